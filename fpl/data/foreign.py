"""Caches of image features that others made, read into a features file of ours.

Five kinds are read:
  a folder in Tip-Adapter's layout: keys_Ks.pt (d, n) and values_Ks.pt (n, c), one-hot, of which
    those with the most shots are the training images, and test_f.pt (n, d), test_l.pt (n,), and so
    for val, which are the training images where there are no keys;
  a folder with features.npy (n, d), labels.npy (n,) and split.npy (n,);
  one .npz with these three arrays;
  a .csv or .parquet with the columns label, split and numbered ones, such as f0, f1, ..;
  a folder that `save_to_disk` of Hugging Face's `datasets` has written, with a column of vectors
    and the column label: a DatasetDict, or a Dataset with the column split.

Text features (c, d) or (d, c) of the classes may come with them: in a file of their own, or in a
folder as one of TEXTS. Nothing in all this is run: a file that needs a pickle is refused. The
result has no text tower, and its provenance says so.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fpl.data import arrow, extraction, pictures
from fpl.data.datasets.layouts import JSON
from fpl.data.datasets.own import SPELT
from fpl.data.features import Refused, require, written
from fpl.data.files import atomic_write
from fpl.data.imported import IMPORTED
from fpl.data.manifest import SPLITS, UNWRITABLE, Manifest, text_of
from fpl.data.pack import checksum_of

UNKNOWN = "unknown"
SIZE = 2**32  # bytes of a file, and of what a zip holds
ARRAYS = {  # by name, what they hold
    "features": "one row for each image",
    "labels": "one whole number from 0 on for each image",
    "split": f"one of the words {', '.join(SPLITS)} for each image",
}
TEXTS = ("clip_weights.pt", "text.npy")  # text features in a folder
DICT, STATE = "dataset_dict.json", "state.json"  # of `datasets`: of several data sets, and of one
TEXT = "imported; a row's template does not change them"
SUFFIXES = (".npz", ".npy", ".csv", ".parquet", ".pt")
SHOTS = re.compile(r"keys_(\d+)shots\.pt")
NUMBERED = re.compile(r"(\D*)(\d+)")  # of columns: what all have in front, and the number
Part = tuple[str, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Hints:
    """What a source does not say by itself.

    text: a .pt or .npy with text features of the classes. column: that of the features, in a data
    set that has several columns of vectors.
    """

    text: Path | None = None
    column: str = ""


@dataclass
class Cache:
    """What a source holds: features (n, d), labels (n,), splits and ids of n images.

    kind: of the source, in words. root: the folder that it is in. sums: SHA-256 of each file that
    was read, by its name in this folder, of another behind "..".
    """

    kind: str
    root: Path
    feats: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))
    labels: np.ndarray = field(default_factory=lambda: np.empty(0, int))
    split: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    sums: dict[str, str] = field(default_factory=dict)

    def open(self, path: Path, most: int = SIZE) -> io.BytesIO:
        """Read a file and note its hash. Raises OSError, and Refused beyond so many bytes."""
        inside = path.is_relative_to(self.root)
        name = path.relative_to(self.root).as_posix() if inside else f"../{path.name}"
        try:
            content = pictures.content(path, most)
        except FileNotFoundError:
            raise FileNotFoundError(f"there is no file {path}") from None
        except ValueError as e:
            raise Refused(f"has {name}, which is not read: {e}") from None
        self.sums[name] = hashlib.sha256(content).hexdigest()
        return io.BytesIO(content)

    def decode(self, path: Path, call: Callable[[io.BytesIO], Any], most: int = SIZE) -> Any:
        """Return what a file holds. Raises as `open`, and Refused for what cannot be decoded."""
        raw = self.open(path, most)
        try:
            check_unpacked(raw)
            return call(raw)
        except Refused:
            raise
        except Exception as e:  # a damaged or hostile file can fail in any way
            only = "it is damaged, or holds more than plain numbers, and no pickle is run"
            raise Refused(f"has {path.name}, which is not read: {only}") from e


def bring(
    source: Path,
    classes: Path,
    path: Path,
    about: Mapping[str, str],
    force: bool = False,
    hints: Hints = Hints(),
) -> bool:
    """Write the features of a source, at unit length, to `path`, and return whether they are new.

    classes: a text file, one name a line, in the order of the labels. about: provenance that is
    known: `data`, the name of the data set, and perhaps `model`. force: replace other features.

    Raises OSError for what is not there, and ValueError for a source that is of no kind above,
    needs a pickle, or has shapes, labels, splits or numbers that cannot be features, and where
    other features would be replaced.
    """
    try:
        names = classes_of(classes)
        cache = read(source, len(names), hints.column)
        check(cache, len(names))
        feats = unit(cache.feats, "images")
    except Refused as e:
        raise ValueError(f"{source} {e}") from e
    text = read_text(cache, source, hints.text, (len(names), feats.shape[1]))
    made = provenance(cache, {**about, "text": "none" if text is None else TEXT})
    before = checksum_of(path) if path.exists() else ""
    with atomic_write(path) as temporary:
        with written(temporary) as f:
            extraction.create(f, listed(cache, names), "feats", feats.shape[1:], made)
            f["feats"][:] = feats
            if text is not None:
                f["text"] = text
        is_new = checksum_of(temporary) != before
        if is_new and path.exists() and not force:
            raise ValueError(
                f"{path} would be replaced by other features: move it away or give --force"
            )
    return is_new


def read_text(
    cache: Cache, source: Path, given: Path | None, shape: tuple[int, int]
) -> np.ndarray | None:
    """Return unit text features (c, d) from the file that is given or lies in a folder.

    shape: c and d. Raises OSError, and ValueError for what cannot be text features of the classes.
    """
    there = [source / name for name in TEXTS if (source / name).is_file()]
    path = given or next(iter(there), None)
    if path is None:
        return None
    try:
        is_array = path.suffix.lower() == ".npy"
        load = np.lib.format.read_array
        text = cache.decode(path, load) if is_array else tensor_of(cache, path)
        require(text.dtype.kind in "fiu", "has no real numbers")
        turned = shape[::-1]
        found = f"has the shape {text.shape}"
        fits = text.shape in (shape, turned)
        require(fits, f"{found}, not {shape} or {turned}, which are classes and width")
        same = "as many classes as their width: nobody can tell which is which, so leave them out"
        require(shape != turned, f"{found}, {same}")
        return unit(text if text.shape == shape else text.T, "classes")
    except Refused as e:
        raise ValueError(f"{path}, read as text features, {e}") from e


def provenance(cache: Cache, about: Mapping[str, str]) -> dict[str, str]:
    """Say what is known of imported features, and that the rest is not."""
    not_known = ("model", "architecture", "transform", "manifest", "pictures", "images")
    return {
        **dict.fromkeys(not_known, UNKNOWN),
        "weights": IMPORTED,
        "imported": cache.kind,
        "sources": ", ".join(f"{name} {sha256}" for name, sha256 in sorted(cache.sums.items())),
        "content": "feats",
        "skipped": "none",
        **about,
    }


def listed(cache: Cache, names: list[str]) -> Manifest:
    """Return the images as a manifest lists them."""
    rows = [
        {"path": name, "label": str(label), "split": split, "domain": ""}
        for name, label, split in zip(cache.ids, cache.labels.tolist(), cache.split, strict=True)
    ]
    return Manifest(Path(), rows, names, "")


def classes_of(path: Path) -> list[str]:
    """Return class names, with spaces for underscores.

    Raises FileNotFoundError, and ValueError for none, for an empty line, and for two that are the
    same in prompts.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path} of class names")
    names: list[str] = []
    first: dict[str, int] = {}
    for number, line in enumerate(text_of(path).rstrip().split("\n"), start=1):
        name = " ".join(line.replace("_", " ").split())
        if not name or UNWRITABLE.search(name):
            raise ValueError(f"{path}, line {number}: needs a class name, one on each line")
        other = first.setdefault(name.casefold(), number)
        if other != number:
            raise ValueError(f"{path}, line {number}: {name!r} is on line {other} already")
        names.append(name)
    return names


