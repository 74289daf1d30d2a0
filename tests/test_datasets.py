"""Promise: a data set in the files of its authors or of others gives one manifest.

Its lists run nothing, and one file more in the package is one data set more.
"""

import csv
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets as tv
from helpers.pickles import cifar_world, opcodes, python2
from PIL import Image
from scipy.io import savemat

from fpl.audit import label_prior
from fpl.data import datasets, pickled
from fpl.data.datasets import domainnet10, layouts, office_caltech10
from fpl.data.manifest import SPLITS, Row, read_manifest, write_manifest

ROOT = Path(__file__).parents[1]


def picture(path, colour=(9, 9, 9)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (2, 2), colour).save(path)


def dump(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


# --- small worlds: each writes a data set and returns its rows (path, label, class, split) --------


def coop_world(lists, images, names, prefix=""):
    def make(folder):
        made = {
            split: [
                [f"{prefix}{name.replace(' ', '_')}/{split}_{i}.jpg", i, name]
                for i, name in reversed([*enumerate(names)])
            ]
            for split in ("train", "val", "test")
        }
        dump(folder / lists, made)
        rows = [
            (f"{images}/{path}", i, name, split) for split in made for path, i, name in made[split]
        ]
        for path, *_ in rows:
            picture(folder / path)
        return rows

    return make


def flowers_world(folder, **more):
    savemat(folder / "imagelabels.mat", {"labels": np.array([[3, 1, 2, 1, 3, 2, 2]], np.uint8)})
    numbers = {"trnid": [[2, 1, 3]], "valid": [[4, 7]], "tstid": [[6, 5]]}
    savemat(
        folder / "setid.mat", {key: np.array(value, np.uint16) for key, value in numbers.items()}
    )
    names = ["pink primrose", "hard-leaved pocket orchid", "canterbury bells"]
    order = [
        (2, 0, "train"),
        (1, 2, "train"),
        (3, 1, "train"),
        (4, 0, "val"),
        (7, 1, "val"),
        (6, 1, "test"),
        (5, 2, "test"),
    ]
    for number in range(1, 8):
        picture(folder / f"jpg/image_{number:05d}.jpg")
    return [
        (f"jpg/image_{number:05d}.jpg", label, names[label], split)
        for number, label, split in order
    ]


def pets_world(folder):
    dump(folder / "annotations/trainval.txt", "Bengal_2 2 1 1\nAbyssinian_100 1 1 1\n")
    dump(
        folder / "annotations/test.txt",
        "Abyssinian_7 1 1 1\namerican_pit_bull_terrier_3 3 2 1\nBengal_1 2 1 1\n",
    )
    listed = [("Bengal_2", 1, "bengal", "train"), ("Abyssinian_100", 0, "abyssinian", "train")]
    listed += [("Abyssinian_7", 0, "abyssinian", "test")]
    listed += [
        ("american_pit_bull_terrier_3", 2, "american pit bull terrier", "test"),
        ("Bengal_1", 1, "bengal", "test"),
    ]
    for name, *_ in listed:
        picture(folder / f"images/{name}.jpg")
    return [(f"images/{name}.jpg", *rest) for name, *rest in listed]


def food_world(folder):
    dump(
        folder / "meta/train.json",
        {"waffles": ["waffles/8"], "apple_pie": ["apple_pie/2", "apple_pie/1"]},
    )
    dump(folder / "meta/test.json", {"waffles": ["waffles/9"], "apple_pie": ["apple_pie/3"]})
    rows = [(f"images/apple_pie/{i}.jpg", 0, "apple pie", "train") for i in (2, 1)] + [
        ("images/waffles/8.jpg", 1, "waffles", "train")
    ]
    rows += [
        ("images/apple_pie/3.jpg", 0, "apple pie", "test"),
        ("images/waffles/9.jpg", 1, "waffles", "test"),
    ]
    for path, *_ in rows:
        picture(folder / path)
    return rows


def dtd_world(folder):
    listed = {
        "train": ["woven/woven_0001.jpg", "banded/banded_0002.jpg"],
        "val": ["banded/banded_0004.jpg", "woven/woven_0009.jpg"],
    }
    listed["test"] = ["woven/woven_0003.jpg", "banded/banded_0001.jpg"]
    rows = []
    for split, images in listed.items():
        dump(folder / f"labels/{split}1.txt", "\n".join(images) + "\n")
        for image in images:
            name = image.split("/")[0]
            rows.append((f"images/{image}", ["banded", "woven"].index(name), name, split))
            picture(folder / rows[-1][0])
    return rows


COOP = {
    "flowers102": ("split_zhou_OxfordFlowers.json", "jpg", ["pink primrose", "tiger lily"]),
    "oxfordpets": ("split_zhou_OxfordPets.json", "images", ["abyssinian", "american_bulldog"]),
    "food101": ("split_zhou_Food101.json", "images", ["apple_pie", "waffles"]),
    "caltech101": (
        "split_zhou_Caltech101.json",
        "101_ObjectCategories",
        ["face", "leopard", "accordion"],
    ),
    "dtd": ("split_zhou_DescribableTextures.json", "images", ["banded", "woven"]),
}
TORCHVISION = {
    "flowers102": flowers_world,
    "oxfordpets": pets_world,
    "food101": food_world,
    "dtd": dtd_world,
}
WORLDS = [
    (name, "coop", coop_world(*of), folder)
    for name, of in COOP.items()
    for folder in datasets.DATASETS[name].folders
]
WORLDS += [
    (name, "torchvision", of, folder)
    for name, of in TORCHVISION.items()
    for folder in datasets.DATASETS[name].folders
]


@pytest.mark.parametrize(
    ("name", "layout", "make", "folder"), WORLDS, ids=lambda x: x if isinstance(x, str) else ""
)
def test_a_data_set_is_read_in_each_layout_and_under_each_folder_name(
    name, layout, make, folder, tmp_path
):
    (tmp_path / folder).mkdir(parents=True)
    expected = [
        (path, i, text.replace("_", " "), split) for path, i, text, split in make(tmp_path / folder)
    ]
    manifest = datasets.read(name, tmp_path)
    assert datasets.find(name, tmp_path)[:2] == (tmp_path / folder, layout)
    assert [(r["path"], int(r["label"]), r["class"], r["split"]) for r in manifest.rows] == expected
    assert {r["domain"] for r in manifest.rows} == {name}
    assert manifest.classes == [c for _, c in sorted({(i, text) for _, i, text, _ in expected})]
    assert (
        datasets.read(name, tmp_path / folder, layout).rows == manifest.rows
    )  # the data root may be the folder itself


def test_the_written_manifest_is_the_one_in_memory(tmp_path):
    (tmp_path / "dtd").mkdir()
    dtd_world(tmp_path / "dtd")
    manifest = datasets.read("dtd", tmp_path)
    path = write_manifest(manifest)
    assert path == tmp_path / "dtd" / "manifest.csv" and read_manifest(path) == manifest
    away = read_manifest(write_manifest(manifest, tmp_path / "elsewhere" / "dtd.csv"))
    assert (
        all((away.folder / row["path"]).exists() for row in away.rows)
        and away.classes == manifest.classes
    )


ORACLES = {  # torchvision's own reader, on the same files: (folder, splits, reader)
    "flowers102": ("flowers-102", {"train": "train", "val": "val", "test": "test"}, tv.Flowers102),
    "oxfordpets": ("oxford-iiit-pet", {"train": "trainval", "test": "test"}, tv.OxfordIIITPet),
    "food101": ("food-101", {"train": "train", "test": "test"}, tv.Food101),
    "dtd": ("dtd/dtd", {"train": "train", "val": "val", "test": "test"}, tv.DTD),
}


@pytest.mark.parametrize("name", ORACLES)
def test_labels_are_those_of_torchvision(name, tmp_path, monkeypatch):
    folder, splits, oracle = ORACLES[name]
    (tmp_path / folder).mkdir(parents=True)
    TORCHVISION[name](tmp_path / folder)
    monkeypatch.setattr(
        tv.Flowers102, "_check_integrity", lambda self: True
    )  # it wants the real files' checksums
    theirs = {}
    for split, called in splits.items():
        data = oracle(tmp_path, split=called)
        theirs |= {
            (str(p), split): i
            for p, i in zip(
                data._images if name == "oxfordpets" else data._image_files, data._labels
            )
        }
    manifest = datasets.read(name, tmp_path)
    assert {
        (str(manifest.folder / r["path"]), r["split"]): int(r["label"]) for r in manifest.rows
    } == theirs


def test_the_split_of_coop_goes_first_and_another_can_be_asked_for(tmp_path):
    folder = tmp_path / "oxford_flowers"
    folder.mkdir()
    own = flowers_world(folder)
    coop_world(*COOP["flowers102"])(folder)
    assert datasets.find("flowers102", tmp_path)[1] == "coop"
    assert [r["path"] for r in datasets.read("flowers102", tmp_path, "torchvision").rows] == [
        path for path, *_ in own
    ]


def test_flower_names_come_from_cat_to_name_where_it_is(tmp_path):
    flowers_world(tmp_path)
    dump(tmp_path / "cat_to_name.json", {"1": "rose", "2": "pink-yellow dahlia", "3": "lotus"})
    assert datasets.read("flowers102", tmp_path).classes == ["rose", "pink-yellow dahlia", "lotus"]


def test_the_unsure_flower_has_its_name_in_coop(tmp_path):
    flowers_world(tmp_path)
    savemat(tmp_path / "imagelabels.mat", {"labels": np.full((1, 7), 60, np.uint8)})
    assert datasets.read("flowers102", tmp_path).classes == ["pink-yellow dahlia"]


def test_caltech_folders_follow_coops_classes_names_and_shares(tmp_path):
    sizes = {
        "Faces": 9,
        "Faces_easy": 4,
        "BACKGROUND_Google": 4,
        "airplanes": 10,
        "Leopards": 7,
        "Motorbikes": 5,
        "accordion": 11,
    }
    for name, n in sizes.items():
        for i in range(n):
            picture(tmp_path / f"caltech-101/101_ObjectCategories/{name}/image_{i:04d}.jpg")
    manifest = datasets.read("caltech101", tmp_path)
    assert manifest.classes == [
        "face",
        "leopard",
        "motorbike",
        "accordion",
        "airplane",
    ]  # capitals sort first
    found = Counter((r["class"], r["split"]) for r in manifest.rows)
    shares = {
        "face": (4, 2, 3),
        "leopard": (4, 1, 2),
        "motorbike": (2, 1, 2),
        "accordion": (6, 2, 3),
        "airplane": (5, 2, 3),
    }
    assert found == {
        (name, split): n for name, ns in shares.items() for split, n in zip(SPLITS, ns)
    }
    assert datasets.read("caltech101", tmp_path).rows == manifest.rows


# --- a data set more ------------------------------------------------------------------------------

FRUIT = """
from pathlib import Path

from fpl.data.datasets.layouts import Dataset, File, Layout, Row, Rows, lines


def read(folder: Path, domain: str) -> Rows:
    for line in lines(folder / f"{domain}.txt"):
        path, name, split = line.split()
        yield Row(path, ["apple", "red_pear"].index(name), name, split)


DATASET = Dataset(
    key="fruit",
    title="Fruit of Two Kinds",
    position=4,
    folders=("fruit",),
    classes=2,
    layouts={"lists": Layout(("{domain}.txt",), read, train=1, test=1)},
    page="https://fruit.example",
    terms="None.",
    files=(File("fruit/shop.txt", hint="ask at the shop"),),
    domains={"shop": "The Shop"},
)
"""
USE = """
from pathlib import Path
from fpl.data import datasets, fetch
from fpl.experiments import tables
assert Path(datasets.__file__).is_relative_to(Path.cwd())
print(*datasets.overview(Path("."))["data set"])
print(*fetch.by_hand("fruit", Path(".")))
Path("fruit/shop.txt").write_text("a.jpg apple train\\nb.jpg red_pear test")
manifest = datasets.read("fruit", Path("."))
print(*manifest.classes, *(row["domain"] for row in manifest.rows), sep=", ")
print(datasets.checklist("fruit", Path("."))["todo"].iloc[-1])
print(tables.PRINTED["fruit"], tables.SPELT["shop"], sep=", ")
"""


def test_one_file_more_is_one_data_set_more(tmp_path):
    """In the list, read, checked, asked for and printed by its name, with no other change."""
    shutil.copytree(ROOT / "fpl", tmp_path / "fpl", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "fpl/data/datasets/fruit.py").write_text(FRUIT)
    (tmp_path / "fruit").mkdir()
    there = {**os.environ, "PYTHONPATH": str(tmp_path)}
    made = subprocess.run(
        [sys.executable, "-c", USE], cwd=tmp_path, env=there, capture_output=True, text=True
    )
    assert made.stdout.splitlines() == [
        " ".join(
            [*list(datasets.DATASETS)[:3], "caltech101", "fruit", *list(datasets.DATASETS)[4:]]
        ),
        "bring shop.txt (ask at the shop) and put it at fruit/shop.txt",
        "apple, red pear, shop, shop",
        "the first that is missing is fruit/a.jpg",
        "Fruit of Two Kinds, The Shop",
    ], made.stderr


def test_the_data_sets_are_listed_in_the_order_of_the_paper_and_then_the_others():
    assert list(datasets.DATASETS) == [
        "flowers102", "oxfordpets", "food101", "caltech101", "dtd",
        "cifar10", "cifar100", "domainnet10", "office_caltech10",
        "eurosat", "ucf101", "fgvc_aircraft", "stanford_cars", "sun397", "pacs", "office_home"
    ]  # fmt: skip


# --- CIFAR ----------------------------------------------------------------------------------------


def with_bytes_as_keys(x):
    return pickle.dumps({key.encode(): value for key, value in x.items()}, protocol=2)


@pytest.mark.parametrize("write", [python2, pickle.dumps, with_bytes_as_keys])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_images_are_written_as_they_are_and_numbered_as_in_torchvision(
    name, write, tmp_path, monkeypatch
):
    train, test = cifar_world(tmp_path, name, write)
    manifest = datasets.read(name, tmp_path)
    for split, pixels in (("train", train), ("test", test)):
        rows = [r for r in manifest.rows if r["split"] == split]
        assert [Path(r["path"]).name for r in rows] == [f"{i:05d}.png" for i in range(len(pixels))]
        assert (
            np.stack([np.asarray(Image.open(manifest.folder / r["path"])) for r in rows]) == pixels
        ).all()
        if write is python2:
            monkeypatch.setattr(tv.cifar, "check_integrity", lambda *_: True)
            theirs = {"cifar10": tv.CIFAR10, "cifar100": tv.CIFAR100}[name](
                tmp_path / name, train=split == "train"
            )
            assert (
                theirs.targets == [int(r["label"]) for r in rows] and (theirs.data == pixels).all()
            )
            assert [c.replace("_", " ") for c in theirs.classes] == manifest.classes


def test_cifar_images_are_written_once_and_never_taken_for_those_of_other_batches(tmp_path):
    cifar_world(tmp_path, "cifar10", pickle.dumps)
    first = datasets.read("cifar10", tmp_path)
    image = first.folder / first.rows[0]["path"]
    image.write_bytes(b"kept")
    assert datasets.read("cifar10", tmp_path).rows == first.rows and image.read_bytes() == b"kept"
    batch = tmp_path / "cifar10/cifar-10-batches-py/data_batch_2"
    batch.write_bytes(
        pickle.dumps(pickle.loads(batch.read_bytes()) | {"labels": [1] * 4})
    )  # our own file
    assert not {r["path"] for r in datasets.read("cifar10", tmp_path).rows} & {
        r["path"] for r in first.rows
    }


# --- domains --------------------------------------------------------------------------------------


def lists_of(domain, classes, prefix=""):
    """FedBN's two lists of a domain: (paths, names) as arrays, classes in reversed order."""
    order = list(reversed(classes))
    return {
        split: ([f"{prefix}{domain}/{c}/{split}_{c}.jpg" for c in order], order)
        for split in ("train", "test")
    }


def as_objects(paths, names):
    return pickle.dumps((np.array(paths, object), np.array(names, object)))


def as_text(paths, names):
    return pickle.dumps((np.array(paths), np.array(names)), protocol=2)


def as_python2(paths, names):
    return python2((np.array(paths, "S"), np.array(names, "S")))


def as_lists(paths, names):
    return pickle.dumps([paths, names])


def fedbn_world(folder, domains, classes, write=as_objects, prefix=""):
    for domain in domains:
        (folder / domain).mkdir(parents=True)
        for split, (paths, names) in lists_of(domain, classes, prefix).items():
            (folder / f"{domain}_{split}.pkl").write_bytes(write(paths, names))


@pytest.mark.parametrize("prefix", ["", "DomainNet/", "../data/DomainNet/"])
@pytest.mark.parametrize("write", [as_objects, as_text, as_python2, as_lists])
def test_fedbns_lists_give_labels_in_the_fixed_class_order_and_keep_their_own_order(
    write, prefix, tmp_path
):
    fedbn_world(tmp_path / "DomainNet", domainnet10.DOMAINS, domainnet10.CLASSES, write, prefix)
    manifest = datasets.read("domainnet10", tmp_path)
    assert manifest.classes == [
        "bird", "feather", "headphones", "ice cream", "teapot",
        "tiger", "whale", "windmill", "wine glass", "zebra"
    ]  # fmt: skip
    expected = [
        (f"{domain}/{name}/{split}_{name}.jpg", str(9 - i), domain, split)
        for domain in ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
        for split in ("train", "test")
        for i, name in enumerate(reversed(domainnet10.CLASSES))
    ]
    assert [(r["path"], r["label"], r["domain"], r["split"]) for r in manifest.rows] == expected


def test_office_has_its_lists_and_its_own_class_order(tmp_path):
    fedbn_world(
        tmp_path / "office_caltech_10",
        ("amazon", "caltech", "dslr", "webcam"),
        office_caltech10.CLASSES,
    )
    manifest = datasets.read("office_caltech10", tmp_path)
    assert manifest.classes == [
        "back pack", "bike", "calculator", "headphones", "keyboard",
        "laptop computer", "monitor", "mouse", "mug", "projector"
    ]  # fmt: skip
    assert {r["domain"] for r in manifest.rows} == {"amazon", "caltech", "dslr", "webcam"}
    assert len(manifest.rows) == 80


@pytest.mark.parametrize("place", ["", "splits/"])
def test_the_official_lists_of_domainnet_are_cut_to_ten_classes(place, tmp_path):
    for domain in domainnet10.DOMAINS:
        (tmp_path / "domainnet" / domain).mkdir(parents=True)
        for split in ("train", "test"):
            names = ["aircraft_carrier", "zebra", "tiger", "ice_cream", "the_Eiffel_Tower", "tiger"]
            text = "".join(
                f"{domain}/{name}/{domain}_{i}_{split}.jpg {i * 40}\n"
                for i, name in enumerate(names)
            )
            dump(tmp_path / f"domainnet/{place}{domain}_{split}.txt", text)
    manifest = datasets.read("domainnet10", tmp_path)
    assert [
        (r["path"], r["class"], r["label"])
        for r in manifest.rows
        if r["domain"] == "real" and r["split"] == "test"
    ] == [
        ("real/zebra/real_1_test.jpg", "zebra", "2"),
        ("real/tiger/real_2_test.jpg", "tiger", "1"),
        (
            "real/ice_cream/real_3_test.jpg",
            "ice cream",
            "0",
        ),  # labels close up where classes are missing
        ("real/tiger/real_5_test.jpg", "tiger", "1"),
    ]
    fedbn_world(tmp_path / "DomainNet", domainnet10.DOMAINS, domainnet10.CLASSES)
    assert datasets.find("domainnet10", tmp_path)[1] == "fedbn"


@pytest.mark.parametrize(
    "called", [{}, {"caltech": "caltech10", "back_pack": "backpack", "laptop_computer": "laptop"}]
)
def test_plain_folders_of_office_are_split_80_to_20_under_either_name(called, tmp_path):
    for domain in ("amazon", "caltech", "dslr", "webcam"):
        for n, name in enumerate([*office_caltech10.CLASSES, "stapler"]):
            for i in range(n + 2):
                folder = f"{called.get(domain, domain)}/{called.get(name, name)}"
                picture(tmp_path / f"office_caltech_10/{folder}/{i:04d}.jpg")
    manifest = datasets.read("office_caltech10", tmp_path)
    assert manifest.classes[0] == "back pack" and manifest.classes[5] == "laptop computer"
    assert len(manifest.classes) == 10
    assert (
        Counter((r["domain"], r["split"]) for r in manifest.rows)["caltech", "test"] == 13
    )  # 65 images
    assert all((manifest.folder / r["path"]).exists() for r in manifest.rows)
    assert datasets.read("office_caltech10", tmp_path).rows == manifest.rows


def test_the_stratified_split_has_the_counts_of_fedbns_preprocessing():
    with open(ROOT / "data/label_prior/office_caltech10_counts.csv") as f:
        table = list(csv.DictReader(f))
    for domain in sorted({row["domain"] for row in table}):
        totals = [
            int(row["images"])
            for row in sorted(table, key=lambda r: int(r["label"]))
            if row["domain"] == domain
        ]
        images = [
            Row(f"{label}/{i}", label, str(label))
            for label, n in enumerate(totals)
            for i in range(n)
        ]
        found = Counter((row.split, row.label) for row in layouts.stratified(images, domain))
        train, test = label_prior.stratified(np.array(totals))[0]
        assert [[found[split, label] for label in range(10)] for split in ("train", "test")] == [
            train.tolist(),
            test.tolist(),
        ]


def test_a_part_of_the_domains_is_read_but_not_a_part_of_a_domain(tmp_path):
    fedbn_world(tmp_path / "DomainNet", ("real", "sketch"), domainnet10.CLASSES)
    assert {r["domain"] for r in datasets.read("domainnet10", tmp_path).rows} == {"real", "sketch"}
    (tmp_path / "DomainNet" / "clipart").mkdir()
    with pytest.raises(ValueError, match="only a part of clipart: add clipart_train.pkl"):
        datasets.read("domainnet10", tmp_path)


# --- what is refused ------------------------------------------------------------------------------


class Calls:
    """Pickles to a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def forged_array():
    """An array of objects whose pointers are given as bytes."""
    return python2(np.zeros(1, "i8")).replace(opcodes("i8"), opcodes("O8"))


HOSTILE = {
    "a call": lambda mark: pickle.dumps(Calls(os.system, f"touch {mark}")),
    "eval": lambda mark: pickle.dumps(Calls(eval, f"open({str(mark)!r}, 'w')")),
    "in a list in an array": lambda mark: pickle.dumps(
        (np.array([[Calls(os.system, f"touch {mark}")], "x"], object), ["x"])
    ),
    "as an argument": lambda mark: pickle.dumps(
        Calls(bytes, Calls(Calls, Calls(os.system, f"touch {mark}")))
    ),
    "in an old protocol": lambda mark: b"cos\nsystem\n(S'touch " + str(mark).encode() + b"'\ntR.",
    "by getattr": lambda mark: pickle.dumps(Calls(getattr, "x", "upper")),
    "an import": lambda mark: b"cthis\ns\n.",
    "NumPy's own loader": lambda mark: b"cnumpy\nload\n(S'x'\ntR.",
    "a name behind an admitted one": lambda mark: b"\x80\x04\x8c\x05numpy\x8c\x0cndarray.fill\x93.",
    "pointers": lambda mark: forged_array(),
    "an object of a class": lambda mark: pickle.dumps(Path("x")),
    "a set": lambda mark: pickle.dumps({"x"}),
    "an array without content": lambda mark: b"cnumpy.core.multiarray\n_reconstruct\n(tR.",
    "a bare type": lambda mark: b"cnumpy\ndtype\n.",
    "no pickle": lambda mark: b"<html>sign in</html>",
    "nothing": lambda mark: b"",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_pickle_that_does_more_than_list_is_refused_and_nothing_runs(kind, tmp_path):
    fedbn_world(tmp_path / "DomainNet", domainnet10.DOMAINS, domainnet10.CLASSES)
    mark = tmp_path / "ran"
    (tmp_path / "DomainNet" / "painting_test.pkl").write_bytes(HOSTILE[kind](mark))
    with pytest.raises(ValueError, match=r"^domainnet10: .*painting_test\.pkl is not read"):
        datasets.read("domainnet10", tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("a call", "posix.system"),
        ("eval", "builtins.eval"),
        ("an import", "this.s"),
        ("pointers", "O8"),
    ],
)
def test_the_refusal_names_what_was_asked_for(kind, named, tmp_path):
    (tmp_path / "list.pkl").write_bytes(HOSTILE[kind](tmp_path / "ran"))
    with pytest.raises(ValueError, match=named):
        pickled.read(tmp_path / "list.pkl")


def test_a_cut_pickle_is_refused_wherever_it_is_cut(tmp_path):
    whole = as_text(["clipart/bird/a.jpg", "clipart/zebra/b.jpg"], ["bird", "zebra"])
    for end in range(len(whole) - 1):
        (tmp_path / "list.pkl").write_bytes(whole[:end])
        with pytest.raises(ValueError, match="is not read"):
            pickled.read(tmp_path / "list.pkl")


@pytest.mark.parametrize("protocol", range(5))
@pytest.mark.parametrize(
    "array",
    [
        np.array(["a", "bcd"]),
        np.array([["x", "y"], ["é", ""]], object),
        np.array(["s"], "S3"),
        np.arange(6, dtype=">i4").reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.array([True, False]),
    ],
)
def test_arrays_come_back_as_they_were(array, protocol, tmp_path):
    (tmp_path / "x.pkl").write_bytes(
        pickle.dumps(
            {"x": array, "n": [1, 2.5, None, b"", b"\xff", np.int64(7)]}, protocol=protocol
        )
    )
    found = pickled.read(tmp_path / "x.pkl")
    assert found["n"] == [1, 2.5, None, b"", b"\xff", 7]
    assert found["x"].dtype == array.dtype and found["x"].tolist() == array.tolist()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"train": [["/etc/x.jpg", 0, "a"]], "val": [], "test": []}, "images//etc/x.jpg"),
        ({"train": [["../../x.jpg", 0, "a"]], "val": [], "test": []}, "leads out of the folder"),
        (
            {"train": [["a.jpg", 0, "a"], ["b.jpg", 0, "b"]], "val": [], "test": []},
            "label 0 is 'a' for one image and 'b' for images/b",
        ),
        ({"train": [], "val": [], "test": []}, "they name no images"),
        ({"train": [], "val": []}, "KeyError 'test'"),
        ({"train": [["a.jpg", 0]], "val": [], "test": []}, "not enough values"),
        ({"train": [["a.jpg", 0, 7]], "val": [], "test": []}, "'int' object has no attribute"),
        ("[1, ", "Expecting value"),
    ],
)
def test_lists_that_are_wrong_are_refused_in_one_sentence(rows, message, tmp_path):
    dump(tmp_path / "dtd/split_zhou_DescribableTextures.json", rows)
    (tmp_path / "dtd/images").mkdir()
    if "etc" in message:  # joined to the folder it stays inside
        assert datasets.read("dtd", tmp_path).rows[0]["path"] == message
        return
    with pytest.raises(ValueError, match=f"^dtd: the lists of the coop layout in .*{message}"):
        datasets.read("dtd", tmp_path)


@pytest.mark.parametrize("content", [b"", b"MATLAB 5.0 MAT-file", b"<html>sign in</html>" * 20])
def test_a_damaged_matlab_file_is_told(content, tmp_path):
    flowers_world(tmp_path)
    (tmp_path / "setid.mat").write_bytes(content)
    with pytest.raises(ValueError, match="^flowers102: the lists of the torchvision layout in "):
        datasets.read("flowers102", tmp_path)


# --- own data -------------------------------------------------------------------------------------


CSVS = {
    "path,class,split\na.jpg,tiger cat,train\nb.jpg,bear,test\n": [
        ("a.jpg", "1", "tiger cat", "train", "own"),
        ("b.jpg", "0", "bear", "test", "own"),
    ],
    "path,label,split\na.jpg,10,train\nb.jpg,9,test\n": [
        ("a.jpg", "1", "10", "train", "own"),
        ("b.jpg", "0", "9", "test", "own"),
    ],
    "split,path,label,class,domain\nval,/x/a.jpg,1,bear,site1\ntrain,b.jpg,2,ant,\n": [
        ("/x/a.jpg", "0", "bear", "val", "site1"),
        ("b.jpg", "1", "ant", "train", "own"),
    ],
}


@pytest.mark.parametrize("text", CSVS)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_own_data_from_a_csv(text, mark, tmp_path):
    (tmp_path / "mine.csv").write_text(mark + text)
    manifest = datasets.read("own", tmp_path / "mine.csv")
    assert (
        manifest.folder == tmp_path and [tuple(row.values()) for row in manifest.rows] == CSVS[text]
    )


def test_clients_of_own_data_survive_to_the_manifest_that_is_read(tmp_path):
    (tmp_path / "mine.csv").write_text(
        "path,class,split,client\na.jpg,x,train,site 2\nb.jpg,y,test,site 1\n"
    )
    path = write_manifest(datasets.read("own", tmp_path / "mine.csv"))
    assert [row["client"] for row in read_manifest(path).rows] == ["site 2", "site 1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,split\na.jpg,train\n", "needs the columns path, split, and class or label"),
        ("", "needs the columns"),
        ("path,class,split\n", "name no images"),
        ("path,class,split\na.jpg,x,train\nb.jpg,x\n", "line 3: needs one value for each column"),
        ("path,class,split\na.jpg,x,train,more\n", "line 2: needs one value"),
        ("path,class,split,client\na.jpg,x,train,\n", "line 2: needs one value"),
        (
            "path,class,split\na.jpg,x,train\n\nb.jpg,x,holdout\n",
            "line 4: the split is train, val or test, not 'holdout'",
        ),
        ("path,class,split\na.jpg, x,train\n", "line 2: class ' x' has spaces around it"),
        ("path,class,split,class\na.jpg,x,train,y\n", "names a column twice"),
        ('path,class,split\na.jpg,"x,train\nb.jpg,x,test\n', "mine.csv, line 3: .* quotation mark"),
        (f"path,class,split\na.jpg,{'x' * 200_000},train\n", "mine.csv, line 2: field larger"),
        ("path,class,split\na.jpg,x\x1b[2J,train\n", "characters that are not printed"),
        ("path,class,split\na.jpg,a_b,train\nb.jpg,a b,test\n", "'a b' and 'a_b' are both 'a b'"),
        ("path,label,class,split\na.jpg,x,x,train\n", "line 2: beside a class the label is 0, 1"),
        (
            "path,label,class,split\na.jpg,1,x,train\nb.jpg,1,y,train\n",
            "label 1 is 'x' for one image and 'y'",
        ),
    ],
)
def test_a_wrong_csv_is_refused_by_its_line(text, message, tmp_path):
    (tmp_path / "mine.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        datasets.read("own", tmp_path / "mine.csv")


@pytest.mark.parametrize(
    "raw",
    ["path,class,split\nb\u00e4r.jpg,x,train\n".encode(code) for code in ("latin-1", "utf-16")]
    + [b"path,class,split\na.jpg,x\0,train\n"],
)
def test_a_list_that_is_not_in_utf_8_is_named(raw, tmp_path):
    (tmp_path / "mine.csv").write_bytes(raw)
    (tmp_path / "shop.txt").write_bytes(raw)
    for read in (
        lambda: datasets.read("own", tmp_path / "mine.csv"),
        lambda: layouts.lines(tmp_path / "shop.txt"),
    ):
        with pytest.raises(ValueError, match=r"(mine\.csv|shop\.txt) (is not in|has a NUL).*UTF-8"):
            read()


# clients of the two lines, and what is said of them
TWICE = [
    ("a.jpg,x,train,1\na.jpg,x,test,1\n", "a.jpg .train, x. and a.jpg .test, x.: list it once"),
    ("a.jpg,x,train,1\n./b/../a.jpg,y,train,1\n", "one picture twice"),
    ("a.jpg,x,train,1\nlink.jpg,x,test,1\n", "a.jpg .train, x. and link.jpg"),
]


@pytest.mark.parametrize(("lines", "message"), TWICE)
def test_a_picture_that_is_listed_twice_is_named(lines, message, tmp_path):
    picture(tmp_path / "a.jpg")
    (tmp_path / "b").mkdir()
    (tmp_path / "link.jpg").symlink_to("a.jpg")
    (tmp_path / "mine.csv").write_text("path,class,split,client\n" + lines)
    with pytest.raises(ValueError, match=message):
        datasets.read("own", tmp_path / "mine.csv")
    elsewhere = lines.removesuffix("1\n") + "2\n"
    (tmp_path / "mine.csv").write_text("path,class,split,client\n" + elsewhere)
    with pytest.warns(UserWarning, match="mine.csv lists 1 times a picture that another client"):
        assert len(datasets.read("own", tmp_path / "mine.csv").rows) == 2


def test_own_folders_by_class(tmp_path):
    for name, n in (("tiger_cat", 7), ("bear", 8)):
        for i in range(n):
            picture(tmp_path / name / f"{i}.PNG")
    dump(tmp_path / "bear" / "notes.txt", "not an image")
    dump(tmp_path / "bear" / ".hidden.png", "")
    rows = datasets.read("own", tmp_path).rows
    assert Counter((r["class"], r["label"], r["domain"]) for r in rows) == {
        ("bear", "0", "own"): 8,
        ("tiger cat", "1", "own"): 7,
    }
    assert Counter(r["split"] for r in rows) == {"train": 12, "test": 3}


def test_own_folders_by_domain_and_class_are_split_domain_by_domain(tmp_path):
    for domain, n in (("north", 5), ("south", 10)):
        for name in ("a", "b"):
            for i in range(n):
                picture(tmp_path / domain / name / f"{i}.jpg")
    found = Counter(
        (r["domain"], r["class"], r["split"]) for r in datasets.read("own", tmp_path).rows
    )
    assert found == {
        (d, c, s): k
        for d, n in (("north", 1), ("south", 2))
        for c in "ab"
        for s, k in (("test", n), ("train", 4 * n))
    }


@pytest.mark.parametrize(
    "called",
    ["train val test", "Train Valid TEST", "training dev testing", "TRAIN Validation Test"],
)
def test_own_folders_and_lists_may_give_the_split_in_any_spelling(called, tmp_path):
    named = dict(zip(called.split(), SPLITS))
    lines = ["path,class,split"]
    for split in reversed(named):
        picture(tmp_path / split / "a" / "1.jpg")
        lines.append(f"{split}/a/1.jpg,a,{split}")
    rows = datasets.read("own", tmp_path).rows
    wanted = [(f"{split}/a/1.jpg", named[split], "own") for split in named]
    assert [(r["path"], r["split"], r["domain"]) for r in rows] == wanted
    (tmp_path / "list.csv").write_text("\n".join(lines))
    listed = datasets.read("own", tmp_path / "list.csv").rows
    assert sorted((r["path"], r["split"], r["domain"]) for r in listed) == sorted(wanted)


def test_files_that_are_not_read_are_told(tmp_path):
    files = ["a/1.jpg", "a/2.JFIF", "a/3.heic", "b/4.svg", "top.png", "b/c/d/e.png", "a/.hidden"]
    for file in files:
        dump(tmp_path / file, "")
    with pytest.warns(UserWarning) as told:
        rows = datasets.read("own", tmp_path).rows
    assert [row["path"] for row in rows] == ["a/1.jpg", "a/2.JFIF"]
    kinds, places = (str(warning.message) for warning in told)
    assert "has 2 files of kinds that are not read" in kinds and "1 .heic, 1 .svg" in kinds
    assert "first is a/3.heic" in kinds
    assert "has 2 files neither CLASS/FILE" in places and "first is top.png" in places


def test_a_root_may_be_a_link_and_have_any_name(tmp_path):
    root = tmp_path / "photos #2, of 2024"
    for i in range(5):
        picture(root / "a" / f"{i}.jpg", (i, i, i))
    (tmp_path / "link").symlink_to(root)
    for place in (root, tmp_path / "link"):
        path = datasets.prepare("own", place, None, tmp_path / "data" / "own" / "manifest.csv")
        listed = read_manifest(path)
        assert all((listed.folder / row["path"]).is_file() for row in listed.rows)


def test_images_of_one_split_only_are_refused_before_features(tmp_path):
    picture(tmp_path / "photos" / "train" / "a" / "1.jpg")
    with pytest.raises(ValueError, match="own in .*photos has no images for the split test"):
        datasets.prepare("own", tmp_path / "photos", None, tmp_path / "manifest.csv")


@pytest.mark.parametrize("layout", ["folder", "csv", "coop"])
@pytest.mark.parametrize("only", ["ant", "cow", "dog"])
def test_a_class_of_validation_images_only_leaves_no_gap(only, layout, tmp_path):
    own = layout != "coop"
    rows = {s: [(f"{s}/{c}/1.jpg", c) for c in ("ant", "cow", "dog")] for s in SPLITS}
    for split in ("train", "test"):
        rows[split] = [row for row in rows[split] if row[1] != only]
    for path, _ in sum(rows.values(), []):
        picture(tmp_path / "photos" / path)
    root = tmp_path / "photos"
    if layout == "csv":
        root = tmp_path / "mine.csv"
        lines = [f"photos/{path},{name},{split}" for split in rows for path, name in rows[split]]
        root.write_text("\n".join(["path,class,split", *lines]))
    if layout == "coop":
        (tmp_path / "dtd" / "images").mkdir(parents=True)
        listed = {s: [[path, "acd".index(c[0]), c] for path, c in rows[s]] for s in rows}
        dump(tmp_path / "dtd" / "split_zhou_DescribableTextures.json", listed)
        root = tmp_path
    name, layout = ("own", None) if own else ("dtd", "coop")
    found = read_manifest(datasets.prepare(name, root, layout, tmp_path / "out" / "manifest.csv"))
    assert found.classes == sorted({"ant", "cow", "dog"} - {only})
    assert all(found.classes[int(row["label"])] == row["class"] for row in found.rows)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "no images"),
        (["a/1.jpg", "d/a/1.jpg"], "both a/1.jpg and d/a/1.jpg"),
        (["a/train/1.jpg", "a/test/1.jpg"], "a/test/1.jpg in a folder named as a split"),
        (["Train/1.jpg", "cat/1.jpg"], "Train/1.jpg in a folder named as a split"),
        (["train/a/1.jpg", "north/a/1.jpg"], "folders train and north, a split beside"),
        (["val/a/1.jpg", "valid/a/1.jpg", "train/a/1.jpg"], "two folders for one split"),
        (["train_set/a/1.jpg", "testset/a/1.jpg"], "may be a split or a domain: rename it"),
        (["a b/1.jpg", "a_b/1.jpg"], "'a b' and 'a_b' are both 'a b' in prompts"),
    ],
)
def test_own_folders_of_no_known_form_are_refused(files, message, tmp_path):
    for file in files:
        picture(tmp_path / file)
    with pytest.raises(ValueError, match=message):
        datasets.read("own", tmp_path)


# --- what is there and what is not ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layout", "error", "message"),
    [
        ("flowers", None, ValueError, "'flowers' is none of flowers102, .*own"),
        ("dtd", "fedbn", ValueError, "dtd has no layout 'fedbn': use coop or torchvision"),
        ("dtd", None, FileNotFoundError, "no dtd in .*fpl data check dtd"),
        ("own", None, FileNotFoundError, "no own data at"),
    ],
)
def test_what_is_not_there_is_said_in_one_sentence(name, layout, error, message, tmp_path):
    with pytest.raises(error, match=message):
        datasets.read(name, tmp_path / "nowhere", layout)


@pytest.mark.parametrize("name", datasets.DATASETS)
def test_the_checklist_of_an_absent_set_says_where_each_file_goes(name, tmp_path):
    table = datasets.checklist(name, tmp_path)
    dataset = datasets.DATASETS[name]
    domain = next(iter(dataset.domains), "")
    first = dataset.layouts[dataset.best].needs[0].format(domain=domain)
    assert f"put it at {tmp_path / dataset.folders[0] / first}" in list(table["todo"])
    assert (table["found"].iloc[:-1] == "missing").all() and table["item"].iloc[-1] == "manifest"
    assert list(datasets.overview(tmp_path)["found"]) == [""] * len(datasets.DATASETS)


def test_the_checklist_compares_with_the_published_sizes_and_refuses_no_subset(tmp_path):
    flowers_world(tmp_path)
    (tmp_path / "jpg/image_00005.jpg").unlink()
    table = datasets.checklist("flowers102", tmp_path).set_index("item")
    assert (
        table.loc["train images", ["expected", "found"]].tolist() == [1020, 3]
        and "part of the set" in table.loc["classes", "todo"]
    )
    assert table.loc["images on disk", "found"] == 6 and table.loc[
        "images on disk", "todo"
    ].endswith("jpg/image_00005.jpg")
    assert (
        "the paper's split is in the files of the coop layout"
        in table.loc["layout that is read", "todo"]
    )
    assert datasets.overview(tmp_path)["found"][0] == f"{tmp_path} (torchvision)"


def test_a_complete_set_leaves_nothing_to_do(tmp_path, monkeypatch):
    fedbn_world(tmp_path / "DomainNet", domainnet10.DOMAINS, domainnet10.CLASSES)
    for row in datasets.read("domainnet10", tmp_path).rows:
        picture(tmp_path / "DomainNet" / row["path"])
    layout = layouts.fedbn(domainnet10.CLASSES, 60, 60)
    monkeypatch.setitem(datasets.DATASETS["domainnet10"].layouts, "fedbn", layout)
    assert not datasets.checklist("domainnet10", tmp_path)["todo"].any()
    (tmp_path / "DomainNet" / "real_train.pkl").write_bytes(b"")
    assert (
        "real_train.pkl is not read" in datasets.checklist("domainnet10", tmp_path)["todo"].iloc[-1]
    )


def test_the_checklist_of_own_data(tmp_path):
    (tmp_path / "mine.csv").write_text("path,class,split\na.jpg,x,train\nb.jpg,y,test\n")
    picture(tmp_path / "a.jpg")
    table = datasets.checklist("own", tmp_path / "mine.csv").set_index("item")
    assert table.loc[["classes", "train images", "images on disk"], "found"].tolist() == [2, 1, 1]
    assert (
        table.loc["images on disk", "todo"] == f"the first that is missing is {tmp_path / 'b.jpg'}"
    )
    assert "no own data at" in datasets.checklist("own", tmp_path / "other")["todo"].iloc[-1]
    with pytest.raises(ValueError, match="'flowers' is none of"):
        datasets.checklist("flowers", tmp_path)
