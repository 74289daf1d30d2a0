"""What a profile takes before it runs: data, weights, disk, the runs of each table, and hours.

The cost of a run is counted, not guessed: two rounds of its method with a text tower that only
counts how many prompts it is given, times the local steps that its protocol has, times the
operations of one prompt tree. What a step costs besides the text tower (FedOTP's transport, the
gate) is left out, and so is the reading of files; rows of released code that train clients one
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
from typing import NamedTuple

import open_clip
import pandas as pd
import torch
import torch.nn.functional as F
from huggingface_hub import try_to_load_from_cache

from fpl.bench.counting import CountingEncoder, count_round
from fpl.bench.features import BYTES, draw_photos
from fpl.bench.measure import timed
from fpl.bench.parts import draw_clients
from fpl.bench.ways import load_model, names
from fpl.data import datasets, encoders, extraction, world
from fpl.experiments import records, runner
from fpl.experiments.cache import device
from fpl.experiments.settings import Backbone, Data, Experiment, Settings, Source
from fpl.methods import PromptFL
from fpl.prompts import ALONE, GROUP, Clip, PromptTree
from fpl.rounds import Setup, Training, train_locally
from fpl.state import Clients

TOKENS = 4  # of a class name in the prompt tree with "." and EOS: 4.06 for Food101
# items of a checklist: those without which nothing is to run, and those that are counted
BAD = ("layout that is read", "images on disk")
COUNTED = ("train images", "test images", "classes", "domains")
PART = ": others than are published, so not to be compared with print"
GB = 1e9
HOUR = 3600


class Tower(NamedTuple):
    """What of a model decides its cost.

    dim: joint width. patches: of an image. width, layers: of the text tower.
    """

    dim: int
    patches: int
    width: int
    layers: int


class Images(NamedTuple):
    """How many images and classes a data set has, as found or, if it is not there, as published.

    todo: what to do if it is not there, or in another split than papers have. note: that its
    numbers are not as published.
    """

    train: int
    test: int
    classes: int
    todo: str = ""
    note: str = ""


class File(NamedTuple):
    """A features file: the data set that makes it, what it holds, and of how many images."""

    path: Path
    maker: str
    content: str
    images: int


@dataclass(frozen=True)
class Rates:
    """What this device does in a second, by the name of the model.

    text: operations of the text tower in training. images: images encoded.
    """

    text: Mapping[str, float]
    images: Mapping[str, float]


def needs(settings: Settings, fetch: bool = False) -> pd.DataFrame:
    """Return a line per data set, model and disk: columns need, of, state, todo.

    todo: a sentence where something is missing. fetch: download a tag whose weights are not on this
    machine; it is missing when that fails.
    """
    sources = [settings.source(name) for name in settings.contents()]
    sets = {(source.data.name, source.data.root): source.data for source in sources}
    table = []
    for data in sets.values():
        found = images_of(data)
        state = "not there"
        if not found.todo:
            state = f"{found.train + found.test} images, {found.classes} classes{found.note}"
        table.append(("data set", data.name, state, found.todo))
    models = [replace(source.backbone, preprocessing="") for source in sources]
    users: dict[str, str] = {}  # the model that has a file as its weights
    for backbone in dict.fromkeys(models):
        name = f"{backbone.name} {backbone.weights}".strip()
        state, todo = weights_of(backbone, fetch)
        first = users.setdefault(backbone.weights, backbone.name)
        if first != backbone.name and Path(backbone.weights).is_file():
            todo = f"{backbone.weights} cannot be of {first}, too: give each `weights` of its own"
        table.append(("weights", name, state, todo))
    sizes = disk(settings)
    # a file may be larger than estimated, and at its end it is there twice
    left = (sizes["GB"] - sizes["there, GB"]).clip(lower=0)
    wanted = left.sum() + left.max()
    free = shutil.disk_usage(".").free / GB
    todo = ""
    if wanted > free:
        where = Path.cwd().name
        todo = f"{wanted:.1f} GB more are needed in {where} and {free:.1f} are free: make room"
    state = f"{wanted:.2f} GB needed meanwhile, {free:.0f} GB free"
    table.append(("disk", "features and records", state, todo))
    return pd.DataFrame(table, columns=["need", "of", "state", "todo"])


def images_of(data: Data) -> Images:
    """Count what is there of a data set; nothing is written."""
    return count_images(data, Path.cwd())


@functools.cache
def count_images(data: Data, here: Path) -> Images:
    """Count what is there of a data set, seen from `here`."""
    if data.name in world.WORLDS:
        classes = len(world.WORLDS[data.name].classes)
        return Images(classes * data.train_per_class, classes * data.test_per_class, classes)
    root = Path(data.root)
    published = Images(0, 0, 0)
    if data.name != "own":
        dataset = datasets.get(data.name)
        paper = dataset.layouts[dataset.best]
        published = Images(paper.train or 0, paper.test or 0, dataset.classes)
        try:
            folder, key, _ = datasets.find(data.name, root, data.layout or None)
        except FileNotFoundError:
            get = f"`fpl data fetch {data.name} --root {root}` gets it or says what to bring"
            todo = f"the data set {data.name} is not under {root}: {get}"
            return published._replace(todo=todo)
        except ValueError as e:
            return published._replace(todo=str(e))
        count = dataset.layouts[key].count
        if count:
            train, test = count(folder)
            note = "" if (train, test) == (paper.train, paper.test) else PART
            return published._replace(train=train, test=test, note=note)
    listed = datasets.checklist(data.name, root, data.layout or None).set_index("item")
    if "manifest" in listed.index:
        todo = f"the data set {data.name} cannot be read: {listed.loc['manifest', 'todo']}"
        return published._replace(todo=todo)
    asked = listed["todo"][listed["todo"] != ""]
    wrong = [f"{item} of {data.name}: {asked[item]}" for item in BAD if item in asked]
    note = PART if asked.index.isin(COUNTED).any() else ""
    found = listed["found"]
    numbers = found["train images"], found["test images"], found["classes"]
    return Images(*numbers, "; ".join(wrong), note)


def weights_of(backbone: Backbone, fetch: bool) -> tuple[str, str]:
    """Return state and what to do about a model's weights; only `fetch` asks the network."""
    name = backbone.name
    place = ""  # REPOSITORY/FILE of the hub, or REPOSITORY/
    if name.startswith(encoders.HUB):
        place = name.removeprefix(encoders.HUB) + "/"
    elif ":" not in name:
        place = open_clip.get_pretrained_cfg(name, backbone.weights).get("hf_hub", "")
    if place and not fetch:
        repository, _, file = place.rpartition("/")
        files = [encoders.WEIGHTS, encoders.PICKLED]
        if file:
            files = [str(Path(file).with_suffix(".safetensors")), file]
        if any(isinstance(try_to_load_from_cache(repository, each), str) for each in files):
            return "on this machine", ""
        return f"to be downloaded from {repository}", ""
    try:
        _, path, _ = encoders.resolve(name, backbone.weights)
        encoders.check_plain(path)
    except (FileNotFoundError, ValueError) as e:
        return "not there", str(e)
    return f"{path.stat().st_size / 1e6:.0f} MB on this machine", ""


