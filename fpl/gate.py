"""The attention gate of pFedMoAP (Luo et al., ICLR 2025, section 3.3) and its ablations.

Shapes: b batch, c classes, d joint width, g gate width, h heads, e = g / h, k experts (the local
one first); `...` are clients.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fpl.state import Tensors

Mixing = Literal["attention", "uniform", "linear", "average"]
Pooling = Literal["stride", "mean"]
# The maps of a gate, by how it mixes: query, key, value and output; one that routes; or none.
MAPS = {"attention": "qkvo", "uniform": "vo", "linear": "r", "average": ""}


def names(mixing: str) -> tuple[str, ...]:
    """Return the names of a gate's tensors: a weight and a bias for each of its maps."""
    return tuple(f"gate_{kind}{part}" for part in MAPS[mixing] for kind in "wb")


def init(g: int, gen: torch.Generator, mixing: str = "attention", k: int = 1) -> Tensors:
    """Draw a gate as PyTorch draws a Linear: 4 (g^2 + g) numbers for attention.

    k: the places that a "linear" router scores, with k (g + 1) numbers.
    """
    rows = k if mixing == "linear" else g
    drawn = {}
    for part in MAPS[mixing]:
        for kind, shape in (("w", (rows, g)), ("b", (rows,))):
            uniform = 2 * torch.rand(*shape, generator=gen) - 1
            drawn[f"gate_{kind}{part}"] = uniform / math.sqrt(g)
    return drawn


def pool(x: Float[Tensor, "*n d"], g: int, pooling: str = "stride") -> Float[Tensor, "*n g"]:
    """Take every (d // g)-th coordinate, as the code does, or means of d // g neighbours (D12)."""
    if pooling == "mean":
        return x.unflatten(-1, (g, -1)).mean(-1)
    return x[..., :: x.shape[-1] // g]


def linear(p: Tensors, part: str, x: Tensor) -> Tensor:
    """Send x (..., *, g) through one map; maps have the leading client axes of x, or none."""
    w = p[f"gate_w{part}"]
    b = p[f"gate_b{part}"]
    y = x.flatten(w.ndim - 2, -2) @ w.mT + b.unsqueeze(-2)
    return y.reshape(x.shape)


def attention(
    p: Tensors,
    image: Float[Tensor, "*n b g"],
    experts: Float[Tensor, "*n k c g"],
    heads: int,
    scale: float,
) -> Float[Tensor, "*n h b k c"]:
    """Return softmax over experts of scale * q . k; the code's scale is 10, usual 1 / sqrt(e)."""
    q = linear(p, "q", image).unflatten(-1, (heads, -1))
    k = linear(p, "k", experts).unflatten(-1, (heads, -1))
    return torch.einsum("...bhe,...kche->...hbkc", scale * q, k).softmax(-2)


def mix(
    p: Tensors,
    image: Float[Tensor, "*n b g"],
    experts: Float[Tensor, "*n k c g"],
    heads: int = 8,
    scale: float = 10.0,
    mixing: str = "attention",
) -> Float[Tensor, "*n b c"]:
    """Return <image, T_MoE>: the pooled image against the mixed text feature of every class.

    "attention": T_MoE[b, c] = W_o concat_h(sum_k A[h, b, k, c] v[h, k, c]) + b_o. Only its product
    with the image is wanted, so W_o goes to the image's side and no (b, c, g) tensor exists.
    "uniform": the same with A = 1/k everywhere.
    "linear": the ordinary router of a mixture of experts,
    T_MoE[b, c] = sum_k softmax(W_r image + b_r)_k expert[k, c], place 0 the local expert's.
    "average": the mean of the experts. The logit scale is not in it.
    """
    if mixing == "average":
        return image @ experts.mean(-3).mT
    if mixing == "linear":
        scores = image @ p["gate_wr"].mT + p["gate_br"].unsqueeze(-2)
        share = scores[..., : experts.shape[-3]].softmax(-1)
        return torch.einsum("...bk,...bg,...kcg->...bc", share, image, experts)
    r = (image @ p["gate_wo"]).unflatten(-1, (heads, -1))  # W_o^T image
    bias = image @ p["gate_bo"].unsqueeze(-1)
    if mixing == "uniform":  # the mean of the values is the value of the mean
        v = linear(p, "v", experts.mean(-3, keepdim=True)).squeeze(-3)
        return r.flatten(-2) @ v.mT + bias
    a = attention(p, image, experts, heads, scale)
    v = linear(p, "v", experts).unflatten(-1, (heads, -1))
    seen = torch.einsum("...bhe,...kche->...hbkc", r, v)
    return (a * seen).sum((-4, -2)) + bias
