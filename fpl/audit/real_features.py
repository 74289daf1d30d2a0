"""CLIP features of photographs that others published: found, imported, and tables of their runs.

The files are not ours to hand on. real/sources.yaml says what they are and where they come from,
real/profile.yaml which runs are made, results/expected/real what came out.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from pandas import DataFrame

from fpl.data import foreign
from fpl.data.files import ROOT, sha256
from fpl.experiments import records, runner, tables, values
from fpl.experiments.settings import Settings
from fpl.experiments.tables import published

BOOK = "25_real_features"
SOURCES = ROOT / "real" / "sources.yaml"
EXPECTED = ROOT / "results" / "expected" / "real"
TRAINED_ON = {"keys": "means of ten augmentations", "val": "single validation pictures"}
FRONT = ["data set", "backbone", "trained on"]
SHOTS = 16
PAIRS = [("ridge_own", "majority"), ("ridge_own", "ridge_all"), ("ridge_own", "afl")]


@dataclass(frozen=True)
class Source:
    """Features of one data set by one model.

    title: the data set as papers print it. train: what the training images are, a key of
    TRAINED_ON. classes: their list in data/class_names, or how many there are. folder: of the
    files, below that of the clones. files: SHA-256 by name.
    """

    title: str
    backbone: str
    train: str
    classes: str | int
    folder: str
    files: Mapping[str, str]

    @property
    def names(self) -> list[str]:
        """The names of the classes, numbered ones where we have no list."""
        if isinstance(self.classes, int):
            return [f"class {i}" for i in range(self.classes)]
        return (ROOT / "data" / "class_names" / f"{self.classes}.txt").read_text().split()


def sources() -> dict[str, Source]:
    """Return what real/sources.yaml says, by the name of the data set in real/profile.yaml."""
    return {key: Source(**said) for key, said in values.load(SOURCES).items()}


def check(folder: Path, which: Mapping[str, Source]) -> None:
    """Raise FileNotFoundError or ValueError for the first file that is missing, or another one."""
    fetch = "get the two repositories that docs/real_features.md names"
    for source in which.values():
        for name, wanted in source.files.items():
            path = folder / source.folder / name
            if not path.is_file():
                raise FileNotFoundError(f"there is no file {path}: {fetch}")
            if sha256(path) != wanted:
                raise ValueError(f"{path} is another file than was measured: {fetch}")


def bring(folder: Path, settings: Settings, which: Mapping[str, Source]) -> None:
    """Import some sources to where the settings look for them. Raises as `check` does.

    folder: that of the two clones.
    """
    check(folder, which)
    for key, source in which.items():
        data = settings.source(key).data
        about = {"data": data.name, "model": source.backbone}
        with tempfile.TemporaryDirectory() as place:
            names = chosen(source, folder, Path(place))
            foreign.bring(Path(place), names, data.features, about, force=True)


def chosen(source: Source, folder: Path, place: Path) -> Path:
    """Link the files of a source from another place, and return a file of its class names there.

    Where they lie are others, too, such as another model's, which are not to be read.
    """
    for name in source.files:
        path = folder / source.folder / name
        (place / name).symlink_to(path.resolve())
    names = place / "names.txt"
    names.write_text("\n".join(source.names) + "\n")
    return names


def measure(folder: Path, settings: Settings) -> dict[str, DataFrame]:
    """Import all sources, make the missing runs, and return and save the tables.

    folder: that of the two clones. Raises as `check` does, and ValueError for settings that lack
    these runs.
    """
    books = {table.notebook for table in settings.tables.values()}
    if BOOK not in books:
        raise ValueError("these settings have no runs on real features: go to the folder real")
    names = settings.tables_of(BOOK)
    bring(folder, settings, sources())
    runner.tables(settings, names)
    runs = {name: records.of_table(name) for name in names}
    found = tables_of(runs)
    for name, table in found.items():
        tables.save(table, f"{BOOK}/{name}")
    return found


def expected() -> dict[str, DataFrame]:
    """Return the tables of the repository, by name. Raises FileNotFoundError without them."""
    found = {}
    for path in sorted(EXPECTED.glob("*.csv")):
        found[path.stem] = pd.read_csv(path, index_col=0)
    if not found:
        raise FileNotFoundError(f"there are no tables in {EXPECTED}: restore it")
    return found


def tables_of(runs: Mapping[str, DataFrame]) -> dict[str, DataFrame]:
    """Return all tables, by name. runs: of the tables of real/profile.yaml."""
    even = accuracies(runs["even"], "even")
    released = accuracies(runs["released"], "released", "shots")
    dirichlet = runs["dirichlet"]
    most = dirichlet[dirichlet["shots"] == SHOTS]
    return {
        "even": even,
        "shots": accuracies(runs["shots"], "even", "shots"),
        "released": released,
        "dirichlet": accuracies(dirichlet, "dirichlet", "concentration", "shots"),
        "even_differences": differences(runs["even"]),
        "dirichlet_differences": differences(most, "concentration"),
        "averaged": averaged(runs["single"]),
        "beside": beside(even, released),
    }


def wide(table: DataFrame, over: str, *also: str) -> DataFrame:
    """Return the means of a table with a column for each value of one of its columns.

    also: other columns, of which each combination of values has lines of its own.
    """
    index = ["data set", "backbone", *also, "row"]
    return table.pivot_table("mean", index, over, sort=False)


def accuracies(runs: DataFrame, split: str, *keys: str) -> DataFrame:
    """Return mean, std and interval over seeds of each row, data set, and value of the keys."""
    table = tables.grid(runs, ["method", *keys])
    table = table.reset_index()
    rows = table["method"].map(tables.titles(runs))
    table.insert(1, "split", split)
    table.insert(3, "row", rows)
    return described(table)


def described(table: DataFrame) -> DataFrame:
    """Return a table by data set with what the names stand for in front."""
    lines = {}
    for key, source in sources().items():
        lines[key] = (source.title, source.backbone, TRAINED_ON[source.train])
    said = DataFrame.from_dict(lines, "index", columns=FRONT)
    front = said.loc[table["data"]].reset_index(names="data")
    rest = table.drop(columns="data").reset_index(drop=True)
    return front.join(rest).set_index("data")


def differences(runs: DataFrame, key: str = "") -> DataFrame:
    """Return the comparisons of PAIRS, client by client; key: a setting, at each value of it."""
    if not key:
        asked = {f"{a} - {b}": (a, b) for a, b in PAIRS}
        return described(tables.differences(runs, asked).reset_index())
    labelled = tables.by_settings(runs, ["row", key])
    pairs = {}
    for value in sorted(runs[key].unique()):
        at = f"{key} {value:g}"
        for a, b in PAIRS:
            pairs[f"{a} - {b}", value] = (f"{a}, {at}", f"{b}, {at}")
    table = tables.differences(labelled, pairs).reset_index()
    return described(table.rename(columns={"at": key}))


def averaged(runs: DataFrame) -> DataFrame:
    """Return what means of ten augmentations give over single pictures, with the same clients."""
    data = [*runs["data"].unique()]
    pairs = {}
    for name in data:
        single = f"{name}_val"
        if single in data:
            pairs[name] = (name, single)
    by_data = runs.assign(row=runs["data"], data="all")
    table = tables.differences(by_data, pairs).reset_index()
    return described(table.rename(columns={"pair": "data"}))


def beside(even: DataFrame, released: DataFrame) -> DataFrame:
    """Return ours with SHOTS shots beside all rows of the pFedMoAP paper's Table 1."""
    few = released[released["shots"] == SHOTS]
    ours = pd.concat([few.drop(columns="shots"), even])
    parts = []
    for title, lines in printed().groupby("data set", sort=False):
        own = ours[ours["data set"] == title]
        if len(own):
            parts += [own, lines]
    return pd.concat(parts).rename_axis("data")


def printed() -> DataFrame:
    """Return the paper's Table 1 with the columns of ours."""
    theirs = published().query("paper == @tables.PAPER and table == 'Table 1'")
    variant = theirs["variant"].fillna("")
    table = theirs[["mean", "std"]].assign(seeds=3)
    front = {
        "data set": theirs["dataset"],
        "backbone": theirs["backbone"].str.removeprefix("CLIP "),
        "trained on": "its own pictures, how many is not stated",
        "split": "the paper's",
        "method": "published",
        "row": (theirs["method"] + " " + variant).str.strip(),
    }
    return table.assign(**front).set_index(theirs["dataset"])[[*front, *table]]
