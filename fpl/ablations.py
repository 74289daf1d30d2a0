"""Rows that take pFedMoAP apart: what its gate gives alone, and what experts give by being others'.

None is a method of a paper. Shapes and symbols are those of fpl.methods.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from fpl.methods import CoOp, PFedMoAP, PromptFL
from fpl.prompts import PromptTree
from fpl.state import Clients

TEMPLATES = (
    *("a photo of a {}.", "a drawing of a {}.", "a painting of a {}.", "a sketch of a {}."),
    *("a small picture of one {}.", "a close view of a {}.", "there is a {} in this image."),
    *("an icon of a {}.", "this is what a {} looks like."),
)


@dataclass(frozen=True)
class GateAlone(PFedMoAP):
    """CoOp with pFedMoAP's gate: nothing is sent, and hand-written templates are the experts.

    What it gains over CoOp is the gate's doing, not the federation's. The `n_experts` first of
    TEMPLATES; the local prompt goes on from round to round.
    """

    key = "gate_alone"
    title = "pFedMoAP's gate alone, on templates"
    shared = ()
    n_experts: PositiveInt = 4

    def check_experts(self, clients: Clients):
        if self.n_experts > len(TEMPLATES):
            wrong = f"n_experts {self.n_experts} must be between 1 and {len(TEMPLATES)}"
            raise ValueError(f"{wrong}: experts are templates here")

    def cohorts(self, server, drawn):
        return PromptFL.cohorts(self, server, drawn)

    def download(self, server, client_ids, clients: Clients):
        return {}

    def context(self, text: PromptTree, down, client_ids, clients: Clients):
        chosen = TEMPLATES[: self.n_experts]
        experts = torch.stack([self.pool(text.zero_shot(template)) for template in chosen])
        return {"experts": experts.expand(len(client_ids), -1, -1, -1)}

    def evaluated(self, server, local, tune):
        return local


IDLE = ("wq", "bq", "wk", "bk", "bv", "bo")  # of one expert nothing is chosen


@dataclass(frozen=True)
class OwnGate(PFedMoAP):
    """pFedMoAP without experts, but with its gate: capacity without collaboration.

    The gate attends to the one local text feature: A = 1, and two linear maps are learnt on it. A
    client that never trains is classified through the gate as it was drawn.
    """

    key = "own_gate"
    title = "pFedMoAP's gate without experts"
    idle: ClassVar[tuple[str, ...]] = tuple(f"gate_{part}" for part in IDLE)
    n_experts: NonNegativeInt = 0  # more are neither sent nor read

    def download(self, server, client_ids, clients: Clients):
        return PromptFL.download(self, server, client_ids, clients)

    def context(self, text: PromptTree, down, client_ids, clients: Clients):
        return {"experts": clients.feats.new_zeros(len(client_ids), 0, text.n_cls, self.d_gate)}


@dataclass(frozen=True)
class CoOpAdapter(CoOp):
    """CoOp with a linear adapter of the image feature: as many numbers as pFedMoAP's gate, no gate.

    logits = s <x', t>, x' = x + (x A) B scaled to unit length, A (d, r), B (r, d). r is such that
    A and B have the 4 (g^2 + g) numbers of a gate of width g, up to d. They learn at the gate's
    rate.
    """

    key = "coop_adapter"
    title = "CoOp with a linear adapter"
    d_gate: PositiveInt = 128

    def init(self, text: PromptTree, gen):
        rank = max(1, round(2 * (self.d_gate**2 + self.d_gate) / text.dim))
        prompt = super().init(text, gen)
        inner = torch.randn(text.dim, rank, generator=gen) / math.sqrt(text.dim)
        return {**prompt, "a": inner, "b": 0.02 * torch.randn(rank, text.dim, generator=gen)}

    def rate_group(self, name):
        return "prompt" if name == "ctx" else "gate"

    def logits(self, text: PromptTree, t, p, context, x):
        adapted = F.normalize(x + x @ p["a"] @ p["b"], dim=-1)
        return super().logits(text, t, p, context, adapted)


@dataclass(frozen=True)
class NoiseExperts(PFedMoAP):
    """pFedMoAP with random prompts for experts: what it gains from having more texts to mix.

    They are drawn like an untrained prompt, anew for every client and round.
    """

    key = "noise_experts"
    title = "pFedMoAP, random prompts for experts"

    def download(self, server, client_ids, clients: Clients):
        down = super().download(server, client_ids, clients)
        if "experts" not in down:
            return down
        shape = (len(clients), *down["experts"].shape[1:])
        drawn = torch.randn(shape, generator=server.draw("noise experts", server.round))
        return {**down, "experts": 0.02 * drawn.to(client_ids.device)[client_ids]}


ABLATIONS: dict[str, type[PromptFL]] = {
    row.key: row for row in (GateAlone, OwnGate, CoOpAdapter, NoiseExperts)
}
