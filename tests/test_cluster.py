"""Promise: a sweep on a cluster leaves the bytes of a sweep on this machine.

What happens when workers die, hang or differ is in tests/cluster, which takes minutes.
"""

import contextlib
import hashlib
import os
import shutil
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import distributed
import numpy as np
import pytest
import torch
from helpers import BACKBONE, DATA, HALVED, PARAMS, refuses
from helpers.dask import cluster
from tqdm.auto import tqdm

from fpl import cli
from fpl.data import encoders, extraction, features, foreign
from fpl.data.manifest import read_manifest
from fpl.data.views import Views
from fpl.experiments import cluster as on_cluster
from fpl.experiments import keep, records, remote, runner, settings
from fpl.experiments.runner import Asked
from fpl.experiments.settings import ROWS

FEW = [PARAMS.experiment(row, seed) for row in ("promptfl", "pfedmoap") for seed in (1, 2, 3)]


@pytest.fixture(scope="module")
def dask(world, tmp_path_factory):
    """A scheduler and two workers, each with a folder of its own and nothing of ours in it."""
    with cluster(tmp_path_factory.mktemp("dask")) as made:
        made.worker("first")
        made.worker("second")
        yield made


def content(folder=None):
    return {path.name: path.read_bytes() for path in (folder or records.RECORDS).iterdir()}


def made_here(experiments, **asked):
    """Return the files of a sweep on this machine, and remove them."""
    runner.sweep(experiments, jobs=1, asked=Asked(**asked))
    found = content()
    shutil.rmtree(records.RECORDS)
    return found


def test_two_workers_leave_the_same_bytes_as_one_process(dask, alone):
    want = made_here(FEW, keep=True)
    paths = runner.sweep(FEW, asked=Asked(keep=True, cluster=dask.address))
    assert content() == want and [path.name for path in paths] == [
        key.path.name for key in runner.keys_of(FEW)
    ]
    stores = [dask.folder / name / "store" / "files" for name in ("first", "second")]
    for store in stores:
        assert len(content(store)) == 3  # features, configuration and weights
        assert all(remote.sha256(path) == path.name for path in store.iterdir())
    before = {path: path.stat().st_mtime_ns for store in stores for path in store.iterdir()}
    runner.sweep(FEW[:2], asked=Asked(fresh=True, cluster=dask.address))
    after = {path: path.stat().st_mtime_ns for store in stores for path in store.iterdir()}
    assert after == before, "a file was sent twice"


@pytest.mark.parametrize("content", ["feats", "patches", "views"])
def test_features_have_the_same_bytes_too(content, dask, alone, tmp_path):
    """With an image that cannot be read, and batches of which one is not full."""
    images = read_manifest(DATA.folder / "manifest.csv")
    bad = DATA.folder / images.rows[3]["path"]
    whole = bad.read_bytes()
    bad.write_bytes(b"no image")
    clip = encoders.load(BACKBONE.name)
    views = Views(2) if content == "views" else None
    try:
        here = extraction.Options(skip_bad=True)
        want = extraction.extract(images, clip, tmp_path / "here.h5", content, views, here)
        with on_cluster.connected(dask.address) as client, client.as_current():
            away = replace(here, elsewhere=on_cluster.Encoder(client, BACKBONE))
            made = extraction.extract(images, clip, tmp_path / "away.h5", content, views, away)
    finally:
        bad.write_bytes(whole)
    assert made.read_bytes() == want.read_bytes()
    assert len(features.load(made, content=content).skipped) == 1


def test_methods_of_ones_own_and_runs_that_fail_go_there_too(dask, alone):
    (alone / "mine.py").write_text(HALVED)
    own = PARAMS.experiment("mine.py:Halved", 1)
    want = made_here([own])
    bad = PARAMS.experiment("promptfl", 4, lr=1e30)
    said = "1 of 2 runs failed, promptfl, seed 4: the loss .* is not finite"
    with pytest.raises(RuntimeError, match=said):
        runner.sweep([bad, own], asked=Asked(cluster=dask.address))
    assert content() == want


