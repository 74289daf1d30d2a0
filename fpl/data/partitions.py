"""Partitions: from the labels of a data set to the image indices of each client.

Every kind says first how many images of a class each client gets; which ones is then drawn from other streams, so shots can be
changed without changing who has what. The splits of the released code are in `fpl.released_splits`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Indices = list[np.ndarray]  # one integer array per client
Counts = np.ndarray  # (2, n, c) training and test images of each client and class; (2, c) of all

KINDS = ("pathological", "even", "dirichlet", "domain", "iid", "pachinko", "column")
FORMS = ("ours", "released")
LOADERS = ("right", "mismatched", "misnamed", "both")
CLASSES = ("all", "base")
ELSEWHERE = ("base", "novel", "target")  # what clients may be tested on besides their own images, see `elsewhere`
DRAWS = 100  # of all clients together, until each has min_size images
SUPERCLASSES = (  # of CIFAR-100, whose classes are numbered in alphabetical order: aquatic mammals, fish, flowers, ...
    (4, 30, 55, 72, 95), (1, 32, 67, 73, 91), (54, 62, 70, 82, 92), (9, 10, 16, 28, 61), (0, 51, 53, 57, 83),
    (22, 39, 40, 86, 87), (5, 20, 25, 84, 94), (6, 7, 14, 18, 24), (3, 42, 43, 88, 97), (12, 17, 37, 68, 76),
    (23, 33, 49, 60, 71), (15, 19, 21, 31, 38), (34, 63, 64, 66, 75), (26, 45, 77, 79, 99), (2, 11, 35, 46, 98),
    (27, 29, 44, 78, 93), (36, 50, 65, 74, 80), (47, 52, 56, 59, 96), (8, 13, 48, 58, 90), (41, 69, 81, 85, 89),
)  # fmt: skip


@dataclass(frozen=True)
class Partition:
    """How images go to clients.

    kind: "pathological", disjoint classes by the rule of the paper (pFedMoAP, section 4.1); "even", the same with class counts
    that differ by at most one, ours; "dirichlet", "domain", "iid" and "pachinko", ours, see `dirichlet`, `iid`, `pachinko`;
    "column", as the manifest's column client says. form "released": the split of that kind in the released code, index by index,
    and loader: its mistakes with DomainNet and Office, see `fpl.released_splits`.

    To see what clients can do with classes and domains that nobody trains on: classes "base" deals the first ceil(c / 2) of the c
    labels only, the rest are novel; held_out is a domain of which nobody has images. With kind "domain" and as many clients as
    there are other domains, every domain is one client, as in FedPGP (Cui et al., ICML 2024).
    """

    kind: str = "pathological"
    clients: int = 10
    shots: int = 16  # training images per class and client; 0: all
    concentration: float = 0.5  # the alpha of Dir(alpha), of kinds dirichlet, domain and pachinko: small is far from even
    min_size: int = 2  # training and test images that every client has, of kinds dirichlet and domain
    form: str = "ours"
    loader: str = "right"  # or mismatched (D1), misnamed (D2), both
    split_seed: int = 0  # of who has which classes and how many images; 0: the run's
    shot_seed: int = 0  # of which training images these are; 0: the run's
    classes: str = "all"  # or base
    held_out: str = ""  # a domain

    def __post_init__(self):
        checked = {"partition": (self.kind, KINDS), "form": (self.form, FORMS), "loader": (self.loader, LOADERS)}
        for what, (value, known) in {**checked, "classes": (self.classes, CLASSES)}.items():
            if value not in known:
                raise ValueError(f"{what} {value!r} is not known: use {', '.join(known[:-1])} or {known[-1]}")
        if self.clients < 1 or self.min_size < 1:
            raise ValueError(f"clients ({self.clients}) and min_size ({self.min_size}) must be at least 1")
        if self.shots < 0:
            raise ValueError(f"shots ({self.shots}) must be at least 0, which stands for all training images")
        if not self.concentration > 0:
            raise ValueError(f"concentration ({self.concentration}) must be above 0")
        if (self.classes != "all" or self.held_out) and (self.form, self.loader) != ("ours", "right"):
            raise ValueError(
                "the released splits have all classes and domains: use form ours and loader right, or leave none out"
            )


def make(
    partition: Partition,
    labels: np.ndarray,
    split: np.ndarray,
    seed: int,
    domain: np.ndarray | None = None,
    client: np.ndarray | None = None,
) -> tuple[Indices, Indices]:
    """Image numbers of each client: for training class by class, for testing in the files' order.

    labels, split ("train", "test"), domain, client: one per image. Kind "domain" needs the domains: Dirichlet in each, the
    clients of the first (in alphabetical order) first. Kind "column" needs the clients, who come in the order of their names. A
    client trains on `shots` of its images of each class (all, if there are fewer) and is tested on all of its test images. Novel
    classes and the domain that is held out are dealt to nobody; streams and rules do not know that there are more images. Who
    has what is drawn from the stream "classes", which training images these are from "shots", which test images from "test".
    Raises ValueError when the images cannot be dealt as asked.
    """
    base, target = _base(partition, labels), _target(partition, labels, domain)
    here = base & ~target
    if partition.kind == "column":
        groups = _clients(partition.clients, client, here)
    else:
        groups = _domains(partition.clients, domain, here) if partition.kind == "domain" else [here]
    n, n_cls = partition.clients // len(groups), int(labels.max()) + 1
    split_seed, shot_seed = partition.split_seed or seed, partition.shot_seed or seed
    seeds = {"classes": split_seed, "shots": shot_seed, "test": split_seed}
    streams = {name: np.random.default_rng([number, *name.encode()]) for name, number in seeds.items()}
    train: Indices = []
    test: Indices = []
    for group in groups:
        pools = [
            [streams[stream].permutation(np.flatnonzero(group & (labels == c) & (split == name))) for c in range(n_cls)]
            for stream, name in (("shots", "train"), ("test", "test"))
        ]
        counts = np.array([[len(pool) for pool in of_split] for of_split in pools])
        dealt, order = DEALERS[partition.kind](partition, counts, n, streams["classes"])
        train_of, test_of = (
            [np.split(pool, np.cumsum(of_class)[:-1]) for pool, of_class in zip(*both, strict=True)]
            for both in zip(pools, dealt.swapaxes(1, 2), strict=True)
        )
        shots = partition.shots or None
        train += [np.concatenate([np.sort(train_of[c][i][:shots]) for c in order]) for i in range(n)]
        test += [np.sort(np.concatenate([pieces[i] for pieces in test_of])) for i in range(n)]
    return train, test


def n_base(labels: np.ndarray) -> int:
    """How many of the classes, the first in the order of the labels, are base classes: half of them, rounded up."""
    return (int(labels.max()) + 2) // 2


def elsewhere(
    partition: Partition, labels: np.ndarray, split: np.ndarray, domain: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Image numbers that every client is tested on besides its own, by name; none if the partition leaves nothing out.

    "base": the test images of all base classes, and "novel" of all others, both without a domain that is held out; "target":
    training and test images of the domain that is held out, with the classes that clients train on. Raises ValueError if one of
    these has no images.
    """
    base, target, test = _base(partition, labels), _target(partition, labels, domain), split == "test"
    found = {"base": base & test & ~target, "novel": ~base & test & ~target} if partition.classes == "base" else {}
    found |= {"target": base & target} if partition.held_out else {}
    for name, images in found.items():
        if not images.any():
            raise ValueError(f"there are no {name} images to test on: use classes all and no held_out, or other data")
    return {name: np.flatnonzero(images) for name, images in found.items()}


