"""The middle frames of UCF101 (Soomro et al., 2012), a data set of videos of actions."""

import re
from pathlib import Path

from fpl.data.datasets.layouts import Dataset, File, Layout, Row, Rows, coop, coop_file, lines

FRAMES = "UCF-101-midframes"
LISTS = "ucfTrainTestlist"
COOP = "https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md"


def read(folder: Path, domain: str) -> Rows:
    """The authors' lines "ActionName/video.avi[ LABEL]" of the first of three partitions.

    Frames are those of CoOp, "Action_Name/video.jpg". Labels are 1 .. 101 in lines "LABEL NAME".
    Raises ValueError for a video of an action that has no label.
    """
    numbered = (line.split() for line in lines(folder / LISTS / "classInd.txt"))
    labels = {name: int(label) - 1 for label, name in numbered}
    for split, file in (("train", "trainlist01.txt"), ("test", "testlist01.txt")):
        for line in lines(folder / LISTS / file):
            action, video = line.split()[0].split("/")
            if action not in labels:
                raise ValueError(f"{file} names the action {action}, which classInd.txt lacks")
            name = "_".join(re.findall("[A-Z][^A-Z]*", action))
            frame = Path(video).with_suffix(".jpg")
            yield Row(f"{FRAMES}/{name}/{frame}", labels[action], name, split)


DATASET = Dataset(
    key="ucf101",
    title="UCF101",
    position=11,
    folders=("ucf101",),
    classes=101,
    layouts={
        "coop": coop("split_zhou_UCF101.json", FRAMES, train=7639, test=3783),
        "official": Layout(
            (
                f"{LISTS}/classInd.txt",
                f"{LISTS}/trainlist01.txt",
                f"{LISTS}/testlist01.txt",
                FRAMES,
            ),
            read,
            train=9537,
            test=3783,
        ),
    },
    page="https://www.crcv.ucf.edu/data/UCF101.php",
    terms="No licence is stated; the videos come from the web.",
    files=(
        File(
            f"ucf101/{FRAMES}.zip", hint=f"the frames of CoOp, see {COOP}", gives=f"ucf101/{FRAMES}"
        ),
        coop_file("ucf101/split_zhou_UCF101.json"),
    ),
)
