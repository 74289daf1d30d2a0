"""Promise: whichever way experts are chosen, mixed and kept, it is what its name says."""

import dataclasses
import weakref

import pytest
import torch
import torch.nn.functional as F
from conftest import NAMES, error, make, tiny_model
from test_identities import HALF, RUN, SEEDS, always, equal, near, play, read

from fpl import gate, rounds
from fpl.controls import TEMPLATES, GateAlone
from fpl.methods import CHOICES, PFedMoAP
from fpl.prompts import Clip, PromptTree
from fpl.state import Clients, Lookup, Server

SEEN = torch.tensor([True, True, True, False, True, True])


def server(pool, number=0, seed=1):
    return Server({}, {"ctx": pool}, SEEN, number, lambda *key: rounds.generator(seed, *key))


@pytest.fixture(scope="module")
def pool():
    return torch.randn(6, 3, 8, generator=torch.Generator().manual_seed(0))


def chosen(choice, pool, clients=None, k=2, who=(0, 1, 4), **where):
    return PFedMoAP(n_experts=k, choice=choice).neighbours(server(pool, **where), torch.tensor(who), clients).tolist()


# Choice


@pytest.mark.parametrize("choice", CHOICES)
def test_experts_are_others_with_an_upload_and_no_more_than_there_are(choice, pool, clients):
    for k, number in ((1, 0), (2, 3), (5, 1)):
        for i, experts in zip((0, 1, 4), chosen(choice, pool, clients, k, number=number), strict=True):
            assert len(set(experts)) == len(experts) == min(k, 4) and i not in experts and 3 not in experts


def test_knn_and_cosine_take_the_nearest_by_their_own_measure(pool):
    flat = (pool * torch.tensor([1.0, 5.0, 1.0, 1.0, 0.2, 3.0]).view(6, 1, 1)).flatten(1)
    others = {i: [j for j in range(6) if j not in (i, 3)] for i in (0, 1, 4)}
    l2 = [sorted(others[i], key=lambda j: (flat[i] - flat[j]).norm().item())[:2] for i in others]
    angle = [sorted(others[i], key=lambda j: -F.cosine_similarity(flat[i], flat[j], dim=0).item())[:2] for i in others]
    assert chosen("knn", flat.view_as(pool)) == l2 and chosen("cosine", flat.view_as(pool)) == angle and l2 != angle


def test_random_is_drawn_anew_for_every_client_and_round_same_for_every_round_fixed_once(pool):
    many = {c: [chosen(c, pool, number=t, k=1, who=(0, 1, 2, 4, 5)) for t in range(40)] for c in ("random", "same", "fixed")}
    agree = {c: [len({e for (e,) in found}) for found in rounds_] for c, rounds_ in many.items()}
    assert max(agree["random"]) > 2 and max(agree["same"]) == 2 == max(agree["fixed"])  # the expert itself takes the next one
    assert len({str(found) for found in many["same"]}) > 5 and len({str(found) for found in many["fixed"]}) == 1
    drawn = [c for c in CHOICES if c != "oracle" and chosen(c, pool, seed=2, k=1) != chosen(c, pool, k=1)]
    assert drawn == ["random", "same", "fixed"]


def test_the_oracle_takes_the_largest_overlap_of_labels():
    labels = torch.tensor([0, 0, 1, 0, 1, 1, 2, 2, 2, 1, 1, 0])
    parts = torch.arange(12).split(2)  # 00, 10, 11, 22, 21, 10
    clients = Clients(torch.ones(12, 2), labels, parts, parts, 3)
    everybody = dataclasses.replace(server(torch.zeros(6, 1, 1)), seen=torch.ones(6, dtype=torch.bool))
    method = PFedMoAP(n_experts=2, choice="oracle")
    assert method.neighbours(everybody, torch.tensor([0, 1, 3]), clients).tolist() == [[1, 5], [5, 0], [4, 0]]


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_runs_and_only_the_choice_differs(choice, text, clients):
    log = play(dataclasses.replace(make(PFedMoAP), choice=choice), text, clients, HALF)
    plain = play(make(PFedMoAP), text, clients, HALF)
    assert equal(log.own[0], plain.own[0]), "the first round has no experts"
    assert equal(log.own[-1], plain.own[-1]) == (choice == "knn")


# Mixing


@pytest.mark.parametrize("mixing", gate.NAMES)
def test_each_gate_has_the_numbers_its_docstring_says(mixing):
    g, k = 128, 10
    made = gate.init(g, torch.Generator(), mixing, k)
    assert tuple(made) == gate.NAMES[mixing]
    assert (
        sum(v.numel() for v in made.values())
        == {"attention": 66048, "uniform": 33024, "linear": k * (g + 1), "average": 0}[mixing]
    )


@pytest.mark.parametrize("mixing", gate.NAMES)
def test_every_mixing_has_gradients_for_all_it_declares(mixing, clients):
    text = PromptTree(Clip(tiny_model().double()), NAMES, 4)
    method, gen = dataclasses.replace(make(PFedMoAP), mixing=mixing), torch.Generator().manual_seed(1)
    p = {k: v.double().expand(2, *v.shape).clone().requires_grad_() for k, v in method.init(text, gen).items()}
    ctx = torch.randn(6, 4, 32, generator=gen).double()
    f = read(method, text, Server({}, {"ctx": ctx}, torch.ones(6, dtype=torch.bool)), torch.tensor([0, 2]), clients)
    order = torch.stack([clients.train[i][:4] for i in (0, 2)])
    method.loss(text, p, f, clients.feats[order].double(), clients.labels[order]).sum().backward()
    silent = {"gate_bk", "gate_bv", "gate_bo"}  # equal for all experts or classes
    assert all((v.grad.abs().max() > 1e-8) == (k not in silent) for k, v in p.items())


