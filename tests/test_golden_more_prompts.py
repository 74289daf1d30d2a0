"""Promise: FedPHA, PromptFolio, FedTPG, KgCoOp and ProGrad compute what their releases computed.

Where a release does something else than its paper says, the test does that, with our losses. Where
it gives no number or a wrong one, ours is the formula's.
"""

from functools import cache

import pytest
import torch
from helpers import refuses
from helpers.more_prompts import (
    FIRST,
    average,
    case,
    failing,
    files,
    nobody,
    stored,
    unseen,
    unused,
)
from helpers.tiny import NAMES, error, make

from fpl.experiments import values
from fpl.more_methods.prompts import FedPHA, FedTPG, KgCoOp, ProGrad, PromptFolio, project
from fpl.prompts import PromptTree

FILES = files("pha_", "folio_", "kg_", "pg_", "tpg_")


# The golden files


@cache
def compared(name):
    """Return what a file has, and the comparisons with it."""
    z = stored(name)
    return z, [*case(name, z)]


def other_result(z, key, found):
    """Return a stored result with its largest number off by several limits."""
    result = z[key].clone().flatten()
    at = result.abs().argmax()
    if not result.is_floating_point():
        result[at] += 1
        return result.view_as(z[key])
    sizes = [limit * (scale or result[at].abs()) for k, _, _, limit, scale in found if k == key]
    result[at] += 20 * max(sizes) or 1.0
    return result.view_as(z[key])


def other_input(value):
    if isinstance(value, list):
        return [f"{value[0]} q", *value[1:]]
    wave = torch.arange(value.numel()).view_as(value)
    if value.is_floating_point():
        return value + 0.05 * value.abs().max() * wave.cos() if value.ndim else value / 2
    return value + 1 + wave if value.max() > 1 else 1 - value


def test_all_files_are_there():
    single = {"folio_n4", "folio_n8_t02", "kg_n4", "pg_n4", "pha_he_short", "pha_n4"}
    single |= {"pha_n5_floor", "tpg_w32", "tpg_w32_d48_self1"}
    assert {*FILES} >= single | {"folio_traj", "folio_traj_released", "pha_traj", "tpg_traj"}


@pytest.mark.parametrize("name", FILES)
def test_every_number_is_the_stored_one(name):
    z, found = compared(name)
    assert not [*failing(found, z)]


@pytest.mark.parametrize("name", FILES)
def test_another_stored_result_fails(name):
    z, found = compared(name)
    for key in {key for key, *_ in found}:
        other = {**z, key: other_result(z, key, found)}
        assert {*failing(found, other)} == {key}


@pytest.mark.parametrize("name", FILES)
def test_another_input_fails(name):
    """Whatever a file has besides its results changes them, weights of one model together."""
    z, found = compared(name)
    together = {}
    for key in z.keys() - {key for key, *_ in found} - unseen(z):
        model = [prefix for prefix in ("sd.", "init.") if key.startswith(prefix)]
        together.setdefault(model[0] if model else key, set()).add(key)
    for keys in together.values():
        other = {**z, **{key: other_input(z[key]) for key in keys}}
        try:
            failed = next(failing(case(name, other), other), None)
        except Exception as refused:  # there is no such client, layer or class
            failed = refused
        assert failed, keys


# What the releases do instead


def test_promptfolios_release_gives_an_upload_the_weight_of_another():
    z = stored("folio_n4")
    assert error(z["agg.global"], z["agg.formula_global"]) > 0.5


def test_prograd_steps_along_no_gradient_that_is_against_the_frozen_clip():
    z = stored("pg_n4")
    assert z["formula_dot"] < 0
    assert abs((z["formula_grad"] * z["grad_add_ctx"]).sum()) < 1e-4 * -z["formula_dot"]
    assert error(z["formula_grad"], z["grad_ctx"]) > 0.1, "flip adds the two instead"


@pytest.mark.parametrize("sign", [1, -1])
def test_prograd_keeps_what_agrees_and_drops_what_does_not(sign, text):
    """Each client by itself; the losses are linear in the prompt here."""
    own = torch.tensor([[1.0, 2.0], [1.0, -2.0]]).view(2, 1, 2)
    general = torch.tensor([[1.0, 1.0], [1.0, 1.0]]).view(2, 1, 2)

    class Linear(ProGrad):
        def pair(self, text, p, context, x, y):
            return [(p["ctx"] * slope).sum((1, 2)) for slope in (own, sign * general)]

    p = {"ctx": torch.zeros(2, 1, 2, requires_grad=True)}
    for weight in (0.0, 0.5, 1.0):
        _, found = Linear(weight=weight).gradients(text, p, {}, None, None, None)
        # <g, k> is 3 and -1, or the other way round; |k|^2 is 2
        dots = [min(0.0, sign * 3.0), min(0.0, sign * -1.0)]
        for at, dot in enumerate(dots):
            want = own[at] - weight * dot / 2 * sign * general[at]
            assert torch.allclose(found["ctx"][at], want)


