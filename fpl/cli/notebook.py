"""fpl notebook: execute notebooks."""

import logging
from pathlib import Path

from fpl.cli import stage
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

    # after Ctrl-C it would show the traceback of the cell that was left
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    values.profile()
    pairs = [f"{name}={text}" for name, text in options.parameter]
    given = values.assignments(pairs, "name=value")
    for source in options.source:
        check_notebook(source)
    # a kernel that is being started is not yet one that papermill ends
    with results_of(options) as results, stage.leaving_nothing():
        for source in options.source:
            try:
                notebook.execute(source, results / "notebooks" / source.name, given)
            except RuntimeError as e:  # as when the kernel dies
                named = str(source) in str(e)
                raise RuntimeError(e if named else f"{source}: {e}") from None


def check_notebook(path: Path) -> None:
    """Raise FileNotFoundError without the file, and ValueError if it is no notebook."""
    import warnings

    from fpl.experiments.notebook import import_quickly

    import_quickly()
    import nbformat

    if not path.is_file():
        raise FileNotFoundError(f"there is no notebook {path}")
    try:
        with warnings.catch_warnings(action="ignore"):
            nbformat.validate(nbformat.read(path, as_version=4))
    except OSError:
        raise
    except Exception as e:  # each way of being none has its own
        reason = str(e).partition("\n")[0] or type(e).__name__
        raise ValueError(f"{path} is no notebook that Jupyter reads: {reason}") from None
