"""Promises of every method: what is learnt, what leaves a client, and what a result depends on."""

import dataclasses
import math
from types import SimpleNamespace

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from helpers.runs import (
    HALF,
    LEARNING,
    RUN,
    SEEDS,
    always,
    batches,
    by_client,
    calls,
    equal,
    near,
    play,
    read,
    rights,
)
from helpers.tiny import NAMES, SMALL, error, make, tiny_model

from fpl import controls, gate, rounds, transport
from fpl.controls import CONTROLS
from fpl.methods import (
    METHODS,
    CoOp,
    FedAMP,
    FedOTP,
    FedPer,
    FedPGP,
    FedProx,
    FineTuned,
    PFedMoAP,
    PFedPrompt,
    PromptFL,
)
from fpl.prompts import Clip, PromptTree
from fpl.released.methods import InTurn
from fpl.rounds import Seeds, Setup
from fpl.state import Clients, Server


@pytest.fixture(params=LEARNING)
def learning(request):
    """A method that trains something."""
    return make(LEARNING[request.param])


def right(text, ctx, clients, i):
    """Return which test images of client i a prompt classifies correctly."""
    test = clients.test[i]
    return (clients.feats[test] @ text(ctx).T).argmax(-1) == clients.labels[test]


def double_text(n_ctx):
    return PromptTree(Clip(tiny_model().double()), NAMES, n_ctx)


# What is learnt and what leaves


def test_every_declared_tensor_has_a_gradient(learning, clients):
    text = double_text(learning.n_ctx)
    gen = torch.Generator().manual_seed(1)
    init = {k: v.double() for k, v in learning.init(text, gen).items()}
    uploads = {k: torch.randn(6, *init[k].shape, generator=gen).double() for k in learning.shared}
    params = {k: init[k] for k in learning.shared}
    everybody = torch.ones(6, dtype=torch.bool)
    server = Server(params, uploads, everybody, everybody)
    who = torch.tensor([0, 2])
    order = torch.stack([clients.train[i][:4] for i in (0, 2)])
    p = {k: v.expand(2, *v.shape).clone().requires_grad_() for k, v in init.items()}
    context = read(learning, text, server, who, clients)
    x = getattr(clients, learning.inputs)[order].double()
    learning.loss(text, p, context, x, clients.labels[order]).sum().backward()
    size = {k: v.grad.flatten(1).norm(dim=1) for k, v in p.items()}
    nothing = {k: size.pop(k) for k in p if k in learning.idle}
    assert min(v.min() for v in size.values()) > 1e-8, size
    assert all(v.max() < 1e-12 for v in nothing.values()), nothing


def test_only_biases_of_the_gate_are_idle():
    """They are equal for all experts or for all classes: spec 3.11."""
    idle = {name: kind.idle for name, kind in METHODS.items() if kind.idle}
    assert idle == {"pfedmoap": ("gate_bk", "gate_bv", "gate_bo")}


def test_exactly_the_shared_tensors_leave_the_client(row, text, clients):
    log = play(row, text, clients, HALF)
    for uploads, server in zip(log.uploads, log.servers, strict=True):
        assert set(row.shared) == uploads.keys() == server.params.keys() == server.uploads.keys()


def test_what_is_shared_is_known():
    rows = {name: kind() for name, kind in {**METHODS, **CONTROLS}.items()}
    shared = {name: row.shared for name, row in rows.items() if row.shared}
    none = {"zeroshot", "coop", *CONTROLS} - {"pooled"}
    a_prompt = rows.keys() - none - {"fedper"}
    assert shared == {"fedper": ("base",), **{name: ("ctx",) for name in a_prompt}}


def test_an_upload_is_as_large_as_the_docstring_says(learning, text, clients):
    log = play(learning, text, clients, dataclasses.replace(RUN, rounds=1))
    vectors = {CoOp: 0, FedPer: 3}.get(type(learning), learning.n_ctx)
    assert sum(v[0].numel() for v in log.uploads[0].values()) == vectors * text.width


