"""Promise: a run is a record that is found by everything it depends on, made once, and kept whatever happens to other runs."""

import ast
import dataclasses
import json
import math
import multiprocessing
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml
from helpers import BACKBONE, DATA, OTHER, PARAMS, Here, python, standing_in

from fpl import cli
from fpl.audit import published
from fpl.experiments import assemble, cache, fingerprint, records, runner, settings, stats, tables

EXPERIMENTS = [PARAMS.experiment("promptfl", seed, rounds=40) for seed in range(1, 9)]
FEW = [PARAMS.experiment(row, seed) for row in ("majority", "ridge_own", "promptfl") for seed in (1, 2)]


@pytest.fixture
def here(here):
    """Without records."""
    shutil.rmtree(records.RECORDS, ignore_errors=True)
    return here


@pytest.fixture
def calls(monkeypatch):
    """Every experiment that is performed, as it is."""
    made, perform = [], runner.perform

    def counted(experiment, *rest, **options):
        made.append(experiment)
        perform(experiment, *rest, **options)

    monkeypatch.setattr(runner, "perform", counted)
    return made


@pytest.mark.parametrize("experiment", FEW, ids=lambda e: f"{e.row}-{e.seed}")
def test_a_record_is_one_line_with_all_settings(experiment, here):
    (path,) = runner.sweep([experiment])
    text = path.read_text()
    assert text.endswith("\n") and text.count("\n") == 1
    record = json.loads(text)
    assert record["settings"] == experiment.settings()
    assert (
        record["features"] == cache.load_cached(DATA, BACKBONE, cache.device())[1].sha256
        and record["code"] == fingerprint.code_fingerprint()
    )
    rounds = list(assemble.rounds_of(experiment))
    assert [r["round"] for r in record["rounds"]] == list(range(len(rounds)))
    for stored, r in zip(record["rounds"], rounds, strict=True):
        assert (
            stored["accuracy"] == pytest.approx(r.accuracy.tolist(), abs=1e-6)
            and stored["participants"] == r.participants.tolist()
        )
    assert {"seconds", "backbone", "torch", "device"} <= set(record)
    assert [p.name for p in records.RECORDS.iterdir()] == [path.name]


def test_a_run_is_not_made_twice(here, calls):
    paths = runner.sweep(FEW[:2])
    assert calls and sorted(calls, key=FEW.index) == FEW[:2]
    assert runner.sweep(FEW[:2]) == paths and len(calls) == 2
    assert runner.sweep(FEW[:3])[:2] == paths and calls[2:] == [FEW[2]]
    paths[0].unlink()
    runner.sweep(FEW[:3])
    assert calls[3:] == [FEW[0]]
    runner.sweep(FEW[:3], fresh=True)
    assert sorted(calls[4:], key=FEW.index) == FEW[:3]


def test_records_come_in_the_order_of_the_experiments(here):
    paths = runner.sweep(FEW)
    assert [json.loads(path.read_text())["settings"] for path in paths] == [e.settings() for e in FEW]


TABLES = {
    "rows": settings.Table(
        {"one": {"method": "promptfl", "rounds": 1}, "majority": {}}, notebook="10_rows"
    ),
    "experts": settings.Table(
        {"pfedmoap": {}, "majority": {}}, vary={"n_experts": [1, 2]}, notebook="11_experts"
    ),
}


def test_a_table_is_read_from_its_index_with_its_labels(here, calls):
    params = dataclasses.replace(PARAMS, seeds=(1, 2), tables=TABLES)
    with pytest.raises(FileNotFoundError, match="the runs of table rows were not made .*`fpl sweep rows`"):
        records.of_table("rows")
    runner.tables(params, ["rows", "experts"])
    assert len(calls) == 2 + 2 + 4  # what two tables share is run once
    frame = records.of_table("rows")
    assert frame.groupby("row", sort=False)["method"].unique().map(list).to_dict() == {
        "one": ["promptfl"],
        "majority": ["majority"],
    }
    assert set(frame[frame["row"] == "one"]["rounds"]) == {1} and set(frame["seed"]) == {1, 2}
    varied = records.of_table("experts")
    assert varied.groupby("row")["n_experts"].nunique().to_dict() == {"pfedmoap": 2, "majority": 0}
    assert stats.varied(frame) == stats.varied(frame[frame["row"] == "one"]) == ["row"]
    assert stats.varied(varied) == ["row", "n_experts"] and stats.varied(varied[varied["row"] == "pfedmoap"]) == ["n_experts"]
    other = varied.assign(data="other", clients=9)  # what differs between data sets is no setting that was varied
    assert stats.varied(pd.concat([varied, other])) == ["row", "n_experts"]
    next(records.RECORDS.glob("promptfl*")).unlink()
    with pytest.raises(FileNotFoundError, match="1 of . runs of table .*`fpl sweep"):
        [records.of_table(name) for name in TABLES]


