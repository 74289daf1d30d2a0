"""Promise: features that others made become ours as they are, at unit length, or are refused.

Nothing in their files is run.
"""

import contextlib
import hashlib
import io
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import arrow as written
from helpers import refuses, standing_in

from fpl import cli
from fpl.data import arrow, features, foreign, pack
from fpl.experiments import cache, predict, runner, settings, transfer

N, D = 12, 5
WIDE = 128  # joint width that every gate fits
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


def columns(feats=FEATS, labels=LABELS, split=SPLIT):
    """The columns of a data set of Hugging Face that has others besides."""
    name = np.array([f"picture {i}" for i in range(len(feats))]).tolist()
    return {"file": name, "embedding": feats, "label": labels, "split": split.tolist()}


def ragged():
    """Vectors of which one is shorter."""
    found = np.empty(N, object)
    found[:] = [row[: D - (i == 4)] for i, row in enumerate(FEATS)]
    return found


def dataset(feats=FEATS, labels=LABELS, split=SPLIT):
    """A folder of one Dataset in three files, whose column split says the splits."""
    written.save(Path("cache"), columns(feats, labels, split), shards=3)
    return Path("cache")


def dataset_dict(feats=FEATS, labels=LABELS, split=SPLIT):
    """A folder of a DatasetDict, whose splits are named as on the hub."""
    whole = {"embedding": feats, "label": labels}
    parts = {"train": "train", "validation": "val", "test": "test"}
    splits = {k: {n: x[split == v] for n, x in whole.items()} for k, v in parts.items()}
    written.save_splits(Path("cache"), {k: part for k, part in splits.items()})
    return Path("cache")


ARRAYS = [arrays, npz, csv]
KINDS = [tip, *ARRAYS, dataset, dataset_dict]
ONE_FILE = {  # of a folder, to damage
    tip: "test_f.pt",
    arrays: "features.npy",
    dataset: "data-00001-of-00003.arrow",
    dataset_dict: "test/data-00000-of-00001.arrow",
}


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
    folder = source.parent if source.is_file() else source
    read = [source] if source.is_file() else [path for path in source.rglob("*") if path.is_file()]
    read = [path for path in read if not re.search("1shots|dataset_info", path.name)]
    named = {path.relative_to(folder).as_posix(): path for path in read}
    files = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in named.items()}
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
    path = source / ONE_FILE[kind] if source.is_dir() else source
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
    "Unnamed: 0,label,split,f0,f1": "index=False",
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


@pytest.mark.parametrize("first", ["9,8", "0,1"])  # the second could be the numbers of rows
def test_rows_with_more_values_than_columns_are_refused(first):
    rows = zip(first.split(","), ["train", "test"])
    lines = [f"{number},1,2,0,{split}" for number, split in rows]
    Path("cache.csv").write_text("\n".join(["f0,f1,label,split", *lines]))
    refused(Path("cache.csv"), "more values than columns")


def test_parquet_without_its_library_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    Path("cache.parquet").touch()
    refused(Path("cache.parquet"), "pyarrow", ".csv")


class Parquet(list):
    """What pyarrow, which tests do not need, says of a file of some rows before it is read."""

    def __init__(self, rows, **kinds):
        super().__init__(SimpleNamespace(name=name, type=kind) for name, kind in kinds.items())
        self.names, self.pandas_metadata = [*kinds], None
        group = SimpleNamespace(total_byte_size=100, num_rows=rows)
        about = SimpleNamespace(num_row_groups=2, row_group=lambda _: group)
        self.schema_arrow, self.metadata = self, about
        parts = {
            "parquet": SimpleNamespace(ParquetFile=lambda *_, **__: contextlib.nullcontext(self)),
            "types": SimpleNamespace(is_integer="i".__eq__, is_floating="f".__eq__),
        }
        self.library = SimpleNamespace(__spec__="found", **parts)

    def read(self, columns):
        frame = pd.DataFrame({f"f{i}": FEATS[:, i] for i in range(D)})
        frame = frame.assign(label=LABELS, split=SPLIT)
        return SimpleNamespace(to_pandas=lambda ignore_metadata: frame[columns])


@pytest.mark.parametrize(
    "rows, split, column, words",
    [
        (N, "f", "f", ""),
        (2**26, "f", "f", f"more than {2**32} bytes"),
        (N, "f", "list", "has the column f4, which holds no numbers"),
        (N, None, "f", "lacks the column split"),
    ],
)
def test_parquet_is_looked_at_before_it_is_unpacked(rows, split, column, words, monkeypatch):
    kinds = {f"f{i}": "f" for i in range(D)} | {f"f{D - 1}": column, "label": "i"}
    found = Parquet(rows, **kinds, **({"split": split} if split else {}))
    monkeypatch.setitem(sys.modules, "pyarrow", found.library)
    Path("cache.parquet").touch()
    if not words:
        assert bring(Path("cache.parquet"))
        return
    monkeypatch.setattr(Parquet, "read", None)
    refused(Path("cache.parquet"), words)


