"""What runs share and is opened once: backbones, features, prompt trees."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fpl.data import encoders, features, imported
from fpl.data.files import sha256
from fpl.data.manifest import SOURCE, Manifest
from fpl.experiments.extract import manifest_of
from fpl.experiments.settings import Backbone, Data, Experiment
from fpl.prompts import Clip, Precision, PromptTree

T = TypeVar("T", bound=Callable)


def cached_by_features(maxsize: int) -> Callable[[T], T]:
    """Keep in memory what a function of (data, ...) returned, until a features file changes."""

    def wrap(function):
        @functools.lru_cache(maxsize)
        def cached(state, *arguments, **named):
            return function(*arguments, **named)

        @functools.wraps(function)
        def look(data: Data, *arguments, **named):
            files = [data.file(content) for content in features.COMMANDS]
            changed = tuple(path.stat().st_mtime_ns if path.exists() else 0 for path in files)
            return cached((str(files[0].resolve()), changed), data, *arguments, **named)

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
    check_source(data)
    clip = encoders.load(backbone.name, backbone.weights, device, False, backbone.preprocessing)
    there = data.manifest.exists()
    images = {"manifest": sha256(data.manifest)} if there else {"data": data.name}
    return clip, features.load(data.features, clip.provenance | images, device)


def features_hash(experiment: Experiment) -> str:
    """Return the hash of all features that a run reads: pooled ones, patches, crops.

    What lies beside the pooled ones and cannot be read counts as nothing; the run says so.
    """
    data = experiment.source.data
    _, feats = load_cached(data, experiment.source.backbone, device())
    beside = ["patches"] * (experiment.method.inputs == "patches") + ["views"] * bool(data.views)
    if not beside:
        return feats.sha256
    hashes = [feats.sha256, *(features.hash_in(data.file(content)) for content in beside)]
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def check_source(data: Data) -> None:
    """Raise ValueError unless the images that are there are drawn or listed from what is asked."""
    if not data.manifest.exists():  # features that came without images
        return
    path = data.folder / SOURCE
    try:
        made = json.loads(path.read_bytes())
        same = places(made) == places(data.source)
    except (FileNotFoundError, TypeError, ValueError):
        raise ValueError(
            f"{path} does not say what the images are listed from: run `fpl features`"
        ) from None
    if not same:
        raise ValueError(
            f"{data.folder} holds images of {json.dumps(made)}, "
            f"asked for is {json.dumps(data.source)}: run `fpl features` for that"
        )


def places(source: Any) -> Any:
    """Give what images are from with the whole path of its root, which can be said in many ways."""
    if isinstance(source, dict) and "root" in source:
        return source | {"root": str(Path(source["root"]).resolve())}
    return source


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
    these = slice(*classes)
    names = feats.classes[these]
    if backbone.name == imported.IMPORTED:
        text = None if feats.text is None else feats.text[these]
        return imported.WithoutTower(names, feats.feats.shape[1], text)
    return PromptTree(clip, names, n_ctx, precision=precision)


@cached_by_features(maxsize=1)
def patches_of(data: Data, backbone: Backbone, device: str) -> Tensor:
    """Return patch features (images, M, d) in half precision, of the images of the pooled ones."""
    _, feats = load_cached(data, backbone, device)
    return features.load(data.file("patches"), feats.provenance, device, "patches").feats


@cached_by_features(maxsize=1)
def views_of(data: Data, backbone: Backbone, device: str) -> tuple[Tensor, Tensor]:
    """Return unit features of random crops (rows, V, d), and the row of each image (-1: none).

    Raises ValueError when another number of crops was made than is asked for, or of other images
    than those for training.
    """
    _, feats = load_cached(data, backbone, device)
    path = data.file("views")
    made = features.load(path, feats.provenance, device, "views")
    if made.feats.shape[1] != data.views:
        raise ValueError(
            f"{path} has {made.feats.shape[1]} views of an image, asked for are "
            f"{data.views}: run `fpl features --views {data.views}` or set data.views"
        )
    place = torch.full((len(feats.labels),), -1, device=device)
    place[made.rows] = torch.arange(len(made.feats), device=device)
    without = np.flatnonzero((feats.split == "train") & (place.cpu().numpy() < 0))
    if len(without):
        raise ValueError(
            f"{path} has no crops of {len(without)} training images (row {without[0]}, say): "
            f"run `fpl features --views {data.views}`"
        )
    return torch.nn.functional.normalize(made.feats.float(), dim=-1), place


def manifest(data: Data, backbone: Backbone) -> Manifest:
    """Return the images behind the features, in the same order; for whoever shows images."""
    _, feats = load_cached(data, backbone, device())
    return features.of_features(manifest_of(data), feats)
