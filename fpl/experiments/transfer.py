"""What runs learnt on one data set, tried on another: all its test images, under its class names.

Nothing is trained and no record is written: a run that has kept what it learnt is evaluated anew,
so the result is always of the features that are there. Data sets can be added to runs of long ago.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

from fpl.data.imported import IMPORTED
from fpl.experiments.cache import device, load_cached, patches_of, text_of
from fpl.experiments.predict import restore
from fpl.experiments.settings import Settings, Source
from fpl.methods import PromptFL
from fpl.rounds import Setup, evaluate_cohorts, mean_right
from fpl.state import Clients


def others(settings: Settings, name: str) -> list[Source]:
    """Return the data sets of all tables that the backbone of this one sees, but for its images."""
    own = settings.source(name)
    sources = {images_of(own): own}
    for source in map(settings.source, settings.contents()):
        if source.backbone == own.backbone:
            sources.setdefault(images_of(source), source)
    return [*sources.values()][1:]


def images_of(source: Source) -> tuple[str, str]:
    """Return what says which images a data set has; several may have some prepared otherwise."""
    return source.data.name, source.data.root


def accuracies(
    run: str | Path, source: Source, method: str | type[PromptFL] | None = None
) -> list[float]:
    """Return the accuracy of every client of a run on the test images of a data set.

    The text features, and what clients read (experts and the like), are made of its class names,
    from what each client has received. A method that is bound to the classes of training
    (`transfers`) has nan. run: its record, the file that it kept, or the name of these. method: the
    class of a method of your own, or "FILE.py:CLASS".
    Raises FileNotFoundError for a run that has kept nothing, and ValueError where the features are
    of another CLIP than the run's, or of none, and for a method of your own that is not given.
    """
    data, backbone, on = source.data, source.backbone, device()
    if backbone.name == IMPORTED:
        raise ValueError(
            f"{data.features} came without a CLIP: a run is tried elsewhere with its own"
        )
    clip, feats = load_cached(data, backbone, on)
    model = restore(run, clip, method)
    kept = model.kept
    own, n = kept.method, kept.n
    if not own.transfers:
        return [math.nan] * n
    text = text_of(data, backbone, on, own.n_ctx, precision=kept.training.precision)
    patches = patches_of(data, backbone, on) if own.inputs == "patches" else None
    test = [torch.from_numpy(np.flatnonzero(feats.split == "test")).to(on)] * n
    clients = Clients(feats.feats, feats.labels, test, test, text.n_cls, patches)
    setup = Setup(own, model.text, clients, kept.training, kept.seeds)
    found = evaluate_cohorts(setup, kept.cohorts, kept.deployed, text, clients)
    return mean_right(found).tolist()
