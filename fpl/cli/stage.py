"""A command as a stage of the pipeline: ends with what started it, and checks before it works."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import psutil

PIPELINE = "FPL_REPRO"  # variable of the environment: number and start of `fpl repro`
DVC = "DVC_STAGE"  # variable that DVC sets: the stage's name
SAME = 60.0  # seconds by which the start of one process may differ after the clock was corrected
OFTEN = 0.5  # seconds between two looks at a process
PATIENCE = 5.0  # seconds that an interrupted command has to end by itself


def handed_on() -> dict[str, str]:
    """Return the variable that tells the stages which process they belong to."""
    import psutil

    return {PIPELINE: f"{os.getpid()} {psutil.Process().create_time()}"}


def belongs_to_pipeline() -> bool:
    """Return whether `fpl repro` started this command."""
    return PIPELINE in os.environ


def end_with_pipeline() -> None:
    """End this process when the `fpl repro` that started it is gone.

    Raises RuntimeError if it already is.
    """
    if not belongs_to_pipeline():
        return
    pipeline = pipeline_of(os.environ[PIPELINE])
    if pipeline is None:
        raise RuntimeError("the `fpl repro` that this belongs to is gone: call it again")

    def watch() -> None:
        while is_at_work(pipeline):
            time.sleep(OFTEN)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def pipeline_of(told: str) -> psutil.Process | None:
    """Return the process that the variable names, None if it is gone.

    A number is given to another process in time, which then has another start.
    Raises ValueError for what `handed_on` does not write.
    """
    import psutil

    try:
        number, start = told.split()
        process = psutil.Process(int(number))
        is_same = abs(process.create_time() - float(start)) < SAME
    except (ValueError, OverflowError):
        raise ValueError(f"{PIPELINE} is set to {told!r}, by no `fpl repro`: unset it") from None
    except psutil.NoSuchProcess:
        return None
    return process if is_same and is_at_work(process) else None


def is_at_work(process: psutil.Process) -> bool:
    """Return whether a process lives; one that ended unnoticed by its parent does not."""
    import psutil

    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end_all(number: int) -> None:
    """End a process at once, and its descendants as `end` does.

    It is held first, so that it starts no other meanwhile.
    """
    import psutil

    try:
        top = psutil.Process(number)
        top.suspend()
        below = top.children(recursive=True)
        top.kill()
    except psutil.NoSuchProcess:
        return
    end(below)


@contextmanager
def leaving_nothing() -> Iterator[None]:
    """End the processes that were started in the block, and theirs, where it does not end well."""
    import psutil

    this = psutil.Process()
    before = this.children(recursive=True)
    try:
        yield
    except BaseException:
        now = this.children(recursive=True)
        end([process for process in now if process not in before])
        raise


def end(processes: Sequence[psutil.Process]) -> None:
    """Ask processes to terminate, and kill those that are at work after some seconds."""
    tell(processes, "terminate")
    last = time.monotonic() + PATIENCE
    while any(map(is_at_work, processes)) and time.monotonic() < last:
        time.sleep(OFTEN / 10)
    tell(processes, "kill")


def tell(processes: Sequence[psutil.Process], what: str) -> None:
    """Call `terminate` or `kill` of those that are there."""
    import psutil

    for process in processes:
        with suppress(psutil.NoSuchProcess):
            getattr(process, what)()


def check_data() -> None:
    """Raise ValueError unless the settings have the data sets that the stages here make."""
    from fpl.experiments import values

    profile = values.profile()
    pipeline = Path("dvc.yaml")
    made = made_by(values.load(pipeline)) if pipeline.exists() else set()
    if not made:
        return
    from fpl.experiments import settings

    read = settings.read()
    missing = made - {read.source(name).data.name for name in ("", *read.datasets)}
    if missing:
        raise ValueError(
            f"the stages of {pipeline} are the demo's and make {', '.join(sorted(missing))}, which "
            f"{profile} no longer has: call `fpl features`, `fpl run` and `fpl sweep` for "
            "other data, or correct its data.name"
        )


def made_by(pipeline: Mapping[str, Any]) -> set[str]:
    """Return the data sets that the stage `features` makes: each has the list of its images."""
    node: Any = pipeline
    for name in ("stages", "features", "outs"):
        node = node.get(name) if isinstance(node, dict) else None
    outs = node if isinstance(node, list) else []  # DVC says what is wrong with others
    paths: list[Path] = []
    for out in outs:
        paths += map(Path, out if isinstance(out, dict) else [str(out)])
    return {path.parent.name for path in paths if path.name == "manifest.csv"}
