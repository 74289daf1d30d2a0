"""Promise: a record outlives the code around it, and not the code that made its number."""

import ast
import dataclasses
import itertools
import os
import shutil
import sys

import pytest
import yaml
from helpers import PARAMS, ROOT

from fpl.experiments import assemble, fingerprint, runner, settings
from fpl.experiments.settings import ROWS
from fpl.methods import FedOTP, FedProx, PFedMoAP
from fpl.released.methods import InTurn

TICKS = itertools.count(1)
EVERY = set(ROWS)


def those_of(*kinds):
    """Return the rows whose method is one of these, or made of it."""
    return {row for row, kind in ROWS.items() if issubclass(kind, kinds)}


def write(path, text):
    """Write a file as if a second had gone by since it was last written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    time = path.stat().st_mtime + next(TICKS)
    os.utime(path, (time, time))


def replace(path, old, new):
    text = path.read_text()
    assert text.count(old) == 1, f"{path} has {text.count(old)} times {old!r}"
    write(path, text.replace(old, new))


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    copy = tmp_path_factory.mktemp("package") / "fpl"
    shutil.copytree(fingerprint.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture
def package(copied, monkeypatch):
    """A copy of the package's sources, which fingerprints are made of; put back afterwards."""
    before = {path: (path.read_bytes(), path.stat()) for path in copied.rglob("*.py")}
    monkeypatch.setattr(fingerprint, "PACKAGE", copied)
    yield copied
    for path in copied.rglob("*.py"):
        if path not in before:
            path.unlink()
        elif path.stat().st_mtime_ns != before[path][1].st_mtime_ns:
            path.write_bytes(before[path][0])
            os.utime(path, ns=(before[path][1].st_atime_ns, before[path][1].st_mtime_ns))


def fingerprints(rows=ROWS, **changes):
    """Return the fingerprint of a run of every row."""
    found = {}
    for row in rows:
        found[row] = fingerprint.code_fingerprint(PARAMS.experiment(row, 1, **changes))
    return found


def changed(before, after):
    """Return the rows whose records are no longer found."""
    return {row for row in before if before[row] != after[row]}


def test_a_copy_of_the_sources_has_the_fingerprints_of_the_sources(package, monkeypatch):
    of_copy = fingerprints()
    monkeypatch.undo()
    assert of_copy == fingerprints()
    assert len(set(of_copy.values())) == len(ROWS), "every row has code of its own"


# What changes no number. (file, text, what stands in its place); without a text, at the end.

METHOD = '''

@dataclass(frozen=True)
class Another(PromptFL):
    """A method of next year."""

    key = "another"

    more: float = 1.0

    def loss(self, text, p, context, x, y):
        return self.more * super().loss(text, p, context, x, y)


METHODS["another"] = Another
'''
FUNCTION = '\n\ndef unheard_of(x):\n    """Double."""\n    return 2 * x\n'
PERMITTED = {
    "a method": ("methods.py", None, METHOD),
    "a released method": ("released/methods.py", None, METHOD.replace("METHODS[", "RELEASED[")),
    "a control": ("controls.py", None, METHOD.replace("METHODS[", "CONTROLS[")),
    "a method in the middle": ("methods.py", "\n\n@dataclass(frozen=True)\nclass CoOp", None),
    "a title": ("methods.py", 'title = "Prompt+FedProx"', 'title = "FedProx"'),
    "a source": ("methods.py", 'source = "Li et al., 2020, on PromptFL"', 'source = "Li"'),
    "a docstring of a class": ("methods.py", '"""FedAvg of one', '"""The FedAvg of one'),
    "a docstring of a method": ("methods.py", '"""s <x, t_c>."""', '"""Scaled cosines."""'),
    "a docstring of a module": ("rounds.py", '"""The one federated', '"""The only federated'),
    "a comment": (
        "gate.py",
        "return image @ experts.mean(-3).mT",
        "return image @ experts.mean(-3).mT  # mean",
    ),
    "a comment in a loop": (
        "rounds.py",
        "            stepper.step()\n",
        "            # downhill\n            stepper.step()\n",
    ),
    "a line break": (
        "gate.py",
        "image @ experts.mean(-3).mT",
        "(\n            image @ experts.mean(-3).mT\n        )",
    ),
    "a data set": ("data/datasets/mine.py", None, "SIZE = 3\n"),
    "a table": ("experiments/tables.py", None, FUNCTION),
    "a command": ("cli/mine.py", None, FUNCTION),
}
MODULES = ["prompts", "gate", "transport", "state", "methods", "rounds", "privacy", "controls"]
MODULES += ["data/partitions", "data/features", "experiments/assemble", "experiments/cache"]
MODULES += ["experiments/settings", "experiments/runner", "released/splits", "released/methods"]
PERMITTED |= {f"a function in {name}": (f"{name}.py", None, FUNCTION) for name in MODULES}


