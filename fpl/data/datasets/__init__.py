"""Readers: from the files of a data set, as its authors or other repositories lay them out, to one manifest.

A data set has layouts: the files each needs, and how images are listed in them. The first layout that is there is read, unless
one is asked for. Rows keep the order of the lists, on which official partitions depend, `val` images included. Class names are in
label order, with spaces for underscores as in CoOp's prompts; labels close up to 0, 1, .. where a subset lacks classes. Sizes are
those of Table 5 of pFedMoAP (ICLR 2025) and of torchvision: `checklist` compares, nothing is refused for being a subset.
Formats and names: KaiyangZhou/CoOp at 1fbb1a6, med-air/FedBN at 2fa38ad, torchvision 0.29.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from fpl.data import pickled
from fpl.data.features import Manifest
from fpl.data.files import atomic_write, sha256

SPLITS = ("train", "val", "test")
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff", ".gif"}
DOMAINNET = ["bird", "feather", "headphones", "ice_cream", "teapot", "tiger", "whale", "windmill", "wine_glass", "zebra"]
OFFICE = ["back_pack", "bike", "calculator", "headphones", "keyboard", "laptop_computer", "monitor", "mouse", "mug", "projector"]
OFFICE_ALSO = {"backpack": "back_pack", "laptop": "laptop_computer"}  # folder names of other copies
CALTECH_IGNORED = {"BACKGROUND_Google", "Faces_easy"}  # as CoOp: clutter, and the faces a second time
CALTECH_NAMES = {"airplanes": "airplane", "Faces": "face", "Leopards": "leopard", "Motorbikes": "motorbike"}


class Row(NamedTuple):
    """One image: path relative to the data set's folder, label in its lists, class name, split, domain, client (own data)."""

    path: str
    label: int
    name: str
    split: str
    domain: str
    client: str = ""


@dataclass(frozen=True)
class Layout:
    """What must be there ("{domain}" stands for each, "|" parts alternatives), the reader of one domain, sizes to expect."""

    needs: tuple[str, ...]
    read: Callable[[Path, str], Iterable[Row]]
    train: int | None = None
    test: int | None = None


@dataclass(frozen=True)
class Dataset:
    """`folders`: what the set's folder may be called under the data root, first the name that `fpl data fetch` uses."""

    folders: tuple[str, ...]
    classes: int
    layouts: dict[str, Layout]
    domains: tuple[str, ...] = ()


# --- layouts: each reads one domain of a data set's folder ----------------------------------------------------------------------


def coop(folder: Path, domain: str, lists: str, images: str) -> Iterator[Row]:
    """CoOp's JSON {"train" | "val" | "test": [[path under `images`, label, class name], ..]}."""
    content = json.loads((folder / lists).read_text())
    for split in SPLITS:
        yield from (Row(f"{images}/{path}", int(label), name, split, domain) for path, label, name in content[split])


def flowers(folder: Path, domain: str) -> Iterator[Row]:
    """MATLAB files: the labels 1 .. 102 of image_00001.jpg and on, and the image numbers of each split."""
    from scipy.io import loadmat
    from torchvision.datasets import Flowers102

    labels = loadmat(folder / "imagelabels.mat")["labels"].ravel()
    numbers = loadmat(folder / "setid.mat")
    names = {str(i): name.rstrip("?") for i, name in enumerate(Flowers102.classes, 1)}  # CoOp has no mark after the unsure one
    if (folder / "cat_to_name.json").exists():
        names = json.loads((folder / "cat_to_name.json").read_text())
    for split, key in zip(SPLITS, ("trnid", "valid", "tstid")):
        for number in numbers[key].ravel().tolist():
            label = int(labels[number - 1])
            yield Row(f"jpg/image_{number:05d}.jpg", label - 1, names[str(label)], split, domain)


def pets(folder: Path, domain: str) -> Iterator[Row]:
    """Lines "Breed_name_12 LABEL SPECIES BREED" with labels 1 .. 37; trainval is for training."""
    for split, lists in (("train", "trainval.txt"), ("test", "test.txt")):
        for line in lines(folder / "annotations" / lists):
            image, label = line.split()[:2]
            yield Row(f"images/{image}.jpg", int(label) - 1, image.rpartition("_")[0].lower(), split, domain)


