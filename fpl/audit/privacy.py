"""What noise in the uploads promises: the epsilon of a noise multiplier, and what epsilon means."""

from __future__ import annotations

import math

from fpl.privacy import LARGEST, accountant, noise_multiplier


def epsilon_of(z: float, delta: float, releases: int) -> float:
    """Return the epsilon of `releases` Gaussian releases of noise multiplier z; inf from 500 on.

    Raises ValueError for a z that is not above 0, a delta outside (0, 1), or no release.
    """
    if not z > 0:
        raise ValueError(f"the noise multiplier {z} must be above 0")
    gdp = accountant(delta, releases)
    mu = math.sqrt(releases) / z
    if gdp.delta_eps_mu(eps=0.0, mu=mu) <= delta:
        return 0.0
    if gdp.delta_eps_mu(eps=LARGEST, mu=mu) >= delta:
        return math.inf
    return gdp.eps_from_mu(mu=mu, delta=delta)


def detection(epsilon: float, delta: float, false: float = 0.05) -> float:
    """Return how often the best test for "this client took part with its data" is right, in [0, 1].

    false: how often it says so where the client sent no data; without any release both are equal.
    For Gaussian releases it is Phi(Phi^-1(false) + mu), whatever their number (Dong, Roth and Su,
    2022, Theorem 2.7): this is what epsilon and delta come to.
    """
    from scipy.stats import norm

    return float(norm.cdf(norm.ppf(false) + 1 / noise_multiplier(epsilon, delta, 1)))
