"""Partitions: from the labels of a data set to the image indices of each client."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

Indices = list[np.ndarray]  # one integer array per client


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


def released_domain_dirichlet(
    train_labels: ArrayLike,
    test_labels: ArrayLike,
    n_clients: int = 5,
    beta: float = 0.3,
    min_size: int = 2,
    seed: int = 0,
) -> tuple[Indices, Indices]:
    """The clients of one domain of DomainNet or Office-Caltech10, as the code released with pFedMoAP deals them out.

    Class after class, the shuffled images are cut in proportions p ~ Dir(beta 1_n); a client that already holds 1/n of the
    training images gets none of the class. Train and test are cut with the same p. Legacy NumPy is re-seeded for every
    class, so the split does not depend on the run's seed, the p of different classes are related, and the label counts
    depend on the class counts alone, not on the order of the list. Use it to reproduce Tables 3 and 4, for nothing else.

    train_labels (n_train,), test_labels (n_test,): class of each image of the domain.
    Returns the train and the test indices of each client, in the order in which the released code leaves them.
    ValueError if a client gets fewer than `min_size` images: the release would then try again with the same numbers, forever;
    and if the p of all clients that may still take images round to 0 (tiny beta), where the release fails too.
    Source: pFedMoAP (ICLR 2025), Section 4.1, and a description in our own words of its repository at a481de3.
    """
    train_labels, test_labels = np.asarray(train_labels), np.asarray(test_labels)
    train: Indices = [np.empty(0, int)] * n_clients
    test: Indices = [np.empty(0, int)] * n_clients
    rng = np.random.RandomState(seed)
    for label in np.union1d(train_labels, test_labels):
        rng = np.random.RandomState(seed)  # again for every class: this is the defect that fixes the partition
        train_class = rng.permutation(np.flatnonzero(train_labels == label))
        test_class = rng.permutation(np.flatnonzero(test_labels == label))
        shares = rng.dirichlet(np.full(n_clients, beta))
        shares[[len(held) >= len(train_labels) / n_clients for held in train]] = 0
        train, test = _deal(train, train_class, shares), _deal(test, test_class, shares)
    _check_sizes(train, test, min_size)
    for client in range(n_clients):  # continues the generator of the last class
        rng.shuffle(train[client])
        rng.shuffle(test[client])
    return train, test


def _deal(held: Indices, images: np.ndarray, shares: np.ndarray) -> Indices:
    """Adds to each client its part of `images`; `shares` (n,) need not sum to 1. ValueError if they are all 0."""
    if not shares.any():
        raise ValueError("no client that may still take images drew a share of the class: pass another seed or a larger beta")
    cuts = (np.cumsum(shares / shares.sum())[:-1] * len(images)).astype(int)
    return [np.concatenate(pair) for pair in zip(held, np.split(images, cuts))]


def _check_sizes(train: Indices, test: Indices, min_size: int) -> None:
    size, split, client = min((len(i), name, c) for name, part in (("train", train), ("test", test)) for c, i in enumerate(part))
    if size < min_size:
        raise ValueError(
            f"client {client} would hold {size} {split} images, fewer than min_size={min_size}, and every further pass of the "
            "released rule is the same because it re-seeds: pass another seed, a smaller min_size or fewer clients"
        )
