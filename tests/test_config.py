"""Promise: settings are read whole or refused.

Every one of them reaches what it names, and the record that is found by it.
"""

import copy
import dataclasses
import itertools

import pytest
import yaml
from helpers import OTHER, ROOT

from fpl.controls import CONTROLS
from fpl.experiments import settings, values
from fpl.methods import METHODS

CONTENT = yaml.safe_load((ROOT / "params.yaml").read_text())
PARAMS = settings.Settings(methods={"coop": {"rounds": 1, "n_ctx": 4}, "pfedmoap": {"lam": 0.5}})
ROWS = [*METHODS, *CONTROLS]


def read(tmp_path, way, value):
    """Return the settings of params.yaml with another value at this path in the tree."""
    content = copy.deepcopy(CONTENT)
    place = content
    for key in way[:-1]:
        place = place[key]
    place[way[-1]] = value
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(content))
    return settings.read(tmp_path / "params.yaml")


def test_params_yaml_reads():
    params = settings.read(ROOT / "params.yaml")
    for section in ("data", "backbone", "partition", "run"):
        assert dataclasses.asdict(getattr(params, section)).items() >= CONTENT[section].items()
    assert params.seeds == tuple(CONTENT["seeds"]) and params.methods == CONTENT["methods"]
    assert {*params.tables} == {name for shown in CONTENT["tables"].values() for name in shown}
    table = params.runs("table1")
    rows = [*CONTENT["methods"], *CONTROLS]
    found = {(label, e.row, e.seed) for label, e in table}
    assert found == {(row, row, seed) for row in rows for seed in CONTENT["seeds"]}
    for _, e in table:
        assert e.settings().items() >= CONTENT["methods"].get(e.row, {}).items()


WORLDS = """
data: {name: shapes, seed: 3}
run: {rounds: 4, lr: 0.1}
partition: {shots: 5}
datasets:
  other: {data: {name: own, root: x}, run: {rounds: 7}, backbone: {name: RN50}}
seeds: [1, 2]
methods: {coop: {rounds: 1}, promptfl: {}, pfedmoap: {n_experts: 2}}
tables:
  10_all: {all: {}}
  11_two:
    two:
      data: [shapes, other]
      rows: {promptfl: {}, coop: {}, near: {method: pfedmoap, lam: 3}}
      set: {rounds: 9, gate_lr: 0.5, heads: 4}
      vary: {n_experts: [0, 1], shots: [1, 2]}
"""


def test_a_table_is_a_grid_of_rows_data_sets_values_and_seeds(tmp_path):
    (tmp_path / "params.yaml").write_text(WORLDS)
    params = settings.read(tmp_path / "params.yaml")
    labels = [label for label, _ in params.runs("all")[::2]]
    assert labels == ["coop", "promptfl", "pfedmoap", *CONTROLS]
    found = []
    for label, experiment in params.runs("two"):
        s = experiment.settings()
        found.append((s["data"], label, s.get("n_experts"), s["shots"], s["seed"]))
    wanted = []
    for on, label in itertools.product(("shapes", "other"), ("promptfl", "coop", "near")):
        varied = itertools.product((0, 1) if label == "near" else (None,), (1, 2), (1, 2))
        wanted += [(on, label, *values) for values in varied]
    assert found == wanted
    names = ("method", "rounds", "heads", "lam")
    runs = [experiment.settings() for _, experiment in params.runs("two")]
    found = {tuple(s.get(name) for name in names) for s in runs}
    near = ("pfedmoap", 9, 4, 3)
    assert found == {("promptfl", 9, None, None), ("coop", 1, None, None), near}


def test_a_table_belongs_to_its_notebook_and_to_no_other(tmp_path):
    (tmp_path / "params.yaml").write_text(WORLDS)
    params = settings.read(tmp_path / "params.yaml")
    assert params.tables_of("11_two") == params.tables_of("two") == ["two"]
    assert params.tables["all"].notebook == "10_all"
    with pytest.raises(ValueError, match="unknown table, notebook or method 'tow'.* mean 'two'"):
        params.tables_of("tow")
    (tmp_path / "params.yaml").write_text(WORLDS.replace("{all: {}}", "{two: {}}"))
    with pytest.raises(ValueError, match="tables.11_two.two stands under 10_all too: rename one"):
        settings.read(tmp_path / "params.yaml")


def test_a_profile_says_what_differs_from_the_file_beneath_it(tmp_path):
    (tmp_path / "params.yaml").write_text(WORLDS)
    path = tmp_path / "profile.yaml"
    path.write_text(
        "over: params.yaml\nrun: {rounds: 9}\nseeds: [3]\ntables: {10_all: null}\n"
        "datasets: {other: {run: {lr: 0.5}}}\n"
    )
    below, above = settings.read(tmp_path / "params.yaml"), settings.read(path)
    assert (above.run.rounds, above.run.lr, above.seeds) == (9, 0.1, (3,))
    assert above.methods == below.methods and [*above.tables] == ["two"]
    assert (above.source("other").run.rounds, above.source("other").run.lr) == (7, 0.5)


