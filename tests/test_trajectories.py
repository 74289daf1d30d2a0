"""Promise: ten local steps from stored weights, in stored order, end where the release ends."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers.runs import read
from helpers.tiny import error, golden, stored_clip

from fpl.methods import PFedMoAP, PromptFL
from fpl.prompts import PromptTree
from fpl.rounds import Setup, Training, evaluate, run_rounds, train_locally
from fpl.state import Clients, Server

# golden/README.md; the gradient of b_k, b_v, b_o is rounding noise
LIMIT = 3e-4
MOVED = 3e-3
MOVED_BY_NOISE = 1e-2
FILES = ["promptfl", "moap_k3", "moap_decay", "moap_round0", "moap_official_lr"]
THEIRS = {"lam": "lmbda", "heads": "gate_heads", "gate_scale": "scaling"}


def recorded(z):
    """Return the method of a golden file, and what it sees of its training."""
    log = SimpleNamespace(tensors=[], losses=[])
    with_gate = "gate.wq" in z

    class Recorded(PFedMoAP if with_gate else PromptFL):
        def loss(self, text, p, context, x, y):
            log.tensors.append({name: v[0].detach().clone() for name, v in p.items()})
            log.losses.append(super().loss(text, p, context, x, y))
            return log.losses[-1]

    settings = {"n_ctx": int(z["n_ctx"])}
    if with_gate:
        settings |= {"n_experts": int(z["num_experts"]), "d_gate": int(z["d_gate"])}
        settings |= {ours: z[theirs].item() for ours, theirs in THEIRS.items()}
    return Recorded(**settings), log


def training_of(z, name):
    """Return how a golden file trains; what it does not say is our default."""
    epochs = int(z.get("epochs", 1))
    schedule = "zigzag" if name == "moap_official_lr" else "constant"
    decay = z["weight_decay"].item()
    training = Training(local_epochs=epochs, weight_decay=decay, schedule=schedule)
    per_epoch = len(z["batch_index"]) // epochs
    rates = [training.rate("prompt", step // per_epoch) for step in range(len(z["lr_prompt"]))]
    assert rates == pytest.approx(z["lr_prompt"].tolist())
    assert z["momentum"] == training.momentum
    if "gate.wq" in z:
        assert set(z["lr_gate"].tolist()) == {training.gate_lr}
    return training


def train(name):
    """Return what `train_locally` does with a golden file.

    path: weights before the first step and after every step.
    """
    z = golden(f"traj_{name}")
    k = int(z["num_experts"])
    method, log = recorded(z)
    feats = F.normalize(z["image_raw"], dim=-1)
    everyone = [torch.arange(len(z["labels"]))] * (k + 1)
    clients = Clients(feats, z["labels"], everyone, everyone, len(z["classnames"]))
    start = {f"gate_{name[5:]}": v[:1] for name, v in z.items() if name.startswith("gate.")}
    start["ctx"] = z["ctx"][:1]
    uploads = torch.cat([start["ctx"], z["expert_ctx"]]) if k else start["ctx"]
    seen = torch.ones(k + 1, dtype=torch.bool)
    server = Server({"ctx": uploads[0]}, {"ctx": uploads}, seen, seen)
    text = PromptTree(stored_clip(z), z["classnames"], method.n_ctx)
    context = read(method, text, server, torch.tensor([0]), clients)
    setup = Setup(method, text, clients, training_of(z, name))
    last, _ = train_locally(setup, start, context, {0: z["batch_index"]})
    steps = [*log.tensors, {name: value[0] for name, value in last.items()}]
    path = {name: torch.stack([step[name] for step in steps]) for name in last}
    losses = torch.stack(log.losses).detach()[:, 0]
    return SimpleNamespace(z=z, setup=setup, path=path, losses=losses, context=context)


@pytest.mark.parametrize("name", FILES)
def test_ten_steps_end_where_the_released_code_ends(name):
    ran = train(name)
    z = ran.z
    assert error(ran.losses, z["loss"]) < LIMIT
    assert error(ran.path["ctx"], z["ctx"]) < LIMIT
    for tensor in ran.path.keys() - {"ctx"}:
        found = ran.path[tensor]
        stored = z[tensor.replace("_", ".")]
        assert error(found, stored) < LIMIT, tensor
        if ran.context:
            moved = MOVED_BY_NOISE if tensor in PFedMoAP.idle else MOVED
            assert error(found - found[0], stored - stored[0]) < moved, tensor


@pytest.mark.parametrize(("at", "key", "limit"), [(0, "first", 5e-6), (-1, "last", LIMIT)])
@pytest.mark.parametrize("name", FILES)
def test_what_was_trained_classifies_as_the_released_code_does(name, at, key, limit):
    ran = train(name)
    method, text, clients = ran.setup.method, ran.setup.text, ran.setup.clients
    stored = ran.z[f"logits_{key}"]
    p = {k: v[at][None] for k, v in ran.path.items()}
    t = method.encode(text, p, ran.context)
    logits = method.logits(text, t, p, ran.context, clients.feats[None])[0]
    assert error(logits, stored) < limit
    found = evaluate(method, text, p, ran.context, clients, torch.tensor([0]))[0]
    assert torch.equal(found.right, stored.argmax(-1) == ran.z["labels"])
    assert torch.equal(found.predicted, stored.argmax(-1))
    # of our logits: by how much a share of those stored may differ depends on their size
    assert error(found.confidence, logits.softmax(-1).amax(-1)) < 5e-6


@pytest.mark.parametrize("name", ["moap_k3", "moap_decay"])
def test_experts_are_the_pooled_text_features_of_their_prompts(name):
    ran = train(name)
    away = ran.z["expert_ctx"] - ran.z["ctx"][0]
    nearest = away.flatten(1).norm(dim=1).argsort()
    assert error(ran.context["experts"][0], ran.z["experts_pooled"][nearest]) < 5e-6


@pytest.mark.parametrize(
    ("schedule", "shares"), [("constant", [1, 1, 1, 1]), ("cosine", [1, 0.8535534, 0.5, 0.1464466])]
)
def test_the_rate_changes_once_an_epoch(schedule, shares):
    path = []

    class Slope(PromptFL):
        def loss(self, text, p, context, x, y):
            path.append(p["ctx"].item())
            return p["ctx"].flatten(1).sum(1)  # gradient 1

    both = [torch.arange(2)]
    clients = Clients(torch.ones(2, 1), torch.zeros(2, dtype=torch.long), both, both, 1)
    training = Training(local_epochs=4, lr=0.1, momentum=0.0, weight_decay=0.0, schedule=schedule)
    setup = Setup(Slope(), None, clients, training)
    order = {0: torch.zeros(12, 2, dtype=torch.long)}  # three steps an epoch
    last, _ = train_locally(setup, {"ctx": torch.ones(1, 1, 1)}, {}, order)
    steps = -torch.tensor([*path, last["ctx"].item()]).diff()
    assert torch.allclose(steps, 0.1 * torch.tensor(shares).repeat_interleave(3), atol=1e-6)


def test_without_experts_the_gate_stays_as_it_was_to_the_bit():
    ran = train("moap_round0")
    assert not ran.context and len(ran.path) == 9
    assert all(torch.equal(v[-1], v[0]) for k, v in ran.path.items() if k != "ctx")
    assert not torch.equal(ran.path["ctx"][-1], ran.path["ctx"][0])


def test_views_of_an_image_come_one_after_the_other_epoch_by_epoch():
    gen = torch.Generator().manual_seed(0)
    views = torch.randn(3, 4, 2, generator=gen)
    place = torch.tensor([2, 0, -1, 1])  # image 2 is for testing and has none
    train = [torch.tensor([0, 1]), torch.tensor([3, 1])]
    test = [torch.tensor([2])] * 2
    labels = torch.zeros(4).long()
    clients = Clients(torch.zeros(4, 2), labels, train, test, 1, None, views, place)
    seen = []

    class Watched(PromptFL):
        def loss(self, text, p, context, x, y):
            seen.append(x)
            return p["ctx"].flatten(1).sum(1)

        def init(self, text, gen):
            return {"ctx": torch.ones(1, 1)}

        def logits(self, text, t, p, context, x):
            assert torch.equal(x, torch.zeros(1, 1, 2)), "evaluation is with the image itself"
            return x[..., :1]

        def encode(self, text, p, context):
            return None

    training = Training(rounds=2, local_epochs=3, batch_size=2)
    list(run_rounds(Setup(Watched(), SimpleNamespace(at_once=2), clients, training)))
    assert len(seen) == 6
    for epoch, x in enumerate(seen):
        for i in (0, 1):
            wanted = views[place[train[i]], epoch % 4].tolist()
            assert sorted(x[i].tolist()) == sorted(wanted)


def test_a_cosine_is_of_the_gate_too():
    training = Training(local_epochs=4, lr=0.1, gate_lr=0.2, schedule="cosine")
    prompt, gate = ([training.rate(of, epoch) for epoch in range(4)] for of in ("prompt", "gate"))
    assert gate == pytest.approx([2 * rate for rate in prompt])
    assert prompt == pytest.approx([0.1, 0.08535534, 0.05, 0.01464466])
