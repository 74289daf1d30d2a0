"""fpl data: what data sets there are, and getting them."""

from pathlib import Path

from fpl.cli.options import Options, Parser
from fpl.cli.show import say, table


def add(parser: Parser) -> None:
    """Add the options."""
    parser.add_argument("what", choices=("list", "fetch", "check"))
    which = "a data set of `fpl data list`, or own"
    parser.add_argument("name", nargs="?", default="", help=which)
    where = "folder of data sets (data/images); for own, the CSV or folder"
    parser.add_argument("--root", type=Path, default=Path("data/images"), help=where)


def run(options: Options) -> None:
    """List the data sets, fetch one, or check what is there and what is missing."""
    from fpl.data import datasets, fetch

    if options.what == "list":
        if options.name:
            raise ValueError(f"`fpl data list` lists all: leave {options.name!r}, or call check")
        table(datasets.overview(options.root))
        return
    left = []
    if options.what == "fetch":
        say(f"terms of use: {fetch.terms(options.name)}")
        left = fetch.fetch(options.name, options.root)
    items = datasets.checklist(options.name, options.root)
    incomplete = (items["todo"] != "").any()
    if options.what == "check" and incomplete and options.name != "own":
        left = fetch.by_hand(options.name, options.root)
    table(items)
    say(*left)
