"""Promise: a command ends in one sentence, whatever goes wrong and however often it is stopped."""

import contextlib
import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import spawn
from pathlib import Path

import nbformat
import psutil
import pytest
from helpers.processes import Python

from fpl import cli
from fpl.cli import compare, ending, repro, show, stage
from fpl.data import processes
from fpl.data.processes import begin_worker, starting_workers
from fpl.experiments import settings

STOPS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder without anything, and no method of the user's own that another test has loaded."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.startswith(settings.OWN)]:
        monkeypatch.delitem(sys.modules, name)


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
    (
        NotADirectoryError(20, "no folder", "x/y"),
        "fpl compare: [Errno 20] no folder: 'x/y': move away the file that stands where a folder",
    ),
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
    path = Path("mine.py").resolve()
    path.write_text("def loss(x):\n    return x['y']\n")
    module = settings.own_module(path)
    found = said(monkeypatch, lambda: module.loss({}))
    assert found == f"fpl compare: {path}, line 2, in loss: KeyError: 'y'"
    found = said(monkeypatch, lambda: fail(TypeError("no number")))  # of what it gave back
    begin, _, file = found.partition("the file ")
    assert begin.startswith(f"fpl compare: {path} may give back") and "`fpl check`" in begin
    Path(file.split()[0]).unlink()
    monkeypatch.delitem(sys.modules, module.__name__)


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


# --- whole trees of processes: fpl repro, DVC, a command, a kernel, a worker

PIPELINE = """
stages:
  slow:
    cmd: python -m fpl.cli notebook slow.ipynb
    outs: [results/notebooks/slow.ipynb]
"""
CELL = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from fpl.data.processes import begin_worker, starting_workers

pool = ProcessPoolExecutor(1, get_context("spawn"), begin_worker, ("time", "sleep", 0))
with starting_workers():
    pool.submit(time.sleep, 600 if Path("slow").exists() else 0)
