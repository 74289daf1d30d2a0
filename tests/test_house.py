"""Promise: a stranger can read the house: floors, sizes, typed nouns."""

import ast
import re
import tokenize
from pathlib import Path

import pytest
from helpers import ROOT

PACKAGE = ROOT / "fpl"
# From the ground up. A room may import from floors below it and from itself.
FLOORS = [
    ["state", "linear", "later"],
    ["prompts", "gate", "transport"],
    ["methods", "data"],
    ["controls", "ablations", "more_methods", "privacy", "released"],
    ["rounds"],
    ["experiments"],
    ["audit", "bench"],
    ["cli"],
    ["__init__"],  # the public verbs
]
CORE = ["prompts", "gate", "transport", "state", "methods", "controls", "privacy", "rounds"]
SOURCES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def name_of(path):
    return str(path.relative_to(ROOT))


def imports(path):
    """Return the modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rooms_read_by(path):
    """Return the rooms of the package that a file imports from."""
    inner = [name.split(".")[1] for name in imports(path) if name.startswith("fpl.")]
    return set(inner)


def functions(path):
    """Return every function of a file."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def parameters(function):
    """Return the parameters of a function, but for self and cls."""
    every = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
    return [parameter for parameter in every if parameter.arg not in ("self", "cls")]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_run_downwards_only(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    level = {name: height for height, floor in enumerate(FLOORS) for name in floor}
    above = {other for other in rooms_read_by(path) - {room} if level[other] >= level[room]}
    assert not above, f"{name_of(path)} imports from {above}"


def test_data_knows_of_the_package_only_the_model():
    read = set().union(*(rooms_read_by(path) for path in (PACKAGE / "data").rglob("*.py")))
    assert read <= {"data", "later", "prompts"}


def test_every_room_has_a_floor():
    rooms = {path.name.removesuffix(".py") for path in PACKAGE.iterdir()} - {"__pycache__"}
    assert rooms == {room for floor in FLOORS for room in floor}


def test_no_test_module_imports_another():
    """Nor does a script that a test writes down."""
    importing = re.compile(r"^\s*(?:from|import) (test_\w+|conftest)", re.MULTILINE)
    for path in TESTS:
        others = importing.findall(path.read_text())
        assert not others, f"{name_of(path)} imports {others}: what both need goes to helpers"


def test_conftest_has_fixtures_only():
    for function in functions(ROOT / "tests" / "conftest.py"):
        assert "fixture" in "".join(map(ast.unparse, function.decorator_list)), function.name


def test_the_science_core_reads_in_one_sitting():
    lines = {name: len((PACKAGE / f"{name}.py").read_text().splitlines()) for name in CORE}
    assert sum(lines.values()) <= 2000, lines


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_functions_are_short_and_take_few_parameters(path):
    for function in functions(path):
        first = min(node.lineno for node in [function, *function.decorator_list])
        length = function.end_lineno - first + 1
        assert length <= 50, f"{path}: {function.name} has {length} lines"
        assert len(parameters(function)) <= 6, f"{path}: {function.name} has too many parameters"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_text_and_clients_are_typed(path):
    for function in functions(path):
        for parameter in parameters(function):
            if parameter.arg in ("text", "clients"):
                assert parameter.annotation, f"{path}: {function.name}, {parameter.arg}"


# What is neither code nor a name.
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
LAYOUT |= {tokenize.ENCODING, tokenize.ENDMARKER}


def tokens_and_lines(path: Path):
    """Return how many tokens of code a file has and on how many lines; docstrings are none."""
    told = set()
    for node in ast.walk(ast.parse(path.read_text())):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if documented and ast.get_docstring(node):
            told |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    tokens = 0
    lines = set()
    with tokenize.open(path) as source:
        for token in tokenize.generate_tokens(source.readline):
            if token.type not in LAYOUT and token.start[0] not in told:
                tokens += 1
                lines |= set(range(token.start[0], token.end[0] + 1))
    return tokens, len(lines)


def test_a_line_of_code_has_ten_tokens_at_most_in_the_mean():
    tokens, lines = map(sum, zip(*map(tokens_and_lines, SOURCES)))
    assert tokens / lines <= 10, f"{tokens} tokens on {lines} lines"
