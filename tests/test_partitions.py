"""Promise: clients get the classes of the paper's rule, their shots and all their test images, and
a seed says which."""

import dataclasses
import functools
import tracemalloc
from typing import get_args, get_type_hints

import numpy as np
import pytest
from helpers import refuses
from pydantic import ValidationError

from fpl.data import partitions
from fpl.data.partitions import Partition
from fpl.released import splits

PAPER = {
    "the demo world": (48, 10, [5] * 9 + [3]),
    "Flowers102": (102, 10, [10] * 9 + [12]),
    "OxfordPets": (37, 10, [4] * 9 + [1]),
    "DTD": (47, 10, [5] * 9 + [2]),
    "Food101": (101, 10, [10] * 9 + [11]),
    "Caltech101": (100, 10, [10] * 10),
    "half to even": (25, 10, [2] * 9 + [7]),
    "one client": (48, 1, [48]),
    "a class each": (12, 12, [1] * 12),
}


def world(n_cls, train=20, test=6):
    """Labels and split of a data set in an order that has nothing to do with its classes; class 0
    has five training images."""
    labels = np.repeat(np.arange(n_cls), train + test)
    split = np.tile(np.array(["train"] * train + ["test"] * test), n_cls)
    keep = (labels != 0) | (split == "test") | (np.arange(len(labels)) < 5)
    order = np.random.default_rng(0).permutation(keep.sum())
    return labels[keep][order], split[keep][order]


def with_domains(n_cls):
    labels, split = world(n_cls)
    return labels, split, np.random.default_rng(1).choice(["one", "two", "three"], len(labels))


KINDS = [kind for kind in partitions.DEALERS if kind != "column"]
WORLDS = {kind: with_domains(100 if kind == "pachinko" else 12) for kind in KINDS}
WORLDS["iid"] = tuple(
    column[WORLDS["iid"][0] > 0] for column in WORLDS["iid"]
)  # the rare class is too rare
WORLDS["iid"][0][:] -= 1


def deal(kind, shots, seed=1):
    """Six clients of this kind."""
    labels, split, domain = WORLDS[kind]
    return partitions.make(Partition(kind, 6, shots), labels, split, seed, domain)


def tally(parts, kind):
    """Images of each client and class."""
    return np.array([np.bincount(WORLDS[kind][0][index], minlength=100) for index in parts])


def same_sets(parts, others):
    return all(set(a.tolist()) == set(b.tolist()) for a, b in zip(parts, others, strict=True))


def classes(parts, labels):
    return [set(labels[index].tolist()) for index in parts]


@pytest.mark.parametrize("name", PAPER)
def test_class_counts_of_the_papers_rule(name):
    n_cls, clients, wanted = PAPER[name]
    labels, split = world(n_cls)
    for seed in (1, 2, 3):
        train, test = partitions.make(Partition(clients=clients), labels, split, seed)
        assert [len(own) for own in classes(train, labels)] == wanted
        assert classes(train, labels) == classes(test, labels)


@pytest.mark.parametrize(
    ("n_cls", "clients"), [(48, 10), (37, 10), (37, 36), (37, 37), (102, 50), (5, 1)]
)
def test_even_differs_by_at_most_one(n_cls, clients):
    labels, split = world(n_cls)
    counts = [
        len(own)
        for own in classes(partitions.make(Partition("even", clients), labels, split, 1)[0], labels)
    ]
    assert len(counts) == clients and max(counts) - min(counts) <= 1 and sum(counts) == n_cls


@pytest.mark.parametrize("shots", [1, 4, 16, 50])
@pytest.mark.parametrize("kind", ["pathological", "even"])
def test_classes_are_disjoint_and_complete_and_images_are_theirs(kind, shots):
    labels, split = world(37)
    train, test = partitions.make(Partition(kind, 10, shots), labels, split, seed=1)
    own = classes(train, labels)
    assert sorted(c for part in own for c in part) == list(range(37))
    for mine, train_index, test_index in zip(own, train, test, strict=True):
        assert len(set(train_index.tolist())) == len(train_index) and set(split[train_index]) == {
            "train"
        }
        counts = np.bincount(labels[train_index], minlength=37)
        assert all(counts[c] == min(shots, 5 if c == 0 else 20) for c in mine)
        assert test_index.tolist() == [
            i for i in range(len(labels)) if labels[i] in mine and split[i] == "test"
        ]


