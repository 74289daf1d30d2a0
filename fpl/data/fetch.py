"""Getting data sets: files are downloaded, verified, and unpacked into the data set's folder only.

A download goes on after a break. What to get stands in the description of each data set: addresses
and MD5 sums are those of torchvision 0.29 and of the authors' pages, sizes those that their servers
state. What has no stable source is brought by hand: `by_hand` says which file, from where, to which
place.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import os
import shutil
import stat
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from fpl.data import datasets
from fpl.data.datasets.layouts import File
from fpl.data.files import atomic_write, file_lock

ARCHIVES = (".zip", ".tgz", ".tar.gz")
LIMIT = (
    20 * 2**30
)  # bytes that an archive may unpack to; the largest, DomainNet's photographs, has 6 GB
PIECE = 2**20  # bytes that are read at once
HEADER = 2**24  # bytes of an archive read in one go: a forged header may ask for gigabytes
BLOCK = 4096  # bytes that an empty file takes on disk
TIMEOUT = 60.0  # seconds without an answer
PAUSE = 2.0  # seconds before the next try
TRIES = 5  # in a row that brought nothing
BUSY = (408, 429)  # answers below 500 after which it helps to ask again
DAMAGE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    gzip.BadGzipFile,
    zlib.error,
    EOFError,
    RuntimeError,
)  # the last: encrypted


def terms(name: str) -> str:
    """The terms of use of a data set and where they stand."""
    dataset = datasets.get(name)
    return f"{dataset.terms} See {dataset.page}"


def by_hand(name: str, root: Path) -> list[str]:
    """What has no stable source and is not there yet, a sentence for each file."""
    files = [file for file in datasets.get(name).files if file.hint]
    asked = [file for file in files if not (root / (file.gives or file.path)).exists()]
    return [
        f"bring {Path(file.path).name} ({file.hint}) and put it at {root / file.path}"
        for file in asked
    ]


def fetch(name: str, root: Path) -> list[str]:
    """Download, verify and unpack a data set, archives that were brought by hand among it.

    A call goes on where a killed one stopped. Archives are kept and may be deleted once unpacked.
    Returns what is still to be brought, as `by_hand` does. Raises ValueError for a wrong size or
    checksum, a damaged or unsafe archive and a file that its source no longer has, and OSError for
    a source that does not answer.
    """
    dataset = datasets.get(name)
    with file_lock(root / f".{name}.lock"):
        for file in dataset.files:
            path = root / file.path
            unpacked = path.with_name(f".{path.name}.unpacked")
            if unpacked.exists():
                continue
            if file.url:
                download(file, path)
            if path.name.endswith(ARCHIVES) and path.exists():
                top = dataset.folders[0] if path.parent == root else ""
                extract(path, path.parent, top, file.only)
                unpacked.touch()
    return by_hand(name, root)


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
    while failures < TRIES:
        try:
            receive(file, part)
            break
        except (OSError, http.client.HTTPException) as e:
            reason = str(e) or type(e).__name__
        failures = 0 if size_of(part) > most else failures + 1
        most = max(most, size_of(part))
        time.sleep(PAUSE)
    else:
        raise OSError(f"{file.url}: {reason}; fetch again to go on, or put the file at {path}")
    if wrong := mismatch(file, part):
        part.unlink()
        raise ValueError(
            f"{file.url} {wrong}: it is removed; fetch again, or put the right file at {path}"
        )
    os.replace(part, path)


def receive(file: File, part: Path) -> None:
    """Ask once for what `part` still lacks.

    Raises OSError if less comes, and ValueError for what cannot be the file.
    """
    have = size_of(part)
    reply = ask(file.url, part, have)
    if reply is None:
        return
    with reply:
        if reply.status != 206:
            have = 0  # the server knows no ranges and sends all of it again
        elif not reply.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            part.unlink()
            raise OSError("the server sent another part than was asked for")
        stated = reply.headers.get("Content-Length")
        total = have + int(stated) if stated else file.size
        if file.size and total != file.size:
            raise ValueError(
                f"{file.url} has {total} bytes where {file.size} were published: "
                "it is not the file we know"
            )
        if total - have > shutil.disk_usage(part.parent).free:
            raise ValueError(
                f"{file.url} needs {total - have} bytes more than {part.parent} has free: "
                "use another folder"
            )
        bar = tqdm(total=total or None, initial=have, desc=part.stem, unit="B", unit_scale=True)
        with part.open("ab" if have else "wb") as out, bar:
            while piece := reply.read(PIECE):
                have += len(piece)
                if have > (total or LIMIT):
                    raise ValueError(
                        f"{file.url} sends more than {total or LIMIT} bytes: "
                        "it is not the file we know"
                    )
                out.write(piece)
                bar.update(len(piece))
    if have < total:
        raise OSError(f"the connection ended after {have} of {total} bytes")


def ask(url: str, part: Path, have: int) -> http.client.HTTPResponse | None:
    """Ask a server for all but the first `have` bytes; None if there are no more.

    Raises ValueError for a file that it does not give away, and OSError for what may pass.
    """
    headers = {"User-Agent": "fpl"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as e:
        if e.code == 416 and e.headers.get("Content-Range") == f"bytes */{have}":
            return None
        if e.code == 416:
            part.unlink()  # it is of another file
        elif e.code < 500 and e.code not in BUSY:
            raise ValueError(
                f"{url} answers {e.code} {e.reason}: "
                "find the file elsewhere and put it in its place"
            ) from e
        raise


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def mismatch(file: File, path: Path) -> str:
    """How the file differs from what was published, empty if it does not."""
    if file.size and size_of(path) != file.size:
        return f"has {size_of(path)} bytes where {file.size} were published"
    if not file.md5:
        return ""
    with path.open("rb") as f:
        found = hashlib.file_digest(f, partial(hashlib.md5, usedforsecurity=False)).hexdigest()
    return f"has the MD5 {found} where {file.md5} was published" if found != file.md5 else ""


class Member(NamedTuple):
    """A member of an archive; what is neither file nor folder is a link or a device.

    open: gives the content of a file
    """

    name: str
    size: int
    file: bool
    folder: bool
    open: Callable[[], Any]


def members_of_zip(archive: Path) -> Iterator[Member]:
    """The members of a zip file in its order."""
    with zipfile.ZipFile(archive) as z:
        for info in z.infolist():
            plain = stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG)
            folder = info.is_dir()
            content = partial(z.open, info)
            yield Member(info.filename, info.file_size, plain and not folder, folder, content)


class Bounded(gzip.GzipFile):
    """A gzip file that refuses to read a piece of any size that a header states."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= HEADER:
            raise tarfile.ReadError(f"a header asks for {size} bytes")
        return super().read(size)


