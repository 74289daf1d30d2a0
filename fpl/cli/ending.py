"""How a command ends: in one sentence, whatever goes wrong and however often it is interrupted."""

from __future__ import annotations

import os
import re
import select
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from fpl.cli.show import notice
from fpl.cli.stage import PATIENCE, belongs_to_pipeline
from fpl.data.text import one_line

STOPPED = "stopped; call the same command again to go on"
# What says in a sentence what a user can mend, and what is of these kinds but says it to nobody.
SENTENCES = (ValueError, FloatingPointError, OSError, RuntimeError)
OURS = (UnicodeError, RecursionError, NotImplementedError)
NOBODY_READS = 141  # exit status of a program that ends because its output is read no more


@contextmanager
def one_sentence(name: str, arguments: Sequence[str]) -> Iterator[None]:
    """Run a block; what it raises becomes a SystemExit with one sentence, warnings become lines.

    name: of the command, with which sentences begin. arguments: for a report of an error of ours.
    """
    asked: list[float] = []

    def show(message: object, *where: object, **more: object) -> None:
        notice(f"{name}: {one_line(message)}")

    with interruptible(asked), warnings.catch_warnings():
        warnings.showwarning = show
        try:
            yield
            flush()
        except SystemExit:  # of argparse, whose help may have no reader either
            give_up_output()
            raise
        except BaseException as error:
            unread = isinstance(error, BrokenPipeError) and nobody_reads()
            give_up_output()
            if asked or isinstance(error, KeyboardInterrupt):
                sys.exit(1 if belongs_to_pipeline() else STOPPED)  # which says it for all
            if unread:
                sys.exit(NOBODY_READS)
            sys.exit(f"{name}: {sentence(error, arguments)}")


@contextmanager
def interruptible(asked: list[float]) -> Iterator[None]:
    """Let Ctrl-C, or a request to terminate, raise KeyboardInterrupt in the block, but once.

    asked: takes the times at which it was asked for. When it is again long after the first time,
    this process ends at once. A child that is forked in the block leaves Ctrl-C to this process,
    and a stage of the pipeline to `fpl repro`, which then asks it to terminate.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main one hears signals
        return
    process = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        asked.append(time.monotonic())
        if len(asked) == 1:
            raise KeyboardInterrupt
        if asked[-1] - asked[0] > PATIENCE:
            os._exit(128 + number)

    heard = [signal.SIGTERM] if belongs_to_pipeline() else [signal.SIGINT, signal.SIGTERM]
    before = {number: signal.signal(number, stop) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if asked else handler)


def flush() -> None:
    """Write out what was printed; standard output may be closed."""
    if sys.stdout:
        sys.stdout.flush()


def nobody_reads() -> bool:
    """Return whether standard output is a pipe that was closed at its other end."""
    output = select.poll()
    output.register(sys.stdout, 0)  # errors are reported without being asked for
    return bool(output.poll(0))


def give_up_output() -> None:
    """Where standard output cannot be written, keep Python from complaining of it at its end."""
    try:
        flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def sentence(error: BaseException, arguments: Sequence[str]) -> str:
    """Return one line that says what went wrong, where, and what to do."""
    import traceback

    kind = type(error).__name__
    told = one_line(error)
    details = "".join(traceback.format_exception(error))
    own = place_in_own(details)
    if own:
        return f"{own}: {kind}: {told}"
    if isinstance(error, MemoryError):
        return f"memory ran out ({told or kind}): ask for less at a time, or free some"
    if isinstance(error, FileExistsError | NotADirectoryError) and error.filename:
        return f"{told}: move away the file that stands where a folder must be"
    if isinstance(error, SENTENCES) and not isinstance(error, OURS) and told:
        return told
    files = own_files()
    path = written(f"fpl {' '.join(arguments)}\nPython {sys.version}\n\n{details}")
    if files:
        return (
            f"{', '.join(files)} may give back what a method must not ({kind}: {told}): "
            f"`fpl check` says which promise it breaks, the file {path} where that was noticed"
        )
    return (
        f"this is an error of ours ({kind}: {told}): please report it on the issue page of the "
        f"repository that you have fpl from, with the file {path}"
    )


def place_in_own(details: str) -> str:
    """Return where in a file of the user's own methods a traceback ends, "" if it has none."""
    files = own_files()
    for file, line, function in re.findall(r'File "(.+?)", line (\d+), in (.+)', details)[::-1]:
        if file in files:
            return f"{file}, line {line}, in {function}"
    return ""


def own_files() -> list[str]:
    """Return the files of the user's own methods that are loaded."""
    begin = getattr(sys.modules.get("fpl.experiments.settings"), "OWN", "")
    loaded = [module for name, module in sys.modules.items() if begin and name.startswith(begin)]
    return sorted(module.__file__ or "" for module in loaded)


def written(details: str) -> Path:
    """Write the details of an error of ours, and return where they are."""
    import tempfile

    path = Path("results/error.txt")
    try:
        path.write_text(details)
    except OSError:
        descriptor, name = tempfile.mkstemp(".txt", "fpl_error_")
        os.close(descriptor)
        path = Path(name)
        path.write_text(details)
    return path
