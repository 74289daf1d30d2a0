"""fpl plan: what a profile takes before it runs."""

import sys

from fpl.cli.options import Options, Parser, add_settings, read_settings
from fpl.cli.show import say, table


def add(parser: Parser) -> None:
    """Add the options."""
    add_settings(parser)
    what = "get weights that are missing; exit status 1 if anything else is"
    parser.add_argument("--check", action="store_true", help=what)
    parser.add_argument(
        "--no-calibration",
        dest="calibration",
        action="store_false",
        help="measure nothing, estimate no hours",
    )


def run(options: Options) -> None:
    """Say what a profile needs, what of it is there, its runs, and how long they take here.

    With --check weights are downloaded where they are missing, and the exit status is 1 if anything
    else is.
    """
    from fpl.bench import plan
    from fpl.experiments import cache

    settings = read_settings(options)
    needs = plan.needs(settings, fetch=options.check)
    for part in (needs.drop(columns="todo"), plan.disk(settings)):
        table(part, floatfmt=".3g")
        say("")
    if options.calibration:
        stages = plan.stages(settings, plan.calibrate(settings))
        duration = f"about {stages['hours'].sum():.1f} hours on this machine ({cache.device()})"
    else:
        stages = plan.stages(settings).drop(columns="hours")
        duration = "no hours estimated"
    shown = stages.astype(object).where(stages.notna(), None)
    table(shown, floatfmt=".3g", missingval="-")
    left = (stages["number"] - stages["there"]).sum()
    work = f"{stages['PFLOP'].sum():.3g} PFLOP of the text tower"
    say("", f"{left} files and runs to make: {duration}, {work}", "")
    missing = [todo for todo in needs["todo"] if todo]
    count = f"{len(missing)} things are missing" if missing else "nothing is missing"
    say(*missing, count)
    if options.check and missing:
        sys.exit(1)
