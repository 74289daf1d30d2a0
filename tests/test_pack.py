"""Promise: a pack is one file with all that the tables need, and importing it loses nothing.

A damaged or foreign one is refused.
"""

import importlib
import json
import shutil
import time

import h5py
import numpy as np
import pytest
import torch
import yaml
from helpers import BACKBONE, DATA, PARAMS, build, refuses, standing_in, store_clip

from fpl import cli
from fpl.cli import features as command
from fpl.data import encoders as clips
from fpl.data import features, pack, processes
from fpl.data.extraction import extract
from fpl.data.manifest import read_manifest
from fpl.data.views import Views
from fpl.experiments import records, runner

FILES = {content: DATA.file(content) for content in features.CONTENT}
SETTINGS = {
    "data": {"train_per_class": DATA.train_per_class, "test_per_class": DATA.test_per_class},
    "backbone": {"name": BACKBONE.name},
    "partition": {"clients": 4, "shots": 2},
    "run": {"rounds": 2, "local_epochs": 1, "batch_size": 8},
    "methods": {row: dict(PARAMS.methods[row]) for row in PARAMS.methods},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small world with all three features files, of a manifest with clients, and their pack."""
    folder = build(tmp_path_factory.mktemp("world"))
    with standing_in(folder):
        (folder / "params.yaml").write_text(yaml.safe_dump(SETTINGS))
        lines = DATA.manifest.read_text().splitlines()
        lines = [
            lines[0] + ",client",
            *(f"{line},site {i % 3}" for i, line in enumerate(lines[1:])),
        ]
        DATA.manifest.write_text("\n".join(lines) + "\n")
        manifest, tower = read_manifest(DATA.manifest), clips.load(BACKBONE.name)
        for content, path in FILES.items():
            extract(manifest, tower, path, content, Views(2))
        pack.export(FILES, DATA.name, folder / "shapes.pack")
    return folder


@pytest.fixture
def here(world):
    with standing_in(world):
        yield world


@pytest.fixture
def elsewhere(world, tmp_path):
    """Another machine: the settings and the model, but no images and no features."""
    shutil.copytree(world / "clip", tmp_path / "clip")
    shutil.copy(world / "params.yaml", tmp_path)
    with standing_in(tmp_path):
        yield tmp_path


@pytest.fixture
def at_once(monkeypatch):
    """Reading packs in this process, where it is not the other one that counts."""

    def call(seconds, module, function, *arguments):
        return getattr(importlib.import_module(module), function)(*arguments)

    monkeypatch.setattr(processes, "apart", call)


def unpack(path, **settings):
    return pack.unpack(path, FILES, DATA.name, BACKBONE.name, **settings)


def test_what_comes_out_is_what_went_in(world, elsewhere):
    assert unpack(world / "shapes.pack") == {path: True for path in FILES.values()}
    request = None
    for content, path in FILES.items():
        before = features.load(world / path, content=content)
        after = features.load(path, request or before.provenance, content=content)
        for name in ("feats", "labels", "rows"):
            one, other = getattr(before, name), getattr(after, name)
            assert one is other is None or torch.equal(one, other)
        for name in ("split", "domain", "client", "classes", "provenance", "sha256", "skipped"):
            assert np.array_equal(getattr(before, name), getattr(after, name)), name
        assert after.client is not None
        request = after.provenance


def test_the_pack_alone_makes_the_tables(world, elsewhere, capsys):
    """The commands, from the pack to a run, where there are neither images nor a manifest."""
    with standing_in(world):
        [made] = runner.sweep([PARAMS.experiment("promptfl", 1)])
    path = world / made
    cli.main(["features", "import", str(world / "shapes.pack")])
    assert capsys.readouterr().out.splitlines() == [f"features: {path}" for path in FILES.values()]
    assert not DATA.folder.exists()
    cli.main(["run", "promptfl", "seed=1"])
    (record,) = records.RECORDS.iterdir()
    one, other = (json.loads(p.read_text()) for p in (record, path))
    assert one["rounds"] == other["rounds"] and one["features"] == other["features"]
    cli.main(["features", "import", str(world / "shapes.pack")])
    assert capsys.readouterr().out.splitlines()[-3:] == [
        f"features: {path}, which was there already" for path in FILES.values()
    ]


def test_exporting_twice_gives_the_same_bytes(here, tmp_path):
    time.sleep(1.1)  # HDF5 can write the time, in seconds
    pack.export(FILES, DATA.name, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (here / "shapes.pack").read_bytes()
    assert str(here).encode() not in (here / "shapes.pack").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_pooled_features_alone_are_a_pack_too(here, tmp_path):
    said = pack.export(
        {**FILES, "patches": tmp_path / "none", "views": tmp_path / "none"},
        DATA.name,
        tmp_path / "pack",
    )
    assert "patches" not in said and list(h5py.File(tmp_path / "pack")) == ["feats"]


def test_the_command_says_what_is_in_it(here, at_once, tmp_path, capsys):
    cli.main(["features", "export", str(tmp_path / "pack")])
    exported = capsys.readouterr().out
    (tmp_path / "elsewhere").mkdir()
    with standing_in(tmp_path / "elsewhere"):  # no settings are needed to look into a pack
        cli.main(["features", "verify", "../pack"])
    assert capsys.readouterr().out == exported
    said = dict(line.split(":", 1) for line in exported.splitlines())
    said = {what: value.strip() for what, value in said.items()}
    pooled = features.load(DATA.features)
    assert (said["data set"], said["model"]) == ("shapes", BACKBONE.name)
    assert (said["images"], said["classes"], said["clients"]) == ("30 test, 60 train", "30", "3")
    assert (
        "photo" in said["domains"]
        and said["skipped"] == "none"
        and said["weights"] == pooled.provenance["weights"]
    )
    assert said["feats"] == f"90 x 32, sha256 {pooled.sha256}"
    assert said["patches"].startswith("90 x 4 x 32, ") and said["views"].startswith("60 x 2 x 32, ")


def test_a_flipped_byte_is_noticed(world, tmp_path, monkeypatch):
    raw, path = (world / "shapes.pack").read_bytes(), tmp_path / "flipped"
    monkeypatch.setattr(h5py, "File", None)  # which damage could make crash: it is not called
    for position in {*range(0, 600, 29), *range(0, len(raw), 997), len(raw) - 1}:
        path.write_bytes(raw[:position] + bytes([raw[position] ^ 8]) + raw[position + 1 :])
        refuses(lambda: pack.verify(path), [f"{path} is damaged"])


@pytest.mark.parametrize("size", [0, 100, 5000, -1])
def test_a_cut_pack_is_refused(size, world, tmp_path):
    path = tmp_path / "cut"
    path.write_bytes((world / "shapes.pack").read_bytes()[:size])
    with pytest.raises(ValueError, match="cut "):
        pack.verify(path)


def replaced(name, data):
    def change(f):
        new = data(f) if callable(data) else data
        del f[name]
        f[name] = new

    return change


def set_provenance(group, **values):
    def change(f):
        made = json.loads(f[group].attrs["provenance"])
        f[group].attrs["provenance"] = json.dumps(made | values, sort_keys=True)

    return change


def infinite(f):
    f["patches/patches"][3, 0, 0] = np.inf


FOREIGN = {  # a pack with good checksums that is none: what makes it so, and what must be said
    "another format": (
        lambda f: f.attrs.update(format="other"),
        "not one of `fpl features export`",
    ),
    "no pooled features": (lambda f: f.__delitem__("feats"), "holds patches, views"),
    "something more": (lambda f: f.create_group("more"), "holds feats, more, patches, views"),
    "a column more": (
        lambda f: f["feats"].create_dataset("more", data=[1]),
        "wrong columns in feats",
    ),
    "a column less": (lambda f: f["feats"].__delitem__("split"), "wrong columns in feats"),
    "views without their images": (
        lambda f: f["views"].__delitem__("rows"),
        "wrong columns in views",
    ),
    "a link to another file": (
        replaced("feats/domain", h5py.ExternalLink("secret.h5", "/x")),
        "has a link in the place of feats/domain",
    ),
    "a link within": (
        replaced("feats/split", h5py.SoftLink("/feats/domain")),
        "has a link in the place of feats/split",
    ),
    "a group as a column": (
        lambda f: (f["feats"].__delitem__("split"), f["feats"].create_group("split")),
        "feats/split",
    ),
    "bytes of another file": (
        lambda f: (
            f["feats"].__delitem__("labels"),
            f["feats"].create_dataset("labels", (90,), "i8", external=[("secret", 0, 720)]),
        ),
        "something else in the place of feats/labels",
    ),
    "single precision": (
        replaced("feats/feats", lambda f: f["patches/patches"][:, 0].astype("f4")),
        "place of feats/feats",
    ),
    "pooled features of three dimensions": (
        replaced("feats/feats", lambda f: f["patches/patches"][:]),
        "of shape (90, 4, 32)",
    ),
    "labels that are too few": (
        replaced("feats/labels", np.zeros(7, "i8")),
        "has 7 feats/labels for 90 images",
    ),
    "labels beyond the classes": (
        replaced("feats/labels", np.full(90, 30)),
        "labels beyond its 30 classes",
    ),
    "negative labels": (replaced("feats/labels", np.full(90, -1)), "labels beyond its 30 classes"),
    "a class name twice": (
        replaced("feats/classes", lambda f: ["cat"] * 30),
        "has a class name twice",
    ),
    "values that are not finite": (infinite, "has patches of 1 images that are zero or not finite"),
    "features that are zero": (
        lambda f: f["feats/feats"].__setitem__(slice(2), 0),
        "has feats of 2 images that are zero or not finite",
    ),
    "text features that are not finite": (
        lambda f: f["feats"].create_dataset("text", data=np.full((30, 32), np.nan, "f2")),
        "has text of 30 classes that are zero or not finite",
    ),
    "the wrong content": (
        set_provenance("feats", content="views"),
        "has views in the place of feats",
    ),
    "a path in the model": (
        set_provenance("feats", model="local-dir:/srv/clip"),
        "names /srv/clip, a path of one machine",
    ),
    "a path of an image": (
        replaced("feats/image_id", lambda f: [r"C:\images\x.png"] * 90),
        r"names C:\images\x.png, a path of one machine",
    ),
    "patches of other weights": (
        set_provenance("patches", weights="x"),
        "has patches made with weights 'x' and pooled features",
    ),
    **{
        f"patches with another {key}": (
            set_provenance("patches", **{key: "x"}),
            f"has patches made with {key} 'x' and pooled features",
        )
        for key in ("architecture", "transform", "data", "manifest", "pictures", "images")
    },
    "a path of an image left out": (
        lambda f: f["feats"].create_dataset("skipped", data=["/srv/x.png"]),
        "names /srv/x.png, a path of one machine",
    ),
    "a path at home": (set_provenance("feats", model="local-dir:~/clip"), "names ~/clip"),
    "views of fewer images": (
        set_provenance("views", skipped="1 images, x"),
        "has views made with skipped '1 images, x'",
    ),
    "views of other images": (
        replaced("views/rows", np.arange(60) + 30),
        "has views of other images",
    ),
    "views of images beyond": (
        replaced("views/rows", np.arange(60) + 60),
        "has views of other images",
    ),
    "patches in another order": (
        replaced("patches/image_id", lambda f: list(f["patches/image_id"][:])[::-1]),
        "of other images",
    ),
    "features of no image": (
        lambda f: [replaced(f"feats/{n}", f[f"feats/{n}"][:0])(f) for n in list(f["feats"])],
        "beyond its 0",
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_foreign_pack_is_refused(case, world, tmp_path):
    """As somebody makes it who knows how the checksums are made."""
    change, said = FOREIGN[case]
    path = shutil.copy(world / "shapes.pack", tmp_path / "foreign")
    with h5py.File(path, "r+") as f:
        change(f)
        for group in f.values():
            try:
                group.attrs["sha256"] = features.digest(group)
            except (KeyError, AttributeError, TypeError, OSError):
                group.attrs["sha256"] = "none"
        f.attrs["sha256"] = pack.seal(f)
    features.seal(path)
    with pytest.raises(ValueError) as refused:
        pack.verify(path)
    assert (
        str(refused.value).startswith(f"{path} ")
        and said in str(refused.value)
        and "\n" not in str(refused.value)
    )
    with pytest.raises(ValueError):
        pack.unpack(
            path,
            {content: tmp_path / file for content, file in FILES.items()},
            DATA.name,
            BACKBONE.name,
        )
    assert [other.name for other in tmp_path.iterdir()] == ["foreign"]


def test_the_name_of_a_pack_is_sealed(world, tmp_path):
    path = shutil.copy(world / "shapes.pack", tmp_path / "renamed")
    with h5py.File(path, "r+") as f:
        f.attrs["name"] = "food101"
    features.seal(path)
    with pytest.raises(ValueError, match="does not have the checksum that it carries"):
        pack.verify(path)


HANGS = (2**64 - 16).to_bytes(8, "little")  # with the header's 16 bytes HDF5 goes on by 0


def resealed(world, path, change):
    """A pack with other bytes behind a checksum that is right."""
    path.write_bytes(change((world / "shapes.pack").read_bytes()))
    features.seal(path)
    return path


def test_a_pack_that_makes_hdf5_hang_or_crash_is_refused(world, elsewhere, tmp_path, monkeypatch):
    sized = (5).to_bytes(8, "little") + b"train"  # a text with its size in front
    path = resealed(world, tmp_path / "bad", lambda raw: raw.replace(sized, HANGS + b"train"))
    monkeypatch.setattr(command, "PATIENCE", 1.0)
    told = "no pack that can be read: its reader {} (it is damaged, or memory ran out)"
    with pytest.raises(SystemExit) as end:
        cli.main(["features", "import", str(path)])
    how = told.format("gives no answer in 1 seconds")
    assert end.value.code == f"fpl features: {path} is {how}"
    assert not DATA.features.exists()
    apart = processes.apart
    monkeypatch.setattr(processes, "apart", lambda seconds, *call: apart(seconds, "os", "abort"))
    with pytest.raises(SystemExit) as end:
        cli.main(["features", "verify", str(path)])
    assert end.value.code == f"fpl features: {path} is {told.format('dies of SIGABRT')}"


def test_a_pack_that_hdf5_does_not_open_is_named(world, tmp_path):
    path = resealed(world, tmp_path / "bad", lambda raw: raw.replace(b"\x89HDF", b"\x89XXX"))
    refuses(lambda: pack.verify(path), [f"{path} cannot be read ("])


@pytest.mark.parametrize("content", features.CONTENT)
def test_a_features_file_is_no_pack(content, here):
    with pytest.raises(ValueError, match="is not one of `fpl features export`"):
        pack.verify(FILES[content])


def test_other_features_are_not_replaced_unless_by_force(world, elsewhere):
    other = features.load(world / FILES["patches"], content="patches")
    FILES["feats"].parent.mkdir(parents=True)
    shutil.copy(world / FILES["patches"], FILES["views"])
    shutil.copy(world / FILES["feats"], FILES["feats"])
    FILES["patches"].write_bytes(b"something else")
    with pytest.raises(ValueError) as refused:
        unpack(world / "shapes.pack")
    assert str(refused.value) == (
        f"{FILES['patches']}, {FILES['views']} would be replaced by other features: "
        "move it away or give --force"
    )
    assert (
        FILES["patches"].read_bytes() == b"something else"
        and features.load(FILES["views"], content="patches") is not None
    )
    assert unpack(world / "shapes.pack", force=True) == {
        FILES["feats"]: False,
        FILES["patches"]: True,
        FILES["views"]: True,
    }
    assert features.load(FILES["patches"], content="patches").sha256 == other.sha256


@pytest.mark.parametrize(
    ("setting", "value"), [("data", {"name": "food101"}), ("backbone", {"name": "RN50"})]
)
def test_a_pack_of_something_else_than_the_settings_say_is_refused(
    setting, value, world, elsewhere, at_once
):
    (elsewhere / "params.yaml").write_text(yaml.safe_dump(SETTINGS | {setting: value}))
    with pytest.raises(SystemExit) as end:
        cli.main(["features", "import", str(world / "shapes.pack")])
    found = {"data": "data set 'shapes'", "backbone": f"model {BACKBONE.name!r}"}[setting]
    assert end.value.code.endswith(
        f"has features of {found}, params.yaml says {value['name']!r}: correct it there"
    )
    assert not FILES["feats"].parent.exists()


def test_what_others_could_not_use_is_not_exported(here, tmp_path):
    """Features by a model that a path of this machine names, or patches of other features."""
    manifest, path = read_manifest(DATA.manifest.resolve()), tmp_path / "f.h5"
    extract(manifest, clips.load(f"local-dir:{here}/clip"), path)
    with pytest.raises(
        ValueError,
        match=f"no pack that others could use: it names {here}/clip, a path of one machine",
    ):
        pack.export({"feats": path}, DATA.name, tmp_path / "pack")
    store_clip(tmp_path / "clip", seed=1)
    with standing_in(tmp_path):
        extract(manifest, clips.load("local-dir:clip"), tmp_path / "other.h5", "patches")
    with pytest.raises(
        ValueError, match="no pack that others could use: it has patches made with weights"
    ):
        pack.export({**FILES, "patches": tmp_path / "other.h5"}, DATA.name, tmp_path / "pack")
    assert not (tmp_path / "pack").exists()


COMMANDS = {
    "no name": (["export"], "`fpl features export` needs the name of a pack"),
    "no name to read": (["verify"], "`fpl features verify` needs the name of a pack"),
    "a name too many": (["extract", "x.pack"], "`fpl features extract` takes no file (x.pack)"),
    "no such pack": (["verify", "nowhere.pack"], "there is no file nowhere.pack"),
    "no such pack to import": (["import", "nowhere.pack"], "there is no file nowhere.pack"),
    "the features themselves": (
        ["export", str(FILES["patches"])],
        f"a pack at {FILES['patches']} would replace the features",
    ),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_a_wrong_command_is_one_sentence(case, here):
    arguments, said = COMMANDS[case]
    with pytest.raises(SystemExit) as end:
        cli.main(["features", *arguments])
    assert end.value.code.startswith(f"fpl features: {said}") and "\n" not in end.value.code


@pytest.mark.parametrize("action", ["export", "import"])
def test_a_pack_is_of_the_data_set_that_is_asked_for(action, world, elsewhere, at_once):
    others = {"datasets": {"food": {"data": {"name": "food101"}}}}
    (elsewhere / "params.yaml").write_text(yaml.safe_dump(SETTINGS | others))
    path = world / "shapes.pack" if action == "import" else elsewhere / "x.pack"
    with pytest.raises(SystemExit, match="food101"):
        cli.main(["features", action, str(path), "--data", "food"])


def test_there_is_no_pack_without_features(elsewhere):
    with pytest.raises(SystemExit) as end:
        cli.main(["features", "export", "x.pack"])
    assert (
        end.value.code
        == f"fpl features: no features at {DATA.features}: make them with `fpl features` "
        "and the same --data, --set and --params"
    )
