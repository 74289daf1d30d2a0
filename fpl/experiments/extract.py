"""From a data set to its features files: list or draw the images, run the image tower once."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from fpl.data import datasets, extraction, features, seen, world
from fpl.data.files import atomic_write, lock_of_block
from fpl.data.manifest import SOURCE, Manifest, read_manifest
from fpl.data.views import Views
from fpl.experiments.settings import Data
from fpl.experiments.values import check_choice
from fpl.prompts import Clip, tokens_of


@dataclass(frozen=True)
class Request:
    """What is wanted of a data set's images, and how it is made.

    contents: "patches" where these are wanted besides the pooled features.
    views: how many random crops of each training image; None: as the settings say.
    workers: processes that decode images; None: a core each with a GPU, up to 8; else fewer.
    skip_bad: leave out images that cannot be read. fresh: extract what is there again.
    rehash: compare the content of every image, not only of those with another size or time.
    elsewhere: encodes on other machines.
    """

    contents: set[str] = field(default_factory=set)
    views: int | None = None
    workers: int | None = None
    skip_bad: bool = False
    fresh: bool = False
    rehash: bool = False
    elsewhere: extraction.Elsewhere | None = None


class Made(NamedTuple):
    """A features file, old or new.

    skipped: ids of images that it lacks because they cannot be read.
    why: it was there and had to be made again, or still has; "" if not.
    """

    path: Path
    skipped: list[str]
    why: str


def make_features(data: Data, clip: Clip, request: Request) -> Iterator[Made]:
    """Make the features files that are wanted and not there.

    Also those again whose images have changed since. Yields each file, old or new.
    Raises OSError, with their number, where images cannot be read and are not to be left out, and
    for a file that is in use.
    """
    manifest = list_images(data)
    tokens_of(clip, manifest.classes, 0, ".")  # what no prompt could tell apart is refused now
    number = data.views if request.views is None else request.views
    views = Views(number) if number else None
    wanted = request.contents | {"feats"} | ({"views"} if views else set())
    if request.rehash:
        forget(manifest)
    for content in [content for content in features.CONTENT if content in wanted]:
        path = data.file(content)
        asked = partial(features.provenance, clip=clip, content=content, views=views)
        made = look(path, manifest, asked, request)
        if made.why:
            with lock_of_block(manifest.folder / f".{path.name}.lock", partial(waiting, path)):
                now = look(path, manifest, asked, request)  # it may be there by now
                if now.why:
                    why = made.why if path.exists() else ""
                    extraction.extract(manifest, clip, path, content, views, options(request))
                    now = Made(path, features.header(path)[1], why)
            made = now
        manifest = manifest.without(made.skipped)
        if content == "feats":
            tell_doubles(manifest)
        yield made
        # patches and views are of the images that have pooled features
        request = replace(request, skip_bad=False)


def look(
    path: Path, manifest: Manifest, asked: Callable[[Manifest], dict[str, str]], request: Request
) -> Made:
    """Say of a features file what it lacks, and why it must be made.

    asked: gives the provenance that it should have, of these images.
    """
    made, skipped = features.header(path)
    images = manifest.without(skipped) if request.skip_bad else manifest
    if request.fresh:
        return Made(path, skipped, "you ask for it")
    return Made(path, skipped, reason(path, made, asked(images), images))


def waiting(path: Path) -> None:
    """Warn that another process makes a features file."""
    said = f"another process is making {path}: waiting until it has finished"
    warnings.warn(said, stacklevel=2)


def options(request: Request) -> extraction.Options:
    """Return how an extraction goes."""
    away = request.elsewhere
    gpus = [] if away else other_gpus()
    return extraction.Options(workers_of(request), gpus, request.skip_bad, away)


def tell_doubles(manifest: Manifest) -> None:
    """Warn of images with the same content in different splits or classes."""
    content = seen.content_of(seen.recall(manifest.folder))
    first: dict[str, dict[str, str]] = {}
    doubles = []
    for row in manifest.rows:
        other = first.setdefault(content.get(row["path"], row["path"]), row)
        again = other["path"] != row["path"]
        if again and any(other[key] != row[key] for key in ("split", "class")):
            listed = (f"{r['path']} ({r['split']}, {r['class']})" for r in (other, row))
            doubles.append(" and ".join(listed))
    if doubles:
        said = f"{len(doubles)} times an image has the content of one in another split or class"
        warnings.warn(f"{said}: {doubles[0]}", stacklevel=3)


def reason(path: Path, made: dict[str, str], asked: dict[str, str], images: Manifest) -> str:
    """Say why a features file must be made; "" if it is what was asked for, of these images."""
    if not made:
        return "it is damaged, or of an older version"
    for key, value in asked.items():
        if made.get(key) != value:
            return f"{key} is another"
    before = seen.recall(images.folder)
    now = seen.look(images, before)
    if now != before:
        seen.remember(images.folder, now)
    if made.get("images") == seen.summary(now):
        return ""
    then = seen.content_of(before)
    changed = [name for name, found in seen.content_of(now).items() if then.get(name) != found]
    return f"images have changed ({len(changed) or 'some'} of {len(now)})"


def forget(manifest: Manifest) -> None:
    """Take away size and time of all images, so that their contents are compared."""
    known = seen.recall(manifest.folder)
    seen.remember(manifest.folder, {name: f"0 0 {said}" for name, said in known.items()})


def list_images(data: Data) -> Manifest:
    """List the images of a data set, which are drawn first in a demo world.

    `source.json` beside the manifest says of what it was made. Raises ValueError for an unknown
    data set and for lists that cannot be read.
    """
    known = [*world.WORLDS, "own", *datasets.DATASETS]
    check_choice(data.name, known, "data set")
    if data.name in world.WORLDS:
        per_class = (data.train_per_class, data.test_per_class)
        world.make(data.folder, data.seed, *per_class, data.name)
    else:
        datasets.prepare(data.name, Path(data.root), data.layout or None, data.manifest)
        with atomic_write(data.folder / SOURCE) as temporary:
            temporary.write_text(json.dumps(data.source) + "\n")
    return manifest_of(data)


def manifest_of(data: Data) -> Manifest:
    """Read the manifest of a data set that was listed."""
    listed = read_manifest(data.manifest)
    return replace(listed, name=data.name, upright=data.name == "own")


def workers_of(request: Request) -> int:
    """Return how many processes decode images."""
    if request.workers is not None:
        return request.workers
    cores = os.cpu_count() or 1
    return min(cores if torch.cuda.is_available() else cores // 4, 8)


def other_gpus() -> list[str]:
    """Return the GPUs besides the first, on which the model is."""
    return [f"cuda:{i}" for i in range(1, torch.cuda.device_count())]
