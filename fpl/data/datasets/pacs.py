"""PACS (Li et al., ICCV 2017): seven classes in four domains."""

from pathlib import Path

from fpl.data.datasets.layouts import (
    Dataset,
    File,
    Layout,
    Row,
    Rows,
    images_in,
    lines,
    stratified,
    there,
)

CLASSES = ["dog", "elephant", "giraffe", "guitar", "horse", "house", "person"]
IMAGES = "images/{domain}|kfold/{domain}|{domain}"  # where copies have the folders of the domains
DASSL = "https://github.com/KaiyangZhou/Dassl.pytorch/blob/master/DATASETS.md"


def top_of(folder: Path, domain: str) -> str:
    """The folder of a domain's pictures, relative to that of the data set."""
    return there(folder, IMAGES.format(domain=domain)).removesuffix(domain)


def row_of(top: str, path: str, split: str = "") -> Row:
    """The row of DOMAIN/CLASS/FILE. Raises ValueError for another class or form."""
    parts = path.split("/")
    if len(parts) != 3 or parts[1] not in CLASSES:
        raise ValueError(f"{path!r} is no DOMAIN/CLASS/FILE with a class of PACS")
    return Row(top + path, CLASSES.index(parts[1]), parts[1], split)


def read_lists(folder: Path, domain: str) -> Rows:
    """The authors' lines "DOMAIN/CLASS/FILE LABEL"; their list for crossvalidation is for testing.

    Their list for testing has all images of a domain, those for training among them. Labels are
    0 .. 6 in the order of the classes, which is that of the lists' 1 .. 7.
    """
    top = top_of(folder, domain)
    for split, called in (("train", "train"), ("test", "crossval")):
        for line in lines(folder / "splits" / f"{domain}_{called}_kfold.txt"):
            yield row_of(top, line.strip().rpartition(" ")[0], split)


def read_folders(folder: Path, domain: str) -> Rows:
    """Plain folders DOMAIN/CLASS/FILE; a fifth of each domain is for testing, by a draw of ours."""
    top = top_of(folder, domain)
    images = images_in(folder / top / domain, 2)
    return stratified([row_of(top, f"{domain}/{path}") for path in images], domain)


DATASET = Dataset(
    key="pacs",
    title="PACS",
    position=15,
    folders=("pacs", "PACS"),
    classes=7,
    layouts={
        "kfold": Layout(
            ("splits/{domain}_train_kfold.txt", "splits/{domain}_crossval_kfold.txt", IMAGES),
            read_lists,
            train=8977,
            test=1014,
        ),
        "folders": Layout((IMAGES,), read_folders, train=7992, test=1999),
    },
    page="https://domaingeneralization.github.io/",
    terms="No licence is stated; the pictures come from the web and from other data sets.",
    files=(File("pacs.zip", hint=f"images and lists, see PACS in {DASSL}", gives="pacs/splits"),),
    domains={
        "art_painting": "Art Painting",
        "cartoon": "Cartoon",
        "photo": "Photo",
        "sketch": "Sketch",
    },
    split="the authors' split",
)
