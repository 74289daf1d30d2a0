"""What the rows of a table cost a client: numbers, text encodings, seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pandas as pd

from fpl.bench.measure import timed
from fpl.bench.plan import encodings, tower_of
from fpl.experiments.assemble import setup_of
from fpl.experiments.settings import Experiment
from fpl.rounds import begin_run, select, train_round
from fpl.state import count_numbers


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
        n = len(setup.clients)
        short = replace(setup.training, local_epochs=1)
        tower = tower_of(experiment.source.backbone)
        trained, read = encodings(setup.method, n, short, tower)
        numbers = count_numbers(begin_run(setup).local)
        lines[label] = {"numbers": numbers, "trained": trained, "read": read / n}
    return pd.DataFrame.from_dict(lines, orient="index").rename_axis("label")


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
