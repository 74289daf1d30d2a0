"""The data sets: each module of this package with a `DATASET` describes one.

A new data set is a new module and needs nothing else. It is read from the files that its authors
or other repositories offer, and becomes a manifest. Rows keep the order of the lists, on which
official partitions depend, and images for validation are among them. Class names are in the order
of the labels, with spaces for underscores as in CoOp's prompts; labels close up to 0, 1, .. where a
subset lacks classes. Sizes are those of Table 5 of pFedMoAP (ICLR 2025), of CoOp and torchvision:
`checklist` compares with them, and nothing is refused for being a subset.

Formats and names: KaiyangZhou/CoOp at 1fbb1a6, KaiyangZhou/Dassl.pytorch at 21ed5af,
med-air/FedBN at 2fa38ad, torchvision 0.29.
"""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from fpl.data.datasets.layouts import Dataset
from fpl.data.datasets.own import read_own
from fpl.data.manifest import SPLITS, Manifest, Row, assemble, write_manifest

Line = tuple[str, object, object, str]  # of a checklist: item, expected, found, what is to be done


def find_descriptions() -> list[Dataset]:
    """The data sets that the modules of this package describe, by position and key."""
    names = [f"{__name__}.{module.name}" for module in pkgutil.iter_modules(__path__)]
    modules = map(importlib.import_module, names)
    found = [module.DATASET for module in modules if hasattr(module, "DATASET")]
    return sorted(found, key=lambda dataset: (dataset.position, dataset.key))


DATASETS = {dataset.key: dataset for dataset in find_descriptions()}


def get(name: str) -> Dataset:
    """The description of a data set. Raises ValueError for a name that no data set has."""
    if name not in DATASETS:
        raise ValueError(
            f"data set {name!r} is none of {', '.join(DATASETS)}; "
            "for images of your own, `own` names a CSV or folder"
        )
    return DATASETS[name]


def find(name: str, root: Path, layout: str | None = None) -> tuple[Path, str, list[str]]:
    """Look for a data set: its folder under `root` or `root` itself, its layout, its domains.

    A layout is there when one of its domains is whole. Raises FileNotFoundError where none is, and
    ValueError for an unknown name and for a domain of which only a part is there: it would go
    missing unseen.
    """
    dataset = get(name)
    if layout and layout not in dataset.layouts:
        raise ValueError(f"{name} has no layout {layout!r}: use {' or '.join(dataset.layouts)}")
    for folder in [*dataset.places(root), root]:
        for key in [layout] if layout else dataset.layouts:
            missing = dataset.missing(key, folder)
            whole = [domain for domain in missing if not missing[domain]]
            if whole:
                needs = len(dataset.layouts[key].needs)
                refuse_parts(missing, needs, folder)
                return folder, key, whole
    raise FileNotFoundError(
        f"no {name} in {root} ({' or '.join(dataset.folders)}): "
        f"`fpl data check {name}` says which files it needs"
    )


def refuse_parts(missing: Mapping[str, list[str]], needs: int, folder: Path) -> None:
    """Raise ValueError for a domain that misses some, but not all of the files that it needs."""
    for domain, items in missing.items():
        if 0 < len(items) < needs:
            raise ValueError(
                f"{folder} has only a part of {domain}: add {items[0]} or take the rest of it away"
            )


def read(name: str, root: Path, layout: str | None = None) -> Manifest:
    """Read a data set under `root`, or "own" data, the CSV file or folder `root`, to a manifest.

    CIFAR's images are written to PNG files on the way, the manifest itself is not written. Warns of
    a domain without pictures of a class that others have. Raises as `find` does, and ValueError for
    lists that cannot be read, for a domain without pictures and for a picture that stands in two
    splits or classes.
    """
    if name == "own":
        return read_own(root)
    folder, key, domains = find(name, root, layout)
    rows = []
    try:
        for domain in domains:
            found = DATASETS[name].layouts[key].read(folder, domain)
            rows += [row._replace(domain=domain) for row in found]
        manifest = assemble(folder, rows)
        check_rows(rows, domains)
        return manifest
    except OSError:
        raise
    except Exception as e:  # MATLAB files, JSON and lines of another form fail in many ways
        reason = e if isinstance(e, ValueError) else f"{type(e).__name__} {e}"
        raise ValueError(
            f"{name}: the lists of the {key} layout in {folder} are not as they should be: {reason}"
        ) from e


