"""Getting the data sets: downloads that go on after a break, verified, and unpacked so that nothing leaves the set's folder.

Addresses and MD5 sums are those of torchvision 0.29 and of the authors' pages, sizes those that their servers state. What has no
stable source is brought by hand: `by_hand` says which file, from where, to which place.
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
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

from tqdm.auto import tqdm

from fpl.data.datasets import DOMAINNET, SIX, known
from fpl.data.files import atomic_write, file_lock

LIMIT = 20 * 2**30  # bytes that an archive may unpack to; the largest, DomainNet's photographs, has 6 GB
PIECE = 2**20
HEADER = 2**24  # bytes of an archive read in one go: a forged header may ask for gigabytes
BLOCK = 4096  # an empty file takes a block too
TIMEOUT = 60.0  # seconds without an answer
PAUSE = 2.0  # seconds before the next try
TRIES = 5  # in a row that brought nothing
DAMAGE = (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, RuntimeError)  # the last: encrypted zip


@dataclass(frozen=True)
class File:
    """`path` under the data root and the address it comes from, less its name; bytes and MD5 where they are published.

    An archive is unpacked beside itself, of it only the folders `only`, where given. Without an address `hint` says where a
    person finds the file; it is not asked for where `gives` is there.
    """

    path: str
    base: str = ""
    size: int = 0
    md5: str = ""
    hint: str = ""
    gives: str = ""
    only: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        return self.base + PurePosixPath(self.path).name


@dataclass(frozen=True)
class Source:
    """Where a data set comes from, and its terms of use in our words."""

    page: str
    terms: str
    files: tuple[File, ...]


def split_of_coop(path: str) -> File:
    return File(path, hint="the split of CoOp, see https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md", gives=path)


VGG = "https://www.robots.ox.ac.uk/~vgg/data/"
CALTECH = "https://data.caltech.edu/records/mzrjq-6wc02"
TORONTO = "https://www.cs.toronto.edu/~kriz/"
BOSTON = "https://csr.bu.edu/ftp/visda/2019/multi-source/"
CLEANED = {"clipart": "groundtruth/", "painting": "groundtruth/"}  # without double images; the copies that FedBN uses
FEDBN = "linked in the README of https://github.com/med-air/FedBN"
CITE = "No licence is stated; the authors ask for a citation of their report."
FLOWERS = (
    File("oxford_flowers/102flowers.tgz", VGG + "flowers/102/", 344862509, "52808999861908f626f3c1f4e79d11fa"),
    File("oxford_flowers/imagelabels.mat", VGG + "flowers/102/", md5="e0620be6f572b9609742df49c70aed4d"),
    File("oxford_flowers/setid.mat", VGG + "flowers/102/", md5="a5357ecc9cb78c4bef273ce3793fc85c"),
    split_of_coop("oxford_flowers/split_zhou_OxfordFlowers.json"),
)
PETS = (
    File("oxford_pets/images.tar.gz", VGG + "pets/data/", 791918971, "5c4f3ee8e5d25df40f4fd59a7f44e54c"),
    File("oxford_pets/annotations.tar.gz", VGG + "pets/data/", 19173078, "95a8c909bbe2e81eed6a22bccdf3f68f"),
    split_of_coop("oxford_pets/split_zhou_OxfordPets.json"),
)
FOOD = (
    File("food-101.tar.gz", "http://data.vision.ee.ethz.ch/cvl/", 4996278331, "85eeb15f3717b99a5da872d97d918f87"),
    split_of_coop("food-101/split_zhou_Food101.json"),
)
CATEGORIES = (
    File("caltech-101.zip", CALTECH + "/files/", 137414764, "3138e1922a9193bfa496528edbbc45d0"),
    File("caltech-101/101_ObjectCategories.tar.gz"),  # comes in the one above
    split_of_coop("caltech-101/split_zhou_Caltech101.json"),
)
TEXTURES = (
    File("dtd-r1.0.1.tar.gz", VGG + "dtd/download/", 625239812, "fff73e5086ae6bdbea199a49dfb8a4c1"),
    split_of_coop("dtd/split_zhou_DescribableTextures.json"),
)
CIFAR10 = (File("cifar10/cifar-10-python.tar.gz", TORONTO, 170498071, "c58f30108f718f92721af3b95e74349a"),)
CIFAR100 = (File("cifar100/cifar-100-python.tar.gz", TORONTO, 169001437, "eb9058c3a382ffc7106e4002c42a8d85"),)
TEN_OF_DOMAINNET = (
    *(File(f"DomainNet/{domain}.zip", BOSTON + CLEANED.get(domain, ""), only=tuple(DOMAINNET)) for domain in SIX),
    *(File(f"DomainNet/{domain}_{split}.txt", BOSTON + "domainnet/txt/") for domain in SIX for split in ("train", "test")),
    File("domainnet_dataset.zip", hint=f"the split of FedBN, {FEDBN}", gives="DomainNet/clipart_train.pkl"),
)
TEN_OF_OFFICE = (File("office_caltech_10_dataset.zip", hint=f"images and split, {FEDBN}", gives="office_caltech_10/amazon"),)
SOURCES = {
    "flowers102": Source(
        VGG + "flowers/102/", "No licence is stated; the photographs come from the web and belong to their authors.", FLOWERS
    ),
    "oxfordpets": Source(
        VGG + "pets/", "CC BY-SA 4.0 for the data set; the photographs stay the property of their owners.", PETS
    ),
    "food101": Source(
        "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
        "Photographs of Foodspotting's users, not of the authors; beyond scientific fair use, ask their owners.",
        FOOD,
    ),
    "caltech101": Source(CALTECH, "The licence stands on the page of the record; the pictures come from the web.", CATEGORIES),
    "dtd": Source(VGG + "dtd/", "Given to the research community, for research; the pictures come from the web.", TEXTURES),
    "cifar10": Source(TORONTO + "cifar.html", CITE, CIFAR10),
    "cifar100": Source(TORONTO + "cifar.html", CITE, CIFAR100),
    "domainnet10": Source(
        "https://ai.bu.edu/M3SDA/",
        "For academic research; parts are under copyright and used without their owners' word. 17 GB, ten classes are unpacked.",
        TEN_OF_DOMAINNET,
    ),
    "office_caltech10": Source(
        "https://github.com/med-air/FedBN",
        "No licence is stated; pictures of a shop's goods, of two offices, and by way of Caltech-256 from the web.",
        TEN_OF_OFFICE,
    ),
}


def terms(name: str) -> str:
    known(name)
    return f"{SOURCES[name].terms} See {SOURCES[name].page}"


def by_hand(name: str, root: Path) -> list[str]:
    """What has no stable source and is not there yet, a sentence for each file."""
    known(name)
    asked = [file for file in SOURCES[name].files if file.hint and not (root / file.gives).exists()]
    return [f"bring {Path(file.path).name} ({file.hint}) and put it at {root / file.path}" for file in asked]


def fetch(name: str, root: Path, progress: bool = True) -> list[str]:
    """Download, verify and unpack what a data set's sources offer, and archives brought by hand; returns what `by_hand` does.

    Goes on where a killed call stopped. Archives are kept and may be deleted once unpacked. ValueError for a wrong size or
    checksum, a damaged or unsafe archive, a file that its source no longer has; OSError for a source that does not answer.
    """
    folder = known(name).folders[0]
    with file_lock(root / f".{name}.lock"):
        for file in SOURCES[name].files:
            path = root / file.path
            unpacked = path.with_name(f".{path.name}.unpacked")
            if unpacked.exists():
                continue
            if file.base:
                download(file, path, progress)
            if path.name.endswith((".zip", ".tgz", ".tar.gz")) and path.exists():
                extract(path, path.parent, "" if path.parent != root else folder, file.only, progress=progress)
                unpacked.touch()
    return by_hand(name, root)


def download(file: File, path: Path, progress: bool = True) -> None:
    """`file.url` to `path` by way of `path`.part, with which a later call goes on. What is at `path` already is only verified."""
    if path.exists():
        if wrong := mismatch(file, path):
            raise ValueError(f"{path} {wrong}: delete it and fetch again")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    most, failures = size_of(part), 0
    while True:
        try:
            total = receive(file, part, progress)
            if size_of(part) == total:
                break
            reason = f"the connection ended after {size_of(part)} of {total} bytes"
        except (OSError, http.client.HTTPException) as e:
            reason = str(e) or type(e).__name__
        most, failures = (size_of(part), 0) if size_of(part) > most else (most, failures + 1)
        if failures == TRIES:
            raise OSError(f"{file.url}: {reason}; fetch again to go on, or put the file at {path}")
        time.sleep(PAUSE)
    if wrong := mismatch(file, part):
        part.unlink()
        raise ValueError(f"{file.url} {wrong}: it is removed; fetch again, or put the right file at {path}")
    os.replace(part, path)


def receive(file: File, part: Path, progress: bool) -> int:
    """One request for what `part` still lacks; returns the size of the whole file."""
    have = size_of(part)
    request = urllib.request.Request(file.url, headers={"User-Agent": "fpl"} | ({"Range": f"bytes={have}-"} if have else {}))
    try:
        reply = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as e:
        if e.code == 416 and e.headers.get("Content-Range") == f"bytes */{have}":
            return have
        if e.code == 416:
            part.unlink()  # of another file
        elif e.code < 500 and e.code not in (408, 429):
            raise ValueError(f"{file.url} answers {e.code} {e.reason}: find the file elsewhere and put it in its place") from e
        raise
    with reply:
        if reply.status == 206 and not reply.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            part.unlink()
            raise OSError("the server sent another part than was asked for")
        have = have if reply.status == 206 else 0  # a server that knows no ranges sends all of it again
        stated = reply.headers.get("Content-Length")
        total = have + int(stated) if stated else file.size
        if file.size and total != file.size:
            raise ValueError(f"{file.url} has {total} bytes where {file.size} were published: it is not the file we know")
        if total - have > shutil.disk_usage(part.parent).free:
            raise ValueError(f"{file.url} needs {total - have} bytes more than {part.parent} has free: use another folder")
        with (
            part.open("ab" if have else "wb") as out,
            tqdm(total=total or None, initial=have, desc=part.stem, unit="B", unit_scale=True, disable=not progress) as bar,
        ):
            while piece := reply.read(PIECE):
                have += len(piece)
                if have > (total or LIMIT):
                    raise ValueError(f"{file.url} sends more than {total or LIMIT} bytes: it is not the file we know")
                out.write(piece)
                bar.update(len(piece))
    return total or have


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def mismatch(file: File, path: Path) -> str:
    """How the file differs from what was published, empty if it does not."""
    if file.size and size_of(path) != file.size:
        return f"has {size_of(path)} bytes where {file.size} were published"
    with path.open("rb") as f:
        found = hashlib.file_digest(f, partial(hashlib.md5, usedforsecurity=False)).hexdigest() if file.md5 else ""
    return f"has the MD5 {found} where {file.md5} was published" if found != file.md5 else ""


class Bounded(gzip.GzipFile):
    """Refuses to read a piece of any size that a header states."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= HEADER:
            raise tarfile.ReadError(f"a header asks for {size} bytes")
        return super().read(size)


