"""fpl repro: the whole pipeline."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from fpl.cli import compare, stage
from fpl.cli.options import Options, Parser
from fpl.cli.show import notice
from fpl.data.files import ROOT, file_lock


def add(parser: Parser) -> None:
    """Add the options."""
    parser.add_argument("dvc", nargs="*", help="passed on to dvc repro")


def run(options: Options) -> None:
    """Run the DVC pipeline, then `fpl compare` where results are expected, which is in the demo.

    One at a time in a folder; what a killed one left half written is removed. Stages end with it.
    """
    stage.check_data()
    with file_lock("results/.repro.lock", waiting) as lock:
        for path in (Path(".dvc/tmp/rwlock"), Path("dvc.lock")):
            if path.exists() and not readable(path):  # DVC empties them before it writes
                path.unlink()
        here = str(Path(sys.executable).parent)  # the stages call python
        places = os.pathsep.join([here, os.environ.get("PATH", "")])
        own = {"PATH": places, "DVC_NO_ANALYTICS": "1", **stage.handed_on()}
        for module, *arguments in commands(options.dvc):
            command = [sys.executable, "-m", module, *arguments]
            if code := call(command, {**os.environ, **own}, lock):
                sys.exit(code)
    if is_demo():
        compare.run(options)


def is_demo() -> bool:
    """Return whether results are expected where we stand."""
    return Path("results/expected").exists() or Path.cwd() == ROOT


def commands(asked: Sequence[str]) -> list[list[str]]:
    """Return the modules to run, with their arguments; asked: those of dvc repro.

    All of the demo's runs are made by one sweep, in which a core waits once and not at the end of
    every table. The stages find them made. Elsewhere runs are long, and each table is to be there
    as soon as its own are.
    """
    whole = ["dvc", "repro", *asked]
    if asked or not is_demo():
        return [whole]
    return [["dvc", "repro", "features"], ["fpl.cli", "sweep"], whole]


def call(command: Sequence[str], environment: Mapping[str, str], lock: int) -> int:
    """Run a command, which holds the lock too, and return its exit status.

    An interruption ends all of it: DVC and its stages leave Ctrl-C to this process, so that one of
    them answers it.
    """
    with subprocess.Popen(
        command, env=environment, pass_fds=[lock], preexec_fn=leave_ctrl_c
    ) as process:
        try:
            return process.wait()
        except BaseException:
            stage.end_all(process.pid)
            raise


def leave_ctrl_c() -> None:
    """Ignore Ctrl-C, as do the processes that this one starts."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def waiting() -> None:
    """Say that another process holds the lock."""
    notice("another fpl is at work in this folder: waiting until it has finished")


def readable(path: Path) -> bool:
    """Return whether a YAML or JSON file of DVC's is whole enough to be a mapping."""
    import yaml

    try:
        return isinstance(yaml.safe_load(path.read_text()), dict)
    except (yaml.YAMLError, UnicodeDecodeError):
        return False
