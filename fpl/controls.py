"""What every method must be compared with: rows that the literature lacks."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import NonNegativeFloat
from pydantic.dataclasses import dataclass
from torch import Tensor

from fpl.methods import PromptFL, ZeroShot
from fpl.prompts import PromptTree
from fpl.state import Clients, Ids

PENALTIES = [10.0**k for k in range(-3, 4)]  # between which a ridge regression chooses


@dataclass(frozen=True)
class Control(PromptFL):
    """Nothing is learned by gradient and nothing is sent."""

    shared = ()
    transfers = False
    is_control = True

    def init(self, text: PromptTree, gen):
        return {}

    def encode(self, text: PromptTree, p, context):
        return None


@dataclass(frozen=True)
class Majority(Control):
    """The client's most frequent training class, whatever the image (ties: the smallest label)."""

    key = "majority"
    title = "control: the client's majority class"

    def context(self, text: PromptTree, down, client_ids, clients: Clients):
        counts = [clients.counts(i) for i in client_ids.tolist()]
        return {"prior": torch.stack(counts).float()}

    def logits(self, text: PromptTree, t, p, context, x):
        return context["prior"].unsqueeze(1).expand(-1, x.shape[1], -1)


@dataclass(frozen=True)
class ZeroShotOwn(ZeroShot):
    """Zero-shot CLIP that chooses among the client's own training classes only."""

    key = "zeroshot_own"
    title = "control: zero-shot, own classes only"
    transfers = False
    is_control = True

    def context(self, text: PromptTree, down, client_ids, clients: Clients):
        zero_shot = super().context(text, down, client_ids, clients)
        return {**zero_shot, "own": own_classes(clients, client_ids)}

    def logits(self, text: PromptTree, t, p, context, x):
        return restrict(super().logits(text, t, p, context, x), context["own"])


@dataclass(frozen=True)
class RidgeOwn(Control):
    """Ridge regression to one-hot labels on the client's own training features.

    alpha: the penalty on unit features; 0 takes, for each fit, the one of PENALTIES with the least
    squared error when every training image in turn is left out. Nothing is chosen on test data.
    """

    key = "ridge_own"
    title = "control: ridge on own features"
    alpha: NonNegativeFloat = 0.0

    def context(self, text: PromptTree, down, client_ids, clients: Clients):
        fits = [self.fit(*clients.training(i), clients.n_cls) for i in client_ids.tolist()]
        return {"w": torch.stack([w for w, _ in fits]), "b": torch.stack([b for _, b in fits])}

    def fit(
        self, x: Float[Tensor, "b d"], y: Tensor, n_cls: int
    ) -> tuple[Float[Tensor, "d c"], Float[Tensor, " c"]]:
        """argmin |X W + b - Y|^2 + alpha |W|^2, b not penalised."""
        target = F.one_hot(y, n_cls).to(x.dtype)
        mean = x.mean(0)
        level = target.mean(0)
        u, s, vh = torch.linalg.svd(x - mean, full_matrices=False)
        projected = u.T @ (target - level)

        def left_out(alpha: float) -> float:
            shrunk = s**2 / (s**2 + alpha)
            leverage = 1 / len(x) + (u**2 @ shrunk)
            residual = target - level - u @ (shrunk.unsqueeze(1) * projected)
            return (residual / (1 - leverage).unsqueeze(1)).square().sum().item()

        alpha = self.alpha or min(PENALTIES, key=left_out)
        w = vh.T @ ((s / (s**2 + alpha)).unsqueeze(1) * projected)
        return w, level - mean @ w

    def logits(self, text: PromptTree, t, p, context, x):
        return x @ context["w"] + context["b"].unsqueeze(1)


@dataclass(frozen=True)
class RidgeAll(RidgeOwn):
    """One ridge regression on everybody's training features, restricted to the client's classes."""

    key = "ridge_all"
    title = "control: ridge on everybody's features, own classes only"

    def context(self, text: PromptTree, down, client_ids, clients: Clients):
        n = len(client_ids)
        everybody = [clients.training(i) for i in range(len(clients))]
        x = torch.cat([features for features, _ in everybody])
        y = torch.cat([labels for _, labels in everybody])
        w, b = self.fit(x, y, clients.n_cls)
        own = own_classes(clients, client_ids)
        return {"w": w.expand(n, -1, -1), "b": b.expand(n, -1), "own": own}

    def logits(self, text: PromptTree, t, p, context, x):
        return restrict(super().logits(text, t, p, context, x), context["own"])


@dataclass(frozen=True)
class Untrained(PromptFL):
    """The prompt as it was drawn: what training a prompt gives is what is above this row."""

    key = "untrained"
    title = "control: an untrained prompt"
    shared = ()
    training = {"rounds": 1, "local_epochs": 1, "lr": 0.0}
    is_control = True


@dataclass(frozen=True)
class Pooled(PromptFL):
    """One prompt trained on the images of all clients in one place: what a shared one could be.

    One client a round trains: in as many steps as all together, where batches divide their sets.
    """

    key = "pooled"
    title = "control: one prompt on everybody's images"
    training = {"participation": 1e-9}  # one client
    is_control = True

    def clients(self, clients: Clients):
        everybody = torch.cat(list(clients.train))
        return replace(clients, train=[everybody] * len(clients))


def own_classes(clients: Clients, client_ids: Ids) -> Bool[Tensor, "n c"]:
    """Return of which classes each client has training images."""
    return torch.stack([clients.counts(i) > 0 for i in client_ids.tolist()])


def restrict(logits: Float[Tensor, "n b c"], own: Bool[Tensor, "n c"]) -> Float[Tensor, "n b c"]:
    """Return the logits with those of other classes than the client's own at -inf."""
    return logits.masked_fill(~own.unsqueeze(1), -torch.inf)


CONTROLS: dict[str, type[PromptFL]] = {
    control.key: control
    for control in (Majority, ZeroShotOwn, RidgeOwn, RidgeAll, Untrained, Pooled)
}
