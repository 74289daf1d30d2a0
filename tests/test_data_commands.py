"""Promise: a folder or a data set's name becomes features and a run, by the README's commands."""

import dataclasses
import json
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
import yaml
from helpers import BACKBONE, PARAMS, refuses, standing_in, store_clip
from PIL import Image

from fpl import cli
from fpl.data import datasets, encoders, extraction, features
from fpl.data.manifest import read_manifest
from fpl.experiments import (
    assemble,
    cache,
    extract,
    notebook,
    records,
    report,
    settings,
    tables,
    verbs,
)

SETTINGS = {
    "backbone": {"name": BACKBONE.name},
    "partition": {"clients": 2, "shots": 2, "kind": "even"},
    "run": {"rounds": 1, "local_epochs": 1, "batch_size": 4},
    "methods": {"promptfl": {"n_ctx": 2}},
}
OWN = ["--set", "data.name=own", "--set", "data.root=photos"]


def photo(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(
        path
    )


@pytest.fixture
def here(tmp_path):
    """An empty project with a model, settings, and photos of two sites."""
    with standing_in(tmp_path):
        store_clip(tmp_path / "clip")
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(SETTINGS))
        for i in range(40):
            photo(tmp_path / "photos" / f"site_{i % 2}" / f"class_{i // 2 % 4}" / f"{i}.png", i)
        yield tmp_path


def test_a_folder_becomes_features_and_a_run(here, capsys):
    cli.main(["features", *OWN])
    data = settings.Data(name="own", root="photos")
    found = features.load(data.features)
    assert found.classes == [f"class {i}" for i in range(4)] and set(found.domain) == {
        "site_0",
        "site_1",
    }
    assert len(found.labels) == 40 and set(found.split) == {"train", "test"}
    cli.main(["run", "promptfl", *OWN])
    assert "promptfl: " in capsys.readouterr().out
    (record,) = records.RECORDS.iterdir()
    assert json.loads(record.read_text())["settings"]["data"] == "own"


def test_the_column_client_of_a_csv_decides_who_has_what(here):
    lines = ["path,class,split,client"]
    for i, p in enumerate(sorted((here / "photos").glob("*/*/*.png"))):
        split = "test" if i % 4 == 0 else "train"
        lines.append(f"{p.relative_to(here)},{p.parent.name},{split},{p.parent.parent.name}")
    (here / "own.csv").write_text("\n".join(lines))
    own = ["--set", "data.name=own", "--set", "data.root=own.csv"]
    cli.main(["features", *own])
    data = settings.Data(name="own", root="own.csv")
    experiment = dataclasses.replace(PARAMS, data=data, partition=settings.Partition()).experiment(
        "majority", 1, kind="column", clients=2
    )
    clients = assemble.make_clients(experiment, "cpu")
    images = [row["path"] for row in read_manifest(data.manifest).rows]
    for i in range(2):
        assert all(
            f"site_{i}/" in images[k]
            for part in (clients.train, clients.test)
            for k in part[i].tolist()
        )


def test_clients_keep_their_names_and_their_order(here, capsys):
    """Site 2 has its labels swapped, so with two classes its accuracy is 100 % minus that of 1."""
    lines = ["path,class,split,client"]
    photos = sorted((here / "photos").glob("*/class_[01]/*.png"))
    for site in (10, 2, 1):
        for i, photo_ in enumerate(photos):
            label = int(photo_.parent.name[-1])
            name = f"class {1 - label if site == 2 else label}"
            lines.append(f"{photo_},{name},{'test' if i % 2 else 'train'},site {site}")
    (here / "own.csv").write_text("\n".join(lines))
    changes = ["data.name=own", "data.root=own.csv", "partition.kind=column", "partition.clients=3"]
    own = [word for change in changes for word in ("--set", change)]
    cli.main(["features", *own])
    said = "own.csv lists 20 times a picture that another client has in another split or class"
    assert said in capsys.readouterr().err
    cli.main(["run", "zeroshot", *own])
    (path,) = records.RECORDS.iterdir()
    last = records.frame([path]).set_index("client_name")["accuracy"]
    assert [*last.index] == records.read(path)["clients"] == ["site 1", "site 2", "site 10"]
    assert last["site 1"] == last["site 10"] == pytest.approx(1 - last["site 2"])
    found = features.load(settings.Data(name="own").features)
    clients = verbs.split(found, kind="column", clients=3)
    clip = encoders.load(BACKBONE.name)
    result = verbs.train("zeroshot", clip, clients, progress=False)
    assert result.table()["accuracy, %"].round().tolist() == (100 * last).round().tolist()
    assert [*result.table().index] == [*last.index]
    assert result.prompts is None
    learnt = verbs.train("promptfl", clip, clients, rounds=1, progress=False)
    assert learnt.prompts.shape == (3, 16, clip.model.token_embedding.weight.shape[1])


