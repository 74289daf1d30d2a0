"""Splits deal clients as the code released with pFedMoAP does, index by index.

That is github.com/ljaiverson/pFedMoAP at a481de3 (ICLR 2025). Use these to reproduce published
numbers, for nothing else; `fpl.data.partitions` is without their defects. Rebuilt from a
description of the release, not from its text. Arrays stay in the released order. Every split seeds
generators of its own with the numbers that the release gives to the global ones; one that is passed
as `draw` (Python's) or `rng` (legacy NumPy's) is seeded again instead, and what it draws next is
what the released run would draw next.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy import ndarray
from numpy.random import RandomState

from fpl.data.partitions import SUPERCLASSES, Indices, Partition, groups, of_each_class

Lists = tuple[ndarray, ndarray]  # classes of the training images and of the test images
Parts = tuple[Indices, Indices]  # of each client, places in these two lists

SPLIT_SEED = 2023  # of the pathological split, whatever the run's seed
PACHINKO_SEED = 12345
PASSES = 1000  # after which `label_dirichlet` gives up; the release would go on forever


def make(
    partition: Partition,
    labels: ndarray,
    split: ndarray,
    seed: int,
    domain: ndarray | None = None,
    rng: RandomState | None = None,
) -> Parts:
    """Deal images by the released split of a kind: their numbers for each client.

    Numbers that the release fixes stay as they are (sizes, its own seeds). Arguments are those of
    `fpl.data.partitions.make`. rng: NumPy's state as the run has seeded it, which the split leaves
    as the rounds find it. That OxfordPets with 20 clients repeats classes has no setting: see
    `pathological`. Raises ValueError for a kind that the release has not, and for shots
    where it takes all images.
    """
    kind, shots, beta = partition.kind, partition.shots, partition.concentration
    if kind not in ("pathological", "iid", "domain", "dirichlet", "pachinko"):
        raise ValueError(f"the released code has no {kind} split: use form ours")
    by_shots = kind in ("pathological", "iid")
    if shots and not by_shots:
        raise ValueError(
            f"the released {kind} split takes all training images: set shots to 0, not {shots}"
        )
    separate = groups(partition, np.full(len(labels), True), domain)
    n = partition.clients // len(separate)
    train: Indices = []
    test: Indices = []
    for group in separate:
        places = [group[split[group] == name] for name in ("train", "test")]
        lists = (labels[places[0]], labels[places[1]])
        if by_shots:
            parts = pathological(lists, n, shots, iid=kind == "iid")
        elif kind == "domain":
            parts = domain_dirichlet(lists, n, beta, rng=rng)
        elif kind == "dirichlet":
            parts = label_dirichlet(lists, n, beta, seed, rng)
        else:
            parts = pachinko(lists, n, beta, seed, rng=rng)
        train += [places[0][index] for index in parts[0]]
        test += [places[1][index] for index in parts[1]]
    return train, test


def pathological(
    lists: Lists,
    n_clients: int,
    shots: int = 16,
    iid: bool = False,
    repeat_rate: float = 0.0,
    draw: random.Random | None = None,
) -> Parts:
    """Deal disjoint classes, as on five data sets.

    Classes stand in the order of their first appearance in the list. The paper (section 4.1) says
    that they are dealt evenly; see `pathological_classes` for what is done. Classes and shots are
    the same for every seed of a run.

    shots: training images of each class and client, 0 for all; clients are tested on all images.
    iid: every client has all classes, draws its shots for itself, and whole lists are divided.
    repeat_rate: 0.1 on OxfordPets with exactly 20 clients and 16 shots or all images, else 0.

    Raises ValueError when a client would have nothing to train on (Pets with 50 clients), and for a
    repeat rate in settings in which the release deals the repeated classes in several groups, or in
    none, which are not reproduced here.
    """
    check_positive(n_clients=n_clients)
    if repeat_rate and (iid or (shots and n_clients // shots != 1)):
        raise ValueError(
            f"repeat_rate {repeat_rate} is reproduced for n_clients / 2 < shots <= n_clients and "
            f"without iid only, not for {n_clients} clients and {shots} shots with iid={iid}: "
            "use repeat_rate 0"
        )
    draw = draw or random.Random()
    n_classes = count_classes(lists)
    parts = []
    for labels, few in zip(lists, (shots, 0), strict=True):
        draw.seed(SPLIT_SEED)
        classes, shared = pathological_classes(n_classes, n_clients, draw, iid, repeat_rate)
        if few:
            parts.append(few_shot(labels, classes, few, draw, shared))
        else:
            parts.append(whole(labels, classes, draw, iid, shared))
    train, test = parts
    empty = sum(not len(own) for own in train)
    if empty:
        raise ValueError(
            f"the released split of {n_classes} classes leaves {empty} of {n_clients} clients "
            "without training images: use fewer clients"
        )
    return train, test


def count_classes(lists: Lists) -> int:
    return int(np.concatenate(lists).max()) + 1


def pathological_classes(
    n_classes: int, n_clients: int, draw: random.Random, iid: bool = False, repeat_rate: float = 0.0
) -> tuple[list[list[int]], list[int]]:
    """List the classes of each client in dealt order, and those that all share.

    Shuffled classes in blocks of round(c / n), half to even; the last client gets the rest, which
    may be many, few or none. With a repeat rate the first int(rate c) of the shuffled classes
    belong to everybody and the rest is dealt.
    """
    order = list(range(n_classes))
    draw.shuffle(order)
    n_shared = int(repeat_rate * n_classes)
    shared = order[:n_shared]
    dealt = order[n_shared:]
    if shared:
        # into groups that share classes: there is one, what remains are the numbers drawn
        draw.shuffle(list(range(n_clients)))
    if iid:
        return [list(range(n_classes))] * n_clients, shared
    size = round(len(dealt) / n_clients)
    starts = [size * i for i in range(n_clients)]
    ends = [*starts[1:], n_classes]
    return [shared + dealt[i:j] for i, j in zip(starts, ends, strict=True)], shared


def few_shot(
    labels: ndarray,
    classes: Sequence[Sequence[int]],
    shots: int,
    draw: random.Random,
    shared: Sequence[int] = (),
) -> Indices:
    """Draw `shots` images of each class of each client, all where there are fewer.

    Of a shared class each of n clients gets shots // n, but at least one. Raises ValueError where
    classes are shared and a class has too few images: the release fails there too.
    """
    images_of = by_class(labels)
    place = dict(zip(images_of, range(len(images_of))))
    of_shared = max(shots // len(classes), 1)
    wanted = {label: of_shared if label in shared else shots for label in images_of}
    short = [label for label, images in images_of.items() if len(images) < wanted[label]]
    if shared and short:
        raise ValueError(
            f"class {short[0]} has fewer than {wanted[short[0]]} images, "
            "which a repeat rate needs: use fewer shots"
        )
    parts = []
    for own in classes:
        found = []
        for label in sorted(place.keys() & own, key=place.__getitem__):
            images = images_of[label]
            number = wanted[label]
            found += images if len(images) < number else draw.sample(images, number)
        parts.append(np.array(found, int))
    return parts


def whole(
    labels: ndarray,
    classes: Sequence[Sequence[int]],
    draw: random.Random,
    iid: bool = False,
    shared: Sequence[int] = (),
) -> Indices:
    """Give each client all images of its classes; of a class that all have, its piece.

    All have every class (`iid`) or those that are `shared`. Client i gets the i-th piece of
    round(images / n) of a random order: where that rounds down the rest goes to nobody, where it
    rounds up the last clients get less.
    """
    images_of = by_class(labels)
    place = dict(zip(images_of, range(len(images_of))))
    mixed = {label: list(images) for label, images in images_of.items()}
    for images in mixed.values():
        draw.shuffle(images)
    parts = []
    for client, own in enumerate(classes):
        found = []
        for label in sorted(place.keys() & own, key=place.__getitem__):
            images = images_of[label]
            if iid or label in shared:
                size = round(len(images) / len(classes))
                images = sorted(mixed[label][client * size : (client + 1) * size])
            found += images
        parts.append(np.array(found, int))
    return parts


def by_class(labels: ndarray) -> dict[int, list[int]]:
    """List the images of each class, classes in the order of their first appearance."""
    found = of_each_class(np.arange(len(labels)), labels)
    return {label: found[label].tolist() for label in dict.fromkeys(labels.tolist())}


def label_dirichlet(
    lists: Lists,
    n_clients: int,
    beta: float = 0.5,
    seed: int = 1,
    rng: RandomState | None = None,
    min_size: int = 10,
) -> Parts:
    """Deal the classes of CIFAR by p ~ Dir(beta 1_n), the same for training and test images.

    The release's `noniid-labeldir`. A client that already holds 1/n of the training images gets
    none of the class. Everything is drawn again until every client has `min_size` training and test
    images. The paper says Dir(0.5), and no more.

    seed: the run's, so the split varies.

    Raises ValueError after PASSES draws, and if the p of all clients that may still take images
    round to 0.
    """
    check_positive(n_clients=n_clients, beta=beta)
    rng = rng or RandomState()
    rng.seed(seed)
    for _ in range(PASSES):
        train, test = deal_classes(lists, n_clients, beta, rng)
        if min(map(len, train + test)) >= min_size:
            return shuffled(train, test, rng)
    raise ValueError(
        f"{n_clients} clients with {min_size} training and test images each were not found in "
        f"{PASSES} passes: use fewer clients, a larger concentration, or form ours"
    )


def domain_dirichlet(
    lists: Lists,
    n_clients: int = 5,
    beta: float = 0.3,
    seed: int = 0,
    rng: RandomState | None = None,
    min_size: int = 2,
) -> Parts:
    """Deal the images of one domain of DomainNet or Office-Caltech10.

    The paper (section 4.1) says Dir(0.3) with 5 clients in each domain, and no more. The release:
    the rule of `label_dirichlet`, with NumPy seeded again for every class. So the split does not
    depend on the run's seed, the p of different classes are related, and the label counts depend on
    the class counts alone, not on the order of the list. See `mistaken` for what follows.

    Raises ValueError if a client gets fewer than `min_size` images: the release would then try
    again with the same numbers, forever; and if the p of all clients that may still take images
    round to 0 (tiny beta), where the release fails too.
    """
    check_positive(n_clients=n_clients, beta=beta)
    rng = rng or RandomState()
    train, test = deal_classes(lists, n_clients, beta, rng, seed)
    for name, part in (("train", train), ("test", test)):
        for client, images in enumerate(part):
            if len(images) < min_size:
                raise ValueError(
                    f"client {client} would hold {len(images)} {name} images, fewer than "
                    f"min_size={min_size}, and every further pass of the released rule is the same "
                    "because it seeds again: use fewer clients, another concentration, or form ours"
                )
    return shuffled(train, test, rng)


def deal_classes(
    lists: Lists, n_clients: int, beta: float, rng: RandomState, seed: int | None = None
) -> Parts:
    """Deal every class once; a `seed` starts each anew, the defect that fixes the domain split."""
    train: Indices = [np.empty(0, int)] * n_clients
    test: Indices = [np.empty(0, int)] * n_clients
    full = len(lists[0]) / n_clients
    for label in range(count_classes(lists)):
        if seed is not None:
            rng.seed(seed)
        train_images, test_images = (rng.permutation(np.flatnonzero(y == label)) for y in lists)
        shares = rng.dirichlet(np.full(n_clients, beta))
        shares[[len(held) >= full for held in train]] = 0
        train = deal(train, train_images, shares)
        test = deal(test, test_images, shares)
    return train, test


def deal(held: Indices, images: ndarray, shares: ndarray) -> Indices:
    """Add to each client its part of `images`; `shares` (n,) need not sum to 1.

    The last client may get one image in spite of a share of 0, where the sum of the others rounds
    to less than 1. Raises ValueError if all shares are 0.
    """
    if not shares.sum() > 0:  # NaN, too
        raise ValueError(
            "no client that may still take images drew a share of the class: "
            "pass another seed or a larger beta"
        )
    cuts = (np.cumsum(shares / shares.sum())[:-1] * len(images)).astype(int)
    return [np.concatenate(pair) for pair in zip(held, np.split(images, cuts), strict=True)]


def shuffled(train: Indices, test: Indices, rng: RandomState) -> Parts:
    for pair in zip(train, test, strict=True):
        for images in pair:
            rng.shuffle(images)
    return train, test


def mistaken(
    loader: str, labels: ndarray, split: ndarray, domain: ndarray, parts: Parts, seed: int
) -> tuple[ndarray, ndarray, Parts]:
    """Give what the released loader of DomainNet and Office makes of a partition by domain.

    That is image numbers, their labels, and which of these each client has.

    loader: "mismatched" (D1), a client's labels are its own, but its images are the first ones of
        the domain, the same for all its clients, so labels say nothing about images, and about one
        in ten fits; "misnamed" (D2), the prompt of class c speaks of another class (see
        `class_order`), said here by giving its images the label of that class; or "both". The paper
        describes an ordinary shift of labels and features.
    """
    images = []
    renamed = []
    for of_split, name in zip(parts, ("train", "test"), strict=True):
        for index in of_split:
            if len(set(domain[index])) > 1:
                raise ValueError(
                    f"loader {loader!r} is for clients of one domain each: "
                    "use kind domain, or loader right"
                )
            here = np.flatnonzero((domain == domain[index[0]]) & (split == name))
            images.append(index if loader == "misnamed" else here[: len(index)])
            renamed.append(labels[index])
    ends = np.cumsum([len(index) for index in images])
    places = np.split(np.arange(ends[-1]), ends[:-1])
    given = np.concatenate(renamed)
    if loader != "mismatched":
        given = np.array(class_order(range(int(labels.max()) + 1), seed))[given]
    n = len(parts[0])
    return np.concatenate(images), given, (places[:n], places[n:])


def class_order(classes: Sequence[Any], seed: int) -> list[Any]:
    """Order class names as the rows of a prompt get them on DomainNet and Office.

    The release keeps the names in a Python set, whose order differs from process to process, so a
    prompt carries the name of a random class, the same in training and test. Those orders cannot be
    had back: here a permutation by a named seed.
    """
    order = np.random.default_rng([seed, *b"names"]).permutation(len(classes))
    return [classes[i] for i in order]


def pachinko(
    lists: Lists,
    n_clients: int,
    beta: float = 0.5,
    seed: int = 1,
    draw: random.Random | None = None,
    rng: RandomState | None = None,
) -> Parts:
    """Deal by Pachinko allocation over the 20 superclasses of CIFAR-100, the release's default.

    The release's `noniid-labeldir100`. Training and test images are pooled. Client after client
    draws weights of the superclasses, Dir(beta 1_20), and of the classes in each, Dir(10 1_5), then
    1/n of the images without replacement; what is used up is taken out of the tree. The images of
    the test list become its test set, so a client's training and test labels are two samples and
    differ. The paper says Dir(0.5), and not whether it means this or `label_dirichlet`.

    seed: the run's, which decides nothing but the order of the clients.

    Raises ValueError unless the labels are the 100 classes (on CIFAR-10 the release ends in an
    IndexError), for a client without images, and for weights that round to 0 (tiny beta).
    """
    check_positive(n_clients=n_clients, beta=beta)
    labels = np.concatenate(lists).tolist()
    classes = set(labels)
    if classes != set(range(100)):
        raise ValueError(
            f"pachinko needs the 100 classes of CIFAR-100, these labels have {len(classes)}: "
            "use label_dirichlet (the released code ends in an IndexError here)"
        )
    draw = draw or random.Random()
    rng = rng or RandomState()
    draw.seed(PACHINKO_SEED)
    rng.seed(PACHINKO_SEED)
    images: dict[int, list[int]] = {label: [] for label in range(100)}
    for i in draw.sample(range(len(labels)), len(labels)):
        images[labels[i]].append(i)
    tree = SUPERCLASSES.tolist()
    size = len(labels) // n_clients
    clients = [draw_client(tree, images, size, beta, draw, rng) for _ in range(n_clients)]
    draw.seed(seed)
    draw.shuffle(clients)
    n_train = len(lists[0])
    train = [own[own < n_train] for own in clients]
    test = [own[own >= n_train] - n_train for own in clients]
    if not all(map(len, train + test)):
        raise ValueError(
            f"{n_clients} clients cannot share {len(labels)} images, some would have none: "
            "use fewer clients"
        )
    return train, test


def draw_client(
    tree: list[list[int]],
    images: dict[int, list[int]],
    size: int,
    beta: float,
    draw: random.Random,
    rng: RandomState,
) -> ndarray:
    """Take `size` images out of `images`, and out of `tree` what is empty then."""
    top = positive(rng.dirichlet(np.full(len(tree), beta)))
    inner = [rng.dirichlet(np.full(len(classes), 10.0)) for classes in tree]
    own = []
    for _ in range(size):
        s = int(rng.multinomial(1, top).argmax())
        k = int(rng.multinomial(1, inner[s]).argmax())
        left = images[tree[s][k]]
        own.append(left.pop(draw.randrange(len(left))))
        if not left:
            del tree[s][k]
            inner[s] = without(inner[s], k)
            if not tree[s]:
                del tree[s], inner[s]
                top = without(top, s)
    return np.array(own, int)


def without(weights: ndarray, k: int) -> ndarray:
    """Drop a weight and let the others sum to 1."""
    rest = np.delete(weights, k)
    return rest / positive(rest).sum() if len(rest) else rest


def positive(weights: ndarray) -> ndarray:
    if not weights.sum() > 0:  # NaN, too
        raise ValueError(
            "all superclasses that still have images drew the weight 0: use a larger beta"
        )
    return weights


def participants(n_clients: int, participation: float, rounds: int, rng: RandomState) -> ndarray:
    """Draw the clients of every round in their order of training: (rounds, m), without replacement.

    m is max(int(participation n), 1). After `domain_dirichlet` and `pachinko` they are the same for
    every seed. What a method makes of them is its `turns` (fpl.released.methods).

    rng: NumPy's state when the rounds begin, seeded by the run and moved on by `make`.
    """
    check_positive(n_clients=n_clients, participation=participation, rounds=rounds)
    m = max(int(participation * n_clients), 1)
    return np.stack([rng.choice(n_clients, m, replace=False) for _ in range(rounds)])


def check_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} ({value}) must be above 0")
