"""Archives are unpacked into one folder only, in bounded time and memory."""

from __future__ import annotations

import errno
import gzip
import io
import lzma
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from fpl.data.files import atomic_write

ARCHIVES = (".zip", ".tgz", ".tar.gz")
LIMIT = 20 * 2**30  # bytes an archive may unpack to; DomainNet's photographs have 6 GB
MEMBERS = 10**6  # in an archive; DomainNet's largest has 175,000
DIRECTORY = 2**25  # bytes of a zip's list of members; DomainNet's largest has some 20 MB
HEADER = 2**20  # bytes of all headers of a tar's member, and of the zeros at its end
PIECE = 2**20  # bytes that are copied at once
BLOCK = 4096  # bytes that an empty file takes on disk
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # others can ask for gigabytes of memory
DAMAGE = (
    *(zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, lzma.LZMAError),
    *(struct.error, OverflowError, EOFError, IndexError),
    ValueError,  # no text, or no number in a header
    RuntimeError,  # encrypted, or headers within headers
)
NO_PLACE = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)


class Refused(ValueError):
    """Why a member is not unpacked."""


class Member(NamedTuple):
    """A member of an archive; what is neither file nor folder is a link or a device.

    open: gives the content of a file
    """

    name: str
    size: int
    file: bool
    folder: bool
    open: Callable[[], Any]


class Zipped(io.BufferedReader):
    """A zip file that refuses to read a list of members of any size that it states."""

    def read(self, size: int | None = -1) -> bytes:
        most = DIRECTORY + 1
        found = super().read(most if size is None or size < 0 else min(size, most))
        if len(found) == most:
            raise zipfile.BadZipFile(f"its list of members has more than {DIRECTORY} bytes")
        return found


def members_of_zip(archive: Path) -> Iterator[Member]:
    """The members of a zip file in its order."""
    with Zipped(io.FileIO(archive)) as f, zipfile.ZipFile(f) as z:
        for info in z.infolist():
            if info.compress_type not in METHODS:
                raise zipfile.BadZipFile(f"{info.filename!r} is not packed in the usual way")
            plain = stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG)
            folder = info.is_dir()
            content = partial(z.open, info)
            yield Member(info.filename, info.file_size, plain and not folder, folder, content)


class Unzipped(gzip.GzipFile):
    """A gzip file that refuses to read beyond a place: a forged header may ask for gigabytes."""

    stop = HEADER

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0 or self.tell() + size > self.stop:
            raise tarfile.ReadError(f"a header asks for {size} bytes")
        return super().read(size)


def members_of_tar(archive: Path) -> Iterator[Member]:
    """The members of a tar.gz or tgz file in its order; headers count as a part of their size."""
    with (
        Unzipped(archive) as unzipped,
        tarfile.open(fileobj=unzipped, mode="r:") as t,  # type: ignore[arg-type]
    ):
        begin = 0
        while info := t.next():
            t.members = []  # type: ignore[attr-defined]  # it would grow with every member
            t.pax_headers = {}
            if t.offset <= begin:
                raise tarfile.ReadError("a header has a negative size")
            size = max(info.size, t.offset - begin)
            unzipped.stop = begin = t.offset
            content = partial(t.extractfile, info)
            yield Member(info.name, size, info.isreg(), info.isdir(), content)
            unzipped.stop = begin + HEADER
        unzipped.stop = unzipped.tell() + HEADER
        rest = unzipped.read(HEADER)
        if rest.strip(b"\0"):  # tarfile takes a header that it cannot read for the end
            raise tarfile.ReadError("a header cannot be read")
        if len(rest) == HEADER:
            raise tarfile.ReadError(f"it ends in more than {HEADER} zeros")


def extract(
    archive: Path, target: Path, top: str = "", only: tuple[str, ...] = (), limit: int = LIMIT
) -> dict[str, int]:
    """Unpack the plain files of an archive under `target`; they are whole or not there.

    Returns the size of each, by its place.

    top: unpack only what is in this folder of the archive
    only: unpack only what is in folders of these names
    limit: bytes that all members may have

    Raises ValueError naming the member for one that would leave `target`, for a link or a device,
    and beyond the limit; also for a damaged archive and for nothing to unpack. What was unpacked
    before stays.
    """
    members = members_of_zip if archive.suffix == ".zip" else members_of_tar
    total = 0
    unpacked = {}
    try:
        bar = tqdm(members(archive), desc=f"unpacking {archive.name}", unit="file")
        for number, member in enumerate(bar):
            bad = f"{archive} is not unpacked further: its member {member.name!r}"
            path = PurePosixPath(member.name)
            if "\\" in member.name:
                raise Refused(f"{bad} has a backslash in its name: pack it again with / instead")
            nameless = member.file and not path.parts or "\0" in member.name
            if path.is_absolute() or ".." in path.parts or nameless:
                raise Refused(f"{bad} leads out of {target}")
            if not member.file and not member.folder:
                raise Refused(f"{bad} is a link or a device, which a data set does not need")
            total += max(member.size, BLOCK)
            if total > limit:
                raise Refused(f"{bad} is beyond the limit of {limit} bytes for all")
            if number == MEMBERS:
                raise Refused(f"{bad} is beyond the limit of {MEMBERS} members")
            outside = top and path.parts[:1] != (top,)
            unasked = only and not set(only) & set(path.parts)
            if member.folder or outside or unasked:
                continue
            unpacked[str(path)] = write(member, target / path, bad)
    except Refused:
        raise
    except DAMAGE as e:
        raise ValueError(f"{archive} is damaged ({e}): delete it and fetch again") from e
    if not unpacked:
        place = f" in a folder {top}" if top else ""
        raise ValueError(f"{archive} holds no files{place} to unpack: is it the right one?")
    return unpacked


def write(member: Member, path: Path, bad: str) -> int:
    """Write the content of a member, and return its size. Raises Refused where it has no place."""
    try:
        with (
            atomic_write(path, one_of_many=True) as temporary,
            member.open() as source,
            temporary.open("wb") as out,
        ):
            shutil.copyfileobj(source, out, PIECE)
            return out.tell()
    except OSError as e:
        if e.errno in NO_PLACE:
            raise Refused(f"{bad} has no place at {path} ({e.strerror})") from e
        raise