def tower_of(backbone: Backbone) -> Tower:
    """Read open_clip's description of a model; nothing is built."""
    name = backbone.name
    if ":" in name:
        kind, _, place = name.partition(":")
        is_hub = kind + ":" == encoders.HUB
        folder = encoders.model_of_hub(place).parent if is_hub else Path(place)
        config = json.loads((folder / encoders.CONFIG).read_text())["model_cfg"]
    else:
        config = open_clip.get_model_config(encoders.check_name(name))
    vision = config["vision_cfg"]
    text = config["text_cfg"]
    # a ResNet has one position for 32 pixels
    side = vision["image_size"] // (vision["patch_size"] or 32)
    return Tower(config["embed_dim"], side**2, text["width"], text["layers"])


def encoded(source: Source, wanted: set[str]) -> dict[str, int]:
    """Return how many images are encoded for each features file of a data set, by content."""
    images = images_of(source.data)
    everything = images.train + images.test
    numbers = {"feats": everything}
    if "patches" in wanted:
        numbers["patches"] = everything
    if source.data.views:
        numbers["views"] = source.data.views * images.train
    return numbers


def features_files(settings: Settings) -> list[File]:
    """Return all features files; one that two data sets share is made by the first."""
    found: dict[Path, File] = {}
    for name, wanted in settings.contents().items():
        source = settings.source(name)
        for content, images in encoded(source, wanted).items():
            path = source.data.file(content)
            found.setdefault(path, File(path, name, content, images))
    return [*found.values()]


