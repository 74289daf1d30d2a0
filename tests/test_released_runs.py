"""Promise: whole runs of the released code come out of our loop and released rows, step by step."""

import dataclasses
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers.runs import like
from helpers.tiny import error, golden, stored_clip

from fpl import methods, rounds
from fpl.prompts import PromptTree
from fpl.released import methods as released
from fpl.rounds import Training
from fpl.state import Clients

LIMIT = 1e-4
GATE = {f"gate_{part}": part for part in ("wq", "bq", "wk", "bk", "wv", "bv", "wo", "bo")}


@dataclass(frozen=True)
class ReleasedOnePrompt(released.InTurn, released.PlaceholderAnchor):
    """FedPGP as released, but for the second prompt of its script."""

    training = {"optimiser": "shared"}


def promptfl(z):
    return released.ReleasedPromptFL(int(z["n_ctx"])), {"ctx": z["ctx_init"]}


def pfedmoap(z):
    settings = {"lam": "lmbda", "d_gate": "d_gate", "heads": "gate_heads", "gate_scale": "scaling"}
    # the released number counts the local expert
    k = min(int(z["num_experts"]), int(z["num_users"])) - 1
    stored = {ours: z[theirs].item() for ours, theirs in settings.items()}
    method = released.ReleasedPFedMoAP(int(z["n_ctx"]), k, **stored)
    drawn = {ours: z[f"gate_init.{theirs}"] for ours, theirs in GATE.items()}
    return method, {"ctx": z["ctx_init"], **drawn}


def fedotp(z):
    method = released.ReleasedFedOTP(int(z["n_ctx"]), eps=z["eps"].item(), gamma=z["gamma"].item())
    return method, dict(zip(("ctx", "local"), z["init.ctx"], strict=True))


def fedpgp(z):
    two = int(z["num_prompt"]) == 2
    kind = released.ReleasedFedPGP if two else ReleasedOnePrompt
    settings = {"rank": int(z["bottleneck"]), "mu": z["mu"].item(), "tau": z["tau"].item()}
    names = {"ctx": "sigma", "u": "U", "v": "V"}
    drawn = {ours: z[f"init.{theirs}"] for ours, theirs in names.items()}
    if not two:
        drawn = {name: value[0] for name, value in drawn.items()}
    return kind(int(z["n_ctx"]), **settings), drawn


MAKE = {
    "e2e_promptfl_official": promptfl,
    "e2e_pfedmoap_official": pfedmoap,
    "e2e_fedotp_official": fedotp,
    "e2e_fedpgp_official": fedpgp,
    "e2e_fedpgp_official_np2": fedpgp,
}


def clients_of(z):
    """Return clients whose images are those for training of all clients, then those for testing.

    Features of FedOTP have the pooled token in front of the patches.
    """
    n = range(int(z["num_users"]))
    names = [f"client{i}." for i in n] + [f"client{i}.test_" for i in n]
    images = torch.cat([z[f"{name}image"] for name in names])
    labels = torch.cat([z[f"{name}label"] for name in names])
    parts = torch.arange(len(labels)).split([len(z[f"{name}label"]) for name in names])
    tokens = images.ndim == 3
    feats = F.normalize(images[:, 0] if tokens else images, dim=-1)
    patches = images[:, 1:] if tokens else None
    return Clients(feats, labels, parts[: len(n)], parts[len(n) :], len(z["classnames"]), patches)


def recorded(method, init):
    """Return the method with stored initial values, and a log of training and evaluation."""
    log = SimpleNamespace(start=[], end=[], loss=[], server=[], logits=[])

    class Recorded(type(method)):
        def init(self, text, gen):
            return init

        def start(self, local, down):
            log.start.append(super().start(local, down))
            return log.start[-1]

        def loss(self, text, p, context, x, y):
            log.loss.append(super().loss(text, p, context, x, y))
            return log.loss[-1]

        def logits(self, text, t, p, context, x):
            z = super().logits(text, t, p, context, x)
            if not torch.is_grad_enabled():
                log.logits.append(z[0])
            return z

        def after_cohort(self, server, client_ids, local):
            if len(client_ids):
                log.end.append({k: v[client_ids[0]] for k, v in local.items()})
            else:
                log.start.pop()  # of clients that were not drawn
            return super().after_cohort(server, client_ids, local)

        def aggregate(self, server, client_ids, uploads, sizes):
            log.server.append(super().aggregate(server, client_ids, uploads, sizes))
            return log.server[-1]

    return like(Recorded, method), log


