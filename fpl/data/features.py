"""Frozen image features of a data set, stored once per backbone and read from one HDF5 file.

The file holds feats (n, d) f16, labels (n,) i64, the strings split, domain and image_id (n,), and
classes (c,) in label order; where the manifest has them, client (n,); where images were left out,
skipped (k,), their ids; where others made the features and gave them, text (c, d) f16, unit text
features of the classes. Attributes are the provenance as JSON, and a SHA-256 over provenance and
content, names, types and shapes included. In front are 512 bytes with the SHA-256 of all that
follows, which is compared before HDF5 opens the file: damage can make it crash or hang. Features
are stored in half precision and loaded as unit vectors in single precision: half-precision logits
would flip up to 0.9 % of the predictions, the file none.

Files of their own, made when asked for, hold in the place of feats
  patches (n, M, d) f16, not normalised: M times the size;
  views (m, V, d) f16 unit vectors of V random crops of every training image, and rows (m,), the
  numbers of these images among the n.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fpl.data.files import NO_LOCKS
from fpl.data.manifest import Manifest
from fpl.data.views import Views
from fpl.prompts import Clip

COMMANDS = {  # what a file can hold of an image, and the command that makes it
    "feats": "fpl features",
    "patches": "fpl features --patches",
    "views": "fpl features --views V",
}
CONTENT = tuple(COMMANDS)
SAME = "and the same --data, --set and --params"
COLUMNS = ("labels", "split", "domain", "image_id", "classes")
OPTIONAL = ("client", "rows", "skipped", "text")  # that a file has where they say something
DIMENSIONS = {"feats": 2, "patches": 3, "views": 3}
# The columns that are no text.
NUMBERS = {**dict.fromkeys((*CONTENT, "text"), "f2"), "labels": "i8", "rows": "i8"}
INFORMATION = ("precision", "batch")  # provenance that no request is compared with
LIBRARIES = ("torch", "open_clip_torch", "torchvision", "pillow")
PICTURES = {  # how they are read, by whether they are to be upright
    False: "as they are stored",
    True: "turned by their EXIF tag, and on white where they are transparent",
}
# What HDF5 has for a broken file.
BROKEN = (OSError, KeyError, RuntimeError, TypeError, AttributeError, ValueError)
PART = 256  # images whose features are checked at once: the check makes copies
BLOCK = 512  # bytes in front of what HDF5 reads


class Refused(ValueError):
    """What is wrong with a file."""


def require(fine: bool, otherwise: str) -> None:
    """Raise Refused with what is wrong."""
    if not fine:
        raise Refused(otherwise)


@dataclass(frozen=True)
class Features:
    """A features file in memory.

    feats: unit vectors in single precision; of patches and views, those in half as they are stored.
    split, domain, image_id: one for each image; the id is the path that the manifest lists.
    client: whom each image belongs to, where the manifest says it.
    rows: of views, the numbers of their images in the file of pooled features.
    skipped: ids of images that could not be read and are left out.
    text: unit text features of the classes in single precision, where they were imported.
    patches: features of the images' patches, where `fpl.features` was asked for them.
    """

    feats: Float[Tensor, "images *M d"]
    labels: Int[Tensor, " images"]
    split: np.ndarray
    domain: np.ndarray
    image_id: np.ndarray
    classes: list[str]
    provenance: dict[str, str]
    sha256: str
    client: np.ndarray | None = None
    rows: Int[Tensor, " images"] | None = None
    skipped: list[str] = field(default_factory=list)
    text: Float[Tensor, "c d"] | None = None
    patches: Float[Tensor, "images M d"] | None = None


def of_features(manifest: Manifest, features: Features) -> Manifest:
    """Give the rows of a manifest that have features, in the order of these: row i is of feature i.

    Raises ValueError for features of other images than the manifest lists.
    """
    found = manifest.without(features.skipped)
    if features.rows is not None:
        found = replace(found, rows=[found.rows[i] for i in features.rows.tolist()])
    if [row["path"] for row in found.rows] != features.image_id.tolist():
        raise ValueError(
            f"the manifest in {manifest.folder} lists other images than the features: "
            "run `fpl features`"
        )
    return found


def provenance(
    manifest: Manifest, clip: Clip, content: str = "feats", views: Views | None = None
) -> dict[str, str]:
    """Say what features are made of, and with what; a request is compared with what a file says."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES]
    made = {
        **clip.provenance,
        "data": manifest.name or manifest.folder.name,
        "manifest": manifest.sha256,
        "pictures": PICTURES[manifest.upright],
        "libraries": ", ".join(versions),
        "content": content,
        "skipped": summary(manifest.skipped),
    }
    if views and content == "views":
        made["views"] = str(views)
    return made


