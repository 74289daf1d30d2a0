"""Files that are whole or not there, and their hashes."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = (
    Path(__file__).resolve().parents[2]
)  # what belongs to the repository and not to a profile is found from here


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Give a temporary name, which becomes `path` if the block ends well and is removed if not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def file_lock(path: str | Path, notice: Callable[[], object] = lambda: None) -> Iterator[int]:
    """Let one process at a time into the block; a killed one lets go of the lock.

    Yields the descriptor; a child that is given it holds the lock too, as long as it lives.

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
        yield lock.fileno()


def sha256(path: str | Path) -> str:
    """Hash a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
