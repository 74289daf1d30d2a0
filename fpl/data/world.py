"""The demo world: images drawn from (shape, texture, colour, style), so that the whole companion runs without a download.

In the world "shapes" a class is a texture and a shape ("striped circle", 48 of them), in "styles" a shape alone (12). The style
is the domain; the rest varies freely: colour, place, size, tilt, noise. Every image has its own random generator, named by
(seed, number), so a data set can be drawn in any order or in parts and is the same.
"""

from __future__ import annotations

import csv
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm.auto import tqdm

from fpl.data.files import atomic_write

SHAPES = ["circle", "square", "triangle", "star", "ring", "cross", "heart", "crescent", "diamond", "arrow", "hexagon", "flower"]
TEXTURES = ["plain", "striped", "dotted", "checkered"]
COLOURS = {
    "red": (220, 40, 40),
    "green": (50, 170, 70),
    "blue": (50, 90, 220),
    "yellow": (235, 210, 50),
    "purple": (150, 60, 180),
    "orange": (240, 140, 40),
    "pink": (240, 130, 180),
    "brown": (130, 85, 50),
}
STYLES = ["photo", "sketch", "painting", "clipart", "infograph", "quickdraw"]
CLASSES = [f"{texture} {shape}" for shape in SHAPES for texture in TEXTURES]
WORLDS = {"shapes": CLASSES, "styles": SHAPES}
CANVAS = 128  # drawn at twice the final size, then reduced: smooth edges

Rng = np.random.Generator


@dataclass(frozen=True)
class Attributes:
    """What is in one image; the fields are words of the lists above."""

    shape: str
    texture: str
    colour: str
    style: str

    @property
    def label(self) -> int:
        return SHAPES.index(self.shape) * len(TEXTURES) + TEXTURES.index(self.texture)

    @classmethod
    def draw(cls, rng: Rng, label: int | None = None) -> Attributes:
        """Uniform over everything, or over colours and styles of one class."""
        label = int(rng.integers(len(CLASSES))) if label is None else label
        shape, texture = divmod(label, len(TEXTURES))
        return cls(SHAPES[shape], TEXTURES[texture], str(rng.choice(list(COLOURS))), str(rng.choice(STYLES)))


def rng_of(seed: int, *key: int) -> Rng:
    return np.random.default_rng([seed, *key])


def outline(shape: str, radius: float, tilt: float) -> np.ndarray:
    """Corners (p, 2) of a shape around the origin; the round shapes are ellipses and not among them."""
    if shape == "cross":
        w = 0.32
        points = np.array(
            [(w, 1), (w, w), (1, w), (1, -w), (w, -w), (w, -1), (-w, -1), (-w, -w), (-1, -w), (-1, w), (-w, w), (-w, 1)]
        )
    elif shape == "heart":
        t = np.linspace(0, 2 * math.pi, 40)
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        points = np.stack([16 * np.sin(t) ** 3, -y], axis=1) / 17
    else:
        angle, distance = {
            "square": (np.pi / 4 + np.arange(4) * np.pi / 2, np.ones(4)),
            "triangle": (-np.pi / 2 + np.arange(3) * 2 * np.pi / 3, np.ones(3)),
            "star": (-np.pi / 2 + np.arange(10) * np.pi / 5, np.tile([1, 0.42], 5)),
            "diamond": (np.arange(4) * np.pi / 2, np.tile([0.55, 1], 2)),
            "hexagon": (np.arange(6) * np.pi / 3, np.ones(6)),
            "arrow": (np.pi * np.array([0, 0.5, 0.62, 0.85, -0.85, -0.62, -0.5]), np.array([1, 0.8, 0.35, 1, 1, 0.35, 0.8])),
            "flower": (np.linspace(0, 2 * np.pi, 80), 0.7 + 0.3 * np.cos(5 * np.linspace(0, 2 * np.pi, 80))),
        }[shape]
        points = np.stack([distance * np.cos(angle), distance * np.sin(angle)], axis=1)
    c, s = math.cos(tilt), math.sin(tilt)
    return radius * points @ np.array([[c, s], [-s, c]])


def silhouette(shape: str, rng: Rng) -> Image.Image:
    """Mask (CANVAS, CANVAS) of the shape at a random place, size and tilt."""
    radius = rng.uniform(0.26, 0.42) * CANVAS
    x, y = rng.uniform(0.38, 0.62, 2) * CANVAS
    mask = Image.new("L", (CANVAS, CANVAS), 0)
    draw = ImageDraw.Draw(mask)
    if shape in ("circle", "ring", "crescent"):
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=255)
        if shape == "ring":
            draw.ellipse([x - radius * 0.55, y - radius * 0.55, x + radius * 0.55, y + radius * 0.55], fill=0)
        if shape == "crescent":
            draw.ellipse([x - radius * 0.4, y - radius * 1.05, x + radius * 1.5, y + radius * 0.85], fill=0)
    else:
        corners = outline(shape, radius, tilt=rng.normal(0, 0.25)) + (x, y)
        draw.polygon([tuple(p) for p in corners], fill=255)
    return mask


