"""Runs on the workers of a Dask cluster, which may be on other machines.

Dask carries calls and what they return; which run goes to whom is decided here, since a worker must
have the files of a run first. A run that is lost with its worker, or of which nothing is heard for
long, goes to another one, twice; one that fails for its settings would fail anywhere.
"""

from __future__ import annotations

import functools
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from distributed import Client, Future, TimeoutError, wait
from tqdm.auto import tqdm

from fpl.data import encoders, extraction
from fpl.data.files import atomic_write, sha256
from fpl.data.imported import IMPORTED
from fpl.experiments import cache, keep, records, remote, runner
from fpl.experiments.records import Key
from fpl.experiments.runner import Run
from fpl.experiments.settings import Backbone, Experiment

PIECE = 16_000_000  # bytes of a file that are sent at once
TRIES = 3  # of a run
PATIENCE = 1800.0  # seconds without a round, after which a worker counts as hung
OFTEN = 0.5  # seconds between two looks at who is there
AGAIN = 15.0  # seconds until a worker that could not be asked what it is, is asked again
CONNECT = 15.0  # seconds to reach the scheduler
WEIGHTS = "weights.file"  # where a worker has weights of a built-in model
# A run that ends in one of these would do so on any worker.
HOPELESS = (ValueError, FloatingPointError)
LACKING = (ImportError, AttributeError)  # in which a worker ends that has not what it is asked for


@dataclass
class Job:
    """A call on its way: of what, what it needs, how often it was tried, and where in vain.

    arguments: gives them when they are sent. files: hash to place. what: the caller's own.
    """

    number: int
    call: Callable[..., Any]
    arguments: Callable[[], tuple[Any, ...]]
    files: dict[str, Path]
    what: Any
    tried: list[str] = field(default_factory=list)
    heard: float = 0.0


def perform(todo: Sequence[Run], total: int, address: str) -> None:
    """Make runs on the workers of a cluster, and write their records here.

    Raises ValueError without a scheduler at the address or without a fitting worker, OSError where
    a record cannot be written, and RuntimeError, when all others are made, for runs that failed.
    """
    caller = uuid.uuid4().hex
    jobs = [job_of(run, caller, number) for number, run in enumerate(runner.longest_first(todo))]
    with (
        connected(address) as client,
        client.as_current(),
        tqdm(total=total, initial=total - len(todo), desc="runs", unit="run") as bar,
    ):
        bar.write(f"Dask's dashboard: {client.dashboard_link}", file=sys.stderr)
        failures = Dealer(client, bar, caller).deal(jobs, take_record)
    runner.report([(job.what, error) for job, error in failures], len(todo))


def connected(address: str) -> Client:
    """Return a client of a scheduler. Raises ValueError where none answers."""
    try:
        return Client(address, timeout=CONNECT, set_as_default=False)
    except (OSError, TimeoutError, ValueError) as error:
        what = "start one with `dask scheduler`, or correct the address"
        raise ValueError(f"no Dask scheduler answers at {address}: {what}") from error


def take_record(job: Job, found: tuple[dict[str, Any], bytes]) -> None:
    """Write what a worker gave. Raises RuntimeError for the record of another run."""
    _, key, asked = job.what
    record, learnt = found
    if records.key_of(record).path != key.path:
        raise RuntimeError(f"a worker gave the record of another run than {key.path.name}")
    if asked.keep:
        with atomic_write(key.path.with_suffix(keep.SUFFIX)) as temporary:
            temporary.write_bytes(learnt)
    records.write(record)


def job_of(run: Run, caller: str, number: int) -> Job:
    """Return a run as a worker takes it, with the files that it needs."""
    experiment, key, asked = run
    row, weights, names = experiment.row, "", files_of(experiment)
    for path in runner.own_files(experiment):
        names[path.name] = path
        row = f"{path.name}:{type(experiment.method).__name__}"
    if WEIGHTS in names:
        weights = WEIGHTS
    hashes = hashes_of(names)
    files = {hashes[name]: path for name, path in names.items()}
    told = remote.described(experiment, row, weights)
    plain = Key({**key.settings}, *key[1:])
    arguments = told, plain, asked, hashes, (caller, number)
    return Job(number, remote.perform, lambda: arguments, files, run)


