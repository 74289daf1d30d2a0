"""Promise: settings are read whole or refused.

Every one of them reaches what it names, and the record that is found by it.
"""

import copy
import dataclasses
import itertools
import os
from pathlib import Path

import pytest
import yaml
from helpers import OTHER, ROOT, refuses

from fpl import cli
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
    said = {row: dict(CONTENT["methods"].get(row, {})) for row in rows}
    seeds = {row: CONTENT["seeds"][: own.pop("seeds", None)] for row, own in said.items()}
    assert found == {(row, row, seed) for row in rows for seed in seeds[row]}
    for _, e in table:
        assert e.settings().items() >= said[e.row].items()


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


def test_a_value_that_no_row_takes_is_refused(tmp_path):
    (tmp_path / "params.yaml").write_text(
        "methods: {pfedmoap: {n_experts: 9}}\n"
        "tables: {a: {t: {set: {n_experts: 4}, rows: [pfedmoap, promptfl]}}}\n"
    )
    with pytest.raises(ValueError, match=r"tables.t.set.n_experts does nothing: .* in rows"):
        settings.read(tmp_path / "params.yaml")


VARIED = {
    "in no row": (
        "rows: [promptfl, coop], vary: {n_experts: [1, 2]}",
        "vary.n_experts does nothing",
    ),
    "that a row sets": (
        "rows: {promptfl: {}, few: {method: promptfl, shots: 9}}, vary: {shots: [1, 2]}",
        "rows.few sets shots, which the table varies",
    ),
}


@pytest.mark.parametrize("case", VARIED)
def test_a_value_that_varies_in_vain_is_refused(case, tmp_path):
    table, said = VARIED[case]
    (tmp_path / "params.yaml").write_text(f"tables: {{a: {{t: {{{table}}}}}}}\n")
    with pytest.raises(ValueError, match=rf"^tables\.t\.{said}"):
        settings.read(tmp_path / "params.yaml")


def test_a_data_set_of_the_section_s_name_differs_wherever_it_is_named(tmp_path):
    (tmp_path / "params.yaml").write_text(
        "data: {name: shapes}\nrun: {rounds: 4}\ndatasets: {shapes: {run: {rounds: 7}}}\n"
        "tables: {a: {one: {rows: [promptfl]}, two: {rows: [promptfl], data: [shapes]}}}\n"
    )
    params = settings.read(tmp_path / "params.yaml")
    runs = [params.experiment("promptfl", 1), params.experiment("promptfl", 1, on="shapes")]
    runs += [params.runs(table)[0][1] for table in ("one", "two")]
    assert [experiment.run.rounds for experiment in runs] == [7] * 4


@pytest.mark.parametrize("change", ["data.root=photos", "data.layout=coop"])
def test_a_place_of_images_that_are_drawn_is_refused(change):
    refuses(lambda: settings.read(changes=[change]), ["does nothing for shapes", "data.name"])
    assert settings.read(changes=[change, "data.name=own"]).data.name == "own"


def test_the_nearest_word_on_how_many_seeds_holds(tmp_path):
    """A row's, then the method's, then the table's; never more than there are."""
    (tmp_path / "params.yaml").write_text(
        "seeds: [5, 6, 7, 8]\nmethods: {coop: {seeds: 2}, promptfl: {}}\n"
        "tables: {a: {t: {seeds: 3, rows: {coop: {}, promptfl: {}, fedprox: {seeds: '9'}}}}}\n"
    )
    found = {}
    for label, experiment in settings.read(tmp_path / "params.yaml").runs("t"):
        found.setdefault(label, []).append(experiment.seed)
    assert found == {"coop": [5, 6], "promptfl": [5, 6, 7], "fedprox": [5, 6, 7, 8]}
    (tmp_path / "params.yaml").write_text("seeds: [1, 2, 1]\n")
    refuses(lambda: settings.read(tmp_path / "params.yaml"), ["seeds", "the same seed twice"])


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


