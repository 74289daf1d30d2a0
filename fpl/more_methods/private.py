"""Methods whose steps draw something at random: dropout, or noise that hides an image."""

from __future__ import annotations

from fpl.methods import PromptFL

ROWS: tuple[type[PromptFL], ...] = ()