def read(source: Path, n_cls: int, column: str = "") -> Cache:
    """Read a source of whatever kind. Raises OSError, and Refused with what is wrong."""
    suffix = source.suffix.lower()
    if source.is_dir():
        named = {path.name for path in source.iterdir()}
        if {DICT, STATE} & named:
            return read_datasets(source, column)
        require(not column, f"has no columns, of which {column!r} could be one")
        if "features.npy" in named:
            return read_arrays(source)
        tip = "test_f.pt" in named or any(map(SHOTS.fullmatch, named))
        known = f"test_f.pt, as Tip-Adapter's caches have, nor features.npy, nor {STATE}"
        require(tip, f"has neither {known}")
        return read_tip_adapter(source, n_cls)
    if not source.exists():
        raise FileNotFoundError(f"there is no file {source}")
    if suffix == ".npz":
        return read_npz(source)
    if suffix in (".csv", ".parquet"):
        return read_table(source)
    one = suffix in (".npy", ".pt")
    advice = "give the folder that it is in" if one else f"give a folder or {', '.join(SUFFIXES)}"
    raise Refused(f"is no cache of features by itself: {advice}")


def read_tip_adapter(folder: Path, n_cls: int) -> Cache:
    """Read a folder in Tip-Adapter's layout."""
    cache = Cache("a cache in Tip-Adapter's layout", folder)
    parts = parts_of(cache, folder, n_cls)
    for name, (_, feats, labels) in parts.items():
        fits = feats.ndim == 2 and labels.shape == feats.shape[:1]
        shapes = f"features {feats.shape} in {name} with labels {labels.shape}"
        require(fits, f"has {shapes}, which do not fit")
    widths = {feats.shape[1]: name for name, (_, feats, _) in parts.items()}
    said = " and ".join(f"{width} in {name}" for width, name in widths.items())
    advice = "two models made it, so take away the files of one (without keys, val is trained on)"
    require(len(widths) == 1, f"has features of different widths, {said}: {advice}")
    cache.feats = np.concatenate([feats for _, feats, _ in parts.values()])
    cache.labels = np.concatenate([labels for _, _, labels in parts.values()])
    for name, (split, feats, _) in parts.items():
        cache.split += [split] * len(feats)
        cache.ids += [f"{name}/{i}" for i in range(len(feats))]
    return cache


