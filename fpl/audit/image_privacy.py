"""Differential privacy of a single training image, where clients release noisy gradients: DP-FPL.

In every step a client's gradients are means over a batch of b images. Each image's gradient of each
tensor has an l2 norm of at most `bound`, and the mean gets Gaussian noise of standard deviation
noise bound / b: one release, of multiplier `noise`. What a client keeps and sends is made of such
releases alone. An image is in at most one batch of a local epoch, so it is in at most rounds x
epochs x tensors releases; together they are what fpl.privacy says of as many, even if each depends
on those before it. Nothing is claimed for the drawing of batches: this holds for any order.

Neighbours: the same images, but that the gradients of one count as zero. Where one image is
replaced by another a mean moves twice as far, and `noise` is worth what half of it is. Public are
the numbers of clients and of their images, and how training goes. Whoever sees the means over n
clients is meant, so the server that makes them is trusted, or sums securely: what it gets of one
client has 1 / n of the variance. Other clients know their own share of the noise: to all of them
together an image is hidden by the share of its client alone. Accuracies and losses in a record are
not hidden, and the noise is drawn from a named generator: this is for experiments.
"""

from __future__ import annotations

from fpl.audit.privacy import epsilon_of
from fpl.more_methods.private import DPFPL
from fpl.rounds import Training


def releases(method: DPFPL, training: Training) -> int:
    """Return in how many releases of a run one training image is at most."""
    return training.rounds * training.local_epochs * len(method.noised)


def epsilon(method: DPFPL, training: Training, delta: float) -> float:
    """Return the epsilon of one training image over a run; inf from 500 on.

    Raises ValueError where clipping bounds no image, and as `fpl.audit.privacy.epsilon_of`.
    """
    if not method.bound or method.clip_by != "image":
        said = f"bound {method.bound:g} and clip_by {method.clip_by} bound no image's gradient"
        raise ValueError(f"{said}: take a bound above 0 and clip_by image")
    return epsilon_of(method.noise, delta, releases(method, training))
