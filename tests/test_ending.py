"""Promise: a command ends in one sentence, whatever goes wrong and however often it is stopped."""

import multiprocessing
import os
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import spawn
from pathlib import Path

import pytest

from fpl import cli
from fpl.cli import compare, ending, show
from fpl.data.processes import begin_worker, starting_workers

STOPS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def handlers():
    """What this process does on signals, as it was."""
    before = {number: signal.getsignal(number) for number in STOPS}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


def said(monkeypatch, act):
    """Return the sentence that a command ends in which does this."""
    monkeypatch.setattr(compare, "run", lambda options: act())
    with pytest.raises(SystemExit) as end:
        cli.main(["compare"])
    return end.value.code


def fail(error):
    raise error


MENDABLE = [
    (ValueError("wrong: write another"), "fpl compare: wrong: write another"),
    (FileNotFoundError(2, "none", "x"), "fpl compare: [Errno 2] none: 'x'"),
    (RuntimeError("two\n  lines\x1b[2J"), r"fpl compare: two lines\x1b[2J"),
    (MemoryError(), "fpl compare: memory ran out (MemoryError): ask for less at a time, or free"),
]
OURS = [
    KeyError("x"),
    TypeError("two\nlines"),
    RecursionError("too deep"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    AssertionError(),
    ValueError(),
    NotImplementedError("later"),
]


@pytest.mark.parametrize(("error", "wanted"), MENDABLE, ids=str)
def test_what_a_user_can_mend_is_a_sentence(error, wanted, monkeypatch):
    found = said(monkeypatch, lambda: fail(error))
    assert found.startswith(wanted) and "\n" not in found
    assert not Path("results").exists()


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("error", OURS, ids=lambda error: type(error).__name__)
def test_what_nobody_can_mend_is_ours_with_its_details_in_a_file(error, there, monkeypatch):
    if there:
        Path("results").mkdir()
    found = said(monkeypatch, lambda: fail(error))
    assert "this is an error of ours" in found and type(error).__name__ in found
    assert "please report it" in found and "\n" not in found
    path = Path(found.rpartition("the file ")[2])
    assert (path == Path("results/error.txt")) == there
    details = path.read_text()
    path.unlink()
    assert "fpl compare" in details and "Traceback" in details and "in fail" in details


def test_what_fails_in_a_file_of_ones_own_is_said_with_its_place(monkeypatch):
    from fpl.experiments import settings

    path = Path("mine.py").resolve()
    path.write_text("def loss(x):\n    return x['y']\n")
    module = settings.own_module(path)
    found = said(monkeypatch, lambda: module.loss({}))
    assert found == f"fpl compare: {path}, line 2, in loss: KeyError: 'y'"


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("number", STOPS)
def test_a_command_that_is_stopped_says_so_once(number, times, monkeypatch, handlers, capsys):
    def work():
        try:
            os.kill(os.getpid(), number)
        finally:  # what tidies up is not interrupted again, and may fail
            for _ in range(times - 1):
                os.kill(os.getpid(), number)
            fail(KeyError("a half of something"))

    assert said(monkeypatch, work) == ending.STOPPED
    assert capsys.readouterr().err == ""


def test_a_command_that_does_not_stop_is_ended(handlers):
    process = os.fork()
    if not process:
        asked = []
        with ending.interruptible(asked):
            for _ in range(2):
                try:
                    os.kill(os.getpid(), signal.SIGINT)
                except KeyboardInterrupt:
                    asked[0] -= 2 * ending.PATIENCE
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 128 + signal.SIGINT


def test_signals_do_afterwards_what_they_did_before(handlers, monkeypatch):
    said(monkeypatch, lambda: fail(ValueError("no")))
    assert {number: signal.getsignal(number) for number in STOPS} == handlers


def test_output_that_nobody_reads_ends_a_command_quietly(monkeypatch):
    reads, writes = os.pipe()
    os.close(reads)
    with open(writes, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        code = said(monkeypatch, lambda: show.say("x" * 10**5))
    assert code == ending.NOBODY_READS


def test_a_warning_is_a_line(monkeypatch, capsys):
    monkeypatch.setattr(compare, "run", lambda options: ending.warnings.warn("odd\nbut so"))
    cli.main(["compare"])
    assert capsys.readouterr().err == "fpl compare: odd but so\n"


def test_a_worker_leaves_ctrl_c_to_its_parent_and_does_not_run_the_script(monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "script.py", raising=False)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    assert spawn.get_preparation_data("worker")["init_main_from_path"].endswith("script.py")
    ready = ("time", "sleep", 0)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), begin_worker, ready) as pool:
        with starting_workers():
            assert not {name for name in spawn.get_preparation_data("worker") if "main" in name}
            blocked = pool.submit(signal.pthread_sigmask, signal.SIG_BLOCK, [])
        assert signal.SIGINT in blocked.result()
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert sys.modules["__main__"].__file__ == "script.py"
