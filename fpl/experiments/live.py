"""Runs that are followed while they go, by DVCLive where it is installed.

DVCLive is no part of what fpl needs: `pip install dvclive`. Its files lie under results/live; any
editor with DVC's extension, or `dvc plots`, draws them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from fpl.experiments import places
from fpl.experiments.runner import Asked
from fpl.experiments.settings import Experiment


@contextmanager
def followed(experiment: Experiment, asked: Asked) -> Iterator[Asked]:
    """Let DVCLive log what each round of a run finds: loss, mean and worst accuracy, traffic.

    A run that goes on from a checkpoint logs the rounds before it again, so the curves are whole.
    Raises ValueError where DVCLive is not installed.
    """
    try:
        from dvclive import Live
    except ImportError:
        raise ValueError("--live needs DVCLive: call `pip install dvclive`") from None
    folder = places.results() / "live" / f"{experiment.row}-{experiment.seed}"
    with Live(str(folder), dvcyaml=None, save_dvc_exp=False) as live:
        live.log_params(experiment.settings())

        def log(line: Mapping[str, Any]) -> None:
            for name, value in metrics(line).items():
                live.log_metric(name, value)
            live.next_step()

        yield replace(asked, follow=log)


def metrics(line: Mapping[str, Any]) -> dict[str, float]:
    """Return what is logged of a record's line of a round; of methods that learn nothing no loss.

    Accuracies in percent, sent and received in numbers, summed over participants.
    """
    accuracy = line["accuracy"]
    found = {
        "accuracy/mean": 100 * math.fsum(accuracy) / len(accuracy),
        "accuracy/worst": 100 * min(accuracy),
        "sent": sum(line["up"]),
        "received": sum(line["down"]),
    }
    return found if line["loss"] is None else found | {"loss": line["loss"]}