DEEP = {
    "methods.finetuned.tune_epochs=1": lambda s: (
        s.experiment("finetuned", 1).method.tune_epochs == 1
    ),
    "methods.fedpha.rounds=3": lambda s: s.experiment("fedpha", 1).run.rounds == 3,
    "methods.zeroshot.template=2024 {}": lambda s: s.said("zeroshot") == {"template": "2024 {}"},
    "datasets.styles.data.root=2024": lambda s: s.source("styles").data.root == "2024",
    "datasets.styles.partition.shots=3": lambda s: s.source("styles").partition.shots == 3,
    "datasets.shapes_views.run.rounds=3": lambda s: s.source("shapes_views").run.rounds == 3,
    "tables.11_ablations.lam.set.rounds=3": lambda s: (
        [s.tables[name].set["rounds"] for name in ("lam", "d_gate")] == [3, 5]
    ),
    "tables.15_shots.shots.vary={lr: [1]}": lambda s: s.tables["shots"].vary == {"lr": [1]},
}


@pytest.mark.parametrize("change", DEEP)
def test_a_change_reaches_any_value_and_no_other(change):
    assert DEEP[change](settings.read(ROOT / "params.yaml", [change]))


def test_a_change_reaches_a_row_whose_name_has_dots(tmp_path):
    (tmp_path / "my.method.py").write_text(
        "from dataclasses import dataclass\nfrom fpl.methods import PromptFL\n\n\n"
        "@dataclass(frozen=True)\nclass Mine(PromptFL):\n    lam: float = 0.5\n"
    )
    row = f"{tmp_path}/my.method.py:Mine"
    path = tmp_path / "params.yaml"
    for content in ("seeds: [1]", yaml.safe_dump({"methods": {row: {"rounds": 2}}})):
        path.write_text(content)
        assert settings.read(path, [f"methods.{row}.lam=3"]).experiment(row, 1).method.lam == 3


ASTRAY = {
    "methods.finetund.tune_epochs=1": ["unknown method 'finetund'", "mean 'finetuned'?"],
    "methods.finetuned.tune_epoch=1": ["of finetuned 'tune_epoch'", "mean 'tune_epochs'?"],
    "methods.finetuned.tune_epochs.x=1": ["methods.finetuned.tune_epochs", "dict, not 5"],
    "datasets.style.run.rounds=1": ["name in datasets 'style'", "mean 'styles'?"],
    "datasets.styles.runs.rounds=1": ["section of datasets.styles 'runs'", "mean 'run'?"],
    "datasets.styles.run.round=1": ["in datasets.styles.run 'round'", "mean 'rounds'?"],
    "tables.15_shot.shots.seeds=1": ["name in tables '15_shot'", "mean '15_shots'?"],
    "tables.15_shots.shot.seeds=1": ["name in tables.15_shots 'shot'", "mean 'shots'?"],
    "tables.15_shots.shots.sets.rounds=1": ["part of tables.15_shots.shots 'sets'", "'set'?"],
    "seeds.x=1": ["seeds", "dict"],
    "run.rounds.x=1": ["run.rounds", "dict, not 10"],
}


@pytest.mark.parametrize("change", ASTRAY)
def test_a_change_of_what_is_not_there_is_refused_with_the_nearest_name(change):
    refuses(lambda: settings.read(ROOT / "params.yaml", [change]), ASTRAY[change])


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


def test_a_data_set_of_another_name_keeps_its_own_store():
    """As when own features are tried in the demo's folder."""
    own = ["data.name=own", "data.root=own.csv", "data.store=mine"]
    params = settings.read(ROOT / "params.yaml", own)
    stores = {name: params.source(name).data.store for name in ("own", "styles", "shapes_views")}
    assert stores == {"own": "mine", "styles": "", "shapes_views": "mine"}


LISTS = {
    "3": ["3"],
    "0, 1,.5": ["0", "1", ".5"],
    "knn,random": ["knn", "random"],
    "a: b": ["a: b"],
    "1:3": [1, 2, 3],
    "0:1:0.5": [0, 0.5, 1],
}


@pytest.mark.parametrize("text", LISTS)
def test_lists_and_ranges(text):
    assert values.several(text, "x") == LISTS[text]


