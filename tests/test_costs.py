"""Promise: numbers up and down are what really travels.

For ViT-B/16 they are those of the cost model.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from helpers.runs import HALF, play
from helpers.tiny import NAMES, make

from fpl import rounds
from fpl.ablations import OwnGate
from fpl.controls import CONTROLS
from fpl.methods import METHODS, FedOTP, FedPGP, PFedMoAP
from fpl.prompts import PromptTree
from fpl.released.methods import RELEASED, ReleasedFedPGP
from fpl.rounds import Training
from fpl.state import Clients

P = 16 * 512
GATE = 4 * (128 * 128 + 128)
# method: up, down in the first round, down in a later one (K experts are there), kept by the client
MODEL = {
    "zeroshot": (0, 0, 0, 0),
    "coop": (0, 0, 0, P),
    "promptfl": (P, P, P, 0),
    "finetuned": (P, P, P, 0),
    "fedper": (P // 2, P // 2, P // 2, P // 2),
    "fedprox": (P, P, P, 0),
    "fedamp": (P, P + 1, P + 1, 0),  # u_i, and how strongly it pulls
    "pfedprompt": (P, P, P, 0),
    "fedotp": (P, P, P, P),
    "fedpgp": (P, P, P, 8 * (16 + 512)),
    "pfedmoap": (P, P, 10 * P, GATE),
}
AGGREGATED = PFedMoAP(gate_kept="aggregated")
VARIANTS = {
    "FedPGP of rank 4": (FedPGP(rank=4), P, P, P, 2112),
    "FedPGP with two prompts": (ReleasedFedPGP(), 2 * P, 2 * P, 2 * P, 2 * 4224),
    "pFedMoAP with 19 experts": (PFedMoAP(n_experts=19), P, P, 20 * P, GATE),
    "pFedMoAP, gate aggregated": (AGGREGATED, P + GATE, P + GATE, 10 * P + GATE, 0),
    "the gate without experts": (OwnGate(n_experts=5), P, P, P, GATE),
    "FedOTP with 4 vectors": (FedOTP(n_ctx=4), 2048, 2048, 2048, 2048),
}


class Tower:
    """A text tower with the widths of CLIP ViT-B/16 that costs nothing.

    The features of its two classes are parts of the prompt.
    """

    width = dim = 512
    n_cls = 2
    scale = 1.0
    at_once = 10

    def __call__(self, ctx):
        return F.normalize(ctx[..., :2, :], dim=-1)

    def zero_shot(self, template):
        return torch.eye(512)[:2]

    def words(self, text):
        return torch.ones(1, 512)


def measured(method, n=20):
    parts = torch.arange(2 * n).split(2)
    patches = torch.randn(2 * n, 3, 512)
    feats = F.normalize(patches[:, 0], dim=-1)
    clients = Clients(feats, torch.arange(2 * n) % 2, parts, parts, 2, patches)
    training = Training(rounds=2, local_epochs=1, **method.training)
    results = list(rounds.run_rounds(rounds.Setup(method, Tower(), clients, training)))
    init = method.init(Tower(), torch.Generator())
    kept = sum(v.numel() for k, v in init.items() if k not in method.shared)
    for r in results:
        assert len(set(r.up.tolist())) == len(set(r.down.tolist())) == 1
        assert len(r.up) == len(r.down) == n
    return results[0].up[0], results[0].down[0], results[-1].down[0], kept


@pytest.mark.parametrize("name", MODEL)
def test_the_default_methods_cost_what_the_model_says(name):
    assert set(MODEL) == set(METHODS)
    assert measured(METHODS[name]()) == MODEL[name]


@pytest.mark.parametrize(
    ("method", "up", "first", "later", "kept"), VARIANTS.values(), ids=VARIANTS
)
def test_variants_cost_what_the_model_says(method, up, first, later, kept):
    assert measured(method) == (up, first, later, kept)


@pytest.mark.parametrize("name", [*METHODS, *CONTROLS, *RELEASED])
def test_what_goes_up_is_counted_tensor_by_tensor(name, clip, clients):
    method = make({**METHODS, **CONTROLS, **RELEASED}[name])
    training = dataclasses.replace(HALF, **method.training)
    log = play(method, PromptTree(clip, NAMES, method.n_ctx), clients, training)
    for r, uploads in zip(log.rounds, log.uploads, strict=True):
        assert r.up.tolist() == [sum(v[0].numel() for v in uploads.values())] * len(r.participants)


def test_a_client_without_an_upload_gets_no_experts(text, clients):
    log = play(make(PFedMoAP), text, clients, HALF)
    uploaded = set()
    one = 4 * text.width
    for r in log.rounds:
        k = min(2, len(uploaded) - 1) if uploaded else 0
        who = r.participants.tolist()
        assert r.down.tolist() == [one * (1 + k * (i in uploaded)) for i in who]
        uploaded |= set(who)
