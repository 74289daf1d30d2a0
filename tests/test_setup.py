"""Promise: the lock and nothing else is installed, quietly; no file knows an index or a machine.

The package keeps its rules, too: one place that prints, no pickles, no global seed.
"""

import importlib.metadata
import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
ENTRY = re.compile(
    r"[A-Za-z0-9._-]+==[^\s;=<>~!,*]+(?: ; [^\\]+?)? \\\n"
    r"(?: {4}--hash=sha256:[0-9a-f]{64}(?: \\)?\n)+"
)
# In pieces, so that this file may be read too.
HOSTS = [
    "py" + "pi.org",
    "python" + "hosted.org",
    "download.py" + "torch.org",
    "ana" + "conda.org",
    "npm" + "js.org",
    "cr" + "ates.io",
]
PLACES = re.compile(r"(?<![\w.:})\]-])/(?:wo" + r"rk|ro" + r"ot|ho" + r"me|Us" + r"ers)(?![\w.-])")
SOURCES = sorted((ROOT / "fpl").rglob("*.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def lock():
    text = (ROOT / "requirements.txt").read_text()
    return text, [Requirement(entry.split(" \\\n")[0]) for entry in ENTRY.findall(text)]


def repository():
    """Text files that are in git or could be added to it."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    content = {str(path.relative_to(ROOT)): path.read_bytes() for path in paths if path.is_file()}
    return {name: raw.decode() for name, raw in content.items() if b"\0" not in raw}


@pytest.fixture(scope="module")
def files():
    return repository()


def code(path):
    """What a module or notebook does: no comments, no strings, a blank between tokens."""
    text = path.read_text()
    if path.suffix == ".ipynb":
        text = "\n".join(
            "".join(cell["source"])
            for cell in json.loads(text)["cells"]
            if cell["cell_type"] == "code"
        )
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return " ".join(t.string for t in tokens if t.type in (tokenize.NAME, tokenize.OP))


def test_the_lock_is_versions_and_hashes_and_nothing_else():
    text, found = lock()
    assert ENTRY.sub("", text) == "", (
        "something in requirements.txt is no `name==version` with sha256 hashes"
    )
    assert len(found) > 20 and all(r.url is None and len(r.specifier) == 1 for r in found)
    assert "://" not in text


def test_the_lock_holds_every_requirement():
    _, found = lock()
    versions = {
        canonicalize_name(r.name): [
            next(iter(other.specifier)).version for other in found if other.name == r.name
        ]
        for r in found
    }
    wanted = [
        Requirement(line.split("#")[0])
        for line in (ROOT / "requirements.in").read_text().splitlines()
        if line.split("#")[0].strip()
    ]
    assert wanted
    for requirement in wanted:
        locked = versions.get(canonicalize_name(requirement.name), [])
        assert locked and all(version in requirement.specifier for version in locked), (
            f"{requirement} is not in the lock"
        )


def test_what_builds_source_packages_is_locked_and_installed_first(checkout):
    """Whatever pip fetches has a hash: build tools, too, which it would fetch by itself."""
    assert setup(checkout).returncode == 0
    builders = ENTRY.findall((checkout / ".venv" / "build.txt").read_text())
    assert [entry.split("==")[0] for entry in builders] == ["packaging", "setuptools", "wheel"]
    text, found = lock()
    assert all(entry in text for entry in builders)
    first, whole, ours = (checkout / "calls").read_text().splitlines()
    assert first.endswith("-r .venv/build.txt") and whole.endswith("-r requirements.txt")
    source = re.search(r"^SOURCE := (.+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert source in {requirement.name for requirement in found}
    for call in (first, whole):
        assert {"--require-hashes", "--no-build-isolation"} <= {*call.split()}
        assert f"--only-binary :all: --no-binary {source}" in call
    assert "--no-build-isolation" in ours and "--no-deps" in ours


def test_conda_users_get_exactly_the_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert set(environment) == {"name", "dependencies"}  # no channel, no prefix
    python, pip, installed = environment["dependencies"]
    assert pip == "pip" and installed == {"pip": ["-r requirements.txt"]}
    name, version = python.split("=")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert name == "python" and version in SpecifierSet(project["requires-python"])


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_the_promised_pythons_are_allowed(version):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert version in SpecifierSet(project["requires-python"])
    assert not {"3.10", "3.14"} & set(
        SpecifierSet(project["requires-python"]).filter(["3.10", version, "3.14"])
    )


@pytest.mark.parametrize("host", HOSTS)
def test_no_file_names_an_index(host, files):
    assert len(files) > 30
    assert [name for name, text in files.items() if host in text] == []


def test_no_file_names_a_developers_machine(files):
    assert {name: found[0] for name, text in files.items() if (found := PLACES.findall(text))} == {}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("cd /wo" + "rk/main", 1),
        ('"/ro' + 'ot"', 1),
        ("/ho" + "me/x", 1),
        ("a/ho" + "me/b", 0),
        ("/wo" + "rkers", 0),
    ],
)
def test_the_search_for_places_finds_them(text, found):
    assert len(PLACES.findall(text)) == found


def test_one_place_prints_which_makes_text_harmless():
    users = [path for path in SOURCES if re.search(r"(?<!\. )\bprint \(", code(path))]
    assert users == [ROOT / "fpl" / "cli" / "show.py"]


FORBIDDEN = [
    "pickle",
    "torch . load",
    "torch . manual_seed",
    "np . random . seed",
    "numpy . random . seed",
    "random . seed",
]


# the module that may, which gives the reason
EXCEPTIONS = {
    # reads the lists of others, with a reader that admits arrays and strings
    "pickle": {"pickled.py"},
    # with weights_only
    "torch . load": {"encoders.py", "foreign.py"},
    # open_clip initialises its modules from the global generator
    "torch . manual_seed": {"pretrain.py", "promises.py"},
}


@pytest.mark.parametrize("words", FORBIDDEN)
def test_no_pickle_and_no_global_seed(words):
    call = re.compile(rf"(?<![\w.]){re.escape(words)}\b")
    users = {path.name for path in [*SOURCES, *NOTEBOOKS] if call.search(code(path))}
    assert users == EXCEPTIONS.get(words, set())


def test_the_exceptions_run_nothing_that_a_file_names():
    source = {path.name: code(path) for path in SOURCES}
    for name in EXCEPTIONS["torch . load"]:
        calls = re.findall(r"torch \. load \([^)]*\)", source[name])
        assert calls and all("weights_only = True" in call for call in calls)
    assert set(re.findall(r"pickle \. (\w+)", source["pickled.py"])) == {"Unpickler"}


def test_the_pipelines_of_both_profiles_are_whole():
    """DVC reads all of the repository's pipelines and lock files, whichever it is to run."""
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "dag"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "table1" in done.stdout, done.stderr
    ignored = subprocess.run(
        ["git", "check-ignore", "dvc.lock", "paper/dvc.lock"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert not ignored.stdout


WORKSPACE = """
from pathlib import Path

Path("ran").write_text(__file__)
"""


@pytest.mark.parametrize("profile", [".", "paper"])
def test_stages_run_the_code_of_the_workspace_and_not_what_is_installed(profile, tmp_path):
    """DVC runs queued experiments in a copy of the project as it was."""
    stages = yaml.safe_load((ROOT / profile / "dvc.yaml").read_text())["stages"].values()
    commands = [stage.get("do", stage)["cmd"] for stage in stages]
    (tmp_path / "fpl" / "cli").mkdir(parents=True)
    (tmp_path / "fpl" / "__init__.py").touch()
    (tmp_path / "fpl" / "cli" / "__main__.py").write_text(WORKSPACE)
    (tmp_path / "paper").mkdir(exist_ok=True)
    bin = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{bin}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)
    for command in {part for cmd in commands for part in ([cmd] if isinstance(cmd, str) else cmd)}:
        command = command.replace("${", "").replace("}", "")
        (tmp_path / profile / "ran").unlink(missing_ok=True)
        subprocess.run(command, shell=True, cwd=tmp_path / profile, env=environment, check=True)
        found = Path((tmp_path / profile / "ran").read_text()).resolve()
        assert found == (tmp_path / "fpl" / "cli" / "__main__.py").resolve(), command


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_version_stands_once_and_everywhere_alike():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    first = re.search(r"^## \[(\S+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert cited["version"] == first[1] == PROJECT["version"]


def test_the_licence_is_named_and_comes_with_the_package():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["license"] == PROJECT["license"] == "MIT"
    assert PROJECT["license-files"] == ["LICENSE"]
    text = (ROOT / "LICENSE").read_text()
    assert text.startswith("MIT License\n\nCopyright (c) 2026 The fpl developers\n")


def test_the_papers_can_be_cited():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["type"] == "software"
    papers = {paper["notes"]: paper for paper in cited["references"]}
    assert {"pFedMoAP", "FedPGP", "FedOTP"} <= set(papers)
    for paper in papers.values():
        assert paper["title"] and paper["year"] and paper["authors"][0]["family-names"]


def test_the_distribution_has_a_name_of_its_own_and_the_import_is_fpl():
    distribution = importlib.metadata.distribution(PROJECT["name"])
    assert PROJECT["name"] == "fpl-companion"
    assert [entry.value for entry in distribution.entry_points if entry.name == "fpl"] == [
        "fpl.cli:main"
    ]


def test_make_test_and_git_run_one_list_of_checks():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [(repo["repo"], hook["entry"]) for repo in hooks for hook in repo["hooks"]] == [
        ("local", "make check")
    ]
    assert "\ntest: check\n" in (ROOT / "Makefile").read_text()


def test_the_tour_says_where_its_picture_is():
    recipe = (ROOT / "Makefile").read_text().split("\ntour: setup\n")[1].split("\n\n")[0]
    assert (
        "notebook notebooks/00_tour.ipynb" in recipe and "results/tables/00_tour/tour.png" in recipe
    )
    cells = json.loads((ROOT / "notebooks" / "00_tour.ipynb").read_text())["cells"]
    code_of = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert 'plots.save(figure, "00_tour/tour", kinds=["png"])' in code_of


PIP = """
import sys
print("Ignoring colorama: markers 'sys_platform == win32' don't match your environment")
for line in (
    "Requirement already satisfied: torch==1.0 in ./.venv (from -r requirements.txt (line 3))",
    "Processing /a/folder/numpy-1.0-py3-none-any.whl (from -r requirements.txt (line 5))",
    "Collecting fpl-needs==1.0 (from -r requirements.txt (line 7))",
):
    print(line)
    print("  Downloading a file that is large")
print("Installing collected packages: torch, numpy, fpl-needs")
sys.stderr.write("a word on stderr\\n")
sys.exit(STATUS)
"""
LOCKED = "".join(
    f"{name}==1.0 \\\n    --hash=sha256:00\n"
    for name in ("colorama", "torch", "numpy", "fpl-needs")
)


def installer(folder, status):
    """The command line of the installer with something that talks like pip."""
    (folder / "requirements.txt").write_text(LOCKED)
    pip = [sys.executable, "-c", PIP.replace("STATUS", str(status))]
    return [sys.executable, ROOT / "tools" / "install.py", "install.log", "requirements.txt", *pip]


def test_installing_says_a_few_lines_and_keeps_the_others(tmp_path):
    done = subprocess.run(installer(tmp_path, 0), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.splitlines() == [
        "1 of 4 packages: colorama",
        "2 of 4 packages: torch",
        "3 of 4 packages: numpy",
        "4 of 4 packages: fpl-needs",
        "all packages are here, unpacking them (about a minute)",
        "installed; pip's own words are in install.log",
    ]
    log = (tmp_path / "install.log").read_text()
    assert log.count("Downloading") == 3 and "a word on stderr" in log


def test_many_packages_are_as_few_lines(tmp_path):
    command = installer(tmp_path, 0)
    (tmp_path / "requirements.txt").write_text("".join(f"p{i}==1\n" for i in range(200)))
    command[-1] = "for i in range(200): print(f'Collecting p{i}==1')"
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert [line.split(":")[0] for line in done.stdout.splitlines()[:-1]] == [
        f"{n} of 200 packages" for n in (50, 100, 150, 200)
    ]


def test_on_a_terminal_the_line_overwrites_itself(tmp_path):
    ours, theirs = pty.openpty()
    done = subprocess.run(installer(tmp_path, 0), cwd=tmp_path, stdout=theirs)
    os.close(theirs)
    shown = os.read(ours, 10_000).decode()
    os.close(ours)
    assert done.returncode == 0
    assert shown.count("\n") == 1 and shown.count("\r\033[K") == 6
    assert "3 of 4 packages: numpy" in shown and "Downloading" not in shown


def test_when_pip_fails_the_end_of_its_words_is_shown(tmp_path):
    done = subprocess.run(installer(tmp_path, 3), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 3
    assert "pip failed" in done.stdout and "all of which is in install.log" in done.stdout
    assert "Downloading a file that is large" in done.stdout and "a word on stderr" in done.stdout


@pytest.fixture
def checkout(tmp_path):
    """What `make setup` needs: an environment of stand-ins, whose pip fails if a file says so."""
    for name in ("Makefile", "requirements.txt", "pyproject.toml", "tools/install.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    (tmp_path / ".git").mkdir()
    pip = 'echo "pip $*" >> calls; echo "Collecting all"; [ ! -e broken ]'
    venv = "mkdir -p .venv/bin && cp inner .venv/bin/python"
    real = f'exec {sys.executable} "$@"'
    (tmp_path / "inner").write_text(f'#!/bin/sh\nif [ "$1" = -m ]; then {pip}; else {real}; fi\n')
    (tmp_path / "python").write_text(
        f'#!/bin/sh\nif [ "$2" = venv ]; then {venv}; else {real}; fi\n'
    )
    for name in ("inner", "python"):
        (tmp_path / name).chmod(0o755)
    return tmp_path


def setup(folder):
    return subprocess.run(
        ["make", "setup", "PYTHON=./python"], cwd=folder, capture_output=True, text=True
    )


def test_make_installs_once_and_the_package_again_when_its_description_changes(checkout):
    done = setup(checkout)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) <= 8 and (checkout / ".venv" / "install.log").exists()
    calls = (checkout / "calls").read_text().splitlines()
    hashed = ["--require-hashes" in call for call in calls]
    assert hashed == [True, True, False]
    assert "up to date" in setup(checkout).stdout or "Nothing to be done" in setup(checkout).stdout
    os.utime(checkout / "pyproject.toml", times=(2**32, 2**32))
    assert setup(checkout).returncode == 0
    calls = (checkout / "calls").read_text().splitlines()
    assert ["--require-hashes" in call for call in calls] == [*hashed, False]


def test_an_installation_that_failed_is_begun_again(checkout):
    (checkout / "broken").touch()
    done = setup(checkout)
    assert (
        done.returncode
        and "pip failed" in done.stdout
        and not (checkout / ".venv" / ".ready").exists()
    )
    (checkout / "broken").unlink()
    assert setup(checkout).returncode == 0 and (checkout / ".venv" / ".ready").exists()
