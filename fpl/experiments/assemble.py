"""Clients out of features and a partition."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch

from fpl.data import partitions
from fpl.experiments.cache import device, load_cached, patches_of, text_of, views_of
from fpl.experiments.settings import Experiment
from fpl.prompts import PromptTree
from fpl.released import splits
from fpl.rounds import Round, Seeds, run_rounds
from fpl.state import Clients


def make_clients(experiment: Experiment, device: str) -> Clients:
    data, backbone = experiment.source.data, experiment.source.backbone
    _, feats = load_cached(data, backbone, device)
    asked, labels, rows = experiment.partition, feats.labels.cpu().numpy(), np.arange(len(feats.labels))
    seed = asked.split_seed or experiment.seed
    if asked.form == "released":
        parts = splits.make(asked, labels, feats.split, seed, feats.domain)
    else:
        parts = partitions.make(asked, labels, feats.split, experiment.seed, feats.domain, feats.client)
    if asked.loader != "right":
        rows, labels, parts = splits.mistaken(asked.loader, labels, feats.split, feats.domain, parts, seed)
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




def elsewhere_of(experiment: Experiment, text: PromptTree, clients: Clients) -> dict[str, tuple[PromptTree, Clients]]:
    """What every client is tested on besides its own images; novel classes have a text and labels of their own."""
    data, backbone = experiment.source.data, experiment.source.backbone
    _, feats = load_cached(data, backbone, device())
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
    _, feats = load_cached(experiment.source.data, experiment.source.backbone, device())
    names = [str(name) for name in np.unique(feats.domain) if name != partition.held_out]
    return [name for name in names for _ in range(partition.clients // len(names))]




def rounds_of(experiment: Experiment, tick=lambda n: None) -> Iterable[Round]:
    """The rounds of one experiment as they finish; in a notebook, a way to watch one."""
    where, source = device(), experiment.source
    clients = make_clients(experiment, where)
    cfg = experiment.run
    text = text_of(source.data, source.backbone, where, experiment.method.n_ctx, 0, clients.n_cls, cfg.precision)
    seeds = Seeds(cfg.init_seed or experiment.seed, cfg.order_seed or experiment.seed)
    return run_rounds(experiment.method, text, clients, cfg, seeds, tick, elsewhere_of(experiment, text, clients))