def test_training_starts_from_the_download_and_the_clients_own(learning, text, clients):
    log = play(learning, text, clients, HALF)
    begin = {}
    for t, i, p, _ in calls(clients, log, training=True):
        begin.setdefault((t, i), p)
    assert begin.keys() == {(t, i) for t, who in enumerate(log.who) for i in who}
    for (t, i), p in begin.items():
        if t:
            download = {} if isinstance(learning, FedAMP) else log.servers[t - 1].params
            assert equal(p, {**{k: v[i] for k, v in log.local[t - 1].items()}, **download})


def test_whoever_is_not_selected_keeps_what_it_has(learning, text, clients):
    log = play(learning, text, clients, HALF)
    prompts = [name for name in log.local[0] if learning.rate_group(name) == "prompt"]
    for before, after, who in zip(log.local, log.local[1:], log.who[1:], strict=False):
        idle = [i for i in range(len(clients)) if i not in who]
        assert all(torch.equal(before[k][idle], after[k][idle]) for k in before)
        assert not any(torch.equal(before[k][who], after[k][who]) for k in prompts)


# Degenerate cases


def test_one_client_makes_promptfl_equal_coop(text, clients):
    alone = {"train": clients.train[:1], "test": clients.test[:1], "patches": None}
    lone = dataclasses.replace(clients, **alone)
    shared, private = (play(make(kind), text, lone) for kind in (PromptFL, CoOp))
    assert always(equal, shared.evaluated, private.evaluated)
    assert not equal(shared.evaluated[0], shared.evaluated[1])
    shared, private = (play(make(kind), text, clients) for kind in (PromptFL, CoOp))
    assert not always(equal, shared.evaluated, private.evaluated)


@pytest.mark.parametrize("training", [RUN, HALF], ids=["all", "half"])
def test_pfedmoap_without_experts_trains_like_promptfl(text, clients, training):
    without = play(make(PFedMoAP, n_experts=0), text, clients, training)
    plain = play(make(PromptFL), text, clients, training)
    with_experts = play(make(PFedMoAP), text, clients, training)
    assert always(equal, without.uploads, plain.uploads)
    assert always(equal, [s.params for s in without.servers], [s.params for s in plain.servers])
    assert [r.loss for r in without.rounds] == [r.loss for r in plain.rounds]
    assert not always(equal, with_experts.uploads, plain.uploads)


def test_fedotp_with_one_patch_and_equal_prompts_classifies_like_promptfl(text, clients):
    patches = 3 * clients.feats.unsqueeze(1)  # of any length
    ctx = 0.1 * torch.randn(2, 4, text.width)
    index = torch.stack([clients.train[i][:3] for i in (0, 2)])
    twice = {"ctx": ctx, "local": ctx}

    def logits(gamma):
        method = make(FedOTP, gamma=gamma)
        t = method.encode(text, twice, {})
        return method.logits(text, t, twice, {}, patches[index])

    want = PromptFL().logits(text, text(ctx), {"ctx": ctx}, {}, clients.feats[index])
    assert error(logits(1.0), want) < 1e-5
    assert error(logits(0.5), logits(1.0) / 2) < 1e-5


DEGENERATE = {
    "fine-tuned for 0 epochs": (FineTuned, {"tune_epochs": 0}, PromptFL),
    "fedper, all vectors shared": (FedPer, {"n_base": 4}, PromptFL),
    "fedper, no vector shared": (FedPer, {"n_base": 0}, CoOp),
    "fedprox without the term": (FedProx, {"mu": 0.0}, PromptFL),
    "fedamp without attraction": (FedAMP, {"attraction": 0.0}, CoOp),
    "pfedprompt without memory": (PFedPrompt, {"blend": 0.0}, PromptFL),
    "fedpgp of rank 0 without contrast": (FedPGP, {"rank": 0, "mu": 0.0}, PromptFL),
    "pfedmoap without experts": (PFedMoAP, {"n_experts": 0, "tested": "after"}, PromptFL),
}
PAIRS = [(kind, same_as) for kind, _, same_as in DEGENERATE.values()]


