"""Promise: image features are computed once, into a file that is right, whole and reproducible;
another file is refused."""

import errno
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
from helpers import BACKBONE, DATA, PARAMS, ROOT, build, refuses, standing_in, store_clip
from helpers.extracting import CHUNK, PER_IMAGE, Counting, Stop, extract, stepping
from helpers.processes import Python

from fpl.data import encoders as clips
from fpl.data import extraction, features, seen
from fpl.data import files as disk
from fpl.data import world as drawn
from fpl.data.manifest import read_manifest
from fpl.experiments import records, runner
from fpl.prompts import PromptTree

KEYS = ["model", "architecture", "weights", "transform", "data", "manifest", "pictures"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with standing_in(build(tmp_path_factory.mktemp("world"))) as folder:
        yield folder


@pytest.fixture(params=features.CONTENT)
def content(request):
    return request.param


@pytest.fixture(scope="module")
def manifest(world):
    return read_manifest(world / DATA.folder / "manifest.csv")


@pytest.fixture(scope="module")
def tower(world):
    return clips.load(BACKBONE.name)


@pytest.fixture
def chunked(monkeypatch):
    """Batches and chunks of 32 images, or 16 with two views each."""
    monkeypatch.setattr(extraction, "CHUNK", CHUNK)
    monkeypatch.setitem(extraction.BATCH, "cpu", CHUNK)


@pytest.fixture(scope="module")
def files(manifest, tower, tmp_path_factory):
    """What it holds -> a file that nobody disturbed."""
    folder = tmp_path_factory.mktemp("files")
    return {
        content: extract(manifest, tower, folder / f"{content}.h5", content)
        for content in features.CONTENT
    }


def interrupted(manifest, tower, path, image, content="feats"):
    """An extraction that stops at an image, counted from 0; the transform is asked for its size
    with a blank one first."""
    with pytest.raises(Stop):
        extract(manifest, stepping(tower, Counting(image * PER_IMAGE[content] + 1)), path, content)


@pytest.mark.parametrize(
    ("content", "shape"), [("feats", (32,)), ("patches", (4, 32)), ("views", (2, 32))]
)
def test_layout(content, shape, files, manifest, tower):
    numbers = [
        i for i, row in enumerate(manifest.rows) if content != "views" or row["split"] == "train"
    ]
    rows = [manifest.rows[i] for i in numbers]
    with h5py.File(files[content]) as f:
        columns = {content, "labels", "split", "domain", "image_id", "classes"}
        assert set(f) == columns | ({"rows"} if content == "views" else set())
        assert (
            content != "views"
            or f["rows"][:].tolist() == numbers
            and 0 < len(numbers) < len(manifest.rows)
        )
        assert (f[content].shape, f[content].dtype) == ((len(rows), *shape), np.float16)
        assert f["labels"].dtype == np.int64 and f["labels"][:].tolist() == [
            int(row["label"]) for row in rows
        ]
        for name, column in (("split", "split"), ("domain", "domain"), ("image_id", "path")):
            assert f[name].asstr()[:].tolist() == [row[column] for row in rows]
        assert f["classes"].asstr()[:].tolist() == drawn.WORLDS["shapes"].classes
        made = json.loads(f.attrs["provenance"])
        of_views = {"views": "2 random crops and flips, seed 0"} if content == "views" else {}
        asked = features.provenance(manifest, tower, content) | of_views
        assert set(asked) == {*KEYS, "libraries", "content", "skipped", *of_views}
        shown = seen.summary(seen.look(manifest, {}))
        assert made == {**asked, "images": shown, "precision": "fp32 on cpu", "batch": "64"}
        assert made["content"] == content and made["skipped"] == "none"
        total = hashlib.sha256(f.attrs["provenance"].encode())
        for name in sorted(f):
            total.update(json.dumps([name, f[name].dtype.str, f[name].shape]).encode())
            total.update(
                f[name][:].tobytes() if f[name].dtype != object else b"\0".join(f[name][:])
            )
        assert f.attrs["sha256"] == total.hexdigest()


def encoded(manifest, tower):
    """The image features by the model itself, without `fpl.data.extraction`."""
    pixels = [
        tower.transform(PIL.Image.open(manifest.folder / row["path"]).convert("RGB"))
        for row in manifest.rows
    ]
    return torch.nn.functional.normalize(tower.model.encode_image(torch.stack(pixels)), dim=-1)


@pytest.mark.parametrize("name", ["clip", f"{ROOT}/data/demo_clip"], ids=["random", "demo"])
def test_values_are_those_of_the_model(name, manifest, tmp_path):
    tower = clips.load(f"local-dir:{name}")
    own, loaded = (
        encoded(manifest, tower),
        features.load(extraction.extract(manifest, tower, tmp_path / "f.h5")),
    )
    assert loaded.feats.dtype == torch.float32
    torch.testing.assert_close(loaded.feats.norm(dim=-1), torch.ones(len(own)), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        loaded.feats, own, rtol=2**-10, atol=1e-6
    )  # half precision has 11 digits


def test_predictions_are_those_of_the_model(manifest, tmp_path):
    """On a trained model: half-precision storage flips none of them."""
    tower = clips.load(f"local-dir:{ROOT}/data/demo_clip")
    loaded = features.load(extraction.extract(manifest, tower, tmp_path / "f.h5"))
    text = PromptTree(tower, loaded.classes, 1).zero_shot()
    predicted = (loaded.feats @ text.T).argmax(1)
    assert torch.equal(predicted, (encoded(manifest, tower) @ text.T).argmax(1))
    assert len(predicted.unique()) > 20


@pytest.mark.parametrize("key", KEYS)
def test_another_request_is_refused_with_both_values(key, content, files, manifest, tower):
    """Also that of the pooled features for their patches and views, which is but for the content
    the same."""
    made, request = (
        features.provenance(manifest, tower, content),
        features.provenance(manifest, tower),
    )
    assert (
        features.load(files[content], request, content=content).provenance.items() >= made.items()
    )
    with pytest.raises(ValueError) as refused:
        features.load(files[content], {**request, key: "something else"}, content=content)
    assert all(
        part in str(refused.value)
        for part in (str(files[content]), key, repr(made[key]), "'something else'")
    )


def test_how_it_was_computed_is_no_request(content, files, manifest, tower):
    """Patches from a laptop go with pooled features from a GPU."""
    request = features.provenance(manifest, tower) | {"precision": "fp16 on cuda", "batch": "256"}
    assert features.load(files[content], request, content=content).provenance["batch"] == "64"


def test_other_weights_and_another_manifest_are_another_request(world, manifest, tower, tmp_path):
    store_clip(tmp_path / "clip", seed=1)
    other = clips.load(f"local-dir:{tmp_path}/clip")
    assert (
        other.provenance["weights"] != tower.provenance["weights"]
        and other.provenance["transform"] == tower.provenance["transform"]
    )
    second = read_manifest(
        drawn.make(tmp_path / "shapes", seed=2, train_per_class=1, test_per_class=1)
    )
    assert (
        features.provenance(second, tower)["manifest"]
        != features.provenance(manifest, tower)["manifest"]
    )


def never(*arguments, **named):
    raise AssertionError("HDF5 was asked to open a damaged file")


def test_a_flipped_byte_is_noticed_before_hdf5_opens_the_file(
    content, files, tmp_path, monkeypatch
):
    """Which could crash."""
    raw, path = files[content].read_bytes(), tmp_path / "flipped.h5"
    with monkeypatch.context() as patch:
        patch.setattr(h5py, "File", never)
        for position in {*range(0, 600, 23), *range(0, len(raw), 211), len(raw) - 1}:
            path.write_bytes(raw[:position] + bytes([raw[position] ^ 8]) + raw[position + 1 :])
            refuses(lambda: features.load(path, content=content), [f"{path} is damaged"])
            assert features.header(path) == ({}, [])
    path.write_bytes(raw + b"more")
    refuses(lambda: features.load(path, content=content), [f"{path} is damaged"])


def put(name, *arguments, **named):
    """Replace a dataset by another one."""

    def change(f):
        there = f[name]
        rest = named or {"data": there[:].astype(arguments[0])}
        del f[name]
        f.create_dataset(name, **rest)

    return change


def link(name, to):
    def change(f):
        del f[name]
        f[name] = to

    return change


def virtual(f):
    layout = h5py.VirtualLayout((90,), "i8")
    layout[:] = h5py.VirtualSource("elsewhere.h5", "x", (90,))
    del f["labels"]
    f.create_virtual_dataset("labels", layout)


NO_FEATURES_FILE = {
    "numbers of another type": put("feats", "u2"),
    "labels of another type": put("labels", "f8"),
    "labels in other bytes": put("labels", ">i8"),
    "numbers for text": put("split", data=np.zeros(90)),
    "too few": put("domain", data=["photo"] * 143),
    "another shape": put("labels", data=np.zeros((90, 1), "i8")),
    "packed numbers": put("labels", data=np.zeros(90, "i8"), compression="gzip"),
    "no numbers, only their shape": put("labels", shape=(90,), dtype="i8"),
    "bytes of another file": put(
        "labels", shape=(90,), dtype="i8", external=[("elsewhere", 0, 720)]
    ),
    "a link to another file": link("labels", h5py.ExternalLink("elsewhere.h5", "x")),
    "a link within": link("domain", h5py.SoftLink("/split")),
    "numbers put together from another file": virtual,
    "a column more": lambda f: f.create_dataset("more", data=1),
    "a column less": lambda f: f.__delitem__("domain"),
    "a group": lambda f: (f.__delitem__("domain"), f.create_group("domain")),
    "provenance that is none": lambda f: f.attrs.__setitem__("provenance", "[]"),
}


@pytest.mark.parametrize("case", NO_FEATURES_FILE)
def test_columns_have_their_types_and_shapes_and_lie_in_the_file(case, files, tmp_path):
    """Whoever sealed the file."""
    path = shutil.copy(files["feats"], tmp_path / "f.h5")
    with h5py.File(path, "r+") as f:
        NO_FEATURES_FILE[case](f)
    refuses(lambda: features.load(path), [f"{path} is damaged, or an older version"])
    features.seal(path)
    refuses(lambda: features.load(path), [f"{path} is damaged, it ", "`fpl features`"])


def test_the_checksum_covers_names_types_and_shapes(tmp_path):
    """Of the same bytes."""
    numbers = np.arange(6, dtype="f2")
    kinds = [("a", numbers), ("b", numbers), ("a", numbers.view("u2")), ("a", numbers[:, None])]
    sums = set()
    for name, data in kinds:
        with h5py.File(tmp_path / "x", "w") as f:
            f.attrs["provenance"] = "{}"
            f[name] = data
            sums.add(features.digest(f))
    assert len(sums) == len(kinds)


LOCKS = {
    "in use by another program": BlockingIOError(),
    "": OSError(errno.ENOLCK, "No locks available"),
}


@pytest.mark.parametrize("said", LOCKS)
def test_a_file_in_use_is_not_damaged(said, manifest, tower, files, monkeypatch):
    """And where a file system has no locks, all is as elsewhere."""

    def flock(*arguments):
        raise LOCKS[said]

    monkeypatch.setattr(features.fcntl, "flock", flock)
    if said:
        for call in (features.load, features.header):
            with pytest.raises(OSError, match=said) as refused:
                call(files["feats"])
            assert "damaged" not in str(refused.value)
    else:
        with pytest.warns(UserWarning, match="has no locks"), disk.file_lock("a.lock"):
            assert len(features.load(files["feats"]).labels) == len(manifest.rows)


@pytest.mark.parametrize("size", [0, 100, 5000, -1])
def test_a_cut_file_is_refused(size, content, files, tmp_path):
    path = tmp_path / "cut.h5"
    path.write_bytes(files[content].read_bytes()[:size])
    with pytest.raises(ValueError, match="is damaged"):
        features.load(path, content=content)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_features_that_are_not_finite_are_refused(
    bad, content, manifest, tower, tmp_path, monkeypatch
):
    encode, numbers = extraction.image_features, extraction.images_of(manifest, content)

    def broken(clip, x, content):
        out = encode(clip, x, content)
        if len(out) == 64:
            out[[7 * PER_IMAGE[content], 20 * PER_IMAGE[content]], ..., 3] = bad
        return out

    monkeypatch.setattr(extraction, "image_features", broken)
    path = extract(manifest, tower, tmp_path / "f.h5", content)
    with pytest.raises(ValueError) as refused:
        features.load(path, content=content)
    assert str(path) in str(refused.value) and manifest.rows[numbers[7]]["path"] in str(
        refused.value
    )
    assert manifest.rows[numbers[20]]["path"] not in str(refused.value)


@pytest.mark.parametrize(
    "settings",
    [{}, {"workers": 2}, {"devices": ("cpu",)}, {"workers": 1, "devices": ("cpu", "cpu")}],
    ids=str,
)
def test_repeating_gives_the_same_bytes(settings, content, manifest, tower, files, tmp_path):
    """Whoever decodes the images, and however many devices (here all the CPU) take turns."""
    path, whole = tmp_path / "again.h5", files[content].read_bytes()
    for _ in range(2):
        assert extract(manifest, tower, path, content, **settings).read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == ["again.h5"]


def test_every_device_takes_its_turn(chunked, manifest, tower, tmp_path, monkeypatch):
    encode, used = extraction.encode, []
    monkeypatch.setattr(
        extraction, "encode", lambda clip, *rest: (used.append(clip.model), encode(clip, *rest))[1]
    )
    extract(manifest, tower, tmp_path / "f.h5", "feats", devices=("cpu", "cpu"))
    models = list(dict.fromkeys(used))
    assert len(models) == 3 and models[0] is tower.model
    assert used == [
        models[0],
        *[models[i % 3] for i in range(5)],
    ]  # the width is asked of the first, then 90 images in 20s


@pytest.mark.parametrize(("room", "size"), [(1000, 256), (256, 256), (255, 128), (40, 32), (1, 1)])
def test_the_batch_is_what_memory_suffices_for(room, size, tower, monkeypatch):
    tried = []

    def limited(clip, x, content):
        tried.append(len(x))
        if len(x) > room:
            raise torch.OutOfMemoryError
        return x[:, 0, 0, :1]

    monkeypatch.setattr(extraction, "image_features", limited)
    assert extraction.largest_batch([tower, tower], "feats", (3, 2, 2)) == size
    assert tried[-2:] == [size, size]  # the last device too, with a batch waiting


def test_no_room_for_one_image_is_said(tower, monkeypatch):
    def full(clip, x, content):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(extraction, "image_features", full)
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        extraction.largest_batch([tower], "feats", (3, 2, 2))


def test_going_on_keeps_the_size_of_the_batches(
    content, chunked, manifest, tower, tmp_path, monkeypatch
):
    """Also where a new measurement of the memory would give another."""
    path, whole = (
        tmp_path / "f.h5",
        extract(manifest, tower, tmp_path / "whole.h5", content).read_bytes(),
    )
    interrupted(manifest, tower, path, 38, content)
    monkeypatch.setitem(extraction.BATCH, "cpu", 7)
    assert extract(manifest, tower, path, content).read_bytes() == whole
    assert features.load(path, content=content).provenance["batch"] == str(CHUNK)


@pytest.mark.parametrize("image", [0, 5, CHUNK, 44, 59])
def test_an_exception_loses_only_the_chunk_under_way(
    image, content, chunked, manifest, tower, tmp_path
):
    path, whole = (
        tmp_path / "f.h5",
        extract(manifest, tower, tmp_path / "whole.h5", content).read_bytes(),
    )
    interrupted(manifest, tower, path, image, content)
    assert not path.exists()
    counting, each = Counting(), PER_IMAGE[content]
    extract(manifest, stepping(tower, counting), path, content)
    assert path.read_bytes() == whole
    chunk = CHUNK // each
    assert counting.calls == 1 + each * (
        len(extraction.images_of(manifest, content)) - image // chunk * chunk
    )


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch", [0, 1, 3, 4])
def test_an_interrupted_batch_is_made_again(
    batch, workers, content, chunked, manifest, tower, tmp_path, monkeypatch
):
    path, whole = (
        tmp_path / "f.h5",
        extract(manifest, tower, tmp_path / "whole.h5", content).read_bytes(),
    )
    encode, calls = extraction.encode, iter(range(100))

    def stopping(*arguments):
        if next(calls) == batch + 1:  # the width is asked for first
            raise KeyboardInterrupt
        return encode(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(extraction, "encode", stopping)
        with pytest.raises(KeyboardInterrupt):
            extract(manifest, tower, path, content, workers=workers)
    again = Counting()
    assert extract(manifest, stepping(tower, again), path, content).read_bytes() == whole
    assert (
        again.calls
        == 1 + PER_IMAGE[content] * len(extraction.images_of(manifest, content)) - batch * CHUNK
    )


KILLER = """
import os, pathlib, signal, sys
import torch
from fpl.data import encoders, extraction
from fpl.data.manifest import read_manifest
from helpers import BACKBONE, DATA
from helpers.extracting import CHUNK, extract, stepping

torch.set_num_threads(1)
torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.1  # workers find their parent gone
content, workers, events = sys.argv[1], int(sys.argv[2]), 0
extraction.CHUNK = extraction.BATCH["cpu"] = CHUNK
tower = encoders.load(BACKBONE.name)
manifest = read_manifest(DATA.folder / "manifest.csv")

def killed_at(moment, call):
    def counted(*args, **kwargs):
        global events
        if events == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        events += 1
        return call(*args, **kwargs)
    return counted

def status_when_killed_at(moment):
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        on_disk = ((os, "replace"), (os, "fsync"), (pathlib.Path, "unlink"))
        for owner, name in (*on_disk, (extraction, "encode")):
            setattr(owner, name, killed_at(moment, getattr(owner, name)))
        killable = stepping(tower, killed_at(moment, lambda image: image))
        path = pathlib.Path(f"killed/{content}{workers}/{moment}/f.h5")
        extract(manifest, killable, path, content, workers=workers)
        pathlib.Path(f"events_{content}{workers}").write_text(str(events))
        os._exit(0)
    finally:
        os._exit(1)  # a worker was killed

print(-1, status_when_killed_at(-1), flush=True)
total = int(pathlib.Path(f"events_{content}{workers}").read_text())
moments = {0, 1, 2, 4, 9, 14, 41, 42, 43, 90, *range(total - 7, total, 2), total - 2}
for moment in sorted(moments & set(range(total))):
    print(moment, status_when_killed_at(moment), flush=True)
"""


@pytest.mark.parametrize(("content", "workers"), [("feats", 0), ("views", 0), ("feats", 2)])
def test_kill_at_any_moment_and_go_on(content, workers, chunked, world, manifest, tower, tmp_path):
    """Moments are calls: to the transform (in a worker, if there are), to the tower, and of what
    flushes, renames, removes."""
    process = Python(world, "-c", KILLER, content, str(workers))
    out, err = process.communicate()
    codes = {int(moment): int(code) for moment, code in (line.split() for line in out.splitlines())}
    assert codes.pop(-1) == 0 and len(codes) > 9, err
    assert set(codes.values()) <= {-signal.SIGKILL, 1 if workers else -signal.SIGKILL}, err
    whole = extract(manifest, tower, tmp_path / "whole.h5", content).read_bytes()
    for moment in codes:
        path = world / f"killed/{content}{workers}/{moment}/f.h5"
        assert extract(manifest, tower, path, content).read_bytes() == whole, (
            f"killed at moment {moment}"
        )
        assert [other.name for other in path.parent.iterdir()] == ["f.h5"]


def test_the_partial_file_of_another_request_is_not_continued(
    content, chunked, manifest, tower, tmp_path
):
    store_clip(tmp_path / "clip", seed=1)
    other, path = clips.load(f"local-dir:{tmp_path}/clip"), tmp_path / "f.h5"
    rest = next(name for name in features.CONTENT if name != content)
    requests = {"ours": (tower, content), "other": (other, content), "rest": (tower, rest)}

    def make(name, to):
        return extract(manifest, requests[name][0], to, requests[name][1]).read_bytes()

    whole = {name: make(name, tmp_path / f"{name}.h5") for name in requests}
    assert len(set(whole.values())) == 3
    for name in ("other", "rest"):
        interrupted(manifest, tower, path, 50, content)
        assert make(name, path) == whole[name]
        interrupted(manifest, tower, path, 50, content)
        interrupted(
            manifest, requests[name][0], path, 5, requests[name][1]
        )  # has begun its own, but finished no chunk of it
        assert make("ours", path) == whole["ours"]


@pytest.mark.parametrize(
    "header", ["path,label,class,split,domain", "client,path,domain,label,class,split,camera"]
)
def test_the_client_column_is_kept_where_there_is_one(header, content, tower, tmp_path):
    """Other columns are no matter, and neither is their order."""
    rows = []
    for i in range(4):
        PIL.Image.new("RGB", (32, 32), (60 * i, 0, 0)).save(tmp_path / f"{i}.png")
        row = {
            "path": f"{i}.png",
            "label": "0",
            "class": "dot",
            "split": ("train", "test")[i % 2],
            "domain": "photo",
        }
        rows.append(row | {"client": f"clinic {i // 2}", "camera": "x"})
    lines = [header, *(",".join(row[name] for name in header.split(",")) for row in rows)]
    (tmp_path / "manifest.csv").write_text("\n".join(lines) + "\n")
    manifest = read_manifest(tmp_path / "manifest.csv")
    loaded = features.load(extract(manifest, tower, tmp_path / "f.h5", content), content=content)
    if "client" in header:
        assert loaded.client.tolist() == [
            rows[i]["client"] for i in extraction.images_of(manifest, content)
        ]
    else:
        assert loaded.client is None
    assert set(loaded.split) == ({"train"} if content == "views" else {"train", "test"})


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
        [path] = runner.sweep([PARAMS.experiment(row, 1)])
        assert len(records.frame([path])) == PARAMS.partition.clients * len(
            json.loads(path.read_text())["rounds"]
        )
