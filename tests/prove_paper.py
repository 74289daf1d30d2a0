"""The whole chain at paper scale's form: the nine data sets in their formats, both encoders with random weights, two rounds.

    python tests/prove_paper.py FOLDER --office PHOTOS

makes a project in FOLDER with `paper/` in it, and runs there what `make paper` runs. PHOTOS has real images of Office-Caltech10
as DOMAIN/CLASS/FILE; without it they are made up, like those of the other eight. It took a quarter of an hour on two
cores.
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


def cifar(root, name, classes, train=60, test=40):
    """Batches as torchvision reads them."""
    folder, gen = root / name / {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[name], np.random.default_rng(0)
    folder.mkdir(parents=True)
    key, names = ("labels", "label_names") if name == "cifar10" else ("fine_labels", "fine_label_names")
    files = {f"data_batch_{i}": train // 5 for i in range(1, 6)} | {"test_batch": test}
    for file, number in (files if name == "cifar10" else {"train": train, "test": test}).items():
        batch = {"data": gen.integers(0, 256, (number, 3072), dtype=np.uint8), key: [i % classes for i in range(number)]}
        (folder / file).write_bytes(pickle.dumps(batch))
    meta = {names: [f"kind_{i}" for i in range(classes)]}
    (folder / ("batches.meta" if name == "cifar10" else "meta")).write_bytes(pickle.dumps(meta))


def domainnet(root):
    """FedBN's lists, one training and one test image of each class and domain."""
    from fpl.data import datasets

    for domain in datasets.SIX:
        for split in ("train", "test"):
            paths = [f"{domain}/{name}/{split}.png" for name in datasets.DOMAINNET]
            for i, path in enumerate(paths):
                photo(root / "DomainNet" / path, [i, len(split), len(domain)])
            lists = (np.array(paths, object), np.array(datasets.DOMAINNET, object))
            (root / "DomainNet" / f"{domain}_{split}.pkl").write_bytes(pickle.dumps(lists))


def office(root, photos=None, number=4):
    """Some images of each class and domain, real ones if there are any."""
    from fpl.data import datasets

    for domain in datasets.DATASETS["office_caltech10"].domains:
        for k, name in enumerate(datasets.OFFICE):
            target = root / "office_caltech_10" / domain / name
            target.mkdir(parents=True)
            if photos:
                for path in sorted((photos / domain / name).iterdir())[:number]:
                    shutil.copy(path, target)
            else:
                for i in range(number):
                    photo(target / f"{i}.png", [k, i, len(domain)])


def smaller(settings):
    """The settings of the paper profile with two rounds of one epoch, one seed, few clients and experts, short lists.

    Tables other than the first have two data sets.
    """
    from fpl.experiments import settings

    def shrink(key, value):
        if isinstance(value, dict):
            return {k: shrink(k, v) for k, v in value.items()}
        if isinstance(value, list) and key in ("n_experts", "shots", "d_gate", "lam", "rank", "mu", "concentration"):
            return [min(v, 2) if key == "n_experts" else v for v in value[:2]]
        if key == "participation":  # two clients at least, so that there are experts in the second round
            return max(value, 0.5)
        sizes = {"rounds": 2, "local_epochs": 1, "n_experts": 2, "shots": 2}
        return min(value, sizes[key]) if key in sizes and not isinstance(value, list) else value

    small = {key: shrink(key, value) for key, value in settings.items()} | {"seeds": [1]}
    small["partition"]["clients"] = 3
    clients = {"cifar10": 4, "cifar100": 4, "domainnet10": 6, "office_caltech10": 4}  # one a domain: these have few images
    for name, own in small["datasets"].items():
        own.setdefault("partition", {})
        if name in clients:
            own["partition"] = own["partition"] | {"clients": clients[name], "min_size": 1}
    for row, own in [*small["methods"].items(), *small["tables"]["ledger"]["rows"].items()]:
        if "n_experts" in {field.name for field in dataclasses.fields(settings.ROWS[own.get("method", row)])}:
            own["n_experts"] = 2
    for name, table in small["tables"].items():
        if "data" in table and name != "table1":
            table["data"] = table["data"][:2]
    small["tables"]["heterogeneity"]["set"]["clients"] = 3
    small["tables"]["table7"]["rows"]["linear, 3 experts"]["n_experts"] = 1
    return small


def project(folder, settings):
    """A copy of what `paper/` needs, with these settings in it."""
    for name in ("fpl", "notebooks", "data/class_names"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("data/published.csv", "data/ledger.yaml", "CITATION.cff", "paper/dvc.yaml", ".dvcignore"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "paper" / "params.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], cwd=folder, env=environment(folder), check=True)
    return folder / "paper"


def environment(folder):
    return {**os.environ, "PYTHONPATH": str(folder), "DVC_NO_ANALYTICS": "1", "PYTHONHASHSEED": "0"}


def fpl(paper, *command, **options):
    """The command line, standing in the profile."""
    return subprocess.run([sys.executable, "-m", "fpl.cli", *command], cwd=paper, env=environment(paper.parent), **options)


def main():
    import open_clip

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--office", type=Path)
    given = parser.parse_args()
    settings = smaller(yaml.safe_load((ROOT / "paper" / "params.yaml").read_text()))
    images, weights = given.folder.resolve() / "data" / "images", given.folder.resolve() / "weights"
    weights.mkdir(parents=True)
    for name in ("RN50-quickgelu", "ViT-B-16-quickgelu"):
        torch.manual_seed(0)
        torch.save(open_clip.create_model(name).state_dict(), weights / f"{name}.pt")
    settings["backbone"]["weights"] = "../weights/RN50-quickgelu.pt"
    for own in settings["datasets"].values():
        if "backbone" in own:
            own["backbone"]["weights"] = "../weights/ViT-B-16-quickgelu.pt"
    for name in LISTS:
        few_shot(images, name)
    cifar(images, "cifar10", 10)
    cifar(images, "cifar100", 100, 200, 100)
    domainnet(images)
    office(images, given.office)
    paper = project(given.folder.resolve(), settings)
    fpl(paper, "plan", "--check", check=True)
    fpl(paper, "repro", check=True)
    fpl(paper, "plan", "--no-calibration", check=True)


if __name__ == "__main__":
    main()
