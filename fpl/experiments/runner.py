"""Runs to records: make the runs that have no record yet, several at a time.

A record (fpl.experiments.records) is named by the hash of settings, code and features, so a run
that was made is not made again and nothing else is mistaken for it. A killed sweep loses only the
runs that were under way.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fpl.data.files import atomic_write
from fpl.experiments.assemble import domains_of, rounds_of
from fpl.experiments.cache import device, load_cached
from fpl.experiments.fingerprint import code_fingerprint, file_of
from fpl.experiments.records import RECORDS, save_index
from fpl.experiments.settings import OWN, Experiment, Settings, own_module
from fpl.rounds import Round


def tables(
    settings: Settings, names: Sequence[str], jobs: int | None = None, fresh: bool = False
) -> None:
    """Make the missing runs of some tables, all in one sweep, and write each table's index."""
    runs = {name: settings.runs(name) for name in names}
    experiments = [experiment for table in runs.values() for _, experiment in table]
    paths = iter(sweep(experiments, jobs, fresh))
    for name, table in runs.items():
        of_table = list(itertools.islice(paths, len(table)))
        labels = [label for label, _ in table]
        save_index(settings.tables[name].notebook, name, of_table, labels, settings.results)


def sweep(
    experiments: Sequence[Experiment], jobs: int | None = None, fresh: bool = False
) -> list[Path]:
    """Return the records of all experiments, in their order; only missing runs are made.

    jobs: how many at a time (as many as cores). fresh: make all of them again.
    Raises what a run raises, and RuntimeError when a worker was killed; finished runs are kept.
    """
    paths = paths_of(experiments)
    pairs = zip(paths, experiments, strict=True)
    todo = {path: experiment for path, experiment in pairs if fresh or not path.exists()}
    if len(todo) <= 1:  # no pool: a bar over its rounds says more
        for path, experiment in todo.items():
            perform(experiment, path, progress=True)
        return paths
    in_workers(todo, len(set(paths)), jobs)
    return paths


def in_workers(todo: Mapping[Path, Experiment], total: int, jobs: int | None) -> None:
    """Make runs in several processes, the longest first."""
    jobs = jobs or min(os.cpu_count() or 1, 8)
    jobs = 1 if device() == "cuda" else min(jobs, len(todo))
    threads = max(1, torch.get_num_threads() // jobs)
    kinds = {type(experiment.method) for experiment in todo.values()}
    files = [file_of(kind.__module__) for kind in kinds if kind.__module__.startswith(OWN)]
    own = [path for path in files if path]
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), begin_worker, (threads, own))
    epochs = {path: e.run.rounds * e.run.local_epochs for path, e in todo.items()}
    longest_first = sorted(todo, key=lambda path: -epochs[path])
    with pool, tqdm(total=total, initial=total - len(todo), desc="runs", unit="run") as bar:
        under_way = [pool.submit(perform, todo[path], path) for path in longest_first]
        try:
            for finished in as_completed(under_way):
                finished.result()
                bar.update()
        except BrokenProcessPool:
            raise RuntimeError(
                "a worker was killed (out of memory?): "
                "call the same command again, finished runs are kept"
            ) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def begin_worker(threads: int, own: Sequence[Path]) -> None:
    """Take a share of the cores, load methods of one's own, and end when the parent is gone.

    A killed pool would leave its workers waiting for ever.
    """
    torch.set_num_threads(threads)
    for path in own:
        own_module(path)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def perform(experiment: Experiment, path: Path, progress: bool = False) -> None:
    """Make one run and write its record to `path`.

    The caller has worked out that name: the code may change meanwhile.
    """
    begin = time.perf_counter()
    bar = tqdm(
        rounds_of(experiment),
        experiment.row,
        experiment.run.rounds,
        unit="round",
        disable=not progress,
    )
    rounds = [line_of(r) for r in bar]
    record = record_of(experiment, rounds) | {"seconds": round(time.perf_counter() - begin, 3)}
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(record, sort_keys=True) + "\n")


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


def record_of(experiment: Experiment, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the record of a run, but for the time that it took."""
    source = experiment.source
    _, feats = load_cached(source.data, source.backbone, device())
    return {
        "settings": experiment.settings(),
        "title": experiment.method.title,
        "is_control": experiment.method.is_control,
        "images": source.data.name,
        "rounds": rounds,
        "backbone": source.backbone.name,
        "features": feats.sha256,
        "views": source.data.views,
        "domains": domains_of(experiment),
        "code": code_fingerprint(experiment),
        "torch": torch.__version__,
        "device": device(),
    }


def paths_of(experiments: Iterable[Experiment]) -> list[Path]:
    """Return where the records are or will be, for features that are the ones asked for."""
    paths = []
    for experiment in experiments:
        data = experiment.source.data
        _, feats = load_cached(data, experiment.source.backbone, device())
        features = f"{feats.sha256} {data.views}" if data.views else feats.sha256
        paths.append(record_path(features, experiment))
    return paths


def record_path(features: str, experiment: Experiment) -> Path:
    """Return a record's name: the row, the seed, and a hash of settings, code and features."""
    key = [experiment.settings(), code_fingerprint(experiment), features]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return RECORDS / f"{experiment.row}-{experiment.seed}-{digest[:16]}.json"
