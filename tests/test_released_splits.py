"""Promise: the released code's clients are reproduced index by index, or refused where it would
crash or never end."""

import functools
import random

import numpy as np
import pytest
from helpers import ROOT, refuses
from helpers.tiny import golden

from fpl.data.partitions import Partition
from fpl.released import splits as released

FILES = sorted(
    path.stem
    for pattern in ("split_*", "select_clients*")
    for path in (ROOT / "tests/data/golden").glob(f"{pattern}.npz")
)


class Counting(np.random.RandomState):
    """Legacy NumPy that counts its Dirichlet draws."""

    calls = 0

    def dirichlet(self, *args):
        self.calls += 1
        return super().dirichlet(*args)


def load(name):
    return {key: np.asarray(value) for key, value in golden(name).items()}


def flat(name, parts):
    """Index lists as the files store them."""
    yield from ((f"{name}_index", np.concatenate(parts)), (f"{name}_offsets", offsets(parts)))


def offsets(parts):
    return np.cumsum([0, *map(len, parts)])


def class_lists(z):
    """Labels of any order will do: only sizes are stored."""
    yield "split_seed", released.SPLIT_SEED
    for n_cls, n in z["combos"].tolist():
        draw, key = random.Random(released.SPLIT_SEED), f"c{n_cls}_n{n}."
        classes, _ = released.pathological_classes(n_cls, n, draw)
        yield from ((key + "classes", np.concatenate(classes)), (key + "offsets", offsets(classes)))
        train, test = (
            np.repeat(np.arange(n_cls), z[f"{name}_per_class"]) for name in ("train", "test")
        )
        yield (
            key + "train_size",
            [len(part) for part in released.few_shot(train, classes, int(z["shots"]), draw)],
        )
        yield key + "test_size", [len(part) for part in released.whole(test, classes, draw)]


def few_shot(z):
    n, iid, rate, draw = (
        int(z["num_users"]),
        bool(z["iid"]),
        float(z["repeat_rate"]),
        random.Random(),
    )
    lists = (z["train_labels"], z["test_labels"])
    call = functools.partial(released.pathological, lists, n, iid=iid, repeat_rate=rate)
    train, test = call(shots=int(z["shots"]), draw=draw)
    yield "random_after_test_split", draw.random()
    useall, same = call(shots=0)
    assert all(map(np.array_equal, test, same))
    for name, parts in (("train", train), ("test", test), ("useall", useall)):
        yield from flat(name, parts)
    draw.seed(released.SPLIT_SEED)
    classes, _ = released.pathological_classes(int(z["train_labels"].max()) + 1, n, draw, iid, rate)
    yield from (
        ("classes", np.concatenate(classes)),
        ("class_offsets", offsets(classes)),
        ("split_seed", released.SPLIT_SEED),
    )


def cifar(z, split, **options):
    seed, rng = int(z["seed"]), Counting()
    labels = (z["train_labels"], z["test_labels"])
    draw = random.Random(seed)
    if split is released.pachinko:
        options["draw"] = draw
    parts = split(labels, int(z["num_users"]), float(z["beta"]), seed, rng=rng, **options)
    yield from (
        ("dirichlet_calls", rng.calls),
        ("numpy_rng_after", rng.random_sample(3)),
        ("python_rng_after", draw.random()),
    )
    for name, y, part in zip(("train", "test"), labels, parts, strict=True):
        yield from flat(name, part)
        yield f"{name}_size", [len(index) for index in part]
        yield (
            f"{name}_counts",
            [np.bincount(y[index], minlength=int(z["num_classes"])) for index in part],
        )


def domains(z):
    rng, fits = np.random.RandomState(int(z["user_seed"])), []
    for site in z["sites"].tolist():
        lists = (z[f"{site}.train_labels"], z[f"{site}.test_labels"])
        n, sizes = int(z["num_users"]) // len(z["sites"]), [*map(len, lists)]
        parts = released.domain_dirichlet(lists, n, float(z["beta"]), rng=rng)
        labels, split = np.concatenate(lists), np.repeat(["train", "test"], sizes)
        numbered = (parts[0], [index + sizes[0] for index in parts[1]])
        where = (labels, split, np.full(sum(sizes), site), numbered)
        images, given, places = released.mistaken("mismatched", *where, 0)
        for name, first, part, own in zip(("train", "test"), (0, sizes[0]), parts, places):
            yield from flat(f"{site}.{name}", part)
            label, image = given[np.concatenate(own)], images[np.concatenate(own)]
            yield f"{site}.{name}_released_label", label
            yield f"{site}.{name}_released_image", image - first
            yield f"{site}.{name}_released_nameid", labels[image]
        fits.append(np.mean(label == labels[image]))  # of the test images
    yield "released_match_fraction", np.mean(fits)
    yield "numpy_rng_after", rng.random_sample(3)


