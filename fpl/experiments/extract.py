"""From a data set to its features files: list or draw the images, run the image tower once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fpl.data import datasets, extraction, features, world
from fpl.data.manifest import Manifest, read_manifest
from fpl.data.views import Views
from fpl.experiments.settings import Data
from fpl.experiments.values import check_choice
from fpl.prompts import Clip


@dataclass(frozen=True)
class Request:
    """What is wanted of a data set's images, and how it is made.

    contents: "patches" where these are wanted besides the pooled features.
    views: how many random crops of each training image; None: as the settings say.
    workers: processes that decode images; None: a core each with a GPU, up to 8; else fewer.
    skip_bad: leave out images that cannot be read. fresh: extract what is there again.
    """

    contents: set[str] = field(default_factory=set)
    views: int | None = None
    workers: int | None = None
    skip_bad: bool = False
    fresh: bool = False


def make_features(data: Data, clip: Clip, request: Request) -> Iterator[tuple[Path, list[str]]]:
    """Make the features files that are wanted and not there.

    Yields each file, old or new, and the ids of images that it lacks because they cannot be read.
    Raises OSError, with their number, where such images are not to be left out.
    """
    manifest = list_images(data)
    number = data.views if request.views is None else request.views
    views = Views(number) if number else None
    wanted = request.contents | {"feats"} | ({"views"} if views else set())
    for content in [content for content in features.CONTENT if content in wanted]:
        path = features.file_of(data.features, content)
        made, skipped = features.header(path)
        # patches and views are of the images that have pooled features
        skip_bad = request.skip_bad and content == "feats"
        images = manifest.without(skipped) if skip_bad else manifest
        asked = features.provenance(images, clip, content, views)
        if request.fresh or not made.items() >= asked.items():
            how = extraction.Options(workers_of(request), other_gpus(), skip_bad)
            extraction.extract(manifest, clip, path, content, views, how)
            _, skipped = features.header(path)
        yield path, skipped
        manifest = manifest.without(skipped)


def list_images(data: Data) -> Manifest:
    """Return the images of a data set, which are drawn first in a demo world.

    Raises ValueError for an unknown data set and for lists that cannot be read.
    """
    known = [*world.WORLDS, "own", *datasets.DATASETS]
    check_choice(data.name, known, "data set")
    if data.name in world.WORLDS:
        per_class = (data.train_per_class, data.test_per_class)
        path = world.make(data.folder, data.seed, *per_class, data.name)
    else:
        path = datasets.prepare(data.name, Path(data.root), data.layout or None, data.manifest)
    return read_manifest(path)


def workers_of(request: Request) -> int:
    """Return how many processes decode images."""
    if request.workers is not None:
        return request.workers
    cores = os.cpu_count() or 1
    return min(cores if torch.cuda.is_available() else cores // 4, 8)


def other_gpus() -> list[str]:
    """Return the GPUs besides the first, on which the model is."""
    return [f"cuda:{i}" for i in range(1, torch.cuda.device_count())]
