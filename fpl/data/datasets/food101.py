"""Food-101 (Bossard et al., ECCV 2014)."""

from pathlib import Path

from fpl.data.datasets.layouts import Dataset, File, Layout, Row, Rows, coop, coop_file, json_of


def read(folder: Path, domain: str) -> Rows:
    """JSON {class: ["class/number", ..]}; labels in the order of the sorted classes."""
    for split in ("train", "test"):
        content = json_of(folder / "meta" / f"{split}.json")
        for label, name in enumerate(sorted(content)):
            for image in content[name]:
                yield Row(f"images/{image}.jpg", label, name, split)


DATASET = Dataset(
    key="food101",
    title="Food101",
    position=3,
    folders=("food-101", "food101"),
    classes=101,
    layouts={
        "coop": coop("split_zhou_Food101.json", "images", train=50500, test=30300),
        "torchvision": Layout(
            ("meta/train.json", "meta/test.json", "images"), read, train=75750, test=25250
        ),
    },
    page="https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
    terms="Photographs of Foodspotting's users, not of the authors; "
    "beyond scientific fair use, ask their owners.",
    files=(
        File(
            "food-101.tar.gz",
            "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz",
            size=4996278331,
            md5="85eeb15f3717b99a5da872d97d918f87",
        ),
        coop_file("food-101/split_zhou_Food101.json"),
    ),
)
