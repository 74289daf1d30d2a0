"""What a profile takes before it runs: data, weights, disk, the runs of each table, and hours on this machine.

The cost of a run is counted, not guessed: two rounds of its method with a text tower that only counts how many prompts it is
given, times the local steps that its protocol has, times the operations of one prompt tree. What a step costs besides the text
tower (FedOTP's transport, the gate) is left out, and so is the reading of files; rows of released code that train clients one
after the other fill a GPU less than is measured here.
"""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from huggingface_hub import try_to_load_from_cache
from torch import Tensor

from fpl.bench import features as bench_features
from fpl.bench import step as bench
from fpl.data import datasets, encoders, features, pickled, world
from fpl.experiments import runner
from fpl.experiments.settings import Backbone, Data, Experiment, Settings
from fpl.methods import PromptFL
from fpl.prompts import GROUP, Clip, PromptTree
from fpl.rounds import Seeds, Training, run_rounds
from fpl.state import Clients

TOKENS = 4  # of a class name in the prompt tree with "." and EOS: 4.06 for Food101
GB, HOUR = 1e9, 3600


class Tower(NamedTuple):
    """What of a model decides its cost: joint width, patches of an image, width and layers of the text tower."""

    dim: int
    patches: int
    width: int
    layers: int


class Images(NamedTuple):
    """How many images and classes a data set has, as found or, where it is not there, as published; `todo` if it is not there."""

    train: int
    test: int
    classes: int
    todo: str = ""


@dataclass(frozen=True)
class Rates:
    """Of this device: operations per second of the text tower in training, and images per second, by the name of the model."""

    text: Mapping[str, float]
    images: Mapping[str, float]


class Counter:
    """A text tower that costs next to nothing and counts the prompts it encodes, with and without a gradient."""

    scale, at_once = 1.0, 1000

    def __init__(self, tower: Tower, n_cls: int = 2):
        self.width, self.dim, self.n_cls, self.trained, self.read = tower.width, tower.dim, n_cls, 0, 0
        gen = torch.Generator().manual_seed(0)
        self.project = torch.randn(tower.width, n_cls * tower.dim, generator=gen)

    def __call__(self, ctx: Tensor) -> Tensor:
        prompts = ctx.shape[:-2].numel()
        if torch.is_grad_enabled() and ctx.requires_grad:
            self.trained += prompts
        else:
            self.read += prompts
        return F.normalize((ctx.mean(-2) @ self.project).unflatten(-1, (self.n_cls, self.dim)), dim=-1)

    def zero_shot(self, template: str = "") -> Tensor:
        self.read += 1
        return F.normalize(self.project.T[: self.n_cls * self.dim].mean(-1).view(self.n_cls, self.dim), dim=-1)

    def words(self, text: str) -> Tensor:
        return torch.ones(1, self.width)


# --- what is needed -------------------------------------------------------------------------------------------------------------


def needs(params: Settings, fetch: bool = False) -> pd.DataFrame:
    """A line per data set, model and disk: columns need, of, state, todo; todo is a sentence where something is missing.

    A tag whose weights are not on this machine is downloaded where `fetch` says so, and missing when that fails.
    """
    sources = [params.source(name) for name in params.contents()]
    table = []
    for data in {(s.data.name, s.data.root): s.data for s in sources}.values():
        found = images_of(data)
        state = "not there" if found.todo else f"{found.train + found.test} images, {found.classes} classes"
        table.append(("data set", data.name, state, found.todo))
    for backbone in dict.fromkeys(s.backbone for s in sources):
        table.append(("weights", f"{backbone.name} {backbone.weights}".strip(), *weights_of(backbone, fetch)))
    sizes, free = disk(params), shutil.disk_usage(".").free / GB
    wanted = (sizes["GB"] - sizes["there, GB"]).clip(lower=0).sum()  # a file may be larger than estimated
    short = f"{wanted:.1f} GB more are needed in {Path.cwd().name} and {free:.1f} are free: make room" if wanted > free else ""
    table.append(("disk", "features and records", f"{wanted:.2f} GB to write, {free:.0f} GB free", short))
    return pd.DataFrame(table, columns=["need", "of", "state", "todo"])


def images_of(data: Data) -> Images:
    """What is there is counted, and nothing written: CIFAR's batches are not unpacked."""
    return looked_at(data, Path.cwd())


