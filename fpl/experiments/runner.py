"""Runs to records: perform the runs that have no record yet, several at a time.

A record (fpl.records) is named by the hash of settings, code and features, so a run that was made is not made again and nothing
else is mistaken for it. A killed sweep loses only the runs that were under way.
"""
from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm.auto import tqdm

from fpl.data.files import atomic_write
from fpl.experiments.assemble import domains_of, rounds_of
from fpl.experiments.cache import device, load_cached
from fpl.experiments.fingerprint import code_fingerprint
from fpl.experiments.records import RECORDS, save_index
from fpl.experiments.settings import Experiment, Settings


def record_path(features_sha: str, experiment: Experiment) -> Path:
    key = json.dumps([experiment.settings(), code_fingerprint(), features_sha], sort_keys=True)
    return RECORDS / f"{experiment.row}-{experiment.seed}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"




def perform(experiment: Experiment, path: Path, progress: bool = False) -> None:
    """Make one run and write its record to `path`, the name that the caller worked out (the code may change meanwhile)."""
    begin, source = time.perf_counter(), experiment.source
    rounds = [
        {
            "round": r.number,
            "accuracy": [round(a, 6) for a in r.accuracy.tolist()],
            "participants": r.participants.tolist(),
            "loss": None if math.isnan(r.loss) else r.loss,
            "up": r.up.tolist(),
            "down": r.down.tolist(),
        }
        | ({"elsewhere": {k: [round(a, 6) for a in v.tolist()] for k, v in r.elsewhere.items()}} if r.elsewhere else {})
        for r in tqdm(rounds_of(experiment), experiment.row, experiment.run.rounds, unit="round", disable=not progress)
    ]
    record = {
        "settings": experiment.settings(),
        "rounds": rounds,
        "seconds": round(time.perf_counter() - begin, 3),
        "backbone": source.backbone.name,
        "features": load_cached(source.data, source.backbone, device())[1].sha256,
        "views": source.data.views,
        "domains": domains_of(experiment),
        "code": code_fingerprint(),
        "torch": torch.__version__,
        "device": device(),
    }
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(record, sort_keys=True) + "\n")




def settle(threads: int) -> None:
    """In a worker: its share of the cores, and an end when the parent is gone (a killed pool leaves its workers waiting)."""
    torch.set_num_threads(threads)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()




def sweep(experiments: Sequence[Experiment], jobs: int | None = None, fresh: bool = False) -> list[Path]:
    """Records of all experiments, in their order; only the missing ones are run, `jobs` at a time (as many as cores)."""
    paths = paths_of(experiments)
    todo = {path: e for path, e in zip(paths, experiments, strict=True) if fresh or not path.exists()}
    if len(todo) <= 1:  # no pool: a bar over its rounds says more
        for path, experiment in todo.items():
            perform(experiment, path, progress=True)
        return paths
    jobs = 1 if device() == "cuda" else min(jobs or min(os.cpu_count() or 1, 8), len(todo))
    threads = max(1, torch.get_num_threads() // jobs)
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=settle, initargs=(threads,))
    total = len(set(paths))
    with pool, tqdm(total=total, initial=total - len(todo), desc="runs", unit="run") as bar:
        longest_first = sorted(todo.items(), key=lambda item: -item[1].run.rounds * item[1].run.local_epochs)
        under_way = [pool.submit(perform, e, path) for path, e in longest_first]
        try:
            for finished in as_completed(under_way):
                finished.result()
                bar.update()
        except BrokenProcessPool:
            why = "a worker was killed (out of memory?)"
            raise RuntimeError(f"{why}: call the same command again, finished runs are kept") from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return paths




def paths_of(experiments: Sequence[Experiment]) -> list[Path]:
    """Where the records are or will be, for features that are the ones asked for."""
    paths = []
    for e in experiments:
        data = e.source.data
        _, feats = load_cached(data, e.source.backbone, device())
        paths.append(record_path(f"{feats.sha256} {data.views}" if data.views else feats.sha256, e))
    return paths




def tables(params: Settings, names: Sequence[str], jobs: int | None = None, fresh: bool = False) -> None:
    """Make the missing runs of some tables, all in one sweep, and write for each table the index of its records."""
    runs = {name: params.runs(name) for name in names}
    paths = iter(sweep([experiment for table in runs.values() for _, experiment in table], jobs, fresh))
    for name, table in runs.items():
        save_index(name, itertools.islice(paths, len(table)), [label for label, _ in table], params.results)


