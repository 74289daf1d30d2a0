"""What a run learnt, kept in one file beside its record: all that prediction needs.

The file has what every client would deploy, what it has received and reads (experts and the like),
the server's tensors, and in its header class names, clients' names, method, training, seed, and
which model, weights and transform the features were made with. It has no images. A method that
classifies with features or label counts of a client's images (pFedPrompt's memory, some controls)
keeps these: they are what it reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fpl.experiments import stored
from fpl.experiments.checkpoints import server_of, server_tensors
from fpl.experiments.records import Damaged
from fpl.experiments.settings import ROWS
from fpl.experiments.values import build
from fpl.methods import PromptFL
from fpl.prompts import Clip
from fpl.rounds import Cohort, Round, Seeds, Setup, Training
from fpl.state import Lookup, Server, Tensors

SUFFIX = ".safetensors"
FORMAT = 1


@dataclass(frozen=True)
class Kept:
    """What a run learnt.

    clients: their names, or none. provenance: of the model, see fpl.prompts.Clip. deployed: the
    tensors with which every client was evaluated last. server: as the last round left it. cohorts:
    what clients received and read in that round. about: what else is worth knowing.
    """

    method: PromptFL
    training: Training
    seeds: Seeds
    classes: Sequence[str]
    clients: Sequence[str]
    provenance: Mapping[str, str]
    deployed: Tensors = field(repr=False)
    server: Server = field(repr=False)
    cohorts: Sequence[Cohort] = field(repr=False)
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """How many clients took part."""
        return sum(len(cohort.client_ids) for cohort in self.cohorts)


def of_run(
    setup: Setup, last: Round, clip: Clip, clients: Sequence[str] = (), **about: Any
) -> Kept:
    """Return what a run learnt, from its last round; clip: the frozen model that it ran with."""
    return Kept(
        method=setup.method,
        training=setup.training,
        seeds=setup.seeds,
        classes=setup.text.names,
        clients=clients,
        provenance=clip.provenance,
        deployed=last.evaluated,
        server=last.state.server,
        cohorts=last.cohorts,
        about=about,
    )


def write(path: Path, kept: Kept) -> None:
    """Write what a run learnt, as one file of safetensors."""
    header = {
        "format": FORMAT,
        "row": kept.method.key,
        "class": type(kept.method).__name__,
        "method": dataclasses.asdict(kept.method),
        "training": dataclasses.asdict(kept.training),
        "seeds": dataclasses.asdict(kept.seeds),
        "classes": [*kept.classes],
        "clients": [*kept.clients],
        "provenance": {**kept.provenance},
        "round": kept.server.round,
        "about": {**kept.about},
    }
    cohorts = {str(i): tensors_of(cohort) for i, cohort in enumerate(kept.cohorts)}
    server = server_tensors(kept.server)
    stored.write(path, {"deployed": kept.deployed, "server": server, "cohorts": cohorts}, header)


def read(path: Path, method: type[PromptFL] | None = None, device: str = "cpu") -> Kept:
    """Return what a run learnt.

    method: its class, needed where it is one of your own: no file says what code is run. Raises
    FileNotFoundError when there is no file, Damaged for one that was cut or has changed, and
    ValueError where the method is needed, or is another one.
    """
    tensors, header = stored.read(path, device)
    if header.get("format") != FORMAT:
        raise Damaged(f"{path} is not what a run keeps, or was written by another version of fpl")
    try:
        known = ROWS.get(header["row"])
        kind = method or known
        if kind is None or kind.__name__ != header["class"]:
            own = f"{header['class']}, a class of your own: give it as method"
            said = f"{own} (--method FILE.py:CLASS)"
            if known and known.__name__ == header["class"]:
                said = f"{known.__name__}, a row of the table: leave out the method"
            raise ValueError(f"{path} is of {said}")
        kept = kept_of(kind, tensors, header, str(path))
        check_clients(kept)
    except (LookupError, TypeError, AttributeError, RuntimeError):
        raise Damaged(f"{path} is not built as what a run keeps") from None
    return kept


def run_of(path: Path) -> str:
    """Return the name of the record beside which a file was kept, "" for none; raises as `read`."""
    about = stored.read(path)[1].get("about", {})
    return str(about.get("run", ""))


def check_clients(kept: Kept) -> None:
    """Raise LookupError unless every client has its tensors, and has them once."""
    ids = [i for cohort in kept.cohorts for i in cohort.client_ids.tolist()]
    lengths = {len(value) for value in kept.deployed.values()}
    if sorted(ids) != list(range(len(ids))) or lengths - {len(ids)}:
        raise LookupError
    for cohort in kept.cohorts:
        for value in (*cohort.received.values(), *cohort.context.values()):
            place = value.place if isinstance(value, Lookup) else value
            if len(place) != len(cohort.client_ids):
                raise LookupError


def kept_of(
    kind: type[PromptFL], tensors: Mapping[str, Any], header: Mapping[str, Any], where: str
) -> Kept:
    """Return what a run learnt from the content of its file."""
    seeds = Seeds(**header["seeds"])
    return Kept(
        method=build(kind, header["method"], kind.key),
        training=build(Training, header["training"], where),
        seeds=seeds,
        classes=header["classes"],
        clients=header["clients"],
        provenance=header["provenance"],
        deployed=tensors.get("deployed", {}),
        server=server_of(tensors["server"], header["round"], seeds.order),
        cohorts=[cohort_of(tensors["cohorts"][key]) for key in sorted(tensors["cohorts"], key=int)],
        about=header["about"],
    )


def tensors_of(cohort: Cohort) -> dict[str, Any]:
    """Return what clients of a cohort received and read; what is equal for several stands once."""
    return {
        "clients": cohort.client_ids,
        "received": {name: packed(value) for name, value in cohort.received.items()},
        "reads": {name: packed(value) for name, value in cohort.context.items()},
    }


def cohort_of(tensors: Mapping[str, Any]) -> Cohort:
    """Return a cohort from what `tensors_of` made of it."""
    ids = tensors["clients"]
    everybody = torch.arange(len(ids), device=ids.device)
    received = {name: unpacked(value) for name, value in tensors.get("received", {}).items()}
    context: dict[str, Tensor | Lookup] = {}
    for name, value in tensors.get("reads", {}).items():
        of_experts = value["place"].ndim == 2
        context[name] = Lookup(**value) if of_experts else unpacked(value)
    return Cohort(ids, received, context, everybody)


def unpacked(value: Mapping[str, Tensor]) -> Tensor:
    """Return what `packed` was given."""
    return value["rows"][value["place"]]


def packed(value: Tensor | Lookup) -> dict[str, Tensor]:
    """Return the rows that differ, and which of them each client has.

    An axis of experts behind that of the clients is looked through: many receive the same ones.
    """
    if isinstance(value, Lookup):
        return {"rows": value.rows, "place": value.place}
    lead = 2 if value.ndim == 4 else 1
    flat = value.flatten(0, lead - 1)
    if value.numel():
        rows, place = flat.unique(dim=0, return_inverse=True)
    else:  # of which no two differ
        rows, place = flat[:1], torch.zeros(len(flat), dtype=torch.long)
    return {"rows": rows, "place": place.view(value.shape[:lead])}
