"""Runs to records: make the runs that have no record yet, several at a time.

A record (fpl.experiments.records) is named by the hash of settings, code and features, so a run
that was made is not made again and nothing else is mistaken for it. A record that is damaged is
made again. A killed sweep goes on where it was: each run from its last checkpoint. A run that fails
does not keep the others from being made.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import multiprocessing
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fpl.data.files import check_writable
from fpl.data.imported import IMPORTED
from fpl.data.processes import begin_worker, starting_workers
from fpl.experiments import answers, keep, records
from fpl.experiments.assemble import names_of, rounds_of, setup_of, text_for
from fpl.experiments.cache import device, features_hash, load_cached
from fpl.experiments.checkpoints import EVERY, Checkpoint
from fpl.experiments.fingerprint import code_fingerprint, file_of
from fpl.experiments.records import Key
from fpl.experiments.settings import OWN, Experiment, Settings, own_module
from fpl.rounds import Round


def tables(
    settings: Settings,
    names: Sequence[str],
    jobs: int | None = None,
    fresh: bool = False,
    cluster: str = "",
) -> None:
    """Make the missing runs of some tables, all in one sweep, and write each table's index."""
    runs = {name: settings.runs(name) for name in names}
    experiments = [experiment for table in runs.values() for _, experiment in table]
    kept = [settings.tables[name].keep for name, table in runs.items() for _ in table]
    paths = iter(sweep(experiments, jobs, Asked(fresh=fresh, cluster=cluster), kept))
    for name, table in runs.items():
        of_table = list(itertools.islice(paths, len(table)))
        labels = [label for label, _ in table]
        records.save_index(settings.tables[name].notebook, name, of_table, labels, settings.results)


@dataclass(frozen=True)
class Asked:
    """What is asked of runs, besides their records.

    fresh: to make them again even where a record exists. keep: to keep what they learn in a file
    beside the record. every: seconds between two checkpoints. follow: is called with what the
    record says of each round, as it ends; of a single run only. cluster: the address of the Dask
    scheduler whose workers make the runs, such as tcp://host:8786; "" for this machine.
    """

    fresh: bool = False
    keep: bool = False
    every: float = EVERY
    follow: Callable[[Mapping[str, Any]], object] | None = None
    cluster: str = ""


Run = tuple[Experiment, Key, Asked]
Failures = list[tuple[Run, BaseException]]


def sweep(
    experiments: Sequence[Experiment],
    jobs: int | None = None,
    asked: Asked = Asked(),
    kept: Sequence[bool] = (),
) -> list[Path]:
    """Return the records of all experiments, in their order; only missing runs are made.

    jobs: how many at a time (as many as cores, or GPUs). kept: `asked.keep` of each, where it
    differs. Raises what a single run raises, OSError where no record can be written, and
    RuntimeError when a worker was killed, or at the end, when all others are made, for runs that
    failed; finished runs are kept.
    """
    keys = keys_of(experiments)
    paths = [key.path for key in keys]
    wanted: dict[Path, Run] = {}
    for experiment, key, keeps in zip(experiments, keys, kept or [asked.keep] * len(keys)):
        twice = key.path in wanted and wanted[key.path][2].keep  # under another label
        wanted[key.path] = experiment, key, replace(asked, keep=keeps or twice)
    todo = []
    for run in wanted.values():
        if asked.fresh or not is_made(*run):
            todo.append(run)
        elif (left := Checkpoint(*run[:2])).path.exists():  # of one killed behind its record
            left.remove()
    if todo:
        check_writable(records.RECORDS)
    if todo and asked.cluster:
        from fpl.experiments import cluster  # few sweeps need what it imports

        cluster.perform(todo, len(wanted), asked.cluster)
        return paths
    if len(todo) > 1:
        in_workers(todo, len(wanted), jobs)
        return paths
    for run in todo:  # no pool: a bar over its rounds says more
        perform(*run, progress=True)
    return paths


def has_record(experiment: Experiment) -> bool:
    """Return whether a run has a record that is whole."""
    (key,) = keys_of([experiment])
    return records.is_whole(key.path)


def is_made(experiment: Experiment, key: Key, asked: Asked) -> bool:
    """Return whether there is all that is asked of a run."""
    if not records.is_whole(key.path):
        return False
    kept = key.path.with_suffix(keep.SUFFIX)
    return not asked.keep or records.is_whole(kept, lambda path: keep.run_of(path) == path.stem)


