"""How many prompts a round encodes: counted by running it with a text tower that only counts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fpl.methods import PromptFL
from fpl.rounds import Setup, Training, run_rounds
from fpl.state import Clients


class CountingEncoder:
    """A text tower that costs next to nothing and counts the prompts that it encodes.

    trained: with a gradient, read: without. The features of its two classes are random projections
    of the prompt's mean, so that clients learn different prompts.
    """

    scale = 1.0
    at_once = 1000
    n_cls = 2

    def __init__(self, width: int, dim: int):
        self.width = width
        self.dim = dim
        self.trained = 0
        self.read = 0
        gen = torch.Generator().manual_seed(0)
        self.projection = torch.randn(width, self.n_cls * dim, generator=gen)

    def __call__(self, ctx: Float[Tensor, "*n m w"]) -> Float[Tensor, "*n c d"]:
        prompts = ctx.shape[:-2].numel()
        if torch.is_grad_enabled() and ctx.requires_grad:
            self.trained += prompts
        else:
            self.read += prompts
        return F.normalize(self.features(ctx), dim=-1)

    def features(self, ctx: Float[Tensor, "*n m w"]) -> Float[Tensor, "*n c d"]:
        """Return features of any length."""
        mixed = ctx.mean(-2) @ self.projection
        return mixed.unflatten(-1, (self.n_cls, self.dim))

    def zero_shot(self, template: str = "") -> Float[Tensor, "c d"]:
        """Return features for a template, which are the same for all."""
        return self(torch.eye(self.n_cls, self.width))

    def words(self, text: str) -> Float[Tensor, "m w"]:
        """Return a context for words, which is the same for all."""
        return torch.ones(1, self.width)


class VectorEncoder(CountingEncoder):
    """A counting text tower whose features are the first vectors of the prompt; w = d."""

    def features(self, ctx: Float[Tensor, "*n m w"]) -> Float[Tensor, "*n c d"]:
        return ctx[..., : self.n_cls, :]

    def images(self, x: Tensor) -> Tensor:
        """Return what stands for the features of images: themselves."""
        return x


def count_round(
    method: PromptFL, text: CountingEncoder, clients: Clients, training: Training
) -> tuple[int, int]:
    """Return how many prompts the last round of a run encodes, with a gradient and without."""
    counts = (0, 0)
    for _ in run_rounds(Setup(method, text, clients, training)):
        counts = (text.trained, text.read)
        text.trained = text.read = 0
    return counts