def summary(skipped: Sequence[str]) -> str:
    """Say how many images are left out, and by a hash which these are."""
    if not skipped:
        return "none"
    ids = hashlib.sha256("\0".join(skipped).encode()).hexdigest()
    return f"{len(skipped)} images, {ids[:16]}"


def header(path: Path) -> tuple[dict[str, str], list[str]]:
    """Read provenance and ids of images left out; both empty without a file that is whole.

    Raises OSError for a file that is in use or may not be read.
    """
    try:
        with opened(path) as f:
            skipped = f["skipped"].asstr()[:].tolist() if "skipped" in f else []
            return json.loads(f.attrs["provenance"]), skipped
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        return {}, []


@contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """Open a features file to read it, if its bytes are those that were written.

    Raises ValueError if they are not, and OSError for a file that is not there or in use.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    with path.open("rb") as raw:
        share(raw, path)
        if raw.read(BLOCK) != mark_of(raw):
            raise ValueError(
                f"{path} is damaged, or an older version made it: "
                "its bytes do not have the checksum in front of them"
            )
        with open_hdf5(path) as f:
            yield f


def open_hdf5(path: Path) -> h5py.File:
    """Open a file without locks, unless this process has it open with them: HDF5 wants the same."""
    try:
        return h5py.File(path, "r", locking=False)
    except OSError:
        return h5py.File(path, "r")


def share(raw: BufferedIOBase, path: Path) -> None:
    """Raise OSError if another program, such as one that uses HDF5, has a file for itself."""
    try:
        fcntl.flock(raw, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError(
            f"{path} is in use by another program: close it there, or wait for its end"
        ) from None
    except OSError as e:
        if e.errno not in NO_LOCKS:
            raise


def seal(path: Path) -> None:
    """Write the checksum of a file's bytes in front of them."""
    with path.open("r+b") as raw:
        raw.seek(BLOCK)
        mark = mark_of(raw)
        raw.seek(0)
        raw.write(mark)


def mark_of(raw: BufferedIOBase) -> bytes:
    """Give the first BLOCK bytes of a features file whose other bytes are read here."""
    checksum = hashlib.file_digest(raw, "sha256").hexdigest()
    return f"fpl features, SHA-256 of the bytes from {BLOCK} on: {checksum}\n".encode().ljust(BLOCK)


def load(
    path: Path,
    request: Mapping[str, str] | None = None,
    device: str = "cpu",
    content: str = "feats",
) -> Features:
    """Open a features file, and check that it is whole, finite and what was asked for.

    Takes little more memory than the file.

    request: any fields of the provenance, such as model, weights, transform and manifest; for
        patches and views, the provenance of the pooled features that they shall belong to.

    Raises FileNotFoundError when there is no file, and OSError for one that is in use; ValueError
    for another provenance or content (naming both values), a wrong checksum, columns of other
    types or shapes, or features that are zero or not finite.
    """
    command = COMMANDS[content]
    if not path.is_file():
        raise FileNotFoundError(f"no features at {path}: make them with `{command}` {SAME}")
    data, made, checksum = read(path, content)
    for key, wanted in {**(request or {}), "content": content}.items():
        if key not in INFORMATION and made.get(key) != wanted:
            raise ValueError(
                f"{path} was made with {key} {made.get(key)!r}, asked for is {wanted!r}: "
                f"run `{command}` or correct params.yaml"
            )
    feats = torch.from_numpy(data[content])
    bad = torch.cat([*map(is_bad, feats.split(PART))]).nonzero().flatten().tolist()
    if bad:
        first = f"the first is {data['image_id'][bad[0]]}: extract again"
        raise ValueError(f"{path}: features of {len(bad)} images are zero or not finite, {first}")
    if content == "feats":
        feats = F.normalize(feats.float(), dim=-1)
    rows = torch.from_numpy(data["rows"]).to(device) if "rows" in data else None
    columns = {name: data[name] for name in ("split", "domain", "image_id")}
    return Features(
        feats=feats.to(device),
        labels=torch.from_numpy(data["labels"]).to(device),
        classes=list(data["classes"]),
        provenance=made,
        sha256=checksum,
        client=data.get("client"),
        rows=rows,
        skipped=list(data.get("skipped", ())),
        text=text_in(data, path, device),
        **columns,
    )


def is_bad(rows: Float[Tensor, "n *M d"]) -> Bool[Tensor, " n"]:
    """Say of each row whether it is zero or not finite."""
    flat = rows.flatten(1)
    return ~(flat.isfinite().all(1) & flat.any(1))


def text_in(data: Mapping[str, Any], path: Path, device: str) -> Float[Tensor, "c d"] | None:
    """Return a file's unit text features. Raises ValueError for some zero or not finite."""
    if "text" not in data:
        return None
    text = F.normalize(torch.from_numpy(data["text"]).float(), dim=-1)
    if is_bad(text).any():
        raise ValueError(f"{path} has text features that are zero or not finite: import them again")
    return text.to(device)


