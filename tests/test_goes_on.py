"""Promise: a killed run goes on from its last checkpoint, and its record has the same bytes."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import PARAMS
from helpers.processes import Python
from helpers.runs import small
from safetensors.torch import load_file, save_file

from fpl.experiments import checkpoints, keep, records, runner
from fpl.experiments.runner import Asked
from fpl.experiments.settings import ROWS

pytestmark = pytest.mark.usefixtures("patched")

EVERY_ROUND = Asked(every=0, keep=True)
MANY = 8  # rounds of a run that is killed several times


class Stop(Exception):
    pass


def stop_after(number):
    """Return what is asked of a run that ends when a round has ended, before its checkpoint."""

    def follow(line):
        if line["round"] == number:
            raise Stop

    return replace(EVERY_ROUND, follow=follow)


def short(row, seed=1, **changes):
    """Return an experiment of three rounds, in which not everybody trains."""
    return small(row, seed, **{"rounds": 3, "participation": 0.75, **changes})


def files_of(experiment):
    """Return the bytes of a run's record and of what it kept, which it must have."""
    (key,) = runner.keys_of([experiment])
    return key.path.read_bytes(), key.path.with_suffix(keep.SUFFIX).read_bytes()


def checkpoint_of(experiment):
    (key,) = runner.keys_of([experiment])
    return checkpoints.Checkpoint(experiment, key)


def undisturbed(experiment):
    """Make a run without a stop, and forget it; return its files."""
    runner.sweep([experiment], asked=EVERY_ROUND)
    found = files_of(experiment)
    shutil.rmtree(records.RECORDS)
    return found


def goes_on(experiment):
    """Stop a run twice, each time a round later, and compare all that it leaves."""
    want = undisturbed(experiment)
    rounds = len(json.loads(want[0])["rounds"])  # one where there is nothing to learn
    for last in range(1, rounds):
        with pytest.raises(Stop):  # before the checkpoint of that round
            runner.sweep([experiment], asked=stop_after(last))
        assert checkpoint_of(experiment).read()[1].server.round == last - 1
    lines = []
    runner.sweep([experiment], asked=replace(EVERY_ROUND, follow=lines.append))
    assert files_of(experiment) == want
    assert [line["round"] for line in lines] == list(range(rounds))
    assert not checkpoint_of(experiment).path.exists()


@pytest.mark.parametrize("row", ROWS)
def test_every_row_goes_on_as_if_nothing_had_happened(row, alone):
    goes_on(short(row))


def test_on_two_threads_too(alone):
    """A row with all there is to go on with: a gate, experts and an optimiser of all clients."""
    torch.set_num_threads(2)
    try:
        goes_on(short("pfedmoap_released"))
    finally:
        torch.set_num_threads(1)


OTHERS = [{"epsilon": 5.0}, {"mechanism": "clipping"}, {"lam": 0.1}]
OTHERS += [{"choice": "random", "order_seed": 7}]


@pytest.mark.parametrize("changes", OTHERS)
def test_with_noise_clipping_and_other_settings_too(changes, alone):
    goes_on(short("pfedmoap", **changes))


def stopped(experiment):
    """Leave a run with a checkpoint of its first round."""
    with pytest.raises(Stop):
        runner.sweep([experiment], asked=stop_after(1))
    return checkpoint_of(experiment).path


@pytest.mark.parametrize("other", [short("pfedmoap", 2), short("pfedmoap", lam=0.1), short("coop")])
def test_no_run_goes_on_from_the_checkpoint_of_another(other, alone):
    experiment = short("pfedmoap")
    want = undisturbed(experiment)
    shutil.copy(stopped(other), checkpoint_of(experiment).path)
    with pytest.warns(UserWarning, match="is of another run: its run begins again"):
        runner.sweep([experiment], asked=EVERY_ROUND)
    assert files_of(experiment) == want


def test_nor_from_one_of_another_device(monkeypatch, alone):
    checkpoint = checkpoint_of(short("promptfl"))
    here = checkpoint.identity
    monkeypatch.setattr(checkpoints, "device", lambda: "cuda")
    assert checkpoint.identity != here


def test_nor_from_one_of_another_version_of_torch(alone, monkeypatch):
    path = stopped(short("promptfl"))
    monkeypatch.setattr(checkpoints, "torch", SimpleNamespace(__version__="0.1"))
    with pytest.warns(UserWarning, match="is of another run"):
        assert checkpoint_of(short("promptfl")).read() == ([], None)
    assert path.exists()


