"""Promise: uploads are clipped and noised as epsilon and delta demand, and nothing else changes."""

import dataclasses
import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from helpers import ROOT
from helpers.runs import HALF, LEARNING, RUN, SEEDS, equal, play
from helpers.tiny import make
from scipy.stats import norm

from fpl import privacy, rounds
from fpl.audit import privacy as audit
from fpl.controls import Pooled
from fpl.experiments import values
from fpl.methods import CoOp, PFedMoAP, PromptFL
from fpl.more_methods.private import DPFPL
from fpl.released.methods import RELEASED
from fpl.rounds import Training

PRIVATE = {"epsilon": 50.0, "delta": 0.05, "clip": 0.1}
SHARING = {name: kind for name, kind in LEARNING.items() if make(kind).shared}
UNCOVERED = {"promptfl_released", "fedprox_released", "fedotp_released", "fedpgp_released"}
UNCOVERED |= {"pfedmoap_live", "pfedmoap_leak", "pfedmoap_released"}


@pytest.fixture(params=SHARING)
def sharing(request):
    """A method that uploads something."""
    return make(SHARING[request.param])


def delta_of(epsilon, z):
    """Return the delta of one Gaussian release, P(L > epsilon) - e^epsilon P(L' < -epsilon).

    L is the privacy loss, N(1/2z^2, 1/z^2).
    """
    mean = 1 / (2 * z**2)
    std = 1 / z
    return norm.sf(epsilon, mean, std) - math.exp(epsilon) * norm.cdf(-epsilon, mean, std)


def gens(*names):
    return [rounds.generator(0, "noise", name) for name in names]


# The accountant

BUDGETS = [(50.0, 0.05), (25.0, 0.05), (5.0, 0.05), (1.0, 1e-5), (0.1, 0.5), (200.0, 1e-9)]


@pytest.mark.parametrize(("epsilon", "delta"), BUDGETS)
def test_one_release_has_the_delta_of_its_privacy_loss(epsilon, delta):
    z = privacy.noise_multiplier(epsilon, delta, 1)
    assert delta_of(epsilon, z) == pytest.approx(delta, rel=1e-6)
    assert audit.epsilon_of(z, delta, 1) == pytest.approx(epsilon, rel=1e-6)


@pytest.mark.parametrize(("epsilon", "delta"), BUDGETS)
@pytest.mark.parametrize("releases", [1, 10, 120])
def test_k_releases_are_one_with_less_noise(epsilon, delta, releases):
    z = privacy.noise_multiplier(epsilon, delta, releases)
    assert z == pytest.approx(
        math.sqrt(releases) * privacy.noise_multiplier(epsilon, delta, 1), rel=1e-9
    )
    assert audit.epsilon_of(z, delta, releases) == pytest.approx(epsilon, rel=1e-6)


@pytest.mark.parametrize("epsilon", [50.0, 25.0, 5.0])
def test_privacy_loss_composed_by_number_agrees(epsilon):
    """Opacus' other accountant knows no closed form: an upper bound with an error of 0.01."""
    from opacus.accountants import PRVAccountant

    prv = PRVAccountant()
    prv.history = [(privacy.noise_multiplier(epsilon, 0.05, 10), 1.0, 10)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # log(0) where sampling is of everybody
        assert epsilon < prv.get_epsilon(0.05, eps_error=0.01) < epsilon + 0.03


def test_the_delta_of_ten_releases_is_found_by_drawing_their_privacy_loss():
    epsilon, releases = 5.0, 10
    z = privacy.noise_multiplier(epsilon, 0.05, releases)
    noise = np.random.default_rng(0).normal(0, z, (400_000, releases))
    loss = ((1 + 2 * noise) / (2 * z**2)).sum(
        1
    )  # log density of data with update 1 over that of none, at 1 + noise
    assert np.maximum(0, 1 - np.exp(epsilon - loss)).mean() == pytest.approx(0.05, abs=0.001)


@pytest.mark.parametrize("epsilon", [1.0, 5.0, 25.0])
def test_no_test_finds_a_client_more_often_than_said(epsilon):
    """The best test compares the sum of all releases with a threshold (Neyman and Pearson)."""
    z, gen = privacy.noise_multiplier(epsilon, 0.05, 10), np.random.default_rng(1)
    without, there = (gen.normal(update, z, (100_000, 10)).sum(1) for update in (0, 1))
    found = (there > np.quantile(without, 0.95)).mean()
    assert found > 0.05 and audit.detection(epsilon, 0.05) == pytest.approx(found, abs=0.01)


def test_less_privacy_needs_less_noise():
    z = privacy.noise_multiplier
    assert (
        z(50.0, 0.05, 10)
        < z(25.0, 0.05, 10)
        < z(5.0, 0.05, 10)
        < z(5.0, 0.01, 10)
        < z(5.0, 0.01, 11)
    )
    assert (
        audit.epsilon_of(1.0, 0.05, 10)
        > audit.epsilon_of(2.0, 0.05, 10)
        > audit.epsilon_of(2.0, 0.1, 10)
    )
    assert audit.epsilon_of(100.0, 0.5, 1) == 0 and audit.epsilon_of(0.001, 0.05, 10) == math.inf


@pytest.mark.parametrize(
    "call",
    [
        *(
            (privacy.noise_multiplier, epsilon, 0.05, 10)
            for epsilon in (0.0, -1.0, 501.0, math.inf, math.nan)
        ),
        *((privacy.noise_multiplier, 5.0, delta, 10) for delta in (0.0, 1.0, -0.1, math.nan)),
        *((audit.epsilon_of, z, 0.05, 10) for z in (0.0, -1.0, math.nan)),
        *((audit.epsilon_of, 1.0, delta, 10) for delta in (0.0, 1.0)),
        (privacy.noise_multiplier, 5.0, 0.05, 0),
        (audit.epsilon_of, 1.0, 0.05, 0),
    ],
)
def test_what_is_no_budget_is_refused(call):
    with pytest.raises(
        ValueError, match=r"^(epsilon|delta|releases|the noise multiplier) [-\w.]+ (must|is not)"
    ):
        call[0](*call[1:])


def test_the_accountant_is_imported_only_when_asked():
    code = "import sys, fpl.experiments.settings; print(*sys.modules)"
    found = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split()
    assert "fpl.privacy" in found and not {"opacus", "scipy.optimize"} & {*found}


# The release

UPLOADS = {
    "a": torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1)),
    "b": torch.ones(3, 2),
}
BEGIN = {"a": torch.full((4, 5), 0.5), "b": torch.zeros(2)}


