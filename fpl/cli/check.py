"""fpl check: whether a method keeps the promises that all methods here keep."""

import sys

from fpl.cli.options import Options, Parser
from fpl.cli.show import say


def add(parser: Parser) -> None:
    """Add the options."""
    which = "a class of your own, my_method.py:MyMethod, or a method of the table"
    parser.add_argument("method", help=which)
    what = "settings of the method, such as lam=1"
    parser.add_argument("changes", nargs="*", default=[], metavar="name=value", help=what)


def run(options: Options) -> None:
    """Check the promises on a method, on a small random CLIP, and say which are broken.

    Each declared tensor gets a gradient, what leaves a client is exactly what the method shares,
    clients in one batch learn what they learn alone, and so on. Exit status 1 if one is broken.
    """
    from fpl.experiments import promises, settings, values

    method = settings.row_class(options.method)
    changes = values.assignments(options.changes, "name=value")
    broken = promises.check(method, changes)
    say(*broken or [f"all {len(promises.PROMISES)} promises hold"])
    if broken:
        sys.exit(1)
