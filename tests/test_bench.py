"""Promise: `fpl bench` measures what it says, on as many images as it says; sizes follow shapes."""

import json

import h5py
import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
from helpers import BACKBONE, ROOT, standing_in, store_clip

from fpl import cli
from fpl.bench import features as bench_features
from fpl.bench import plan, ways
from fpl.bench import step as bench
from fpl.data import datasets, encoders, extraction, features, pictures
from fpl.experiments import settings
from fpl.prompts import Clip

RATES = ["way", "images", "seconds", "images/s"]


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory):
    with standing_in(tmp_path_factory.mktemp("world")) as folder:
        store_clip(folder / "clip")
        yield folder


@pytest.fixture
def clock(monkeypatch):
    """Calls are made once, and take the seconds that are listed, in turn."""

    def take(*seconds):
        turn = iter(seconds)

        def timed(call):
            call()
            return next(turn)

        monkeypatch.setattr(bench_features, "timed", timed)

    return take


def printed(*arguments):
    cli.main(["bench", *map(str, arguments), "--save", "saved/table"])
    with open("saved/table.json") as f:
        return pd.DataFrame(json.load(f))


def test_extraction_reports_three_ways_and_their_ratio():
    table = printed(
        "extraction", "--model", BACKBONE.name, "--images", 5, "--repeats", 1, "--batch", 2
    )
    about = ["model", "device", "batch", "workers"]
    assert [*table] == [*RATES, "share of bare model", *about]
    assert table["way"].tolist() == ["bare model", "extraction", "decoding alone"]
    assert (
        (table["images"] == 5).all()
        and (table["batch"] == 2).all()
        and (table["model"] == BACKBONE.name).all()
    )
    np.testing.assert_allclose(table["images/s"] * table["seconds"], 5, rtol=1e-6)
    assert (table.iloc[:, 4] > 0).all() and table.iloc[0, 4] == 1


def test_the_three_ways_work_on_the_same_images(monkeypatch):
    """Each once without counting, then `repeats` times."""
    made, files, opened = [], [], []
    extract, bare, read = extraction.extract, bench_features.encode_bare, pictures.content

    def kept_extract(*arguments, **named):
        files.append(features.load(extract(*arguments, **named)))

    def kept_bare(clip, pixels):
        made.append(bare(clip, pixels))

    def counted(path):
        opened.append(path)
        return read(path)

    monkeypatch.setattr(extraction, "extract", kept_extract)
    monkeypatch.setattr(bench_features, "encode_bare", kept_bare)
    monkeypatch.setattr(pictures, "content", counted)
    bench_features.extract(ways.load_model(BACKBONE.name), 5, 2, workers=0, repeats=2)
    assert len(made) == len(files) == 3
    assert (
        len(opened) == 5 * (1 + 3 + 3) and len(set(opened)) == 5
    )  # into memory; by extraction; alone
    torch.testing.assert_close(made[0], files[0].feats, rtol=2**-10, atol=1e-6)
    assert len(made[0].unique(dim=0)) == 5


def test_a_share_is_the_median_over_turns_of_a_ratio_of_neighbours(clock):
    clock(50, 50, 2, 4, 6, 6, 3, 12)  # the first turn does not count
    calls = []
    table = bench_features.rates(
        {name: lambda name=name: calls.append(name) for name in "ab"}, images=12, repeats=3
    )
    assert "".join(calls) == "ab" * 4
    assert table["seconds"].tolist() == [3, 6] and table["images/s"].tolist() == [4, 2]
    assert table["share of a"].tolist() == [1, 0.5]


def test_photos_are_like_photographs_and_the_same_every_time(tmp_path):
    files = [
        bench_features.draw_photos(folder, 3)
        for folder in (tmp_path / "a", tmp_path / "b")
        if not folder.mkdir()
    ]
    first, second = ([(m.folder / row["path"]).read_bytes() for row in m.rows] for m in files)
    assert first == second and len(set(first)) == 3
    assert all(40_000 < len(data) < 200_000 for data in first)


def test_reading_opens_a_file_that_is_whole(monkeypatch):
    loaded, load = [], features.load

    def kept(path):
        with h5py.File(path) as f:
            loaded.append((load(path), f["feats"].dtype))

    monkeypatch.setattr(features, "load", kept)
    table = printed("reading", "--images", 40, "--repeats", 1)
    assert [*table] == [*RATES, "share of array alone", "d", "MiB"]
    assert (
        table["way"].tolist() == ["array alone", "features.load"] and (table["images"] == 40).all()
    )
    assert (
        all(feats.feats.shape == (40, 512) and stored == np.float16 for feats, stored in loaded)
        and len(loaded) == 2
    )
    assert table["MiB"][0] * 2**20 > 40 * 512 * 2


def sizes():
    table = printed("sizes", "--views", 8)
    assert [*table] == ["data set", "images", "tower", "d", "pooled MB", "patches MB", "8 views MB"]
    return table.set_index(["data set", "tower"])


