"""What the commands share: the options of settings, and name=value pairs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from fpl.experiments.settings import Settings

Options: TypeAlias = argparse.Namespace
Parser: TypeAlias = argparse.ArgumentParser


def add_settings(parser: Parser) -> None:
    """Add the options that say which settings hold."""
    parser.add_argument("--params", type=Path, help="settings file (params.yaml)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.NAME=VALUE",
        help="a setting in place of the file's, such as data.name=flowers102",
    )
    parser.add_argument(
        "--data",
        dest="on",
        default="",
        metavar="NAME",
        help="one of the file's datasets (that of its section data)",
    )


def add_fresh(parser: Parser) -> None:
    """Add the option to repeat runs."""
    what = "run again even where a record exists"
    parser.add_argument("--fresh", action="store_true", help=what)


def read_settings(options: Options) -> Settings:
    """Return the settings that --params and --set name."""
    from fpl.experiments import settings

    return settings.read(options.params, options.set)


def assignments(texts: Sequence[str], parse: Callable[[str, str], Any]) -> dict[str, Any]:
    """Return name -> value of texts such as lam=1. Raises ValueError for one without "=".

    parse: makes a value of its text and its name.
    """
    values = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"{text!r} is not of the form name=value")
        values[name] = parse(value, name)
    return values


def positive(text: str) -> int:
    """Return a whole number of at least 1; argparse makes a sentence of a ValueError."""
    if int(text) < 1:
        raise ValueError
    return int(text)