def test_runs_on_imported_features_need_no_model_there(dask, alone):
    gen = np.random.default_rng(0)
    label = np.arange(40) % 2
    split = np.array(["train", "test"])[np.arange(40) // 20]
    np.savez("cache.npz", features=gen.normal(size=(40, 8)), labels=label, split=split)
    Path("names.txt").write_text("a\nb\n")
    data = settings.Data(name="own", store="brought")
    foreign.bring(Path("cache.npz"), Path("names.txt"), data.features, {"data": "own"})
    given = settings.Settings(data, settings.Backbone("imported"), settings.Partition("iid", 2))
    own = [given.experiment("ridge_own", seed) for seed in (1, 2)]
    want = made_here(own)
    runner.sweep(own, asked=Asked(cluster=dask.address))
    assert content() == want


@pytest.mark.parametrize("row", ROWS)
def test_an_experiment_arrives_as_it_was(row):
    experiment = PARAMS.experiment(row, 7)
    assert remote.experiment_of(remote.described(experiment, row)).settings() == (
        experiment.settings()
    )
    there = remote.experiment_of(remote.described(experiment, row, "file"))
    assert there.method == experiment.method and there.run == experiment.run
    assert there.source.data == experiment.source.data
    assert there.source.backbone.weights == "file"


def test_the_address_is_an_option_a_setting_or_a_variable(here, monkeypatch):
    found = []
    monkeypatch.setattr(runner, "tables", lambda *_, **named: found.append(named["cluster"]))
    (here / "params.yaml").write_text("cluster: tcp://file:1\n")
    cli.main(["sweep"])
    cli.main(["sweep", "--cluster", "tcp://option:2"])
    monkeypatch.setenv("FPL_CLUSTER", "tcp://variable:3")
    cli.main(["sweep"])
    assert found == ["tcp://file:1", "tcp://option:2", "tcp://variable:3"]


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "nonsense"])
def test_without_a_scheduler_there_is_a_sentence(address, alone, monkeypatch):
    monkeypatch.setattr(on_cluster, "CONNECT", 0.3)
    asked = Asked(cluster=address)
    refuses(lambda: runner.sweep(FEW[:1], asked=asked), [address, "dask scheduler"])


def test_a_place_that_no_worker_has_is_refused(alone):
    far = settings.Backbone("local-dir:/somewhere/clip")
    refuses(lambda: on_cluster.model_files(far), ["/somewhere/clip", "where you stand"])


@pytest.mark.parametrize(
    ("said", "count", "wanted"),
    [("", 2, ["0", "1"]), ("3", 1, ["3"]), ("5,GPU-8a", 2, ["5", "GPU-8a"]), ("", 0, [])],
)
def test_gpus_are_those_that_the_caller_may_use(said, count, wanted, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", said)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert runner.visible_gpus() == wanted


def test_what_a_run_learnt_is_read_from_a_place_of_its_own(here, monkeypatch):
    """Two workers of one store stand in the same folder."""
    experiments = [PARAMS.experiment("promptfl", seed) for seed in (1, 2)]
    keys = runner.keys_of(experiments)
    places = []
    write = keep.write
    monkeypatch.setattr(keep, "write", lambda path, kept: places.append(path) or write(path, kept))
    monkeypatch.setattr(remote, "standing_at", lambda files: contextlib.nullcontext(Path.cwd()))
    monkeypatch.setattr(remote, "teller", lambda caller, number: None)
    monkeypatch.setattr(remote, "threads", lambda: 1)
    for experiment, key in zip(experiments, keys, strict=True):
        told = remote.described(experiment, "promptfl")
        _, content = remote.perform(told, key, Asked(keep=True), {}, ("caller", 0))
        assert content
    assert len({*places}) == 2 and not any(path.exists() for path in places)


def test_images_are_transformed_as_the_caller_says():
    """Whose weights may be those of a tag with another transform than that of its file."""
    assert remote.Sent({"transform": "the caller's"}, None, []).transform == "the caller's"


@pytest.mark.parametrize("room", ["methods.py", "more_methods/prompts.py", "data/partitions.py"])
def test_a_worker_with_other_code_is_another_one(room, tmp_path, monkeypatch):
    shutil.copytree(remote.PACKAGE, tmp_path / "fpl")
    monkeypatch.setattr(remote, "PACKAGE", tmp_path / "fpl")
    before = remote.identity()
    path = tmp_path / "fpl" / room
    path.write_text(path.read_text() + "\nX = 1\n")
    assert remote.identity() != before


def test_of_several_gpus_of_this_machine_each_worker_has_its_own(monkeypatch):
    numbers = ["0", "1"]
    gpus = SimpleNamespace(empty=lambda: not numbers, get=lambda: numbers.pop(0))
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    found = []
    for _ in range(3):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        runner.get_ready(1, [], gpus)
        found.append(os.environ.get("CUDA_VISIBLE_DEVICES"))
    assert found == ["0", "1", None], "without a GPU nothing is said"


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A worker's store, of this process."""
    monkeypatch.setenv(remote.STORE, str(tmp_path / "store"))
    monkeypatch.setattr(remote, "threads", lambda: 1)
    remote.tower.cache_clear()
    yield tmp_path / "store" / "files"
    remote.tower.cache_clear()


def sent(content):
    """Put content into the store, and return its hash."""
    sha = hashlib.sha256(content).hexdigest()
    remote.put(sha, content, 0, True)
    return sha


def damage(path):
    """Change a file where it lies, as a disk would."""
    with path.open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"damaged!")


