"""Images of one's own: a CSV file that lists them, or folders."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fpl.data.datasets.layouts import files_in, stratified
from fpl.data.manifest import SPLITS, Manifest, Row, assemble, is_label, read_table
from fpl.data.pictures import is_picture

# How people call the splits, whatever the case.
SPELT = {"training": "train", "valid": "val", "validation": "val", "dev": "val", "testing": "test"}
SPELT |= {split: split for split in SPLITS}
DEPTH = 6  # levels of a folder that are looked at
IN_CSV = "or list the images in a CSV file"


def read_own(root: Path) -> Manifest:
    """The manifest of a CSV file, or of a folder of images.

    Raises FileNotFoundError where neither is, and ValueError for what can be read in two ways.
    """
    if root.is_file():
        rows = read_csv(root)
        manifest = assemble(root.parent, rows, inside=False)
    elif root.is_dir():
        rows = read_folder(root)
        manifest = assemble(root, rows)
    else:
        raise FileNotFoundError(
            f"no own data at {root}: give a CSV file or a folder CLASS/FILE or DOMAIN/CLASS/FILE"
        )
    check_doubles(root, manifest.folder, rows)
    return manifest


def read_folder(root: Path) -> list[Row]:
    """Read images CLASS/FILE, DOMAIN/CLASS/FILE or SPLIT/CLASS/FILE; warn of other files.

    Labels are in the order of the sorted class names. Where no splits are given, a fifth of each
    domain's images is for testing, stratified by class.
    """
    levels = [files_in(root, depth) for depth in range(1, DEPTH + 1)]
    images = [[path for path in level if is_picture(path)] for level in levels]
    _, flat, deep, *_ = images
    unread = [path for level in levels for path in level if not is_picture(path)]
    tell(root, unread, "of kinds that are not read as images")
    elsewhere = [path for level in (images[0], *images[3:]) for path in level]
    tell(root, elsewhere, "neither CLASS/FILE nor DOMAIN/CLASS/FILE, hence not read")
    if bool(flat) == bool(deep):
        found = f"both {flat[0]} and {deep[0]}" if flat else "no images"
        raise ValueError(
            f"{root} holds {found}: images must be in CLASS/FILE, "
            "or all of them in DOMAIN/CLASS/FILE"
        )
    names = sorted({path.parts[-2] for path in flat or deep})
    labels = {name: label for label, name in enumerate(names)}
    check_classes(root, flat or deep)
    tops = defaultdict(list)
    for path in flat or deep:
        name = path.parts[-2]
        top = path.parts[0] if deep else "own"
        tops[top].append(Row(str(path), labels[name], name, top, top))
    split_of = splits_of(root, tops)
    if not split_of:
        return [row for top, rows in tops.items() for row in stratified(rows, top)]
    ordered = sorted(tops, key=lambda top: SPLITS.index(split_of[top]))
    return [row._replace(split=split_of[top], domain="own") for top in ordered for row in tops[top]]


def tell(root: Path, files: Sequence[Path], what: str) -> None:
    """Warn of files that are there and not read, with their number, endings and the first."""
    if files:
        kinds = Counter(path.suffix.lower() or "no ending" for path in files).most_common(8)
        listed = ", ".join(f"{number} {kind}" for kind, number in kinds)
        said = f"{root} has {len(files)} files {what} ({listed}), the first is {files[0]}"
        warnings.warn(said, stacklevel=4)


def check_classes(root: Path, images: Iterable[Path]) -> None:
    """Raise ValueError for images in folders named as splits, where classes are expected."""
    for path in images:
        if path.parts[-2].casefold() in SPELT:
            raise ValueError(
                f"{root} has {path} in a folder named as a split, where its class is expected: "
                f"splits stand above classes, as in train/CLASS/FILE; rename it {IN_CSV}"
            )


def splits_of(root: Path, tops: Iterable[str]) -> dict[str, str]:
    """The split of each folder of classes, of none if they are not named as splits.

    Raises ValueError where some are, where two are the same split, and for names that only have
    such a word in them.
    """
    found = {top: SPELT[top.casefold()] for top in tops if top.casefold() in SPELT}
    others = [top for top in tops if top not in found]
    if found and others:
        raise ValueError(
            f"{root} has the folders {next(iter(found))} and {others[0]}, a split beside something "
            f"else: give train, val and test only, {IN_CSV}"
        )
    if len(set(found.values())) < len(found):
        raise ValueError(
            f"{root} has two folders for one split ({', '.join(found)}): put them into one"
        )
    for top in others:
        words = re.findall("[a-z]+", top.casefold())
        if any(word.removesuffix("set") in SPELT for word in words):
            raise ValueError(
                f"{root} has the folder {top}, which may be a split or a domain: rename it, to "
                f"train, val or test if it is a split, {IN_CSV}"
            )
    return found


def check_doubles(root: Path, folder: Path, rows: Iterable[Row]) -> None:
    """Raise ValueError for a picture that own data list twice, under whatever names.

    Several clients may have the same picture: that is warned of where they disagree about it.
    """
    anybodys: dict[Any, Row] = {}
    clients: dict[Any, Row] = {}
    disagree = []
    for row in rows:
        picture = identity(folder / row.path)
        other = clients.setdefault((picture, row.client), row)
        if other is not row:
            listed = " and ".join(f"{r.path} ({r.split}, {r.name})" for r in (other, row))
            raise ValueError(f"{root} has one picture twice, {listed}: list it once")
        first = anybodys.setdefault(picture, row)
        if (first.split, first.name) != (row.split, row.name):
            disagree.append(f"{row.path} ({first.split}, {first.name}; {row.split}, {row.name})")
    if disagree:
        said = f"{root} lists {len(disagree)} times a picture that another client has"
        warnings.warn(f"{said} in another split or class: {disagree[0]}", stacklevel=4)


def identity(path: Path) -> Any:
    """What two names of one file have in common."""
    try:
        status = path.stat()
        if status.st_ino:
            return status.st_dev, status.st_ino
    except OSError:
        pass
    return os.path.normpath(path)


def read_csv(path: Path) -> list[Row]:
    """Read a CSV file: path, split, class or label or both, and maybe domain and client."""
    columns, table = read_table(path, optional={"domain"})
    if not {"path", "split"} <= columns or not {"class", "label"} & columns:
        raise ValueError(
            f"{path} needs the columns path, split, and class or label in its first line, "
            f"it has {sorted(columns)}"
        )
    for line, row in table.items():
        check(row, columns, f"{path}, line {line}")
    if not {"class", "label"} <= columns:
        key = "class" if "class" in columns else "label"
        names = {row[key] for row in table.values()}
        in_order = sorted(names, key=int if all(map(is_label, names)) else str)
        labels = {name: str(i) for i, name in enumerate(in_order)}
        for row in table.values():
            row["class"] = row[key]
            row["label"] = labels[row[key]]
    rows = []
    for row in table.values():
        domain = row.get("domain") or "own"
        client = row.get("client", "")
        split = SPELT[row["split"].casefold()]
        rows.append(Row(row["path"], int(row["label"]), row["class"], split, domain, client))
    return rows


def check(row: dict[str, str], columns: set[str], where: str) -> None:
    """Raise ValueError for a row that lacks a value or has one that is not allowed."""
    if not all(row[column] for column in columns - {"domain"}):
        raise ValueError(f"{where}: needs one value for each column, not {list(row.values())}")
    for column in columns - {"path"}:
        value = row[column] or ""
        if value != value.strip():
            raise ValueError(f"{where}: {column} {value!r} has spaces around it: take them away")
    if row["split"].casefold() not in SPELT:
        raise ValueError(f"{where}: the split is train, val or test, not {row['split']!r}")
    if {"class", "label"} <= columns and not is_label(row["label"]):
        raise ValueError(f"{where}: beside a class the label is 0, 1, .., not {row['label']!r}")
