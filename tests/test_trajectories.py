"""Promise: ten local steps from stored weights, in stored order, end where the released code ends."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import error, golden, stored_clip
from test_identities import read

from fpl.methods import PFedMoAP, PromptFL
from fpl.prompts import PromptTree
from fpl.rounds import Seeds, Training, evaluate, run_rounds, train_locally
from fpl.state import Clients, Server

LIMIT, MOVED, MOVED_BY_NOISE = 3e-4, 3e-3, 1e-2  # golden/README.md; the gradient of b_k, b_v, b_o is rounding noise


def train(name):
    """What `train_locally` does with a golden file: weights before step 1 and after every step, losses, and the last weights."""
    z = golden(name)
    with_gate, k = "gate.wq" in z, int(z["num_experts"])
    kind, before, losses = PFedMoAP if with_gate else PromptFL, [], []

    class Recorded(kind):
        def loss(self, text, p, f, x, y):
            before.append({name: v[0].detach().clone() for name, v in p.items()})
            losses.append(super().loss(text, p, f, x, y))
            return losses[-1]

    settings = {"n_experts": "num_experts", "lam": "lmbda", "d_gate": "d_gate", "heads": "gate_heads", "gate_scale": "scaling"}
    method = Recorded(n_ctx=int(z["n_ctx"]), **{ours: z[theirs].item() for ours, theirs in settings.items() if with_gate})
    feats, everyone = F.normalize(z["image_raw"], dim=-1), [torch.arange(len(z["labels"]))] * (k + 1)
    clients = Clients(feats, z["labels"], everyone, everyone, len(z["classnames"]))
    epochs, schedule = int(z.get("epochs", 1)), "zigzag" if name == "traj_moap_official_lr" else "constant"
    run = Training(local_epochs=epochs, weight_decay=z["weight_decay"].item(), schedule=schedule)  # the rest is our default
    per_epoch = len(z["batch_index"]) // epochs
    assert [run.rate("ctx", step // per_epoch) for step in range(len(z["lr_prompt"]))] == pytest.approx(z["lr_prompt"].tolist())
    assert z["momentum"] == run.momentum and (not with_gate or set(z["lr_gate"].tolist()) == {run.gate_lr})
    start = {"ctx": z["ctx"][:1], **{f"gate_{n[5:]}": v[:1] for n, v in z.items() if n.startswith("gate.")}}
    pool = torch.cat([start["ctx"], z["expert_ctx"]]) if k else start["ctx"]
    server = Server({"ctx": pool[0]}, {"ctx": pool}, torch.ones(k + 1, dtype=torch.bool))
    text = PromptTree(stored_clip(z), z["classnames"], method.n_ctx)
    frozen, order = read(method, text, server, torch.tensor([0]), clients), [z["batch_index"]]
    last, _ = train_locally(method, text, start, frozen, order, clients, run, lambda n: None)
    path = {name: torch.stack([w[name] for w in [*before, {k: v[0] for k, v in last.items()}]]) for name in last}
    return z, method, text, path, torch.stack(losses).detach()[:, 0], frozen, clients


@pytest.mark.parametrize(
    "name", ["traj_promptfl", "traj_moap_k3", "traj_moap_decay", "traj_moap_round0", "traj_moap_official_lr"]
)
def test_ten_steps_end_where_the_released_code_ends(name):
    z, method, text, path, losses, frozen, clients = train(name)
    assert error(losses, z["loss"]) < LIMIT
    assert error(path["ctx"], z["ctx"]) < LIMIT
    for tensor in path.keys() - {"ctx"}:
        stored, noise = z[tensor.replace("_", ".")], tensor[-2:] in ("bk", "bv", "bo")
        assert error(path[tensor], stored) < LIMIT, tensor
        if frozen:
            assert error(path[tensor] - path[tensor][0], stored - stored[0]) < (MOVED_BY_NOISE if noise else MOVED), tensor
    for at, key, limit in ((0, "logits_first", 5e-6), (-1, "logits_last", LIMIT)):
        p = {k: v[at][None] for k, v in path.items()}
        assert error(method.logits(text, method.encode(text, p), p, frozen, clients.feats[None])[0], z[key]) < limit
        assert torch.equal(evaluate(method, text, p, frozen, clients, [0])[0], z[key].argmax(-1) == z["labels"])


@pytest.mark.parametrize("name", ["traj_moap_k3", "traj_moap_decay"])
def test_experts_are_the_pooled_text_features_of_their_prompts(name):
    z, method, _, _, _, frozen, _ = train(name)
    nearest = (z["expert_ctx"] - z["ctx"][0]).flatten(1).norm(dim=1).argsort()
    assert error(frozen["experts"][0], z["experts_pooled"][nearest]) < 5e-6


@pytest.mark.parametrize(("schedule", "shares"), [("constant", [1, 1, 1, 1]), ("cosine", [1, 0.8535534, 0.5, 0.1464466])])
def test_the_rate_changes_once_an_epoch(schedule, shares):
    path = []

    class Slope(PromptFL):
        def loss(self, text, p, f, x, y):
            path.append(p["ctx"].item())
            return p["ctx"].flatten(1).sum(1)  # gradient 1

    clients = Clients(torch.ones(2, 1), torch.zeros(2, dtype=torch.long), [torch.arange(2)], [torch.arange(2)], 1)
    run = Training(local_epochs=4, lr=0.1, momentum=0.0, weight_decay=0.0, schedule=schedule)
    order = [torch.zeros(12, 2, dtype=torch.long)]  # three steps an epoch
    last, _ = train_locally(Slope(), None, {"ctx": torch.ones(1, 1, 1)}, {}, order, clients, run, lambda n: None)
    steps = -torch.tensor([*path, last["ctx"].item()]).diff()
    assert torch.allclose(steps, 0.1 * torch.tensor(shares).repeat_interleave(3), atol=1e-6)


def test_without_experts_the_gate_stays_as_it_was_to_the_bit():
    _, _, _, path, _, frozen, _ = train("traj_moap_round0")
    assert not frozen and len(path) == 9
    assert all(torch.equal(v[-1], v[0]) for k, v in path.items() if k != "ctx")
    assert not torch.equal(path["ctx"][-1], path["ctx"][0])


def test_views_of_an_image_come_one_after_the_other_epoch_by_epoch():
    gen, seen = torch.Generator().manual_seed(0), []
    views, place = torch.randn(3, 4, 2, generator=gen), torch.tensor([2, 0, -1, 1])  # image 2 is for testing and has none
    train = [torch.tensor([0, 1]), torch.tensor([3, 1])]
    clients = Clients(torch.zeros(4, 2), torch.zeros(4).long(), train, [torch.tensor([2])] * 2, 1, None, views, place)

    class Watched(PromptFL):
        def loss(self, text, p, f, x, y):
            seen.append(x)
            return p["ctx"].flatten(1).sum(1)

        def init(self, text, gen):
            return {"ctx": torch.ones(1, 1)}

        def logits(self, text, t, p, f, x):
            assert torch.equal(x, torch.zeros(1, 1, 2)), "evaluation is with the image itself"
            return x[..., :1]

        def encode(self, text, p):
            return None

    cfg = Training(rounds=2, local_epochs=3, batch_size=2)
    list(run_rounds(Watched(), SimpleNamespace(at_once=2), clients, cfg, Seeds()))
    assert len(seen) == 6
    for epoch, x in enumerate(seen):
        for i in (0, 1):
            assert {tuple(v) for v in x[i].tolist()} == {tuple(v) for v in views[place[train[i]], epoch % 4].tolist()}