def food(folder: Path, domain: str) -> Iterator[Row]:
    """JSON {class: ["class/number", ..]}; labels in the order of the sorted classes."""
    for split in ("train", "test"):
        content = json.loads((folder / "meta" / f"{split}.json").read_text())
        for label, name in enumerate(sorted(content)):
            yield from (Row(f"images/{image}.jpg", label, name, split, domain) for image in content[name])


def dtd(folder: Path, domain: str) -> Iterator[Row]:
    """Lines "class/file", the first of the authors' ten partitions; labels in the order of the sorted classes."""
    listed = [(split, line) for split in SPLITS for line in lines(folder / "labels" / f"{split}1.txt")]
    names = sorted({line.split("/")[0] for _, line in listed})
    for split, line in listed:
        name = line.split("/")[0]
        yield Row(f"images/{line}", names.index(name), name, split, domain)


def caltech(folder: Path, domain: str) -> Iterator[Row]:
    """Class folders; classes, names and shares (50 % train, 20 % val, the rest test) are CoOp's, the draw is ours."""
    images = [path for path in images_in(folder / "101_ObjectCategories", 2) if path.parts[0] not in CALTECH_IGNORED]
    names = sorted({path.parts[0] for path in images})
    labels = np.array([names.index(path.parts[0]) for path in images], int)
    totals = np.bincount(labels)
    train, val = np.rint(totals * 0.5).astype(int), np.rint(totals * 0.2).astype(int)
    splits = dealt(labels, {"train": train, "val": val, "test": totals - train - val}, domain)
    for path, label, split in zip(images, labels.tolist(), splits):
        yield Row(f"101_ObjectCategories/{path}", label, CALTECH_NAMES.get(names[label], names[label]), split, domain)


def cifar(folder: Path, domain: str, train: tuple[str, ...], test: str, meta: str, names: str, labels: str) -> Iterator[Row]:
    """torchvision's batches; every image becomes a PNG file once, numbered as torchvision numbers it.

    The PNG folder is named after the hash of the batches: images of other batches are never taken for these.
    """
    from PIL import Image

    classes = by_text(pickled.read(folder / meta))[names]
    hashes = "".join(sha256(folder / file) for file in (*train, test))
    images = Path(f"png_{hashlib.sha256(hashes.encode()).hexdigest()[:8]}")
    for split, files in (("train", train), ("test", (test,))):
        batches = [by_text(pickled.read(folder / file)) for file in files]
        pixels = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        listed = [label for batch in batches for label in batch[labels]]
        for number, (label, image) in enumerate(
            zip(tqdm(listed, desc=f"{domain} {split}", unit="image", delay=2), pixels, strict=True)
        ):
            path = images / split / f"{number:05d}.png"
            if not (folder / path).exists():
                with atomic_write(folder / path) as temporary:
                    Image.fromarray(image).save(temporary, format="PNG")
            yield Row(str(path), label, classes[label], split, domain)


def fedbn(folder: Path, domain: str, classes: list[str]) -> Iterator[Row]:
    """FedBN's pickles (paths, class names); of a path the last three parts count, DOMAIN/CLASS/FILE."""
    for split in ("train", "test"):
        paths, names = pickled.read(folder / f"{domain}_{split}.pkl")
        for path, name in zip(paths, names, strict=True):
            path, name = (x.decode() if isinstance(x, bytes) else str(x) for x in (path, name))
            yield Row("/".join(path.split("/")[-3:]), classes.index(name), name, split, domain)


def official(folder: Path, domain: str) -> Iterator[Row]:
    """DomainNet's lines "DOMAIN/CLASS/FILE LABEL" of 345 classes, of which ten are kept."""
    for split in ("train", "test"):
        for line in lines(folder / f"{domain}_{split}.txt"):
            path = line.rpartition(" ")[0]
            name = path.split("/")[-2]
            if name in DOMAINNET:
                yield Row(path, DOMAINNET.index(name), name, split, domain)


