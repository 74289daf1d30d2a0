"""Files are whole or not there, stages of the pipeline run one at a time, and what DVC left half
written is found."""

import subprocess
import sys
import threading
import time

import pytest

from fpl.cli import repro
from fpl.data import files


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with pytest.raises(KeyError), files.atomic_write(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert not list(path.parent.iterdir())
    with files.atomic_write(path) as temporary:
        temporary.write_text("whole")
    assert path.read_text() == "whole" and list(path.parent.iterdir()) == [path]


def test_the_lock_makes_others_wait_until_its_holder_ends(tmp_path):
    lock, done = tmp_path / "lock", tmp_path / "done"
    code = (
        "from fpl.data import files\nprint('up', flush=True)\n"
        f"with files.file_lock({str(lock)!r}): open({str(done)!r}, 'w')"
    )
    with files.file_lock(lock):
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert child.stdout.readline() == "up\n"
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(1)
        assert not done.exists()
    assert child.wait(20) == 0 and done.exists()


def test_a_killed_holder_lets_go(tmp_path):
    lock = tmp_path / "lock"
    code = (
        "from fpl.data import files\nimport time\n"
        f"with files.file_lock({str(lock)!r}): print('held', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "held\n"
    child.kill()
    child.wait()
    with files.file_lock(lock):
        pass


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("", False),
        ('{"a"', False),
        ("stages: {", False),
        ('{"a": 1}', True),
        ("schema: '2.0'\n", True),
    ],
)
def test_half_written_files_are_told_from_whole_ones(text, whole, tmp_path):
    (tmp_path / "file").write_text(text)
    assert repro.readable(tmp_path / "file") == whole


def test_whoever_has_to_wait_is_told_so(tmp_path):
    told = []
    with files.file_lock(tmp_path / "lock", lambda: told.append("first")):
        waits = threading.Thread(target=lambda: enter(tmp_path / "lock", told))
        waits.start()
        while not told:
            time.sleep(0.01)
        assert told == ["second waits"]
    waits.join()
    assert told == ["second waits", "second is in"]


def enter(lock, told):
    with files.file_lock(lock, lambda: told.append("second waits")):
        told.append("second is in")
