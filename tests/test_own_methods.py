"""Promise: a method of one's own, in a file of its own, needs no change to the package."""

import json

import pytest
import yaml
from helpers import PARAMS, refuses, standing_in

from fpl import rounds
from fpl.experiments import predict, promises, records, runner, settings
from fpl.experiments.runner import Asked
from fpl.methods import METHODS, PromptFL

KEEP = Asked(keep=True)
FUTURE = "from __future__ import annotations\n\n"
STDLIB = "from dataclasses import dataclass\n"
PYDANTIC = "from pydantic.dataclasses import dataclass\n"
OWN = '''
from fpl.methods import PromptFL


def pull(ctx):
    return ctx.flatten(1).square().sum(1)


@dataclass(frozen=True)
class MyMethod(PromptFL):
    """PromptFL whose prompt is pulled towards zero."""

    title = "Mine"

    lam: float = 0.5
    steps: int = 3
    word: str = "a"

    def loss(self, text, p, context, x, y):
        return super().loss(text, p, context, x, y) + self.lam / 2 * pull(p["ctx"])


class NoDataclass(PromptFL):
    lam = 1.0


@dataclass(frozen=True)
class NoMethod:
    lam: float = 1.0
'''
WRITTEN = {
    "stdlib": STDLIB + OWN,
    "stdlib, from __future__": FUTURE + STDLIB + OWN,
    "pydantic": PYDANTIC + OWN,
    "pydantic, from __future__": FUTURE + PYDANTIC + OWN,
}


@pytest.fixture(params=WRITTEN)
def own(request, tmp_path):
    """The file, as it may be written."""
    path = tmp_path / "my_method.py"
    path.write_text(WRITTEN[request.param])
    return path


def test_it_takes_settings_as_a_method_of_the_package_does(own):
    experiment = settings.Settings().experiment(f"{own}:MyMethod", 1, lam=1, rounds=3)
    assert isinstance(experiment.method, PromptFL)
    assert (experiment.method.lam, type(experiment.method.lam)) == (1.0, float)
    assert (experiment.method.steps, experiment.method.n_ctx) == (3, 16)
    assert (experiment.row, experiment.method.title) == ("mymethod", "Mine")
    flat = experiment.settings()
    assert flat["method"] == "mymethod" and flat["lam"] == 1.0 and flat["rounds"] == 3
    assert "mymethod" not in METHODS


@pytest.mark.parametrize(("given", "read_as"), [("1e-3", 1e-3), (2, 2.0), ("0.5", 0.5)])
def test_numbers_may_come_as_text(own, given, read_as):
    found = settings.Settings().experiment(f"{own}:MyMethod", 1, lam=given).method.lam
    assert found == read_as and type(found) is float


