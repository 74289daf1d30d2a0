"""The command line: `fpl COMMAND --help` says what each command takes.

Each command stands in a file of its own: `add` declares its options, `run` does the work. Heavy
libraries are imported where they are used, so that help comes at once.
"""

import argparse
import inspect
import sys
from collections.abc import Sequence
from contextlib import nullcontext

from fpl.cli import (
    accept,
    bench,
    check,
    compare,
    data,
    features,
    notebook,
    plan,
    report,
    repro,
    run,
    sweep,
)
from fpl.data.files import file_lock

COMMANDS = (
    data,
    features,
    run,
    sweep,
    check,
    notebook,
    report,
    compare,
    accept,
    bench,
    plan,
    repro,
)
# These run one at a time: an orphan of a killed pipeline may still be at one.
STAGES = ("features", "sweep", "notebook", "report")


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; the docstring of `run` is a command's help."""
    title = "Companion to federated prompt learning of CLIP: cached features, methods, tables."
    top = argparse.ArgumentParser(prog="fpl", description=title)
    commands = top.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for module in COMMANDS:
        name = module.__name__.rpartition(".")[2]
        text = inspect.getdoc(module.run) or ""
        command = commands.add_parser(name, help=text.split("\n")[0], description=text)
        command.set_defaults(run=module.run)
        module.add(command)
    return top


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command. What a user can mend ends in one sentence and exit status 1."""
    options = parser().parse_args(arguments)
    try:
        stage = options.command in STAGES
        with file_lock("results/.stage.lock", repro.waiting) if stage else nullcontext():
            options.run(options)
    except (ValueError, FloatingPointError, OSError, RuntimeError) as error:
        sys.exit(f"fpl {options.command}: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; call the same command again to go on")
