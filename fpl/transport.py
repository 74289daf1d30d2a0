"""FedOTP's transport plan between the patches of an image and the prompts of a class (Li et al., CVPR 2024).

Entropic optimal transport with cost 1 - S, S the cosine similarities, by scaling the kernel K = exp(-(1 - S) / eps). The K of
the released code underflows at small eps; ours is divided by its maximum, and u or v carries what was divided out, which gives
the released iterates up to rounding.

Shapes: n clients, M patches, k prompts; `p` are images and classes.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


@torch.no_grad()
def plan(
    sim: Float[Tensor, "n *p M k"],
    eps: float = 0.1,
    gamma: float = 0.8,
    balanced: bool = False,
    max_iter: int = 100,
    thresh: float = 1e-3,
) -> tuple[Float[Tensor, "n *p M k"], Int[Tensor, " n"]]:
    """diag(u) K diag(v) and the number of iterations; a constant for the gradient.

    Unbalanced (the paper's COT): every column has gamma / k, no row more than 1 / M, so a part gamma of the image is matched;
    u = min(1, (1 / M) / (K v)), v = (gamma / k) / (K^T u). `balanced` (Sinkhorn): rows 1 / M, columns 1 / k, gamma unused.

    The iteration starts from ones and stops for a client when its v (balanced: u) changes by less than `thresh` in the mean. As
    in the released code, the change is absolute and the mean is over the client's whole batch: the truncated plan of one image
    depends on what else is in the batch and on the scale of K, so no maximum may be subtracted; the limit depends on neither.
    """
    patches, prompts = sim.shape[-2:]
    exact = sim.movedim(-1, 0).to(torch.float64 if eps < 0.03 else sim.dtype)  # (k, n, *p, M); cosines differ by up to 2
    most = exact.amax(0) if balanced else exact.amax((0, -1)).unsqueeze(-1)  # of a row, or of the whole
    kernel, unit = ((exact - most) / eps).exp().contiguous(), ((most - 1) / eps).exp()
    v = torch.ones_like(kernel[..., 0]) if balanced else unit[..., 0].expand_as(kernel[..., 0])  # unbalanced: v times unit
    u = unit.expand_as(kernel[0])  # balanced: u times unit
    iterations = torch.zeros(len(sim), dtype=torch.long, device=sim.device)
    going = torch.ones(len(sim), dtype=torch.bool, device=sim.device)
    for _ in range(max_iter):
        new_u = 1 / patches / (kernel * v.unsqueeze(-1)).sum(0)
        new_u = new_u if balanced else new_u.clamp_(max=1)
        new_v = (1 if balanced else gamma) / prompts / (kernel * new_u).sum(-1)
        if not going.all():  # a client that has stopped stays as it is
            keep = going.view(-1, *[1] * (sim.ndim - 3))
            new_u, new_v = torch.where(keep.unsqueeze(-1), new_u, u), torch.where(keep, new_v, v)
        change = (new_u - u) / unit if balanced else ((new_v - v) / unit[..., 0]).movedim(0, -1)
        u, v, iterations = new_u, new_v, iterations + going
        going = going & ~(change.abs().flatten(1).mean(1) < thresh)
        if not going.any():
            break
    return (u * kernel * v.unsqueeze(-1)).movedim(0, -1).to(sim.dtype), iterations