def _base(partition: Partition, labels: np.ndarray) -> np.ndarray:
    """Which images (images,) are of classes that clients train on."""
    return labels < n_base(labels) if partition.classes == "base" else np.full(len(labels), True)


def _target(partition: Partition, labels: np.ndarray, domain: np.ndarray | None) -> np.ndarray:
    """Which images (images,) are of the domain that is held out."""
    if not partition.held_out:
        return np.full(len(labels), False)
    names = [] if domain is None else np.unique(domain).tolist()
    if domain is None or len(names) < 2 or partition.held_out not in names:
        there = f"there are {', '.join(names)}" if len(names) > 1 else "the images are not of several domains"
        raise ValueError(f"held_out {partition.held_out!r} cannot be left out: {there}")
    return domain == partition.held_out


def _domains(clients: int, domain: np.ndarray | None, here: np.ndarray) -> list[np.ndarray]:
    if domain is None:
        raise ValueError("the partition by domain needs the domain of each image: give a domain column or use dirichlet")
    names = np.unique(domain[here])
    if clients % len(names):
        raise ValueError(f"{clients} clients cannot be shared evenly by {len(names)} domains: use a multiple of {len(names)}")
    return [(domain == name) & here for name in names]


def _clients(clients: int, client: np.ndarray | None, here: np.ndarray) -> list[np.ndarray]:
    if client is None:
        raise ValueError("the partition by column needs the client of each image: give the manifest a column client")
    names = np.unique(client[here])
    if len(names) != clients:
        raise ValueError(f"the column client names {len(names)} clients, asked for are {clients}: set clients to {len(names)}")
    return [(client == name) & here for name in names]


