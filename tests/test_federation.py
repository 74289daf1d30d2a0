"""Promise: sites that keep images and gates to themselves get what the in-process loop gets."""

import hashlib
import importlib.util
import json
import re
import secrets
import shutil
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from helpers import ROOT, refuses
from helpers.runs import equal, near
from helpers.tiny import NAMES, SMALL
from scipy.stats import kstest

from federation import protocol, server
from federation.protocol import ROWS, Parcel, agreement_of, model_of
from federation.server import Answer, Coordinator
from federation.site import Site, read_images
from fpl import privacy, prompts
from fpl.ablations import ABLATIONS
from fpl.controls import CONTROLS
from fpl.experiments import settings, stored, verbs
from fpl.experiments.settings import part_of
from fpl.methods import PromptFL
from fpl.prompts import PromptTree
from fpl.released.methods import RELEASED
from fpl.rounds import Setup, noise_of, run_rounds
from fpl.state import Server

APART = [name for name, kind in ROWS.items() if not kind.in_step]
SITES = ("north", "south", "west", "east")
MADE_OF = {"architecture": "a", "weights": "w", "transform": "t"}
TRAINING = {"rounds": 3, "local_epochs": 1, "batch_size": 4, "lr": 0.02, "gate_lr": 0.05}


@pytest.fixture
def people(clients):
    """Four clients, of whom each has other numbers of images."""
    return replace(clients, train=clients.train[:4], test=clients.test[:4])


@pytest.fixture
def tower(clip):
    return replace(clip, provenance=MADE_OF)


def agreed(method="pfedmoap", settings=None, evaluate="every", **training):
    kind = ROWS[method]
    settings = part_of(SMALL, kind) | (settings or {})
    said = {"name": "rehearsal", "sites": SITES, "classes": NAMES, "method": method, "seed": 4}
    fixed = kind.training  # by the method itself
    training = {k: v for k, v in TRAINING.items() if k not in fixed} | training
    content = said | {"model": MADE_OF, "settings": settings, "training": training}
    rest = {"noise": "named", "evaluate": evaluate, "reveal": method == "afl"}
    return agreement_of(content | rest, "the test")


def alone(clients, i):
    """What site i has: one client."""
    return replace(clients, train=[clients.train[i]], test=[clients.test[i]])


class Wire:
    """Carries parcels in memory; `fault` may change a reply, or lose it by giving None."""

    def __init__(self, sites, fault=None):
        self.at = {900 - 7 * i: site for i, site in enumerate(sites)}
        self.fault = fault or (lambda kind, site, asked, reply: reply)
        self.sent = []

    def addresses(self):
        return [*self.at]

    def ask(self, kind, parcels):
        found = {}
        for address, asked in reversed(parcels.items()):
            site = self.at[address]
            reply = self.fault(kind, site.name, asked, partial(site.answer, kind, asked))
            reply = reply() if callable(reply) else reply
            if reply is not None:
                self.sent.append((kind, site.name, asked, reply))
                found[address] = Answer(reply, asked.bytes, reply.bytes)
        return found


def lost(kind, name, number):
    """Lose the reply of a site in a round, which it never begins."""

    def fault(asked_kind, site, asked, reply):
        hit = (asked_kind, site, asked.words.get("round")) == (kind, name, number)
        return None if hit else reply

    return fault


def altered(name, number, change):
    """Change what a site sends in a round."""

    def fault(kind, site, asked, reply):
        hit = (kind, site, asked.words.get("round")) == ("train", name, number)
        return change(reply()) if hit else reply

    return fault


def sites_of(agreement, folder, tower, clients):
    return [
        Site(name, folder / name, tower, lambda _, i=i: alone(clients, i))
        for i, name in enumerate(agreement.sites)
    ]


def federate(agreement, folder, tower, clients, fault=None):
    """Return coordinator and wire after all rounds."""
    wire = Wire(sites_of(agreement, folder, tower, clients), fault)
    coordinator = Coordinator(agreement, tower, folder / "server.safetensors")
    server.run(coordinator, wire, patience=0)
    return coordinator, wire


