"""A pack holds the features of a data set in one file: who has it makes all tables without images.

It is an HDF5 file behind the checksum of its bytes, with a group for each features file (`feats`
and, where they were made, `patches` and `views`) that holds all of it, as `fpl.data.features`
describes. There is no pickle, no link and no path of the machine that it comes from. The text tower
is not in it: the receiver loads the model and the weights that the provenance names.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path, PureWindowsPath

import h5py
import numpy as np
import torch

from fpl.data.features import (
    BROKEN,
    DIMENSIONS,
    SAME,
    Refused,
    check_columns,
    digest,
    is_bad,
    opened,
    parts,
    require,
    written,
)
from fpl.data.files import atomic_write

FORMAT = "fpl features pack 2"
SHARED = (  # all groups agree in these
    *("model", "architecture", "weights", "transform"),
    *("data", "manifest", "pictures", "images", "skipped"),
)


def export(files: Mapping[str, Path], name: str, path: Path) -> dict[str, str]:
    """Put features files into a pack, and return what `verify` says of it.

    files: by content; those that exist are taken
    name: of the data set

    Raises FileNotFoundError without pooled features, and ValueError for what `verify` would refuse.
    """
    if not files["feats"].exists():
        make = f"make them with `fpl features` {SAME}"
        raise FileNotFoundError(f"no features at {files['feats']}: {make}")
    if path.resolve() in {file.resolve() for file in files.values()}:
        raise ValueError(
            f"a pack at {path} would replace the features themselves: give it another name"
        )
    with atomic_write(path) as temporary:
        with written(temporary, seal) as pack:
            for content, file in files.items():
                if file.exists():
                    with opened(file) as f:
                        pack.copy(f["/"], pack, content)
            pack.attrs["format"] = FORMAT
            pack.attrs["name"] = name
        try:
            return verify(temporary)
        except ValueError as e:
            reason = str(e).removeprefix(f"{temporary} ")
            raise ValueError(
                f"the features of {name} make no pack that others could use: it {reason}"
            ) from None


def verify(path: Path) -> dict[str, str]:
    """Read all of a pack, and say in words what is in it.

    Raises FileNotFoundError, and ValueError for another kind of file, wrong checksums, columns that
    do not fit, features that are zero or not finite, and paths of the machine that it comes from.
    Takes little memory.
    """
    with opened_pack(path) as pack:
        return check(pack)


@contextmanager
def opened_pack(path: Path) -> Iterator[h5py.File]:
    """Open a pack to read it. Raises as `opened`, and ValueError for what HDF5 does not open."""
    with ExitStack() as stack:
        try:
            pack = stack.enter_context(opened(path))
        except OSError as e:
            if str(path) in str(e):
                raise
            raise ValueError(f"{path} cannot be read ({e})") from None
        yield pack


def check(pack: h5py.File) -> dict[str, str]:
    """Say in words what is in an open pack. Raises as `verify` does."""
    try:
        require(pack.attrs.get("format") == FORMAT, "is not one of `fpl features export`")
        require({"feats"} <= set(pack) <= set(DIMENSIONS), f"holds {', '.join(pack)}")
        made = {content: check_group(pack, content) for content in pack}
        require(pack.attrs["sha256"] == seal(pack), "does not have the checksum that it carries")
        for content in made:
            check_belongs(pack, content, made)
        return describe(pack, made["feats"])
    except BROKEN as e:
        reason = e if isinstance(e, Refused) else f"cannot be read ({e})"
        raise ValueError(f"{pack.filename} {reason}") from None


def unpack(
    path: Path, files: Mapping[str, Path], name: str, model: str, force: bool = False
) -> dict[Path, bool]:
    """Put the features files of a pack where the settings look for them.

    files: these places, by content
    name, model: the data set and the model of the settings
    force: replace other features

    Returns for each place whether it had to be written. Raises ValueError for a pack that `verify`
    refuses, for one of another data set or model, and before any is written for other features that
    are there already.
    """
    with opened_pack(path) as pack:
        check(pack)
        made = json.loads(pack["feats"].attrs["provenance"])
        fits(path, "data set", pack.attrs["name"], name)
        fits(path, "model", made["model"], model)
        todo = [c for c in pack if checksum_of(files[c]) != pack[c].attrs["sha256"]]
        different = [str(files[content]) for content in todo if files[content].exists()]
        if different and not force:
            raise ValueError(
                f"{', '.join(different)} would be replaced by other features: "
                "move it away or give --force"
            )
        for content in todo:
            with atomic_write(files[content]) as temporary, written(temporary) as f:
                for column in pack[content].values():
                    f.copy(column, f)
                f.attrs["provenance"] = pack[content].attrs["provenance"]
        return {files[content]: content in todo for content in pack}


def fits(path: Path, what: str, found: str, wanted: str) -> None:
    """Raise ValueError if a pack is of something else than the settings name."""
    if found != wanted:
        raise ValueError(
            f"{path} has features of {what} {found!r}, params.yaml says {wanted!r}: "
            "correct it there"
        )


def seal(pack: h5py.File) -> str:
    """SHA-256 over what a pack says of itself and the checksums of its groups."""
    sums = {content: group.attrs["sha256"] for content, group in pack.items()}
    said = json.dumps([pack.attrs["format"], pack.attrs["name"], sums], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


def checksum_of(file: Path) -> str | None:
    """The checksum of what a features file holds now, None if it cannot be read."""
    try:
        with opened(file) as f:
            return f.attrs["sha256"]
    except (FileNotFoundError, ValueError):
        return None


def check_group(pack: h5py.File, content: str) -> dict[str, str]:
    """Raise Refused for a group that is not in order by itself; return its provenance."""
    link = pack.get(content, getlink=True)
    require(isinstance(link, h5py.HardLink), f"has a link in the place of {content}")
    group = pack[content]
    check_columns(group, content)
    same = digest(group) == group.attrs["sha256"]
    require(same, f"has {content} that do not have the checksum they carry")
    made = json.loads(group.attrs["provenance"])
    require(made["content"] == content, f"has {made['content']} in the place of {content}")
    check_values(group, content)
    check_path(made["model"].removeprefix("local-dir:"))
    for column in ("image_id", "skipped"):
        for path in group[column].asstr() if column in group else ():
            check_path(path)
    return made


def check_path(path: str) -> None:
    """Raise Refused for a path that exists on one machine only."""
    absolute = path.startswith(("/", "~")) or PureWindowsPath(path).drive
    advice = "name it by the project's folder and extract again"
    require(not absolute, f"names {path}, a path of one machine: {advice}")


def check_values(group: h5py.Group, content: str) -> None:
    """Raise Refused unless labels and class names fit, and for features zero or not finite."""
    labels = group["labels"][:]
    classes = len(group["classes"])
    require(classes == len(set(group["classes"])), "has a class name twice")
    fits = len(labels) > 0 and labels.min() >= 0 and labels.max() < classes
    require(fits, f"has labels beyond its {classes} classes")
    for name in {content, "text"} & set(group):
        bad = sum(int(is_bad(torch.from_numpy(part)).sum()) for part in parts(group[name]))
        what = "classes" if name == "text" else "images"
        require(not bad, f"has {name} of {bad} {what} that are zero or not finite")


def check_belongs(pack: h5py.File, content: str, made: Mapping[str, Mapping[str, str]]) -> None:
    """Raise Refused unless a group is of the images and by the model of the pooled features."""
    for key in SHARED:
        here = made[content][key]
        pooled = made["feats"][key]
        both = f"{key} {here!r} and pooled features with {pooled!r}"
        require(here == pooled, f"has {content} made with {both}: extract them again")
    group = pack[content]
    ids = pack["feats/image_id"][:]
    rows = group["rows"][:] if "rows" in group else np.arange(len(group["image_id"]))
    there = rows.min() >= 0 and rows.max() < len(ids)
    same = there and np.array_equal(ids[rows], group["image_id"][:])
    require(same, f"has {content} of other images than its pooled features")


def describe(pack: h5py.File, made: Mapping[str, str]) -> dict[str, str]:
    """Say in words what is in a pack."""
    feats = pack["feats"]
    said = {
        "data set": pack.attrs["name"],
        "model": made["model"],
        "weights": made["weights"],
        "images": counts(feats["split"]),
        "classes": str(len(feats["classes"])),
        "domains": counts(feats["domain"]),
    }
    if "client" in feats:
        said["clients"] = str(len(set(feats["client"])))
    said["skipped"] = made["skipped"]
    for content, group in pack.items():
        shape = " x ".join(map(str, group[content].shape))
        said[content] = f"{shape}, sha256 {group.attrs['sha256']}"
    return said


def counts(column: h5py.Dataset) -> str:
    """How often each text stands in a column."""
    numbers = Counter(column.asstr())
    return ", ".join(f"{numbers[text]} {text}" for text in sorted(numbers))