@pytest.mark.parametrize("kind", ["pathological", "even"])
def test_a_seed_is_a_split(kind):
    labels, split = world(48)
    partition = Partition(kind, 10, 4)
    first, again, other = (partitions.make(partition, labels, split, seed) for seed in (1, 1, 2))
    for part, same in zip((*first[0], *first[1]), (*again[0], *again[1]), strict=True):
        assert np.array_equal(part, same)
    assert classes(first[0], labels) != classes(other[0], labels)
    assert set(np.concatenate(first[0]).tolist()) != set(np.concatenate(other[0]).tolist())


@pytest.mark.parametrize(
    "other",
    [Partition(clients=5, shots=4), Partition("even", 10, 4), Partition(clients=48, shots=4)],
)
def test_who_has_a_class_does_not_decide_its_shots(other):
    labels, split = world(48)
    chosen, differently = (
        partitions.make(p, labels, split, 1)[0] for p in (Partition(clients=10, shots=4), other)
    )
    assert classes(chosen, labels) != classes(differently, labels)
    assert set(np.concatenate(chosen).tolist()) == set(np.concatenate(differently).tolist())


@pytest.mark.parametrize("stream", ["classes", "shots", "test"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_streams_are_separate(kind, stream, monkeypatch):
    """With one stream changed, what the other ones draw stays."""
    before, generator = deal(kind, shots=0), np.random.default_rng
    few = deal(kind, shots=2)
    monkeypatch.setattr(
        np.random,
        "default_rng",
        lambda key: generator([99, *key] if bytes(key[1:]) == stream.encode() else key),
    )
    after = deal(kind, shots=0)
    same = [
        np.array_equal(tally(a, kind), tally(b, kind)) for a, b in zip(before, after, strict=True)
    ]
    assert (
        same == [stream != "classes" or kind == "iid"] * 2
    )  # how many of each class: iid draws nothing there
    if kind in (
        "pathological",
        "even",
    ):  # whole classes: which images these are is decided by the shots
        chosen, differently = (
            set(np.concatenate(parts).tolist()) for parts in (few[0], deal(kind, shots=2)[0])
        )
        assert (chosen == differently) == (stream != "shots")
    elif stream != "classes":
        assert [same_sets(a, b) for a, b in zip(before, after, strict=True)] == [
            stream != "shots",
            stream != "test",
        ]


def test_split_and_shots_can_have_seeds_of_their_own():
    """With both fixed, as the releases do, the run's seed changes nothing; with one, only the
    other."""
    labels, split = world(48)

    def make(seed, **fixed):
        return partitions.make(Partition(clients=10, shots=4, **fixed), labels, split, seed)[0]

    def images(parts):
        return set(np.concatenate(parts).tolist())

    both = [make(seed, split_seed=2023, shot_seed=2023) for seed in (1, 2)]
    assert all(map(np.array_equal, *both)) and all(map(np.array_equal, both[0], make(2023)))
    same_split = [make(seed, split_seed=2023) for seed in (1, 2)]
    assert classes(same_split[0], labels) == classes(same_split[1], labels)
    assert images(same_split[0]) != images(same_split[1])
    same_shots = [make(seed, shot_seed=2023) for seed in (1, 2)]
    assert classes(same_shots[0], labels) != classes(same_shots[1], labels)
    assert images(same_shots[0]) == images(same_shots[1])


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_shots_are_some_of_more_and_change_nothing_else(kind):
    everything, (few, test) = deal(kind, shots=0), deal(kind, shots=2)
    assert np.array_equal(tally(few, kind), np.minimum(tally(everything[0], kind), 2))
    assert all(set(a.tolist()) < set(b.tolist()) for a, b in zip(few, everything[0], strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(test, everything[1], strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_every_image_goes_to_one_client(kind):
    _, split, _ = WORLDS[kind]
    for parts, name in zip(deal(kind, shots=0), ("train", "test"), strict=True):
        assert len(parts) == 6 and all(len(part) for part in parts)
        assert sorted(np.concatenate(parts).tolist()) == np.flatnonzero(split == name).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_training_images_stand_class_by_class_and_test_images_in_the_files_order(kind):
    train, test = deal(kind, shots=0)
    for mine in train:
        own = WORLDS[kind][0][mine]
        assert 1 + np.count_nonzero(np.diff(own)) == len(set(own.tolist()))
        assert all((np.diff(mine[own == c]) > 0).all() for c in own)
    assert all((np.diff(mine) > 0).all() for mine in test)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_decides_everything(kind):
    first, again, other = (deal(kind, 4, seed) for seed in (1, 1, 2))
    assert all(map(np.array_equal, first[0] + first[1], again[0] + again[1]))
    assert not same_sets(first[0], other[0]) and not same_sets(first[1], other[1])


@pytest.mark.parametrize("seed", range(10))
def test_dirichlet_deals_test_images_like_training_images_and_nothing_to_those_who_have_their_share(
    seed,
):
    counts = np.full((2, 12), 40)
    partition = Partition("dirichlet", 5, concentration=0.3, min_size=30)
    (train, test), _ = partitions.dirichlet(partition, counts, 5, np.random.default_rng(seed))
    assert np.array_equal(train, test) and train.sum(1).min() >= 30
    had = train.cumsum(1) - train
    full = had >= counts[0].sum() / 5
    assert full.any() and (train[full] == 0).all()


def test_dirichlet_draws_again_until_all_have_the_least():
    smallest = {least: min(smallest_set(seed, least) for seed in range(20)) for least in (1, 6)}
    assert smallest[1] < 6 <= smallest[6]


def smallest_set(seed, least):
    partition = Partition("dirichlet", 6, 0, concentration=0.3, min_size=least)
    return min(
        len(part)
        for parts in partitions.make(partition, *WORLDS["dirichlet"][:2], seed)
        for part in parts
    )


def of_a_class(seed):
    """What the first client of Dir(0.3) takes of the first class, when nobody has anything yet."""
    partition, counts = Partition("dirichlet", concentration=0.3), np.full((2, 20), 10**6)
    return (
        partitions.dirichlet(partition, counts, 5, np.random.default_rng(seed))[0][0, 0, 0] / 10**6
    )


@functools.cache
def of_superclass_3(seed):
    """Images of its five classes that the first client takes, in training and in test, when nothing
    is used up."""
    partition, counts = Partition("pachinko", concentration=0.3), np.full((2, 100), 10**6)
    dealt, _ = partitions.pachinko(partition, counts, 50, np.random.default_rng(seed))
    return dealt[:, 0, list(partitions.SUPERCLASSES[3])]


def of_its_first_class(seed):
    five = of_superclass_3(seed)[0]
    return five[0] / five.sum() if five.sum() > 1e4 else np.nan


DRAWN = {  # a share -> its mean and its concentration
    "a class of dirichlet": (of_a_class, 1 / 5, 0.3 * 5),
    "a superclass of pachinko": (
        lambda seed: of_superclass_3(seed)[0].sum() / (2 * 10**6),
        1 / 20,
        0.3 * 20,
    ),
    "a class of its superclass": (of_its_first_class, 1 / 5, 10 * 5),
}


@pytest.mark.parametrize("name", DRAWN)
def test_shares_vary_as_their_dirichlet_does(name):
    share, mean, concentration = DRAWN[name]
    drawn = np.array([share(seed) for seed in range(150)])
    std = np.sqrt(mean * (1 - mean) / (1 + concentration))
    assert (
        abs(np.nanmean(drawn) - mean) < 4 * std / np.sqrt(len(drawn))
        and 0.75 < np.nanstd(drawn) / std < 1.3
    )


def test_pachinko_takes_test_images_by_the_weights_of_training():
    for seed in range(20):
        train, test = of_superclass_3(seed)
        assert np.abs(train - test).max() <= 6 * np.sqrt(2 * train.max() + 1)


def test_domains_have_clients_of_their_own_in_their_order():
    _, _, domain = WORLDS["domain"]
    for parts in deal("domain", shots=0):
        assert [set(domain[part].tolist()) for part in parts] == [
            {"one"},
            {"one"},
            {"three"},
            {"three"},
            {"two"},
            {"two"},
        ]
        counts = tally(parts, "domain")
        assert not np.array_equal(counts[0], counts[2]) and not np.array_equal(counts[2], counts[4])


@pytest.mark.parametrize("classes", ["all", "base"])
@pytest.mark.parametrize("held_out", ["", "two"])
def test_clients_are_named_by_the_domains_that_are_dealt(held_out, classes):
    """Of domain "one" there are novel classes only."""
    labels = np.repeat([2, 3, 0, 1, 0, 1], 40)
    domain = np.repeat(np.array(["one", "two", "three"], object), 80)
    split = np.tile(np.array(["train", "test"], object), 120)
    left = 3 - (held_out == "two") - (classes == "base")
    partition = Partition("domain", 2 * left, 0, 9.0, classes=classes, held_out=held_out)
    named = partitions.domain_names(partition, labels, domain)
    assert len(set(named)) == left
    for parts in partitions.make(partition, labels, split, 1, domain):
        assert [{*domain[own]} for own in parts] == [{name} for name in named]
    assert partitions.domain_names(Partition("iid", 2), labels, domain) == []


@pytest.mark.parametrize("name", ["train", "test"])
def test_iid_clients_differ_by_one_image_in_a_class_and_in_all(name):
    counts = tally(deal("iid", shots=0)[name == "test"], "iid")
    assert (
        counts[:, :11].min() > 0
        and np.ptp(counts, axis=0).max() <= 1
        and np.ptp(counts.sum(1)) <= 1
    )


@pytest.mark.parametrize("concentration", [0.5, 1e-9])
def test_pachinko_deals_everything_in_equal_sizes(concentration):
    """Also where all weights but one round to 0, and that one is used up."""
    counts = np.full((2, 100), [[7], [3]])
    dealt, _ = partitions.pachinko(
        Partition("pachinko", concentration=concentration), counts, 9, np.random.default_rng(1)
    )
    assert np.array_equal(dealt.sum(1), counts) and np.ptp(dealt.sum(2), axis=1).max() <= 1


WORLD = WORLDS["dirichlet"]
TESTED = (WORLD[0] > 0) | (WORLD[1] == "test")  # of class 0 nothing is for training
REFUSED = {
    "no domains": (
        lambda: partitions.make(Partition("domain"), *WORLD[:2], 1),
        ["partition by domain", "domain of each image", "a column domain"],
    ),
    "clients and domains": (
        lambda: partitions.make(Partition("domain", 10), *WORLD[:2], 1, WORLD[2]),
        ["10", "3 domains", "of 3"],
    ),
    "too few images": (
        lambda: partitions.make(Partition("dirichlet", 10, min_size=30), *WORLD[:2], 1),
        ["100 draws of Dir(0.5)", "10 clients", "30 training and test images", "use fewer clients"],
    ),
    "tiny shares": (
        lambda: partitions.make(Partition("dirichlet", 12, concentration=1e-9), *WORLD[:2], 1),
        ["Dir(1e-09)"],
    ),
    "a class for tests only": (
        lambda: partitions.make(Partition("iid", 1), WORLD[0][TESTED], WORLD[1][TESTED], 1),
        ["0 training images of class 0", "leave the class out"],
    ),
    "one client with too few": (
        lambda: partitions.make(Partition("dirichlet", 1, min_size=999), *WORLD[:2], 1),
        ["1 clients never had 999", ": use a larger concentration or a smaller min_size"],
    ),
    "a rare class": (
        lambda: partitions.make(Partition("iid", 21), *WORLD[:2], 1),
        ["21 clients", "5 training", "class 0"],
    ),
    "no superclasses": (
        lambda: partitions.make(Partition("pachinko"), *WORLD[:2], 1),
        ["100 classes", "have 12", "use dirichlet"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_dealt_is_refused_in_one_sentence(name):
    refuses(*REFUSED[name])


@pytest.mark.parametrize("n_cls", [37, 47, 48, 102])
def test_every_number_of_clients_is_dealt_or_refused_with_one_that_works(n_cls):
    labels, split = world(n_cls, train=1, test=1)
    for clients in range(1, n_cls + 20):
        try:
            train, _ = partitions.make(Partition(clients=clients), labels, split, 1)
        except ValueError as error:
            words = str(error).split()
            assert words[0] == str(clients) and str(n_cls) in words and "\n" not in str(error)
            assert int(words[-1]) < clients and len(
                partitions.make(Partition(clients=int(words[-1])), labels, split, 1)[0]
            ) == int(words[-1])
        else:
            assert len(train) == clients and all(len(part) for part in train)


def test_a_column_names_the_clients():
    labels, split, _ = WORLDS["dirichlet"]
    client = np.random.default_rng(2).choice(["site b", "site a", "site c"], len(labels))
    train, test = partitions.make(
        Partition("column", clients=3, shots=0), labels, split, 1, client=client
    )
    for name, own, tested in zip(["site a", "site b", "site c"], train, test, strict=True):
        assert sorted(own) == np.flatnonzero((client == name) & (split == "train")).tolist()
        assert tested.tolist() == np.flatnonzero((client == name) & (split == "test")).tolist()
    few, _ = partitions.make(
        Partition("column", clients=3, shots=2), labels, split, 1, client=client
    )
    assert all(
        np.bincount(labels[own]).max() <= 2 and set(own) <= set(whole)
        for own, whole in zip(few, train, strict=True)
    )


@pytest.mark.parametrize(
    "names",
    [
        ["1", "2", "10", "11"],
        ["-3", "0.5", "2", "10.25"],
        ["hospital 2", "hospital 10", "ward 1b", "ward 12a"],
        ["2 north", "10", "north"],
        ["01", "1", "1x"],
    ],
)
def test_clients_stand_in_the_order_in_which_people_count(names):
    labels = np.zeros(2 * len(names), int)
    split = np.array(["train", "test"] * len(names), object)
    client = np.repeat(np.array(names[::-1], object), 2)
    partition = Partition("column", clients=len(names), shots=0)
    assert partitions.client_names(partition, labels, None, client) == names
    train, test = partitions.make(partition, labels, split, 1, client=client)
    assert [client[own].tolist() for own in train] == [[name] for name in names]
    assert [client[own].tolist() for own in test] == [[name] for name in names]


@pytest.mark.parametrize("form", ["ours", "released"])
def test_many_clients_with_many_classes_take_no_more_than_their_images(form):
    """A table of all clients and classes alone would have 16 million entries."""
    labels = np.repeat(np.arange(4_000), 2)
    split = np.array(["train", "test"] * 4_000, object)
    partition = Partition("pathological", 2_000, shots=1, form=form)
    make = splits.make if form == "released" else partitions.make
    tracemalloc.start()
    train, test = make(partition, labels, split, 1)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sorted(np.concatenate(train + test)) == list(range(8_000))
    assert most < 2**22


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            lambda: partitions.make(Partition("column"), *WORLDS["dirichlet"][:2], 1),
            "column client",
        ),
        (
            lambda: partitions.make(
                Partition("column"), *WORLDS["dirichlet"][:2], 1, client=WORLDS["dirichlet"][2]
            ),
            "names 3 clients, asked for are 10: set clients to 3",
        ),
    ],
)
def test_columns_that_cannot_be(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        settings()


@pytest.mark.parametrize(
    ("wrong", "allowed"),
    [
        ({"kind": "shards"}, "'pachinko' or 'column'"),
        ({"form": "theirs"}, "'ours' or 'released'"),
        ({"loader": "wrong"}, "'right', 'mismatched', 'misnamed' or 'both'"),
        ({"classes": "new"}, "'all' or 'base'"),
        ({"clients": 0}, "greater than 0"),
        ({"clients": 2.5}, "integer"),
        ({"shots": -1}, "greater than or equal to 0"),
        ({"concentration": 0.0}, "greater than 0"),
        ({"min_size": 0}, "greater than 0"),
        ({"unseen": -1}, "greater than or equal to 0"),
    ],
)
def test_a_setting_says_what_it_may_be(wrong, allowed):
    with pytest.raises(ValidationError) as refused:
        Partition(**wrong)
    (found,) = refused.value.errors()
    assert found["loc"] == tuple(wrong) and allowed in found["msg"]


def test_every_kind_can_be_dealt():
    (kind,) = (field for field in dataclasses.fields(Partition) if field.name == "kind")
    assert set(get_args(get_type_hints(Partition)[kind.name])) == set(partitions.DEALERS)


def test_settings_are_a_dataclass_like_the_others():
    partition = Partition("dirichlet", clients=4)
    assert dataclasses.replace(partition, shots=0) == Partition("dirichlet", clients=4, shots=0)
    assert Partition(**dataclasses.asdict(partition)) == partition
    with pytest.raises(dataclasses.FrozenInstanceError):
        partition.clients = 5
    with pytest.raises(ValidationError):
        dataclasses.replace(partition, form="theirs")
