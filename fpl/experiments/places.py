"""Where results are kept: in `results`, or in a folder of their own for other data than the file's.

`fpl notebook --set` hands that folder, and the settings, on to the process of the notebook.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

# Variables of the environment, by which a notebook's process is told.
RESULTS = "FPL_RESULTS"
CHANGES = "FPL_SET"


def results() -> Path:
    """Return the folder of tables, figures, executed notebooks and their report."""
    return Path(os.environ.get(RESULTS, "results"))


def changes() -> list[str]:
    """Return the settings of the command line that this process was started with."""
    return json.loads(os.environ.get(CHANGES, "[]"))


@contextmanager
def handed_on(folder: str, settings: Sequence[str]) -> Iterator[Path]:
    """Let processes that are started in the block keep results in a folder, under settings."""
    told = {RESULTS: folder, CHANGES: json.dumps([*settings])}
    before = {name: os.environ.get(name) for name in told}
    os.environ.update(told)
    try:
        yield results()
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
