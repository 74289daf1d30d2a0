"""Promise: each released row does what its sentence says, and differs from the paper in that."""

import dataclasses
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT
from helpers.runs import HALF, RUN, SEEDS, batches, calls, equal, near, play
from helpers.tiny import NAMES, SMALL, error, golden, make

from fpl import methods, rounds
from fpl.experiments import assemble, settings
from fpl.methods import FedPGP, FedProx, PFedMoAP, PromptFL
from fpl.prompts import PromptTree
from fpl.released import methods as released
from fpl.released import splits
from fpl.released.methods import RELEASED
from fpl.rounds import Training
from fpl.state import Clients, Server, take


@pytest.fixture(params=RELEASED)
def row(request):
    return make(RELEASED[request.param])


def as_released(method, training=RUN):
    return dataclasses.replace(training, **method.training)


# What every row has in common with every method


@pytest.mark.parametrize("training", [RUN, HALF], ids=["all", "half"])
def test_the_same_seed_gives_the_same_bits_and_everybody_the_same_clients_and_batches(
    row, text, clip, clients, training
):
    tower = PromptTree(clip, NAMES, row.n_ctx)
    one, two = (play(row, tower, clients, as_released(row, training)) for _ in range(2))
    reference = play(make(PromptFL), text, clients, training)
    assert all(map(equal, one.evaluated, two.evaluated))
    assert one.who == reference.who and batches(clients, one) == batches(clients, reference)


def test_every_tensor_of_a_row_moves(row, clip, clients):
    log = play(row, PromptTree(clip, NAMES, row.n_ctx), clients, as_released(row))
    init = row.init(PromptTree(clip, NAMES, row.n_ctx), rounds.generator(SEEDS.init, "init"))
    still = {k for k, v in log.local[-1].items() if torch.equal(v[0], init[k])}
    assert still <= ({*row.idle} if row.key == "pfedmoap_half" else set())


# The quirks


def test_d4_the_prompt_is_the_vector_of_one_word(clip, clients):
    method = make(released.OneWord)
    text = PromptTree(clip, NAMES, method.n_ctx)
    init = method.init(text, torch.Generator())
    assert init["ctx"].shape == (1, text.width) and torch.equal(init["ctx"], text.words("False"))
    encoded = method.encode(text, {"ctx": init["ctx"][None]}, {})
    assert error(encoded[0], text.zero_shot("False {}.")) < 1e-5
    with pytest.raises(ValueError, match="less than or equal to 1"):
        released.OneWord(n_ctx=4)
    other = make(PFedMoAP).init(text, torch.Generator())
    assert released.OneWord().n_ctx == 1 and len(other["ctx"]) == SMALL["n_ctx"]


def test_d5_the_term_is_reported_and_does_nothing(text, clients):
    detached, plain, real = (
        play(make(kind), text, clients) for kind in (released.DetachedTerm, PromptFL, FedProx)
    )
    assert all(map(equal, detached.local, plain.local))
    assert not equal(real.local[-1], plain.local[-1])
    assert all(a.loss > b.loss for a, b in zip(detached.rounds, plain.rounds, strict=True))
    whole, without = (
        play(make(RELEASED[row]), text, clients)
        for row in ("fedprox_released", "promptfl_released")
    )
    assert all(map(equal, whole.local, without.local))
    assert all(a.loss > b.loss for a, b in zip(whole.rounds, without.rounds, strict=True))


def permutation(z, s, seed):
    """Return the permutation of the clients for a seed, as a golden file has it."""
    n = int(z["num_users"])
    order = list(range(n))
    random.Random(seed).shuffle(order)
    assert order == z["permutation"][s].tolist()
    after = list(range(n))
    draw = random.Random(seed)
    split = (z["split_train_labels"].numpy(), z["split_test_labels"].numpy())
    splits.pathological(split, int(z["split_users"]), int(z["split_shots"]), draw=draw)
    draw.shuffle(after)
    assert after == z["permutation_after_split"][s].tolist(), "it is the same for every seed"
    return order


def fix(monkeypatch, order):
    """Let the choice "fixed" follow this permutation of the clients."""
    places = torch.as_tensor(order).argsort().float().repeat(len(order), 1)
    monkeypatch.setitem(methods.CHOICES, "fixed", lambda server, clients: places)


