"""What notebooks need around their prose: a place to stand, parameters, and their execution."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

from fpl.data.files import ROOT, atomic_write
from fpl.experiments.places import results
from fpl.experiments.values import PROFILES, check_choice, plain

EXECUTED = results() / "notebooks"
TABLES = results() / "tables"
# What a parameter of a notebook may be.
PLAIN = (type(None), bool, int, float, str, list, dict)
PROGRESS_BAR = "application/vnd.jupyter.widget-view+json"


def start() -> None:
    """Go to the profile, wherever Jupyter or papermill was started, and use the figures' style.

    The profile is the nearest folder at or above where we stand that has settings, all of them or
    what differs; without one, it is the project's root.
    """
    import pandas as pd

    from fpl.experiments import plots

    here = Path.cwd()
    for folder in (here, *here.parents, ROOT):
        if any((folder / name).exists() for name in PROFILES):
            os.chdir(folder)
            break
    pd.options.display.max_colwidth = None
    plots.style()


def parameters(namespace: dict[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Return the notebook's parameters: the public names that its first cells have set.

    papermill only warns of a parameter that the notebook does not have; here it is a ValueError
    that names the nearest of the `known` ones. Parameters that are None are left out: the default
    stands where the value is used.
    """
    # a cell may be run again: names that came later are no parameters
    first = namespace.setdefault("_names_at_first", {*namespace})
    eligible = first.union(known) - {"In", "Out"}
    found = {}
    for name, value in namespace.items():
        if name in eligible and not name.startswith("_") and isinstance(value, PLAIN):
            found[name] = value
    for name in found:
        check_choice(name, sorted(known), "notebook parameter")
    return {name: value for name, value in found.items() if value is not None}


def execute(source: Path, target: Path, given: Mapping[str, Any] | None = None) -> Path:
    """Run a notebook with papermill, from where we stand, and return `target`, its executed copy.

    given: parameters; text for one whose default is a number or a list is read as such.
    The copy has neither times nor absolute paths. The notebook's folder of tables and figures is
    made. Raises ValueError for a parameter that the notebook does not declare, and RuntimeError,
    with the executed cells kept in `target`, when a cell fails.
    """
    import_quickly()
    import nbformat
    import papermill

    declared = papermill.inspect_notebook(str(source))
    passed = {}
    for name, value in (given or {}).items():
        check_choice(name, list(declared), f"parameter of {source.name}")
        passed[name] = as_declared(value, declared[name]["default"], name)
    target.parent.mkdir(parents=True, exist_ok=True)
    (results() / "tables" / source.stem).mkdir(parents=True, exist_ok=True)
    try:
        papermill.execute_notebook(
            str(source),
            str(target),
            passed,
            kernel_name="python3",
            shutdown_kernel="immediate",  # which has nothing left to do, and would take two seconds
        )
    except papermill.PapermillExecutionError as error:
        raise RuntimeError(
            f"{source}, cell [{error.exec_count}]: {error.ename}: {error.evalue} "
            f"({target} has the cells up to there)"
        ) from None
    book = nbformat.read(target, as_version=4)
    book.metadata.pop("papermill", None)
    for i, cell in enumerate(book.cells):
        cell.id = f"c{i}"
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if is_result(output)]
    with atomic_write(target) as temporary:
        nbformat.write(book, temporary)
    return target


def import_quickly() -> None:
    """Keep jsonschema, which nbformat imports, from building a grammar of addresses for seconds.

    It does without where the grammar's package is not there, and notebooks have no such field.
    """
    sys.modules.setdefault("rfc3987_syntax", cast(Any, None))


def as_declared(value: Any, default: str, where: str) -> Any:
    """Return a parameter's value, of which text is read where the default is neither text nor None.

    default: as it stands in the notebook. Raises ValueError for text that is no YAML then.
    """
    if not isinstance(value, str) or default == "None" or default[:1] in "\"'":
        return value
    return plain(value, where)


def is_result(output: Mapping[str, Any]) -> bool:
    """Return whether an output of a cell is neither a warning nor a progress bar."""
    return output.get("name") != "stderr" and PROGRESS_BAR not in output.get("data", {})
