"""Four rows that every table needs and the literature lacks: what a client gets without any prompt learning.

They are methods without trainable tensors: a client reads something frozen and classifies with it. And one control of the gate:
what it gives to a client that is alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from fpl.methods import PFedMoAP, PromptFL, ZeroShot


@dataclass(frozen=True)
class Control(PromptFL):
    """Nothing is learned by gradient and nothing is sent."""

    shared = ()

    def init(self, text, gen):
        return {}

    def encode(self, text, p):
        return None


@dataclass(frozen=True)
class Majority(Control):
    """The client's most frequent training class, whatever the image (ties: the smallest label)."""

    transfers = False

    def frozen(self, text, down, who, clients):
        return {"prior": torch.stack([clients.counts(i) for i in who.tolist()]).float()}

    def logits(self, text, t, p, f, x):
        return f["prior"].unsqueeze(1).expand(-1, x.shape[1], -1)


@dataclass(frozen=True)
class ZeroShotOwn(ZeroShot):
    """Zero-shot CLIP that chooses among the client's own training classes only."""

    transfers = False

    def frozen(self, text, down, who, clients):
        return {**super().frozen(text, down, who, clients), "own": own_classes(clients, who)}

    def logits(self, text, t, p, f, x):
        return restrict(super().logits(text, t, p, f, x), f["own"])


@dataclass(frozen=True)
class RidgeOwn(Control):
    """Ridge regression to one-hot labels on the client's own training features.

    `alpha` is the penalty on unit features; 0 takes, for each fit, the power of ten between 0.001 and 1000 with the least squared
    error when every training image in turn is left out. Nothing is chosen on test data.
    """

    alpha: float = 0.0
    transfers = False

    def frozen(self, text, down, who, clients):
        fits = [self.fit(*clients.training(i), clients.n_cls) for i in who.tolist()]
        return {"w": torch.stack([w for w, _ in fits]), "b": torch.stack([b for _, b in fits])}

    def fit(self, x: Float[Tensor, "b d"], y: Tensor, n_cls: int) -> tuple[Float[Tensor, "d c"], Float[Tensor, " c"]]:
        """argmin |X W + b - Y|^2 + alpha |W|^2, b not penalised."""
        target = F.one_hot(y, n_cls).to(x.dtype)
        mean, level = x.mean(0), target.mean(0)
        u, s, vh = torch.linalg.svd(x - mean, full_matrices=False)
        projected = u.T @ (target - level)

        def left_out(alpha: float) -> float:
            shrunk = s**2 / (s**2 + alpha)
            leverage = 1 / len(x) + (u**2 @ shrunk)
            residual = target - level - u @ (shrunk.unsqueeze(1) * projected)
            return (residual / (1 - leverage).unsqueeze(1)).square().sum().item()

        alpha = self.alpha or min((10.0**k for k in range(-3, 4)), key=left_out)
        w = vh.T @ ((s / (s**2 + alpha)).unsqueeze(1) * projected)
        return w, level - mean @ w

    def logits(self, text, t, p, f, x):
        return x @ f["w"] + f["b"].unsqueeze(1)


@dataclass(frozen=True)
class RidgeAll(RidgeOwn):
    """One ridge regression on the training features of all clients, restricted to the client's own classes."""

    def frozen(self, text, down, who, clients):
        x, y = (torch.cat(parts) for parts in zip(*map(clients.training, range(len(clients))), strict=True))
        w, b = self.fit(x, y, clients.n_cls)
        return {"w": w.expand(len(who), -1, -1), "b": b.expand(len(who), -1), "own": own_classes(clients, who)}

    def logits(self, text, t, p, f, x):
        return restrict(super().logits(text, t, p, f, x), f["own"])


TEMPLATES = (
    "a photo of a {}.",
    "a drawing of a {}.",
    "a painting of a {}.",
    "a sketch of a {}.",
    "a small picture of one {}.",
    "a close view of a {}.",
    "there is a {} in this image.",
    "an icon of a {}.",
    "this is what a {} looks like.",
)


@dataclass(frozen=True)
class GateAlone(PFedMoAP):
    """CoOp with pFedMoAP's gate: nothing is sent, and the experts are hand-written templates instead of others' prompts.

    What it gains over CoOp is the gate's doing, not the federation's. The `n_experts` first of TEMPLATES; the local prompt goes
    on from round to round.
    """

    n_experts: int = 4
    shared = ()

    def check_experts(self, clients):
        if not 1 <= self.n_experts <= len(TEMPLATES):
            raise ValueError(f"n_experts {self.n_experts} must be between 1 and {len(TEMPLATES)}: experts are templates here")

    def cohorts(self, server, drawn):
        return PromptFL.cohorts(self, server, drawn)

    def download(self, server, who, clients):
        return {}

    def frozen(self, text, down, who, clients):
        experts = torch.stack([self.pool(text.zero_shot(template)) for template in TEMPLATES[: self.n_experts]])
        return {"experts": experts.expand(len(who), -1, -1, -1)}

    def deploy(self, server, own, tune):
        return own


def own_classes(clients, who) -> Bool[Tensor, "n c"]:
    return torch.stack([clients.counts(i) > 0 for i in who.tolist()])


def restrict(logits: Float[Tensor, "n b c"], own: Bool[Tensor, "n c"]) -> Float[Tensor, "n b c"]:
    return logits.masked_fill(~own.unsqueeze(1), -torch.inf)


CONTROLS: dict[str, type[PromptFL]] = {
    "majority": Majority,
    "zeroshot_own": ZeroShotOwn,
    "ridge_own": RidgeOwn,
    "ridge_all": RidgeAll,
}
