"""fpl run: one run of one method."""

from fpl.cli.options import Options, Parser, add_fresh, add_settings, assignments, read_settings


def add(parser: Parser) -> None:
    """Add the options."""
    add_settings(parser)
    add_fresh(parser)
    which = "a row of the table, such as promptfl, or a class of your own: my_method.py:MyMethod"
    parser.add_argument("method", help=which)
    what = "settings to change, such as lam=1 seed=2"
    parser.add_argument("changes", nargs="*", metavar="name=value", help=what)


def run(options: Options) -> None:
    """Make one run (or find its record) and print the accuracy after the last round."""
    from fpl.experiments import records, runner, stats, values

    settings = read_settings(options)
    changes = assignments(options.changes, values.plain)
    seed = values.number(changes.pop("seed", settings.seeds[0]), "int", "seed")
    experiment = settings.experiment(options.method, int(seed), options.on, **changes)
    (path,) = runner.sweep([experiment], fresh=options.fresh)
    accuracy = stats.by_seed(records.frame([path])).iloc[0]
    found = f"{100 * accuracy:.2f} % after the last round, mean over clients"
    print(f"{options.method}: {found}; record: {path}")
