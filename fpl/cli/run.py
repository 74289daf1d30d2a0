"""fpl run: one run of one method."""

import re

from fpl.cli.options import Options, Parser, add_data, add_fresh, add_settings, read_settings
from fpl.cli.show import say

# What `fpl sweep` would take for several values.
SEVERAL = re.compile(r"[-+.\w]+([:,][-+.\w]+)+")


def add(parser: Parser) -> None:
    """Add the options."""
    add_settings(parser)
    add_data(parser)
    add_fresh(parser)
    which = "a row of the table, such as promptfl, or a class of your own: my_method.py:MyMethod"
    parser.add_argument("method", help=which)
    what = "settings to change, such as lam=1 seed=2"
    parser.add_argument("changes", nargs="*", metavar="name=value", help=what)


def run(options: Options) -> None:
    """Make one run (or find its record) and print the accuracy after the last round."""
    from fpl.experiments import records, runner, stats, values

    settings = read_settings(options)
    changes = {"seed": settings.seeds[0], **values.assignments(options.changes, "name=value")}
    try:
        experiment = settings.experiment(options.method, on=options.on, **changes)
    except ValueError as error:
        if not any(SEVERAL.fullmatch(value) for value in map(str, changes.values())):
            raise
        raise ValueError(f"{error}; `fpl sweep` takes lists and ranges") from None
    (path,) = runner.sweep([experiment], fresh=options.fresh)
    accuracy = stats.by_seed(records.frame([path])).iloc[0]
    found = f"{100 * accuracy:.2f} % after the last round, mean over clients"
    say(f"{options.method}: {found}; record: {path}")
