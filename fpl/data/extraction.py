"""Images are run through the frozen image tower once, and their features are written to a file.

An extraction that was interrupted goes on where it stopped, and its file has the same bytes.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import h5py
import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from fpl.data.encoders import tokens
from fpl.data.features import digest, provenance, summary
from fpl.data.files import atomic_write
from fpl.data.manifest import Manifest
from fpl.data.views import Views
from fpl.prompts import Clip

CHUNK = 256  # images (views) between two points where a killed extraction can go on
BATCH = {"cpu": 64, "cuda": 256}  # images (views) that the tower sees at once, if memory suffices
PIECE = 32  # images (views) that a process decodes before it hands them over: few wait in memory


@dataclass(frozen=True)
class Options:
    """How an extraction goes; only `skip_bad` changes what is stored.

    workers: processes that decode images ahead of the tower.
    devices: further ones of the kind that the model is on; batches go to each of them in turn.
    skip_bad: leave out the images that cannot be read, and say so in the file.
    """

    workers: int = 0
    devices: Sequence[str] = ()
    skip_bad: bool = False


def extract(
    manifest: Manifest,
    clip: Clip,
    path: Path,
    content: str = "feats",
    views: Views | None = None,
    options: Options | None = None,
) -> Path:
    """Run the image tower over the images of a manifest, and write their features to `path`.

    On a GPU the tower runs in half precision. An interrupted call with the same request is
    continued.

    views: which views, if these are the content.

    Raises OSError at the end when images cannot be read, with their number and the first of them:
    what was encoded is kept, and the next call encodes only what is missing. Raises ValueError for
    patches of a tower that has none, and when no image is left.
    """
    options = options or Options()
    images = Images(manifest, clip.transform, content, views)
    towers = [clip]
    for device in options.devices:
        towers.append(replace(clip, model=copy.deepcopy(clip.model).to(device)))
    partial = begin(path.with_suffix(".partial"), manifest, images, towers)
    batch = int(partial.provenance["batch"])
    plan = partial.todo(len(images), max(1, batch // images.views))
    missing = sum(i >= 0 for numbers in plan for i in numbers)
    with tqdm(total=missing, desc=f"image {content}", unit="image") as bar:
        batches = encode_all(images, plan, towers, batch, options.workers)
        partial.store(batches, max(1, CHUNK // images.views), bar.update)
    bad = {images.paths[i]: why for i, why in sorted(partial.bad.items())}
    if bad and not options.skip_bad:
        named = [f"{manifest.folder / name} ({why})" for name, why in bad.items()]
        first = ", ".join(named[:3] + [".."] * (len(bad) > 3))
        raise OSError(
            f"{len(bad)} of {len(images)} images cannot be read: {first}; repair them and call "
            "this again, or leave them out with --skip-bad; the others are kept"
        )
    finish(partial, manifest.without(bad), images.paths, path)
    return path


def images_of(manifest: Manifest, content: str) -> list[int]:
    """Number the rows that a file holds: all, or of views those of training images.

    Raises ValueError when there are none.
    """
    everything = content != "views"
    numbers = [i for i, row in enumerate(manifest.rows) if everything or row["split"] == "train"]
    if not numbers:
        kind = "images" if everything else "training images"
        bad = len(manifest.skipped)
        raise ValueError(
            f"no {kind} in {manifest.folder}, but for {bad} that cannot be read: see its manifest"
        )
    return numbers


class Images(Dataset):
    """The images of a manifest, decoded and transformed, by their numbers in the features file.

    An item is (views, 3, s, s), and why the image cannot be read ("" if it can): then it is black,
    as it is for the number -1.
    """

    def __init__(
        self,
        manifest: Manifest,
        transform: Callable[[Image.Image], Tensor],
        content: str = "feats",
        views: Views | None = None,
    ):
        self.folder = manifest.folder
        self.paths = [manifest.rows[i]["path"] for i in images_of(manifest, content)]
        self.transform = transform
        self.content = content
        self.drawn = (views or Views(1)) if content == "views" else None
        self.views = self.drawn.number if self.drawn else 1
        self.pixels = transform(Image.new("RGB", (64, 64))).shape

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Float[Tensor, "V 3 s s"], str]:
        if i < 0:
            return self.black(), ""
        try:
            with Image.open(self.folder / self.paths[i]) as image:
                decoded = image.convert("RGB")
        except Exception as e:  # Pillow has all kinds for a damaged file
            words = str(getattr(e, "strerror", None) or e).split()
            return self.black(), " ".join(words) or type(e).__name__
        if self.drawn:
            return self.drawn.draw(self.transform, decoded, self.paths[i], self.pixels[1:]), ""
        return self.transform(decoded).unsqueeze(0), ""

    def black(self) -> Float[Tensor, "V 3 s s"]:
        return torch.zeros(self.views, *self.pixels)


class Batch(NamedTuple):
    """Encoded images: their numbers, why each cannot be read, and features, None if none can be."""

    numbers: Sequence[int]
    reasons: Sequence[str]
    features: Tensor | None


@dataclass
class Partial:
    """An extraction under way: a file with room for all images, and one that says how far it is.

    done: the first so many images were tried.
    bad: which of them could not be read, and why.
    """

    path: Path
    content: str
    provenance: dict[str, str]
    done: int = 0
    bad: dict[int, str] = field(default_factory=dict)

    @property
    def progress(self) -> Path:
        return self.path.with_suffix(".progress")

    def resume(self) -> bool:
        """Take over what an interrupted call left behind, if it had the same request."""
        if not (self.path.exists() and self.progress.exists()):
            return False
        left = json.loads(self.progress.read_text())
        batch = left["provenance"]["batch"]
        if left["provenance"] != {**self.provenance, "batch": batch}:
            return False
        self.provenance["batch"] = batch
        self.done = left["done"]
        self.bad = {int(i): why for i, why in left["bad"].items()}
        return True

    def todo(self, n: int, batch: int) -> list[list[int]]:
        """Plan batches of the numbers of images that are missing.

        The last bits of a feature can depend on its batch, so one that is repaired keeps its size
        and places, with -1 for what is there.
        """
        plan = []
        for first in range(0, n, batch):
            numbers = list(range(first, min(first + batch, n)))
            if first < self.done:
                numbers = [i if i in self.bad else -1 for i in numbers]
            if max(numbers) >= 0:
                plan.append(numbers)
        return plan

    def store(self, batches: Iterable[Batch], every: int, tick: Callable[[int], Any]) -> None:
        """Write encoded batches to their places; a kill loses the last `every` images at most."""
        with h5py.File(self.path, "r") as f:
            start = f[self.content].id.get_offset()
        unsaved = 0
        # not mapped into memory, of which its pages would count as a part
        with self.path.open("r+b") as file:
            for batch in batches:
                self.write(file, start, batch)
                tick(sum(i >= 0 for i in batch.numbers))
                unsaved += len(batch.numbers)
                if unsaved >= every:
                    unsaved = 0
                    self.save(file)
            self.save(file)

    def write(self, file: BinaryIO, start: int, batch: Batch) -> None:
        """Write a batch's features to their places behind `start`, and note what cannot be read."""
        if batch.features is not None:
            rows = batch.features.cpu().reshape(len(batch.numbers), -1).numpy()
        for at, (i, why) in enumerate(zip(batch.numbers, batch.reasons, strict=True)):
            if why:
                self.bad[i] = why
            elif i >= 0:
                self.bad.pop(i, None)
                file.seek(start + i * rows[at].nbytes)
                file.write(rows[at].tobytes())
        self.done = max(self.done, max(batch.numbers) + 1)

    def save(self, file: BinaryIO) -> None:
        """Bring what was written to the disk, and say that it is there."""
        file.flush()
        os.fsync(file.fileno())
        state = {"provenance": self.provenance, "done": self.done, "bad": self.bad}
        with atomic_write(self.progress) as temporary:
            temporary.write_text(json.dumps(state))


