"""Runs to records: perform the runs that have no record yet, several at a time.

A record (fpl.records) is named by the hash of settings, code and features, so a run that was made is not made again and nothing
else is mistaken for it. A killed sweep loses only the runs that were under way.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import itertools
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from tqdm.auto import tqdm

from fpl import clip, features, partitions, released_splits, shapes
from fpl.config import Backbone, Data, Experiment, Params
from fpl.files import sha256, writing
from fpl.records import RECORDS, save_index
from fpl.rounds import Clients, Round, Seeds, run

T = TypeVar("T", bound=Callable)
# the modules that make a number out of settings
SOURCES = (
    *("clip", "gate", "methods", "transport", "released", "controls", "rounds", "privacy"),
    *("partitions", "released_splits", "features", "shapes", "sweep"),
)


@functools.cache
def code_fingerprint() -> str:
    """Hash of the modules that make numbers, without comments, docstrings and layout."""
    trees = [ast.parse((Path(__file__).parent / f"{name}.py").read_text()) for name in SOURCES]
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return hashlib.sha256("\n".join(map(ast.dump, trees)).encode()).hexdigest()


def kept(maxsize: int) -> Callable[[T], T]:
    """Keep in memory what a function of (data, ...) returned, until the features file is another one."""

    def wrap(function):
        cached = functools.lru_cache(maxsize)(lambda state, *arguments, **named: function(*arguments, **named))

        def look(data: Data, *arguments, **named):
            path = data.features
            return cached((str(path.resolve()), path.stat().st_mtime_ns if path.exists() else 0), data, *arguments, **named)

        return functools.update_wrapper(look, function)

    return wrap


@kept(maxsize=4)
def opened(data: Data, backbone: Backbone, device: str) -> tuple[clip.Clip, features.Features]:
    """Backbone and features of a data set, refused unless the one was made with the other."""
    drawn, wanted = data.folder / "drawn.json", shapes.drawing(data.seed, data.train_per_class, data.test_per_class)
    if drawn.exists() and drawn.read_text() != wanted:
        found = f"{data.folder} holds images of {drawn.read_text().strip()}"
        raise ValueError(f"{found}, params.yaml asks for {wanted.strip()}: run `fpl features`")
    loaded = clip.load(backbone.name, backbone.weights or None, device, False, backbone.preprocessing)
    images = {"manifest": sha256(data.manifest)} if data.manifest.exists() else {}
    return loaded, features.load(data.features, loaded.provenance | images, device)


@kept(maxsize=4)
def text_of(
    data: Data, backbone: Backbone, device: str, n_ctx: int, first: int = 0, end: int | None = None, precision: str = "single"
) -> clip.Text:
    """The prompts of the classes numbered `first` to before `end`."""
    loaded, feats = opened(data, backbone, device)
    return clip.Text(loaded, feats.classes[first:end], n_ctx, precision=precision)


@kept(maxsize=1)
def patches_of(data: Data, backbone: Backbone, device: str) -> torch.Tensor:
    """Patch features (images, M, d) in half precision, of the images of the pooled ones."""
    _, feats = opened(data, backbone, device)
    return features.load(data.patches, feats.provenance, device, "patches").feats


@kept(maxsize=1)
def views_of(data: Data, backbone: Backbone, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit features of the views of training images (rows, V, d), and the row of each image (-1: none). Raises ValueError."""
    _, feats = opened(data, backbone, device)
    made = features.load(data.views_file, feats.provenance, device, "views")
    if made.feats.shape[1] != data.views:
        found = f"{data.views_file} has {made.feats.shape[1]} views of an image, asked for are {data.views}"
        raise ValueError(f"{found}: run `fpl features --views {data.views}` or set data.views")
    where = torch.full((len(feats.labels),), -1, device=device)
    where[made.rows] = torch.arange(len(made.feats), device=device)
    return torch.nn.functional.normalize(made.feats.float(), dim=-1), where


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def manifest(data: Data) -> features.Manifest:
    """The images behind the features, in the same order; only the notebooks that show images read it."""
    return features.read_manifest(data.manifest)


