"""Settings: params.yaml and everything that may be changed about one run, checked when read."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from fpl.controls import CONTROLS
from fpl.methods import METHODS, PromptFL
from fpl.partitions import Partition
from fpl.released import RELEASED
from fpl.rounds import Run

T = TypeVar("T")
ROWS: dict[str, type[PromptFL]] = METHODS | RELEASED | CONTROLS  # everything that can be a row of a table
PARAMS = Path("params.yaml")


@dataclass(frozen=True)
class Data:
    """The data set: "shapes", the drawn demo world, with its seed and size; one of fpl.datasets; or "own" images."""

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


@dataclass(frozen=True)
class Experiment:
    """One run: a method with its hyperparameters, how clients train, how data are split, one seed for everything drawn."""

    row: str
    method: PromptFL
    run: Run
    partition: Partition
    seed: int

    def settings(self) -> dict[str, Any]:
        """All settings, flat and ready for JSON; a record carries them and is found by them."""
        parts = (dataclasses.asdict(part) for part in (self.method, self.run, self.partition))
        return {"method": self.row, "seed": self.seed} | {k: v for part in parts for k, v in part.items()}


@dataclass(frozen=True)
class Params:
    """The content of params.yaml."""

    data: Data = field(default_factory=Data)
    backbone: Backbone = field(default_factory=Backbone)
    partition: Partition = field(default_factory=Partition)
    run: Run = field(default_factory=Run)
    seeds: tuple[int, ...] = (1, 2, 3)
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    ablations: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def experiment(self, row: str, seed: int, **changes: Any) -> Experiment:
        """One run of a table row, `changes` over what params.yaml says of the method; a key belongs to whatever has it.

        Raises ValueError for a row or a key that nothing has, naming the nearest one that exists.
        """
        valid, wanted = sorted(parameter_names(row)), {**self.methods.get(row, {}), **changes}
        for key in wanted:
            known(key, valid, f"parameter of {row}")
        pick = lambda cls: {f.name: wanted[f.name] for f in dataclasses.fields(cls) if f.name in wanted}  # noqa: E731
        method = build(ROWS[row], pick(ROWS[row]), row)
        run = build(Run, dataclasses.asdict(self.run) | ROWS[row].run | pick(Run), row)
        partition = build(Partition, dataclasses.asdict(self.partition) | pick(Partition), row)
        return Experiment(row, method, run, partition, seed)

    def table(self) -> list[Experiment]:
        """The runs of the miniature Table 1: every method and every control with every seed."""
        return [self.experiment(row, seed) for row in dict.fromkeys([*self.methods, *CONTROLS]) for seed in self.seeds]

    def ablation(self, only: str | None = None) -> list[Experiment]:
        """The runs of pFedMoAP with one hyperparameter changed, for each value listed under `ablations` (or for `only` one)."""
        listed = self.ablations if only is None else {only: self.ablations[only]}
        return [
            self.experiment("pfedmoap", seed, **{key: v}) for key, values in listed.items() for v in values for seed in self.seeds
        ]


def parameter_names(row: str | None = None) -> set[str]:
    """Everything that may be changed about a run of this table row (of any): fields of its method, of Run and of Partition."""
    owners = ([ROWS[known(row, ROWS, "method")]] if row else [*ROWS.values()]) + [Run, Partition]
    return {f.name for owner in owners for f in dataclasses.fields(owner)}


def known(name: str, valid: Iterable[str], what: str) -> str:
    """`name` if it is valid. Raises ValueError with the nearest valid name otherwise."""
    valid = list(valid)
    if name not in valid:
        near = difflib.get_close_matches(str(name), valid, n=8, cutoff=0.0)
        listed = valid if len(valid) <= 16 else [*near, f"{len(valid) - len(near)} others"]
        raise ValueError(
            f"unknown {what} {name!r}: did you mean {near[0]!r}? (there are {', '.join(listed)})"
            if near
            else f"unknown {what} {name!r}"
        )
    return name


def build(cls: type[T], values: Any, where: str) -> T:
    """A settings object from plain values: names and types are checked, 1e-3 may come as text. Raises ValueError."""
    fields = {f.name: str(f.type) for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    made = {}
    for key, value in of_type(values, dict, where).items():
        kind = fields[known(key, fields, f"parameter in {where}")]
        made[key] = number(value, kind, f"{where}.{key}") if kind in ("int", "float") else of_type(value, str, f"{where}.{key}")
    return cls(**made)


def of_type(value: Any, kind: type[T], where: str) -> T:
    if not isinstance(value, kind):
        raise ValueError(f"{where} must be of type {kind.__name__}, not {value!r}")
    return value


def plain(text: str, where: str) -> Any:
    """What YAML makes of a text. Raises ValueError when it is none."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None


def number(value: Any, kind: str, where: str) -> int | float:
    """PyYAML reads 1e-3 as text, so text that is a number will do; a truth value or a fraction for an int will not."""
    try:
        if isinstance(value, bool):
            raise ValueError
        exact = float(value)
        if kind == "int" and not exact.is_integer():
            raise ValueError
        return exact if kind == "float" else int(exact)
    except (TypeError, ValueError):
        raise ValueError(f"{where} must be of type {kind}, not {value!r}") from None


def read(path: Path = PARAMS, changes: Sequence[str] = ()) -> Params:
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
        known(key, [f.name for f in dataclasses.fields(Params)], f"section of {path}")
    made: dict[str, Any] = {
        key: build(cls, content[key], key)
        for key, cls in {"data": Data, "backbone": Backbone, "partition": Partition, "run": Run}.items()
        if key in content
    }
    if "seeds" in content:
        if content["seeds"] == []:
            raise ValueError("seeds must name at least one seed")
        made["seeds"] = tuple(number(seed, "int", "seeds") for seed in of_type(content["seeds"], list, "seeds"))
    for key, kind in (("methods", dict), ("ablations", list)):
        made[key] = {name: of_type(v, kind, f"{key}.{name}") for name, v in of_type(content.get(key, {}), dict, key).items()}
    params = Params(**made)
    params.table()  # a wrong name or type anywhere is found now, not after an hour
    params.ablation()
    return params