def disk(settings: Settings) -> pd.DataFrame:
    """Return GB (of 10^9 bytes) of every features file and of the records, and what is there."""
    table = []
    for file in features_files(settings):
        tower = tower_of(settings.source(file.maker).backbone)
        there = file.path.stat().st_size if file.path.exists() else 0
        vectors = file.images * (tower.patches if file.content == "patches" else 1)
        table.append((str(file.path), vectors * tower.dim * BYTES / GB, there / GB))
    size = 0
    for experiments in distinct(settings).values():
        for e in experiments:
            n = e.partition.clients
            of_round = 10 * n + 30 * e.run.participants(n)
            size += e.run.rounds * of_round + 1500
    kept = records.RECORDS.glob("*.json")
    there = sum(path.stat().st_size for path in kept)
    table.append((str(records.RECORDS), size / GB, there / GB))
    return pd.DataFrame(table, columns=["files", "GB", "there, GB"])


def steps_per_epoch(experiment: Experiment) -> float:
    """Return the local steps of a client in an epoch, on average, and one at least."""
    partition = experiment.partition
    n = partition.clients
    images = images_of(experiment.source.data)
    share = 0.5 if partition.classes == "base" else 1.0
    total = share * images.train
    if partition.shots:
        holders = 1 if partition.kind in ("pathological", "even") else n  # of a class
        classes = math.ceil(share * images.classes)
        total = min(total, partition.shots * classes * holders)
    return max(1.0, total / n / experiment.run.batch_size)


@functools.cache
def encodings(method: PromptFL, n: int, training: Training, tower: Tower) -> tuple[float, float]:
    """Return how many prompts a round encodes once everybody has been in one.

    With a gradient, per client and step of an epoch; and in all without one, for experts and for
    the test of all clients. Counted by running the method with clients of one step an epoch.
    """
    gen = torch.Generator().manual_seed(0)
    b = min(training.batch_size, 64)  # of methods that see all images at once
    patches = torch.randn(b * n, 2, tower.dim, generator=gen)
    own = torch.arange(b * n).split(b)
    feats = F.normalize(patches[:, 0], dim=-1)
    clients = Clients(feats, torch.arange(b * n) % 2, own, own, 2, patches)
    rounds = min(training.rounds, 2)
    short = replace(training, rounds=rounds, participation=1.0, batch_size=b)
    encoder = CountingEncoder(tower.width, tower.dim)
    trained, read = count_round(method, encoder, clients, short)
    return trained / n, read


def operations(tower: Tower, shared: int, own: int, classes: int) -> float:
    """Return the operations of encoding one prompt tree, forward.

    Every layer has 12 w^2 multiply-adds of two operations for each token, and 2 r^2 w for each
    group of r. The last has 3 w^2, and the other 9 w^2 for the ends of the classes only, which
    alone attend there if there is one group. shared: tokens that all classes share. own: others.
    """
    tokens = shared + own
    maps = (tower.layers - 1) * tokens * 12 + tokens * 3 + classes * 9
    if own > ALONE:
        seen = tower.layers * math.ceil(own / GROUP) * (shared + GROUP) ** 2
    else:
        seen = tokens * ((tower.layers - 1) * tokens + classes)
    return 2.0 * tower.width * (maps * tower.width + 2 * seen)


def cost(experiment: Experiment) -> float:
    """Return the operations of the text tower in one run.

    A gradient costs as much as the way forward, since no weight has one.
    """
    tower = tower_of(experiment.source.backbone)
    run = experiment.run
    n = experiment.partition.clients
    short = replace(run, rounds=min(run.rounds, 2))
    trained, read = encodings(experiment.method, n, short, tower)
    classes = images_of(experiment.source.data).classes
    if experiment.partition.classes == "base":
        classes = math.ceil(classes / 2)
    steps = run.participants(n) * steps_per_epoch(experiment)
    prompts = run.rounds * (2 * trained * steps + read)
    tree = operations(tower, 1 + experiment.method.n_ctx, TOKENS * classes, classes)
    return prompts * tree