@pytest.mark.parametrize("case", PERMITTED)
def test_what_makes_no_number_keeps_every_record(case, package):
    before = fingerprints()
    name, old, new = PERMITTED[case]
    path = package / name
    if old is None:
        write(path, (path.read_text() if path.exists() else "") + new)
    else:
        replace(path, old, METHOD.rpartition("\n\n\n")[0] + old if new is None else new)
    assert changed(before, fingerprints()) == set()


def test_a_table_or_a_data_set_in_params_yaml_keeps_every_record(tmp_path):
    content = yaml.safe_load((ROOT / "params.yaml").read_text())
    more = {
        **content,
        "datasets": {**content["datasets"], "mine": {"data": {"seed": 5, "store": "mine"}}},
    }
    more["tables"] = {**content["tables"], "30_mine": {"mine": {"data": ["mine"]}}}
    paths = []
    for name, written in (("before", content), ("after", more)):
        (tmp_path / name).write_text(yaml.safe_dump(written))
        params = settings.read(tmp_path / name)
        paths.append([runner.key_of("sha", e).path for _, e in params.runs("table1")])
    assert paths[0] == paths[1] and "mine" in params.tables


# What changes a number drops exactly the records that depend on it.

DROPS = {
    "a method's term": (
        "methods.py",
        'return self.mu / 2 * (p["ctx"]',
        'return self.mu / 3 * (p["ctx"]',
        those_of(FedProx),
    ),
    "a method's setting": (
        "methods.py",
        "mu: NonNegativeFloat = 0.5\n\n    def context",
        "mu: NonNegativeFloat = 0.6\n\n    def context",
        those_of(FedProx),
    ),
    "everybody's loss": (
        "methods.py",
        'reduction="none")',
        'reduction="none", label_smoothing=0.1)',
        EVERY,
    ),
    "the gate": (
        "gate.py",
        "return image @ experts.mean(-3).mT",
        "return image @ experts.amax(-3).mT",
        those_of(PFedMoAP),
    ),
    "a map of the gate": ("gate.py", "y = x.flatten(", "y = 1.0 * x.flatten(", those_of(PFedMoAP)),
    "a number of the plan": (
        "transport.py",
        "THRESHOLD = 1e-3",
        "THRESHOLD = 1e-4",
        those_of(FedOTP),
    ),
    "the order of clients": (
        "released/methods.py",
        "return [*drawn.split(1), *idle]",
        "return [*idle, *drawn.split(1)]",
        those_of(InTurn),
    ),
    "a choice of experts": (
        "methods.py",
        "return -torch.minimum(",
        "return -torch.maximum(",
        those_of(PFedMoAP),
    ),
    "a control": (
        "controls.py",
        "return logits.masked_fill(~own",
        "return logits.masked_fill(own",
        {"zeroshot_own", "ridge_all"},
    ),
    "the loop": (
        "rounds.py",
        "            stepper.step()\n",
        "            stepper.step()\n            stepper.step()\n",
        EVERY,
    ),
    "evaluation": ("rounds.py", "z.argmax(-1) ==", "z.argmin(-1) ==", EVERY),
    "a constant of the loop": ("rounds.py", "TEST_ROWS = 512", "TEST_ROWS = 511", EVERY),
    "a stream": (
        "rounds.py",
        'generator(seed, "select", number)',
        'generator(seed, "pick", number)',
        EVERY,
    ),
    "generators": ("state.py", ">> np.uint64(1)", ">> np.uint64(2)", EVERY),
    "a block of the tower": (
        "prompts.py",
        "return x + block.ls_2(",
        "return 1.0 * x + block.ls_2(",
        EVERY,
    ),
    "the classes of imported features": (
        "data/imported.py",
        "SCALE = 100.0",
        "SCALE = 50.0",
        EVERY,
    ),
    "the tree": ("prompts.py", "ALONE, GROUP = 128, 48", "ALONE, GROUP = 128, 49", EVERY),
    "who has which images": ("data/partitions.py", "DRAWS = 100", "DRAWS = 99", EVERY),
    "assembling": (
        "experiments/assemble.py",
        "training.init_seed or seed",
        "training.init_seed or 1",
        EVERY,
    ),
}


