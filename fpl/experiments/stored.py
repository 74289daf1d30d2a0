"""Tensors by name in one safetensors file, with a header of JSON and a checksum of everything.

Tensors may stand in dictionaries within dictionaries; in the file their names are paths.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fpl.data.files import atomic_write
from fpl.experiments.records import UNFIT, Damaged

Nested: TypeAlias = Mapping[str, Any]  # of tensors, or of more of the same

HEADER = "fpl"
CHECKSUM = "sha256"


class Foreign(Damaged):
    """A whole file of safetensors that this module has not written."""


def write(path: Path, tensors: Nested, header: Mapping[str, Any]) -> None:
    """Write tensors, wherever they live, and what JSON can hold of them, under a temporary name.

    Raises ValueError for a name with a "/" in it.
    """
    flat = dict(flatten(tensors))
    text = json.dumps({**header, CHECKSUM: checksum(flat, header)}, sort_keys=True)
    with atomic_write(path) as temporary:
        # a single entry: the order of several would be chance
        temporary.write_bytes(save(flat, {HEADER: text}))


def read(path: Path, device: str = "cpu") -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the tensors, in dictionaries as they were written, and the header.

    Empty dictionaries are not written. Raises FileNotFoundError when there is no file, Damaged for
    one that was cut or has changed, and Foreign for one that is none of ours.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}")
    try:
        with safe_open(path, "pt", "cpu") as file:
            header = json.loads((file.metadata() or {}).get(HEADER, "{}"))
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        told = header.pop(CHECKSUM, None)
        whole = told is None or told == checksum(flat, header)
    except (SafetensorError, *UNFIT):
        whole = False
    if not whole:
        raise Damaged(f"{path} is damaged")
    if told is None:
        raise Foreign(f"{path} is damaged")
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *folders, last = name.split("/")
        place = nested
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = value.to(device)
    return nested, header


def flatten(tensors: Nested, above: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor under its path, as the file takes it: contiguous, and with no other.

    Raises ValueError for a name that would be a path.
    """
    check_names(tensors)
    for name, value in tensors.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{above}{name}/")
        else:
            copied = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            yield f"{above}{name}", copied


def check_names(tensors: Nested) -> None:
    """Raise ValueError for a name that would be a path."""
    for name in tensors:
        if "/" in name:
            raise ValueError(f"a tensor is called {name!r}, which a file cannot hold: rename it")


def checksum(flat: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    """Return the hash of names, types, shapes and numbers of tensors, and of the header."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, value in sorted(flat.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
