"""Whether images are still those that features were made from: by size and time, then by content.

`seen.json` beside a manifest says "SIZE TIME SHA256" of each image as it was last read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from fpl.data import pictures
from fpl.data.files import atomic_write
from fpl.data.manifest import Manifest

UNREAD = "-"  # in the place of the hash of what cannot be read


def read(path: Path) -> tuple[str, bytes]:
    """Read an image's file: what is seen of it, and its content. Raises as `pictures.content`."""
    before = stamp(path)
    content = pictures.content(path)
    return f"{before} {hashlib.sha256(content).hexdigest()}", content


def stamp(path: Path) -> str:
    """Give size in bytes and time of change in ns of a file. Raises OSError if there is none."""
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def is_unchanged(path: Path, seen: str) -> bool:
    """Say whether a file has still the size and time with which it was seen."""
    try:
        return seen.startswith(f"{stamp(path)} ")
    except OSError:
        return not seen


def look(manifest: Manifest, known: Mapping[str, str]) -> dict[str, str]:
    """Say of all images of a manifest what is seen now, "" of one that is not there.

    known: what was seen before; an image is read only if it has another size or time.
    """
    now = {}
    for name in sorted({*(row["path"] for row in manifest.rows), *manifest.skipped}):
        path = manifest.folder / name
        now[name] = known.get(name, "")
        if not is_unchanged(path, now[name]):
            now[name] = look_again(path)
    return now


def look_again(path: Path) -> str:
    """Say what is seen of one image."""
    try:
        return read(path)[0]
    except (OSError, ValueError):
        return f"{stamp(path)} {UNREAD}" if path.exists() else ""


def content_of(seen: Mapping[str, str]) -> dict[str, str]:
    """Give the hash of each image's content."""
    return {name: said.rpartition(" ")[2] for name, said in seen.items()}


def summary(seen: Mapping[str, str]) -> str:
    """Hash the contents of all images; sizes and times, which differ by machine, are no part."""
    return hashlib.sha256(json.dumps(content_of(seen), sort_keys=True).encode()).hexdigest()


def recall(folder: Path) -> dict[str, str]:
    """Read what was seen of the images of a manifest in `folder`; nothing from a damaged file."""
    try:
        found = json.loads((folder / "seen.json").read_bytes())
        return {str(name): str(said) for name, said in found.items()}
    except (FileNotFoundError, ValueError, AttributeError, RecursionError):
        return {}


def remember(folder: Path, seen: Mapping[str, str]) -> None:
    """Write down what was seen of the images of a manifest in `folder`."""
    with atomic_write(folder / "seen.json") as temporary:
        temporary.write_text(json.dumps(seen, indent=0) + "\n")