def test_rows_without_a_split_are_refused():
    csv(split=np.where(np.arange(N) == 4, "", SPLIT))
    refused(Path("cache.csv"), "rows without a split")


@pytest.mark.parametrize(
    "text", ["", "cod\n\nplaice", "cod\nplaice\ncod", "sea bass\nsea_bass\ncod", "cod\nplaice\nCod"]
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


def test_the_command_reads_text_features_and_a_column(capsys):
    written.save(Path("cache"), {**columns(), "other": FEATS})
    np.save("t.npy", text_features())
    cli.main(["features", "import", "cache", *COMMAND, "--text", "t.npy", "--column", "embedding"])
    assert features.load(PATH).text.shape == (3, D)
    with pytest.raises(SystemExit, match="t2.npy"):
        cli.main(["features", "import", "cache", *COMMAND, "--text", "t2.npy", "--column", "other"])
    with pytest.raises(SystemExit, match="--text"):
        cli.main(["features", "--text", "t.npy"])


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


def bring_more(**options):
    """Import 120 images, with text features of the classes or without."""
    feats = np.random.default_rng(2).normal(size=(120, WIDE))
    source = npz(feats, np.arange(120) % 3, np.where(np.arange(120) % 2, "train", "test"))
    bring(source, force=True, **options)


@pytest.fixture
def imported():
    """Settings of features that came without a text tower."""
    bring_more()
    return settings.Settings(
        data=settings.Data(name="own", store="fish"),
        backbone=settings.Backbone("imported"),
        partition=settings.Partition("iid", clients=2),
        run=settings.Training(rounds=1, local_epochs=1),
    )


DATASETS = {  # what is in a saved data set, how it is saved, and words of the sentence
    "no vectors": ({"embedding": LABELS}, {}, ["lacks a column", "vectors"]),
    "vectors of two lengths": ({"embedding": ragged()}, {}, ["lacks a column", "one length"]),
    "two columns of vectors": ({"other": FEATS}, {}, ["embedding, other", "--column"]),
    "whole numbers": ({"embedding": FEATS.astype("i4")}, {}, ["vectors of floats"]),
    "no labels": ({"label": None}, {}, ["lacks the column label"]),
    "no split": ({"split": None}, {}, ["lacks the column split"]),
    "another split": ({"split": ["fold 1"] * N}, {}, ["fold 1"]),
    "chosen rows": ({}, {"_indices_files": [{"filename": "i.arrow"}]}, ["newer `datasets`"]),
    "files elsewhere": ({}, {"_data_files": [{"filename": "../a.arrow"}]}, ["leads elsewhere"]),
    "no files": ({}, {"_data_files": []}, ["names no file"]),
    "no list of files": ({}, {"_data_files": None}, ["state.json", "damaged"]),
}


@pytest.mark.parametrize("case", DATASETS)
def test_saved_data_sets_that_cannot_be_features_are_refused(case):
    changed, state, words = DATASETS[case]
    whole = {name: x for name, x in (columns() | changed).items() if x is not None}
    written.save(Path("cache"), whole, **state)
    refused(Path("cache"), *words)


@pytest.mark.parametrize("names", [["../cache"], [], "train", None])
def test_splits_of_a_saved_data_set_lie_in_its_folder(names):
    dataset_dict()
    Path("cache/dataset_dict.json").write_text(json.dumps({"splits": names}))
    refused(Path("cache"), "dataset_dict.json")


def test_a_column_may_be_named():
    written.save(Path("cache"), {**columns(), "other": -FEATS})
    assert bring(Path("cache"), hints=foreign.Hints(column="embedding"))
    cosine = (features.load(PATH).feats.numpy() * FEATS).sum(1)
    assert cosine.min() > 0
    refuses(lambda: bring(Path("cache"), hints=foreign.Hints(column="emb")), ["'emb'"])
    shutil.rmtree("cache")
    refuses(lambda: bring(tip(), hints=foreign.Hints(column="emb")), ["no columns"])


def test_text_from_elsewhere_is_not_taken_for_a_file_of_the_same_name():
    """In the provenance, which has the hash of both."""
    source = arrays()
    Path("text").mkdir()
    np.save("text/features.npy", np.eye(len(NAMES), D))
    assert bring(source, hints=foreign.Hints(Path("text/features.npy")))
    said = features.load(PATH).provenance["sources"]
    for folder in (source, Path("text")):
        assert hashlib.sha256((folder / "features.npy").read_bytes()).hexdigest() in said


def test_lists_of_one_length_are_vectors():
    lists = np.empty(N, object)
    lists[:] = [*FEATS]
    written.save(Path("cache"), columns(lists))
    assert bring(Path("cache"))
    assert features.load(PATH).feats.shape == (N, D)


@pytest.mark.parametrize("at", range(0, 900, 7))
def test_damaged_streams_are_refused_or_read_otherwise(at):
    """Whatever byte is wrong: no crash, and no more memory than the file has."""
    whole = written.stream({"embedding": FEATS, "label": LABELS, "split": SPLIT.tolist()})
    assert at < len(whole)
    for value in (0, 127, 255):
        bad = bytearray(whole)
        bad[at] = value
        with contextlib.suppress(Exception):
            found = arrow.read(io.BytesIO(bytes(bad)))
            assert sum(x.nbytes for x in found.values()) < 10 * len(whole)


TEXTS = {  # text features, and words of the sentence
    "fewer classes": (np.ones((2, D)), ["(2, 5)", "(3, 5)"]),
    "another width": (np.ones((3, 7)), ["(3, 7)", "(5, 3)"]),
    "not finite": (np.full((3, D), np.inf), ["3 classes", "not finite"]),
    "zero": (np.zeros((D, 3)), ["3 classes", "zero"]),
    "no numbers": (np.full((3, D), "x"), ["real numbers"]),
    "one axis": (np.ones(3 * D), ["(15,)"]),
    "a pickle": (np.full((3, D), None), ["no pickle is run"]),
}


@pytest.mark.parametrize("case", TEXTS)
def test_text_features_that_do_not_fit_are_refused(case):
    text, words = TEXTS[case]
    np.save("t.npy", text)
    source = npz()
    refuses(lambda: bring(source, hints=foreign.Hints(Path("t.npy"))), ["t.npy", *words])
    assert not PATH.exists()


def test_as_many_classes_as_dimensions_are_refused_with_text_only():
    source = npz(FEATS[:, :3])
    np.save("t.npy", np.eye(3))
    refuses(
        lambda: bring(source, hints=foreign.Hints(Path("t.npy"))), ["(3, 3)", "nobody can tell"]
    )
    assert bring(source)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("place", ["option.pt", "option.npy", "cache/clip_weights.pt"])
def test_text_features_come_in_at_unit_length(place, turned):
    source = tip()
    text = text_features()
    kept = np.ascontiguousarray(text.T) if turned else text
    if place.endswith(".pt"):
        torch.save(torch.from_numpy(kept), place)
    else:
        np.save(place, kept)
    hints = foreign.Hints(Path(place) if "option" in place else None)
    assert bring(source, hints=hints)
    found = features.load(PATH)
    wanted = text / np.linalg.norm(text, axis=1, keepdims=True)
    assert np.abs(found.text.numpy() - wanted).max() < 1e-3
    said = found.provenance
    sha256 = hashlib.sha256(Path(place).read_bytes()).hexdigest()
    assert f"{Path(place).name} {sha256}" in said["sources"] and "template" in said["text"]
    parts = {"feats": PATH, "patches": Path("no"), "views": Path("no")}
    assert pack.export(parts, "own", Path("p"))["classes"] == "3"


def test_without_text_features_the_provenance_says_none():
    bring(npz())
    found = features.load(PATH)
    assert found.text is None and found.provenance["text"] == "none"


NOTHING = ("majority", "ridge_own", "ridge_all", "afl")  # of the text
TEXT = ("zeroshot", "zeroshot_own", "fedclip", "zslp", "zeroshot_memory")


def text_features(width=D):
    """Text features of the three names, not at unit length."""
    return np.random.default_rng(3).normal(size=(len(NAMES), width)).astype(np.float32)


@pytest.mark.parametrize("row", settings.ROWS)
@pytest.mark.parametrize("text", [False, True])
def test_rows_run_on_what_was_imported_and_others_say_what_lacks(row, text, imported):
    if text:
        np.save("text.npy", text_features(WIDE))
        bring_more(hints=foreign.Hints(Path("text.npy")))
    experiment = imported.experiment(row, 1)
    if row in NOTHING or text and row in TEXT:
        [path] = runner.sweep([experiment], asked=runner.Asked(keep=True))
        assert json.loads(path.read_text())["classes"] == NAMES
        clip, _ = cache.load_cached(experiment.source.data, experiment.source.backbone, "cpu")
        assert predict.restore(path, clip).kept.classes == NAMES
        refuses(lambda: transfer.accuracies(path, experiment.source), ["came without a CLIP"])
    else:
        words = "no text tower" if row not in TEXT else "--text FILE"
        refuses(lambda: runner.sweep([experiment]), [words])


def test_some_classes_have_their_own_text_features():
    np.save("text.npy", text_features(WIDE))
    bring_more(hints=foreign.Hints(Path("text.npy")))
    data = settings.Data(name="own", store="fish")
    on = settings.Backbone("imported"), "cpu", 2
    whole = cache.text_of(data, *on).zero_shot()
    for first, end in ((0, 2), (2, None)):
        assert torch.equal(cache.text_of(data, *on, (first, end)).zero_shot(), whole[first:end])
