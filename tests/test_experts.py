"""Promise: whichever way experts are chosen, mixed and kept, it is what its name says."""

import dataclasses
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers.runs import HALF, RUN, SEEDS, equal, near, play, read
from helpers.tiny import NAMES, error, make, tiny_model

from fpl import gate, rounds
from fpl.ablations import TEMPLATES, CoOpAdapter, GateAlone, NoiseExperts
from fpl.methods import CHOICES, PFedMoAP
from fpl.prompts import Clip, PromptTree
from fpl.state import Clients, Lookup, Server

SEEN = torch.tensor([True, True, True, False, True, True])


def server(prompts, number=0, seed=1):
    draw = partial(rounds.generator, seed)
    return Server({}, {"ctx": prompts}, SEEN, SEEN, number, draw)


@pytest.fixture(scope="module")
def prompts():
    return torch.randn(6, 3, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def chosen(clients):
    """Whom a choice gives to some clients."""

    def choose(choice, prompts, k=2, who=(0, 1, 4), **where):
        method = PFedMoAP(n_experts=k, choice=choice)
        return method.neighbours(server(prompts, **where), torch.tensor(who), clients).tolist()

    return choose


# Choice


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize(("k", "number"), [(1, 0), (2, 3), (5, 1)])
def test_experts_are_others_with_an_upload_and_no_more_than_there_are(
    choice, k, number, prompts, chosen
):
    found = chosen(choice, prompts, k, number=number)
    for i, experts in zip((0, 1, 4), found, strict=True):
        assert len(set(experts)) == len(experts) == min(k, 4)
        assert i not in experts and 3 not in experts


def test_knn_and_cosine_take_the_nearest_by_their_own_measure(prompts, chosen):
    flat = (prompts * torch.tensor([1.0, 5.0, 1.0, 1.0, 0.2, 3.0]).view(6, 1, 1)).flatten(1)
    found = {}
    for i in (0, 1, 4):
        others = [j for j in range(6) if j not in (i, 3)]
        l2 = {j: (flat[i] - flat[j]).norm().item() for j in others}
        angle = {j: -F.cosine_similarity(flat[i], flat[j], dim=0).item() for j in others}
        found[i] = [sorted(others, key=away.get)[:2] for away in (l2, angle)]
    nearest = [list(way) for way in zip(*found.values())]
    assert [chosen(choice, flat.view_as(prompts)) for choice in ("knn", "cosine")] == nearest
    assert nearest[0] != nearest[1]


def test_random_is_drawn_anew_for_every_client_and_round_same_for_every_round_fixed_once(
    prompts, chosen
):
    many = {}
    agree = {}
    for choice in ("random", "same", "fixed"):
        who = (0, 1, 2, 4, 5)
        drawn = [chosen(choice, prompts, number=t, k=1, who=who) for t in range(40)]
        agree[choice] = max(len({expert for (expert,) in found}) for found in drawn)
        many[choice] = len({str(found) for found in drawn})
    # two, since the expert itself takes the next one
    assert agree["random"] > 2 and agree["same"] == 2 == agree["fixed"]
    assert many["same"] > 5 and many["fixed"] == 1
    other = {c: chosen(c, prompts, seed=2, k=1) for c in CHOICES if c != "oracle"}
    drawn = [c for c, found in other.items() if found != chosen(c, prompts, k=1)]
    assert drawn == ["random", "same", "fixed"]


def test_the_oracle_takes_the_largest_overlap_of_labels():
    labels = torch.tensor([0, 0, 1, 0, 1, 1, 2, 2, 2, 1, 1, 0])
    parts = torch.arange(12).split(2)  # 00, 10, 11, 22, 21, 10
    clients = Clients(torch.ones(12, 2), labels, parts, parts, 3)
    seen = torch.ones(6, dtype=torch.bool)
    everybody = dataclasses.replace(server(torch.zeros(6, 1, 1)), has_upload=seen)
    method = PFedMoAP(n_experts=2, choice="oracle")
    found = method.neighbours(everybody, torch.tensor([0, 1, 3]), clients)
    assert found.tolist() == [[1, 5], [5, 0], [4, 0]]
    least = PFedMoAP(n_experts=2, choice="disjoint")
    assert least.neighbours(everybody, torch.tensor([0, 1]), clients).tolist() == [[2, 3], [3, 0]]


def test_the_oracle_compares_shares_however_many_images_a_client_has():
    """By hand, sum_c min(p_i(c), p_j(c)) with client 0: half, 1, 0.9."""
    labels = [torch.tensor(own) for own in ([0, 1], [0] * 50, [0, 1] * 3, [0] * 4 + [1] * 6)]
    parts = torch.arange(68).split([len(own) for own in labels])
    clients = Clients(torch.ones(68, 2), torch.cat(labels), parts, parts, 2)
    everybody = torch.ones(4, dtype=torch.bool)
    empty = server(torch.zeros(4, 1, 1))
    asked = dataclasses.replace(empty, has_upload=everybody, returned=everybody)
    for choice, wanted in (("oracle", [2, 3, 1]), ("disjoint", [1, 3, 2])):
        method = PFedMoAP(n_experts=3, choice=choice)
        assert method.neighbours(asked, torch.tensor([0]), clients).tolist() == [wanted]


def test_a_client_that_has_never_met_another_has_not_come_back():
    """It trained its gate without experts, however often it was drawn."""
    now = server(torch.zeros(4, 1, 1))
    nobody = torch.zeros(4, dtype=torch.bool)
    now = dataclasses.replace(now, has_upload=nobody, returned=nobody)
    returned = []
    for number, drawn in enumerate([2, 2, 3, 2], 1):
        now = now.begin(number, torch.tensor([drawn]))
        returned.append(now.returned.nonzero().flatten().tolist())
        now = now.store(torch.tensor([drawn]), {})
    assert returned == [[], [], [], [2]]


@pytest.mark.parametrize("newcomers", [[True, False], [False, False]])
def test_whoever_has_not_come_back_gets_no_experts(newcomers, prompts, clients):
    params = {"ctx": prompts[0]}
    returned = SEEN.clone()
    returned[:2] = torch.tensor(newcomers)
    asked = dataclasses.replace(server(prompts), params=params, returned=returned)
    method = PFedMoAP(n_experts=2)
    assert [*method.download(asked, torch.tensor([0, 1]), clients)] == ["ctx"]
    down = method.download(asked, torch.tensor([2, 4]), clients)
    assert down["experts"].shape == (2, 2, *prompts.shape[1:])


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_runs_and_only_the_choice_differs(choice, text, clients):
    log = play(make(PFedMoAP, choice=choice), text, clients, HALF)
    plain = play(make(PFedMoAP), text, clients, HALF)
    assert equal(log.local[0], plain.local[0]), "the first round has no experts"
    assert equal(log.local[-1], plain.local[-1]) == (choice == "knn")


# Mixing


NUMBERS = {"attention": 66048, "uniform": 33024, "linear": 10 * (128 + 1), "average": 0}


@pytest.mark.parametrize("mixing", gate.MAPS)
def test_each_gate_has_the_numbers_its_docstring_says(mixing):
    made = gate.init(128, torch.Generator(), mixing, 10)
    assert tuple(made) == gate.names(mixing)
    assert sum(v.numel() for v in made.values()) == NUMBERS[mixing]


@pytest.mark.parametrize("mixing", gate.MAPS)
def test_every_mixing_has_gradients_for_all_it_declares(mixing, clients):
    text = PromptTree(Clip(tiny_model().double()), NAMES, 4)
    method = make(PFedMoAP, mixing=mixing)
    gen = torch.Generator().manual_seed(1)
    p = {}
    for name, value in method.init(text, gen).items():
        p[name] = value.double().expand(2, *value.shape).clone().requires_grad_()
    ctx = torch.randn(6, 4, 32, generator=gen).double()
    seen = torch.ones(6, dtype=torch.bool)
    everybody = Server({}, {"ctx": ctx}, seen, seen)
    context = read(method, text, everybody, torch.tensor([0, 2]), clients)
    order = torch.stack([clients.train[i][:4] for i in (0, 2)])
    x = clients.feats[order].double()
    method.loss(text, p, context, x, clients.labels[order]).sum().backward()
    assert all((v.grad.abs().max() > 1e-8) == (k not in method.idle) for k, v in p.items())


def random_gate(mixing, k=3, g=8):
    gen = torch.Generator().manual_seed(3)
    p = {name: 2 * v.double() for name, v in gate.init(g, gen, mixing, k).items()}
    image = torch.randn(5, g, generator=gen).double()
    experts = torch.randn(k, 4, g, generator=gen).double()
    return p, image, experts


def test_uniform_is_attention_without_queries():
    p, image, experts = random_gate("attention")
    p |= {name: torch.zeros_like(p[name]) for name in ("gate_wq", "gate_bq")}
    uniform = gate.mix(p, image, experts, 2, 10.0, "uniform")
    assert error(uniform, gate.mix(p, image, experts, 2, 10.0)) < 1e-12


@pytest.mark.parametrize("k", [3, 2], ids=["as many as places", "fewer"])
def test_linear_is_a_softmax_over_places_by_the_image_alone(k):
    p, image, experts = random_gate("linear")
    weight = (image @ p["gate_wr"][:k].T + p["gate_br"][:k]).softmax(-1)
    want = sum(weight[:, i : i + 1] * (image @ experts[i].T) for i in range(k))
    assert error(gate.mix(p, image, experts[:k], mixing="linear"), want) < 1e-12


def test_average_is_the_mean_expert():
    _, image, experts = random_gate("average")
    assert error(gate.mix({}, image, experts, mixing="average"), image @ experts.mean(0).T) < 1e-12


def test_alone_nothing_travels_and_the_templates_are_the_experts(text, clients):
    method = make(GateAlone)
    log = play(method, text, clients, HALF)
    assert all(not r.up.any() and not r.down.any() for r in log.rounds)
    with pytest.raises(ValueError, match="between 1 and 9"):
        make(GateAlone, n_experts=10).check(text, clients)
    with pytest.raises(ValueError, match="greater than 0"):
        make(GateAlone, n_experts=0)
    experts = method.context(text, {}, torch.tensor([3, 1]), clients)["experts"]
    assert experts.shape == (2, method.n_experts, len(NAMES), method.d_gate)
    assert torch.equal(experts[0], experts[1])
    assert torch.equal(experts[0, 0], method.pool(text.zero_shot(TEMPLATES[0])))


def test_features_are_held_once_and_copied_only_for_those_who_train_together(
    text, clients, monkeypatch
):
    taken = []
    take = Lookup.__getitem__

    def counted(self, positions):
        found = take(self, positions)
        taken.append((len(self.rows), len(found)))
        return found

    monkeypatch.setattr(Lookup, "__getitem__", counted)
    monkeypatch.setattr(type(text), "at_once", 2)
    play(make(PFedMoAP, n_experts=len(clients) - 1), text, clients)
    held, copied = (max(numbers) for numbers in zip(*taken, strict=True))
    assert held <= len(clients) and copied == 2


def test_the_last_rounds_features_are_let_go_before_the_next_are_made(text, clients):
    made = []
    held = []

    class Watched(PFedMoAP):
        def context(self, text, down, client_ids, clients):
            held.append(sum(ref() is not None for ref in made))
            found = super().context(text, down, client_ids, clients)
            made.extend(weakref.ref(v) for v in found.values())
            return found

    for _ in rounds.run_rounds(rounds.Setup(make(Watched), text, clients, RUN, SEEDS)):
        pass
    assert len(made) == RUN.rounds - 1 and not any(held)


def test_tested_after_aggregation_all_have_the_average_prompt(text, clients):
    logs = [play(make(PFedMoAP, tested=when), text, clients, HALF) for when in ("before", "after")]
    assert equal(logs[0].local[-1], logs[1].local[-1]), "training is the same"
    before, after = (log.evaluated[-1] for log in logs)
    assert all(torch.equal(ctx, after["ctx"][0]) for ctx in after["ctx"])
    assert not equal(before, after)


@pytest.mark.parametrize("mixing", gate.MAPS)
def test_permuting_experts_changes_nothing_but_for_a_router_by_place(mixing):
    p, image, experts = random_gate(mixing)
    one = gate.mix(p, image, experts, 2, 10.0, mixing)
    other = gate.mix(p, image, experts[[0, 2, 1]], 2, 10.0, mixing)
    assert (error(one, other) < 1e-12) == (mixing != "linear")


def test_mean_pooling_is_of_neighbours():
    x = torch.arange(12.0).view(1, 12)
    assert gate.pool(x, 4, "mean").tolist() == [[1, 4, 7, 10]]
    assert gate.pool(x, 4, "stride").tolist() == gate.pool(x, 4).tolist() == [[0, 3, 6, 9]]


# Keeping


def test_a_private_gate_stays_and_an_aggregated_one_is_averaged_and_used_by_everybody(
    text, clients
):
    private, shared = (make(PFedMoAP, gate_kept=kept) for kept in ("private", "aggregated"))
    names = gate.names("attention")
    assert private.shared == ("ctx",) and shared.shared == ("ctx", *names)
    log = play(shared, text, clients)
    sizes = torch.tensor([float(len(train)) for train in clients.train])
    share = sizes / sizes.sum()
    for local, server, evaluated in zip(log.local, log.servers, log.evaluated, strict=True):
        mean = {k: torch.tensordot(share, local[k], dims=1) for k in names}
        assert near({k: server.params[k] for k in names}, mean)
        for k in names:
            assert all(torch.equal(v, server.params[k]) for v in evaluated[k])
        assert torch.equal(evaluated["ctx"], local["ctx"])
    alone = play(private, text, clients)
    assert equal(alone.local[0], log.local[0]), "gates differ once experts are there"


def test_random_experts_are_nobody_s_and_other_ones_for_every_client_and_round(prompts, clients):
    method = NoiseExperts(n_ctx=3, n_experts=2)
    ids = torch.tensor([0, 2, 4])
    found = [method.download(server(prompts, t), ids, clients)["experts"] for t in (1, 1, 2)]
    assert found[0].shape == (3, 2, 3, 8) and torch.equal(found[0], found[1])
    drawn = torch.cat([found[0], found[2]]).flatten(0, 1)  # of three clients, in two rounds
    assert len(drawn.unique(dim=0)) == 12 and drawn.std().item() == pytest.approx(0.02, rel=0.2)
    alone = method.download(server(prompts, 1), ids[1:2], clients)["experts"]
    assert torch.equal(alone[0], found[0][1]), "whoever else takes part"


def test_an_adapter_learns_at_the_rate_of_the_gate_whose_place_it_takes(text):
    method = make(CoOpAdapter)
    groups = {name: method.rate_group(name) for name in method.init(text, torch.Generator())}
    assert groups == {"ctx": "prompt", "a": "gate", "b": "gate"}
