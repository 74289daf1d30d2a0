"""Promise: whole federated runs of the released code come out of our loop and our released rows, at every step."""

import dataclasses
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import error, golden, stored_clip

from fpl import methods, rounds
from fpl.prompts import PromptTree
from fpl.released import methods as released
from fpl.rounds import Seeds, Training
from fpl.state import Clients

LIMIT = 1e-4
GATE = {f"gate_{part}": part for part in ("wq", "bq", "wk", "bk", "wv", "bv", "wo", "bo")}


@dataclass(frozen=True)
class ReleasedOnePrompt(released.InTurn, released.PlaceholderAnchor):
    """FedPGP as released, but for the second prompt of its script."""

    run = {"optimiser": "shared"}


def promptfl(z):
    return released.ReleasedPromptFL(int(z["n_ctx"])), {"ctx": z["ctx_init"]}


def pfedmoap(z):
    settings = {"lam": "lmbda", "d_gate": "d_gate", "heads": "gate_heads", "gate_scale": "scaling"}
    k = min(int(z["num_experts"]), int(z["num_users"])) - 1  # the released number counts the local expert
    method = released.ReleasedPFedMoAP(int(z["n_ctx"]), k, **{ours: z[theirs].item() for ours, theirs in settings.items()})
    return method, {"ctx": z["ctx_init"], **{ours: z[f"gate_init.{theirs}"] for ours, theirs in GATE.items()}}


def fedotp(z):
    method = released.ReleasedFedOTP(int(z["n_ctx"]), eps=z["eps"].item(), gamma=z["gamma"].item())
    return method, dict(zip(("ctx", "local"), z["init.ctx"], strict=True))


def fedpgp(z):
    two = int(z["num_prompt"]) == 2
    kind = released.ReleasedFedPGP if two else ReleasedOnePrompt
    method = kind(int(z["n_ctx"]), rank=int(z["bottleneck"]), mu=z["mu"].item(), tau=z["tau"].item())
    names = {"ctx": "sigma", "u": "U", "v": "V"}
    return method, {ours: z[f"init.{theirs}"][slice(None) if two else 0] for ours, theirs in names.items()}


MAKE = {
    "e2e_promptfl_official": promptfl,
    "e2e_pfedmoap_official": pfedmoap,
    "e2e_fedotp_official": fedotp,
    "e2e_fedpgp_official": fedpgp,
    "e2e_fedpgp_official_np2": fedpgp,
}


def clients_of(z):
    """Training images of all clients, then test images; features of FedOTP have the pooled token in front of the patches."""
    n = range(int(z["num_users"]))
    keys = [(f"client{i}.{part}image", f"client{i}.{part}label") for part in ("", "test_") for i in n]
    images, labels = (torch.cat(parts) for parts in zip(*((z[image], z[label]) for image, label in keys), strict=True))
    parts = torch.arange(len(labels)).split([len(z[label]) for _, label in keys])
    tokens = images.ndim == 3
    feats = F.normalize(images[:, 0] if tokens else images, dim=-1)
    return Clients(feats, labels, parts[: len(n)], parts[len(n) :], len(z["classnames"]), images[:, 1:] if tokens else None)


def recorded(method, init):
    """The method with stored initial values, and a log of what goes in and comes out of training and evaluation."""
    log = SimpleNamespace(start=[], end=[], loss=[], server=[], logits=[])

    class Recorded(type(method)):
        def init(self, text, gen):
            return init

        def start(self, own, down):
            log.start.append(super().start(own, down))
            return log.start[-1]

        def loss(self, text, p, f, x, y):
            log.loss.append(super().loss(text, p, f, x, y))
            return log.loss[-1]

        def logits(self, text, t, p, f, x):
            z = super().logits(text, t, p, f, x)
            if not torch.is_grad_enabled():
                log.logits.append(z[0])
            return z

        def between(self, server, who, own):
            if len(who):
                log.end.append({k: v[who[0]] for k, v in own.items()})
            else:
                log.start.pop()  # of clients that were not drawn
            return super().between(server, who, own)

        def aggregate(self, server, who, uploads, sizes):
            log.server.append(super().aggregate(server, who, uploads, sizes))
            return log.server[-1]

    return Recorded(**{f.name: getattr(method, f.name) for f in dataclasses.fields(method)}), log


def play(z, monkeypatch):
    """Everything that a golden file stores, as it comes out of our loop: name -> list of tensors."""
    method, init = MAKE[z["file"]](z)
    text, clients = PromptTree(stored_clip(z), z["classnames"], method.n_ctx), clients_of(z)
    n, epochs, visits = len(clients), int(z["local_epochs"]), {}
    if "order_offsets" in z:
        orders = [z["order"][a:b] for a, b in zip(z["order_offsets"], z["order_offsets"][1:], strict=False)]
    else:
        orders = list(z["order"])

    def stored_batches(index, run, seed, number, client, stream):
        at = visits[client] = visits.get(client, -1) + 1
        return index[z[f"client{client}.batches"][at * epochs : (at + 1) * epochs].flatten(0, 1)]

    monkeypatch.setattr(rounds, "select", lambda n, r, seed, number: orders[number])
    monkeypatch.setattr(rounds, "batches", stored_batches)
    if "permutation" in z:
        places = z["permutation"].argsort().float()
        monkeypatch.setitem(methods.CHOICES, "fixed", lambda server, clients: places.repeat(n, 1))
    lr = z["lr"].item() if "lr" in z else 0.002
    watched, log = recorded(method, init)
    cfg = Training(int(z["rounds"]), epochs, int(z["batch"]), lr, **method.run)
    before, found = 0, {"lr_start": [], "test_accuracy": [], "test_macro_f1": []}
    for result, order in zip(rounds.run_rounds(watched, text, clients, cfg, Seeds()), orders, strict=True):
        assert result.participants.tolist() == sorted(order.tolist())
        found["lr_start"] += [torch.tensor(cfg.rate("ctx", 0, before + epochs * j)) for j in range(len(order))]
        before += epochs * len(order)
        found["test_accuracy"].append(100 * result.accuracy)
        tested = [i for who in watched.cohorts(log.server[-1], order) for i in who.tolist()]  # in this order
        log.logits[-n:] = [log.logits[-n:][tested.index(i)] for i in range(n)]
        found["test_macro_f1"].append(torch.stack([macro_f1(z[f"client{i}.test_label"], log.logits[i - n]) for i in range(n)]))
    return found | {"loss": log.loss, "test_logits": log.logits} | named(z, log)


