"""Methods whose steps draw something at random: dropout, or noise that hides an image.

N1, N2, ... are defects of a method's released code, named where ours does something else.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field, NonNegativeFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.optim import SGD

from fpl.methods import Images, Labels, PromptFL
from fpl.more_methods.prompts import check_heads
from fpl.prompts import PromptTree
from fpl.state import Clients, Draw, PerClient, Tensors, generator

Each = Float[Tensor, "n b *p"]  # a tensor for each image of a batch


def of_each_image(
    method: PromptFL, text: PromptTree, p: Tensors, context: Tensors, x: Images, y: Labels
) -> tuple[Float[Tensor, "n b"], Tensors]:
    """Return the loss of every image by itself and its gradients (n, b, *), by name.

    Every image is a client of its own for this: the client axis keeps gradients apart. context:
    what is read, with an axis of all images in place of that of clients.
    """
    b = y.shape[1]
    alone = {name: value.repeat_interleave(b, 0) for name, value in p.items()}
    one = x.flatten(0, 1).unsqueeze(1), y.flatten().unsqueeze(1)
    losses = method.loss(text, alone, context, *one)
    found = torch.autograd.grad(losses.sum(), [*alone.values()], allow_unused=True)
    pairs = zip(p, found, strict=True)
    apart = {name: slope.unflatten(0, (-1, b)) for name, slope in pairs if slope is not None}
    return losses.unflatten(0, (-1, b)), apart


def clipped(each: Each, bound: float) -> Each:
    """Return each image's tensor, scaled to l2 norm `bound` where it is longer."""
    size = each.flatten(2).norm(dim=2).clamp(min=bound)
    return each * (bound / size).view(*size.shape, *[1] * (each.ndim - 2))


@dataclass(frozen=True)
class Noisy(PromptFL):
    """PromptFL whose gradients may be clipped to l2 norm `bound` and get noise in units of it."""

    bound: NonNegativeFloat = 0.0
    noise: NonNegativeFloat = 0.0

    def check(self, text: PromptTree, clients: Clients):
        if self.noise and not self.bound:
            raise ValueError(f"noise {self.noise} is in units of bound, which is 0: set bound too")

    def hidden(self, name: str, each: Each, b: int, draw: Draw, among: int = 1) -> Tensor:
        """Return the mean of what b images say, each clipped, and N(0, (noise bound / b)^2).

        among: of how many clients the mean is taken, which share out that noise.
        """
        if not self.bound:
            return each.mean(1)
        std = self.noise * self.bound / b / math.sqrt(among)
        return clipped(each, self.bound).mean(1) + std * draw(name, *each.shape[2:])


