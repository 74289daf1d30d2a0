"""Ten of the 345 classes of DomainNet (Peng et al., ICCV 2019), those of FedBN (ICLR 2021)."""

from collections.abc import Iterator
from pathlib import Path

from fpl.data.datasets.layouts import Dataset, File, Layout, Row, Rows, fedbn, lines, there

ADDRESS = "https://csr.bu.edu/ftp/visda/2019/multi-source"
FOLDER = "DomainNet"
LISTS = "{domain}_{split}.txt|splits/{domain}_{split}.txt"  # as Dassl has them
CLEANED = ("clipart", "painting")  # these have an archive without double images, which FedBN uses
DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
CLASSES = [
    "bird",
    "feather",
    "headphones",
    "ice_cream",
    "teapot",
    "tiger",
    "whale",
    "windmill",
    "wine_glass",
    "zebra",
]


def read(folder: Path, domain: str) -> Rows:
    """The authors' lines "DOMAIN/CLASS/FILE LABEL" of all classes, of which ten are kept."""
    for split in ("train", "test"):
        for line in lines(folder / there(folder, LISTS.format(domain=domain, split=split))):
            path = line.rpartition(" ")[0]
            name = path.split("/")[-2]
            if name in CLASSES:
                yield Row(path, CLASSES.index(name), name, split)


def files() -> Iterator[File]:
    """The archive and the two lists of each domain, and FedBN's split."""
    for domain in DOMAINS:
        place = f"{ADDRESS}/groundtruth" if domain in CLEANED else ADDRESS
        archive = f"{domain}.zip"
        yield File(f"{FOLDER}/{archive}", f"{place}/{archive}", only=tuple(CLASSES))
    for domain in DOMAINS:
        for split in ("train", "test"):
            lists = f"{domain}_{split}.txt"
            yield File(f"{FOLDER}/{lists}", f"{ADDRESS}/domainnet/txt/{lists}")
    yield File(
        "domainnet_dataset.zip",
        hint="the split of FedBN, linked in the README of https://github.com/med-air/FedBN",
        gives="DomainNet/clipart_train.pkl",
    )


DATASET = Dataset(
    key="domainnet10",
    title="DomainNet (10 classes)",
    position=8,
    folders=(FOLDER, "domainnet"),
    classes=10,
    layouts={
        "fedbn": fedbn(CLASSES, train=18278, test=4573),
        "official": Layout(
            (*(LISTS.replace("{split}", split) for split in ("train", "test")), "{domain}"), read
        ),
    },
    page="https://ai.bu.edu/M3SDA/",
    terms="For academic research; parts are under copyright and used without their owners' word. "
    "17 GB, ten classes are unpacked.",
    files=tuple(files()),
    domains={domain: domain.capitalize() for domain in DOMAINS},
)
