"""Promise: one image moves what a step of DP-FPL releases by as much as its epsilon assumes.

And each release counts.
"""

import math
from dataclasses import replace

import pytest
import torch
from helpers import refuses
from helpers.more_private import given
from helpers.runs import RUN, SEEDS, equal, play
from helpers.tiny import NAMES, make, tiny_model
from scipy.stats import norm

from fpl.audit import image_privacy
from fpl.audit.privacy import epsilon_of
from fpl.more_methods.private import DPFPL, FedSEPT
from fpl.prompts import Clip, PromptTree
from fpl.rounds import Setup, Training, run_rounds

BOUND = 0.05  # below the norm of any image's gradient here
FORMS = {  # of what a step releases gradients, by our names
    "promptfl": ("ctx",),
    "fedotp": ("ctx", "local"),
    "fedpgp": ("ctx", "u", "v"),
    "dplora": ("ctx", "u", "v"),
    "dpfpl": ("ctx", "u", "v"),
}


@pytest.fixture(scope="module")
def double():
    """The classes, in double precision: what an image moves is told from rounding."""
    return PromptTree(Clip(tiny_model().double()), NAMES, 4)


def tensors(method, text, n=1):
    """Return what clients learn, of a size at which every gradient is large."""
    gen = torch.Generator().manual_seed(3)
    drawn = method.init(text, gen)
    return {k: 5 * v.double().expand(n, *v.shape) for k, v in drawn.items()}


def released(method, text, x, y, **noise):
    """Return one client's gradients as they are released."""
    p = tensors(method, text)
    gen = torch.Generator().manual_seed(4)
    low = method.factors(p, torch.randn(text.width, method.rank, generator=gen).double())
    _, found = method.released(text, p, low, (x[None], y[None]), given(**noise))
    return {name: value[0] for name, value in found.items()}


def batch(clients, b=8):
    index = clients.train[0][:b]
    return clients.feats[index].double(), clients.labels[index]


def moved(method, text, clients):
    """Return how far each gradient moves, in bound / b, where one image is replaced by another."""
    x, y = batch(clients)
    before = released(method, text, x, y)
    most = dict.fromkeys(before, 0.0)
    for i in clients.train[2].tolist():
        other_x, other_y = x.clone(), y.clone()
        other_x[0], other_y[0] = -3 * clients.feats[i], clients.labels[i]
        after = released(method, text, other_x, other_y)
        for name, value in before.items():
            far = (after[name] - value).norm().item() * len(y) / method.bound
            most[name] = max(most[name], far)
    return most


@pytest.mark.parametrize("form", FORMS)
def test_one_image_moves_a_gradient_by_twice_its_share_at_most(form, double, clients):
    method = make(DPFPL, factorization=form, bound=BOUND)
    most = moved(method, double, clients)
    assert tuple(most) == method.noised == FORMS[form]
    assert all(0.5 < far <= 2 + 1e-9 for far in most.values())


@pytest.mark.parametrize("form", FORMS)
def test_an_image_that_counts_as_zero_moves_it_by_its_share(form, double, clients):
    """The neighbours of the epsilon: one image's gradient, or zeros in its place."""
    method = make(DPFPL, factorization=form, bound=BOUND)
    x, y = batch(clients)
    whole, rest = (released(method, double, *part) for part in ((x, y), (x[1:], y[1:])))
    for name, value in whole.items():
        share = value - rest[name] * (len(y) - 1) / len(y)
        assert share.norm().item() * len(y) == pytest.approx(BOUND)


def test_where_whole_batches_are_clipped_it_moves_further(double, clients):
    """N5: so the release hides less than it says."""
    method = make(DPFPL, bound=BOUND, clip_by="batch")
    assert max(moved(method, double, clients).values()) > 2.5


def test_the_noise_is_that_of_one_image_in_the_mean_of_all_clients(text, clients):
    """Of the shared prompt each client adds its part; of its own factors all of it."""
    still = make(DPFPL, bound=1e-9, noise=2e9, n_ctx=4)  # std 2 / b, and no signal
    n, b = 4, 3
    index = torch.stack([clients.train[i][:b] for i in range(n)])
    x, y = clients.feats[index], clients.labels[index]
    p = {k: v.float() for k, v in tensors(still, text, n).items()}
    gen = torch.Generator().manual_seed(5)
    seen = {"ctx": [], "u": []}

    def draw(name, *shape):
        return torch.randn(n, *shape, generator=gen)

    for _ in range(40):
        low = still.factors(p, draw("factors", text.width, still.rank))
        _, found = still.released(text, p, low, (x, y), draw)
        _, stepped = still.gradients(text, p, {}, x, y, draw)
        assert torch.equal(stepped["ctx"], stepped["ctx"][:1].expand_as(stepped["ctx"]))
        seen["ctx"].append(stepped["ctx"][0])
        seen["u"].append(found["u"])
    std = {name: torch.stack(values).std().item() for name, values in seen.items()}
    assert std["ctx"] == pytest.approx(2 / b / n, rel=0.05)
    assert std["u"] == pytest.approx(2 / b, rel=0.05)


