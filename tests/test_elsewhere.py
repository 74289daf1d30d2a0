"""Promise: classes and domains that are left out take no part in training.

At the end all clients are tested on them.
"""

import dataclasses
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from helpers import BACKBONE, DATA, PARAMS, refuses
from helpers.tiny import NAMES, make

from fpl import rounds
from fpl.data import partitions
from fpl.data.partitions import Partition
from fpl.experiments import assemble, cache, records, runner, stats, tables
from fpl.experiments.settings import ROWS
from fpl.prompts import PromptTree
from fpl.rounds import Training
from fpl.state import Clients

# to the classes of training
BOUND = {"pfedprompt", "majority", "zeroshot_own", "ridge_own", "ridge_all"}
BOUND |= {"afl", "zslp", "zeroshot_memory"}
RUN = Training(rounds=2, local_epochs=1, batch_size=4, lr=0.02, gate_lr=0.05)
GEN = torch.Generator().manual_seed(0)
LABELS = torch.randint(len(NAMES), (240,), generator=GEN)
SPLIT = np.where(torch.rand(240, generator=GEN) < 0.4, "train", "test")
FEATS = F.normalize(torch.randn(240, 32, generator=GEN), dim=-1)
PATCHES = torch.randn(240, 3, 32, generator=GEN)
NOVEL = LABELS >= 3


def people(clients=3, feats=FEATS, patches=PATCHES):
    """Clients who share the three base classes."""
    parts = partitions.make(Partition("even", clients, 8, classes="base"), LABELS.numpy(), SPLIT, 1)
    train, test = ([torch.from_numpy(index) for index in part] for part in parts)
    return Clients(feats, LABELS, train, test, 3, patches)


def places(clip, text, clients):
    """Base classes as in training, and under the same names in another order; and novel classes."""
    found = partitions.elsewhere(Partition(classes="base"), LABELS.numpy(), SPLIT)

    def on(name, labels):
        test = [torch.from_numpy(found[name])] * len(clients)
        return dataclasses.replace(clients, labels=labels, test=test)

    turned = PromptTree(clip, NAMES[2::-1], n_ctx=text.n_ctx)
    novel = PromptTree(clip, NAMES[3:], n_ctx=text.n_ctx)
    return {
        "base": (text, on("base", LABELS)),
        "turned": (turned, on("base", 2 - LABELS)),
        "novel": (novel, on("novel", LABELS - 3)),
    }


@pytest.fixture(params=ROWS)
def name(request):
    return request.param


@pytest.fixture
def base(clip, name):
    method = make(ROWS[name])
    return method, PromptTree(clip, NAMES[:3], n_ctx=method.n_ctx)


def play(method, text, clients, **options):
    training = dataclasses.replace(RUN, **method.training)
    setup = rounds.Setup(method, text, clients, training)
    return list(rounds.run_rounds(setup, **options))


def trained(played):
    return [
        (r.number, r.accuracy.tolist(), str(r.loss), r.up.tolist(), r.down.tolist()) for r in played
    ]


def test_a_run_does_not_notice_that_it_is_tested_elsewhere(base, clip, name):
    clients = people()
    plain = play(*base, clients)
    tested = play(*base, clients, elsewhere=places(clip, base[1], clients))
    assert trained(plain) == trained(tested)
    assert all(not r.elsewhere for r in [*plain, *tested[:-1]])
    assert set(tested[-1].elsewhere) == ({"base"} if name in BOUND else {"base", "turned", "novel"})
    assert all(len(accuracy) == 3 for accuracy in tested[-1].elsewhere.values())


def other_novel_images(seed):
    """The same clients, with other novel images."""
    gen = torch.Generator().manual_seed(seed)
    novel = NOVEL.view(-1, 1)
    feats = torch.where(novel, F.normalize(torch.randn(240, 32, generator=gen), dim=-1), FEATS)
    patches = torch.where(novel.unsqueeze(2), torch.randn(240, 3, 32, generator=gen), PATCHES)
    return people(feats=feats, patches=patches)


def test_novel_images_are_not_trained_on(base, clip, name):
    """With other novel images, nothing but the accuracy on them is another."""
    # several others: one accuracy may be the same by chance
    ways = [people(), *map(other_novel_images, (1, 2, 3))]
    plays = [play(*base, clients, elsewhere=places(clip, base[1], clients)) for clients in ways]
    first, *others = map(trained, plays)
    assert all(other == first for other in others)
    for place in plays[0][-1].elsewhere:
        found = {tuple(played[-1].elsewhere[place].tolist()) for played in plays}
        assert (len(found) > 1) == (place == "novel")