@pytest.mark.parametrize("case", DROPS)
def test_what_makes_a_number_drops_the_records_that_depend_on_it(case, package):
    name, old, new, rows = DROPS[case]
    before = fingerprints()
    replace(package / name, old, new)
    assert rows and changed(before, fingerprints()) == rows


def test_code_that_comes_back_finds_its_records_again(package):
    before = fingerprints(["fedprox"])
    replace(package / "methods.py", "self.mu / 2 *", "self.mu / 3 *")
    assert fingerprints(["fedprox"]) != before
    replace(package / "methods.py", "self.mu / 3 *", "self.mu / 2 *")
    assert fingerprints(["fedprox"]) == before


# Whatever runs is in the fingerprint.

GATE = {"n_ctx": 2, "n_experts": 2, "d_gate": 16, "heads": 4}
RUNS = {
    "a control": ("ridge_all", {}),
    "private": ("promptfl", {"epsilon": 5.0}),
    "released": ("pfedmoap_released", GATE),
    "released splits": ("pfedmoap", {"form": "released"}),
    "base classes": ("fedpgp", {"classes": "base", "kind": "even"}),
}


def executed(experiment):
    """Return module and qualified name of every function of the package that a run calls."""
    found = set()

    def note(frame, event, argument):
        name = frame.f_globals.get("__name__", "")
        if event == "call" and name.startswith("fpl."):
            found.add((name, frame.f_code.co_qualname.partition(".<locals>")[0]))

    sys.setprofile(note)
    try:
        list(assemble.rounds_of(experiment))
    finally:
        sys.setprofile(None)
    outside = {*fingerprint.ELSEWHERE, *fingerprint.FILES}
    return {(name, function) for name, function in found if name not in outside}


def with_another_line(text, qualified):
    """Return source code in which a function has one more statement; None if it has no such one."""
    tree = ast.parse(text)
    place = tree
    for name in qualified.split("."):
        inner = [node for node in place.body if getattr(node, "name", "") == name]
        if not inner:
            return None  # made by a dataclass, or a lambda of a module
        place = inner[-1]
    place.body.append(ast.parse("assert True").body[0])
    return ast.unparse(tree)


@pytest.mark.parametrize("case", RUNS)
def test_every_function_that_a_run_calls_is_in_its_fingerprint(case, here, package):
    row, changes = RUNS[case]
    experiment = PARAMS.experiment(row, 1, **changes)
    functions = executed(experiment)
    before = fingerprint.code_fingerprint(experiment)
    forgotten = []
    tried = 0
    for module, name in sorted(functions):
        path = fingerprint.file_of(module)
        text = path.read_text()
        other = with_another_line(text, name)
        if other is None:
            continue
        tried += 1
        write(path, other)
        if fingerprint.code_fingerprint(experiment) == before:
            forgotten.append(f"{module}.{name}")
        write(path, text)
    assert tried > 40 and forgotten == []


OURS = {"ours": {}, "another kind": {"kind": "iid"}}
RELEASED = {"released": {"form": "released"}, "loader": {"loader": "both", "kind": "domain"}}
FEW = ["promptfl", "pfedmoap", "majority"]


@pytest.mark.parametrize("name", OURS | RELEASED)
def test_the_released_splits_count_for_runs_that_have_them(name, package):
    changes = (OURS | RELEASED)[name]
    before = fingerprints(FEW, **changes)
    path = package / "released" / "splits.py"
    write(path, path.read_text().replace("if not value > 0:", "if value <= 0:"))
    assert changed(before, fingerprints(FEW, **changes)) == (
        set(FEW) if name in RELEASED else set()
    )


PRIVATE = [({}, False), ({"epsilon": 5.0}, True), ({"mechanism": "clipping"}, True)]


@pytest.mark.parametrize(("how", "counts"), PRIVATE)
def test_privacy_counts_for_runs_that_clip_uploads(how, counts, package):
    rows = ["promptfl", "pfedmoap"]
    before = fingerprints(rows, **how)
    replace(package / "privacy.py", "z * clip * torch.stack(noise)", "z * torch.stack(noise)")
    assert changed(before, fingerprints(rows, **how)) == (set(rows) if counts else set())