def test_noise_is_anew_for_every_client_and_step(text, clients):
    log = []

    class Watched(DPFPL):
        def released(self, text, p, low, batch, draw):
            loss, found = super().released(text, p, low, batch, draw)
            log.extend(found["u"])
            return loss, found

    method = make(Watched, bound=1e-9, noise=1e9)
    training = replace(RUN, rounds=2)
    [*run_rounds(Setup(method, text, clients, training, SEEDS))]
    noise = torch.stack(log).flatten(1)
    assert len(noise) == len(noise.unique(dim=0)) == 6 * 2 * 2
    unit = torch.nn.functional.normalize(noise, dim=1)
    assert ((unit @ unit.T).abs() - torch.eye(len(unit))).max() < 0.95


def test_two_runs_draw_the_same(text, clients):
    method = make(DPFPL, bound=1.0, noise=1.0)
    one, two = (play(method, text, clients, replace(RUN, rounds=2)) for _ in range(2))
    assert equal(one.local[-1], two.local[-1])


# Epsilon


def delta_of(epsilon, z, releases):
    """Return the delta of Gaussian releases, of their privacy loss N(mu^2 / 2, mu^2)."""
    mu = math.sqrt(releases) / z
    return norm.sf(epsilon / mu - mu / 2) - math.exp(epsilon) * norm.sf(epsilon / mu + mu / 2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("rounds", "epochs"), [(1, 1), (10, 1), (5, 3)])
def test_epsilon_counts_every_gradient_of_every_epoch(form, rounds, epochs):
    method = DPFPL(factorization=form, bound=1.0, noise=20.0)
    training = Training(rounds=rounds, local_epochs=epochs)
    many = rounds * epochs * len(FORMS[form])
    assert image_privacy.releases(method, training) == many
    found = image_privacy.epsilon(method, training, 1e-5)
    assert found == epsilon_of(20.0, 1e-5, many)
    assert delta_of(found, 20.0, many) == pytest.approx(1e-5, rel=1e-4)


def test_an_image_is_in_as_many_releases_as_are_counted(text, clients):
    """At most once in an epoch, however many batches this has."""
    seen = []

    class Watched(DPFPL):
        def gradients(self, text, p, context, x, y, draw):
            seen.extend(x.flatten(0, 1).tolist())
            return super().gradients(text, p, context, x, y, draw)

    method = make(Watched, bound=1.0, noise=1.0)
    training = replace(RUN, batch_size=1)
    [*run_rounds(Setup(method, text, clients, training, SEEDS))]
    times = {tuple(x): 0 for x in seen}
    for x in seen:
        times[tuple(x)] += 1
    assert set(times.values()) == {RUN.rounds * RUN.local_epochs}
    most = image_privacy.releases(method, training)
    assert most == RUN.rounds * RUN.local_epochs * 3


def test_the_release_says_less_than_it_spends():
    """N6: its own epsilon counts rounds, not the steps and tensors of each."""
    sigma = math.sqrt(100 * math.log(1e5)) / 0.4
    method = DPFPL(bound=10.0, noise=sigma)
    assert image_privacy.epsilon(method, Training(rounds=100, local_epochs=1), 1e-5) > 0.6


NO_EPSILON = {
    "no bound": ({}, ["bound 0", "clip_by image"]),
    "whole batches": ({"bound": 1.0, "noise": 1.0, "clip_by": "batch"}, ["clip_by batch"]),
    "no noise": ({"bound": 1.0}, ["noise multiplier 0", "above 0"]),
}


@pytest.mark.parametrize("case", NO_EPSILON)
def test_without_noise_and_bound_there_is_no_epsilon(case):
    changes, words = NO_EPSILON[case]
    refuses(lambda: image_privacy.epsilon(DPFPL(**changes), RUN, 1e-5), words)


# Settings

