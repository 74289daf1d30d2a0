"""Files are whole or not there, stages of the pipeline run one at a time, and what DVC left half
written is found."""

import errno
import os
import subprocess
import sys
import threading
import time

import pytest

from fpl.cli import options, repro
from fpl.data import files
from fpl.experiments import verbs


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with pytest.raises(KeyError), files.atomic_write(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert not list(path.parent.iterdir())
    with files.atomic_write(path) as temporary:
        temporary.write_text("whole")
    assert path.read_text() == "whole" and list(path.parent.iterdir()) == [path]


def test_what_killed_commands_left_is_removed_by_the_next(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    living = f".a.json.{os.getppid()}.tmp"
    others = {living, ".b.json.1.tmp", ".a.json.x.tmp", f".xa.json.{ended.pid}.tmp"}
    for name in {*others, f".a.json.{ended.pid}.tmp", f".a.json.{9**30}.tmp"}:
        (tmp_path / name).touch()
    with files.atomic_write(tmp_path / "a.json") as temporary:
        temporary.touch()
    assert {path.name for path in tmp_path.iterdir()} == others | {"a.json"}


def test_file_and_folder_are_on_the_disk_when_it_is_written(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(files, "sync", lambda path: done.append((path, (tmp_path / "a").exists())))
    with files.atomic_write(tmp_path / "a") as temporary:
        temporary.touch()
    assert done == [(temporary, False), (tmp_path, True)]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("file write failed: errno = 28, error message = 'No space left on device'"),
    ],
    ids=repr,
)
def test_a_full_disk_is_said_with_the_file(error, tmp_path):
    with (
        pytest.raises(OSError, match=f"^no space left for {tmp_path}/a: make room and "),
        files.atomic_write(tmp_path / "a"),
    ):
        raise error
    assert not list(tmp_path.iterdir())


def test_what_is_no_file_is_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    saved = tmp_path / "pipe.safetensors"
    os.mkfifo(saved)
    calls = [lambda: options.check_target(pipe), lambda: verbs.save(None, saved)]
    for call in calls:
        with pytest.raises(OSError, match="is a folder, a device or a pipe: give"):
            call()
    assert saved.is_fifo()
    saved.unlink()
    assert pipe.is_fifo() and [*tmp_path.iterdir()] == [pipe]


def test_a_link_is_written_through_where_a_command_is_told_the_name(tmp_path):
    link, file = tmp_path / "link", tmp_path / "deep" / "file"
    link.symlink_to(file)
    assert options.check_target(link) == file and options.check_target(file) == file
    with files.atomic_write(options.check_target(link)) as temporary:
        temporary.write_text("new")
    assert link.is_symlink() and file.read_text() == "new"


@pytest.mark.parametrize("number", files.NO_LOCKS)
def test_where_there_are_no_locks_everybody_is_let_in_with_a_word(number, tmp_path, monkeypatch):
    def flock(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.fcntl, "flock", flock)
    said = pytest.warns(UserWarning, match=f"{tmp_path}/lock has no locks")
    with said, files.file_lock(tmp_path / "lock"):
        pass


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
        ("\xff\xfe", False),
        ('{"a": 1}', True),
        ("schema: '2.0'\n", True),
    ],
)
def test_half_written_files_are_told_from_whole_ones(text, whole, tmp_path):
    (tmp_path / "file").write_bytes(text.encode("latin-1"))
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
