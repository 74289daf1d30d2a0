"""Promise: what is installed is the lock and nothing else, nothing in the repository knows a machine or an index, and the
package keeps its own rules: one place that prints, no pickles, no global seed."""

import io
import json
import re
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
ENTRY = re.compile(r"[A-Za-z0-9._-]+==[^\s;=<>~!,*]+(?: ; [^\\]+?)? \\\n(?: {4}--hash=sha256:[0-9a-f]{64}(?: \\)?\n)+")
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
SOURCES = sorted((ROOT / "fpl").glob("*.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def lock():
    text = (ROOT / "requirements.txt").read_text()
    return text, [Requirement(entry.split(" \\\n")[0]) for entry in ENTRY.findall(text)]


def repository():
    """Text files that are in git or could be added to it."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    content = {str(path.relative_to(ROOT)): path.read_bytes() for path in paths if path.is_file()}
    return {name: raw.decode() for name, raw in content.items() if b"\0" not in raw}


@pytest.fixture(scope="module")
def files():
    return repository()


def code(path):
    """A module or notebook without comments and strings, tokens apart by a blank: what it does, not what it says."""
    text = path.read_text()
    if path.suffix == ".ipynb":
        text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code")
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return " ".join(t.string for t in tokens if t.type in (tokenize.NAME, tokenize.OP))


def test_the_lock_is_versions_and_hashes_and_nothing_else():
    text, found = lock()
    assert ENTRY.sub("", text) == "", "something in requirements.txt is no `name==version` with sha256 hashes"
    assert len(found) > 20 and all(r.url is None and len(r.specifier) == 1 for r in found)
    assert "://" not in text


def test_the_lock_holds_every_requirement():
    _, found = lock()
    versions = {
        canonicalize_name(r.name): [next(iter(other.specifier)).version for other in found if other.name == r.name] for r in found
    }
    wanted = [
        Requirement(line.split("#")[0])
        for line in (ROOT / "requirements.in").read_text().splitlines()
        if line.split("#")[0].strip()
    ]
    assert wanted
    for requirement in wanted:
        locked = versions.get(canonicalize_name(requirement.name), [])
        assert locked and all(version in requirement.specifier for version in locked), f"{requirement} is not in the lock"


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
    assert not {"3.10", "3.14"} & set(SpecifierSet(project["requires-python"]).filter(["3.10", version, "3.14"]))


@pytest.mark.parametrize("host", HOSTS)
def test_no_file_names_an_index(host, files):
    assert len(files) > 30
    assert [name for name, text in files.items() if host in text] == []


def test_no_file_names_a_developers_machine(files):
    assert {name: found[0] for name, text in files.items() if (found := PLACES.findall(text))} == {}


@pytest.mark.parametrize(
    ("text", "found"),
    [("cd /wo" + "rk/main", 1), ('"/ro' + 'ot"', 1), ("/ho" + "me/x", 1), ("a/ho" + "me/b", 0), ("/wo" + "rkers", 0)],
)
def test_the_search_for_places_finds_them(text, found):
    assert len(PLACES.findall(text)) == found


def test_only_the_command_line_prints():
    assert [path.name for path in SOURCES if re.search(r"(?<!\. )\bprint \(", code(path))] == ["cli.py"]


FORBIDDEN = ["pickle", "torch . load", "torch . manual_seed", "np . random . seed", "numpy . random . seed", "random . seed"]


EXCEPTIONS = {  # with the reason in the module
    "pickle": {"pickled.py"},  # reads the lists of others with a reader that admits arrays and strings
    "torch . load": {"clip.py"},  # with weights_only
    "torch . manual_seed": {"pretrain.py"},  # open_clip initialises its modules from the global generator
}


@pytest.mark.parametrize("words", FORBIDDEN)
def test_no_pickle_and_no_global_seed(words):
    users = {path.name for path in [*SOURCES, *NOTEBOOKS] if re.search(rf"(?<![\w.]){re.escape(words)}\b", code(path))}
    assert users == EXCEPTIONS.get(words, set())


def test_the_exceptions_run_nothing_that_a_file_names():
    source = {path.name: code(path) for path in SOURCES}
    calls = re.findall(r"torch \. load \([^)]*\)", source["clip.py"])
    assert calls and all("weights_only = True" in call for call in calls)
    assert set(re.findall(r"pickle \. (\w+)", source["pickled.py"])) == {"Unpickler"}


def test_the_pipelines_of_both_profiles_are_whole():
    """DVC reads all of the repository's pipelines and lock files, whichever it is to run."""
    done = subprocess.run([sys.executable, "-m", "dvc", "dag"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "table1" in done.stdout, done.stderr
    ignored = subprocess.run(["git", "check-ignore", "dvc.lock", "paper/dvc.lock"], cwd=ROOT, capture_output=True, text=True)
    assert not ignored.stdout
