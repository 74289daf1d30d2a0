"""Six ways to train pFedMoAP, from the shape of the released code to ours.

Each is a method and a text encoder that go through the same `rounds.train_locally` and
`rounds.evaluate`; each but the first changes one thing of the way before it.

Shapes: n clients, b batch, c classes, m context length, d joint width, k experts, g gate width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from open_clip import IMAGENET_CLASSNAMES
from torch import Tensor

from fpl import gate
from fpl.data import encoders
from fpl.data.files import ROOT
from fpl.experiments.cache import device
from fpl.methods import PFedMoAP, PromptFL
from fpl.prompts import Clip, PromptTree, project, text_tower, tokens_of, width_of
from fpl.state import Clients, Tensors

# The list of names to take for a number of classes.
LISTS = {
    10: "cifar10",
    37: "oxfordpets",
    47: "dtd",
    100: "cifar100",
    101: "food101",
    102: "flowers102",
}


def names(classes: int) -> list[str]:
    """Return the class names of the data set with that many classes, or the first of ImageNet's.

    Raises ValueError for more than 1,000.
    """
    if classes in LISTS:
        file = ROOT / "data" / "class_names" / f"{LISTS[classes]}.txt"
        return file.read_text().split()
    most = len(IMAGENET_CLASSNAMES)
    if not 1 <= classes <= most:
        raise ValueError(f"--classes {classes}: there are names for 1 to {most} classes")
    listed = list(IMAGENET_CLASSNAMES)
    listed[744], listed[837] = "projectile", "dark glasses"  # others have their short names
    return listed[:classes]


def load_model(model: str, weights: str = "") -> Clip:
    """Load a model with its own or these weights, or else with random ones."""
    if weights or ":" in model:
        return encoders.load(model, weights, device())
    return encoders.untrained(model, device())


class SequentialPFedMoAP(PFedMoAP):
    """One client after the other, each encodes its own experts, and T_MoE (n, b, c, g) is made."""

    def cohorts(self, server, drawn):
        everybody = torch.cat(super().cohorts(server, drawn))
        return [*everybody.split(1)]

    def context(self, text: PromptTree, down, client_ids, clients: Clients):
        if "experts" not in down:
            return {}
        prompts = down["experts"].unbind(1)
        encoded = [self.pool(text(ctx)) for ctx in prompts]
        return {"experts": torch.stack(encoded, dim=1)}

    def logits(self, text: PromptTree, t, p, context, x):
        local = PromptFL.logits(self, text, t, p, context, x)
        if "experts" not in context:
            return local
        own = self.pool(t).unsqueeze(1)
        experts = torch.cat([own, context["experts"]], dim=1)
        mixed = mix_unfolded(self, p, self.pool(x), experts)
        return text.scale * mixed + self.lam * local


class PixelPFedMoAP(SequentialPFedMoAP):
    """The image tower runs on every batch, without gradients, in training and in evaluation."""

    inputs = "pixels"

    def logits(self, text: PixelPrompts, t, p, context, x):
        feats = text.images(x)
        return super().logits(text, t, p, context, feats)


def mix_unfolded(
    method: PFedMoAP, p: Tensors, image: Float[Tensor, "n b g"], experts: Float[Tensor, "n k c g"]
) -> Float[Tensor, "n b c"]:
    """Do what `gate.mix` does as the released code does it.

    It has a query for every class, and the mixed text features themselves.
    """
    heads = (method.heads, -1)
    of_class = image.unsqueeze(-2)
    c = experts.shape[-2]
    queries = of_class.expand(-1, -1, c, -1)
    q = gate.linear(p, "q", queries).unflatten(-1, heads)
    k = gate.linear(p, "k", experts).unflatten(-1, heads)
    v = gate.linear(p, "v", experts).unflatten(-1, heads)
    scores = torch.einsum("nbche,nkche->nhbkc", method.gate_scale * q, k)
    a = scores.softmax(-2)
    mixed = torch.einsum("nhbkc,nkche->nbche", a, v).flatten(-2)
    return (gate.linear(p, "o", mixed) * of_class).sum(-1)


class PaddedPrompts:
    """The usual text path: a sequence per class, of 77 tokens or, with `cut`, of the longest's.

    A call takes ctx (n, m, w) to unit text features (n, c, d).
    """

    at_once = 1

    def __init__(self, clip: Clip, names: Sequence[str], n_ctx: int = 16, cut: bool = False):
        self.tower = text_tower(clip)
        self.scale = float(clip.model.logit_scale.exp())
        self.n_cls = len(names)
        self.width = int(self.tower.token_embedding.weight.shape[1])
        self.dim = width_of(self.tower.text_projection)
        rows = tokens_of(clip, names, n_ctx, ".")
        self.end = torch.tensor([len(row) - 1 for row in rows])
        self.length = max(map(len, rows)) if cut else len(self.tower.positional_embedding)
        self.n_nodes = len(rows) * self.length
        padded = [row + [0] * (self.length - len(row)) for row in rows]
        embedding = self.tower.token_embedding
        self.fixed = embedding(torch.tensor(padded).to(embedding.weight.device))

    def __call__(self, ctx: Float[Tensor, "n m w"]) -> Float[Tensor, "n c d"]:
        n, m = ctx.shape[:2]
        fixed = self.fixed.expand(n, -1, -1, -1)
        prompts = ctx.unsqueeze(1).expand(-1, self.n_cls, -1, -1)
        x = torch.cat([fixed[:, :, :1], prompts, fixed[:, :, 1 + m :]], dim=2)
        x = (x + self.tower.positional_embedding[: self.length]).flatten(0, 1)
        mask = self.tower.attn_mask[: self.length, : self.length]
        x = self.tower.transformer(x, attn_mask=mask).unflatten(0, (n, self.n_cls))
        return project(self.tower, x[:, torch.arange(self.n_cls), self.end])


class PixelPrompts(PaddedPrompts):
    """The padded prompts, with the image tower at hand."""

    def __init__(self, clip: Clip, names: Sequence[str], n_ctx: int):
        super().__init__(clip, names, n_ctx)
        self.model: Any = clip.model

    @torch.no_grad()
    def images(self, x: Float[Tensor, "n b 3 s s"]) -> Float[Tensor, "n b d"]:
        """Return unit image features."""
        flat = x.flatten(0, 1)
        features = self.model.encode_image(flat, normalize=True)
        return features.unflatten(0, x.shape[:2])


def compiled(clip: Clip, names: Sequence[str], n_ctx: int) -> PromptTree:
    """Return the prompt tree with every block of the transformer compiled.

    Blocks that are alike share one compilation.
    """
    # only so many versions of a function are kept, and those of other settings count
    torch.compiler.reset()
    text = PromptTree(clip, names, n_ctx)
    text.layer = torch.compile(text.layer, dynamic=False)
    return text


COMPILED = "f compiled"
Make = Callable[[Clip, Sequence[str], int], Any]
WAYS: dict[str, tuple[type[PFedMoAP], Make]] = {
    "a image tower, 77 tokens": (PixelPFedMoAP, PixelPrompts),
    "b image features cached": (SequentialPFedMoAP, PaddedPrompts),
    "c cut at EOS": (SequentialPFedMoAP, partial(PaddedPrompts, cut=True)),
    "d prompt tree": (SequentialPFedMoAP, PromptTree),
    # experts once for all who receive them, gate folded: what `fpl run` does
    "e clients stacked": (PFedMoAP, PromptTree),
    COMPILED: (PFedMoAP, compiled),
}
