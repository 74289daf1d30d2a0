"""Differential privacy of what clients upload: each update of a round is clipped, and Gaussian noise is added to it.

pFedMoAP (Table 6) gives epsilon and delta, and says that gradients of prompts are clipped and uploaded prompts are noised; it
gives neither the norm nor the accountant nor what is protected. All of this is our choice, in the manner of DP-FedAvg (McMahan
et al., 2018) but for each client: what is clipped is the change of its shared tensors in a round, and noise is added before
anything leaves it, so that the server and the other clients see released uploads only.

What is protected is a client's whole data set, over all rounds of a run. Neighbours: a client with its data and one with none,
whose update is zero (add or remove one data set; that the client takes part is not hidden). One release then differs by at
most `clip` in l2, and z is its standard deviation over `clip`. Between any two data sets it differs by up to 2 clip, so if one is
replaced by another, the same z is worth `epsilon_of(z / 2, ...)`. The server sees who takes part, so nothing is claimed for
sampling: a client may be in every round. Not protected: who takes part, how many training images it has (they are the weights of
the average), its label shares where pFedMoAP's `choice` is "oracle", and the accuracies that a record holds.

The noise is drawn from a named generator, so that a run can be repeated: whoever knows the seed can take it away again. This
is for experiments; a deployment needs secret randomness.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fpl.state import Tensors

LARGEST = 500.0  # epsilon up to which the accountant's exp(epsilon) times a normal tail stays within double precision


@functools.cache
def noise_multiplier(epsilon: float, delta: float, releases: int) -> float:
    """The least z for which `releases` Gaussian releases are (epsilon, delta) differentially private together.

    They are one release of multiplier z / sqrt(releases), exactly and even if each depends on those before it (Dong, Roth and
    Su, 2022, Corollary 3.3), whose delta is known in closed form (Balle and Wang, 2018, Theorem 8): Opacus computes it.
    Raises ValueError for an epsilon outside (0, 500], a delta outside (0, 1), or no release.
    """
    if not 0 < epsilon <= LARGEST:
        raise ValueError(f"epsilon {epsilon} must be above 0 and at most {LARGEST:g}")
    check(delta, releases)
    from scipy.optimize import brentq  # imported here, like the accountant, because the import takes time

    delta_eps_mu = accountant().delta_eps_mu
    return math.sqrt(releases) / brentq(lambda mu: delta_eps_mu(eps=epsilon, mu=mu) - delta, 1e-9, 100.0)


def epsilon_of(z: float, delta: float, releases: int) -> float:
    """The epsilon that `releases` Gaussian releases of noise multiplier z have at delta; infinite from 500 on.

    Raises ValueError for a z that is not above 0, a delta outside (0, 1), or no release.
    """
    if not z > 0:
        raise ValueError(f"the noise multiplier {z} must be above 0")
    check(delta, releases)
    gdp, mu = accountant(), math.sqrt(releases) / z
    if gdp.delta_eps_mu(eps=0.0, mu=mu) <= delta:
        return 0.0
    return gdp.eps_from_mu(mu=mu, delta=delta) if gdp.delta_eps_mu(eps=LARGEST, mu=mu) < delta else math.inf


def detection(epsilon: float, delta: float, false: float = 0.05) -> float:
    """How often the best test for "this client took part with its data" may be right where it does, in [0, 1].

    `false` is how often it says so where the client sent no data; without any release both are equal. For Gaussian releases it is
    Phi(Phi^-1(false) + mu), whatever their number (Dong, Roth and Su, 2022, Theorem 2.7): what epsilon and delta come to.
    """
    from scipy.stats import norm

    return float(norm.cdf(norm.ppf(false) + 1 / noise_multiplier(epsilon, delta, 1)))


def check(delta: float, releases: int) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"delta {delta} is not in (0, 1)")
    if releases < 1:
        raise ValueError(f"releases {releases} must be at least 1")


def accountant():
    """Opacus' accountant of Gaussian differential privacy; its import takes seconds."""
    from opacus.accountants.analysis import gdp

    return gdp


def release(uploads: Tensors, begin: Tensors, clip: float, z: float, gens: Sequence[torch.Generator]) -> Tensors:
    """What leaves the clients: begin + clipped (uploads - begin) + N(0, (z clip)^2), all tensors of a client as one vector.

    `uploads` have the client axis in front, `begin` is what the server knows already, with that axis or without it. Each client
    has a generator of its own. Computed in double precision and rounded to the uploads' at the end.
    """
    flat = torch.cat([(v.double() - begin[k].double()).flatten(1) for k, v in uploads.items()], dim=1)
    noise = torch.stack([torch.randn(flat.shape[1], generator=gen, dtype=flat.dtype) for gen in gens]).to(flat.device)
    parts = (clipped(flat, clip) + z * clip * noise).split([v[0].numel() for v in uploads.values()], dim=1)
    return {k: (begin[k].double() + part.view_as(v)).to(v.dtype) for (k, v), part in zip(uploads.items(), parts, strict=True)}


def clipped(updates: Float[Tensor, "n m"], clip: float) -> Float[Tensor, "n m"]:
    """Each row scaled to l2 norm `clip` where it is longer."""
    return updates * (clip / updates.norm(dim=1, keepdim=True).clamp(min=clip))
