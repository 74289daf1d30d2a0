"""What the notebooks need around their prose: a place to stand, parameters that cannot be misspelt, and their execution."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fpl.data.files import ROOT, atomic_write
from fpl.experiments import values

EXECUTED = Path("results/notebooks")


def start() -> None:
    """Go to the profile, wherever Jupyter or papermill was started, and take on the figures' style.

    A profile is a folder with a params.yaml: the nearest one at or above where we stand, or else the project's root.
    """
    import pandas as pd

    from fpl.experiments import plots

    here = Path.cwd()
    os.chdir(next((folder for folder in (here, *here.parents) if (folder / "params.yaml").exists()), ROOT))
    pd.options.display.max_colwidth = None
    plots.style()


def parameters(namespace: dict[str, Any], known: set[str]) -> dict[str, Any]:
    """The notebook's parameters: every public name that the cells so far have set to a plain value.

    papermill only warns of a parameter that the notebook does not have; here it is an error that names the nearest one.
    Parameters that are None are left out: the default stands where the value is used. Raises ValueError.
    """
    plain = (type(None), bool, int, float, str, list, dict)
    namespace.setdefault("_names_at_first", {*namespace})  # a cell may be run again: names that came later are no parameters
    eligible = (namespace["_names_at_first"] | known) - {"In", "Out"}
    found = {k: v for k, v in namespace.items() if k in eligible and not k.startswith("_") and isinstance(v, plain)}
    for name in found:
        values.check_choice(name, sorted(known), "notebook parameter")
    return {k: v for k, v in found.items() if v is not None}


def execute(source: Path, target: Path, values: Mapping[str, Any] | None = None) -> Path:
    """Run a notebook with papermill, from where we stand; the executed copy is written without times and absolute paths.

    Raises ValueError for a parameter that the notebook does not declare, and papermill's error, with the executed cells kept in
    `target`, when a cell fails.
    """
    import nbformat
    import papermill

    declared = papermill.inspect_notebook(str(source))
    for name in values or {}:
        values.check_choice(name, list(declared), f"parameter of {source.name}")
    target.parent.mkdir(parents=True, exist_ok=True)
    papermill.execute_notebook(str(source), str(target), dict(values or {}), kernel_name="python3", progress_bar=True)
    book = nbformat.read(target, as_version=4)
    book.metadata.pop("papermill", None)
    for i, cell in enumerate(book.cells):
        cell.id = f"c{i}"
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        if "outputs" in cell:
            bar = "application/vnd.jupyter.widget-view+json"
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr" and bar not in o.get("data", {})]
    with atomic_write(target) as temporary:
        nbformat.write(book, temporary)
    return target