@pytest.mark.parametrize(
    ("change", "read_as"),
    [("run.lr=1e-3", {"lr": 1e-3}), ("run.rounds=8", {"rounds": 8}), ("run={lr: 2}", {"lr": 2.0})],
)
def test_a_change_on_the_command_line_is_as_if_the_file_said_so(change, read_as, tmp_path):
    (tmp_path / "params.yaml").write_text("seeds: [4]\n")
    found = settings.read(tmp_path / "params.yaml", [change])
    assert found == settings.Settings(seeds=(4,), run=settings.Training(**read_as))


def test_a_data_set_differs_from_the_file_where_it_says_so(tmp_path):
    (tmp_path / "params.yaml").write_text(WORLDS)
    params = settings.read(tmp_path / "params.yaml")
    first = params.source()
    other = params.source("other")
    assert first == params.source("shapes")
    assert first.run == params.run and first.data == params.data
    assert (other.run.rounds, other.run.lr, other.partition.shots) == (7, 0.1, 5)
    assert (other.data.name, other.data.seed, other.backbone.name) == ("own", 3, "RN50")
    assert params.experiment("promptfl", 1, "other").run.rounds == 7
    assert params.experiment("promptfl", 1).run.rounds == 4


LISTS = {
    "3": [3],
    "0,1,.5": [0, 1, 0.5],
    "knn,random": ["knn", "random"],
    "1:3": [1, 2, 3],
    "0:1:0.5": [0, 0.5, 1],
}


@pytest.mark.parametrize("text", LISTS)
def test_lists_and_ranges(text):
    assert values.several(text, "x") == LISTS[text]


@pytest.mark.parametrize("text", ["3:1", "1:2:0", "a:b", "1:3:-1"])
def test_a_range_without_values_is_refused(text):
    with pytest.raises(ValueError, match="^x"):
        values.several(text, "x")


def test_what_the_file_does_not_say_is_the_default(tmp_path):
    (tmp_path / "params.yaml").write_text("seeds: [4]\n")
    assert settings.read(tmp_path / "params.yaml") == settings.Settings(seeds=(4,))


D_GATE = ["tables", "11_ablations", "d_gate"]
UNKNOWN = {
    "section": (["methodss"], {}, "methodss", "methods"),
    "data": (["data", "sed"], 1, "sed", "seed"),
    "backbone": (["backbone", "weight"], "x", "weight", "weights"),
    "partition": (["partition", "client"], 5, "client", "clients"),
    "run": (["run", "local_epoch"], 5, "local_epoch", "local_epochs"),
    "method": (["methods", "pfedmoa"], {}, "pfedmoa", "pfedmoap"),
    "method, capitals": (["methods", "PromptFL"], {}, "PromptFL", "promptfl"),
    "parameter of a method": (["methods", "pfedmoap", "n_expert"], 3, "n_expert", "n_experts"),
    "parameter that another method has": (["methods", "promptfl", "lam"], 3, "lam", None),
    "table": ([*D_GATE, "varies"], {}, "varies", "vary"),
    "varied": (
        ["tables", "11_ablations", "d_gate", "vary"],
        {"d_gates": [32]},
        "d_gates",
        "d_gate",
    ),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_an_unknown_name_is_an_error_with_the_nearest_one(case, tmp_path):
    way, value, wrong, near = UNKNOWN[case]
    with pytest.raises(ValueError) as error:
        read(tmp_path, way, value)
    message = str(error.value)
    assert message.startswith("unknown ") and repr(wrong) in message and "\n" not in message
    assert f"did you mean {near!r}?" in message if near else "did you mean " in message


WRONG_TYPE = [
    (["run", "rounds"], "ten", "run.rounds"),
    (["run", "rounds"], 2.5, "run.rounds"),
    (["run", "rounds"], "2.5", "run.rounds"),
    (["run", "rounds"], float("inf"), "run.rounds"),
    (["run", "rounds"], True, "run.rounds"),
    (["run", "rounds"], None, "run.rounds"),
    (["run", "rounds"], [10], "run.rounds"),
    (["run", "lr"], "fast", "run.lr"),
    (["run", "lr"], {}, "run.lr"),
    (["run", "lr"], None, "run.lr"),
    (["run", "lr"], True, "run.lr"),
    (["run", "schedule"], 5, "schedule"),
    (["partition", "shots"], False, "partition.shots"),
    (["data", "seed"], "one", "data.seed"),
    (["data", "name"], None, "data.name"),
    (["methods", "pfedmoap", "lam"], "half", "pfedmoap.lam"),
    (["methods", "pfedmoap", "heads"], True, "pfedmoap.heads"),
    (["methods", "coop", "local_epochs"], "many", "coop.local_epochs"),
    (["tables", "11_ablations", "n_experts", "vary", "n_experts"], [0, 1.5], "pfedmoap.n_experts"),
    (["tables", "11_ablations", "lam", "vary", "lam"], 2, "lam"),
    (["tables", "11_ablations", "lam"], [1], "tables.11_ablations.lam"),
    (["datasets"], {"a": 3}, "datasets.a"),
    (["run"], 5, "run"),
    (["methods"], ["promptfl"], "methods"),
    (["methods", "promptfl"], 5, "promptfl"),
    (["seeds"], 3, "seeds"),
    (["seeds"], [1, 2.5], "seeds"),
    (["seeds"], ["one"], "seeds"),
    (["seeds"], [True], "seeds"),
]


@pytest.mark.parametrize(
    ("way", "value", "named"), WRONG_TYPE, ids=[f"{case[2]}={case[1]}" for case in WRONG_TYPE]
)
def test_a_wrong_type_is_refused(way, value, named, tmp_path):
    with pytest.raises(ValueError) as error:
        read(tmp_path, way, value)
    assert named in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["a: [", "run: {rounds: 1", "just a word", "[1, 2]"])
