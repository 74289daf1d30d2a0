"""Values that people write, in settings files, notebooks or on the command line: read or refused.

Settings files are YAML 1.2, as DVC reads them: 010 is ten; yes, 1:30 and dates are text. What is
typed for a setting comes as text, of which `build` makes what the setting's type says.
A refusal is a ValueError of one sentence that says where, what, and what to do. Needs no torch.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from ruamel.yaml import YAML, YAMLError
from ruamel.yaml.composer import Composer, ComposerError
from ruamel.yaml.constructor import ConstructorError, SafeConstructor
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, NodeEvent
from ruamel.yaml.nodes import MappingNode, ScalarNode
from ruamel.yaml.parser import Parser, ParserError
from ruamel.yaml.tag import Tag

from fpl.data.pictures import content

T = TypeVar("T")
# A profile is a folder with one of these: what differs from other settings, or all.
PROFILES = (Path("profile.yaml"), Path("params.yaml"))
# Above this many choices, a refusal lists the nearest only.
LISTED = 16
# What a settings file may be: nobody's is a tenth of it.
CHARACTERS = 100_000
NODES = 100_000  # with every alias written out
DEPTH = 20
DIGITS = 20
# What a number of things may be, and a seed, for which some generators have 32 bits.
COUNT = 10**6
SEED = 2**32 - 1
COMBINATIONS = 10_000
TAG = "tag:yaml.org,2002:"


def check_choice(name: str, valid: Iterable[str], what: str) -> str:
    """Return `name` if it is valid. Raises ValueError with the nearest valid name otherwise."""
    valid = list(valid)
    if name in valid:
        return name
    near = difflib.get_close_matches(str(name)[:80], valid, n=8, cutoff=0.0)
    if not near:
        raise ValueError(f"unknown {what} {shown(name)}")
    listed = valid
    if len(valid) > LISTED:
        listed = [*near, f"{len(valid) - len(near)} others"]
    raise ValueError(
        f"unknown {what} {shown(name)}: did you mean {near[0]!r}? (there are {', '.join(listed)})"
    )


def of_type(value: Any, kind: type[T], where: str) -> T:
    """Return `value` if it is of this type. Raises ValueError otherwise."""
    if not isinstance(value, kind):
        raise ValueError(f"{where} must be of type {kind.__name__}, not {shown(value)}")
    return value


def shown(value: Any) -> str:
    """Return a value as Python writes it, in a length that fits into a sentence."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


class Bounded(Parser):
    """Reads YAML in bounded time and memory, whatever aliases and nesting it has."""

    def __init__(self, loader: Any) -> None:
        super().__init__(loader)
        self.nodes = 0
        self.opened: list[tuple[str, int]] = []  # anchors, and the nodes that were before them
        self.sizes: dict[str, int] = {}  # of what stands under an anchor that is closed

    def get_event(self) -> Any:
        """Return the next event. Raises ParserError when there would be too much."""
        event = super().get_event()
        anchor = getattr(event, "anchor", None) or ""
        if isinstance(event, AliasEvent):
            self.nodes += self.sizes.get(anchor, NODES)
        elif isinstance(event, CollectionEndEvent):
            anchor, before = self.opened.pop()
            self.sizes[anchor] = self.nodes - before
        elif isinstance(event, NodeEvent):
            self.nodes += 1
            self.sizes[anchor] = 1
            if isinstance(event, CollectionStartEvent):
                self.opened.append((anchor, self.nodes - 1))
                self.sizes.pop(anchor)
        if self.nodes > NODES or len(self.opened) > DEPTH:
            most = f"at most {NODES} values are read, {DEPTH} deep, with all aliases written out"
            raise ParserError(None, None, most, event.start_mark)
        return event


class Names(Composer):
    """Takes the keys of mappings as the text that stands there, each once."""

    warn_double_anchors = False

    def compose_mapping_node(self, anchor: Any) -> MappingNode:
        node = super().compose_mapping_node(anchor)
        found = set()
        for key, _ in node.value:
            if not isinstance(key, ScalarNode):
                raise ComposerError(None, None, "a name must be text", key.start_mark)
            if key.value in found:
                twice = f"{key.value!r} stands there twice: leave one"
                raise ComposerError(None, None, twice, key.start_mark)
            found.add(key.value)
            if key.tag != f"{TAG}merge":
                key.ctag = Tag(suffix=f"{TAG}str")
        return node


