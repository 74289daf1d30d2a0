"""Notebooks have no outputs and run from top to bottom; a misspelt parameter is refused."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jupyter_client
import matplotlib
import nbclient
import nbformat
import pandas as pd
import pytest
import yaml
from papermill import engines

from fpl import cli
from fpl.data import files
from fpl.experiments import notebook, records, settings, values

BOOKS = sorted(Path(files.ROOT, "notebooks").glob("*.ipynb"))
SMALL = files.ROOT / "tests" / "data" / "small.yaml"
QUICK = {
    "00_tour": {"clients": 4},
    "03_methods": {"rounds": 2, "clients": 4},
    "06_own_method": {"rounds": 1},
    "07_one_run": {"rounds": 2},
    "20_label_prior": {"null_seeds": 5},
    "23_pictures": {"rounds": 2},
}


# What the command line makes before, in the kernel itself; and few draws for each interval.
PREPARE = """
from functools import partial
from fpl import cli
from fpl.experiments import inspect, runner, stats, tables
from helpers import Here

runner.ProcessPoolExecutor = Here
inspect.related = partial(inspect.related, draws=100)
stats.paired = tables.paired = partial(stats.paired, draws=100)
for command in (["features", "--patches"], ["features", "--all"], ["sweep"]):
    cli.main(command)
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of the project with tiny settings."""
    root = tmp_path_factory.mktemp("project")
    given = ("data/demo_clip", "data/label_prior", "data/class_names", "real")
    for name in ("fpl", "notebooks", *given, "results/expected/real"):
        shutil.copytree(
            files.ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("published.csv", "ledger.yaml"):
        shutil.copy(files.ROOT / "data" / name, root / "data")
    (root / "params.yaml").write_text(yaml.safe_dump(values.load(SMALL)))
    return root


@pytest.fixture(scope="module")
def prepared(project):
    """One kernel for all notebooks, which has made features and runs: to import takes longest."""
    kernel = jupyter_client.AsyncKernelManager()
    paths = os.pathsep.join([str(project), str(files.ROOT / "tests")])
    cell(kernel, PREPARE, cwd=str(project), env={**os.environ, "PYTHONPATH": paths})
    yield kernel
    cell(kernel, "pass", cleanup_kc=True)  # and shut it down


def cell(kernel, code: str, **options) -> None:
    """Execute some code in the kernel, which is started if need be."""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbclient.NotebookClient(book, km=kernel).execute(**options)


@pytest.fixture
def engine(prepared, project, monkeypatch):
    """Papermill executes in that kernel, where no name is left of the notebook before."""
    cell(prepared, f"%cd -q {project}\nget_ipython().reset(new_session=False)")

    class InOneKernel(engines.NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, notebook, kernel_name, **options):
            options["km"] = prepared
            return super().execute_managed_notebook(notebook, kernel_name, **options)

    monkeypatch.setitem(engines.papermill_engines._engines, None, InOneKernel)


@pytest.mark.parametrize("book", BOOKS, ids=lambda b: b.stem)
def test_runs_from_top_to_bottom(project, engine, book, monkeypatch):
    monkeypatch.chdir(project)
    source = Path("notebooks", book.name)
    target = notebook.execute(source, notebook.EXECUTED / book.name, QUICK.get(book.stem))
    assert Path("results", "tables", book.stem).is_dir()
    executed = nbformat.read(target, as_version=4)
    code = [cell for cell in executed.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert str(project) not in nbformat.writes(executed)


@pytest.mark.parametrize("book", BOOKS, ids=lambda b: b.stem)
def test_committed_without_outputs_and_defines_nothing(book):
    cells = nbformat.read(book, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert [cell.id for cell in cells] == [str(i) for i in range(len(cells))]
    assert "def " not in "\n".join(cell.source for cell in code)


def test_run_notebook_makes_the_record_that_the_command_line_finds(
    project, prepared, monkeypatch, capsys
):
    """In a process and a kernel of its own."""
    given = ["-p", "method", "promptfl", "-p", "seed", "5"]
    command = [sys.executable, "-m", "fpl.cli", "notebook", "notebooks/04_run.ipynb", *given]
    monkeypatch.chdir(project)
    subprocess.run(command, check=True)
    (path,) = records.RECORDS.glob("promptfl-5-*.json")
    accuracy = records.frame([path]).query("round == round.max()")["accuracy"].mean()
    cli.main(["run", "promptfl", "seed=5"])
    said = capsys.readouterr().out
    assert path.name in said and f"{100 * accuracy:.2f} %" in said
    assert len([*records.RECORDS.glob("promptfl-5-*.json")]) == 1


@pytest.mark.parametrize("name", ["params.yaml", "profile.yaml"])
def test_starts_in_the_nearest_profile(tmp_path, monkeypatch, name):
    (tmp_path / "profile" / "notebooks").mkdir(parents=True)
    (tmp_path / "params.yaml").touch()
    (tmp_path / "profile" / name).touch()
    monkeypatch.chdir(tmp_path / "profile" / "notebooks")
    with matplotlib.rc_context(), pd.option_context("display.max_colwidth", 50):
        notebook.start()
    assert Path.cwd() == tmp_path / "profile"


def test_starts_in_the_root_where_there_is_no_profile(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with matplotlib.rc_context(), pd.option_context("display.max_colwidth", 50):
        notebook.start()
    assert Path.cwd() == files.ROOT


def test_misspelt_parameter_is_refused_by_the_command_line(project, monkeypatch):
    monkeypatch.chdir(project)
    with pytest.raises(SystemExit, match="'metod'.*'method'"):
        cli.main(["notebook", "notebooks/04_run.ipynb", "-p", "metod", "coop"])


def test_misspelt_parameter_is_refused_in_the_notebook():
    known = {"method", "seed"} | settings.parameter_names()
    space = {
        "In": [],
        "_i": "",
        "method": "pfedmoap",
        "seed": 1,
        "n_expert": 3,
        "notebook": notebook,
    }
    with pytest.raises(ValueError, match="'n_expert'.*'n_experts'"):
        notebook.parameters(space, known)
    with pytest.raises(ValueError, match="'sed'.*'seed'"):
        notebook.parameters({"method": "coop", "sed": None}, known)
    assert notebook.parameters({"method": "coop", "lam": None}, known) == {"method": "coop"}


def test_a_cell_may_be_run_again():
    known = {"method", "seed"} | settings.parameter_names()
    space = {"In": [], "method": "coop", "seed": 1, "lam": None}
    first = notebook.parameters(space, known)
    space |= {"settings": first, "title": "what a later cell said", "last": 3}
    assert notebook.parameters(space, known) == first == {"method": "coop", "seed": 1}
    space["seed"] = 2
    assert notebook.parameters(space, known) == {"method": "coop", "seed": 2}


@pytest.mark.parametrize(
    ("text", "default", "read_as"),
    [("010", "1", 10), ("2024", '"x"', "2024"), ("a #2", "None", "a #2"), ("[1]", "[2]", [1])],
)
def test_a_parameter_on_the_command_line_is_read_as_the_notebook_declares_it(
    text, default, read_as
):
    assert notebook.as_declared(text, default, "name") == read_as
