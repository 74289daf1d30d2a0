"""Oxford-IIIT Pets (Parkhi et al., CVPR 2012)."""

from pathlib import Path

from fpl.data.datasets.layouts import Dataset, File, Layout, Row, Rows, coop, coop_file, lines

PAGE = "https://www.robots.ox.ac.uk/~vgg/data/pets/"


def read(folder: Path, domain: str) -> Rows:
    """Lines "Breed_name_12 LABEL SPECIES BREED" with labels 1 .. 37; trainval is for training."""
    for split, lists in (("train", "trainval.txt"), ("test", "test.txt")):
        for line in lines(folder / "annotations" / lists):
            image, label = line.split()[:2]
            breed = image.rpartition("_")[0]
            yield Row(f"images/{image}.jpg", int(label) - 1, breed.lower(), split)


DATASET = Dataset(
    key="oxfordpets",
    title="OxfordPets",
    position=2,
    folders=("oxford_pets", "oxford-iiit-pet", "oxfordpets"),
    classes=37,
    layouts={
        "coop": coop("split_zhou_OxfordPets.json", "images", train=2944, test=3669),
        "torchvision": Layout(
            ("annotations/trainval.txt", "annotations/test.txt", "images"),
            read,
            train=3680,
            test=3669,
        ),
    },
    page=PAGE,
    terms="CC BY-SA 4.0 for the data set; the photographs stay the property of their owners.",
    files=(
        File(
            "oxford_pets/images.tar.gz",
            PAGE + "data/images.tar.gz",
            size=791918971,
            md5="5c4f3ee8e5d25df40f4fd59a7f44e54c",
        ),
        File(
            "oxford_pets/annotations.tar.gz",
            PAGE + "data/annotations.tar.gz",
            size=19173078,
            md5="95a8c909bbe2e81eed6a22bccdf3f68f",
        ),
        coop_file("oxford_pets/split_zhou_OxfordPets.json"),
    ),
)
