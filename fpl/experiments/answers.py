"""What clients said of their test images after the last round, as a record keeps it.

So metrics (fpl.experiments.metrics) need no second run. Reading needs no torch.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy import ndarray
from pandas import DataFrame

from fpl.experiments import records
from fpl.experiments.records import UNFIT, Damaged

if TYPE_CHECKING:
    from torch import Tensor

    from fpl.rounds import Answers
    from fpl.state import Clients

LEVELS = 255  # a confidence is kept in so many steps, hence to 1 / 510
TYPES = {"|u1", "<u2", "<u4"}  # as numpy calls them: unsigned, of one, two and four bytes
MOST = 10**8  # images; a file that says more is after memory
AGAIN = "make the run again with --fresh"
NO_CLASS = "(no class)"  # what rows with more columns than classes may say, such as fedpgp_two


def pack(answers: Sequence[Answers], clients: Clients) -> dict[str, Any]:
    """Return what JSON can hold of every client's answers on its test images.

    `label`, `predicted` and `confidence` have the images of all clients, one client after the other
    and as in its part of `clients.test`; `sizes` says how many are whose. On the demo an image
    takes 0.3 to 2.2 bytes, the most where answers are unsure and wrong in many ways.

    Raises ValueError for answers that are not those of these clients, and for a confidence that is
    no number.
    """
    label = joined([clients.labels[index] for index in clients.test])
    predicted = joined([found.predicted for found in answers])
    right = joined([found.right for found in answers])
    if len(label) != len(predicted) or np.any((label == predicted) != right):
        raise ValueError("the answers are of other images than the clients': give those of the run")
    levels = np.rint(LEVELS * joined([found.confidence for found in answers]))
    if not np.all((levels >= 0) & (levels <= LEVELS)):
        raise ValueError("a confidence is no number in [0, 1]: a logit is infinite or nan")
    parts = {"label": label, "predicted": predicted, "confidence": levels}
    sizes = [len(index) for index in clients.test]
    return {"sizes": sizes} | {name: squeezed(values) for name, values in parts.items()}


def joined(parts: Sequence[Tensor]) -> ndarray:
    """Return tensors, wherever they live, as one array."""
    return np.concatenate([part.numpy(force=True) for part in parts])


def squeezed(values: ndarray) -> dict[str, str]:
    """Return whole numbers of at least 0, in the smallest type that holds them, as text."""
    kind = np.min_scalar_type(int(values.max())).newbyteorder("<")
    content = zlib.compress(values.astype(kind).tobytes(), 9)
    return {"dtype": kind.str, "zlib": base64.b64encode(content).decode()}


def unpack(packed: Mapping[str, Any]) -> DataFrame:
    """Return a line per client and test image: client, label, predicted, confidence and right.

    The lines of a client stand in the order of its part of `clients.test`. predicted: the number of
    a class, or of a column beyond the classes in rows that have such (fedpgp_two).

    Raises Damaged for what `pack` did not make.
    """
    try:
        sizes = packed["sizes"]
        natural = all(type(size) is int and size > 0 for size in sizes)
        n = sum(sizes) if natural else 0
        if not 0 < n <= MOST:
            raise Damaged(f"the answers' sizes are not numbers of images up to {MOST}: {AGAIN}")
        names = ("label", "predicted", "confidence")
        label, predicted, levels = (expanded(packed[name], n) for name in names)
    except Damaged:
        raise
    except (zlib.error, *UNFIT):
        raise Damaged(f"the answers are not built as a record's are: {AGAIN}") from None
    if levels.max() > LEVELS:
        raise Damaged(f"an answer's confidence is above {LEVELS}: {AGAIN}")
    return DataFrame(
        {
            "client": np.repeat(np.arange(len(sizes)), sizes),
            "label": label.astype(int),
            "predicted": predicted.astype(int),
            "confidence": levels / LEVELS,
            "right": predicted == label,
        }
    )


def expanded(part: Mapping[str, str], n: int) -> ndarray:
    """Return the n numbers that `squeezed` made text of; no more than these are unpacked."""
    if part["dtype"] not in TYPES:
        raise Damaged(f"the answers are numbers of a type that is not known: {AGAIN}")
    kind = np.dtype(part["dtype"])
    wanted = n * kind.itemsize
    unpacker = zlib.decompressobj()
    content = unpacker.decompress(base64.b64decode(part["zlib"], validate=True), wanted + 1)
    if len(content) != wanted or not unpacker.eof or unpacker.unused_data:
        raise Damaged(f"the answers are not {n} numbers, as their sizes say: {AGAIN}")
    return np.frombuffer(content, kind)


def read(path: Path) -> DataFrame:
    """Return the answers of a record, as `unpack` does.

    Raises FileNotFoundError where there is no record, and ValueError for one of before answers were
    kept, and for one whose answers are damaged or are not those behind its accuracy.
    """
    record = records.read(path)
    if "answers" not in record:
        raise ValueError(f"{path} was made before predictions were kept: {AGAIN}")
    try:
        frame = unpack(record["answers"])
        stored = record["rounds"][-1]["accuracy"]
        names = record["classes"]
        own = frame.groupby("client")["right"].mean()
        pairs = zip(own, stored, strict=True)
        close = all(math.isclose(a, b, abs_tol=1e-5) for a, b in pairs)
        same = close and frame["label"].max() < len(names)
    except Damaged as error:
        raise Damaged(f"{path}: {error}") from None
    except UNFIT:
        same = False
    if not same:
        raise Damaged(f"{path} has answers that are not those of its accuracy: {AGAIN}")
    return frame
