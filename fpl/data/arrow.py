"""Columns of tables in Arrow's stream format, read without Arrow.

A stream is a schema and then batches of rows. Each of these messages has a size, a description in
FlatBuffers, and the buffers that the description tells of. Sources: the Arrow columnar format,
version 1, with Message.fbs and Schema.fbs of apache/arrow; FlatBuffers, internals.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum
from io import BytesIO
from typing import Any

import numpy as np

CONTINUES = 2**32 - 1  # in front of every message since Arrow 0.15
SCHEMA = 1
BATCH = 3


class Kind(IntEnum):
    """What a column holds."""

    NULL = 1
    INT = 2
    FLOAT = 3
    BINARY = 4
    UTF8 = 5
    BOOL = 6
    DECIMAL = 7
    DATE = 8
    TIME = 9
    TIMESTAMP = 10
    INTERVAL = 11
    LIST = 12
    STRUCT = 13
    FIXED_BINARY = 15
    FIXED_LIST = 16
    MAP = 17
    DURATION = 18
    LARGE_BINARY = 19
    LARGE_UTF8 = 20
    LARGE_LIST = 21


FLOATS = ("<f2", "<f4", "<f8")
OFFSETS = {Kind.UTF8: "<i4", Kind.LIST: "<i4", Kind.LARGE_UTF8: "<i8", Kind.LARGE_LIST: "<i8"}
TEXTS = (Kind.UTF8, Kind.LARGE_UTF8)
# buffers of a column in a batch, besides those of its children; of other kinds 2
BUFFERS = {
    Kind.NULL: 0,
    Kind.STRUCT: 1,
    Kind.FIXED_LIST: 1,
    Kind.BINARY: 3,
    Kind.UTF8: 3,
    Kind.LARGE_BINARY: 3,
    Kind.LARGE_UTF8: 3,
}


def read(raw: BytesIO) -> dict[str, np.ndarray]:
    """Return the columns of a stream that are numbers (n,), text (n,) or vectors of floats (n, d).

    Others are left out, and so are columns that lack a value or whose vectors differ in length.
    Raises ValueError, or what struct and indices raise, for what is no such stream or is damaged,
    and for one that is compressed or has dictionaries.
    """
    fields: list[Table] = []
    parts: dict[str, list[np.ndarray | None]] = {}
    for kind, header, body in messages(raw.getbuffer()):
        if kind == SCHEMA:
            fields = header.tables(1)
        elif kind == BATCH:
            batch = Batch(header, body)
            for field in fields:
                parts.setdefault(field.text(0), []).append(batch.column(field))
        else:
            raise ValueError("it has dictionaries")
    columns = {name: joined(found) for name, found in parts.items()}
    return {name: column for name, column in columns.items() if column is not None}


def joined(parts: list[np.ndarray | None]) -> np.ndarray | None:
    """Return a column; None where a part was left out, or they have several widths."""
    found = [part for part in parts if part is not None]
    same = len({part.shape[1:] for part in found}) == 1
    return np.concatenate(found) if same and len(found) == len(parts) else None


def messages(content: memoryview) -> Iterator[tuple[int, Table, memoryview]]:
    """Give kind, description and body of each message."""
    at = 0
    while at < len(content):
        mark, size = struct.unpack_from("<II", content, at)
        if mark != CONTINUES:
            raise ValueError("it is of another format")
        if not size:
            return
        raw = content[at + 8 : at + 8 + size]
        message = Table(raw, struct.unpack_from("<I", raw)[0])
        start = at + 8 + size
        at = start + message.number(3, "<Q")
        if at > len(content):
            raise ValueError("it is cut")
        yield message.number(1, "<B"), message.table(2), content[start:at]


class Table:
    """A table of FlatBuffers: its fields have numbers, and any of them may be missing."""

    def __init__(self, raw: memoryview, at: int):
        self.raw = raw
        self.at = at
        start = at - self.unpack("<i", at)
        size = self.unpack("<H", start)
        self.offsets = struct.unpack_from(f"<{size // 2 - 2}H", raw, start + 4)

    def unpack(self, form: str, place: int) -> int:
        """Return the number at a place."""
        return struct.unpack_from(form, self.raw, place)[0]

    def place(self, field: int) -> int:
        """Return where a field is, 0 where it is missing."""
        offset = self.offsets[field] if field < len(self.offsets) else 0
        return self.at + offset if offset else 0

    def number(self, field: int, form: str) -> int:
        """Return a field that is a number."""
        place = self.place(field)
        return self.unpack(form, place) if place else 0

    def follow(self, place: int) -> int:
        """Return the place to which that at a place refers."""
        return place + self.unpack("<I", place)

    def table(self, field: int) -> Table:
        """Return a field that is a table."""
        return Table(self.raw, self.follow(self.place(field)))

    def vector(self, field: int) -> tuple[int, int]:
        """Return where the entries of a field begin, and how many there are."""
        place = self.place(field)
        if not place:
            return 0, 0
        start = self.follow(place)
        return start + 4, self.unpack("<I", start)

    def tables(self, field: int) -> list[Table]:
        """Return a field that is several tables."""
        start, n = self.vector(field)
        return [Table(self.raw, self.follow(start + 4 * i)) for i in range(n)]

    def pairs(self, field: int) -> Iterator[tuple[int, int]]:
        """Give a field that is several pairs of large numbers."""
        start, n = self.vector(field)
        return struct.iter_unpack("<QQ", self.raw[start : start + 16 * n])

    def text(self, field: int) -> str:
        """Return a field that is text."""
        start, n = self.vector(field)
        return str(self.raw[start : start + n], "utf-8")


class Batch:
    """Some rows of all columns, which are taken in the order of the schema."""

    def __init__(self, header: Table, body: memoryview):
        if header.place(3):
            raise ValueError("it is compressed")
        self.body = body
        self.nodes = header.pairs(1)  # of each column and its children: rows, and how many lack
        self.buffers = header.pairs(2)  # where they begin, and their bytes

    def column(self, field: Table) -> np.ndarray | None:
        """Return the next column, None for one of another kind or with missing values."""
        kind = Kind(field.number(2, "<B"))
        if field.place(4):
            raise ValueError("it has dictionaries")
        rows, missing = next(self.nodes)
        buffers = [next(self.buffers) for _ in range(BUFFERS.get(kind, 2))]
        inner = [self.column(child) for child in field.tables(5)]
        if missing:
            return None
        if kind in (Kind.INT, Kind.FLOAT):
            return self.array(buffers[1], type_of(kind, field.table(3)), rows)
        if kind == Kind.FIXED_LIST:
            width = field.table(3).number(0, "<I")
            return vectors(inner[0], width, rows)
        if kind not in OFFSETS:
            return None
        ends = self.ends(buffers[1], OFFSETS[kind], rows)
        if kind in TEXTS:
            letters = self.array(buffers[2], "u1", ends[-1]).tobytes()
            texts = [letters[a:b].decode() for a, b in zip(ends, ends[1:])]
            return np.array(texts, object)
        widths = {b - a for a, b in zip(ends, ends[1:])}
        if inner[0] is None or len(widths) != 1:
            return None
        return vectors(inner[0][ends[0] :], widths.pop(), rows)

    def ends(self, buffer: tuple[int, int], form: str, rows: int) -> list[int]:
        """Return where each of the entries begins, and where the last one ends."""
        if not rows:
            return [0]
        found = self.array(buffer, form, rows + 1).tolist()
        if found[0] < 0 or sorted(found) != found:
            raise ValueError("its offsets go back")
        return found

    def array(self, buffer: tuple[int, int], form: str, n: int) -> np.ndarray:
        """Return the first n numbers of a buffer."""
        start, size = buffer
        needed = n * np.dtype(form).itemsize
        if needed > size or start + size > len(self.body):
            raise ValueError("it is cut")
        return np.frombuffer(self.body[start : start + needed], form)


def type_of(kind: Kind, said: Table) -> str:
    """Return what NumPy calls a type of numbers."""
    if kind == Kind.FLOAT:
        return FLOATS[said.number(0, "<H")]
    sign = "i" if said.number(1, "<B") else "u"
    size = said.number(0, "<I") // 8
    return f"<{sign}{size}"


def vectors(numbers: Any, width: int, rows: int) -> np.ndarray | None:
    """Return numbers (n d,) as vectors (n, d); None for what is no float, or has no width."""
    if numbers is None or numbers.ndim != 1 or numbers.dtype.kind != "f" or not width:
        return None
    return numbers[: rows * width].reshape(rows, width)