def loop(agreement, tower, clients, without=None):
    """Return the rounds of the in-process loop; without: client i in round 1."""
    text = PromptTree(tower, NAMES, agreement.rules.n_ctx)
    if without is not None:
        everybody = torch.arange(len(clients))
        turns = [everybody, everybody[everybody != without], everybody]
        clients = replace(clients, turns=turns)
    setup = Setup(agreement.rules, text, clients, agreement.run, agreement.seeds)
    return list(run_rounds(setup))


def kept(agreement, folder, name):
    return stored.read(folder / name / f"{agreement.key[:16]}.safetensors")


def accuracy(agreement, folder, number):
    found = [kept(agreement, folder, name)[1]["accuracy"] for name in agreement.sites]
    return torch.tensor([said[str(number)] for said in found])


def compare(agreement, folder, coordinator, rounds, same, skip=None):
    """Hold that server, sites and accuracies are what the loop has, but for those of one round."""
    last = rounds[-1].state
    assert same(coordinator.server.params, last.server.params)
    assert same(coordinator.server.uploads, last.server.uploads)
    assert same(coordinator.server.memory, last.server.memory)
    assert torch.equal(coordinator.server.has_upload, last.server.has_upload)
    assert torch.equal(coordinator.server.returned, last.server.returned)
    for i, name in enumerate(agreement.sites):
        own = kept(agreement, folder, name)[0].get("local", {})
        assert same(own, {k: v[i : i + 1] for k, v in last.local.items()})
    for r in rounds:
        if r.number != skip:
            assert torch.equal(accuracy(agreement, folder, r.number), r.accuracy)


@pytest.mark.parametrize("method", APART)
def test_bits_are_those_of_the_loop(method, tower, people, tmp_path, monkeypatch):
    monkeypatch.setitem(prompts.BUDGET, "cpu", 1)  # every client by itself, as at its site
    agreement = agreed(method, participation=0.75)
    coordinator, _ = federate(agreement, tmp_path, tower, people)
    compare(agreement, tmp_path, coordinator, loop(agreement, tower, people), equal)


@pytest.mark.parametrize("method", ["promptfl", "pfedmoap"])
def test_numbers_are_those_of_the_loop_that_trains_all_at_once(method, tower, people, tmp_path):
    agreement = agreed(method, {"n_ctx": 3})
    coordinator, _ = federate(agreement, tmp_path, tower, people)
    compare(agreement, tmp_path, coordinator, loop(agreement, tower, people), near)


@pytest.mark.parametrize("method", ["fedper", "fedamp"])
def test_updates_are_released_at_the_site(method, tower, people, tmp_path, monkeypatch):
    monkeypatch.setitem(prompts.BUDGET, "cpu", 1)
    agreement = agreed(method, epsilon=20.0, clip=0.1, rounds=2)
    coordinator, wire = federate(agreement, tmp_path, tower, people)
    compare(agreement, tmp_path, coordinator, loop(agreement, tower, people), equal)
    secret = replace(agreement, noise="secret")
    other, _ = federate(secret, tmp_path / "secret", tower, people)
    assert not near(other.server.params, coordinator.server.params)


@pytest.fixture
def site(tower, people, tmp_path):
    return sites_of(agreed(), tmp_path, tower, people)[0]


