"""Processes that work for this one: none outlives it, hears its Ctrl-C or runs the script again."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from types import ModuleType
from typing import Any


@contextmanager
def starting_workers() -> Iterator[None]:
    """Start processes in the block as workers that leave Ctrl-C to this process.

    A worker that is spawned would import the user's script, and with it do all that the script does
    unless that is guarded: no work of ours needs it, so it is hidden meanwhile.
    """
    script = sys.modules["__main__"]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited for good
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent() -> None:
    """In a worker: end when the process that started it is gone, also if it already is.

    Starting hands over the end of a pipe that closes with the parent. Its number, asked for here,
    may be that of whoever took its place.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "only a worker has a parent to end with"

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def begin_worker(module: str, function: str, *arguments: Any) -> None:
    """In a worker: `end_with_parent`, and only then import a module and call what it has.

    What is imported may take seconds, in which the parent may go.
    """
    end_with_parent()
    getattr(importlib.import_module(module), function)(*arguments)
