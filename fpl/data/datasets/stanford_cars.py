"""Stanford Cars (Krause et al., 3dRR 2013), with CoOp's split."""

from dataclasses import replace
from pathlib import Path

from fpl.data.datasets.layouts import Dataset, File, Rows, coop, coop_file

LIST = "split_zhou_StanfordCars.json"
FOLDERS = ("cars_train", "cars_test")
COOP = coop(LIST, ".", train=6509, test=8041)  # its paths name the folders


def read(folder: Path, domain: str) -> Rows:
    """CoOp's JSON, whose class names have the year in front: "2000 AM General Hummer SUV".

    The authors' own lists are structures of MATLAB, which are not read.
    """
    for row in COOP.read(folder, domain):
        yield row._replace(path=row.path.removeprefix("./"))


DATASET = Dataset(
    key="stanford_cars",
    title="StanfordCars",
    position=13,
    folders=("stanford_cars",),
    classes=196,
    layouts={"coop": replace(COOP, needs=(LIST, *FOLDERS), read=read)},
    page="https://ai.stanford.edu/~jkrause/cars/car_dataset.html",
    terms="For non-commercial research; the pictures come from the web.",
    files=(
        *(
            File(
                f"stanford_cars/{name}",
                hint=f"the folder in {name}.tgz of the authors, whose server has it no more",
            )
            for name in FOLDERS
        ),
        coop_file(f"stanford_cars/{LIST}"),
    ),
)
