"""Promise: features that others made become ours as they are, at unit length, or are refused.

Nothing in their files is run.
"""

import hashlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import refuses, standing_in

from fpl import cli
from fpl.data import features, foreign, pack
from fpl.experiments import runner, settings

N, D = 12, 5
NAMES = ["sea bass", "plaice", "cod"]
FEATS = np.random.default_rng(0).normal(size=(N, D)).astype(np.float32) * 7
LABELS = np.arange(N) % len(NAMES)
SPLIT = np.array(["train"] * 6 + ["val"] * 2 + ["test"] * 4)
PATH = Path("data/features/fish.h5")
COMMAND = ["--classes", "names.txt", "--set", "data.name=own", "--set", "data.store=fish"]


@pytest.fixture(autouse=True)
def folder(tmp_path):
    with standing_in(tmp_path):
        Path("names.txt").write_text("sea_bass\nplaice\ncod\n")
        Path("params.yaml").write_text("{}\n")
        yield tmp_path


def tip(feats=FEATS, labels=LABELS, **other):
    """A folder in Tip-Adapter's layout, in half precision; other: files, by name."""
    feats = torch.from_numpy(feats).half()
    labels = torch.from_numpy(labels)
    files = {
        "keys_2shots": feats[:6].T,
        "values_2shots": torch.eye(len(NAMES)).half()[labels[:6]],
        "keys_1shots": feats[:3].T,
        "values_1shots": torch.eye(len(NAMES)).half()[labels[:3]],
        "val_f": feats[6:8],
        "val_l": labels[6:8],
        "test_f": feats[8:],
        "test_l": labels[8:],
    }
    source = Path("cache")
    source.mkdir()
    for name, x in (files | other).items():
        if x is not None:
            torch.save(x, source / f"{name}.pt")
    return source


def arrays(feats=FEATS, labels=LABELS, split=SPLIT):
    source = Path("cache")
    source.mkdir()
    for name, x in (("features", feats), ("labels", labels), ("split", split)):
        np.save(source / f"{name}.npy", x)
    return source


def npz(feats=FEATS, labels=LABELS, split=SPLIT):
    np.savez_compressed("cache.npz", features=feats, labels=labels, split=split)
    return Path("cache.npz")


def csv(feats=FEATS, labels=LABELS, split=SPLIT):
    """A table whose columns stand in another order than their numbers."""
    columns = {f"f{i}": feats[:, i] for i in reversed(range(feats.shape[1]))}
    pd.DataFrame({**columns, "split": split, "label": labels}).to_csv("cache.csv", index=False)
    return Path("cache.csv")


ARRAYS = [arrays, npz, csv]
KINDS = [tip, *ARRAYS]


def bring(source, **options):
    return foreign.bring(source, Path("names.txt"), PATH, {"data": "own"}, **options)


def refused(source, *words):
    """Hold that a source is refused in a sentence that names it, and that nothing is written."""
    refuses(lambda: bring(source), [str(source), *words])
    assert not PATH.exists() and not list(Path("data").rglob("*.tmp"))


@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_in_is_what_is_there_at_unit_length(kind):
    assert bring(kind())
    found = features.load(PATH, {"data": "own", "weights": "imported"})
    wanted = FEATS / np.sqrt((FEATS.astype(float) ** 2).sum(1, keepdims=True))
    assert np.abs(found.feats.numpy() - wanted).max() < 1e-3
    assert found.labels.tolist() == LABELS.tolist() and found.classes == NAMES
    assert found.split.tolist() == SPLIT.tolist()
    assert len({*found.image_id}) == N


@pytest.mark.parametrize("kind", KINDS)
def test_the_provenance_has_the_hash_of_every_file_that_was_read(kind):
    source = kind()
    bring(source)
    said = features.load(PATH).provenance["sources"]
    read = [source] if source.is_file() else [p for p in source.iterdir() if "1shots" not in p.name]
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in read}
    assert dict(part.split(" ") for part in said.split(", ")) == files


def test_without_keys_the_validation_images_are_trained_on():
    bring(tip(**{f"{part}_{k}shots": None for part in ("keys", "values") for k in (1, 2)}))
    assert features.load(PATH).split.tolist() == ["train"] * 2 + ["test"] * 4