def test_a_file_that_was_damaged_and_sent_again_is_the_one_that_is_read(store):
    content = b"features of images"
    names = {"data/features/x.h5": sent(content)}
    with remote.standing_at(names):
        assert Path("data/features/x.h5").read_bytes() == content
    damage(store / names["data/features/x.h5"])
    assert remote.missing([*names.values()]) == [*names.values()]
    sent(content)
    with remote.standing_at(names) as folder:
        assert Path("data/features/x.h5").read_bytes() == content
    assert [path.name for path in (folder / "data/features").iterdir()] == ["x.h5"]


def test_no_features_come_from_damaged_weights(store, here):
    paths = [Path("clip") / name for name in (encoders.CONFIG, encoders.WEIGHTS)]
    told = tuple((str(path), sent(path.read_bytes())) for path in paths)
    weights = told[1][1]
    assert remote.tower(BACKBONE, told).provenance["weights"] == weights
    remote.tower.cache_clear()  # as in a worker that was started anew
    damage(store / weights)
    with pytest.raises(OSError, match="weights of local-dir:clip .* are not those that were sent"):
        remote.tower(BACKBONE, told)


def test_a_store_may_be_named_from_where_the_worker_was_started(tmp_path, monkeypatch):
    monkeypatch.setenv(remote.STORE, f"store of {tmp_path.name}")
    monkeypatch.chdir(tmp_path)
    names = {"data/x": sent(b"content")}
    with remote.standing_at(names):
        assert Path("data/x").read_bytes() == b"content"
        assert remote.missing([*names.values()]) == [], "asked while a run stands elsewhere"
    assert [path.name for path in tmp_path.iterdir()] == [f"store of {tmp_path.name}"]


class Workers:
    """A client of workers in memory. What each says of itself, or how it does not, is in `says`.

    One that hangs takes jobs and never ends them. later: workers that come with the tenth look.
    wakes: those that hang, and say that they were slow when their job has been taken away.
    """

    def __init__(self, says, hangs=(), later=(), wakes=()):
        self.says, self.later, self.hangs, self.wakes = {**says}, later, {*hangs}, wakes
        self.looks, self.heard, self.given = 0, [], []

    def subscribe_topic(self, topic, hear):
        self.heard.append(hear)

    def scheduler_info(self, n_workers):
        self.looks += 1
        if self.looks == 10:
            self.says |= dict.fromkeys(self.later, OURS)
        if any(future.cancelled() for future in self.given):
            self.hangs -= {*self.wakes}
            for worker in self.wakes:
                event = {"caller": "mine", "run": 0, "round": 1, "worker": worker}
                self.heard[0]((0.0, event))
        return {"workers": dict.fromkeys(self.says)}

    def run(self, function, *arguments, workers, on_error):
        (worker,) = workers
        said = self.says[worker].pop(0) if len(self.says[worker]) > 1 else self.says[worker][0]
        if isinstance(said, OSError):
            raise said
        return {worker: said if function is remote.identity else []}

    def submit(self, call, *arguments, workers, pure):
        future = Future()
        self.given.append(future)
        if workers[0] not in self.hangs:
            future.set_result((workers[0], *arguments))
        return future


