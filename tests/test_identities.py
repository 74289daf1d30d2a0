"""Promises of every method: what is learnt, what leaves a client, what it depends on, and degenerate cases that agree."""

import dataclasses
import math
from types import SimpleNamespace

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from conftest import NAMES, SMALL, error, make, tiny_model

from fpl import controls, gate, rounds, transport
from fpl.controls import CONTROLS
from fpl.methods import METHODS, CoOp, FedAMP, FedOTP, FedPer, FedPGP, FedProx, FineTuned, PFedMoAP, PFedPrompt, PromptFL
from fpl.prompts import Clip, PromptTree
from fpl.released import methods
from fpl.rounds import Seeds, Training
from fpl.state import Clients, Server, take

LEARNING = {name: kind for name, kind in METHODS.items() if make(kind).init(SimpleNamespace(width=8), torch.Generator())}
RUN = Training(rounds=3, local_epochs=2, batch_size=4, lr=0.02, gate_lr=0.05)
HALF = dataclasses.replace(RUN, participation=0.5)
SEEDS = Seeds(init=3, order=4)


@pytest.fixture(params=LEARNING)
def learning(request):
    """A method that trains something."""
    return make(LEARNING[request.param])


def watch(method):
    """The same method and a log: batches and logits as called, then per round who, uploads, servers, own and deployed tensors.

    Batches of training for deployment are `tuned`.
    """
    log = SimpleNamespace(batches=[], logits=[], who=[], uploads=[], servers=[], own=[], deployed=[], tuned=[], tuning=False)

    class Watched(type(method)):
        def loss(self, text, p, f, x, y):
            value = super().loss(text, p, f, x, y)
            (log.tuned if log.tuning else log.batches).append((len(log.servers) - log.tuning, x, y, value))
            return value

        def logits(self, text, t, p, f, x):
            if log.tuning:
                return super().logits(text, t, p, f, x)
            log.logits.append((torch.is_grad_enabled(), len(log.servers), {k: v.detach().clone() for k, v in p.items()}, t, f, x))
            return super().logits(text, t, p, f, x)

        def aggregate(self, server, who, uploads, sizes):
            log.who.append(who.tolist())
            log.uploads.append({k: v.clone() for k, v in uploads.items()})
            log.servers.append(super().aggregate(server, who, uploads, sizes))
            return log.servers[-1]

        def deploy(self, server, own, tune):
            log.own.append(own)
            log.tuning = True
            log.deployed.append(super().deploy(server, own, tune))
            log.tuning = False
            return log.deployed[-1]

    return Watched(**{f.name: getattr(method, f.name) for f in dataclasses.fields(method)}), log


def play(method, text, clients, cfg=RUN, seeds=SEEDS):
    """The log of a whole run; `rounds` are its results."""
    watched, log = watch(method)
    log.rounds = list(rounds.run_rounds(watched, text, clients, cfg, seeds))
    return log


