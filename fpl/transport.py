"""FedOTP's transport plan between an image's patches and a class's prompts (Li et al., CVPR 2024).

Entropic optimal transport with cost 1 - S, S the cosine similarities, by scaling the kernel
K = exp(-(1 - S) / eps). The K of the released code underflows at small eps; ours is divided by its
maximum, and u or v carries what was divided out, which gives the released iterates up to rounding.

Shapes: n clients, M patches, k prompts; `p` are images and classes.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

MAX_ITERATIONS = 100
THRESHOLD = 1e-3


@torch.no_grad()
def plan(
    sim: Float[Tensor, "n *p M k"],
    eps: float = 0.1,
    gamma: float = 0.8,
    balanced: bool = False,
    max_iter: int = MAX_ITERATIONS,
    thresh: float = THRESHOLD,
) -> tuple[Float[Tensor, "n *p M k"], Int[Tensor, " n"]]:
    """Return diag(u) K diag(v) and the number of iterations of each client; no gradient.

    Unbalanced (the paper's COT): every column has gamma / k, no row more than 1 / M, so a part
    gamma of the image is matched; u = min(1, (1 / M) / (K v)), v = (gamma / k) / (K^T u).
    balanced (Sinkhorn): rows have 1 / M, columns 1 / k, and gamma is not used.

    The iteration starts from ones and stops for a client when its v (balanced: u) changes by less
    than `thresh` in the mean, over its whole batch, as in the released code. So the truncated plan
    of an image depends on the batch and on the scale of K; the limit depends on neither.
    """
    patches, prompts = sim.shape[-2:]
    mass = 1 if balanced else gamma
    kernel, unit = kernel_of(sim, eps, balanced)
    u = unit.expand_as(kernel[0])  # balanced: u is kept times unit
    v = torch.ones_like(kernel[..., 0])
    if not balanced:  # v is kept times unit
        unit = unit[..., 0]
        v = unit.expand_as(v)
    iterations = torch.zeros(len(sim), dtype=torch.long, device=sim.device)
    going = torch.ones(len(sim), dtype=torch.bool, device=sim.device)
    for _ in range(max_iter):
        new_u = 1 / patches / (kernel * v.unsqueeze(-1)).sum(0)
        if not balanced:
            new_u = new_u.clamp_(max=1)
        new_v = mass / prompts / (kernel * new_u).sum(-1)
        if not going.all():  # a client that has stopped stays as it is
            keep = going.view(-1, *[1] * (sim.ndim - 3))
            new_u = torch.where(keep.unsqueeze(-1), new_u, u)
            new_v = torch.where(keep, new_v, v)
        change = (new_u - u if balanced else new_v - v) / unit
        if not balanced:
            change = change.movedim(0, -1)
        u, v = new_u, new_v
        iterations = iterations + going
        going = going & ~(change.abs().flatten(1).mean(1) < thresh)
        if not going.any():
            break
    return (u * kernel * v.unsqueeze(-1)).movedim(0, -1).to(sim.dtype), iterations


def kernel_of(
    sim: Float[Tensor, "n *p M k"], eps: float, balanced: bool
) -> tuple[Float[Tensor, "k n *p M"], Float[Tensor, "..."]]:
    """Return exp(-(1 - S) / eps) over its maximum, of a row or of the whole, and that maximum."""
    # cosines differ by up to 2, which single precision does not hold at small eps
    exact = sim.movedim(-1, 0).to(torch.float64 if eps < 0.03 else sim.dtype)
    most = exact.amax(0) if balanced else exact.amax((0, -1)).unsqueeze(-1)
    return ((exact - most) / eps).exp().contiguous(), ((most - 1) / eps).exp()