def rounds(z):
    for n, participation in zip(z["users"].tolist(), z["frac"].tolist(), strict=True):
        seeded = [np.random.RandomState(seed) for seed in z["seeds"]]
        yield (
            f"n{n}_f{participation:g}.picks",
            [released.participants(n, participation, int(z["rounds"]), rng) for rng in seeded],
        )


# by the beginning of the file's name: what rebuilds its outputs, and which arrays are inputs
CASES = {
    "split_pathological": (class_lists, {"combos", "shots", "train_per_class", "test_per_class"}),
    "split_fewshot": (
        few_shot,
        {"train_labels", "test_labels", "shots", "num_users", "iid", "repeat_rate"},
    ),
    "split_labeldir": (
        functools.partial(cifar, split=released.label_dirichlet),
        {"train_labels", "test_labels", "num_users", "beta", "seed", "num_classes"},
    ),
    "split_domainnet": (domains, {"sites", "class_names", "num_users", "beta", "user_seed"}),
    "select": (rounds, {"seeds", "rounds", "users", "frac"}),
}
CASES["split_iid"] = CASES["split_pets20"] = CASES["split_fewshot"]
CASES["split_office"] = CASES["split_domainnet"]
CASES["split_pachinko"] = (
    functools.partial(cifar, split=released.pachinko),
    CASES["split_labeldir"][1],
)


def case(name):
    (found,) = (CASES[beginning] for beginning in CASES if name.startswith(beginning))
    return found


@functools.cache
def rebuilt(name):
    return {key: np.asarray(value) for key, value in case(name)[0](load(name))}


def failing(name, z):
    return [key for key, ours in rebuilt(name).items() if not np.array_equal(ours, z[key])]


@pytest.mark.parametrize("name", FILES)
def test_clients_and_rounds_are_those_stored(name):
    assert not failing(name, load(name))


@pytest.mark.parametrize("name", FILES)
def test_nothing_stored_is_left_out(name):
    labels = {
        f"{site}.{split}_labels"
        for site in load(name).get("sites", [])
        for split in ("train", "test")
    }
    assert rebuilt(name).keys() == load(name).keys() - case(name)[1] - labels