def test_sizes_name_every_data_set_with_both_towers():
    table = sizes()
    assert len(table) == len(datasets.DATASETS) * 2 and table.index.is_unique
    assert set(table.index.levels[1]) == {"RN50", "ViT-B/16"} and (table.iloc[:, 2:] > 0).all(
        axis=None
    )


@pytest.mark.parametrize(
    ("name", "tower", "pooled", "patches", "views"),
    [  # by hand: 60,000 images of 1,024 or 2,048 bytes, 50,000 of them for training; 22,851 and
        # 18,278; 196 or 49 patches
        ("cifar100", "ViT-B/16", 61.4, 12042.2, 409.6),
        ("cifar100", "RN50", 122.9, 6021.1, 819.2),
        ("domainnet10", "ViT-B/16", 23.4, 4586.3, 149.7),
        ("office_caltech10", "RN50", 5.2, 254.2, 33.2),
    ],
)
def test_sizes_are_those_of_the_shapes(name, tower, pooled, patches, views):
    line = sizes().loc[name, tower]
    assert line[["pooled MB", "patches MB", "8 views MB"]].tolist() == [pooled, patches, views]


@pytest.mark.parametrize(
    ("tower", "name"), [("RN50", "RN50-quickgelu"), ("ViT-B/16", "ViT-B-16-quickgelu")]
)
def test_the_shapes_are_those_of_the_towers(tower, name):
    with torch.device("meta"):
        model = open_clip.CLIP(**open_clip.get_model_config(name)).eval()
        pooled, patches = encoders.tokens(Clip(model), torch.zeros(1, 3, 224, 224))
    assert bench_features.TOWERS[tower] == (pooled.shape[1], patches.shape[1])


def test_without_a_word_it_is_a_step_and_a_round_for_every_setting(monkeypatch, capsys):
    asked, line = (
        [],
        {
            "machine": "a machine",
            "peak, GFLOP/s": 1.0,
            "clients": 10,
            "steps": 25,
            **dict.fromkeys(bench.COLUMNS, 2.0),
        }
        | {"feature difference": 3.25e-16, "first call, s": None},
    )

    def table(case, clip, repeats, measure_round):
        asked.append((case.model, case.classes, case.batch, case.steps, repeats, measure_round))
        setting = {"model": case.model, "classes": case.classes, "batch": case.batch}
        return pd.DataFrame([{"way": way, **setting, **line} for way in bench.WAYS])

    monkeypatch.setattr(bench, "table", table)
    monkeypatch.setattr(bench, "load_model", lambda model: None)
    assert printed()["way"].tolist() == list(bench.WAYS)
    several = printed(
        "step",
        "--classes",
        10,
        37,
        "--batch",
        16,
        32,
        "--model",
        "RN50",
        "--steps",
        50,
        "--measure-round",
    )
    assert len(several) == 4 * len(bench.WAYS) and (several["feature difference"] == 3.25e-16).all()
    assert several["first call, s"].isna().all()
    assert asked == [
        ("ViT-B-16-quickgelu", 102, 16, 25, 3, False),
        *(("RN50", classes, batch, 50, 3, True) for classes in (10, 37) for batch in (16, 32)),
    ]
    assert "RN50, 37 classes, batches of 32, 10 clients" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("extraction --batch 2 3", "extraction` takes one value of --batch"),
        ("step --steps 2 3", "step` takes one value of --steps"),
        ("scaling --model x y", "scaling` takes one value of --model"),
        ("evaluation --experts 2 3 --classes 1 2", "takes one value of --classes, --experts"),
        ("profile --classes 1", "--classes takes two and more"),
        ("sizes --save .", ". is a folder: give the name of a file in it"),
        ("sizes --save /dev/null/x", "nothing can be written in /dev/null"),
        ("sizes --clients 2", "`fpl bench sizes` does not read --clients: leave it out"),
        ("step --weights x", "`fpl bench step` does not read --weights: leave it out"),
    ],
)
def test_what_cannot_be_measured_or_saved_is_refused_first(line, said):
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", *line.split()])
    assert end.value.code.startswith("fpl bench: ") and said in end.value.code


def test_the_saved_table_is_the_printed_one(capsys):
    printed("sizes")
    with open("saved/table.md") as f:
        assert f.read() == capsys.readouterr().out


def test_an_unknown_model_is_one_sentence():
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", "extraction", "--model", "ViT-B16"])
    assert end.value.code == "fpl bench: unknown model 'ViT-B16': did you mean 'ViT-B-16'?"


def test_the_plan_of_the_demo_counts_its_drawings():
    """Every class has as many pictures as the settings ask for."""
    demo = settings.read(ROOT / "params.yaml")
    with standing_in(ROOT):
        disk = plan.disk(demo).set_index("files")["GB"] * 1e9
    images = 30 * (demo.data.train_per_class + demo.data.test_per_class)
    assert disk["data/features/shapes.h5"] >= images * 256 * 2  # half precision
