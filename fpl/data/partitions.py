"""Partitions give every client its images, by nothing but the labels of a data set.

Every kind says first how many images of a class each client gets; which ones is then drawn from
other streams, so shots can be changed without changing who has what. The splits of the released
code are in `fpl.released.splits`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
from numpy import ndarray
from numpy.random import Generator
from pydantic import Field, FiniteFloat, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

Indices = list[ndarray]  # one integer array per client
# (2, n, c) training and test images of each client and class; (2, c) of all clients together
Counts = ndarray
# counts of each client, or (2, c) the one client that has all of a class; and the classes' order
Dealt = tuple[Counts, ndarray]

GLOBAL = "global"  # the test images of all clients
ELSEWHERE = ("base", "novel", "target")  # what clients may be tested on, see `elsewhere`
NUMBER = re.compile(r"[-+]?[0-9]+(\.[0-9]+)?")
DRAWS = 100  # of all clients together, until each has min_size images
# of CIFAR-100, whose classes are numbered in alphabetical order
SUPERCLASSES = np.loadtxt(
    """
     4 30 55 72 95  # aquatic mammals
     1 32 67 73 91  # fish
    54 62 70 82 92  # flowers
     9 10 16 28 61  # food containers
     0 51 53 57 83  # fruit and vegetables
    22 39 40 86 87  # household electrical devices
     5 20 25 84 94  # household furniture
     6  7 14 18 24  # insects
     3 42 43 88 97  # large carnivores
    12 17 37 68 76  # large man-made outdoor things
    23 33 49 60 71  # large natural outdoor scenes
    15 19 21 31 38  # large omnivores and herbivores
    34 63 64 66 75  # medium-sized mammals
    26 45 77 79 99  # invertebrates other than insects
     2 11 35 46 98  # people
    27 29 44 78 93  # reptiles
    36 50 65 74 80  # small mammals
    47 52 56 59 96  # trees
     8 13 48 58 90  # vehicles
    41 69 81 85 89  # more vehicles
    """.splitlines(),
    int,
)


@dataclass(frozen=True)
class Partition:
    """How images go to clients.

    kind: "pathological", disjoint classes by the rule of the paper (pFedMoAP, section 4.1); "even",
        ours, the same with class counts that differ by at most one; "dirichlet", "domain", "iid"
        and "pachinko", ours, see the functions of these names; "column", as the manifest's column
        client says.
    shots: training images of each class and client, 0 for all.
    concentration: the alpha of Dir(alpha), of kinds dirichlet, domain and pachinko; small is far
        from even.
    min_size: training and test images that every client has, of kinds dirichlet and domain.
    form: "released" is the split of that kind in the released code, index by index.
    loader: the mistakes of the released code with DomainNet and Office, see `fpl.released.splits`:
        "mismatched" (D1), "misnamed" (D2) or "both".
    split_seed: decides who has which classes and how many images; 0 is the run's seed.
    shot_seed: decides which training images these are; 0 is the run's seed.
    classes: "base" deals the first ceil(c / 2) of the c labels only, the rest are novel.
    held_out: a domain of which nobody has images. With kind "domain" and as many clients as there
        are other domains, every domain is one client, as in FedPGP (Cui et al., ICML 2024).
    unseen: how many of the clients never train; which ones, `is_unseen` says. Controls that read
        everybody's images read theirs, too.
    """

    kind: Literal["pathological", "even", "dirichlet", "domain", "iid", "pachinko", "column"] = (
        "pathological"
    )
    clients: PositiveInt = 10
    shots: NonNegativeInt = 16
    concentration: Annotated[FiniteFloat, Field(gt=0)] = 0.5
    min_size: PositiveInt = 2
    form: Literal["ours", "released"] = "ours"
    loader: Literal["right", "mismatched", "misnamed", "both"] = "right"
    split_seed: NonNegativeInt = 0
    shot_seed: NonNegativeInt = 0
    classes: Literal["all", "base"] = "all"
    held_out: str = ""
    unseen: NonNegativeInt = 0

    def __post_init__(self):
        leaves_out = self.classes != "all" or self.held_out or self.unseen
        if leaves_out and (self.form, self.loader) != ("ours", "right"):
            raise ValueError(
                "the released splits have all classes, domains and clients: use form ours and "
                "loader right, or leave none out"
            )
        if self.unseen >= self.clients:
            of_all = f"unseen {self.unseen} of {self.clients} clients"
            raise ValueError(f"{of_all} leaves nobody who trains: give a smaller number")


def is_unseen(client: ndarray, unseen: int | ndarray, clients: int | ndarray) -> ndarray:
    """Say of clients, by their numbers, whether they are among the `unseen` that never train.

    These stand evenly among all, and so in every domain: 2 of 10 clients are the numbers 4 and 9.
    """
    return (client + 1) * unseen // clients > client * unseen // clients


def make(
    partition: Partition,
    labels: ndarray,
    split: ndarray,
    seed: int,
    domain: ndarray | None = None,
    client: ndarray | None = None,
) -> tuple[Indices, Indices]:
    """Number the images of each client, for training class by class, for testing in order.

    A client trains on `shots` of its images of each class (all, if there are fewer) and is tested
    on all of its test images. Novel classes and the domain that is held out are dealt to nobody;
    streams and rules do not know that there are more images. Who has what is drawn from the stream
    "classes", which training images these are from "shots", which test images from "test".

    labels, split ("train" or "test"), domain, client: one per image.
    domain: needed by kind "domain", which is Dirichlet in each; clients of the first, in
        alphabetical order, come first.
    client: needed by kind "column"; clients come in the order of `in_order`.

    Raises ValueError when the images cannot be dealt as asked.
    """
    here = is_dealt(partition, labels, domain)
    separate = groups(partition, here, domain, client)
    n = partition.clients // len(separate)
    n_cls = int(labels.max()) + 1
    split_seed = partition.split_seed or seed
    classes_rng = stream(split_seed, "classes")
    test_rng = stream(split_seed, "test")
    shots_rng = stream(partition.shot_seed or seed, "shots")
    train: Indices = []
    test: Indices = []
    for group in separate:
        parts = [group[split[group] == name] for name in ("train", "test")]
        counts = np.array([np.bincount(labels[part], minlength=n_cls) for part in parts])
        pools = [
            {c: rng.permutation(images) for c, images in of_each_class(part, labels).items()}
            for part, rng in zip(parts, (shots_rng, test_rng), strict=True)
        ]
        dealt, order = DEALERS[partition.kind](partition, counts, n, classes_rng)
        few = partition.shots or None
        for own in handed_out(pools[0], dealt[0], order, n):
            train.append(joined([np.sort(images[:few]) for images in own]))
        test += [np.sort(joined(own)) for own in handed_out(pools[1], dealt[1], order, n)]
    return train, test


def stream(seed: int, name: str) -> Generator:
    return np.random.default_rng([seed, *name.encode()])


def of_each_class(images: ndarray, labels: ndarray) -> dict[int, ndarray]:
    """Return the images of each class that has any, in the order of the classes."""
    by_class = images[np.argsort(labels[images], kind="stable")]
    classes, starts = np.unique(labels[by_class], return_index=True)
    return dict(zip(classes.tolist(), np.split(by_class, starts[1:])))


def handed_out(
    pools: Mapping[int, ndarray], dealt: ndarray, order: ndarray, n: int
) -> list[list[ndarray]]:
    """Cut the images of each class as `dealt` says; a client gets its parts in `order`.

    What nobody has takes no time: clients times classes may be far more than images.
    """
    found: list[list[ndarray]] = [[] for _ in range(n)]
    for c in order[np.isin(order, [*pools])]:
        if dealt.ndim == 1:
            found[dealt[c]].append(pools[c])
            continue
        clients = np.flatnonzero(dealt[:, c])
        parts = np.split(pools[c], np.cumsum(dealt[clients, c])[:-1])
        for client, part in zip(clients, parts):
            found[client].append(part)
    return found


def joined(parts: Sequence[ndarray]) -> ndarray:
    return np.concatenate([np.array([], int), *parts])


def n_base(labels: ndarray) -> int:
    """Count the base classes, the first in the order of the labels: half of them, rounded up."""
    return (int(labels.max()) + 2) // 2


def elsewhere(
    partition: Partition, labels: ndarray, split: ndarray, domain: ndarray | None = None
) -> dict[str, ndarray]:
    """Number the images that all clients are tested on besides their own, if any are left out.

    "base" are the test images of all base classes and "novel" those of all others, both without a
    domain that is held out; "target" are training and test images of that domain, of the classes
    that clients train on. Raises ValueError if one of these has no images.
    """
    base = is_base(partition, labels)
    target = is_target(partition, labels, domain)
    test = (split == "test") & ~target
    found = {}
    if partition.classes == "base":
        found = {"base": base & test, "novel": ~base & test}
    if partition.held_out:
        found["target"] = base & target
    for name, images in found.items():
        if not images.any():
            raise ValueError(
                f"there are no {name} images to test on: "
                "use classes all and no held_out, or other data"
            )
    return {name: np.flatnonzero(images) for name, images in found.items()}


def is_dealt(partition: Partition, labels: ndarray, domain: ndarray | None) -> ndarray:
    """Say of each image whether any client may have it."""
    return is_base(partition, labels) & ~is_target(partition, labels, domain)


def is_base(partition: Partition, labels: ndarray) -> ndarray:
    """Say of each image whether clients train on its class."""
    if partition.classes == "base":
        return labels < n_base(labels)
    return np.full(len(labels), True)


def is_target(partition: Partition, labels: ndarray, domain: ndarray | None) -> ndarray:
    """Say of each image whether it is of the domain that is held out."""
    if not partition.held_out:
        return np.full(len(labels), False)
    names = [] if domain is None else np.unique(domain).tolist()
    several = len(names) > 1
    if domain is None or not several or partition.held_out not in names:
        there = (
            f"there are {', '.join(names)}" if several else "the images are not of several domains"
        )
        raise ValueError(f"held_out {partition.held_out!r} cannot be left out: {there}")
    return domain == partition.held_out


def groups(
    partition: Partition, here: ndarray, domain: ndarray | None, client: ndarray | None = None
) -> Indices:
    """Number the images of each group that is dealt for itself, of those that are `here`.

    Raises ValueError without the column that says the groups, and for clients whose number does not
    fit theirs.
    """
    images = np.flatnonzero(here)
    if partition.kind not in ("domain", "column"):
        return [images]
    what, column = ("domain", domain) if partition.kind == "domain" else ("client", client)
    if column is None:
        raise ValueError(
            f"the partition by {partition.kind} needs the {what} of each image: "
            f"give the manifest a column {what}"
        )
    names, places = np.unique(column[here], return_inverse=True)
    n = len(names)
    if what == "client" and n != partition.clients:
        raise ValueError(
            f"the column client names {n} clients, asked for are {partition.clients}: "
            f"set clients to {n}"
        )
    if partition.clients % n:
        raise ValueError(
            f"{partition.clients} clients cannot be shared evenly by {n} domains: "
            f"use a multiple of {n}"
        )
    ends = np.cumsum(np.bincount(places))[:-1]
    found = np.split(images[np.argsort(places, kind="stable")], ends)
    if what == "client":
        of_name = dict(zip(names.tolist(), found, strict=True))
        return [of_name[name] for name in in_order(of_name)]
    return found


def client_names(
    partition: Partition, labels: ndarray, domain: ndarray | None, client: ndarray | None
) -> list[str]:
    """Name the clients of kind "column" as the column does, in their order; of others nothing."""
    if partition.kind != "column" or client is None:
        return []
    return in_order(np.unique(client[is_dealt(partition, labels, domain)]).tolist())


def domain_names(partition: Partition, labels: ndarray, domain: ndarray) -> list[str]:
    """Name the domain of each client of kind "domain", in their order; of others nothing."""
    if partition.kind != "domain":
        return []
    names = np.unique(domain[is_dealt(partition, labels, domain)])
    return np.repeat(names, partition.clients // len(names)).tolist()


def in_order(names: Iterable[str]) -> list[str]:
    """Sort names as people count: as numbers where all are; else "site 2" before "site 10"."""
    names = [*names]
    if all(NUMBER.fullmatch(name) for name in names):
        return sorted(names, key=lambda name: (float(name), name))

    def natural(name: str) -> list:
        words = re.split("([0-9]+)", name)
        return [int(word[:99]) if i % 2 else word for i, word in enumerate(words)]

    return sorted(names, key=lambda name: (natural(name), name))


def column(partition: Partition, counts: Counts, n: int, rng: Generator) -> Dealt:
    """Give all images to the one client."""
    return counts[:, None], np.arange(counts.shape[1])


def disjoint(partition: Partition, counts: Counts, n: int, rng: Generator) -> Dealt:
    """Give every class to one client: classes are shuffled and dealt in blocks.

    "pathological" is the paper's rule (pFedMoAP, section 4.1) as its code reads it: blocks of
    round(c / n) classes, the rest to the last client. "even" is ours. Raises ValueError when that
    leaves a client without a class.
    """
    classes = np.flatnonzero(counts.any(0))  # of which there are images
    n_cls = len(classes)
    even = partition.kind == "even"
    possible = [k for k in range(1, n_cls + 1) if even or round(n_cls / k) * (k - 1) < n_cls]
    if n not in possible:
        fewer = max(k for k in possible if k < n)
        raise ValueError(
            f"{n} clients cannot share {n_cls} classes by the {partition.kind} partition, "
            f"some would have none: use {fewer}"
        )
    classes = rng.permutation(classes)
    if even:
        blocks = np.array_split(classes, n)
    else:
        blocks = np.split(classes, np.arange(1, n) * round(n_cls / n))
    owner = np.zeros(counts.shape[1], int)
    owner[classes] = np.repeat(np.arange(n), [len(block) for block in blocks])
    return np.array([owner, owner]), classes


def dirichlet(partition: Partition, counts: Counts, n: int, rng: Generator) -> Dealt:
    """Deal each class with shares p ~ Dir(alpha 1_n), the same for training and test images.

    A client that already has 1/n of the training images gets none of the class. All is drawn again
    until every client has `min_size` training and test images. The paper names Dir(0.5) for CIFAR
    with 100 clients and Dir(0.3) with 5 clients in each domain (section 4.1); the balancing is its
    code's. Ours: the draws of classes and domains are independent, they depend on the seed, and are
    given up after 100. Raises ValueError then.
    """
    for _ in range(DRAWS):
        dealt = draw_shares(partition, counts, n, rng)
        if dealt is not None and dealt.sum(2).min() >= partition.min_size:
            return dealt, np.arange(counts.shape[1])
    train, test = counts.sum(1)
    fewer = "fewer clients, " if n > 1 else ""
    raise ValueError(
        f"in {DRAWS} draws of Dir({partition.concentration}) {n} clients never had "
        f"{partition.min_size} training and test images each of {train} and {test}: "
        f"use {fewer}a larger concentration or a smaller min_size"
    )


def draw_shares(partition: Partition, counts: Counts, n: int, rng: Generator) -> Counts | None:
    """Draw once; None if the shares of all clients that may still take images round to 0."""
    if n == 1:  # the rule would keep from the one client what follows its last training image
        return counts[:, None]
    dealt = np.zeros((2, n, counts.shape[1]), int)
    had = np.zeros(n, int)  # training images
    total = counts[0].sum()
    for c in np.flatnonzero(counts.any(0)):
        may_take = had * n < total
        shares = rng.dirichlet(np.full(n, partition.concentration)) * may_take
        if not shares.sum() > 0:
            return None
        ends = np.outer(counts[:, c], np.cumsum(shares) / shares.sum())
        # rounded down, the last client would get one in spite of a share of 0
        dealt[:, :, c] = np.diff(np.rint(ends), prepend=0)
        had += dealt[0, :, c]
    return dealt


def iid(partition: Partition, counts: Counts, n: int, rng: Generator) -> Dealt:
    """Deal images one by one, class after class: clients differ by one image in a class and in all.

    Ours. Raises ValueError when a class has too few training images for every client to have one.
    """
    rarest = min(np.flatnonzero(counts.any(0)), key=lambda c: counts[0, c])
    fewest = counts[0, rarest]
    if fewest < n:
        less = "use fewer clients" if fewest else "add some, or leave the class out"
        raise ValueError(
            f"{n} clients cannot share {fewest} training images of class {rarest}: {less}"
        )
    # client i has had images i, i + n, ... of all those up to the end of a class
    upto = (counts.cumsum(1)[:, None] + np.arange(n)[::-1, None]) // n
    return np.diff(upto, axis=2, prepend=0), np.arange(counts.shape[1])


def pachinko(partition: Partition, counts: Counts, n: int, rng: Generator) -> Dealt:
    """Let clients in turn take 1/n of the images, by weights of CIFAR-100's 20 superclasses.

    A client draws weights Dir(alpha 1_20) of the superclasses and Dir(10 1_5) of the classes in
    each; what is used up goes to the other classes of the superclass, then to the other
    superclasses (Reddi et al., ICLR 2021, appendix). Ours: training and test images are drawn with
    the same weights (the released code pools the two), and none is left over. Labels must be
    numbered as in CIFAR-100; raises ValueError unless there are 100.
    """
    n_cls = counts.shape[1]
    if n_cls != 100:
        raise ValueError(
            f"pachinko needs the 100 classes of CIFAR-100, these labels have {n_cls}: use dirichlet"
        )
    dealt = np.zeros((2, n, n_cls), int)
    left = counts.copy()
    for i in range(n):
        top = rng.dirichlet(np.full(20, partition.concentration))
        inner = rng.dirichlet(np.full(5, 10.0), 20)
        for taken, rest, total in zip(dealt[:, i], left, counts.sum(1), strict=True):
            images = total // n + (i < total % n)
            of_superclass = draw_from(images, top, rest[SUPERCLASSES].sum(1), rng)
            for classes, weights, part in zip(SUPERCLASSES, inner, of_superclass, strict=True):
                taken[classes] = draw_from(part, weights, rest[classes], rng)
            rest -= taken
    return dealt, np.arange(n_cls)


def draw_from(images: int, weights: ndarray, left: ndarray, rng: Generator) -> ndarray:
    """Draw by `weights` (k,) how many of `left` (k,) images one takes.

    Others stand in for what is used up.
    """
    taken = np.zeros_like(left)
    while taken.sum() < images:
        # a weight may have rounded to 0
        open_weights = np.where(taken < left, np.maximum(weights, 1e-9), 0)
        drawn = rng.multinomial(images - taken.sum(), open_weights / open_weights.sum())
        taken = np.minimum(taken + drawn, left)
    return taken


# (partition, counts of a group, number of its clients, generator) -> what each client gets
DEALERS: dict[str, Callable[[Partition, Counts, int, Generator], Dealt]] = {
    "pathological": disjoint,
    "even": disjoint,
    "dirichlet": dirichlet,
    "domain": dirichlet,
    "iid": iid,
    "pachinko": pachinko,
    "column": column,
}
