"""What the rows of a table cost a client: numbers, text encodings, seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pandas as pd
import torch
import torch.nn.functional as F

from fpl.bench.counting import CountingEncoder, count_round
from fpl.bench.measure import timed
from fpl.experiments.assemble import setup_of
from fpl.experiments.settings import Experiment
from fpl.methods import PromptFL
from fpl.rounds import Setup, begin_run, select, train_round
from fpl.state import Clients, count_numbers


def costs(experiments: Mapping[str, Experiment]) -> pd.DataFrame:
    """Return what a client of each row has and computes, a line for each label.

    numbers: that it learns, the shared ones with those that never leave it. trained: prompts that
    it encodes with a gradient in a local step; each is one pass of the text tower over all classes.
    read: prompts encoded without one in a round, for experts, fixed texts and the test, divided by
    the number of clients.
    """
    lines = {}
    for label, experiment in experiments.items():
        setup = setup_of(experiment)
        trained, read = encodings(setup)
        numbers = count_numbers(begin_run(setup).local)
        lines[label] = {"numbers": numbers, "trained": trained, "read": read}
    return pd.DataFrame.from_dict(lines, orient="index").rename_axis("label")


def encodings(setup: Setup) -> tuple[float, float]:
    """Return how many prompts a client encodes: with a gradient in a step, without in a round.

    Counted in the second round of a run with a text tower that only counts, where each client has
    one step, of a batch of two images.
    """
    n = len(setup.clients)
    encoder = CountingEncoder(setup.text.width, setup.text.dim)
    gen = torch.Generator().manual_seed(0)
    patches = torch.randn(4 * n, 2, encoder.dim, generator=gen)
    feats = F.normalize(patches[:, 0], dim=-1)
    parts = torch.arange(4 * n).split(2)
    labels = torch.arange(4 * n) % encoder.n_cls
    clients = Clients(feats, labels, parts[:n], parts[n:], encoder.n_cls, patches)
    rounds = min(setup.training.rounds, 2)
    asked = {"rounds": rounds, "local_epochs": 1, "batch_size": 2, "participation": 1.0}
    method: PromptFL = setup.method
    small = replace(setup.training, **asked)
    trained, read = count_round(method, encoder, clients, small)
    return trained / n, read / n


def seconds(experiments: Mapping[str, Experiment]) -> pd.Series:
    """Return the seconds of the first round's training of each row, all clients, measured here."""
    found = {}
    for label, experiment in experiments.items():
        setup = setup_of(experiment)
        setup = replace(setup, clients=setup.method.clients(setup.clients))
        state = begin_run(setup)
        drawn = select(setup.clients, setup.training, setup.seeds.order, 0)
        drawn = drawn.to(setup.clients.feats.device)
        found[label] = timed(lambda: train_round(setup, state, drawn))  # noqa: B023
    return pd.Series(found, name="seconds").rename_axis("label")
