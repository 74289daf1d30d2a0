"""What runs share and is opened once: backbones, features, prompt trees."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from fpl.data import encoders, features, world
from fpl.data.files import sha256
from fpl.data.manifest import Manifest, read_manifest
from fpl.experiments.settings import Backbone, Data
from fpl.prompts import Clip, Precision, PromptTree

T = TypeVar("T", bound=Callable)


def cached_by_features(maxsize: int) -> Callable[[T], T]:
    """Keep in memory what a function of (data, ...) returned, until the features file changes."""

    def wrap(function):
        @functools.lru_cache(maxsize)
        def cached(state, *arguments, **named):
            return function(*arguments, **named)

        @functools.wraps(function)
        def look(data: Data, *arguments, **named):
            path = data.features
            changed = path.stat().st_mtime_ns if path.exists() else 0
            return cached((str(path.resolve()), changed), data, *arguments, **named)

        return look

    return wrap


def device() -> str:
    """Return where tensors live: on a GPU when there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@cached_by_features(maxsize=4)
def load_cached(data: Data, backbone: Backbone, device: str) -> tuple[Clip, features.Features]:
    """Return backbone and features of a data set.

    Raises ValueError unless the one was made with the other, of the images that are there.
    """
    drawn = data.folder / "drawn.json"
    wanted = world.drawing(data.seed, data.train_per_class, data.test_per_class)
    if drawn.exists() and drawn.read_text() != wanted:
        raise ValueError(
            f"{data.folder} holds images of {drawn.read_text().strip()}, "
            f"params.yaml asks for {wanted.strip()}: run `fpl features`"
        )
    clip = encoders.load(
        backbone.name, backbone.weights or None, device, False, backbone.preprocessing
    )
    images = {"manifest": sha256(data.manifest)} if data.manifest.exists() else {}
    return clip, features.load(data.features, clip.provenance | images, device)


@cached_by_features(maxsize=4)
def text_of(
    data: Data,
    backbone: Backbone,
    device: str,
    n_ctx: int,
    classes: tuple[int, int | None] = (0, None),
    precision: Precision = "single",
) -> PromptTree:
    """Return the prompts of the classes numbered from the first to before the second."""
    clip, feats = load_cached(data, backbone, device)
    return PromptTree(clip, feats.classes[slice(*classes)], n_ctx, precision=precision)


@cached_by_features(maxsize=1)
def patches_of(data: Data, backbone: Backbone, device: str) -> Tensor:
    """Return patch features (images, M, d) in half precision, of the images of the pooled ones."""
    _, feats = load_cached(data, backbone, device)
    return features.load(data.patches, feats.provenance, device, "patches").feats


@cached_by_features(maxsize=1)
def views_of(data: Data, backbone: Backbone, device: str) -> tuple[Tensor, Tensor]:
    """Return unit features of random crops (rows, V, d), and the row of each image (-1: none).

    Raises ValueError when another number of crops was made than is asked for.
    """
    _, feats = load_cached(data, backbone, device)
    made = features.load(data.views_file, feats.provenance, device, "views")
    if made.feats.shape[1] != data.views:
        raise ValueError(
            f"{data.views_file} has {made.feats.shape[1]} views of an image, asked for are "
            f"{data.views}: run `fpl features --views {data.views}` or set data.views"
        )
    place = torch.full((len(feats.labels),), -1, device=device)
    place[made.rows] = torch.arange(len(made.feats), device=device)
    return torch.nn.functional.normalize(made.feats.float(), dim=-1), place


def manifest(data: Data, backbone: Backbone) -> Manifest:
    """Return the images behind the features, in the same order; for whoever shows images."""
    _, feats = load_cached(data, backbone, device())
    return features.of_features(read_manifest(data.manifest), feats)
