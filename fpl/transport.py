"""FedOTP's transport plan between the patches of an image and the prompts of a class (Li et al., CVPR 2024).

Entropic optimal transport with cost 1 - S, S the cosine similarities, by scaling the kernel K = exp(-(1 - S) / eps). It is done
with logarithms of u, v and K, which gives the released iterates up to rounding and cannot underflow as they do at small eps.

Shapes: M patches, k prompts; `...` are images, classes and clients.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


@torch.no_grad()
def plan(
    sim: Float[Tensor, "*n M k"],
    eps: float = 0.1,
    gamma: float = 0.8,
    balanced: bool = False,
    max_iter: int = 100,
    thresh: float = 1e-3,
) -> tuple[Float[Tensor, "*n M k"], int]:
    """diag(u) K diag(v) and the number of iterations; a constant for the gradient.

    Unbalanced (the paper's COT): every column has gamma / k, no row more than 1 / M, so a part gamma of the image is matched;
    u = min(1, (1 / M) / (K v)), v = (gamma / k) / (K^T u). `balanced` (Sinkhorn): rows 1 / M, columns 1 / k, gamma unused.

    The iteration starts from ones and stops when v (balanced: u) changes by less than `thresh` in the mean. As in the released
    code, the change is absolute and the mean is over everything in `sim`: the truncated plan of one image depends on what else is
    in the batch and on the scale of K, so no maximum may be subtracted; the limit depends on neither.
    """
    patches, prompts = sim.shape[-2:]
    log_k = (sim - 1) / eps
    u, v = torch.zeros_like(sim[..., 0]), torch.zeros_like(sim[..., 0, :])  # logarithms
    column = math.log((1 if balanced else gamma) / prompts)
    iterations = 0
    while iterations < max_iter:
        iterations += 1
        before = u if balanced else v
        u = -math.log(patches) - (log_k + v.unsqueeze(-2)).logsumexp(-1)
        if not balanced:
            u = u.clamp(max=0)
        v = column - (log_k + u.unsqueeze(-1)).logsumexp(-2)
        if ((u if balanced else v).exp() - before.exp()).abs().mean() < thresh:
            break
    return (u.unsqueeze(-1) + log_k + v.unsqueeze(-2)).exp(), iterations
