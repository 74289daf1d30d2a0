"""Random crops and flips of training images, as the official runs draw them anew in every epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from fpl.later import Later

transforms = Later("torchvision.transforms")
functional = Later("torchvision.transforms.functional")


@dataclass(frozen=True)
class Views:
    """Seeded random crops and flips of an image, prepared as the model's own transform does.

    As in the official runs (Luo et al., ICLR 2025; ljaiverson/pFedMoAP at a481de3, INPUT in its
    configs/trainers): a crop of 0.08 to 1 of the area and of aspect 3/4 to 4/3, resized, and
    flipped half of the time. A view is a function of (seed, image id, number of the view) alone.

    number: views of each image.
    """

    number: int
    seed: int = 0

    def __post_init__(self):
        if self.number < 1:
            raise ValueError(f"views must be at least 1 for an image, not {self.number}")

    def __str__(self) -> str:
        return f"{self.number} random crops and flips, seed {self.seed}"

    def draw(
        self, transform: Any, image: Image.Image, name: str, size: Sequence[int]
    ) -> Float[Tensor, "V 3 h w"]:
        """Draw the views of an image that has the id `name`. Raises as `resizing`."""
        resizing = self.resizing(transform)
        steps = transform.transforms
        cropping = [step for step in steps if type(step).__name__.startswith("CenterCrop")]
        finish = transforms.Compose([step for step in steps if step not in resizing + cropping])
        views = []
        for number in range(self.number):
            rng = self.generator(name, number)
            left, top, width, height = crop(rng, *image.size)
            box = (top, left, height, width)
            view = functional.resized_crop(image, *box, list(size), resizing[0].interpolation)
            if rng.random() < 0.5:
                view = functional.hflip(view)
            views.append(finish(view))
        return torch.stack(views)

    def resizing(self, transform: Any) -> list[Any]:
        """Find the steps that resize. Raises ValueError for a transform without any."""
        steps = getattr(transform, "transforms", [])
        found = [step for step in steps if hasattr(step, "interpolation")]
        if not found:
            needed = "an image transform that begins with resizing"
            raise ValueError(f"views need {needed}, this one is {transform!r}")
        return found

    def generator(self, name: str, number: int) -> np.random.Generator:
        """Make the generator of one view of the image with this id."""
        words = np.frombuffer(hashlib.sha256(name.encode()).digest(), dtype="<u4")
        return np.random.default_rng([self.seed, number, *words.tolist()])


def crop(rng: np.random.Generator, width: int, height: int) -> tuple[int, int, int, int]:
    """Draw left, top, width and height of a crop of an image.

    After ten draws that do not fit in the image it is the largest central one of the nearest
    aspect.
    """
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1)
        aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w = round(np.sqrt(area * aspect))
        h = round(np.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left = int(rng.integers(width - w + 1))
            top = int(rng.integers(height - h + 1))
            return left, top, w, h
    w = min(width, round(height * 4 / 3))
    h = min(height, round(width * 4 / 3))
    return (width - w) // 2, (height - h) // 2, w, h