def members(archive: Path) -> Iterator[tuple[str, int, str, Callable[[], IO[bytes] | None]]]:
    """Name, size, kind (file, folder, link or device) and opener of each member of a zip, tar.gz or tgz file, in its order."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as z:
            for info in z.infolist():
                mode = stat.S_IFMT(info.external_attr >> 16)
                plain = "file" if mode in (0, stat.S_IFREG) else "link" if mode == stat.S_IFLNK else "device"
                yield info.filename, info.file_size, "folder" if info.is_dir() else plain, partial(z.open, info)
        return
    with Bounded(archive) as unzipped, tarfile.open(fileobj=unzipped, mode="r:") as t:  # type: ignore[arg-type]
        for member in t:
            plain = "file" if member.isreg() else "link" if member.issym() or member.islnk() else "device"
            yield member.name, member.size, "folder" if member.isdir() else plain, partial(t.extractfile, member)
        while piece := unzipped.read(PIECE):  # tarfile takes a header that it cannot read for the end
            if piece.strip(b"\0"):
                raise tarfile.ReadError("a header cannot be read")


def extract(
    archive: Path, target: Path, top: str = "", only: tuple[str, ...] = (), limit: int = LIMIT, progress: bool = True
) -> None:
    """The plain files of an archive under `target`; of them those in the folder `top` and below one of `only`, where given.

    ValueError that names the member for one that would leave `target`, for a link or a device, and where all have more than
    `limit` bytes; also for a damaged archive and for nothing to unpack. Files are whole or not there; those unpacked before stay.
    """
    total, unpacked, bad = 0, 0, f"{archive} is not unpacked further"
    try:
        for name, size, kind, opened in tqdm(
            members(archive), desc=f"unpacking {archive.name}", unit="file", disable=not progress
        ):
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or "\\" in name or (kind == "file" and not path.parts):
                raise ValueError(f"{bad}: its member {name!r} leads out of {target}")
            if kind not in ("file", "folder"):
                raise ValueError(f"{bad}: its member {name!r} is a {kind}, which a data set does not need")
            total += max(size, BLOCK)
            if total > limit:
                raise ValueError(f"{bad}: with its member {name!r} it has more than {limit} bytes")
            if kind == "file" and top in ("", path.parts[0]) and (not only or set(only) & set(path.parts)):
                unpacked += 1
                with atomic_write(target / path) as temporary, opened() as source, temporary.open("wb") as out:  # type: ignore[union-attr]
                    shutil.copyfileobj(source, out, PIECE)
    except DAMAGE as e:
        raise ValueError(f"{archive} is damaged ({e}): delete it and fetch again") from e
    if not unpacked:
        raise ValueError(f"{archive} holds no files{f' in a folder {top}' * bool(top)} to unpack: is it the right one?")
