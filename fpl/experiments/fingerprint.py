"""What the code that makes a number looks like."""

from __future__ import annotations

import ast
import functools
import hashlib
from pathlib import Path

# the modules that make a number out of settings
SOURCES = (
    *("prompts", "state", "gate", "methods", "transport", "released/methods", "controls", "rounds", "privacy"),
    *("data/partitions", "released/splits", "data/features", "data/world", "experiments/assemble"),
)


@functools.cache
def code_fingerprint() -> str:
    """Hash of the modules that make numbers, without comments, docstrings and layout."""
    trees = [ast.parse((Path(__file__).parents[1] / f"{name}.py").read_text()) for name in SOURCES]
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return hashlib.sha256("\n".join(map(ast.dump, trees)).encode()).hexdigest()


