"""Linear maps of a frozen model.

PyTorch has two libraries for products on a CPU: `F.linear` takes MKL, which uses half of what many
AMD processors can do. oneDNN uses all of it, and is no slower elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

# PyTorch's own name for a linear map by oneDNN; None where PyTorch was built without it.
ONEDNN: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def linear(
    x: Float[Tensor, "*n i"], w: Float[Tensor, "o i"], b: Float[Tensor, " o"] | None = None
) -> Float[Tensor, "*n o"]:
    """Return x w^T + b for a frozen w and b: the gradient is x's alone."""
    single = x.dtype == w.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if ONEDNN and single and x.device.type == "cpu":
        return Frozen.apply(x, w, b)
    return F.linear(x, w, b)


class Frozen(torch.autograd.Function):
    """A linear map by oneDNN, in both directions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(w)
        return ONEDNN(x, w, b, "none", [], "")

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor, None, None]:
        (w,) = ctx.saved_tensors
        return ONEDNN(*above, w.mT, None, "none", [], ""), None, None
