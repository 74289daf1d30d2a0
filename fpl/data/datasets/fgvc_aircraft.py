"""FGVC-Aircraft (Maji et al., 2013), by variant, with the authors' split, which CoOp keeps."""

from pathlib import Path

from fpl.data.datasets.layouts import SPLITS, Dataset, File, Layout, Row, Rows, lines

PAGE = "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/"
ARCHIVE = "fgvc-aircraft-2013b"
VARIANTS = "variants.txt"
LISTS = tuple(f"images_variant_{split}.txt" for split in SPLITS)


def read(folder: Path, domain: str) -> Rows:
    """Lines "NUMBER VARIANT"; labels are in the order of the list of variants.

    Raises ValueError for a variant that is not in it.
    """
    variants = [line.strip() for line in lines(folder / VARIANTS)]
    for split, file in zip(SPLITS, LISTS):
        for line in lines(folder / file):
            image, _, name = line.strip().partition(" ")
            if name not in variants:
                raise ValueError(f"{file} names the variant {name!r}, which {VARIANTS} lacks")
            yield Row(f"images/{image}.jpg", variants.index(name), name, split)


DATASET = Dataset(
    key="fgvc_aircraft",
    title="FGVC-Aircraft",
    position=12,
    # CoOp's, the authors', and where the archive is unpacked
    folders=("fgvc_aircraft", f"{ARCHIVE}/data", f"fgvc_aircraft/{ARCHIVE}/data"),
    classes=100,
    layouts={"official": Layout((VARIANTS, *LISTS, "images"), read, train=3334, test=3333)},
    page=PAGE,
    terms="For non-commercial research only; the photographs belong to those who took them.",
    files=(File(f"fgvc_aircraft/{ARCHIVE}.tar.gz", f"{PAGE}archives/{ARCHIVE}.tar.gz"),),
)