def make_clients(experiment: Experiment, device: str) -> Clients:
    data, backbone = experiment.source.data, experiment.source.backbone
    _, feats = opened(data, backbone, device)
    asked, labels, rows = experiment.partition, feats.labels.cpu().numpy(), np.arange(len(feats.labels))
    seed = asked.split_seed or experiment.seed
    if asked.form == "released":
        parts = released_splits.make(asked, labels, feats.split, seed, feats.domain)
    else:
        parts = partitions.make(asked, labels, feats.split, experiment.seed, feats.domain, feats.client)
    if asked.loader != "right":
        rows, labels, parts = released_splits.mistaken(asked.loader, labels, feats.split, feats.domain, parts, seed)
    place = lambda array: torch.from_numpy(array).to(device)  # noqa: E731
    train, test = ([place(index) for index in part] for part in parts)
    patches = patches_of(data, backbone, device) if experiment.method.inputs == "patches" else None
    views, where = views_of(data, backbone, device) if data.views else (None, None)
    if patches is not None and views is not None:
        raise ValueError(f"{experiment.row} reads patches, of which there are no views: set data.views to 0")
    if asked.loader == "right":
        n_cls = partitions.n_base(labels) if asked.classes == "base" else len(feats.classes)
        return Clients(feats.feats, place(labels), train, test, n_cls, patches, views, where)
    patches, where = (None if of_image is None else of_image[rows] for of_image in (patches, where))
    return Clients(feats.feats[rows], place(labels), train, test, len(feats.classes), patches, views, where)


def elsewhere_of(experiment: Experiment, text: clip.Text, clients: Clients) -> dict[str, tuple[clip.Text, Clients]]:
    """What every client is tested on besides its own images; novel classes have a text and labels of their own."""
    data, backbone = experiment.source.data, experiment.source.backbone
    _, feats = opened(data, backbone, device())
    found = partitions.elsewhere(experiment.partition, feats.labels.cpu().numpy(), feats.split, feats.domain)
    made = {}
    for name, images in found.items():
        there = replace(clients, test=[torch.from_numpy(images).to(clients.labels.device)] * len(clients))
        if name == "novel":
            names = text_of(data, backbone, device(), experiment.method.n_ctx, clients.n_cls, None, experiment.run.precision)
            made[name] = names, replace(there, labels=clients.labels - clients.n_cls, n_cls=names.n_cls)
        else:
            made[name] = text, there
    return made


def domains_of(experiment: Experiment) -> list[str]:
    """The domain of each client, of the partition by domain: as many clients in each, in the order of their names."""
    partition = experiment.partition
    if partition.kind != "domain":
        return []
    _, feats = opened(experiment.source.data, experiment.source.backbone, device())
    names = [str(name) for name in np.unique(feats.domain) if name != partition.held_out]
    return [name for name in names for _ in range(partition.clients // len(names))]


def rounds_of(experiment: Experiment, tick=lambda n: None) -> Iterable[Round]:
    """The rounds of one experiment as they finish; in a notebook, a way to watch one."""
    where, source = device(), experiment.source
    clients = make_clients(experiment, where)
    cfg = experiment.run
    text = text_of(source.data, source.backbone, where, experiment.method.n_ctx, 0, clients.n_cls, cfg.precision)
    seeds = Seeds(cfg.init_seed or experiment.seed, cfg.order_seed or experiment.seed)
    return run(experiment.method, text, clients, cfg, seeds, tick, elsewhere_of(experiment, text, clients))


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
        "features": opened(source.data, source.backbone, device())[1].sha256,
        "views": source.data.views,
        "domains": domains_of(experiment),
        "code": code_fingerprint(),
        "torch": torch.__version__,
        "device": device(),
    }
    with writing(path) as temporary:
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
        _, feats = opened(data, e.source.backbone, device())
        paths.append(record_path(f"{feats.sha256} {data.views}" if data.views else feats.sha256, e))
    return paths


def tables(params: Params, names: Sequence[str], jobs: int | None = None, fresh: bool = False) -> None:
    """Make the missing runs of some tables, all in one sweep, and write for each table the index of its records."""
    runs = {name: params.runs(name) for name in names}
    paths = iter(sweep([experiment for table in runs.values() for _, experiment in table], jobs, fresh))
    for name, table in runs.items():
        save_index(name, itertools.islice(paths, len(table)), [label for label, _ in table], params.results)