def _classes(counts: Counts) -> np.ndarray:
    """The classes of which there are images to deal."""
    return np.flatnonzero(counts.any(0))


def column(partition: Partition, counts: Counts, n: int, rng: np.random.Generator) -> tuple[Counts, np.ndarray]:
    """All images of the one client."""
    return counts[:, None], np.arange(counts.shape[1])


def disjoint(partition: Partition, counts: Counts, n: int, rng: np.random.Generator) -> tuple[Counts, np.ndarray]:
    """Every class belongs to one client: classes are shuffled and dealt in blocks.

    "pathological" is the paper's rule (pFedMoAP, section 4.1) as its code reads it: blocks of round(c / n) classes, the rest to
    the last client. "even" is ours. Raises ValueError when that leaves a client without a class.
    """
    n_cls = len(_classes(counts))
    possible = [k for k in range(1, n_cls + 1) if partition.kind == "even" or round(n_cls / k) * (k - 1) < n_cls]
    if n not in possible:
        fewer = max(k for k in possible if k < n)
        raise ValueError(
            f"{n} clients cannot share {n_cls} classes by the {partition.kind} partition, some would have none: use {fewer}"
        )
    classes = rng.permutation(_classes(counts))
    cut = np.arange(1, n) * round(n_cls / n)
    blocks = np.array_split(classes, n) if partition.kind == "even" else np.split(classes, cut)
    return counts[:, None] * np.array([np.isin(np.arange(counts.shape[1]), block) for block in blocks]), classes


def dirichlet(partition: Partition, counts: Counts, n: int, rng: np.random.Generator) -> tuple[Counts, np.ndarray]:
    """Each class is dealt with p ~ Dir(alpha 1_n), the same p for training and test images.

    A client that already has 1/n of the training images gets none of the class. All is drawn again until every client has
    `min_size` training and test images. The paper names Dir(0.5) for CIFAR with 100 clients and Dir(0.3) with 5 clients in each
    domain (section 4.1); the balancing is its code's. Ours: the draws of classes and domains are independent, they depend on the
    seed, and are given up after 100. Raises ValueError then.
    """
    for _ in range(DRAWS):
        dealt = _dealt(partition, counts, n, rng)
        if dealt is not None and dealt.sum(2).min() >= partition.min_size:
            return dealt, np.arange(counts.shape[1])
    raise ValueError(
        f"in {DRAWS} draws of Dir({partition.concentration}) {n} clients never had {partition.min_size} training and test images "
        f"each of {counts[0].sum()} and {counts[1].sum()}: use fewer clients, a larger concentration or a smaller min_size"
    )


