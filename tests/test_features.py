"""Promise: image features are computed once, into a file that is right, whole and reproducible; another file is refused."""

import dataclasses
import gc
import hashlib
import json
import shutil
import signal

import h5py
import numpy as np
import open_clip
import PIL.Image
import pytest
import torch
from helpers import BACKBONE, DATA, PARAMS, ROOT, build, python, standing_in, store_clip

from fpl import clip as clips
from fpl import features, shapes, sweep

CHUNK = 32
KEYS = ["model", "weights", "transform", "manifest"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with standing_in(build(tmp_path_factory.mktemp("world"))) as folder:
        yield folder


@pytest.fixture(params=features.CONTENT)
def content(request):
    return request.param


@pytest.fixture(scope="module")
def manifest(world):
    return features.read_manifest(world / DATA.folder / "manifest.csv")


@pytest.fixture(scope="module")
def tower(world):
    return clips.load(BACKBONE.name)


@pytest.fixture
def chunked(monkeypatch):
    monkeypatch.setattr(features, "CHUNK", CHUNK)


@pytest.fixture(scope="module")
def files(manifest, tower, tmp_path_factory):
    """What it holds -> a file that nobody disturbed."""
    folder = tmp_path_factory.mktemp("files")
    return {content: features.extract(manifest, tower, folder / f"{content}.h5", content=content) for content in features.CONTENT}


class Stop(Exception):
    """The interruption."""


class Counting:
    """The model's transform; counts its images and stops at one of them."""

    def __init__(self, transform, stop_at=None):
        self.transform, self.stop_at, self.calls = transform, stop_at, 0

    def __call__(self, image):
        if self.calls == self.stop_at:
            raise Stop
        self.calls += 1
        return self.transform(image)


def interrupted(manifest, tower, path, image, content="feats"):
    """An extraction that stops at an image, counted from 0; the model is asked for its width with a blank one first."""
    counting = Counting(tower.transform, image + 1)
    with pytest.raises(Stop):
        features.extract(manifest, dataclasses.replace(tower, transform=counting), path, content=content)


@pytest.mark.parametrize(("content", "shape"), [("feats", (32,)), ("patches", (4, 32))])
def test_layout(content, shape, files, manifest, tower):
    rows = manifest.rows
    with h5py.File(files[content]) as f:
        assert set(f) == {content, "labels", "split", "domain", "image_id", "classes"}
        assert (f[content].shape, f[content].dtype) == ((len(rows), *shape), np.float16)
        assert f["labels"].dtype == np.int64 and f["labels"][:].tolist() == [int(row["label"]) for row in rows]
        for name, column in (("split", "split"), ("domain", "domain"), ("image_id", "path")):
            assert f[name].asstr()[:].tolist() == [row[column] for row in rows]
        assert f["classes"].asstr()[:].tolist() == shapes.CLASSES
        made = json.loads(f.attrs["provenance"])
        assert made == features.provenance(manifest, tower, content) and set(made) == {*KEYS, "libraries", "content"}
        assert made["content"] == content
        total = hashlib.sha256(f.attrs["provenance"].encode())
        for name in sorted(f):
            total.update(f[name][:].tobytes() if f[name].dtype != object else b"\0".join(f[name][:]))
        assert f.attrs["sha256"] == total.hexdigest()


def encoded(manifest, tower):
    """The image features by the model itself, without `fpl.features`."""
    pixels = [tower.transform(PIL.Image.open(manifest.folder / row["path"]).convert("RGB")) for row in manifest.rows]
    return torch.nn.functional.normalize(tower.model.encode_image(torch.stack(pixels)), dim=-1)


@pytest.mark.parametrize("name", ["clip", f"{ROOT}/data/demo_clip"], ids=["random", "demo"])
def test_values_are_those_of_the_model(name, manifest, tmp_path):
    tower = clips.load(f"local-dir:{name}")
    own, loaded = encoded(manifest, tower), features.load(features.extract(manifest, tower, tmp_path / "f.h5"))
    assert loaded.feats.dtype == torch.float32
    torch.testing.assert_close(loaded.feats.norm(dim=-1), torch.ones(len(own)), rtol=0, atol=1e-6)
    torch.testing.assert_close(loaded.feats, own, rtol=2**-10, atol=1e-6)  # half precision has 11 digits


def test_predictions_are_those_of_the_model(manifest, tmp_path):
    """On a trained model: half-precision storage flips none of them."""
    tower = clips.load(f"local-dir:{ROOT}/data/demo_clip")
    loaded = features.load(features.extract(manifest, tower, tmp_path / "f.h5"))
    text = clips.Text(tower, loaded.classes, 1).zero_shot()
    predicted = (loaded.feats @ text.T).argmax(1)
    assert torch.equal(predicted, (encoded(manifest, tower) @ text.T).argmax(1))
    assert len(predicted.unique()) > 30


@pytest.mark.parametrize("key", KEYS)
def test_another_request_is_refused_with_both_values(key, content, files, manifest, tower):
    """Also that of the pooled features for their patches, which is but for the content the same."""
    made, request = features.provenance(manifest, tower, content), features.provenance(manifest, tower)
    assert features.load(files[content], request, content=content).provenance == made
    with pytest.raises(ValueError) as refused:
        features.load(files[content], {**request, key: "something else"}, content=content)
    assert all(part in str(refused.value) for part in (str(files[content]), key, repr(made[key]), "'something else'"))


def test_other_weights_and_another_manifest_are_another_request(world, manifest, tower, tmp_path):
    store_clip(tmp_path / "clip", seed=1)
    other = clips.load(f"local-dir:{tmp_path}/clip")
    assert (
        other.provenance["weights"] != tower.provenance["weights"]
        and other.provenance["transform"] == tower.provenance["transform"]
    )
    second = features.read_manifest(shapes.make(tmp_path / "shapes", seed=2, train_per_class=1, test_per_class=1))
    assert features.provenance(second, tower)["manifest"] != features.provenance(manifest, tower)["manifest"]


def test_a_flipped_byte_changes_nothing_unnoticed(content, files, tmp_path):
    good, raw, path = features.load(files[content], content=content), files[content].read_bytes(), tmp_path / "flipped.h5"
    with h5py.File(files[content]) as f:
        begin = f[content].id.get_offset()
        values = {
            begin,
            begin + f[content].nbytes - 1,
            f["labels"].id.get_offset(),
            raw.index(b"plain circle"),
            raw.index(b'"weights"'),
        }
    for position in sorted(values | set(range(0, len(raw), 211))):
        path.write_bytes(raw[:position] + bytes([raw[position] ^ 8]) + raw[position + 1 :])
        try:
            found = features.load(path, content=content)
        except ValueError as error:
            assert f"{path} is damaged" in str(error) and "\n" not in str(error)
            continue
        assert position not in values, f"byte {position} is content, and its change went unnoticed"
        for name in ("feats", "labels"):
            assert torch.equal(getattr(found, name), getattr(good, name)), f"byte {position} changes {name}"
        for name in ("split", "domain", "classes", "provenance"):
            assert np.array_equal(getattr(found, name), getattr(good, name)), f"byte {position} changes {name}"


@pytest.mark.parametrize("size", [0, 100, 5000, -1])
def test_a_cut_file_is_refused(size, content, files, tmp_path):
    path = tmp_path / "cut.h5"
    path.write_bytes(files[content].read_bytes()[:size])
    with pytest.raises(ValueError, match="is damaged"):
        features.load(path, content=content)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_features_that_are_not_finite_are_refused(bad, content, manifest, tower, tmp_path, monkeypatch):
    encode = features.CONTENT[content]

    def broken(clip, x):
        out = encode(clip, x)
        if len(out) > 40:
            out[[7, 40], ..., 3] = bad
        return out

    monkeypatch.setitem(features.CONTENT, content, broken)
    path = features.extract(manifest, tower, tmp_path / "f.h5", content=content)
    with pytest.raises(ValueError) as refused:
        features.load(path, content=content)
    assert str(path) in str(refused.value) and manifest.rows[7]["path"] in str(refused.value)
    assert manifest.rows[40]["path"] not in str(refused.value)


def test_repeating_gives_the_same_bytes(content, manifest, tower, files, tmp_path):
    path, whole = tmp_path / "again.h5", files[content].read_bytes()
    for _ in range(2):
        assert features.extract(manifest, tower, path, content=content).read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == ["again.h5"]


@pytest.mark.parametrize("image", [0, 5, CHUNK, 100, 143])
def test_an_exception_loses_only_the_chunk_under_way(image, content, chunked, manifest, tower, tmp_path):
    path, whole = tmp_path / "f.h5", features.extract(manifest, tower, tmp_path / "whole.h5", content=content).read_bytes()
    interrupted(manifest, tower, path, image, content)
    assert not path.exists()
    counting = Counting(tower.transform)
    features.extract(manifest, dataclasses.replace(tower, transform=counting), path, content=content)
    assert path.read_bytes() == whole
    blank = image < CHUNK  # nothing was finished: all from the beginning
    assert counting.calls == len(manifest.rows) - image // CHUNK * CHUNK + blank


KILLER = """
import dataclasses, os, pathlib, shutil, signal, sys
import numpy, torch
from fpl import clip, features
from helpers import BACKBONE, DATA

torch.set_num_threads(1)
features.CHUNK, content, events = int(sys.argv[1]), sys.argv[2], 0
tower = clip.load(BACKBONE.name)
manifest = features.read_manifest(DATA.folder / "manifest.csv")

def killed_at(moment, call):
    def counted(*args, **kwargs):
        global events
        if events == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        events += 1
        return call(*args, **kwargs)
    return counted

def extract(moment):
    for owner, name in ((os, "replace"), (shutil, "copyfile"), (pathlib.Path, "unlink"), (numpy.memmap, "flush")):
        setattr(owner, name, killed_at(moment, getattr(owner, name)))
    killable = dataclasses.replace(tower, transform=killed_at(moment, tower.transform))
    features.extract(manifest, killable, pathlib.Path(f"killed/{content}{moment}/f.h5"), content=content)

for moment in [int(word) for word in sys.argv[3:]]:
    child = os.fork()
    if not child:
        extract(moment)
        print(events, flush=True)
        os._exit(0)
    print(moment, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_kill_at_any_moment_and_go_on(content, chunked, world, manifest, tower, tmp_path):
    """Moments are calls: to the transform (145), and what writes: flush and rename of every chunk, copy, rename, removals."""
    moments = [0, 1, 20, 34, 35, 36, 37, 90, *range(158, 170)]
    process = python(world, "-c", KILLER, str(CHUNK), content, *map(str, moments))
    out, err = process.communicate()
    lines = [[int(word) for word in line.split()] for line in out.splitlines()]
    codes = dict(line for line in lines if len(line) == 2)
    (total,) = {line[0] for line in lines if len(line) == 1}  # how many moments there are; later ones were never reached
    assert codes == {m: -signal.SIGKILL if m < total else 0 for m in moments}, err
    assert 160 < total < 170, "the list above no longer reaches the end: adapt it"
    whole = features.extract(manifest, tower, tmp_path / "whole.h5", content=content).read_bytes()
    for moment in moments:
        path = world / f"killed/{content}{moment}/f.h5"
        assert features.extract(manifest, tower, path, content=content).read_bytes() == whole, f"killed at moment {moment}"
        assert [other.name for other in path.parent.iterdir()] == ["f.h5"]


def test_the_partial_file_of_another_request_is_not_continued(content, chunked, manifest, tower, tmp_path):
    store_clip(tmp_path / "clip", seed=1)
    other, path = clips.load(f"local-dir:{tmp_path}/clip"), tmp_path / "f.h5"
    requests = {"ours": (tower, content), "other": (other, content), "rest": (tower, *({*features.CONTENT} - {content}))}
    make = lambda name, to: features.extract(manifest, requests[name][0], to, content=requests[name][1]).read_bytes()  # noqa: E731
    whole = {name: make(name, tmp_path / f"{name}.h5") for name in requests}
    assert len(set(whole.values())) == 3
    for name in ("other", "rest"):
        interrupted(manifest, tower, path, 100, content)
        assert make(name, path) == whole[name]
        interrupted(manifest, tower, path, 100, content)
        interrupted(manifest, requests[name][0], path, 5, requests[name][1])  # has begun its own, but finished no chunk of it
        assert make("ours", path) == whole["ours"]


DAMAGE = {
    "missing": lambda path, raw: path.unlink(),
    "empty": lambda path, raw: path.write_bytes(b""),
    "no image": lambda path, raw: path.write_bytes(b"this is not an image"),
    "cut": lambda path, raw: path.write_bytes(raw[: len(raw) // 2]),
    "broken chunk": lambda path, raw: path.write_bytes(raw.replace(b"IDAT", b"ID\x01T")),
    "broken header": lambda path, raw: path.write_bytes(raw[:8] + b"\0\0\0\4" + raw[12:]),
}


@pytest.mark.parametrize(("damage", "workers"), [*((name, 0) for name in DAMAGE), ("cut", 1)])
def test_an_unreadable_image_is_named(damage, workers, tower, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)  # or PyTorch waits 5 s for a worker that failed
    lines = ["path,label,class,split,domain"]
    for i in range(3):
        PIL.Image.new("RGB", (32, 32), (i, i, i)).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,0,plain circle,train,photo")
    (tmp_path / "manifest.csv").write_text("\n".join(lines) + "\n")
    path = tmp_path / "1.png"
    DAMAGE[damage](path, path.read_bytes())
    with pytest.raises(OSError) as error:
        features.extract(features.read_manifest(tmp_path / "manifest.csv"), tower, tmp_path / "f.h5", workers=workers)
    message = str(error.value)
    assert message.startswith(f"cannot read image {path}: ") and "\n" not in message
    assert not (tmp_path / "f.h5").exists()
    del error
    gc.collect()  # ends the worker


@pytest.mark.parametrize("row", ["zeroshot", "ridge_own", "promptfl", "pfedmoap"])
def test_after_extraction_nothing_opens_an_image(row, world, tmp_path, monkeypatch):
    shutil.copytree("clip", tmp_path / "clip")
    shutil.copytree(DATA.features.parent, tmp_path / DATA.features.parent)

    def fail(*args, **kwargs):
        raise AssertionError("an image was opened or encoded")

    monkeypatch.setattr(PIL.Image, "open", fail)
    monkeypatch.setattr(open_clip.transformer.VisionTransformer, "forward", fail)
    with standing_in(tmp_path):
        assert not DATA.folder.exists()
        path = tmp_path / "record.json"
        sweep.perform(DATA, BACKBONE, PARAMS.experiment(row, 1), path)
        assert len(sweep.frame([path])) == PARAMS.partition.clients * len(json.loads(path.read_text())["rounds"])