def test_a_sweep_may_keep_a_name_for_notebooks(here, capsys):
    sections = {name: dataclasses.asdict(getattr(PARAMS, name)) for name in ("data", "backbone", "partition", "run")}
    Path("params.yaml").write_text(yaml.safe_dump(sections))
    cli.main(["sweep", "promptfl", "n_ctx=1,2", "seed=1,2", "rounds=1", "local_epochs=1", "--name", "mine"])
    found = records.of_table("mine")
    assert stats.varied(found) == ["n_ctx"] and set(found["seed"]) == {1, 2} and "n_ctx" in capsys.readouterr().out


NAMES = [
    (part, f.name)
    for part in ("method", "run", "partition")
    for f in dataclasses.fields(getattr(PARAMS.experiment("pfedmoap", 1), part))
]


@pytest.mark.parametrize(("part", "name"), NAMES)
def test_any_change_of_settings_is_another_record(part, name):
    base = PARAMS.experiment("pfedmoap", 1)
    value = getattr(base, part)
    new = OTHER[name] if name in OTHER else getattr(value, name) + 1
    changed = dataclasses.replace(base, **{part: dataclasses.replace(value, **{name: new})})
    assert runner.record_path("sha", changed) != runner.record_path("sha", base)


def test_another_row_seed_features_or_code_is_another_record(monkeypatch):
    base = PARAMS.experiment("coop", 1)
    same = dataclasses.replace(base)
    assert runner.record_path("sha", same) == runner.record_path("sha", base)
    paths = [
        runner.record_path("sha", e) for e in (base, dataclasses.replace(base, row="promptfl"), dataclasses.replace(base, seed=2))
    ]
    paths.append(runner.record_path("another sha", base))
    monkeypatch.setattr(fingerprint, "code_fingerprint", lambda: "another code")
    paths.append(runner.record_path("sha", base))
    assert len(set(paths)) == 5


@pytest.mark.parametrize("name", fingerprint.SOURCES)
def test_the_fingerprint_is_that_of_the_code(name, tmp_path, monkeypatch):
    """A comment, a docstring or a blank line makes no other code, a statement does."""
    source = Path(runner.__file__).parent
    for module in source.glob("*.py"):
        shutil.copy(module, tmp_path)
    monkeypatch.setattr(runner, "__file__", str(tmp_path / "sweep.py"))
    file, fingerprint = tmp_path / f"{name}.py", fingerprint.code_fingerprint.__wrapped__
    before, text = fingerprint(), file.read_text()
    assert before == fingerprint.code_fingerprint()
    file.write_text(f"# another comment\n\n{text}\n\n# and one more\n")
    assert fingerprint() == before
    file.write_text(text.replace('"""\n', ' Another.\n"""\n'))
    assert fingerprint() == before
    file.write_text(text + "\nANYTHING = 1\n")
    assert fingerprint() != before


def test_the_fingerprint_forgets_no_module():
    """Whatever the fingerprinted modules import from here is fingerprinted too; settings stand in the record themselves."""
    for name in fingerprint.SOURCES:
        tree = ast.parse((Path(runner.__file__).parent / f"{name}.py").read_text())
        imports = [
            node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fpl"
        ]
        used = {alias.name if node.module == "fpl" else node.module.split(".")[1] for node in imports for alias in node.names}
        assert used <= {*fingerprint.SOURCES, "files", "records", "config"}, name


def test_a_failing_run_keeps_the_others(here, calls):
    good, bad = FEW[4], PARAMS.experiment("promptfl", 2, lr=1e30)
    with pytest.raises(FloatingPointError, match="not finite"):
        runner.sweep([good, bad])
    (kept,) = records.RECORDS.iterdir()
    assert json.loads(kept.read_text())["settings"] == good.settings()
    assert runner.sweep([good]) == [kept] and calls == [good, bad]


def result(paths):
    return records.frame(paths).sort_values(["seed", "round", "client"], ignore_index=True)


def left():
    return {path: path.stat().st_mtime_ns for path in records.RECORDS.glob("[!.]*.json")}


def wait_for_records(most=120.0):
    end = time.monotonic() + most
    while not left() and time.monotonic() < end:
        time.sleep(0.005)


def finishes_as_if_nothing_had_happened(kept, monkeypatch):
    assert 0 < len(kept) < len(EXPERIMENTS), "the kill came too early or too late to show anything"
    found = result(runner.sweep(EXPERIMENTS, jobs=1))
    assert left().items() >= kept.items(), "a finished run was made again"
    with monkeypatch.context() as patch:
        patch.setattr(runner, "RECORDS", Path("results/undisturbed"))
        patch.setattr(runner, "ProcessPoolExecutor", Here)
        pd.testing.assert_frame_equal(found, result(runner.sweep(EXPERIMENTS)))


SWEEP = """
import os
from fpl import sweep
from helpers import BACKBONE, DATA
from test_records import EXPERIMENTS
os.cpu_count = lambda: 1
sweep.sweep(EXPERIMENTS, jobs=1)
"""