def hashes_of(names: Mapping[str, Path]) -> dict[str, str]:
    """Return the hash of each file, by its name."""
    return {name: hash_of(path, path.stat().st_mtime_ns) for name, path in names.items()}


def files_of(experiment: Experiment) -> dict[str, Path]:
    """Return the files that a run reads, by the names that they have for it.

    Raises ValueError for a place that no worker can have.
    """
    data = experiment.source.data
    contents = {"feats", experiment.method.inputs} | ({"views"} if data.views else set())
    found = {str(data.file(content)): data.file(content) for content in sorted(contents)}
    return found | model_files(experiment.source.backbone)


def model_files(backbone: Backbone) -> dict[str, Path]:
    """Return the files of a model; those of a repository of the hub every worker gets itself.

    Of imported features there are none.
    """
    if backbone.name == IMPORTED or backbone.name.startswith(encoders.HUB):
        return {}
    if not backbone.name.startswith(encoders.LOCAL):
        return {WEIGHTS: encoders.resolve(backbone.name, backbone.weights)[1]}
    folder = Path(backbone.name.removeprefix(encoders.LOCAL))
    if folder.is_absolute() or folder.parts[:2] == ("..", ".."):
        raise ValueError(f"{folder} has no place on a worker: name it from where you stand")
    return {str(path): path for path in sorted(folder.iterdir()) if path.is_file()}


@functools.lru_cache(maxsize=256)
def hash_of(path: Path, changed: int) -> str:
    """Return the hash of a file; `changed` is when it was."""
    return sha256(path)


class Encoder:
    """Encodes images on the workers of a cluster, as `extraction.Elsewhere`.

    The caller reads the files, workers decode and encode: each the batches of one process, so the
    file has the same bytes.
    """

    def __init__(self, client: Client, backbone: Backbone) -> None:
        self.client = client
        self.dealer = Dealer(client, tqdm(disable=True))
        names = model_files(backbone)
        self.hashes = hashes_of(names)
        self.files = {self.hashes[name]: path for name, path in names.items()}
        weights = WEIGHTS if WEIGHTS in names else backbone.weights
        self.backbone = replace(backbone, weights=weights)
        found = client.run(cache.device, on_error="return").values()
        self.cuda = "cuda" in found

    def __call__(
        self, images: extraction.Images, plan: Sequence[list[int]], batch: int
    ) -> Iterator[extraction.Batch]:
        told = {name: value for name, value in vars(images).items() if name != "folder"}
        many = 4 * max(2, len(self.client.scheduler_info(n_workers=-1)["workers"]))
        for first in range(0, len(plan), many):
            part = plan[first : first + many]
            yield from self.encode(images, part, told, batch)

    def encode(
        self, images: extraction.Images, part: Sequence[list[int]], told: Any, batch: int
    ) -> list[extraction.Batch]:
        """Return some batches, in their order. Raises the error of one that nobody can encode."""

        def arguments(numbers: list[int]) -> tuple[Any, ...]:
            files = [read_file(images, i) for i in numbers]
            of_batch = told | {"paths": [images.paths[i] for i in numbers]}
            return of_batch, self.backbone, self.hashes, batch, self.cuda, files

        jobs = [
            Job(k, remote.encode, functools.partial(arguments, numbers), self.files, numbers)
            for k, numbers in enumerate(part)
        ]
        found: dict[int, Any] = {}
        failures = self.dealer.deal(jobs, lambda job, given: found.update({job.number: given}))
        for _, error in failures:
            raise error
        made = []
        for k, numbers in enumerate(part):
            reasons, seen, features = found[k]
            tensor = None if features is None else torch.from_numpy(features)
            made.append(extraction.Batch(numbers, reasons, seen, tensor))
        return made


