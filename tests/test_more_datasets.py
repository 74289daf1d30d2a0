"""Promise: the other data sets of CoOp and Dassl are read from the files that are in use for them.

Each tree here is made up, small, and in the exact format.
"""

import dataclasses
import json
import shutil
import tarfile
import zipfile
from collections import Counter

import pytest
import torchvision.datasets as tv
from PIL import Image

from fpl.data import datasets, fetch
from fpl.data.datasets import eurosat, office_home, pacs
from fpl.data.manifest import SPLITS

PICTURE = (2, 2)  # pixels


def put(path, text=""):
    """Write a list, or where it is called so, a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".jpg", ".png"):
        Image.new("RGB", PICTURE).save(path)
    else:
        path.write_text(text if isinstance(text, str) else json.dumps(text))


def found(manifest):
    """The rows of a manifest as (path, label, class, split)."""
    return [(r["path"], int(r["label"]), r["class"], r["split"]) for r in manifest.rows]


# --- CoOp's lists: list, folder of the pictures, (path in the list, label, class name) ------------

COOP = {
    "eurosat": (
        "eurosat/split_zhou_EuroSAT.json",
        "2750/",
        [("SeaLake/SeaLake_2.jpg", 9, "Sea or Lake"), ("River/River_1.jpg", 8, "River")],
    ),
    "ucf101": (
        "ucf101/split_zhou_UCF101.json",
        "UCF-101-midframes/",
        [
            ("Handstand_Pushups/v_HandStandPushups_g01_c01.jpg", 36, "Handstand_Pushups"),
            ("Apply_Eye_Makeup/v_ApplyEyeMakeup_g08_c01.jpg", 0, "Apply_Eye_Makeup"),
        ],
    ),
    "stanford_cars": (
        "stanford_cars/split_zhou_StanfordCars.json",
        "",
        [
            ("cars_train/00002.jpg", 1, "2012 Acura RL Sedan"),
            ("cars_test/00001.jpg", 0, "2000 AM General Hummer SUV"),
        ],
    ),
    "sun397": (
        "sun397/split_zhou_SUN397.json",
        "SUN397/",
        [
            ("a/apse/indoor/sun_b.jpg", 17, "indoor apse"),
            ("a/airplane_cabin/sun_a.jpg", 1, "airplane_cabin"),
        ],
    ),
}


def coop_world(name, root):
    """Write the list with the two images of the set in each split, and return the rows."""
    lists, images, listed = COOP[name]
    own = {s: [(path.replace(".", f"_{s}."), *named) for path, *named in listed] for s in SPLITS}
    put(root / lists, own)
    folder = (root / lists).parent
    for path, *_ in sum(own.values(), []):
        put(folder / images / path)
    return [
        (images + path, 1 - i, text.replace("_", " "), split)
        for split in SPLITS
        for i, (path, _, text) in enumerate(own[split])  # labels close up, the second has the lower
    ]


@pytest.mark.parametrize("name", COOP)
def test_coops_list_gives_its_classes_labels_and_splits(name, tmp_path):
    rows = coop_world(name, tmp_path)
    manifest = datasets.read(name, tmp_path)
    assert found(manifest) == rows and datasets.find(name, tmp_path)[1] == "coop"
    assert all((manifest.folder / row["path"]).is_file() for row in manifest.rows)
    assert {row["domain"] for row in manifest.rows} == {name}
    table = datasets.checklist(name, tmp_path).set_index("item")
    assert table.loc["images on disk", "todo"] == ""


BROKEN = {
    "cut": ('{"train": [', "is no JSON that is read"),
    "a split less": ({"train": [], "val": []}, "KeyError 'test'"),
    "two names": ({"train": [["a", 0, "x"], ["b", 0, "y"]], "val": [], "test": []}, "label 0 is"),
    "a way out": ({"train": [["../../a", 0, "x"]], "val": [], "test": []}, "leads out of"),
    "another way": ({"train": [["/../a", 0, "x"]], "val": [], "test": []}, "leads out of"),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("name", COOP)
def test_a_broken_list_of_coop_is_named_in_a_sentence(name, kind, tmp_path):
    coop_world(name, tmp_path)
    content, message = BROKEN[kind]
    put(tmp_path / COOP[name][0], content)
    with pytest.raises(ValueError, match=f"^{name}: the lists of the coop layout .*{message}"):
        datasets.read(name, tmp_path)


# --- the authors' lists: each writes a tree and returns the rows ----------------------------------


def ucf_world(root):
    lists = root / "ucf101/ucfTrainTestlist"
    put(lists / "classInd.txt", "1 ApplyEyeMakeup\n2 HandstandPushups\n3 YoYo\n")
    put(
        lists / "trainlist01.txt",
        "YoYo/v_YoYo_g08_c01.avi 3\nHandstandPushups/v_HandStandPushups_g08_c02.avi 2\n",
    )
    put(lists / "testlist01.txt", "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi\n")
    frames = "UCF-101-midframes"
    return [
        (f"{frames}/Yo_Yo/v_YoYo_g08_c01.jpg", 2, "Yo Yo", "train"),
        (
            f"{frames}/Handstand_Pushups/v_HandStandPushups_g08_c02.jpg",
            1,
            "Handstand Pushups",
            "train",
        ),
        (f"{frames}/Apply_Eye_Makeup/v_ApplyEyeMakeup_g01_c01.jpg", 0, "Apply Eye Makeup", "test"),
    ]


def aircraft_world(root, folder="fgvc_aircraft"):
    put(root / folder / "variants.txt", "707-320\nBoeing 717\nF/A-18\n")
    lists = {
        "train": "1025794 F/A-18\n0056978 707-320\n",
        "val": "1340192 Boeing 717\n",
        "test": "1514522 707-320\n",
    }
    for split, text in lists.items():
        put(root / folder / f"images_variant_{split}.txt", text)
    return [
        ("images/1025794.jpg", 2, "F/A-18", "train"),
        ("images/0056978.jpg", 0, "707-320", "train"),
        ("images/1340192.jpg", 1, "Boeing 717", "val"),
        ("images/1514522.jpg", 0, "707-320", "test"),
    ]


def sun_world(root):
    put(root / "sun397/ClassName.txt", "/a/abbey\n/a/airplane_cabin\n/a/apse/indoor\n")
    put(root / "sun397/Training_01.txt", "/a/apse/indoor/sun_b.jpg\n/a/abbey/sun_a.jpg\n")
    put(root / "sun397/Testing_01.txt", "/a/airplane_cabin/sun_c.jpg\n")
    return [
        ("SUN397/a/apse/indoor/sun_b.jpg", 2, "indoor apse", "train"),
        ("SUN397/a/abbey/sun_a.jpg", 0, "abbey", "train"),
        ("SUN397/a/airplane_cabin/sun_c.jpg", 1, "airplane cabin", "test"),
    ]


# the tree, its folder, and a list with a line of a class that is nowhere
AUTHORS = {
    "ucf101": (ucf_world, "ucf101", "ucfTrainTestlist/testlist01.txt", "Juggling/v_x.avi"),
    "fgvc_aircraft": (aircraft_world, "fgvc_aircraft", "images_variant_val.txt", "0000001 Tu-1"),
    "sun397": (sun_world, "sun397", "Testing_01.txt", "/z/zoo/sun_d.jpg"),
}


def make(name, root):
    """Write the tree of the authors with its pictures, and return the rows."""
    world, folder, *_ = AUTHORS[name]
    rows = world(root)
    for path, *_ in rows:
        put(root / folder / path)
    return rows


@pytest.mark.parametrize("name", AUTHORS)
def test_the_authors_lists_give_their_classes_labels_and_splits(name, tmp_path):
    rows = make(name, tmp_path)
    manifest = datasets.read(name, tmp_path)
    assert found(manifest) == rows and datasets.find(name, tmp_path)[1] == "official"
    assert all((manifest.folder / row["path"]).is_file() for row in manifest.rows)


@pytest.mark.parametrize("name", AUTHORS)
def test_a_line_of_an_unknown_class_is_named_in_a_sentence(name, tmp_path):
    make(name, tmp_path)
    _, folder, lists, line = AUTHORS[name]
    put(tmp_path / folder / lists, line)
    wanted = f"^{name}: the lists of the official layout .*{lists.split('/')[-1]} names the "
    with pytest.raises(ValueError, match=wanted):
        datasets.read(name, tmp_path)


@pytest.mark.parametrize("name", ["ucf101", "sun397"])
def test_the_split_of_coop_goes_before_the_authors(name, tmp_path):
    make(name, tmp_path)
    rows = coop_world(name, tmp_path)
    assert found(datasets.read(name, tmp_path)) == rows


@pytest.mark.parametrize("folder", datasets.get("fgvc_aircraft").folders)
def test_aircraft_lie_in_coops_or_the_authors_folder_and_have_torchvisions_labels(folder, tmp_path):
    rows = aircraft_world(tmp_path, folder)
    (tmp_path / folder / "images").mkdir()
    manifest = datasets.read("fgvc_aircraft", tmp_path)
    assert manifest.folder == tmp_path / folder and found(manifest) == rows
    if folder == "fgvc-aircraft-2013b/data":
        for split in SPLITS:
            theirs = tv.FGVCAircraft(tmp_path, split)
            assert theirs._labels == [label for _, label, _, s in rows if s == split]


@pytest.mark.parametrize("split", [False, True])
def test_eurosat_may_lie_in_the_folder_of_the_newer_archive(split, tmp_path):
    coop_world("eurosat", tmp_path)
    if not split:
        (tmp_path / "eurosat/split_zhou_EuroSAT.json").unlink()
        shutil.rmtree(tmp_path / "eurosat/2750")
        for i in range(10):
            put(tmp_path / f"eurosat/2750/River/{i}.jpg")
    older = found(datasets.read("eurosat", tmp_path))
    (tmp_path / "eurosat/2750").rename(tmp_path / "eurosat/EuroSAT_RGB")
    newer = found(datasets.read("eurosat", tmp_path))
    assert newer == [(path.replace("2750", "EuroSAT_RGB"), *rest) for path, *rest in older]


def test_a_picture_in_two_splits_or_classes_is_named(tmp_path):
    pacs_world(tmp_path)
    lists = tmp_path / "pacs/splits"
    both = "photo/dog/pic_001.png"
    shutil.copy(lists / "photo_test_kfold.txt", lists / "photo_crossval_kfold.txt")
    said = rf"{both} is listed in train \(dog\) and test \(dog\)$"
    with pytest.raises(ValueError, match=said):
        datasets.read("pacs", tmp_path)


def test_a_domain_without_pictures_is_named_and_one_that_lacks_a_class_warned_of(tmp_path):
    """As where an archive was not unpacked to its end, or its folders stand one deeper."""
    pacs_world(tmp_path, lists=False)
    shutil.rmtree(tmp_path / "pacs/images/sketch/dog")
    with pytest.warns(UserWarning, match="^sketch has no pictures of dog, which others have"):
        assert len(datasets.read("pacs", tmp_path).rows) == 35
    shutil.rmtree(tmp_path / "pacs/images/sketch")
    (tmp_path / "pacs/images/sketch").mkdir()
    with pytest.raises(ValueError, match="no pictures of sketch: add them, or take it away"):
        datasets.read("pacs", tmp_path)


def test_eurosats_folders_have_coops_names_and_shares_and_torchvisions_labels(tmp_path):
    for name in eurosat.NAMES:
        for i in range(1, 11):
            put(tmp_path / f"eurosat/2750/{name}/{name}_{i}.jpg")
    manifest = datasets.read("eurosat", tmp_path)
    assert manifest.classes == [
        "Annual Crop Land", "Forest", "Herbaceous Vegetation Land", "Highway or Road",
        "Industrial Buildings", "Pasture Land", "Permanent Crop Land", "Residential Buildings",
        "River", "Sea or Lake",
    ]  # fmt: skip
    shares = {"train": 5, "val": 2, "test": 3}
    counts = Counter((r["class"], r["split"]) for r in manifest.rows)
    assert counts == {(c, s): n for c in manifest.classes for s, n in shares.items()}
    theirs = tv.EuroSAT(tmp_path)
    assert {str(manifest.folder / path): label for path, label, *_ in found(manifest)} == dict(
        theirs.samples
    )
    put(tmp_path / "eurosat/2750/Desert/Desert_1.jpg")
    with pytest.raises(ValueError, match="2750/Desert is no class of EuroSAT: take it away"):
        datasets.read("eurosat", tmp_path)


# --- domains --------------------------------------------------------------------------------------


def pacs_world(root, images="images/", lists=True):
    """Each domain has five dogs and five persons, of which the last two are for testing."""
    rows = []
    for domain in pacs.DATASET.domains:
        paths = [f"{domain}/{c}/pic_{i:03d}.png" for i in range(1, 6) for c in ("dog", "person")]
        for path in paths:
            put(root / "pacs" / images / path)
        numbered = [f"{path} {1 if 'dog' in path else 7}\n" for path in paths]
        parts = {"train": numbered[:8], "crossval": numbered[8:], "test": numbered}
        for part, listed in parts.items():
            if lists:
                put(root / f"pacs/splits/{domain}_{part}_kfold.txt", "".join(listed))
        for i, path in enumerate(paths):
            rows.append((domain, images + path, "train" if i < 8 else "test"))
    return rows


@pytest.mark.parametrize("images", ["images/", "kfold/", ""])
def test_the_lists_of_pacs_split_each_domain(images, tmp_path):
    rows = pacs_world(tmp_path, images)
    manifest = datasets.read("pacs", tmp_path)
    assert [(r["domain"], r["path"], r["split"]) for r in manifest.rows] == rows
    assert manifest.classes == ["dog", "person"]
    assert all((r["class"] in r["path"]) and r["label"] in "01" for r in manifest.rows)
    assert list(datasets.find("pacs", tmp_path)[1:]) == [
        "kfold",
        ["art_painting", "cartoon", "photo", "sketch"],
    ]


@pytest.mark.parametrize("images", ["images/", "kfold/", ""])
def test_pacs_without_lists_gives_a_fifth_of_each_domain_to_testing(images, tmp_path):
    rows = pacs_world(tmp_path, images, lists=False)
    manifest = datasets.read("pacs", tmp_path)
    assert {r["path"] for r in manifest.rows} == {path for _, path, _ in rows}
    counts = Counter((r["domain"], r["split"]) for r in manifest.rows)
    domains = pacs.DATASET.domains
    assert counts == {(d, s): n for d in domains for s, n in (("train", 8), ("test", 2))}


def test_the_seven_classes_of_pacs_have_the_labels_of_its_lists(tmp_path):
    names = ["dog", "elephant", "giraffe", "guitar", "horse", "house", "person"]
    for name in reversed(names):
        put(tmp_path / f"pacs/photo/{name}/1.jpg")
        put(tmp_path / f"pacs/photo/{name}/2.jpg")
    manifest = datasets.read("pacs", tmp_path)
    assert manifest.classes == names and {r["domain"] for r in manifest.rows} == {"photo"}


@pytest.mark.parametrize("line", ["photo/zebra/1.jpg 1", "1.jpg 1", "/x/photo/dog/1.jpg 0"])
def test_a_broken_list_of_pacs_is_named_in_a_sentence(line, tmp_path):
    pacs_world(tmp_path)
    put(tmp_path / "pacs/splits/photo_crossval_kfold.txt", line)
    with pytest.raises(ValueError, match="^pacs: the lists of the kfold .* is no DOMAIN/CLASS/FIL"):
        datasets.read("pacs", tmp_path)


def test_a_domain_of_pacs_that_lacks_a_list_is_refused(tmp_path):
    pacs_world(tmp_path)
    (tmp_path / "pacs/splits/cartoon_train_kfold.txt").unlink()
    with pytest.raises(ValueError, match="a part of cartoon: add splits/cartoon_train_kfold.txt"):
        datasets.read("pacs", tmp_path)


def office_world(folder, domains, between="", numbers=range(1, 6)):
    """Five pictures of two classes in each folder of a domain."""
    for domain in domains:
        for name in ("ToothBrush", "Alarm_Clock"):
            for i in numbers:
                put(folder / domain / between / name / f"{i:05d}.jpg")


OFFICE = [
    ("OfficeHomeDataset_10072016", "authors", ["Art", "Clipart", "Product", "Real World"]),
    ("office_home", "authors", ["Art", "Clipart", "Product", "Real_World"]),
    ("OfficeHome", "authors", ["Art", "Clipart", "Product", "RealWorld"]),
    ("office_home", "folders", ["art", "clipart", "product", "real_world"]),
]


@pytest.mark.parametrize(("folder", "layout", "domains"), OFFICE)
def test_office_homes_folders_give_a_fifth_of_each_domain_to_testing(
    folder, layout, domains, tmp_path
):
    office_world(tmp_path / folder, domains)
    manifest = datasets.read("office_home", tmp_path, layout)
    assert manifest.classes == ["Alarm Clock", "Toothbrush"]
    counts = Counter((r["domain"], r["split"]) for r in manifest.rows)
    keys = ["art", "clipart", "product", "real_world"]
    assert counts == {(d, s): n for d in keys for s, n in (("train", 8), ("test", 2))}
    assert datasets.find("office_home", tmp_path)[1:] == (layout, keys)
    for row in manifest.rows:
        assert row["path"].startswith(domains[keys.index(row["domain"])] + "/")
        assert (manifest.folder / row["path"]).is_file()


def test_dassls_split_of_office_home_is_kept(tmp_path):
    root = tmp_path / "office_home_dg"
    office_world(root, ["art", "real_world"], "train")
    office_world(root, ["art", "real_world"], "val", [9])
    manifest = datasets.read("office_home", tmp_path)
    wanted = {"train": "train", "test": "val"}
    assert {r["domain"] for r in manifest.rows} == {"art", "real_world"}
    assert all(r["path"].split("/")[1] == wanted[r["split"]] for r in manifest.rows)
    assert Counter(r["split"] for r in manifest.rows) == {"train": 20, "test": 4}


def split_line(name, root):
    """What the checklist expects of the layout, what it found, and what it says is to be done."""
    table = datasets.checklist(name, root).set_index("item")
    return [*table.loc["layout that is read"]]


@pytest.mark.parametrize(("folder", "layout", "domains"), [OFFICE[0], OFFICE[3]])
def test_no_layout_of_office_home_is_said_to_have_a_papers_split(folder, layout, domains, tmp_path):
    office_world(tmp_path / folder, domains)
    assert split_line("office_home", tmp_path) == [layout, layout, ""]
    office_world(tmp_path / "office_home_dg", ["art"], "train")
    office_world(tmp_path / "office_home_dg", ["art"], "val", [9])
    alone = tmp_path / "office_home_dg"
    assert split_line("office_home", alone) == ["dassl", "dassl", ""]


@pytest.mark.parametrize("lists", [True, False])
def test_the_split_of_pacs_is_the_authors_and_no_papers(lists, tmp_path):
    pacs_world(tmp_path, lists=lists)
    todo = "" if lists else "the authors' split is in the files of the kfold layout"
    assert split_line("pacs", tmp_path) == ["kfold", "kfold" if lists else "folders", todo]


@pytest.mark.parametrize("name", ["ucf101", "sun397"])
def test_the_split_that_papers_use_is_asked_for_where_it_is_not_there(name, tmp_path):
    make(name, tmp_path)
    todo = "the paper's split is in the files of the coop layout"
    assert split_line(name, tmp_path) == ["coop", "official", todo]


SIZES = {  # images for training and testing, as CoOp's paper and the authors print them
    "eurosat": (13_500, 8_100),
    "ucf101": (7_639, 3_783),
    "fgvc_aircraft": (3_334, 3_333),
    "stanford_cars": (6_509, 8_041),
    "sun397": (15_880, 19_850),
    "pacs": (8_977, 1_014),
    "office_home": (12_469, 3_119),
}
ALL = {"pacs": 9_991, "office_home": 15_588}  # images of the whole set


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_the_published_ones(name):
    dataset = datasets.get(name)
    for layout in dataset.layouts.values():
        if name in ALL and layout.train:
            assert layout.train + layout.test == ALL[name]
    best = dataset.layouts[dataset.best]
    assert (best.train, best.test) == SIZES[name]


# a fifth of each domain, rounded up, is for testing; images of each domain
DOMAINS = {"pacs": [2_048, 2_344, 1_670, 3_929], "office_home": [2_427, 4_365, 4_439, 4_357]}


@pytest.mark.parametrize("name", DOMAINS)
def test_a_fifth_of_each_domain_makes_the_sizes_of_plain_folders(name):
    layout = datasets.get(name).layouts["folders"]
    assert sum(DOMAINS[name]) == ALL[name]
    assert layout.test == sum(-(-images // 5) for images in DOMAINS[name])


def test_another_class_and_a_half_domain_of_office_home_are_named(tmp_path):
    root = tmp_path / "office_home_dg"
    office_world(root, ["art"], "train")
    office_world(root, ["art"], "val")
    put(root / "art/val/Zeppelin/00001.jpg")
    with pytest.raises(ValueError, match=r"^office_home: .*Zeppelin is no class of Office-Home"):
        datasets.read("office_home", tmp_path)
    office_world(root, ["product"], "train")
    with pytest.raises(ValueError, match="a part of product: add product/val"):
        datasets.read("office_home", tmp_path)


def test_office_home_has_its_65_classes_once():
    assert len({*office_home.LABELS}) == len(office_home.CLASSES) == 65


# --- what is not there, and getting it ------------------------------------------------------------

NEW = [*COOP, "fgvc_aircraft", "pacs", "office_home"]
LACKS = {  # a file to take away from a whole tree: none of another layout is there
    "eurosat": "2750",
    "ucf101": "split_zhou_UCF101.json",
    "stanford_cars": "cars_test",
    "sun397": "split_zhou_SUN397.json",
    "fgvc_aircraft": "images_variant_test.txt",
}


@pytest.mark.parametrize("name", LACKS)
def test_a_missing_file_is_named_with_its_place(name, tmp_path):
    make(name, tmp_path) if name not in COOP else coop_world(name, tmp_path)
    path = tmp_path / name / LACKS[name]
    path.rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError, match=f"no {name} in .*fpl data check {name}"):
        datasets.read(name, tmp_path)
    assert f"put it at {path}" in [*datasets.checklist(name, tmp_path)["todo"]]


@pytest.mark.parametrize("name", NEW)
def test_terms_and_what_is_to_be_brought_are_said(name, tmp_path):
    assert fetch.terms(name).rpartition("See ")[2].startswith("https://")
    told = fetch.by_hand(name, tmp_path)
    dataset = datasets.get(name)
    assert len(told) == sum(not file.url for file in dataset.files)
    assert all(f"put it at {tmp_path}" in line for line in told)


def archive(path, members):
    """Pack the files `members` of a folder under their paths there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as z:
            for name, source in members.items():
                z.write(source, name)
    else:
        with tarfile.open(path, "w:gz") as t:
            for name, source in members.items():
                t.add(source, name)