def equal(a, b):
    """Two dicts of tensors, to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def near(a, b):
    """Two dicts of tensors, up to rounding over some steps."""
    return a.keys() == b.keys() and all(error(a[k], b[k]) < 1e-4 for k in a)


def always(same, a, b):
    """In every round."""
    return len(a) == len(b) and all(map(same, a, b))


def read(method, text, server, who, clients):
    """What the clients `who` may read, by way of what they download."""
    return take(method.frozen(text, method.download(server, who, clients), who, clients), slice(None))


def images(clients, x):
    """Image numbers of features (n, b, d), or of patches (n, b, M, d); no two images are equal."""
    x, stored = (x, clients.feats) if x.ndim == 3 else (x[..., 0, :], clients.patches[:, 0])
    return (x.unsqueeze(-2) == stored).all(-1).int().argmax(-1)


def owners(clients):
    """Image number -> its client; no image has two."""
    return {image: i for parts in (clients.train, clients.test) for i, part in enumerate(parts) for image in part.tolist()}


def by_client(clients, steps):
    """Client -> (round, batch, loss) of its steps, from what `loss` was called with; labels are checked on the way."""
    found, owner = {}, owners(clients)
    for t, x, y, losses in steps:
        index = images(clients, x)
        assert torch.equal(clients.labels[index], y)
        for batch, loss in zip(index.tolist(), losses.tolist(), strict=True):
            found.setdefault(owner[batch[0]], []).append((t, batch, loss))
    return found


def batches(clients, log):
    """Client -> (round, batch) of its steps."""
    return {i: [(t, batch) for t, batch, _ in steps] for i, steps in by_client(clients, log.batches).items()}


def calls(clients, log, training):
    """(round, client, its tensors, its experts or None), one for each client that a call of `logits` was about."""
    owner = owners(clients)
    for grad, aggregated, p, _, f, x in log.logits:
        for n, image in enumerate(images(clients, x)[:, 0].tolist() if grad == training else ()):
            experts = f["experts"][n] if "experts" in f else None
            yield aggregated - (not training), owner[image], {k: v[n] for k, v in p.items()}, experts


def right(text, ctx, clients, i):
    """Which test images of client i a prompt classifies correctly."""
    return (clients.feats[clients.test[i]] @ text(ctx).T).argmax(-1) == clients.labels[clients.test[i]]


# What is learnt and what leaves


def test_every_declared_tensor_has_a_gradient(learning, clients):
    text, gen = PromptTree(Clip(tiny_model().double()), NAMES, learning.n_ctx), torch.Generator().manual_seed(1)
    init = {k: v.double() for k, v in learning.init(text, gen).items()}
    pool = {k: torch.randn(6, *init[k].shape, generator=gen).double() for k in learning.shared}
    server = Server({k: init[k] for k in learning.shared}, pool, torch.ones(6, dtype=torch.bool))
    who, order = torch.tensor([0, 2]), torch.stack([clients.train[i][:4] for i in (0, 2)])
    p = {k: v.expand(2, *v.shape).clone().requires_grad_() for k, v in init.items()}
    frozen = read(learning, text, server, who, clients)
    learning.loss(text, p, frozen, getattr(clients, learning.inputs)[order].double(), clients.labels[order]).sum().backward()
    size = {k: v.grad.flatten(1).norm(dim=1) for k, v in p.items()}
    nothing = {k: size.pop(k) for k in p if k in ("gate_bk", "gate_bv", "gate_bo")}  # equal for all experts or classes: spec 3.11
    assert min(v.min() for v in size.values()) > 1e-8, size
    assert all(v.max() < 1e-12 for v in nothing.values()), nothing


def test_exactly_the_shared_tensors_leave_the_client(row, text, clients):
    log = play(row, text, clients, HALF)
    for uploads, server in zip(log.uploads, log.servers, strict=True):
        assert set(row.shared) == uploads.keys() == server.params.keys() == server.pool.keys()


def test_what_is_shared_is_known():
    shared = {name: kind().shared for name, kind in {**METHODS, **CONTROLS}.items() if kind().shared}
    a_prompt = ("promptfl", "finetuned", "fedprox", "fedamp", "pfedprompt", "fedotp", "fedpgp", "pfedmoap")
    assert shared == {"fedper": ("base",), **{name: ("ctx",) for name in a_prompt}}


def test_an_upload_is_as_large_as_the_docstring_says(learning, text, clients):
    log = play(learning, text, clients, dataclasses.replace(RUN, rounds=1))
    vectors = {CoOp: 0, FedPer: 3}.get(type(learning), learning.n_ctx)
    assert sum(v[0].numel() for v in log.uploads[0].values()) == vectors * text.width


def test_training_starts_from_the_download_and_the_clients_own(learning, text, clients):
    log, begin = play(learning, text, clients, HALF), {}
    for t, i, p, _ in calls(clients, log, training=True):
        begin.setdefault((t, i), p)
    assert begin.keys() == {(t, i) for t, who in enumerate(log.who) for i in who}
    for (t, i), p in begin.items():
        if t:
            download = {} if isinstance(learning, FedAMP) else log.servers[t - 1].params
            assert equal(p, {**{k: v[i] for k, v in log.own[t - 1].items()}, **download})


def test_whoever_is_not_selected_keeps_what_it_has(learning, text, clients):
    log = play(learning, text, clients, HALF)
    for before, after, who in zip(log.own, log.own[1:], log.who[1:], strict=False):
        idle = [i for i in range(len(clients)) if i not in who]
        assert equal({k: v[idle] for k, v in before.items()}, {k: v[idle] for k, v in after.items()})
        assert not any(torch.equal(before[k][who], after[k][who]) for k in before if not k.startswith("gate_"))


# Degenerate cases


def test_one_client_makes_promptfl_equal_coop(text, clients):
    lone = Clients(clients.feats, clients.labels, clients.train[:1], clients.test[:1], clients.n_cls)
    shared, private = play(make(PromptFL), text, lone), play(make(CoOp), text, lone)
    assert always(equal, shared.deployed, private.deployed)
    assert not equal(shared.deployed[0], shared.deployed[1])
    assert not always(equal, play(make(PromptFL), text, clients).deployed, play(make(CoOp), text, clients).deployed)


@pytest.mark.parametrize("cfg", [RUN, HALF], ids=["all", "half"])
def test_pfedmoap_without_experts_trains_like_promptfl(text, clients, cfg):
    without = play(dataclasses.replace(make(PFedMoAP), n_experts=0), text, clients, cfg)
    plain, with_experts = play(make(PromptFL), text, clients, cfg), play(make(PFedMoAP), text, clients, cfg)
    assert always(equal, without.uploads, plain.uploads)
    assert always(equal, [s.params for s in without.servers], [s.params for s in plain.servers])
    assert [r.loss for r in without.rounds] == [r.loss for r in plain.rounds]
    assert not always(equal, with_experts.uploads, plain.uploads)


def test_fedotp_with_one_patch_and_equal_prompts_classifies_like_promptfl(text, clients):
    whole = dataclasses.replace(clients, patches=3 * clients.feats.unsqueeze(1))  # of any length
    method, ctx = dataclasses.replace(make(FedOTP), gamma=1.0), 0.1 * torch.randn(2, 4, text.width)
    index = torch.stack([whole.train[i][:3] for i in (0, 2)])
    twice, once = {"ctx": ctx, "local": ctx}, {"ctx": ctx}
    found = method.logits(text, method.encode(text, twice), twice, {}, whole.patches[index])
    assert error(found, PromptFL().logits(text, text(ctx), once, {}, whole.feats[index])) < 1e-5
    part = dataclasses.replace(method, gamma=0.5)
    assert error(part.logits(text, method.encode(text, twice), twice, {}, whole.patches[index]), found / 2) < 1e-5


DEGENERATE = {
    "fedprox without the term": (FedProx, {"mu": 0.0}, PromptFL),
    "fedper, all vectors shared": (FedPer, {"n_base": 4}, PromptFL),
    "fedper, no vector shared": (FedPer, {"n_base": 0}, CoOp),
    "fedpgp of rank 0 without contrast": (FedPGP, {"rank": 0, "mu": 0.0}, PromptFL),
    "pfedprompt without memory": (PFedPrompt, {"blend": 0.0}, PromptFL),
    "fedamp without attraction": (FedAMP, {"lam": 0.0}, CoOp),
    "fine-tuned for 0 epochs": (FineTuned, {"tune_epochs": 0}, PromptFL),
}


@pytest.mark.parametrize("cfg", [RUN, HALF], ids=["all", "half"])
@pytest.mark.parametrize(("kind", "changes", "same_as"), DEGENERATE.values(), ids=DEGENERATE)
def test_degenerate_cases_are_equal_to_the_bit(text, clients, kind, changes, same_as, cfg):
    one, other = play(dataclasses.replace(make(kind), **changes), text, clients, cfg), play(make(same_as), text, clients, cfg)
    method = make(kind)
    for part in ("own", "deployed"):
        assert all(torch.equal(method.ctx(a), b["ctx"]) for a, b in zip(getattr(one, part), getattr(other, part), strict=True))
    assert [r.loss for r in one.rounds] == [r.loss for r in other.rounds]
    assert all(torch.equal(torch.cat(a.correct), torch.cat(b.correct)) for a, b in zip(one.rounds, other.rounds, strict=True))


@pytest.mark.parametrize("cfg", [RUN, HALF], ids=["all", "half"])
@pytest.mark.parametrize(("kind", "changes", "same_as"), DEGENERATE.values(), ids=DEGENERATE)
def test_the_ordinary_case_is_not_the_degenerate_one(text, clients, kind, changes, same_as, cfg):
    method, logits = make(kind), []
    one, other = play(method, text, clients, cfg), play(make(same_as), text, clients, cfg)
    if kind is PFedPrompt:  # it differs in what is made of the prompts
        assert one.rounds[-1].correct and always(equal, one.deployed, other.deployed)
        for log, row in ((one, method), (other, make(same_as))):
            _, _, p, t, f, x = log.logits[-1]
            logits.append(row.logits(text, t, p, f, x))
        assert error(*logits) > 1e-3
    else:
        assert not all(torch.equal(method.ctx(a), b["ctx"]) for a, b in zip(one.deployed, other.deployed, strict=True))


# Extra terms, in double precision, against their formulas


@pytest.fixture(scope="module")
def case(clients):
    """A server of six prompts, of which client 4 has sent none, three clients' tensors and a batch of each; the frozen CLIP."""
    gen, text = torch.Generator().manual_seed(2), PromptTree(Clip(tiny_model().double()), NAMES, SMALL["n_ctx"])
    pool = 0.1 * torch.randn(6, 4, text.width, generator=gen).double()
    seen = torch.tensor([True, True, True, True, False, True])
    server = Server({"ctx": pool.mean(0)}, {"ctx": pool * seen.view(-1, 1, 1)}, seen)
    who = torch.tensor([0, 2, 4])
    order = torch.stack([clients.train[i][torch.arange(3) % len(clients.train[i])] for i in who])
    ours = dataclasses.replace(clients, feats=clients.feats.double())
    return SimpleNamespace(text=text, server=server, who=who, clients=ours, x=ours.feats[order], y=ours.labels[order], gen=gen)


