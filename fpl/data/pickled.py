"""Pickles of others, read without running anything that they name: arrays, strings, numbers and containers, or a refusal.

Nothing of NumPy is called while a pickle is read. What it says about arrays is kept as data and made into arrays afterwards, from
element types that hold no pointers, so that a forged array cannot read or write memory either.
"""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np

NUMPY = {("numpy", "ndarray"), ("numpy", "dtype")} | {
    (f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")
}


def read(path: Path) -> Any:
    """What is pickled in `path`, Python 2 strings as str. ValueError names what was refused, also for a damaged file."""
    try:
        return plain(Reader(io.BytesIO(path.read_bytes()), encoding="latin1").load())
    except OSError:
        raise
    except Exception as e:  # a damaged or hostile pickle can fail in any way
        raise ValueError(f"{path} is not read, for it is no pickle of arrays and strings: {e}") from e


class Stored:
    """A NumPy object as a pickle describes it: the arguments of its making and its state."""

    def __init__(self, kind: str, arguments: tuple):
        self.kind, self.arguments, self.state = kind, arguments, None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class Reader(pickle.Unpickler):
    """Strings, numbers, lists, tuples and dicts need no name in a pickle; of names, arrays and bytes only are admitted."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in NUMPY:
            return lambda *arguments: Stored(name, arguments)
        if (module, name) == ("_codecs", "encode"):  # bytes, in protocols before 3
            return lambda text, encoding: text.encode("latin1")
        if (module, name) in (("builtins", "bytes"), ("__builtin__", "bytes")):  # empty bytes, in the same
            return lambda: b""
        raise ValueError(f"it asks for {module}.{name}")


def plain(x: Any) -> Any:
    if isinstance(x, list | tuple):
        return type(x)(plain(v) for v in x)
    if isinstance(x, dict):
        return {plain(k): plain(v) for k, v in x.items()}
    if not isinstance(x, Stored):
        if x is None or isinstance(x, str | bytes | int | float):
            return x
        raise ValueError(f"it holds a {type(x).__name__}")
    if x.kind == "scalar":
        return np.frombuffer(as_bytes(x.arguments[1]), element(x.arguments[0]))[0].item()
    if x.kind != "_reconstruct" or not x.state:
        raise ValueError(f"it holds a bare {x.kind}")
    _, shape, dtype, fortran, content = x.state
    if isinstance(content, list):  # of objects
        flat = np.empty(len(content), object)
        flat[:] = [plain(v) for v in content]
    else:
        flat = np.frombuffer(as_bytes(content), element(dtype))
    return flat.reshape(shape, order="F" if fortran else "C")


def element(stored: Stored) -> np.dtype:
    """Whole numbers, floats, booleans and strings of fixed width; b1, i4, S10 .. and a byte order is all that is taken over."""
    code, order = stored.arguments[0], stored.state[1] if stored.state else "|"
    if not re.fullmatch(r"[biufSU]\d+", code) or order not in ("<", ">", "|", "="):
        raise ValueError(f"it has elements of type {code!r}")
    return np.dtype(code).newbyteorder(order)


def as_bytes(content: str | bytes) -> bytes:
    return content.encode("latin1") if isinstance(content, str) else content  # a string where Python 2 wrote it
