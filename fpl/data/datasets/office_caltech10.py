"""Office-Caltech-10 (Gong et al., CVPR 2012), with the split of FedBN (Li et al., ICLR 2021)."""

from pathlib import Path

from fpl.data.datasets.layouts import (
    Dataset,
    File,
    Layout,
    Row,
    Rows,
    fedbn,
    images_in,
    stratified,
    there,
)

PAGE = "https://github.com/med-air/FedBN"
CLASSES = [
    "back_pack",
    "bike",
    "calculator",
    "headphones",
    "keyboard",
    "laptop_computer",
    "monitor",
    "mouse",
    "mug",
    "projector",
]
ALSO = {"backpack": "back_pack", "laptop": "laptop_computer"}  # folder names of other copies


def read(folder: Path, domain: str) -> Rows:
    """Plain folders DOMAIN/CLASS/FILE; FedBN's rule of 80/20 with a draw of ours."""
    top = there(folder, f"{domain}|{domain}10")
    rows = []
    for path in images_in(folder / top, 2):
        name = ALSO.get(path.parts[0], path.parts[0])
        if name in CLASSES:
            rows.append(Row(f"{top}/{path}", CLASSES.index(name), name))
    return stratified(rows, domain)


DATASET = Dataset(
    key="office_caltech10",
    title="Office-Caltech10",
    position=9,
    folders=("office_caltech_10", "office_caltech10"),
    classes=10,
    layouts={
        "fedbn": fedbn(CLASSES, train=2025, test=508),
        "folders": Layout(("{domain}|{domain}10",), read, train=2025, test=508),
    },
    page=PAGE,
    terms="No licence is stated; pictures of a shop's goods, of two offices, "
    "and by way of Caltech-256 from the web.",
    files=(
        File(
            "office_caltech_10_dataset.zip",
            hint=f"images and split, linked in the README of {PAGE}",
            gives="office_caltech_10/amazon_train.pkl",
        ),
    ),
    domains={"amazon": "Amazon", "caltech": "Caltech", "dslr": "DSLR", "webcam": "Webcam"},
)