def test_the_methods_declare_these_cases():
    declared = [(kind, other) for kind in METHODS.values() for _, other in kind.degenerate]
    assert declared == PAIRS


@pytest.mark.parametrize("training", [RUN, HALF], ids=["all", "half"])
@pytest.mark.parametrize(("kind", "changes", "same_as"), DEGENERATE.values(), ids=DEGENERATE)
def test_degenerate_cases_are_equal_to_the_bit(text, clients, kind, changes, same_as, training):
    method = make(kind)
    one = play(make(kind, **changes), text, clients, training)
    other = play(make(same_as), text, clients, training)
    for mine, theirs in ((one.local, other.local), (one.evaluated, other.evaluated)):
        pairs = zip(mine, theirs, strict=True)
        assert all(torch.equal(method.ctx(a), b["ctx"]) for a, b in pairs)
    assert [r.loss for r in one.rounds] == [r.loss for r in other.rounds]
    for a, b in zip(one.rounds, other.rounds, strict=True):
        assert torch.equal(torch.cat(rights(a)), torch.cat(rights(b)))


@pytest.mark.parametrize("training", [RUN, HALF], ids=["all", "half"])
@pytest.mark.parametrize(("kind", "same_as"), PAIRS, ids=DEGENERATE)
def test_the_ordinary_case_is_not_the_degenerate_one(text, clients, kind, same_as, training):
    method, plain = make(kind), make(same_as)
    one = play(method, text, clients, training)
    other = play(plain, text, clients, training)
    if kind is not PFedPrompt:
        pairs = zip(one.evaluated, other.evaluated, strict=True)
        assert not all(torch.equal(method.ctx(a), b["ctx"]) for a, b in pairs)
        return
    # it differs in what is made of the prompts
    assert one.rounds[-1].answers and always(equal, one.evaluated, other.evaluated)
    found = []
    for log, row in ((one, method), (other, plain)):
        _, _, p, t, context, x = log.logits[-1]
        found.append(row.logits(text, t, p, context, x))
    assert error(*found) > 1e-3


# Extra terms, in double precision, against their formulas


@pytest.fixture(scope="module")
def case(clients):
    """A server of six prompts, of which client 4 has sent none, and a batch of three clients."""
    gen = torch.Generator().manual_seed(2)
    text = double_text(SMALL["n_ctx"])
    prompts = 0.1 * torch.randn(6, 4, text.width, generator=gen).double()
    seen = torch.tensor([True, True, True, True, False, True])
    server = Server({"ctx": prompts.mean(0)}, {"ctx": prompts * seen.view(-1, 1, 1)}, seen, seen)
    who = torch.tensor([0, 2, 4])
    order = torch.stack([clients.train[i][torch.arange(3) % len(clients.train[i])] for i in who])
    ours = dataclasses.replace(clients, feats=clients.feats.double())
    x = ours.feats[order]
    y = ours.labels[order]
    return SimpleNamespace(text=text, server=server, who=who, clients=ours, x=x, y=y)


def gradients(method, case, extra=None):
    """Return a point, what is read there, and the gradients of the method's loss.

    extra: (tensors, context) -> a term whose gradients are wanted alone. The point is the same for
    every method.
    """
    gen = torch.Generator().manual_seed(7)
    p = {}
    for name, value in method.init(case.text, gen).items():
        p[name] = (0.1 * torch.randn(3, *value.shape, generator=gen).double()).requires_grad_()
    context = read(method, case.text, case.server, case.who, case.clients)
    own = extra or (lambda p, context: method.loss(case.text, p, context, case.x, case.y))
    value = own(p, context)
    found = torch.autograd.grad(value.sum(), list(p.values()), materialize_grads=True)
    return p, context, dict(zip(p, found, strict=True))