@functools.cache
def looked_at(data: Data, here: Path) -> Images:
    if data.name in world.WORLDS:
        classes = len(world.WORLDS[data.name])
        return Images(classes * data.train_per_class, classes * data.test_per_class, classes)
    root, published = Path(data.root), Images(0, 0, 0)
    if data.name != "own":
        dataset = datasets.known(data.name)
        first = next(iter(dataset.layouts.values()))
        published = Images(first.train or 0, first.test or 0, dataset.classes)
        try:
            folder, key, _ = datasets.find(data.name, root, data.layout or None)
        except FileNotFoundError:
            get = f"`fpl data fetch {data.name} --root {root}` gets it or says what to bring"
            return published._replace(todo=f"the data set {data.name} is not under {root}: {get}")
        except ValueError as e:
            return published._replace(todo=str(e))
        read: Any = dataset.layouts[key].read
        if getattr(read, "func", None) is datasets.cifar:
            named = {name: read.keywords[name] for name in ("train", "test", "labels")}
            count = lambda file: len(datasets.by_text(pickled.read(folder / file))[named["labels"]])  # noqa: E731
            return published._replace(train=sum(map(count, named["train"])), test=count(named["test"]))
    listed = datasets.checklist(data.name, root).set_index("item")
    if "manifest" in listed.index:
        return published._replace(todo=f"the data set {data.name} cannot be read: {listed.loc['manifest', 'todo']}")
    train, test, classes = (int(listed.loc[item, "found"]) for item in ("train images", "test images", "classes"))
    absent = str(listed.loc["images on disk", "todo"])
    return Images(train, test, classes, f"images of {data.name} are missing: {absent}" if absent else "")


def weights_of(backbone: Backbone, fetch: bool) -> tuple[str, str]:
    """State and what to do about a model's weights; only `fetch` asks the network."""
    known = {} if ":" in backbone.name else encoders.open_clip.get_pretrained_cfg(backbone.name, backbone.weights)
    if (known or backbone.name.startswith(encoders.HUB)) and not fetch:
        place = known["hf_hub"] if known else backbone.name.removeprefix(encoders.HUB) + "/"
        repository, file = os.path.split(place)
        files = [f"{os.path.splitext(file)[0]}.safetensors", file] if file else [encoders.WEIGHTS, encoders.PICKLED]
        there = any(isinstance(try_to_load_from_cache(repository, name), str) for name in files)
        return ("on this machine" if there else f"to be downloaded from {repository}"), ""
    try:
        return f"{encoders.resolve(backbone.name, backbone.weights)[1].stat().st_size / 1e6:.0f} MB on this machine", ""
    except (FileNotFoundError, ValueError) as e:
        return "not there", str(e)


def tower_of(backbone: Backbone) -> Tower:
    """From open_clip's description of the model; nothing is built."""
    if backbone.name.startswith((encoders.LOCAL, encoders.HUB)):
        place = backbone.name.removeprefix(encoders.LOCAL).removeprefix(encoders.HUB)
        folder = encoders.model_of_hub(place).parent if backbone.name.startswith(encoders.HUB) else Path(place)
        config = json.loads((folder / encoders.CONFIG).read_text())["model_cfg"]
    else:
        config = encoders.open_clip.get_model_config(encoders.check_name(backbone.name))
    vision, text = config["vision_cfg"], config["text_cfg"]
    side = vision["image_size"] // (vision["patch_size"] or 32)  # a ResNet has one position for 32 pixels
    return Tower(config["embed_dim"], side**2, text["width"], text["layers"])


def disk(params: Settings) -> pd.DataFrame:
    """Gigabytes (10^9) of every features file and of the records, and how much of it is there."""
    table = []
    for name, wanted in params.contents().items():
        source = params.source(name)
        data, tower, images = source.data, tower_of(source.backbone), images_of(source.data)
        kinds = {"feats": images.train + images.test, "patches": tower.patches * (images.train + images.test)}
        kinds["views"] = data.views * images.train
        for kind in ["feats"] + ["patches"] * ("patches" in wanted) + ["views"] * bool(data.views):
            path = features.file_of(data.features, kind)
            there = path.stat().st_size if path.exists() else 0
            table.append((str(path), kinds[kind] * tower.dim * features.BYTES / GB, there / GB))
    every = [e for runs in distinct(params).values() for e in runs]
    size = sum(e.run.rounds * (10 * e.partition.clients + 30 * e.run.participants(e.partition.clients)) + 1500 for e in every)
    kept = sum(path.stat().st_size for path in runner.RECORDS.glob("*.json")) if runner.RECORDS.exists() else 0
    table.append((str(runner.RECORDS), size / GB, kept / GB))
    return pd.DataFrame(table, columns=["files", "GB", "there, GB"])


