"""Promise: what needs no torch does not wait for it: help, tables and figures of records, papermill, the report."""

import subprocess
import sys

import pytest
from helpers import ROOT


@pytest.mark.parametrize(
    "code",
    [
        "from fpl import cli; cli.parser().format_help()",
        "from fpl.experiments import notebook, plots, records, stats, tables; notebook.start()",
        "from fpl.audit import ledger; from fpl.experiments import notebook, plots, tables; notebook.start()",
        "from fpl.audit import label_prior; from fpl.experiments import notebook, plots; notebook.start()",
        "from fpl.experiments import values, notebook; import papermill",
        "from fpl.experiments import expected, report",
    ],
)
def test_torch_is_not_loaded(code):
    found = subprocess.check_output([sys.executable, "-c", f"{code}; import sys; print(*sys.modules)"], cwd=ROOT, text=True)
    assert "fpl.data.files" in found.split() and not {"torch", "open_clip"} & {*found.split()}