WRONG = {
    "noise of nothing": (DPFPL, {"noise": 1.0}, ["noise 1.0", "set bound too"]),
    "noise of nothing, FedSEPT": (FedSEPT, {"noise": 1.0}, ["noise 1.0", "set bound too"]),
    "too large a rank": (DPFPL, {"rank": 5}, ["rank 5", "n_ctx 4"]),
    "heads": (FedSEPT, {"heads": 3}, ["heads 3", "width 32"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused_in_one_sentence(case, text, clients):
    kind, changes, words = WRONG[case]
    refuses(lambda: make(kind, **changes).check(text, clients), words)


# What the methods are besides


def test_training_sets_are_cut_to_the_smallest_and_keep_their_mixture(clients):
    cut = DPFPL().clients(clients)
    assert {len(part) for part in cut.train} == {3} and cut.test is clients.test
    for whole, part in zip(clients.train, cut.train, strict=True):
        place = [whole.tolist().index(i) for i in part.tolist()]
        assert place == [len(whole) * k // 3 for k in range(3)]


def test_all_clients_step_together_and_keep_a_prompt_of_their_own(text, clients):
    log = play(make(DPFPL), text, clients)
    for local in log.local:
        assert torch.equal(local["ctx"], local["ctx"][:1].expand_as(local["ctx"]))
        assert len(local["local"].unique(dim=0)) == len(clients)
    steps = RUN.local_epochs  # of batches of three images, one an epoch
    for r in log.rounds:
        assert {*r.up.tolist()} == {*r.down.tolist()} == {steps * 4 * text.width}


def test_the_minus_sign_is_the_projection_and_the_plus_counts_thrice_what_is_inside(
    double, clients
):
    """N4, for the gradient of the prompt, without clipping."""
    x, y = batch(clients)
    p = tensors(make(DPFPL), double)
    q = torch.randn(double.width, 2, generator=torch.Generator().manual_seed(6)).double()
    found = {}
    for sign in (1, -1):
        method = make(DPFPL, sign=sign)
        own = {name: value.clone().requires_grad_() for name, value in p.items()}
        _, grads = method.gradients(double, own, {}, x[None], y[None], lambda *_: q[None])
        found[sign] = 10 * grads["local"][0]
    low = method.factors(p, q)
    u, v = low["u"][0], low["v"][0]
    whole = grads["ctx"][0]
    projection = u @ u.T @ whole + whole @ v.T @ v - u @ u.T @ whole @ v.T @ v
    assert torch.allclose(found[-1], projection, atol=1e-12)
    inside = u @ u.T @ whole @ v.T @ v
    assert torch.allclose(u @ u.T @ found[1] @ v.T @ v, 3 * inside, atol=1e-12)


def test_dplora_evaluates_with_the_same_factors_each_time(text):
    """N7: the release draws anew, and says something else of the same images."""
    method = make(DPFPL, factorization="dplora")
    p = {k: v.float() for k, v in tensors(method, text).items()}
    assert torch.equal(method.ctx(p), method.ctx(p))


def test_dropout_is_for_training_alone(text, clients):
    method = make(FedSEPT, dropout=0.5)
    index = clients.train[0][:4]
    x, y = clients.feats[index][None], clients.labels[index][None]
    drawn = method.init(text, torch.Generator().manual_seed(0))
    p = {name: (3 * value[None]).requires_grad_() for name, value in drawn.items()}

    def loss(*heads):
        dropped = torch.tensor(heads).expand(4, -1)
        return method.gradients(text, p, {}, x, y, given(dropout=dropped))[0].item()

    plain = method.loss(text, p, {}, x, y).item()
    assert len({plain, loss(9.0, -9.0, 9.0, 9.0), loss(9.0, 9.0, -9.0, 9.0)}) == 3
    # what is kept is scaled up, which the norm behind it takes back
    assert loss(9.0, 9.0, 9.0, 9.0) == pytest.approx(plain, rel=1e-4)


def test_the_router_has_no_decay(text):
    drawn = make(FedSEPT).init(text, torch.Generator())
    groups = [{"name": name, "params": [value]} for name, value in drawn.items()]
    stepper = make(FedSEPT).optimiser(groups, 0.9, 0.5)
    decay = {group["name"]: group["weight_decay"] for group in stepper.param_groups}
    assert {name for name, value in decay.items() if value} == {"a", "r"}
    assert all(group["momentum"] == 0.9 for group in stepper.param_groups)


def test_the_constant_factor_of_fedsept_is_the_same_for_all_and_stays(text, clients):
    log = play(make(FedSEPT), text, clients)
    begin = log.local[0]["b0"]
    assert torch.equal(begin, begin[:1].expand_as(begin))
    assert all(torch.equal(local["b0"], begin) for local in log.local)
    assert all([*uploads] == ["a"] for uploads in log.uploads)


def test_clipping_single_images_of_fedsept_bounds_each(double, clients):
    method = make(FedSEPT, bound=BOUND, dropout=0.0)
    x, y = batch(clients)
    p = {k: v.clone().requires_grad_() for k, v in tensors(method, double).items()}
    found = []
    for first in (x[0], -3 * x[0]):
        other = torch.cat([first[None], x[1:]])
        _, grads = method.gradients(double, p, {}, other[None], y[None], given())
        found.append(grads["a"][0])
    assert (found[0] - found[1]).norm().item() * len(y) <= 2 * BOUND + 1e-9