def check_rows(rows: Sequence[Row], domains: Sequence[str]) -> None:
    """Raise ValueError, or warn, for what `read` says of rows."""
    classes: dict[str, set[str]] = {domain: set() for domain in domains}
    listed: dict[str, Row] = {}
    for row in rows:
        classes[row.domain].add(row.name)
        other = listed.setdefault(row.path, row)
        if (other.split, other.label) != (row.split, row.label):
            places = f"{other.split} ({other.name}) and {row.split} ({row.name})"
            raise ValueError(f"{row.path} is listed in {places}")
    every = set().union(*classes.values())
    for domain, there in classes.items():
        if not there:
            raise ValueError(f"there are no pictures of {domain}: add them, or take it away")
        if lacks := sorted(every - there):
            said = f"{domain} has no pictures of {', '.join(lacks[:3])}, which others have"
            warnings.warn(said, stacklevel=3)


def prepare(name: str, root: Path, layout: str | None, path: Path) -> Path:
    """Write the manifest that features are made from, and return its path.

    It has all images but those for validation, which no protocol here uses, and the classes of all
    but these. Raises as `read` does, and ValueError without any image for training, or for testing.
    """
    whole = read(name, root, layout)
    used = [row for row in whole.rows if row["split"] != "val"]
    for split in ("train", "test"):
        if all(row["split"] != split for row in used):
            raise ValueError(f"{name} in {root} has no images for the split {split}: add some")
    labels = sorted({int(row["label"]) for row in used})  # some may be of validation only
    new = {str(label): str(i) for i, label in enumerate(labels)}
    rows = [row | {"label": new[row["label"]]} for row in used]
    return write_manifest(replace(whole, rows=rows), path)


def overview(root: Path) -> pd.DataFrame:
    """List the data sets with their sizes in the paper, and where they are found under `root`."""
    table = []
    for name, dataset in DATASETS.items():
        try:
            folder, layout, _ = find(name, root)
            place = f"{folder} ({layout})"
        except FileNotFoundError:
            place = ""
        except ValueError as e:
            place = str(e)
        paper = dataset.layouts[dataset.best]
        table.append((name, dataset.classes, paper.train, paper.test, place))
    return pd.DataFrame(table, columns=["data set", "classes", "train", "test", "found"])


def checklist(name: str, root: Path, layout: str | None = None) -> pd.DataFrame:
    """Compare what a data set needs with what is there: columns item, expected, found, todo.

    todo is empty where nothing is to be done. layout: the one that was chosen, if one was.
    """
    table: list[Line] = []
    reason = used = ""
    try:
        manifest = read(name, root, layout)
    except FileNotFoundError as e:
        reason = str(e) if name == "own" else "see above"
    except ValueError as e:
        reason = str(e)
    sizes: dict[str, int | None] = {}
    if name != "own":
        dataset = get(name)
        folder = next(filter(Path.is_dir, dataset.places(root)), dataset.places(root)[0])
        if not reason:
            folder, used, _ = find(name, root, layout)
            sizes = dataset.sizes(used)
            best = layout or (dataset.best if dataset.split else used)
            todo = f"{dataset.split} is in the files of the {best} layout" if used != best else ""
            table.append(("layout that is read", best, used, todo))
        table += missing_files(dataset, folder, used)
    if reason:
        table.append(("manifest", "readable", "no", reason))
    else:
        table += images_found(manifest, sizes)
    return pd.DataFrame(table, columns=["item", "expected", "found", "todo"])


def missing_files(dataset: Dataset, folder: Path, used: str) -> list[Line]:
    """A line for every file that is not there; only those of the layout in use must be brought."""
    table: list[Line] = []
    for key in dataset.layouts:
        for items in dataset.missing(key, folder).values():
            for item in items:
                place = folder / item.split("|")[0]
                todo = f"put it at {place}" if used in ("", key) else ""
                table.append((f"{item} ({key} layout)", "there", "missing", todo))
    return table


def images_found(manifest: Manifest, sizes: Mapping[str, int | None]) -> list[Line]:
    """Compare the numbers of a manifest with the expected ones, and look for its images."""
    rows = pd.DataFrame(manifest.rows)
    found = {"classes": len(manifest.classes), "domains": rows["domain"].nunique()}
    for split in SPLITS:
        found[f"{split} images"] = int((rows["split"] == split).sum())
    table: list[Line] = []
    for item, number in found.items():
        wanted = sizes.get(item) or number
        part = "fine for a part of the set, but not to be compared with published numbers"
        table.append((item, wanted, number, part if wanted != number else ""))
    paths = [manifest.folder / path for path in rows["path"]]
    absent = [path for path in paths if not path.exists()]
    todo = f"the first that is missing is {absent[0]}" if absent else ""
    table.append(("images on disk", len(paths), len(paths) - len(absent), todo))
    return table