def updates(uploads, begin=BEGIN):
    return torch.cat([(uploads[k].double() - begin[k].double()).flatten(1) for k in uploads], dim=1)


def test_a_long_update_is_cut_to_the_norm_and_keeps_its_direction():
    before, after = (
        updates(UPLOADS),
        updates(privacy.release(UPLOADS, BEGIN, 1.5, 0.0, gens(0, 1, 2))),
    )
    assert before.norm(dim=1).min() > 1.5
    assert torch.allclose(after, 1.5 * before / before.norm(dim=1, keepdim=True), atol=1e-6)
    assert (privacy.clipped(before, 1.5).norm(dim=1) <= 1.5 * (1 + 1e-15)).all()


def test_a_short_update_is_left_as_it_is():
    assert equal(privacy.release(UPLOADS, BEGIN, 100.0, 0.0, gens(0, 1, 2)), UPLOADS)
    short = torch.tensor([[3.0, 4.0], [0.0, 0.0], [6.0, 8.0]], dtype=torch.double)
    assert privacy.clipped(short, 5.0).tolist() == [[3, 4], [0, 0], [3, 4]]


def test_the_noise_is_normal_with_std_z_clip():
    uploads = {"a": torch.zeros(2, 300, 500), "b": torch.zeros(2, 1000)}
    out = privacy.release(uploads, {k: v[0] for k, v in uploads.items()}, 0.3, 2.0, gens(0, 1))
    assert all(out[k].shape == v.shape and out[k].dtype == v.dtype for k, v in uploads.items())
    for noise in out["a"].flatten(1):  # the error of a mean of 150,000 is 0.003 standard deviations
        within = (noise.abs() < 0.6).double().mean()
        assert noise.mean().abs() < 0.006 and noise.std() == pytest.approx(0.6, rel=0.01)
        assert within == pytest.approx(norm.cdf(1) - norm.cdf(-1), abs=0.006)
    assert out["b"].std(dim=1).tolist() == pytest.approx([0.6, 0.6], rel=0.1)
    assert torch.corrcoef(out["a"].flatten(1))[0, 1].abs() < 0.015


def test_a_release_does_not_depend_on_who_else_takes_part():
    everybody = privacy.release(UPLOADS, BEGIN, 1.0, 1.0, gens(0, 1, 2))
    two = privacy.release({k: v[[0, 2]] for k, v in UPLOADS.items()}, BEGIN, 1.0, 1.0, gens(0, 2))
    assert equal({k: v[[0, 2]] for k, v in everybody.items()}, two)
    assert not torch.equal(
        updates(everybody)[1], updates(privacy.release(UPLOADS, BEGIN, 1.0, 1.0, gens(0, 3, 2)))[1]
    )


# In a run


def with_and_without(method, text, clients, **changes):
    """Return the logs of two runs, of which the second has these settings."""
    return [
        play(method, text, clients, training)
        for training in (RUN, dataclasses.replace(RUN, **changes))
    ]


