"""Text from outside, such as names in files: written so that nothing obeys it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame

ACTIVE = re.compile(r"[\\`|<\[&]")  # in a cell of Markdown: escapes, code, columns, HTML, links


def one_line(text: object) -> str:
    r"""Return text as one line that a terminal shows and does not obey.

    Line breaks become spaces. What is not printable is written as Python does: \x1b for the escape
    that begins a terminal's commands, \u202e for the one that turns the direction of writing.
    """
    joined = re.sub(r"[\r\n]+\s*", " ", str(text))
    shown = [c if c.isprintable() else c.encode("unicode_escape").decode() for c in joined]
    return "".join(shown)


def cell(value: Any) -> Any:
    """Return text as Markdown that shows it in the cell of a table, anything else as it is."""
    if isinstance(value, str):
        return ACTIVE.sub(r"\\\g<0>", one_line(value))
    return value


def markdown(frame: DataFrame, **options: Any) -> str:
    """Return a table in Markdown, without its index; texts like "1e5" are no numbers.

    options: those of `DataFrame.to_markdown`.
    """
    shown = frame.map(cell).rename(columns=cell)
    words = shown.map(lambda value: isinstance(value, str)).any()
    texts = [position for position, has_words in enumerate(words) if has_words]
    return shown.to_markdown(**{"disable_numparse": texts, "index": False, **options})
