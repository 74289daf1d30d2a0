"""Values that people write, in params.yaml or on the command line: read, checked, and refused in one sentence. Needs no torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from decimal import Decimal
from typing import Any, TypeVar

import yaml

T = TypeVar("T")


def check_choice(name: str, valid: Iterable[str], what: str) -> str:
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


def several(text: str, where: str) -> list[Any]:
    """The values of 0,1,3 or of first:last[:step], whose last counts in. Raises ValueError for a range that has none."""
    if ":" not in text:
        return [plain(part, where) for part in text.split(",")]
    first, last, step = (Decimal(str(number(part, "float", where))) for part in (text + ":1").split(":")[:3])
    if step <= 0 or last < first:
        raise ValueError(f"{where}={text} has no values: write first:last[:step] with last not below first and step above 0")
    values = [first + i * step for i in range(int((last - first) / step) + 1)]
    return [int(v) if v == int(v) else float(v) for v in values]


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
