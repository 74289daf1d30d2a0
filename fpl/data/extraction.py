"""Images are run through the frozen image tower once, and their features are written to a file.

An extraction that was interrupted goes on where it stopped, and its file has the same bytes. Beside
it are meanwhile NAME.partial, an array with room for the features of all images, and NAME.progress,
which says line by line which images were tried and what was written of them, each line behind a
checksum. What does not fit together there is made again.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn, Protocol

import h5py
import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from fpl.data import pictures, seen
from fpl.data.encoders import tokens
from fpl.data.features import provenance, summary, written
from fpl.data.files import atomic_write, room_for
from fpl.data.manifest import Manifest
from fpl.data.processes import end_with_parent
from fpl.data.views import Views
from fpl.prompts import Clip

CHUNK = 256  # images (views) between two points where a killed extraction can go on
BATCH = {"cpu": 64, "cuda": 256}  # images (views) that the tower sees at once, if memory suffices
PIECE = 32  # images (views) that a process decodes before it hands them over: few wait in memory


@dataclass(frozen=True)
class Options:
    """How an extraction goes; only `skip_bad` changes what is stored.

    workers: processes that decode images ahead of the tower. elsewhere: encodes in their place.
    devices: further ones of the kind that the model is on; batches go to each of them in turn.
    skip_bad: leave out the images that cannot be read, and say so in the file.
    """

    workers: int = 0
    devices: Sequence[str] = ()
    skip_bad: bool = False
    elsewhere: Elsewhere | None = None


class Elsewhere(Protocol):
    """Encodes the batches of a plan on other machines. cuda: these have GPUs."""

    cuda: bool

    def __call__(
        self, images: Images, plan: Sequence[list[int]], batch: int
    ) -> Iterator[Batch]: ...


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
    away = options.elsewhere
    cuda = away.cuda if away else on_gpu(clip)
    partial = begin(path.with_suffix(".partial"), manifest, images, towers, cuda)
    batch = int(partial.request["batch"])
    plan = partial.todo(len(images), max(1, batch // images.views))
    missing = sum(i >= 0 for numbers in plan for i in numbers)
    with tqdm(total=missing, desc=f"image {content}", unit="image") as bar:
        if away:
            batches = away(images, plan, batch)
        else:
            batches = encode_all(images, plan, towers, batch, options.workers)
        partial.store(batches, max(1, CHUNK // images.views), bar.update)
    read, bad = partial.outcome(images)
    if bad and not options.skip_bad:
        tell_bad(images, bad)
    known = seen.recall(manifest.folder)
    now = seen.look(manifest, known | read) | read  # the file is of what was read, come what may
    finish(partial, manifest.without(bad), images, path, seen.summary(now))
    seen.remember(manifest.folder, now)
    return path


def tell_bad(images: Images, bad: Mapping[str, str]) -> NoReturn:
    """Raise OSError for images that cannot be read, naming the first of them."""
    named = [f"{images.folder / name} ({why})" for name, why in bad.items()]
    first = ", ".join(named[:3] + [".."] * (len(bad) > 3))
    raise OSError(
        f"{len(bad)} of {len(images)} images cannot be read: {first}; repair them and call "
        "this again, or leave them out with --skip-bad; the others are kept"
    )


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

    An item is (views, 3, s, s); why the image cannot be read ("" if it can), for then it is black,
    as it is for the number -1; and what was seen of it, in the words of fpl.data.seen.
    """

    def __init__(
        self,
        manifest: Manifest,
        transform: Callable[[Image.Image], Tensor],
        content: str = "feats",
        views: Views | None = None,
    ):
        self.folder = manifest.folder
        self.upright = manifest.upright
        self.paths = [manifest.rows[i]["path"] for i in images_of(manifest, content)]
        self.transform = transform
        self.content = content
        self.outside = outside(manifest)
        self.drawn = (views or Views(1)) if content == "views" else None
        self.views = self.drawn.number if self.drawn else 1
        if self.drawn:
            self.drawn.resizing(transform)
        self.pixels = transform(Image.new("RGB", (64, 64))).shape

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Float[Tensor, "V 3 s s"], str, str]:
        if i < 0:
            return self.black(), "", ""
        found = ""
        try:
            found, content = self.read(i)
            return self.transformed(content, self.paths[i]), "", found
        except Exception as e:  # Pillow and transforms have all kinds for what is no good image
            return self.black(), reason_of(e), found

    def read(self, i: int) -> tuple[str, bytes]:
        """Return what is seen of an image's file, and its content. Raises as `seen.read`."""
        return seen.read(self.folder / self.paths[i])

    def transformed(self, content: bytes, name: str) -> Float[Tensor, "V 3 s s"]:
        decoded = pictures.decode(content, self.upright)
        if self.drawn:
            inside = name.removeprefix(self.outside)
            return self.drawn.draw(self.transform, decoded, inside, self.pixels[1:])
        return self.transform(decoded).unsqueeze(0)

    def black(self) -> Float[Tensor, "V 3 s s"]:
        return torch.zeros(self.views, *self.pixels)


