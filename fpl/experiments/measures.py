"""What records do not say of a run: its local steps, and how large updates are beside noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pandas import DataFrame, Series
from torch import Tensor

from fpl.experiments import assemble
from fpl.experiments.cache import device
from fpl.experiments.settings import Experiment
from fpl.privacy import noise_multiplier
from fpl.rounds import begin_run
from fpl.state import Tensors


def steps(experiment: Experiment) -> int:
    """Return how many local steps all clients together would take if all took part in every round.

    They depend on how the images are dealt, so tables that compare partitions state them.
    """
    run = experiment.run
    clients = assemble.make_clients(experiment, device())
    sizes = [len(index) for index in clients.train]
    of_epoch = sum(n // min(run.batch_size, n) for n in sizes)
    return of_epoch * run.local_epochs * run.rounds


def norms(experiment: Experiment) -> DataFrame:
    """Make a run, without a record, and return a line per round and client that took part.

    prompt: the norm of the shared tensors as the server has them; update: that of what the client
    sends minus these, before anything is clipped, which is the change that its training made (but
    for FedAMP, whose clients begin elsewhere); numbers: how many numbers they are. So the run
    should have neither noise nor clipping. Raises ValueError for a method that sends nothing.
    """
    method = experiment.method
    if not method.shared:
        raise ValueError(f"{experiment.row} sends nothing: choose another row")
    setup = assemble.setup_of(experiment)
    begin = begin_run(setup).server.params
    lines = []
    for played in assemble.rounds_of(experiment, setup):
        server = played.state.server
        for client in played.participants.tolist():
            received = flat({name: begin[name] for name in method.shared})
            sent = flat({name: server.uploads[name][client] for name in method.shared})
            update = (sent - received).norm().item()
            line = {"round": played.number, "client": client, "prompt": received.norm().item()}
            lines.append(line | {"update": update, "numbers": len(sent)})
        begin = server.params
    return DataFrame(lines)


def flat(tensors: Tensors) -> Tensor:
    """Return some tensors as one vector."""
    return torch.cat([value.cpu().double().flatten() for value in tensors.values()])


def beside(found: DataFrame, experiment: Experiment, epsilons: Sequence[float]) -> Series:
    """Return the norms of prompt and update beside those of the noise at some epsilons.

    found: as `norms` gives it. A vector of m normal numbers of deviation z clip has a norm near
    z clip sqrt(m); their mean over the n clients of a round, with as many images each, 1 / sqrt(n)
    of that.
    """
    run = experiment.run
    shown = {
        "prompt, as drawn": found["prompt"].iloc[0],
        "prompt, as the last round found it": found["prompt"].iloc[-1],
        "update of a client in a round, median": found["update"].median(),
        "clipping norm": run.clip,
    }
    many = len(found) // found["round"].nunique()
    for epsilon in epsilons:
        z = noise_multiplier(epsilon, run.delta, run.rounds)
        norm = z * run.clip * math.sqrt(found["numbers"].iloc[0])
        shown[f"noise in an upload, epsilon {epsilon:g}"] = norm
        shown[f"noise in the mean of {many} uploads, epsilon {epsilon:g}"] = norm / math.sqrt(many)
    return Series(shown, name="l2 norm").rename_axis("of")
