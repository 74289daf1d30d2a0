"""Pictures are read from files that may be anything, in bounded time and memory.

What cannot be a picture is refused with a reason and never opened by a program. A file with several
pictures gives its first. Colours come out as Pillow converts them to RGB, without colour profiles.
"""

from __future__ import annotations

import io
import os
import re
import stat
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

# Rasters only: Pillow would hand PostScript to another program, whatever the name of its file.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM", "AVIF")
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".avif", ".gif"}
    | {".tif", ".tiff", ".ppm", ".pgm", ".pnm"}
)
SIZE = 2**29  # bytes of a picture's file
PIXELS = 89 * 10**6  # of a picture; decoding takes up to 20 bytes for each
SCANS = 100  # of a JPEG: each goes over all pixels, and ten are usual
SCAN, END = b"\xff\xda", b"\xff\xd9"  # markers of a JPEG
MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")  # those that are followed by their length
RATIO = 100  # of the sides; with the short one at 224 pixels the long one makes memory
BITS, PHOTOMETRIC, MIN_IS_WHITE = 258, 262, 0  # tags of TIFF, and a value of the second


def is_picture(path: Path) -> bool:
    """Say whether a file is called as pictures are."""
    return path.suffix.lower() in SUFFIXES


def content(path: Path, most: int = SIZE) -> bytes:
    """Read a file, of at most so many bytes; others' lists are read by this too.

    Raises OSError for one that cannot be opened, and ValueError for what is no file (a pipe, a
    device, a socket, a folder) and for one that is too large.
    """
    check_kind(path.stat())
    # not blocking: another may have put a pipe in its place
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with open(descriptor, "rb") as f:
        check_kind(os.fstat(descriptor))
        found = f.read(most + 1)
    if len(found) > most:
        raise ValueError(f"it has more than {most} bytes")
    return found


def check_kind(status: os.stat_result) -> None:
    """Raise ValueError unless a path is a file's."""
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is a folder, pipe, socket or device and not a file")


def decode(content: bytes, upright: bool = False) -> Image.Image:
    """Decode a picture to RGB with 8 bits; more bits are scaled from the range of their type.

    upright: turned as its EXIF tag says, and put on white where it is transparent. CLIP's own
        transform does neither, and numbers in papers are made so.

    Raises ValueError and OSError for what is no picture or damaged, for too many pixels, for a
    shape too long and for values whose range is unknown.
    """
    try:
        return decode_rasters(content, upright)
    except (OSError, ValueError, MemoryError):
        raise
    except Exception as e:  # Pillow has all kinds for a damaged file
        raise ValueError(f"it is damaged: {e}") from e


def decode_rasters(content: bytes, upright: bool) -> Image.Image:
    """Decode a picture as `decode` does. Raises whatever Pillow has."""
    try:
        opened = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError(
            f"it is no picture in a format that is read: {', '.join(FORMATS)}"
        ) from None
    except Image.DecompressionBombError:
        raise ValueError(f"it has more than {PIXELS} pixels") from None
    with opened as image:
        check_shape(*image.size)
        if isinstance(image, JpegImageFile) and scans_of(content) > SCANS:
            raise ValueError(f"it goes over its pixels more than {SCANS} times")
        image.load()
        if upright:
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith(("I", "F")):
            return to_eight_bits(image).convert("RGB")
        if upright and image.has_transparency_data:
            above = image.convert("RGBA")
            ground = Image.new("RGBA", above.size, "white")
            return Image.alpha_composite(ground, above).convert("RGB")
        return image.convert("RGB")


def scans_of(content: bytes) -> int:
    """Count the scans of a JPEG up to the end of its picture: phones put films behind it."""
    most = content.count(SCAN)
    if most <= SCANS:
        return most
    scans, at = 0, 2
    while (found := MARKER.search(content, at)) and found[0] != END:
        scans += found[0] == SCAN
        at = found.end() + int.from_bytes(content[found.end() : found.end() + 2])
    return scans


def check_shape(width: int, height: int) -> None:
    """Raise ValueError for a picture that would take too much memory, by itself or resized."""
    if width * height > PIXELS:
        raise ValueError(f"it has {width} x {height} pixels, more than {PIXELS}")
    if max(width, height) > RATIO * min(width, height):
        raise ValueError(f"it has {width} x {height} pixels, one side {RATIO} times the other")


def to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale greyscale of 12 or 16 bits, or of floats from 0 to 1, to 0 .. 255.

    Raises ValueError for values whose range is unknown.
    """
    tags = getattr(image, "tag_v2", {})
    values = np.asarray(image).astype(np.float32)
    if image.mode.startswith("I;16"):
        values /= 2 ** tags.get(BITS, (16,))[0] - 1
    elif image.mode == "I" and image.format == "PPM":  # Pillow has scaled it to 16 bits
        values /= 65535
    elif image.mode != "F":
        raise ValueError(
            "it has whole numbers of unknown range: save it with 8 or 16 bits, unsigned"
        )
    if not (values.min() >= 0 and values.max() <= 1):  # also for what is not a number
        raise ValueError(
            "it has floats outside 0 .. 1, whose range is unknown: save it with 8 bits"
        )
    if tags.get(PHOTOMETRIC) == MIN_IS_WHITE:  # Pillow turns it round for 8 bits only
        values = 1 - values
    return Image.fromarray(np.rint(values * 255).astype(np.uint8))