def members_of_tar(archive: Path) -> Iterator[Member]:
    """The members of a tar.gz or tgz file in its order."""
    with (
        Bounded(archive) as unzipped,
        tarfile.open(fileobj=unzipped, mode="r:") as t,  # type: ignore[arg-type]
    ):
        for info in t:
            content = partial(t.extractfile, info)
            yield Member(info.name, info.size, info.isreg(), info.isdir(), content)
        while piece := unzipped.read(
            PIECE
        ):  # tarfile takes a header that it cannot read for the end
            if piece.strip(b"\0"):
                raise tarfile.ReadError("a header cannot be read")


def extract(
    archive: Path, target: Path, top: str = "", only: tuple[str, ...] = (), limit: int = LIMIT
) -> None:
    """Unpack the plain files of an archive under `target`; they are whole or not there.

    top: unpack only what is in this folder of the archive
    only: unpack only what is in folders of these names
    limit: bytes that all members may have

    Raises ValueError naming the member for one that would leave `target`, for a link or a device,
    and beyond the limit; also for a damaged archive and for nothing to unpack. What was unpacked
    before stays.
    """
    members = members_of_zip if archive.suffix == ".zip" else members_of_tar
    total = unpacked = 0
    try:
        for member in tqdm(members(archive), desc=f"unpacking {archive.name}", unit="file"):
            bad = f"{archive} is not unpacked further: its member {member.name!r}"
            path = PurePosixPath(member.name)
            nameless = member.file and not path.parts
            if path.is_absolute() or ".." in path.parts or "\\" in member.name or nameless:
                raise ValueError(f"{bad} leads out of {target}")
            if not member.file and not member.folder:
                raise ValueError(f"{bad} is a link or a device, which a data set does not need")
            total += max(member.size, BLOCK)
            if total > limit:
                raise ValueError(f"{bad} is beyond the limit of {limit} bytes for all")
            outside = top and path.parts[:1] != (top,) or only and not set(only) & set(path.parts)
            if member.folder or outside:
                continue
            unpacked += 1
            with (
                atomic_write(target / path) as temporary,
                member.open() as source,
                temporary.open("wb") as out,
            ):
                shutil.copyfileobj(source, out, PIECE)
    except DAMAGE as e:
        raise ValueError(f"{archive} is damaged ({e}): delete it and fetch again") from e
    if not unpacked:
        place = f" in a folder {top}" if top else ""
        raise ValueError(f"{archive} holds no files{place} to unpack: is it the right one?")
