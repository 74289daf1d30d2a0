"""Promise: what needs no torch does not wait for it: help, tables and figures of records, papermill, the report."""

import subprocess
import sys

import pytest
from helpers import ROOT


@pytest.mark.parametrize(
    "code",
    [
        "from fpl import cli; cli.parser().format_help()",
        "from fpl import notebook, plots, records, stats, tables; notebook.start()",
        "from fpl import ledger, notebook, plots, tables; notebook.start()",
        "from fpl import label_prior, notebook, plots; notebook.start()",
        "from fpl import given, notebook; import papermill",
        "from fpl import compare, report",
    ],
)
def test_torch_is_not_loaded(code):
    found = subprocess.check_output([sys.executable, "-c", f"{code}; import sys; print(*sys.modules)"], cwd=ROOT, text=True)
    assert "fpl.files" in found.split() and not {"torch", "open_clip"} & {*found.split()}
