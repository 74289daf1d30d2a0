"""What the released code does instead of what its paper says: one subclass a quirk, and the released systems made of them.

Each is a row of its own. Repositories: pFedMoAP a481de3 (with PromptFL and FedProx), FedOTP 9948611, FedPGP d43045b. D4 .. D11
are the numbers that this project gives to the defects. Not here: where the paper is silent or contradicts itself our default is
the code's (D12: the gate's factor 10, no dropout, the stride; D13: logits of a client without experts are not multiplied by lam).
A run of the released pFedMoAP with partial participation ends in an error (D3), so what it leaves to a client that joins late
(D8b: the experts of another one) has no results to compare with.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fpl import gate
from fpl.methods import FedOTP, FedPGP, FedProx, PFedMoAP, PromptFL


@dataclass(frozen=True)
class InTurn(PromptFL):
    """Clients train one after the other, in the order in which they were drawn (all repositories)."""

    def cohorts(self, server, drawn):
        return [*drawn.split(1), *(group[~torch.isin(group, drawn)] for group in super().cohorts(server, drawn))]


@dataclass(frozen=True)
class OneWord(PFedMoAP):
    """D4: the launch script passes the text "False" as initial words, so the prompt is the one vector of that word."""

    n_ctx: int = 1

    def check(self, text, clients):
        super().check(text, clients)
        if self.n_ctx != 1:
            raise ValueError(f"n_ctx {self.n_ctx} must be 1 here: the prompt is the vector of one word")

    def init(self, text, gen):
        return {**super().init(text, gen), "ctx": text.words("False")}


@dataclass(frozen=True)
class DetachedTerm(FedProx):
    """D5: the proximal term is computed without a gradient, so it is part of the reported loss only; training is PromptFL's."""

    def term(self, p, f):
        return super().term(p, f).detach()


@dataclass(frozen=True)
class FixedExperts(PFedMoAP):
    """D6: no nearest neighbours; everybody takes the first K others in one permutation of the clients, for the whole run."""

    choice: str = "fixed"


@dataclass(frozen=True)
class LivePool(InTurn, PFedMoAP):
    """D7: an upload is in the pool at once, so experts are partly of the same round and depend on the order of clients."""

    def between(self, server, who, own):
        return super().between(server, who, own).store(who, {k: own[k][who] for k in self.shared})


@dataclass(frozen=True)
class LeakingGate(InTurn, PFedMoAP):
    """D8a: a client's gate is stored from its second participation on; before, it starts from that of the client before it.

    What it gets of another's gate counts as received.
    """

    def download(self, server, who, clients):
        leaked = {k: server.pool[k][who] for k in gate.NAMES[self.mixing] if k in server.pool}
        return {**super().download(server, who, clients), **leaked}

    def between(self, server, who, own):
        if not len(who):
            return server
        stored = server.pool.get("stored", torch.zeros_like(server.seen)).index_copy(0, who, server.seen[who])
        begin = {k: own[k].where(stored.view(-1, *[1] * (own[k].ndim - 1)), own[k][who]) for k in gate.NAMES[self.mixing]}
        return super().between(replace(server, pool={**server.pool, "stored": stored, **begin}), who, own)


@dataclass(frozen=True)
class TwoPrompts(FedPGP):
    """D10: the script trains two prompts; the second adds as many columns as there are classes, of which none is ever right."""

    def init(self, text, gen):
        one, other = super().init(text, gen), super().init(text, gen)
        return {k: torch.stack([one[k], other[k]]) for k in one}

    def frozen(self, text, down, who, clients):
        return {k: v.repeat(1, 2, 1) for k, v in super().frozen(text, down, who, clients).items()}

    def encode(self, text, p):
        return super().encode(text, p).flatten(1, 2)  # (n, 2 c, d)

    def pair(self, text, p):
        return super().pair(text, p).flatten(2, 3)


@dataclass(frozen=True)
class PlaceholderAnchor(FedPGP):
    """D11: what stands for CLIP's knowledge is the text "X X .. X {}.", the places of the context, not a template for images."""

    def template(self):
        return "X " * self.n_ctx + "{}."


@dataclass(frozen=True)
class ReleasedPromptFL(InTurn, PromptFL):
    """D8c, D9: one SGD for all clients, whose velocity goes from client to client and whose cosine goes up and down."""

    run = {"optimiser": "shared", "schedule": "zigzag"}


@dataclass(frozen=True)
class ReleasedFedProx(ReleasedPromptFL, DetachedTerm):
    """D5, D8c, D9."""


@dataclass(frozen=True)
class ReleasedFedOTP(InTurn, FedOTP):
    """D8c: the velocity goes from client to client."""

    run = {"optimiser": "shared"}


@dataclass(frozen=True)
class ReleasedFedPGP(InTurn, PlaceholderAnchor, TwoPrompts):
    """D8c, D10, D11."""

    run = {"optimiser": "shared"}


@dataclass(frozen=True)
class ReleasedPFedMoAP(FixedExperts, LeakingGate, LivePool):
    """D6, D7, D8, D9: all but the launch script's one word."""

    run = {"optimiser": "shared", "schedule": "zigzag"}


RELEASED: dict[str, type[PromptFL]] = {
    "promptfl_released": ReleasedPromptFL,
    "fedprox_detached": DetachedTerm,
    "fedprox_released": ReleasedFedProx,
    "fedotp_released": ReleasedFedOTP,
    "fedpgp_two": TwoPrompts,
    "fedpgp_placeholder": PlaceholderAnchor,
    "fedpgp_released": ReleasedFedPGP,
    "pfedmoap_oneword": OneWord,
    "pfedmoap_fixed": FixedExperts,
    "pfedmoap_live": LivePool,
    "pfedmoap_leak": LeakingGate,
    "pfedmoap_released": ReleasedPFedMoAP,
}
