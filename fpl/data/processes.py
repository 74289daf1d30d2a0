"""Processes that work for this one: none outlives it, hears its Ctrl-C or runs the script again."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
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


def apart(seconds: float, module: str, function: str, *arguments: Any) -> Any:
    """Call what a module has in a process of its own, and return what it returns.

    What it reads may crash or hang a library: that ends the other process only.
    seconds: that the call may take once the module is imported

    Raises what the call raises, ChildProcessError naming the signal if the process dies, and
    TimeoutError.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    worker = context.Process(
        target=begin_worker, args=(__name__, "answer", theirs, module, function, *arguments)
    )
    with starting_workers():
        worker.start()
    theirs.close()
    try:
        ours.recv()  # the module is imported
        if not ours.poll(seconds):
            raise TimeoutError(f"gives no answer in {seconds:.0f} seconds")
        is_fine, found = ours.recv()
    except EOFError:
        worker.join()
        number = -(worker.exitcode or 0)
        how = signal.Signals(number).name if number > 0 else f"exit status {-number}"
        raise ChildProcessError(f"dies of {how}") from None
    finally:
        worker.kill()
        worker.join()
    if not is_fine:
        raise found
    return found


def answer(pipe: Connection, module: str, function: str, *arguments: Any) -> None:
    """In a worker: send that the module is there, then what its function returns or raises."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stderr.fileno())  # where C libraries say how they die
    call = getattr(importlib.import_module(module), function)
    pipe.send("ready")
    try:
        found = (True, call(*arguments))
    except Exception as error:
        error.add_note(traceback.format_exc())
        found = (False, error)
    pipe.send(found)
