"""A round in each of the six ways, cut into parts that can be timed, and the clients of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fpl.bench.ways import WAYS
from fpl.experiments.cache import device
from fpl.methods import PFedMoAP
from fpl.prompts import Clip, PromptTree
from fpl.rounds import Setup, Training, evaluate, train_locally
from fpl.state import Clients, Server, Tensors, generator, take


@dataclass(frozen=True)
class Case:
    """What is measured: clients with one batch each, which they see `steps` times in a round.

    method: settings of pFedMoAP.
    """

    model: str
    classes: int
    batch: int = 16
    clients: int = 10
    steps: int = 25
    method: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pixels(Clients):
    """Clients that have the images themselves, too."""

    pixels: Float[Tensor, "images 3 s s"] | None = None


@dataclass(frozen=True)
class World:
    """What all ways work on: clients that have uploaded, each with its own prompt and gate."""

    case: Case
    clients: Pixels
    local: Tensors
    server: Server


def draw_clients(n: int, batch: int, dim: int, n_cls: int) -> Clients:
    """Draw clients, each with one batch of unit features to train on and to be tested on."""
    gen = torch.Generator().manual_seed(1)
    images = n * batch
    feats = torch.randn(images, dim, generator=gen)
    feats = F.normalize(feats, dim=-1).to(device())
    labels = torch.randint(n_cls, (images,), generator=gen).to(device())
    own = torch.arange(images, device=device()).split(batch)
    return Clients(feats, labels, own, own, n_cls)


def make_world(clip: Clip, case: Case) -> World:
    """Draw what a case needs.

    Images are random pixels, the same for all clients, with labels of their own, and their features
    are the image tower's: what they show does not change what a step costs.
    """
    gen = torch.Generator().manual_seed(1)
    model: Any = clip.model
    like = model.logit_scale
    n = case.clients
    size = model.visual.image_size
    square = size if isinstance(size, tuple) else (size, size)
    pixels = torch.randn(case.batch, 3, *square, generator=gen).to(like)
    with torch.no_grad():
        feats = model.encode_image(pixels, normalize=True)
    drawn = draw_clients(n, case.batch, 1, case.classes)
    clients = Pixels(
        feats=feats.repeat(n, 1),
        labels=drawn.labels,
        train=[own.repeat(case.steps) for own in drawn.test],
        test=drawn.test,
        n_cls=case.classes,
        pixels=pixels.repeat(n, 1, 1, 1),
    )
    method = PFedMoAP(**case.method)
    text = PromptTree(clip, ["one"], method.n_ctx)
    inits = [method.init(text, gen) for _ in range(n)]
    local = {}
    for name in inits[0]:
        everybody = [init[name] for init in inits]
        local[name] = torch.stack(everybody).to(like)
    everybody = torch.ones(n, dtype=torch.bool, device=like.device)
    server = Server(
        params={"ctx": local["ctx"].mean(0)},
        uploads={"ctx": local["ctx"]},
        has_upload=everybody,
        returned=everybody,
        draw=partial(generator, 1),
    )
    return World(case, clients, local, server)


class Parts:
    """The parts of a round in one way: a step, an encoding and an evaluation of some clients.

    groups: the numbers of the clients that are treated at once. ids: the first group, whose calls
    are timed; size: how many these are.
    """

    def __init__(self, way: str, clip: Clip, world: World, names: Sequence[str]):
        case = world.case
        kind, encoder = WAYS[way]
        self.way = way
        self.world = world
        self.method = kind(**case.method)
        self.text = encoder(clip, names, self.method.n_ctx)
        training = Training(rounds=2, local_epochs=1, batch_size=case.batch)
        self.setup = Setup(self.method, self.text, world.clients, training)
        self.groups: list[Tensor] = []
        everybody = torch.arange(case.clients)
        for cohort in filter(len, self.method.cohorts(world.server, everybody)):
            self.groups += cohort.split(self.text.at_once)
        self.ids = self.groups[0]
        self.size = len(self.ids)
        self.local = take(world.local, self.ids)
        gen = torch.Generator().manual_seed(2)
        shape = (self.size, self.method.n_experts, len(names), self.method.d_gate)
        experts = 0.05 * torch.randn(*shape, generator=gen)
        self.context = {"experts": experts.to(self.local["ctx"])}
        self.calls = {"step": self.step, "encode": self.encode, "evaluate": self.evaluate}

    def step(self) -> None:
        """Make a local step of the clients."""
        test = self.world.clients.test
        order = {i: test[i].unsqueeze(0) for i in self.ids.tolist()}
        train_locally(self.setup, self.local, self.context, order)

    @torch.no_grad()
    def encode(self) -> None:
        """Encode a prompt of each of the clients, without gradients."""
        self.text(self.local["ctx"])

    def evaluate(self) -> None:
        """Evaluate the clients on one batch each."""
        clients = self.world.clients
        evaluate(self.method, self.text, self.local, self.context, clients, self.ids)

    def in_round(self, experts: int) -> dict[str, float]:
        """Return how often a round makes each of the calls, given how many experts it encodes."""
        case = self.world.case
        times = case.clients / self.size
        return {"step": case.steps * times, "encode": experts / self.size, "evaluate": times}