WRONG = {
    "a word for a number": ({"lam": "much"}, ["mymethod.lam", "float", "'much'"]),
    "a fraction for a whole number": ({"steps": 1.5}, ["mymethod.steps", "int", "1.5"]),
    "a truth value": ({"lam": True}, ["mymethod.lam", "True"]),
    "a number for a word": ({"word": 5}, ["mymethod.word", "str", "5"]),
    "a list": ({"lam": [1]}, ["mymethod.lam", "float", "[1]"]),
    "an unknown setting": ({"lamb": 1}, ["unknown parameter of", "'lamb'", "did you mean 'lam'?"]),
    "a base's setting": ({"n_ctx": 0}, ["mymethod.n_ctx", "greater than 0", "0"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_settings_are_refused_in_one_sentence(own, case):
    changes, words = WRONG[case]
    words = [word.replace("mymethod", f"{own}:MyMethod") for word in words]
    refuses(lambda: settings.Settings().experiment(f"{own}:MyMethod", 1, **changes), words)


NOT_THERE = {
    "no such file": ("other.py:MyMethod", ["there is no file", "other.py", "FILE.py:CLASS"]),
    "no such class": ("my_method.py:MyMethd", ["'MyMethd'", "did you mean 'MyMethod'?"]),
    "no class named": ("my_method.py:", ["class of", "my_method.py"]),
    "no method": ("my_method.py:NoMethod", ["NoMethod is not a subclass of fpl.methods.PromptFL"]),
    "no dataclass": ("my_method.py:NoDataclass", ["NoDataclass", "@dataclass(frozen=True)"]),
    "no Python": ("my_method.txt:MyMethod", ["unknown method"]),
}


@pytest.mark.parametrize("case", NOT_THERE)
def test_what_is_not_there_is_refused_in_one_sentence(own, case):
    row, words = NOT_THERE[case]
    refuses(lambda: settings.row_class(str(own.parent / row)), words)


BROKEN = {
    "syntax": ("def loss(:\n", "SyntaxError"),
    "import": ("import no_such_module_at_all\n", "ModuleNotFoundError: No module named"),
    "error": ("x = 1 / 0\n", "ZeroDivisionError: division by zero"),
    "an exit": ("import sys\n\nsys.exit(5)\n", "SystemExit: 5"),
    "error of two lines": ('raise ValueError("a\\nb")\n', "ValueError: a b"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_does_not_run_is_refused_in_one_sentence(case, tmp_path):
    code, words = BROKEN[case]
    path = tmp_path / "broken.py"
    path.write_text(code)
    for _ in range(2):  # it is not taken for loaded
        refuses(lambda: settings.row_class(f"{path}:Mine"), [f"{path} does not run", words])
    path.write_text(STDLIB + OWN)
    assert settings.row_class(f"{path}:MyMethod").title == "Mine"


def test_it_stands_in_params_yaml_as_any_other(own, tmp_path):
    row = f"{own}:MyMethod"
    path = tmp_path / "params.yaml"
    rows = {"mine": {"method": row, "lam": 2}, "promptfl": {}}
    tables = {"all": {}, "own": {"rows": rows, "vary": {"steps": [1, 2]}}}
    content = {"methods": {row: {"rounds": 4}, "coop": {}}, "tables": {"10_own": tables}}
    path.write_text(yaml.safe_dump(content))
    params = settings.read(path)
    assert {label for label, _ in params.runs("all")} >= {row, "coop", "majority"}
    runs = [(label, e) for label, e in params.runs("own") if e.seed == 1]
    assert [label for label, _ in runs] == ["mine", "mine", "promptfl"]
    assert [e.method.steps for label, e in runs if label == "mine"] == [1, 2]
    assert {(e.method.lam, e.run.rounds) for label, e in runs if label == "mine"} == {(2.0, 4)}


def sweep(own, **changes):
    experiments = []
    for seed in (1, 2):
        experiments.append(PARAMS.experiment(f"{own}:MyMethod", seed, n_ctx=2, **changes))
        experiments.append(PARAMS.experiment("promptfl", seed))
    return experiments


def test_its_records_are_in_frames_as_all_others(here, own):
    paths = runner.sweep(sweep(own, lam=0.0))
    frame = records.frame(paths)
    assert {*frame["method"]} == {"mymethod", "promptfl"}
    assert {*frame["title"]} == {"Mine", "PromptFL"}
    mine, plain = (frame[frame["method"] == name] for name in ("mymethod", "promptfl"))
    for column in ("accuracy", "up", "down"):
        assert mine[column].tolist() == pytest.approx(plain[column].tolist(), nan_ok=True)
    assert set(mine["lam"]) == {0.0}


@pytest.mark.parametrize("own", ["pydantic, from __future__"], indirect=True)
def test_another_process_can_run_it(world, own):
    """A worker is a process that knows nothing of the file; it must find its classes."""
    with standing_in(world):
        paths = runner.sweep(sweep(own, lam=0.5)[::2], jobs=1)
        made = [json.loads(path.read_text()) for path in paths]
    assert [record["settings"]["seed"] for record in made] == [1, 2]
    assert {record["title"] for record in made} == {"Mine"}


SIGNED = """
from dataclasses import dataclass

from fpl.methods import ZeroShot


@dataclass(frozen=True)
class Signed(ZeroShot):
    def logits(self, text, t, p, context, x):
        return SIGN * super().logits(text, t, p, context, x)
"""


def test_edited_it_is_another_method_in_the_same_session(alone):
    """As in a notebook: neither is the old code run, nor its number taken for the new one's."""
    file = alone / "signed.py"

    def made(sign):
        file.write_text(SIGNED + f"\n\nSIGN = {sign}\n")
        experiment = PARAMS.experiment("signed.py:Signed", 1)
        (path,) = runner.sweep([experiment])
        return experiment, path, records.read(path)["rounds"][0]["accuracy"]

    old, first, right = made(1)
    _, second, wrong = made(-1)
    assert first != second and wrong != right
    with pytest.raises(ValueError, match="signed.py has changed .* name the method again"):
        runner.sweep([old])
    assert made(1)[1:] == (first, right)


OF_RUNS = ["seed", "method", "data", "rounds", "shots", *sorted(records.TAKEN)]


@pytest.mark.parametrize("name", OF_RUNS)
def test_a_setting_that_every_run_has_is_refused(name, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(f"{STDLIB}{OWN.replace('lam: float = 0.5', f'{name}: int = 5')}")
    refuses(lambda: settings.row_class(f"{file}:MyMethod"), [f"a setting {name}", "rename it"])


def test_a_switch_is_kept_as_any_other_setting(alone):
    (alone / "mine.py").write_text(STDLIB + OWN.replace("steps: int = 3", "steep: bool = True"))
    (path,) = runner.sweep([PARAMS.experiment("mine.py:MyMethod", 1, n_ctx=2)], asked=KEEP)
    assert predict.restore(path, method="mine.py:MyMethod").kept.method.steep is True
    refuses(lambda: PARAMS.experiment("mine.py:MyMethod", 1, lam=True), ["lam", "True"])


LEARNT = """
    def init(self, text, gen):
        return {**super().init(text, gen), "net/w": text.words("a")}
"""
READ = """
    def context(self, text, down, client_ids, clients):
        more = {"net/w": clients.feats[client_ids]}
        return {**super().context(text, down, client_ids, clients), **more}
"""


@pytest.mark.parametrize("path", [LEARNT, READ])
def test_a_tensor_whose_name_no_file_can_hold_breaks_a_promise(path, alone):
    code = OWN.replace("    def loss(", f"{path}\n    def loss(")
    (alone / "mine.py").write_text(STDLIB + code)
    broken = promises.check(settings.row_class("mine.py:MyMethod"), {"n_ctx": 2})
    (said,) = [one for one in broken if "a file can hold" in one]
    assert "'net/w'" in said and "rename it" in said


def test_and_no_run_trains_with_it(alone, monkeypatch):
    code = OWN.replace("    def loss(", f"{LEARNT}\n    def loss(")
    (alone / "mine.py").write_text(STDLIB + code)
    experiment = PARAMS.experiment("mine.py:MyMethod", 1, n_ctx=2)
    monkeypatch.setattr(rounds, "train_cohort", lambda *args, **named: pytest.fail("it trained"))
    refuses(lambda: runner.sweep([experiment]), ["'net/w'", "rename it"])


def test_naming_it_from_another_folder_is_naming_the_same(own, monkeypatch):
    whole = settings.row_class(f"{own}:MyMethod")
    monkeypatch.chdir(own.parent)
    assert settings.row_class("my_method.py:MyMethod") is whole
