"""Promise: help, tables and figures of records, papermill and the report do not wait for torch.

What reads settings, or only gives work to others, waits for torch and not for open_clip.
"""

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
    found = imported_by(code)
    assert "fpl.data.files" in found and not {"torch", "open_clip"} & found


def imported_by(code):
    """Return the modules that are imported when a new process has run this code."""
    code = f"{code}; import sys; print(*sys.modules)"
    return {*subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split()}


def test_open_clip_is_not_loaded_before_a_clip_is():
    found = imported_by(
        "from fpl.experiments import fingerprint, runner, settings, verbs; "
        "fingerprint.code_fingerprint(settings.read().experiment('pfedmoap', 1))"
    )
    assert "torch" in found and not {"open_clip", "torchvision"} & found
