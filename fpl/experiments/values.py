"""Values that people write, in settings files or on the command line: read, checked, refused.

A refusal is a ValueError of one sentence that says where, what, and what to do. Needs no torch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")
# Above this many choices, a refusal lists the nearest only.
LISTED = 16


def check_choice(name: str, valid: Iterable[str], what: str) -> str:
    """Return `name` if it is valid. Raises ValueError with the nearest valid name otherwise."""
    valid = list(valid)
    if name in valid:
        return name
    near = difflib.get_close_matches(str(name), valid, n=8, cutoff=0.0)
    if not near:
        raise ValueError(f"unknown {what} {name!r}")
    listed = valid
    if len(valid) > LISTED:
        listed = [*near, f"{len(valid) - len(near)} others"]
    raise ValueError(
        f"unknown {what} {name!r}: did you mean {near[0]!r}? (there are {', '.join(listed)})"
    )


def of_type(value: Any, kind: type[T], where: str) -> T:
    """Return `value` if it is of this type. Raises ValueError otherwise."""
    if not isinstance(value, kind):
        raise ValueError(f"{where} must be of type {kind.__name__}, not {value!r}")
    return value


def plain(text: str, where: str) -> Any:
    """Return what YAML makes of a text. Raises ValueError when it is none."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None


def load(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    What the file names as `over` is a file beneath it, of which it says only what differs: mappings
    are merged, other values replaced, and null takes away what stands there.
    """
    content = of_type(plain(path.read_text(), str(path)) or {}, dict, str(path))
    if "over" not in content:
        return content
    beneath = path.parent / of_type(content.pop("over"), str, f"{path}: over")
    return merge(load(beneath), content)


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
    """Return the values of 0,1,3 or of first:last[:step], whose last counts in.

    Raises ValueError for a range that has none.
    """
    if ":" not in text:
        return [plain(part, where) for part in text.split(",")]
    bounds = [Decimal(str(number(part, "float", where))) for part in text.split(":")]
    first, last, step = [*bounds, Decimal(1)][:3]
    if step <= 0 or last < first:
        raise ValueError(
            f"{where}={text} has no values: "
            "write first:last[:step] with last not below first and step above 0"
        )
    values = [first + i * step for i in range(int((last - first) / step) + 1)]
    return [int(value) if value == int(value) else float(value) for value in values]


def number(value: Any, kind: str, where: str) -> int | float:
    """Return a number of kind "int" or "float"; 1e-3, which YAML reads as text, will do.

    Raises ValueError for anything else, a truth value or a fraction for an int among it.
    """
    wrong = ValueError(f"{where} must be of type {kind}, not {value!r}")
    if isinstance(value, bool):
        raise wrong
    try:
        exact = float(value)
        if kind == "float":
            return exact
        if exact == int(exact):
            return int(exact)
    except (TypeError, ValueError, OverflowError):
        pass
    raise wrong


def build(cls: type[T], values: Any, where: str) -> T:
    """Return a settings object from plain values, checked by the types of its fields.

    Raises ValueError naming the setting: unknown, of another type, or out of its range.
    """
    known = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    for key, value in of_type(values, dict, where).items():
        check_choice(key, known, f"parameter in {where}")
        if isinstance(value, bool):
            raise ValueError(f"{where}.{key} must be a number or a word, not {value!r}")
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        raise ValueError(sentence(error, where)) from None


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
        return f"{name} must be of type {kind}, not {value!r}"
    must = first["msg"].removeprefix("Input should be ")
    return f"{name} must be {must}, not {value!r}"