def in_workers(todo: Sequence[Run], total: int, jobs: int | None) -> None:
    """Make runs in several processes, the longest first; of several GPUs each has its own."""
    context = get_context("spawn")
    gpus = context.SimpleQueue()
    for name in visible_gpus():
        gpus.put(name)
    most = torch.cuda.device_count() or min(os.cpu_count() or 1, 8)
    jobs = min(jobs or most, most if device() == "cuda" else len(todo), len(todo))
    threads = max(1, torch.get_num_threads() // jobs)
    own = [*{path: None for experiment, *_ in todo for path in own_files(experiment)}]
    others = multiprocessing.active_children()
    ready = (__name__, get_ready.__name__, threads, own, gpus)
    pool = ProcessPoolExecutor(jobs, context, begin_worker, ready)
    failures: Failures = []
    with pool, tqdm(total=total, initial=total - len(todo), desc="runs", unit="run") as bar:
        try:
            with starting_workers():
                under_way = {pool.submit(perform, *run): run for run in longest_first(todo)}
            for finished in as_completed(under_way):
                error = finished.exception()
                if isinstance(error, BrokenProcessPool | OSError):
                    raise error
                if error:
                    failures.append((under_way[finished], error))
                bar.update()
        except BrokenProcessPool:
            raise RuntimeError(
                "a worker was killed (out of memory?): "
                "call the same command again, finished runs are kept"
            ) from None
        except Exception:
            pool.shutdown(cancel_futures=True)
            raise
        except BaseException:  # Ctrl-C does not wait for the runs that are under way
            for worker in multiprocessing.active_children():
                if worker not in others:
                    worker.kill()
            raise
    report(failures, len(todo))


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    said = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    many = range(torch.cuda.device_count())
    return said.split(",")[: len(many)] if said else [*map(str, many)]


def longest_first(todo: Sequence[Run]) -> list[Run]:
    """Return runs in the order in which they are begun, so that none is long at the end."""
    return sorted(todo, key=lambda run: -run[0].run.rounds * run[0].run.local_epochs)


def own_files(experiment: Experiment) -> list[Path]:
    """Return the file of a method of one's own; of others nothing."""
    module = type(experiment.method).__module__
    path = file_of(module) if module.startswith(OWN) else None
    return [path] if path else []


def report(failures: Failures, total: int) -> None:
    """Raise RuntimeError for runs that failed, naming the first; a single one's error as it is."""
    if not failures:
        return
    (experiment, _, _), error = failures[0]
    if total == 1:
        raise error
    of = f"{experiment.row}, seed {experiment.seed}: {error}"
    first = "" if len(failures) == 1 else "the first, "
    raise RuntimeError(
        f"{len(failures)} of {total} runs failed, {first}{of}; the others are made"
    ) from error


def get_ready(threads: int, own: Sequence[Path], gpus: Any) -> None:
    """In a worker: take a share of the cores or a GPU, and load methods of one's own."""
    torch.set_num_threads(threads)
    if not gpus.empty():  # before the first use of a GPU by this process
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus.get()
    for path in own:
        own_module(path)


def perform(
    experiment: Experiment, key: Key, asked: Asked = Asked(), progress: bool = False
) -> None:
    """Make one run, and write its record and what else is asked for."""
    checkpoint = Checkpoint(experiment, key, asked.every)
    made = make(experiment, key, asked, checkpoint, progress)
    if asked.keep:
        keep.write(key.path.with_suffix(keep.SUFFIX), made.kept)
    records.write(made.record)
    checkpoint.remove()


class Made(NamedTuple):
    """A run that was made: its record, and what it learnt."""

    record: dict[str, Any]
    kept: keep.Kept


def make(
    experiment: Experiment, key: Key, asked: Asked, checkpoint: Checkpoint, progress: bool = False
) -> Made:
    """Make one run, from its last checkpoint if there is one.

    The caller has worked out by what it is found: the code may change meanwhile. Raises ValueError
    where the features did, and for a row that needs a text tower where they came without one.
    """
    source = experiment.source
    clip, _ = load_cached(source.data, source.backbone, device())
    if features_hash(experiment) != key.features:
        changed = "has changed since this command began: call it again"
        raise ValueError(f"{source.data.features} {changed}")
    check_tower(experiment)
    follow = asked.follow or (lambda line: None)
    if asked.fresh:
        checkpoint.remove()
    lines, state = checkpoint.read()
    for line in lines:
        follow(line)
    setup = setup_of(experiment)
    rounds = rounds_of(experiment, setup, state)
    how = {"initial": len(lines), "unit": "round", "disable": not progress}
    for last in tqdm(rounds, experiment.row, experiment.run.rounds, **how):
        lines.append(line_of(last))
        follow(lines[-1])
        if not last.cohorts:  # which only the last round has
            checkpoint.write(last.state, lines)
    record = record_of(experiment, key, lines)
    record |= {"classes": setup.text.names, "answers": answers.pack(last.answers, setup.clients)}
    about = {name: record[name] for name in ("settings", "images", "domains", "torch")}
    about["run"] = key.path.stem
    backbone = dataclasses.asdict(source.backbone)
    learnt = keep.of_run(setup, last, clip, record["clients"], **about, backbone=backbone)
    return Made(record, learnt)


def check_tower(experiment: Experiment) -> None:
    """Raise ValueError for a row that learns prompts from features without a text tower.

    It draws them at the beginning, and asks for their width. What else needs a tower, such as a
    fixed prompt, is refused where it is encoded.
    """
    if experiment.source.backbone.name == IMPORTED:
        experiment.method.init(text_for(experiment, (0, None)), torch.Generator())


def line_of(r: Round) -> dict[str, Any]:
    """Return what a record says of a round."""
    line = {
        "round": r.number,
        "accuracy": rounded(r.accuracy),
        "participants": r.participants.tolist(),
        "loss": None if math.isnan(r.loss) else r.loss,
        "up": r.up.tolist(),
        "down": r.down.tolist(),
    }
    if r.elsewhere:
        line["elsewhere"] = {name: rounded(accuracy) for name, accuracy in r.elsewhere.items()}
    return line


def rounded(accuracy: Tensor) -> list[float]:
    return [round(a, 6) for a in accuracy.tolist()]


def record_of(experiment: Experiment, key: Key, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the record of a run, but for the time that it took."""
    source = experiment.source
    return key._asdict() | {
        "title": experiment.method.title,
        "is_control": experiment.method.is_control,
        "images": source.data.name,
        "rounds": rounds,
        "backbone": source.backbone.name,
        **names_of(experiment),
        "torch": torch.__version__,
        "device": device(),
    }


def keys_of(experiments: Iterable[Experiment]) -> list[Key]:
    """Return by what the records are found, for features that are the ones asked for."""
    return [key_of(features_hash(experiment), experiment) for experiment in experiments]


def key_of(features: str, experiment: Experiment) -> Key:
    """Return by what a record is found: settings, code, and the hash of the features it reads."""
    views = experiment.source.data.views
    return Key(experiment.settings(), code_fingerprint(experiment), features, views)
