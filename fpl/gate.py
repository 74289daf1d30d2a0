"""The attention gate of pFedMoAP (Luo et al., ICLR 2025, section 3.3): an image feature attends to the experts' text features.

Shapes: b batch, c classes, d joint width, g gate width, h heads, e = g / h, k experts (the local one first); `...` are clients.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

Params = dict[str, Tensor]


# the tensors of a gate, by how it mixes: maps for query, key, value and output, one that routes, or none
NAMES = {
    kind: tuple(f"gate_{half}{part}" for part in parts for half in "wb")
    for kind, parts in {"attention": "qkvo", "uniform": "vo", "linear": "r", "average": ""}.items()
}


def init(g: int, gen: torch.Generator, mixing: str = "attention", k: int = 1) -> Params:
    """Linear maps with bias, drawn as PyTorch draws a Linear: g -> g each, 4 (g^2 + g) numbers for attention; "linear" g -> k."""
    rows = k if mixing == "linear" else g
    shapes = {name: (rows, g) if name[5] == "w" else (rows,) for name in NAMES[mixing]}
    return {name: (2 * torch.rand(*shape, generator=gen) - 1) / math.sqrt(g) for name, shape in shapes.items()}


def pool(x: Float[Tensor, "*n d"], g: int) -> Float[Tensor, "*n g"]:
    """Every (d // g)-th coordinate; the paper calls it a pooling layer, its code takes a stride."""
    return x[..., :: x.shape[-1] // g]


def mean_pool(x: Float[Tensor, "*n d"], g: int) -> Float[Tensor, "*n g"]:
    """Means of d // g neighbours."""
    return x.unflatten(-1, (g, -1)).mean(-1)


POOLINGS = {"stride": pool, "mean": mean_pool}


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
    p: Params,
    image: Float[Tensor, "*n b g"],
    experts: Float[Tensor, "*n k c g"],
    heads: int = 8,
    scale: float = 10.0,
    mixing: str = "attention",
) -> Float[Tensor, "*n b c"]:
    """<image, T_MoE>: the pooled image feature against the mixed text feature of every class, without the logit scale.

    T_MoE[b, c] = W_o concat_h(sum_k A[h, b, k, c] v[h, k, c]) + b_o. Only its product with the image is wanted, so W_o goes to
    the image's side and no (b, c, g) tensor exists. A = 1/k everywhere for "uniform". "linear" is the ordinary router of a
    mixture of experts: T_MoE[b, c] = sum_k softmax(W_r image + b_r)_k expert[k, c], place 0 the local expert's. "average" is
    their mean, without anything to learn.
    """
    if mixing == "average":
        return image @ experts.mean(-3).mT
    if mixing == "linear":
        scores = (image @ p["gate_wr"].mT + p["gate_br"].unsqueeze(-2))[..., : experts.shape[-3]]
        return torch.einsum("...bk,...bg,...kcg->...bc", scores.softmax(-1), image, experts)
    r = (image @ p["gate_wo"]).unflatten(-1, (heads, -1))  # W_o^T image
    bias = image @ p["gate_bo"].unsqueeze(-1)
    if mixing == "uniform":
        v = linear(p, "v", experts.mean(-3, keepdim=True)).squeeze(-3)  # (..., c, g): the mean of the values is that of the mean
        return r.flatten(-2) @ v.mT + bias
    a = attention(p, image, experts, heads, scale)
    v = linear(p, "v", experts).unflatten(-1, (heads, -1))
    seen = torch.einsum("...bhe,...kche->...hbkc", r, v)
    return (a * seen).sum((-4, -2)) + bias