def test_what_clients_read_follows_the_class_names(base, clip, name):
    """Base classes in another order are the same task.

    Text features of experts and templates must have turned with them.
    """
    if name in BOUND:
        base = (make(ROWS["zeroshot"]), base[1])
    last = play(*base, people(), elsewhere=places(clip, base[1], people()))[-1].elsewhere
    assert last["turned"].tolist() == pytest.approx(last["base"].tolist(), abs=0.02)


def test_one_client_with_all_base_classes_is_at_home_there(base, clip, name):
    method, text = base
    if hasattr(method, "n_experts") and name != "gate_alone":
        method = dataclasses.replace(method, n_experts=0)
    clients = people(clients=1)
    last = play(method, text, clients, elsewhere=places(clip, text, clients))[-1]
    assert torch.equal(last.elsewhere["base"], last.accuracy)


# Who has what

SIZES = {  # classes -> base classes, and classes of each of ten clients
    "Flowers102": (102, 51, [5] * 9 + [6]),
    "OxfordPets": (37, 19, [2] * 9 + [1]),
    "Food101": (101, 51, [5] * 9 + [6]),
    "Caltech101": (100, 50, [5] * 10),
    "DTD": (47, 24, [2] * 9 + [6]),
}


@pytest.mark.parametrize("data", SIZES)
def test_class_counts_of_the_released_base_classes(data):
    n_cls, n_base, wanted = SIZES[data]
    labels, split = np.repeat(np.arange(n_cls), 2), np.tile(["train", "test"], n_cls)
    train, test = partitions.make(Partition(classes="base"), labels, split, 1)
    assert (
        partitions.n_base(labels) == n_base
        and [len(set(labels[index])) for index in train] == wanted
    )
    for parts, name in ((train, "train"), (test, "test")):
        assert (
            sorted(np.concatenate(parts))
            == np.flatnonzero((labels < n_base) & (split == name)).tolist()
        )
    found = partitions.elsewhere(Partition(classes="base"), labels, split)
    assert labels[found["base"]].tolist() == [*range(n_base)] and labels[
        found["novel"]
    ].tolist() == [*range(n_base, n_cls)]
    assert set(split[np.concatenate([*found.values()])]) == {"test"}


DRAW = np.random.default_rng(0)
WORLD = {
    "labels": DRAW.permutation(np.repeat(np.arange(100), 36)),
    "split": DRAW.choice(["train", "test"], 3600),
    "domain": DRAW.choice(["ink", "oil", "photo"], 3600),
    "client": DRAW.choice(["site a", "site b"], 3600),
}
LEFT_OUT = {
    "base": {"classes": "base"},
    "held out": {"held_out": "oil"},
    "both": {"classes": "base", "held_out": "oil"},
}


def deal(partition, keep):
    """Return images of each client, numbered as in the whole world, when there are only these."""
    world = {k: v[keep] for k, v in WORLD.items()}
    where = np.flatnonzero(keep)
    return [
        [where[index].tolist() for index in part]
        for part in partitions.make(partition, seed=1, **world)
    ]


@pytest.mark.parametrize("left", LEFT_OUT)
@pytest.mark.parametrize("kind", partitions.DEALERS)
@pytest.mark.parametrize("clients", [2, 1])
def test_what_is_left_out_might_as_well_not_exist(kind, left, clients):
    settings = LEFT_OUT[left]
    if kind == "domain":
        clients *= 2 if "held_out" in settings else 3
    if kind == "column":
        clients = 2
    partition = Partition(kind, clients, 4, **settings)
    keep = np.full(3600, True)
    if "classes" in settings:
        keep &= WORLD["labels"] < 50
    if "held_out" in settings:
        keep &= WORLD["domain"] != "oil"
    dealt = deal(partition, np.full(3600, True))
    for part in dealt:
        assert len(part) == clients and all(part) and keep[np.concatenate(part)].all()
    by_number = kind == "pachinko" and "classes" in settings  # it knows what the 100 classes are
    if not by_number:
        assert dealt == deal(Partition(kind, clients, 4), keep)
    everything, test = deal(dataclasses.replace(partition, shots=0), np.full(3600, True))
    for part, name in ((everything, "train"), (test, "test")):
        left = np.flatnonzero(keep & (WORLD["split"] == name))
        assert sorted(np.concatenate(part)) == left.tolist()


