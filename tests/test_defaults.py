"""Promise: a setting that nobody gives has the value that a paper or its released script prints.

The numbers stand here once more, by hand, so that one that slips in the code is seen.
"""

import dataclasses
import math

import pytest
import torch
from helpers.tiny import make
from torch.optim import SGD

from fpl import gate
from fpl.methods import METHODS, FedPGP, PFedMoAP, PromptFL
from fpl.prompts import PromptTree
from fpl.rounds import Training
from fpl.state import generator

# pFedMoAP's section 4.1 and its released code; FedOTP's and FedPGP's released scripts; Tip-Adapter.
PRINTED = {
    "promptfl": {"n_ctx": 16},
    "zeroshot": {"template": "a photo of a {}."},
    "finetuned": {"tune_epochs": 5},
    "fedper": {"n_base": 8},
    "fedprox": {"mu": 0.5},
    "fedamp": {"attraction": 1.0, "step": 1.0},
    "pfedprompt": {"blend": 1.0, "beta": 5.5, "memory": "test"},
    "fedotp": {"eps": 0.1, "gamma": 0.8, "transport": "unbalanced"},
    "fedpgp": {"rank": 8, "mu": 0.5, "tau": 0.5, "anchor": "a photo of a {}."},
    "pfedmoap": {
        "n_experts": 9,
        "lam": 0.5,
        "d_gate": 128,
        "heads": 8,
        "gate_scale": 10.0,
        "choice": "knn",
        "mixing": "attention",
        "gate_kept": "private",
        "pooling": "stride",
        "tested": "before",
    },
}
LOOP = {
    "rounds": 10,
    "local_epochs": 5,
    "batch_size": 16,
    "lr": 0.002,
    "gate_lr": 0.01,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "schedule": "constant",
    "optimiser": "fresh",
    "participation": 1.0,
    "precision": "single",
    "epsilon": 0.0,
    "delta": 0.05,
}


@pytest.mark.parametrize("name", METHODS)
def test_methods(name):
    method = METHODS[name]()
    assert method.n_ctx == 16
    for setting, value in PRINTED.get(name, {}).items():
        assert getattr(method, setting) == value, setting
    own = {field.name for field in dataclasses.fields(method)} - {"n_ctx"}
    assert own == PRINTED.get(name, {}).keys() - {"n_ctx"}


def test_the_loop():
    assert {name: getattr(Training(), name) for name in LOOP} == LOOP


@pytest.mark.parametrize(
    ("participation", "n", "picked"), [(1.0, 10, 10), (0.25, 30, 7), (0.1, 100, 10), (0.1, 5, 1)]
)
def test_a_share_of_clients_is_rounded_down_as_in_the_released_code(participation, n, picked):
    assert Training(participation=participation).participants(n) == picked


@pytest.mark.parametrize(("kind", "names"), [(PromptFL, ["ctx"]), (FedPGP, ["ctx", "u", "v"])])
def test_prompts_are_drawn_with_standard_deviation_one_fiftieth(kind, names, clip):
    text = PromptTree(clip, ["cat"], n_ctx=4)
    drawn = [kind(n_ctx=16).init(text, generator(seed, "init")) for seed in range(40)]
    for name in names:
        values = torch.stack([one[name] for one in drawn])
        assert values.std().item() == pytest.approx(0.02, rel=0.05), name
        assert abs(values.mean().item()) < 0.001


def test_a_gate_is_drawn_as_a_linear_layer_of_pytorch():
    drawn = gate.init(64, generator(1, "init"))
    bound = 1 / math.sqrt(64)
    for name, value in drawn.items():
        assert value.abs().max() <= bound, name
        assert value.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)


def test_steps_are_those_of_sgd_with_one_rate_for_prompts_and_one_for_gates(clip):
    method = make(PFedMoAP)
    begin = method.init(PromptTree(clip, ["cat"], n_ctx=4), generator(1, "init"))
    groups = [{"name": name, "params": [value]} for name, value in begin.items()]
    stepper = method.optimiser(groups, 0.9, 5e-4)
    assert type(stepper) is SGD and not stepper.defaults["nesterov"]
    assert {method.rate_group(name) for name in gate.names("attention")} == {"gate"}
    assert method.rate_group("ctx") == "prompt"
    assert (Training().rate("prompt", 0), Training().rate("gate", 0)) == (0.002, 0.01)