def outside(manifest: Manifest) -> str:
    """Return how all paths begin that lead out of the manifest's folder, "" where not all do.

    Crops are drawn by what follows it, and so are the same wherever a data set lies, but for one in
    the manifest's folder, of which the whole path counts.
    """
    folders = [os.path.dirname(row["path"]) for row in manifest.rows]
    if not folders or not all(folder.startswith("..") for folder in folders):
        return ""
    return os.path.commonpath(folders) + "/"


def reason_of(error: Exception) -> str:
    """Return in a line why an image cannot be read."""
    words = str(getattr(error, "strerror", None) or error).split()
    return " ".join(words) or type(error).__name__


class Batch(NamedTuple):
    """Encoded images: their numbers, why each cannot be read, what was seen of it, and features.

    features: None if no image can be read.
    """

    numbers: Sequence[int]
    reasons: Sequence[str]
    seen: Sequence[str]
    features: Tensor | None


class Done(NamedTuple):
    """What is known of an image that was tried.

    seen: of its file. why: it cannot be read. features: hash of what was written.
    """

    seen: str
    why: str
    features: str


@dataclass
class Partial:
    """An extraction under way: an array with room for all images, and a file of what is done.

    request: the provenance, but for what only the end shows. shape: of an image's features.
    done: images that were tried, by number.
    """

    path: Path
    request: dict[str, str]
    shape: Sequence[int] = ()
    done: dict[int, Done] = field(default_factory=dict)

    @property
    def progress(self) -> Path:
        return self.path.with_suffix(".progress")

    @property
    def row(self) -> int:
        """Bytes of an image's features."""
        return 2 * math.prod(self.shape)

    def resume(self, images: Images) -> bool:
        """Take over what an interrupted call left behind, if it had the same request.

        Images that cannot be read, that have changed since or whose features are damaged are made
        again.
        """
        lines = read_lines(self.progress)
        if not lines or not self.path.is_file():
            return False
        left, shape = lines[0]
        if left != {**self.request, "batch": left["batch"]}:
            return False
        self.request, self.shape = left, shape
        for line in lines[1:]:
            self.done |= {i: Done(*said) for i, *said in line}
        with self.path.open("rb") as file:
            kept = {i: done for i, done in self.done.items() if self.holds(file, i, done, images)}
        self.done = kept
        return True

    def holds(self, file: BinaryIO, i: int, done: Done, images: Images) -> bool:
        """Say whether the features of an image are what was written, and the image what it was."""
        file.seek(i * self.row)
        same = hash_of(file.read(self.row)) == done.features
        return same and seen.is_unchanged(images.folder / images.paths[i], done.seen)

    def outcome(self, images: Images) -> tuple[dict[str, str], dict[str, str]]:
        """Say by path what was seen of images, and why some cannot be read.

        Several rows may list a path: all must have read it, with the same content.
        """
        read: dict[str, str] = {}
        bad: dict[str, str] = {}
        for i, done in sorted(self.done.items()):
            name = images.paths[i]
            before = read.get(name, done.seen)
            if done.seen.split()[-1:] != before.split()[-1:]:
                bad.setdefault(name, "it changed between two readings")
            if done.why:
                bad[name] = done.why
            if done.seen:
                read[name] = done.seen
        return read, bad

    def begin(self, n: int) -> None:
        """Write what is known and make room for n images."""
        with atomic_write(self.progress) as temporary:
            known = [(i, *done) for i, done in self.done.items()]
            temporary.write_bytes(line_of([self.request, self.shape]) + line_of(known))
        self.path.touch()
        os.truncate(self.path, n * self.row)

    def todo(self, n: int, batch: int) -> list[list[int]]:
        """Plan batches of the numbers of images that are missing.

        The last bits of a feature can depend on its batch, so one that is repaired keeps its size
        and places, with -1 for what is there.
        """
        plan = []
        for first in range(0, n, batch):
            everything = range(first, min(first + batch, n))
            numbers = [-1 if i in self.done else i for i in everything]
            if max(numbers) >= 0:
                plan.append(numbers)
        return plan

    def store(self, batches: Iterable[Batch], every: int, tick: Callable[[int], Any]) -> None:
        """Write encoded batches to their places; a kill loses the last `every` images at most."""
        unsaved: list[int] = []
        # not mapped into memory, of which its pages would count as a part
        with room_for(self.path), self.path.open("r+b") as file:
            for batch in batches:
                unsaved += self.write(file, batch)
                tick(sum(i >= 0 for i in batch.numbers))
                if len(unsaved) >= every:
                    self.save(file, unsaved)
                    unsaved = []
            self.save(file, unsaved)

    def write(self, file: BinaryIO, batch: Batch) -> list[int]:
        """Write a batch's features to their places, and return the numbers of its images."""
        numbers = [i for i in batch.numbers if i >= 0]
        if batch.features is not None:
            rows = batch.features.cpu().reshape(len(batch.numbers), -1).numpy()
        for at, (i, why) in enumerate(zip(batch.numbers, batch.reasons, strict=True)):
            if i < 0:
                continue
            features = b"" if why else rows[at].tobytes()
            file.seek(i * self.row)
            file.write(features)
            self.done[i] = Done(batch.seen[at], why, hash_of(features))
        return numbers

    def save(self, file: BinaryIO, numbers: Sequence[int]) -> None:
        """Bring what was written to the disk, and say that it is there."""
        file.flush()
        os.fsync(file.fileno())
        with self.progress.open("ab") as progress:
            progress.write(line_of([(i, *self.done[i]) for i in numbers]))
            progress.flush()
            os.fsync(progress.fileno())


