"""Pickles of others, read without running anything that they name.

Arrays, strings, numbers and containers are read, everything else is refused. Nothing of NumPy is
called while a pickle is read. What it says about arrays is kept as data and made into arrays
afterwards, from element types that hold no pointers, so that a forged array cannot read or write
memory either. Shared values are counted as often as they are met, so that a short pickle cannot
stand for more than memory or time allow.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fpl.data.pictures import content as content_of

SIZE = 2**28  # bytes of a pickle; CIFAR-100 has 155 MB
STEPS = 2**21  # instructions of a pickle; CIFAR-100 has some 250,000
YIELD = 2**29  # bytes of what it stands for, with VALUE for each value
VALUE = 256
DEPTH = 50  # of values within values
PUTS = ("PUT", "BINPUT", "LONG_BINPUT")
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

    Raises ValueError that names what was refused, also for a damaged file and beyond the limits
    above.
    """
    try:
        content = content_of(path, SIZE)
        check_steps(content)
        reader = Reader(io.BytesIO(content), encoding="latin1")
        return reader.plain(reader.load())
    except OSError:
        raise
    except Exception as e:  # a damaged or hostile pickle can fail in any way
        reason = " ".join(str(e).split()) or type(e).__name__
        raise ValueError(
            f"{path} is not read, for it is no pickle of arrays and strings: {reason}"
        ) from e


def check_steps(content: bytes) -> None:
    """Raise ValueError for too many instructions and for sizes that the pickle does not have.

    Nothing is made of them yet. A place in the memo is reserved with all places before it.
    """
    for step, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        if step >= STEPS:
            raise ValueError(f"it has more than {STEPS} instructions")
        if opcode.name in PUTS and not 0 <= int(argument or 0) <= step:
            raise ValueError(f"it uses place {argument} of its memo at instruction {step}")


class Reader(pickle.Unpickler):
    """An unpickler that admits the names of arrays and bytes only.

    Strings, numbers, lists, tuples and dicts need no name in a pickle.
    """

    spent = 0  # of YIELD

    def find_class(self, module: str, name: str) -> Any:
        wanted = f"{module}.{name}"
        if wanted in ARRAYS:
            return partial(Stored, name)
        if wanted in BYTES:
            return partial(self.to_bytes)  # a new one each time: a pickle can change it
        raise ValueError(f"it asks for {wanted}")

    def spend(self, size: int) -> None:
        """Count a value. Raises ValueError beyond YIELD."""
        self.spent += VALUE + size
        if self.spent > YIELD:
            raise ValueError(f"it stands for more than {YIELD} bytes")

    def to_bytes(self, text: str | bytes = "", encoding: str = "latin1") -> bytes:
        """Bytes that a pickle holds as text, as Python 2 and early protocols do."""
        self.spend(len(text))
        return text.encode("latin1") if isinstance(text, str) else text

    def plain(self, x: Any, depth: int = 0) -> Any:
        """Put arrays in the place of their descriptions.

        Raises ValueError for what is not allowed and beyond the limits.
        """
        self.spend(len(x) if isinstance(x, str | bytes) else 0)
        if depth > DEPTH:
            raise ValueError(f"it has values within values, more than {DEPTH} deep")
        inner = partial(self.plain, depth=depth + 1)
        if isinstance(x, Stored):
            return x.value(self.to_bytes, inner)
        if isinstance(x, list | tuple):
            return type(x)(map(inner, x))
        if isinstance(x, dict):
            return {inner(key): inner(value) for key, value in x.items()}
        if x is None or isinstance(x, str | bytes | int | float):
            return x
        raise ValueError(f"it holds a {type(x).__name__}")


class Stored:
    """A NumPy object as a pickle describes it: the arguments of its making and its state."""

    def __init__(self, kind: str, *arguments: Any):
        self.kind = kind
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def value(self, to_bytes: Callable[[Any], bytes], plain: Callable[[Any], Any]) -> Any:
        """The array or number that is described; both functions are the reader's."""
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
