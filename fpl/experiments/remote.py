"""What a worker of a Dask cluster does: say what it is, keep files by their hash, make runs.

Workers share no disk with the caller. Files lie in a store of their own (FPL_STORE, or the user's
cache) under their hash, so each is sent once; a run stands in a folder in which they have the names
that the caller's have.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import platform
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fpl.data import encoders, extraction
from fpl.data.files import sha256
from fpl.data.partitions import Partition
from fpl.experiments import cache, keep, runner
from fpl.experiments.checkpoints import Checkpoint
from fpl.experiments.records import Key, checksum
from fpl.experiments.settings import Backbone, Data, Experiment, Source, row_class
from fpl.experiments.values import build
from fpl.prompts import Clip
from fpl.rounds import Training

STORE = "FPL_STORE"
PACKAGE = Path(__file__).parents[1]
# what a run goes through
ROOMS = ("*.py", "data/**/*.py", "experiments/*.py", "more_methods/*.py", "released/*.py")
# Two levels below what a run may name, so that ../data/demo_clip of the paper's profile is inside.
INSIDE = Path("repository") / "profile"
# What numbers depend on besides our own code.
LIBRARIES = ("torch", "open_clip_torch", "numpy", "h5py", "pillow", "torchvision")
standing = threading.Lock()  # a process stands in one folder: it makes one run at a time


def identity() -> dict[str, str]:
    """Return versions of Python and libraries, and the hash of this package's code."""
    digest = hashlib.sha256()
    for path in sorted(path for room in ROOMS for path in PACKAGE.glob(room)):
        digest.update(f"{path.relative_to(PACKAGE)} {sha256(path)}".encode())
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"python": platform.python_version(), "fpl": digest.hexdigest()[:16]} | versions


def store() -> Path:
    """Return the folder of files that were sent."""
    place = os.environ.get(STORE)
    return absolute(place) if place else Path.home() / ".cache" / "fpl"


@functools.cache  # runs change the folder in which the process stands
def absolute(place: str) -> Path:
    """Return a path as it is from where the process stood when it was first asked for it."""
    return Path(place).absolute()


def missing(hashes: Sequence[str]) -> list[str]:
    """Return which files are not here, or are not what they were."""
    files = [store() / "files" / sha for sha in hashes]
    return [path.name for path in files if not path.is_file() or sha256(path) != path.name]


def put(sha: str, piece: bytes, offset: int, is_last: bool) -> None:
    """Take a piece of a file; with the last one it is verified and kept.

    Raises OSError for a file that arrives as another one.
    """
    path = store() / "files" / sha
    path.parent.mkdir(parents=True, exist_ok=True)
    coming = path.with_name(f".{sha}.{os.getpid()}.tmp")
    with coming.open("r+b" if offset else "wb") as file:
        file.seek(offset)
        file.write(piece)
    if not is_last:
        return
    arrived = sha256(coming)
    if arrived != sha:
        coming.unlink()
        raise OSError(f"a file arrived as {arrived[:12]}, not as {sha[:12]}: send it again")
    os.replace(coming, path)


def link(file: Path, place: Path) -> None:
    """Give a file of the store another name, also where an older one has it that was damaged."""
    if place.exists() and place.samefile(file):
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    new = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    new.unlink(missing_ok=True)
    os.link(file, new)  # a hard link: Python resolves others
    os.replace(new, place)
    new.unlink(missing_ok=True)  # it stays where another process was as quick


@contextlib.contextmanager
def standing_at(files: Mapping[str, str]) -> Iterator[Path]:
    """Stand in a folder in which files of the store have their names; files: name to hash."""
    folder = store() / "at" / checksum(files)[:16] / INSIDE
    folder.mkdir(parents=True, exist_ok=True)
    with standing:
        for name, sha in files.items():
            link(store() / "files" / sha, folder / name)
        before = Path.cwd()
        os.chdir(folder)
        try:
            yield folder
        finally:
            os.chdir(before)


def described(experiment: Experiment, row: str, weights: str = "") -> dict[str, Any]:
    """Return an experiment as plain values.

    row: from which the class of its method is found. weights: the name under which a file of them
    is sent.
    """
    source = experiment.source
    backbone = replace(source.backbone, weights=weights or source.backbone.weights)
    return {
        "key": experiment.row,
        "row": row,
        "method": asdict(experiment.method),
        "run": asdict(experiment.run),
        "partition": asdict(experiment.partition),
        "seed": experiment.seed,
        "name": source.name,
        "data": asdict(source.data),
        "backbone": asdict(backbone),
    }


