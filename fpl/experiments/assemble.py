"""From settings to what the loop takes: clients, other test images, and the rounds themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.optim import SGD

from fpl.data import partitions
from fpl.data.features import Features
from fpl.data.partitions import Partition
from fpl.experiments.cache import device, load_cached, patches_of, text_of, views_of
from fpl.experiments.settings import Experiment
from fpl.experiments.stored import check_names
from fpl.prompts import PromptTree
from fpl.released import splits
from fpl.rounds import Round, Seeds, Setup, State, Training, run_rounds, select
from fpl.state import Clients


def make_clients(experiment: Experiment, device: str) -> Clients:
    """Return the clients of an experiment: cached features, dealt by its partition.

    Raises ValueError for images that cannot be dealt as asked, and for a method that reads patches
    where crops are asked for.
    """
    data, backbone = experiment.source.data, experiment.source.backbone
    _, feats = load_cached(data, backbone, device)
    patches = views = place = None
    if experiment.method.inputs == "patches":
        patches = patches_of(data, backbone, device)
    if data.views:
        views, place = views_of(data, backbone, device)
    if patches is not None and views is not None:
        raise ValueError(
            f"{experiment.row} reads patches, of which there are no views: set data.views to 0"
        )
    whole = Clients(feats.feats, feats.labels, [], [], len(feats.classes), patches, views, place)
    clients = deal(whole, feats, experiment.partition, experiment.seed)
    turns = turns_of(experiment, feats)
    if experiment.partition.unseen:
        turns = turns_of_seen(experiment, clients)
    return replace(clients, turns=turns)


def turns_of(experiment: Experiment, feats: Features) -> list[Tensor] | None:
    """Return who trains in each round of a released row under a released split; else None.

    The release draws them by NumPy's global state, as the split has left it.
    """
    asked, run = experiment.partition, experiment.run
    turns = getattr(experiment.method, "turns", None)  # of fpl.released.methods.InTurn
    if asked.form != "released" or turns is None:
        return None
    rng = np.random.RandomState(experiment.seed)
    labels = feats.labels.cpu().numpy()
    split_seed = asked.split_seed or experiment.seed
    splits.make(asked, labels, feats.split, split_seed, feats.domain, rng)
    picks = splits.participants(asked.clients, run.participation, run.rounds, rng)
    return turns(torch.from_numpy(picks), asked.clients)


def turns_of_seen(experiment: Experiment, clients: Clients) -> list[Tensor]:
    """Return who trains in each round where some clients never do.

    The others are drawn as all are elsewhere; `participation` is a share of them.
    """
    asked, run = experiment.partition, experiment.run
    unseen = partitions.is_unseen(np.arange(asked.clients), asked.unseen, asked.clients)
    seen = torch.from_numpy(np.flatnonzero(~unseen))
    train, test = ([part[i] for i in seen] for part in (clients.train, clients.test))
    others = replace(clients, train=train, test=test)
    order = seeds_of(run, experiment.seed).order
    return [seen[select(others, run, order, number)] for number in range(run.rounds)]


def deal(whole: Clients, feats: Features, asked: Partition, seed: int) -> Clients:
    """Return the images of `whole`, which nobody has, dealt to clients by a partition.

    Raises ValueError for images that cannot be dealt as asked.
    """
    labels = feats.labels.cpu().numpy()
    split_seed = asked.split_seed or seed
    if asked.form == "released":
        parts = splits.make(asked, labels, feats.split, split_seed, feats.domain)
    else:
        parts = partitions.make(asked, labels, feats.split, seed, feats.domain, feats.client)
    if asked.loader != "right":
        rows, labels, parts = splits.mistaken(
            asked.loader, labels, feats.split, feats.domain, parts, split_seed
        )
        patches = None if whole.patches is None else whole.patches[rows]
        place = None if whole.place is None else whole.place[rows]
        whole = replace(whole, feats=whole.feats[rows], patches=patches, place=place)
    device = str(whole.feats.device)
    train, test = ([on(device, index) for index in part] for part in parts)
    n_cls = partitions.n_base(labels) if asked.classes == "base" else whole.n_cls
    return replace(whole, labels=on(device, labels), train=train, test=test, n_cls=n_cls)


def on(device: str, array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).to(device)


def elsewhere_of(
    experiment: Experiment, text: PromptTree, clients: Clients
) -> dict[str, tuple[PromptTree, Clients]]:
    """Return what every client is tested on besides its own images, by name.

    "global" are the test images of all clients. Novel classes have a text and labels of their own.
    """
    source = experiment.source
    _, feats = load_cached(source.data, source.backbone, device())
    labels = feats.labels.cpu().numpy()
    found = partitions.elsewhere(experiment.partition, labels, feats.split, feats.domain)
    everything = torch.cat(list(clients.test)).unique()
    made = {partitions.GLOBAL: (text, replace(clients, test=[everything] * len(clients)))}
    for name, index in found.items():
        tested = [on(str(clients.labels.device), index)] * len(clients)
        there = replace(clients, test=tested)
        made[name] = text, there
        if name == "novel":
            names = text_for(experiment, (clients.n_cls, None))
            renumbered = clients.labels - clients.n_cls
            made[name] = names, replace(there, labels=renumbered, n_cls=names.n_cls)
    return made


def text_for(experiment: Experiment, classes: tuple[int, int | None]) -> PromptTree:
    """Return the prompts of some classes as the experiment's method learns them."""
    source = experiment.source
    n_ctx = experiment.method.n_ctx
    precision = experiment.run.precision
    return text_of(source.data, source.backbone, device(), n_ctx, classes, precision)


