"""The whole chain at paper scale: sixteen data sets in their formats, both encoders, two rounds.

    python tests/prove_paper.py FOLDER --office PHOTOS

makes a project in FOLDER with `paper/` in it, and runs there what `make paper` runs, with random
weights. PHOTOS has real images of Office-Caltech10 as DOMAIN/CLASS/FILE; without it they are made
up, like those of the others. With nine data sets it took a quarter of an hour on two cores.
"""

import argparse
import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

ROOT = Path(__file__).parents[1]
LISTS = {  # folder, list, images of the data sets that CoOp splits
    "flowers102": ("oxford_flowers", "split_zhou_OxfordFlowers.json", "jpg"),
    "oxfordpets": ("oxford_pets", "split_zhou_OxfordPets.json", "images"),
    "food101": ("food-101", "split_zhou_Food101.json", "images"),
    "caltech101": ("caltech-101", "split_zhou_Caltech101.json", "101_ObjectCategories"),
    "dtd": ("dtd", "split_zhou_DescribableTextures.json", "images"),
    "eurosat": ("eurosat", "split_zhou_EuroSAT.json", "2750"),
    "ucf101": ("ucf101", "split_zhou_UCF101.json", "UCF-101-midframes"),
    "stanford_cars": ("stanford_cars", "split_zhou_StanfordCars.json", "."),
    "sun397": ("sun397", "split_zhou_SUN397.json", "SUN397"),
}


def photo(path, seed):
    """Noise over a colour, another one for each seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    gen = np.random.default_rng(seed)
    pixels = gen.integers(0, 200, (1, 1, 3)) + gen.integers(0, 56, (32, 32, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def few_shot(root, name, classes=6, train=3, test=2):
    """A data set with CoOp's list: train + test images of each class."""
    folder, lists, images = LISTS[name]
    made: dict[str, list] = {"train": [], "val": [], "test": []}
    for label in range(classes):
        for split, number in (("train", train), ("test", test)):
            for i in range(number):
                path = f"kind_{label}/{split}_{i}.png"
                photo(root / folder / images / path, [label, i, len(split)])
                made[split].append([path, label, f"kind {label}"])
    (root / folder / lists).write_text(json.dumps(made))


def aircraft(root, classes=6, train=3, test=2):
    """FGVC-Aircraft's own lists, with as many images."""
    folder = root / "fgvc_aircraft"
    numbers = {"train": range(train), "val": [], "test": range(train, train + test)}
    for split, places in numbers.items():
        lines = []
        for label in range(classes):
            for i in places:
                photo(folder / "images" / f"{label}{i}.jpg", [label, i])
                lines.append(f"{label}{i} kind {label}\n")
        (folder / f"images_variant_{split}.txt").write_text("".join(lines))
    variants = "".join(f"kind {label}\n" for label in range(classes))
    (folder / "variants.txt").write_text(variants)