def attentive_mean(case, method):
    """Return u_i and alpha, pair by pair as the paper writes them."""
    prompts = case.server.uploads["ctx"]
    seen = [0, 1, 2, 3, 5]
    n = 6

    def between(i, j):
        return (prompts[i] - prompts[j]).square().sum().item()

    pairs = [between(i, j) for i in seen for j in seen if i < j]
    sigma = sorted(pairs)[4]  # the lower median of ten
    alpha = method.step * sigma / n
    found = []
    for i in (0, 2):
        xi = {j: alpha / sigma * math.exp(-between(i, j) / sigma) for j in seen if j != i}
        most = max(1, sum(xi.values()))
        xi = {j: v / most for j, v in xi.items()}
        own = (1 - sum(xi.values())) * prompts[i]
        found.append(own + sum(v * prompts[j] for j, v in xi.items()))
    return torch.stack(found), alpha


def test_fedprox_adds_the_gradient_of_its_term(case):
    p, _, got = gradients(FedProx(n_ctx=4, mu=0.7), case)
    _, _, plain = gradients(PromptFL(n_ctx=4), case)
    want = 0.7 * (p["ctx"] - case.server.params["ctx"]).detach()
    assert error(got["ctx"] - plain["ctx"], want) < 1e-9


def test_fedamps_sigma_is_that_of_the_first_round_with_two_uploads(case):
    method, ids = FedAMP(n_ctx=4), torch.tensor([0, 1, 2])
    alone = dataclasses.replace(case.server, has_upload=torch.zeros(6, dtype=torch.bool))
    prompts = case.server.uploads["ctx"]
    one = method.aggregate(alone, ids[:1], {"ctx": prompts[:1]}, torch.tensor([1]))
    assert not one.memory
    first = method.aggregate(one, ids[1:], {"ctx": prompts[1:3]}, torch.tensor([1, 1]))
    apart = [(prompts[i] - prompts[j]).square().sum() for i, j in ((0, 1), (0, 2), (1, 2))]
    assert first.memory["sigma"].item() == pytest.approx(sorted(apart)[1].item())
    later = method.aggregate(first, ids, {"ctx": 5 * prompts[:3]}, torch.tensor([1, 1, 1]))
    assert torch.equal(later.memory["sigma"], first.memory["sigma"])


def test_fedotp_reads_the_direction_of_a_patch_and_not_its_length(text):
    gen = torch.Generator().manual_seed(0)
    x, method = torch.randn(2, 3, 5, text.dim, generator=gen), FedOTP(n_ctx=4)
    t = F.normalize(torch.randn(2, 2, text.n_cls, text.dim, generator=gen), dim=-1)
    long = 10.0 ** torch.arange(-4, 1).view(1, 1, 5, 1)
    same = [method.logits(text, t, {}, {}, part) for part in (x, long * x)]
    assert error(*same) < 1e-5


@pytest.mark.parametrize("step", [1.0, 30.0], ids=["default", "own weight clamped at 0"])
def test_fedamp_adds_the_gradient_of_its_term(case, step):
    method = FedAMP(n_ctx=4, attraction=0.3, step=step)
    ids = torch.tensor([0, 1, 2, 3, 5])
    sent = {"ctx": case.server.uploads["ctx"][ids]}
    server = method.aggregate(case.server, ids, sent, torch.ones_like(ids))
    case = SimpleNamespace(**{**vars(case), "server": server})
    p, context, got = gradients(method, case)
    _, _, plain = gradients(CoOp(n_ctx=4), case)
    mean, alpha = attentive_mean(case, method)
    assert error(context["cloud"][:2], mean) < 1e-9
    want = 0.3 / alpha * (p["ctx"].detach()[:2] - mean)
    assert error((got["ctx"] - plain["ctx"])[:2], want) < 1e-9
    assert torch.equal(got["ctx"][2], plain["ctx"][2]), "client 4 has no upload to be drawn to"


