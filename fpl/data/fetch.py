"""Getting data sets: files are downloaded, verified, and unpacked into the data set's folder only.

A download goes on after a break. What to get stands in the description of each data set: addresses
and MD5 sums are those of torchvision 0.29 and of the authors' pages, sizes those that their servers
state. What has no stable source is brought by hand: `by_hand` says which file, from where, to which
place.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import shutil
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from fpl.data import datasets
from fpl.data.archives import ARCHIVES, LIMIT, extract
from fpl.data.datasets.layouts import Dataset, File
from fpl.data.files import atomic_write, file_lock

LISTS = 2**26  # bytes that a file may have that is no archive
PIECE = 2**20  # bytes that are read at once
TIMEOUT = 60.0  # seconds without an answer
WINDOW = 120.0  # seconds in which LEAST bytes must come
LEAST = 2**17
TOTAL = 24 * 3600  # seconds for a file; a later call goes on
PAUSE = 2.0  # seconds before the next try
TRIES = 5  # in a row that brought less than PROGRESS bytes
PROGRESS = 2**20
BUSY = (408, 429)  # answers below 500 after which it helps to ask again
ELSEWHERE = "find the file elsewhere and put it in its place"


def terms(name: str) -> str:
    """The terms of use of a data set and where they stand."""
    dataset = datasets.get(name)
    return f"{dataset.terms} See {dataset.page}"


def by_hand(name: str, root: Path) -> list[str]:
    """What has no stable source and is not there yet or no more, a sentence for each file."""
    asked = []
    for file in placed(datasets.get(name), root):
        path = root / file.path
        lost = mark_of(path).exists() and not path.exists() and not is_unpacked(path)
        if file.hint and (lost or not (root / (file.gives or file.path)).exists()):
            asked.append(f"bring {path.name} ({file.hint}) and put it at {path}")
    return asked


def placed(dataset: Dataset, root: Path) -> list[File]:
    """Return a data set's files with the folder in which it is, where that is not its first one."""
    try:
        folder, *_ = datasets.find(dataset.key, root)
    except (FileNotFoundError, ValueError):
        return [*dataset.files]
    first, now = f"{dataset.folders[0]}/", f"{folder.relative_to(root)}/".removeprefix("./")

    def moved(path: str) -> str:
        return now + path.removeprefix(first) if path.startswith(first) else path

    return [replace(f, path=moved(f.path), gives=moved(f.gives)) for f in dataset.files]


def fetch(name: str, root: Path) -> list[str]:
    """Download, verify and unpack a data set, archives that were brought by hand among it.

    A call goes on where a killed one stopped, and gets again what is gone or has another size.
    Archives are kept and may be deleted once unpacked. Returns what is still to be brought, as
    `by_hand` does. Raises ValueError for a wrong size or checksum, a damaged or unsafe archive and
    a file that its source no longer has, and OSError for a source that does not answer.
    """
    dataset = datasets.get(name)
    with file_lock(root / f".{name}.lock"):
        for file in dataset.files:
            path = root / file.path
            if is_unpacked(path):
                continue
            if file.url:
                download(file, path)
            if path.name.endswith(ARCHIVES) and path.is_file():
                top = dataset.folders[0] if path.parent == root else ""
                sizes = extract(path, path.parent, top, file.only)
                os.sync()
                with atomic_write(mark_of(path)) as temporary:
                    temporary.write_text(json.dumps(sizes))
    return by_hand(name, root)


def mark_of(path: Path) -> Path:
    """Name the file that says what came out of an archive."""
    return path.with_name(f".{path.name}.unpacked")


def is_unpacked(path: Path) -> bool:
    """Whether all that came out of an archive is there with its size.

    An archive among it may be gone if it was unpacked itself.
    """
    try:
        sizes = json.loads(mark_of(path).read_text())
        return all(is_there(path.parent / name, size) for name, size in sizes.items())
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def is_there(path: Path, size: int) -> bool:
    """Whether there is a file of this size, or what was in it."""
    return path.is_file() and path.stat().st_size == size or is_unpacked(path)


