"""Promise: the demo world is drawn from its seed alone, and the demo CLIP that ships with it is
worth looking at."""

import io
import json
import random
import signal
import statistics
from dataclasses import replace
from unittest import mock

import numpy as np
import open_clip
import pandas as pd
import PIL.Image
import pytest
import safetensors
import torch
from helpers import ROOT, refuses, standing_in
from helpers.processes import Python

from fpl.data import encoders, extraction, pretrain, world
from fpl.data.manifest import read_manifest
from fpl.experiments import assemble, settings

SIZE = {"train_per_class": 1, "test_per_class": 1}
DEMO_CLIP = ROOT / "data/demo_clip"


def content(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    world.make(folder, seed=1, **SIZE)
    return content(folder)


@pytest.mark.parametrize("part", ["first half", "last half", "every third", "nothing"])
def test_the_same_seed_gives_the_same_bytes_whatever_was_drawn_first(part, drawn, tmp_path):
    world.make(tmp_path, seed=1, **SIZE)
    images = sorted((tmp_path / "images").rglob("*.png"), key=lambda path: path.name)
    keep = {
        "first half": images[:30],
        "last half": images[30:],
        "every third": images[::3],
        "nothing": [],
    }[part]
    for path in {*images, tmp_path / "manifest.csv"} - set(keep):
        path.unlink()
    before = {path: path.stat().st_mtime_ns for path in keep}
    world.make(tmp_path, seed=1, **SIZE)
    assert content(tmp_path) == drawn
    assert {path: path.stat().st_mtime_ns for path in keep} == before, (
        "what was there was drawn again"
    )


def test_one_image_needs_none_of_the_others(drawn):
    classes = world.WORLDS["shapes"].classes
    numbers = list(range(60))
    random.Random(0).shuffle(numbers)
    stored = {int(name[-9:-4]): raw for name, raw in drawn.items() if name.endswith(".png")}
    for number in numbers[:24]:
        rng = world.rng_of(1, number)
        label = world.CLASSES.index(classes[number // 2])
        pixels = world.seen("shapes", world.Attributes.draw(rng, label), rng)
        assert pixels.shape == (64, 64, 3)
        with PIL.Image.open(io.BytesIO(stored[number])) as image:
            assert np.array_equal(np.asarray(image), pixels)


def test_another_seed_gives_other_images(drawn, tmp_path):
    world.make(tmp_path, seed=2, **SIZE)
    other = content(tmp_path)
    assert other["manifest.csv"] != drawn["manifest.csv"]
    assert {raw for name, raw in other.items() if name.endswith(".png")}.isdisjoint(drawn.values())


@pytest.mark.parametrize(
    ("before", "finished"),
    [
        ({"seed": 2, **SIZE}, True),
        ({"seed": 2, **SIZE}, False),
        ({"seed": 1, **SIZE, "train_per_class": 2}, True),
        ({"seed": 1, **SIZE, "test_per_class": 2}, True),
    ],
)
def test_the_images_of_another_request_do_not_stay(before, finished, drawn, tmp_path):
    manifest = world.make(tmp_path, **before)
    if not finished:
        manifest.unlink()
    world.make(tmp_path, seed=1, **SIZE)
    assert content(tmp_path) == drawn


def test_what_does_not_say_of_what_it_was_drawn_is_drawn_again(drawn, tmp_path):
    world.make(tmp_path, seed=2, **SIZE)
    (tmp_path / "source.json").write_bytes(b"\xff\xfe")
    world.make(tmp_path, seed=1, **SIZE)
    assert content(tmp_path) == drawn


def test_a_finished_folder_is_left_alone(tmp_path):
    world.make(tmp_path, seed=1, **SIZE)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    world.make(tmp_path, seed=1, **SIZE)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("finished", [True, False])
def test_the_images_of_another_world_do_not_stay(finished, drawn, tmp_path):
    """Of which the file beside them says nothing, so that it fits folders of long ago."""
    manifest = world.make(tmp_path, seed=1, **SIZE, world="styles")
    if not finished:
        manifest.unlink()
    world.make(tmp_path, seed=1, **SIZE)
    assert content(tmp_path) == drawn
    styles = read_manifest(world.make(tmp_path, seed=1, **SIZE, world="styles"))
    assert styles.classes == world.WORLDS["styles"].classes


def test_worlds_are_told_apart_by_their_classes():
    shapes, styles = (set(one.classes) for one in world.WORLDS.values())
    assert shapes.isdisjoint(styles)


DRAWER = """
import pathlib
from fpl.data import world

world.make(pathlib.Path("."), seed=1, train_per_class=1, test_per_class=1)
"""


def test_another_process_waits_until_all_is_drawn(drawn, tmp_path):
    """Both would take each other's temporary files for those of a killed drawing."""
    images, others = iter(range(60)), []
    render = world.render

    def while_another_comes(*args):
        if next(images) == 30:
            others.append(Python(tmp_path, "-c", DRAWER))
            with pytest.raises(TimeoutError):
                others[0].communicate(timeout=3)
        return render(*args)

    with mock.patch.object(world, "render", while_another_comes):
        world.make(tmp_path, seed=1, **SIZE)
    _, said = others[0].communicate(timeout=60)
    assert others[0].returncode == 0 and "another process is drawing into ." in said
    assert content(tmp_path) == drawn


KILLER = """
import os, pathlib, signal, sys
from fpl.data import world

replace, calls = os.replace, 0

def killed(*args):
    global calls
    calls += 1
    if calls > int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*args)

os.replace = killed
world.make(pathlib.Path("."), seed=1, train_per_class=1, test_per_class=1)
"""


@pytest.mark.parametrize("files", [0, 1, 2, 30, 61])
def test_a_killed_drawing_goes_on(files, drawn, tmp_path):
    process = Python(tmp_path, "-c", KILLER, str(files))
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    assert len(kept) == max(0, files - 1)  # the first file says what is being drawn
    world.make(tmp_path, seed=1, **SIZE)
    assert content(tmp_path) == drawn
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())


def test_manifest(tmp_path):
    manifest = read_manifest(world.make(tmp_path, seed=1, train_per_class=3, test_per_class=2))
    assert manifest.classes == world.WORLDS["shapes"].classes and len(manifest.classes) == 30
    assert set(manifest.classes) < set(world.CLASSES), "the demo CLIP knows all of them"
    assert {row["domain"] for row in manifest.rows} == set(world.STYLES) and len(world.STYLES) == 6
    counts = {(label, split): 0 for label in range(30) for split in ("train", "test")}
    for row in manifest.rows:
        counts[int(row["label"]), row["split"]] += 1
        with PIL.Image.open(tmp_path / row["path"]) as image:
            assert (image.size, image.mode) == ((64, 64), "RGB")
    assert counts == {(label, split): {"train": 3, "test": 2}[split] for label, split in counts}
    assert len({row["path"] for row in manifest.rows}) == len(manifest.rows)


def test_the_demo_clip_is_an_ordinary_small_open_clip_model():
    assert {"open_clip_config.json", "open_clip_model.safetensors"} <= {
        path.name for path in DEMO_CLIP.iterdir()
    }
    assert sum(path.stat().st_size for path in DEMO_CLIP.iterdir()) <= 15e6
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{DEMO_CLIP}")
    assert type(model) is open_clip.CLIP
    image = model.encode_image(transform(PIL.Image.new("RGB", (64, 64))).unsqueeze(0))
    text = model.encode_text(
        open_clip.get_tokenizer(f"local-dir:{DEMO_CLIP}")(["a striped circle."])
    )
    assert image.shape == text.shape and image.isfinite().all() and text.isfinite().all()


def test_the_demo_clip_says_how_it_was_made_and_was_not_trained_on_the_data():
    with safetensors.safe_open(DEMO_CLIP / "open_clip_model.safetensors", "pt") as f:
        made = json.loads(f.metadata()["made_by"])
    assert {"draws", "epochs", "seed", "seconds"} <= set(made)
    assert made["seed"] != settings.read(ROOT / "params.yaml").data.seed


WRONG = {
    "more epochs than are scheduled": ({"epochs": 2}, ["stop is 7", "1 .. epochs", "2"]),
    "no epoch": ({"stop": 0}, ["stop is 0", "1 .. epochs", "8"]),
    "fewer drawings than a batch": ({"draws": 100}, ["batch is 256", "1 .. draws", "100"]),
    "no batch": ({"batch": 0}, ["batch is 0", "1 .. draws"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_recipe_that_ends_in_no_model_is_refused_before_anything_is_drawn(case):
    changes, words = WRONG[case]
    refuses(lambda: pretrain.Recipe(**changes), words)


def test_the_demo_clip_has_the_recipe_that_is_the_default():
    with safetensors.safe_open(DEMO_CLIP / "open_clip_model.safetensors", "pt") as f:
        made = json.loads(f.metadata()["made_by"])
    same = {name: made[name] for name in ("draws", "seed", "batch", "lr")}
    assert pretrain.Recipe(epochs=made["of"], stop=made["epochs"], **same) == pretrain.Recipe()


@pytest.fixture(scope="module")
def quality(tmp_path_factory):
    """Row of the table -> its rounds of all seeds, in the world and with the model of params.yaml.

    Of each class there are as many images as clients train on, and 20 for the test.
    """
    params = settings.read(ROOT / "params.yaml")
    few = replace(params.data, train_per_class=params.partition.shots, test_per_class=20)
    params = replace(params, data=few)
    folder = tmp_path_factory.mktemp("quality")
    (folder / "data").mkdir()
    (folder / "data/demo_clip").symlink_to(DEMO_CLIP)
    with standing_in(folder):
        manifest = world.make(few.folder, few.seed, few.train_per_class, few.test_per_class)
        loaded = encoders.load(params.backbone.name, params.backbone.weights or None)
        extraction.extract(read_manifest(manifest), loaded, few.features)
        yield {
            row: [
                r for seed in params.seeds for r in assemble.rounds_of(params.experiment(row, seed))
            ]
            for row in ("zeroshot", "zeroshot_own", "ridge_own")
        }


def test_zero_shot_has_something_to_gain(quality):
    """Over all 30 classes and all test images."""
    (accuracy,) = {
        torch.cat([found.right for found in r.answers]).float().mean().item()
        for r in quality["zeroshot"]
    }  # no seed matters
    assert 0.35 <= accuracy <= 0.65


def mean_of(runs):
    """Return the mean over ten seeds and ten clients."""
    assert [len(r.accuracy) for r in runs] == [10] * 10
    return statistics.mean(a for r in runs for a in r.accuracy.tolist())


def test_features_suffice_for_a_clients_own_classes_and_names_do_not(quality):
    """Ridge regression on the client's own 16 shots against zero-shot among the same classes."""
    ridge = mean_of(quality["ridge_own"])
    assert 0.90 <= ridge <= 0.97
    assert mean_of(quality["zeroshot_own"]) <= ridge - 0.05


def test_the_quality_is_measured_with_the_published_partition():
    params = settings.read(ROOT / "params.yaml")
    assert params.partition == settings.Partition("pathological", clients=10, shots=16)


def means(path):
    """Return the accuracies of a table of expected results, by the name in its first column."""
    table = pd.read_csv(ROOT / "results/expected" / path)
    return table.set_index(table.columns[0])["mean"]


def test_a_shared_prompt_has_something_to_learn():
    """Between the floor and the ceiling of prompt learning is room, and where clients are alike
    PromptFL comes near the ceiling."""
    shared = means("10_table1/table1_shared.csv")
    assert shared["pooled"] >= shared["zeroshot"] + 5
    assert shared["untrained"] <= shared["pooled"] - 5
    assert shared["promptfl, clients alike"] >= shared["pooled"] - 3


def test_the_methods_of_table_1_come_apart():
    table = means("10_table1/table1.csv")
    apart = sorted(table[["coop", "promptfl", "fedpgp", "pfedmoap"]])
    assert min(np.diff(apart)) > 3 and table.max() <= 97


def test_the_domains_come_apart():
    table = means("13_domains/table3.csv")
    assert table["ridge_own"] > table["majority"] + 30
    assert min(np.diff(sorted(table[["promptfl", "coop", "pfedmoap"]]))) > 2