ONLY_ONE = {"equal prompts": [True, True, False], "one prompt": [True, False, False]}


@pytest.mark.parametrize("seen", ONLY_ONE.values(), ids=ONLY_ONE)
def test_fedamp_without_a_distance_has_no_attraction(text, clients, seen):
    has_upload = torch.tensor(seen)
    server = Server({}, {"ctx": torch.zeros(3, 4, 8)}, has_upload & False, has_upload & False)
    ids = has_upload.nonzero()[:, 0]
    uploads = {"ctx": torch.ones(len(ids), 4, 8)}
    server = FedAMP().aggregate(server, ids, uploads, torch.ones(len(ids)).long())
    context = read(FedAMP(), text, server, torch.arange(3), clients)
    assert torch.equal(context["pull"], torch.zeros(3)) and torch.isfinite(context["cloud"]).all()


def test_fedpgp_adds_the_gradient_of_its_term(case):
    method = FedPGP(n_ctx=4, rank=2, mu=0.7, tau=0.3)
    plain = FedPGP(n_ctx=4, rank=2, mu=0.0)

    def contrast(p, context):
        anchor = case.text.zero_shot("a photo of a {}.").expand(3, -1, -1)
        common = case.text(p["ctx"])
        personal = case.text(p["ctx"] + p["u"] @ p["v"])
        cosines = [F.cosine_similarity(common, other, dim=-1) for other in (anchor, personal)]
        return -0.7 * (torch.stack(cosines) / 0.3).softmax(0)[0].log().mean(-1)

    _, _, got = gradients(method, case)
    _, _, without = gradients(plain, case)
    _, _, want = gradients(method, case, contrast)
    for name in ("ctx", "u", "v"):
        assert error(got[name] - without[name], want[name]) < 1e-9, name


@pytest.mark.parametrize("memory", ["test", "always"])
def test_pfedprompt_adds_its_memory_to_the_logits(case, memory):
    method = PFedPrompt(n_ctx=4, blend=0.8, beta=2.0, memory=memory)
    p, context, got = gradients(method, case)
    t = method.encode(case.text, p, context)
    z = method.logits(case.text, t, p, context, case.x)
    for n, i in enumerate(case.who.tolist()):
        keys, labels = case.clients.training(i)
        for b, x in enumerate(case.x[n]):
            want = case.text.scale * t[n] @ x
            for key, label in zip(keys, labels, strict=True):
                near = math.exp(-2.0 * (1 - (x @ key).item()))
                want = want + 0.8 * near * F.one_hot(label, len(NAMES)).double()
            assert error(z[n, b], want) < 1e-9
    _, _, plain = gradients(PromptFL(n_ctx=4), case)
    assert equal(got, plain) == (memory == "test"), "training uses it only where it is asked to"


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
    assert sum(counts) == steps * (2 if isinstance(learning, FedOTP | FedPGP) else 1)


def test_fine_tuning_is_for_evaluation_only(text, clients):
    tuned, plain = (play(make(kind), text, clients, HALF) for kind in (FineTuned, PromptFL))
    assert always(equal, tuned.uploads, plain.uploads) and always(equal, tuned.local, plain.local)
    assert batches(clients, tuned) == batches(clients, plain) and not plain.tuned


def test_fine_tuning_is_of_everybody_from_the_new_average_in_an_order_of_its_own(text, clients):
    log = play(make(FineTuned), text, clients, HALF)
    training = dataclasses.replace(HALF, local_epochs=SMALL["tune_epochs"])
    setup = Setup(PromptFL(4), text, clients, training, SEEDS)
    steps = by_client(clients, log.tuned)
    for t, (server, found, r) in enumerate(
        zip(log.servers, log.evaluated, log.rounds, strict=True)
    ):
        for i in range(len(clients)):
            order = rounds.batches(setup, i, t, "tune")
            assert [batch for at, batch, _ in steps[i] if at == t] == order.tolist()
            begin = {"ctx": server.params["ctx"][None]}
            want, _ = rounds.train_locally(setup, begin, {}, {i: order})
            assert error(found["ctx"][i], want["ctx"][0]) < 1e-4
            assert torch.equal(rights(r)[i], right(text, found["ctx"][i], clients, i))
    assert order.tolist() != rounds.batches(setup, i, t).tolist()