def download(file: File, path: Path) -> None:
    """Download a file by way of `path`.part, with which a later call goes on.

    What is at `path` already is verified and not touched.
    """
    if path.exists():
        if wrong := mismatch(file, path):
            raise ValueError(f"{path} {wrong}: delete it and fetch again")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    most = size_of(part)
    failures = 0
    end = time.monotonic() + TOTAL
    while failures < TRIES and time.monotonic() < end:
        try:
            attempt(file, part, end)
            break
        except (OSError, http.client.HTTPException) as e:
            reason = str(e) or type(e).__name__
            if isinstance(e, Unfit):
                part.unlink(missing_ok=True)
        failures = 0 if size_of(part) >= most + PROGRESS else failures + 1
        most = max(most, size_of(part))
        time.sleep(PAUSE)
    else:
        raise OSError(f"{file.url}: {reason}; fetch again to go on, or put the file at {path}")
    wrong = mismatch(file, part)
    version_file(part).unlink(missing_ok=True)
    if wrong:
        part.unlink()
        raise ValueError(
            f"{file.url} {wrong}: it is removed; fetch again, or put the right file at {path}"
        )
    os.replace(part, path)


def attempt(file: File, part: Path, end: float) -> None:
    """Ask once for what `part` still lacks, and give up a server that keeps us waiting.

    Raises OSError if less comes or too slowly, and ValueError for what cannot be the file.
    """
    request = Request(file, part)
    request.start()
    before = 0
    try:
        while request.is_alive():
            request.join(min(WINDOW, max(0, end - time.monotonic())))
            waiting = request.received < before + LEAST or time.monotonic() > end
            if request.is_alive() and waiting:
                raise OSError(f"the server sends less than {LEAST} bytes in {WINDOW:g} seconds")
            before = request.received
    finally:
        request.give_up()
    if request.error:
        raise request.error


class Unfit(OSError):
    """The part is of another file."""


class Request(threading.Thread):
    """A request in a thread, which can be left behind wherever it waits.

    It then touches no file any more: a later request may be at work on the same ones.

    received: bytes
    error: what it ended with
    """

    def __init__(self, file: File, part: Path):
        super().__init__(daemon=True)
        self.file = file
        self.part = part
        self.received = 0
        self.given_up = False
        self.touching = threading.Lock()
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self.receive()
        except Exception as e:  # for the other thread to raise
            self.error = e

    def give_up(self) -> None:
        """Leave it behind."""
        with self.touching:
            self.given_up = True

    @contextmanager
    def wanted(self) -> Iterator[None]:
        """Touch files in the block. Raises OSError where the request is left behind."""
        with self.touching:
            if self.given_up:
                raise OSError("nobody waits for this any more")
            yield

    def receive(self) -> None:
        """Add what comes to the part, or replace it where the server sends all of it again."""
        version = version_file(self.part)
        known = version.read_text("latin-1").strip() if version.exists() else ""
        # without either, two files could become one
        have = size_of(self.part) if known or self.file.md5 else 0
        reply = ask(self.file.url, have, known)
        if reply is None:
            return
        with reply:
            stated = version_of(reply)
            if reply.status != 206:
                have = 0  # the server knows no ranges or has another file, and sends all of it
            elif not continues(reply, have) or (known and stated and stated != known):
                raise Unfit("the server sent another part than was asked for")
            total = check(reply, self.file, self.part, have)
            if not have:
                with self.wanted():
                    self.part.unlink(missing_ok=True)  # first, for a kill between the two
                    version.write_text(stated, "latin-1")
            self.store(reply, have, total)

    def store(self, reply: http.client.HTTPResponse, have: int, total: int) -> None:
        """Write what comes behind the first `have` of `total` bytes, 0 if that is unknown."""
        most = total or limit_of(self.file)
        bar = tqdm(
            total=total or None, initial=have, desc=self.part.stem, unit="B", unit_scale=True
        )
        with self.wanted():
            # unbuffered, or closing it could write, too
            out = self.part.open("ab", buffering=0)
        with out, bar:
            while piece := reply.read1(PIECE):
                have += len(piece)
                self.received += len(piece)
                if have > most:
                    raise ValueError(
                        f"{self.file.url} sends more than {most} bytes: it is not the file we know"
                    )
                with self.wanted():
                    whole = out.write(piece) == len(piece)
                if not whole:
                    raise OSError(f"there is no room for more of {self.part}")
                bar.update(len(piece))
        if have < total:
            raise OSError(f"the connection ended after {have} of {total} bytes")