def gradients(method, case, extra=None):
    """Of the method's loss, or of `extra` (tensors, frozen) alone; the point is the same for every method."""
    gen = torch.Generator().manual_seed(7)
    p = {k: 0.1 * torch.randn(3, *v.shape, generator=gen).double() for k, v in method.init(case.text, gen).items()}
    p = {k: v.requires_grad_() for k, v in p.items()}
    f = read(method, case.text, case.server, case.who, case.clients)
    value = extra(p, f) if extra else method.loss(case.text, p, f, case.x, case.y)
    return p, f, dict(zip(p, torch.autograd.grad(value.sum(), list(p.values()), materialize_grads=True), strict=True))


def attentive_mean(case, method):
    """u_i and alpha, pair by pair as the paper writes them."""
    pool, seen, n = case.server.pool["ctx"], [0, 1, 2, 3, 5], 6
    between = lambda i, j: (pool[i] - pool[j]).square().sum().item()  # noqa: E731
    sigma = sorted(between(i, j) for i in seen for j in seen if i < j)[4]  # the lower median of ten
    alpha, found = method.step * sigma / n, []
    for i in (0, 2):
        xi = {j: alpha / sigma * math.exp(-between(i, j) / sigma) for j in seen if j != i}
        xi = {j: v / max(1, sum(xi.values())) for j, v in xi.items()}
        found.append((1 - sum(xi.values())) * pool[i] + sum(v * pool[j] for j, v in xi.items()))
    return torch.stack(found), alpha