def as_stored(z, monkeypatch):
    """Let clients, batches and fixed experts be those of a golden file; return who trains when."""
    n = int(z["num_users"])
    epochs = int(z["local_epochs"])
    visits = dict.fromkeys(range(n), 0)
    orders = list(z["order"])
    if "order_offsets" in z:
        ends = z["order_offsets"].tolist()
        orders = [z["order"][a:b] for a, b in pairwise(ends)]

    def stored_batches(setup, client, number, stream):
        first = visits[client] * epochs
        visits[client] += 1
        return setup.clients.train[client][
            z[f"client{client}.batches"][first : first + epochs].flatten(0, 1)
        ]

    monkeypatch.setattr(rounds, "select", lambda n, training, seed, number: orders[number])
    monkeypatch.setattr(rounds, "batches", stored_batches)
    if "permutation" in z:
        places = z["permutation"].argsort().float().repeat(n, 1)
        monkeypatch.setitem(methods.CHOICES, "fixed", lambda server, clients: places)
    return orders


def play(z, monkeypatch):
    """Return what a golden file stores, as it comes out of our loop: name -> list of tensors."""
    method, init = MAKE[z["file"]](z)
    text = PromptTree(stored_clip(z), z["classnames"], method.n_ctx)
    clients = clients_of(z)
    n = len(clients)
    epochs = int(z["local_epochs"])
    orders = as_stored(z, monkeypatch)
    watched, log = recorded(method, init)
    lr = z["lr"].item() if "lr" in z else 0.002
    training = Training(int(z["rounds"]), epochs, int(z["batch"]), lr, **method.training)
    before = 0
    found = {"lr_start": [], "test_accuracy": [], "test_macro_f1": []}
    run = rounds.run_rounds(rounds.Setup(watched, text, clients, training))
    for result, order in zip(run, orders, strict=True):
        assert result.participants.tolist() == sorted(order.tolist())
        for _ in order:
            found["lr_start"].append(torch.tensor(training.rate("prompt", 0, before)))
            before += epochs
        found["test_accuracy"].append(100 * result.accuracy)
        tested = torch.cat(watched.cohorts(log.server[-1], order)).tolist()  # in this order
        log.logits[-n:] = [log.logits[-n:][tested.index(i)] for i in range(n)]
        scores = [macro_f1(z[f"client{i}.test_label"], log.logits[i - n]) for i in range(n)]
        found["test_macro_f1"].append(torch.stack(scores))
    return found | {"loss": log.loss, "test_logits": log.logits} | named(z, log)


def macro_f1(truth, logits):
    """Return it in percent, over the classes that occur in the truth."""
    guess = logits.argmax(-1)
    scores = []
    for c in truth.unique():
        right = ((guess == c) & (truth == c)).sum().double()
        scores.append(2 * right / ((guess == c).sum() + (truth == c).sum()))
    return 100 * torch.stack(scores).double().mean()


def named(z, log):
    """Return the tensors under the names that the file gives them."""
    shared = [server.params["ctx"] for server in log.server]
    first = [{k: v[0] for k, v in p.items()} for p in log.start]
    if "ctx_start" in z:
        found = {"ctx_start": [p["ctx"] for p in first], "global_ctx": shared}
        found["ctx_end"] = [p["ctx"] for p in log.end]
        if "gate_end.wq" in z:
            for ours, theirs in GATE.items():
                found[f"gate_end.{theirs}"] = [p[ours] for p in log.end]
        return found
    found = {"global_part": [value.view_as(z["global_part"][0]) for value in shared]}
    for prefix, tensors in (("start.", first), ("end.", log.end)):
        if "start.ctx" in z:
            found[f"{prefix}ctx"] = [torch.stack([p["ctx"], p["local"]]) for p in tensors]
            continue
        for theirs, ours in {"sigma": "ctx", "U": "u", "V": "v"}.items():
            found[prefix + theirs] = [p[ours].view_as(z[prefix + theirs][0]) for p in tensors]
    return found