@pytest.fixture
def one_core(monkeypatch):
    """One thread a worker: on a busy machine several threads of one small run wait for each other most of the time."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)


def test_a_killed_sweep_goes_on(world, monkeypatch, one_core):
    """kill -9 of the command; its worker must not stay behind; then the same call, with real workers."""
    with standing_in(world):
        shutil.rmtree(records.RECORDS, ignore_errors=True)
        process = python(world, "-c", SWEEP)
        wait_for_records()
        os.kill(process.pid, signal.SIGKILL)
        _, err = process.communicate()  # ends when the last process that holds the pipe has ended, workers included
        assert process.returncode == -signal.SIGKILL, err
        finishes_as_if_nothing_had_happened(left(), monkeypatch)


def test_a_killed_worker_is_reported_and_the_sweep_goes_on(world, monkeypatch, one_core):
    """As when memory runs out; then the same call."""

    def kill():
        wait_for_records()
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGKILL)

    with standing_in(world):
        shutil.rmtree(records.RECORDS, ignore_errors=True)
        killer = threading.Thread(target=kill)
        killer.start()
        with pytest.raises(RuntimeError, match="a worker was killed .* call the same command again, finished runs are kept"):
            runner.sweep(EXPERIMENTS, jobs=1)
        killer.join()
        monkeypatch.setattr(runner, "ProcessPoolExecutor", Here)
        finishes_as_if_nothing_had_happened(left(), monkeypatch)


def test_frame(here):
    experiments = [
        PARAMS.experiment("promptfl", 1),
        PARAMS.experiment("promptfl", 2, clients=3),
        PARAMS.experiment("majority", 1),
    ]
    frame = records.frame(runner.sweep(experiments))
    assert len(frame) == 2 * 4 + 2 * 3 + 1 * 4  # rounds times clients; what learns nothing has one round
    assert {*stats.settings_of(frame)} == {*experiments[0].settings(), *experiments[2].settings()}
    assert frame["accuracy"].between(0, 1).all()
    for experiment in experiments:
        lines = frame[(frame["method"] == experiment.row) & (frame["seed"] == experiment.seed)]
        assert not lines.duplicated(["round", "client"]).any() and set(lines["client"]) == set(
            range(experiment.partition.clients)
        )
        assert {k: lines[k].iloc[0] for k in experiment.settings()} == experiment.settings()


def test_a_record_of_other_images_or_another_model_is_not_taken(here):
    runner.sweep(FEW[:1])
    drawn = dataclasses.replace(PARAMS, data=dataclasses.replace(DATA, seed=DATA.seed + 1))
    with pytest.raises(ValueError, match="holds images of .* asks for .*run `fpl features`"):
        runner.sweep([drawn.experiment("majority", 1)])
    another = dataclasses.replace(PARAMS, backbone=dataclasses.replace(BACKBONE, name="local-dir:another"))
    with pytest.raises((ValueError, FileNotFoundError), match="another"):
        runner.paths_of([another.experiment("majority", 1)])


@pytest.mark.parametrize("held_out", ["", "sketch"])
def test_clients_of_domains_have_their_names(here, held_out):
    n = 5 if held_out else 12
    experiment = PARAMS.experiment("majority", 1, kind="domain", clients=n, held_out=held_out)
    frame = records.frame(runner.sweep([experiment]))
    domains = cache.load_cached(DATA, BACKBONE, cache.device())[1].domain
    own = [{*domains[index.numpy()]} for index in assemble.make_clients(experiment, "cpu").train]
    assert own == [{domain} for domain in frame["domain"]] and frame["domain"].nunique() == (5 if held_out else 6)
    table = tables.beside(frame, "DomainNet (10 classes)")
    for name, of in frame.groupby("domain"):
        assert table[name.capitalize()].tolist() == [round(100 * of["accuracy"].mean(), 2)]
    assert records.frame(runner.sweep([PARAMS.experiment("majority", 1)]))["domain"].eq("").all()


def test_the_table_against_the_paper_has_a_line_for_each_domain(here):
    frame = records.frame(runner.sweep([PARAMS.experiment("zeroshot", seed, kind="domain", clients=12) for seed in (1, 2)]))
    printed = {"painting": "amazon", "photo": "caltech", "quickdraw": "dslr", "sketch": "webcam"}
    office = frame.assign(data="office_caltech10", domain=frame["domain"].map(printed)).dropna(subset="domain")
    made = published.of_tables({"table3": office})
    assert made["domain"].tolist() == ["Average", "Amazon", "Caltech", "DSLR", "Webcam"] and (made["table"] == "Table 4").all()
    assert made["mean"].iloc[0] == pytest.approx(made["mean"].iloc[1:].mean())
    assert len(published.compare(made, comparable=True).query("ours_mean.notna() and method == 'ZS-CLIP'")) == 5
