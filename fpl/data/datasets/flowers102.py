"""Oxford Flowers (Nilsback and Zisserman, ICVGIP 2008)."""

from pathlib import Path

from fpl.data import matlab
from fpl.data.datasets.layouts import (
    SPLITS,
    Dataset,
    File,
    Layout,
    Row,
    Rows,
    coop,
    coop_file,
    json_of,
)
from fpl.data.files import ROOT

PAGE = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"
NAMES = ROOT / "data" / "class_names" / "flowers102.txt"


def read(folder: Path, domain: str) -> Rows:
    """MATLAB files: labels 1 .. 102 of image_00001.jpg and on, and the numbers of each split."""
    labels = matlab.read(folder / "imagelabels.mat")["labels"].ravel()
    numbers = matlab.read(folder / "setid.mat")
    names = {str(label): name for label, name in enumerate(NAMES.read_text().split(), start=1)}
    if (folder / "cat_to_name.json").exists():
        names = json_of(folder / "cat_to_name.json")
    for split, key in zip(SPLITS, ("trnid", "valid", "tstid")):
        for number in numbers[key].ravel().tolist():
            label = int(labels[number - 1])
            yield Row(f"jpg/image_{number:05d}.jpg", label - 1, names[str(label)], split)


DATASET = Dataset(
    key="flowers102",
    title="Flowers102",
    position=1,
    folders=("oxford_flowers", "flowers-102", "flowers102"),
    classes=102,
    layouts={
        "coop": coop("split_zhou_OxfordFlowers.json", "jpg", train=4093, test=2463),
        "torchvision": Layout(("imagelabels.mat", "setid.mat", "jpg"), read, train=1020, test=6149),
    },
    page=PAGE,
    terms="No licence is stated; the photographs come from the web and belong to their authors.",
    files=(
        File(
            "oxford_flowers/102flowers.tgz",
            PAGE + "102flowers.tgz",
            size=344862509,
            md5="52808999861908f626f3c1f4e79d11fa",
        ),
        File(
            "oxford_flowers/imagelabels.mat",
            PAGE + "imagelabels.mat",
            md5="e0620be6f572b9609742df49c70aed4d",
        ),
        File(
            "oxford_flowers/setid.mat", PAGE + "setid.mat", md5="a5357ecc9cb78c4bef273ce3793fc85c"
        ),
        coop_file("oxford_flowers/split_zhou_OxfordFlowers.json"),
    ),
)