def cut(path):
    path.write_bytes(path.read_bytes()[:-8])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def change(path):
    """Another number under the header as it was: the file of another hand."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
    tensors = load_file(path)
    tensors["local/ctx"] += 1
    save_file(tensors, path, json.loads(header)["__metadata__"])


DAMAGES = {
    "cut": cut,
    "a bit": flip,
    "a number": change,
    "empty": lambda path: path.write_bytes(b""),
    "another kind": lambda path: path.write_text("{}"),
    "no header of ours": lambda path: save_file({"x": torch.zeros(1)}, path),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_named_and_not_used(damage, alone):
    experiment = short("promptfl")
    want = undisturbed(experiment)
    damage(stopped(experiment))
    with pytest.warns(UserWarning, match="checkpoint is damaged: its run begins again"):
        runner.sweep([experiment], asked=EVERY_ROUND)
    assert files_of(experiment) == want


def test_a_fresh_run_takes_no_checkpoint(alone):
    stopped(short("promptfl"))
    lines = []
    asked = Asked(
        fresh=True, follow=lambda line: lines.append(checkpoint_of(short("promptfl")).path.exists())
    )
    runner.sweep([short("promptfl")], asked=asked)
    assert lines == [False, False, False]


def test_one_killed_behind_its_record_leaves_nothing_when_called_again(alone, monkeypatch):
    experiment = short("promptfl")
    with monkeypatch.context() as killed:
        killed.setattr(checkpoints.Checkpoint, "remove", lambda self: None)
        runner.sweep([experiment], asked=EVERY_ROUND)
    path = checkpoint_of(experiment).path
    assert path.exists()
    path.with_name(f".{path.name}.{2**22 + 1}.tmp").touch()  # of a process that cannot be
    runner.sweep([experiment], asked=EVERY_ROUND)
    assert {p.suffix for p in records.RECORDS.iterdir()} == {".json", keep.SUFFIX}


def test_checkpoints_come_as_often_as_asked_and_take_a_small_share_of_the_time(alone, monkeypatch):
    experiment = short("promptfl", rounds=12)
    now, written = [100.0], []
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now[0])

    def write(path, tensors, header):
        written.append(now[0])
        now[0] += 0.5  # as long as writing takes

    monkeypatch.setattr(checkpoints.stored, "write", write)

    def later(line):
        now[0] += 6.0

    runner.sweep([experiment], asked=Asked(every=10.0, follow=later))
    assert written == [112.0, 142.5]  # after 25 = 0.5 / 0.02 seconds, not 10, and at a round's end


KILLED = """
import os, random, signal, sys, time
from helpers import PARAMS
from fpl.data import encoders, extraction
from fpl.data.manifest import read_manifest
from fpl.experiments import checkpoints, runner
from fpl.experiments.runner import Asked

row, seed = sys.argv[1:]
experiment = PARAMS.experiment(row, 1, rounds=ROUNDS, participation=0.75)
runner.keys_of([experiment])  # children have in memory what is read first, and begin at once


def start():
    child = os.fork()
    if not child:
        runner.sweep([experiment], asked=Asked(every=0))
        os._exit(0)
    return child


def code_of(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


began = time.monotonic()
assert code_of(start()) == 0
patience = time.monotonic() - began  # what an undisturbed run takes on this machine
runner.keys_of([experiment])[0].path.unlink()
chance = random.Random(int(seed))
kills = 0
while True:
    child = start()
    time.sleep(chance.uniform(0, patience))
    os.kill(child, signal.SIGKILL)
    if code_of(child) == 0:
        break
    kills += 1
    patience *= 1.1  # ends on a machine that has become slower, too
print(kills)
""".replace("ROUNDS", str(MANY))


@pytest.mark.parametrize("row", ["pfedmoap", "promptfl_released"])
def test_killed_at_any_moment_again_and_again_it_ends_with_the_same_bytes(row, alone):
    """kill -9, at random moments of loading, rounds and writing."""
    experiment = PARAMS.experiment(row, 1, rounds=MANY, participation=0.75)
    (path,) = runner.sweep([experiment])
    want = path.read_bytes()
    path.unlink()
    process = Python(alone, "-c", KILLED, row, "7")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert int(out) >= 2, "no kill came in time"
    assert path.read_bytes() == want
    assert [p.name for p in records.RECORDS.iterdir()] == [path.name]
