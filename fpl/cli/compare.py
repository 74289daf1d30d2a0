"""fpl compare: fresh tables against the expected ones of the repository."""

from fpl.cli.options import Options, Parser
from fpl.cli.show import say, table

PLACES = {"tables and figures": "results/tables", "report": "results/report/index.html"}


def add(parser: Parser) -> None:
    """There are no options."""


def run(options: Options) -> None:
    """Compare fresh tables with results/expected, and fail if a cell is outside its tolerance."""
    from fpl.experiments import expected, tables

    cells = expected.all_cells(tables.TABLES)
    table(cells.round(2))
    wrong = int((cells["verdict"] != "same").sum())
    right = f"{len(cells) - wrong} of {len(cells)} cells are the expected ones"
    say("", f"{right} within their tolerance, {wrong} are not.")
    for what, where in PLACES.items():
        say(f"{what + ':':20}{where}")
    if wrong:
        differ = "the results differ from those in results/expected"
        raise ValueError(f"{differ}: see the verdict column above")