def test_stacked_clients_train_as_they_would_alone(learning, text, clients, monkeypatch):
    stacked = play(learning, text, clients)
    monkeypatch.setattr(type(text), "at_once", 1)
    alone = play(learning, text, clients)
    assert {len(x) for _, x, *_ in alone.batches} == {1}
    assert {len(x) for _, x, *_ in stacked.batches} == {1, 3, 5}
    assert always(near, alone.local, stacked.local)
    assert always(near, alone.evaluated, stacked.evaluated)


@pytest.mark.parametrize("subset", [[2], [0, 5], [1, 3, 4]])
def test_a_client_does_not_depend_on_who_else_trains(learning, text, clients, monkeypatch, subset):
    # what is shared makes them depend in later rounds
    training = dataclasses.replace(RUN, rounds=1 if learning.shared else 3)
    everybody = play(learning, text, clients, training)
    monkeypatch.setattr(rounds, "select", lambda *args: torch.tensor(subset))
    some = play(learning, text, clients, training)
    assert by_client(clients, some.batches).keys() == set(subset)
    theirs = []
    for log in (some, everybody):
        theirs.append([{k: v[subset] for k, v in local.items()} for local in log.local])
    assert always(near, *theirs)


def test_the_same_seed_gives_the_same_bits(row, text, clients):
    one, two = (play(row, text, clients, HALF) for _ in range(2))
    assert always(equal, one.local, two.local) and always(equal, one.evaluated, two.evaluated)
    pairs = zip(one.rounds, two.rounds, strict=True)
    assert all(torch.equal(a.accuracy, b.accuracy) for a, b in pairs)


@pytest.mark.parametrize("other", [Seeds(3, 5), Seeds(5, 4)], ids=["order", "init"])
def test_another_seed_gives_something_else(learning, text, clients, other):
    one, two = (play(learning, text, clients, HALF, seeds) for seeds in (SEEDS, other))
    assert not any(map(equal, one.local, two.local))
    assert (batches(clients, one) == batches(clients, two)) == (other.order == SEEDS.order)


def test_a_round_carries_what_was_evaluated_and_what_the_server_holds(learning, text, clients):
    log = play(learning, text, clients, HALF)
    for r, evaluated, server in zip(log.rounds, log.evaluated, log.servers, strict=True):
        assert equal(r.evaluated, evaluated)
        assert equal(r.state.server.params, server.params)
        assert equal(r.state.server.uploads, server.uploads)


def test_methods_with_one_seed_see_the_same_clients_and_batches(learning, text, clients):
    log, reference = (play(row, text, clients, HALF) for row in (learning, make(PromptFL)))
    assert log.who == reference.who == [r.participants.tolist() for r in log.rounds]
    assert batches(clients, log) == batches(clients, reference)


def test_batches_are_full_and_show_an_image_once_an_epoch(text, clients):
    found = batches(clients, play(make(PromptFL), text, clients))
    assert found.keys() == set(range(len(clients)))
    for i, steps in found.items():
        own = set(clients.train[i].tolist())
        b = min(RUN.batch_size, len(own))
        per_epoch = len(own) // b
        assert len(steps) == RUN.rounds * RUN.local_epochs * per_epoch
        assert {len(batch) for _, batch in steps} == {b}
        for at in range(0, len(steps), per_epoch):
            epoch = sum((batch for _, batch in steps[at : at + per_epoch]), [])
            assert len(set(epoch)) == len(epoch) and set(epoch) <= own


