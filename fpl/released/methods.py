"""What the released code does instead of what its paper says: one subclass a quirk.

The released systems are made of them, and each is a row of its own. Repositories: pFedMoAP a481de3
(with PromptFL and FedProx), FedOTP 9948611, FedPGP d43045b. D4 .. D11, D29 and D31 are the numbers
that this project gives to the defects. Not here: where the paper is silent or contradicts itself
our default is the code's (D12: the gate's factor 10, no dropout, the stride; D13: logits of a
client without experts are not multiplied by lam). A run of the released pFedMoAP with partial
participation ends in an error (D3), so what it leaves to a client that joins late (D8b: the experts
of another one) has no results to compare with. Rows that stand for a whole system compute in single
precision; D29 is a row of its own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

import torch
from jaxtyping import Int
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from fpl import gate
from fpl.methods import FedOTP, FedPGP, FedProx, PFedMoAP, PromptFL
from fpl.prompts import PromptTree
from fpl.state import Clients, Tensors


@dataclass(frozen=True)
class InTurn(PromptFL):
    """Clients train one after the other, in the order of the draw (all repositories)."""

    @classmethod
    def turns(cls, picks: Int[Tensor, "rounds m"], n: int) -> list[Int[Tensor, " _picked"]]:
        """Return who trains in each round, in order; picks: `splits.participants` of n clients."""
        return list(picks)

    def cohorts(self, server, drawn):
        idle = [group[~torch.isin(group, drawn)] for group in super().cohorts(server, drawn)]
        return [*drawn.split(1), *idle]


@dataclass(frozen=True)
class EverybodyFirst(InTurn):
    """D31: in round 0 all clients train, by their numbers; the draws begin with round 1.

    That holds where participants are drawn as released, with `form: released` of the partition.
    """

    @classmethod
    def turns(cls, picks, n):
        return [torch.arange(n), *picks[:-1]]


@dataclass(frozen=True)
class OneWord(PFedMoAP):
    """D4: the launch script passes "False" as initial words; the prompt is that one vector."""

    key = "pfedmoap_oneword"
    title = "released: pFedMoAP's one word alone"

    n_ctx: Annotated[int, Field(ge=1, le=1)] = 1

    def init(self, text: PromptTree, gen):
        return {**super().init(text, gen), "ctx": text.words("False")}


@dataclass(frozen=True)
class DetachedTerm(FedProx):
    """D5: the proximal term has no gradient, so it is part of the reported loss only."""

    key = "fedprox_detached"
    title = "released: FedProx's term alone"

    def term(self, p, context):
        return super().term(p, context).detach()


@dataclass(frozen=True)
class FixedExperts(PFedMoAP):
    """D6: no nearest neighbours; for the whole run everybody takes the first K others in one
    permutation of the clients."""

    key = "pfedmoap_fixed"
    title = "released: pFedMoAP's experts alone"

    choice: Literal["knn", "cosine", "random", "same", "fixed", "oracle"] = "fixed"


@dataclass(frozen=True)
class LivePool(InTurn, PFedMoAP):
    """D7: an upload is there for others at once, so experts are partly of the same round and depend
    on the order of clients."""

    key = "pfedmoap_live"
    title = "released: pFedMoAP's pool alone"

    def after_cohort(self, server, client_ids, local):
        uploads = {name: local[name][client_ids] for name in self.shared}
        return super().after_cohort(server, client_ids, local).store(client_ids, uploads)


@dataclass(frozen=True)
class LeakingGate(InTurn, PFedMoAP):
    """D8a: a client's gate is stored from its second participation on; before, it starts from that
    of the client before it.

    What it gets of another's gate counts as received.
    """

    key = "pfedmoap_leak"
    title = "released: pFedMoAP's gate alone"
    gate_kept: Literal["private"] = "private"

    def download(self, server, client_ids, clients: Clients):
        down = super().download(server, client_ids, clients)
        for name in gate.names(self.mixing):
            if name in server.uploads:
                down[name] = server.uploads[name][client_ids]
        return down

    def after_cohort(self, server, client_ids, local):
        if not len(client_ids):
            return server
        seen = server.has_upload
        stored = server.uploads.get("stored", torch.zeros_like(seen))
        stored = stored.index_copy(0, client_ids, seen[client_ids])
        left = {"stored": stored}
        for name in gate.names(self.mixing):
            mine = local[name]
            has_own = stored.view(-1, *[1] * (mine.ndim - 1))
            left[name] = mine.where(has_own, mine[client_ids])
        after = replace(server, uploads={**server.uploads, **left})
        return super().after_cohort(after, client_ids, local)


def single(p: Tensors) -> Tensors:
    """Return tensors of half precision in single precision, and others as they are."""
    return {k: v.float() if v.dtype == torch.half else v for k, v in p.items()}


@dataclass(frozen=True)
class HalfPrecision(PFedMoAP):
    """D29: prompt and gate are held in half precision, and so are gradients, velocities and steps.

    A step that is smaller than half the distance to the next number is lost. Text features and
    logits are computed in single precision here, so this is the part that storage plays; the
    release computes them in half precision, too.
    """

    key = "pfedmoap_half"
    title = "released: pFedMoAP's half precision alone"

    def init(self, text: PromptTree, gen):
        return {name: value.half() for name, value in super().init(text, gen).items()}

    def aggregate(self, server, client_ids, uploads, sizes):
        kept = {name: value.half() for name, value in uploads.items()}
        return super().aggregate(server, client_ids, kept, sizes)

    def neighbours(self, server, client_ids, clients: Clients):
        return super().neighbours(
            replace(server, uploads=single(server.uploads)), client_ids, clients
        )

    def context(self, text: PromptTree, down, client_ids, clients: Clients):
        return super().context(text, single(down), client_ids, clients)

    def encode(self, text: PromptTree, p, context):
        return super().encode(text, single(p), context)

    def logits(self, text: PromptTree, t, p, context, x):
        return super().logits(text, t, single(p), context, x)


@dataclass(frozen=True)
class TwoPrompts(FedPGP):
    """D10: the script trains two prompts; the second adds as many columns as there are classes, of
    which none is ever right."""

    key = "fedpgp_two"
    title = "released: FedPGP's two prompts alone"

    def init(self, text: PromptTree, gen):
        one = super().init(text, gen)
        other = super().init(text, gen)
        return {name: torch.stack([one[name], other[name]]) for name in one}

    def context(self, text: PromptTree, down, client_ids, clients: Clients):
        once = super().context(text, down, client_ids, clients)
        return {name: value.repeat(1, 2, 1) for name, value in once.items()}

    def encode(self, text: PromptTree, p, context):
        return text(self.ctx(p)).flatten(1, 2)  # (n, 2 c, d)

    def pair(self, text: PromptTree, p):
        return super().pair(text, p).flatten(2, 3)


@dataclass(frozen=True)
class PlaceholderAnchor(FedPGP):
    """D11: what stands for CLIP's knowledge is the text "X X .. X {}.", the places of the context,
    not a template for images."""

    key = "fedpgp_placeholder"
    title = "released: FedPGP's anchor alone"

    def context(self, text: PromptTree, down, client_ids, clients: Clients):
        placeholder = replace(self, anchor="X " * self.n_ctx + "{}.")
        return super(PlaceholderAnchor, placeholder).context(text, down, client_ids, clients)


@dataclass(frozen=True)
class ReleasedPromptFL(InTurn, PromptFL):
    """D8c, D9: one SGD for all clients, whose velocity goes from client to client and whose cosine
    goes up and down."""

    key = "promptfl_released"
    title = "released: PromptFL"
    training = {"optimiser": "shared", "schedule": "zigzag"}


@dataclass(frozen=True)
class ReleasedFedProx(ReleasedPromptFL, DetachedTerm):
    """D5, D8c, D9."""

    key = "fedprox_released"
    title = "released: Prompt+FedProx"


@dataclass(frozen=True)
class ReleasedFedOTP(EverybodyFirst, FedOTP):
    """D8c, D31: the velocity goes from client to client; everybody trains in round 0, where the
    partition has `form: released`."""

    key = "fedotp_released"
    title = "released: FedOTP"
    training = {"optimiser": "shared"}


@dataclass(frozen=True)
class ReleasedFedPGP(EverybodyFirst, PlaceholderAnchor, TwoPrompts):
    """D8c, D10, D11, and D31 where the partition has `form: released`."""

    key = "fedpgp_released"
    title = "released: FedPGP"
    training = {"optimiser": "shared"}


@dataclass(frozen=True)
class ReleasedPFedMoAP(FixedExperts, LeakingGate, LivePool):
    """D6, D7, D8, D9: all but the launch script's one word and half precision."""

    key = "pfedmoap_released"
    title = "released: pFedMoAP"
    training = {"optimiser": "shared", "schedule": "zigzag"}


ROWS = (
    *(ReleasedPromptFL, DetachedTerm, ReleasedFedProx, ReleasedFedOTP),
    *(TwoPrompts, PlaceholderAnchor, ReleasedFedPGP),
    *(OneWord, FixedExperts, LivePool, LeakingGate, HalfPrecision, ReleasedPFedMoAP),
)
RELEASED: dict[str, type[PromptFL]] = {row.key: row for row in ROWS}
