"""Frozen image features, computed once per (data set, backbone, weights, transform) into one HDF5 file.

Layout: feats (n, d) f16, labels (n,) i64, split, domain and image_id (n,) strings, classes (c,) strings in label order.
Attributes: the provenance as JSON, and a SHA-256 over provenance and content. Features are stored in half precision and
loaded as unit vectors in single precision: half-precision logits would flip up to 0.9 % of the predictions, the file none.

A second file, made when asked for, holds patches (n, M, d) f16 in the place of feats, not normalised: M times the size.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from fpl.clip import tokens
from fpl.files import sha256, writing

CONTENT = {  # what a file can hold of an image: (clip, batch of images) -> its features
    "feats": lambda clip, x: clip.model.encode_image(x, normalize=True),  # (b, d)
    "patches": lambda clip, x: tokens(clip, x)[1],  # (b, M, d)
}
COLUMNS = ("labels", "split", "domain", "image_id", "classes")
LIBRARIES = ("torch", "open_clip_torch", "torchvision", "pillow")
CHUNK = 256  # images between two points where a killed extraction can go on


@dataclass(frozen=True)
class Manifest:
    """The images of a data set: a CSV `path,label,class,split,domain` with paths relative to its folder."""

    folder: Path
    rows: list[dict[str, str]]
    classes: list[str]
    sha256: str


@dataclass(frozen=True)
class Features:
    """A features file in memory; split and domain are numpy strings, one per image.

    feats are unit vectors (n, d) in fp32; from a file of patches they are those, (n, M, d) in fp16 and not normalised.
    """

    feats: Float[Tensor, "images *M d"]
    labels: Int[Tensor, " images"]
    split: np.ndarray
    domain: np.ndarray
    classes: list[str]
    provenance: dict[str, Any]
    sha256: str


class Images(torch.utils.data.Dataset):
    """Decoded and transformed images of some manifest rows; the error for an unreadable one names the file."""

    def __init__(self, manifest: Manifest, transform, begin: int, end: int):
        self.manifest, self.transform, self.begin, self.end = manifest, transform, begin, end

    def __len__(self) -> int:
        return self.end - self.begin

    def __getitem__(self, i: int) -> Tensor:
        from PIL import Image

        path = self.manifest.folder / self.manifest.rows[self.begin + i]["path"]
        try:
            with Image.open(path) as image:
                decoded = image.convert("RGB")
        except (OSError, SyntaxError, ValueError) as e:  # Pillow has all three for a damaged file
            raise OSError(f"cannot read image {path}: {e}; restore the file or take it out of the manifest") from e
        return self.transform(decoded)


def read_manifest(path: Path) -> Manifest:
    """Raises ValueError naming the line for a missing column, or labels and class names that do not belong together."""
    with path.open(newline="") as f:
        reader = csv.DictReader(f)
        missing = {"path", "label", "class", "split", "domain"} - set(reader.fieldnames or [])
        if missing:
            raise ValueError(f"manifest {path} lacks the column(s) {', '.join(sorted(missing))}: write them in its first line")
        rows = list(reader)
    if not rows:
        raise ValueError(f"manifest {path} lists no images")
    names: dict[int, str] = {}
    for line, row in enumerate(rows, start=2):
        if None in row.values() or not row["label"].isdecimal():
            raise ValueError(f"manifest {path}, line {line}: needs five columns and a label 0, 1, .., not {list(row.values())}")
        if names.setdefault(int(row["label"]), row["class"]) != row["class"]:
            above = names[int(row["label"])]
            raise ValueError(f"manifest {path}, line {line}: label {row['label']} is {above!r} above and {row['class']!r} here")
    if sorted(names) != list(range(len(names))):
        raise ValueError(f"manifest {path}: labels must be 0 .. {len(names) - 1} without gaps, found {sorted(names)}")
    return Manifest(path.parent, rows, [names[i] for i in range(len(names))], sha256(path))


def provenance(manifest: Manifest, clip, content: str = "feats") -> dict[str, str]:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)
    return {**clip.provenance, "manifest": manifest.sha256, "libraries": versions, "content": content}


def extract(manifest: Manifest, clip, path: Path, device: str = "cpu", workers: int = 0, content: str = "feats") -> Path:
    """Run the image tower over the manifest and write `path`; goes on where an interrupted call with the same request stopped.

    Raises OSError naming an image that cannot be read, and ValueError for patches of a tower that has none.
    """
    encode = CONTENT[content]
    made = json.dumps(provenance(manifest, clip, content), sort_keys=True)
    partial, progress = path.with_suffix(".partial"), path.with_suffix(".progress")
    path.parent.mkdir(parents=True, exist_ok=True)
    done = json.loads(progress.read_text()) if partial.exists() and progress.exists() else {}
    if done.get("provenance") != made:
        progress.unlink(missing_ok=True)  # first: a kill from here on must not leave it beside another request's file
        with torch.no_grad():
            shape = encode(clip, blank(clip).to(device)).shape[1:]  # from a tower that need not say it
        create(partial, manifest, content, shape, made)
        done = {"provenance": made, "images": 0}
    feats = rows_on_disk(partial, content)
    with tqdm(total=len(manifest.rows), initial=done["images"], desc="image features", unit="image") as bar:
        for begin in range(done["images"], len(manifest.rows), CHUNK):
            end = min(begin + CHUNK, len(manifest.rows))
            loader = torch.utils.data.DataLoader(Images(manifest, clip.transform, begin, end), batch_size=64, num_workers=workers)
            with torch.no_grad():
                encoded = [encode(clip, x.to(device)).cpu() for x in batches_of(loader)]
            feats[begin:end] = torch.cat(encoded).numpy()
            feats.flush()
            with writing(progress) as temporary:
                temporary.write_text(json.dumps({"provenance": made, "images": end}))
            bar.update(end - begin)
    del feats
    for stale in path.parent.glob(f".{path.stem}.*.tmp"):  # of a killed extraction
        stale.unlink()
    with writing(path) as temporary:  # a copy, so that a kill while HDF5 adds the checksum leaves `partial` as it was
        shutil.copyfile(partial, temporary)
        with h5py.File(temporary, "r+") as f:
            f.attrs["sha256"] = digest(f)
    partial.unlink()
    progress.unlink()
    return path


def batches_of(loader: torch.utils.data.DataLoader) -> Iterator[Tensor]:
    """The batches; an error in a worker process comes with that worker's traceback in front, of which the last line is enough."""
    try:
        yield from loader
    except OSError as e:
        raise OSError(str(e).rstrip().splitlines()[-1].removeprefix("OSError: ")) from e