def test_secret_noise_is_as_large_as_that_of_release(site):
    agreement = replace(agreed("promptfl", epsilon=5.0), noise="secret")
    clip, z = agreement.run.clip, noise_of(agreement.rules, agreement.run)
    gen = torch.Generator().manual_seed(1)
    upload = {name: torch.randn(1, 200, w, generator=gen) for name, w in (("a", 300), ("b", 40))}
    begin = {name: value[0] / 2 for name, value in upload.items()}

    def noise(found, name):
        assert found[name].dtype == upload[name].dtype and found[name].shape == upload[name].shape
        return (found[name] - clipped[name]).double().flatten() / (z * clip)

    clipped = privacy.release(upload, begin, clip, 0.0, [gen])
    one, other = (site.released(agreement, 0, upload, begin) for _ in range(2))
    named = privacy.release(upload, begin, clip, z, [gen])
    for name in upload:
        drawn = noise(one, name)
        assert drawn.std().item() == pytest.approx(noise(named, name).std().item(), rel=0.05)
        assert kstest(drawn.numpy(), "norm").pvalue > 1e-6
        assert abs(torch.corrcoef(torch.stack([drawn, noise(other, name)]))[0, 1]) < 0.1
    same = replace(agreed("promptfl", mechanism="clipping"), noise="secret")
    assert near(site.released(same, 0, upload, begin), clipped)


def test_secret_noise_has_no_seed_that_could_be_searched(site, monkeypatch):
    agreement = replace(agreed("promptfl", epsilon=5.0), noise="secret")
    upload, begin = {"ctx": torch.zeros(1, 4, 32)}, {"ctx": torch.zeros(4, 32)}
    drawn = []

    def flipped(at):
        """What leaves the site when one bit of the entropy is another, and all else is equal."""

        def source(number):
            drawn.append(number)
            found = bytearray(hashlib.shake_128(b"entropy").digest(number))
            found[at % number] ^= 0x80
            return bytes(found)

        with monkeypatch.context() as patched:
            patched.setattr(secrets, "token_bytes", source)
            return site.released(agreement, 0, upload, begin)["ctx"].flatten()

    usual = flipped(7)
    assert drawn == [8 * len(usual)]  # each number has its own bits
    for i in (1, 2, 50, len(usual) - 1):
        changed = (flipped(8 * i + 7) != usual).nonzero()[:, 0].tolist()
        assert changed == [0, i]


@pytest.mark.parametrize("method", APART)
def test_a_site_sends_what_is_shared_and_nothing_else(method, tower, people, tmp_path):
    agreement = agreed(method, evaluate="last", rounds=1 if method == "afl" else 2)
    coordinator, wire = federate(agreement, tmp_path, tower, people)
    rounds = loop(agreement, tower, people)
    sizes = [len(own) for own in people.train]
    for kind, name, _, reply in wire.sent:
        if kind == "train":
            assert [*reply.tensors] == ["shared"] and reply.words.keys() == {"site", "round", "key"}
            assert tuple(reply.tensors["shared"]) == agreement.rules.shared
        else:
            assert not reply.tensors
            said = {"site", *MADE_OF, "images"} if kind == "join" else {"site", "round"}
            assert reply.words.keys() == said
        if kind == "join":
            assert reply.words["images"] == sizes[SITES.index(name)]
    for line in coordinator.lines:
        if line.kind == "train":  # the numbers of our tables, in single precision
            r = rounds[line.round]
            at = r.participants.tolist().index(SITES.index(line.site))
            assert (line.down, line.up) == (4 * r.down[at], 4 * r.up[at])


def test_a_round_goes_on_without_a_site_that_was_killed(tower, people, tmp_path, monkeypatch):
    monkeypatch.setitem(prompts.BUDGET, "cpu", 1)
    agreement = agreed()
    fault = lost("train", "west", 1)
    coordinator, _ = federate(agreement, tmp_path, tower, people, fault)
    rounds = loop(agreement, tower, people, without=2)
    compare(agreement, tmp_path, coordinator, rounds, equal, skip=1)


def test_an_upload_that_was_lost_is_missed_once(tower, people, tmp_path):
    def fault(kind, site, asked, reply):  # killed behind its training, before its reply
        hit = (kind, site, asked.words.get("round")) == ("train", "west", 1)
        return reply() and None if hit else reply

    agreement = agreed(evaluate="last")
    coordinator, _ = federate(agreement, tmp_path, tower, people, fault)
    trained = {(x.site, x.round) for x in coordinator.lines if x.kind == "train"}
    assert len(trained) == 4 * 3 - 1 and ("west", 1) not in trained
    assert kept(agreement, tmp_path, "west")[1]["round"] == 2


