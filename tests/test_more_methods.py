"""Promise: `fpl check` finds the methods of papers whole, newer ones in every form they have."""

from dataclasses import dataclass

import pytest
import torch
from helpers.runs import SIZES, play
from helpers.tiny import make

from fpl import rounds
from fpl.experiments import promises
from fpl.methods import METHODS, PFedMoAP
from fpl.more_methods import MORE
from fpl.more_methods.private import DPFPL

FORMS = [(row, {}) for row in {**METHODS, **MORE}] + [
    ("prograd", {"rule": "flip"}),
    ("afl", {"gamma": 0.0}),
    ("fedclip", {"contrast": "class"}),
    ("dpfpl", {"factorization": "fedpgp"}),
    ("dpfpl", {"factorization": "dplora", "sign": -1}),
    ("dpfpl", {"bound": 1.0, "noise": 0.5}),
]


@pytest.mark.parametrize(("row", "settings"), FORMS)
def test_they_keep_the_promises_of_all_methods(row, settings):
    kind = {**METHODS, **MORE}[row]
    sizes = {name: n for name, n in SIZES.items() if name in kind.__dataclass_fields__}
    assert not promises.check(kind, sizes | settings)


@dataclass(frozen=True)
class InOrder(PFedMoAP):
    """pFedMoAP that looks at its first expert once more."""

    def logits(self, text, t, p, context, x):
        first = context["experts"][:, :1] if "experts" in context else torch.zeros(1)
        return super().logits(text, t, p, context, x) + first.sum()


def test_a_method_that_depends_on_the_order_of_experts_is_told():
    (said,) = promises.check(InOrder, {"n_ctx": 2, "d_gate": 16, "heads": 4})
    assert "the order of experts does not matter: logits differs" in said


def test_noise_of_a_step_is_never_drawn_again(text, clients, monkeypatch):
    """Else the difference of two rounds' uploads would have none."""
    drawn, made = [], rounds.normals

    def noted(like, seed, client_ids, numbers, name, *shape):
        drawn.extend((name, *numbers, i) for i in client_ids)
        return made(like, seed, client_ids, numbers, name, *shape)

    monkeypatch.setattr(rounds, "normals", noted)
    play(make(DPFPL, bound=1.0, noise=0.5), text, clients)
    streams = len({name for name, *_ in drawn})
    assert len({*drawn}) == len(drawn) > 2 * streams * len(clients)