def parts_of(cache: Cache, folder: Path, n_cls: int) -> dict[str, Part]:
    """Return split, features (n, d) and labels (n,) of each file of features in a folder."""
    named = {path.name for path in folder.iterdir()}
    shots = [int(found[1]) for found in map(SHOTS.fullmatch, named) if found]
    parts: dict[str, Part] = {}
    if shots:
        most = f"{max(shots)}shots.pt"
        keys = tensor_of(cache, folder / f"keys_{most}")
        one_hot = tensor_of(cache, folder / f"values_{most}")
        parts[f"keys_{most}"] = "train", keys.T, labels_of(one_hot, n_cls)
    for split in ("val", "test"):
        name = f"{split}_f.pt"
        if split == "test" or name in named:
            feats = tensor_of(cache, folder / name)
            labels = tensor_of(cache, folder / f"{split}_l.pt")
            trained = split == "val" and not shots
            parts[name] = "train" if trained else split, feats, labels
    return parts


def tensor_of(cache: Cache, path: Path) -> np.ndarray:
    """Return the numbers of a tensor in a file, in double precision where they are not whole."""

    def plain(raw: io.BytesIO) -> np.ndarray:
        x = torch.load(raw, map_location="cpu", weights_only=True)
        is_plain = isinstance(x, Tensor) and x.layout is torch.strided and x.device.type == "cpu"
        require(is_plain, f"has {path.name}, which is not one tensor of numbers")
        # a view can stand for more than the file holds
        fits = x.nbytes <= len(raw.getbuffer())
        require(fits, f"has {path.name}, whose tensor is larger than the file")
        return (x.detach().double() if x.is_floating_point() else x.detach()).numpy()

    return cache.decode(path, plain)


def labels_of(one_hot: np.ndarray, n_cls: int) -> np.ndarray:
    """Return the labels (n,) that one-hot rows (n, c) stand for."""
    fine = one_hot.ndim == 2 and one_hot.shape[1] == n_cls
    require(fine, f"has values of shape {one_hot.shape} for {n_cls} class names")
    one_each = bool((one_hot.sum(1) == 1).all())
    require(one_each and bool(np.isin(one_hot, [0, 1]).all()), "has values that are not one-hot")
    return one_hot.argmax(1)


def read_arrays(folder: Path) -> Cache:
    """Read a folder of three .npy files."""
    cache = Cache("NumPy arrays", folder)
    for name in ARRAYS:
        require((folder / f"{name}.npy").exists(), f"lacks {name}.npy: {ARRAYS[name]}")
    load = np.lib.format.read_array
    parts = [cache.decode(folder / f"{name}.npy", load) for name in ARRAYS]
    return filled(cache, *parts)


def read_npz(path: Path) -> Cache:
    """Read an .npz of three arrays."""
    cache = Cache("NumPy arrays in one file", path.parent)

    def load(raw: io.BytesIO) -> list[np.ndarray]:
        with np.load(raw, allow_pickle=False) as arrays:
            for name in ARRAYS:
                require(name in arrays, f"lacks the array {name}: {ARRAYS[name]}")
            return [arrays[name] for name in ARRAYS]

    return filled(cache, *cache.decode(path, load))


