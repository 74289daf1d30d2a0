"""Frozen image features, computed once per (data set, backbone, weights, transform) into one HDF5 file.

Layout: feats (n, d) f16, labels (n,) i64, split, domain and image_id (n,) strings, classes (c,) strings in label order; when the
manifest has them, client (n,) strings; when images were left out, skipped (k,) strings, their ids. Attributes: the provenance
as JSON, and a SHA-256 over provenance and content. Features are stored in half precision and loaded as unit vectors in single
precision: half-precision logits would flip up to 0.9 % of the predictions, the file none.

Files of their own, made when asked for, hold in the place of feats
  patches (n, M, d) f16, not normalised: M times the size;
  views (m, V, d) f16 unit vectors of V random crops of every training image, and rows (m,), the images' numbers among the n.
"""

from __future__ import annotations

import copy
import csv
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from fpl.data.encoders import tokens
from fpl.data.files import atomic_write, sha256
from fpl.prompts import Clip

Batch = tuple[Sequence[int], Sequence[str], Tensor | None]  # numbers of images, why each cannot be read ("" if it can), features
CONTENT = {  # what a file can hold of an image: (clip, batch of images) -> its features
    "feats": lambda clip, x: clip.model.encode_image(x, normalize=True),  # (b, d)
    "patches": lambda clip, x: tokens(clip, x)[1],  # (b, M, d)
    "views": lambda clip, x: clip.model.encode_image(x, normalize=True),  # (b V, d)
}
COLUMNS = ("labels", "split", "domain", "image_id", "classes")
OPTIONAL = ("client", "rows", "skipped")  # columns that a file has where they say something
INFORMATION = ("precision", "batch")  # provenance that no request is compared with
LIBRARIES = ("torch", "open_clip_torch", "torchvision", "pillow")
CHUNK = 256  # images (views) between two points where a killed extraction can go on
BATCH = {"cpu": 64, "cuda": 256}  # images (views) that the tower sees at once; fewer where the memory of a GPU is short
PIECE = 32  # images (views) that a process decodes before it hands them over: what is decoded ahead stays small


@dataclass(frozen=True)
class Manifest:
    """The images of a data set: a CSV `path,label,class,split,domain[,client]` with paths relative to its folder.

    `skipped` are the ids (paths) of images that the CSV lists and `rows` does not, because they cannot be read.
    """

    folder: Path
    rows: list[dict[str, str]]
    classes: list[str]
    sha256: str
    skipped: tuple[str, ...] = ()

    def without(self, ids: Collection[str]) -> Manifest:
        """The same without some images."""
        left_out = {*self.skipped, *ids}
        rows = [row for row in self.rows if row["path"] not in left_out]
        return dataclasses.replace(self, rows=rows, skipped=tuple(sorted(left_out)))


@dataclass(frozen=True)
class Features:
    """A features file in memory; split and domain are numpy strings, one per image.

    feats are unit vectors (n, d) in fp32; from a file of patches or views they are those, in fp16 as they are stored.
    rows are, for views, the numbers of their images in the file of pooled features; client is None unless the manifest had it;
    skipped are the ids of images that could not be read and are left out.
    """

    feats: Float[Tensor, "images *M d"]
    labels: Int[Tensor, " images"]
    split: np.ndarray
    domain: np.ndarray
    classes: list[str]
    provenance: dict[str, Any]
    sha256: str
    client: np.ndarray | None = None
    rows: Int[Tensor, " images"] | None = None
    skipped: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Views:
    """`number` random crops and flips of an image, seeded; with the model's own size, interpolation and normalisation.

    What the official runs draw anew in every epoch (Luo et al., ICLR 2025; ljaiverson/pFedMoAP at a481de3, INPUT in its
    configs/trainers): a crop of 0.08 to 1 of the area and of aspect 3/4 to 4/3, resized, and flipped half of the time. View v of
    an image is a function of (seed, image id, v) alone.
    """

    number: int
    seed: int = 0

    def __post_init__(self):
        if self.number < 1:
            raise ValueError(f"views must be at least 1 for an image, not {self.number}")

    def draw(self, transform, image, name: str, size: Sequence[int]) -> Float[Tensor, "V 3 h w"]:
        """The views of a Pillow image. Raises ValueError for a transform that says no interpolation."""
        from torchvision.transforms.functional import hflip, resized_crop

        steps = getattr(transform, "transforms", [])
        resizing = [step for step in steps if hasattr(step, "interpolation")]
        if not resizing:
            raise ValueError(f"views need an image transform that begins with resizing, this one is {transform!r}")
        rest = [step for step in steps if step not in resizing and not type(step).__name__.startswith("CenterCrop")]
        out = []
        for number in range(self.number):
            rng = self.generator(name, number)
            left, top, width, height = crop(rng, *image.size)
            view = resized_crop(image, top, left, height, width, list(size), resizing[0].interpolation)
            if rng.random() < 0.5:
                view = hflip(view)
            for step in rest:
                view = step(view)
            out.append(view)
        return torch.stack(out)

    def generator(self, name: str, number: int) -> np.random.Generator:
        words = np.frombuffer(hashlib.sha256(name.encode()).digest(), dtype="<u4")
        return np.random.default_rng([self.seed, number, *words.tolist()])