@pytest.mark.parametrize(
    "text", ["3:1", "1:2:0", "1:3:-1", "0:1e9", "0:1:1e-9", "1:2:3x", "1:2:1e999"]
)
def test_a_range_without_values_or_with_too_many_is_refused(text):
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
    (["tables", "11_ablations", "lam", "seeds"], 0, "tables.11_ablations.lam.seeds"),
    (["tables", "11_ablations", "lam", "seeds"], [1], "tables.11_ablations.lam.seeds"),
    (["methods", "coop", "seeds"], True, "methods.coop.seeds"),
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


LAUGHS = "seeds:\n- &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"- &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 8)
)
MERGES = "m0: &m0 {a: 1}\n" + "".join(
    f"m{i}: &m{i} {{<<: [{','.join([f'*m{i - 1}'] * 10)}]}}\n" for i in range(1, 9)
)
HUNDRED = "[" + ",".join(["1"] * 100) + "]"
NO_SETTINGS = {
    "open list": ("a: [", "line 1"),
    "open mapping": ("run: {rounds: 1", "line 1"),
    "a word": ("just a word", "dict"),
    "a list": ("[1, 2]", "dict"),
    "nothing": ("", "empty"),
    "comments only": ("# run: {}\n", "empty"),
    "another encoding": ("results: é".encode("latin-1"), "utf-8"),
    "a key twice": ("run: {rounds: 5, rounds: 7}", "'rounds'", "twice"),
    "a section twice": ("run: {rounds: 5}\nrun: {lr: 0.1}", "'run'", "twice", "line 2"),
    "a key twice beside a merge": ("run: {<<: {lr: 1}, lr: 2, lr: 3}", "'lr'", "twice"),
    "a list as a name": ("[a]: 1", "a name must be text"),
    "an object": ("run: !!python/object:os.system {}", "line 1"),
    "a tag that does not fit": ("run: {lr: !!bool x}", "YAML"),
    "400 digits": (f"run: {{rounds: {'9' * 400}}}", "20 digits"),
    "aliases of aliases": (f"{LAUGHS}data: *a7", "100000 values"),
    "merges of merges": (MERGES, "100000 values"),
    "an alias of itself": ("seeds: &a [*a]", "100000 values"),
    "too deep": ("seeds: " + "[" * 5000, "20 deep"),
    "too long": ("seeds: [" + "1," * 60_000 + "1]", "100000 characters"),
    "too many runs of a row": (
        f"tables: {{b: {{t: {{rows: [fedprox], vary: {{lr: &l {HUNDRED}, mu: *l, shots: *l}}}}}}}}",
        "1000000 combinations",
    ),
    "over itself": ("over: params.yaml", "correct `over`"),
    "a row that is a list": ("tables: {b: {t: {rows: [[a]]}}}", "tables.b.t.rows", "str"),
    "a method of nothing": ("tables: {b: {t: {rows: {x: {method: null}}}}}", "rows.x.method"),
    "a data set that is a list": ("tables: {b: {t: {data: [[a]]}}}", "tables.b.t.data", "str"),
}


