"""What a data set is described with: Dataset, File, Layout, and readers that several of them share.

A reader takes the folder of the data set and the name of a domain, and yields rows. It need not
name the domain in them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from fpl.data import pickled
from fpl.data.files import atomic_write, sha256
from fpl.data.manifest import SPLITS, Row, text_of
from fpl.data.pictures import is_picture

Rows = Iterable[Row]
JSON = 2**25  # bytes of a JSON file, which takes twenty times the memory; CoOp's have up to 2**23


@dataclass(frozen=True)
class Layout:
    """One way in which the files of a data set lie in its folder.

    needs: what must be there; "{domain}" stands for each domain, "|" parts alternatives
    train, test: how many images the whole data set has
    count: counts both in a folder, for a reader that would write files
    """

    needs: tuple[str, ...]
    read: Callable[[Path, str], Rows]
    train: int | None = None
    test: int | None = None
    count: Callable[[Path], tuple[int, int]] | None = None


@dataclass(frozen=True)
class File:
    """A file to download, or without `url` to bring by hand; an archive is unpacked beside itself.

    path: where it goes under the data root
    size, md5: what it must have, in bytes and in hexadecimal digits, where that is published
    hint: for whoever has to bring it, where it is found
    gives: it need not be brought where this path is there, by default its own
    only: the names of folders to unpack, all where none is given
    """

    path: str
    url: str = ""
    size: int = 0
    md5: str = ""
    hint: str = ""
    gives: str = ""
    only: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dataset:
    """A data set.

    key: its name in settings and commands
    title: its name as the paper prints it
    position: its place in lists
    folders: names that its folder may have under the data root; downloads go to the first
    layouts: the first whose files are there is read
    split: what split the very first layout has; empty where it is not one of a paper
    page, terms: its web page, and its terms of use in our words
    domains: the printed name of each domain, where it has several
    """

    key: str
    title: str
    position: int
    folders: tuple[str, ...]
    classes: int
    layouts: Mapping[str, Layout]
    page: str
    terms: str
    files: tuple[File, ...]
    domains: Mapping[str, str] = field(default_factory=dict)
    split: str = "the paper's split"

    @property
    def best(self) -> str:
        """The name of the layout that goes before the others."""
        return next(iter(self.layouts))

    def places(self, root: Path) -> list[Path]:
        """Where its folder may be under the data root."""
        return [root / folder for folder in self.folders]

    def sizes(self, layout: str) -> dict[str, int | None]:
        """How many classes, domains and images the whole data set has, where that is known."""
        files = self.layouts[layout]
        images = {"train images": files.train, "test images": files.test}
        return {"classes": self.classes, "domains": len(self.domains) or 1, **images}

    def missing(self, layout: str, folder: Path) -> dict[str, list[str]]:
        """The files that a folder lacks, for each domain or for the data set as a whole."""
        lacks = {}
        for domain in self.domains or [self.key]:
            items = [item.format(domain=domain) for item in self.layouts[layout].needs]
            lacks[domain] = [item for item in items if not there(folder, item)]
        return lacks


def there(folder: Path, item: str) -> str:
    """Which of several alternatives a folder has; "" for none."""
    return next((name for name in item.split("|") if (folder / name).exists()), "")


def coop(lists: str, places: str, train: int, test: int) -> Layout:
    """CoOp's JSON {"train" | "val" | "test": [[path under its place, label, class name], ..]}."""

    def read(folder: Path, domain: str) -> Rows:
        content = json_of(folder / lists)
        images = there(folder, places)
        for split in SPLITS:
            for path, label, name in content[split]:
                yield Row(f"{images}/{path}", int(label), name, split)

    return Layout((lists, places), read, train, test)


def coop_file(path: str) -> File:
    """The JSON file of CoOp, which is on a page for people only."""
    page = "https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md"
    return File(path, hint=f"the split of CoOp, see {page}")


def fedbn(classes: list[str], train: int, test: int) -> Layout:
    """FedBN's pickles (paths, class names); a path counts from its last three parts on."""

    def read(folder: Path, domain: str) -> Rows:
        for split in ("train", "test"):
            paths, names = pickled.read(folder / f"{domain}_{split}.pkl")
            for path, name in zip(map(as_text, paths), map(as_text, names), strict=True):
                short = "/".join(path.split("/")[-3:])  # DOMAIN/CLASS/FILE
                yield Row(short, classes.index(name), name, split)

    return Layout(("{domain}_train.pkl", "{domain}_test.pkl", "{domain}"), read, train, test)


