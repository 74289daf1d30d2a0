"""Matrices of numbers from MATLAB's files, read without a library that a damaged file can crash.

Version 5 of the format, which MATLAB writes unless asked for another: elements one behind the
other, each with its type and size in front.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fpl.data.pictures import content as content_of

SIZE = 2**25  # bytes of a file, and of what it unpacks to
HEADER = 128  # bytes of text, version and byte order in front
NUMBERS = {
    **{1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4"},
    **{7: "f4", 9: "f8", 12: "i8", 13: "u8"},
}
MATRIX, COMPRESSED = 14, 15


def read(path: Path) -> dict[str, np.ndarray]:
    """Read the matrices of a file by their names; texts, cells and structures are left out.

    Raises OSError for a file that cannot be opened, and ValueError naming it for a damaged one and
    for one of another version.
    """
    try:
        content = content_of(path, SIZE)
        order = {b"IM": "<", b"MI": ">"}[content[126:HEADER]]
        return dict(matrices(content[HEADER:], order))
    except (KeyError, IndexError, struct.error, zlib.error, ValueError) as e:
        reason = e if isinstance(e, ValueError) else "damaged or of another version"
        raise ValueError(f"{path} is not read as a file of MATLAB 5: {reason}") from e


def matrices(content: bytes, order: str) -> Iterator[tuple[str, np.ndarray]]:
    """Give names and values of the matrices of real numbers; "<" or ">" is the order of bytes."""
    for kind, data in elements(unpacked(content, order), order):
        parts = list(elements(data, order)) if kind == MATRIX else []
        if len(parts) == 4 and parts[3][0] in NUMBERS:  # flags, sides, name, numbers
            sides = np.frombuffer(parts[1][1], f"{order}i4")
            numbers = np.frombuffer(parts[3][1], order + NUMBERS[parts[3][0]])
            yield parts[2][1].decode("ascii"), numbers.reshape(sides, order="F")


def unpacked(content: bytes, order: str) -> bytes:
    """Put what compressed elements hold in their place. Raises ValueError beyond SIZE in all."""
    whole = bytearray()
    for kind, data in elements(content, order):
        if kind == COMPRESSED:
            unpacking = zlib.decompressobj()
            whole += unpacking.decompress(data, SIZE)
            if not unpacking.eof or len(whole) > SIZE:
                raise ValueError(f"it is cut, or unpacks to more than {SIZE} bytes")
        else:
            whole += struct.pack(f"{order}II", kind, len(data)) + data + bytes(-len(data) % 8)
    return bytes(whole)


def elements(content: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """Give type and data of each element; those of at most four bytes are beside their size."""
    at = 0
    while at < len(content):
        kind, size = struct.unpack_from(f"{order}II", content, at)
        start = at + 8
        if kind >> 16:
            kind, size, start = kind & 0xFFFF, kind >> 16, at + 4
        if start + size > len(content):
            raise ValueError("it is cut")
        yield kind, content[start : start + size]
        at = start + size
        if kind != COMPRESSED:
            at += -at % 8
