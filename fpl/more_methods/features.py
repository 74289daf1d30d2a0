"""Methods that learn on image features, without a gradient through the text tower."""

from __future__ import annotations

from fpl.methods import PromptFL

ROWS: tuple[type[PromptFL], ...] = ()
