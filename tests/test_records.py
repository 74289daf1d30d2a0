"""Promise: a run is a record that is found by everything it depends on.

It is made once, and kept whatever happens to other runs. What code a record depends on is in
test_records_outlive.
"""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from helpers import BACKBONE, DATA, OTHER, PARAMS, Here, standing_in
from helpers.processes import Python

from fpl import cli
from fpl.audit import published
from fpl.experiments import assemble, cache, fingerprint, records, runner, settings, stats, tables

EXPERIMENTS = [PARAMS.experiment("promptfl", seed, rounds=12) for seed in range(1, 5)]
ROWS = ["majority", "ridge_own", "promptfl"]
FEW = [PARAMS.experiment(row, seed) for row in ROWS for seed in (1, 2)]


@pytest.fixture
def calls(monkeypatch):
    """Every experiment that is performed, as it is."""
    made = []
    perform = runner.perform

    def counted(experiment, *rest, **options):
        made.append(experiment)
        perform(experiment, *rest, **options)

    monkeypatch.setattr(runner, "perform", counted)
    return made


@pytest.mark.parametrize("experiment", FEW, ids=lambda e: f"{e.row}-{e.seed}")
def test_a_record_is_one_line_with_all_settings(experiment, alone):
    (path,) = runner.sweep([experiment])
    text = path.read_text()
    assert text.endswith("\n") and text.count("\n") == 1
    record = json.loads(text)
    assert record["settings"] == experiment.settings()
    _, feats = cache.load_cached(DATA, BACKBONE, cache.device())
    assert record["features"] == feats.sha256
    assert record["code"] == fingerprint.code_fingerprint(experiment)
    assert record["title"] == type(experiment.method).title
    assert record["is_control"] == (experiment.row != "promptfl")
    rounds = list(assemble.rounds_of(experiment))
    assert [r["round"] for r in record["rounds"]] == list(range(len(rounds)))
    for stored, r in zip(record["rounds"], rounds, strict=True):
        assert stored["accuracy"] == pytest.approx(r.accuracy.tolist(), abs=1e-6)
        assert stored["participants"] == r.participants.tolist()
    assert {"backbone", "torch", "device", "classes", "answers"} <= set(record)
    assert [p.name for p in records.RECORDS.iterdir()] == [path.name]


def test_a_run_is_not_made_twice(alone, calls):
    paths = runner.sweep(FEW[:2])
    assert calls and sorted(calls, key=FEW.index) == FEW[:2]
    assert runner.sweep(FEW[:2]) == paths and len(calls) == 2
    assert runner.sweep(FEW[:3])[:2] == paths and calls[2:] == [FEW[2]]
    paths[0].unlink()
    runner.sweep(FEW[:3])
    assert calls[3:] == [FEW[0]]
    runner.sweep(FEW[:3], asked=runner.Asked(fresh=True))
    assert sorted(calls[4:], key=FEW.index) == FEW[:3]


def test_records_come_in_the_order_of_the_experiments(alone):
    paths = runner.sweep(FEW)
    found = [json.loads(path.read_text())["settings"] for path in paths]
    assert found == [experiment.settings() for experiment in FEW]


ONE = {"method": "promptfl", "rounds": 1}
VARY = {"n_experts": [1, 2]}
TABLES = {
    "rows": settings.Table({"one": ONE, "majority": {}}, notebook="10_rows"),
    "experts": settings.Table({"pfedmoap": {}, "majority": {}}, vary=VARY, notebook="11_experts"),
}


