"""The one place that prints: whatever is shown, a terminal does not obey it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from fpl.data.text import markdown, one_line

if TYPE_CHECKING:
    from pandas import DataFrame


def say(*lines: object) -> None:
    """Print texts, a line each."""
    for line in lines:
        print(one_line(line), flush=True)


def notice(text: object) -> None:
    """Print a line that is no result of the command."""
    print(one_line(text), file=sys.stderr, flush=True)


def table(frame: DataFrame, **options: Any) -> None:
    """Print a table without its index; options are those of `DataFrame.to_markdown`."""
    print(markdown(frame, **options), flush=True)