def test_fedprox_adds_the_gradient_of_its_term(case):
    p, _, got = gradients(FedProx(n_ctx=4, mu=0.7), case)
    _, _, plain = gradients(PromptFL(n_ctx=4), case)
    assert error(got["ctx"] - plain["ctx"], 0.7 * (p["ctx"] - case.server.params["ctx"]).detach()) < 1e-9


@pytest.mark.parametrize("step", [1.0, 30.0], ids=["default", "own weight clamped at 0"])
def test_fedamp_adds_the_gradient_of_its_term(case, step):
    method = FedAMP(n_ctx=4, lam=0.3, step=step)
    p, f, got = gradients(method, case)
    _, _, plain = gradients(CoOp(n_ctx=4), case)
    mean, alpha = attentive_mean(case, method)
    assert error(f["cloud"][:2], mean) < 1e-9
    assert error((got["ctx"] - plain["ctx"])[:2], 0.3 / alpha * (p["ctx"].detach()[:2] - mean)) < 1e-9
    assert torch.equal(got["ctx"][2], plain["ctx"][2]), "client 4 has no upload, so nothing to be drawn to"


@pytest.mark.parametrize("seen", [[True, True, False], [True, False, False]], ids=["equal prompts", "one prompt"])
def test_fedamp_without_a_distance_has_no_attraction(seen):
    server = Server({}, {"ctx": torch.ones(3, 4, 8)}, torch.tensor(seen))
    frozen = read(FedAMP(), None, server, torch.arange(3), None)
    assert torch.equal(frozen["pull"], torch.zeros(3)) and torch.isfinite(frozen["cloud"]).all()


