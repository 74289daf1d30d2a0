"""Office-Home (Venkateswara et al., CVPR 2017): 65 classes in four domains."""

from pathlib import Path

from fpl.data.datasets.layouts import Dataset, File, Layout, Row, Rows, images_in, stratified, there

PAGE = "https://www.hemanthdv.org/officeHomeDataset.html"
ARCHIVE = "OfficeHomeDataset_10072016"
# the authors' list and order; folders may be in other letters, as ToothBrush is
CLASSES = [
    "Alarm_Clock", "Backpack", "Batteries", "Bed", "Bike", "Bottle", "Bucket", "Calculator",
    "Calendar", "Candles", "Chair", "Clipboards", "Computer", "Couch", "Curtains", "Desk_Lamp",
    "Drill", "Eraser", "Exit_Sign", "Fan", "File_Cabinet", "Flipflops", "Flowers", "Folder", "Fork",
    "Glasses", "Hammer", "Helmet", "Kettle", "Keyboard", "Knives", "Lamp_Shade", "Laptop", "Marker",
    "Monitor", "Mop", "Mouse", "Mug", "Notebook", "Oven", "Pan", "Paper_Clip", "Pen", "Pencil",
    "Postit_Notes", "Printer", "Push_Pin", "Radio", "Refrigerator", "ruler", "Scissors",
    "Screwdriver", "Shelf", "Sink", "Sneakers", "Soda", "Speaker", "Spoon", "Table", "Telephone",
    "Toothbrush", "Toys", "Trash_Can", "TV", "Webcam",
]  # fmt: skip
LABELS = {name.lower(): label for label, name in enumerate(CLASSES)}


class Domain(str):
    """The name of a domain, and as `folders` those that its folder has in copies."""

    @property
    def folders(self) -> str:
        words = self.title().split("_")
        return "|".join(dict.fromkeys(gap.join(words) for gap in (" ", "_", "")))


def rows_of(folder: Path, top: str, split: str = "") -> list[Row]:
    """The rows of the pictures top/CLASS/FILE. Raises ValueError for another class."""
    rows = []
    for path in images_in(folder / top, 2):
        label = LABELS.get(path.parts[0].lower())
        if label is None:
            raise ValueError(f"{folder / top / path.parts[0]} is no class of Office-Home")
        rows.append(Row(f"{top}/{path}", label, CLASSES[label], split))
    return rows


def read_folders(folder: Path, domain: str) -> Rows:
    """Plain folders DOMAIN/CLASS/FILE; a fifth of each domain is for testing, by a draw of ours."""
    top = there(folder, f"{Domain(domain).folders}|{domain}")
    return stratified(rows_of(folder, top), domain)


def read_dassl(folder: Path, domain: str) -> Rows:
    """Folders DOMAIN/SPLIT/CLASS/FILE of Dassl; its part for validation is for testing."""
    for split, called in (("train", "train"), ("test", "val")):
        yield from rows_of(folder, f"{domain}/{called}", split)


DATASET = Dataset(
    key="office_home",
    title="Office-Home",
    position=16,
    folders=(ARCHIVE, "office_home", "office_home_dg", "OfficeHome"),
    classes=65,
    layouts={
        "authors": Layout(("{domain.folders}",), read_folders, train=12469, test=3119),
        "dassl": Layout(("{domain}/train", "{domain}/val"), read_dassl),
        "folders": Layout(("{domain}",), read_folders, train=12469, test=3119),
    },
    page=PAGE,
    terms="For non-commercial research; parts are under copyright and used without their owners' "
    "word.",
    files=(File(f"{ARCHIVE}.zip", hint=f"linked at {PAGE}", gives=f"{ARCHIVE}/Art"),),
    domains={
        Domain("art"): "Art",
        Domain("clipart"): "Clipart",
        Domain("product"): "Product",
        Domain("real_world"): "Real World",
    },
    split="",
)