@pytest.mark.parametrize("name", ["select_experts_n10", "select_experts_n30"])
def test_d6_experts_are_the_first_others_of_one_permutation(name, clients, monkeypatch):
    z = golden(name)
    n = int(z["num_users"])
    for s, seed in enumerate(z["seeds"].tolist()):
        fix(monkeypatch, permutation(z, s, seed))
        for e, number in enumerate(z["num_experts"].tolist()):
            method = released.FixedExperts(n_experts=min(number, n) - 1)
            for p, seen in enumerate(z["pool"].bool()):
                server = Server({}, {"ctx": torch.zeros(n, 1, 1)}, seen, seen)
                for i in range(n):
                    stored = [j for j in z["experts"][s, e, p, i].tolist() if j >= 0]
                    found = method.neighbours(server, torch.tensor([i]), clients)
                    assert found[0].tolist() == stored


def test_d6_all_clients_have_the_same_experts_in_all_rounds(text, clients):
    found = {}
    for kind in (released.FixedExperts, PFedMoAP):
        log = play(make(kind), text, clients, dataclasses.replace(RUN, rounds=4))
        found[kind] = {}
        for t, i, _, experts in calls(clients, log, training=True):
            if experts is not None:
                last = [pooled(text, ctx) for ctx in log.local[t - 1]["ctx"]]
                found[kind][i] = [j for j in range(6) if is_among(last[j], experts)]
    chosen = found[released.FixedExperts]
    assert len({*sum(chosen.values(), [])}) == 3, "two, and a third for those who are one of them"
    assert chosen != found[PFedMoAP]


def is_among(features, experts):
    return any(error(expert, features) < 1e-5 for expert in experts)