def crop(rng: np.random.Generator, width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, width and height of a random crop; after ten that do not fit, the largest central one of the nearest aspect."""
    for _ in range(10):
        area, aspect = width * height * rng.uniform(0.08, 1), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (width - w) // 2, (height - h) // 2, w, h


class Images(torch.utils.data.Dataset):
    """Decoded and transformed images by number, (v, 3, s, s) with v = 1 or the number of views, and why one cannot be read.

    Black where it cannot, and for the number -1.
    """

    def __init__(self, manifest: Manifest, numbers: Sequence[int], transform: Callable, views: Views | None):
        self.folder, self.paths = manifest.folder, [manifest.rows[i]["path"] for i in numbers]
        self.transform, self.views = transform, views
        self.shape = (views.number if views else 1, *blank(transform).shape[1:])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Tensor, str]:
        from PIL import Image

        if i < 0:
            return torch.zeros(self.shape), ""
        try:
            with Image.open(self.folder / self.paths[i]) as image:
                decoded = image.convert("RGB")
        except Exception as e:  # Pillow has all kinds for a damaged file
            return torch.zeros(self.shape), " ".join(str(getattr(e, "strerror", None) or e).split()) or type(e).__name__
        if self.views:
            return self.views.draw(self.transform, decoded, self.paths[i], self.shape[-2:]), ""
        return self.transform(decoded).unsqueeze(0), ""


@dataclass
class Partial:
    """An extraction under way: a file with the place of every image's features, and another that says which are there.

    The first `done` images were tried, and `bad` says which of them could not be read, and why.
    """

    path: Path
    content: str
    provenance: dict[str, str]
    done: int = 0
    bad: dict[int, str] = field(default_factory=dict)

    @property
    def progress(self) -> Path:
        return self.path.with_suffix(".progress")

    @classmethod
    def left_at(cls, path: Path, content: str) -> Partial | None:
        """What an interrupted call left behind."""
        progress = cls(path, content, {}).progress
        if not (path.exists() and progress.exists()):
            return None
        left = json.loads(progress.read_text())
        return cls(path, content, left["provenance"], left["done"], {int(i): why for i, why in left["bad"].items()})

    def todo(self, n: int, batch: int) -> list[list[int]]:
        """Batches of image numbers that are missing. A batch to be repaired keeps its size and places, -1 for what is there:
        the last bits of a feature can depend on them."""
        plan = [[*range(i, min(i + batch, n))] for i in range(0, n, batch)]
        repair = [[i if i in self.bad else -1 for i in part] for part in plan if part[0] < self.done]
        return [part for part in repair if max(part) >= 0] + [part for part in plan if part[0] >= self.done]

    def store(self, found: Iterable[Batch], every: int, tick: Callable[[int], Any]) -> None:
        """Take over encoded batches; a kill loses `every` images at most."""
        with h5py.File(self.path, "r") as f:
            begin, data = f[self.content].id.get_offset(), f[self.content]
            shape, size = data.shape[1:], data.dtype.itemsize * int(np.prod(data.shape[1:]))
        unsaved = 0
        with self.path.open("r+b") as file:  # not mapped into memory, of which its pages would count as a part
            for numbers, reasons, features in found:
                rows = None if features is None else features.cpu().reshape(len(numbers), *shape).numpy()
                for at, (i, why) in enumerate(zip(numbers, reasons, strict=True)):
                    if why:
                        self.bad[i] = why
                    elif i >= 0 and rows is not None:
                        self.bad.pop(i, None)
                        file.seek(begin + i * size)
                        file.write(rows[at].tobytes())
                self.done = max(self.done, max(numbers) + 1)
                unsaved += len(numbers)
                tick(sum(i >= 0 for i in numbers))
                if unsaved >= every:
                    unsaved = 0
                    self.save(file)
            self.save(file)

    def save(self, file) -> None:
        file.flush()
        os.fsync(file.fileno())
        with atomic_write(self.progress) as temporary:
            temporary.write_text(json.dumps({"provenance": self.provenance, "done": self.done, "bad": self.bad}))


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
        if None in row.values() or None in row or not row["label"].isdecimal():
            columns = f"needs the columns {', '.join(reader.fieldnames or [])} and a label 0, 1, .."
            raise ValueError(f"manifest {path}, line {line}: {columns}, not {list(row.values())}")
        if names.setdefault(int(row["label"]), row["class"]) != row["class"]:
            above = names[int(row["label"])]
            raise ValueError(f"manifest {path}, line {line}: label {row['label']} is {above!r} above and {row['class']!r} here")
    if sorted(names) != list(range(len(names))):
        raise ValueError(f"manifest {path}: labels must be 0 .. {len(names) - 1} without gaps, found {sorted(names)}")
    return Manifest(path.parent, rows, [names[i] for i in range(len(names))], sha256(path))


def provenance(manifest: Manifest, clip: Clip, content: str = "feats", views: Views | None = None) -> dict[str, str]:
    """What a file says of its making, but for what is no request (INFORMATION)."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)
    made = {"manifest": manifest.sha256, "libraries": versions, "content": content, "skipped": summary(manifest.skipped)}
    drawn = {"views": f"{views.number} random crops and flips, seed {views.seed}"} if views and content == "views" else {}
    return {**clip.provenance, **made, **drawn}


def summary(skipped: Sequence[str]) -> str:
    """How many images are left out, and a hash of which: patches and views must be of the same images as the pooled features."""
    return f"{len(skipped)} images, {hashlib.sha256(chr(0).join(skipped).encode()).hexdigest()[:16]}" if skipped else "none"


def extract(
    manifest: Manifest,
    clip: Clip,
    path: Path,
    content: str = "feats",
    *,
    views: Views | None = None,
    workers: int = 0,
    devices: Sequence[str] = (),
    skip_bad: bool = False,
) -> Path:
    """Run the image tower over the manifest and write `path`; goes on where an interrupted call with the same request stopped.

    `workers` processes decode images ahead of the tower. Batches go in turn to the device that the model is on and to `devices`
    of the same kind; on GPUs the tower runs in half precision. Neither these nor interruptions change what is stored.

    Raises OSError at the end when images cannot be read, with their number and the first of them: what was encoded is kept, and
    the next call encodes only what is missing. With `skip_bad` they are left out, and the file says so. Raises ValueError for
    patches of a tower that has none, and when no image is left.
    """
    numbers = images_of(manifest, content)
    images = Images(manifest, numbers, clip.transform, (views or Views(1)) if content == "views" else None)
    towers = [clip, *(dataclasses.replace(clip, model=copy.deepcopy(clip.model).to(device)) for device in devices)]
    partial = begin(path.with_suffix(".partial"), manifest, images, towers, content)
    batch = int(partial.provenance["batch"])
    plan = partial.todo(len(images), max(1, batch // images.shape[0]))
    missing = sum(i >= 0 for part in plan for i in part)
    with tqdm(total=len(images), initial=len(images) - missing, desc=f"image {content}", unit="image") as bar:
        partial.store(encoded(images, plan, towers, content, batch, workers), max(1, CHUNK // images.shape[0]), bar.update)
    bad = {images.paths[i]: why for i, why in sorted(partial.bad.items())}
    if bad and not skip_bad:
        first = ", ".join(f"{manifest.folder / name} ({why})" for name, why in [*bad.items()][:3])
        listed = f"{len(bad)} of {len(images)} images cannot be read: {first}" + ", .." * (len(bad) > 3)
        raise OSError(f"{listed}; repair them and call this again, or leave them out with --skip-bad; the others are kept")
    finish(partial, manifest.without(bad), images.paths, path)
    return path


def file_of(path: Path, content: str) -> Path:
    """Where other content of the same images is, beside the file of pooled features."""
    return path if content == "feats" else path.with_stem(f"{path.stem}_{content}")


def images_of(manifest: Manifest, content: str) -> list[int]:
    """The rows that a file holds: all, or of views the training images. Raises ValueError when there are none."""
    numbers = [i for i, row in enumerate(manifest.rows) if content != "views" or row["split"] == "train"]
    if not numbers:
        kind = "training images" if content == "views" else "images"
        raise ValueError(f"no {kind} in {manifest.folder}, but for {len(manifest.skipped)} that cannot be read: see its manifest")
    return numbers


def begin(path: Path, manifest: Manifest, images: Images, towers: Sequence[Clip], content: str) -> Partial:
    """What an interrupted call with the same request left at `path`, or a file with a place for every image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cuda = device_of(towers[0]).type == "cuda"
    precision = "fp16 on cuda" if cuda else "fp32 on cpu"
    made = provenance(manifest, towers[0], content, images.views) | {"precision": precision}
    partial = Partial.left_at(path, content)
    if partial and {k: v for k, v in partial.provenance.items() if k != "batch"} == made:
        return partial
    partial = Partial(path, content, made)
    partial.progress.unlink(missing_ok=True)  # first: a kill from here on must not leave it beside another request's file
    made["batch"] = str(largest_batch(towers, content, images.shape[1:]) if cuda else BATCH["cpu"])
    shape = encode(towers[0], torch.zeros(1, *images.shape[1:]), content).shape[1:]  # a tower need not say it
    create(path, manifest, content, (images.shape[0], *shape) if images.views else shape, made)
    return partial


def largest_batch(towers: Sequence[Clip], content: str, shape: Sequence[int]) -> int:
    """BATCH, halved until the memory of every GPU suffices.

    By memory and not by speed: timings differ from call to call, and the last bits of what is stored depend on the batch.
    """
    size = BATCH["cuda"]
    for tower in towers:
        while True:
            try:
                fetched = torch.zeros(size, *shape, device=device_of(tower))
                _ = [encode(tower, torch.cat([fetched]), content) for _ in range(2)]  # as when another waits to be stored
                break
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                size //= 2
                torch.cuda.empty_cache()
    return size


def device_of(clip: Clip) -> torch.device:
    return next(clip.model.parameters()).device


@torch.no_grad()
def encode(clip: Clip, pixels: Float[Tensor, "b 3 s s"], content: str) -> Tensor:
    """Features in half precision, on the device of the model."""
    device = device_of(clip)
    with torch.autocast("cuda", torch.float16, enabled=device.type == "cuda"):
        return CONTENT[content](clip, pixels.to(device)).half()


def encoded(
    images: Images, plan: Sequence[list[int]], towers: Sequence[Clip], content: str, batch: int, workers: int
) -> Iterator[Batch]:
    """The batches of the plan, encoded.

    GPUs compute while this fetches and sends: as many batches as there are devices wait for their results.
    """
    cuda, piece = device_of(towers[0]).type == "cuda", max(1, PIECE // images.shape[0])
    pieces = [part[i : i + piece] for part in plan for i in range(0, len(part), piece)]
    loader = torch.utils.data.DataLoader(images, batch_sampler=pieces, num_workers=workers, pin_memory=cuda)
    arriving, waiting = iter(loader), deque[Batch]()
    for part, tower in zip(plan, itertools.cycle(towers)):
        fetched = [next(arriving) for _ in range(0, len(part), piece)]
        reasons = [why for _, whys in fetched for why in whys]
        features = None
        if any(i >= 0 and not why for i, why in zip(part, reasons, strict=True)):
            pixels = torch.cat([x.to(device_of(tower), non_blocking=True) for x, _ in fetched]).flatten(0, 1)
            features = torch.cat([encode(tower, x, content) for x in pixels.split(batch)])
        waiting.append((part, reasons, features))
        if len(waiting) > cuda * len(towers):
            yield waiting.popleft()
    yield from waiting


def finish(partial: Partial, manifest: Manifest, ids: Sequence[str], path: Path) -> None:
    """The whole file at `path`, without the images that the manifest lacks; until it is there, the partial one stays as it is."""
    for stale in path.parent.glob(f".{path.stem}.*.tmp"):  # of a killed extraction
        stale.unlink()
    kept, at = np.isin(ids, manifest.skipped, invert=True), 0
    with atomic_write(path) as temporary, h5py.File(partial.path, "r") as source:
        data = source[partial.content]
        made = partial.provenance | {"skipped": summary(manifest.skipped)}
        create(temporary, manifest, partial.content, data.shape[1:], made)
        with h5py.File(temporary, "r+") as f:
            for begin in range(0, len(data), CHUNK):
                part = data[begin : begin + CHUNK][kept[begin : begin + CHUNK]]
                f[partial.content][at : at + len(part)] = part
                at += len(part)
            f.attrs["sha256"] = digest(f)
    partial.path.unlink()
    partial.progress.unlink()


def blank(transform) -> Float[Tensor, "1 3 s s"]:
    """A batch of one black image."""
    from PIL import Image

    return transform(Image.new("RGB", (64, 64))).unsqueeze(0)


def create(path: Path, manifest: Manifest, content: str, shape: Sequence[int], made: dict[str, str]) -> None:
    """The whole file but for the features, whose place is reserved: contiguous, and readable after a kill."""
    text, numbers = h5py.string_dtype(), images_of(manifest, content)
    column = lambda name: [manifest.rows[i][name] for i in numbers]  # noqa: E731
    columns = {"split": "split", "domain": "domain", "image_id": "path"}
    if "client" in manifest.rows[0]:
        columns["client"] = "client"
    with h5py.File(path, "w") as f:
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        plist.set_obj_track_times(False)  # a time of creation would make every file a different one
        space = h5py.h5s.create_simple((len(numbers), *shape))
        h5py.h5d.create(f.id, content.encode(), h5py.h5t.IEEE_F16LE, space, plist)
        f.create_dataset("labels", data=np.array([int(v) for v in column("label")]))
        for name, source in columns.items():
            f.create_dataset(name, data=column(source), dtype=text)
        f.create_dataset("classes", data=manifest.classes, dtype=text)
        if content == "views":
            f.create_dataset("rows", data=np.array(numbers))
        if manifest.skipped:
            f.create_dataset("skipped", data=manifest.skipped, dtype=text)
        f.attrs["provenance"] = json.dumps(made, sort_keys=True)


def digest(f: h5py.Group) -> str:
    """SHA-256 over provenance and all datasets, in the order of their names."""
    total = hashlib.sha256(f.attrs["provenance"].encode())
    for name in sorted(f):
        if f[name].dtype == object:
            total.update(b"\0".join(f[name][:]))
        else:
            for part in parts(f[name]):
                total.update(part.data)
    return total.hexdigest()


def parts(data: h5py.Dataset) -> Iterator[np.ndarray]:
    """The rows, some 4 MB at a time."""
    step = max(1, 2**22 // max(1, data.nbytes // max(1, len(data))))
    return (data[begin : begin + step] for begin in range(0, len(data), step))


def header(path: Path) -> tuple[dict[str, str], list[str]]:
    """Provenance and ids of the images left out, unchecked; nothing of both for a file that is not there or cannot be read."""
    try:
        with h5py.File(path, "r") as f:
            return json.loads(f.attrs["provenance"]), list(f["skipped"].asstr()[:]) if "skipped" in f else []
    except (OSError, KeyError, RuntimeError, TypeError, ValueError):
        return {}, []


def load(path: Path, request: dict[str, str] | None = None, device: str = "cpu", content: str = "feats") -> Features:
    """Open a features file, check that it is whole, finite and what was asked for; pooled features are normalised in fp32.

    `request` holds any of the provenance fields (model, weights, transform, manifest); for patches and views, the provenance of
    the pooled features that they shall belong to. Raises FileNotFoundError when there is no file and ValueError for another
    provenance or content (naming both values), a wrong checksum, or features that are not finite. Takes little more memory than
    the file.
    """
    command = "fpl features" + {"patches": " --patches", "views": " --views V"}.get(content, "")
    if not path.exists():
        raise FileNotFoundError(f"no features at {path}: make them with `{command}`")
    try:
        with h5py.File(path, "r") as f:
            made, checksum, found = json.loads(f.attrs["provenance"]), f.attrs["sha256"], digest(f)
            names = [made.get("content", content), *COLUMNS, *(name for name in OPTIONAL if name in f)]
            data = {name: f[name].asstr()[:] if f[name].dtype == object else f[name][:] for name in names}
    except (OSError, KeyError, RuntimeError, TypeError, ValueError) as e:  # HDF5 has them all for a broken file
        raise ValueError(f"{path} is damaged, it cannot be read ({e}): delete it and run `{command}`") from e
    if found != checksum:
        raise ValueError(f"{path} is damaged, its content does not have the checksum it carries: delete it and run `{command}`")
    for key, wanted in ((request or {}) | {"content": content}).items():
        if made.get(key) != wanted and key not in INFORMATION:
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
    rows = torch.from_numpy(data["rows"]).to(device) if "rows" in data else None
    columns = (data["split"], data["domain"], list(data["classes"]), made, checksum, data.get("client"))
    return Features(feats.to(device), labels, *columns, rows, list(data.get("skipped", ())))
