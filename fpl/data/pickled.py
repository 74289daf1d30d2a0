"""Pickles of others, read without running anything that they name.

Arrays, strings, numbers and containers are read, everything else is refused. Nothing of NumPy is
called while a pickle is read. What it says about arrays is kept as data and made into arrays
afterwards, from element types that hold no pointers, so that a forged array cannot read or write
memory either.
"""

from __future__ import annotations

import io
import pickle
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

ARRAYS = (
    "numpy.ndarray",
    "numpy.dtype",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
)
BYTES = ("_codecs.encode", "builtins.bytes", "__builtin__.bytes")  # in protocols before 3


def read(path: Path) -> Any:
    """Read what is pickled in a file; strings of Python 2 become str.

    Raises ValueError that names what was refused, also for a damaged file.
    """
    content = io.BytesIO(path.read_bytes())
    try:
        return plain(Reader(content, encoding="latin1").load())
    except Exception as e:  # a damaged or hostile pickle can fail in any way
        raise ValueError(
            f"{path} is not read, for it is no pickle of arrays and strings: {e}"
        ) from e


class Reader(pickle.Unpickler):
    """An unpickler that admits the names of arrays and bytes only.

    Strings, numbers, lists, tuples and dicts need no name in a pickle.
    """

    def find_class(self, module: str, name: str) -> Any:
        wanted = f"{module}.{name}"
        if wanted in ARRAYS:
            return partial(Stored, name)
        if wanted in BYTES:
            return partial(to_bytes)  # a new one each time: a pickle can change what it is given
        raise ValueError(f"it asks for {wanted}")


def to_bytes(text: str | bytes = "", encoding: str = "latin1") -> bytes:
    """Bytes that a pickle holds as text, as Python 2 and early protocols do."""
    return text.encode("latin1") if isinstance(text, str) else text


class Stored:
    """A NumPy object as a pickle describes it: the arguments of its making and its state."""

    def __init__(self, kind: str, *arguments: Any):
        self.kind = kind
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def value(self) -> Any:
        """The array or number that is described."""
        if self.kind == "scalar":
            dtype, content = self.arguments
            return np.frombuffer(to_bytes(content), element(dtype))[0].item()
        if self.kind != "_reconstruct" or not self.state:
            raise ValueError(f"it holds a bare {self.kind}")
        _, shape, dtype, fortran, content = self.state
        if isinstance(content, list):  # of objects
            flat = np.empty(len(content), object)
            flat[:] = [plain(item) for item in content]
        else:
            flat = np.frombuffer(to_bytes(content), element(dtype))
        return flat.reshape(shape, order="F" if fortran else "C")


def element(stored: Stored) -> np.dtype:
    """The type of an array's elements: numbers, booleans and strings of fixed width.

    Its code and byte order is all that is taken over.
    """
    code = stored.arguments[0]
    order = stored.state[1] if stored.state else "|"
    if not re.fullmatch(r"[biufSU]\d+", code) or order not in ("<", ">", "|", "="):
        raise ValueError(f"it has elements of type {code!r}")
    return np.dtype(code).newbyteorder(order)


def plain(x: Any) -> Any:
    """Put arrays in the place of their descriptions. Raises ValueError for what is not allowed."""
    if isinstance(x, Stored):
        return x.value()
    if isinstance(x, list | tuple):
        return type(x)(map(plain, x))
    if isinstance(x, dict):
        return {plain(key): plain(value) for key, value in x.items()}
    if x is None or isinstance(x, str | bytes | int | float):
        return x
    raise ValueError(f"it holds a {type(x).__name__}")
