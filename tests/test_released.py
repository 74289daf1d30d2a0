"""Promise: each released row does what its sentence says, and differs from the paper's method in that."""

import dataclasses
import random

import pytest
import torch
from conftest import NAMES, SMALL, error, golden, make
from test_identities import HALF, RUN, SEEDS, batches, calls, equal, near, play

from fpl import methods, rounds
from fpl.methods import FedPGP, FedProx, PFedMoAP, PromptFL
from fpl.prompts import PromptTree
from fpl.released import methods as released
from fpl.released import splits
from fpl.released.methods import RELEASED
from fpl.rounds import Seeds, Training
from fpl.state import Clients, Server


@pytest.fixture(params=RELEASED)
def row(request):
    return made(RELEASED[request.param])


def made(kind):
    return dataclasses.replace(make(kind), n_ctx=1) if kind is released.OneWord else make(kind)


def as_released(method, cfg=RUN):
    return dataclasses.replace(cfg, **method.run)


# What every row has in common with every method


@pytest.mark.parametrize("cfg", [RUN, HALF], ids=["all", "half"])
def test_the_same_seed_gives_the_same_bits_and_everybody_the_same_clients_and_batches(row, text, clip, clients, cfg):
    tower = PromptTree(clip, NAMES, row.n_ctx)
    one, two = (play(row, tower, clients, as_released(row, cfg)) for _ in range(2))
    reference = play(make(PromptFL), text, clients, cfg)
    assert all(map(equal, one.deployed, two.deployed))
    assert one.who == reference.who and batches(clients, one) == batches(clients, reference)


def test_every_tensor_of_a_row_moves(row, clip, clients):
    log = play(row, PromptTree(clip, NAMES, row.n_ctx), clients, as_released(row))
    init = row.init(PromptTree(clip, NAMES, row.n_ctx), rounds.generator(SEEDS.init, "init"))
    assert all(not torch.equal(v[0], init[k]) for k, v in log.own[-1].items())


# The quirks


def test_d4_the_prompt_is_the_vector_of_one_word(clip, clients):
    method = made(released.OneWord)
    text = PromptTree(clip, NAMES, method.n_ctx)
    init = method.init(text, torch.Generator())
    assert init["ctx"].shape == (1, text.width) and torch.equal(init["ctx"], text.words("False"))
    assert error(method.encode(text, {"ctx": init["ctx"][None]})[0], text.zero_shot("False {}.")) < 1e-5
    with pytest.raises(ValueError, match="one word"):
        make(released.OneWord).check(text, clients)
    assert released.OneWord().n_ctx == 1 and make(PFedMoAP).init(text, torch.Generator())["ctx"].shape == (
        SMALL["n_ctx"],
        text.width,
    )


def test_d5_the_term_is_reported_and_does_nothing(text, clients):
    detached, plain, real = (play(make(kind), text, clients) for kind in (released.DetachedTerm, PromptFL, FedProx))
    assert all(map(equal, detached.own, plain.own)) and not equal(real.own[-1], plain.own[-1])
    assert all(a.loss > b.loss for a, b in zip(detached.rounds, plain.rounds, strict=True))


@pytest.mark.parametrize("name", ["select_experts_n10", "select_experts_n30"])
def test_d6_experts_are_the_first_others_of_one_permutation(name, monkeypatch):
    z, n = golden(name), int(golden(name)["num_users"])
    split = [z[f"split_{part}"].numpy() for part in ("train_labels", "test_labels")]
    for s, seed in enumerate(z["seeds"].tolist()):
        order, after = list(range(n)), list(range(n))
        random.Random(seed).shuffle(order)
        assert order == z["permutation"][s].tolist()
        draw = random.Random(seed)
        splits.pathological(*split, int(z["split_users"]), int(z["split_shots"]), draw=draw)
        draw.shuffle(after)
        assert after == z["permutation_after_split"][s].tolist(), "after the split the permutation is the same for every seed"
        places = torch.tensor(order).argsort().float()
        monkeypatch.setitem(methods.CHOICES, "fixed", lambda server, clients: places.repeat(n, 1))  # noqa: B023
        for e, number in enumerate(z["num_experts"].tolist()):
            method = released.FixedExperts(n_experts=min(number, n) - 1)
            for p, seen in enumerate(z["pool"].bool()):
                for i in range(n):
                    stored = [j for j in z["experts"][s, e, p, i].tolist() if j >= 0]
                    server = Server({}, {"ctx": torch.zeros(n, 1, 1)}, seen)
                    assert method.neighbours(server, torch.tensor([i]), None)[0].tolist() == stored


