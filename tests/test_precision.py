"""Promise: what half precision leaves of training is measured as an independent computation does.

tests/data/half_moap_k3.npz was made for this project without its code: a text tower and a gate in
double precision, and SGD written in NumPy, whose every result is rounded to half or single. Inputs
are those of golden/traj_moap_k3, whose ten batches follow each other again and again.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT
from helpers.tiny import NAMES, error, golden, make, stored_clip

from fpl.audit import precision
from fpl.methods import PFedMoAP
from fpl.prompts import PromptTree
from fpl.released.methods import HalfPrecision
from fpl.rounds import Seeds, Setup, Training, train_locally
from fpl.state import Clients

KINDS = {"half": HalfPrecision, "single": PFedMoAP}


def trained(kind, z, steps):
    """Return what a golden file's client begins with, and what it has after some steps."""
    settings = {"n_ctx": int(z["n_ctx"]), "n_experts": int(z["num_experts"])}
    settings |= {"d_gate": int(z["d_gate"]), "heads": int(z["gate_heads"])}
    method = kind(**settings, lam=z["lmbda"].item(), gate_scale=z["scaling"].item())
    text = PromptTree(stored_clip(z), z["classnames"], method.n_ctx)
    feats = F.normalize(z["image_raw"], dim=-1)
    everything = [torch.arange(len(feats))]
    clients = Clients(feats, z["labels"], everything, everything, len(z["classnames"]))
    begin = {f"gate_{name[5:]}": v[:1] for name, v in z.items() if name.startswith("gate.")}
    begin["ctx"] = z["ctx"][:1]
    down = {"experts": z["expert_ctx"][None]}
    if kind is HalfPrecision:
        begin, down = ({k: v.half() for k, v in p.items()} for p in (begin, down))
    context = method.context(text, down, torch.tensor([0]), clients)
    setup = Setup(method, text, clients, Training(local_epochs=1))
    batches = z["batch_index"]
    order = torch.stack([batches[step % len(batches)] for step in range(steps)])
    ended, _ = train_locally(setup, begin, {"experts": context["experts"][[0]]}, {0: order})
    return begin, ended


@pytest.mark.parametrize("name", KINDS)
def test_movement_is_what_an_independent_computation_finds(name):
    with np.load(ROOT / "tests/data/half_moap_k3.npz") as stored:
        wanted = {k: stored[k] for k in stored.files if k != "source"}
    begin, ended = trained(KINDS[name], golden("traj_moap_k3"), int(wanted["steps"]))
    table = precision.movement(begin, ended)
    for tensor in begin:
        key = f"{name}.{tensor.removeprefix('gate_')}"
        changed, moved = table.loc[tensor]
        assert changed == pytest.approx(wanted[f"{key}.changed"], abs=0.01), tensor
        assert moved == pytest.approx(wanted[f"{key}.moved"], rel=0.01), tensor
        if name == "half":
            end = torch.from_numpy(wanted[f"{key}.end"])
            assert error(ended[tensor][0], end) < 0.01, f"{tensor}: roundings may fall otherwise"


def test_steps_that_are_too_small_are_lost_in_half_precision_alone():
    """The tensors without a gradient are moved by weight decay, a relative step of 5e-6."""
    z = golden("traj_moap_k3")
    share = {}
    for name, kind in KINDS.items():
        share[name] = precision.movement(*trained(kind, z, 25))["changed"]
    assert (share["half"][[*PFedMoAP.idle]] == 0).all()
    assert (share["single"] == 1).all()
    assert (share["half"][["gate_wq", "gate_wk"]] < 0.9).all()


def test_movement_by_hand():
    """Of two clients: one number of two changes by 3 of a norm of 5, then none."""
    begin = {"w": torch.tensor([[3.0, 4.0], [1.0, 1.0]]).half()}
    end = {"w": torch.tensor([[0.0, 4.0], [1.0, 1.0]]).half()}
    assert precision.movement(begin, end).loc["w"].tolist() == pytest.approx([0.25, 0.3])


def test_a_second_round_begins_with_the_average_and_the_own_gate(clip, clients):
    """And takes as many steps as asked, though the round has fewer."""
    method = make(PFedMoAP)
    text = PromptTree(clip, NAMES, method.n_ctx)
    seen = []

    class Counted(PFedMoAP):
        def loss(self, text, p, context, x, y):
            seen.append("experts" in context)
            return super().loss(text, p, context, x, y)

    counted = make(Counted)
    training = Training(rounds=2, local_epochs=2, batch_size=4)
    setup = Setup(counted, text, clients, training, Seeds())
    begin, end = precision.second_round(setup, 7)
    assert sum(seen) == 7 * len(clients), "with experts, each client"
    assert all(torch.equal(row, begin["ctx"][0]) for row in begin["ctx"])
    assert all(len(v) == len(clients) and not torch.equal(v, end[k]) for k, v in begin.items())
