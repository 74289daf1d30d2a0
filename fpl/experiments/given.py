"""Images that somebody gives to what a run learnt: found, decoded and encoded as those of runs."""

from __future__ import annotations

import glob
import io
import re
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from fpl.data import extraction, pictures
from fpl.data.datasets import own
from fpl.experiments.values import check_choice
from fpl.prompts import Clip

Source: TypeAlias = Path | Image.Image
Given: TypeAlias = str | Path | Image.Image
# Paths, folders, patterns such as holiday/*.jpg, pictures of Pillow; or several of these.
Images: TypeAlias = Given | Sequence[Given] | Iterator[Given]
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def gather(images: Images) -> list[Source]:
    """Return the single images that are meant. Raises ValueError for what is none, or a URL."""
    several = isinstance(images, Sequence | Iterator | Set) and not isinstance(images, str | bytes)
    found: list[Source] = []
    for image in images if several else [images]:  # type: ignore[union-attr]
        if isinstance(image, Image.Image):
            found.append(image)
        elif isinstance(image, str | Path):
            found += paths_of(str(image))
        else:
            kinds = "a path, a folder, a pattern or a picture of Pillow"
            raise ValueError(f"an image is {kinds}, not {type(image).__name__}: save it as a file")
    if not found:
        raise ValueError("there is no image among those that are given: name one")
    return found


def paths_of(text: str) -> list[Path]:
    """Return the files that a path, the name of a folder or a pattern stands for."""
    if URL.match(text):
        raise ValueError(f"{text} is a URL: download the image and give the path of its file")
    path = Path(text)
    if path.is_dir():
        return pictures_in(path)
    if path.exists() or not glob.has_magic(text):
        return [path]
    found = [Path(name) for name in sorted(glob.glob(text, recursive=True))]
    if not found:
        raise FileNotFoundError(f"no file is called as {text} says: correct the pattern")
    return [file for one in found for file in (pictures_in(one) if one.is_dir() else [one])]


def pictures_in(folder: Path) -> list[Path]:
    """Return all pictures below a folder, sorted; warn of other files. Hidden ones are none."""
    below = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    files = sorted(path for path in below if "/." not in f"/{path}")
    own.tell(folder, [p for p in files if not pictures.is_picture(p)], "not called as pictures are")
    found = [folder / path for path in files if pictures.is_picture(path)]
    if not found:
        raise FileNotFoundError(f"{folder} has no pictures: name another folder")
    return found


def name_of(image: Source, number: int) -> str:
    """Return what an image is called in a table."""
    if isinstance(image, Image.Image):
        return str(getattr(image, "filename", "")) or f"image {number}"
    return str(image)


def labelled(folder: str | Path, classes: Sequence[str]) -> tuple[list[Source], list[int]]:
    """Return images in folders CLASS/FILE and their labels, sorted by path.

    Underscores in class names are spaces. Raises FileNotFoundError without the folder, and
    ValueError for other classes or other folders.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}: give one with images in CLASS/FILE")
    labels = {name.replace("_", " "): label for label, name in enumerate(classes)}
    rows = sorted(own.read_folder(root))
    for row in rows:
        if len(Path(row.path).parts) != 2:
            raise ValueError(f"{root} has {row.path}: images must be in CLASS/FILE here")
        check_choice(row.name.replace("_", " "), labels, f"class in {root}")
    found = [labels[row.name.replace("_", " ")] for row in rows]
    return [root / row.path for row in rows], found


def pixels_of(image: Source, clip: Clip, upright: bool) -> Float[Tensor, "3 s s"] | str:
    """Return an image as the tower takes it, or why it cannot be read."""
    try:
        content = pictures.content(image) if isinstance(image, Path) else as_file(image)
        return clip.transform(pictures.decode(content, upright))
    except Exception as error:  # Pillow and transforms have all kinds for what is no good image
        return extraction.reason_of(error)


def as_file(image: Image.Image) -> bytes:
    """Return the PNG file of a picture. Raises OSError for colours that PNG does not have."""
    file = io.BytesIO()
    image.save(file, "PNG", exif=image.getexif())
    return file.getvalue()


@torch.no_grad()
def encode(
    images: Sequence[Source], clip: Clip, content: str, upright: bool
) -> tuple[Float[Tensor, "read *M d"], list[str]]:
    """Return features of images that can be read, and for each image why it cannot, or "".

    They are those of `fpl features`, up to the last bit of half precision, which depends on the
    batch. content: feats, of unit length, or patches. upright: see `pictures.decode`.
    Raises ValueError for a model without an image tower, or with one that has no patches.
    """
    if getattr(clip.model, "visual", None) is None:
        raise ValueError("this CLIP has no image tower: load it with one, by `fpl.load`")
    device = extraction.device_of(clip)
    size = extraction.BATCH[device.type]
    parts = [torch.zeros(0)]
    reasons: list[str] = []
    for first in range(0, len(images), size):
        seen = [pixels_of(image, clip, upright) for image in images[first : first + size]]
        reasons += [x if isinstance(x, str) else "" for x in seen]
        pixels = [x for x in seen if isinstance(x, Tensor)]
        if pixels:
            parts.append(extraction.encode(clip, torch.stack(pixels), content).cpu())
    x = torch.cat(parts[1:] or parts)
    # as fpl.data.features.load does it
    return (F.normalize(x.float(), dim=-1) if content == "feats" else x).to(device), reasons


def require_read(images: Sequence[Source], reasons: Sequence[str]) -> None:
    """Raise OSError where images cannot be read."""
    bad = [f"{image} ({why})" for image, why in zip(images, reasons, strict=True) if why]
    if bad:
        first = ", ".join(bad[:3] + [".."] * (len(bad) > 3))
        found = f"{len(bad)} of {len(images)} images cannot be read: {first}"
        raise OSError(f"{found}; repair them or take them away")