class Core(SafeConstructor):
    """Makes numbers, truth values, text, lists and mappings, and nothing else."""

    def construct_yaml_int(self, node: Any) -> int:
        if len(node.value) > DIGITS:
            most = f"a number has at most {DIGITS} digits"
            raise ConstructorError(None, None, most, node.start_mark)
        return super().construct_yaml_int(node)


Core.yaml_constructors = {
    f"{TAG}null": Core.construct_yaml_null,
    f"{TAG}bool": Core.construct_yaml_bool,
    f"{TAG}int": Core.construct_yaml_int,
    f"{TAG}float": Core.construct_yaml_float,
    f"{TAG}str": Core.construct_yaml_str,
    f"{TAG}timestamp": Core.construct_yaml_str,
    f"{TAG}seq": Core.construct_yaml_seq,
    f"{TAG}map": Core.construct_yaml_map,
    None: Core.construct_undefined,
}


def plain(text: str, where: str) -> Any:
    """Return what YAML makes of a text. Raises ValueError when it is none, or far too much."""
    reader = YAML(typ="safe", pure=True)
    reader.Parser, reader.Composer, reader.Constructor = Bounded, Names, Core
    try:
        if len(text) > CHARACTERS:
            raise ValueError(f"it has more than {CHARACTERS} characters")
        return reader.load(text)
    except (YAMLError, ValueError, LookupError) as error:  # the last for !!bool x
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        line = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{where}{line} is not valid YAML: {problem}") from None


def profile() -> Path:
    """Return the settings file of the profile where we stand.

    Raises FileNotFoundError where there is none.
    """
    for path in PROFILES:
        if path.exists():
            return path
    raise FileNotFoundError(
        f"there is no {' and no '.join(map(str, PROFILES))} in {Path.cwd()}: "
        "go to the project's folder, where one is"
    )


def load(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    What the file names as `over` is a file beneath it, of which it says only what differs: mappings
    are merged, other values replaced, and null takes away what stands there.
    Raises OSError for a file that cannot be opened and ValueError for one that is no such mapping.
    """
    try:
        text = content(path).decode("utf-8-sig")
    except ValueError as error:
        raise ValueError(f"{path} is no file of settings: {error}") from None
    found = plain(text, str(path))
    if found is None:
        raise ValueError(f"{path} is empty: write settings there, or {{}} for the defaults")
    if "over" not in of_type(found, dict, str(path)):
        return found
    beneath = path.parent / of_type(found.pop("over"), str, f"{path}: over")
    if beneath.resolve() in above:
        raise ValueError(f"{path} lies over {beneath}, which lies over it: correct `over`")
    return merge(load(beneath, (*above, beneath.resolve())), found)


def merge(beneath: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return one mapping over another; null takes away."""
    merged = dict(beneath)
    for key, value in above.items():
        under = merged.get(key)
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict) and isinstance(under, dict):
            merged[key] = merge(under, value)
        else:
            merged[key] = value
    return merged


def several(text: str, where: str) -> list[Any]:
    """Return the values of 0,1,3, as text, or of the range first:last[:step], whose last counts in.

    Raises ValueError for a range that has none, or far too many.
    """
    if not re.fullmatch(r"[-+.\d][^:,]*(:[-+.\d][^:,]*){1,2}", text):
        return [part.strip() for part in text.split(",")] if "," in text else [text]
    bounds = [Decimal(str(number(part, "float", where))) for part in text.split(":")]
    first, last, step = [*bounds, Decimal(1)][:3]
    if step <= 0 or last < first:
        raise ValueError(
            f"{where}={text} has no values: "
            "write first:last[:step] with last not below first and step above 0"
        )
    if (last - first) / step >= COMBINATIONS:
        raise ValueError(f"{where}={text} has more than {COMBINATIONS} values: take a larger step")
    values = [first + i * step for i in range(int((last - first) / step) + 1)]
    return [int(value) if value == int(value) else float(value) for value in values]