@dataclass(frozen=True)
class FedSEPT(Noisy):
    """Shared experts of low rank, mixed for each image by a router that stays at the client.

    Expert k's prompt is A_k B_0 + R: A (k, m, rank) is shared, R (m, w) private, B_0 (rank, w) a
    constant. logits = sum_k pi_k(x) s <x, t_k>; the loss adds lam times the mean of cos(A_k, A_j)^2
    over k != j. pi = softmax of a linear head on LayerNorm(W_o W_v x), where steps drop each of
    `heads` parts of W_v x with probability `dropout`. The release's attention has one token to
    attend to, so its query and keys, half the router, never learn (N2): we leave them out.

    Values are those of the release; its lambda_gate does nothing (N1). Steps are SGD's, decay is
    not for the router, and each client has its own momentum (the release's is one for all: N4).
    bound > 0 takes for A the sum of the gradients of single images, each scaled to that l2 norm at
    most, plus N(0, (noise bound)^2), over b. It comes with no epsilon: what R and the router learn
    from all images reaches later gradients of A (N3).
    B_0 is in `init`, not sent and without a gradient: every client draws the same from the run's
    seed, and a new one too. Uploads and downloads k m rank; keeps m w, and of the router
    2 (d^2 + d) + (k + 2) d + k.
    """

    key = "fedsept"
    title = "FedSEPT"
    source = "yuCoryx/FedSEPT, ACM MM 2026"
    shared = ("a",)
    idle: ClassVar[tuple[str, ...]] = ("b0",)
    experts: PositiveInt = 4
    rank: PositiveInt = 16
    heads: PositiveInt = 4
    lam: NonNegativeFloat = 10.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1

    def check(self, text: PromptTree, clients: Clients):
        super().check(text, clients)
        check_heads(self.heads, text.dim)

    def init(self, text: PromptTree, gen):
        a = 0.02 * torch.randn(self.experts, self.n_ctx, self.rank, generator=gen)
        b0 = 0.02 * torch.randn(self.rank, text.width, generator=gen)
        prompt = {"a": a, "b0": b0, "r": torch.zeros(self.n_ctx, text.width)}
        return prompt | router_init(text.dim, self.experts, gen)

    def ctx(self, p):
        return p["a"] @ p["b0"].detach().unsqueeze(1) + p["r"].unsqueeze(1)

    def logits(self, text: PromptTree, t, p, context, x):
        share = route(p, x, context.get("kept")).softmax(-1)
        each = text.scale * torch.einsum("nbd,nkcd->nbkc", x, t)
        return (share.unsqueeze(-1) * each).sum(2)

    def loss(self, text: PromptTree, p, context, x, y):
        return super().loss(text, p, context, x, y) + self.lam * alike(p["a"])

    def gradients(self, text: PromptTree, p, context, x, y, draw):
        b = y.shape[1]
        kept = dropped(self.dropout, draw("dropout", b, self.heads))
        if not self.bound:
            return super().gradients(text, p, {"kept": kept}, x, y, draw)
        each_kept = {"kept": kept.flatten(0, 1).unsqueeze(1)}
        losses, each = of_each_image(self, text, p, each_kept, x, y)
        found = {name: value.mean(1) for name, value in each.items()}
        return losses.mean(1), found | {"a": self.hidden("noise", each["a"], b, draw)}

    def optimiser(self, groups, momentum, decay):
        for group in groups:
            group["weight_decay"] = decay if group["name"] in ("a", "r") else 0.0
        return SGD(groups, 0.0, momentum)


def dropped(share: float, drawn: Float[Tensor, "n b h"]) -> Float[Tensor, "n b h"]:
    """Return factors that drop a share of what normal numbers stand for and keep its mean."""
    uniform = torch.special.ndtr(drawn)
    return (uniform >= share) / (1 - share)


def router_init(d: int, k: int, gen: torch.Generator) -> Tensors:
    """Return a router as the release draws it: of an attention layer, a norm and a linear head."""
    value, out = (2 * torch.rand(2, d, d, generator=gen) - 1) / math.sqrt(d)
    weights = {"v_w": math.sqrt(1.5) * value, "out_w": out, "ln_w": torch.ones(d)}
    weights["head_w"] = 0.01 * torch.randn(k, d, generator=gen)
    return weights | {f"{name[:-2]}_b": torch.zeros(len(w)) for name, w in weights.items()}