def random_gate(mixing, k=3, g=8):
    gen = torch.Generator().manual_seed(3)
    p = {name: 2 * v.double() for name, v in gate.init(g, gen, mixing, k).items()}
    return p, torch.randn(5, g, generator=gen).double(), torch.randn(k, 4, g, generator=gen).double()


def test_uniform_is_attention_without_queries():
    p, image, experts = random_gate("attention")
    p = {name: torch.zeros_like(v) if name in ("gate_wq", "gate_bq") else v for name, v in p.items()}
    assert error(gate.mix(p, image, experts, 2, 10.0, "uniform"), gate.mix(p, image, experts, 2, 10.0)) < 1e-12


def test_linear_is_a_softmax_over_places_by_the_image_alone():
    p, image, experts = random_gate("linear")
    weight = (image @ p["gate_wr"].T + p["gate_br"]).softmax(-1)
    want = sum(weight[:, k : k + 1] * (image @ experts[k].T) for k in range(3))
    assert error(gate.mix(p, image, experts, mixing="linear"), want) < 1e-12
    fewer = gate.mix(p, image, experts[:2], mixing="linear")
    weight = (image @ p["gate_wr"][:2].T + p["gate_br"][:2]).softmax(-1)
    assert error(fewer, sum(weight[:, k : k + 1] * (image @ experts[k].T) for k in range(2))) < 1e-12


def test_average_is_the_mean_expert():
    _, image, experts = random_gate("average")
    assert error(gate.mix({}, image, experts, mixing="average"), image @ experts.mean(0).T) < 1e-12


def test_alone_nothing_travels_and_the_templates_are_the_experts(text, clients):
    method = make(GateAlone)
    log = play(method, text, clients, HALF)
    assert all(not r.up.any() and not r.down.any() for r in log.rounds)
    with pytest.raises(ValueError, match="between 1 and 9"):
        dataclasses.replace(method, n_experts=0).check(text, clients)
    f = method.frozen(text, {}, torch.tensor([3, 1]), clients)["experts"]
    assert f.shape == (2, method.n_experts, len(NAMES), method.d_gate) and torch.equal(f[0], f[1])
    assert torch.equal(f[0, 0], method.pool(text.zero_shot(TEMPLATES[0])))


def test_features_are_held_once_and_copied_only_for_those_who_train_together(text, clients, monkeypatch):
    taken, take = [], Lookup.__getitem__

    def counted(self, at):
        found = take(self, at)
        taken.append((len(self.rows), len(found)))
        return found

    monkeypatch.setattr(Lookup, "__getitem__", counted)
    monkeypatch.setattr(type(text), "at_once", 2)
    play(dataclasses.replace(make(PFedMoAP), n_experts=len(clients) - 1), text, clients)
    held, copied = (max(numbers) for numbers in zip(*taken, strict=True))
    assert held <= len(clients) and copied == 2


def test_the_last_rounds_features_are_let_go_before_the_next_are_made(text, clients):
    made, held = [], []

    class Watched(PFedMoAP):
        def frozen(self, text, down, who, clients):
            held.append(sum(ref() is not None for ref in made))
            found = super().frozen(text, down, who, clients)
            made.extend(weakref.ref(v) for v in found.values())
            return found

    for _ in rounds.run_rounds(make(Watched), text, clients, RUN, SEEDS):
        pass
    assert len(made) == RUN.rounds - 1 and not any(held)


def test_tested_after_aggregation_all_have_the_average_prompt(text, clients):
    before, after = (play(dataclasses.replace(make(PFedMoAP), tested=when), text, clients, HALF) for when in ("before", "after"))
    assert equal(before.own[-1], after.own[-1]), "training is the same"
    assert all(torch.equal(ctx, after.deployed[-1]["ctx"][0]) for ctx in after.deployed[-1]["ctx"])
    assert not equal(before.deployed[-1], after.deployed[-1])


@pytest.mark.parametrize("mixing", gate.NAMES)
def test_permuting_experts_changes_nothing_but_for_a_router_by_place(mixing):
    p, image, experts = random_gate(mixing)
    one, other = (gate.mix(p, image, experts[list(order)], 2, 10.0, mixing) for order in ((0, 1, 2), (0, 2, 1)))
    assert (error(one, other) < 1e-12) == (mixing != "linear")


def test_mean_pooling_is_of_neighbours():
    x = torch.arange(12.0).view(1, 12)
    assert gate.POOLINGS["mean"](x, 4).tolist() == [[1, 4, 7, 10]] and gate.POOLINGS["stride"](x, 4).tolist() == [[0, 3, 6, 9]]


# Keeping


def test_a_private_gate_stays_and_an_aggregated_one_is_averaged_and_used_by_everybody(text, clients):
    private, shared = (dataclasses.replace(make(PFedMoAP), gate_kept=kept) for kept in ("private", "aggregated"))
    assert private.shared == ("ctx",) and shared.shared == ("ctx", *gate.NAMES["attention"])
    log = play(shared, text, clients, RUN)
    sizes = torch.tensor([float(len(train)) for train in clients.train])
    for own, server, deployed in zip(log.own, log.servers, log.deployed, strict=True):
        for k in gate.NAMES["attention"]:
            mean = torch.tensordot(sizes / sizes.sum(), own[k], dims=1)
            assert near({k: server.params[k]}, {k: mean}) and all(torch.equal(v, server.params[k]) for v in deployed[k])
        assert torch.equal(deployed["ctx"], own["ctx"])
    assert always(equal, play(private, text, clients, RUN).own[:1], log.own[:1]), "gates differ once experts are there"