def test_a_table_is_read_from_its_index_with_its_labels(alone, calls):
    params = dataclasses.replace(PARAMS, seeds=(1, 2), tables=TABLES)
    with pytest.raises(FileNotFoundError, match="the runs of table rows .*`fpl sweep rows`"):
        records.of_table("rows")
    runner.tables(params, ["rows", "experts"])
    assert len(calls) == 2 + 2 + 4  # what two tables share is run once
    frame = records.of_table("rows")
    methods = frame.groupby("row", sort=False)["method"].unique().map(list).to_dict()
    assert methods == {"one": ["promptfl"], "majority": ["majority"]}
    one = frame[frame["row"] == "one"]
    assert set(one["rounds"]) == {1} and set(frame["seed"]) == {1, 2}
    varied = records.of_table("experts")
    experts = varied.groupby("row")["n_experts"].nunique().to_dict()
    assert experts == {"pfedmoap": 2, "majority": 0}
    assert stats.varied(frame) == stats.varied(one) == ["row"]
    assert stats.varied(varied) == ["row", "n_experts"]
    assert stats.varied(varied[varied["row"] == "pfedmoap"]) == ["n_experts"]
    # what differs between data sets is no setting that was varied
    other = varied.assign(data="other", clients=9)
    assert stats.varied(pd.concat([varied, other])) == ["row", "n_experts"]


def test_a_table_whose_records_are_gone_is_refused(alone):
    runner.tables(dataclasses.replace(PARAMS, seeds=(1, 2), tables=TABLES), ["rows"])
    next(records.RECORDS.glob("promptfl*")).unlink()
    with pytest.raises(FileNotFoundError, match="1 of 4 runs of table rows .*`fpl sweep rows`"):
        records.of_table("rows")


def flip(path):
    """An accuracy that is ten times what it was."""
    path.write_text(path.read_text().replace('"accuracy": [0.', '"accuracy": [5.', 1))