def blank(clip) -> Float[Tensor, "1 3 s s"]:
    """A batch of one black image."""
    from PIL import Image

    return clip.transform(Image.new("RGB", (64, 64))).unsqueeze(0)


def create(path: Path, manifest: Manifest, content: str, shape: Sequence[int], made: str) -> None:
    """The whole file but for the features, whose place is reserved: contiguous, and readable after a kill."""
    text = h5py.string_dtype()
    column = lambda name: [row[name] for row in manifest.rows]  # noqa: E731
    with h5py.File(path, "w") as f:
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        plist.set_obj_track_times(False)  # a time of creation would make every file a different one
        space = h5py.h5s.create_simple((len(manifest.rows), *shape))
        h5py.h5d.create(f.id, content.encode(), h5py.h5t.IEEE_F16LE, space, plist)
        f.create_dataset("labels", data=np.array([int(v) for v in column("label")]))
        for name, source in (("split", "split"), ("domain", "domain"), ("image_id", "path")):
            f.create_dataset(name, data=column(source), dtype=text)
        f.create_dataset("classes", data=manifest.classes, dtype=text)
        f.attrs["provenance"] = made


def rows_on_disk(path: Path, name: str) -> np.memmap:
    with h5py.File(path, "r") as f:
        data = f[name]
        return np.memmap(path, mode="r+", dtype=data.dtype, shape=data.shape, offset=data.id.get_offset())


def digest(f: h5py.File) -> str:
    """SHA-256 over provenance and all datasets, in the order of their names."""
    total = hashlib.sha256(f.attrs["provenance"].encode())
    for name in sorted(f):
        data = f[name][:]
        total.update(data if data.dtype != object else b"\0".join(data))
    return total.hexdigest()


def load(path: Path, request: dict[str, str] | None = None, device: str = "cpu", content: str = "feats") -> Features:
    """Open a features file, check that it is whole, finite and what was asked for; pooled features are normalised in fp32.

    `request` holds any of the provenance fields (model, weights, transform, manifest); for patches, the provenance of the pooled
    features that they shall belong to. Raises FileNotFoundError when there is no file and ValueError for another provenance or
    content (naming both values), a wrong checksum, or features that are not finite. Takes little more memory than the file.
    """
    command = "fpl features" + " --patches" * (content == "patches")
    if not path.exists():
        raise FileNotFoundError(f"no features at {path}: make them with `{command}`")
    try:
        with h5py.File(path, "r") as f:
            made, checksum, found = json.loads(f.attrs["provenance"]), f.attrs["sha256"], digest(f)
            names = (made.get("content", content), *COLUMNS)
            data = {name: f[name].asstr()[:] if f[name].dtype == object else f[name][:] for name in names}
    except (OSError, KeyError, RuntimeError, TypeError, ValueError) as e:  # HDF5 has them all for a broken file
        raise ValueError(f"{path} is damaged, it cannot be read ({e}): delete it and run `{command}`") from e
    if found != checksum:
        raise ValueError(f"{path} is damaged, its content does not have the checksum it carries: delete it and run `{command}`")
    for key, wanted in ((request or {}) | {"content": content}).items():
        if made.get(key) != wanted:
            advice = f"run `{command}` or correct params.yaml"
            raise ValueError(f"{path} was made with {key} {made.get(key)!r}, asked for is {wanted!r}: {advice}")
    feats = torch.from_numpy(data[content])
    finite = torch.cat([part.isfinite().flatten(1).all(1) for part in feats.split(CHUNK)])  # in parts: it makes copies
    bad = (~finite).nonzero()[:, 0]
    if len(bad):
        first = data["image_id"][int(bad[0])]
        raise ValueError(f"{path}: features of {len(bad)} images are not finite, the first is {first}: extract again")
    feats = F.normalize(feats.float(), dim=-1) if content == "feats" else feats
    labels = torch.from_numpy(data["labels"]).to(device)
    return Features(feats.to(device), labels, data["split"], data["domain"], list(data["classes"]), made, checksum)
