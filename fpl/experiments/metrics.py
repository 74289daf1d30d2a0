"""Metrics of what clients said of their test images, from records and without another run.

`frame` is always one of fpl.experiments.answers, of one run: a line per client and image. All
values are in [0, 1], and torchmetrics computes them.

Confidence is the largest share of the softmax over the classes. Controls that give no
probabilities have one, too: their scores are no logits, so it says little of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from pandas import DataFrame, Index
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_calibration_error,
    multiclass_confusion_matrix,
    multiclass_f1_score,
    multiclass_recall,
)

from fpl.experiments.answers import NO_CLASS

BINS = 15  # of equal width, as in Guo et al. (2017)


def scores(frame: DataFrame) -> DataFrame:
    """Return a line per client: accuracy, macro_f1, worst_class and ece.

    macro_f1: the mean F1 of the classes of which the client has test images, as in the released
    code; F1 counts images of these that were taken for another class, and other images that were
    taken for these. worst_class: the least recall of these classes. ece: see `ece`.
    """
    lines = {}
    for client, own in frame.groupby("client"):
        classes = per_class(own)
        lines[client] = {
            "accuracy": own["right"].mean(),
            "macro_f1": classes["f1"].mean(),
            "worst_class": classes["recall"].min(),
            "ece": ece(own),
        }
    return DataFrame.from_dict(lines, orient="index").rename_axis("client")


def over_clients(found: DataFrame) -> DataFrame:
    """Return two lines of `scores`: the mean, in which clients have an equal say, and the worst.

    The worst is taken of each metric by itself, so it need not be one client: the lowest value, and
    of the calibration error the highest.
    """
    worst = found.min()
    worst["ece"] = found["ece"].max()
    return DataFrame({"mean": found.mean(), "worst client": worst}).T


def per_class(frame: DataFrame) -> DataFrame:
    """Return a line per class that has images: images, recall and f1.

    Images of all clients in the frame count alike. The index `label` has the numbers of classes.
    """
    said, truth = tensor(frame, "predicted"), tensor(frame, "label")
    many = max(2, int(said.max()) + 1, int(truth.max()) + 1)
    columns = {
        "images": torch.bincount(truth, minlength=many),
        "recall": multiclass_recall(said, truth, many, average="none"),
        "f1": multiclass_f1_score(said, truth, many, average="none"),
    }
    return DataFrame(columns).rename_axis("label").query("images > 0")


def confusion(frame: DataFrame, classes: Sequence[str]) -> DataFrame:
    """Return how many images of a class (row) were taken for which class (column).

    classes: the names of all. What was taken for none of them has a column of its own, if there is
    any. Raises ValueError for labels that have no name.
    """
    said, truth = tensor(frame, "predicted"), tensor(frame, "label")
    n = len(classes)
    if truth.max() >= n:
        raise ValueError(f"label {truth.max()} has no name among {n} classes: give all names")
    counts = multiclass_confusion_matrix(said.clamp(max=n), truth, n + 1)
    names = [*classes, NO_CLASS]
    table = DataFrame(counts.numpy(), Index(names, name="class"), Index(names, name="taken for"))
    return table.iloc[:-1] if table[NO_CLASS].any() else table.iloc[:-1, :-1]


def ece(frame: DataFrame, bins: int = BINS) -> float:
    """Return the expected calibration error of the classes that were said (top label), in l1.

    Images are put in bins of equal width by confidence; it is the mean distance of accuracy and
    mean confidence over the bins, each weighed by its images.
    """
    return binary_calibration_error(confidence(frame), tensor(frame, "right").int(), bins).item()


def reliability(frame: DataFrame, bins: int = BINS) -> DataFrame:
    """Return a line per bin of `ece`: where it begins (low) and ends (high), and what is in it.

    That is images, their mean confidence and their accuracy, which are nan where there are none.
    The distances of confidence and accuracy, weighed by images, add up to the `ece`.
    """
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.double)
    at = torch.bucketize(confidence(frame), edges, right=True) - 1
    inside = frame.groupby(at.numpy())
    found = DataFrame(
        {
            "images": inside.size(),
            "confidence": inside["confidence"].mean(),
            "accuracy": inside["right"].mean(),
        }
    ).reindex(range(bins))
    found["images"] = found["images"].fillna(0).astype(int)
    found.insert(0, "low", edges[:-1])
    found.insert(1, "high", edges[1:])
    return found.rename_axis("bin")


def tensor(frame: DataFrame, column: str) -> Tensor:
    """Return a column as torchmetrics takes it."""
    return torch.from_numpy(frame[column].to_numpy(copy=True))


def confidence(frame: DataFrame) -> Tensor:
    """Return confidences below 1: torchmetrics would put a confidence of 1 in a bin of its own."""
    return tensor(frame, "confidence").clamp(max=np.nextafter(1.0, 0.0))