def office(folder: Path, domain: str) -> Iterator[Row]:
    """Plain folders DOMAIN/CLASS/FILE; FedBN's rule of 80/20 with a draw of ours."""
    top = domain if (folder / domain).exists() else f"{domain}10"
    named = [(path, OFFICE_ALSO.get(path.parts[0], path.parts[0])) for path in images_in(folder / top, 2)]
    yield from stratified([(f"{top}/{path}", OFFICE.index(name), name) for path, name in named if name in OFFICE], domain)


def own(root: Path) -> list[Row]:
    """A CSV file, or folders CLASS/FILE, DOMAIN/CLASS/FILE or {train,val,test}/CLASS/FILE; labels follow the sorted class names.

    Without given splits a fifth of each domain's images is for testing, stratified by class.
    """
    if root.is_file():
        return own_csv(root)
    if not root.is_dir():
        raise FileNotFoundError(f"no own data at {root}: give a CSV file or a folder CLASS/FILE or DOMAIN/CLASS/FILE")
    flat, deep = images_in(root, 2), images_in(root, 3)
    if bool(flat) == bool(deep):
        found = f"both {flat[0]} and {deep[0]}" if flat else "no images"
        raise ValueError(f"{root} holds {found}: images must be in CLASS/FILE, or all of them in DOMAIN/CLASS/FILE")
    names = sorted({path.parts[-2] for path in flat or deep})
    tops: dict[str, list[tuple[str, int, str]]] = {}
    for path in flat or deep:
        tops.setdefault(path.parts[0] if deep else "own", []).append((str(path), names.index(path.parts[-2]), path.parts[-2]))
    if tops.keys() <= set(SPLITS):
        return [Row(*image, split, "own") for split in SPLITS for image in tops.get(split, [])]
    return [row for domain, images in tops.items() for row in stratified(images, domain)]


def own_csv(path: Path) -> list[Row]:
    """Columns path, split, class or label or both, and domain and client where there are such."""
    with path.open(newline="", encoding="utf-8-sig") as f:  # -sig: spreadsheets put a mark in front
        reader = csv.DictReader(f)
        table, columns = list(reader), set(reader.fieldnames or [])
    if not {"path", "split"} <= columns or not {"class", "label"} & columns:
        raise ValueError(f"{path} needs the columns path, split, and class or label in its first line, it has {sorted(columns)}")
    both, key = {"class", "label"} <= columns, "class" if "class" in columns else "label"
    for line, row in enumerate(table, start=2):
        if None in row or not all(row[column] for column in columns - {"domain"}):
            raise ValueError(f"{path}, line {line}: needs one value for each column, not {list(row.values())}")
        if row["split"] not in SPLITS:
            raise ValueError(f"{path}, line {line}: the split is train, val or test, not {row['split']!r}")
        if both and not row["label"].isdecimal():
            raise ValueError(f"{path}, line {line}: beside a class the label is 0, 1, .., not {row['label']!r}")
    names = {row[key] for row in table}
    order = sorted(names, key=int if all(name.isdecimal() for name in names) else str)
    label = lambda row: int(row["label"]) if both else order.index(row[key])  # noqa: E731
    return [
        Row(row["path"], label(row), row[key], row["split"], row.get("domain") or "own", row.get("client", "")) for row in table
    ]


# --- what layouts share ---------------------------------------------------------------------------------------------------------


def lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line.strip()]


def by_text(mapping: dict) -> dict[str, Any]:
    return {key.decode() if isinstance(key, bytes) else key: value for key, value in mapping.items()}


def images_in(folder: Path, depth: int) -> list[Path]:
    """Image files `depth` levels down, relative to `folder`, sorted, without hidden ones."""
    found = (path.relative_to(folder) for path in folder.glob("/".join("*" * depth)) if path.suffix.lower() in SUFFIXES)
    return sorted(path for path in found if not any(part.startswith(".") for part in path.parts))


def dealt(labels: np.ndarray, counts: dict[str, np.ndarray], stream: str) -> np.ndarray:
    """A split for each image: counts[split][c] of the images of class c, drawn by a generator named by `stream`."""
    rng = np.random.default_rng([0, *stream.encode()])
    splits = np.empty(len(labels), object)
    for label in np.unique(labels):
        order = rng.permutation(np.flatnonzero(labels == label))
        splits[order] = np.repeat(list(counts), [count[label] for count in counts.values()])
    return splits