def begin(path: Path, manifest: Manifest, images: Images, towers: Sequence[Clip]) -> Partial:
    """Go on with what an interrupted call left at `path`, or make a file with room for all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cuda = on_gpu(towers[0])
    made = provenance(manifest, towers[0], images.content, images.drawn)
    made["precision"] = "fp16 on cuda" if cuda else "fp32 on cpu"
    partial = Partial(path, images.content, made)
    if partial.resume():
        return partial
    # first: a kill from here on must not leave it beside the file of another request
    partial.progress.unlink(missing_ok=True)
    size = largest_batch(towers, images.content, images.pixels) if cuda else BATCH["cpu"]
    made["batch"] = str(size)
    blank = torch.zeros(1, *images.pixels)
    shape = [*encode(towers[0], blank, images.content).shape[1:]]
    if images.drawn:
        shape.insert(0, images.views)
    create(path, manifest, images.content, shape, made)
    return partial


def largest_batch(towers: Sequence[Clip], content: str, shape: Sequence[int]) -> int:
    """Halve the batch until the memory of every GPU suffices; `shape` is that of an image.

    By memory and not by speed: timings differ from call to call, and the last bits of what is
    stored depend on the batch.
    """
    size = BATCH["cuda"]
    for tower in towers:
        while not fits(tower, content, (size, *shape)):
            size //= 2
    return size


def fits(tower: Clip, content: str, shape: Sequence[int]) -> bool:
    """Try whether a GPU has the memory for a batch of this shape while another one waits."""
    try:
        fetched = torch.zeros(*shape, device=device_of(tower))
        _ = [encode(tower, torch.cat([fetched]), content) for _ in range(2)]
        return True
    except torch.OutOfMemoryError:
        if shape[0] == 1:
            raise
        torch.cuda.empty_cache()
        return False


def device_of(clip: Clip) -> torch.device:
    return next(clip.model.parameters()).device


def on_gpu(clip: Clip) -> bool:
    return device_of(clip).type == "cuda"


@torch.no_grad()
def encode(clip: Clip, pixels: Float[Tensor, "b 3 s s"], content: str) -> Tensor:
    """Encode a batch to features in half precision, on the device of the model."""
    with torch.autocast("cuda", torch.float16, enabled=on_gpu(clip)):
        return image_features(clip, pixels.to(device_of(clip)), content).half()


def image_features(clip: Clip, pixels: Float[Tensor, "b 3 s s"], content: str) -> Tensor:
    """Encode a batch to patches (b, M, d), or to the unit vectors (b, d) of images or views."""
    if content == "patches":
        return tokens(clip, pixels)[1]
    model: Any = clip.model
    return model.encode_image(pixels, normalize=True)


def encode_all(
    images: Images, plan: Sequence[list[int]], towers: Sequence[Clip], batch: int, workers: int
) -> Iterator[Batch]:
    """Encode the batches of a plan, at most `batch` images or views at once.

    GPUs compute while this fetches and sends: as many batches as there are GPUs await their
    results.
    """
    cuda = on_gpu(towers[0])
    size = max(1, PIECE // images.views)
    pieces = [numbers[i : i + size] for numbers in plan for i in range(0, len(numbers), size)]
    loader = DataLoader(images, batch_sampler=pieces, num_workers=workers, pin_memory=cuda)
    arriving = iter(loader)
    waiting: deque[Batch] = deque()
    for numbers, tower in zip(plan, itertools.cycle(towers)):
        fetched = [next(arriving) for _ in range(0, len(numbers), size)]
        reasons = [why for _, whys in fetched for why in whys]
        features = None
        if any(i >= 0 and not why for i, why in zip(numbers, reasons, strict=True)):
            sent = [x.to(device_of(tower), non_blocking=True) for x, _ in fetched]
            pixels = torch.cat(sent).flatten(0, 1).split(batch)
            features = torch.cat([encode(tower, x, images.content) for x in pixels])
        waiting.append(Batch(numbers, reasons, features))
        if len(waiting) > cuda * len(towers):
            yield waiting.popleft()
    yield from waiting


def create(
    path: Path, manifest: Manifest, content: str, shape: Sequence[int], made: dict[str, str]
) -> None:
    """Write the whole file but for the features, whose place is reserved and readable after a kill.

    shape: of an image's features. made: the provenance.
    """
    text = h5py.string_dtype()
    numbers = images_of(manifest, content)
    rows = [manifest.rows[i] for i in numbers]
    columns = {"split": "split", "domain": "domain", "image_id": "path"}
    if "client" in manifest.rows[0]:
        columns["client"] = "client"
    with h5py.File(path, "w") as f:
        reserved = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        reserved.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        reserved.set_obj_track_times(
            False
        )  # a time of creation would make every file a different one
        space = h5py.h5s.create_simple((len(rows), *shape))
        h5py.h5d.create(f.id, content.encode(), h5py.h5t.IEEE_F16LE, space, reserved)
        f.create_dataset("labels", data=np.array([int(row["label"]) for row in rows]))
        for name, column in columns.items():
            f.create_dataset(name, data=[row[column] for row in rows], dtype=text)
        f.create_dataset("classes", data=manifest.classes, dtype=text)
        if content == "views":
            f.create_dataset("rows", data=np.array(numbers))
        if manifest.skipped:
            f.create_dataset("skipped", data=manifest.skipped, dtype=text)
        f.attrs["provenance"] = json.dumps(made, sort_keys=True)


def finish(partial: Partial, manifest: Manifest, ids: Sequence[str], path: Path) -> None:
    """Write the whole file without the images that the manifest skips, then drop the partial one.

    ids: of the images that have a place in the partial file.
    """
    for stale in path.parent.glob(f".{path.stem}.*.tmp"):  # of a killed extraction
        stale.unlink()
    kept = np.isin(ids, manifest.skipped, invert=True)
    made = partial.provenance | {"skipped": summary(manifest.skipped)}
    with atomic_write(path) as temporary, h5py.File(partial.path, "r") as source:
        data = source[partial.content]
        create(temporary, manifest, partial.content, data.shape[1:], made)
        with h5py.File(temporary, "r+") as f:
            written = 0
            for first in range(0, len(data), CHUNK):
                part = data[first : first + CHUNK][kept[first : first + CHUNK]]
                f[partial.content][written : written + len(part)] = part
                written += len(part)
            f.attrs["sha256"] = digest(f)
    partial.path.unlink()
    partial.progress.unlink()
