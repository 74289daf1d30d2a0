"""Differential privacy of what clients upload: every update is clipped, and noise is added to it.

pFedMoAP (Table 6) gives epsilon and delta, but neither the norm nor the accountant nor what is
protected. That is our choice, in the manner of DP-FedAvg (McMahan et al., 2018) but for each
client: the change of its shared tensors in a round is clipped, and Gaussian noise is added before
anything leaves it. The server and the other clients see released uploads only.

What is protected is a client's whole data set, over all rounds of a run. Neighbours: a client with
its data and one with none, whose update is zero. One release then differs by at most `clip` in l2,
and z is its standard deviation over `clip`. Between any two data sets it differs by up to 2 clip:
if one is replaced by another, z is worth what z / 2 is (fpl.audit.privacy). A client may be in
every round: nothing is claimed for sampling. Not protected: who takes part, how many training
images it has, its label shares where pFedMoAP's `choice` is "oracle" or "disjoint", accuracies and
losses in a record, whatever `ridge_all` reads. The noise is drawn from a named generator: whoever
knows the seed can take it away again. This is for experiments; others need secret randomness.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fpl.state import Tensors

LARGEST = 500.0  # up to here exp(epsilon) times a normal tail stays within double precision


@functools.cache
def noise_multiplier(epsilon: float, delta: float, releases: int) -> float:
    """Return the least z for which `releases` Gaussian releases are (epsilon, delta) private.

    Together they are one release of multiplier z / sqrt(releases), exactly and even if each depends
    on those before it (Dong, Roth and Su, 2022, Corollary 3.3), whose delta is known in closed form
    (Balle and Wang, 2018, Theorem 8): Opacus computes it.
    Raises ValueError for an epsilon outside [1e-6, 500], a delta outside (0, 1), or no release.
    """
    from scipy.optimize import brentq  # its import takes time, and few runs need it

    if not 1e-6 <= epsilon <= LARGEST:
        raise ValueError(f"epsilon {epsilon} must be at least 1e-6 and at most {LARGEST:g}")
    delta_of = accountant(delta, releases).delta_eps_mu
    mu = brentq(lambda mu: delta_of(eps=epsilon, mu=mu) - delta, 1e-9, 100.0)
    return math.sqrt(releases) / mu


def accountant(delta: float, releases: int):
    """Return Opacus' accountant of Gaussian differential privacy, whose import takes seconds.

    Raises ValueError for a delta or a number of releases that cannot be.
    """
    from opacus.accountants.analysis import gdp

    if not 0 < delta < 1:
        raise ValueError(f"delta {delta} is not in (0, 1)")
    if releases < 1:
        raise ValueError(f"releases {releases} must be at least 1")
    return gdp


def release(
    uploads: Tensors, begin: Tensors, clip: float, z: float, gens: Sequence[torch.Generator]
) -> Tensors:
    """Return what leaves the clients: begin + clipped (uploads - begin) + N(0, (z clip)^2).

    uploads: with the client axis in front; all tensors of a client count as one vector. begin: what
    the server knows already, with that axis or without it. gens: a generator for each client.
    Computed in double precision and rounded to the uploads' at the end.
    """
    updates = [(v.double() - begin[k].double()).flatten(1) for k, v in uploads.items()]
    flat = torch.cat(updates, dim=1)
    noise = [torch.randn(flat.shape[1], generator=gen, dtype=flat.dtype) for gen in gens]
    noisy = clipped(flat, clip) + z * clip * torch.stack(noise).to(flat.device)
    parts = noisy.split([v[0].numel() for v in uploads.values()], dim=1)
    released = {}
    for (name, value), part in zip(uploads.items(), parts, strict=True):
        released[name] = (begin[name].double() + part.view_as(value)).to(value.dtype)
    return released


def clipped(updates: Float[Tensor, "n m"], clip: float) -> Float[Tensor, "n m"]:
    """Return each row, scaled to l2 norm `clip` where it is longer."""
    return updates * (clip / updates.norm(dim=1, keepdim=True).clamp(min=clip))