def combinations(lists: Mapping[str, Sequence[Any]], where: str) -> Iterator[dict[str, Any]]:
    """Return every combination of a value of each list, by name.

    Raises ValueError when there are far too many.
    """
    n = math.prod(map(len, lists.values()))
    if n > COMBINATIONS:
        most = f"at most {COMBINATIONS} are made at once"
        raise ValueError(f"{where} asks for {n} combinations of values: {most}")
    return (dict(zip(lists, chosen)) for chosen in itertools.product(*lists.values()))


def assignments(texts: Sequence[str], form: str) -> dict[str, str]:
    """Return name -> text of texts such as lam=1.

    Raises ValueError for one without "=", and for a name that is given twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ValueError(f"{shown(text)} is not of the form {form}")
        if name in found:
            raise ValueError(f"{name} is given twice, as {found[name]!r} and {value!r}: leave one")
        found[name] = value
    return found


def number(value: Any, kind: str, where: str) -> int | float:
    """Return a finite number of kind "int" or "float"; 1e-3, also as text, will do.

    Raises ValueError for anything else, a truth value or a fraction for an int among it.
    """
    wrong = ValueError(f"{where} must be of type {kind}, not {shown(value)}")
    if isinstance(value, bool):
        raise wrong
    try:
        exact = float(value)
        if kind == "float" and math.isfinite(exact):
            return exact
        if exact == int(exact):
            return int(exact)
    except (TypeError, ValueError, OverflowError):
        pass
    raise wrong


def seed(value: Any, where: str = "seed") -> int:
    """Return a seed. Raises ValueError unless it is a whole number of 32 bits, not below 0."""
    found = int(number(value, "int", where))
    if not 0 <= found <= SEED:
        raise ValueError(f"{where} must be from 0 to {SEED}, not {shown(value)}")
    return found


def build(cls: type[T], values: Any, where: str) -> T:
    """Return a settings object from plain values, checked by the types of its fields.

    Raises ValueError naming the setting: unknown, of another type, or out of its range, which for
    any number ends somewhere.
    """
    known = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    switches = {field.name for field in fields(cls) if field.type in (bool, "bool")}  # type: ignore[arg-type]
    for key, value in of_type(values, dict, where).items():
        check_choice(key, known, f"parameter in {where}")
        if isinstance(value, bool) and key not in switches:
            raise ValueError(f"{where}.{key} must be a number or a word, not {value!r}")
    try:
        made = checked(cls).validate_python(values)  # type: ignore[arg-type]
    except ValidationError as error:
        raise ValueError(sentence(error, where)) from None
    for name in known:
        check_size(getattr(made, name), f"{where}.{name}")
    return made


@functools.cache
def checked(cls: Any) -> TypeAdapter:
    """Return what checks the values of a class; making it takes longer than one use."""
    return TypeAdapter(cls)


def check_size(value: Any, where: str) -> None:
    """Raise ValueError for a number that nobody can mean."""
    if isinstance(value, int) and where.endswith("seed"):
        seed(value, where)
    elif isinstance(value, int) and abs(value) > COUNT:
        raise ValueError(f"{where} must be at most {COUNT}, not {shown(value)}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} must be a finite number, not {value}")


# What pydantic's types of error are about, in words.
KINDS = {"int": "int", "float": "float", "string": "str", "finite": "float"}


def sentence(error: ValidationError, where: str) -> str:
    """Return the first of pydantic's complaints as one sentence."""
    first = error.errors()[0]
    value = first["input"]
    context = first.get("ctx", {})
    if first["type"] == "value_error":  # a class's own words
        return f"{where}: {context['error']}"
    name = f"{where}.{first['loc'][0]}"
    words = re.findall(r"'([^']*)'", context.get("expected", ""))
    if words:
        try:
            check_choice(value, words, f"value of {name}")
        except ValueError as refusal:
            return str(refusal)
    kind = KINDS.get(first["type"].split("_")[0])
    if kind:
        quotes = ": put it in quotes" if kind == "str" else ""
        return f"{name} must be of type {kind}, not {shown(value)}{quotes}"
    must = first["msg"].removeprefix("Input should be ")
    return f"{name} must be {must}, not {shown(value)}"
