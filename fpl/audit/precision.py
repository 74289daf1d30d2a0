"""What half precision leaves of training (D29): which numbers change at all, and how far they go.

The released code holds prompt and gate in half precision and adds steps to them without a scale of
the loss. Near 0.02 the next number of half precision is 1.5e-5 away, near 0.08 it is 6e-5: smaller
steps are lost, and so is most of weight decay. The row `pfedmoap_half` does that and computes text
features and logits in single precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import pandas as pd
import torch
from pandas import DataFrame

from fpl.experiments.assemble import make_clients, text_for
from fpl.experiments.cache import device
from fpl.experiments.settings import Experiment
from fpl.methods import PFedMoAP
from fpl.released.methods import HalfPrecision
from fpl.rounds import Seeds, Setup, batches, run_rounds, train_locally
from fpl.state import Tensors, take

NOTE = (
    "What 25 steps of the second round change, in % as means over clients: `changed` is the share "
    "of a tensor's numbers that are not the same afterwards, `moved` the norm of the change "
    "divided by the norm before."
)
NAMES = {"ctx": "prompt", "gate_wq": "W_q", "gate_wk": "W_k", "gate_wv": "W_v", "gate_wo": "W_o"}


def measure(experiment: Experiment, steps: int = 25) -> DataFrame:
    """Return what some steps of the second round change, in half and in single precision.

    experiment: of pFedMoAP; its first round makes the experts. A line per tensor; the columns are
    `movement` by precision. "single, no decay" is trained without weight decay, which alone moves
    every number in single precision: what "single" has beyond it, no image has asked for.
    """
    clients = make_clients(experiment, device())
    text = text_for(experiment, (0, clients.n_cls))
    seeds = Seeds(experiment.seed, experiment.seed)
    settings = {f.name: getattr(experiment.method, f.name) for f in fields(experiment.method)}
    run = experiment.run
    ways = {
        "half": (HalfPrecision(**settings), run),
        "single": (PFedMoAP(**settings), run),
        "single, no decay": (PFedMoAP(**settings), replace(run, weight_decay=0.0)),
    }
    found = {}
    for name, (method, training) in ways.items():
        found[name] = movement(*second_round(Setup(method, text, clients, training, seeds), steps))
    table = pd.concat(found, axis=1).loc[[*NAMES]]
    return table.rename(index=NAMES).rename_axis(index="tensor", columns=["precision", ""])


def second_round(setup: Setup, steps: int) -> tuple[Tensors, Tensors]:
    """Return what all clients begin their second round with, and what some steps make of it.

    A client's images come in the order of the round, as if that had as many local epochs as needed.
    """
    method, clients, training = setup.method, setup.clients, setup.training
    first = next(run_rounds(setup))
    everybody = torch.arange(len(clients), device=clients.feats.device)
    server = first.state.server.begin(1, everybody)
    longer = replace(setup, training=replace(training, local_epochs=steps))  # an epoch has a step
    at_once = replace(setup, training=replace(training, local_epochs=1))
    begins, ends = [], []
    for i, one in enumerate(everybody.split(1)):
        down = method.download(server, one, clients)
        context = method.context(setup.text, down, one, clients)
        begin = method.start(take(first.evaluated, one), down)
        order = batches(longer, i, 1)[:steps]
        ended, _ = train_locally(at_once, begin, take(context, slice(None)), {i: order})
        begins.append(begin)
        ends.append(ended)
    return stacked(begins), stacked(ends)


def stacked(parts: Sequence[Tensors]) -> Tensors:
    """Return tensors of several clients one after the other."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def movement(begin: Tensors, end: Tensors) -> DataFrame:
    """Return a line per tensor: what training changed, as means over clients, the leading axis.

    changed: the share of its numbers that are not the same afterwards, in [0, 1].
    moved: the norm of the change divided by the norm before.
    """
    lines = {}
    for name, before in begin.items():
        was, now = before.double().flatten(1), end[name].double().flatten(1)
        moved = (now - was).norm(dim=1) / was.norm(dim=1)
        share = (was != now).double().mean()
        lines[name] = {"changed": share.item(), "moved": moved.mean().item()}
    return DataFrame(lines).T
