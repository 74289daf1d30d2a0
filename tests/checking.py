"""The type checker of the tests: shapes and types are as annotated, but for the text tower.

Whatever encodes prompts may stand in for a PromptTree: in tests, and in `fpl bench`. This is not
in `helpers`, which itself imports what is checked.
"""

import sys
from typing import Any

from beartype import BeartypeConf, FrozenDict, beartype


def check(annotated):
    """Return the function with its annotations checked at every call."""
    tree = getattr(sys.modules.get("fpl.prompts"), "PromptTree", None)
    overrides = FrozenDict({tree: Any} if tree else {})
    return beartype(conf=BeartypeConf(hint_overrides=overrides))(annotated)
