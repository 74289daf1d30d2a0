"""Promise: steps and whole runs of DP-FPL and FedSEPT are the released ones, noise and all.

Where the release loses steps or mixes clients, a loop in helpers does so around our functions.
"""

import pytest
import torch
import torch.nn.functional as F
from helpers.more_private import (
    FACTORISED,
    THEIRS,
    FedSEPTRun,
    Found,
    altered,
    apart,
    clients_noise,
    dpfpl_method,
    dpfpl_run,
    dpfpl_step,
    dpfpl_together,
    dropped,
    epsilon_of,
    failing,
    fedsept_method,
    fedsept_tensors,
    finding,
    given,
    sigma_of,
    stored,
    text_of,
    unit,
    unnoticed,
)
from helpers.more_prompts import files

from fpl.more_methods.private import alike, of_each_image, route

STEP, GRADIENT, RUN = 2e-5, 2e-4, 3e-4


def dpfpl_steps(z):
    """Yield what is found of one step in each form, without and with noise."""
    text = text_of(z)
    batch = unit(z["image_raw"]), z["labels"]
    for form in z["forms"]:
        for way, private in (("raw", False), ("dp", True)):
            method = dpfpl_method(z, form, private)
            names = method.init(text, torch.Generator())
            p = {name: z[THEIRS[name]] for name in names}
            prefix = f"{form}.{way}."
            q = z.get(f"{prefix}draw_v", torch.zeros(text.width, method.rank))
            noise = clients_noise(z, form, prefix)
            loss, prompt, factors, grads = dpfpl_step(method, text, p, batch, q, noise)
            # the step that training makes of it
            own = {name: value[None] for name, value in p.items()}
            one = batch[0][None], batch[1][None]
            _, stepped = method.gradients(text, own, {}, *one, given(factors=q, **noise))
            grads |= {name: value[0] for name, value in stepped.items()}
            for name, value in grads.items():
                yield Found(f"{prefix}grad_{THEIRS[name]}", value, GRADIENT)
            if private:
                std = method.noise * method.bound / z["batch"]
                yield Found(f"{prefix}std", std, 1e-6)
                continue
            features = text(prompt)
            logits = text.scale * batch[0] @ features.T
            right = (logits.argmax(-1) == batch[1]).double().mean()
            yield Found("scale", torch.tensor(text.scale).double(), 1e-6)
            yield Found(f"{form}.loss", loss, STEP)
            yield Found(f"{form}.ctx", prompt, STEP)
            yield Found(f"{form}.logits", logits, STEP)
            yield Found(f"{form}.acc", 100 * right, 1e-5)
            length = z[f"{form}.features_raw"].norm(dim=-1, keepdim=True)
            yield Found(f"{form}.features_raw", features * length, STEP)
            if form in FACTORISED:
                rest = p["local"] - factors["u"] @ factors["v"]
                yield Found(f"{form}.U", factors["u"], STEP)
                yield Found(f"{form}.V", factors["v"], STEP)
                yield Found(f"{form}.residual", rest, STEP)


def dpfpl_runs(z):
    """Yield what is found of a whole run, and of our own loop where no step is lost."""
    text = text_of(z)
    lossless = "start.global" not in z
    for name, value in dpfpl_run(z, text, lossless).items():
        yield Found(name, value, 1e-9 if "accuracy" in name else RUN)
    private = z["noise"] > 0
    if private:
        method = dpfpl_method(z, z["form"], private)
        yield Found("std", method.noise * method.bound / z["batch"], 1e-6)
    if lossless:
        path, losses = dpfpl_together(z, text)
        assert all(torch.equal(p["ctx"], p["ctx"][:1].expand_as(p["ctx"])) for p in path)
        yield Found("loss", losses.view(z["loss"].shape), RUN)
        for name in path[0]:
            ends = torch.stack([p[name] for p in path[1:]])
            stored_as = f"end.{THEIRS[name]}"
            yield Found(stored_as, ends.view(z[stored_as].shape), RUN)