# --- what it costs --------------------------------------------------------------------------------------------------------------


def steps_per_epoch(experiment: Experiment) -> float:
    """Local steps of a client in an epoch, on average: its images by the batch size, and one at least."""
    partition, images = experiment.partition, images_of(experiment.source.data)
    share, classes = (0.5 if partition.classes == "base" else 1.0), images.classes
    total = share * images.train
    if partition.shots:
        holders = 1 if partition.kind in ("pathological", "even") else partition.clients  # of a class
        total = min(total, partition.shots * math.ceil(share * classes) * holders)
    return max(1.0, total / partition.clients / experiment.run.batch_size)


@functools.cache
def encodings(method: PromptFL, n: int, cfg: Training, tower: Tower) -> tuple[float, float]:
    """Prompts that a round encodes once everybody has been in one: with a gradient per client and step of an epoch, and in all
    without one, for experts and for the test of all clients.

    Counted by running the method with clients of one step an epoch.
    """
    text, gen = Counter(tower), torch.Generator().manual_seed(0)
    patches = torch.randn(2 * n, 2, tower.dim, generator=gen)
    own = torch.arange(2 * n).split(2)
    clients = Clients(F.normalize(patches[:, 0], dim=-1), torch.arange(2 * n) % 2, own, own, 2, patches)
    cfg = replace(cfg, rounds=min(cfg.rounds, 2), participation=1.0, batch_size=2)
    before = (0, 0)
    for _ in run_rounds(method, text, clients, cfg, Seeds()):
        (trained, read), before = (text.trained - before[0], text.read - before[1]), (text.trained, text.read)
    return trained / n, read


def operations(tower: Tower, classes: int, n_ctx: int) -> float:
    """Of one prompt tree, forward."""
    return tree_operations(tower, 1 + n_ctx, TOKENS * classes, classes)


def tree_operations(tower: Tower, shared: int, own: int, classes: int) -> float:
    """Every layer has 12 w^2 multiply-adds of two operations for each token, and 2 r^2 w for each group of r. The last has 3 w^2,
    and the other 9 w^2 for the ends of the classes only."""
    tokens, groups = shared + own, math.ceil(own / GROUP)
    maps = ((tower.layers - 1) * tokens * 12 + tokens * 3 + classes * 9) * tower.width
    return 2.0 * tower.width * (maps + tower.layers * groups * 2 * (shared + min(own, GROUP)) ** 2)


def cost(experiment: Experiment) -> float:
    """Operations of the text tower in one run; a gradient costs as much as the way forward, since no weight has one."""
    tower, e = tower_of(experiment.source.backbone), experiment
    trained, read = encodings(e.method, e.partition.clients, replace(e.run, rounds=min(e.run.rounds, 2)), tower)
    classes = images_of(e.source.data).classes
    classes = math.ceil(classes / 2) if e.partition.classes == "base" else classes
    number = e.run.rounds * (2 * trained * e.run.participants(e.partition.clients) * steps_per_epoch(e) + read)
    return number * operations(tower, classes, e.method.n_ctx)


def stages(params: Settings, rates: Rates | None = None) -> pd.DataFrame:
    """A line per stage: columns stage, inputs, number (of files or runs), there, PFLOP (10^15), hours (missing without rates).

    A run of two tables counts in the first; operations and hours are of what is not there.
    """
    table = []
    for name, wanted in params.contents().items():
        source, made = params.source(name), 0
        kinds = ["feats", *sorted(wanted - {"feats"}), *["views"] * bool(source.data.views)]
        images, hours = images_of(source.data), 0.0
        for kind in kinds:
            there = features.file_of(source.data.features, kind).exists()
            number = source.data.views * images.train if kind == "views" else images.train + images.test
            made += there
            hours += 0 if there or not rates else number / rates.images[source.backbone.name] / HOUR
        line = (f"features {name}", f"{source.data.name}, {source.backbone.name}", len(kinds), made)
        table.append((*line, math.nan, hours if rates else math.nan))
    for name, experiments in distinct(params).items():
        todo = [e for e in experiments if not recorded(e)]
        costs = [cost(e) for e in todo]
        hours = sum(c / rates.text[e.source.backbone.name] / HOUR for c, e in zip(costs, todo)) if rates else math.nan
        data = ", ".join(dict.fromkeys(e.source.name for _, e in params.runs(name)))
        line = (f"runs {name}", f"features of {data}", len(experiments), len(experiments) - len(todo))
        table.append((*line, sum(costs) / 1e15, hours))
    return pd.DataFrame(table, columns=["stage", "inputs", "number", "there", "PFLOP", "hours"])


