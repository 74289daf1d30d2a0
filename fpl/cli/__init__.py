"""The command line: `fpl COMMAND --help` says what each command takes.

Each command stands in a file of its own: `add` declares its options, `run` does the work. Heavy
libraries are imported where they are used, so that help comes at once.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from fpl.cli import stage
from fpl.cli.ending import one_sentence

if TYPE_CHECKING:
    from fpl.cli.options import Options, Parser

# Modules of this package, in the order of the help.
COMMANDS = (
    "data",
    "features",
    "run",
    "sweep",
    "predict",
    "export",
    "check",
    "notebook",
    "report",
    "compare",
    "accept",
    "bench",
    "plan",
    "repro",
)
# These run one at a time: an orphan of a killed pipeline may still be at one.
STAGES = ("features", "sweep", "notebook", "report")
MAKING = ("features", "sweep")  # those that make features and runs, of the data in the settings


def parser() -> Parser:
    """Return the parser of all commands; the docstring of `run` is a command's help."""
    import inspect

    from fpl.cli.options import Parser

    title = "Companion to federated prompt learning of CLIP: cached features, methods, tables."
    top = Parser(prog="fpl", description=title)
    commands = top.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name in COMMANDS:
        module = importlib.import_module(f"fpl.cli.{name}")
        text = inspect.getdoc(module.run) or ""
        command = commands.add_parser(name, help=text.split("\n")[0], description=text)
        command.set_defaults(run=module.run)
        module.add(command)
    return top


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command. What a user can mend ends in one sentence and exit status 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # beside another busy process, threads that spin while they wait take ten times as long
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    named = [argument for argument in arguments if argument in COMMANDS]
    with one_sentence(" ".join(["fpl", *named[:1]]), arguments):
        options = parser().parse_args(arguments)
        stage.end_with_pipeline()
        if stage.DVC in os.environ and options.command in MAKING:
            stage.check_data()
        with at_work(options) if options.command in STAGES else nullcontext():
            options.run(options)


def at_work(options: Options) -> AbstractContextManager[object]:
    """Hold the lock of the commands that run one at a time; leave nothing where no profile is."""
    from fpl.cli.repro import waiting
    from fpl.data.files import file_lock
    from fpl.experiments.values import PROFILES

    if not vars(options).get("params") and not any(path.exists() for path in PROFILES):
        return nullcontext()
    return file_lock("results/.stage.lock", waiting)