@pytest.mark.parametrize("name", FILES)
def test_a_perturbed_value_fails(name):
    z = load(name)
    for key in rebuilt(name):
        changed = z[key].copy()
        changed.flat[changed.size // 2] += 1e-9 if changed.dtype.kind == "f" else 1
        assert failing(name, {**z, key: changed}) == [key]


def test_there_are_files_of_every_kind():
    assert {
        beginning for beginning in CASES for name in FILES if name.startswith(beginning)
    } == set(CASES)


PETS = np.repeat(np.arange(37), 20)
CIFAR10, CIFAR100 = np.repeat(np.arange(10), 60), np.repeat(np.arange(100), 20)
REFUSED = {
    "clients without a class": (
        lambda: released.pathological((PETS, PETS), 50),
        ["37 classes", "13 of 50 clients", "use fewer clients"],
    ),
    "one client without a class": (
        lambda: released.pathological((PETS, PETS), 20),
        ["1 of 20 clients"],
    ),
    "images too few to divide": (
        lambda: released.pathological((PETS[::5], PETS), 10, shots=0, iid=True),
        ["10 of 10 clients without training images"],
    ),
    "repeated classes in groups": (
        lambda: released.pathological((PETS, PETS), 20, shots=4, repeat_rate=0.1),
        ["20 clients and 4 shots", "use repeat_rate 0"],
    ),
    "repeated classes of all": (
        lambda: released.pathological((PETS, PETS), 20, iid=True, repeat_rate=0.1),
        ["iid=True", "use repeat_rate 0"],
    ),
    "too few images to repeat": (
        lambda: released.pathological((PETS[:-5], PETS), 20, repeat_rate=0.1),
        ["class 36", "16 images", "use fewer shots"],
    ),
    "nobody": (lambda: released.pathological((PETS, PETS), 0), ["n_clients (0)", "above 0"]),
    "no Dirichlet": (
        lambda: released.domain_dirichlet((CIFAR10, CIFAR10), beta=0.0),
        ["beta (0.0)", "above 0"],
    ),
    "no round": (
        lambda: released.participants(5, 0.5, 0, np.random.RandomState(1)),
        ["rounds (0)", "above 0"],
    ),
    "label Dirichlet without end": (
        lambda: released.label_dirichlet((CIFAR10, CIFAR10), 20, min_size=31),
        ["20 clients", "31 training and test images", "2 passes", "use fewer clients"],
    ),
    "label Dirichlet without shares": (
        lambda: released.label_dirichlet((CIFAR10, CIFAR10), 5, beta=1e-5),
        ["no client that may still take images", "larger beta"],
    ),
    "Pachinko on CIFAR-10": (
        lambda: released.pachinko((CIFAR10, CIFAR10), 5),
        ["100 classes of CIFAR-100", "have 10", "use label_dirichlet", "IndexError"],
    ),
    "Pachinko without weights": (
        lambda: released.pachinko((CIFAR100, CIFAR100), 5, beta=1e-5),
        ["weight 0", "larger beta"],
    ),
    "Pachinko for too many": (
        lambda: released.pachinko((CIFAR100, CIFAR100[::20]), 500),
        ["500 clients", "2100 images", "use fewer clients"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_release_cannot_deal_is_refused_in_one_sentence(name, monkeypatch):
    monkeypatch.setattr(released, "PASSES", 2)
    refuses(*REFUSED[name])


CALLS = {
    "pathological": lambda seed: released.pathological((PETS, PETS), 10),
    "label_dirichlet": lambda seed: released.label_dirichlet((CIFAR10, CIFAR10), 5, seed=seed),
    "domain_dirichlet": lambda seed: released.domain_dirichlet((CIFAR10, CIFAR10)),
    "pachinko": lambda seed: released.pachinko((CIFAR100, CIFAR100), 10, seed=seed),
    "participants": lambda seed: (
        (released.participants(10, 0.5, 3, np.random.RandomState(seed)),) * 2
    ),
    "class_order": lambda seed: (
        (released.class_order(["whale", "tiger", "bird", "zebra"], seed),) * 2
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_global_generators_are_left_alone(name):
    before = random.getstate(), np.random.get_state()[1].tolist()
    CALLS[name](1)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


@pytest.mark.parametrize("name", ["label_dirichlet", "pachinko", "participants", "class_order"])
def test_the_seed_of_a_run_decides(name):
    first, again, other = ([list(part) for part in CALLS[name](seed)[0]] for seed in (1, 1, 2))
    assert first == again != other
    if name == "pachinko":
        assert sorted(first) == sorted(other), "nothing but the order of the clients"
    if name == "class_order":
        assert sorted(first) == sorted(other)


def test_after_a_domain_split_every_seed_has_the_same_participants():
    picks = []
    for seed in (1, 2):
        rng = np.random.RandomState(seed)
        released.domain_dirichlet((CIFAR10, CIFAR10), rng=rng)
        picks.append(released.participants(30, 0.25, 5, rng).tolist())
    assert picks[0] == picks[1]


# As settings of an experiment: one list of images, training and test mixed


def mixed(train_labels, test_labels, order):
    """Labels and split of all images in some order, and for both lists the place of each of its
    images."""
    labels = np.concatenate([train_labels, test_labels])[order]
    split = np.repeat(["train", "test"], [len(train_labels), len(test_labels)])[order]
    return labels, split, np.flatnonzero(split == "train"), np.flatnonzero(split == "test")


MADE = {
    "pathological": (
        Partition("pathological", 4, shots=3, form="released"),
        lambda a, b: released.pathological((a, b), 4, 3),
    ),
    "all images": (
        Partition("pathological", 4, shots=0, form="released"),
        lambda a, b: released.pathological((a, b), 4, shots=0),
    ),
    "domain": (
        Partition("domain", 3, 0, 0.7, form="released"),
        lambda a, b: released.domain_dirichlet((a, b), 3, 0.7),
    ),
    "pachinko": (
        Partition("pachinko", 6, 0, 0.3, form="released"),
        lambda a, b: released.pachinko((a, b), 6, 0.3, 5),
    ),
    "iid": (
        Partition("iid", 3, shots=2, form="released"),
        lambda a, b: released.pathological((a, b), 3, 2, iid=True),
    ),
    "dirichlet": (
        Partition("dirichlet", 3, 0, 0.7, form="released"),
        lambda a, b: released.label_dirichlet((a, b), 3, 0.7, 5),
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_settings_deal_as_the_functions_do(name):
    partition, rule = MADE[name]
    gen = np.random.default_rng(3)
    many, train, test = (100, 3000, 1500) if partition.kind == "pachinko" else (8, 240, 100)
    lists = gen.integers(0, many, train), gen.integers(0, many, test)
    labels, split, *places = mixed(*lists, gen.permutation(train + test))
    domain = np.full(len(labels), "one") if partition.kind == "domain" else None
    found = released.make(partition, labels, split, 5, domain)
    wanted = rule(labels[places[0]], labels[places[1]])
    for ours, theirs, place in zip(found, wanted, places, strict=True):
        assert all(
            np.array_equal(own, place[index]) for own, index in zip(ours, theirs, strict=True)
        )


@pytest.mark.parametrize("name", ["split_domainnet12", "split_domainnet30", "split_office20"])
def test_the_released_loader_is_what_the_files_say(name):
    z = load(name)
    lists = [
        (site, part, z[f"{site}.{part}_labels"])
        for site in sorted(z["sites"].tolist())
        for part in ("train", "test")
    ]
    labels = np.concatenate([found for *_, found in lists])
    domain, split = (np.concatenate([[of[k]] * len(of[2]) for of in lists]) for k in (0, 1))
    partition = Partition(
        "domain", int(z["num_users"]), 0, z["beta"].item(), form="released", loader="mismatched"
    )
    parts = released.make(partition, labels, split, 7, domain)
    images, given, (train, test) = released.mistaken("mismatched", labels, split, domain, parts, 7)
    for site in sorted(z["sites"].tolist()):
        for part, own in (("train", train), ("test", test)):
            here = np.concatenate([index for index in own if domain[images[index[0]]] == site])
            first = np.flatnonzero((domain == site) & (split == part))[0]
            assert np.array_equal(given[here], z[f"{site}.{part}_released_label"])
            assert np.array_equal(images[here] - first, z[f"{site}.{part}_released_image"])
    right, same, _ = released.mistaken("misnamed", labels, split, domain, parts, 7)
    assert np.array_equal(right, np.concatenate([*parts[0], *parts[1]]))
    names = np.array(released.class_order(range(10), 7))
    assert np.array_equal(same, names[labels[right]]) and not np.array_equal(names, np.arange(10))
    with pytest.raises(
        ValueError, match="loader 'both' is for clients of one domain each: use kind domain"
    ):
        released.mistaken("both", labels, split, domain, ([np.arange(len(labels))], parts[1]), 7)
    _, both, _ = released.mistaken("both", labels, split, domain, parts, 7)
    assert np.array_equal(both, names[given])


@pytest.mark.parametrize("name", ["split_domainnet12", "split_office20"])
def test_settings_leave_the_state_that_the_rounds_find(name):
    """What is drawn next is what the released run draws next; disjoint classes draw nothing."""
    z = load(name)
    sites = z["sites"].tolist()
    both = [(site, part) for site in sites for part in ("train", "test")]
    lists = [z[f"{site}.{part}_labels"] for site, part in both]
    split = np.repeat([part for _, part in both], [*map(len, lists)])
    domain = np.repeat([site for site, _ in both], [*map(len, lists)])
    partition = Partition("domain", int(z["num_users"]), 0, float(z["beta"]), form="released")
    rng = np.random.RandomState(int(z["user_seed"]))
    released.make(partition, np.concatenate(lists), split, 5, domain, rng)
    assert np.array_equal(rng.random_sample(3), z["numpy_rng_after"])
    rng = np.random.RandomState(7)
    disjoint = Partition("pathological", 4, shots=3, form="released")
    released.make(disjoint, np.concatenate(lists), split, 5, None, rng)
    assert rng.random_sample() == np.random.RandomState(7).random_sample()


@pytest.mark.parametrize(
    ("partition", "sentence"),
    [
        (Partition("even", 2, 0, form="released"), "released code has no even split"),
        (
            Partition("dirichlet", 2, 4, form="released"),
            "takes all training images: set shots to 0, not 4",
        ),
        (Partition("domain", 2, 0, form="released"), "needs the domain of each image"),
    ],
)
def test_settings_that_the_release_has_not_are_refused(partition, sentence):
    labels, split, *_ = mixed(np.arange(40) % 4, np.arange(20) % 4, np.arange(60))
    with pytest.raises(ValueError, match=sentence):
        released.make(partition, labels, split, 1)