def read(path: Path, content: str) -> tuple[dict[str, Any], dict[str, str], str]:
    """Read a file's columns, provenance and checksum. Raises as `load` does."""
    again = f"`{COMMANDS[content]}` makes it again"
    try:
        with opened(path) as f:
            return columns_of(f, content)
    except ValueError as e:
        raise ValueError(f"{e}: {again}") from e


def columns_of(f: h5py.File, content: str) -> tuple[dict[str, Any], dict[str, str], str]:
    """Read what is in an open file. Raises ValueError if its columns are not as they should be."""
    try:
        made = json.loads(f.attrs["provenance"])
        held = made.get("content", content)
        check_columns(f, held)
        data = {}
        for name in f:
            data[name] = f[name][:] if name in NUMBERS else f[name].asstr()[:]
        return data, made, f.attrs["sha256"]
    except BROKEN as e:
        reason = e if isinstance(e, Refused) else f"cannot be read ({e})"
        raise ValueError(f"{f.filename} is damaged, it {reason}") from e


def check_columns(group: h5py.Group, content: str) -> None:
    """Raise Refused unless a group has a features file's columns, with their types and shapes."""
    needed = {content, *COLUMNS} | ({"rows"} if content == "views" else set())
    named = needed <= set(group) <= needed | set(OPTIONAL)
    require(named, f"has the wrong columns in {content}: {', '.join(group)}")
    for name in group:
        link = group.get(name, getlink=True)
        require(isinstance(link, h5py.HardLink), f"has a link in the place of {content}/{name}")
    images = len(group[content])
    for name, data in group.items():
        place = f"{content}/{name}"
        fine = is_inside(data) and is_of_type(data, name)
        require(fine, f"has something else in the place of {place}")
        if name == "text":
            wanted = (len(group["classes"]), group[content].shape[-1])
            require(data.shape == wanted, f"has {place} of shape {data.shape}, not {wanted}")
            continue
        require(data.ndim == DIMENSIONS.get(name, 1), f"has {place} of shape {data.shape}")
        fits = len(data) == images or name in ("classes", "skipped")
        require(fits, f"has {len(data)} {place} for {images} images")


def is_inside(data: h5py.Dataset | h5py.Group) -> bool:
    """Say whether a dataset lies in its file as it is: all of it, not packed, not elsewhere."""
    if not isinstance(data, h5py.Dataset) or data.is_virtual or data.external or data.chunks:
        return False
    if data.id.get_storage_size() < data.nbytes:  # text takes more
        return False
    return data.dtype != object or text_size(data) <= Path(data.file.filename).stat().st_size


def text_size(data: h5py.Dataset) -> int:
    """Bytes of all texts of a column, unread: a text in the file may stand for any number."""
    offset = data.id.get_offset() or 0
    places = np.fromfile(data.file.filename, "<u4, V12", data.size, offset=offset)
    return int(places["f0"].sum(dtype=np.int64))


def is_of_type(data: h5py.Dataset, column: str) -> bool:
    """Say whether a column has its type of number, or text."""
    if column in NUMBERS:
        return data.dtype == NUMBERS[column]
    return h5py.check_string_dtype(data.dtype) is not None


def hash_in(path: Path) -> str:
    """Return the hash that a features file says it has, "" where it cannot be read."""
    try:
        with h5py.File(path, locking=False) as f:
            return f.attrs["sha256"]
    except (OSError, KeyError):
        return ""


def digest(f: h5py.Group) -> str:
    """Hash provenance and all datasets, in the order of their names, by SHA-256."""
    total = hashlib.sha256(f.attrs["provenance"].encode())
    for name in sorted(f):
        data = f[name]
        head = json.dumps([name, data.dtype.str, data.shape])
        total.update(head.encode())
        if data.dtype == object:
            total.update(b"\0".join(data[:]))
        else:
            for part in parts(data):
                total.update(part.data)
    return total.hexdigest()


@contextmanager
def written(path: Path, hashed: Callable[[h5py.File], str] = digest) -> Iterator[h5py.File]:
    """Give a new file of features to fill, and seal it in the end.

    hashed: what hashes its content, of a pack with several groups.
    """
    with h5py.File(path, "w", userblock_size=BLOCK, locking=False) as f:
        yield f
        f.attrs["sha256"] = hashed(f)
    seal(path)


def parts(data: h5py.Dataset) -> Iterator[np.ndarray]:
    """Read the rows of a dataset some 4 MB at a time."""
    n = len(data)
    step = max(1, 2**22 // max(1, data.nbytes // max(1, n)))
    for begin in range(0, n, step):
        yield data[begin : begin + step]
