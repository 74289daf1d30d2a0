"""What the commands share: how arguments are read, and the options of settings."""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from fpl.data.text import one_line

if TYPE_CHECKING:
    from fpl.experiments.settings import Experiment, Settings

Options: TypeAlias = argparse.Namespace
FLAGS = {"on": "--data"}  # options whose names are not those of their values
POSITIONAL = {"what", "name", "action", "file"}


class Once(argparse.Action):
    """Stores the value of an option that may be given once."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: Options,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        given = vars(namespace).setdefault("given", set())
        if option_string and self.dest in given:
            parser.error(f"{option_string} is given twice: leave one")
        given.add(self.dest)
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """Takes options anywhere among the other arguments, and each once."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.register("action", None, Once)
        self.is_inner = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        # what stands behind -- is no option, which the other way of reading forgets
        if self._subparsers or self.is_inner or "--" in (args or ()):
            return super().parse_known_args(args, namespace)
        self.is_inner = True  # the next line calls this function again
        try:
            found, rest = self.parse_known_intermixed_args(args, namespace)
        finally:
            self.is_inner = False
        if rest:  # the parser of all commands would show its own usage
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return found, rest

    def error(self, message: str) -> NoReturn:
        super().error(one_line(message))


def add_settings(parser: Parser) -> None:
    """Add the options that say which settings hold."""
    parser.add_argument("--params", type=Path, help="settings file (params.yaml)")
    add_set(parser)


def add_data(parser: Parser) -> None:
    """Add the option to choose among the data sets of the settings."""
    parser.add_argument(
        "--data",
        dest="on",
        default="",
        metavar="NAME",
        help="one of the file's datasets (that of its section data)",
    )


def add_set(parser: Parser) -> None:
    """Add the option to change settings of the file."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.NAME=VALUE",
        help="a setting in place of the file's, such as data.name=flowers102",
    )


def add_fresh(parser: Parser) -> None:
    """Add the option to repeat runs."""
    what = "run again even where a record exists"
    parser.add_argument("--fresh", action="store_true", help=what)


def add_cluster(parser: Parser) -> None:
    """Add the option to work on a cluster."""
    what = "the address of a Dask scheduler, such as tcp://host:8786, whose workers do the work"
    parser.add_argument("--cluster", default="", metavar="ADDRESS", help=what)


def cluster_of(settings: Settings, options: Options) -> str:
    """Return the scheduler's address: of the option, else of the environment, else of the file."""
    return options.cluster or os.environ.get("FPL_CLUSTER", "") or settings.cluster


def check_read(options: Options, read: Collection[str], command: str) -> None:
    """Raise ValueError for an option on the command line that a command does not read.

    read: the names of those that it reads, as attributes of `options`
    """
    given = {
        name for name, value in vars(options).items() if value is True or name == "set" and value
    }
    unread = (given | vars(options).get("given", set())) - {*read}
    flags = sorted(FLAGS.get(name, f"--{name.replace('_', '-')}") for name in unread - POSITIONAL)
    if flags:
        raise ValueError(f"`{command}` does not read {', '.join(flags)}: leave it out")


def read_settings(options: Options) -> Settings:
    """Return the settings that --params and --set name."""
    from fpl.experiments import settings

    return settings.read(options.params, options.set)


def check_reach(options: Options, settings: Settings, runs: Sequence[Experiment]) -> None:
    """Raise ValueError for a --set of run or partition that a run has from elsewhere.

    That is from section methods, from the method itself, or from the data set.
    """
    for change in options.set:
        place, _, value = change.partition("=")
        section, _, name = place.partition(".")
        if section not in ("run", "partition") or not name:
            continue
        wanted = getattr(getattr(settings, section), name)
        for one in runs:
            if getattr(getattr(one, section), name) != wanted:
                instead = f"write {name}={value} behind the method"
                raise ValueError(f"--set {change} does nothing for {one.row}: {instead}")


@contextmanager
def results_of(options: Options) -> Iterator[Path]:
    """Give the folder of results under --set, which processes started in the block know too."""
    from fpl.experiments import places

    if not options.set:
        yield places.results()
        return
    from fpl.experiments import settings

    folder = settings.read(None, options.set).results
    with places.handed_on(folder, options.set) as results:
        yield results


def check_target(path: Path) -> Path:
    """Return the file to write, which is that behind a link.

    Raises ValueError for a name that no file can have, and OSError where none can be written.
    """
    from fpl.data.files import check_file, check_writable

    if not path.name or path.is_dir():
        raise ValueError(f"{path} is a folder: give the name of a file in it")
    check_file(path)
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    check_writable(path.parent)
    return path


def natural(text: str) -> int:
    """Return a whole number of at least 0."""
    if int(text) < 0:
        raise ValueError
    return int(text)


def positive(text: str) -> int:
    """Return a whole number of at least 1; argparse makes a sentence of a ValueError."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def seconds(text: str) -> float:
    """Return a time of at least 0 seconds."""
    if not 0 <= float(text) < float("inf"):
        raise ValueError
    return float(text)