Path("up").touch()
time.sleep(600 if Path("slow").exists() else 0)
pool.shutdown()
"""

IN_A_GROUP = "import os; os.setsid(); from fpl import cli; cli.main()"


@pytest.fixture
def project(tmp_path):
    """A pipeline of one notebook, which takes ten minutes while there is a file `slow`."""
    Path("params.yaml").write_text("{}")
    Path("dvc.yaml").write_text(PIPELINE)
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "", "language": "python"}
    nbformat.write(book, "slow.ipynb")
    Path("slow").touch()
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], check=True)
    return tmp_path


@contextlib.contextmanager
def at_work(folder, *arguments):
    """Give a command, in a group of its own as in a terminal, and its tree once all of it works."""
    process = Python(folder, "-c", IN_A_GROUP, *arguments)
    tree = []
    try:
        while not Path("up").exists():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        tree = psutil.Process(process.pid).children(recursive=True)
        assert any("ipykernel_launcher" in other.cmdline() for other in tree)
        assert any("spawn_main" in " ".join(other.cmdline()) for other in tree)
        yield process, tree
    finally:
        Path("up").unlink(missing_ok=True)
        process.kill()
        stage.tell(tree, "kill")  # with what a broken promise has left
        process.communicate()


def left(tree, seconds=0.0):
    """Return what of a tree is alive after some seconds, at most."""
    end = time.monotonic() + seconds
    while any(map(stage.is_at_work, tree)) and time.monotonic() < end:
        time.sleep(0.05)
    return [process.cmdline() for process in tree if stage.is_at_work(process)]


def is_free(path):
    with open(path) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if it is held
    return True


def test_a_pipeline_that_is_stopped_or_killed_leaves_nothing_and_the_next_call_works(project):
    with at_work(project, "repro") as (process, tree):
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
        said = process.communicate(timeout=30)[1]
        assert not left(tree)
    assert process.returncode == 1 and said.count("stopped") == 1
    assert said.splitlines()[-1] == ending.STOPPED and "ERROR" not in said
    with at_work(project, "repro") as (process, tree):
        process.kill()
        assert not left(tree, seconds=20)
    assert is_free("results/.repro.lock") and is_free("results/.stage.lock")
    Path("slow").unlink()
    process = Python(project, "-m", "fpl.cli", "repro")
    out, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert Path("results/notebooks/slow.ipynb").exists() and "waiting" not in said


@pytest.mark.parametrize(
    ("demo", "asked", "whole"),
    [
        (True, [], ["dvc repro features", "fpl.cli sweep", "dvc repro"]),
        (True, ["results@10_table1"], ["dvc repro results@10_table1"]),
        (False, [], ["dvc repro"]),
    ],
)
@pytest.mark.parametrize("fails", [0, 1, 2, 3])
def test_all_runs_of_the_demo_are_made_by_one_sweep_and_what_fails_ends_it(
    demo, asked, whole, fails, tmp_path, monkeypatch
):
    """fails: which of the commands ends with a status of its own."""
    Path("params.yaml").write_text("{}")
    if demo:
        Path("results/expected").mkdir(parents=True)
    called, compared = [], []

    def call(command, environment, lock):
        assert command[:2] == [sys.executable, "-m"] and stage.PIPELINE in environment
        called.append(" ".join(command[2:]))
        return 7 if len(called) == fails else 0

    monkeypatch.setattr(repro, "call", call)
    monkeypatch.setattr(repro.compare, "run", compared.append)
    stopped = 0 < fails <= len(whole)
    with pytest.raises(SystemExit, match="7") if stopped else contextlib.nullcontext():
        cli.main(["repro", *asked])
    assert called == (whole[:fails] if stopped else whole)
    assert len(compared) == (demo and not stopped)


def test_a_notebook_that_is_stopped_leaves_nothing(project):
    with at_work(project, "notebook", "slow.ipynb") as (process, tree):
        os.killpg(process.pid, signal.SIGINT)
        said = process.communicate(timeout=30)[1]
        assert not left(tree)
    assert process.returncode == 1 and said.count("stopped") == 1
    assert "Traceback" not in said and "KeyboardInterrupt" not in said
    assert is_free("results/.stage.lock")


def test_a_stage_whose_pipeline_is_gone_does_not_begin(monkeypatch):
    ended = subprocess.Popen(["true"])
    ended.wait()
    this = psutil.Process().create_time()
    for told in (f"{ended.pid} {this}", f"{os.getpid()} {this - 3600}"):
        monkeypatch.setenv(stage.PIPELINE, told)
        found = said(monkeypatch, lambda: pytest.fail("it began"))
        assert found == "fpl compare: the `fpl repro` that this belongs to is gone: call it again"
    for told in ("", "1", "a b", "-1 1", "1 x"):
        monkeypatch.setenv(stage.PIPELINE, told)
        found = said(monkeypatch, lambda: pytest.fail("it began"))
        assert f"{stage.PIPELINE} is set to {told!r}" in found and "unset it" in found


def test_a_stage_leaves_ctrl_c_to_its_pipeline_which_asks_it_to_end(monkeypatch, handlers):
    monkeypatch.setenv(stage.PIPELINE, stage.handed_on()[stage.PIPELINE])
    with ending.interruptible([]):
        assert signal.getsignal(signal.SIGINT) == handlers[signal.SIGINT]
    assert said(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGTERM)) == 1  # and says nothing


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (("os", "abort"), ChildProcessError, "dies of SIGABRT"),
        (("os", "_exit", 3), ChildProcessError, "dies of exit status 3"),
        (("time", "sleep", 60), TimeoutError, "no answer in 1 seconds"),
        (("math", "sqrt", -1), ValueError, "math domain error|nonnegative"),
    ],
)
def test_what_a_call_apart_does_to_its_process_is_said(call, error, words):
    with pytest.raises(error, match=words):
        processes.apart(1, *call)
    assert not multiprocessing.active_children()


def test_a_call_apart_gives_its_answer():
    assert processes.apart(60, "math", "sqrt", 4) == 2