def test_columns_are_in_the_order_of_their_numbers():
    wide = np.random.default_rng(1).normal(size=(N, 12))
    bring(csv(wide))
    cosine = (features.load(PATH).feats.numpy() * wide).sum(1) / np.linalg.norm(wide, axis=1)
    assert cosine.min() > 0.999


def test_other_features_are_replaced_by_force_only():
    source = npz()
    assert bring(source) and not bring(source)
    before = PATH.read_bytes()
    npz(-FEATS)
    refuses(lambda: bring(source), [str(PATH), "--force"])
    assert PATH.read_bytes() == before
    assert bring(source, force=True) and PATH.read_bytes() != before


def test_imported_features_make_a_pack():
    bring(npz())
    said = pack.export(
        {"feats": PATH, "patches": Path("no"), "views": Path("no")}, "own", Path("p")
    )
    assert said["weights"] == "imported" and said["images"] == "4 test, 6 train, 2 val"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "value, words", [(np.nan, "not finite"), (np.inf, "not finite"), (0, "zero")]
)
def test_rows_that_are_no_direction_are_refused(kind, value, words):
    feats = FEATS.copy()
    feats[9] = value
    refused(kind(feats), "1 images", words)


@pytest.mark.parametrize("label", [-1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_labels_beyond_the_classes_are_refused(kind, label):
    labels = LABELS.copy()
    labels[10] = label
    refused(kind(labels=labels), str(label), "3 class names")


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_that_cannot_be_features_are_refused(kind, folder):
    for case, (changed, words) in enumerate(
        (
            ({"labels": LABELS + 0.5}, "whole numbers"),
            ({"split": np.where(SPLIT == "val", "dev", SPLIT)}, "dev"),
            ({"split": np.where(SPLIT == "test", "val", SPLIT)}, "split test"),
            ({"feats": np.full((N, D), "x")}, "numbers"),
        )
    ):
        (folder / str(case)).mkdir()
        with standing_in(folder / str(case)):
            Path("names.txt").write_text("\n".join(NAMES))
            refused(kind(**changed), words)


@pytest.mark.parametrize("kind", [arrays, npz])
def test_shapes_that_do_not_fit_are_refused(kind):
    refused(kind(labels=LABELS[1:]), "shapes", "(11,)")


TIP = {  # what stands in a file, and words of the sentence
    "another width": ({"test_f": torch.ones(4, 7)}, ["5 in val_f.pt", "7 in test_f.pt"]),
    "fewer labels": ({"test_l": torch.zeros(3).long()}, ["test_f.pt", "(3,)"]),
    "labels not whole": ({"test_l": torch.zeros(4)}, ["whole numbers"]),
    "more classes": ({"values_2shots": torch.eye(6)}, ["(6, 6)", "3 class names"]),
    "not one-hot": ({"values_2shots": torch.full((6, 3), 1 / 3)}, ["one-hot"]),
    "keys not turned": ({"keys_2shots": torch.ones(6, 5)}, ["keys_2shots.pt", "do not fit"]),
    "no tensor": ({"test_f": {"features": torch.ones(4, 5)}}, ["test_f.pt", "one tensor"]),
    "sparse": ({"test_f": torch.eye(4, 5).to_sparse()}, ["test_f.pt", "one tensor"]),
    "a view of one number": ({"test_f": torch.ones(1).expand(10**6, 10**6)}, ["larger than"]),
    "complex": ({"test_f": torch.ones(4, 5).to(torch.complex64)}, ["real numbers"]),
}


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize("case", TIP)
def test_tensors_that_cannot_be_features_are_refused(case):
    other, words = TIP[case]
    refused(tip(**other), *words)


def test_a_missing_file_of_a_cache_is_named():
    source = tip(test_l=None)
    with pytest.raises(FileNotFoundError, match=r"cache/test_l\.pt"):
        bring(source)


class Bomb:
    """What leaves a file behind if it is unpickled."""

    def __reduce__(self):
        return open, ("exploded", "w")


def test_pickles_are_refused_and_not_run(folder):
    bombs = np.array([Bomb()] * N, object)
    refused(tip(test_f=Bomb()), "test_f.pt", "no pickle is run")
    (folder / "cache").rename("tip")
    refused(arrays(split=bombs), "split.npy", "no pickle is run")
    refused(npz(labels=bombs), "cache.npz", "no pickle is run")
    assert not Path("exploded").exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [0, 10, 100])
def test_cut_files_are_refused(kind, size):
    source = kind()
    path = source if source.is_file() else source / {tip: "test_f.pt"}.get(kind, "features.npy")
    path.write_bytes(path.read_bytes()[:size])
    refused(source)


def test_a_zip_that_stands_for_too_much_is_refused(monkeypatch):
    monkeypatch.setattr(foreign, "SIZE", 10**5)
    npz(feats=np.ones((N, 10**5)))
    assert Path("cache.npz").stat().st_size < 10**5
    refused(Path("cache.npz"), "more than 100000 bytes")


def test_an_array_that_claims_more_than_its_file_has_is_refused():
    source = arrays()
    raw = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": (2**40, 2**20)}
    np.lib.format.write_array_header_1_0(raw, header)
    (source / "features.npy").write_bytes(raw.getvalue())
    refused(source, "features.npy")


TABLES = {
    "label,f0,f1": "split",
    "split,f0,f1": "label",
    "label,split": "numbered",
    "label,split,f0,f2": "without gaps",
    "label,split,f0,g1": "without gaps",
    "label,split,f1,f01": "without gaps",
    "label,split,f0,f0": "f0.1",
    "label,split,f0,name": "name",
}


@pytest.mark.parametrize("columns", TABLES)
def test_tables_with_other_columns_are_refused(columns):
    row = ",".join("train" if name == "split" else "1" for name in columns.split(","))
    Path("cache.csv").write_text(f"{columns}\n{row}\n")
    refused(Path("cache.csv"), TABLES[columns])


def test_parquet_without_its_library_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    Path("cache.parquet").touch()
    refused(Path("cache.parquet"), "pyarrow", ".csv")


@pytest.mark.parametrize(
    "text", ["", "cod\n\nplaice", "cod\nplaice\ncod", "sea bass\nsea_bass\ncod"]
)
def test_class_names_are_given_and_distinct(text):
    Path("names.txt").write_text(text)
    refuses(lambda: bring(npz()), ["names.txt, line"])


@pytest.mark.parametrize("name", ["none", "cache.txt", "alone.npy", "test_f.pt"])
def test_what_is_no_cache_is_refused(name):
    Path(name).mkdir() if name == "none" else Path(name).touch()
    refused(Path(name))


def test_the_command_imports_a_cache(capsys):
    source = str(tip())
    call = ["features", "import", source, *COMMAND, "--model", "ViT-B/32"]
    cli.main(call)
    cli.main(call)
    said = [f"features: {PATH}", f"features: {PATH}, which was there already"]
    assert capsys.readouterr().out.splitlines() == said
    made = features.load(PATH).provenance
    assert (made["model"], made["data"], made["weights"]) == ("ViT-B/32", "own", "imported")


def test_the_command_says_what_it_lacks():
    source = str(npz())
    with pytest.raises(SystemExit, match="--classes FILE"):
        cli.main(["features", "import", source, *COMMAND[2:]])
    manifest = Path("data/own/fish/manifest.csv")
    manifest.parent.mkdir(parents=True)
    manifest.touch()
    with pytest.raises(SystemExit, match="manifest.csv lists the images of own: .*data.store"):
        cli.main(["features", "import", source, *COMMAND])
    assert not PATH.exists()


@pytest.fixture
def imported():
    """Settings of features that came without a text tower."""
    feats = np.random.default_rng(2).normal(size=(120, D))
    bring(npz(feats, np.arange(120) % 3, np.where(np.arange(120) % 2, "train", "test")))
    return settings.Settings(
        data=settings.Data(name="own", store="fish"),
        backbone=settings.Backbone("imported"),
        partition=settings.Partition("iid", clients=2),
        run=settings.Training(rounds=1, local_epochs=1),
    )


@pytest.mark.parametrize("row", settings.ROWS)
def test_rows_that_read_features_run_and_others_say_what_lacks(row, imported):
    experiment = imported.experiment(row, 1)
    if row in ("majority", "ridge_own", "ridge_all"):
        [path] = runner.sweep([experiment])
        assert len(json.loads(path.read_text())["rounds"]) == 1
    else:
        refuses(lambda: runner.sweep([experiment]), ["without a text tower", "only rows that read"])
