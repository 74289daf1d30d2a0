"""fpl notebook: execute notebooks."""

from pathlib import Path

from fpl.cli.options import Options, Parser


def add(parser: Parser) -> None:
    """Add the options."""
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
    """Execute a notebook with papermill and keep the executed copy under results/notebooks."""
    from fpl.experiments import notebook, values

    given = {name: values.plain(text, name) for name, text in options.parameter}
    for source in options.source:
        notebook.execute(source, notebook.EXECUTED / source.name, given)