def read_datasets(folder: Path, column: str) -> Cache:
    """Read a folder of `datasets`: of a DatasetDict, or of one Dataset that says the splits."""
    cache = Cache("a data set that Hugging Face's `datasets` saved", folder)
    if not (folder / DICT).exists():
        columns = columns_of(cache, folder)
        require("split" in columns, f"lacks the column split: {ARRAYS['split']}")
        words = [as_split(word) for word in columns["split"].tolist()]
        return filled(cache, *vectors_of(columns, column), np.array(words))
    names = cache.decode(folder / DICT, names_of_splits, JSON)
    parts = [vectors_of(columns_of(cache, folder / name), column) for name in names]
    require(bool(parts), f"has a {DICT} that names no split")
    widths = {feats.shape[1] for feats, _ in parts}
    require(len(widths) == 1, f"has splits of different widths, {sorted(widths)}")
    feats, labels = (np.concatenate(found) for found in zip(*parts))
    words = [as_split(name) for name, (_, own) in zip(names, parts) for _ in own]
    return filled(cache, feats, labels, np.array(words))


def names_of_splits(raw: io.BytesIO) -> list[str]:
    """Return the folders of a DatasetDict. Raises Refused for others than in its own."""
    names = json.load(raw)["splits"]
    inside = isinstance(names, list) and all(Path(name).name == name for name in names)
    require(inside, f"has a {DICT} that leads elsewhere")
    return names


def names_of_files(raw: io.BytesIO) -> list[str]:
    """Return the files of a Dataset. Raises Refused for others than in its folder."""
    state = json.load(raw)
    chosen = any(value for key, value in state.items() if key.startswith("_indices"))
    require(not chosen, f"has a {STATE} that chooses among rows: save it with a newer `datasets`")
    names = [file["filename"] for file in state["_data_files"]]
    require(all(Path(name).name == name for name in names), f"has a {STATE} that leads elsewhere")
    return names


def columns_of(cache: Cache, folder: Path) -> dict[str, np.ndarray]:
    """Return the columns of a Dataset that all of its files have."""
    names = cache.decode(folder / STATE, names_of_files, JSON)
    require(bool(names), f"has a {STATE} that names no file")
    files = [cache.decode(folder / name, arrow.read) for name in names]
    alike = {}
    for name in set.intersection(*map(set, files)):
        parts = [file[name] for file in files]
        if len({part.shape[1:] for part in parts}) == 1:
            alike[name] = np.concatenate(parts)
    return alike


def vectors_of(columns: Mapping[str, np.ndarray], column: str) -> tuple[np.ndarray, np.ndarray]:
    """Return features and labels. column: that of the features, "" for the only one of vectors."""
    vectors = sorted(name for name, values in columns.items() if values.ndim == 2)
    named = f"the column {column!r}" if column else "a column"
    chosen = [name for name in vectors if name == (column or name)]
    require(bool(chosen), f"lacks {named} of vectors of floats, all of one length")
    several = f"has the columns of vectors {', '.join(vectors)}: name one with --column"
    require(len(chosen) == 1, several)
    require("label" in columns, f"lacks the column label: {ARRAYS['labels']}")
    return columns[chosen[0]], columns["label"]


def as_split(word: str) -> str:
    """Return a split as we spell it; what is none stays as it is, cut to what can be shown."""
    return SPELT.get(str(word).lower(), str(word)[:20])


def read_table(path: Path) -> Cache:
    """Read a table of vectors."""
    suffix = path.suffix.lower()
    cache = Cache(f"a table ({suffix})", path.parent)
    if suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ValueError(
            f"{path} is not read without pyarrow: install it, or save the table as .csv"
        )
    frame = cache.decode(path, parquet_of if suffix == ".parquet" else csv_of)
    columns = numbered([str(name) for name in frame.columns])
    try:
        feats = frame[columns].to_numpy(float)
    except (ValueError, TypeError):
        raise Refused("has features that are no numbers") from None
    require(frame["split"].notna().all(), f"has rows without a split: {ARRAYS['split']}")
    words = [str(word)[:20] for word in frame["split"]]
    return filled(cache, feats, frame["label"].to_numpy(), np.array(words, str))