def fedsept_steps(z):
    """Yield what is found of one step, in training and in evaluation."""
    text = text_of(z)
    tensors = fedsept_tensors(z)
    p = {name: value[None].clone().requires_grad_() for name, value in tensors.items()}
    x, y = unit(z["image_raw"])[None], z["labels"][None]
    scale = z.get("dropout_scale", torch.ones(len(z["labels"]), int(z["router_heads"])))
    draw = given(dropout=dropped(scale), noise=z["noise"])
    dropout = z["dropout"].item()
    plain = fedsept_method(z, private=False, dropout=dropout)
    private = fedsept_method(z, dropout=dropout)
    kept = (scale > 0)[None] / (1 - dropout)
    t = plain.encode(text, p, {})
    yield Found("scale", torch.tensor(text.scale).double(), 1e-6)
    yield Found("logits", plain.logits(text, t, p, {"kept": kept}, x)[0], STEP)
    each_kept = {"kept": kept.flatten(0, 1).unsqueeze(1)}
    losses, each = of_each_image(private, text, p, each_kept, x, y)
    yield Found("per_sample_losses", losses[0], STEP)
    yield Found("per_sample_grad_A", each["a"][0], GRADIENT)
    yield Found("per_sample_grad_norm", each["a"][0].flatten(1).norm(dim=1), GRADIENT)
    loss, grads = plain.gradients(text, p, {}, x, y, draw)
    yield Found("loss", loss[0], STEP)
    noisy_loss, noisy = private.gradients(text, p, {}, x, y, draw)
    yield Found("loss", noisy_loss[0], STEP)
    yield Found("private_grad_A", noisy["a"][0], GRADIENT)
    for found in (grads, {**noisy, "a": grads["a"]}):
        theirs = {"A": found["a"][0], "R": found["r"][0]}
        for name in ("out_w", "out_b", "ln_w", "ln_b", "head_w", "head_b"):
            theirs[name] = found[name][0]
        for name in ("w", "b"):  # the release's attention learns nothing of queries and keys: N2
            value = found[f"v_{name}"][0]
            nothing = torch.zeros(2 * len(value), *value.shape[1:])
            theirs[f"in_{name}"] = torch.cat([nothing, value])
        for name, value in theirs.items():
            yield Found(f"grad_{name}", value, GRADIENT)
    gate = route(p, x)[0]
    yield Found("eval.gate_logits", gate, STEP)
    yield Found("eval.gate", gate.softmax(-1), STEP)
    yield Found("eval.logits", plain.logits(text, t, p, {}, x)[0], STEP)
    yield Found("text_features", t[0], STEP)
    yield Found("ctx", plain.ctx(p)[0], STEP)
    yield Found("diversity", alike(p["a"])[0], STEP)


def fedsept_runs(z):
    """Yield what is found of a whole run."""
    run = FedSEPTRun(z, text_of(z))
    limits = {"order": 0, "test_accuracy_mean": 1e-9, "cross_accuracy_mean": 1e-9}
    limits["epsilon_spent"] = 1e-4
    for name, value in run.play().items():
        yield Found(name, value, limits.get(name, RUN))
    for name in ("lr_prompt", "lr_router"):
        rates = torch.full_like(z[name], run.setup.training.rate("prompt", 0))
        yield Found(name, rates, 1e-9)


def fedsept_accounts(z):
    """Yield the release's noise for an epsilon and the epsilon of that noise (but see N3)."""
    rates = (z["batch"] / z["local_size"]).tolist()
    steps, delta = z["steps"].tolist(), z["delta"].tolist()
    rows = [*zip(rates, steps, delta, strict=True)]
    spent = [epsilon_of(sigma, *row) for sigma, row in zip(z["sigma"].tolist(), rows, strict=True)]
    sigma = [
        sigma_of(wanted, *row) for wanted, row in zip(z["epsilon"].tolist(), rows, strict=True)
    ]
    yield Found("epsilon_of_sigma", torch.tensor(spent).double(), 1e-4)
    yield Found("sigma", torch.tensor(sigma).double(), 1e-4)


def cosine(raw):
    """Return the mean cosine between groups."""
    k = len(raw)
    cosines = torch.einsum("icd,jcd->cij", unit(raw), unit(raw))
    return (cosines.sum((1, 2)) - k).mean() / (k * (k - 1))


def descend(raw, loss, steps, rate):
    """Return the mean cosine between groups before and after every step down a loss."""
    found = [cosine(raw)]
    for _ in range(steps):
        leaf = raw.clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss(leaf), [leaf])
        raw = raw - rate * slope
        found.append(cosine(raw))
    return torch.stack(found)