# A method of one's own, in a file of its own.

OWN = '''"""A method of mine."""

from dataclasses import dataclass

import fpl.gate as mixing
from fpl.methods import CoOp, FedProx

WEIGHT = 2.0
TABLE = {"term": 1.0}
TABLE["more"] = 0.0
if WEIGHT > 1:
    HEAVY = 1.0


def weight(x):
    """Return it weighted."""
    return HEAVY * WEIGHT * x + TABLE["more"]


def helper(x):
    return weight(x)


def unused(x):
    return x


@dataclass(frozen=True)
class Mine(FedProx):
    """FedProx with a heavier term."""

    title = "Mine"

    def pool(self, x):
        return mixing.pool(x, 2)

    def term(self, p, context):
        return helper(super().term(p, context))
'''
FUTURE = "from __future__ import annotations\n\n"


@pytest.fixture(params=[False, True], ids=["plain", "from __future__"])
def own(request, tmp_path):
    """The file of a method of one's own, which is known from now on."""
    path = tmp_path / "my_method.py"
    text = OWN
    if request.param:
        text = text.replace("from dataclasses", f"{FUTURE}from dataclasses", 1)
    write(path, text)
    assert settings.row_class(f"{path}:Mine").key == "mine"
    return path


def of_own(path):
    return fingerprint.code_fingerprint(PARAMS.experiment(f"{path}:Mine", 1))


SAME = {
    "a comment": ("WEIGHT = 2.0", "WEIGHT = 2.0  # heavy"),
    "a docstring": ("Return it weighted", "Return it heavier"),
    "a title": ('title = "Mine"', 'title = "FedProx, mine"'),
    "a function that it does not use": ("    return x\n\n\n@data", "    return 3 * x\n\n\n@data"),
    "another class": ("\n\n@dataclass", "\n\nclass Other(FedProx):\n    pass\n\n\n@dataclass"),
}
OTHER = {
    "a helper": ("return weight(x)", "return weight(x) + 1"),
    "a helper's helper": ("return HEAVY * WEIGHT", "return HEAVY / WEIGHT"),
    "a table": ('TABLE = {"term": 1.0}', 'TABLE = {"term": 2.0}'),
    "a line of a table": ('TABLE["more"] = 0.0', 'TABLE["more"] = 1.0'),
    "a condition": ("    HEAVY = 1.0", "    HEAVY = 2.0"),
    "a constant": ("WEIGHT = 2.0", "WEIGHT = 3.0"),
    "the method": ("return helper(super()", "return -helper(super()"),
    "its base": ("class Mine(FedProx)", "class Mine(CoOp)"),
}


@pytest.mark.parametrize("case", SAME | OTHER)
def test_a_method_of_ones_own_is_followed_through_its_file(case, own):
    before = of_own(own)
    replace(own, *(SAME | OTHER)[case])
    assert (of_own(own) != before) == (case in OTHER)


def test_a_method_of_ones_own_depends_on_the_package_as_its_base_does(own, package):
    before = of_own(own)
    write(package / "methods.py", (package / "methods.py").read_text() + METHOD)
    assert of_own(own) == before
    replace(package / "methods.py", "self.mu / 2 *", "self.mu / 3 *")
    after = of_own(own)
    assert after != before
    replace(package / "gate.py", "x[..., :: x.shape[-1] // g]", "x[..., :g]")
    assert of_own(own) != after, "a module that is imported as a whole"