OURS = [remote.identity()]
OTHERS = [remote.identity() | {"fpl": "another"}]
GONE = OSError("the worker has gone")


@pytest.fixture
def quick(monkeypatch):
    """No second is waited for anything."""

    def wait(futures, timeout, return_when):
        return SimpleNamespace(done=[future for future in futures if future.done()])

    monkeypatch.setattr(on_cluster, "wait", wait)
    monkeypatch.setattr(on_cluster, "PATIENCE", 0.05)
    monkeypatch.setattr(on_cluster, "OFTEN", 0.001)
    monkeypatch.setattr(on_cluster, "AGAIN", 0.01)


def dealt(workers):
    """Let workers do three jobs, and return who did them."""
    did = {}
    jobs = [on_cluster.Job(k, None, lambda: (), {}, None) for k in range(3)]
    dealer = on_cluster.Dealer(workers, tqdm(disable=True), "mine")
    assert dealer.deal(jobs, lambda job, found: did.update({job.number: found[0]})) == []
    return did


@pytest.mark.parametrize("others", [{}, {"other": OTHERS}], ids=["alone", "beside another version"])
def test_a_sweep_whose_only_worker_hangs_waits_for_another(others, quick):
    workers = Workers({"hangs": OURS} | others, hangs=["hangs"], later=["comes"])
    with pytest.warns(UserWarning, match="worker hangs has not said anything for long"):
        assert dealt(workers) == dict.fromkeys(range(3), "comes")


def test_a_worker_that_was_slow_is_used_again(quick):
    with pytest.warns(UserWarning, match="worker slow has not said anything for long"):
        did = dealt(Workers({"slow": OURS}, hangs=["slow"], wakes=["slow"]))
    assert did == dict.fromkeys(range(3), "slow")


def test_a_worker_that_goes_while_it_is_asked_ends_no_sweep(quick):
    with pytest.warns(UserWarning, match="worker goes is not used: the worker has gone"):
        did = dealt(Workers({"goes": [GONE]}, later=["comes"]))
    assert did == dict.fromkeys(range(3), "comes")


def test_a_worker_that_could_not_be_asked_is_asked_again(quick):
    with pytest.warns(UserWarning, match="worker back is not used: the worker has gone"):
        assert dealt(Workers({"back": [GONE, *OURS]})) == dict.fromkeys(range(3), "back")


@pytest.mark.parametrize("said", [OTHERS, [ImportError("no package")]], ids=["version", "package"])
def test_without_a_worker_that_is_the_same_a_sweep_ends_in_a_sentence(said, quick):
    with pytest.warns(UserWarning, match="worker one is not used"):
        refuses(lambda: dealt(Workers({"one": said, "two": OTHERS})), ["no worker", "this version"])


def test_another_callers_runs_keep_none_of_mine_alive(monkeypatch):
    """All callers hear all workers."""
    jobs = {}
    for caller in ("mine", "other"):
        workers = Workers({})
        dealer = on_cluster.Dealer(workers, tqdm(disable=True), caller)
        jobs[caller] = on_cluster.Job(0, None, lambda: (), {}, None)
        dealer.by_number = {0: jobs[caller]}
        told = []
        worker = SimpleNamespace(log_event=lambda topic, said, told=told: told.append(said))
        monkeypatch.setattr(distributed, "get_worker", lambda worker=worker: worker)
        remote.teller("other", 0)({"round": 1})
        workers.heard[0]((0.0, {**told[0], "worker": "one"}))  # as Dask says who spoke
    assert jobs["mine"].heard == 0.0 < jobs["other"].heard
