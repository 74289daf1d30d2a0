"""Promise: a folder or a data set's name becomes features and a run, by the README's commands."""

import dataclasses
import json

import numpy as np
import pytest
import yaml
from helpers import BACKBONE, PARAMS, standing_in, store_clip
from PIL import Image

from fpl import cli
from fpl.data import datasets, features
from fpl.data.manifest import read_manifest
from fpl.experiments import assemble, records, settings

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