@pytest.mark.parametrize("training", [RUN, HALF], ids=["all", "half"])
def test_the_server_gets_what_release_makes_of_what_was_trained(sharing, text, clients, training):
    training = dataclasses.replace(training, **PRIVATE)
    log = play(sharing, text, clients, training)
    z = privacy.noise_multiplier(training.epsilon, training.delta, training.rounds)
    known = sharing.init(text, rounds.generator(SEEDS.init, "init"))
    for number, server in enumerate(log.servers):
        who = log.who[number]
        uploads = log.uploads[number]
        trained = {k: log.local[number][k][who] for k in sharing.shared}
        drawn = [rounds.generator(SEEDS.order, "noise", number, i) for i in who]
        assert equal(uploads, privacy.release(trained, known, training.clip, z, drawn))
        assert not equal(uploads, trained)
        assert equal({k: server.uploads[k][who] for k in sharing.shared}, uploads)
        known = server.params


def test_clients_keep_their_own_tensors_as_trained(sharing, text, clients):
    """In the first round nobody has seen any noise; then training starts from what was released."""
    plain, private = with_and_without(sharing, text, clients, **PRIVATE)
    assert equal(plain.local[0], private.local[0]) and plain.who == private.who
    assert not equal(plain.servers[0].params, private.servers[0].params)
    assert not equal(plain.local[1], private.local[1])
    assert [r.up.tolist() for r in plain.rounds] == [r.up.tolist() for r in private.rounds]


def test_experts_are_released_prompts(text, clients):
    log = play(make(PFedMoAP), text, clients, dataclasses.replace(RUN, **PRIVATE))
    everybody = torch.arange(6)
    down = make(PFedMoAP).download(log.servers[0].begin(1, everybody), everybody, clients)
    for expert in down["experts"].flatten(0, 1):
        assert any(torch.equal(expert, upload) for upload in log.uploads[0]["ctx"])


def test_without_an_epsilon_nothing_changes(row, text, clients):
    plain, other = with_and_without(row, text, clients, delta=0.5, clip=1e-6)
    assert all(map(equal, plain.evaluated, other.evaluated))
    assert all(map(equal, plain.uploads, other.uploads))
    for local, who, uploads in zip(plain.local, plain.who, plain.uploads, strict=True):
        assert equal(uploads, {k: local[k][who] for k in row.shared})


@pytest.mark.parametrize("how", [PRIVATE, {"mechanism": "clipping"}], ids=["noise", "clipping"])
def test_who_uploads_nothing_has_nothing_to_hide(how, text, clients):
    plain, private = with_and_without(make(CoOp), text, clients, **how)
    assert all(map(equal, plain.evaluated, private.evaluated))


@pytest.mark.parametrize("how", [PRIVATE, {"mechanism": "clipping"}], ids=["noise", "clipping"])
@pytest.mark.parametrize("name", [name for name in RELEASED if name != "pfedmoap_oneword"])
def test_a_row_whose_clients_leave_each_other_more_than_uploads_is_refused(
    name, how, text, clients
):
    kind = RELEASED[name]
    training = dataclasses.replace(RUN, **kind.training, **how)
    run = rounds.run_rounds(rounds.Setup(make(kind), text, clients, training, SEEDS))
    if name not in UNCOVERED:
        next(run)
        return
    with pytest.raises(
        ValueError, match=r"^clients of this row .* epsilon 0 and mechanism gaussian, or another"
    ):
        next(run)


@pytest.mark.parametrize("kind", [DPFPL, Pooled])
@pytest.mark.parametrize("how", [PRIVATE, {"mechanism": "clipping"}], ids=["noise", "clipping"])
def test_a_method_whose_clients_step_together_or_read_all_images_is_refused(
    how, kind, text, clients
):
    training = dataclasses.replace(RUN, **how)
    run = rounds.run_rounds(rounds.Setup(make(kind), text, clients, training, SEEDS))
    with pytest.raises(ValueError, match="clients of this row have things of each other"):
        next(run)


def test_more_rounds_need_more_noise(text, clients):
    begin = make(PromptFL).init(text, rounds.generator(SEEDS.init, "init"))

    def noise(n):
        log = play(make(PromptFL), text, clients, dataclasses.replace(RUN, rounds=n, **PRIVATE))
        trained = privacy.clipped(updates(log.local[0], begin), PRIVATE["clip"])
        return updates(log.uploads[0], begin) - trained

    assert torch.allclose(noise(4), 2 * noise(1), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("epsilon", value) for value in (-1.0, 501.0, math.inf, math.nan)),
        *(("delta", value) for value in (0.0, 1.0, -0.5, math.nan)),
        *(("clip", value) for value in (0.0, -1.0, math.inf, math.nan)),
    ],
)
def test_bad_settings_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"^run.{name} must be [^\n]*, not {value}$"):
        values.build(Training, {name: value}, "run")
