"""The attention gate of pFedMoAP (Luo et al., ICLR 2025, section 3.3): an image feature attends to the experts' text features.

Shapes: b batch, c classes, d joint width, g gate width, h heads, e = g / h, k experts (the local one first); `...` are clients.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

Params = dict[str, Tensor]


def init(g: int, gen: torch.Generator) -> Params:
    """Four linear maps g -> g with bias (query, key, value, output), drawn as PyTorch draws a Linear: 4 (g^2 + g) numbers."""
    shapes = {f"gate_{kind}{part}": shape for part in "qkvo" for kind, shape in (("w", (g, g)), ("b", (g,)))}
    return {name: (2 * torch.rand(*shape, generator=gen) - 1) / math.sqrt(g) for name, shape in shapes.items()}


def pool(x: Float[Tensor, "*n d"], g: int) -> Float[Tensor, "*n g"]:
    """Every (d // g)-th coordinate; the paper calls it a pooling layer, its code takes a stride."""
    return x[..., :: x.shape[-1] // g]


def linear(p: Params, part: str, x: Tensor) -> Tensor:
    """x (..., *, g) through one of the maps; the maps have the leading client axes of x, or none."""
    w, b = p[f"gate_w{part}"], p[f"gate_b{part}"]
    return (x.flatten(w.ndim - 2, -2) @ w.mT + b.unsqueeze(-2)).reshape(x.shape)


def attention(
    p: Params, image: Float[Tensor, "*n b g"], experts: Float[Tensor, "*n k c g"], heads: int, scale: float
) -> Float[Tensor, "*n h b k c"]:
    """softmax over the experts of scale * q . k. The scale multiplies; the released code takes 10 where 1/sqrt(e) is usual."""
    q = linear(p, "q", image).unflatten(-1, (heads, -1))
    k = linear(p, "k", experts).unflatten(-1, (heads, -1))
    return torch.einsum("...bhe,...kche->...hbkc", scale * q, k).softmax(-2)


def mix(
    p: Params, image: Float[Tensor, "*n b g"], experts: Float[Tensor, "*n k c g"], heads: int = 8, scale: float = 10.0
) -> Float[Tensor, "*n b c"]:
    """<image, T_MoE>: the pooled image feature against the mixed text feature of every class, without the logit scale.

    T_MoE[b, c] = W_o concat_h(sum_k A[h, b, k, c] v[h, k, c]) + b_o. Only its product with the image is wanted, so W_o goes to
    the image's side and no (b, c, g) tensor exists.
    """
    a = attention(p, image, experts, heads, scale)
    v = linear(p, "v", experts).unflatten(-1, (heads, -1))
    r = (image @ p["gate_wo"]).unflatten(-1, (heads, -1))  # W_o^T image
    seen = torch.einsum("...bhe,...kche->...hbkc", r, v)
    return (a * seen).sum((-4, -2)) + (image @ p["gate_bo"].unsqueeze(-1))
