"""What all sites agree on, and what travels between them and the server.

Nothing here, in `server` or in `site` knows Flower: `app` carries their parcels over it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from fpl.data.text import one_line
from fpl.experiments import values
from fpl.experiments.assemble import seeds_of
from fpl.experiments.predict import People
from fpl.methods import METHODS, PromptFL
from fpl.more_methods import MORE
from fpl.more_methods.features import AFL
from fpl.rounds import Seeds, Training
from fpl.state import Clients, Tensors

# Of a model's provenance what must be the same for all; its name is a path, which need not be.
MODEL = ("architecture", "weights", "transform")
KINDS = ("join", "train", "evaluate")  # what a server asks
ROWS: dict[str, type[PromptFL]] = METHODS | MORE
Words = dict[str, str | int | float | bool]


class Refused(ValueError):
    """Why something is not taken, in a sentence that may leave a site."""


@dataclass(frozen=True)
class Parcel:
    """What is sent at once: tensors by name in groups by name, with a client axis of one, words."""

    tensors: Mapping[str, Tensors] = field(default_factory=dict)
    words: Words = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Of the tensors' numbers."""
        return sum(v.nbytes for group in self.tensors.values() for v in group.values())


def check_answered(reply: Parcel, what: str) -> None:
    """Raise Refused, with the sentence that a site gives, where it does not do what was asked."""
    if "refused" in reply.words:
        raise Refused(f"{what}: {one_line(reply.words['refused'])[:200]}")


@dataclass(frozen=True)
class Agreement:
    """What all sites agree on before the first round.

    name: of the federation. sites: their names, in the order of client numbers. model: see MODEL.
    noise: of differential privacy, "secret", or "named" by the seed for a rehearsal that can be
    repeated, which protects nothing. evaluate: when sites test what they have. reveal: whether
    uploads may be features and labels, summed, as those of AFL are.
    """

    name: str
    sites: tuple[str, ...]
    classes: tuple[str, ...]
    method: str
    model: dict[str, str]
    settings: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    seed: int = 1
    noise: Literal["secret", "named"] = "secret"
    evaluate: Literal["last", "every"] = "last"
    reveal: bool = False

    @property
    def text(self) -> str:
        """All of it, as JSON."""
        content = asdict(self)
        if not self.reveal:
            del content["reveal"]  # agreements from before there was such a line keep their key
        return json.dumps(content, sort_keys=True)

    @property
    def key(self) -> str:
        """Names the agreement: equal where all of it is, the model included."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @cached_property
    def rules(self) -> PromptFL:
        """The method, with its settings. Raises ValueError for unknown ones."""
        kind = ROWS[values.check_choice(self.method, ROWS, f"method of {self.name}")]
        return values.build(kind, self.settings, kind.key)

    @cached_property
    def run(self) -> Training:
        """How sites train. Raises ValueError for settings that are unknown or out of range."""
        return values.build(Training, self.rules.training | self.training, "training")

    @property
    def seeds(self) -> Seeds:
        """The seeds of what is drawn."""
        return seeds_of(self.run, self.seed)

    @property
    def private(self) -> bool:
        """Whether updates are clipped before they leave a site."""
        return bool(self.run.epsilon) or self.run.mechanism == "clipping"

    def check(self) -> None:
        """Raise ValueError for what no federation can do."""
        for what, names in (("sites", self.sites), ("classes", self.classes)):
            if not names or len(set(names)) < len(names):
                raise ValueError(f"{self.name}: {what} must be names, each once: correct them")
        choice = getattr(self.rules, "choice", "")
        if choice in ("oracle", "disjoint"):
            needs = "needs how many images of each class every site has, which stays there"
            raise ValueError(f"{self.name}: choice {choice} {needs}: take knn")
        if self.rules.in_step:
            every = "averages gradients in every step, and sites meet once a round"
            raise ValueError(f"{self.name}: {self.rules.title} {every}: take another method")
        hidden = self.run.epsilon and self.noise == "secret"
        if isinstance(self.rules, AFL) and not (hidden or self.reveal):
            sums = "sends sums of features and labels, of a single image these themselves"
            raise ValueError(f"{self.name}: AFL {sums}: say reveal: true, or take an epsilon")
        if getattr(self.rules, "noise", 0):
            known = "is drawn from the agreed seed, so whoever knows that takes it away again"
            raise ValueError(f"{self.name}: noise in a step {known}: take noise 0, and epsilon")
        if self.run.optimiser == "shared":
            left = "would carry what a site has computed to the next"
            raise ValueError(f"{self.name}: a shared optimiser {left}: take fresh")


def agreement_of(content: Mapping[str, Any], where: str) -> Agreement:
    """Return a checked agreement from plain values. Raises ValueError for what it cannot be."""
    agreement = values.build(Agreement, dict(content), where)
    agreement.check()
    return agreement


def read(path: Path, provenance: Mapping[str, str]) -> Agreement:
    """Return the agreement in a YAML file, over the model that the server has."""
    content = values.load(path)
    if "model" in content:
        raise ValueError(f"{path}: model is that of the server's own CLIP: take the line away")
    return agreement_of(content | {"model": model_of(provenance)}, str(path))


def model_of(provenance: Mapping[str, str]) -> dict[str, str]:
    """Return of a CLIP's provenance what must be the same everywhere."""
    return {name: provenance.get(name, "") for name in MODEL}


