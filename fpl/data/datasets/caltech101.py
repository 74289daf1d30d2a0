"""Caltech-101 (Fei-Fei et al., CVPR workshops 2004), without clutter."""

from pathlib import Path

from fpl.data.datasets.layouts import (
    Dataset,
    File,
    Layout,
    Row,
    Rows,
    coop,
    coop_file,
    halved,
    images_in,
)

PAGE = "https://data.caltech.edu/records/mzrjq-6wc02"
FOLDER = "101_ObjectCategories"
IGNORED = {"BACKGROUND_Google", "Faces_easy"}  # as CoOp: clutter, and the faces a second time
NAMES = {"airplanes": "airplane", "Faces": "face", "Leopards": "leopard", "Motorbikes": "motorbike"}


def read(folder: Path, domain: str) -> Rows:
    """Class folders with CoOp's classes, names and shares, by a draw of ours."""
    images = [path for path in images_in(folder / FOLDER, 2) if path.parts[0] not in IGNORED]
    names = sorted({path.parts[0] for path in images})
    rows = []
    for path in images:
        name = path.parts[0]
        rows.append(Row(f"{FOLDER}/{path}", names.index(name), NAMES.get(name, name)))
    return halved(rows, domain)


DATASET = Dataset(
    key="caltech101",
    title="Caltech101",
    position=4,
    folders=("caltech-101", "caltech101"),
    classes=100,
    layouts={
        "coop": coop("split_zhou_Caltech101.json", FOLDER, train=4128, test=2465),
        "folders": Layout((FOLDER,), read, train=4128, test=2465),
    },
    page=PAGE,
    terms="The licence stands on the page of the record; the pictures come from the web.",
    files=(
        File(
            "caltech-101.zip",
            PAGE + "/files/caltech-101.zip",
            size=137414764,
            md5="3138e1922a9193bfa496528edbbc45d0",
        ),
        File("caltech-101/101_ObjectCategories.tar.gz"),  # comes in the one above
        coop_file("caltech-101/split_zhou_Caltech101.json"),
    ),
)