def hash_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def line_of(value: Any) -> bytes:
    """Write a line of the progress file."""
    said = json.dumps(value)
    return f"{hash_of(said.encode())} {said}\n".encode()


def read_lines(path: Path) -> list[Any]:
    """Read the lines of a progress file, up to the first that is not as it was written."""
    found: list[Any] = []
    if path.is_file():
        for line in path.read_bytes().splitlines():
            checksum, _, said = line.partition(b" ")
            if checksum.decode(errors="replace") != hash_of(said):
                break
            found.append(json.loads(said))
    return found


def begin(
    path: Path, manifest: Manifest, images: Images, towers: Sequence[Clip], cuda: bool
) -> Partial:
    """Go on with what an interrupted call left at `path`, or make a file with room for all."""
    request = provenance(manifest, towers[0], images.content, images.drawn)
    request["precision"] = "fp16 on cuda" if cuda else "fp32 on cpu"
    partial = Partial(path, request)
    if not partial.resume(images):
        size = BATCH["cuda" if cuda else "cpu"]
        if on_gpu(towers[0]):
            size = largest_batch(towers, images.content, images.pixels)
        request["batch"] = str(size)
        blank = torch.zeros(1, *images.pixels)
        partial.shape = [*encode(towers[0], blank, images.content).shape[1:]]
        if images.drawn:
            partial.shape = [images.views, *partial.shape]
    partial.begin(len(images))
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
    loader = DataLoader(
        images,
        batch_sampler=pieces,
        num_workers=workers,
        pin_memory=cuda,
        worker_init_fn=begin_worker,
    )
    arriving = iter(loader)
    waiting: deque[Batch] = deque()
    for numbers, tower in zip(plan, itertools.cycle(towers)):
        fetched = [next(arriving) for _ in range(0, len(numbers), size)]
        reasons = [why for _, whys, _ in fetched for why in whys]
        found = [said for _, _, sayings in fetched for said in sayings]
        features = None
        if any(i >= 0 and not why for i, why in zip(numbers, reasons, strict=True)):
            sent = [x.to(device_of(tower), non_blocking=True) for x, _, _ in fetched]
            pixels = torch.cat(sent).flatten(0, 1).split(batch)
            features = torch.cat([encode(tower, x, images.content) for x in pixels])
        waiting.append(Batch(numbers, reasons, found, features))
        if len(waiting) > cuda * len(towers):
            yield waiting.popleft()
    yield from waiting


def begin_worker(number: int) -> None:
    """In a process that decodes: end with the parent."""
    end_with_parent()


def create(
    f: h5py.File, manifest: Manifest, content: str, shape: Sequence[int], made: dict[str, str]
) -> None:
    """Fill a new file but for the features, whose place is reserved.

    shape: of an image's features. made: the provenance.
    """
    text = h5py.string_dtype()
    numbers = images_of(manifest, content)
    rows = [manifest.rows[i] for i in numbers]
    columns = {"split": "split", "domain": "domain", "image_id": "path"}
    if "client" in manifest.rows[0]:
        columns["client"] = "client"
    reserved = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    reserved.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    reserved.set_obj_track_times(False)  # a time of creation would make every file a different one
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


def finish(partial: Partial, manifest: Manifest, images: Images, path: Path, content: str) -> None:
    """Write the whole file without the images that the manifest skips, then drop the partial one.

    images: those that have a place in the partial file. content: hash of all images'.
    """
    kept = np.isin(images.paths, manifest.skipped, invert=True)
    made = partial.request | {"skipped": summary(manifest.skipped), "images": content}
    with (
        atomic_write(path) as temporary,
        partial.path.open("rb") as source,
        written(temporary) as f,
    ):
        create(f, manifest, images.content, partial.shape, made)
        count = 0
        for first in range(0, len(images), CHUNK):
            rows = np.frombuffer(source.read(CHUNK * partial.row), "<f2")
            part = rows.reshape(-1, *partial.shape)[kept[first : first + CHUNK]]
            f[images.content][count : count + len(part)] = part
            count += len(part)
    partial.path.unlink()
    partial.progress.unlink()