def macro_f1(truth, logits):
    """In percent, over the classes that occur in the truth."""
    guess = logits.argmax(-1)
    scores = [
        2 * ((guess == c) & (truth == c)).sum().double() / ((guess == c).sum() + (truth == c).sum()) for c in truth.unique()
    ]
    return 100 * torch.stack(scores).double().mean()


def named(z, log):
    """The tensors under the names that the file gives them."""
    if "ctx_start" in z:
        found = {"ctx_start": [p["ctx"][0] for p in log.start], "ctx_end": [p["ctx"] for p in log.end]}
        if "gate_end.wq" in z:
            found |= {f"gate_end.{theirs}": [p[ours] for p in log.end] for ours, theirs in GATE.items()}
        return found | {"global_ctx": [server.params["ctx"] for server in log.server]}
    if "start.ctx" in z:
        ends = {"ctx": lambda p: torch.stack([p["ctx"], p["local"]])}
    else:
        one = z["num_prompt"] == 1
        pick = {"sigma": "ctx", "U": "u", "V": "v"}
        ends = {theirs: (lambda p, k=ours: p[k][None] if one else p[k]) for theirs, ours in pick.items()}
    first = [{k: v[0] for k, v in p.items()} for p in log.start]
    found = {f"start.{k}": [part(p) for p in first] for k, part in ends.items()}
    found |= {f"end.{k}": [part(p) for p in log.end] for k, part in ends.items()}
    shared = [server.params["ctx"] for server in log.server]
    return found | {"global_part": [v.view_as(z["global_part"][0]) for v in shared]}


def failing(z, found):
    """Names of arrays of which some piece is not the stored one."""
    wrong = []
    for name, pieces in found.items():
        stored = z[name].reshape(len(pieces), *(pieces[0].shape)) if pieces[0].ndim else z[name].flatten()
        scale = {"lr_start": 1.0, "test_accuracy": 100.0, "test_macro_f1": 100.0, "loss": z["loss"].abs().max()}.get(name)
        limit = {"lr_start": 1e-9, "test_accuracy": 1e-6, "test_macro_f1": 1e-6}.get(name, LIMIT)
        if not all(error(a.detach(), b, scale) <= limit for a, b in zip(pieces, stored, strict=True)):
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
    stored = {k for k in z if k.startswith(("start.", "end.", "ctx_", "gate_end", "global_", "test_", "loss", "lr_start"))}
    assert found.keys() == stored - {"ctx_init"}


def test_a_perturbed_value_fails(case):
    z, found = case
    for name in found:
        changed = z[name].clone().view(-1)
        changed[changed.abs().argmax()] *= 1.01
        assert failing({**z, name: changed.view_as(z[name])}, found) == [name]


@pytest.mark.parametrize("name", MAKE)
def test_a_perturbed_input_fails(name, monkeypatch):
    z = {**golden(name), "file": name}
    for key in ("client0.image", "client0.label", "client1.batches", "client0.test_image", "sd.text_projection", "emb_rows"):
        if z[key].is_floating_point():
            changed = z[key] + 0.05 * z[key].abs().max() * torch.arange(z[key].numel()).cos().view_as(z[key])
        else:
            changed = z[key].flip(0).flip(-1).roll(1)
        with monkeypatch.context() as patch:
            assert failing(z, play({**z, key: changed}, patch)), key


WITHOUT = {
    "D6, experts": ((released.LeakingGate, released.LivePool), {"optimiser": "shared", "schedule": "zigzag"}),
    "D7, pool": ((released.FixedExperts, released.LeakingGate), {"optimiser": "shared", "schedule": "zigzag"}),
    "D8, gate": ((released.FixedExperts, released.LivePool), {"optimiser": "shared", "schedule": "zigzag"}),
    "D8, velocity": ((released.ReleasedPFedMoAP,), {"schedule": "zigzag"}),
    "D9, schedule": ((released.ReleasedPFedMoAP,), {"optimiser": "shared"}),
}


@pytest.mark.parametrize(("bases", "run"), WITHOUT.values(), ids=WITHOUT)
def test_without_any_one_quirk_the_run_is_another(bases, run, monkeypatch):
    z = {**golden("e2e_pfedmoap_official"), "file": "e2e_pfedmoap_official"}
    whole, init = pfedmoap(z)
    fields = {f.name: getattr(whole, f.name) for f in dataclasses.fields(whole) if f.name != "choice"}
    other = type("Other", bases, {"run": run})(**fields)
    monkeypatch.setitem(MAKE, z["file"], lambda z: (other, init))
    assert set(failing(z, play(z, monkeypatch))) >= {"ctx_end", "loss", "test_logits"}