def route(
    p: Tensors, x: Float[Tensor, "n b d"], kept: Float[Tensor, "n b h"] | None = None
) -> Float[Tensor, "n b k"]:
    """Return the logits of the experts; kept: factors for h parts of what stands for the image."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ p[f"{name}_w"].mT + p[f"{name}_b"].unsqueeze(1)

    value = linear("v", x)
    if kept is not None:
        parts = value.unflatten(-1, (kept.shape[-1], -1))
        value = (parts * kept.unsqueeze(-1)).flatten(2)
    normed = F.layer_norm(linear("out", value), x.shape[-1:])
    return linear("head", normed * p["ln_w"].unsqueeze(1) + p["ln_b"].unsqueeze(1))


def alike(a: Float[Tensor, "n k m r"]) -> PerClient:
    """Return the mean squared cosine between two experts; of one alone it is 0."""
    k = a.shape[1]
    unit = F.normalize(a.flatten(2), dim=-1)
    others = 1 - torch.eye(k, device=a.device)
    cosine = unit @ unit.mT
    total = (others * cosine.square()).sum((1, 2))
    return total / max(k * (k - 1), 1)


# By form of DP-FPL: what a client keeps, and what its step releases beside P_g's gradient.
KEPT = {"promptfl": (), "fedotp": ("local",), "fedpgp": ("u", "v")}
KEPT |= {"dplora": ("local",), "dpfpl": ("local",)}
NOISED = KEPT | {"dplora": ("u", "v"), "dpfpl": ("u", "v")}


@dataclass(frozen=True)
class WithLowRank(Noisy):
    """A shared prompt P_g with a private part, in DP-FPL's five forms, by factorization.

    promptfl: P_g alone; fedotp: P_g + P_l; fedpgp: P_g + U V, both learnt; dpfpl: P_g + P_l with
    P_l = U V + E; dplora: P_g + U V without E. In the last two U = GS(P_l Q), V = GS(P_l^T U)^T
    with Q (w, rank), in evaluation one that is always the same (N7); GS is Gram and Schmidt's.
    """

    rank: PositiveInt = 8
    factorization: Literal["promptfl", "fedotp", "fedpgp", "dplora", "dpfpl"] = "dpfpl"

    def check(self, text: PromptTree, clients: Clients):
        super().check(text, clients)
        if self.rank > self.n_ctx:
            wrong = f"rank {self.rank} is above n_ctx {self.n_ctx}"
            raise ValueError(f"{wrong}: a prompt of that length has no larger rank")

    def init(self, text: PromptTree, gen):
        m, w = self.n_ctx, text.width
        shapes = {"ctx": (m, w), "local": (m, w), "u": (m, self.rank), "v": (self.rank, w)}
        learnt = ("ctx", *KEPT[self.factorization])
        return {name: 0.02 * torch.randn(shapes[name], generator=gen) for name in learnt}

    def ctx(self, p):
        q = torch.randn(p["ctx"].shape[-1], self.rank, generator=generator(0, "factors"))
        return self.prompt(p, self.factors(p, q.to(p["ctx"])))

    def factors(self, p: Tensors, q: Float[Tensor, "*n w r"]) -> Tensors:
        """Return U and V: made of P_l, or those that are learnt; none for others."""
        if self.factorization not in ("dplora", "dpfpl"):
            return {name: p[name] for name in p if name in ("u", "v")}
        u = gram_schmidt(p["local"] @ q)
        return {"u": u, "v": gram_schmidt(p["local"].mT @ u).mT}

    def prompt(self, p: Tensors, low: Tensors) -> Float[Tensor, "n m w"]:
        """Return the prompt; U V + E is P_l, whatever Q is."""
        if self.factorization in ("fedpgp", "dplora"):
            return p["ctx"] + low["u"] @ low["v"]
        return p["ctx"] + p.get("local", 0)


@dataclass(frozen=True)
class DPFPL(WithLowRank):
    """DP-FPL: a shared prompt and a private one whose gradient is taken through a noisy sketch.

    In every step U and V are made anew with another Q. Of the prompt the gradients dP_g, dU and dV
    are clipped and get noise; P_l's is dU' V + U dV' + sign U U^T dU' V, dU' = dU / 10, dV' = dV /
    10. All clients step with the mean of dP_g. sign 1 and the 10 are the release's; -1 is the
    projection (N4).

    bound > 0: clip_by "image" scales the gradients of single images, each tensor's by itself, to
    that l2 norm at most; "batch", as released, those of the whole batch, which hides no image (N5).
    Each tensor gets N(0, (noise bound / b)^2); for P_g of n clients that is shared out, 1 / n of
    it each, so that the mean has what hides an image in it, and the server sees less: trust it, or
    sum securely. Epsilon: fpl.audit.image_privacy; the release's counts rounds for steps (N6).
    Training sets are cut to the smallest of those that train. Steps count: the release keeps the
    last of each round (N1), with the private gradient of its last client for all (N2) and one
    momentum (N3).
    Uploads and downloads m w in every step, keeps m w.
    """

    key = "dpfpl"
    title = "DP-FPL"
    source = "Tran et al., ICLR 2025 (arXiv 2501.13904)"
    in_step = True
    sign: Annotated[int, Field(ge=-1, le=1)] = 1
    clip_by: Literal["image", "batch"] = "image"

    def clients(self, clients: Clients):
        who = torch.cat([*clients.turns]).tolist() if clients.turns else range(len(clients))
        least = min(len(clients.train[i]) for i in who)
        spread = [len(index) * torch.arange(least) // least for index in clients.train]
        pairs = zip(clients.train, spread, strict=True)
        return replace(clients, train=[index[at.to(index.device)] for index, at in pairs])

    @property
    def noised(self) -> tuple[str, ...]:
        """Of what a step releases gradients."""
        return "ctx", *NOISED[self.factorization]

    def gradients(self, text: PromptTree, p, context, x, y, draw):
        own = {name: value.detach() for name, value in p.items()}
        low = self.factors(own, draw("factors", own["ctx"].shape[-1], self.rank))
        loss, found = self.released(text, own, low, (x, y), draw)
        mean = found.pop("ctx").mean(0, keepdim=True).expand_as(p["ctx"])
        if low and "local" in p:
            found = {"local": rebuilt(low, found, self.sign)}
        return loss, {"ctx": mean, **found}

    def released(
        self, text: PromptTree, p: Tensors, low: Tensors, batch: tuple[Images, Labels], draw: Draw
    ) -> tuple[PerClient, Tensors]:
        """Return the loss, and each client's gradients as clipping and noise leave them, by name.

        Of P_g, and of U and V where there are any, else of P_l.
        """
        n, b = batch[1].shape
        alone = self.bound > 0 and self.clip_by == "image"
        loss, slope = slopes(text, self.prompt(p, low), batch, alone)
        each = of_parts(slope, low)
        among = {"ctx": n}
        return loss, {k: self.hidden(k, each[k], b, draw, among.get(k, 1)) for k in self.noised}


def of_parts(slope: Each, low: Tensors) -> Tensors:
    """Return the gradients for P_g and P_l, and those for U and V where there are any."""
    found = {"ctx": slope, "local": slope}
    if low:
        found["u"] = slope @ low["v"].mT.unsqueeze(1)
        found["v"] = low["u"].mT.unsqueeze(1) @ slope
    return found


def slopes(
    text: PromptTree, prompt: Float[Tensor, "n m w"], batch: tuple[Images, Labels], alone: bool
) -> tuple[PerClient, Float[Tensor, "n parts m w"]]:
    """Return cross-entropy and its gradients for the prompt, of each image or of all as one."""
    plain = PromptFL(prompt.shape[1])
    leaf = {"ctx": prompt.requires_grad_()}
    if alone:
        losses, each = of_each_image(plain, text, leaf, {}, *batch)
        return losses.mean(1), each["ctx"]
    loss = plain.loss(text, leaf, {}, *batch)
    (slope,) = torch.autograd.grad(loss.sum(), [prompt])
    return loss, slope.unsqueeze(1)


def gram_schmidt(x: Float[Tensor, "n m r"]) -> Float[Tensor, "n m r"]:
    """Return orthonormal columns: each is scaled to length 1, then taken out of those behind it."""
    columns = [*x.unbind(-1)]
    for j, column in enumerate(columns):
        unit = F.normalize(column, dim=-1)
        columns[j] = unit
        for i in range(j + 1, len(columns)):
            along = (unit * columns[i]).sum(-1, keepdim=True)
            columns[i] = columns[i] - along * unit
    return torch.stack(columns, dim=-1)


def rebuilt(low: Tensors, found: Tensors, sign: int) -> Float[Tensor, "n m w"]:
    """Return P_l's gradient from those of U and V: the third term is inside both subspaces."""
    inner = found["u"] / 10 @ low["v"]
    both = low["u"] @ (low["u"].mT @ inner)
    return inner + low["u"] @ found["v"] / 10 + sign * both


ROWS: tuple[type[PromptFL], ...] = (FedSEPT, DPFPL)
