"""Promise: help, tables and figures of records, papermill and the report do not wait for torch."""

import subprocess
import sys

import pytest
from helpers import ROOT


@pytest.mark.parametrize(
    "code",
    [
        "from fpl import cli; cli.parser().format_help()",
        "from fpl.audit import label_prior, ledger; from fpl.experiments import expected, report; "
        "from fpl.experiments import notebook, plots, records, stats, tables, values; "
        "notebook.start(); import papermill",
    ],
)
def test_torch_is_not_loaded(code):
    found = subprocess.check_output(
        [sys.executable, "-c", f"{code}; import sys; print(*sys.modules)"], cwd=ROOT, text=True
    )
    assert "fpl.data.files" in found.split() and not {"torch", "open_clip"} & {*found.split()}
