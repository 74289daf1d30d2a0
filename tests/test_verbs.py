"""Promise: what the public verbs train is a run like others, with the model of its features."""

import dataclasses
from dataclasses import dataclass

import pytest
from helpers import BACKBONE, DATA, PARAMS, refuses, store_clip
from helpers.runs import near

import fpl
from fpl import methods
from fpl.data import encoders, features
from fpl.experiments import keep, predict, records, runner, settings, transfer, verbs
from fpl.experiments.runner import Asked
from fpl.rounds import Seeds

SAME = {"n_ctx": 2, "rounds": 2, "local_epochs": 1, "batch_size": 8}
DEAL = {"clients": 4, "shots": 2}


@pytest.fixture
def clip(here):
    return verbs.load(BACKBONE.name)


@pytest.fixture
def found(here):
    return features.load(DATA.features)


def train(row, clip, clients, **settings):
    return fpl.train(row, clip, clients, progress=False, **{**SAME, **settings})


def test_python_trains_as_the_command_line_does(clip, found):
    (path,) = runner.sweep([PARAMS.experiment("promptfl", 3)])
    result = train("promptfl", clip, fpl.split(found, seed=3, **DEAL))
    last = records.read(path)["rounds"][-1]
    assert result.accuracy.tolist() == pytest.approx(last["accuracy"], abs=1e-6)
    assert result.rounds[-1].loss == pytest.approx(last["loss"], rel=1e-5)


def test_the_seed_is_that_of_the_split_unless_it_is_said(clip, found):
    clients = fpl.split(found, seed=3, **DEAL)
    seeds = {}
    for name, asked in {"none": {}, "5": {"seed": 5}, "apart": {"order_seed": 7}}.items():
        seeds[name] = train("zeroshot", clip, clients, **asked).setup.seeds
    assert seeds == {"none": Seeds(3, 3), "5": Seeds(5, 5), "apart": Seeds(3, 7)}
    experiment = PARAMS.experiment("promptfl", 3, order_seed=7, init_seed=9)
    assert runner.setup_of(experiment).seeds == Seeds(9, 7)


def test_another_model_than_that_of_the_features_is_refused(clip, found, here):
    store_clip(here / "other", seed=1)
    clients = fpl.split(found, **DEAL)
    other = encoders.load("local-dir:other")
    refuses(lambda: train("promptfl", other, clients), ["these clients", "another weights"])
    known = dataclasses.replace(clients, provenance={})  # features that somebody made by hand
    assert len(train("zeroshot", other, known).accuracy) == 4


def test_who_trains_in_a_released_split_is_not_drawn_otherwise(clip, found):
    released = fpl.split(found, form="released", split_seed=1, **DEAL)
    asked = lambda: train("promptfl_released", clip, released)  # noqa: E731
    refuses(asked, ["draws who trains", "fpl run promptfl_released"])
    assert len(train("promptfl", clip, released, rounds=1).accuracy) == 4
    ours = fpl.split(found, **DEAL)
    assert len(train("promptfl_released", clip, ours, rounds=1).accuracy) == 4


def test_what_is_saved_knows_its_clients_by_name(clip, found, here):
    named = dataclasses.replace(fpl.split(found, **DEAL), names=("north", "east", "south", "west"))
    result = train("coop", clip, named)
    kept = keep.read(fpl.save(result, here / "mine.safetensors"))
    assert [*kept.clients] == [*named.names] and kept.about == {"images": "shapes"}
    model = fpl.restore(here / "mine.safetensors", clip)
    for number, name in enumerate(named.names):
        assert near(model.classifier(name).p, model.classifier(number).p)


def test_products_are_made_in_the_precision_that_is_asked_for(clip, found, monkeypatch):
    """In the run, by the verbs, in what is restored, and on other data."""
    experiment = PARAMS.experiment("promptfl", 1, precision="bfloat16")
    (path,) = runner.sweep([experiment], asked=Asked(keep=True))
    trees = [
        runner.setup_of(experiment).text,
        train("promptfl", clip, fpl.split(found, **DEAL), precision="bfloat16").setup.text,
        predict.restore(path).text,
    ]
    made = transfer.text_of
    monkeypatch.setattr(
        transfer, "text_of", lambda *a, **b: trees.append(made(*a, **b)) or trees[-1]
    )
    transfer.accuracies(path, experiment.source)
    assert [tree.precision for tree in trees] == ["bfloat16"] * 4
    single = runner.setup_of(PARAMS.experiment("promptfl", 1)).text
    assert single.precision == "single"


@dataclass(frozen=True)
class CoOp(methods.CoOp):
    """Of one's own, with the name of a row."""


def test_a_class_of_ones_own_does_not_pass_for_a_row(clip, found, here):
    words = ["CoOp has the key coop of another row", "write key ="]
    refuses(lambda: train(CoOp, clip, fpl.split(found, **DEAL)), words)
    head = "from dataclasses import dataclass\nfrom fpl import methods\n\n@dataclass(frozen=True)\n"
    (here / "mine.py").write_text(f"{head}class CoOp(methods.CoOp):\n    pass\n")
    refuses(lambda: settings.row_class("mine.py:CoOp"), words)
