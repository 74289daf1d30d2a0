"""Promise: bad input ends in one sentence that says what and where, before anything is trained."""

import dataclasses
import shutil
from pathlib import Path

import h5py
import pytest
import torch
import yaml
from helpers import BACKBONE, DATA, PARAMS, ROOT, Here, build, standing_in, store_clip
from helpers.processes import Python

from fpl import cli
from fpl.cli import repro, stage
from fpl.data import encoders as clips
from fpl.data import features
from fpl.data.manifest import read_manifest
from fpl.experiments import assemble, cache, runner, settings
from fpl.prompts import PromptTree

HEADER = "path,label,class,split,domain\n"
FILE = {
    "data": {"train_per_class": 2, "test_per_class": 1},
    "backbone": {"name": BACKBONE.name},
    "partition": {"clients": 4, "shots": 2},
    "run": {"rounds": 2, "local_epochs": 1, "batch_size": 8},
    "methods": {
        "promptfl": {"n_ctx": 2},
        "pfedmoap": {"n_ctx": 2, "n_experts": 2, "d_gate": 16, "heads": 4},
    },
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = build(tmp_path_factory.mktemp("world"))
    store_clip(folder / "other", seed=1)
    (folder / "params.yaml").write_text(yaml.safe_dump(FILE))
    return folder


@pytest.fixture
def here(world, monkeypatch):
    monkeypatch.setattr(runner, "ProcessPoolExecutor", Here)
    with standing_in(world):
        yield monkeypatch


def run(row="promptfl", backbone=BACKBONE, **changes):
    """A whole experiment; what is refused must be refused before its first round is over."""
    params = dataclasses.replace(PARAMS, backbone=backbone)
    return lambda monkeypatch: next(iter(assemble.rounds_of(params.experiment(row, 1, **changes))))


def with_features(change, row="promptfl", **changes):
    """The same with features that are not what they were."""

    def call(monkeypatch):
        loaded, feats = cache.load_cached(DATA, BACKBONE, cache.device())
        with monkeypatch.context() as patch:
            patch.setattr(assemble, "load_cached", lambda *args: (loaded, change(feats)))
            return run(row, **changes)(patch)

    return call


def without_tests_of_class_3(feats):
    split = feats.split.copy()
    split[feats.labels.numpy() == 3] = "train"
    return dataclasses.replace(feats, split=split)


def with_a_nan(feats):
    return dataclasses.replace(feats, feats=feats.feats.index_fill(0, torch.tensor([5]), torch.nan))


def stored_features(change):
    """Open a features file that was changed and carries the right checksum."""

    def call(monkeypatch):
        shutil.copy(DATA.features, "changed.h5")
        with h5py.File("changed.h5", "r+") as f:
            change(f)
            f.attrs["sha256"] = features.digest(f)
        features.seal(Path("changed.h5"))
        features.load(Path("changed.h5"))

    return call


def spoil(f):
    f["feats"][7, 3] = float("inf")


def manifest(text):
    def call(monkeypatch):
        Path("manifest.csv").write_text(text)
        read_manifest(Path("manifest.csv"))

    return call


def settings_file(text):
    def call(monkeypatch):
        Path("bad.yaml").write_text(text)
        settings.read(Path("bad.yaml"))

    return call


def names(words):
    return lambda monkeypatch: PromptTree(clips.load(BACKBONE.name), [words], n_ctx=16)


CASES = {  # what is wrong -> who notices, and what the sentence must contain
    "unknown method": (run("pfedmoapp"), "unknown method 'pfedmoapp'", "did you mean 'pfedmoap'?"),
    "unknown method with a parameter": (
        run("promptlf", n_ctx=2),
        "unknown method 'promptlf'",
        "did you mean 'promptfl'?",
    ),
    "unknown parameter": (
        run(n_ctxx=4),
        "unknown parameter of promptfl 'n_ctxx'",
        "did you mean 'n_ctx'?",
    ),
    "parameter of another method": (run(d_gate=16), "unknown parameter of promptfl 'd_gate'"),
    "more clients than classes": (run(clients=31), "31 clients", "30 classes", "use 30"),
    "a client without a class": (
        run(clients=20),
        "20 clients",
        "30 classes",
        "pathological",
        "use 15",
    ),
    "more clients than classes, even": (
        run(clients=50, kind="even"),
        "50 clients",
        "30 classes",
        "even",
        "use 30",
    ),
    "no client": (run(clients=0), "clients must be greater than 0, not 0"),
    "a negative number of shots": (run(shots=-1), "shots must be", "equal to 0, not -1"),
    "unknown partition": (
        run(kind="shards"),
        "'shards'",
        "pathological, even, dirichlet, domain, iid, pachinko, column",
    ),
    "a client without test images": (
        with_features(without_tests_of_class_3, clients=30),
        "client ",
        " of 30 ",
        "no test images",
    ),
    "heads do not divide the gate": (run("pfedmoap", heads=3), "heads 3", "d_gate 16"),
    "no head": (run("pfedmoap", heads=0), "pfedmoap.heads must be greater than 0, not 0"),
    "the gate does not divide the features": (
        run("pfedmoap", d_gate=12),
        "d_gate 12",
        "feature width 32",
    ),
    "the gate is wider than the features": (
        run("pfedmoap", d_gate=64),
        "d_gate 64",
        "feature width 32",
    ),
    "no gate": (run("pfedmoap", d_gate=0), "pfedmoap.d_gate must be greater than 0, not 0"),
    "a negative gate": (
        run("pfedmoap", d_gate=-16),
        "pfedmoap.d_gate must be greater than 0, not -16",
    ),
    "as many experts as clients": (
        run("pfedmoap", n_experts=4),
        "n_experts 4",
        "number of clients 4",
    ),
    "a negative number of experts": (
        run("pfedmoap", n_experts=-1),
        "n_experts must be",
        "equal to 0, not -1",
    ),
    "unknown choice of experts": (
        run("pfedmoap", choice="nearest"),
        "choice 'nearest'",
        "knn, cosine, random",
    ),
    "unknown gate": (
        run("pfedmoap", mixing="mlp"),
        "mixing 'mlp'",
        "attention, uniform, linear, average",
    ),
    "unknown place of the gate": (
        run("pfedmoap", gate_kept="both"),
        "gate_kept 'both'",
        "private, aggregated",
    ),
    "unknown pooling": (run("pfedmoap", pooling="max"), "pooling 'max'", "stride, mean"),
    "FedOTP without patches": (
        run("fedotp", n_ctx=2),
        "no features at",
        "_patches.h5",
        "fpl features --patches",
    ),
    "FedOTP with too little entropy": (run("fedotp", eps=0.001), "fedotp.eps", "0.006", "0.001"),
    "FedOTP that matches more than all": (run("fedotp", gamma=1.2), "fedotp.gamma", "1.2"),
    "one optimiser for clients at once": (
        run(optimiser="shared"),
        "shared optimiser",
        "one after the other",
    ),
    "one word of several vectors": (
        run("pfedmoap_oneword", n_ctx=4, n_experts=1, d_gate=16, heads=4),
        "pfedmoap_oneword.n_ctx must be less than or equal to 1, not 4",
    ),
    "a negative time of fine-tuning": (
        run("finetuned", tune_epochs=-1),
        "tune_epochs must be",
        "equal to 0, not -1",
    ),
    "more shared vectors than there are": (run("fedper", n_ctx=2, n_base=3), "n_base 3", "n_ctx 2"),
    "a negative number of shared vectors": (
        run("fedper", n_ctx=2, n_base=-1),
        "n_base must be",
        "equal to 0, not -1",
    ),
    "no step to divide by": (
        run("fedamp", n_ctx=2, step=0),
        "fedamp.step must be greater than 0, not 0",
    ),
    "unknown use of the memory": (
        run("pfedprompt", n_ctx=2, memory="never"),
        "'never'",
        "test, always",
    ),
    "a negative rank": (run("fedpgp", n_ctx=2, rank=-1), "rank must be", "equal to 0, not -1"),
    "no temperature": (run("fedpgp", n_ctx=2, tau=0), "fedpgp.tau must be greater than 0, not 0"),
    "an anchor without a class": (run("fedpgp", n_ctx=2, anchor="a photo."), "'a photo.'", "{}"),
    "no context": (run(n_ctx=0), "promptfl.n_ctx must be greater than 0, not 0"),
    "too long a context": (run(n_ctx=75), "75 context vectors", "77"),
    "too long a class name": (names("cat " * 70), "class name 'cat cat", "77"),
    "features in the file are not finite": (
        stored_features(spoil),
        "changed.h5",
        "1 images are zero or not finite",
        ".png",
    ),
    "features in the file are zero": (
        stored_features(lambda f: f["feats"].__setitem__(slice(2), 0)),
        "changed.h5: features of 2 images are zero or not finite",
    ),
    "features are not finite": (
        with_features(with_a_nan),
        "features of 1 images are not finite",
        "image 5",
        "fpl features",
    ),
    "features of another model": (
        run(backbone=settings.Backbone("local-dir:other")),
        str(DATA.features),
        "local-dir:clip",
        "local-dir:other",
    ),
    "participation 0": (run(participation=0), "participation must be greater than 0, not 0"),
    "participation above 1": (
        run(participation=1.5),
        "participation must be",
        "equal to 1, not 1.5",
    ),
    "unknown schedule": (run(schedule="linear"), "'linear'", "constant, cosine, zigzag"),
    "a schedule through all clients without their optimiser": (
        run(schedule="zigzag"),
        "zigzag",
        "set optimiser to shared",
    ),
    "sums of one round in several": (
        lambda monkeypatch: [*assemble.rounds_of(PARAMS.experiment("afl", 1, rounds=2))],
        "AFL",
        "set rounds to 1",
    ),
    "a shared optimiser for a method with its own": (
        run("fedclip", optimiser="shared"),
        "FedCLIP is not trained by SGD",
        "fresh",
    ),
    "no round": (run(rounds=0), "rounds must be greater than 0, not 0"),
    "no batch": (run(batch_size=0), "batch_size must be greater than 0, not 0"),
    "a last step after which there are no numbers": (
        run(lr=1e20, rounds=1, local_epochs=1, batch_size=1000),
        "client 0",
        "no numbers",
        "lower lr",
    ),
    "an aggregated gate that is left to others": (
        run("pfedmoap_leak", gate_kept="aggregated"),
        "gate_kept",
        "private",
    ),
    "a loss that is not finite": (run(lr=1e30), "loss", "clients [", "round 0", "lower lr"),
    "missing weights": (
        run(backbone=settings.Backbone("local-dir:nowhere")),
        "nowhere/open_clip_model.safetensors",
        "local-dir:nowhere",
    ),
    "missing checkpoint": (
        run(backbone=settings.Backbone("RN50", "nowhere.pt")),
        "no weights at nowhere.pt",
        "RN50",
    ),
    "missing features": (
        lambda monkeypatch: features.load(Path("nowhere.h5")),
        "no features at nowhere.h5",
        "`fpl features` and the same --data, --set and --params",
    ),
    "missing column": (
        manifest("path,label,class\na.png,0,cat\n"),
        "manifest.csv",
        "column(s) domain, split",
    ),
    "empty manifest": (manifest(""), "manifest.csv", "column(s) class, domain, label, path, split"),
    "manifest without images": (manifest(HEADER), "manifest.csv", "no images"),
    "label and class disagree": (
        manifest(HEADER + "a.png,0,cat,train,x\nb.png,0,dog,train,x\n"),
        "manifest.csv, line 3",
        "label 0",
        "'cat'",
        "'dog'",
    ),
    "a label is missing": (
        manifest(HEADER + "a.png,0,cat,train,x\nb.png,2,dog,train,x\n"),
        "manifest.csv",
        "0 .. 1",
        "[0, 2]",
    ),
    "a label is no number": (
        manifest(HEADER + "a.png,cat,cat,train,x\n"),
        "manifest.csv, line 2",
        "'cat'",
    ),
    "a line is too short": (
        manifest(HEADER + "a.png,0,cat,train,x\nb.png,0\n"),
        "manifest.csv, line 3",
        "split, domain",
    ),
    "a comma in a name": (
        manifest(HEADER + "a.png,0,cat, wild,train,x\n"),
        "manifest.csv, line 2",
        "split, domain",
        "' wild'",
    ),
    "settings: unknown section": (
        settings_file("runs: {rounds: 3}"),
        "unknown section of bad.yaml 'runs'",
        "did you mean 'run'?",
    ),
    "settings: unknown table setting": (
        settings_file("tables: {book: {t: {vary: {lamb: [1]}}}}"),
        "'lamb'",
        "did you mean 'lam'?",
    ),
    "settings: unknown part of a table": (
        settings_file("tables: {book: {t: {row: [coop]}}}"),
        "part of tables.book.t 'row'",
        "mean 'rows'?",
    ),
    "settings: unknown row of a table": (
        settings_file("tables: {book: {t: {rows: [promptf]}}}"),
        "'promptf'",
        "mean 'promptfl'?",
    ),
    "settings: unknown data set of a table": (
        settings_file("tables: {book: {t: {rows: [coop], data: [shape]}}}"),
        "data set 'shape'",
        "'shapes'",
    ),
    "settings: unknown section of a data set": (
        settings_file("datasets: {d: {runs: {}}}"),
        "datasets.d 'runs'",
        "mean 'run'?",
    ),
    "settings: wrong type": (settings_file("run: {rounds: many}"), "run.rounds", "int", "'many'"),
}


def is_one_sentence(message, parts):
    assert "\n" not in message and "Traceback" not in message and 20 < len(message) < 400
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_sentence(case, here):
    call, *parts = CASES[case]
    with pytest.raises((ValueError, FloatingPointError, OSError)) as error:
        call(here)
    is_one_sentence(str(error.value), parts)


def test_the_settings_that_the_cases_change_are_good(here):
    """Without the mistake, each kind of run above goes through."""
    for row in ("promptfl", "pfedmoap"):
        assert run(row)(here).accuracy.isfinite().all()
    assert with_features(lambda feats: feats, clients=30)(here).accuracy.isfinite().all()


WRONG_NOTEBOOKS = [
    b"\xff",
    b"null",
    b"[1]",
    b'{"cells": [1]}',
    b'{"cells": [], "nbformat": 4}',
    b'{"cells": [], "metadata": {}, "nbformat": 3, "nbformat_minor": 0}',
    b'{"cells": [], "metadata": {}, "nbformat": 9, "nbformat_minor": 0}',
]
OTHERS = ["--params", "fixed.yaml", "--data", "other"]
COMMANDS = {
    "unknown method": (
        ["run", "pfedmoapp"],
        "fpl run: unknown method 'pfedmoapp': did you mean 'pfedmoap'?",
    ),
    "unknown parameter": (
        ["run", "promptfl", "n_ctxx=4"],
        "fpl run: unknown parameter of promptfl 'n_ctxx': did you mean 'n_ctx'?",
    ),
    "no assignment": (
        ["run", "promptfl", "n_ctx"],
        "fpl run: 'n_ctx' is not of the form name=value",
    ),
    "value of no YAML": (["run", "promptfl", "n_ctx=["], "fpl run: ", "n_ctx"),
    "wrong type": (
        ["run", "promptfl", "n_ctx=some"],
        "fpl run: promptfl.n_ctx must be of type int, not 'some'",
    ),
    "seed of the wrong type": (["run", "promptfl", "seed=one"], "fpl run: ", "seed"),
    "an option of another action": (
        ["features", "verify", "x.pack", "--workers", "2", "--set", "run.lr=1"],
        "fpl features: `fpl features verify` does not read --set, --workers: leave it out",
    ),
    "one data set of all": (
        ["features", "--all", "--data", "x"],
        "fpl features: --all makes what all data sets need",
    ),
    "a name that is a table's": (
        ["sweep", "promptfl", "--name", "table1", "--params", "tables.yaml"],
        "fpl sweep: --name table1 is a table of params.yaml: take another name",
    ),
    "a name for tables": (["sweep", "--name", "x"], "fpl sweep: ", "--name x is for a method"),
    "a name that is a path": (
        ["sweep", "promptfl", "--name", "../x"],
        "fpl sweep: --name '../x' cannot be the name of a file",
    ),
    "a name for the list": (["data", "list", "dtd"], "fpl data: `fpl data list` lists all"),
    "a pack in place of a folder": (
        ["features", "export", "nowhere"],
        "fpl features: nowhere is a folder: give the name of a file in it",
    ),
    "no notebook": (["notebook", "x.ipynb"], "fpl notebook: there is no notebook x.ipynb"),
    "a folder as notebook": (["notebook", "nowhere"], "fpl notebook: there is no notebook nowhere"),
    "settings as notebook": (
        ["notebook", "params.yaml"],
        "fpl notebook: params.yaml is no notebook that Jupyter reads: ",
    ),
    **{
        f"a notebook of {text!r}": (
            ["notebook", f"wrong{number}.ipynb"],
            f"fpl notebook: wrong{number}.ipynb is no notebook that Jupyter reads: ",
        )
        for number, text in enumerate(WRONG_NOTEBOOKS)
    },
    "several seeds": (["run", "promptfl", "seed=1:3"], "fpl run: seed must be", "`fpl sweep`"),
    "several values": (
        ["run", "promptfl", "rounds=1,5", "lam=1"],
        "fpl run: unknown parameter of promptfl 'lam'",
    ),
    "a range where one value is asked": (
        ["run", "promptfl", "rounds=1:5"],
        "fpl run: promptfl.rounds must be of type int, not '1:5'; `fpl sweep` takes lists",
    ),
    "a setting twice": (["run", "promptfl", "lr=1", "--fresh", "lr=0.1"], "lr is given twice"),
    "a setting of the file twice": (
        ["sweep", "--set", "run.lr=1", "--set", "run.lr=2"],
        "fpl sweep: run.lr is given twice",
    ),
    "a setting that the method has from elsewhere": (
        ["run", "coop", "--params", "fixed.yaml", "--set", "run.rounds=3"],
        "fpl run: --set run.rounds=3 does nothing for coop: write rounds=3 behind the method",
    ),
    "a setting that the data set has from elsewhere": (
        ["sweep", "promptfl", *OTHERS, "--set", "partition.shots=3"],
        "fpl sweep: --set partition.shots=3 does nothing for promptfl: write shots=3 behind",
    ),
    "a setting that the values replace": (
        ["sweep", "promptfl", "rounds=1,2", "--set", "run.rounds=2"],
        "fpl sweep: --set run.rounds=2 does nothing for promptfl",
    ),
    "a notebook's parameter twice": (
        ["notebook", "x.ipynb", "-p", "seed", "1", "-p", "seed", "2"],
        "fpl notebook: seed is given twice",
    ),
    "far too many runs": (
        ["sweep", "promptfl", "lr=0:1:0.001", "momentum=0:0.9:0.01"],
        "fpl sweep: promptfl asks for 273273 combinations",
    ),
    "a settings file that is a folder": (
        ["sweep", "--params", "nowhere"],
        "fpl sweep: nowhere is no file of settings",
    ),
    "experts": (["run", "pfedmoap", "n_experts=4"], "fpl run: n_experts 4"),
    "partition": (["run", "promptfl", "clients=31"], "fpl run: 31 clients cannot share 30 classes"),
    "no settings file": (
        ["sweep", "table1", "--params", "nowhere.yaml"],
        "fpl sweep: ",
        "nowhere.yaml",
    ),
    "settings that are no YAML": (
        ["sweep", "table1", "--params", "broken.yaml"],
        "fpl sweep: ",
        "broken.yaml",
    ),
    "other model": (
        ["run", "promptfl", "--params", "other.yaml"],
        "fpl run: ",
        "'local-dir:clip'",
        "'local-dir:other'",
    ),
    "no weights": (
        ["features", "--params", "nowhere/params.yaml"],
        "fpl features: ",
        "nowhere/open_clip_model.safetensors",
    ),
    "unknown table": (
        ["sweep", "promptfll"],
        "fpl sweep: unknown table, notebook or method 'promptfll': did you mean 'promptfl'?",
    ),
    "unknown notebook": (
        ["sweep", "10_tabel", "--params", "tables.yaml"],
        "fpl sweep: unknown table, notebook or method '10_tabel': did you mean '10_table1'?",
    ),
    "a method among tables": (
        ["sweep", "table1", "promptfl", "--params", "tables.yaml"],
        "fpl sweep: the method promptfl stands among tables: name it first, without tables",
    ),
    "a method of one's own among tables": (
        ["sweep", "table1", "own.py:Mine", "--params", "tables.yaml"],
        "fpl sweep: the method own.py:Mine stands among tables",
    ),
    "no file of one's own": (["run", "mine.py:Mine"], "fpl run: there is no file ", "mine.py"),
    "unknown method to check": (["check", "promptf"], "fpl check: unknown method 'promptf'"),
    "unknown data set": (
        ["features", "--params", "food.yaml"],
        "fpl features: unknown data set 'food'",
        "'food101'",
    ),
}


@pytest.fixture
def commands(here):
    """Where the commands above find their bad files."""
    Path("broken.yaml").write_text("run: {rounds: 1")
    for number, content in enumerate(WRONG_NOTEBOOKS):
        Path(f"wrong{number}.ipynb").write_bytes(content)
    Path("other.yaml").write_text(yaml.safe_dump({**FILE, "backbone": {"name": "local-dir:other"}}))
    fixed = {"methods": {"coop": {"rounds": 1}}, "datasets": {"other": {"partition": {"shots": 1}}}}
    Path("fixed.yaml").write_text(yaml.safe_dump({**FILE, **fixed}))
    tables = {"tables": {"10_table1": {"table1": {"rows": ["promptfl"]}}}}
    Path("tables.yaml").write_text(yaml.safe_dump({**FILE, **tables}))
    Path("food.yaml").write_text(yaml.safe_dump({**FILE, "data": {"name": "food"}}))
    Path("nowhere").mkdir(exist_ok=True)
    Path("nowhere/params.yaml").write_text(
        yaml.safe_dump({**FILE, "backbone": {"name": "local-dir:nowhere"}})
    )


@pytest.mark.parametrize("case", COMMANDS)
def test_a_command_ends_with_the_sentence(case, commands):
    arguments, *parts = COMMANDS[case]
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert isinstance(end.value.code, str)  # Python prints it to stderr and exits with 1
    is_one_sentence(end.value.code, parts)


def test_a_process_exits_with_1_and_the_sentence_on_stderr(world, commands):
    arguments, *parts = COMMANDS["no weights"]
    process = Python(world, "-m", "fpl.cli", *arguments)
    out, err = process.communicate()
    assert process.returncode == 1 and out == "" and "Traceback" not in err
    is_one_sentence(err.strip().splitlines()[-1], parts)


NEED_A_PROFILE = ["features", "run promptfl", "sweep", "plan", "report", "accept", "repro"]


@pytest.mark.parametrize("line", [*NEED_A_PROFILE, "notebook x.ipynb"])
def test_outside_a_profile_a_command_says_where_it_looked_and_leaves_nothing(
    line, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        cli.main(line.split())
    is_one_sentence(end.value.code, ["no params.yaml", str(tmp_path), "go to the project's folder"])
    assert not list(tmp_path.iterdir())


def test_stages_of_other_data_sets_are_refused_before_anything_is_removed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "dvc.yaml", "dvc.yaml")
    Path("params.yaml").write_text("data: {name: own, root: photos}\n")
    monkeypatch.setattr(repro.subprocess, "Popen", lambda *args, **named: pytest.fail("DVC ran"))
    with pytest.raises(SystemExit) as end:
        cli.main(["repro"])
    refused = ["demo's", "shapes", "data.name", "`fpl features`"]
    is_one_sentence(end.value.code, refused)
    monkeypatch.setenv("DVC_STAGE", "features")  # as plain `dvc repro` does
    for line in ("features --all", "sweep"):
        with pytest.raises(SystemExit) as end:
            cli.main(line.split())
        is_one_sentence(end.value.code, refused)
    assert {path.name for path in tmp_path.iterdir()} == {"dvc.yaml", "params.yaml"}
    shutil.copy(ROOT / "params.yaml", "params.yaml")
    stage.check_data()


@pytest.mark.parametrize(
    "outs", ["", "outs: x", "outs: [data/features, {a: {cache: false}}]", "outs: [1, [2]]"]
)
def test_stages_that_make_no_data_set_are_of_no_concern(outs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text("data: {name: own, root: photos}\n")
    for text in (f"stages: {{features: {{cmd: 'true', {outs}}}}}", "stages:", "vars: []", "{}"):
        Path("dvc.yaml").write_text(text)
        stage.check_data()


OWN = """
from pydantic.dataclasses import dataclass
from fpl.methods import PromptFL

@dataclass(frozen=True)
class Mine(PromptFL):
    key = "mine"
    lam: float = 0.0

    def aggregate(self, server, client_ids, uploads, sizes):
        made = super().aggregate(server, client_ids, uploads, sizes)
        if self.lam:
            made.params["ctx"] = uploads["ctx"][0]  # of whoever comes first
        return made
"""


def test_a_method_of_ones_own_is_checked_and_run(here, capsys):
    Path("own.py").write_text(OWN)
    cli.main(["check", "own.py:Mine"])
    assert "promises hold" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="1"):
        cli.main(["check", "own.py:Mine", "lam=1"])
    assert "breaks the promise" in capsys.readouterr().out
    small = ["n_ctx=2", "rounds=1", "local_epochs=1", "seed=1"]
    cli.main(["run", "own.py:Mine", *small])
    assert "own.py:Mine: " in capsys.readouterr().out
    cli.main(["sweep", "own.py:Mine", *small[:-1], "lam=0,1", "seed=1"])
    assert "lam" in capsys.readouterr().out