def stratified(images: list[tuple[str, int, str]], domain: str) -> Iterator[Row]:
    """The rows of a domain's images (path, label, class name), a fifth of them, rounded up, for testing.

    Each class gives the whole part of its share, those of the largest remainders one more, among equals the lowest label first:
    the counts of the stratified split in FedBN's preprocessing.
    """
    labels = np.array([label for _, label, _ in images], int)
    totals, n_test = np.bincount(labels), -(-len(images) // 5)
    test, remainder = np.divmod(totals * n_test, max(len(images), 1))
    test[np.argsort(-remainder, kind="stable")[: n_test - test.sum()]] += 1
    splits = dealt(labels, {"train": totals - test, "test": test}, domain)
    yield from (Row(*image, split, domain) for image, split in zip(images, splits))


def assemble(folder: Path, rows: list[Row], inside: bool = True) -> Manifest:
    """Rows to a manifest in memory, with the hash of the file that `write_manifest` makes of it in `folder`.

    ValueError for a label with two class names and, if all must be `inside`, for a path that leads out of the folder.
    """
    if not rows:
        raise ValueError("they name no images")
    names: dict[int, str] = {}
    for row in rows:
        if names.setdefault(row.label, row.name) != row.name:
            raise ValueError(f"label {row.label} is {names[row.label]!r} for one image and {row.name!r} for {row.path}")
        if inside and (row.path.startswith("/") or ".." in PurePosixPath(row.path).parts):
            raise ValueError(f"the path {row.path!r} leads out of the folder")
    classes = {label: names[label].replace("_", " ") for label in sorted(names)}
    closed = {label: str(i) for i, label in enumerate(classes)}
    entries = [
        {"path": row.path, "label": closed[row.label], "class": classes[row.label], "split": row.split, "domain": row.domain}
        | ({"client": row.client} if row.client else {})
        for row in rows
    ]
    return Manifest(folder, entries, list(classes.values()), hashlib.sha256(as_csv(entries)).hexdigest())


def as_csv(entries: list[dict[str, str]]) -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, entries[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(entries)
    return out.getvalue().encode()


def write_manifest(manifest: Manifest, path: Path | None = None) -> Path:
    """The manifest as a CSV `path,label,class,split,domain[,client]`, by default `manifest.csv` in the data set's folder.

    Written elsewhere (where that folder is read-only), its paths lead from there to the images, and its hash is another.
    """
    path = path or manifest.folder / "manifest.csv"
    away = os.path.relpath(manifest.folder, path.parent)
    rows = manifest.rows if away == "." else [row | {"path": os.path.join(away, row["path"])} for row in manifest.rows]
    with atomic_write(path) as temporary:
        temporary.write_bytes(as_csv(rows))
    return path


# --- the data sets --------------------------------------------------------------------------------------------------------------


def of_coop(lists: str, images: str, train: int, test: int) -> Layout:
    return Layout((lists, images), partial(coop, lists=lists, images=images), train, test)


def of_cifar(train: tuple[str, ...], test: str, meta: str, names: str, labels: str) -> dict[str, Layout]:
    read = partial(cifar, train=train, test=test, meta=meta, names=names, labels=labels)
    return {"torchvision": Layout((*train, test, meta), read, 50000, 10000)}


def of_fedbn(classes: list[str], train: int, test: int) -> Layout:
    return Layout(("{domain}_train.pkl", "{domain}_test.pkl", "{domain}"), partial(fedbn, classes=classes), train, test)


FLOWERS = {
    "coop": of_coop("split_zhou_OxfordFlowers.json", "jpg", 4093, 2463),
    "torchvision": Layout(("imagelabels.mat", "setid.mat", "jpg"), flowers, 1020, 6149),
}
PETS = {
    "coop": of_coop("split_zhou_OxfordPets.json", "images", 2944, 3669),
    "torchvision": Layout(("annotations/trainval.txt", "annotations/test.txt", "images"), pets, 3680, 3669),
}
FOOD = {
    "coop": of_coop("split_zhou_Food101.json", "images", 50500, 30300),
    "torchvision": Layout(("meta/train.json", "meta/test.json", "images"), food, 75750, 25250),
}
CALTECH = {
    "coop": of_coop("split_zhou_Caltech101.json", "101_ObjectCategories", 4128, 2465),
    "folders": Layout(("101_ObjectCategories",), caltech, 4128, 2465),
}
TEXTURES = {
    "coop": of_coop("split_zhou_DescribableTextures.json", "images", 2820, 1692),
    "torchvision": Layout(("labels/train1.txt", "labels/val1.txt", "labels/test1.txt", "images"), dtd, 1880, 1880),
}
BATCHES = tuple(f"cifar-10-batches-py/data_batch_{i}" for i in range(1, 6))
CIFAR10 = of_cifar(BATCHES, "cifar-10-batches-py/test_batch", "cifar-10-batches-py/batches.meta", "label_names", "labels")
CIFAR100 = of_cifar(
    ("cifar-100-python/train",), "cifar-100-python/test", "cifar-100-python/meta", "fine_label_names", "fine_labels"
)
TEN_OF_DOMAINNET = {
    "fedbn": of_fedbn(DOMAINNET, 18278, 4573),
    "official": Layout(("{domain}_train.txt", "{domain}_test.txt", "{domain}"), official),
}
TEN_OF_OFFICE = {"fedbn": of_fedbn(OFFICE, 2025, 508), "folders": Layout(("{domain}|{domain}10",), office, 2025, 508)}
SIX = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")

DATASETS = {
    "flowers102": Dataset(("oxford_flowers", "flowers-102", "flowers102"), 102, FLOWERS),
    "oxfordpets": Dataset(("oxford_pets", "oxford-iiit-pet", "oxfordpets"), 37, PETS),
    "food101": Dataset(("food-101", "food101"), 101, FOOD),
    "caltech101": Dataset(("caltech-101", "caltech101"), 100, CALTECH),
    "dtd": Dataset(("dtd", "dtd/dtd"), 47, TEXTURES),
    "cifar10": Dataset(("cifar10", "cifar-10"), 10, CIFAR10),
    "cifar100": Dataset(("cifar100", "cifar-100"), 100, CIFAR100),
    "domainnet10": Dataset(("DomainNet", "domainnet"), 10, TEN_OF_DOMAINNET, SIX),
    "office_caltech10": Dataset(
        ("office_caltech_10", "office_caltech10"), 10, TEN_OF_OFFICE, ("amazon", "caltech", "dslr", "webcam")
    ),
}


def known(name: str) -> Dataset:
    if name not in DATASETS:
        raise ValueError(
            f"data set {name!r} is none of {', '.join(DATASETS)}; for images of your own, `own` names a CSV or folder"
        )
    return DATASETS[name]


def missing(folder: Path, layout: Layout, domain: str) -> list[str]:
    """What the layout needs for a domain and the folder has not."""
    needs = [item.format(domain=domain) for item in layout.needs]
    return [item for item in needs if not any((folder / name).exists() for name in item.split("|"))]


def find(name: str, root: Path, layout: str | None = None) -> tuple[Path, str, list[str]]:
    """Folder, layout and domains of a data set, in its folder under `root` or in `root` itself.

    A layout is there when one of its domains is whole. FileNotFoundError where none is; ValueError for an unknown name, and for a
    domain that is there in part, which would go missing unseen.
    """
    dataset = known(name)
    if layout and layout not in dataset.layouts:
        raise ValueError(f"{name} has no layout {layout!r}: use {' or '.join(dataset.layouts)}")
    for folder in (*(root / name for name in dataset.folders), root):
        for key in [layout] if layout else dataset.layouts:
            lacks = {domain: missing(folder, dataset.layouts[key], domain) for domain in dataset.domains or (name,)}
            if all(lacks.values()):
                continue
            for domain, items in lacks.items():
                if 0 < len(items) < len(dataset.layouts[key].needs):
                    raise ValueError(f"{folder} has only a part of {domain}: add {items[0]} or take the rest of it away")
            return folder, key, [domain for domain, items in lacks.items() if not items]
    raise FileNotFoundError(
        f"no {name} in {root} ({' or '.join(dataset.folders)}): `fpl data check {name}` says which files it needs"
    )


def read(name: str, root: Path, layout: str | None = None) -> Manifest:
    """The manifest of a data set under `root`, or of "own" data, the CSV file or folder `root`; in memory, see `write_manifest`.

    CIFAR's images are written to PNG files on the way. Raises as `find` does, and ValueError for lists that cannot be read.
    """
    if name == "own":
        return assemble(root.parent if root.is_file() else root, own(root), inside=False)
    folder, key, domains = find(name, root, layout)
    chosen = DATASETS[name].layouts[key]
    try:
        return assemble(folder, [row for domain in domains for row in chosen.read(folder, domain)])
    except OSError:
        raise
    except Exception as e:  # MATLAB files, JSON and lines of another form fail in many ways
        reason = e if isinstance(e, ValueError) else f"{type(e).__name__} {e}"
        raise ValueError(f"{name}: the lists of the {key} layout in {folder} are not as they should be: {reason}") from e


def prepare(name: str, root: Path, layout: str | None, path: Path) -> Path:
    """Write the manifest from which features are made: all images but those for validation, which no protocol here uses."""
    whole = read(name, root, layout)
    used = [row for row in whole.rows if row["split"] != "val"]
    return write_manifest(replace(whole, rows=used), path)


def checklist(name: str, root: Path) -> pd.DataFrame:
    """What a data set needs and what is there: columns item, expected, found, todo (empty where nothing is to be done)."""
    table: list[tuple[str, object, object, str]] = []
    expected: dict[str, int | None] = {}
    manifest, used, reason = None, "", ""
    try:
        manifest = read(name, root)
    except FileNotFoundError as e:
        reason = str(e) if name == "own" else "see above"
    except ValueError as e:
        reason = str(e)
    if name != "own":
        dataset, best = known(name), next(iter(known(name).layouts))
        folder = next((root / f for f in dataset.folders if (root / f).is_dir()), root / dataset.folders[0])
        if manifest:
            folder, used, _ = find(name, root)
            note = f"the paper's split is in the files of the {best} layout" if used != best else ""
            table.append(("layout that is read", best, used, note))
            expected = {"classes": dataset.classes, "domains": len(dataset.domains) or 1}
            expected |= {"train images": dataset.layouts[used].train, "test images": dataset.layouts[used].test}
        for key, layout in dataset.layouts.items():
            for domain in dataset.domains or (name,):
                for item in missing(folder, layout, domain):
                    todo = f"put it at {folder / item.split('|')[0]}" if used in ("", key) else ""
                    table.append((f"{item} ({key} layout)", "there", "missing", todo))
    if not manifest:
        return pd.DataFrame([*table, ("manifest", "readable", "no", reason)], columns=["item", "expected", "found", "todo"])
    splits = [row["split"] for row in manifest.rows]
    counts = {"classes": len(manifest.classes), "domains": len({row["domain"] for row in manifest.rows})}
    for item, found in (counts | {f"{split} images": splits.count(split) for split in SPLITS}).items():
        wanted = expected.get(item) or found
        todo = "fine for a part of the set, but not to be compared with published numbers" if wanted != found else ""
        table.append((item, wanted, found, todo))
    absent = [row["path"] for row in manifest.rows if not (manifest.folder / row["path"]).exists()]
    todo = f"the first that is missing is {manifest.folder / absent[0]}" if absent else ""
    table.append(("images on disk", len(splits), len(splits) - len(absent), todo))
    return pd.DataFrame(table, columns=["item", "expected", "found", "todo"])


def overview(root: Path) -> pd.DataFrame:
    """Every data set with its sizes in the paper and, where it is under `root`, its folder and layout."""
    table = []
    for name, dataset in DATASETS.items():
        first = next(iter(dataset.layouts.values()))
        try:
            folder, layout, _ = find(name, root)
            place = f"{folder} ({layout})"
        except (FileNotFoundError, ValueError) as e:
            place = str(e) if isinstance(e, ValueError) else ""
        table.append((name, dataset.classes, first.train, first.test, place))
    return pd.DataFrame(table, columns=["data set", "classes", "train", "test", "found"])