def test_a_class_of_the_held_out_domain_alone_is_dealt_to_nobody():
    world = {**WORLD, "domain": np.where(WORLD["labels"] == 7, "oil", WORLD["domain"])}
    for kind in ("pathological", "even", "dirichlet", "iid"):
        train, _ = partitions.make(Partition(kind, 2, held_out="oil"), seed=1, **world)
        assert set(world["labels"][np.concatenate(train)]) == {*range(100)} - {7}


def test_the_one_client_of_a_domain_has_its_classes_without_training_images():
    labels, split = np.array([0, 0, 1, 1, 2]), np.array(["train", "test", "train", "test", "test"])
    for kind in ("dirichlet", "domain"):
        ((train,), (test,)) = partitions.make(
            Partition(kind, 1, min_size=1), labels, split, 1, np.full(5, "oil")
        )
        assert train.tolist() == [0, 2] and test.tolist() == [1, 3, 4]


def test_one_client_per_domain_and_all_images_of_the_target():
    partition = Partition("domain", 2, held_out="oil")
    for part in deal(partition, np.full(3600, True)):
        assert [set(WORLD["domain"][index]) for index in part] == [{"ink"}, {"photo"}]
    world = [WORLD[k] for k in ("labels", "split", "domain")]
    found = partitions.elsewhere(partition, *world)
    assert [*found] == ["target"] and not partitions.elsewhere(Partition(), *world)
    assert found["target"].tolist() == np.flatnonzero(WORLD["domain"] == "oil").tolist()
    both = partitions.elsewhere(Partition(classes="base", held_out="oil"), *world)
    assert [*both] == [*partitions.ELSEWHERE]
    assert (WORLD["labels"][both["target"]] < 50).all()
    assert not set(WORLD["domain"][np.concatenate([both["base"], both["novel"]])]) & {"oil"}


def made(**settings):
    return lambda: partitions.make(Partition(**settings), seed=1, **WORLD)


REFUSED = {
    "domain": (made(held_out="chalk"), ["'chalk'", "there are ink, oil, photo"]),
    "no domains": (
        lambda: partitions.make(Partition(held_out="oil"), WORLD["labels"], WORLD["split"], 1),
        ["'oil'", "not of several domains"],
    ),
    "one domain": (
        lambda: partitions.make(
            Partition(held_out="own"), WORLD["labels"], WORLD["split"], 1, np.full(3600, "own")
        ),
        ["'own'", "not of several domains"],
    ),
    "clients": (made(kind="domain", clients=3, held_out="oil"), ["3 clients", "2 domains"]),
    "one class": (
        lambda: partitions.elsewhere(
            Partition(classes="base"), np.zeros(4, int), np.array(["train", "test"] * 2)
        ),
        ["no novel images"],
    ),
}


@pytest.mark.parametrize(
    "settings",
    [
        {"form": "released", "classes": "base"},
        {"kind": "domain", "form": "released", "held_out": "oil"},
        {"kind": "domain", "loader": "both", "held_out": "oil"},
    ],
)
def test_the_released_splits_leave_nothing_out(settings):
    with pytest.raises(ValueError, match="use form ours and loader right, or leave none out"):
        Partition(**settings)


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_left_out_is_refused_in_one_sentence(case):
    refuses(*REFUSED[case])


# From features to a table


def right(feats, images, first, end):
    """Return zero-shot accuracy on some images, without the machinery of runs.

    Classes are those from `first` to before `end`.
    """
    loaded, _ = cache.load_cached(DATA, BACKBONE, "cpu")
    t = PromptTree(loaded, feats.classes[first:end]).zero_shot()
    found = (feats.feats[images] @ t.T).argmax(-1) == feats.labels[images] - first
    return found.float().mean().item()


def found_elsewhere(**changes):
    """Return the accuracies on other images of a zero-shot run."""
    (last,) = assemble.rounds_of(PARAMS.experiment("zeroshot", 1, **changes))
    return {k: v.tolist() for k, v in last.elsewhere.items() if k != partitions.GLOBAL}


def test_zero_shot_accuracies_are_those_of_the_images_and_names(here):
    _, feats = cache.load_cached(DATA, BACKBONE, "cpu")
    labels = feats.labels.numpy()
    test = feats.split == "test"
    base = right(feats, (labels < 15) & test, 0, 15)
    novel = right(feats, (labels >= 15) & test, 15, 30)
    found = found_elsewhere(classes="base")
    assert found == {"base": pytest.approx([base] * 4), "novel": pytest.approx([novel] * 4)}
    target = right(feats, feats.domain == "sketch", 0, 30)
    found = found_elsewhere(kind="domain", clients=5, held_out="sketch")
    assert found == {"target": pytest.approx([target] * 5)}


