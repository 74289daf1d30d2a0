"""Clients as the code released with pFedMoAP (ICLR 2025, github.com/ljaiverson/pFedMoAP at a481de3) deals them, index by index.

Use these to reproduce published numbers, for nothing else; `fpl.partitions` has partitions without their defects. Rebuilt from a
description of the release, not from its text. Arrays stay in the released order. Every split seeds generators of its own with the
numbers that the release gives to the global ones; one that is passed as `draw` (Python's) or `rng` (legacy NumPy's) is re-seeded
instead, and what it draws next is what the released run would draw next.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fpl.data.partitions import SUPERCLASSES, Indices, Partition

SPLIT_SEED = 2023  # of the pathological split, whatever the run's seed
PACHINKO_SEED = 12345


def make(
    partition: Partition, labels: np.ndarray, split: np.ndarray, seed: int, domain: np.ndarray | None = None
) -> tuple[Indices, Indices]:
    """As `fpl.partitions.make`: image numbers of each client, of the released split of the partition's kind.

    Numbers that the release fixes stay as they are (sizes, its own seeds). Raises ValueError for a kind that it has not, and for
    shots where it takes all images.
    """
    if partition.kind not in ("pathological", "iid") and partition.shots:
        raise ValueError(f"the released {partition.kind} split takes all training images: set shots to 0, not {partition.shots}")
    n, beta, useall = partition.clients, partition.concentration, not partition.shots
    if partition.kind == "domain":
        if domain is None:
            raise ValueError("the partition by domain needs the domain of each image: give a domain column")
        groups = [domain == name for name in np.unique(domain)]
        if n % len(groups):
            raise ValueError(f"{n} clients cannot be shared evenly by {len(groups)} domains: use a multiple of {len(groups)}")
        parts = [_numbers(domain_dirichlet, labels, split, here, n // len(groups), beta) for here in groups]
        return [i for train, _ in parts for i in train], [i for _, test in parts for i in test]
    everything = np.full(len(labels), True)
    if partition.kind in ("pathological", "iid"):
        return _numbers(pathological, labels, split, everything, n, partition.shots or 1, useall, partition.kind == "iid")
    if partition.kind in ("dirichlet", "pachinko"):
        rule: Callable = label_dirichlet if partition.kind == "dirichlet" else pachinko
        return _numbers(rule, labels, split, everything, n, beta, seed)
    raise ValueError(f"the released code has no {partition.kind} split: use form ours")


def _numbers(rule: Callable, labels: np.ndarray, split: np.ndarray, here: np.ndarray, *settings: Any) -> tuple[Indices, Indices]:
    """A rule on the training and the test list of some images, in numbers of all images."""
    train, test = (np.flatnonzero(here & (split == name)) for name in ("train", "test"))
    found = rule(labels[train], labels[test], *settings)
    return [train[i] for i in found[0]], [test[i] for i in found[1]]


def pathological(
    train_labels: ArrayLike,
    test_labels: ArrayLike,
    n_clients: int,
    shots: int = 16,
    useall: bool = False,
    iid: bool = False,
    repeat_rate: float = 0.0,
    draw: random.Random | None = None,
) -> tuple[Indices, Indices]:
    """Training and test indices of each client, of the five data sets with disjoint classes.

    train_labels, test_labels (images,): class of each image in the order of the split file. A client trains on `shots` images of
    each of its classes (on all with `useall`) and is tested on all test images of them; classes stand in the order of their first
    appearance in the list. The paper (section 4.1) says that the classes are dealt evenly; see `pathological_classes` for what is
    done. Classes and shots are the same for every seed of a run. `iid`: every client has all classes, shots are drawn by each
    client for itself, and whole sets are divided (see `whole`). `repeat_rate`: 0.1 on OxfordPets with exactly 20 clients, else 0.

    Raises ValueError when a client would have nothing to train on (Pets with 50 clients), and for a repeat rate in settings in
    which the release deals the repeated classes in several groups, or in none, which are not reproduced here.
    """
    _above_zero(n_clients=n_clients, shots=shots)
    if repeat_rate and (iid or n_clients // shots != 1):
        raise ValueError(
            f"repeat_rate {repeat_rate} is reproduced for n_clients / 2 < shots <= n_clients without iid only, "
            f"not for {n_clients} clients and {shots} shots with iid={iid}: use repeat_rate 0"
        )
    draw = draw or random.Random()
    train_labels, test_labels = np.asarray(train_labels), np.asarray(test_labels)
    n_classes = int(max(train_labels.max(), test_labels.max())) + 1
    parts = []
    for labels, few in ((train_labels, not useall), (test_labels, False)):
        draw.seed(SPLIT_SEED)
        classes, shared = pathological_classes(n_classes, n_clients, draw, iid, repeat_rate)
        parts.append(few_shot(labels, classes, shots, draw, shared) if few else whole(labels, classes, draw, iid, shared))
    train, test = parts
    empty = sum(not len(own) for own in train)
    if empty:
        found = f"the released split of {n_classes} classes leaves {empty} of {n_clients} clients without training images"
        raise ValueError(f"{found}: use fewer clients")
    return train, test


def pathological_classes(
    n_classes: int, n_clients: int, draw: random.Random, iid: bool = False, repeat_rate: float = 0.0
) -> tuple[list[list[int]], list[int]]:
    """Class list of each client in dealt order, and the classes that all share. Clients may be left without a class.

    Shuffled classes in blocks of round(c / n), half to even; the last client gets the rest, which may be many, few or none.
    With a repeat rate the first int(rate c) of the shuffled classes belong to everybody and the rest is dealt.
    """
    order = list(range(n_classes))
    draw.shuffle(order)
    n_shared = int(repeat_rate * n_classes)
    shared, dealt = order[:n_shared], order[n_shared:]
    if shared:
        draw.shuffle(list(range(n_clients)))  # into groups that share classes: there is one, what remains are the numbers drawn
    if iid:
        return [list(range(n_classes)) for _ in range(n_clients)], shared
    size = round(len(dealt) / n_clients)
    ends = [*range(size, n_clients * size, size)] if size else [0] * (n_clients - 1)
    return [shared + dealt[begin:end] for begin, end in zip([0, *ends], [*ends, n_classes], strict=True)], shared


def few_shot(
    labels: ArrayLike, classes: Sequence[Sequence[int]], shots: int, draw: random.Random, shared: Sequence[int] = ()
) -> Indices:
    """`shots` images of each class of each client, all where there are fewer; shots // n of a shared class, but at least one.

    Raises ValueError where classes are shared and a class has too few images: the release fails there too.
    """
    lists = _by_class(labels)
    wanted = {label: max(shots // len(classes), 1) if label in shared else shots for label in lists}
    short = [label for label, images in lists.items() if len(images) < wanted[label]]
    if shared and short:
        raise ValueError(f"class {short[0]} has fewer than {wanted[short[0]]} images, which a repeat rate needs: use fewer shots")
    return [
        _array(
            images if label in short else draw.sample(images, wanted[label]) for label, images in lists.items() if label in own
        )
        for own in classes
    ]


def whole(
    labels: ArrayLike, classes: Sequence[Sequence[int]], draw: random.Random, iid: bool = False, shared: Sequence[int] = ()
) -> Indices:
    """All images of each client's classes; those of a class that all have (`iid`, `shared`) are divided among the n clients.

    Divided means: client i gets the i-th piece of round(images / n) of a random order. Where that rounds down the rest goes to
    nobody, where it rounds up the last clients get less.
    """
    lists, n = _by_class(labels), len(classes)
    mixed = {label: list(images) for label, images in lists.items()}
    for images in mixed.values():
        draw.shuffle(images)

    def part(label: int, client: int) -> list[int]:
        if not (iid or label in shared):
            return lists[label]
        size = round(len(lists[label]) / n)
        return sorted(mixed[label][client * size : (client + 1) * size])

    return [_array(part(label, client) for label in lists if label in own) for client, own in enumerate(classes)]


def _by_class(labels: ArrayLike) -> dict[int, list[int]]:
    """Indices of each class, classes in the order of their first appearance."""
    labels = np.asarray(labels)
    return {label: np.flatnonzero(labels == label).tolist() for label in dict.fromkeys(labels.tolist())}


def _array(pieces) -> np.ndarray:
    return np.array([index for piece in pieces for index in piece], int)


def label_dirichlet(
    train_labels: ArrayLike,
    test_labels: ArrayLike,
    n_clients: int,
    beta: float = 0.5,
    seed: int = 1,
    min_size: int = 10,
    passes: int = 1000,
    rng: np.random.RandomState | None = None,
) -> tuple[Indices, Indices]:
    """`noniid-labeldir`, Dirichlet over the labels of CIFAR: p ~ Dir(beta 1_n) for every class, the same for train and test.

    A client that already holds 1/n of the training images gets none of the class. Everything is drawn again until every client
    has `min_size` training and test images. The paper says Dir(0.5), and no more. `seed` is the run's, so the split varies.
    Raises ValueError after `passes` of them (the release would go on forever), and if the p of all clients that may still take
    images round to 0.
    """
    _above_zero(n_clients=n_clients, beta=beta)
    rng = rng or np.random.RandomState()
    rng.seed(seed)
    for _ in range(passes):
        train, test = _pass(np.asarray(train_labels), np.asarray(test_labels), n_clients, beta, rng)
        if min(map(len, train + test)) >= min_size:
            return _shuffled(train, test, rng)
    raise ValueError(
        f"{n_clients} clients with {min_size} training and test images each were not found in {passes} passes: "
        "use fewer clients, a larger beta or a smaller min_size"
    )


def domain_dirichlet(
    train_labels: ArrayLike,
    test_labels: ArrayLike,
    n_clients: int = 5,
    beta: float = 0.3,
    min_size: int = 2,
    seed: int = 0,
    rng: np.random.RandomState | None = None,
) -> tuple[Indices, Indices]:
    """The clients of one domain of DomainNet or Office-Caltech10; those of the next domain follow.

    The paper (section 4.1) says Dir(0.3) with 5 clients in each domain, and no more. The release: the rule of `label_dirichlet`,
    with NumPy re-seeded for every class. So the split does not depend on the run's seed, the p of different classes are related,
    and the label counts depend on the class counts alone, not on the order of the list. See `domain_loader` for what follows.
    train_labels (n_train,), test_labels (n_test,): class of each image of the domain.
    ValueError if a client gets fewer than `min_size` images: the release would then try again with the same numbers, forever;
    and if the p of all clients that may still take images round to 0 (tiny beta), where the release fails too.
    """
    _above_zero(n_clients=n_clients, beta=beta)
    rng = rng or np.random.RandomState()
    train, test = _pass(np.asarray(train_labels), np.asarray(test_labels), n_clients, beta, rng, seed)
    size, split, client = min((len(i), name, c) for name, part in (("train", train), ("test", test)) for c, i in enumerate(part))
    if size < min_size:
        raise ValueError(
            f"client {client} would hold {size} {split} images, fewer than min_size={min_size}, and every further pass of the "
            "released rule is the same because it re-seeds: pass another seed, a smaller min_size or fewer clients"
        )
    return _shuffled(train, test, rng)


def _pass(
    train_labels: np.ndarray, test_labels: np.ndarray, n_clients: int, beta: float, rng: np.random.RandomState, seed=None
) -> tuple[Indices, Indices]:
    """Every class dealt once; with a `seed` the generator starts again for each: the defect that fixes the domain split."""
    train: Indices = [np.empty(0, int)] * n_clients
    test: Indices = [np.empty(0, int)] * n_clients
    for label in range(int(max(train_labels.max(), test_labels.max())) + 1):
        if seed is not None:
            rng.seed(seed)
        train_class = rng.permutation(np.flatnonzero(train_labels == label))
        test_class = rng.permutation(np.flatnonzero(test_labels == label))
        shares = rng.dirichlet(np.full(n_clients, beta))
        shares[[len(held) >= len(train_labels) / n_clients for held in train]] = 0
        train, test = _deal(train, train_class, shares), _deal(test, test_class, shares)
    return train, test


def _deal(held: Indices, images: np.ndarray, shares: np.ndarray) -> Indices:
    """Adds to each client its part of `images`; `shares` (n,) need not sum to 1. ValueError if they are all 0.

    The last client may get one image in spite of a share of 0, where the sum of the others rounds to less than 1.
    """
    if not shares.sum() > 0:  # NaN, too
        raise ValueError("no client that may still take images drew a share of the class: pass another seed or a larger beta")
    cuts = (np.cumsum(shares / shares.sum())[:-1] * len(images)).astype(int)
    return [np.concatenate(pair) for pair in zip(held, np.split(images, cuts), strict=True)]


def _shuffled(train: Indices, test: Indices, rng: np.random.RandomState) -> tuple[Indices, Indices]:
    for pair in zip(train, test, strict=True):
        for images in pair:
            rng.shuffle(images)
    return train, test


def domain_loader(labels: ArrayLike, parts: Indices) -> list[tuple[np.ndarray, np.ndarray]]:
    """What the released DomainNet and Office loader hands each client of a domain: labels, and numbers of the images beside them.

    labels (images,) of the domain, parts: its clients, of one split. Labels are those of the client's indices; the images, and
    the class names that come with them, are the first ones of the domain, the same for all its clients. So labels say nothing
    about images: about one in ten fits. The paper describes an ordinary shift of labels and features.
    """
    labels = np.asarray(labels)
    return [(labels[index], np.arange(len(index))) for index in parts]


def mistaken(
    loader: str, labels: np.ndarray, split: np.ndarray, domain: np.ndarray, parts: tuple[Indices, Indices], seed: int
) -> tuple[np.ndarray, np.ndarray, tuple[Indices, Indices]]:
    """What the released loader makes of a partition by domain: image numbers, their labels, and who has which of these.

    "mismatched" (D1): see `domain_loader`. "misnamed" (D2): see `class_order`; that the prompt of class c speaks of another class
    is said here by giving its images the label of that class. "both".
    """
    images, given, sizes = [], [], []
    for of_split, name in zip(parts, ("train", "test"), strict=True):
        for index in of_split:
            if len(set(domain[index])) > 1:
                raise ValueError(f"loader {loader!r} is for clients of one domain each: use kind domain, or loader right")
            here = np.flatnonzero((domain == domain[index[0]]) & (split == name))
            images.append(index if loader == "misnamed" else here[: len(index)])
            given.append(labels[index])
            sizes.append(len(index))
    renamed = np.concatenate(given)
    if loader != "mismatched":
        renamed = np.array(class_order(range(int(labels.max()) + 1), seed))[renamed]
    places = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    return np.concatenate(images), renamed, (places[: len(parts[0])], places[len(parts[0]) :])


def class_order(classes: Sequence[Any], seed: int) -> list[Any]:
    """The class names in the order in which a prompt's row c gets one, on DomainNet and Office.

    The release keeps the names in a Python set, whose order differs from process to process, so a prompt carries the name of a
    random class, the same in training and test. Those orders cannot be had back: here a permutation by a named seed.
    """
    return [classes[i] for i in np.random.default_rng([seed, *b"names"]).permutation(len(classes))]


def pachinko(
    train_labels: ArrayLike,
    test_labels: ArrayLike,
    n_clients: int,
    beta: float = 0.5,
    seed: int = 1,
    draw: random.Random | None = None,
    rng: np.random.RandomState | None = None,
) -> tuple[Indices, Indices]:
    """`noniid-labeldir100`, the release's default: Pachinko allocation over the 20 superclasses of CIFAR-100.

    Training and test images are pooled. Client after client draws weights of the superclasses, Dir(beta 1_20), and of the classes
    in each, Dir(10 1_5), then 1/n of the images without replacement; what is used up is taken out of the tree. The images of the
    test list become its test set, so a client's training and test labels are two samples and differ. The run's seed decides
    nothing but the order of the clients. The paper says Dir(0.5), and not whether it means this or `label_dirichlet`.
    Raises ValueError unless the labels are the 100 classes (on CIFAR-10 the release ends in an IndexError), for a client without
    images, and for weights that round to 0 (tiny beta).
    """
    _above_zero(n_clients=n_clients, beta=beta)
    labels = np.concatenate([np.asarray(train_labels), np.asarray(test_labels)]).tolist()
    if set(labels) != set(range(100)):
        raise ValueError(
            f"pachinko needs the 100 classes of CIFAR-100, these labels have {len(set(labels))}: use label_dirichlet "
            "(the released code ends in an IndexError here)"
        )
    draw, rng = draw or random.Random(), rng or np.random.RandomState()
    draw.seed(PACHINKO_SEED)
    rng.seed(PACHINKO_SEED)
    images: dict[int, list[int]] = {label: [] for label in range(100)}
    for i in draw.sample(range(len(labels)), len(labels)):
        images[labels[i]].append(i)
    tree = [list(classes) for classes in SUPERCLASSES]
    clients = [_one_client(tree, images, len(labels) // n_clients, beta, draw, rng) for _ in range(n_clients)]
    draw.seed(seed)
    draw.shuffle(clients)
    n_train = len(np.asarray(train_labels))
    train, test = ([own[own < n_train] for own in clients], [own[own >= n_train] - n_train for own in clients])
    if not all(map(len, train + test)):
        raise ValueError(f"{n_clients} clients cannot share {len(labels)} images, some would have none: use fewer clients")
    return train, test


def _one_client(
    tree: list[list[int]], images: dict[int, list[int]], size: int, beta: float, draw: random.Random, rng: np.random.RandomState
) -> np.ndarray:
    """Takes `size` images out of `images`, and out of `tree` the classes and superclasses that are empty then."""
    top = _weights(rng.dirichlet(np.full(len(tree), beta)))
    inner = [rng.dirichlet(np.full(len(classes), 10.0)) for classes in tree]
    own = []
    for _ in range(size):
        s = int(rng.multinomial(1, top).argmax())
        k = int(rng.multinomial(1, inner[s]).argmax())
        left = images[tree[s][k]]
        own.append(left.pop(draw.randrange(len(left))))
        if not left:
            del tree[s][k]
            inner[s] = _without(inner[s], k)
            if not tree[s]:
                del tree[s], inner[s]
                top = _without(top, s)
    return np.array(own, int)


def _without(weights: np.ndarray, k: int) -> np.ndarray:
    rest = np.delete(weights, k)
    return rest / _weights(rest).sum() if len(rest) else rest


def _weights(weights: np.ndarray) -> np.ndarray:
    if not weights.sum() > 0:  # NaN, too
        raise ValueError("all superclasses that still have images drew the weight 0: use a larger beta")
    return weights


def participants(n_clients: int, participation: float, rounds: int, rng: np.random.RandomState) -> np.ndarray:
    """Clients of every round in their order of training (rounds, m), m = max(int(participation n), 1), without replacement.

    `rng` is NumPy's state when the rounds begin: seeded by the run and moved on by the split. After `domain_dirichlet` it is the
    same for every seed, and so are the participants.
    """
    _above_zero(n_clients=n_clients, participation=participation, rounds=rounds)
    m = max(int(participation * n_clients), 1)
    return np.stack([rng.choice(n_clients, m, replace=False) for _ in range(rounds)])


def _above_zero(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} ({value}) must be above 0")