def stages(settings: Settings, rates: Rates | None = None) -> pd.DataFrame:
    """Return a line per stage, with how many files or runs it has and how many are there.

    Columns are stage, inputs, number, there, PFLOP (10^15) and hours, missing without rates. A run
    of two tables counts in the first; operations and hours are of what is not there.
    """
    table: list[tuple[str, str, int, int, float, float]] = []
    by_maker: dict[str, list[File]] = {}
    for file in features_files(settings):
        by_maker.setdefault(file.maker, []).append(file)
    for name, files in by_maker.items():
        source = settings.source(name)
        model = source.backbone.name
        left = [file.images for file in files if not file.path.exists()]
        hours = sum(left) / rates.images[model] / HOUR if rates else math.nan
        inputs = f"{source.data.name}, {model}"
        there = len(files) - len(left)
        table.append((f"features {name}", inputs, len(files), there, math.nan, hours))
    for name, experiments in distinct(settings).items():
        todo = [e for e in experiments if not recorded(e)]
        costs = [cost(e) for e in todo]
        hours = math.nan
        if rates:
            speeds = [rates.text[e.source.backbone.name] for e in todo]
            hours = sum(c / speed / HOUR for c, speed in zip(costs, speeds))
        data = dict.fromkeys(e.source.name for _, e in settings.runs(name))
        number = len(experiments)
        line = (f"runs {name}", f"features of {', '.join(data)}", number, number - len(todo))
        table.append((*line, sum(costs) / 1e15, hours))
    return pd.DataFrame(table, columns=["stage", "inputs", "number", "there", "PFLOP", "hours"])


def distinct(settings: Settings) -> dict[str, list[Experiment]]:
    """Return the runs of each table that no table before it has."""
    seen = set()
    found: dict[str, list[Experiment]] = {}
    for name in settings.tables:
        found[name] = []
        for _, e in settings.runs(name):
            source = e.source
            about = [e.settings(), source.backbone.name, source.data.store]
            key = json.dumps(about, sort_keys=True)
            if key not in seen:
                seen.add(key)
                found[name].append(e)
    return found


def recorded(experiment: Experiment) -> bool:
    """Return whether the run has a record; without features that fit, nothing can have one."""
    if not experiment.source.data.features.exists():
        return False
    try:
        (key,) = runner.keys_of([experiment])
    except (FileNotFoundError, ValueError):
        return False
    return records.is_whole(key.path)


def calibrate(settings: Settings) -> Rates:
    """Measure the rates of each backbone, with random weights; several GPUs share the work."""
    text: dict[str, float] = {}
    pixels: dict[str, float] = {}
    devices = max(1, torch.cuda.device_count())
    models = {settings.source(name).backbone.name for name in settings.contents()}
    for name in sorted(models):
        clip = load_model(name)
        text[name] = devices * text_speed(clip, tower_of(Backbone(name)))
        pixels[name] = devices * image_speed(clip, 512 if device() == "cuda" else 8)
    return Rates(text, pixels)


def text_speed(clip: Clip, tower: Tower) -> float:
    """Return the operations per second of local steps of PromptFL, with the names of Food101.

    As many clients as train at once, or ten, take steps until three in a row are within 5 % or ten
    seconds are over.
    """
    text = PromptTree(clip, names(101))
    method = PromptFL()
    n = min(text.at_once, 10)
    clients = draw_clients(n, 16, text.dim, text.n_cls)
    setup = Setup(method, text, clients, Training(local_epochs=1))
    gen = torch.Generator().manual_seed(1)
    ctx = method.init(text, gen)["ctx"].to(device())
    begin = {"ctx": ctx.repeat(n, 1, 1)}
    order = {i: own.unsqueeze(0) for i, own in enumerate(clients.train)}
    step = functools.partial(train_locally, setup, begin, {}, order)
    step()
    taken = [timed(step)]
    while sum(taken) < 10 and not is_steady(taken[-3:]):
        taken.append(timed(step))
    own = text.n_nodes - 1 - method.n_ctx
    tree = operations(tower, 1 + method.n_ctx, own, text.n_cls)
    return 2 * n * tree / statistics.median(taken[-3:])


def is_steady(taken: list[float]) -> bool:
    """Return whether three measurements are within 5 %."""
    return len(taken) == 3 and max(taken) <= 1.05 * min(taken)


def image_speed(clip: Clip, images: int) -> float:
    """Return images per second of the whole extraction, from files of a photograph's size.

    It is made twice, and the second counts.
    """
    cores = min(os.cpu_count() or 1, 8)
    options = extraction.Options(cores if device() == "cuda" else 0)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        manifest = draw_photos(folder, images)
        extract = functools.partial(extraction.extract, manifest, clip, options=options)
        extract(folder / "first.h5")
        return images / timed(lambda: extract(folder / "second.h5"))
