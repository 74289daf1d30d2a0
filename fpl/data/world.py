"""The demo world: images drawn from (shape, texture, colour, style), so nothing is downloaded.

In the world "shapes" a class is a texture and a shape ("striped star", 30 of them), in "styles" a
shape alone (12). The style is the domain; the rest varies freely: colour, place, size, tilt, noise.
The camera is held askew: the demo CLIP was trained on upright drawings, these are turned by quarter
turns, so that class names alone say less than a prompt can learn. Every image has its own random
generator, named by (seed, number), so a data set can be drawn in any order or in parts and is the
same.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFilter
from tqdm.auto import tqdm

from fpl.data.files import atomic_write, lock_of_block
from fpl.data.manifest import SOURCE, as_csv, read_manifest

SHAPES = [
    "circle",
    "square",
    "triangle",
    "star",
    "ring",
    "cross",
    "heart",
    "crescent",
    "diamond",
    "arrow",
    "hexagon",
    "flower",
]
TEXTURES = ["plain", "striped", "dotted", "checkered"]
COLOURS = {
    "red": "#dc2828",
    "green": "#32aa46",
    "blue": "#325adc",
    "yellow": "#ebd232",
    "purple": "#963cb4",
    "orange": "#f08c28",
    "pink": "#f082b4",
    "brown": "#825532",
}
STYLES = ["photo", "sketch", "painting", "clipart", "infograph", "quickdraw"]
CLASSES = [f"{texture} {shape}" for shape in SHAPES for texture in TEXTURES]
VERSION = 2  # of the drawings: a change of what `make` draws needs a new one
CANVAS = 128  # images are drawn at twice the final size, then reduced: smooth edges

Rng = np.random.Generator


@dataclass(frozen=True)
class World:
    """What a data set shows. turns: quarter turns of the camera, by style."""

    classes: list[str]
    turns: dict[str, int]


# a turned circle or ring is the same, and would teach nothing about the camera
TURNING = [shape for shape in SHAPES if shape not in ("circle", "ring")]
WORLDS = {
    "shapes": World(
        [f"{texture} {shape}" for shape in TURNING for texture in TEXTURES if texture != "dotted"],
        dict.fromkeys(STYLES, 1),
    ),
    # two styles to a camera: whoever has the same camera could help
    "styles": World(SHAPES, dict(zip(STYLES, (0, 1, 2, 0, 1, 2), strict=True))),
}


@dataclass(frozen=True)
class Attributes:
    """What is in one image, in words of the lists above."""

    shape: str
    texture: str
    colour: str
    style: str

    @classmethod
    def draw(cls, rng: Rng, label: int | None = None) -> Attributes:
        """Draw uniformly over everything, or over colours and styles of one class."""
        if label is None:
            label = int(rng.integers(len(CLASSES)))
        shape, texture = divmod(label, len(TEXTURES))
        colour = str(rng.choice(list(COLOURS)))
        return cls(SHAPES[shape], TEXTURES[texture], colour, str(rng.choice(STYLES)))


def rng_of(seed: int, *key: int) -> Rng:
    return np.random.default_rng([seed, *key])


def outline(shape: str, radius: float, tilt: float) -> np.ndarray:
    """Give the corners (p, 2) of a shape around the origin; round shapes have none."""
    c, s = math.cos(tilt), math.sin(tilt)
    return radius * corners(shape) @ np.array([[c, s], [-s, c]])


def corners(shape: str) -> np.ndarray:
    """Give the corners (p, 2) of a shape that is upright and reaches to about 1."""
    if shape == "cross":
        w = 0.32
        arm = np.array([(w, 1), (w, w), (1, w)])
        arms = [arm]
        for _ in range(3):
            arms.append(arms[-1] @ np.array([[0, -1], [1, 0]]))  # a quarter turn
        return np.concatenate(arms)
    if shape == "heart":
        t = np.linspace(0, 2 * math.pi, 40)
        x = 16 * np.sin(t) ** 3
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return np.stack([x, -y], axis=1) / 17
    angle, distance = polar(shape)
    return np.stack([distance * np.cos(angle), distance * np.sin(angle)], axis=1)


def polar(shape: str) -> tuple[np.ndarray, np.ndarray]:
    """Give the corners of a shape as angles and distances from its centre."""
    if shape == "square":
        return np.pi / 4 + np.arange(4) * np.pi / 2, np.ones(4)
    if shape == "triangle":
        return -np.pi / 2 + np.arange(3) * 2 * np.pi / 3, np.ones(3)
    if shape == "star":
        return -np.pi / 2 + np.arange(10) * np.pi / 5, np.tile([1, 0.42], 5)
    if shape == "diamond":
        return np.arange(4) * np.pi / 2, np.tile([0.55, 1], 2)
    if shape == "hexagon":
        return np.arange(6) * np.pi / 3, np.ones(6)
    if shape == "arrow":
        half_turns = np.array([0, 0.5, 0.62, 0.85, -0.85, -0.62, -0.5])
        return np.pi * half_turns, np.array([1, 0.8, 0.35, 1, 1, 0.35, 0.8])
    angle = np.linspace(0, 2 * np.pi, 80)  # the flower
    return angle, 0.7 + 0.3 * np.cos(5 * angle)


def silhouette(shape: str, rng: Rng) -> Image.Image:
    """Draw the mask (CANVAS, CANVAS) of a shape at a random place, size and tilt."""
    radius = rng.uniform(0.26, 0.42) * CANVAS
    x, y = rng.uniform(0.38, 0.62, 2) * CANVAS
    mask = Image.new("L", (CANVAS, CANVAS), 0)
    draw = ImageDraw.Draw(mask)

    def ellipse(left: float, top: float, right: float, bottom: float, fill: int) -> None:
        box = [x - radius * left, y - radius * top, x + radius * right, y + radius * bottom]
        draw.ellipse(box, fill=fill)

    if shape in ("circle", "ring", "crescent"):
        ellipse(1, 1, 1, 1, fill=255)
        if shape == "ring":
            ellipse(0.55, 0.55, 0.55, 0.55, fill=0)
        if shape == "crescent":
            ellipse(0.4, 1.05, 1.5, 0.85, fill=0)
    else:
        points = outline(shape, radius, tilt=rng.normal(0, 0.25)) + (x, y)
        draw.polygon([tuple(p) for p in points], fill=255)
    return mask


def pattern(texture: str, rng: Rng) -> np.ndarray:
    """Say of each pixel (CANVAS, CANVAS) whether the second colour of a texture goes there."""
    y, x = np.mgrid[:CANVAS, :CANVAS]
    period = rng.integers(10, 16)
    angle = rng.uniform(0, math.pi)
    u = x * math.cos(angle) + y * math.sin(angle)
    v = -x * math.sin(angle) + y * math.cos(angle)
    if texture == "striped":
        return (u // (period / 2)) % 2 == 0
    if texture == "dotted":
        from_centre = (u % period - period / 2) ** 2 + (v % period - period / 2) ** 2
        return from_centre < (0.3 * period) ** 2
    if texture == "checkered":
        side = 0.7 * period
        return (u // side + v // side) % 2 == 0
    return np.zeros((CANVAS, CANVAS), bool)


def background(style: str, rng: Rng) -> Image.Image:
    """Draw what is behind the shape, (CANVAS, CANVAS)."""
    size = (CANVAS, CANVAS)
    if style in ("photo", "painting"):
        low, high, grid = (60, 200, (8, 8, 3)) if style == "photo" else (80, 230, (16, 4, 3))
        coarse = rng.integers(low, high, grid).astype("uint8")
        return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    if style == "clipart":
        return Image.new("RGB", size, rgb(rng.integers(170, 255, 3)))
    image = Image.new("RGB", size, (250, 250, 250))
    if style == "infograph":
        draw = ImageDraw.Draw(image)
        for k in range(0, CANVAS, 16):
            draw.line([(k, 0), (k, CANVAS)], fill=(200, 210, 230))
            draw.line([(0, k), (CANVAS, k)], fill=(200, 210, 230))
        for x, y in rng.integers(0, CANVAS, (4, 2)).tolist():
            draw.rectangle([x, y, x + 20, y + 5], fill=(120, 120, 120))
    return image


def rgb(colour: np.ndarray) -> tuple[int, ...]:
    return tuple(int(v) for v in colour)


def render(what: Attributes, rng: Rng, size: int = 64) -> np.ndarray:
    """Draw one image, uint8 (size, size, 3)."""
    plain = np.array(ImageColor.getrgb(COLOURS[what.colour]))
    colour = rgb(np.clip(plain + rng.normal(0, 18, 3), 0, 255))
    image = background(what.style, rng)
    mask = silhouette(what.shape, rng)
    textured = (np.asarray(mask) > 0) & pattern(what.texture, rng)
    inside = Image.fromarray(textured.astype("uint8") * 255)
    if what.style in ("sketch", "quickdraw"):
        # outlines in ink; a sketch has its texture in colour
        black = (30, 30, 30)
        edges = mask.filter(ImageFilter.FIND_EDGES).filter(ImageFilter.MaxFilter(3))
        is_sketch = what.style == "sketch"
        image.paste(tuple(v // 2 for v in colour) if is_sketch else black, (0, 0), edges)
        image.paste(colour if is_sketch else black, (0, 0), inside)
    else:
        if rng.random() < 0.5:
            second = tuple(int(0.45 * v) for v in colour)
        else:
            second = tuple(min(255, int(0.5 * v + 130)) for v in colour)
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


def one_of(name: str, rng: Rng) -> int:
    """Return the class of CLASSES that a name says, or one of those of a shape."""
    if name in CLASSES:
        return CLASSES.index(name)
    return SHAPES.index(name) * len(TEXTURES) + int(rng.integers(len(TEXTURES)))


def seen(world: str, what: Attributes, rng: Rng) -> np.ndarray:
    """Draw one image, uint8 (64, 64, 3), as the camera of a world sees it."""
    return np.rot90(render(what, rng), WORLDS[world].turns[what.style])


def drawing(seed: int, train_per_class: int, test_per_class: int) -> str:
    """Write what SOURCE, beside the images, says of them."""
    sizes = {"train_per_class": train_per_class, "test_per_class": test_per_class}
    return json.dumps({"drawn_as": VERSION, "seed": seed, **sizes}) + "\n"


def make(
    folder: Path,
    seed: int = 1,
    train_per_class: int = 32,
    test_per_class: int = 40,
    world: str = "shapes",
) -> Path:
    """Draw the demo data set as PNG files in `folder`, write its manifest last and return its path.

    A finished folder is left alone and a killed drawing goes on; images of another seed or size
    (SOURCE says which) or of another world are removed and drawn again. One process draws at a
    time, the others wait.
    """
    manifest = folder / "manifest.csv"
    request = drawing(seed, train_per_class, test_per_class)
    if manifest.exists() and is_of(folder, request, world):
        return manifest
    with lock_of_block(folder / ".drawing.lock", partial(waiting, folder)):
        if not is_of(folder, request, world):
            manifest.unlink(missing_ok=True)
            shutil.rmtree(folder / "images", ignore_errors=True)
            with atomic_write(folder / SOURCE) as temporary:
                temporary.write_text(request)
        if not manifest.exists():  # it may be there by now
            draw_all(folder, seed, (train_per_class, test_per_class), world)
    return manifest


def waiting(folder: Path) -> None:
    """Warn that another process draws into a folder."""
    said = f"another process is drawing into {folder}: waiting until it has finished"
    warnings.warn(said, stacklevel=2)


def is_of(folder: Path, request: str, world: str) -> bool:
    """Say whether what is in a folder, finished or not, is drawn as asked and of a world.

    SOURCE does not say which world; names of classes do. Raises ValueError for a manifest that
    cannot be read.
    """
    drawn, manifest = folder / SOURCE, folder / "manifest.csv"
    if not drawn.exists() or drawn.read_bytes() != request.encode():
        return False
    if manifest.exists():
        names = {*read_manifest(manifest).classes}
    else:
        names = {path.name.replace("_", " ") for path in folder.glob("images/*/*")}
    others = [{*one.classes} for name, one in WORLDS.items() if name != world]
    return not names or not any(names <= other for other in others)


def draw_all(folder: Path, seed: int, sizes: tuple[int, int], world: str) -> None:
    """Draw the images that are not there, and then write the manifest; sizes: as `make` has them.

    Only one process at a time may do this.
    """
    for stale in folder.rglob(".*.tmp"):  # of a killed drawing
        stale.unlink()
    classes = WORLDS[world].classes
    train_per_class, test_per_class = sizes
    splits = ["train"] * train_per_class + ["test"] * test_per_class
    rows = []
    for number in tqdm(range(len(classes) * len(splits)), desc="drawing", unit="image"):
        label = number // len(splits)
        name = classes[label]
        rng = rng_of(seed, number)
        what = Attributes.draw(rng, one_of(name, rng))
        path = f"images/{what.style}/{name.replace(' ', '_')}/{number:05d}.png"
        split = splits[number % len(splits)]
        row = {"path": path, "label": str(label), "class": name}
        rows.append({**row, "split": split, "domain": what.style})
        if not (folder / path).exists():
            with atomic_write(folder / path, one_of_many=True) as temporary:
                Image.fromarray(seen(world, what, rng)).save(temporary, format="PNG")
    os.sync()  # the manifest says that the images are there
    with atomic_write(folder / "manifest.csv") as temporary:
        temporary.write_bytes(as_csv(rows))