def pattern(texture: str, rng: Rng) -> np.ndarray:
    """Boolean (CANVAS, CANVAS): where the second colour of a texture goes."""
    y, x = np.mgrid[:CANVAS, :CANVAS]
    period, angle = rng.integers(10, 16), rng.uniform(0, math.pi)
    u = x * math.cos(angle) + y * math.sin(angle)
    v = -x * math.sin(angle) + y * math.cos(angle)
    if texture == "striped":
        return (u // (period / 2)) % 2 == 0
    if texture == "dotted":
        return (u % period - period / 2) ** 2 + (v % period - period / 2) ** 2 < (0.3 * period) ** 2
    if texture == "checkered":
        return (u // (0.7 * period) + v // (0.7 * period)) % 2 == 0
    return np.zeros((CANVAS, CANVAS), bool)


def background(style: str, rng: Rng) -> Image.Image:
    if style in ("photo", "painting"):
        coarse = rng.integers(60, 200, (8, 8, 3)) if style == "photo" else rng.integers(80, 230, (16, 4, 3))
        return Image.fromarray(coarse.astype("uint8")).resize((CANVAS, CANVAS), Image.Resampling.BICUBIC)
    if style == "clipart":
        return Image.new("RGB", (CANVAS, CANVAS), tuple(int(v) for v in rng.integers(170, 255, 3)))
    image = Image.new("RGB", (CANVAS, CANVAS), (250, 250, 250))
    if style == "infograph":
        draw = ImageDraw.Draw(image)
        for k in range(0, CANVAS, 16):
            draw.line([(k, 0), (k, CANVAS)], fill=(200, 210, 230))
            draw.line([(0, k), (CANVAS, k)], fill=(200, 210, 230))
        for x, y in rng.integers(0, CANVAS, (4, 2)).tolist():
            draw.rectangle([x, y, x + 20, y + 5], fill=(120, 120, 120))
    return image


def render(what: Attributes, rng: Rng, size: int = 64) -> np.ndarray:
    """One image, uint8 (size, size, 3)."""
    colour = tuple(int(v) for v in np.clip(np.array(COLOURS[what.colour]) + rng.normal(0, 18, 3), 0, 255))
    image, mask = background(what.style, rng), silhouette(what.shape, rng)
    inside = Image.fromarray(((np.asarray(mask) > 0) & pattern(what.texture, rng)).astype("uint8") * 255)
    if what.style in ("sketch", "quickdraw"):  # outlines in ink; a sketch has its texture in colour
        ink = (30, 30, 30) if what.style == "quickdraw" else tuple(v // 2 for v in colour)
        image.paste(ink, (0, 0), mask.filter(ImageFilter.FIND_EDGES).filter(ImageFilter.MaxFilter(3)))
        image.paste(colour if what.style == "sketch" else ink, (0, 0), inside)
    else:
        darker = rng.random() < 0.5
        second = tuple(int(0.45 * v) if darker else min(255, int(0.5 * v + 130)) for v in colour)
        image.paste(colour, (0, 0), mask)
        image.paste(second, (0, 0), inside)
    image = image.resize((size, size), Image.Resampling.BILINEAR)
    if what.style == "painting":
        image = image.filter(ImageFilter.ModeFilter(5))
    pixels: np.ndarray = np.asarray(image, dtype=np.float32)
    if what.style == "photo":
        pixels = pixels * rng.uniform(0.7, 1.15) + rng.normal(0, 12, pixels.shape)
    if what.style == "painting":
        pixels = pixels + rng.normal(0, 8, pixels.shape)
    return pixels.clip(0, 255).astype("uint8")


def drawing(seed: int, train_per_class: int, test_per_class: int) -> str:
    """What `drawn.json` beside the images says of them."""
    return json.dumps({"seed": seed, "train_per_class": train_per_class, "test_per_class": test_per_class}) + "\n"


def make(folder: Path, seed: int = 1, train_per_class: int = 32, test_per_class: int = 40, world: str = "shapes") -> Path:
    """Draw the demo data set as PNG files under `folder` and write its manifest last; a finished folder is left alone.

    A killed drawing goes on; images of another seed or size (`drawn.json` says which) are removed and drawn again.
    Returns the manifest, a CSV `path,label,class,split,domain` with paths relative to its folder.
    """
    manifest, drawn = folder / "manifest.csv", folder / "drawn.json"
    request = drawing(seed, train_per_class, test_per_class)
    if not drawn.exists() or drawn.read_text() != request:
        manifest.unlink(missing_ok=True)
        shutil.rmtree(folder / "images", ignore_errors=True)
        with atomic_write(drawn) as temporary:
            temporary.write_text(request)
    if manifest.exists():
        return manifest
    for stale in folder.rglob(".*.tmp"):  # of a killed drawing
        stale.unlink()
    rows, classes = [], WORLDS[world]
    sizes = (("train", train_per_class), ("test", test_per_class))
    todo = [(label, split) for label in range(len(classes)) for split, n in sizes for _ in range(n)]
    for number, (label, split) in enumerate(tqdm(todo, desc="drawing", unit="image")):
        rng = rng_of(seed, number)
        what = Attributes.draw(rng, label if world == "shapes" else label * len(TEXTURES) + int(rng.integers(len(TEXTURES))))
        path = Path("images") / what.style / classes[label].replace(" ", "_") / f"{number:05d}.png"
        rows.append([str(path), label, classes[label], split, what.style])
        if not (folder / path).exists():
            with atomic_write(folder / path) as temporary:
                Image.fromarray(render(what, rng)).save(temporary, format="PNG")
    with atomic_write(manifest) as temporary, temporary.open("w", newline="") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(["path", "label", "class", "split", "domain"])
        writer.writerows(rows)
    return manifest