TRAINED = {
    "a number": ((3, None, None), ["3 is no method: give a row such as 'promptfl'"]),
    "a class": ((str, None, None), ["<class 'str'> is no method", "a subclass of"]),
    "no split": (("promptfl", None, 3), ["clients are a Split, not int", "`fpl.split`"]),
}


@pytest.mark.parametrize("case", TRAINED)
def test_what_cannot_be_trained_is_refused_in_one_sentence(case):
    given, words = TRAINED[case]
    refuses(lambda: verbs.train(*given), words)


SAME = [("Plain Circle", "plain circle"), ("a &amp; b", "a & b"), ("caf\u00e9", "cafe\u0301")]


@pytest.mark.parametrize("names", SAME)
def test_classes_that_no_prompt_tells_apart_are_refused_wherever_they_come_in(names, tmp_path):
    with standing_in(tmp_path):
        store_clip(tmp_path / "clip")
        for i in range(6):
            photo(tmp_path / "photos" / names[i % 2] / f"{i}.png", i)
        clip = encoders.load(BACKBONE.name)
        data = settings.Data(name="own", root="photos")
        both = " and ".join(map(repr, sorted(names)))
        refusal = re.escape(f"classes {both} have the same tokens: rename one")
        with pytest.raises(ValueError, match=refusal):
            next(extract.make_features(data, clip, extract.Request()))
        listed = extract.list_images(data)  # as if another tokenizer had made the features
        extraction.extract(listed, clip, data.features)
        with pytest.raises(ValueError, match=refusal):
            cache.text_of(data, BACKBONE, "cpu", 2)


def test_own_data_leave_the_results_of_the_file_alone(here, monkeypatch):
    """Sweep, notebook and report agree where the results of other data are."""
    params = SETTINGS | {"data": {"name": "own", "root": "photos"}, "seeds": [1, 2]}
    params |= {"tables": {"10_table1": {"table1": {"rows": ["zeroshot", "majority"]}}}}
    (here / "params.yaml").write_text(yaml.safe_dump(params))
    for i in range(20):
        photo(here / "others" / f"kind_{i % 4}" / f"{i}.png", 100 + i)
    others = ["--set", "data.root=others", "--set", "data.store=others"]
    for changes in ([], others):
        cli.main(["features", *changes])
        cli.main(["sweep", "table1", "--jobs", "1", *changes])
    assert set(records.of_table("table1")["run"]).isdisjoint(
        records.of_table("table1", "results/others")["run"]
    )
    told = {}
    book = nbformat.v4.new_notebook()
    (here / "notebooks").mkdir()
    nbformat.write(book, here / "notebooks/10_table1.ipynb")

    def execute(source, target, given):
        found = settings.read()
        told[target] = found.data.root, {*records.of_table("table1")["run"]}

    monkeypatch.setattr(notebook, "execute", execute)
    monkeypatch.setattr(report, "build", lambda *places: told.setdefault("pages", places))
    cli.main(["notebook", "notebooks/10_table1.ipynb", *others])
    cli.main(["notebook", "notebooks/10_table1.ipynb"])
    cli.main(["report", *others])
    folder = Path("results/others")
    runs = records.of_table("table1", folder)
    assert told == {
        folder / "notebooks/10_table1.ipynb": ("others", {*runs["run"]}),
        Path("results/notebooks/10_table1.ipynb"): ("photos", {*records.of_table("table1")["run"]}),
        "pages": (folder / "notebooks", folder / "report", folder / "tables"),
    }
    said = tables.note(runs, tables.NOTE_TABLE1)
    assert said.startswith("The images are those of own,") and "drawn" not in said


def test_two_sets_of_own_data_stand_in_one_table(here):
    for name, first in (("siteA", 0), ("siteB", 50)):
        for i in range(first, first + 20):
            photo(here / name / f"class_{i % 2}" / f"{i}.png", i)
    sets = {name: {"data": {"name": "own", "root": name}} for name in ("siteA", "siteB")}
    both = {"data": [*sets], "rows": ["majority"], "set": {"kind": "iid"}}
    params = SETTINGS | {"datasets": sets, "tables": {"05_sweep": {"both": both}}, "seeds": [1, 2]}
    (here / "params.yaml").write_text(yaml.safe_dump(params))
    cli.main(["features", "--all"])
    cli.main(["features", "--data", "siteA"])
    cli.main(["sweep", "both", "--jobs", "1"])
    runs = records.of_table("both")
    assert [*tables.parts(runs)] == ["siteA", "siteB"] and runs["run"].nunique() == 4
    for name in sets:
        listed = read_manifest(here / "data" / "own" / name / "manifest.csv")
        assert all(f"/{name}/" in row["path"] for row in listed.rows)


