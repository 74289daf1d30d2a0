"""fpl notebook: execute notebooks."""

from pathlib import Path

from fpl.cli.options import Options, Parser, add_set, results_of


def add(parser: Parser) -> None:
    """Add the options."""
    add_set(parser)
    which = "notebook(s) to execute, in this order"
    parser.add_argument("source", type=Path, nargs="+", help=which)
    parser.add_argument(
        "-p",
        dest="parameter",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="a parameter of the notebook",
    )


def run(options: Options) -> None:
    """Execute a notebook with papermill and keep the executed copy under results/notebooks.

    With --set it reads and writes where `fpl sweep` does with the same settings.
    """
    from fpl.experiments import notebook, values

    values.profile()
    pairs = [f"{name}={text}" for name, text in options.parameter]
    given = values.assignments(pairs, "name=value")
    with results_of(options) as results:
        for source in options.source:
            notebook.execute(source, results / "notebooks" / source.name, given)