def test_fedpgp_adds_the_gradient_of_its_term(case):
    method, plain = FedPGP(n_ctx=4, rank=2, mu=0.7, tau=0.3), FedPGP(n_ctx=4, rank=2, mu=0.0)

    def contrast(p, f):
        anchor = case.text.zero_shot("a photo of a {}.").expand(3, -1, -1)
        common, personal = case.text(p["ctx"]), case.text(p["ctx"] + p["u"] @ p["v"])
        cosines = [F.cosine_similarity(common, other, dim=-1) for other in (anchor, personal)]
        return -0.7 * (torch.stack(cosines) / 0.3).softmax(0)[0].log().mean(-1)

    got, without, want = (gradients(*args)[2] for args in ((method, case), (plain, case), (method, case, contrast)))
    for k in ("ctx", "u", "v"):
        assert error(got[k] - without[k], want[k]) < 1e-9, k


@pytest.mark.parametrize("memory", ["test", "always"])
def test_pfedprompt_adds_its_memory_to_the_logits(case, memory):
    method = PFedPrompt(n_ctx=4, blend=0.8, beta=2.0, memory=memory)
    p, f, got = gradients(method, case)
    t = method.encode(case.text, p)
    z = method.logits(case.text, t, p, f, case.x)
    for n, i in enumerate(case.who.tolist()):
        keys, labels = case.clients.training(i)
        for b, x in enumerate(case.x[n]):
            want = case.text.scale * t[n] @ x
            for key, label in zip(keys, labels, strict=True):
                want = want + 0.8 * math.exp(-2.0 * (1 - (x @ key).item())) * F.one_hot(label, len(NAMES)).double()
            assert error(z[n, b], want) < 1e-9
    _, _, plain = gradients(PromptFL(n_ctx=4), case)
    assert equal(got, plain) == (memory == "test"), "training uses the memory only where it is asked to"


# What a result depends on


def test_each_prompt_is_encoded_once_a_step(learning, text, clients):
    counts = []

    class Counted(PromptTree):
        def forward(self, ctx):
            counts.append(len(ctx.flatten(0, -3)) * ctx.requires_grad)
            return super().forward(ctx)

    counted = Counted(text._clip, NAMES, learning.n_ctx)
    log = play(learning, counted, clients)
    steps = sum(len(x) for _, x, *_ in log.batches + log.tuned)
    assert sum(counts) == steps * (2 if isinstance(learning, (FedOTP, FedPGP)) else 1)


