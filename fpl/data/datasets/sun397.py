"""SUN397 (Xiao et al., CVPR 2010): scenes."""

from pathlib import Path

from fpl.data.datasets.layouts import Dataset, File, Layout, Row, Rows, coop, coop_file, lines

PAGE = "https://vision.princeton.edu/projects/2010/SUN/"
FOLDER = "SUN397"
NAMES = "ClassName.txt"
LISTS = ("Training_01.txt", "Testing_01.txt")


def read(folder: Path, domain: str) -> Rows:
    """Lines "/a/apse/indoor/sun_x.jpg" of the first of the authors' ten partitions.

    Labels are in the order of the list of classes. As in CoOp a class is called by its folders
    from the last one on: "indoor apse". Raises ValueError for a class that is not in the list.
    """
    classes = [line.strip() for line in lines(folder / NAMES)]
    for split, file in zip(("train", "test"), LISTS):
        for line in lines(folder / file):
            image = line.strip()
            place = image.rpartition("/")[0]
            if place not in classes:
                raise ValueError(f"{file} names the class {place!r}, which {NAMES} lacks")
            name = " ".join(reversed(place.split("/")[2:]))  # behind "" and the first letter
            yield Row(f"{FOLDER}{image}", classes.index(place), name, split)


DATASET = Dataset(
    key="sun397",
    title="SUN397",
    position=14,
    folders=("sun397",),
    classes=397,
    layouts={
        "coop": coop("split_zhou_SUN397.json", FOLDER, train=15880, test=19850),
        "official": Layout((NAMES, *LISTS, FOLDER), read, train=19850, test=19850),
    },
    page=PAGE,
    terms="No licence is stated; the photographs come from the web.",
    files=(
        # its 39 GB are beyond what is unpacked here
        File(f"sun397/{FOLDER}", hint=f"unpack {PAGE[:-1]}/SUN397.tar.gz, 39 GB"),
        coop_file("sun397/split_zhou_SUN397.json"),
    ),
)
