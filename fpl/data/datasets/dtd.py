"""Describable Textures (Cimpoi et al., CVPR 2014)."""

from pathlib import Path

from fpl.data.datasets.layouts import (
    SPLITS,
    Dataset,
    File,
    Layout,
    Row,
    Rows,
    coop,
    coop_file,
    lines,
)

PAGE = "https://www.robots.ox.ac.uk/~vgg/data/dtd/"
LISTS = tuple(f"labels/{split}1.txt" for split in SPLITS)


def read(folder: Path, domain: str) -> Rows:
    """Lines "class/file" of the first of the authors' ten partitions.

    Labels are in the order of the sorted classes.
    """
    images = [lines(folder / file) for file in LISTS]
    names = sorted({image.split("/")[0] for listed in images for image in listed})
    for split, listed in zip(SPLITS, images):
        for image in listed:
            name = image.split("/")[0]
            yield Row(f"images/{image}", names.index(name), name, split)


DATASET = Dataset(
    key="dtd",
    title="DTD",
    position=5,
    folders=("dtd", "dtd/dtd"),
    classes=47,
    layouts={
        "coop": coop("split_zhou_DescribableTextures.json", "images", train=2820, test=1692),
        "torchvision": Layout((*LISTS, "images"), read, train=1880, test=1880),
    },
    page=PAGE,
    terms="Given to the research community, for research; the pictures come from the web.",
    files=(
        File(
            "dtd-r1.0.1.tar.gz",
            PAGE + "download/dtd-r1.0.1.tar.gz",
            size=625239812,
            md5="fff73e5086ae6bdbea199a49dfb8a4c1",
        ),
        coop_file("dtd/split_zhou_DescribableTextures.json"),
    ),
)
