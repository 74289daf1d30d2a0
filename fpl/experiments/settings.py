"""Settings: params.yaml and everything that may be changed about one run, checked when read."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fpl.controls import CONTROLS, GateAlone
from fpl.data.partitions import Partition
from fpl.experiments.values import check_choice, number, of_type, plain
from fpl.methods import METHODS, PromptFL
from fpl.released.methods import RELEASED
from fpl.rounds import Training

T = TypeVar("T")
# everything that can be a row of a table
ROWS: dict[str, type[PromptFL]] = METHODS | RELEASED | CONTROLS | {"gate_alone": GateAlone}
PARAMS = Path("params.yaml")


@dataclass(frozen=True)
class Data:
    """The data set: one of fpl.datasets, "own" images, or a drawn demo world with its seed and size.

    The worlds are those of fpl.shapes: "shapes" with 48 classes, and "styles" with 12, for settings with domains.
    """

    name: str = "shapes"
    seed: int = 1
    train_per_class: int = 32
    test_per_class: int = 40
    root: str = "data/images"  # the folder of data sets, where `fpl data fetch` puts them; of own data the CSV file or folder
    layout: str = ""  # of a data set's lists, such as coop or torchvision; by default the first that is there
    store: str = ""  # name of the features files, if not the data set's: two backbones need two
    views: int = 0  # seeded random crops of each training image, of which an epoch sees one after the other; 0: the image itself

    @property
    def folder(self) -> Path:
        return Path("data") / self.name

    @property
    def manifest(self) -> Path:
        return self.folder / "manifest.csv"

    @property
    def features(self) -> Path:
        return Path("data") / "features" / f"{self.store or self.name}.h5"

    @property
    def patches(self) -> Path:
        return self.features.with_stem(f"{self.features.stem}_patches")

    @property
    def views_file(self) -> Path:
        return self.features.with_stem(f"{self.features.stem}_views")


@dataclass(frozen=True)
class Backbone:
    """An open_clip model name, "local-dir:FOLDER" or a built-in one with `weights` (a tag or a file)."""

    name: str = "local-dir:data/demo_clip"
    weights: str = ""
    preprocessing: str = ""  # of images: "" for CLIP's own; cifar10 or cifar100 for what released code does with these (D22)


@dataclass(frozen=True)
class Source:
    """A data set as a backbone sees it, and how it is split and trained on where a table says nothing else."""

    name: str
    data: Data = field(default_factory=Data)
    backbone: Backbone = field(default_factory=Backbone)
    partition: Partition = field(default_factory=Partition)
    run: Training = field(default_factory=Training)


@dataclass(frozen=True)
class Experiment:
    """One run: a method with its hyperparameters, how clients train, how data are split, one seed for everything drawn."""

    row: str
    method: PromptFL
    run: Training
    partition: Partition
    seed: int
    source: Source

    def settings(self) -> dict[str, Any]:
        """All settings, flat and ready for JSON; a record carries them and is found by them."""
        parts = (dataclasses.asdict(part) for part in (self.method, self.run, self.partition))
        named = {"method": self.row, "seed": self.seed, "data": self.source.name}
        return named | {k: v for part in parts for k, v in part.items()}


@dataclass(frozen=True)
class Table:
    """The runs behind a table: its rows on each of its data sets, with every combination of the values that it varies.

    `rows` maps a label to settings, of which `method` says whose row it is (by default the label); without rows, all methods and
    controls. `data` are names of data sets; without any, the one of section data. `set` holds for all rows, under what `methods`
    says of a row; a row that lacks a setting of `set` or `vary` goes without.
    """

    rows: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    data: tuple[str, ...] = ()
    set: Mapping[str, Any] = field(default_factory=dict)
    vary: Mapping[str, Sequence[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """The content of params.yaml. `results` is the folder of tables, figures and executed notebooks."""

    data: Data = field(default_factory=Data)
    backbone: Backbone = field(default_factory=Backbone)
    partition: Partition = field(default_factory=Partition)
    run: Training = field(default_factory=Training)
    datasets: Mapping[str, Source] = field(default_factory=dict)
    seeds: tuple[int, ...] = (1, 2, 3)
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tables: Mapping[str, Table] = field(default_factory=dict)
    results: str = "results"

    def source(self, name: str = "") -> Source:
        """A data set by name; without one, that of section data. Raises ValueError for an unknown name."""
        if name in ("", self.data.name) and name not in self.datasets:
            return Source(self.data.name, self.data, self.backbone, self.partition, self.run)
        return self.datasets[check_choice(name, [*self.datasets, self.data.name], "data set")]

    def experiment(self, row: str, seed: int, on: str = "", **changes: Any) -> Experiment:
        """One run of a row on a data set, `changes` over what params.yaml says of the method; a key belongs to whatever has it.

        Raises ValueError for a row or a key that nothing has, naming the nearest one that exists.
        """
        valid, wanted = sorted(parameter_names(row)), {**self.methods.get(row, {}), **changes}
        for key in wanted:
            check_choice(key, valid, f"parameter of {row}")
        source = self.source(on)
        pick = lambda cls: {f.name: wanted[f.name] for f in dataclasses.fields(cls) if f.name in wanted}  # noqa: E731
        method = build(ROWS[row], pick(ROWS[row]), row)
        run = build(Training, dataclasses.asdict(source.run) | ROWS[row].run | pick(Training), row)
        partition = build(Partition, dataclasses.asdict(source.partition) | pick(Partition), row)
        return Experiment(row, method, run, partition, seed, source)

    def contents(self) -> dict[str, set[str]]:
        """The data sets of all tables, and what of their images the rows read: feats, patches."""
        found: dict[str, set[str]] = {}
        for name in self.tables:
            for _, experiment in self.runs(name):
                found.setdefault(experiment.source.name, set()).add(experiment.method.inputs)
        return found

    def runs(self, table: str) -> list[tuple[str, Experiment]]:
        """The runs of a table, each with the label of its row. Raises ValueError for an unknown table, row or setting."""
        asked = self.tables[check_choice(table, self.tables, "table")]
        rows = asked.rows or {row: {} for row in dict.fromkeys([*self.methods, *CONTROLS])}
        for key in [*asked.set, *asked.vary]:
            check_choice(key, sorted(parameter_names()), f"setting in tables.{table}")
        found = []
        for on, (label, own) in itertools.product(asked.data or [self.data.name], rows.items()):
            row, changes = own.get("method", label), {key: value for key, value in own.items() if key != "method"}
            valid, said = parameter_names(row), self.methods.get(row, {})
            common = {key: value for key, value in asked.set.items() if key in valid and key not in said}
            varied = {key: values for key, values in asked.vary.items() if key in valid}
            for values in itertools.product(*varied.values()):
                settings = {**common, **changes, **dict(zip(varied, values, strict=True))}
                found += [(label, self.experiment(row, seed, on, **settings)) for seed in self.seeds]
        return found


def parameter_names(row: str | None = None) -> set[str]:
    """Everything that may be changed about a run of this table row (of any): fields of its method, of Run and of Partition."""
    owners = ([ROWS[check_choice(row, ROWS, "method")]] if row else [*ROWS.values()]) + [Training, Partition]
    return {f.name for owner in owners for f in dataclasses.fields(owner)}


def build(cls: type[T], values: Any, where: str) -> T:
    """A settings object from plain values: names and types are checked, 1e-3 may come as text. Raises ValueError."""
    fields = {f.name: str(f.type) for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    made = {}
    for key, value in of_type(values, dict, where).items():
        kind = fields[check_choice(key, fields, f"parameter in {where}")]
        made[key] = number(value, kind, f"{where}.{key}") if kind in ("int", "float") else of_type(value, str, f"{where}.{key}")
    return cls(**made)


def read(path: Path = PARAMS, changes: Sequence[str] = ()) -> Settings:
    """Raises FileNotFoundError, or ValueError for what is no YAML and for anything in the file that would be ignored.

    `changes` are of the form SECTION.NAME=VALUE, or SECTION=VALUE for a list, and replace what the file says.
    """
    content = of_type(plain(path.read_text(), str(path)), dict, str(path))
    for change in changes:
        place, equals, value = change.partition("=")
        section, _, name = place.partition(".")
        if not equals:
            raise ValueError(f"{change!r} is not of the form section.name=value, such as data.name=flowers102")
        whole = {name: plain(value, place)} if name else plain(value, place)
        content[section] = of_type(content.get(section) or {}, dict, section) | whole if name else whole
    for key in content:
        check_choice(key, [f.name for f in dataclasses.fields(Settings)], f"section of {path}")
    made: dict[str, Any] = {key: build(cls, content[key], key) for key, cls in SECTIONS.items() if key in content}
    made["datasets"] = {
        name: source(name, content, own or {}) for name, own in of_type(content.get("datasets", {}), dict, "datasets").items()
    }
    if "seeds" in content:
        if content["seeds"] == []:
            raise ValueError("seeds must name at least one seed")
        made["seeds"] = tuple(number(seed, "int", "seeds") for seed in of_type(content["seeds"], list, "seeds"))
    methods = of_type(content.get("methods", {}), dict, "methods")
    made["methods"] = {name: of_type(v, dict, f"methods.{name}") for name, v in methods.items()}
    made["tables"] = {
        name: table(v or {}, f"tables.{name}") for name, v in of_type(content.get("tables", {}), dict, "tables").items()
    }
    if "results" in content:
        made["results"] = of_type(content["results"], str, "results")
    params = Settings(**made)
    for row in params.methods:  # a wrong name or type anywhere is found now, not after an hour
        params.experiment(row, 1)
    for name in params.tables:
        params.runs(name)
    return params


SECTIONS = {"data": Data, "backbone": Backbone, "partition": Partition, "run": Training}


def source(name: str, content: Mapping[str, Any], own: Any) -> Source:
    """The data set of that name: the sections of the whole file, with what its own say in their place."""
    for key in of_type(own, dict, f"datasets.{name}"):
        check_choice(key, SECTIONS, f"section of datasets.{name}")
    merged = {key: {**content.get(key, {}), **of_type(own.get(key, {}), dict, f"datasets.{name}.{key}")} for key in SECTIONS}
    return Source(name, **{key: build(cls, merged[key], f"datasets.{name}.{key}") for key, cls in SECTIONS.items()})


def table(content: Any, where: str) -> Table:
    """A table from plain values; rows may be a list of methods. Raises ValueError for wrong names and types."""
    for key in of_type(content, dict, where):
        check_choice(key, [f.name for f in dataclasses.fields(Table)], f"part of {where}")
    rows = content.get("rows", {})
    rows = dict.fromkeys(rows, {}) if isinstance(rows, list) else of_type(rows, dict, f"{where}.rows")
    rows = {str(label): of_type(own or {}, dict, f"{where}.rows.{label}") for label, own in rows.items()}
    vary = of_type(content.get("vary", {}), dict, f"{where}.vary")
    vary = {key: of_type(values, list, f"{where}.vary.{key}") for key, values in vary.items()}
    data = tuple(of_type(content.get("data", []), list, f"{where}.data"))
    return Table(rows, data, of_type(content.get("set", {}), dict, f"{where}.set"), vary)
