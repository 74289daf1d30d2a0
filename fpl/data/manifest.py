"""A manifest lists the images of a data set: a CSV file `path,label,class,split,domain[,client]`.

Paths are relative to the folder of the file. Labels are 0, 1, .. without gaps, and each stands for
one class name.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from fpl.data import pictures
from fpl.data.files import atomic_write, sha256

COLUMNS = ("path", "label", "class", "split", "domain")
SPLITS = ("train", "val", "test")
SOURCE = "source.json"  # beside a manifest: what it was made from
UNWRITABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # controls, and bytes of no text


class Row(NamedTuple):
    """One image as a reader of a data set finds it.

    path: relative to the data set's folder
    label: as the lists of the data set count them, gaps allowed
    name: the class in words, with spaces or underscores
    client: whom the image belongs to, where own data says it
    """

    path: str
    label: int
    name: str
    split: str = ""
    domain: str = ""
    client: str = ""


@dataclass(frozen=True)
class Manifest:
    """The images of a data set in memory.

    rows: a mapping from column to text for each image
    classes: the class names in the order of the labels
    sha256: hash of the CSV file
    skipped: paths of images that the CSV file lists and `rows` lacks, as they cannot be read
    name: of the data set, if it is not that of the folder
    upright: whether images are turned as their EXIF tag says, see fpl.data.pictures
    """

    folder: Path
    rows: list[dict[str, str]]
    classes: list[str]
    sha256: str
    skipped: tuple[str, ...] = ()
    name: str = ""
    upright: bool = False

    def without(self, paths: Collection[str]) -> Manifest:
        """The same manifest without some of its images."""
        left_out = {*self.skipped, *paths}
        rows = [row for row in self.rows if row["path"] not in left_out]
        return replace(self, rows=rows, skipped=tuple(sorted(left_out)))


def text_of(path: Path, most: int = pictures.SIZE) -> str:
    """Read a list in a text file of at most so many bytes.

    Raises OSError for one that cannot be opened, and ValueError naming it for one that is not in
    UTF-8, has a NUL character, is too large or no file.
    """
    try:
        # -sig: spreadsheets put a mark in front
        text = pictures.content(path, most).decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(
            f"{path} is not in UTF-8 from byte {e.start} on: save it in that encoding"
        ) from None
    except ValueError as e:
        raise ValueError(f"{path} is not read: {e}") from None
    if "\0" in text:
        raise ValueError(f"{path} has a NUL character, as UTF-16 has: save it as text in UTF-8")
    return text


def read_table(
    path: Path, optional: Collection[str] = ()
) -> tuple[set[str], dict[int, dict[str, str]]]:
    """Read the columns of a CSV file, and its rows by the number of the line on which each ends.

    Raises ValueError naming the line for what is no CSV, and for a row with more values than
    columns, or fewer unless only `optional` ones are missing.
    """
    reader = csv.DictReader(io.StringIO(text_of(path), newline=""), strict=True)
    try:
        columns = list(reader.fieldnames or [])
        numbered = ((reader.line_num, row) for row in reader)
        rows = dict(numbered)
    except csv.Error as e:
        raise ValueError(
            f"{path}, line {reader.reader.line_num}: {e}: is a quotation mark missing above?"
        ) from None
    if len(set(columns)) < len(columns):
        raise ValueError(f"{path} names a column twice ({', '.join(columns)}): take one away")
    for line, row in rows.items():
        absent = {column for column, value in row.items() if value is None}
        if None in row or absent - set(optional):
            raise ValueError(
                f"{path}, line {line}: needs one value for each column ({', '.join(columns)}), "
                f"not {list(row.values())}"
            )
    return set(columns), rows


def is_label(text: str) -> bool:
    return text.isdecimal() and len(text) < 10


def read_manifest(path: Path) -> Manifest:
    """Read a manifest from its CSV file.

    Raises ValueError for a missing column and, naming the line, for a label that is no number or
    has two class names.
    """
    columns, rows = read_table(path)
    missing = ", ".join(sorted(set(COLUMNS) - columns))
    if missing:
        raise ValueError(f"{path} lacks the column(s) {missing}: write them in its first line")
    if not rows:
        raise ValueError(f"{path} lists no images")
    names: dict[int, str] = {}
    for line, row in rows.items():
        label, name = row["label"], row["class"]
        if not is_label(label):
            raise ValueError(f"{path}, line {line}: a label is 0, 1, .., not {label!r}")
        above = names.setdefault(int(label), name)
        if above != name:
            raise ValueError(
                f"{path}, line {line}: label {label} is {above!r} above and {name!r} here"
            )
    labels = sorted(names)
    if labels != list(range(len(names))):
        raise ValueError(
            f"{path}: labels must be 0 .. {len(names) - 1} without gaps, found {labels}"
        )
    classes = [names[label] for label in labels]
    return Manifest(path.parent, [*rows.values()], classes, sha256(path))


def assemble(folder: Path, rows: list[Row], inside: bool = True) -> Manifest:
    """Make a manifest of what a reader found; its hash is that of the file in `folder`, if written.

    Labels close up to 0, 1, .. and class names get spaces for underscores. Raises ValueError for no
    rows, for a label with two class names, for two labels with the same, for names that no file can
    hold and, if all images must be `inside` the folder, for a path that leads out of it.
    """
    if not rows:
        raise ValueError("they name no images")
    names: dict[int, str] = {}
    for row in rows:
        name = names.setdefault(row.label, row.name)
        if name != row.name:
            raise ValueError(
                f"label {row.label} is {name!r} for one image and {row.name!r} for {row.path}"
            )
        if inside and (row.path.startswith("/") or ".." in row.path.split("/")):
            raise ValueError(f"the path {row.path!r} leads out of the folder")
    labels = {old: new for new, old in enumerate(sorted(names))}
    classes = [names[label].replace("_", " ") for label in labels]
    first: dict[str, int] = {}
    for label, name in zip(labels, classes):
        other = first.setdefault(name, label)
        if other != label:
            raise ValueError(
                f"the classes {names[other]!r} and {names[label]!r} are both {name!r} in prompts: "
                "give them one name, or different words"
            )
    entries = []
    for row in rows:
        label = labels[row.label]
        values = (row.path, str(label), classes[label], row.split, row.domain)
        for text in (*values, row.client):
            if UNWRITABLE.search(text):
                raise ValueError(f"{text!a} has characters that are not printed: rename it")
        client = {"client": row.client} if row.client else {}
        entries.append(dict(zip(COLUMNS, values)) | client)
    return Manifest(folder, entries, classes, hashlib.sha256(as_csv(entries)).hexdigest())


def as_csv(rows: list[dict[str, str]]) -> bytes:
    """The rows of a manifest as the content of its file."""
    return pd.DataFrame(rows, dtype=object).to_csv(index=False, lineterminator="\n").encode()


def write_manifest(manifest: Manifest, path: Path | None = None) -> Path:
    """Write a manifest, by default as `manifest.csv` in the folder of its images.

    Written elsewhere (where that folder is read-only) its paths lead from there to the images, and
    its hash is another.
    """
    path = path or manifest.folder / "manifest.csv"
    # `..` leads out of where a link leads to
    away = os.path.relpath(manifest.folder.resolve(), path.parent.resolve())
    rows = manifest.rows
    if away != ".":
        rows = [row | {"path": os.path.join(away, row["path"])} for row in rows]
    with atomic_write(path) as temporary:
        temporary.write_bytes(as_csv(rows))
    return path
