"""Every notebook is committed without outputs and runs from top to bottom; a misspelt parameter is an error."""

import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from fpl import config, notebook, records

BOOKS = sorted(Path(notebook.ROOT, "notebooks").glob("*.ipynb"))
SMALL = """
data: {name: shapes, seed: 1, train_per_class: 4, test_per_class: 2}
partition: {clients: 4, shots: 2}
run: {rounds: 1, local_epochs: 1}
seeds: [1, 2]
methods: {zeroshot: {}, coop: {}, promptfl: {}, pfedmoap: {n_experts: 2}}
tables:
  table1: {}
  n_experts: {rows: [pfedmoap], vary: {n_experts: [0, 1, 2]}}
  d_gate: {rows: [pfedmoap], vary: {d_gate: [32, 128]}}
  lam: {rows: [pfedmoap], vary: {lam: [0, 0.5, 1]}}
"""
QUICK = {"00_tour": {"clients": 4}, "03_methods": {"rounds": 2}, "20_label_prior": {"null_seeds": 5}}


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of the project with tiny settings, its features and runs made by the command line."""
    root = tmp_path_factory.mktemp("project")
    for name in ("fpl", "notebooks", "data/demo_clip", "data/label_prior"):
        shutil.copytree(notebook.ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(notebook.ROOT / "data" / "published.csv", root / "data")
    (root / "params.yaml").write_text(SMALL)
    for command in (["features", "--patches"], ["sweep"]):
        run(root, *command)
    return root


def run(root: Path, *command: str) -> subprocess.CompletedProcess:
    done = subprocess.run([sys.executable, "-m", "fpl.cli", *command], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.parametrize("book", BOOKS, ids=lambda b: b.stem)
def test_runs_from_top_to_bottom(project, book):
    values = [word for name, value in QUICK.get(book.stem, {}).items() for word in ("-p", name, str(value))]
    run(project, "notebook", f"notebooks/{book.name}", *values)
    executed = nbformat.read(project / "results" / "notebooks" / book.name, as_version=4)
    code = [cell for cell in executed.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert str(project) not in nbformat.writes(executed)


@pytest.mark.parametrize("book", BOOKS, ids=lambda b: b.stem)
def test_committed_without_outputs_and_defines_nothing(book):
    cells = nbformat.read(book, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert [cell.id for cell in cells] == [str(i) for i in range(len(cells))]
    assert "def " not in "\n".join(cell.source for cell in code if "class Watched" not in cell.source)


def test_run_notebook_makes_the_record_that_the_command_line_finds(project):
    run(project, "notebook", "notebooks/04_run.ipynb", "-p", "method", "promptfl", "-p", "seed", "5")
    (path,) = (project / "results" / "records").glob("promptfl-5-*.json")
    accuracy = records.frame([path]).query("round == round.max()")["accuracy"].mean()
    said = run(project, "run", "promptfl", "seed=5").stdout
    assert path.name in said and f"{100 * accuracy:.2f} %" in said
    assert len(list((project / "results" / "records").glob("promptfl-5-*.json"))) == 1


def test_misspelt_parameter_is_refused_by_the_command_line(project):
    done = subprocess.run(
        [sys.executable, "-m", "fpl.cli", "notebook", "notebooks/04_run.ipynb", "-p", "metod", "coop"],
        cwd=project,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "'metod'" in done.stderr and "'method'" in done.stderr


def test_misspelt_parameter_is_refused_in_the_notebook():
    known = {"method", "seed"} | config.parameter_names()
    space = {"In": [], "_i": "", "method": "pfedmoap", "seed": 1, "n_expert": 3, "notebook": notebook}
    with pytest.raises(ValueError, match="'n_expert'.*'n_experts'"):
        notebook.parameters(space, known)
    assert notebook.parameters({"method": "coop", "lam": None}, known) == {"method": "coop"}


def test_a_cell_may_be_run_again():
    known = {"method", "seed"} | config.parameter_names()
    space = {"In": [], "method": "coop", "seed": 1, "lam": None}
    first = notebook.parameters(space, known)
    space |= {"settings": first, "title": "what a later cell said", "last": 3}
    assert notebook.parameters(space, known) == first == {"method": "coop", "seed": 1}
    space["seed"] = 2
    assert notebook.parameters(space, known) == {"method": "coop", "seed": 2}