def test_a_site_that_cannot_write_has_what_it_had(tower, people, tmp_path, monkeypatch):
    agreement = agreed()
    site = sites_of(agreement, tmp_path, tower, people)[2]
    site.answer("join", Parcel(words={"agreement": agreement.text}))
    before = kept(agreement, tmp_path, "west")
    order = Parcel(words={"key": agreement.key, "round": 0})
    with monkeypatch.context() as patched:
        patched.setattr(stored, "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        assert "log" in site.answer("train", order).words["refused"]
    after = kept(agreement, tmp_path, "west")
    assert equal(before[0]["local"], after[0]["local"]) and before[1] == after[1]
    assert "refused" not in site.answer("train", order).words


def test_asked_again_a_site_sends_what_it_has_sent(tower, people, tmp_path):
    agreement = replace(agreed("promptfl", epsilon=20.0), noise="secret")
    _, wire = federate(agreement, tmp_path, tower, people)
    asked, reply = next((a, r) for k, n, a, r in wire.sent[::-1] if (k, n) == ("train", "west"))
    again = wire.at[900 - 7 * 2].answer("train", asked)
    assert equal(again.tensors["shared"], reply.tensors["shared"]) and again.words == reply.words


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_server_that_was_killed_goes_on(kind, tower, people, tmp_path):
    agreement = agreed()

    def killed(asked_kind, site, asked, reply):
        if (asked_kind, site, asked.words.get("round")) == (kind, "south", 1):
            raise KeyboardInterrupt
        return reply

    with pytest.raises(KeyboardInterrupt):
        federate(agreement, tmp_path / "one", tower, people, killed)
    coordinator, _ = federate(agreement, tmp_path / "one", tower, people)
    whole, _ = federate(agreement, tmp_path / "other", tower, people)
    assert equal(coordinator.server.params, whole.server.params)
    assert equal(coordinator.server.uploads, whole.server.uploads)
    for name in SITES:
        one, other = (kept(agreement, tmp_path / place, name) for place in ("one", "other"))
        assert equal(one[0]["local"], other[0]["local"]) and one[1] == other[1]


def shared(reply, **changes):
    return replace(reply, tensors={"shared": {**reply.tensors["shared"], **changes}})


def worded(reply, **changes):
    return replace(reply, words=reply.words | changes)


BAD = {
    "not finite": lambda reply: shared(reply, ctx=reply.tensors["shared"]["ctx"] * torch.nan),
    "[1, 3, 32]": lambda reply: shared(reply, ctx=reply.tensors["shared"]["ctx"][:, :3]),
    "float64": lambda reply: shared(reply, ctx=reply.tensors["shared"]["ctx"].double()),
    "ctx, gate_wq": lambda reply: shared(reply, gate_wq=torch.zeros(1)),
    "in place of ctx": lambda reply: replace(reply, tensors={}),
    "another model": lambda reply: worded(reply, key="0" * 64),
    "this is round 1": lambda reply: worded(reply, round=0),
    "its own log": lambda reply: Parcel(words={"refused": "its own log says why"}),
}


@pytest.mark.parametrize("words", BAD)
def test_what_is_wrong_is_refused_and_harms_nobody(words, tower, people, tmp_path, monkeypatch):
    monkeypatch.setitem(prompts.BUDGET, "cpu", 1)
    agreement = agreed("promptfl", evaluate="last", rounds=2)
    fault = altered("south", 1, BAD[words])
    coordinator, _ = federate(agreement, tmp_path, tower, people, fault)
    refused = {(line.site, line.round): line.refused for line in coordinator.lines if line.refused}
    assert refused.keys() == {("south", 1)} and words in refused["south", 1]
    wanted = loop(agreement, tower, people, without=1)[-1].state.server
    assert equal(coordinator.server.params, wanted.params)
    assert torch.isfinite(coordinator.server.uploads["ctx"]).all()


def test_a_site_refuses_what_a_server_must_not_send(tower, people, tmp_path):
    agreement = agreed("promptfl", rounds=3)
    _, wire = federate(agreement, tmp_path, tower, people, lost("train", SITES[0], 2))
    site = wire.at[900]
    key = agreement.key
    down = {"ctx": torch.zeros(1, 4, 32)}

    def said(number=2, key=key, **tensors):
        asked = Parcel({"down": {**down, **tensors}}, {"key": key, "round": number})
        return site.answer("train", asked).words.get("refused", "")

    assert "not finite" in said(ctx=torch.full((1, 4, 32), torch.inf))
    assert "[1, 5, 32]" in said(ctx=torch.zeros(1, 5, 32))
    assert "not 0 again" in said(number=0)
    for number in (-1, 3):  # rounds that nobody agreed to would share the epsilon
        assert "has agreed to 3 rounds" in said(number=number)
    assert "not joined" in said(key="1" * 64)
    assert "no key" in said(key="../../../north/x")
    assert site.answer("sell", Parcel()).words["refused"]
    assert not said()


ASKED = {
    "not finite": ("fedamp", "begin", {"ctx": torch.full((1, 4, 32), torch.nan)}),
    "its own log": ("pfedmoap", "down", {"experts": torch.zeros(1, 2, 5, 7)}),
}


@pytest.mark.parametrize("words", ASKED)
def test_a_site_says_that_it_cannot_train_from_what_is_sent(words, tower, people, tmp_path):
    method, group, wrong = ASKED[words]
    agreement = agreed(method, epsilon=20.0, rounds=3)
    _, wire = federate(agreement, tmp_path, tower, people, lost("train", SITES[0], 2))
    asked = next(a for kind, name, a, _ in wire.sent[::-1] if (kind, name) == ("train", SITES[0]))
    tensors = {**asked.tensors, group: {**asked.tensors.get(group, {}), **wrong}}
    reply = wire.at[900].answer("train", Parcel(tensors, asked.words | {"round": 2}))
    assert words in reply.words["refused"] and not reply.tensors


def test_only_agreed_sites_with_the_agreed_model_join(tower, people, tmp_path):
    agreement = agreed("promptfl")
    sites = sites_of(agreement, tmp_path, tower, people)
    other = replace(tower, provenance=MADE_OF | {"weights": "others"})
    sites[1] = replace(sites[1], clip=other)
    sites[2] = replace(sites[2], name="moon")
    sites[3] = replace(sites[3], name="north", folder=tmp_path / "thief")
    coordinator = Coordinator(agreement, tower, tmp_path / "server.safetensors")
    refuses_time(lambda: server.run(coordinator, Wire(sites), patience=0), "south, west, east")
    assert len(coordinator.places) == 1
    joined = sorted((line.kind, line.site, line.refused[:25]) for line in coordinator.lines)
    assert joined == sorted(
        [
            ("join", "", "a site does not join: sou"),
            ("join", "", "a site does not join: moo"),
            ("join", "north", ""),
            ("join", "north", "a second site calls itsel"),
        ]
    )
    replies = [site.answer("join", Parcel(words={"agreement": agreement.text})) for site in sites]
    assert "another weights" in replies[1].words["refused"]
    refuses(lambda: coordinator.admit(1, replies[3]), ["second site", "north"])
    stranger = worded(replies[0], site="moon")
    refuses(lambda: coordinator.admit(1, stranger), ["'moon'", "none of north"])
    liar = worded(replies[0], site="south", weights="others")
    refuses(lambda: coordinator.admit(1, liar), ["south", "another weights"])
    refuses(
        lambda: coordinator.admit(1, worded(replies[0], site="south", images=0)), ["south", "0"]
    )


def test_a_site_with_its_own_copy_joins_and_trains_under_no_other(tower, people, tmp_path):
    ours = agreed("promptfl", epsilon=20.0)
    trusting = sites_of(ours, tmp_path, tower, people)[0]
    careful = replace(trusting, copy=ours)
    others = {
        "method": agreed("fedper", epsilon=20.0),
        "training": agreed("promptfl", epsilon=50.0),
        "noise": replace(ours, noise="secret"),
        "name": replace(ours, name="once more"),
        "seed": replace(ours, seed=5),
    }
    for differs, theirs in others.items():
        join = Parcel(words={"agreement": theirs.text})
        train = Parcel(words={"key": theirs.key, "round": 0})
        refused = careful.answer("join", join).words["refused"]
        assert f"({differs}" in refused and "north" in refused
        assert not trusting.path(theirs.key).exists()
        assert "refused" not in trusting.answer("join", join).words
        assert f"({differs}" in careful.answer("train", train).words["refused"]  # joined before
    said = careful.answer("join", Parcel(words={"agreement": ours.text})).words
    assert "refused" not in said


def test_a_site_says_in_its_log_what_it_joins(tower, people, tmp_path, caplog):
    caplog.set_level("INFO", "federation")
    ours = agreed("promptfl", epsilon=20.0)
    site = sites_of(ours, tmp_path, tower, people)[0]
    join = Parcel(words={"agreement": ours.text})
    site.answer("join", join)
    assert "north joins: method promptfl, epsilon 20, noise named, 3 rounds" in caplog.text
    assert "no copy of the agreement" in caplog.text
    caplog.clear()
    replace(site, copy=ours).answer("join", join)
    assert "method promptfl" in caplog.text and "no copy" not in caplog.text


def test_a_site_that_does_not_join_stands_in_the_file_of_the_server(tower, people, tmp_path):
    agreement = agreed("promptfl", rounds=1)
    sites = sites_of(agreement, tmp_path, tower, people)
    sites[1] = replace(sites[1], clip=replace(tower, provenance=MADE_OF | {"weights": "others"}))
    path = tmp_path / "server.safetensors"
    coordinator = Coordinator(agreement, tower, path, sizes={1: 4})  # it has been here before
    server.run(coordinator, Wire(sites), patience=0)
    lines = stored.read(path)[1]["lines"]
    refused = {line["refused"] for line in lines if line["kind"] == "join"}
    assert len(refused) == 2 and any("another weights" in why for why in refused)


def test_the_readme_says_which_methods_can_be_agreed_on():
    content = json.loads(agreed("promptfl").text)
    outside = {*CONTROLS, *ABLATIONS, *RELEASED, "dpfpl"}
    assert not set(APART) & outside and {*settings.ROWS} == {*APART, *outside}
    for method in outside - {"dpfpl"}:
        refuses(lambda m=method: agreement_of(content | {"method": m}, "x"), [method])


def refuses_time(call, words):
    with pytest.raises(TimeoutError, match=words):
        call()


@pytest.mark.parametrize("choice", ["oracle", "disjoint"])
def test_what_needs_images_on_the_server_is_refused(choice):
    refuses(lambda: agreed("pfedmoap", {"choice": choice}), [choice, "class", "knn"])


def test_what_clients_exchange_in_every_step_is_refused():
    assert set(ROWS) - set(APART) == {"dpfpl"}
    refuses(lambda: agreed("dpfpl"), ["rehearsal", "DP-FPL", "every step", "another method"])


def test_noise_that_whoever_knows_the_seed_can_take_away_is_refused():
    noise = {"bound": 1.0, "noise": 1.0}
    refuses(lambda: agreed("fedsept", noise), ["noise in a step", "agreed seed", "epsilon"])


def test_uploads_that_are_features_and_labels_are_refused_unless_agreed_on(tower, people, tmp_path):
    few = replace(people, train=[people.train[0][:1], *people.train[1:]])
    agreement = agreed("afl", {"gamma": 0.0})
    _, wire = federate(agreement, tmp_path, tower, few)
    moment = next(
        reply.tensors["shared"]["moment"][0]
        for kind, name, _, reply in wire.sent
        if (kind, name) == ("train", SITES[0])
    )
    label = people.labels[people.train[0][0]]  # the feature stands in the column of its label
    assert near({"x": moment[:, label]}, {"x": people.feats[people.train[0][0]]})
    assert moment.abs().sum(0).nonzero()[:, 0].tolist() == [label]
    content = json.loads(agreement.text)
    content["training"] = {k: v for k, v in content["training"].items() if k != "epsilon"}
    wanted = ["rehearsal", "AFL", "features and labels", "reveal: true"]
    refuses(lambda: agreement_of(content | {"reveal": False}, "the test"), wanted)
    noisy = content | {"reveal": False, "training": content["training"] | {"epsilon": 8.0}}
    refuses(lambda: agreement_of(noisy | {"noise": "named"}, "the test"), wanted)
    assert not agreement_of(noisy | {"noise": "secret"}, "the test").reveal


def test_a_line_that_is_not_needed_does_not_change_the_key():
    agreement = agreed("promptfl")
    assert "reveal" not in agreement.text
    assert replace(agreement, reveal=True).key != agreement.key


def test_the_readme_says_of_every_method_what_the_server_needs():
    text = (ROOT / "federation" / "README.md").read_text()
    table = text.split("| method | the server needs |")[1].split("\n\n")[0]
    needs = {}
    for line in table.splitlines()[2:]:
        names, what, _ = (cell.strip() for cell in line.strip("|").split("|"))
        needs |= dict.fromkeys(names.split(", "), what)
    kinds = {re.split(" [(]|, ", ROWS[name].title)[0]: ROWS[name] for name in APART}
    assert needs.keys() == kinds.keys()
    for name, kind in kinds.items():
        assert (needs[name] == "nothing") == (kind().shared == ())
        sums = {"weighted by": [0.25, 0.75], "alike": [0.5, 0.5], "the sum": [1.0, 1.0]}
        for word in (word for word in sums if word in needs[name]):
            assert aggregated(kind()) == pytest.approx(sums[word])


def aggregated(method):
    """What each of two sites counts in the aggregate, the second of which has thrice the images."""
    has = torch.zeros(2, dtype=torch.bool)
    uploads = {name: torch.eye(2) for name in method.shared}
    server = Server({name: torch.zeros(2) for name in uploads}, uploads, has, has)
    after = method.aggregate(server, torch.arange(2), uploads, torch.tensor([4, 12]))
    return after.params[method.shared[0]].tolist()


def test_what_cannot_be_agreed_on_is_refused():
    refuses(lambda: agreed("promptfl", optimiser="shared"), ["shared", "fresh"])
    refuses(lambda: agreed("pfedmoap", {"n_expert": 2}), ["n_expert", "n_experts"])
    content = json.loads(agreed("promptfl").text)
    twice = content | {"sites": ["north", "north"]}
    refuses(lambda: agreement_of(twice, "the test"), ["sites", "once"])
    refuses(lambda: agreement_of(content | {"method": "pfedmoap_released"}, "x"), ["method"])


def test_a_server_goes_on_with_its_own_federation_only(tower, people, tmp_path):
    federate(agreed("promptfl", rounds=1), tmp_path, tower, people)
    again = agreed("promptfl", rounds=2)
    state = tmp_path / "server.safetensors"
    refuses(lambda: Coordinator(again, tower, state), ["another agreement"])


def test_agreements_are_read_from_yaml(tower, tmp_path):
    path = tmp_path / "agreement.yaml"
    path.write_text("name: x\nsites: [a, b]\nclasses: [cat, dog]\nmethod: promptfl\n")
    found = protocol.read(path, tower.provenance | {"model": "where it lies"})
    assert found.model == model_of(MADE_OF) and found.rules == PromptFL()
    path.write_text(path.read_text() + "model: {}\n")
    refuses(lambda: protocol.read(path, tower.provenance), ["model", "own CLIP"])


def test_own_images_become_a_client_with_the_agreed_labels(here, tmp_path):
    clip = verbs.load("local-dir:clip")
    root = tmp_path / "images"
    for path in sorted(here.glob("data/shapes/images/*/*/*.png")):
        if path.parent.name in ("plain_star", "plain_heart"):
            split = "train" if "sketch" in str(path) or "photo" in str(path) else "test"
            place = root / split / path.parent.name
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)
    classes = ("plain arrow", "plain_star", "plain heart")
    agreement = replace(agreed("fedotp"), classes=classes)
    found = read_images(root, tmp_path, clip, agreement)
    names = [classes[i].replace("_", " ") for i in found.labels.tolist()]
    paths = sorted(p for p in root.rglob("*.png"))
    assert sorted(names) == sorted(p.parent.name.replace("_", " ") for p in paths)
    assert len(found.train[0]) == sum("/train/" in str(p) for p in paths)
    assert len(found.test[0]) == sum("/test/" in str(p) for p in paths)
    assert found.patches.shape[0] == len(paths)
    less = replace(agreement, classes=classes[:2])
    refuses(lambda: read_images(root, tmp_path, clip, less), ["plain heart", "class"])