def test_order_is_drawn_anew_for_every_epoch_round_client_and_seed():
    named = [(seed, number, client) for seed in (1, 2) for number in (0, 1) for client in (0, 1)]
    epochs = []
    for name in named:
        seed, number, client = name
        own = [torch.arange(40)] * 2
        clients = Clients(torch.zeros(40, 1), torch.zeros(40).long(), own, own, 1)
        setup = Setup(PromptFL(), None, clients, RUN, Seeds(order=seed))
        order = rounds.batches(setup, client, number)
        epochs += order.view(RUN.local_epochs, -1).tolist()
    assert len({tuple(epoch) for epoch in epochs}) == len(named) * RUN.local_epochs


# Partial participation


@pytest.mark.parametrize(("participation", "picked"), [(0.5, 3), (0.2, 1), (0.1, 1), (1.0, 6)])
def test_every_row_runs_with_partial_participation(row, text, clients, participation, picked):
    log = play(row, text, clients, dataclasses.replace(RUN, participation=participation))
    learns = row.init(text, torch.Generator())
    assert [r.number for r in log.rounds] == ([0, 1, 2] if learns else [0])
    for r in log.rounds:
        who = r.participants.tolist()
        assert len(who) == picked and who == sorted(set(who)) and set(who) <= set(range(6))
        assert [len(c) for c in rights(r)] == [len(test) for test in clients.test]
        assert r.accuracy.tolist() == pytest.approx([c.float().mean().item() for c in rights(r)])
    assert len({tuple(who) for who in log.who}) > 1 or len(log.who) == 1 or picked == 6


def test_the_average_is_weighted_by_training_images(learning, text, clients):
    log = play(learning, text, clients, HALF)
    sizes = torch.tensor([float(len(train)) for train in clients.train])
    for who, uploads, server in zip(log.who, log.uploads, log.servers, strict=True):
        weighted = {k: (sizes[who, None, None] * v).sum(0) for k, v in uploads.items()}
        assert near(server.params, {k: v / sizes[who].sum() for k, v in weighted.items()})


@pytest.mark.parametrize("kind", [CoOp, PromptFL])
def test_evaluation_is_with_ones_own_prompt_or_with_the_new_average(text, clients, kind):
    log = play(make(kind), text, clients, HALF)
    for r, server, local in zip(log.rounds, log.servers, log.local, strict=True):
        prompts = local["ctx"]
        if kind.shared:
            prompts = server.params["ctx"].expand_as(prompts)
        for i, found in enumerate(rights(r)):
            assert torch.equal(found, right(text, prompts[i], clients, i))


def test_text_features_are_those_of_the_prompts_in_use(learning, text, clients):
    log = play(learning, text, clients, HALF)
    assert all(error(t.detach(), text(learning.ctx(p))) < 1e-5 for _, _, p, t, _, _ in log.logits)


