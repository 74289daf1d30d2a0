"""What is opened once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch

from fpl.data import encoders, features, world
from fpl.data.files import sha256
from fpl.experiments.settings import Backbone, Data
from fpl.prompts import Clip, PromptTree

T = TypeVar("T", bound=Callable)


def cached_by_features(maxsize: int) -> Callable[[T], T]:
    """Keep in memory what a function of (data, ...) returned, until the features file is another one."""

    def wrap(function):
        cached = functools.lru_cache(maxsize)(lambda state, *arguments, **named: function(*arguments, **named))

        def look(data: Data, *arguments, **named):
            path = data.features
            return cached((str(path.resolve()), path.stat().st_mtime_ns if path.exists() else 0), data, *arguments, **named)

        return functools.update_wrapper(look, function)

    return wrap




@cached_by_features(maxsize=4)
def load_cached(data: Data, backbone: Backbone, device: str) -> tuple[Clip, features.Features]:
    """Backbone and features of a data set, refused unless the one was made with the other."""
    drawn, wanted = data.folder / "drawn.json", world.drawing(data.seed, data.train_per_class, data.test_per_class)
    if drawn.exists() and drawn.read_text() != wanted:
        found = f"{data.folder} holds images of {drawn.read_text().strip()}"
        raise ValueError(f"{found}, params.yaml asks for {wanted.strip()}: run `fpl features`")
    loaded = encoders.load(backbone.name, backbone.weights or None, device, False, backbone.preprocessing)
    images = {"manifest": sha256(data.manifest)} if data.manifest.exists() else {}
    return loaded, features.load(data.features, loaded.provenance | images, device)




@cached_by_features(maxsize=4)
def text_of(
    data: Data, backbone: Backbone, device: str, n_ctx: int, first: int = 0, end: int | None = None, precision: str = "single"
) -> PromptTree:
    """The prompts of the classes numbered `first` to before `end`."""
    loaded, feats = load_cached(data, backbone, device)
    return PromptTree(loaded, feats.classes[first:end], n_ctx, precision=precision)




@cached_by_features(maxsize=1)
def patches_of(data: Data, backbone: Backbone, device: str) -> torch.Tensor:
    """Patch features (images, M, d) in half precision, of the images of the pooled ones."""
    _, feats = load_cached(data, backbone, device)
    return features.load(data.patches, feats.provenance, device, "patches").feats




@cached_by_features(maxsize=1)
def views_of(data: Data, backbone: Backbone, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit features of the views of training images (rows, V, d), and the row of each image (-1: none). Raises ValueError."""
    _, feats = load_cached(data, backbone, device)
    made = features.load(data.views_file, feats.provenance, device, "views")
    if made.feats.shape[1] != data.views:
        found = f"{data.views_file} has {made.feats.shape[1]} views of an image, asked for are {data.views}"
        raise ValueError(f"{found}: run `fpl features --views {data.views}` or set data.views")
    where = torch.full((len(feats.labels),), -1, device=device)
    where[made.rows] = torch.arange(len(made.feats), device=device)
    return torch.nn.functional.normalize(made.feats.float(), dim=-1), where




def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"




def manifest(data: Data) -> features.Manifest:
    """The images behind the features, in the same order; only the notebooks that show images read it."""
    return features.read_manifest(data.manifest)