def test_fine_tuning_is_for_evaluation_only(text, clients):
    tuned, plain = play(make(FineTuned), text, clients, HALF), play(make(PromptFL), text, clients, HALF)
    assert always(equal, tuned.uploads, plain.uploads) and always(equal, tuned.own, plain.own)
    assert batches(clients, tuned) == batches(clients, plain) and not plain.tuned


def test_fine_tuning_is_of_everybody_from_the_new_average_in_an_order_of_its_own(text, clients):
    log, cfg = play(make(FineTuned), text, clients, HALF), dataclasses.replace(HALF, local_epochs=SMALL["tune_epochs"])
    steps = by_client(clients, log.tuned)
    for t, (server, deployed, r) in enumerate(zip(log.servers, log.deployed, log.rounds, strict=True)):
        for i in range(len(clients)):
            order = rounds.batches(clients.train[i], cfg, SEEDS.order, t, i, "tune")
            assert [batch for at, batch, _ in steps[i] if at == t] == order.tolist()
            ctx = {"ctx": server.params["ctx"][None]}
            want, _ = rounds.train_locally(PromptFL(4), text, ctx, {}, [order], clients, cfg, lambda n: None)
            assert error(deployed["ctx"][i], want["ctx"][0]) < 1e-4
            assert torch.equal(r.correct[i], right(text, deployed["ctx"][i], clients, i))
    assert order.tolist() != rounds.batches(clients.train[i], cfg, SEEDS.order, t, i).tolist()


def test_stacked_clients_train_as_they_would_alone(learning, text, clients, monkeypatch):
    stacked = play(learning, text, clients)
    monkeypatch.setattr(type(text), "at_once", 1)
    alone = play(learning, text, clients)
    assert {len(x) for _, x, *_ in alone.batches} == {1} and {len(x) for _, x, *_ in stacked.batches} == {1, 3, 5}
    assert always(near, alone.own, stacked.own) and always(near, alone.deployed, stacked.deployed)


@pytest.mark.parametrize("subset", [[2], [0, 5], [1, 3, 4]])
def test_a_client_does_not_depend_on_who_else_trains(learning, text, clients, monkeypatch, subset):
    cfg = dataclasses.replace(RUN, rounds=1 if learning.shared else 3)  # what is shared makes them depend in later rounds
    everybody = play(learning, text, clients, cfg)
    monkeypatch.setattr(rounds, "select", lambda *args: torch.tensor(subset))
    some = play(learning, text, clients, cfg)
    assert by_client(clients, some.batches).keys() == set(subset)
    theirs = [[{k: v[subset] for k, v in own.items()} for own in log.own] for log in (some, everybody)]
    assert always(near, *theirs)


def test_the_same_seed_gives_the_same_bits(row, text, clients):
    one, two = (play(row, text, clients, HALF) for _ in range(2))
    assert always(equal, one.own, two.own) and always(equal, one.deployed, two.deployed)
    assert all(torch.equal(a.accuracy, b.accuracy) for a, b in zip(one.rounds, two.rounds, strict=True))


@pytest.mark.parametrize("other", [Seeds(3, 5), Seeds(5, 4)], ids=["order", "init"])
def test_another_seed_gives_something_else(learning, text, clients, other):
    one, two = play(learning, text, clients, HALF), play(learning, text, clients, HALF, other)
    assert not any(map(equal, one.own, two.own))
    assert (batches(clients, one) == batches(clients, two)) == (other.order == SEEDS.order)


def test_a_round_carries_what_was_evaluated_and_what_the_server_holds(learning, text, clients):
    log = play(learning, text, clients, HALF)
    for r, deployed, server in zip(log.rounds, log.deployed, log.servers, strict=True):
        assert equal(r.deployed, deployed) and equal(r.server.params, server.params) and equal(r.server.pool, server.pool)


def test_methods_with_one_seed_see_the_same_clients_and_batches(learning, text, clients):
    log, reference = play(learning, text, clients, HALF), play(make(PromptFL), text, clients, HALF)
    assert log.who == reference.who == [r.participants.tolist() for r in log.rounds]
    assert batches(clients, log) == batches(clients, reference)