def test_the_loss_of_a_round_is_the_mean_of_the_last_epochs(learning, text, clients):
    log = play(learning, text, clients, HALF)
    steps = by_client(clients, log.batches)
    for r in log.rounds:
        means = []
        for i in log.who[r.number]:
            losses = [loss for t, _, loss in steps[i] if t == r.number]
            means.append(torch.tensor(losses[-len(losses) // RUN.local_epochs :]).mean())
        assert r.loss == pytest.approx(torch.stack(means).mean().item())


# The experts of pFedMoAP


@pytest.fixture(scope="module")
def moap(text, clients):
    """Seven rounds with two clients each.

    `last[t]` is, for each client, its last upload as round t finds it.
    """
    training = dataclasses.replace(RUN, rounds=7, participation=0.34)
    log = play(make(PFedMoAP), text, clients, training)
    log.last = [{}]
    for who, uploads in zip(log.who, log.uploads, strict=True):
        log.last.append({**log.last[-1], **dict(zip(who, uploads["ctx"], strict=True))})
    log.training = list(calls(clients, log, training=True))
    log.evaluation = list(calls(clients, log, training=False))
    return log


def test_the_watched_run_has_all_cases(moap, clients):
    first = {}
    again = False
    for t, who in enumerate(moap.who):
        for i in who:
            again |= i in first
            first.setdefault(i, t)
    assert any(t > 0 for t in first.values()), "somebody is new in a later round"
    assert again, "somebody takes part again"
    assert len(moap.last[2]) < len(clients), "somebody was not selected in two rounds"
    assert len(moap.last[-2]) > 1 + make(PFedMoAP).n_experts, "there are more experts than places"


def test_experts_are_the_nearest_uploads_of_others_as_of_the_previous_round(moap, text):
    method = make(PFedMoAP)
    compared = 0
    for t, i, _, experts in moap.training + moap.evaluation:
        last = moap.last[t]
        if i not in last or experts is None:
            continue
        away = {j: (last[j] - last[i]).square().sum().item() for j in last if j != i}
        others = sorted(away, key=lambda j: (away[j], j))
        nearest = torch.stack([last[j] for j in others[: method.n_experts]])
        assert error(experts, text(nearest)[..., :: text.dim // method.d_gate]) < 1e-5
        compared += 1
    assert compared > 20


def test_a_first_participation_is_without_experts(moap):
    trained = {(t, i): experts is not None for t, i, _, experts in moap.training}
    assert trained == {(t, i): i in moap.last[t] for t, who in enumerate(moap.who) for i in who}


def test_evaluation_is_with_ones_own_prompt_or_the_new_average_if_never_selected(moap, clients):
    everybody = {(t, i) for t in range(7) for i in range(len(clients))}
    assert {(t, i) for t, i, *_ in moap.evaluation} == everybody
    for t, i, p, experts in moap.evaluation:
        assert torch.equal(p["ctx"], moap.last[t + 1].get(i, moap.servers[t].params["ctx"]))
        came_back = [i in moap.who[s] and i in moap.last[s] for s in range(t + 1)]
        assert (experts is not None) == any(came_back), "a gate that has not trained is not asked"


def test_never_selected_clients_are_classified_by_the_average_alone(moap, text, clients):
    found = set()
    for r in moap.rounds:
        average = moap.servers[r.number].params["ctx"]
        for i in set(range(len(clients))) - moap.last[r.number + 1].keys():
            found.add(r.number)
            assert torch.equal(rights(r)[i], right(text, average, clients, i))
    assert found >= {0, 1}


def test_ties_go_to_the_smaller_number_and_nobody_is_their_own_expert(clients):
    prompts = torch.tensor([0.0, 1.0, -1.0, 1.0, 5.0])[:, None, None].expand(5, 2, 3)
    seen = torch.tensor([True, True, True, True, False])  # client 4 has no upload yet
    server = Server({}, {"ctx": prompts}, seen, seen)

    def chosen(k, who):
        return PFedMoAP(n_experts=k).neighbours(server, torch.tensor(who), clients).tolist()

    assert chosen(2, [0, 3]) == [[1, 2], [1, 0]]
    assert chosen(4, [1]) == [[3, 0, 2]]


# Shapes

WRONG = {
    "prompts": lambda text, x: text(x.int()),
    "gate": lambda text, x: gate.mix({}, x, x),
    "methods": lambda text, x: PromptFL().logits(text, x, {}, {}, x[0]),
    "transport": lambda text, x: transport.plan(x[0]),
    "released": lambda text, x: InTurn().cohorts(None, x),
    "rounds": lambda text, x: rounds.mean_right([x]),
    "controls": lambda text, x: controls.restrict(x, x),
    "state": lambda text, x: Clients(x, x, [], [], 1),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_a_wrong_shape_or_type_is_refused_while_tests_run(text, call):
    with pytest.raises(jaxtyping.TypeCheckError):
        call(text, torch.zeros(2, 4, 32))
