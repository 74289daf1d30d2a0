"""The features of a data set as one file to hand on: whoever has it makes every table without the images.

A pack is an HDF5 file with a group for each features file (`feats` and, where they were made, `patches` and `views`) that holds
all of it, as `fpl.features` describes. There is no pickle, no link and no path of the machine that it comes from. The text tower
is not in it: the receiver loads the model and the weights that the provenance names.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath

import h5py
import numpy as np

from fpl.data.features import COLUMNS, CONTENT, OPTIONAL, digest, parts
from fpl.data.files import atomic_write

FORMAT = "fpl features pack 1"
DIMENSIONS = {"feats": 2, "patches": 3, "views": 3}
SHARED = ("model", "weights", "transform", "manifest", "skipped")  # provenance in which all groups agree


BROKEN = (OSError, KeyError, RuntimeError, TypeError, AttributeError, ValueError)  # what HDF5 has for a file that is not in order


def export(files: Mapping[str, Path], name: str, path: Path) -> dict[str, str]:
    """Put those of the features files (by content) that exist into a pack of the data set `name`; what `verify` says of it.

    Raises FileNotFoundError without pooled features, and ValueError for what `verify` would refuse.
    """
    if not files["feats"].exists():
        raise FileNotFoundError(f"no features at {files['feats']}: make them with `fpl features`")
    if path.resolve() in {file.resolve() for file in files.values()}:
        raise ValueError(f"a pack at {path} would replace the features themselves: give it another name")
    with atomic_write(path) as temporary:
        with h5py.File(temporary, "w") as pack:
            for content, file in files.items():
                if file.exists():
                    with h5py.File(file, "r") as f:
                        pack.copy(f["/"], pack, content)
            pack.attrs["format"], pack.attrs["name"] = FORMAT, name
            pack.attrs["sha256"] = seal(pack)
        try:
            return verify(temporary)
        except ValueError as e:
            reason = str(e).removeprefix(f"{temporary} ")
            raise ValueError(f"the features of {name} make no pack that others could use: it {reason}") from None


def verify(path: Path) -> dict[str, str]:
    """What is in a pack, in words, once all of it was read and found to be whole and to belong together.

    Raises FileNotFoundError, and ValueError for another kind of file, wrong checksums, columns that do not fit, values that are
    not finite, and paths of the machine that it comes from. Takes little memory.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with h5py.File(path, "r") as pack:
            require(pack.attrs.get("format") == FORMAT, "is not one of `fpl features export`")
            require({"feats"} <= set(pack) <= set(CONTENT), f"holds {', '.join(pack)}")
            made = {content: check(pack, content) for content in pack}
            require(pack.attrs["sha256"] == seal(pack), "does not have the checksum that it carries")
            for content in made:
                belongs(pack, content, made)
            return described(pack, made["feats"])
    except BROKEN as e:
        reason = e if isinstance(e, Refused) else f"cannot be read ({e})"
        raise ValueError(f"{path} {reason}") from None


def unpack(path: Path, files: Mapping[str, Path], name: str, model: str, force: bool = False) -> dict[Path, bool]:
    """Put the features files of a pack where the settings look for them: their paths, and whether each had to be written.

    Raises ValueError for a pack that `verify` refuses, for one of another data set or model than the settings name, and, before
    any is written, for a different file that is there already, unless by `force`.
    """
    verify(path)
    with h5py.File(path, "r") as pack:
        its_model = json.loads(pack["feats"].attrs["provenance"])["model"]
        for what, wanted, found in (("data set", name, pack.attrs["name"]), ("model", model, its_model)):
            if found != wanted:
                raise ValueError(f"{path} has features of {what} {found!r}, params.yaml says {wanted!r}: correct it there")
        missing = [content for content in pack if held(files[content]) != pack[content].attrs["sha256"]]
        different = [str(files[content]) for content in missing if files[content].exists()]
        if different and not force:
            raise ValueError(f"{', '.join(different)} would be replaced by other features: move it away or give --force")
        for content in missing:
            with atomic_write(files[content]) as temporary, h5py.File(temporary, "w") as f:
                for column in pack[content]:
                    f.copy(pack[content][column], f, column)
                f.attrs.update(pack[content].attrs)
        return {files[content]: content in missing for content in pack}


class Refused(ValueError):
    """What is wrong with a pack."""


