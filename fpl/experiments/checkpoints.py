"""Where a run stands, written after its rounds, so that a killed one goes on from there.

A checkpoint lies beside the record that the run will have and is removed when that is written. It
carries the record's key, so that no other run goes on from it.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fpl.data.files import remove_orphans
from fpl.experiments import stored
from fpl.experiments.assemble import seeds_of
from fpl.experiments.cache import device
from fpl.experiments.records import Damaged, Key, checksum
from fpl.experiments.settings import Experiment
from fpl.rounds import Optimiser, State
from fpl.state import Server, generator

EVERY = 10.0  # seconds between two checkpoints, unless a round takes longer
SHARE = 0.02  # of the time that writing them may take
Lines = list[dict[str, Any]]  # what the record says of each round so far


@dataclass
class Checkpoint:
    """The checkpoint of one run. every: seconds between two of them, 0 for one after each round."""

    experiment: Experiment
    key: Key
    every: float = EVERY
    again: float = field(init=False)  # when the next is due

    def __post_init__(self) -> None:
        self.again = time.monotonic() + self.every

    @property
    def path(self) -> Path:
        return self.key.path.with_suffix(".checkpoint")

    @property
    def identity(self) -> str:
        """Of all that must be the same for the run to go on as it would have gone."""
        return checksum([*self.key, torch.__version__, device()])

    def read(self) -> tuple[Lines, State | None]:
        """Return the lines of the rounds that are done, and the state after them, if there is one.

        What is damaged or of another run is not taken, with a warning.
        """
        try:
            tensors, header = stored.read(self.path, device())
            if header["key"] != self.identity:
                raise Damaged(f"{self.path} is of another run")
            return header["lines"], state_of(tensors, header, self.experiment)
        except FileNotFoundError:
            return [], None
        except Damaged as error:
            warnings.warn(f"{error}: its run begins again", stacklevel=2)
            return [], None

    def write(self, state: State, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write the state after a round, if it is time again."""
        begin = time.monotonic()
        if begin < self.again:
            return
        epochs = state.optimiser.epochs if state.optimiser else None
        header = {"key": self.identity, "lines": [*lines], "epochs": epochs}
        stored.write(self.path, tensors_of(state), header | {"round": state.server.round})
        end = time.monotonic()
        self.again = end + max(self.every, (end - begin) / SHARE if self.every else 0)

    def remove(self) -> None:
        """Remove what a kill left half written, then the checkpoint: the run is done."""
        remove_orphans(self.path)
        self.path.unlink(missing_ok=True)


def tensors_of(state: State) -> dict[str, Any]:
    """Return all tensors of a state, by name."""
    server = state.server
    return {
        "local": state.local,
        "server": server_tensors(server),
        "velocity": state.optimiser.velocity if state.optimiser else {},
    }


def server_tensors(server: Server) -> dict[str, Any]:
    """Return all tensors of a server, by name."""
    return {
        "params": server.params,
        "uploads": server.uploads,
        "memory": server.memory,
        "has_upload": server.has_upload,
        "returned": server.returned,
    }


def server_of(tensors: Mapping[str, Any], number: int, seed: int) -> Server:
    """Return a server from its tensors; number: of the round that it has seen last."""
    named = {"params": {}, "uploads": {}, "memory": {}, **tensors}
    return Server(**named, round=number, draw=partial(generator, seed))


def state_of(
    tensors: Mapping[str, Any], header: Mapping[str, Any], experiment: Experiment
) -> State:
    """Return a state from what was written of it."""
    order = seeds_of(experiment.run, experiment.seed).order
    server = server_of(tensors["server"], header["round"], order)
    shared = header["epochs"] is not None
    optimiser = Optimiser(tensors.get("velocity", {}), header["epochs"]) if shared else None
    return State(tensors.get("local", {}), server, optimiser)