def csv_of(raw: io.BytesIO) -> pd.DataFrame:
    """Read a CSV file. Raises Refused for rows of more values than columns."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        try:
            return pd.read_csv(raw, index_col=False)
        except pd.errors.ParserWarning:
            advice = "name each column in the first line"
            raise Refused(f"has rows of more values than columns: {advice}") from None


def parquet_of(raw: io.BytesIO) -> pd.DataFrame:
    """Read a Parquet file but for an index that pandas wrote.

    Raises Refused for columns of other than numbers, and beyond SIZE, before they are unpacked: a
    byte may stand for any number of them.
    """
    from pyarrow import parquet, types

    with parquet.ParquetFile(raw) as f:
        schema, about = f.schema_arrow, f.metadata
    index = (schema.pandas_metadata or {}).get("index_columns", [])
    kinds = {field.name: field.type for field in schema if field.name not in index}
    require(len({*schema.names}) == len(schema), "names a column twice")
    for name in numbered([*kinds]):
        number = types.is_integer(kinds[name]) or types.is_floating(kinds[name])
        require(number, f"has the column {name}, which holds no numbers")
    groups = [about.row_group(i) for i in range(about.num_row_groups)]
    size = sum(max(group.total_byte_size, 8 * group.num_rows * len(kinds)) for group in groups)
    require(size <= SIZE, f"holds more than {SIZE} bytes")
    texts = ["label", "split"]  # one text may stand in each row
    with parquet.ParquetFile(raw, read_dictionary=texts) as f:
        return f.read(columns=[*kinds]).to_pandas(ignore_metadata=True)


def numbered(columns: list[str]) -> list[str]:
    """Return the feature columns in the order of their numbers: f2 before f10.

    Raises Refused for others, and where those of labels and splits are missing.
    """
    for name, array in (("label", "labels"), ("split", "split")):
        require(name in columns, f"lacks the column {name}: {ARRAYS[array]}")
    found = {name: NUMBERED.fullmatch(name) for name in columns if name not in ("label", "split")}
    other = [name for name, match in found.items() if not match]
    require(not other, f"has the column {', '.join(other[:3])}, which is neither numbered nor read")
    numbers = {int(match[2]): name for name, match in found.items() if match}
    fronts = {match[1] for match in found.values() if match}
    first = min(numbers, default=0)
    whole = sorted(numbers) == [*range(first, first + len(numbers))]
    index = [name for name in found if name.startswith("Unnamed")]
    require(not index, "has the numbers of its rows as a column: save it with index=False")
    fine = len(fronts) == 1 and len(numbers) == len(found) and whole and first in (0, 1)
    require(fine, "has feature columns that are not numbered from 0 or 1 on without gaps")
    return [numbers[number] for number in sorted(numbers)]


def filled(cache: Cache, feats: np.ndarray, labels: np.ndarray, split: np.ndarray) -> Cache:
    """Put three arrays of one row for each image into a cache."""
    fine = feats.ndim == 2 and labels.shape == split.shape == feats.shape[:1]
    shapes = f"features {feats.shape}, labels {labels.shape}, split {split.shape}"
    require(fine, f"has arrays of shapes that do not fit: {shapes}")
    require(split.dtype.kind in "US", f"has a split that is no text: {ARRAYS['split']}")
    cache.feats = feats
    cache.labels = labels
    cache.split = split.astype(str).tolist()
    cache.ids = [f"row/{i}" for i in range(len(feats))]
    return cache


def check(cache: Cache, n_cls: int) -> None:
    """Raise Refused for no features, labels beyond the classes, and other splits than ours."""
    labels = cache.labels
    require(cache.feats.size > 0, "has no features")
    require(cache.feats.dtype.kind in "fiu", "has features that are no real numbers")
    require(labels.dtype.kind in "iu", "has labels that are not whole numbers")
    low, high = labels.min(), labels.max()
    beyond = f"has labels from {low} to {high} for {n_cls} class names"
    require(low >= 0 and high < n_cls, f"{beyond}: labels count from 0")
    other = sorted({*cache.split} - {*SPLITS})
    require(not other, f"has the split {', '.join(other[:3])!r}: {ARRAYS['split']}")
    for split in ("train", "test"):
        require(split in cache.split, f"has no images of the split {split}")


def unit(feats: np.ndarray, what: str) -> np.ndarray:
    """Return features (n, d) at unit length, in half precision as they are stored.

    what: of which each row is one. Raises Refused for a row that is not finite or zero.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        rows = feats.astype(np.float64)
        length = np.linalg.norm(rows, axis=1, keepdims=True)
    bad = np.flatnonzero(~np.isfinite(length))
    require(not len(bad), f"has features of {len(bad)} {what} that are not finite")
    bad = np.flatnonzero(length == 0)
    require(not len(bad), f"has features of {len(bad)} {what} that are zero")
    return (rows / length).astype(np.float16)


def check_unpacked(raw: io.BytesIO) -> None:
    """Raise Refused for a zip, which .npz and .pt are, that stands for more than SIZE bytes."""
    if zipfile.is_zipfile(raw):
        with zipfile.ZipFile(raw) as packed:
            size = sum(member.file_size for member in packed.infolist())
        require(size <= SIZE, f"holds more than {SIZE} bytes")
    raw.seek(0)
