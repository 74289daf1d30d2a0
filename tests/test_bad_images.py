"""Promise: images that cannot be read are listed together at the end; what was encoded is kept, and
they can be left out."""

import dataclasses

import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from helpers import DATA, build, standing_in, store_clip
from helpers.extracting import PER_IMAGE, Counting, Stop, extract, stepping

from fpl import cli
from fpl.data import encoders as clips
from fpl.data import extraction, features, seen
from fpl.data.manifest import read_manifest

N, BAD = 22, [1, 2, 9, 17, 21]  # in batches of 4, or of 2 images with two views


@pytest.fixture(params=features.CONTENT)
def content(request):
    return request.param


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    store_clip(folder)
    return clips.load(f"local-dir:{folder}")


@pytest.fixture
def manifest(tmp_path, monkeypatch):
    """Noise in PNG files; every third image is for testing."""
    monkeypatch.setitem(extraction.BATCH, "cpu", 4)
    monkeypatch.setattr(extraction, "CHUNK", 4)
    monkeypatch.setattr(extraction, "PIECE", 3)
    lines, rng = ["path,label,class,split,domain,client"], np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(N):
        PIL.Image.fromarray(rng.integers(0, 256, (40, 32, 3), dtype="uint8")).save(
            tmp_path / f"images/{i}.png"
        )
        lines.append(
            f"images/{i}.png,{i % 2},{'ab'[i % 2]},"
            f"{'test' if i % 3 == 0 else 'train'},photo,{i // 8}"
        )
    (tmp_path / "manifest.csv").write_text("\n".join(lines) + "\n")
    return read_manifest(tmp_path / "manifest.csv")


