"""Files that are whole or not there, and their hashes."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = (
    Path(__file__).resolve().parents[2]
)  # what belongs to the repository and not to a profile is found from here
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # what such a file system says
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def atomic_write(path: str | Path, one_of_many: bool = False) -> Iterator[Path]:
    """Give a temporary name, which becomes `path` if the block ends well and is removed if not.

    The file is on the disk when this ends. What killed commands left under such names is removed.

    one_of_many: do neither, which takes long for thousands of files.

    Raises OSError naming `path` when there is no room.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not one_of_many:
        remove_orphans(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with room_for(path):
            yield temporary
            if not one_of_many:
                sync(temporary)
        os.replace(temporary, path)
        if not one_of_many:
            with suppress(OSError):  # not every file system can do it for folders
                sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def room_for(path: Path) -> Iterator[None]:
    """Raise OSError saying which file had no room and what to do, where the block finds none."""
    try:
        yield
    except Exception as e:  # libraries have their own kinds
        if getattr(e, "errno", None) in NO_ROOM or "No space left" in str(e):
            raise OSError(
                f"no space left for {path}: make room and call the same command again"
            ) from e
        raise


def check_file(path: Path) -> None:
    """Raise OSError for what is there and is no file, such as a pipe: writing would replace it."""
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is a folder, a device or a pipe: give the name of a file")


def check_writable(folder: str | Path) -> None:
    """Raise OSError naming a folder where no file can be written; it is made if it is not there."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise OSError(f"nothing can be written in {folder} ({e.strerror}): correct that") from e


def sync(path: Path) -> None:
    """Bring a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_orphans(path: Path) -> None:
    """Remove the temporary files of a name that belong to no living process."""
    for orphan in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        number = orphan.name.split(".")[-2]
        if number.isdecimal() and not is_alive(int(number)):
            orphan.unlink(missing_ok=True)


def is_alive(process: int) -> bool:
    """Say whether there is a process of this number."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # another user's
    return True


@contextmanager
def file_lock(path: str | Path, notice: Callable[[], object] = lambda: None) -> Iterator[int]:
    """Let one process at a time into the block; a killed one lets go of the lock.

    Yields the descriptor; a child that is given it holds the lock too, as long as it lives. Where
    the file system has no locks everybody is let in, with a warning.

    notice: called before waiting for whoever holds the lock.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            notice()
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as e:
            if e.errno not in NO_LOCKS:
                raise
            warnings.warn(
                f"the file system of {path} has no locks: let one command run here at a time",
                stacklevel=3,
            )
        yield lock.fileno()


@contextmanager
def lock_of_block(path: Path, notice: Callable[[], object]) -> Iterator[None]:
    """Lock as `file_lock` does, and let go at the end: children that were forked hold it, too."""
    with file_lock(path, notice) as lock:
        try:
            yield
        finally:
            with suppress(OSError):  # there may be no locks
                fcntl.flock(lock, fcntl.LOCK_UN)


def sha256(path: str | Path) -> str:
    """Hash a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