def test_two_data_sets_do_not_share_a_file_of_features(here):
    sets = {name: {"data": {"name": "own", "root": name, "store": "x"}} for name in ("A", "B")}
    (here / "params.yaml").write_text(yaml.safe_dump(SETTINGS | {"datasets": sets}))
    with pytest.raises(ValueError, match="A and B keep different features in data/features/x.h5"):
        settings.read()


def test_one_content_in_both_splits_is_told(here, capsys):
    for split in ("train", "test"):
        photo(here / "copies" / split / "a" / f"{split}.png", 1)
    cli.main(["features", "--set", "data.name=own", "--set", "data.root=copies"])
    said = capsys.readouterr().err
    assert "1 times an image has the content of one in another split or class: " in said


def test_a_data_set_by_name_without_its_validation_images(here):
    folder = here / "sets" / "dtd"
    for part in ("train1", "val1", "test1"):
        (folder / "labels").mkdir(parents=True, exist_ok=True)
        names = [f"{c}/{c}_{part}_{i}.jpg" for c in ("banded", "zigzagged") for i in range(3)]
        (folder / "labels" / f"{part}.txt").write_text("\n".join(names))
        for k, name in enumerate(names):
            photo(folder / "images" / name, k)
    cli.main(
        [
            "features",
            "--set",
            "data.name=dtd",
            "--set",
            "data.root=sets",
            "--set",
            "data.store=dtd_tiny",
        ]
    )
    found = features.load(here / "data/features/dtd_tiny.h5")
    assert (
        found.classes == ["banded", "zigzagged"]
        and len(found.labels) == 12
        and set(found.split) == {"train", "test"}
    )
    listed = read_manifest(here / "data/dtd/manifest.csv")
    assert all((listed.folder / row["path"]).is_file() for row in listed.rows)


def test_the_commands_say_what_is_there_and_what_is_missing(here, capsys):
    cli.main(["data", "list", "--root", "sets"])
    out = capsys.readouterr().out
    assert all(name in out for name in datasets.DATASETS)
    cli.main(["data", "check", "dtd", "--root", "sets"])
    out = capsys.readouterr().out
    assert (
        "missing" in out
        and "put it at sets/dtd/" in out
        and "split_zhou_DescribableTextures.json" in out
    )
    cli.main(["data", "check", "own", "--root", "photos"])
    assert "images on disk" in capsys.readouterr().out


BAD = {
    "no name": (["data", "check"], "data set '' is none of flowers102"),
    "a wrong name": (["data", "fetch", "imagenet"], "data set 'imagenet' is none of flowers102"),
    "a wrong data set": (
        ["features", "--set", "data.name=dtdd"],
        "unknown data set 'dtdd': did you mean 'dtd'?",
    ),
    "no folder": (
        ["features", "--set", "data.name=own", "--set", "data.root=nowhere"],
        "no own data at nowhere",
    ),
    "nothing there": (["features", "--set", "data.name=dtd"], "no dtd in data/images"),
    "no value": (
        ["features", "--set", "data.name"],
        "'data.name' is not of the form section.name=value",
    ),
    "a wrong section": (
        ["features", "--set", "dta.name=own"],
        "unknown section of params.yaml 'dta': did you mean 'data'?",
    ),
    "a wrong setting": (["features", "--set", "data.nme=own"], "did you mean 'name'?"),
    "data for tables": (["sweep", "--data", "own"], "tables name their data sets in the settings"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_one_sentence(here, name):
    arguments, sentence = BAD[name]
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert sentence in str(end.value.code) and "\n" not in str(end.value.code)


def test_settings_of_the_command_line_replace_those_of_the_file(here):
    params = settings.read(
        changes=[
            "run.rounds=7",
            "seeds=[4, 5]",
            "backbone.weights=openai",
            "methods={coop: {n_ctx: 3}}",
        ]
    )
    assert (params.run.rounds, params.run.local_epochs, params.seeds) == (7, 1, (4, 5))
    assert params.backbone == settings.Backbone(BACKBONE.name, "openai") and params.methods == {
        "coop": {"n_ctx": 3}
    }