def read_file(images: extraction.Images, i: int) -> tuple[str, bytes] | str | None:
    """Return what is seen of an image's file and its content, or why it cannot be read."""
    if i < 0:
        return None
    try:
        return images.read(i)
    except (OSError, ValueError) as error:
        return extraction.reason_of(error)


class Dealer:
    """Deals jobs to workers until all are done.

    Workers may come and go; each has one job at a time. What they are and have is asked once.
    caller: a name that no other has, under which its jobs say that they are alive.
    """

    def __init__(self, client: Client, bar: tqdm, caller: str = "") -> None:
        self.client, self.bar, self.caller = client, bar, caller
        self.ours = remote.identity()
        self.waiting: list[Job] = []
        self.by_number: dict[int, Job] = {}
        self.under_way: dict[Future, tuple[str, Job]] = {}
        self.fit: dict[str, bool] = {}  # workers that said what they are
        self.later: dict[str, float] = {}  # when to ask a worker again that could not be asked
        self.hung: dict[str, bool] = {}  # workers that are left alone until they say something
        self.has: dict[str, set[str]] = {}  # hashes of files that a worker has
        self.failures: list[tuple[Job, BaseException]] = []
        self.there: list[str] = []
        self.looked = -OFTEN
        client.subscribe_topic("fpl", self.hear)

    def hear(self, event: tuple[float, Any]) -> None:
        """Note that something was heard of a job, and that its worker has not hung."""
        _, said = event
        if said.get("caller") != self.caller:
            return
        self.hung.pop(said["worker"], None)  # it was slow
        job = self.by_number.get(said["run"])
        if job:
            job.heard = time.monotonic()

    def deal(
        self, jobs: Sequence[Job], take: Callable[[Job, Any], object]
    ) -> list[tuple[Job, BaseException]]:
        """Do all jobs, and return those that failed and why; take: is called with what one gave."""
        self.waiting, self.failures, self.take = [*jobs], [], take
        self.by_number = {job.number: job for job in jobs}
        try:
            while self.waiting or self.under_way:
                for worker in self.free():
                    self.give(worker)
                self.collect()
        finally:
            for future in self.under_way:
                future.cancel()
            self.under_way.clear()
        return self.failures

    def workers(self) -> list[str]:
        """Return the addresses of the workers that are there, as they were a moment ago."""
        if time.monotonic() > self.looked + OFTEN:
            self.there = [*self.client.scheduler_info(n_workers=-1)["workers"]]
            self.looked = time.monotonic()
        return self.there

    def free(self) -> list[str]:
        """Return the workers that fit and have no job; says so where there is none at all.

        Raises ValueError where all have said that they are something else.
        """
        there = self.workers()
        for known in (self.fit, self.later, self.hung, self.has):
            for gone in known.keys() - {*there}:  # another worker may come at its address
                del known[gone]
        for worker in there:
            if worker not in self.fit and time.monotonic() > self.later.get(worker, 0.0):
                self.look_at(worker)
        fitting = self.fitting()
        differ = [worker for worker in there if self.fit.get(worker) is False]
        if there and differ == there and not self.under_way:
            raise ValueError("no worker of the cluster has this version of fpl and its libraries")
        self.bar.set_postfix_str("" if fitting else "waiting for workers")
        busy = {worker for worker, _ in self.under_way.values()}
        return [worker for worker in fitting if worker not in busy]

    def fitting(self) -> list[str]:
        """Return the workers that are what we are, and have not hung."""
        there = self.workers()
        return [worker for worker in there if self.fit.get(worker) and worker not in self.hung]

    def look_at(self, worker: str) -> None:
        """Note whether a worker is what we are, and warn of one that is not or does not say."""
        theirs = self.ask(worker, remote.identity)
        if isinstance(theirs, BaseException):
            warnings.warn(f"worker {worker} is not used: {theirs}", stacklevel=2)
            if isinstance(theirs, LACKING):
                self.fit[worker] = False
            self.later[worker] = time.monotonic() + AGAIN
            return
        other = [name for name, version in self.ours.items() if theirs.get(name) != version]
        if other:
            there = ", ".join(f"{name} {theirs.get(name)}" for name in other)
            here = ", ".join(f"{name} {self.ours[name]}" for name in other)
            said = f"worker {worker} is not used: it has {there}, here is {here}"
            warnings.warn(said, stacklevel=2)
        self.fit[worker] = not other

    def ask(self, worker: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return what a function gives on a worker, or the error that it ends in."""
        try:
            found = self.client.run(function, *arguments, workers=[worker], on_error="return")
            return found[worker]
        except Exception as error:  # a worker that has gone ends in many
            return error

    def give(self, worker: str) -> None:
        """Send a worker the next job that was not tried there, and its files first."""
        fitting = {*self.fitting()}
        fresh = [job for job in self.waiting if worker not in job.tried or fitting <= {*job.tried}]
        if not fresh:
            return
        job = fresh[0]
        self.waiting.remove(job)
        job.tried.append(worker)
        job.heard = time.monotonic()
        error = self.send(worker, job)
        if error:
            self.again(job, error)
            return
        future = self.client.submit(job.call, *job.arguments(), workers=[worker], pure=False)
        self.under_way[future] = worker, job

    def send(self, worker: str, job: Job) -> BaseException | None:
        """Send the files of a job that a worker lacks; return an error in which that ends."""
        has = self.has.setdefault(worker, set())
        wanted = [sha for sha in job.files if sha not in has]
        lacking = self.ask(worker, remote.missing, wanted) if wanted else []
        if isinstance(lacking, BaseException):
            return lacking
        for sha in lacking:
            path = job.files[sha]
            size, offset = path.stat().st_size, 0
            with path.open("rb") as file:
                while offset < size:
                    piece = file.read(PIECE)
                    is_last = offset + len(piece) >= size
                    error = self.ask(worker, remote.put, sha, piece, offset, is_last)
                    if isinstance(error, BaseException):
                        return error
                    offset += len(piece)
        has.update(wanted)
        return None

    def collect(self) -> None:
        """Take what has come, and give back what will not come."""
        if not self.under_way:
            time.sleep(OFTEN)  # for workers
            return
        done: Sequence[Future] = []
        try:
            done = wait([*self.under_way], timeout=OFTEN, return_when="FIRST_COMPLETED").done
        except TimeoutError:
            pass
        except CancelledError:
            done = [future for future in self.under_way if future.done()]
        there = {*self.workers()}
        for future, (worker, job) in [*self.under_way.items()]:
            if future in done:
                self.finish(future)
            elif worker not in there:
                self.lose(future, ConnectionError(f"worker {worker} has gone"))
            elif time.monotonic() - job.heard > PATIENCE:
                self.hung[worker] = True
                said = f"worker {worker} has not said anything for long"
                warnings.warn(f"{said}: it is left alone", stacklevel=2)
                self.lose(future, TimeoutError(said))

    def finish(self, future: Future) -> None:
        """Take what a job gave, or its error."""
        worker, job = self.under_way.pop(future)
        lost = ConnectionError(f"worker {worker} has gone")
        error = lost if future.cancelled() else future.exception()
        if isinstance(error, HOPELESS):
            self.failures.append((job, error))
        elif error:
            self.again(job, error)
            return
        else:
            self.take(job, future.result())
        self.bar.update()

    def lose(self, future: Future, error: Exception) -> None:
        """Give up a job where it is."""
        _, job = self.under_way.pop(future)
        future.cancel()
        self.again(job, error)

    def again(self, job: Job, error: BaseException) -> None:
        """Let a job be tried elsewhere, unless it was tried often enough."""
        self.has.pop(job.tried[-1], None)  # files there may be damaged: it is asked again
        if len(job.tried) < TRIES:
            self.waiting.append(job)
            return
        self.failures.append((job, error))
        self.bar.update()