def mgp(z):
    """Yield what is found of FedMGP's term."""
    raw = z["features_raw"].double()
    x = unit(z["image_raw"].double())

    def entropy(raw):
        each = [F.cross_entropy(100 * x @ unit(group).T, z["labels"]) for group in raw]
        return torch.stack(each).mean()

    yield Found("start.cosine", cosine(raw), 1e-5)
    for kind in ("cos", "l1", "l2"):

        def term(raw, kind=kind):
            return apart(unit(raw), kind).abs()

        leaf = raw.clone().requires_grad_()
        value = apart(unit(leaf), kind)
        (slope,) = torch.autograd.grad(value, [leaf])
        yield Found(f"{kind}.value", value, STEP)
        yield Found(f"{kind}.grad", slope, 1e-4)
        yield Found(f"{kind}.forward_divergent", term(raw), STEP)
        yield Found(f"{kind}.forward_ce", entropy(raw), STEP)
        yield Found(f"{kind}.forward_total", entropy(raw) + term(raw), STEP)
        yield Found(f"{kind}.forward_grad_divergent", value.sign() * slope, 1e-2)
        steps = len(z[f"{kind}.trajectory_with"]) - 1
        both = descend(raw, lambda raw, term=term: entropy(raw) + term(raw), steps, 0.02)
        alone = descend(raw, entropy, steps, 0.02)
        yield Found(f"{kind}.trajectory_with", both, 1e-3)
        yield Found(f"{kind}.trajectory_without", alone, 1e-3)
        yield Found(f"{kind}.cosine_after_term_alone", descend(raw, term, 100, 0.5)[-1], 1e-3)


# By the beginning of a file's name: what is found, and stored inputs that it depends on.
TOWER = ("emb_rows", "sd.text_projection")
CASES = {
    "dpfpl_step": (
        dpfpl_steps,
        ("global", "local", "image_raw", "labels", "norm_thresh", "noise", "delta", "rounds"),
    ),
    "dpfpl_run": (dpfpl_runs, ("init.global", "init.local", "draw_v", "lr", "client0.image")),
    "dpfpl_fixed": (dpfpl_runs, ("init.global", "noise_u", "noise_v", "noise_server", "draw_v")),
    "fedsept_step": (
        fedsept_steps,
        ("A", "B0", "R", "in_w", "out_w", "ln_w", "head_w", "noise", "clip", "sigma", "lambda_div"),
    ),
    "fedsept_run": (fedsept_runs, ("init.A", "init.B0", "lr")),
    "fedsept_accountant": (fedsept_accounts, ("local_size", "delta")),
    "mgp": (mgp, ("features_raw", "image_raw")),
}
FILES = files("dpfpl", "fedsept", "mgp")
found = finding(CASES)


@pytest.mark.parametrize("name", FILES)
def test_steps_and_runs_are_those_stored(name):
    z, case = found(name)
    assert case and not failing(case, z)


@pytest.mark.parametrize("name", FILES)
def test_a_perturbed_value_fails(name):
    z, case = found(name)
    for one in case:
        assert one.name in failing(case, {**z, one.name: altered(z[one.name], one.limit)})


@pytest.mark.filterwarnings("ignore:Optimal order")
@pytest.mark.parametrize("name", FILES)
def test_a_perturbed_input_fails(name):
    assert not unnoticed(CASES, name)


@pytest.mark.parametrize("name", ["fedsept_step_eval", "fedsept_step_dropout"])
def test_queries_and_keys_of_the_released_router_learn_nothing(name):
    """N2: an image is one token, to which all attention goes."""
    z = stored(name)
    d = int(z["d"])
    scale = z["grad_in_w"].abs().max()
    for nothing in (z["grad_query"], z["grad_in_w"][: 2 * d], z["grad_in_b"][: 2 * d]):
        assert nothing.abs().max() < 1e-6 * scale


def test_the_released_term_of_fedmgp_pulls_groups_together_and_its_opposite_does_not():
    z = stored("mgp_divergence")
    raw = z["features_raw"].double()
    for kind in ("cos", "l1", "l2"):

        def released(raw, kind=kind):
            return apart(unit(raw), kind).abs()

        def opposite(raw, kind=kind):
            return -apart(unit(raw), kind).abs()

        before, *_, after = descend(raw, released, 30, 0.5)
        assert after > before
        before, *_, after = descend(raw, opposite, 30, 0.5)
        assert after < before