def distinct(params: Settings) -> dict[str, list[Experiment]]:
    """The runs of each table that no table before it has."""
    found: dict[str, dict[str, Experiment]] = {}
    for name in params.tables:
        asked = {
            json.dumps([e.settings(), e.source.backbone.name, e.source.data.store], sort_keys=True): e
            for _, e in params.runs(name)
        }
        found[name] = {key: e for key, e in asked.items() if not any(key in before for before in found.values())}
    return {name: [*runs.values()] for name, runs in found.items()}


def recorded(experiment: Experiment) -> bool:
    """Whether the run has a record; without features that fit, nothing can have one."""
    if not experiment.source.data.features.exists():
        return False
    try:
        (path,) = runner.paths_of([experiment])
    except (FileNotFoundError, ValueError):
        return False
    return path.exists()


# --- what this machine does -----------------------------------------------------------------------------------------------------


def calibrate(params: Settings, device: str, seconds: float = 10, images: int = 0) -> Rates:
    """Rates of each backbone, with random weights.

    Local steps of up to ten clients with the names of Food101, until three in a row are within 5 % or `seconds` are over; and the
    extraction of `images` images (8; on a GPU 512), twice, of which the second counts.
    """
    backbones = {params.source(name).backbone for name in params.contents()}
    number = images or (512 if device == "cuda" else 8)
    text: dict[str, float] = {}
    pixels: dict[str, float] = {}
    by_tower: dict[tuple[int, int], float] = {}
    for backbone in sorted(backbones, key=lambda b: b.name):
        name, tower = backbone.name, tower_of(backbone)
        loaded = encoders.load(name, None, device) if ":" in name else encoders.untrained(name, device)
        same = (tower.width, tower.layers)  # RN50 and ViT-B/16 have one text tower
        by_tower[same] = by_tower.get(same) or steps_per_second(loaded, tower, device, seconds)
        text[name], pixels[name] = by_tower[same], images_per_second(loaded, number, device)
    return Rates(text, pixels)


def steps_per_second(loaded: Clip, tower: Tower, device: str, seconds: float) -> float:
    """Operations per second of forward and backward through the prompt trees of as many clients as train at once, or ten."""
    text, method = PromptTree(loaded, bench.names(101)), PromptFL()
    n, gen = min(text.at_once, 10), torch.Generator().manual_seed(1)
    ctx = (0.02 * torch.randn(n, method.n_ctx, tower.width, generator=gen)).to(device)
    x = F.normalize(torch.randn(n, 16, text.dim, generator=gen), dim=-1).to(device)
    y = torch.zeros(n, 16, dtype=torch.long, device=device)

    def step() -> None:
        bench.step(method, text, ctx, x, y)[1].sum().item()  # .item() waits for a GPU

    step()
    taken = [bench.timed(step)]
    while sum(taken) < seconds and (len(taken) < 3 or max(taken[-3:]) > 1.05 * min(taken[-3:])):
        taken.append(bench.timed(step))
    return (
        2
        * n
        * tree_operations(tower, 1 + method.n_ctx, text.n_nodes - 1 - method.n_ctx, text.n_cls)
        / statistics.median(taken[-3:])
    )


def images_per_second(loaded: Clip, images: int, device: str) -> float:
    """Of the whole extraction, from files of a photograph's size."""
    workers = min(os.cpu_count() or 1, 8) if device == "cuda" else 0
    with tempfile.TemporaryDirectory() as folder:
        manifest = bench_features.photos(Path(folder), images)
        made = [
            bench.timed(lambda: features.extract(manifest, loaded, Path(folder) / f"{i}.h5", workers=workers))  # noqa: B023
            for i in range(2)
        ]
    return images / made[-1]
