"""FedOTP's transport plan between an image's patches and a class's prompts (Li et al., CVPR 2024).

Entropic optimal transport with cost 1 - S, S the cosine similarities, by scaling the kernel
K = exp(-(1 - S) / eps). The K of the released code underflows at small eps; ours is divided by a
client's maximum, and u or v carries what was divided out: the released iterates up to rounding.

Shapes: n clients, M patches, two prompts; `p` are images and classes.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

MAX_ITERATIONS = 100
THRESHOLD = 1e-3
CHECK = 4  # iterations from one look at what has changed to the next
FITS = 2**18  # similarities that a processor's cache has room for


@torch.no_grad()
def plan(
    sim: Float[Tensor, "n *p M 2"],
    eps: float = 0.1,
    gamma: float = 0.8,
    balanced: bool = False,
    max_iter: int = MAX_ITERATIONS,
    thresh: float = THRESHOLD,
) -> tuple[Float[Tensor, "n *p M 2"], Int[Tensor, " n"]]:
    """Return diag(u) K diag(v) and the number of iterations of each client; no gradient.

    Unbalanced (the paper's COT): every column has gamma / 2, no row more than 1 / M, so a part
    gamma of the image is matched; u = min(1, (1 / M) / (K v)), v = (gamma / 2) / (K^T u).
    balanced (Sinkhorn): rows have 1 / M, columns 1 / 2, and gamma is not used.

    The iteration starts from ones and stops for a client when its v (balanced: u) changes by less
    than `thresh` in the mean, over its whole batch, as in the released code. So the truncated plan
    of an image depends on the batch and on the scale of K; the limit depends on neither.
    """
    at_once = max(1, FITS // sim[0].numel()) if sim.device.type == "cpu" else len(sim)
    found = torch.empty_like(sim)  # in memory in the order of `sim`
    counts = []
    for own, out in zip(sim.split(at_once), found.split(at_once), strict=True):
        parts, count = solve(own, eps, 1.0 if balanced else gamma, balanced, max_iter, thresh)
        out.movedim((-1, -2), (0, 2)).copy_(parts)
        counts.append(count)
    return found, torch.cat(counts)


@torch.inference_mode()  # steps are so short that what else torch does for each counts
def solve(
    sim: Tensor, eps: float, mass: float, balanced: bool, most: int, thresh: float
) -> tuple[Float[Tensor, "2 n M *p"], Int[Tensor, " n"]]:
    """Return the plan, the part of one prompt and then the other's, and the iterations."""
    # cosines differ by up to 2: single precision does not hold exp(4 / eps) at small eps
    exact = sim.to(torch.float64 if eps < 0.046 else sim.dtype)
    one, two = exact.movedim(-2, 1).unbind(-1)
    top = exact.amax((*range(1, exact.ndim),)).view(-1, *[1] * (one.ndim - 1))
    unit = ((top - 1) / eps).exp()
    first = (one - top).div_(eps).exp_().mul_(one.shape[1])  # M K_1
    ratio = (two - one).div_(eps).exp_()  # K_2 / K_1
    column = torch.tensor(one.shape[1] * mass / 2, dtype=torch.float64)
    part, u = torch.empty_like(first), unit.expand_as(first)  # balanced: u is kept times unit
    v = [first.new_ones(len(first), 2, *first.shape[2:]) * (1 if balanced else unit)]
    moved: list[Tensor] = []

    def rows(v):  # M u K_1 = min(M K_1, 1 / (v_1 + v_2 K_2 / K_1)), and M u K_2 = ratio M u K_1
        torch.addcmul(v[:, :1], ratio, v[:, 1:], out=part).reciprocal_()
        return part if balanced else torch.minimum(part, first, out=part)

    def small(since):
        if len(moved) < len(v) - 1:
            moved.extend(torch.stack(v[len(moved) :]).diff(dim=0).abs_().flatten(2).mean(2))
        return torch.stack(moved[since:]) < thresh * unit.flatten()

    for done in range(most):
        rows(v[-1])
        if balanced:
            old, u = u, part / first
            moved.append((u - old).abs_().flatten(1).mean(1))
        columns = torch.cat([part.sum(1, True), part.mul_(ratio).sum(1, True)], 1)
        v.append(columns.reciprocal_().mul_(column))
        if done % CHECK == CHECK - 1 and small(done).all():
            break
    stops = small(0)  # (iterations, n)
    count = torch.where(stops.any(0), stops.int().argmax(0) + 1, len(stops))
    before, after = (torch.stack(v)[at, range(len(count))] for at in (count - 1, count))
    after /= first.shape[1]
    return torch.stack([rows(before) * after[:, :1], part * ratio * after[:, 1:]]), count
