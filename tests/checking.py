"""The type checker of the tests: shapes and types are as annotated, but for the text tower.

Whatever encodes prompts may stand in for a PromptTree: in tests, and in `fpl bench`. This is not
in `helpers`, which itself imports what is checked.
"""

import functools
import sys
from typing import Any

import jaxtyping
from beartype import BeartypeConf, FrozenDict, beartype

# Checks in a test. Rounds are alike, and to check each step takes a quarter of a long run's time.
MOST = 3000
made = 0


def begin():
    """Check from the beginning again, as at the start of a test."""
    global made
    made = 0
    jaxtyping.config.update("jaxtyping_disable", False)


def check(annotated):
    """Return the function with its annotations checked, until there have been enough checks."""
    tree = getattr(sys.modules.get("fpl.prompts"), "PromptTree", None)
    overrides = FrozenDict({tree: Any} if tree else {})
    checked = beartype(conf=BeartypeConf(hint_overrides=overrides))(annotated)

    @functools.wraps(annotated)
    def counted(*args, **named):
        global made
        made += 1
        if made == MOST:
            jaxtyping.config.update("jaxtyping_disable", True)
        return checked(*args, **named)

    return counted