def version_file(part: Path) -> Path:
    """Name the file that says of which version of a file the first bytes are."""
    return part.with_name(f"{part.name}.version")


def version_of(reply: http.client.HTTPResponse) -> str:
    """What a server calls this version of a file, "" if it does not say."""
    tag = reply.headers.get("ETag", "W/")
    if tag.startswith("W/"):  # weak: the same in content, not byte by byte
        return reply.headers.get("Last-Modified", "")
    return tag


def continues(reply: http.client.HTTPResponse, have: int) -> bool:
    """Whether a part begins behind the first `have` bytes."""
    return reply.headers.get("Content-Range", "").startswith(f"bytes {have}-")


def limit_of(file: File) -> int:
    """The bytes that a file may have whose size is not published."""
    return LIMIT if file.path.endswith(ARCHIVES) else LISTS


def check(reply: http.client.HTTPResponse, file: File, part: Path, have: int) -> int:
    """Raise ValueError for a reply that cannot bring the file; return its size, 0 if unknown."""
    total = file.size if reply.length is None else have + reply.length
    packed = reply.headers.get("Content-Encoding", "identity") != "identity"
    if packed or reply.headers.get_content_type() == "text/html":
        raise ValueError(f"{file.url} gives a web page or packed file instead: {ELSEWHERE}")
    if not (total or reply.chunked or file.md5):
        raise ValueError(f"{file.url} does not say how long the file is: {ELSEWHERE}")
    if file.size and total != file.size:
        raise ValueError(
            f"{file.url} has {total} bytes where {file.size} were published: "
            "it is not the file we know"
        )
    if not file.size and total > limit_of(file):
        raise ValueError(f"{file.url} has {total} bytes, more than {limit_of(file)}: {ELSEWHERE}")
    if total - have > shutil.disk_usage(part.parent).free:
        raise ValueError(
            f"{file.url} needs {total - have} bytes more than {part.parent} has free: "
            "use another folder"
        )
    return total


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows servers to other servers of the web only."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if urllib.parse.urlsplit(newurl).scheme not in ("http", "https"):
            raise ValueError(f"{req.full_url} sends on to {newurl}: {ELSEWHERE}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def ask(url: str, have: int, version: str = "") -> http.client.HTTPResponse | None:
    """Ask a server for all but the first `have` bytes of a version; None if there are no more.

    Raises ValueError for a file that it does not give away, and OSError for what may pass; that is
    Unfit where there are fewer bytes.
    """
    headers = {"User-Agent": "fpl"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if version:  # of another one it sends all
            headers["If-Range"] = version
    opener = urllib.request.build_opener(Redirects)
    try:
        return opener.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as e:
        if e.code == 416 and e.headers.get("Content-Range") == f"bytes */{have}":
            return None
        if e.code == 416:
            raise Unfit(f"{url} has fewer than {have} bytes") from e
        if e.code < 500 and e.code not in BUSY:
            raise ValueError(f"{url} answers {e.code} {e.reason}: {ELSEWHERE}") from e
        raise


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def mismatch(file: File, path: Path) -> str:
    """How the file differs from what was published, empty if it does not."""
    if not path.is_file():
        return "is no file"
    if file.size and size_of(path) != file.size:
        return f"has {size_of(path)} bytes where {file.size} were published"
    if not file.md5:
        return ""
    with path.open("rb") as f:
        found = hashlib.file_digest(f, partial(hashlib.md5, usedforsecurity=False)).hexdigest()
    return f"has the MD5 {found} where {file.md5} was published" if found != file.md5 else ""