def test_d6_all_clients_have_the_same_experts_in_all_rounds(text, clients):
    found = {}
    for kind in (released.FixedExperts, PFedMoAP):
        log = play(make(kind), text, clients, dataclasses.replace(RUN, rounds=4))
        ctx = [{i: own["ctx"][i] for i in range(6)} for own in log.own]
        found[kind] = {
            i: [j for j in range(6) if any(error(experts[k], pooled(text, ctx[t - 1][j])) < 1e-5 for k in range(2))]
            for t, i, _, experts in calls(clients, log, training=True)
            if experts is not None
        }
    chosen = found[released.FixedExperts]
    assert len({j for js in chosen.values() for j in js}) == 3, "two, and the third for those who are one of the two"
    assert chosen != found[PFedMoAP]


def pooled(text, ctx):
    return text(ctx)[..., :: text.dim // SMALL["d_gate"]]


@pytest.mark.parametrize("name", ["flow_official_n5", "flow_official_n6"])
def test_d6_d7_d8_experts_pool_and_gate_flow_as_released(name, monkeypatch):
    """Training is replaced by marks: (client, round) in the prompt, and in the gate of a client that trains with experts."""
    z, log = golden(name), []
    n, sizes = int(z["num_users"]), z["client_sizes"].tolist()
    method = released.ReleasedPFedMoAP(n_ctx=1, n_experts=min(int(z["num_experts"]), n) - 1, d_gate=2, heads=1)
    places = z["permutation"].argsort().float()

    class Marks:
        width = dim = 2
        scale, at_once = 1.0, 1

        def __call__(self, ctx):
            return ctx  # one class, whose feature is the prompt

    def mark(method, text, clients, seed, number, tick, who, begin, frozen, at, run, stream, shared=None):
        if len(who):
            log.append((number, int(who), begin, frozen))
            stamp = torch.tensor([float(who), float(number)])
            begin = {"ctx": stamp.view(1, 1, 2), **{k: v for k, v in begin.items() if k != "ctx"}}
            begin |= {"gate_bq": stamp.view(1, 2)} if frozen else {}
        return begin, torch.zeros(len(who))

    monkeypatch.setattr(rounds, "train_cohort", mark)
    monkeypatch.setattr(rounds, "select", lambda n, r, seed, number: z["order"][number])
    monkeypatch.setitem(methods.CHOICES, "fixed", lambda server, clients: places.repeat(n, 1))
    parts = torch.arange(sum(sizes)).split(sizes)
    clients = Clients(torch.randn(sum(sizes), 2), torch.zeros(sum(sizes), dtype=torch.long), parts, parts, 1)
    list(rounds.run_rounds(method, Marks(), clients, Training(rounds=int(z["rounds"]), **method.run), Seeds()))
    init = method.init(Marks(), rounds.generator(1, "init"))
    assert [i for _, i, *_ in log] == z["order"].flatten().tolist()
    for (t, _, begin, frozen), experts, trained, gate in zip(
        log, *(z[k].flatten(0, 1) for k in ("experts", "expert_round", "gate_start")), strict=True
    ):
        prompts = sorted(frozen["experts"][0][:, 0].int().tolist()) if frozen else []
        stored = sorted([i, r] for i, r in zip(experts.tolist(), trained.tolist(), strict=True) if i >= 0)
        assert prompts == stored
        assert torch.equal(begin["gate_bq"][0], init["gate_bq"] if gate[0] < 0 else gate.float())
        if t:
            place = [i for r, i, *_ in log if r == t].index(next(i for r, i, b, _ in log if b is begin))
            assert error(begin["ctx"][0, 0], z["prompt_start"][t - 1, place]) < 1e-6


def test_d7_later_clients_see_prompts_of_the_same_round(text, clients):
    for kind, same_round in ((released.LivePool, True), (PFedMoAP, False)):
        log, seen = play(dataclasses.replace(make(kind), n_experts=5), text, clients), False
        for t, i, _, experts in calls(clients, log, training=True):
            fresh = [log.own[t]["ctx"][j] for j in range(6) if j != i]
            if experts is not None:
                seen |= any(error(experts[k], pooled(text, ctx)) < 1e-5 for k in range(5) for ctx in fresh)
        assert seen == same_round


def test_d8_the_gate_of_one_client_is_where_another_begins(text, clients):
    for kind, leaks in ((released.LeakingGate, True), (PFedMoAP, False)):
        log, begin = play(make(kind), text, clients), {}
        for t, i, p, _ in calls(clients, log, training=True):
            begin.setdefault((t, i), p["gate_wv"])
        starts = [begin[1, i] for i in range(6)]
        initial = sum(torch.equal(start, begin[0, 0]) for start in starts)
        others = sum(any(torch.equal(begin[1, i], log.own[1]["gate_wv"][j]) for j in range(6) if j != i) for i in range(6))
        assert (initial, others) == ((1, 5) if leaks else (6, 0))
        assert all(torch.equal(begin[2, i], log.own[1]["gate_wv"][i]) for i in range(6)), "from the third participation its own"


def test_d8_the_velocity_goes_from_client_to_client(text, clients):
    cfg = dataclasses.replace(RUN, rounds=1, local_epochs=1)
    shared, fresh = (
        play(make(released.InTurn), text, clients, dataclasses.replace(cfg, optimiser=o)) for o in ("shared", "fresh")
    )
    first = batches(clients, shared)
    order = [i for i in rounds.select(6, RUN, SEEDS.order, 0).tolist() if i in first]
    moved = [not near({"ctx": shared.own[0]["ctx"][i]}, {"ctx": fresh.own[0]["ctx"][i]}) for i in order]
    assert moved == [False] + 5 * [True]
    assert all(map(near, play(make(PromptFL), text, clients, cfg).own, fresh.own)), "order alone changes nothing"


def test_a_shared_optimiser_needs_clients_in_turn(text, clients):
    with pytest.raises(ValueError, match="train one after the other"):
        list(rounds.run_rounds(make(PromptFL), text, clients, dataclasses.replace(RUN, optimiser="shared"), SEEDS))


@pytest.mark.parametrize("name", ["lr_e2", "lr_e5", "lr_e25_coop"])
def test_d9_the_learning_rate_goes_up_and_down_through_all_clients(name):
    z, epochs = golden(name), int(golden(name)["local_epochs"])
    run = Training(local_epochs=epochs, lr=z["base_lr"].item(), gate_lr=z["gate_base_lr"].item(), schedule="zigzag")
    rates = [run.rate("ctx", e, before) for before in range(0, len(z["prompt_lr"]), epochs) for e in range(epochs)]
    assert rates == pytest.approx(z["prompt_lr"].tolist(), abs=1e-12)
    assert [run.rate("gate_wq", e) for e in range(len(z["gate_lr"]))] == pytest.approx(z["gate_lr"].tolist())
    assert rates[0] == z["warmup_lr"] and (run.momentum, run.weight_decay) == (z["momentum"], z["weight_decay"])
    assert (z["gate_momentum"], z["gate_weight_decay"]) == (z["momentum"], z["weight_decay"])
    even, odd = (torch.tensor(rates[at : at + epochs]).mean() for at in (2 * epochs, epochs))
    assert even > 1.2 * odd, "clients at even and odd places train at different rates"
    ours = dataclasses.replace(run, schedule="constant")
    assert {ours.rate("ctx", e, before) for e in range(epochs) for before in (0, 7)} == {run.lr}


def test_d10_the_second_prompt_is_a_bank_of_classes_that_are_never_right(text, clients):
    method = make(released.TwoPrompts)
    log = play(method, text, clients)
    c = len(NAMES)
    assert log.own[0]["ctx"].shape[1:] == (2, SMALL["n_ctx"], text.width)
    _, _, p, t, f, x = log.logits[-1]
    z = method.logits(text, t, p, f, x)
    assert z.shape[-1] == 2 * c
    _, _, p, t, f, x = play(make(FedPGP), text, clients).logits[-1]
    assert make(FedPGP).logits(text, t, p, f, x).shape[-1] == c
    second = {k: torch.stack([v, v], dim=1) for k, v in {"ctx": p["ctx"], "u": p["u"], "v": p["v"]}.items()}
    both = method.logits(text, method.encode(text, second), second, f, x)
    assert error(both[..., :c], both[..., c:]) < 1e-5, "equal prompts, equal banks: only the label says which one is right"


def test_d11_the_anchor_is_a_row_of_placeholders(text):
    placeholder, real = (
        make(kind).frozen(text, {}, torch.arange(2), None)["anchor"] for kind in (released.PlaceholderAnchor, FedPGP)
    )
    assert error(placeholder[0], text.zero_shot("X X X X {}.")) < 1e-5
    assert error(real[0], text.zero_shot("a photo of a {}.")) < 1e-5 and error(placeholder, real) > 1e-2
