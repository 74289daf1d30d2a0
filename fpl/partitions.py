"""Partitions: from the labels of a data set to the image indices of each client."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Indices = list[np.ndarray]  # one integer array per client

SUPERCLASSES = (  # of CIFAR-100, whose classes are numbered in alphabetical order: aquatic mammals, fish, flowers, ...
    (4, 30, 55, 72, 95), (1, 32, 67, 73, 91), (54, 62, 70, 82, 92), (9, 10, 16, 28, 61), (0, 51, 53, 57, 83),
    (22, 39, 40, 86, 87), (5, 20, 25, 84, 94), (6, 7, 14, 18, 24), (3, 42, 43, 88, 97), (12, 17, 37, 68, 76),
    (23, 33, 49, 60, 71), (15, 19, 21, 31, 38), (34, 63, 64, 66, 75), (26, 45, 77, 79, 99), (2, 11, 35, 46, 98),
    (27, 29, 44, 78, 93), (36, 50, 65, 74, 80), (47, 52, 56, 59, 96), (8, 13, 48, 58, 90), (41, 69, 81, 85, 89),
)  # fmt: skip


@dataclass(frozen=True)
class Partition:
    """How images go to clients: `clients` of them with disjoint classes, `shots` training images per class and client."""

    kind: str = "pathological"  # or "even": class counts differ by at most one
    clients: int = 10
    shots: int = 16

    def __post_init__(self):
        if self.kind not in ("pathological", "even"):
            raise ValueError(f"partition {self.kind!r} is not known: use pathological or even")
        if self.clients < 1 or self.shots < 1:
            raise ValueError(f"clients ({self.clients}) and shots ({self.shots}) must be at least 1")


def make(partition: Partition, labels: np.ndarray, split: np.ndarray, seed: int) -> tuple[Indices, Indices]:
    """Image numbers of each client: for training class by class, for testing in the files' order. labels, split: one per image.

    Classes are shuffled and dealt in blocks; a client trains on `shots` images of each of its classes (all, if there are fewer)
    and is tested on all test images of them. Classes and shots are drawn from streams of their own. "pathological" is the
    paper's rule (pFedMoAP, section 4.1): blocks of round(c / n) classes, the rest to the last client. Raises ValueError when
    that leaves a client without a class.
    """
    n_cls, n = int(labels.max()) + 1, partition.clients
    size = round(n_cls / n)
    possible = [k for k in range(1, n_cls + 1) if partition.kind == "even" or round(n_cls / k) * (k - 1) < n_cls]
    if n not in possible:
        fewer = max(k for k in possible if k < n)
        raise ValueError(
            f"{n} clients cannot share {n_cls} classes by the {partition.kind} partition, some would have none: use {fewer}"
        )
    classes = np.random.default_rng([seed, *b"classes"]).permutation(n_cls)
    blocks = np.array_split(classes, n) if partition.kind == "even" else np.split(classes, size * np.arange(1, n))
    shots = np.random.default_rng([seed, *b"shots"])
    pools = {c: np.flatnonzero((labels == c) & (split == "train")) for c in range(n_cls)}
    chosen = {c: np.sort(shots.permutation(pool)[: partition.shots]) for c, pool in pools.items()}
    train = [np.concatenate([chosen[c] for c in block]) for block in blocks]
    test = [np.flatnonzero(np.isin(labels, block) & (split == "test")) for block in blocks]
    return train, test
