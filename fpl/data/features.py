"""Frozen image features of a data set, stored once per backbone and read from one HDF5 file.

The file holds feats (n, d) f16, labels (n,) i64, the strings split, domain and image_id (n,), and
classes (c,) in label order; where the manifest has them, client (n,); where images were left out,
skipped (k,), their ids. Attributes are the provenance as JSON, and a SHA-256 over provenance and
content. Features are stored in half precision and loaded as unit vectors in single precision:
half-precision logits would flip up to 0.9 % of the predictions, the file none.

Files of their own, made when asked for, hold in the place of feats
  patches (n, M, d) f16, not normalised: M times the size;
  views (m, V, d) f16 unit vectors of V random crops of every training image, and rows (m,), the
  numbers of these images among the n.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fpl.data.manifest import Manifest
from fpl.data.views import Views
from fpl.prompts import Clip

COMMANDS = {  # what a file can hold of an image, and the command that makes it
    "feats": "fpl features",
    "patches": "fpl features --patches",
    "views": "fpl features --views V",
}
CONTENT = tuple(COMMANDS)
COLUMNS = ("labels", "split", "domain", "image_id", "classes")
OPTIONAL = ("client", "rows", "skipped")  # columns that a file has where they say something
INFORMATION = ("precision", "batch")  # provenance that no request is compared with
LIBRARIES = ("torch", "open_clip_torch", "torchvision", "pillow")
BROKEN = (OSError, KeyError, RuntimeError, TypeError, ValueError)  # what HDF5 has for a broken file
PART = 256  # images whose features are checked at once: the check makes copies


@dataclass(frozen=True)
class Features:
    """A features file in memory.

    feats: unit vectors in single precision; of patches and views, those in half as they are stored.
    split, domain, image_id: one for each image; the id is the path that the manifest lists.
    client: whom each image belongs to, where the manifest says it.
    rows: of views, the numbers of their images in the file of pooled features.
    skipped: ids of images that could not be read and are left out.
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


def file_of(path: Path, content: str) -> Path:
    """Name the file of some content, beside `path`, the file of pooled features."""
    return path if content == "feats" else path.with_stem(f"{path.stem}_{content}")


def provenance(
    manifest: Manifest, clip: Clip, content: str = "feats", views: Views | None = None
) -> dict[str, str]:
    """Say what features are made of, and with what; a request is compared with what a file says."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES]
    made = {
        **clip.provenance,
        "manifest": manifest.sha256,
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
    """Read provenance and ids of images left out, unchecked; both empty without a readable file."""
    try:
        with h5py.File(path, "r") as f:
            skipped = f["skipped"].asstr()[:].tolist() if "skipped" in f else []
            return json.loads(f.attrs["provenance"]), skipped
    except BROKEN:
        return {}, []


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

    Raises FileNotFoundError when there is no file; ValueError for another provenance or content
    (naming both values), a wrong checksum, or features that are not finite.
    """
    command = COMMANDS[content]
    if not path.exists():
        raise FileNotFoundError(f"no features at {path}: make them with `{command}`")
    data, made, checksum = read(path, content)
    for key, wanted in {**(request or {}), "content": content}.items():
        if key not in INFORMATION and made.get(key) != wanted:
            raise ValueError(
                f"{path} was made with {key} {made.get(key)!r}, asked for is {wanted!r}: "
                f"run `{command}` or correct params.yaml"
            )
    feats = torch.from_numpy(data[content])
    finite = [part.isfinite().flatten(1).all(1) for part in feats.split(PART)]
    bad = (~torch.cat(finite)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"{path}: features of {len(bad)} images are not finite, "
            f"the first is {data['image_id'][bad[0]]}: extract again"
        )
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
        **columns,
    )


def read(path: Path, content: str) -> tuple[dict[str, Any], dict[str, str], str]:
    """Read a file's columns, provenance and checksum. Raises ValueError if it is damaged."""
    again = f"delete it and run `{COMMANDS[content]}`"
    try:
        with h5py.File(path, "r") as f:
            made = json.loads(f.attrs["provenance"])
            checksum = f.attrs["sha256"]
            found = digest(f)
            there = [name for name in OPTIONAL if name in f]
            data = {}
            for name in (made.get("content", content), *COLUMNS, *there):
                is_text = f[name].dtype == object
                data[name] = f[name].asstr()[:] if is_text else f[name][:]
    except BROKEN as e:
        raise ValueError(f"{path} is damaged, it cannot be read ({e}): {again}") from e
    if found != checksum:
        raise ValueError(
            f"{path} is damaged, its content does not have the checksum it carries: {again}"
        )
    return data, made, checksum


def digest(f: h5py.Group) -> str:
    """Hash provenance and all datasets, in the order of their names, by SHA-256."""
    total = hashlib.sha256(f.attrs["provenance"].encode())
    for name in sorted(f):
        if f[name].dtype == object:
            total.update(b"\0".join(f[name][:]))
        else:
            for part in parts(f[name]):
                total.update(part.data)
    return total.hexdigest()


def parts(data: h5py.Dataset) -> Iterator[np.ndarray]:
    """Read the rows of a dataset some 4 MB at a time."""
    n = len(data)
    step = max(1, 2**22 // max(1, data.nbytes // max(1, n)))
    for begin in range(0, n, step):
        yield data[begin : begin + step]
