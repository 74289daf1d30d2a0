"""fpl sweep: all runs of some tables, or of one method with several values."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fpl.cli import show
from fpl.cli.options import (
    Options,
    Parser,
    add_cluster,
    add_data,
    add_fresh,
    add_settings,
    check_reach,
    cluster_of,
    positive,
    read_settings,
)

if TYPE_CHECKING:
    from fpl.experiments.settings import Settings


def add(parser: Parser) -> None:
    """Add the options."""
    add_settings(parser)
    add_data(parser)
    add_fresh(parser)
    add_cluster(parser)
    parser.add_argument(
        "what",
        nargs="*",
        metavar="TABLE | METHOD NAME=VALUES",
        help="tables, or notebooks for all tables of theirs (everything), or a method (also "
        "my_method.py:MyMethod) and name=values: 0,1,3 or first:last[:step], such as pfedmoap "
        "n_experts=0,1,3 lam=0:2:0.5",
    )
    kept = "of a method's runs: keep them under this name, for notebooks/05_sweep.ipynb"
    parser.add_argument("--name", default="", help=kept)
    parser.add_argument("--jobs", type=positive, help="runs at a time (the number of cores)")


def run(options: Options) -> None:
    """Make the missing runs of tables (all of params.yaml), or of a method with several values."""
    from fpl.experiments import runner
    from fpl.experiments.settings import ROWS

    settings = read_settings(options)
    first = options.what[0] if options.what else ""
    if first in ROWS or ".py:" in first:
        sweep_method(settings, options)
        return
    if options.on:
        raise ValueError(
            f"tables name their data sets in the settings file: --data {options.on} is for a method"
        )
    if options.name:
        raise ValueError(f"tables have names of their own: --name {options.name} is for a method")
    names: dict[str, None] = {}  # in the order in which they are asked for, each once
    for name in options.what or settings.tables:
        names |= dict.fromkeys(settings.tables_of(name))
    cluster = cluster_of(settings, options)
    runner.tables(settings, [*names], options.jobs, options.fresh, cluster=cluster)


def sweep_method(settings: Settings, options: Options) -> None:
    """Run a method with every combination of the values, and print a line for each."""
    from fpl.experiments import records, runner, tables, values

    if options.name and (options.name[0] == "." or Path(options.name).name != options.name):
        raise ValueError(f"--name {options.name!r} cannot be the name of a file: use letters")
    if options.name in settings.tables:
        raise ValueError(f"--name {options.name} is a table of params.yaml: take another name")
    method, *changes = options.what
    given = values.assignments(changes, "name=values")
    lists = {name: values.several(text, name) for name, text in given.items()}
    lists["seed"] = lists.pop("seed", [*settings.seeds])  # at the end: seeds change first
    every = values.combinations(lists, method)
    experiments = [settings.experiment(method, on=options.on, **chosen) for chosen in every]
    check_reach(options, settings, experiments)
    asked = runner.Asked(options.fresh, cluster=cluster_of(settings, options))
    paths = runner.sweep(experiments, options.jobs, asked)
    if options.name:
        rows = [method] * len(paths)
        records.save_index("05_sweep", options.name, paths, rows, settings.results)
    table = tables.grid(
        records.frame(paths), [name for name in lists if name != "seed"] or ["method"]
    )
    show.table(table.reset_index())