def cifar(root, name, classes, train=60, test=40):
    """Batches as torchvision reads them."""
    folder, gen = (
        root / name / {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[name],
        np.random.default_rng(0),
    )
    folder.mkdir(parents=True)
    key, names = (
        ("labels", "label_names") if name == "cifar10" else ("fine_labels", "fine_label_names")
    )
    files = {f"data_batch_{i}": train // 5 for i in range(1, 6)} | {"test_batch": test}
    for file, number in (files if name == "cifar10" else {"train": train, "test": test}).items():
        batch = {
            "data": gen.integers(0, 256, (number, 3072), dtype=np.uint8),
            key: [i % classes for i in range(number)],
        }
        (folder / file).write_bytes(pickle.dumps(batch))
    meta = {names: [f"kind_{i}" for i in range(classes)]}
    (folder / ("batches.meta" if name == "cifar10" else "meta")).write_bytes(pickle.dumps(meta))


def domainnet(root):
    """FedBN's lists, one training and one test image of each class and domain."""
    from fpl.data.datasets.domainnet10 import CLASSES, DOMAINS

    for domain in DOMAINS:
        for split in ("train", "test"):
            paths = [f"{domain}/{name}/{split}.png" for name in CLASSES]
            for i, path in enumerate(paths):
                photo(root / "DomainNet" / path, [i, len(split), len(domain)])
            lists = (np.array(paths, object), np.array(CLASSES, object))
            (root / "DomainNet" / f"{domain}_{split}.pkl").write_bytes(pickle.dumps(lists))


def office(root, photos=None, number=4):
    """Some images of each class and domain, real ones if there are any."""
    from fpl.data.datasets.office_caltech10 import CLASSES, DATASET

    for domain in DATASET.domains:
        for k, name in enumerate(CLASSES):
            target = root / "office_caltech_10" / domain / name
            target.mkdir(parents=True)
            if photos:
                for path in sorted((photos / domain / name).iterdir())[:number]:
                    shutil.copy(path, target)
            else:
                for i in range(number):
                    photo(target / f"{i}.png", [k, i, len(domain)])


def by_domain(root, name, classes, number=5):
    """Folders DOMAIN/CLASS of a data set, for these classes."""
    from fpl.data import datasets

    for domain in datasets.get(name).domains:
        for k, label in enumerate(classes):
            for i in range(number):
                photo(root / name / domain / label / f"{i}.png", [k, i, len(domain)])


SIZES = {"rounds": 2, "local_epochs": 1, "n_experts": 2, "shots": 2, "views": 2, "unseen": 2}
SHORTENED = ("n_experts", "shots", "d_gate", "lam", "rank", "mu", "concentration", "data")
FEW_CLIENTS = {"cifar10": 4, "cifar100": 4, "domainnet10": 6, "office_caltech10": 4}
FEW_CLIENTS |= {"eurosat": 3, "pacs": 4, "office_home": 4}


def shrink(key, value):
    """What stands at a key, with two rounds of one epoch, few experts and shots, short lists."""
    if isinstance(value, dict):
        return {k: shrink(k, v) for k, v in value.items()}
    if isinstance(value, list) and key in SHORTENED:
        return [min(v, 2) if key == "n_experts" else v for v in value[:2]]
    if (
        key == "participation"
    ):  # two clients at least, so that there are experts in the second round
        return max(value, 0.5)
    if key in SIZES and not isinstance(value, list):
        return min(value, SIZES[key])
    return value


def smaller(content):
    """The content of the paper profile, over the demo's, with one seed and few clients.

    Tables other than the first have two data sets.
    """
    from fpl.experiments.settings import row_class

    first = content["tables"]["10_table1"]["table1"]["data"]
    small = {key: shrink(key, value) for key, value in content.items()} | {"seeds": [1]}
    small["tables"]["10_table1"]["table1"]["data"] = first
    small["partition"]["clients"] = 3
    for own in small["datasets"].values():
        own.setdefault("partition", {})
        images = own["data"]["name"]
        if images in FEW_CLIENTS:  # one a domain: these have few images
            own["partition"] = own["partition"] | {"clients": FEW_CLIENTS[images], "min_size": 1}
    rows = [*small["methods"].items()]
    for tables in small["tables"].values():
        for table in tables.values():
            listed = {} if "n_experts" in table.get("vary", {}) else table.get("rows", {})
            rows += listed.items() if isinstance(listed, dict) else []
    for row, own in rows:
        fields = dataclasses.fields(row_class(own.get("method", row)))
        most = {field.name: field.default for field in fields}.get("n_experts", 0)
        if most > 2:
            own.setdefault("n_experts", 2)
    small["tables"]["16_experts"]["heterogeneity"]["set"]["clients"] = 3
    for table in ("table7", "table7_released"):
        small["tables"]["14_gate"][table]["rows"]["linear, 3 experts"]["n_experts"] = 1
    return small


def paper_profile():
    """The whole content of the paper profile."""
    from fpl.experiments import values

    return values.load(ROOT / "paper" / "profile.yaml")


def project(folder, content):
    """A copy of what `paper/` needs, with this content instead of the settings beneath."""
    for name in ("fpl", "notebooks", "docs", "data/class_names"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    copied = (
        "data/published.csv",
        "data/ledger.yaml",
        "CITATION.cff",
        "paper/dvc.yaml",
        ".dvcignore",
    )
    for name in copied:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "params.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    names = ("data", "backbone", "seeds", "methods", "datasets", "tables")
    profile = {"over": "../params.yaml"} | {key: content[key] for key in names if key in content}
    (folder / "paper" / "profile.yaml").write_text(yaml.safe_dump(profile, sort_keys=False))
    command = [sys.executable, "-m", "dvc", "init", "--no-scm", "-q"]
    subprocess.run(command, cwd=folder, env=environment(folder), check=True)
    return folder / "paper"


def environment(folder):
    return {**os.environ, "PYTHONPATH": str(folder), "DVC_NO_ANALYTICS": "1", "PYTHONHASHSEED": "0"}


def fpl(paper, *command, **options):
    """The command line, standing in the profile."""
    return subprocess.run(
        [sys.executable, "-m", "fpl.cli", *command],
        cwd=paper,
        env=environment(paper.parent),
        **options,
    )


def make_lists(images):
    """All data sets with lists of CoOp or their authors."""
    for name in LISTS:
        few_shot(images, name)
    for folder in ("cars_train", "cars_test"):
        (images / "stanford_cars" / folder).mkdir()
    aircraft(images)


def main():
    import open_clip

    from fpl.data.datasets import office_home, pacs

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--office", type=Path)
    given = parser.parse_args()
    settings = smaller(paper_profile())
    images, weights = given.folder.resolve() / "data" / "images", given.folder.resolve() / "weights"
    weights.mkdir(parents=True)
    for name in ("RN50-quickgelu", "ViT-B-16-quickgelu"):
        torch.manual_seed(0)
        torch.save(open_clip.create_model(name).state_dict(), weights / f"{name}.pt")
    settings["backbone"]["weights"] = "../weights/RN50-quickgelu.pt"
    for own in settings["datasets"].values():
        if "name" in own.get("backbone", {}):
            own["backbone"]["weights"] = "../weights/ViT-B-16-quickgelu.pt"
    make_lists(images)
    cifar(images, "cifar10", 10, 400, 200)  # of the released split ten test images a client
    cifar(images, "cifar100", 100, 200, 100)
    domainnet(images)
    office(images, given.office)
    by_domain(images, "pacs", pacs.CLASSES)
    by_domain(images, "office_home", office_home.CLASSES[:10])
    paper = project(given.folder.resolve(), settings)
    fpl(paper, "plan", "--check", check=True)
    fpl(paper, "repro", check=True)
    fpl(paper, "plan", "--no-calibration", check=True)


if __name__ == "__main__":
    main()