def test_batches_are_full_and_show_an_image_once_an_epoch(text, clients):
    found = batches(clients, play(make(PromptFL), text, clients))
    assert found.keys() == set(range(len(clients)))
    for i, steps in found.items():
        own = set(clients.train[i].tolist())
        b = min(RUN.batch_size, len(own))
        per_epoch = len(own) // b
        assert len(steps) == RUN.rounds * RUN.local_epochs * per_epoch and {len(batch) for _, batch in steps} == {b}
        epochs = [sum((batch for _, batch in steps[at : at + per_epoch]), []) for at in range(0, len(steps), per_epoch)]
        assert all(len(set(epoch)) == len(epoch) and set(epoch) <= own for epoch in epochs)


def test_order_is_drawn_anew_for_every_epoch_round_client_and_seed():
    named = [(seed, number, client) for seed in (1, 2) for number in (0, 1) for client in (0, 1)]
    drawn = [rounds.batches(torch.arange(40), RUN, *name).view(RUN.local_epochs, -1) for name in named]
    assert len({tuple(epoch) for order in drawn for epoch in order.tolist()}) == len(named) * RUN.local_epochs


# Partial participation


@pytest.mark.parametrize(("participation", "picked"), [(0.5, 3), (0.2, 1), (0.1, 1), (1.0, 6)])
def test_every_row_runs_with_partial_participation(row, text, clients, participation, picked):
    log = play(row, text, clients, dataclasses.replace(RUN, participation=participation))
    assert [r.number for r in log.rounds] == ([0, 1, 2] if type(row) in LEARNING.values() else [0])
    for r in log.rounds:
        who = r.participants.tolist()
        assert len(who) == picked and who == sorted(set(who)) and set(who) <= set(range(6))
        assert [len(c) for c in r.correct] == [len(test) for test in clients.test]
        assert r.accuracy.tolist() == pytest.approx([c.float().mean().item() for c in r.correct])
    assert len({tuple(who) for who in log.who}) > 1 or len(log.who) == 1 or picked == 6


def test_the_average_is_weighted_by_training_images(learning, text, clients):
    log, sizes = play(learning, text, clients, HALF), torch.tensor([float(len(train)) for train in clients.train])
    for who, uploads, server in zip(log.who, log.uploads, log.servers, strict=True):
        assert near(server.params, {k: (sizes[who, None, None] * v).sum(0) / sizes[who].sum() for k, v in uploads.items()})


@pytest.mark.parametrize("kind", [CoOp, PromptFL])
def test_evaluation_is_with_ones_own_prompt_or_with_the_new_average(text, clients, kind):
    log = play(make(kind), text, clients, HALF)
    for r, server, own in zip(log.rounds, log.servers, log.own, strict=True):
        prompts = server.params["ctx"].expand_as(own["ctx"]) if kind.shared else own["ctx"]
        assert all(torch.equal(c, right(text, prompts[i], clients, i)) for i, c in enumerate(r.correct))


def test_text_features_are_those_of_the_prompts_in_use(learning, text, clients):
    log = play(learning, text, clients, HALF)
    assert all(error(t.detach(), text(learning.ctx(p))) < 1e-5 for _, _, p, t, _, _ in log.logits)