def by_svd(rows, g, ratio):
    """Return the projection as the release computes it."""
    _, _, vh = torch.linalg.svd(g, full_matrices=False)
    kept = vh[:, int(len(vh[0]) * (1 - ratio)) :]
    return rows @ kept.mT @ kept


@pytest.mark.parametrize("shape", [(16, 32), (5, 32), (10, 32), (40, 32), (1, 32)])
@pytest.mark.parametrize("ratio", [0.0, 0.2, 0.8, 0.9, 1.0])
def test_fedpha_projects_on_the_directions_that_its_release_keeps(shape, ratio):
    gen = torch.Generator().manual_seed(0)
    g, other = (torch.randn(2, *shape, generator=gen).double() for _ in range(2))
    rows = torch.randn(2, 3, 32, generator=gen).double()
    leaves = g.requires_grad_(), rows.requires_grad_()
    found = {}
    for way in (project, by_svd):
        value = way(rows, g, ratio)
        slopes = torch.autograd.grad(value.sin().sum(), leaves, materialize_grads=True)
        found[way] = [value.detach(), *slopes]
    size = [*map(torch.norm, found[by_svd])]
    for ours, theirs, scale in zip(found[project], found[by_svd], size, strict=True):
        assert error(ours, theirs, max(scale, 1.0)) < 1e-6


CUT = {(5, 0.8): 0, (10, 0.9): 0, (10, 0.8): 1, (16, 0.8): 3, (4, 0.5): 2}  # spec N2


@pytest.mark.parametrize(("m", "ratio"), CUT)
def test_fedpha_drops_as_many_directions_as_double_precision_says(m, ratio):
    g = torch.randn(1, m, 32, generator=torch.Generator().manual_seed(0))
    rank = project(torch.eye(32)[None], g, ratio)[0].trace()
    assert rank == pytest.approx(m - CUT[m, ratio], abs=1e-4)


def singular(kind, gen):
    """Return prompts (1, 6, 32) whose singular values are not simple."""
    rows = torch.linalg.qr(torch.randn(32, 6, generator=gen))[0].T[None]
    if kind == "one repeated":
        return torch.cat([rows[:, :5], rows[:, :1]], dim=1)
    lengths = {"all equal": 1, "all zero": 0, "one zero": torch.arange(6).clamp(max=1).unsqueeze(1)}
    return rows * lengths[kind]


@pytest.mark.parametrize("kind", ["all equal", "one repeated", "all zero", "one zero"])
@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_fedpha_has_a_gradient_where_singular_values_are_equal(kind, ratio, text):
    gen = torch.Generator().manual_seed(0)
    g = singular(kind, gen)[..., : text.width].clone().requires_grad_()
    p = {"ctx": g, "local": torch.randn(1, 6, 32, generator=gen, requires_grad=True)}
    long = PromptTree(text._clip, NAMES, 6)
    x = torch.nn.functional.normalize(torch.randn(1, 3, 32, generator=gen), dim=-1)
    method = FedPHA(n_ctx=6, ratio=ratio)
    loss = method.loss(long, p, {}, x, torch.tensor([[0, 1, 2]]))
    for slope in torch.autograd.grad(loss.sum(), [*p.values()]):
        assert slope.isfinite().all()
    if kind == "all equal" and ratio == 0.5:
        (theirs,) = torch.autograd.grad(by_svd(p["local"], g, ratio).sum(), [g])
        assert not theirs.isfinite().all() or theirs.abs().max() > 1e3, "the release has none"


def test_fedphas_projection_is_smooth_where_kept_values_are_equal():
    """With all directions kept it is the one on the rows, whatever their lengths."""
    gen = torch.Generator().manual_seed(0)
    g = singular("all equal", gen).double()
    rows, change = (torch.randn(1, n, 32, generator=gen).double() for n in (3, 6))

    def ours(g):
        return project(rows, g, 1.0)

    def theirs(g):
        return rows @ torch.linalg.pinv(g) @ g

    assert error(ours(g + 1e-6 * change), theirs(g + 1e-6 * change)) < 1e-9
    slope, want = (torch.func.jvp(way, (g,), (change,))[1] for way in (ours, theirs))
    assert error(slope, want) < 1e-6


def test_equal_prompts_push_each_other_without_a_nan(text):
    p = {k: torch.ones(1, 4, 32).requires_grad_() for k in ("ctx", "local")}
    t = FedPHA(n_ctx=4).three(text, p)
    for slope in torch.autograd.grad(FedPHA(n_ctx=4).push(t[0], t[1]).sum(), [*p.values()]):
        assert slope.isfinite().all()