def pooled(text, ctx):
    return text(ctx)[..., :: text.dim // SMALL["d_gate"]]


class Marks:
    """A text tower with one class, whose feature is the prompt."""

    width = dim = 2
    scale = 1.0
    at_once = 1

    def __call__(self, ctx):
        return ctx


def marked(z, monkeypatch):
    """Return the log of a run as a golden file has it: (round, client, begin, context) each.

    Training is replaced by marks: (client, round) in the prompt, and in the gate of a client that
    trains with experts.
    """
    log = []
    k = min(int(z["num_experts"]), int(z["num_users"])) - 1
    method = released.ReleasedPFedMoAP(n_ctx=1, n_experts=k, d_gate=2, heads=1)

    def mark(setup, cohort, begin, number, stream="order", optimiser=None):
        who = cohort.client_ids[cohort.positions]
        ended = dict(begin)
        if len(who):
            context = take(cohort.context, cohort.positions)
            log.append((number, int(who), begin, context))
            stamp = torch.tensor([float(who), float(number)])
            ended["ctx"] = stamp.view(1, 1, 2)
            if context:
                ended["gate_bq"] = stamp.view(1, 2)
        return ended, torch.zeros(len(who))

    monkeypatch.setattr(rounds, "train_cohort", mark)
    monkeypatch.setattr(rounds, "select", lambda n, training, seed, number: z["order"][number])
    fix(monkeypatch, z["permutation"])
    sizes = z["client_sizes"].tolist()
    parts = torch.arange(sum(sizes)).split(sizes)
    labels = torch.zeros(sum(sizes), dtype=torch.long)
    clients = Clients(torch.randn(sum(sizes), 2), labels, parts, parts, 1)
    training = Training(rounds=int(z["rounds"]), **method.training)
    list(rounds.run_rounds(rounds.Setup(method, Marks(), clients, training)))
    return log, method.init(Marks(), rounds.generator(1, "init"))


@pytest.mark.parametrize("name", ["flow_official_n5", "flow_official_n6"])
def test_d6_d7_d8_experts_pool_and_gate_flow_as_released(name, monkeypatch):
    z = golden(name)
    log, init = marked(z, monkeypatch)
    assert [i for _, i, *_ in log] == z["order"].flatten().tolist()
    flow = (z[key].flatten(0, 1) for key in ("experts", "expert_round", "gate_start"))
    for at, ((t, _, begin, context), *stored) in enumerate(zip(log, *flow, strict=True)):
        experts, trained, gate = (value.tolist() for value in stored)
        prompts = context["experts"][0][:, 0].int().tolist() if context else []
        assert sorted(prompts) == sorted([i, r] for i, r in zip(experts, trained) if i >= 0)
        start = init["gate_bq"] if gate[0] < 0 else torch.tensor(gate).float()
        assert torch.equal(begin["gate_bq"][0], start)
        if t:
            place = at - [r for r, *_ in log].index(t)
            assert error(begin["ctx"][0, 0], z["prompt_start"][t - 1, place]) < 1e-6


def test_d7_later_clients_see_prompts_of_the_same_round(text, clients):
    for kind, same_round in ((released.LivePool, True), (PFedMoAP, False)):
        log = play(make(kind, n_experts=5), text, clients)
        seen = False
        for t, i, _, experts in calls(clients, log, training=True):
            others = [log.local[t]["ctx"][j] for j in range(6) if j != i]
            if experts is not None:
                seen |= any(is_among(pooled(text, ctx), experts) for ctx in others)
        assert seen == same_round


def test_d8_the_gate_of_one_client_is_where_another_begins(text, clients):
    for kind, leaks in ((released.LeakingGate, True), (PFedMoAP, False)):
        log = play(make(kind), text, clients)
        begin = {}
        for t, i, p, _ in calls(clients, log, training=True):
            begin.setdefault((t, i), p["gate_wv"])
        ends = log.local[1]["gate_wv"]
        initial = [i for i in range(6) if torch.equal(begin[1, i], begin[0, 0])]
        of_others = set()
        for i in range(6):
            of_others |= {i for j in range(6) if j != i and torch.equal(begin[1, i], ends[j])}
        assert (len(initial), len(of_others)) == ((1, 5) if leaks else (6, 0))
        own = [torch.equal(begin[2, i], ends[i]) for i in range(6)]
        assert all(own), "from the third participation on it is its own"


def test_d8_the_velocity_goes_from_client_to_client(text, clients):
    training = dataclasses.replace(RUN, rounds=1, local_epochs=1)
    fresh = play(make(released.InTurn), text, clients, training)
    kept = dataclasses.replace(training, optimiser="shared")
    shared = play(make(released.InTurn), text, clients, kept)
    first = batches(clients, shared)
    order = [i for i in rounds.select(clients, RUN, SEEDS.order, 0).tolist() if i in first]
    prompts = [{"ctx": log.local[0]["ctx"][order].unsqueeze(1)} for log in (shared, fresh)]
    moved = [not near({"ctx": a}, {"ctx": b}) for a, b in zip(*(p["ctx"] for p in prompts))]
    assert moved == [False] + 5 * [True]
    plain = play(make(PromptFL), text, clients, training)
    assert all(map(near, plain.local, fresh.local)), "order alone changes nothing"


def test_a_shared_optimiser_needs_clients_in_turn(text, clients):
    training = dataclasses.replace(RUN, optimiser="shared")
    with pytest.raises(ValueError, match="train one after the other"):
        list(rounds.run_rounds(rounds.Setup(make(PromptFL), text, clients, training, SEEDS)))


@pytest.mark.parametrize("name", ["lr_e2", "lr_e5", "lr_e25_coop"])
def test_d9_the_learning_rate_goes_up_and_down_through_all_clients(name):
    z = golden(name)
    epochs = int(z["local_epochs"])
    rates = {"lr": z["base_lr"].item(), "gate_lr": z["gate_base_lr"].item()}
    run = Training(local_epochs=epochs, schedule="zigzag", **rates)
    rates = []
    for before in range(0, len(z["prompt_lr"]), epochs):
        rates += [run.rate("prompt", epoch, before) for epoch in range(epochs)]
    assert rates == pytest.approx(z["prompt_lr"].tolist(), abs=1e-12)
    gate = [run.rate("gate", epoch) for epoch in range(len(z["gate_lr"]))]
    assert gate == pytest.approx(z["gate_lr"].tolist())
    assert rates[0] == z["warmup_lr"]
    sgd = (z["momentum"], z["weight_decay"])
    assert sgd == (run.momentum, run.weight_decay) == (z["gate_momentum"], z["gate_weight_decay"])
    even, odd = (torch.tensor(rates[at : at + epochs]).mean() for at in (2 * epochs, epochs))
    assert even > 1.2 * odd, "clients at even and odd places train at different rates"
    ours = dataclasses.replace(run, schedule="constant")
    assert {ours.rate("prompt", e, before) for e in range(epochs) for before in (0, 7)} == {run.lr}


def test_d10_the_second_prompt_is_a_bank_of_classes_that_are_never_right(text, clients):
    method = make(released.TwoPrompts)
    log = play(method, text, clients)
    c = len(NAMES)
    assert log.local[0]["ctx"].shape[1:] == (2, SMALL["n_ctx"], text.width)
    _, _, p, t, context, x = log.logits[-1]
    assert method.logits(text, t, p, context, x).shape[-1] == 2 * c
    _, _, p, t, context, x = play(make(FedPGP), text, clients).logits[-1]
    assert make(FedPGP).logits(text, t, p, context, x).shape[-1] == c
    second = {k: torch.stack([p[k], p[k]], dim=1) for k in ("ctx", "u", "v")}
    encoded = method.encode(text, second, context)
    both = method.logits(text, encoded, second, context, x)
    assert error(both[..., :c], both[..., c:]) < 1e-5, "only the label says which one is right"


def test_d11_the_anchor_is_a_row_of_placeholders(text, clients):
    anchors = []
    for kind in (released.PlaceholderAnchor, FedPGP):
        anchors.append(make(kind).context(text, {}, torch.arange(2), clients)["anchor"])
    placeholder, real = anchors
    assert error(placeholder[0], text.zero_shot("X X X X {}.")) < 1e-5
    assert error(real[0], text.zero_shot("a photo of a {}.")) < 1e-5
    assert error(placeholder, real) > 1e-2


def test_d29_what_is_held_in_half_precision_stays_so(clip, clients):
    method = make(released.HalfPrecision)
    log = play(method, PromptTree(clip, NAMES, method.n_ctx), clients)
    held = [*log.local, *log.uploads, *(server.params for server in log.servers)]
    assert {v.dtype for tensors in held for v in tensors.values()} == {torch.half}
    *_, t, context, x = log.logits[-1]
    assert {v.dtype for v in (t, context["experts"], x)} == {torch.float}


def test_d31_everybody_trains_first_and_the_draws_begin_afterwards():
    picks = torch.tensor([[4, 1], [0, 3], [2, 0]])
    everybody = [*range(5)]
    for row in (released.ReleasedFedOTP, released.ReleasedFedPGP):
        assert [t.tolist() for t in row.turns(picks, 5)] == [everybody, [4, 1], [0, 3]]
    for row in (released.ReleasedPromptFL, released.ReleasedPFedMoAP):
        assert [t.tolist() for t in row.turns(picks, 5)] == picks.tolist()


def test_clients_with_turns_train_in_their_order(text, clients):
    turns = released.ReleasedFedPGP.turns(torch.tensor([[4, 1], [0, 3], [2, 0]]), 6)
    fixed = dataclasses.replace(clients, turns=turns)
    log = play(make(released.InTurn), text, fixed, RUN)
    assert log.who == [[0, 1, 2, 3, 4, 5], [1, 4], [0, 3]]
    order = [i for t, i, *_ in calls(fixed, log, training=True) if t == 1]
    assert list(dict.fromkeys(order)) == [4, 1]


def test_under_a_released_split_all_seeds_draw_the_same_clients():
    """By domain the split ends with the same state of NumPy, whatever the seed (D18)."""
    params = settings.read(ROOT / "params.yaml")
    asked = {"form": "released", "shots": 0, "rounds": 15, "participation": 0.25}
    names = ("clipart", "infograph", "painting", "photo", "quickdraw", "sketch")
    images = SimpleNamespace(
        labels=torch.arange(12).repeat(60),
        split=np.repeat([*["train"] * 6, *["test"] * 6], 60),
        domain=np.tile(np.repeat(names, 60), 2),
    )
    drawn = {}
    for row in ("promptfl_released", "fedpgp_released", "promptfl"):
        for seed in (1, 2):
            experiment = params.experiment(row, seed, "styles", **asked)
            drawn[row, seed] = assemble.turns_of(experiment, images)
    one, first = drawn["promptfl_released", 1], drawn["fedpgp_released", 1]
    assert [len(t) for t in one] == [7] * 15 and len({*map(str, one)}) == 15
    assert [len(t) for t in first] == [30, *[7] * 14]
    assert all(map(torch.equal, first[1:], one))
    for row in ("promptfl_released", "fedpgp_released"):
        assert all(map(torch.equal, drawn[row, 1], drawn[row, 2]))
    assert drawn["promptfl", 1] is None, "our own rows draw by the seed"


def test_a_fixed_released_split_fixes_who_is_drawn():
    params = settings.read(ROOT / "params.yaml")
    split = np.repeat([*["train"] * 6, *["test"] * 6], 60)
    images = SimpleNamespace(labels=torch.arange(12).repeat(60), split=split, domain=None)
    asked = {
        "form": "released",
        "kind": "dirichlet",
        "shots": 0,
        "rounds": 9,
        "participation": 0.25,
    }

    def turns(seed, split_seed):
        run = params.experiment("promptfl_released", seed, split_seed=split_seed, **asked)
        return assemble.turns_of(run, images)

    assert all(map(torch.equal, turns(1, 3), turns(2, 3)))
    assert not all(map(torch.equal, turns(1, 3), turns(1, 4)))
