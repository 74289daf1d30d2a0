"""fpl report: the pages of all results."""

from fpl.cli.options import Options, Parser, add_set, results_of
from fpl.cli.show import say


def add(parser: Parser) -> None:
    """Add the options."""
    add_set(parser)


def run(options: Options) -> None:
    """Build the pages of results/report from the executed notebooks, or of theirs with --set."""
    from fpl.experiments.notebook import import_quickly

    import_quickly()
    from fpl.experiments import report, values

    values.profile()
    with results_of(options) as results:
        places = [results / name for name in ("notebooks", "report", "tables")]
        say(f"report: {report.build(*places)}")
