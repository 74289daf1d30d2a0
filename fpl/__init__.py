"""fpl: federated prompt learning of CLIP, reproduced.

The public verbs are `load`, `features`, `split`, `train`, `save` and `restore`; their documentation
is in fpl.experiments.verbs. Importing this package loads no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fpl.experiments.verbs import (
        Model,
        Result,
        Split,
        features,
        load,
        restore,
        save,
        split,
        train,
    )

__all__ = ["Model", "Result", "Split", "features", "load", "restore", "save", "split", "train"]


def __getattr__(name: str) -> Any:
    """Load the verbs when one of them is asked for."""
    if name not in __all__:
        raise AttributeError(f"fpl has no {name!r}: it has {', '.join(__all__)}")
    from fpl.experiments import verbs

    return getattr(verbs, name)