def packed(name, made, root):
    """Put the archive of a set, in its real form, where it is downloaded or brought to."""
    if name == "eurosat":
        for i in range(10):
            put(made / f"eurosat/2750/River/River_{i}.jpg")
        top, path = made / "eurosat", "eurosat/EuroSAT.zip"
    elif name == "fgvc_aircraft":
        aircraft_world(made, "fgvc-aircraft-2013b/data")
        put(made / "fgvc-aircraft-2013b/data/images/0056978.jpg")
        top, path = made, "fgvc_aircraft/fgvc-aircraft-2013b.tar.gz"
    elif name == "ucf101":
        coop_world("ucf101", made)
        top, path = made / "ucf101", "ucf101/UCF-101-midframes.zip"
    elif name == "pacs":
        pacs_world(made)
        top, path = made, "pacs.zip"
    else:
        office_world(made / "OfficeHomeDataset_10072016", ["Art", "Real World"])
        top, path = made, "OfficeHomeDataset_10072016.zip"
    files = [file for file in top.rglob("*") if file.is_file()]
    archive(root / path, {str(file.relative_to(top)): file for file in files})


@pytest.mark.parametrize("name", ["eurosat", "fgvc_aircraft", "ucf101", "pacs", "office_home"])
def test_an_archive_is_unpacked_into_what_the_reader_reads(name, tmp_path, monkeypatch):
    root = tmp_path / "data"
    packed(name, tmp_path / "made", root)
    dataset = datasets.get(name)
    files = tuple(dataclasses.replace(file, md5="") for file in dataset.files)  # ours is another
    monkeypatch.setitem(datasets.DATASETS, name, dataclasses.replace(dataset, files=files))
    left = fetch.fetch(name, root)
    assert all("split_zhou" in line for line in left)
    assert datasets.read(name, root).rows


def test_addresses_and_checksums_are_those_of_torchvision():
    (file, _) = datasets.get("eurosat").files
    with open(tv.eurosat.__file__) as f:
        text = f.read()
    assert file.url in text and file.md5 in text
    assert datasets.get("fgvc_aircraft").files[0].url == tv.FGVCAircraft._URL
    hint = datasets.get("sun397").files[0].hint
    assert tv.SUN397._DATASET_URL.removeprefix("http") in hint
