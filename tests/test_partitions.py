"""Promise: clients get the classes of the paper's rule, their shots and all their test images, and a seed says which."""

import numpy as np
import pytest

from fpl import partitions
from fpl.partitions import Partition

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
    """Labels and split of a data set in an order that has nothing to do with its classes; class 0 has five training images."""
    labels = np.repeat(np.arange(n_cls), train + test)
    split = np.tile(np.array(["train"] * train + ["test"] * test), n_cls)
    keep = (labels != 0) | (split == "test") | (np.arange(len(labels)) < 5)
    order = np.random.default_rng(0).permutation(keep.sum())
    return labels[keep][order], split[keep][order]


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


@pytest.mark.parametrize(("n_cls", "clients"), [(48, 10), (37, 10), (37, 36), (37, 37), (102, 50), (5, 1)])
def test_even_differs_by_at_most_one(n_cls, clients):
    labels, split = world(n_cls)
    counts = [len(own) for own in classes(partitions.make(Partition("even", clients), labels, split, 1)[0], labels)]
    assert len(counts) == clients and max(counts) - min(counts) <= 1 and sum(counts) == n_cls


@pytest.mark.parametrize("shots", [1, 4, 16, 50])
@pytest.mark.parametrize("kind", ["pathological", "even"])
def test_classes_are_disjoint_and_complete_and_images_are_theirs(kind, shots):
    labels, split = world(37)
    train, test = partitions.make(Partition(kind, 10, shots), labels, split, seed=1)
    own = classes(train, labels)
    assert sorted(c for part in own for c in part) == list(range(37))
    for mine, train_index, test_index in zip(own, train, test, strict=True):
        assert len(set(train_index.tolist())) == len(train_index) and set(split[train_index]) == {"train"}
        counts = np.bincount(labels[train_index], minlength=37)
        assert all(counts[c] == min(shots, 5 if c == 0 else 20) for c in mine)
        assert test_index.tolist() == [i for i in range(len(labels)) if labels[i] in mine and split[i] == "test"]


@pytest.mark.parametrize("kind", ["pathological", "even"])
def test_a_seed_is_a_split(kind):
    labels, split = world(48)
    partition = Partition(kind, 10, 4)
    first, again, other = (partitions.make(partition, labels, split, seed) for seed in (1, 1, 2))
    for part, same in zip((*first[0], *first[1]), (*again[0], *again[1]), strict=True):
        assert np.array_equal(part, same)
    assert classes(first[0], labels) != classes(other[0], labels)
    assert set(np.concatenate(first[0]).tolist()) != set(np.concatenate(other[0]).tolist())


@pytest.mark.parametrize("other", [Partition(clients=5, shots=4), Partition("even", 10, 4), Partition(clients=48, shots=4)])
def test_who_has_a_class_does_not_decide_its_shots(other):
    labels, split = world(48)
    chosen, differently = (partitions.make(p, labels, split, 1)[0] for p in (Partition(clients=10, shots=4), other))
    assert classes(chosen, labels) != classes(differently, labels)
    assert set(np.concatenate(chosen).tolist()) == set(np.concatenate(differently).tolist())


@pytest.mark.parametrize("stream", ["classes", "shots"])
def test_the_streams_are_separate(stream, monkeypatch):
    """With one stream changed, what the other one draws stays."""
    labels, split = world(48)
    partition, generator = Partition(clients=10, shots=4), np.random.default_rng
    before = partitions.make(partition, labels, split, 1)[0]
    monkeypatch.setattr(np.random, "default_rng", lambda key: generator([99, *key] if bytes(key[1:]) == stream.encode() else key))
    after = partitions.make(partition, labels, split, 1)[0]
    assert (classes(before, labels) == classes(after, labels)) == (stream == "shots")
    assert (set(np.concatenate(before).tolist()) == set(np.concatenate(after).tolist())) == (stream == "classes")


def test_fewer_shots_are_some_of_more():
    labels, split = world(48)
    few, many = (partitions.make(Partition(shots=shots), labels, split, 1) for shots in (2, 8))
    assert all(set(a.tolist()) < set(b.tolist()) for a, b in zip(few[0], many[0], strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(few[1], many[1], strict=True))


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
