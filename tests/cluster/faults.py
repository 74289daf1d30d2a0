"""Promise: whatever happens to workers, a sweep on a cluster makes every run, or says which not.

Real processes, which take minutes: called by `make test-cluster`, not by `make test`.
"""

import contextlib
import os
import shutil
import signal
import threading
import time

import pytest
from helpers import PARAMS, ROOT
from helpers.dask import cluster

from fpl.experiments import cluster as on_cluster
from fpl.experiments import records, remote, runner
from fpl.experiments.runner import Asked

LONG = [PARAMS.experiment("promptfl", seed, rounds=60) for seed in (1, 2, 3, 4)]


@pytest.fixture
def dask(tmp_path):
    """A scheduler without workers."""
    with cluster(tmp_path) as made:
        yield made


def content():
    return {path.name: path.read_bytes() for path in records.RECORDS.iterdir()}


@pytest.fixture
def want(alone):
    """The records of a sweep on this machine, which are gone."""
    runner.sweep(LONG, jobs=1)
    found = content()
    shutil.rmtree(records.RECORDS)
    return found


def sweep(address):
    runner.sweep(LONG, asked=Asked(cluster=address))


@contextlib.contextmanager
def meanwhile(action):
    """Do something in a thread, when the first record is there."""

    def wait():
        while not list(records.RECORDS.glob("*.json")):
            time.sleep(0.01)
        action()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    yield
    thread.join(60)
    assert not thread.is_alive()


def test_a_killed_worker_loses_its_run_only(dask, want):
    dask.worker("first")
    second = dask.worker("second")
    with meanwhile(lambda: os.kill(second.pid, signal.SIGKILL)):
        sweep(dask.address)
    assert content() == want


def test_a_worker_that_hangs_is_left_alone(dask, want, monkeypatch):
    monkeypatch.setattr(on_cluster, "PATIENCE", 5.0)
    dask.worker("first")
    second = dask.worker("second")
    with meanwhile(lambda: os.kill(second.pid, signal.SIGSTOP)):
        sweep(dask.address)
    assert content() == want


def test_without_workers_a_sweep_waits_and_goes_on_when_there_are_some(dask, want):
    only = dask.worker("only")

    def change():
        os.kill(only.pid, signal.SIGKILL)
        time.sleep(3)
        assert len(content()) < len(LONG), "nobody was there to make them"
        dask.worker("another")

    with meanwhile(change):
        sweep(dask.address)
    assert content() == want


def test_a_run_that_nobody_survives_is_reported_and_the_others_are_made(dask, want, monkeypatch):
    """A method that kills whoever runs it is tried three times; four workers, one is left."""
    for name in ("one", "two", "three", "four"):
        dask.worker(name)
    deadly = records.RECORDS.parent / "deadly.py"
    deadly.parent.mkdir(exist_ok=True)
    deadly.write_text(DEADLY)
    bad = PARAMS.experiment(f"{deadly}:Deadly", 1)
    said = "1 of 5 runs failed, deadly, seed 1: worker .* has gone"
    with pytest.raises(RuntimeError, match=said):
        runner.sweep([bad, *LONG], asked=Asked(cluster=dask.address))
    assert content() == want


DEADLY = """
import os
from dataclasses import dataclass

from fpl.methods import PromptFL


@dataclass(frozen=True)
class Deadly(PromptFL):
    n_ctx: int = 2

    def init(self, text, gen):
        os._exit(9)
"""


def test_other_versions_are_not_used(dask, want, tmp_path):
    """A worker with a changed loop, one without the package, and one that fits."""
    other, none = tmp_path / "other", tmp_path / "none"
    shutil.copytree(ROOT / "fpl", other / "fpl")
    loop = other / "fpl" / "rounds.py"
    loop.write_text(loop.read_text() + "\n# changed\n")
    (none / "fpl").mkdir(parents=True)
    (none / "fpl" / "__init__.py").write_text("raise ImportError('no package')")
    dask.worker("other", PYTHONPATH=str(other))
    said = "is not used: it has fpl .*, here is fpl"
    nobody = pytest.raises(ValueError, match="no worker of the cluster has this version")
    with nobody, pytest.warns(UserWarning, match=said):
        sweep(dask.address)
    dask.worker("none", PYTHONPATH=str(none))
    dask.worker("fits")
    with pytest.warns(UserWarning, match="is not used: "):
        sweep(dask.address)
    assert content() == want
    assert not (dask.folder / "other" / "store").exists(), "something was sent to it"


def test_a_full_disk_here_ends_the_sweep_and_keeps_what_is_made(dask, want, monkeypatch):
    dask.worker("only")
    write, written = records.write, []

    def full(record):
        if written:
            raise OSError("no space left for it: make room and call the same command again")
        written.append(write(record))

    monkeypatch.setattr(records, "write", full)
    with pytest.raises(OSError, match="no space left"):
        sweep(dask.address)
    assert content() == {path.name: want[path.name] for path in written}
    monkeypatch.undo()
    sweep(dask.address)
    assert content() == want


def test_ctrl_c_ends_a_sweep_which_goes_on_when_it_is_called_again(dask, want):
    dask.worker("only")
    main = threading.main_thread().ident
    stop = meanwhile(lambda: signal.pthread_kill(main, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt), stop:
        sweep(dask.address)
    assert 0 < len(content()) < len(LONG)
    sweep(dask.address)
    assert content() == want


def test_nothing_that_arrives_as_something_else_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv(remote.STORE, str(tmp_path))
    whole = b"0123456789"
    sha = remote.hashlib.sha256(whole).hexdigest()
    remote.put(sha, whole[:4], 0, False)
    with pytest.raises(OSError, match="arrived as"):
        remote.put(sha, b"other", 4, True)
    assert remote.missing([sha]) == [sha]
    remote.put(sha, whole[:4], 0, False)
    remote.put(sha, whole[4:], 4, True)
    assert remote.missing([sha]) == []
    (tmp_path / "files" / sha).write_bytes(b"changed")
    assert remote.missing([sha]) == [sha]
