"""Runs to records: make the runs that have no record yet, several at a time.

A record (fpl.experiments.records) is named by the hash of settings, code and features, so a run
that was made is not made again and nothing else is mistaken for it. A record that is damaged is
made again. A killed sweep goes on where it was: each run from its last checkpoint.
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
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fpl.data.files import check_writable
from fpl.data.processes import begin_worker, starting_workers
from fpl.experiments import answers, keep, records
from fpl.experiments.assemble import clients_of, domains_of, rounds_of, setup_of
from fpl.experiments.cache import device, load_cached
from fpl.experiments.checkpoints import EVERY, Checkpoint
from fpl.experiments.fingerprint import code_fingerprint, file_of
from fpl.experiments.records import Key
from fpl.experiments.settings import OWN, Experiment, Settings, own_module
from fpl.rounds import Round


def tables(
    settings: Settings, names: Sequence[str], jobs: int | None = None, fresh: bool = False
) -> None:
    """Make the missing runs of some tables, all in one sweep, and write each table's index."""
    runs = {name: settings.runs(name) for name in names}
    experiments = [experiment for table in runs.values() for _, experiment in table]
    kept = [settings.tables[name].keep for name, table in runs.items() for _ in table]
    paths = iter(sweep(experiments, jobs, Asked(fresh=fresh), kept))
    for name, table in runs.items():
        of_table = list(itertools.islice(paths, len(table)))
        labels = [label for label, _ in table]
        records.save_index(settings.tables[name].notebook, name, of_table, labels, settings.results)


@dataclass(frozen=True)
class Asked:
    """What is asked of runs, besides their records.

    fresh: to make them again even where a record exists. keep: to keep what they learn in a file
    beside the record. every: seconds between two checkpoints. follow: is called with what the
    record says of each round, as it ends; of a single run only.
    """

    fresh: bool = False
    keep: bool = False
    every: float = EVERY
    follow: Callable[[Mapping[str, Any]], object] | None = None


Run = tuple[Experiment, Key, Asked]


def sweep(
    experiments: Sequence[Experiment],
    jobs: int | None = None,
    asked: Asked = Asked(),
    kept: Sequence[bool] = (),
) -> list[Path]:
    """Return the records of all experiments, in their order; only missing runs are made.

    jobs: how many at a time (as many as cores). kept: `asked.keep` of each, where it differs.
    Raises what a run raises, OSError where no record can be written, and RuntimeError when a worker
    was killed; finished runs are kept.
    """
    keys = keys_of(experiments)
    paths = [key.path for key in keys]
    wanted: dict[Path, Run] = {}
    for experiment, key, keeps in zip(experiments, keys, kept or [asked.keep] * len(keys)):
        twice = key.path in wanted and wanted[key.path][2].keep  # under another label
        wanted[key.path] = experiment, key, replace(asked, keep=keeps or twice)
    todo = [run for run in wanted.values() if asked.fresh or not is_made(*run)]
    if todo:
        check_writable(records.RECORDS)
    if len(todo) > 1:
        in_workers(todo, len(wanted), jobs)
        return paths
    for run in todo:  # no pool: a bar over its rounds says more
        perform(*run, progress=True)
    return paths


def is_made(experiment: Experiment, key: Key, asked: Asked) -> bool:
    """Return whether there is all that is asked of a run."""
    if not records.is_whole(key.path):
        return False
    return not asked.keep or keep.is_whole(key.path.with_suffix(keep.SUFFIX))


def in_workers(todo: Sequence[Run], total: int, jobs: int | None) -> None:
    """Make runs in several processes, the longest first."""
    jobs = jobs or min(os.cpu_count() or 1, 8)
    jobs = 1 if device() == "cuda" else min(jobs, len(todo))
    threads = max(1, torch.get_num_threads() // jobs)
    kinds = {type(experiment.method) for experiment, *_ in todo}
    files = [file_of(kind.__module__) for kind in kinds if kind.__module__.startswith(OWN)]
    own = [path for path in files if path]
    others = multiprocessing.active_children()
    ready = (__name__, get_ready.__name__, threads, own)
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), begin_worker, ready)
    longest_first = sorted(todo, key=lambda run: -run[0].run.rounds * run[0].run.local_epochs)
    with pool, tqdm(total=total, initial=total - len(todo), desc="runs", unit="run") as bar:
        try:
            with starting_workers():
                under_way = [pool.submit(perform, *run) for run in longest_first]
            for finished in as_completed(under_way):
                finished.result()
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


def get_ready(threads: int, own: Sequence[Path]) -> None:
    """In a worker: take a share of the cores, and load methods of one's own."""
    torch.set_num_threads(threads)
    for path in own:
        own_module(path)


def perform(
    experiment: Experiment, key: Key, asked: Asked = Asked(), progress: bool = False
) -> None:
    """Make one run, from its last checkpoint if there is one, and write its record.

    The caller has worked out by what it is found: the code may change meanwhile. Raises ValueError
    where the features did.
    """
    source = experiment.source
    clip, feats = load_cached(source.data, source.backbone, device())
    if feats.sha256 != key.features:
        changed = "has changed since this command began: call it again"
        raise ValueError(f"{source.data.features} {changed}")
    follow = asked.follow or (lambda line: None)
    checkpoint = Checkpoint(experiment, key, asked.every)
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
    if asked.keep:
        about = {name: record[name] for name in ("settings", "images", "domains", "torch")}
        backbone = dataclasses.asdict(source.backbone)
        learnt = keep.of_run(setup, last, clip, record["clients"], **about, backbone=backbone)
        keep.write(key.path.with_suffix(keep.SUFFIX), learnt)
    records.write(record)
    checkpoint.remove()


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
        "domains": domains_of(experiment),
        "clients": clients_of(experiment),
        "torch": torch.__version__,
        "device": device(),
    }


def keys_of(experiments: Iterable[Experiment]) -> list[Key]:
    """Return by what the records are found, for features that are the ones asked for."""
    keys = []
    for experiment in experiments:
        source = experiment.source
        _, feats = load_cached(source.data, source.backbone, device())
        keys.append(key_of(feats.sha256, experiment))
    return keys


def key_of(features: str, experiment: Experiment) -> Key:
    """Return by what a record is found: settings, code, and the hash of the features."""
    views = experiment.source.data.views
    return Key(experiment.settings(), code_fingerprint(experiment), features, views)
