"""One local step of PromptFL timed in three ways in one run: 77-token prompts, cut at EOS, and the prompt tree."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fpl.clip import Clip, Text, untrained
from fpl.methods import PromptFL

NAMES = Path(__file__).parent.parent / "data" / "class_names" / "food101.txt"


class Prompts:
    """The usual text path: one sequence per class, ctx (n, m, w) -> unit text features (n, c, d), padded to 77 tokens or cut."""

    def __init__(self, clip: Clip, names: list[str], n_ctx: int, cut: bool):
        self.model, self.scale = clip.model, float(clip.model.logit_scale.exp())
        self.tokens = clip.tokenizer([f"{'X ' * n_ctx}{name.replace('_', ' ')}." for name in names])
        self.end = self.tokens.argmax(-1)
        self.length = int(self.end.max()) + 1 if cut else self.tokens.shape[1]
        self.fixed = clip.model.token_embedding(self.tokens)[:, : self.length]
        self.n_nodes = len(names) * self.length

    def __call__(self, ctx: Float[Tensor, "n m w"]) -> Float[Tensor, "n c d"]:
        m, c = ctx.shape[1], len(self.fixed)
        fixed = self.fixed.expand(len(ctx), -1, -1, -1)
        x = torch.cat([fixed[:, :, :1], ctx.unsqueeze(1).expand(-1, c, -1, -1), fixed[:, :, 1 + m :]], dim=2)
        x = (x + self.model.positional_embedding[: self.length]).flatten(0, 1)
        x = self.model.transformer(x, attn_mask=self.model.attn_mask[: self.length, : self.length])
        x = x.unflatten(0, (len(ctx), c))[:, torch.arange(c), self.end]
        return F.normalize(self.model.ln_final(x) @ self.model.text_projection, dim=-1)


def local_step(model: str, classes: int, batch: int, repeats: int, n_ctx: int = 16) -> pd.DataFrame:
    """Median milliseconds of forward and backward, tokens, ratio to 77 tokens, and the largest differences to it.

    Features are random: their values do not change what a step costs. Raises ValueError for more classes than there are names
    and for an unknown model.
    """
    names = NAMES.read_text().split()
    if not 1 <= classes <= len(names):
        raise ValueError(f"--classes {classes}: there are 1 to {len(names)} names in {NAMES.name}")
    names, gen = names[:classes], torch.Generator().manual_seed(1)
    clip = untrained(model)
    ways = {
        "77 tokens": Prompts(clip, names, n_ctx, cut=False),
        "cut at EOS": Prompts(clip, names, n_ctx, cut=True),
        "prompt tree": Text(clip, names, n_ctx),
    }
    method, ctx = PromptFL(n_ctx), 0.02 * torch.randn(1, n_ctx, clip.model.token_embedding.weight.shape[1], generator=gen)
    x = F.normalize(torch.randn(1, batch, ways["prompt tree"].dim, generator=gen), dim=-1)
    y = torch.randint(classes, (1, batch), generator=gen)
    lines, reference = [], None
    for way, text in ways.items():
        seconds = [timed(lambda: step(method, text, ctx, x, y)) for _ in range(repeats + 1)][1:]  # noqa: B023
        found = step(method, text, ctx, x, y)
        reference = reference or found
        lines.append(
            {
                "way": way,
                "tokens": text.n_nodes,
                "ms": 1000 * statistics.median(seconds),
                "times faster": 0.0,
                "feature difference": (found[0] - reference[0]).abs().max().item(),
                "relative gradient difference": ((found[1] - reference[1]).norm() / reference[1].norm()).item(),
            }
        )
    table = pd.DataFrame(lines)
    table["times faster"] = table["ms"].iloc[0] / table["ms"]
    return table


def step(method: PromptFL, text, ctx: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Text features and the gradient of the loss to the context."""
    p = {"ctx": ctx.clone().requires_grad_()}
    t = method.encode(text, p)
    z = method.logits(text, t, p, {}, x)
    F.cross_entropy(z[0], y[0]).backward()
    return t.detach(), p["ctx"].grad


def timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