WAYS = {
    "a module": ("import fpl.methods", "fpl.methods.FedProx"),
    "everything": ("from fpl.methods import *", "FedProx"),
    "by way of another module": ("from fpl.released.methods import FedProx", "FedProx"),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_base_counts_however_it_is_imported(way, package, tmp_path):
    statement, base = WAYS[way]
    path = tmp_path / "mine.py"
    head = f"from dataclasses import dataclass\n\n{statement}\n\n\n@dataclass(frozen=True)\n"
    write(path, f"{head}class Mine({base}):\n    key = title = 'mine'\n")
    before = of_own(path)
    replace(package / "methods.py", "self.mu / 2 *", "self.mu / 3 *")
    assert of_own(path) != before


HIDING = """
from dataclasses import dataclass
from fpl.methods import PromptFL

def weight(x):
    return 1.0 * x

def noise(x):
    return 1.0 * x

TABLE = {"a": 0.0}
TABLE.update(a=1.0)
MORE = [0.0, 1.0]
del MORE[0]
STEPS = []
for step in range(2):
    STEPS.append(step)

@dataclass(frozen=True)
class Mine(PromptFL):
    key = title = "mine"
    source, heavy = "here", 1.0

    def pool(self, x, weight=weight):
        sums = [noise for noise in x]
        return noise(sum(sums)) + TABLE["a"] + MORE[0] + sum(STEPS) + self.heavy

setattr(Mine, "light", 1.0)
"""
HIDDEN = {
    "a default of the same name": (
        "def weight(x):\n    return 1.0",
        "def weight(x):\n    return 2.0",
    ),
    "a variable of a comprehension": ("def noise(x):\n    return 1", "def noise(x):\n    return 2"),
    "a call at the top": ("TABLE.update(a=1.0)", "TABLE.update(a=2.0)"),
    "what is deleted": ("del MORE[0]", "del MORE[1]"),
    "a loop at the top": ("STEPS.append(step)", "STEPS.append(2 * step)"),
    "an attribute of the class": ('"light", 1.0', '"light", 2.0'),
    "a value beside a printed name": ('"here", 1.0', '"here", 2.0'),
}


@pytest.mark.parametrize("case", HIDDEN)
def test_what_a_file_changes_out_of_sight_counts(case, tmp_path):
    path = tmp_path / "mine.py"
    write(path, HIDING)
    before = of_own(path)
    replace(path, *HIDDEN[case])
    assert of_own(path) != before


CALLING = """
from dataclasses import dataclass
from fpl.methods import PromptFL
{statement}

@dataclass(frozen=True)
class Mine(PromptFL):
    key = title = "mine"

    def seen(self, x):
        return {call}(x, 2, 1)
"""
USES = {
    "import fpl.gate": "fpl.gate.pool",
    "import fpl.gate, fpl.methods": "fpl.gate.pool",
    "import fpl": "fpl.gate.pool",
    "import fpl.gate as mixing": "mixing.pool",
    "from fpl import gate": "gate.pool",
    "from fpl.gate import pool as mean": "mean",
    "from fpl.gate import *": "pool",
    "try:\n    from fpl.gate import pool\nexcept ImportError:\n    pass": "pool",
}


@pytest.mark.parametrize("statement", USES)
def test_a_function_counts_however_it_is_imported(statement, package, tmp_path):
    path = tmp_path / "mine.py"
    write(path, CALLING.format(statement=statement, call=USES[statement]))
    before = of_own(path)
    replace(package / "gate.py", "x[..., :: x.shape[-1] // g]", "x[..., :g]")
    assert of_own(path) != before


def test_what_the_loop_leaves_unused_counts_for_a_method_that_uses_it(package, tmp_path):
    path = tmp_path / "mine.py"
    privacy = "from fpl import privacy"
    write(path, CALLING.format(statement=privacy, call="privacy.noise_multiplier"))
    before, others = of_own(path), fingerprints()
    replace(package / "privacy.py", "return math.sqrt(releases) / mu", "return releases / mu")
    assert of_own(path) != before and not changed(others, fingerprints())


def test_a_file_may_be_moved(own, tmp_path):
    moved = tmp_path / "elsewhere" / own.name
    write(moved, own.read_text())
    assert of_own(moved) == of_own(own)


def test_a_method_in_a_file_of_its_own_changes_no_other(own):
    before = fingerprints(FEW)
    replace(own, "WEIGHT = 2.0", "WEIGHT = 3.0")
    assert fingerprints(FEW) == before


# The record's name holds the fingerprint.


def test_the_name_of_a_record_follows_its_code(package):
    experiment = PARAMS.experiment("fedprox", 1)
    path = runner.key_of("sha", experiment).path
    replace(package / "methods.py", 'title = "Prompt+FedProx"', 'title = "FedProx"')
    assert runner.key_of("sha", experiment).path == path
    replace(package / "methods.py", "self.mu / 2 *", "self.mu / 3 *")
    assert runner.key_of("sha", experiment).path != path
    other = dataclasses.replace(experiment, seed=2)
    assert runner.key_of("sha", other).path not in (path, runner.key_of("sha", experiment).path)