def cifar(train: list[str], test: str, meta: str, names: str, labels: str) -> Layout:
    """CIFAR's pickled batches, numbered as in torchvision; every image becomes a PNG file once.

    The folder of PNG files is named after the hash of the batches, so that images of other batches
    are never taken for these.

    train, test, meta: the files with images for training and testing, and with class names
    names, labels: the keys of class names and labels in them
    """

    def read(folder: Path, domain: str) -> Rows:
        classes = batch(folder / meta)[names]
        hashes = "".join(sha256(folder / file) for file in [*train, test])
        images = f"png_{hashlib.sha256(hashes.encode()).hexdigest()[:8]}"
        for split, files in (("train", train), ("test", [test])):
            batches = [batch(folder / file) for file in files]
            listed = itertools.chain(*(content[labels] for content in batches))
            data = np.concatenate([content["data"] for content in batches])
            pixels = data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            bar = tqdm(pixels, desc=f"{domain} {split}", unit="image", delay=2)
            for number, (label, image) in enumerate(zip(listed, bar, strict=True)):
                path = f"{images}/{split}/{number:05d}.png"
                write_png(folder / path, image)
                yield Row(path, label, classes[label], split)

    def count(folder: Path) -> tuple[int, int]:
        numbers = [len(batch(folder / file)[labels]) for file in [*train, test]]
        return sum(numbers[:-1]), numbers[-1]

    return Layout((*train, test, meta), read, 50000, 10000, count)


def batch(path: Path) -> dict[str, Any]:
    """A pickled mapping; its keys become text where Python 2 wrote bytes."""
    return {as_text(key): value for key, value in pickled.read(path).items()}


def as_text(text: str | bytes) -> str:
    return text.decode() if isinstance(text, bytes) else str(text)


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Write an image unless it is there."""
    from PIL import Image

    if not path.exists():
        with atomic_write(path, one_of_many=True) as temporary:
            Image.fromarray(pixels).save(temporary, format="PNG")


def lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty."""
    return [line for line in text_of(path).splitlines() if line.strip()]


def json_of(path: Path) -> Any:
    """What a JSON file holds. Raises as `text_of` does, and ValueError naming one that is none."""
    text = text_of(path, JSON)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is no JSON that is read: {e}") from None


def files_in(folder: Path, depth: int) -> list[Path]:
    """Files `depth` levels down, relative to the folder, sorted, without hidden ones."""
    found = folder.glob("/".join("*" * depth))
    files = [path.relative_to(folder) for path in found if not path.is_dir()]
    return sorted(path for path in files if "/." not in f"/{path}")


def images_in(folder: Path, depth: int) -> list[Path]:
    """Those of them that are called as images are."""
    return [path for path in files_in(folder, depth) if is_picture(path)]


def deal(rows: list[Row], counts: Mapping[str, np.ndarray], stream: str) -> Rows:
    """Deal counts[split][c] of the images of class c to each split.

    They are drawn by a generator that is named by `stream`.
    """
    rng = np.random.default_rng([0, *stream.encode()])
    labels = np.array([row.label for row in rows], int)
    splits = np.empty(len(rows), object)
    for label in np.unique(labels):
        order = rng.permutation(np.flatnonzero(labels == label))
        splits[order] = np.repeat(list(counts), [count[label] for count in counts.values()])
    for row, split in zip(rows, splits):
        yield row._replace(split=split)


def halved(rows: list[Row], stream: str) -> Rows:
    """Deal half of each class to training, a fifth to validation and the rest to testing."""
    totals = np.bincount([row.label for row in rows])
    train, val = (np.rint(totals * share).astype(int) for share in (0.5, 0.2))
    return deal(rows, {"train": train, "val": val, "test": totals - train - val}, stream)


def stratified(rows: list[Row], stream: str) -> Rows:
    """Deal a fifth of the images, rounded up, to testing and the others to training.

    Each class gives the whole part of its share, and those of the largest remainders one more,
    among equals the lowest label first. These are the counts of the stratified split in FedBN's
    preprocessing (med-air/FedBN at 2fa38ad).
    """
    totals = np.bincount([row.label for row in rows])
    n_test = -(-len(rows) // 5)
    test, remainder = np.divmod(totals * n_test, max(len(rows), 1))
    largest = np.argsort(-remainder, kind="stable")
    test[largest[: n_test - test.sum()]] += 1
    return deal(rows, {"train": totals - test, "test": test}, stream)
