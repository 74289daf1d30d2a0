"""Classes of features that were imported, and came without a model (fpl.data.foreign).

A record counts this code, as that of fpl.prompts, which it stands in for.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from fpl.prompts import PromptTree

IMPORTED = "imported"  # in the place of a model: of features that came without one
NO_TOWER = (
    "this row encodes prompts, and what was imported has no text tower: "
    "take a row that encodes none, or make the features with `fpl features`"
)
NO_TEXT = (
    "this row reads text features, and none were imported: "
    "import again with --text FILE, or take a row that reads no text"
)
SCALE = 100.0  # exp(logit_scale) of OpenAI's models, at which CLIP's training stops it
AT_ONCE = 256  # clients, where no prompt is encoded


class WithoutTower(PromptTree):
    """The classes of imported features, which have no text tower.

    Where methods read a PromptTree, this one has names, sizes, the scale and, if text features were
    imported too, these for any template. Whatever needs a text tower raises ValueError.

    names: of classes. dim: the joint width d. text: unit features of the names.
    """

    def __init__(self, names: Sequence[str], dim: int, text: Float[Tensor, "c d"] | None = None):
        nn.Module.__init__(self)
        self.names = list(names)
        self.n_cls = len(self.names)
        self.dim = dim
        self.scale = SCALE
        self.text = text

    @property
    def at_once(self) -> int:
        """How many clients may train as one batch."""
        return AT_ONCE

    @property
    def width(self) -> int:
        """There is no width of a prompt: raise ValueError."""
        raise ValueError(NO_TOWER)

    def zero_shot(self, template: str = "") -> Float[Tensor, "c d"]:
        """Return the text features that were imported, which the template does not change."""
        if self.text is None:
            raise ValueError(NO_TEXT)
        return self.text

    def words(self, text: str) -> Tensor:
        """Raise ValueError."""
        raise ValueError(NO_TOWER)

    def forward(self, ctx: Tensor) -> Tensor:
        """Raise ValueError."""
        raise ValueError(NO_TOWER)
