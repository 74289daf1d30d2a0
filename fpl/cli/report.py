"""fpl report: the pages of all results."""

from fpl.cli.options import Options, Parser


def add(parser: Parser) -> None:
    """There are no options."""


def run(options: Options) -> None:
    """Build the pages of results/report from the executed notebooks."""
    from fpl.experiments import report

    print(f"report: {report.build()}")