def test_a_file_that_is_no_mapping_is_refused_by_name(text, tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        settings.read(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("given", "read_as"), [("1e-3", 0.001), ("0.5", 0.5), (1, 1.0), (0.002, 0.002)]
)
def test_numbers_may_come_as_text(given, read_as, tmp_path):
    found = read(tmp_path, ["run", "lr"], given).run.lr
    assert found == read_as and type(found) is float
    changed = read(tmp_path, ["methods", "pfedmoap", "lam"], given)
    found = changed.experiment("pfedmoap", 1).method.lam
    assert found == read_as and type(found) is float


@pytest.mark.parametrize(("given", "read_as"), [("8", 8), (8.0, 8), (8, 8)])
def test_whole_numbers_too(given, read_as, tmp_path):
    found = read(tmp_path, ["run", "rounds"], given).run.rounds
    assert found == read_as and type(found) is int


OWNERS = [
    ("pfedmoap", "lam", "method", 3.0),
    ("pfedmoap", "n_ctx", "method", 3),
    ("zeroshot", "template", "method", "a {}."),
    ("ridge_own", "alpha", "method", 3.0),
    ("coop", "rounds", "run", 3),
    ("promptfl", "schedule", "run", "cosine"),
    ("promptfl", "participation", "run", 0.5),
    ("promptfl", "kind", "partition", "even"),
    ("majority", "shots", "partition", 3),
]


@pytest.mark.parametrize(("row", "key", "owner", "value"), OWNERS)
def test_a_change_reaches_its_owner_and_nothing_else(row, key, owner, value):
    before = PARAMS.experiment(row, 1)
    after = PARAMS.experiment(row, 1, **{key: value})
    methods = {**PARAMS.methods, row: {**PARAMS.methods.get(row, {}), key: value}}
    assert dataclasses.replace(PARAMS, methods=methods).experiment(row, 1) == after
    assert getattr(getattr(after, owner), key) == value
    changed = dataclasses.replace(getattr(before, owner), **{key: value})
    assert after == dataclasses.replace(before, **{owner: changed})
    assert after != before


def test_a_change_beats_the_file_and_leaves_it_alone():
    assert (
        PARAMS.experiment("coop", 1).run.rounds == 1
        and PARAMS.experiment("coop", 1, rounds=7).run.rounds == 7
    )
    assert PARAMS.experiment("promptfl", 1).run.rounds == PARAMS.run.rounds == 10


@pytest.mark.parametrize("row", ROWS)
def test_settings_are_complete(row):
    """Whatever part of an experiment changes, its settings change there and only there."""
    base = PARAMS.experiment(row, 1)
    parts = {part: getattr(base, part) for part in ("method", "run", "partition")}
    names = [f.name for part in parts.values() for f in dataclasses.fields(part)]
    assert len(names) == len(set(names)), "one name, two owners"
    assert sorted(base.settings()) == sorted(["method", "seed", "data", *names])
    for part, value in parts.items():
        for name in (f.name for f in dataclasses.fields(value)):
            new = OTHER[name] if name in OTHER else getattr(value, name) + 1
            changed = dataclasses.replace(base, **{part: dataclasses.replace(value, **{name: new})})
            assert changed.settings() == {**base.settings(), name: new}
    assert dataclasses.replace(base, seed=2).settings() == {**base.settings(), "seed": 2}
    assert len({PARAMS.experiment(r, 1).settings()["method"] for r in ROWS}) == len(ROWS)