def check_model(ours: Mapping[str, str], theirs: Mapping[str, Any], who: str) -> None:
    """Raise Refused, naming what differs, for another CLIP than the agreed one."""
    for name in MODEL:
        if ours.get(name) != theirs.get(name):
            one, other = (str(m.get(name))[:16] for m in (theirs, ours))
            agreed = f"the agreed CLIP has {other}: load that"
            raise Refused(f"{who} has a CLIP with another {name} ({one}), {agreed}")


def check_same(ours: Agreement, theirs: Agreement, who: str) -> None:
    """Raise Refused, naming what differs and no value of it, for another agreement than ours."""
    own, other = json.loads(ours.text), json.loads(theirs.text)
    if differ := ", ".join(k for k in own | other if own.get(k) != other.get(k)):
        advice = "compare your files, and let server and site have the same"
        raise Refused(f"the agreement of {who} is another ({differ}): {advice}")


def check_tensors(found: Tensors, wanted: Tensors, who: str) -> None:
    """Raise Refused unless names, types and shapes are as wanted and all numbers are finite."""
    if sorted(found) != sorted(wanted):
        listed = one_line(", ".join(sorted(found)))[:80] or "nothing"
        raise Refused(f"{who} sends {listed} in place of {', '.join(wanted) or 'nothing'}")
    for name, value in found.items():
        want = wanted[name]
        if (value.dtype, value.shape) != (want.dtype, want.shape):
            shapes = f"{value.dtype} {[*value.shape]}, not {want.dtype} {[*want.shape]}"
            raise Refused(f"{who} sends {name} as {shapes}")
    check_finite(found, who)


def check_finite(found: Tensors, who: str) -> None:
    """Raise Refused for tensors with a number that is not finite."""
    for name, value in found.items():
        if not torch.isfinite(value).all():
            raise Refused(f"{who} sends {name} with numbers that are not finite")


class Apart(Sequence):
    """Whose images are whose, where those of at most one client are at hand."""

    def __init__(self, n: int, i: int | None = None, own: Tensor | None = None) -> None:
        self.n, self.i, self.own = n, i, own

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: Any) -> Tensor:
        if i != self.i or self.own is None:
            self.refuse()
        return self.own

    def refuse(self) -> NoReturn:
        raise ValueError("this method reads images of another site: take another one")


def everybody(n: int, i: int, own: Clients) -> People:
    """Return n clients of whom client i is the one in `own`."""
    train, test = (Apart(n, i, part[0]) for part in (own.train, own.test))
    return People(own.feats, own.labels, train, test, own.n_cls, own.patches)


def nobody(n: int, n_cls: int, dim: int, device: str) -> People:
    """Return n clients as the server has them: without images. dim: joint width."""
    feats = torch.zeros(0, dim, device=device)
    labels = torch.zeros(0, dtype=torch.long, device=device)
    return People(feats, labels, Apart(n), Apart(n), n_cls, feats.unsqueeze(1))