def require(fine: bool, otherwise: str) -> None:
    if not fine:
        raise Refused(otherwise)


def seal(pack: h5py.File) -> str:
    """SHA-256 over what a pack says of itself and the checksums of its groups."""
    said = [pack.attrs["format"], pack.attrs["name"], {content: pack[content].attrs["sha256"] for content in pack}]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def held(file: Path) -> str | None:
    """The checksum of what a features file holds now."""
    try:
        with h5py.File(file, "r") as f:
            return digest(f)
    except BROKEN:
        return None


def check(pack: h5py.File, content: str) -> dict[str, str]:
    """The provenance of a group that is in order by itself."""
    for name in [content, *(f"{content}/{column}" for column in pack[content])]:
        require(isinstance(pack.get(name, getlink=True), h5py.HardLink), f"has a link in the place of {name}")
    group = pack[content]
    needed = {content, *COLUMNS} | ({"rows"} if content == "views" else set())
    require(needed <= set(group) <= needed | {*OPTIONAL}, f"has the wrong columns in {content}: {', '.join(group)}")
    for name, data in group.items():
        whole = isinstance(data, h5py.Dataset) and not data.is_virtual and not data.external
        text = name not in (content, "labels", "rows")
        kind = h5py.check_string_dtype(data.dtype) if whole and text else None
        plain = whole and data.dtype == ("f2" if name == content else "i8")
        require(plain or kind is not None, f"has something else in the place of {content}/{name}")
        require(data.ndim == (DIMENSIONS[content] if name == content else 1), f"has {content}/{name} of shape {data.shape}")
        n = len(group[content])
        require(name in ("classes", "skipped") or len(data) == n, f"has {len(data)} {content}/{name} for {n} images")
    require(digest(group) == group.attrs["sha256"], f"has {content} that do not have the checksum they carry")
    made, labels = json.loads(group.attrs["provenance"]), group["labels"][:]
    require(made["content"] == content, f"has {made['content']} in the place of {content}")
    classes = len(set(group["classes"][:]))
    require(classes == len(group["classes"]), "has a class name twice")
    require(len(labels) > 0 and labels.min() >= 0 and labels.max() < classes, f"has labels beyond its {classes} classes")
    bad = sum(int((~np.isfinite(part)).any(axis=tuple(range(1, part.ndim))).sum()) for part in parts(group[content]))
    require(not bad, f"has {content} of {bad} images that are not finite")
    paths = [*group["image_id"].asstr()[:], *(group["skipped"].asstr()[:] if "skipped" in group else ())]
    for where in [made["model"].removeprefix("local-dir:"), *paths]:
        machine = PurePosixPath(where).is_absolute() or PureWindowsPath(where).drive or where.startswith("~")
        require(not machine, f"names {where}, a path of one machine: name it by the project's folder and extract again")
    return made


def belongs(pack: h5py.File, content: str, made: Mapping[str, Mapping[str, str]]) -> None:
    """Whether the features of a group are of the images and by the model of the pooled ones."""
    for key in SHARED:
        theirs, ours = made[content][key], made["feats"][key]
        require(theirs == ours, f"has {content} made with {key} {theirs!r} and pooled features with {ours!r}: extract them again")
    ids, own = pack["feats/image_id"][:], pack[content]["image_id"][:]
    rows = pack[content]["rows"][:] if "rows" in pack[content] else np.arange(len(own))
    there = rows.min() >= 0 and rows.max() < len(ids)
    require(there and np.array_equal(ids[rows], own), f"has {content} of other images than its pooled features")


def described(pack: h5py.File, made: Mapping[str, str]) -> dict[str, str]:
    """A pack in words."""
    feats = pack["feats"]
    counts = lambda name: ", ".join(f"{n} {value}" for value, n in sorted(Counter(feats[name].asstr()[:]).items()))  # noqa: E731
    said = {"data set": pack.attrs["name"], "model": made["model"], "weights": made["weights"]}
    said |= {"images": counts("split"), "classes": str(len(feats["classes"])), "domains": counts("domain")}
    if "client" in feats:
        said["clients"] = str(len(set(feats["client"].asstr()[:])))
    said["skipped"] = made["skipped"]
    return said | {name: f"{' x '.join(map(str, pack[name][name].shape))}, sha256 {pack[name].attrs['sha256']}" for name in pack}
