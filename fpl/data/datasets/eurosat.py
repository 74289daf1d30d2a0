"""EuroSAT (Helber et al., JSTARS 2019): satellite pictures of land in ten uses, in RGB."""

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
    there,
)

PLACES = "2750|EuroSAT_RGB"  # the folder of an older archive, and of a newer one
# torchvision's copy; the authors' server is often down
COPY = "https://huggingface.co/datasets/torchgeo/eurosat/resolve"
NAMES = {  # of folders, in the order of the labels, and in CoOp's prompts
    "AnnualCrop": "Annual Crop Land",
    "Forest": "Forest",
    "HerbaceousVegetation": "Herbaceous Vegetation Land",
    "Highway": "Highway or Road",
    "Industrial": "Industrial Buildings",
    "Pasture": "Pasture Land",
    "PermanentCrop": "Permanent Crop Land",
    "Residential": "Residential Buildings",
    "River": "River",
    "SeaLake": "Sea or Lake",
}


def read(folder: Path, domain: str) -> Rows:
    """Class folders with CoOp's names and shares, by a draw of ours.

    Raises ValueError for a folder of another name.
    """
    top = there(folder, PLACES)
    rows = []
    for path in images_in(folder / top, 2):
        name = path.parts[0]
        if name not in NAMES:
            raise ValueError(f"{folder / top / name} is no class of EuroSAT: take it away")
        rows.append(Row(f"{top}/{path}", list(NAMES).index(name), NAMES[name]))
    return halved(rows, domain)


DATASET = Dataset(
    key="eurosat",
    title="EuroSAT",
    position=10,
    folders=("eurosat",),
    classes=10,
    layouts={
        "coop": coop("split_zhou_EuroSAT.json", PLACES, train=13500, test=8100),
        "folders": Layout((PLACES,), read, train=13500, test=8100),
    },
    page="https://github.com/phelber/EuroSAT",
    terms="MIT licence; the pictures are free data of Copernicus Sentinel-2.",
    files=(
        File(
            "eurosat/EuroSAT.zip",
            f"{COPY}/c877bcd43f099cd0196738f714544e355477f3fd/EuroSAT.zip",
            md5="c8fa014336c82ac7804f0398fcb19387",
        ),
        coop_file("eurosat/split_zhou_EuroSAT.json"),
    ),
)