DAMAGE = {
    "missing": lambda path, raw: path.unlink(),
    "empty": lambda path, raw: path.write_bytes(b""),
    "no image": lambda path, raw: path.write_bytes(b"this is not an image"),
    "cut": lambda path, raw: path.write_bytes(raw[: len(raw) // 2]),
    "broken chunk": lambda path, raw: path.write_bytes(raw.replace(b"IDAT", b"ID\x01T")),
    "broken header": lambda path, raw: path.write_bytes(raw[:8] + b"\0\0\0\4" + raw[12:]),
}


def damage(manifest, numbers):
    """Spoil images, each in another way; how to repair them."""
    before = {}
    for i, kind in zip(numbers, DAMAGE.values()):
        path = manifest.folder / manifest.rows[i]["path"]
        before[path] = path.read_bytes()
        kind(path, before[path])
    return lambda: [path.write_bytes(raw) for path, raw in before.items()]


def names(manifest, numbers):
    return [manifest.rows[i]["path"] for i in numbers]


def listed(manifest, tower, path, content="feats", **settings):
    """The sentence in which an extraction ends."""
    with pytest.raises(OSError) as error:
        extract(manifest, tower, path, content, **settings)
    assert (
        not path.exists() and "\n" not in str(error.value) and "Traceback" not in str(error.value)
    )
    return str(error.value)


@pytest.mark.parametrize("kind", DAMAGE)
def test_an_unreadable_image_is_named_with_the_cause(kind, manifest, tower, tmp_path):
    path = tmp_path / "images/1.png"
    DAMAGE[kind](path, path.read_bytes())
    said = listed(manifest, tower, tmp_path / "f.h5")
    assert (
        said.startswith(f"1 of {N} images cannot be read: {path} (")
        and "()" not in said
        and "--skip-bad" in said
    )


@pytest.mark.parametrize("kind", ["cut", "another"])
@pytest.mark.parametrize("skip_bad", [False, True])
def test_an_image_of_two_clients_that_changes_meanwhile_is_not_stored(
    skip_bad, kind, manifest, tower, tmp_path, monkeypatch
):
    """It is as it should be when it is read for the second."""
    row = manifest.rows[1]
    manifest = dataclasses.replace(manifest, rows=[*manifest.rows, row | {"client": "z"}])
    whole = extract(manifest, tower, tmp_path / "whole.h5", "feats").read_bytes()
    path = tmp_path / row["path"]
    raw = path.read_bytes()
    other = raw[: len(raw) // 2] if kind == "cut" else (tmp_path / "images/2.png").read_bytes()
    path.write_bytes(other)
    read = seen.read

    def mended(name):
        found = read(name)
        if name == path:
            path.write_bytes(raw)
        return found

    monkeypatch.setattr(seen, "read", mended)
    if skip_bad:
        made = extract(manifest, tower, tmp_path / "f.h5", "feats", skip_bad=True)
        assert features.load(made).skipped == [row["path"]]
    else:
        said = listed(manifest, tower, tmp_path / "f.h5")
        assert said.startswith(f"1 of {N + 1} images cannot be read: {path} (")
        assert extract(manifest, tower, tmp_path / "f.h5", "feats").read_bytes() == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_all_are_listed_together(workers, manifest, tower, tmp_path):
    damage(manifest, BAD)
    said = listed(manifest, tower, tmp_path / "f.h5", workers=workers)
    assert said.startswith(f"5 of {N} images cannot be read: ")
    assert [str(tmp_path / name) in said for name in names(manifest, BAD)] == [
        True,
        True,
        True,
        False,
        False,
    ]


def test_the_next_call_encodes_only_those_that_were_repaired(content, manifest, tower, tmp_path):
    """And ends with the bytes of a file whose images were never damaged."""
    path, whole = (
        tmp_path / "f.h5",
        extract(manifest, tower, tmp_path / "whole.h5", content).read_bytes(),
    )
    bad = [i for i in BAD if i in extraction.images_of(manifest, content)]
    assert len(bad) >= 3
    repair_first, repair_rest = damage(manifest, bad[:1]), damage(manifest, bad[1:])
    assert f"{len(bad)} of" in listed(manifest, tower, path, content)
    for repair, repaired in ((repair_rest, len(bad) - 1), (lambda: None, 0)):
        repair()
        counting = Counting()
        assert "1 of" in listed(manifest, stepping(tower, counting), path, content)
        assert counting.calls == 1 + PER_IMAGE[content] * repaired  # one more, to know its size
    repair_first()
    assert extract(manifest, tower, path, content).read_bytes() == whole


@pytest.mark.parametrize("image", [0, 3, 9, 14, 21])
def test_an_interruption_forgets_none(image, manifest, tower, tmp_path):
    path, whole = (
        tmp_path / "f.h5",
        extract(manifest, tower, tmp_path / "whole.h5", "feats").read_bytes(),
    )
    repair = damage(manifest, BAD)

    def stop(picture):
        if picture.tobytes() == spoilt:
            raise Stop
        return picture

    image = min(i for i in range(image, N + 1) if i not in BAD)
    if image < N:
        with PIL.Image.open(tmp_path / f"images/{image}.png") as picture:
            spoilt = picture.tobytes()
        with pytest.raises(Stop):
            extract(manifest, stepping(tower, stop), path, "feats")
    assert f"5 of {N} images" in listed(manifest, tower, path)
    repair()
    assert extract(manifest, tower, path, "feats").read_bytes() == whole


@pytest.mark.parametrize("listed_before", [False, True])
def test_they_can_be_left_out_and_the_file_says_so(
    listed_before, content, manifest, tower, tmp_path
):
    path, again = tmp_path / "f.h5", tmp_path / "again.h5"
    whole = features.load(extract(manifest, tower, tmp_path / "whole.h5", content), content=content)
    numbers = extraction.images_of(manifest, content)
    repair = damage(manifest, BAD)
    if listed_before:
        listed(manifest, tower, path, content)
    extract(manifest, tower, path, content, skip_bad=True)
    assert extract(manifest, tower, again, content, skip_bad=True).read_bytes() == path.read_bytes()
    found, kept = (
        features.load(path, content=content),
        [i for i, number in enumerate(numbers) if number not in BAD],
    )
    gone = [i for i in BAD if i in numbers]
    assert found.skipped == sorted(names(manifest, gone)) and found.provenance[
        "skipped"
    ].startswith(f"{len(gone)} images, ")
    assert torch.equal(found.feats, whole.feats[kept]) and torch.equal(
        found.labels, whole.labels[kept]
    )
    for column in ("split", "domain", "client"):
        assert getattr(found, column).tolist() == getattr(whole, column)[kept].tolist()
    assert found.classes == whole.classes and whole.skipped == []
    repair()
    assert (
        extract(manifest, tower, path, content).read_bytes() == (tmp_path / "whole.h5").read_bytes()
    )


@pytest.mark.parametrize("bad", [[1], BAD])
def test_picture_i_is_the_picture_of_feature_i(bad, content, manifest, tower, tmp_path):
    """Also behind images that were left out: each picture, encoded again, gives the features of its
    row."""
    whole = features.load(extract(manifest, tower, tmp_path / "whole.h5", content), content=content)
    kept = [i for i in extraction.images_of(manifest, content) if i not in bad]
    damage(manifest, bad)
    found = features.load(
        extract(manifest, tower, tmp_path / "f.h5", content, skip_bad=True), content=content
    )
    pictures = features.of_features(manifest, found)
    assert found.image_id.tolist() == names(manifest, kept) and len(kept) < N
    assert pictures.rows == [manifest.rows[i] for i in kept]
    assert [int(row["label"]) for row in pictures.rows] == found.labels.tolist()
    for i, row in enumerate(pictures.rows):
        path = tmp_path / "one" / "manifest.csv"
        alone = dataclasses.replace(manifest, rows=[row])
        own = features.load(extract(alone, tower, path, content), content=content).feats[0]
        own, feature = own.float(), found.feats[i].float()
        others = [
            whole.feats[j].float() for j, name in enumerate(whole.image_id) if name != row["path"]
        ]
        assert (own - feature).norm() < 0.1 * min((own - other).norm() for other in others)


def test_the_pictures_of_other_features_are_refused(manifest, tower, tmp_path):
    found = features.load(extract(manifest, tower, tmp_path / "f.h5", "feats"))
    other = dataclasses.replace(manifest, rows=manifest.rows[::-1])
    with pytest.raises(ValueError, match="lists other images than the features"):
        features.of_features(other, found)


def test_what_is_left_out_makes_no_other_request_of_the_pooled_features(manifest, tower, tmp_path):
    asked = {
        k: v
        for k, v in features.provenance(manifest, tower).items()
        if k in ("model", "weights", "transform", "manifest")
    }
    damage(manifest, BAD)
    path = extract(manifest, tower, tmp_path / "f.h5", "feats", skip_bad=True)
    assert len(features.load(path, asked).labels) == N - len(BAD)


@pytest.mark.parametrize("content", ["patches", "views"])
def test_patches_and_views_must_be_of_the_same_images(content, manifest, tower, tmp_path):
    whole = features.load(extract(manifest, tower, tmp_path / "whole.h5", "feats"))
    damage(manifest, BAD)
    pooled = features.load(extract(manifest, tower, tmp_path / "f.h5", "feats", skip_bad=True))
    path = extract(manifest.without(pooled.skipped), tower, tmp_path / "other.h5", content)
    other = features.load(path, pooled.provenance, content=content)
    rows = torch.arange(len(pooled.labels)) if other.rows is None else other.rows
    assert (
        torch.equal(pooled.labels[rows], other.labels)
        and pooled.client[rows.numpy()].tolist() == other.client.tolist()
    )
    assert (content == "views") == (set(pooled.split[rows.numpy()]) == {"train"})
    with pytest.raises(
        ValueError,
        match="was made with skipped '5 images, .*asked for is 'none': run `fpl features --",
    ):
        asked = {key: value for key, value in whole.provenance.items() if key != "images"}
        features.load(path, asked, content=content)


def test_when_none_is_left_there_is_no_file(content, manifest, tower, tmp_path):
    few = dataclasses.replace(manifest, rows=manifest.rows[1:3])
    damage(few, [0, 1])
    with pytest.raises(
        ValueError, match=r"^no (training )?images in .* but for 2 that cannot be read"
    ):
        extract(few, tower, tmp_path / "f.h5", content, skip_bad=True)
    assert not (tmp_path / "f.h5").exists()


def test_the_tower_is_not_run_over_batches_that_cannot_be_read(
    manifest, tower, tmp_path, monkeypatch
):
    encode, calls = extraction.encode, []
    monkeypatch.setattr(
        extraction, "encode", lambda *arguments: (calls.append(1), encode(*arguments))[1]
    )
    damage(manifest, range(4, 8))
    listed(manifest, tower, tmp_path / "f.h5")
    assert len(calls) == 1 + 5  # the width, and all of the six batches but the second


def test_the_commands(tmp_path, capsys):
    """A bad image stops `fpl features`, --skip-bad leaves it out of all three files, and once it is
    repaired nothing is."""
    build(tmp_path)
    settings = {
        "data": {"train_per_class": 2, "test_per_class": 1},
        "backbone": {"name": "local-dir:clip"},
    }
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(settings))
    with standing_in(tmp_path):
        files = [DATA.file(content) for content in features.CONTENT]
        row = read_manifest(DATA.manifest).rows[0]
        path, whole = DATA.folder / row["path"], DATA.features.read_bytes()
        raw = path.read_bytes()
        path.write_bytes(raw[:60])
        every = ["features", "--patches", "--views", "2", "--workers", "0"]
        for fresh in ([], ["--fresh"]):
            with pytest.raises(SystemExit) as end:
                cli.main([*every, *fresh])
            said = f"fpl features: 1 of 90 images cannot be read: {path} ("
            assert end.value.code.startswith(said)
        assert DATA.features.read_bytes() == whole and not files[1].exists()
        capsys.readouterr()
        cli.main([*every, "--skip-bad", "--fresh"])
        said = [f"features: {file}, without 1 images that cannot be read" for file in files]
        said[0] += ", made again: you ask for it"
        assert capsys.readouterr().out.splitlines() == said
        pooled = features.load(DATA.features)
        assert pooled.skipped == [row["path"]] and len(pooled.labels) == 89
        for content, file in zip(features.CONTENT, files):
            assert (
                features.load(
                    file, pooled.provenance | {"content": content}, content=content
                ).skipped
                == pooled.skipped
            )
        before = [file.stat().st_mtime_ns for file in files]
        cli.main([*every, "--skip-bad"])
        assert [file.stat().st_mtime_ns for file in files] == before
        path.write_bytes(raw)
        cli.main(["features", "--skip-bad"])  # a repaired image is taken up again
        said = f"features: {files[0]}, made again: images have changed (1 of 90)"
        assert capsys.readouterr().out.splitlines()[-1] == said
        assert [features.header(file)[1] for file in files] == [[], [row["path"]], [row["path"]]]
        cli.main([*every, "--skip-bad"])  # they go with the pooled features again
        assert [features.header(file)[1] for file in files] == [[], [], []]
        path.write_bytes(raw[:60])
        cli.main([*every, "--skip-bad", "--fresh"])
        path.write_bytes(raw)
        cli.main(every)
        assert DATA.features.read_bytes() == whole
        assert [features.header(file)[1] for file in files] == [[], [], []]