def experiment_of(told: Mapping[str, Any]) -> Experiment:
    """Return the experiment that `described` was given."""
    kind = row_class(told["row"])
    source = Source(
        told["name"], build(Data, told["data"], "data"), build(Backbone, told["backbone"], "model")
    )
    return Experiment(
        row=told["key"],
        method=build(kind, told["method"], told["key"]),
        run=build(Training, told["run"], "run"),
        partition=build(Partition, told["partition"], "partition"),
        seed=told["seed"],
        source=source,
    )


def perform(
    told: Mapping[str, Any],
    key: Key,
    asked: runner.Asked,
    files: Mapping[str, str],
    whose: tuple[str, int],
) -> tuple[dict[str, Any], bytes]:
    """Make one run, and return its record and the file of what it learnt, empty if not asked for.

    whose: the caller, and the number of the run in its sweep: so it hears of every round.
    Raises ValueError where the code here makes another run of the settings.
    """
    torch.set_num_threads(threads())
    with standing_at(files) as folder:
        experiment = experiment_of(told)
        (made,) = runner.keys_of([experiment])
        if made != key:
            raise ValueError("the worker's code makes another run of these settings: update it")
        checkpoint = Checkpoint(experiment, key, asked.every)
        told_of = replace(asked, follow=teller(*whose))
        found = runner.make(experiment, key, told_of, checkpoint)
        checkpoint.remove()
        if not asked.keep:
            return found.record, b""
        with tempfile.TemporaryDirectory(dir=folder) as own:  # other processes stand here, too
            path = Path(own) / "learnt.safetensors"
            keep.write(path, found.kept)
            return found.record, path.read_bytes()


class Sent(extraction.Images):
    """Images whose files were read by the caller.

    files: for each image what was seen of its file and its content, or why it cannot be read.
    """

    def __init__(
        self, told: Mapping[str, Any], clip: Clip, files: Sequence[tuple[str, bytes] | str]
    ) -> None:
        self.__dict__ |= told
        self.files = files

    def read(self, i: int) -> tuple[str, bytes]:
        """Return what came of a file. Raises OSError where it cannot be read."""
        found = self.files[i]
        if isinstance(found, str):
            raise OSError(found)
        return found


def encode(
    told: Mapping[str, Any],
    backbone: Backbone,
    names: Mapping[str, str],
    batch: int,
    cuda: bool,
    files: Sequence[tuple[str, bytes] | str | None],
) -> tuple[Sequence[str], Sequence[str], np.ndarray | None]:
    """Encode the images of a batch; return why each cannot be read, what was seen, and features.

    told: of Images, but for folder and transform. names: the model's files, name to hash. files: as
    `Sent` has them, None for an empty place. Raises ValueError where the caller expects a GPU and
    there is none, or there is one and it does not.
    """
    torch.set_num_threads(threads())
    clip = tower(backbone, tuple(names.items()))
    if extraction.on_gpu(clip) != cuda:
        raise ValueError("some workers have GPUs and some have none: use workers of one kind")
    numbers = [-1 if file is None else i for i, file in enumerate(files)]
    images = Sent(told, clip, [file or "" for file in files])
    (found,) = extraction.encode_all(images, [numbers], [clip], batch, 0)
    features = None if found.features is None else found.features.cpu().numpy()
    return found.reasons, found.seen, features


@functools.lru_cache(maxsize=1)
def tower(backbone: Backbone, names: tuple[tuple[str, str], ...]) -> Clip:
    """Return the model of some files, name and hash: loaded once, not for every batch.

    Raises OSError for weights that are none of these files: no features may come from them.
    """
    with standing_at(dict(names)):
        asked = backbone.name, backbone.weights, cache.device()
        clip = encoders.load(*asked, preprocessing=backbone.preprocessing)
    weights = clip.provenance["weights"]
    if names and weights not in dict(names).values():  # of the hub's models none are sent
        what = f"the weights of {backbone.name} in {store()} are not those that were sent"
        raise OSError(f"{what}: delete that folder")
    return clip


def threads() -> int:
    """Return how many threads Dask lets this worker have."""
    from distributed import get_worker

    return get_worker().state.nthreads


def teller(caller: str, number: int) -> Callable[[Mapping[str, Any]], None]:
    """Return what tells the caller that a round has ended, by which it sees that a run is alive."""
    from distributed import get_worker

    worker, whose = get_worker(), {"caller": caller, "run": number}  # all callers hear all
    return lambda line: worker.log_event("fpl", {**whose, "round": line["round"]})