def failing(z, found):
    """Return the names of arrays of which some piece is not the stored one."""
    scales = {"lr_start": 1.0, "test_accuracy": 100.0, "test_macro_f1": 100.0}
    scales["loss"] = z["loss"].abs().max()
    limits = {"lr_start": 1e-9, "test_accuracy": 1e-6, "test_macro_f1": 1e-6}
    wrong = []
    for name, pieces in found.items():
        shape = pieces[0].shape
        stored = z[name].reshape(len(pieces), *shape) if shape else z[name].flatten()
        pairs = zip(pieces, stored, strict=True)
        errors = [error(a.detach(), b, scales.get(name)) for a, b in pairs]
        if not all(e <= limits.get(name, LIMIT) for e in errors):
            wrong.append(name)
    return wrong


@pytest.fixture(scope="module", params=MAKE)
def case(request):
    """A golden file and what our loop makes of it."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        z = {**golden(request.param), "file": request.param}
        return z, play(z, monkeypatch)


def test_the_run_is_the_released_one_at_every_step(case):
    z, found = case
    assert failing(z, found) == []
    outputs = ("start.", "end.", "ctx_", "gate_end", "global_", "test_", "loss", "lr_start")
    stored = {k for k in z if k.startswith(outputs)}
    assert found.keys() == stored - {"ctx_init"}


def test_a_perturbed_value_fails(case):
    z, found = case
    for name in found:
        changed = z[name].clone().view(-1)
        changed[changed.abs().argmax()] *= 1.01
        assert failing({**z, name: changed.view_as(z[name])}, found) == [name]


INPUTS = ["client0.image", "client0.label", "client1.batches", "client0.test_image"]
INPUTS += ["sd.text_projection", "emb_rows"]


@pytest.mark.parametrize("name", MAKE)
def test_a_perturbed_input_fails(name, monkeypatch):
    z = {**golden(name), "file": name}
    for key in INPUTS:
        if z[key].is_floating_point():
            wave = torch.arange(z[key].numel()).cos().view_as(z[key])
            changed = z[key] + 0.05 * z[key].abs().max() * wave
        else:
            changed = z[key].flip(0).flip(-1).roll(1)
        with monkeypatch.context() as patch:
            assert failing(z, play({**z, key: changed}, patch)), key


BOTH = {"optimiser": "shared", "schedule": "zigzag"}
WITHOUT = {
    "D6, experts": ((released.LeakingGate, released.LivePool), BOTH),
    "D7, pool": ((released.FixedExperts, released.LeakingGate), BOTH),
    "D8, gate": ((released.FixedExperts, released.LivePool), BOTH),
    "D8, velocity": ((released.ReleasedPFedMoAP,), {"schedule": "zigzag"}),
    "D9, schedule": ((released.ReleasedPFedMoAP,), {"optimiser": "shared"}),
}


@pytest.mark.parametrize(("bases", "training"), WITHOUT.values(), ids=WITHOUT)
def test_without_any_one_quirk_the_run_is_another(bases, training, monkeypatch):
    z = {**golden("e2e_pfedmoap_official"), "file": "e2e_pfedmoap_official"}
    whole, init = pfedmoap(z)
    fields = {f.name: getattr(whole, f.name) for f in dataclasses.fields(whole)}
    del fields["choice"]
    other = type("Other", bases, {"training": training})(**fields)
    monkeypatch.setitem(MAKE, z["file"], lambda z: (other, init))
    assert set(failing(z, play(z, monkeypatch))) >= {"ctx_end", "loss", "test_logits"}
