"""Every notebook is committed without outputs and runs from top to bottom; a misspelt parameter is an error."""

import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

from fpl.audit import ledger
from fpl.data import files
from fpl.experiments import notebook, records, settings

BOOKS = sorted(Path(files.ROOT, "notebooks").glob("*.ipynb"))
SMALL = """
data: {name: shapes, seed: 1, train_per_class: 4, test_per_class: 2}
partition: {clients: 4, shots: 2}
run: {rounds: 1, local_epochs: 1}
datasets:
  styles: {data: {name: styles, train_per_class: 24, test_per_class: 18}, partition: {kind: domain, clients: 6}}
  shapes_views: {data: {views: 2}}
seeds: [1, 2]
methods: {zeroshot: {}, coop: {}, promptfl: {}, pfedmoap: {n_experts: 2}}
tables:
  table1: {data: &two [shapes, styles]}
  n_experts: {data: *two, rows: [pfedmoap, majority, zeroshot_own, ridge_own, ridge_all], vary: {n_experts: [0, 1, 2]}}
  d_gate: {data: *two, rows: [pfedmoap], vary: {d_gate: [32, 128]}}
  lam: {data: *two, rows: [pfedmoap], vary: {lam: [0, 0.5, 1]}}
  table2: {rows: [zeroshot, promptfl, majority]}
  figure5: {rows: [pfedmoap], vary: {n_experts: [0, 1]}}
  table3: {data: [styles], rows: [zeroshot, promptfl, majority]}
  table3_released: {data: [styles], rows: [zeroshot, promptfl, majority], set: {form: released, loader: mismatched, shots: 0}}
  table3_misnamed: {data: [styles], rows: [zeroshot, promptfl], set: {loader: misnamed}}
  table8: {data: [styles], rows: [pfedmoap], vary: {n_experts: [0, 1]}}
  table6: {rows: [promptfl, fedprox, pfedmoap], vary: {epsilon: [0, 50]}}
  table7:
    data: *two
    rows:
      attention: {method: pfedmoap}
      uniform attention: {method: pfedmoap, mixing: uniform}
      plain average: {method: pfedmoap, mixing: average}
      no experts: {method: pfedmoap, n_experts: 0}
      "alone: attention": {method: gate_alone}
      "alone: no gate": {method: coop}
  capacity: {rows: [pfedmoap], vary: {heads: [1], d_gate: [32, 128]}}
  shots: {data: *two, rows: [zeroshot, promptfl], vary: {shots: [1, 2]}}
  heterogeneity: {rows: [promptfl, pfedmoap], vary: {shots: [2], concentration: [0.5, 1], n_experts: [0, 2]}}
  choice: {data: [styles], rows: {nearest (l2): {method: pfedmoap}, random: {method: pfedmoap, choice: random}}}
  communication: {data: *two, rows: [promptfl, pfedmoap], vary: {n_ctx: [1, 16], n_experts: [1]}}
  base_to_novel: {rows: [zeroshot, promptfl], set: {classes: base}}
  fedpgp_rank: {rows: [fedpgp], set: {classes: base}, vary: {rank: [1]}}
  fedpgp_mu: {rows: [fedpgp], set: {classes: base}, vary: {mu: [0]}}
  leave_one_out: {data: [styles], rows: [zeroshot, promptfl], set: {clients: 5}, vary: {held_out: [photo, sketch]}}
"""
QUICK = {"00_tour": {"clients": 4}, "20_label_prior": {"null_seeds": 5}}
QUICK |= {name: {"rounds": 2} for name in ("03_methods", "23_pictures")}


def small():
    """The settings above, and of params.yaml the rows that the ledger names, with as many experts as there can be."""
    content, full = yaml.safe_load(SMALL), yaml.safe_load((files.ROOT / "params.yaml").read_text())["tables"]
    for name in ledger.TABLES:
        rows = full[name]["rows"]
        few = {label: {"n_experts": 2} if own.get("method", label).startswith("pfedmoap") else {} for label, own in rows.items()}
        content["tables"][name] = {
            "data": full[name].get("data", []),
            "rows": {label: rows[label] | few[label] for label in rows},
        }
    return yaml.safe_dump(content)


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of the project with tiny settings, its features and runs made by the command line."""
    root = tmp_path_factory.mktemp("project")
    for name in ("fpl", "notebooks", "data/demo_clip", "data/label_prior"):
        shutil.copytree(files.ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("published.csv", "ledger.yaml"):
        shutil.copy(files.ROOT / "data" / name, root / "data")
    (root / "params.yaml").write_text(small())
    for command in (["features", "--patches"], ["features", "--all"], ["sweep"]):
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
    known = {"method", "seed"} | settings.parameter_names()
    space = {"In": [], "_i": "", "method": "pfedmoap", "seed": 1, "n_expert": 3, "notebook": notebook}
    with pytest.raises(ValueError, match="'n_expert'.*'n_experts'"):
        notebook.parameters(space, known)
    assert notebook.parameters({"method": "coop", "lam": None}, known) == {"method": "coop"}


def test_a_cell_may_be_run_again():
    known = {"method", "seed"} | settings.parameter_names()
    space = {"In": [], "method": "coop", "seed": 1, "lam": None}
    first = notebook.parameters(space, known)
    space |= {"settings": first, "title": "what a later cell said", "last": 3}
    assert notebook.parameters(space, known) == first == {"method": "coop", "seed": 1}
    space["seed"] = 2
    assert notebook.parameters(space, known) == {"method": "coop", "seed": 2}