@pytest.mark.parametrize("case", NO_SETTINGS)
def test_a_file_that_is_no_mapping_or_far_too_much_is_refused_by_name(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, *parts = NO_SETTINGS[case]
    path = tmp_path / "params.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refuses(settings.read, parts)
    if not case.startswith(("too many", "a row", "a method", "a data set")):
        refuses(settings.read, ["params.yaml"])


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_a_folder_or_a_pipe_is_no_settings_file(make, tmp_path):
    make(tmp_path / "params.yaml")
    refuses(lambda: settings.read(tmp_path / "params.yaml"), ["params.yaml", "not a file"])


WHOLE = {"010": 10, "1_000": 1000, "8.0": 8, "+5": 5}
NO_WHOLE = ["1:30", "yes", "on", "0x", "2024-01-01", "1.5", "~", ".inf", "1e99", "[1]", "9" * 400]
NO_NUMBER = ["1:30", ".nan", ".inf", "-.inf", "1e999", "yes", "0.1 0.2", "-0.1"]


@pytest.fixture(params=["file", "option", "change"])
def way(request, tmp_path, monkeypatch):
    """A way in which a setting of section run may be given as text; returns the section."""
    monkeypatch.chdir(tmp_path)

    def given(key, text):
        in_file = request.param == "file"
        Path("params.yaml").write_text(f"run: {{{key}: {text}}}" if in_file else "seeds: [1]")
        if request.param == "change":
            return settings.read().experiment("promptfl", 1, **{key: text}).run
        return settings.read(None, [] if in_file else [f"run.{key}={text}"]).run

    return given


@pytest.mark.parametrize("text", WHOLE)
def test_a_number_is_what_people_mean_wherever_it_is_written(way, text):
    found = way("rounds", text).rounds
    assert found == WHOLE[text] and type(found) is int


@pytest.mark.parametrize(
    ("key", "text"), [("rounds", text) for text in NO_WHOLE] + [("lr", text) for text in NO_NUMBER]
)
def test_a_number_that_nobody_can_mean_is_refused_wherever_it_is_written(way, key, text):
    refuses(lambda: way(key, text), [])


NONSENSE = {
    "promptfl": ["lr=-0.002", "gate_lr=-1", "momentum=1", "momentum=-0.1", "weight_decay=-1"]
    + ["rounds=1000001", "local_epochs=1e9", "batch_size=99999999", "clients=1e12", "shots=1e7"]
    + ["concentration=inf", "concentration=0", "split_seed=-1", "shot_seed=4294967296"]
    + ["init_seed=-1", "epsilon=nan", "delta=nan", "clip=inf", "participation=nan"],
    "pfedmoap": ["lam=-1", "lam=inf", "gate_scale=-1", "gate_scale=nan", "n_experts=1e8"],
    "fedprox": ["mu=-5"],
    "fedamp": ["attraction=-1", "step=inf", "step=0"],
    "fedpgp": ["mu=-1", "tau=inf", "rank=10000000"],
    "pfedprompt": ["blend=-1", "beta=-1"],
    "fedotp": ["gamma=nan", "eps=inf"],
    "ridge_own": ["alpha=inf", "alpha=-1", "alpha=nan"],
}


@pytest.mark.parametrize(
    ("row", "change"), [(row, change) for row, changes in NONSENSE.items() for change in changes]
)
def test_a_setting_without_sense_is_refused_by_name(row, change):
    name, _, text = change.partition("=")
    refuses(lambda: PARAMS.experiment(row, 1, **{name: text}), [f"{row}.{name} must be "])
    if text not in ("nan", "inf"):
        refuses(lambda: PARAMS.experiment(row, 1, **{name: float(text)}), [f"{row}.{name} must"])


@pytest.mark.parametrize("wrong", [True, None, "0x1", "1:3", "1,2", 1.5, [1, 2], -1, 2**32, "x"])
def test_a_seed_is_checked_however_it_is_given(wrong):
    refuses(lambda: PARAMS.experiment("promptfl", wrong), ["seed must be "])
    refuses(lambda: settings.seeds([wrong]), ["seeds must be "])


@pytest.mark.parametrize("given", [1, 1.0, "1", "01"])
def test_a_seed_is_a_whole_number_in_every_record(given):
    assert repr(PARAMS.experiment("promptfl", given).settings()["seed"]) == "1"


TEXTS = ["photos #2", "2024", "010", "a: b", "yes", "[x]", "~", "", "'a'", "x=y", " x", "{}"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_on_the_command_line_is_taken_as_it_stands(text, tmp_path):
    (tmp_path / "params.yaml").write_text("data: {name: own}\nseeds: [1]\nresults: out")
    read = settings.read(tmp_path / "params.yaml", [f"data.root={text}", f"results={text}"])
    assert (read.data.root, read.results) == (text, text)
    assert read.experiment("promptfl", 1, held_out=text).partition.held_out == text


def test_names_in_a_file_are_taken_as_they_stand(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(
        "datasets: {2024: {data: {name: own, root: 2024-01-01, store: x}}, 010: {}, yes: {}}"
    )
    read = settings.read(path)
    assert [*read.datasets] == ["2024", "010", "yes"]
    assert read.source("2024").data.root == "2024-01-01"
    path.write_text("data: {root: 2024}")
    refuses(lambda: settings.read(path), ["data.root", "quotes"])


@pytest.mark.parametrize("given", [["lam=1", "lam=2"], ["lam"], ["=1"]])
def test_a_setting_on_the_command_line_has_a_name_and_stands_there_once(given):
    refuses(lambda: values.assignments(given, "name=value"), ["lam" if given != ["=1"] else "=1"])
    refuses(lambda: settings.read(ROOT / "params.yaml", given), [])


def test_combinations_are_a_grid_of_bounded_size():
    lists = {"a": [1, 2], "b": ["x", "y"]}
    found = [(chosen["a"], chosen["b"]) for chosen in values.combinations(lists, "t")]
    assert found == [(1, "x"), (1, "y"), (2, "x"), (2, "y")]
    many = {name: range(100) for name in "abc"}
    refuses(lambda: values.combinations(many, "t"), ["t asks for 1000000 combinations"])


ORDERS = [
    ["run", "pfedmoap", "n_experts=1", "--set", "data.name=own", "--fresh", "seed=2"],
    ["run", "--fresh", "--set", "data.name=own", "pfedmoap", "n_experts=1", "seed=2"],
    ["run", "pfedmoap", "--fresh", "n_experts=1", "--set", "data.name=own", "seed=2"],
]


@pytest.mark.parametrize("line", ORDERS)
def test_settings_may_stand_anywhere_on_the_line(line):
    read = cli.parser().parse_args(line)
    assert (read.method, read.changes) == ("pfedmoap", ["n_experts=1", "seed=2"])
    assert (read.set, read.fresh) == (["data.name=own"], True)


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("sweep table1 --jobs 2 table2", "what", ["table1", "table2"]),
        ("features --all", "action", "extract"),
        ("features --force import x.pack", "action", "import"),
        ("check own.py:Mine lam=1 -- mu=2", "changes", ["lam=1", "mu=2"]),
        ("data --root x check dtd", "name", "dtd"),
        ("notebook -p a 1 x.ipynb -p b 2 y.ipynb", "source", [Path("x.ipynb"), Path("y.ipynb")]),
        ("bench --batch 2 -- scaling", "what", "scaling"),
        ("repro features -- -f", "dvc", ["features", "-f"]),
        ("repro -- -f --dry", "dvc", ["-f", "--dry"]),
    ],
)
def test_so_may_the_arguments_of_every_command(line, name, value):
    assert getattr(cli.parser().parse_args(line.split()), name) == value


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("run", "fpl run: error: the following arguments are required: method\n"),
        ("check", "fpl check: error: the following arguments are required: method\n"),
        ("run promptfl --seed 2", "fpl run: error: unrecognized arguments: --seed 2\n"),
        ("sweep --seed 2", "fpl sweep: error: unrecognized arguments: --seed\n"),
    ],
)
def test_what_is_missing_or_unknown_is_said_with_the_usage_of_the_command(line, said, capsys):
    with pytest.raises(SystemExit):
        cli.parser().parse_args(line.split())
    shown = capsys.readouterr().err
    assert shown.endswith(said) and shown.startswith(f"usage: {said.partition(':')[0]} ")


def test_an_option_that_is_given_twice_is_refused(capsys):
    with pytest.raises(SystemExit):
        cli.parser().parse_args(["run", "coop", "--params", "a", "--params", "b"])
    assert "--params is given twice" in capsys.readouterr().err


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


def test_what_methods_say_goes_before_what_a_table_sets():
    table = settings.Table({"promptfl": {"rounds": 7}, "fedprox": {}}, set={"rounds": 9})
    runs = dataclasses.replace(PARAMS, tables={"t": table}).runs("t")
    assert {label: run.run.rounds for label, run in runs} == {"promptfl": 7, "fedprox": 9}


def test_all_tables_together_have_no_more_runs_than_one_may(monkeypatch, tmp_path):
    monkeypatch.setattr(values, "COMBINATIONS", 5)
    table = "{rows: [promptfl], seeds: 3}"
    (tmp_path / "params.yaml").write_text(f"tables: {{a: {{one: {table}, two: {table}}}}}\n")
    refuses(lambda: settings.read(tmp_path / "params.yaml"), ["more than 5 runs", "take some away"])
    monkeypatch.setattr(values, "COMBINATIONS", 6)
    assert len(settings.read(tmp_path / "params.yaml").tables) == 2