def test_the_loss_of_a_round_is_the_mean_of_the_last_epochs(learning, text, clients):
    log = play(learning, text, clients, HALF)
    for r in log.rounds:
        steps = [[loss for t, _, loss in by_client(clients, log.batches)[i] if t == r.number] for i in log.who[r.number]]
        last = [torch.tensor(losses[-len(losses) // RUN.local_epochs :]).mean() for losses in steps]
        assert r.loss == pytest.approx(torch.stack(last).mean().item())


# The experts of pFedMoAP


@pytest.fixture(scope="module")
def moap(text, clients):
    """Seven rounds with two clients each. `last[t]` is, for each client, its last upload as round t finds it."""
    log = play(make(PFedMoAP), text, clients, dataclasses.replace(RUN, rounds=7, participation=0.34))
    log.last = [{}]
    for who, uploads in zip(log.who, log.uploads, strict=True):
        log.last.append({**log.last[-1], **dict(zip(who, uploads["ctx"], strict=True))})
    log.training, log.evaluation = (list(calls(clients, log, training)) for training in (True, False))
    return log


def test_the_watched_run_has_all_cases(moap, clients):
    first = {i: min((t for t, who in enumerate(moap.who) if i in who), default=7) for i in range(len(clients))}
    assert any(0 < t < 7 for t in first.values()), "somebody takes part for the first time in a later round"
    assert any(t > first[i] for t, who in enumerate(moap.who) for i in who), "somebody takes part again"
    assert len(moap.last[2]) < len(clients), "somebody was not selected in two rounds"
    assert len(moap.last[-2]) > 1 + make(PFedMoAP).n_experts, "there are more experts than places"


def test_experts_are_the_nearest_uploads_of_others_as_of_the_previous_round(moap, text):
    method, found = make(PFedMoAP), [(moap.last[t], i, experts) for t, i, _, experts in moap.training + moap.evaluation]
    for last, i, experts in found:
        if i in last:
            others = sorted((j for j in last if j != i), key=lambda j: ((last[j] - last[i]).square().sum().item(), j))
            nearest = torch.stack([last[j] for j in others[: method.n_experts]])
            assert error(experts, text(nearest)[..., :: text.dim // method.d_gate]) < 1e-5
    assert sum(i in last for last, i, _ in found) > 20


def test_a_first_participation_is_without_experts(moap):
    trained = {(t, i): experts is not None for t, i, _, experts in moap.training}
    assert trained == {(t, i): i in moap.last[t] for t, who in enumerate(moap.who) for i in who}


def test_evaluation_is_with_ones_own_prompt_or_the_new_average_if_never_selected(moap, clients):
    assert {(t, i) for t, i, *_ in moap.evaluation} == {(t, i) for t in range(7) for i in range(len(clients))}
    for t, i, p, experts in moap.evaluation:
        assert torch.equal(p["ctx"], moap.last[t + 1].get(i, moap.servers[t].params["ctx"]))
        assert (experts is not None) == (i in moap.last[t])


def test_never_selected_clients_are_classified_by_the_average_alone(moap, text, clients):
    never = [(r, i) for r in moap.rounds for i in range(len(clients)) if i not in moap.last[r.number + 1]]
    assert {r.number for r, _ in never} >= {0, 1}
    for r, i in never:
        assert torch.equal(r.correct[i], right(text, moap.servers[r.number].params["ctx"], clients, i))


def test_ties_go_to_the_smaller_number_and_nobody_is_their_own_expert():
    pool = torch.tensor([0.0, 1.0, -1.0, 1.0, 5.0])[:, None, None].expand(5, 2, 3)
    server = Server({}, {"ctx": pool}, torch.tensor([True, True, True, True, False]))  # client 4 has no upload yet
    assert PFedMoAP(n_experts=2).neighbours(server, torch.tensor([0, 3]), None).tolist() == [[1, 2], [1, 0]]
    assert PFedMoAP(n_experts=4).neighbours(server, torch.tensor([1]), None).tolist() == [[3, 0, 2]]


# Shapes

WRONG = {
    "clip": lambda text, x: text(x.int()),
    "gate": lambda text, x: gate.mix({}, x, x),
    "methods": lambda text, x: PromptFL().logits(text, x, {}, {}, x[0]),
    "transport": lambda text, x: transport.plan(x[0]),
    "released": lambda text, x: methods.InTurn().cohorts(None, x),
    "rounds": lambda text, x: rounds.batches(x, RUN, 1, 0, 0),
    "controls": lambda text, x: controls.restrict(x, x),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_a_wrong_shape_or_type_is_refused_while_tests_run(text, call):
    with pytest.raises(jaxtyping.TypeCheckError):
        call(text, torch.zeros(2, 4, 32))
