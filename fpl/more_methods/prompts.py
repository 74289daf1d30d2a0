"""Methods that learn prompts in another way than PromptFL."""

from __future__ import annotations

from fpl.methods import PromptFL

ROWS: tuple[type[PromptFL], ...] = ()
