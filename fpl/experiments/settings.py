"""Settings: params.yaml and everything that may be changed about one run, checked when read."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import itertools
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt, PositiveInt

from fpl.ablations import ABLATIONS
from fpl.controls import CONTROLS
from fpl.data.partitions import Partition
from fpl.data.world import VERSION, WORLDS
from fpl.experiments import places, values
from fpl.experiments.records import TAKEN
from fpl.experiments.values import build, check_choice, load, of_type, plain
from fpl.methods import METHODS, PromptFL
from fpl.more_methods import MORE
from fpl.released.methods import RELEASED
from fpl.rounds import Training

# Everything in the package that can be a row of a table.
ROWS: dict[str, type[PromptFL]] = METHODS | MORE | RELEASED | CONTROLS | ABLATIONS
# How the names begin under which Python knows files of one's own.
OWN = "fpl_own_"
SEEDS = "seeds"  # how many, said by a table, a row or a method


@dataclass(frozen=True)
class Data:
    """The data set: one of fpl.data.datasets, "own" images, or a drawn demo world.

    name: the worlds are those of fpl.data.world: "shapes" with 30 classes, and "styles" with 12,
    for settings with domains; seed, train_per_class and test_per_class are of them.
    root: the folder of data sets, where `fpl data fetch` puts them; of own data, file or folder.
    layout: of a data set's lists, such as coop or torchvision; by default the first that is there.
    store: name of the features files, if not the data set's: two backbones need two, and so do two
        sets of own data, whose lists it keeps apart, too.
    views: random crops of each training image, of which an epoch sees one after the other; 0: none.
    """

    name: str = "shapes"
    seed: NonNegativeInt = 1
    train_per_class: PositiveInt = 32
    test_per_class: PositiveInt = 40
    root: str = "data/images"
    layout: str = ""
    store: str = ""
    views: NonNegativeInt = 0

    @property
    def folder(self) -> Path:
        return Path("data") / self.name / (self.store if self.name == "own" else "")

    @property
    def manifest(self) -> Path:
        return self.folder / "manifest.csv"

    @property
    def source(self) -> dict[str, Any]:
        """What the images are drawn or listed from, as `source.json` beside them says."""
        drawn = self.name in WORLDS
        names = ["seed", "train_per_class", "test_per_class"] if drawn else ["root", "layout"]
        version = {"drawn_as": VERSION} if drawn else {}
        return version | {name: getattr(self, name) for name in names}

    @property
    def features(self) -> Path:
        return Path("data") / "features" / f"{self.store or self.name}.h5"

    def file(self, content: str) -> Path:
        """Where what is made of images is: pooled features, and beside them patches and views."""
        path = self.features
        return path if content == "feats" else path.with_stem(f"{path.stem}_{content}")


@dataclass(frozen=True)
class Backbone:
    """An open_clip model: "local-dir:FOLDER", or a built-in one with `weights` (a tag or file).

    preprocessing: of images: "" for CLIP's own; cifar10 or cifar100 for what released code does
    with these (D22).
    """

    name: str = "local-dir:data/demo_clip"
    weights: str = ""
    preprocessing: str = ""


@dataclass(frozen=True)
class Source:
    """A data set as a backbone sees it, and how it is split and trained on by default."""

    name: str
    data: Data = field(default_factory=Data)
    backbone: Backbone = field(default_factory=Backbone)
    partition: Partition = field(default_factory=Partition)
    run: Training = field(default_factory=Training)


@dataclass(frozen=True)
class Experiment:
    """One run: a method, how clients train, how data are split, one seed for everything drawn.

    row: the key of the method.
    """

    row: str
    method: PromptFL
    run: Training
    partition: Partition
    seed: int
    source: Source

    def settings(self) -> dict[str, Any]:
        """Return all settings, flat; a record carries them and is found by them."""
        flat = {"method": self.row, "seed": self.seed, "data": self.source.name}
        for part in (self.method, self.run, self.partition):
            flat |= dataclasses.asdict(part)
        return flat


@dataclass(frozen=True)
class Table:
    """The runs behind a table: rows on data sets, with every combination of the values that vary.

    rows: a label to settings, of which `method` says whose row it is (by default the label);
    without rows, all methods and controls. data: names of data sets, or the one of section data.
    set: holds for all rows, under what `methods` says of a row, and `vary` over that; a row that
    lacks a setting of `set` or `vary` goes without. seeds: how many of the file's, 0 for all;
    `methods` and rows may say their own number. keep: what its runs learnt, in files beside their
    records. notebook: the one that shows it.
    """

    rows: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    data: tuple[str, ...] = ()
    set: Mapping[str, Any] = field(default_factory=dict)
    vary: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    seeds: int = 0
    keep: bool = False
    notebook: str = ""


@dataclass(frozen=True)
class Settings:
    """The content of params.yaml.

    results: the folder of tables, figures and executed notebooks. cluster: the address of the Dask
    scheduler whose workers make runs and features; "" for this machine.
    """

    data: Data = field(default_factory=Data)
    backbone: Backbone = field(default_factory=Backbone)
    partition: Partition = field(default_factory=Partition)
    run: Training = field(default_factory=Training)
    datasets: Mapping[str, Source] = field(default_factory=dict)
    seeds: tuple[int, ...] = (1, 2, 3)
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tables: Mapping[str, Table] = field(default_factory=dict)
    results: str = "results"
    cluster: str = ""

    def source(self, name: str = "") -> Source:
        """Return a data set by name; without one, that of section data.

        Raises ValueError for an unknown name.
        """
        name = name or self.data.name
        if name == self.data.name and name not in self.datasets:
            return Source(name, self.data, self.backbone, self.partition, self.run)
        check_choice(name, [*self.datasets, self.data.name], "data set")
        return self.datasets[name]

    def experiment(self, row: str, seed: Any, on: str = "", **changes: Any) -> Experiment:
        """Return one run of a method on a data set, with `changes` over what the file says of it.

        row: a key of ROWS, or FILE.py:CLASS. A changed setting belongs to whatever has it: the
        method, the training or the partition. Numbers may come as text. Raises ValueError for a row
        or a setting that nothing has, naming the nearest one, and for values that cannot be.
        """
        kind = row_class(row)
        wanted = {**self.said(row), **changes}
        valid = sorted(parameter_names(row))
        for key in wanted:
            check_choice(key, valid, f"parameter of {row}")
        source = self.source(on)
        run = dataclasses.asdict(source.run) | kind.training
        return Experiment(
            row=kind.key,
            method=build(kind, part_of(wanted, kind), row),
            run=build(Training, run | part_of(wanted, Training), row),
            partition=build(
                Partition, dataclasses.asdict(source.partition) | part_of(wanted, Partition), row
            ),
            seed=values.seed(seed),
            source=source,
        )

    def contents(self) -> dict[str, set[str]]:
        """Return the data sets of all tables, and what rows read of images: feats, patches."""
        found: dict[str, set[str]] = {}
        for name in self.tables:
            for _, experiment in self.runs(name):
                found.setdefault(experiment.source.name, set()).add(experiment.method.inputs)
        return found

    def tables_of(self, name: str) -> list[str]:
        """Return the tables that a notebook shows, or the one table of that name.

        Raises ValueError for a name that is neither, and for a method among them.
        """
        shown = [table for table, asked in self.tables.items() if asked.notebook == name]
        if name in self.tables:
            return [name]
        if not shown and (name in ROWS or ".py:" in name):
            first = "name it first, without tables"
            raise ValueError(f"the method {name} stands among tables: {first}")
        books = dict.fromkeys(asked.notebook for asked in self.tables.values())
        known = [*self.tables, *books, *ROWS]
        return shown or [check_choice(name, known, "table, notebook or method")]

    def runs(self, table: str) -> list[tuple[str, Experiment]]:
        """Return the runs of a table, each with the label of its row.

        Raises ValueError for an unknown table, row or setting.
        """
        asked = self.tables[check_choice(table, self.tables, "table")]
        rows = asked.rows or {row: {} for row in dict.fromkeys([*self.methods, *CONTROLS])}
        methods = [own.get("method", label) for label, own in rows.items()]
        possible = parameter_names(*ROWS, *methods)
        for key in [*asked.set, *asked.vary]:
            check_choice(key, sorted(possible), f"setting in tables.{table}")
        taken = set().union(*map(self.open_to, methods))
        for key in asked.set:
            if key not in taken:
                fixed = "of its rows, each has none or has it from section methods"
                raise ValueError(f"tables.{table}.set.{key} does nothing: {fixed}: set it in rows")
        check_vary(table, asked.vary, rows)
        found = []
        for on, (label, own) in itertools.product(asked.data or [self.data.name], rows.items()):
            row = own.get("method", label)
            for changed in self.settings_of(asked, row, own):
                first = self.experiment(row, self.seeds[0], on, **changed)
                seeds = self.seeds_of(asked, row, own)
                found += [(label, replace(first, seed=seed)) for seed in seeds]
        return found

    def said(self, row: str) -> dict[str, Any]:
        """Return what section methods says of a row's settings."""
        return {k: v for k, v in self.methods.get(row, {}).items() if k != SEEDS}

    def seeds_of(self, asked: Table, row: str, own: Mapping[str, Any]) -> tuple[int, ...]:
        """Return the seeds of a table's row: all, or as many as row, method or table say."""
        most = own.get(SEEDS) or self.methods.get(row, {}).get(SEEDS) or asked.seeds
        return self.seeds[: int(most) or None]

    def open_to(self, row: str) -> set[str]:
        """Return the settings of a row that neither section methods nor the method itself fixes."""
        return parameter_names(row) - {*self.said(row), *row_class(row).training}

    def settings_of(self, asked: Table, row: str, own: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return what each run of a table's row changes, seeds aside."""
        valid = parameter_names(row)
        taken = self.open_to(row)
        common = {k: v for k, v in asked.set.items() if k in taken}
        changes = {k: v for k, v in own.items() if k not in ("method", SEEDS)}
        varied = {k: listed for k, listed in asked.vary.items() if k in valid}
        every = values.combinations(varied, f"the table's row {row}")
        return [common | changes | chosen for chosen in every]


def check_vary(table: str, vary: Iterable[str], rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ValueError for what varies in no row of a table, or in one that says it itself."""
    possible = parameter_names(*(own.get("method", label) for label, own in rows.items()))
    for key in vary:
        if key not in possible:
            raise ValueError(f"tables.{table}.vary.{key} does nothing: none of its rows has it")
        for label, own in rows.items():
            if key in own:
                twice = f"tables.{table}.rows.{label} sets {key}, which the table varies"
                raise ValueError(f"{twice}: take it out of one of them")


def part_of(values: Mapping[str, Any], cls: type) -> dict[str, Any]:
    """Return those of the values that are fields of a class."""
    return {f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values}


def parameter_names(*rows: str) -> set[str]:
    """Return everything that may be changed about a run of these rows (of any, without one)."""
    kinds = [row_class(row) for row in rows or ROWS]
    return names_of(Training, Partition, *kinds)


def row_class(name: str) -> type[PromptFL]:
    """Return the class of a row: by its key in ROWS, or a class of one's own as FILE.py:CLASS.

    Raises ValueError for an unknown key, file or class, and for a class that is no PromptFL.
    """
    path, colon, cls = str(name).rpartition(":")
    if not (colon and path.endswith(".py")):
        return ROWS[check_choice(name, ROWS, "method")]
    module = own_module(Path(path))
    classes = {k: v for k, v in vars(module).items() if isinstance(v, type)}
    own = classes[check_choice(cls, classes, f"class of {path}")]
    if not issubclass(own, PromptFL):
        raise ValueError(f"{name} is not a subclass of fpl.methods.PromptFL: make it one")
    if "__dataclass_fields__" not in vars(own):
        raise ValueError(f"{name} is no dataclass: write @dataclass(frozen=True) above the class")
    check_key(own)
    of_runs = {"method", "seed", "data"} | TAKEN | names_of(Training, Partition)
    for twice in sorted(of_runs & names_of(own)):
        raise ValueError(f"{name} has a setting {twice}, which every run has: rename it")
    return own


def check_key(kind: type[PromptFL]) -> None:
    """Raise ValueError for a class of one's own whose records would be taken for another's."""
    if ROWS.get(kind.key, kind) is not kind:
        said = f"{kind.__name__} has the key {kind.key} of another row"
        raise ValueError(f'{said}: write key = "NAME" in the class')


def names_of(*kinds: Any) -> set[str]:
    """Return the names of the settings of dataclasses."""
    return {one.name for kind in kinds for one in dataclasses.fields(kind)}


def own_name(path: Path) -> str:
    """Return the name of the module in a file of one's own. Raises ValueError without the file."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}: give FILE.py:CLASS with the file of the method")
    content = hashlib.sha256(f"{path}\0".encode() + path.read_bytes())
    return f"{OWN}{path.stem}_{content.hexdigest()[:8]}"


def own_module(path: Path) -> Any:
    """Return the module in a file of one's own, which is run once.

    It is known to Python under a name made of its path and content, so that worker processes find
    its classes, and that a file that was edited is run again.
    Raises ValueError when there is no such file, or it does not run.
    """
    path = path.resolve()
    name = own_name(path)
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        said = " ".join(str(error).split())
        raise ValueError(f"{path} does not run: {type(error).__name__}: {said}") from error
    return module


def read(path: Path | None = None, changes: Sequence[str] = ()) -> Settings:
    """Return the settings in a file; without one, those of the profile where we stand.

    changes: of the form SECTION.NAME=VALUE, with as many names as it takes, or SECTION=VALUE for a
    list, instead of what the file says; a notebook has those of the command that runs it. Where
    they change the data, results go to a folder of these, unless they name one.
    Raises FileNotFoundError, and ValueError for what is no YAML and for anything in the file that
    would be ignored.
    """
    changes = changes or ([] if path else places.changes())
    path = path or values.profile()
    content = load(path)
    of_file = content.get("data")
    changed = values.assignments(changes, "section.name=value")
    for place, text in changed.items():
        apply(place, text, content)
    sections = [f.name for f in dataclasses.fields(Settings)]
    for key in content:
        check_choice(key, sections, f"section of {path}")
    made: dict[str, Any] = {}
    for key, cls in SECTIONS.items():
        if key in content:
            made[key] = build(cls, content[key], key)
    made["datasets"] = {
        name: source(name, content, own or {}) for name, own in mapping(content, "datasets").items()
    }
    if "seeds" in content:
        made["seeds"] = seeds(content["seeds"])
    for name in ("results", "cluster"):
        if name in content:
            made[name] = of_type(content[name], str, name)
    made["methods"] = {
        row: of_type(own or {}, dict, f"methods.{row}")
        for row, own in mapping(content, "methods").items()
    }
    for row, own in made["methods"].items():
        number_of_seeds(own, f"methods.{row}")
    made["tables"] = tables(mapping(content, "tables"))
    settings = Settings(**made)
    if content.get("data") != of_file and "results" not in changed:
        folder = f"{settings.results}/{settings.data.store or settings.data.name}"
        settings = replace(settings, results=folder)
    for name in ("data.root", "data.layout"):
        if name in changed and settings.data.name in WORLDS:
            world = f"{settings.data.name}, which is drawn"
            raise ValueError(f"{name} does nothing for {world}: set data.name, to own for yours")
    check_stores(settings)
    check_runs(settings, path)
    return settings


def check_runs(settings: Settings, path: Path) -> None:
    """Raise ValueError before the first run where one could not be made or there are too many."""
    for row in settings.methods:
        settings.experiment(row, 1)
    runs = 0
    for name in settings.tables:
        runs += len(settings.runs(name))
        if runs > values.COMBINATIONS:
            raise ValueError(
                f"{path} asks for more than {values.COMBINATIONS} runs: take some away"
            )


SECTIONS = {"data": Data, "backbone": Backbone, "partition": Partition, "run": Training}


# How long the way to a value is that is taken as text, of which `build` knows the type.
TEXT = {**dict.fromkeys(SECTIONS, 2), "results": 1, "cluster": 1, "methods": 3, "datasets": 4}
NAMED = {"datasets": 1, "tables": 2}  # how many names people choose come first


def apply(place: str, text: str, content: dict[str, Any]) -> None:
    """Put a value into the content of a settings file; place: SECTION, or a way to what is in it.

    Raises ValueError for a way through what is no mapping, or is not there.
    """
    section, _, rest = place.partition(".")
    above, name, way = content, section, [section]
    while rest:
        where = ".".join(way)
        above[name] = dict(of_type(above.get(name) or {}, dict, where))  # others may share it
        above = above[name]
        name, rest = step(rest, above)
        if rest and len(way) <= NAMED.get(section, 0):
            check_choice(name, above, f"name in {where}")
        way.append(name)
    above[name] = text if len(way) == TEXT.get(section) else plain(text, place)


def step(way: str, known: Iterable[str]) -> tuple[str, str]:
    """Return the first name of a way and the rest of it; the names of files have dots, too."""
    for name in sorted(known, key=len, reverse=True):
        if f"{way}.".startswith(f"{name}."):
            return name, way[len(name) + 1 :]
    file = re.match(r".*\.py:\w+", way)
    first = file[0] if file else way.partition(".")[0]
    return first, way[len(first) + 1 :]


def mapping(content: Mapping[str, Any], section: str) -> dict[str, Any]:
    """Return a section that is a mapping, or an empty one."""
    return of_type(content.get(section, {}), dict, section)


def number_of_seeds(content: Mapping[str, Any], where: str) -> int:
    """Return how many seeds a table, row or method asks for, 0 for all."""
    number = int(values.number(content.get(SEEDS, 1), "int", f"{where}.{SEEDS}"))
    if number < 1:
        raise ValueError(f"{where}.{SEEDS} is {number}: give how many of the seeds, at least 1")
    return number if SEEDS in content else 0


def seeds(listed: Any) -> tuple[int, ...]:
    """Return the seeds of the section of that name. Raises ValueError unless there is one."""
    found = tuple(values.seed(seed, "seeds") for seed in of_type(listed, list, "seeds"))
    if not found:
        raise ValueError("seeds must name at least one seed")
    if len({*found}) < len(found):
        raise ValueError("seeds name the same seed twice: each is one repetition")
    return found


def source(name: str, content: Mapping[str, Any], own: Any) -> Source:
    """Return a data set: the sections of the whole file, with what its own say in their place.

    One of another `data.name` has a `store` of its own, or none.
    """
    where = f"datasets.{name}"
    for key in of_type(own, dict, where):
        check_choice(key, SECTIONS, f"section of {where}")
    made: dict[str, Any] = {}
    for key, cls in SECTIONS.items():
        changed = of_type(own.get(key, {}), dict, f"{where}.{key}")
        above = dict(content.get(key, {}))
        others = above.get("name", Data.name)
        if key == "data" and changed.get("name", others) != others:
            above.pop("store", None)
        made[key] = build(cls, above | changed, f"{where}.{key}")
    data = made["data"]
    root = content.get("data", {}).get("root")
    if data.name == "own" and data.root != root and not data.store:
        made["data"] = replace(data, store=name)
    return Source(name, **made)


def check_stores(settings: Settings) -> None:
    """Raise ValueError for two data sets whose features would replace each other's."""
    kept: dict[Path, tuple[str, Any]] = {}
    for name in dict.fromkeys([settings.data.name, *settings.datasets]):
        source = settings.source(name)
        made_of = replace(source.data, views=0), source.backbone
        other, others = kept.setdefault(source.data.features, (name, made_of))
        if others != made_of:
            raise ValueError(
                f"the data sets {other} and {name} keep different features in "
                f"{source.data.features}: give one of them a `store` of its own"
            )


def tables(section: Mapping[str, Any]) -> dict[str, Table]:
    """Return all notebooks' tables by name. Raises ValueError for a name that stands twice."""
    found: dict[str, Table] = {}
    for notebook, shown in section.items():
        where = f"tables.{notebook}"
        for name, content in of_type(shown or {}, dict, where).items():
            if name in found:
                raise ValueError(
                    f"{where}.{name} stands under {found[name].notebook} too: rename one"
                )
            found[name] = table(content or {}, f"{where}.{name}", notebook)
    return found


def table(content: Any, where: str, notebook: str = "") -> Table:
    """Return a table from plain values; rows may be a list of methods.

    Raises ValueError for wrong names and types.
    """
    for key in of_type(content, dict, where):
        check_choice(key, ["rows", "data", "set", "vary", "keep", SEEDS], f"part of {where}")
    rows = content.get("rows", {})
    if isinstance(rows, list):
        rows = dict.fromkeys(of_type(row, str, f"{where}.rows") for row in rows)
    for label, own in of_type(rows, dict, f"{where}.rows").items():
        own = of_type(own or {}, dict, f"{where}.rows.{label}")
        of_type(own.get("method", ""), str, f"{where}.rows.{label}.method")
        number_of_seeds(own, f"{where}.rows.{label}")
    data = of_type(content.get("data", []), list, f"{where}.data")
    vary = of_type(content.get("vary", {}), dict, f"{where}.vary")
    return Table(
        rows={label: own or {} for label, own in rows.items()},
        data=tuple(of_type(on, str, f"{where}.data") for on in data),
        set=of_type(content.get("set", {}), dict, f"{where}.set"),
        vary={k: of_type(listed, list, f"{where}.vary.{k}") for k, listed in vary.items()},
        seeds=number_of_seeds(content, where),
        keep=of_type(content.get("keep", False), bool, f"{where}.keep"),
        notebook=notebook,
    )
