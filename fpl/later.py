"""Modules that are imported when they are first used, for what is slow and often not needed.

open_clip and torchvision take longer than torch, and whoever only reads records needs neither.
"""

from __future__ import annotations

import importlib
from typing import Any


class Later:
    """Stands for a module of this name: the first use of an attribute imports it."""

    def __init__(self, name: str):
        self.name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self.name), attribute)