def _dealt(partition: Partition, counts: Counts, n: int, rng: np.random.Generator) -> Counts | None:
    """One draw; None if the p of all clients that may still take images round to 0."""
    if n == 1:  # the rule would keep from the one client what comes after its last training image
        return counts[:, None]
    dealt = np.zeros((2, n, counts.shape[1]), int)
    for c in _classes(counts):
        shares = rng.dirichlet(np.full(n, partition.concentration)) * (dealt[0].sum(1) * n < counts[0].sum())
        if not shares.sum() > 0:
            return None
        ends = np.outer(counts[:, c], np.cumsum(shares) / shares.sum())
        dealt[:, :, c] = np.diff(np.rint(ends), prepend=0)  # rounded down, the last client would get one in spite of a share of 0
    return dealt


def iid(partition: Partition, counts: Counts, n: int, rng: np.random.Generator) -> tuple[Counts, np.ndarray]:
    """Images are dealt one by one, class after class, so clients differ by at most one image in a class and in all. Ours.

    Raises ValueError when a class has too few training images for every client to have one.
    """
    rarest = min(_classes(counts), key=lambda c: counts[0, c])
    if counts[0, rarest] < n:
        raise ValueError(f"{n} clients cannot share {counts[0, rarest]} training images of class {rarest}: use fewer clients")
    ends = counts.cumsum(1)
    upto = (ends[:, None] + np.arange(n)[::-1, None]) // n  # client i has had images i, i + n, ... of all those before
    return np.diff(upto, axis=2, prepend=0), np.arange(counts.shape[1])


def pachinko(partition: Partition, counts: Counts, n: int, rng: np.random.Generator) -> tuple[Counts, np.ndarray]:
    """Pachinko allocation over the 20 superclasses of CIFAR-100: clients in turn take 1/n of the images without replacement.

    A client draws weights Dir(alpha 1_20) of the superclasses and Dir(10 1_5) of the classes in each; what is used up goes to the
    other classes of the superclass, then to the other superclasses (Reddi et al., ICLR 2021, appendix). Ours: training and test
    images are drawn with the same weights (the released code pools the two), and none is left over. Labels must be
    numbered as in CIFAR-100; raises ValueError unless there are 100.
    """
    if counts.shape[1] != 100:
        raise ValueError(f"pachinko needs the 100 classes of CIFAR-100, these labels have {counts.shape[1]}: use dirichlet")
    tree, left, dealt = np.array(SUPERCLASSES), counts.copy(), np.zeros((2, n, 100), int)
    for i in range(n):
        top, inner = rng.dirichlet(np.full(20, partition.concentration)), rng.dirichlet(np.full(5, 10.0), 20)
        for here, rest, total in zip(dealt[:, i], left, counts.sum(1), strict=True):
            of_superclass = _taken(total // n + (i < total % n), top, rest[tree].sum(1), rng)
            for classes, weights, images in zip(tree, inner, of_superclass, strict=True):
                here[classes] = _taken(images, weights, rest[classes], rng)
            rest -= here
    return dealt, np.arange(100)


def _taken(images: int, weights: np.ndarray, left: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """How many of `left` (k,) one takes in drawing `images` by `weights` (k,); what is used up is drawn from the others."""
    taken = np.zeros_like(left)
    while taken.sum() < images:
        open_weights = np.where(taken < left, np.maximum(weights, 1e-9), 0)  # a weight may have rounded to 0
        taken = np.minimum(taken + rng.multinomial(images - taken.sum(), open_weights / open_weights.sum()), left)
    return taken


DEALERS: dict[str, Callable[[Partition, Counts, int, np.random.Generator], tuple[Counts, np.ndarray]]] = {
    "pathological": disjoint,
    "even": disjoint,
    "dirichlet": dirichlet,
    "domain": dirichlet,
    "iid": iid,
    "pachinko": pachinko,
    "column": column,
}