def names_of(experiment: Experiment) -> dict[str, list[str]]:
    """Return the domain of each client and its name, where the partition goes by one of them."""
    source, asked = experiment.source, experiment.partition
    _, feats = load_cached(source.data, source.backbone, device())
    labels = feats.labels.cpu().numpy()
    return {
        "domains": partitions.domain_names(asked, labels, feats.domain),
        "clients": partitions.client_names(asked, labels, feats.domain, feats.client),
    }


def setup_of(experiment: Experiment) -> Setup:
    """Return what stays the same during a run: method, text, clients, training and seeds."""
    clients = make_clients(experiment, device())
    text = text_for(experiment, (0, clients.n_cls))
    seeds = seeds_of(experiment.run, experiment.seed)
    return Setup(experiment.method, text, clients, experiment.run, seeds)


def seeds_of(training: Training, seed: int) -> Seeds:
    """Return the seeds of what a run draws: those of its training, or else the one of the run."""
    return Seeds(training.init_seed or seed, training.order_seed or seed)


def check_begin(setup: Setup) -> None:
    """Raise ValueError, before it trains, for what cannot be trained so, or held by no file."""
    setup.method.check(setup.text, setup.clients)
    training = setup.training
    if training.schedule == "zigzag" and training.optimiser != "shared":
        raise ValueError("schedule zigzag goes on through all clients: set optimiser to shared")
    one = [{"name": "ctx", "params": [torch.zeros(1)]}]
    if training.optimiser == "shared" and not isinstance(
        setup.method.optimiser(one, 0.0, 0.0), SGD
    ):
        raise ValueError(f"{setup.method.title} is not trained by SGD: set optimiser to fresh")
    check_names(setup.method.init(setup.text, torch.Generator()))


def rounds_of(
    experiment: Experiment, setup: Setup | None = None, begin: State | None = None
) -> Iterator[Round]:
    """Yield the rounds of an experiment as they finish; in a notebook, a way to watch one.

    setup: that of the experiment, where it is known. begin: the state that an earlier round of the
    same run left, from which it goes on.
    """
    setup = setup or setup_of(experiment)
    check_begin(setup)
    elsewhere = elsewhere_of(experiment, setup.text, setup.clients)
    yield from run_rounds(setup, elsewhere, begin)
