"""Methods that learn on image features, without a gradient through the text tower.

N1, N2, ... are defects of a method's released code, named where ours does something else.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import NonNegativeFloat, PositiveFloat
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.optim import Adam

from fpl.methods import PFedPrompt, PromptFL, ZeroShot, cross_entropy
from fpl.prompts import PromptTree
from fpl.state import Clients


@dataclass(frozen=True)
class AFL(PromptFL):
    """Analytic federated learning: one ridge regression to one-hot labels on everybody's features.

    A client sends C = X^T X + gamma I and M = X^T Y once, X (b, d) its features, Y (b, c) one-hot.
    logits = s x W, W = (sum C)^-1 sum M: what one fit of all images with N gamma gives, N clients
    taking part, however images are dealt. The loss -<C, gram> - <M, moment> is linear: a step of
    rate 1 on all images at once adds C to gram and M to moment.

    gamma 0 is what the release's removal of gamma comes to. Where all images together have a rank
    below d, as few shots do, it then inverts a singular matrix (N2, N3); we take the W of least
    norm. The release's gamma 1 is for features of length ten and more. Of length 1 those of CLIP
    ViT-B/32 want N gamma near 0.1 (six data sets, 1 to 16 shots and all images), which ours is for
    ten clients; 10 loses several points, and tens of them where classes differ in size.
    What is sent hides nothing: of a client's only image, C is the feature.
    Uploads d (d + 1) / 2 + d c numbers, C being symmetric, in the one round; downloads W, d c.
    """

    key = "afl"
    title = "AFL"
    source = "He et al., CVPR 2025"
    shared = ("gram", "moment")
    transfers = False
    training: ClassVar[dict[str, Any]] = {
        **{"rounds": 1, "local_epochs": 1, "batch_size": 10**6, "schedule": "constant"},
        **{"lr": 1.0, "momentum": 0.0, "weight_decay": 0.0},
    }
    gamma: NonNegativeFloat = 0.01

    def init(self, text: PromptTree, gen):
        d = text.dim
        return {"gram": torch.zeros(d * (d + 1) // 2), "moment": torch.zeros(d, text.n_cls)}

    def download(self, server, client_ids, clients: Clients):
        w = solve(**server.params)
        return {"w": w.expand(len(client_ids), *w.shape)}

    def encode(self, text: PromptTree, p, context):
        first = {name: value[:1] for name, value in p.items()}
        alike = all((p[name] == value).all() for name, value in first.items())  # the aggregate
        w = solve(**(first if alike else p))
        return w.mT.expand(len(p["gram"]), -1, -1)

    def loss(self, text: PromptTree, p, context, x, y):
        d, c = p["moment"].shape[1:]
        gram = x.mT @ x + self.gamma * torch.eye(d, device=x.device)
        moment = x.mT @ F.one_hot(y, c).to(x.dtype)
        rows, columns = torch.triu_indices(d, d)
        known = (p["gram"] * gram[:, rows, columns]).sum(1)
        return -known - (p["moment"] * moment).sum((1, 2))

    def aggregate(self, server, client_ids, uploads, sizes):
        if server.round:
            raise ValueError("AFL adds up what is sent in one round: set rounds to 1")
        total = {name: value.sum(0) for name, value in uploads.items()}
        return replace(server.store(client_ids, uploads), params=total)


def solve(gram: Float[Tensor, "*n t"], moment: Float[Tensor, "*n d c"]) -> Float[Tensor, "*n d c"]:
    """Return the W of least norm with C W = moment, found in double precision.

    gram: the upper triangle of C, row by row. What is below the rounding of its numbers counts as
    nothing.
    """
    d = moment.shape[-2]
    rows, columns = torch.triu_indices(d, d)
    whole = gram.new_zeros(*gram.shape[:-1], d, d, dtype=torch.double)
    whole[..., rows, columns] = gram.double()
    whole[..., columns, rows] = gram.double()
    nothing = 8 * torch.finfo(gram.dtype).eps  # real Gram matrices had rounding below 1 of these
    inverse = torch.linalg.pinv(whole, rtol=nothing, hermitian=True)
    return (inverse @ moment.double()).to(moment.dtype)


@dataclass(frozen=True)
class FedCLIP(ZeroShot):
    """Attention over the coordinates of the image feature, learnt by all; no prompt is.

    x' is a(v) v scaled to unit length, a(v) = softmax(W_2 tanh(W_1 v + b_1) + b_2), v the feature
    before it is scaled, of which we take the length to be `feature_norm` for all images (that of
    ViT-B); logits = s <x', t_c>. contrast "batch" is the release's loss: of the b images and the
    texts of their classes, (b, b), both ways, in which images of one class are taught to differ
    (N1); a batch of one image is passed over. "class" is cross-entropy over the classes.
    Steps are Adam's with decay in the gradient, begun anew each round, as released, where lr is
    5e-5, weight_decay 0.2. Clients count alike, whatever their sizes, and names lose underscores.
    Uploads and downloads 2 (d^2 + d) numbers.
    """

    key = "fedclip"
    title = "FedCLIP"
    source = "Lu et al., IEEE Data Eng. Bull. 2023"
    shared = ("w1", "b1", "w2", "b2")  # type: ignore[assignment]
    training: ClassVar[dict[str, Any]] = {"optimiser": "fresh"}
    template: str = "a picture of a {}"
    contrast: Literal["batch", "class"] = "batch"
    feature_norm: PositiveFloat = 10.0

    def init(self, text: PromptTree, gen):
        d = text.dim
        shapes = {"w1": (d, d), "b1": (d,), "w2": (d, d), "b2": (d,)}
        drawn = {name: torch.rand(shape, generator=gen) for name, shape in shapes.items()}
        return {name: (2 * value - 1) / d**0.5 for name, value in drawn.items()}

    def attention(self, p, v: Float[Tensor, "n b d"]) -> Float[Tensor, "n b d"]:
        hidden = torch.tanh(v @ p["w1"].mT + p["b1"].unsqueeze(1))
        return (hidden @ p["w2"].mT + p["b2"].unsqueeze(1)).softmax(-1)

    def logits(self, text: PromptTree, t, p, context, x):
        v = self.feature_norm * x
        adapted = F.normalize(self.attention(p, v) * v, dim=-1)
        return super().logits(text, t, p, context, adapted)

    def loss(self, text: PromptTree, p, context, x, y):
        if self.contrast == "class":
            return super().loss(text, p, context, x, y)
        z = self.logits(text, self.encode(text, p, context), p, context, x)
        b = y.shape[1]
        pairs = z.gather(2, y.unsqueeze(1).expand(-1, b, -1))
        own = torch.arange(b, device=y.device).expand_as(y)
        return (cross_entropy(pairs, own) + cross_entropy(pairs.mT, own)) / 2

    def gradients(self, text: PromptTree, p, context, x, y, draw):
        if self.contrast == "batch" and y.shape[1] == 1:
            return x.new_zeros(len(x)), {}
        return super().gradients(text, p, context, x, y, draw)

    def optimiser(self, groups, momentum, decay):
        return Adam(groups, 0.0, betas=(0.9, 0.98), eps=1e-6, weight_decay=decay)

    def aggregate(self, server, client_ids, uploads, sizes):
        return super().aggregate(server, client_ids, uploads, torch.ones_like(sizes))


@dataclass(frozen=True)
class ZSLP(ZeroShot):
    """A linear classifier of image features that starts at the text features of `template`.

    logits = s <x, w_c / |w_c|>, w (c, d). There is no federated release: FedAvg is ours. Uploads
    and downloads c d numbers.
    """

    key = "zslp"
    title = "ZS-LP, federated"
    source = "Silva-Rodriguez et al., CVPR 2024 (arXiv 2312.12730), on FedAvg"
    shared = ("w",)  # type: ignore[assignment]
    transfers = False

    def init(self, text: PromptTree, gen):
        return {"w": text.zero_shot(self.template)}

    def context(self, text: PromptTree, down, client_ids, clients: Clients):
        return {}

    def encode(self, text: PromptTree, p, context):
        return F.normalize(p["w"], dim=-1)


@dataclass(frozen=True)
class ZeroShotMemory(ZeroShot, PFedPrompt):
    """ZS-CLIP with pFedPrompt's memory of own images: what that gives without a learnt prompt.

    logits = s <x, t> + blend exp(-beta (1 - <x, K>)) V. It needs text features of the names, and no
    text tower. Nothing is trained and nothing is sent.
    """

    key = "zeroshot_memory"
    title = "zero-shot with pFedPrompt's memory"
    source = "Zhang et al., ECCV 2022 (Tip-Adapter), for each client"
    degenerate = (({"blend": 0}, ZeroShot),)
    memory: ClassVar[str] = "test"  # type: ignore[misc]  # nothing trains

    def context(self, text: PromptTree, down, client_ids, clients: Clients):
        own = PFedPrompt.context(self, text, down, client_ids, clients)
        return {**own, **super().context(text, down, client_ids, clients)}


ROWS: tuple[type[PromptFL], ...] = (AFL, FedCLIP, ZSLP, ZeroShotMemory)