DAMAGE = {
    "changed": flip,
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "of another run": lambda path: shutil.copy(runner.sweep([FEW[1]])[0], path),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_record_is_named_and_made_again(kind, alone, calls):
    (path,) = runner.sweep(FEW[:1])
    whole = records.frame([path])
    DAMAGE[kind](path)
    calls.clear()
    with pytest.warns(match=path.name) if path.is_file() else contextlib.nullcontext():
        assert runner.sweep(FEW[:1]) == [path] and calls == FEW[:1]
    pd.testing.assert_frame_equal(records.frame([path]), whole)


def test_features_that_change_meanwhile_are_in_no_record(alone):
    key = runner.key_of("another hash", FEW[0])
    with pytest.raises(ValueError, match="features.*has changed since this command began"):
        runner.perform(FEW[0], key)
    assert not key.path.exists()


def test_a_folder_that_cannot_be_written_is_found_before_training(alone, calls):
    records.RECORDS.parent.mkdir(exist_ok=True)
    records.RECORDS.write_text("in its place")
    with pytest.raises(OSError, match=str(records.RECORDS)):
        runner.sweep(FEW[:1])
    records.RECORDS.unlink()
    assert calls == []


def test_a_sweep_may_keep_a_name_for_notebooks(alone, capsys):
    names = ("data", "backbone", "partition", "run")
    sections = {name: dataclasses.asdict(getattr(PARAMS, name)) for name in names}
    Path("params.yaml").write_text(yaml.safe_dump(sections))
    changes = ["n_ctx=1,2", "seed=1,2", "rounds=1", "local_epochs=1"]
    cli.main(["sweep", "promptfl", *changes, "--name", "mine"])
    found = records.of_table("mine")
    assert stats.varied(found) == ["n_ctx"] and set(found["seed"]) == {1, 2}
    assert "n_ctx" in capsys.readouterr().out


BASE = PARAMS.experiment("pfedmoap", 1)
NAMES = []
for part in ("method", "run", "partition"):
    NAMES += [(part, field.name) for field in dataclasses.fields(getattr(BASE, part))]


@pytest.mark.parametrize(("part", "name"), NAMES)
def test_any_change_of_settings_is_another_record(part, name):
    value = getattr(BASE, part)
    new = OTHER[name] if name in OTHER else getattr(value, name) + 1
    changed = dataclasses.replace(BASE, **{part: dataclasses.replace(value, **{name: new})})
    assert runner.key_of("sha", changed).path != runner.key_of("sha", BASE).path


def test_another_row_seed_features_or_code_is_another_record(monkeypatch):
    base = PARAMS.experiment("coop", 1)
    path = runner.key_of("sha", base).path
    assert runner.key_of("sha", dataclasses.replace(base)).path == path
    paths = [path, runner.key_of("another sha", base).path]
    paths.append(runner.key_of("sha", dataclasses.replace(base, row="promptfl")).path)
    paths.append(runner.key_of("sha", dataclasses.replace(base, seed=2)).path)
    monkeypatch.setattr(runner, "code_fingerprint", lambda experiment: "another code")
    paths.append(runner.key_of("sha", base).path)
    assert len(set(paths)) == 5


def test_a_failing_run_keeps_the_others(alone, calls):
    good = FEW[4]
    bad = PARAMS.experiment("promptfl", 2, lr=1e30)
    said = "1 of 2 runs failed, promptfl, seed 2: the loss .* is not finite .*; the others are made"
    with pytest.raises(RuntimeError, match=said):
        runner.sweep([bad, good])
    (kept,) = records.RECORDS.iterdir()
    assert json.loads(kept.read_text())["settings"] == good.settings()
    assert runner.sweep([good]) == [kept] and calls == [bad, good]
    with pytest.raises(FloatingPointError, match="not finite"):
        runner.sweep([bad])


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
    with monkeypatch.context() as patch:
        patch.setattr(runner, "ProcessPoolExecutor", Here)
        found = result(runner.sweep(EXPERIMENTS, jobs=1))
        assert left().items() >= kept.items(), "a finished run was made again"
        patch.setattr(records, "RECORDS", Path("results/undisturbed"))
        pd.testing.assert_frame_equal(found, result(runner.sweep(EXPERIMENTS)))


SWEEP = """
import os
from fpl.experiments import runner
from helpers import PARAMS
os.cpu_count = lambda: 1
runner.sweep([PARAMS.experiment("promptfl", seed, rounds=12) for seed in range(1, 5)], jobs=1)
"""


SWEEP_THAT_DIES = f"""
import multiprocessing, os, signal, threading, time
def die():
    while not multiprocessing.active_children():
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)
threading.Thread(target=die, daemon=True).start()
{SWEEP}"""


@pytest.fixture
def one_core(monkeypatch):
    """One thread a worker: several threads of one small run would wait for each other."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)


def test_a_killed_sweep_goes_on(world, monkeypatch, one_core):
    """kill -9 of the command, whose worker must not stay behind; then the same call again."""
    with standing_in(world):
        shutil.rmtree(records.RECORDS, ignore_errors=True)
        process = Python(world, "-c", SWEEP)
        wait_for_records()
        os.kill(process.pid, signal.SIGKILL)
        _, err = process.communicate()  # ends when the last process that holds the pipe has ended
        assert process.returncode == -signal.SIGKILL, err
        finishes_as_if_nothing_had_happened(left(), monkeypatch)


def test_a_worker_of_a_sweep_that_is_killed_at_once_does_not_stay(world):
    """Nor does it go on in the hour that its imports may take."""
    with standing_in(world):
        shutil.rmtree(records.RECORDS, ignore_errors=True)
    process = Python(world, "-c", SWEEP_THAT_DIES)
    process.communicate(timeout=300)  # ends when nobody holds the pipe
    assert process.returncode == -signal.SIGKILL


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
        with pytest.raises(RuntimeError, match="a worker was killed .* the same command again"):
            runner.sweep(EXPERIMENTS, jobs=1)
        killer.join()
        finishes_as_if_nothing_had_happened(left(), monkeypatch)


def test_frame(alone):
    promptfl = PARAMS.experiment("promptfl", 1)
    fewer = PARAMS.experiment("promptfl", 2, clients=3)
    majority = PARAMS.experiment("majority", 1)
    frame = records.frame(runner.sweep([promptfl, fewer, majority]))
    # rounds times clients; what learns nothing has one round
    assert len(frame) == 2 * 4 + 2 * 3 + 1 * 4
    assert {*stats.settings_of(frame)} == {*promptfl.settings(), *majority.settings()}
    others = {*frame} - {*stats.settings_of(frame)}  # no setting can be called `global`
    assert others == records.TAKEN - records.OTHER | {"round", "up", "down", "global"}
    assert frame["accuracy"].between(0, 1).all()
    for experiment in (promptfl, fewer, majority):
        lines = frame[(frame["method"] == experiment.row) & (frame["seed"] == experiment.seed)]
        assert not lines.duplicated(["round", "client"]).any()
        assert set(lines["client"]) == set(range(experiment.partition.clients))
        assert {k: lines[k].iloc[0] for k in experiment.settings()} == experiment.settings()


def test_a_record_of_other_images_or_another_model_is_not_taken(alone):
    runner.sweep(FEW[:1])
    drawn = dataclasses.replace(PARAMS, data=dataclasses.replace(DATA, seed=DATA.seed + 1))
    with pytest.raises(ValueError, match="holds images of .* asked for is .*run `fpl features`"):
        runner.sweep([drawn.experiment("majority", 1)])
    backbone = dataclasses.replace(BACKBONE, name="local-dir:another")
    another = dataclasses.replace(PARAMS, backbone=backbone)
    with pytest.raises((ValueError, FileNotFoundError), match="another"):
        runner.keys_of([another.experiment("majority", 1)])


@pytest.mark.parametrize("held_out", ["", "sketch"])
def test_clients_of_domains_have_their_names(alone, held_out):
    changes = {"kind": "domain", "clients": 5 if held_out else 6}
    experiment = PARAMS.experiment("majority", 1, held_out=held_out, **changes)
    frame = records.frame(runner.sweep([experiment]))
    _, feats = cache.load_cached(DATA, BACKBONE, cache.device())
    train = assemble.make_clients(experiment, "cpu").train
    own = [{*feats.domain[index.numpy()]} for index in train]
    assert own == [{domain} for domain in frame["domain"]]
    assert frame["domain"].nunique() == (5 if held_out else 6)
    table = tables.beside(frame, "DomainNet (10 classes)")
    for name, of in frame.groupby("domain"):
        assert table[name.capitalize()].tolist() == [round(100 * of["accuracy"].mean(), 2)]
    assert records.frame(runner.sweep([PARAMS.experiment("majority", 1)]))["domain"].eq("").all()


def test_a_record_is_found_by_settings_code_features_and_crops():
    key = records.Key({"method": "a", "seed": 1}, "code", "features", 0)
    others = [key._replace(views=views) for views in (1, 2)]
    others += [key._replace(code="c"), key._replace(features="f")]
    others += [key._replace(settings=key.settings | {"lam": 1})]
    assert len({one.path for one in (key, *others)}) == 6


def test_the_table_against_the_paper_has_a_line_for_each_domain(alone):
    domains = {"kind": "domain", "clients": 6}
    zero_shot = [PARAMS.experiment("zeroshot", seed, **domains) for seed in (1, 2)]
    frame = records.frame(runner.sweep(zero_shot))
    printed = {"painting": "amazon", "photo": "caltech", "quickdraw": "dslr", "sketch": "webcam"}
    accuracy = np.linspace(0.4, 0.9, len(frame))  # a random CLIP has none that could be seen
    domain = frame["domain"].map(printed)
    office = frame.assign(data="office_caltech10", domain=domain, accuracy=accuracy)
    made = published.of_tables({"table3": office.dropna(subset="domain")})
    assert made["domain"].tolist() == ["Average", "Amazon", "Caltech", "DSLR", "Webcam"]
    assert (made["table"] == "Table 4").all()
    assert made["mean"].iloc[0] == pytest.approx(made["mean"].iloc[1:].mean())
    of_domain = 100 * stats.last_round(office).groupby("domain")["accuracy"].mean()
    own = made.iloc[1:].set_index(made["domain"].iloc[1:].str.lower())["mean"]
    assert own.to_dict() == pytest.approx(of_domain.to_dict())
    compared = published.compare(made, comparable=True)
    assert len(compared.query("ours_mean.notna() and method == 'ZS-CLIP'")) == 5