@pytest.mark.parametrize("row", ["majority", "zeroshot_own"])
def test_global_accuracy_is_that_on_the_test_images_of_all_clients(row, here):
    """Who never names a class of others is right on its own images, and on no others."""
    experiment = PARAMS.experiment(row, 1)
    sizes = [len(own) for own in assemble.make_clients(experiment, "cpu").test]
    *_, last = assemble.rounds_of(experiment)
    everywhere = last.elsewhere[partitions.GLOBAL]
    assert sum(sizes) == 30 and last.accuracy.max() > 0
    wanted = [a * own / 30 for a, own in zip(last.accuracy.tolist(), sizes, strict=True)]
    assert everywhere.tolist() == pytest.approx(wanted)


def test_clients_of_a_base_run_have_base_classes_only(here):
    experiment = PARAMS.experiment("promptfl", 1, classes="base")
    clients = assemble.make_clients(experiment, "cpu")
    assert clients.n_cls == 15
    assert all(clients.labels[i].max() < 15 for i in (*clients.train, *clients.test))
    assert sum(clients.counts(i) for i in range(4)).tolist() == [2] * 15


def test_records_and_frames_have_what_was_found_elsewhere(here):
    experiments = [
        PARAMS.experiment("promptfl", 1, classes="base"),
        PARAMS.experiment("ridge_own", 1, classes="base"),
        PARAMS.experiment("promptfl", 1, kind="domain", clients=5, held_out="sketch"),
        PARAMS.experiment("promptfl", 1),
    ]
    paths = runner.sweep(experiments)
    found = [json.loads(path.read_text())["rounds"][-1].get("elsewhere", {}) for path in paths]
    kinds = [["base", "global", "novel"], ["base", "global"], ["global", "target"], ["global"]]
    assert [[*places] for places in found] == kinds
    means = {}
    for path, experiment, places in zip(paths, experiments, found, strict=True):
        frame = records.frame([path])
        last = frame["round"] == frame["round"].max()
        means[experiment.row, 1] = frame["accuracy"][last].mean()
        for name in (partitions.GLOBAL, *partitions.ELSEWHERE):
            assert frame[name][~last].isna().all()
            nothing = pytest.approx([math.nan] * last.sum(), nan_ok=True)
            assert frame[name][last].tolist() == places.get(name, nothing)
    base = records.frame(paths[:2])
    del means["promptfl", 1]
    means["promptfl", 1] = stats.last_round(records.frame(paths[:1]))["accuracy"].mean()
    assert stats.by_seed(base).to_dict() == pytest.approx(means)
    assert tables.generalisation(base).loc["ridge_own"][["novel", "HM"]].isna().all()


def test_the_harmonic_mean_is_that_of_each_seed():
    accuracies = [(1, 1.0, 0.5, 0.2), (1, 0.6, 0.5, 0.4), (2, 0.5, 0.5, 0.5), (2, 0.5, 0.5, 0.5)]
    lines = pd.DataFrame(accuracies, columns=["seed", "accuracy", "base", "novel"])
    lines = lines.assign(row="a", run=lines["seed"], method="a", data="shapes", round=1)
    before = lines.assign(round=0, accuracy=0.0, base=math.nan, novel=math.nan)
    runs = pd.concat([lines, before])
    (found,) = tables.generalisation(runs).to_dict("records")
    first = 300 / (1 / 0.8 + 1 / 0.5 + 1 / 0.3)
    wanted = {
        "local": 65,
        "base": 50,
        "novel": 40,
        "HM": (first + 50) / 2,
        "HM std": (50 - first) / math.sqrt(2),
        "seeds": 2,
    }
    assert {k: found[k] for k in wanted} == pytest.approx(wanted, abs=0.005)


def test_an_image_that_two_clients_have_counts_once(here):
    experiment = PARAMS.experiment("zeroshot", 1)
    setup = assemble.setup_of(experiment)
    test = [*setup.clients.test]
    both = dataclasses.replace(setup.clients, test=[torch.cat(test[:2])] * 2 + test[2:])
    _, there = assemble.elsewhere_of(experiment, setup.text, both)[partitions.GLOBAL]
    assert there.test[0].tolist() == sorted({*torch.cat(test).tolist()})