# FedTPG's network


class Wide:
    """A text tower as wide as that of CLIP ViT-B/16."""

    width = dim = 512


@pytest.mark.parametrize(("n_ctx", "depth"), [(4, 0), (16, 0), (4, 2)])
def test_fedtpg_sends_its_whole_network(n_ctx, depth):
    method = FedTPG(n_ctx=n_ctx, self_depth=depth)
    drawn = method.init(Wide(), torch.Generator().manual_seed(0))
    assert tuple(drawn) == method.shared
    w = 512
    of_first = n_ctx * w + 14 * w * w + 2 * w * w + 17 * w + 2 * w
    assert sum(v.numel() for v in drawn.values()) == of_first + depth * (16 * w * w + 17 * w)
    assert of_first == 4_206_080 or n_ctx != 4, "as measured of the release"
    bounds = {"wq": (6 / (4 * w)) ** 0.5, "wo": w**-0.5, "ff.fc2.weight": (4 * w) ** -0.5}
    for name, most in bounds.items():
        assert drawn[f"cross.{name}"].abs().max() == pytest.approx(most, rel=1e-3)
    assert drawn["soft_prompt"].std() == pytest.approx(0.02, rel=0.1)
    still = [v for k, v in drawn.items() if k.endswith((".bq", ".bk", ".bv", ".bo", "ln.bias"))]
    assert all((v == 0).all() for v in still)


def test_fedtpg_writes_by_the_set_of_names(clip):
    method = make(FedTPG)
    text, turned, fewer = (PromptTree(clip, names, 4) for names in (NAMES, NAMES[::-1], NAMES[:3]))
    p = {k: v[None] for k, v in method.init(text, torch.Generator().manual_seed(0)).items()}
    found = []
    for one in (text, turned, fewer):
        context = method.context(one, {}, FIRST, nobody(32))
        found.append(method.encode(one, p, context)[0])
    assert error(found[1].flip(0), found[0]) < 1e-5
    assert error(found[2], found[0][:3]) > 1e-3


def test_fedtpgs_server_gives_all_clients_the_same_weight():
    uploads = {"soft_prompt": torch.tensor([1.0, 2.0, 6.0]).view(3, 1, 1)}
    sizes = torch.tensor([100, 1, 1])
    assert average(FedTPG(), uploads, sizes)["soft_prompt"] == 3
    assert average(KgCoOp(), {"ctx": uploads["soft_prompt"]}, sizes)["ctx"] != 3


def test_key_biases_of_fedtpg_stay_as_they_were_drawn(text, clients):
    """Softmax does not see them: what is found as their gradient is rounding."""
    method = make(FedTPG, self_depth=1)
    assert method.idle == ("cross.bk", "self0.bk")
    drawn = method.init(text, torch.Generator().manual_seed(0))
    p = {k: v[None].clone().requires_grad_() for k, v in drawn.items()}
    context = method.context(text, {}, FIRST, clients)
    index = clients.train[0][None]
    seen = context, clients.feats[index], clients.labels[index]
    _, found = method.gradients(text, p, *seen, unused)
    assert all((found[k] == 0).all() == (k in method.idle) for k in method.shared)


# Bad settings

BAD = {
    "fedpha.ratio": (FedPHA, {"ratio": 1.1}, ["fedpha.ratio", "1.1"]),
    "fedpha.alpha": (FedPHA, {"alpha": -1}, ["fedpha.alpha", "-1"]),
    "promptfolio.theta": (PromptFolio, {"theta": 2}, ["promptfolio.theta", "2"]),
    "kgcoop.weight": (KgCoOp, {"weight": -8}, ["kgcoop.weight", "-8"]),
    "prograd.rule": (ProGrad, {"rule": "released"}, ["prograd.rule", "released"]),
    "fedtpg.heads": (FedTPG, {"heads": 0}, ["fedtpg.heads", "0"]),
    "fedtpg.self_depth": (FedTPG, {"self_depth": -1}, ["fedtpg.self_depth", "-1"]),
}


@pytest.mark.parametrize("wrong", BAD)
def test_settings_out_of_range_are_refused(wrong):
    kind, settings, words = BAD[wrong]
    refuses(lambda: values.build(kind, settings, kind.key), words)


def test_settings_that_do_not_fit_the_model_are_refused(text, clients):
    unfit = ["heads 3", "width 32: take one"]
    refuses(lambda: FedTPG(heads=3).check(text, clients), unfit)
    for kind in (KgCoOp, ProGrad):
        method = kind(template="a photo")
        refuses(lambda m=method: m.check(text, clients), ["template 'a photo'", "one {}"])