class Record(dict):
    """Stands for Flower's records, groups by name, and for its messages."""

    @property
    def config_records(self):
        return self

    array_records = {}

    def __init__(self, content=(), *_, **__):
        super().__init__(content)
        self.content = self


@pytest.fixture
def app(monkeypatch):
    """The adapter as Flower loads it, with something in place of Flower, which is not here."""
    for name in ("app", "clientapp", "serverapp", "supercore.inflatable.inflatable_object"):
        monkeypatch.setitem(sys.modules, f"flwr.{name}", MagicMock())
    for name in ("RecordDict", "ConfigRecord", "Message"):
        setattr(sys.modules["flwr.app"], name, Record)
    spec = importlib.util.spec_from_file_location("app", ROOT / "federation" / "app.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


HERE = {"site": "north", "images": "ward7/images", "folder": "ward7/own", "clip": "local-dir:clip"}
BROKEN = {
    "ward7/models": (HERE | {"clip": "local-dir:ward7/models"}, {}),  # no CLIP there
    "does not say folder": (HERE | {"folder": ""}, {}),
    "ward7/copy.yaml": (HERE | {"agreement": "ward7/copy.yaml"}, {}),
    "KeyError": (HERE, None),  # a message that is no parcel
    "ward7/images": (HERE, {"agreement": "ours"}),
}


@pytest.mark.parametrize("words", BROKEN)
def test_a_site_that_cannot_answer_tells_the_server_no_more(words, app, here, caplog):
    config, sent = BROKEN[words]
    if sent:
        model = model_of(verbs.load("local-dir:clip").provenance)
        sent = {"agreement": replace(agreed(), model=model).text}
    message = Record({} if sent is None else {"words": sent})
    reply = app.reply("join", message, SimpleNamespace(node_config=config))
    assert reply["words"] == {"refused": "north cannot do it, its own log says why"}
    assert words in caplog.text


def test_an_error_of_flower_is_in_the_log_of_the_server(app, caplog):
    error = SimpleNamespace(code=3, reason="Traceback /ward7")
    reply = MagicMock(**{"has_error.return_value": True, "metadata.src_node_id": 8}, error=error)
    grid = MagicMock(**{"send_and_receive.return_value": [reply]})
    assert app.Flower(grid, 1.0).ask("train", {}) == {}
    assert "node 8: train fails with Flower's error code 3" in caplog.text
    assert "ward7" not in caplog.text


def test_flower_is_known_to_the_adapter_alone():
    for name in ("protocol", "server", "site"):
        assert "flwr" not in (ROOT / "federation" / f"{name}.py").read_text()
