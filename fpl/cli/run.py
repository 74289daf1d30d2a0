"""fpl run: one run of one method."""

import re
from contextlib import nullcontext
from dataclasses import replace

from fpl.cli.options import (
    Options,
    Parser,
    add_data,
    add_fresh,
    add_settings,
    check_reach,
    read_settings,
    seconds,
)
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
    parser.add_argument("changes", nargs="*", default=[], metavar="name=value", help=what)
    what = "keep what the run learns in a file beside its record, for `fpl predict`"
    parser.add_argument("--keep", action="store_true", help=what)
    what = "log every round with DVCLive, in results/live"
    parser.add_argument("--live", action="store_true", help=what)
    what = "least time between two checkpoints, from which a killed run goes on (10)"
    parser.add_argument("--checkpoint", type=seconds, metavar="SECONDS", help=what)


def run(options: Options) -> None:
    """Make one run (or find its record) and print the accuracy after the last round.

    A run that was killed goes on from its last checkpoint when it is called again. With --live, one
    that has a record is made again.
    """
    from fpl.experiments import keep, live, records, runner, stats, values

    settings = read_settings(options)
    changes = {"seed": settings.seeds[0], **values.assignments(options.changes, "name=value")}
    try:
        experiment = settings.experiment(options.method, on=options.on, **changes)
    except ValueError as error:
        if not any(SEVERAL.fullmatch(value) for value in map(str, changes.values())):
            raise
        raise ValueError(f"{error}; `fpl sweep` takes lists and ranges") from None
    check_reach(options, settings, [experiment])
    again = options.live and runner.has_record(experiment)
    asked = runner.Asked(options.fresh or again, options.keep)
    if options.checkpoint is not None:
        asked = replace(asked, every=options.checkpoint)
    with live.followed(experiment, asked) if options.live else nullcontext(asked) as told:
        (path,) = runner.sweep([experiment], asked=told)
    accuracy = stats.by_seed(records.frame([path])).iloc[0]
    found = f"{100 * accuracy:.2f} % after the last round, mean over clients"
    say(f"{options.method}: {found}; record: {path}")
    if options.keep:
        kept = path.with_suffix(keep.SUFFIX)
        say(f"what it learnt: {kept} ({kept.stat().st_size / 1e6:.1f} MB)")
