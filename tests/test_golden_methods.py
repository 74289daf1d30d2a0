"""Promise: losses, logits and gradients of FedProx, FedPGP and FedOTP are the released ones, or of the formula they miss."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import error, golden, stored_clip

from fpl.data import encoders
from fpl.methods import FedOTP, FedProx, PromptFL
from fpl.prompts import PromptTree
from fpl.released import methods


def names(z):
    """The class names behind stored token ids: what stands between the context and the final stop."""
    tokens = encoders.open_clip.tokenizer._tokenizer
    ends = z["token_ids"].argmax(-1).tolist()
    return [
        tokens.decode(row[1 + int(z["n_ctx"]) : end - 1].tolist()).strip() for row, end in zip(z["token_ids"], ends, strict=True)
    ]


def batch(z):
    return F.normalize(z["image_raw"], dim=-1)[None], z["labels"][None]


def fedprox(z):
    """(name, ours, stored, limit)"""
    method, text, (x, y) = FedProx(int(z["n_ctx"]), mu=z["mu"].item()), PromptTree(stored_clip(z), names(z), int(z["n_ctx"])), batch(z)
    p = {"ctx": z["ctx"][None].clone().requires_grad_()}
    f = method.frozen(text, {"ctx": z["global_ctx"][None]}, torch.tensor([0]), None)
    loss, plain = method.loss(text, p, f, x, y)[0], PromptFL(method.n_ctx).loss(text, p, {}, x, y)[0]
    (grad,), (grad_ce,) = (torch.autograd.grad(value, p["ctx"], retain_graph=True) for value in (loss, plain))
    yield "logits", method.logits(text, method.encode(text, p), p, f, x)[0], z["logits"], 5e-6
    yield "ce", plain, z["ce"], 5e-6
    yield "formula_loss", loss, z["formula_loss"], 5e-6
    yield "loss_official", loss, z["loss_official"], 5e-6
    yield "formula_grad", grad[0], z["formula_grad"], 3e-5
    yield "grad_ce", grad_ce[0], z["grad_ce"], 3e-5
    yield "grad_official", grad_ce[0], z["grad_official"], 3e-5  # the released term has no gradient: spec D5


def fedpgp(z):
    m, two = int(z["n_ctx"]), int(z["N"]) == 2
    kind = methods.ReleasedFedPGP if two else methods.PlaceholderAnchor
    method = kind(m, rank=int(z["bottleneck"]), mu=z["mu"].item(), tau=z["tau"].item())
    text, (x, y) = PromptTree(stored_clip(z), z["classnames"], m), batch(z)
    leaf = {theirs: z[theirs].clone().requires_grad_() for theirs in ("sigma", "U", "V")}
    p = {ours: leaf[theirs][None] if two else leaf[theirs] for ours, theirs in {"ctx": "sigma", "u": "U", "v": "V"}.items()}
    f = method.frozen(text, {}, torch.tensor([0]), None)
    common, personal = method.pair(text, p)
    assert torch.equal(personal, method.encode(text, p)) or error(personal, method.encode(text, p)) < 1e-5
    yield "uv_features", method.encode(text, {**p, "ctx": torch.zeros_like(p["ctx"])})[0], z["uv_features"], 1e-5
    logits, contrast = method.logits(text, personal, p, f, x), method.contrast(f["anchor"], common, personal)
    ce, loss = F.cross_entropy(logits[0], y[0]), method.loss(text, p, f, x, y)[0]
    yield from (("anchor_features", f["anchor"][0], z["anchor_features"], 1e-5), ("logits", logits[0], z["logits"], 1e-5))
    yield from (("global_features", common[0], z["global_features"], 1e-5), ("logits_eval", logits[0], z["logits_eval"], 1e-5))
    yield "personal_features", personal[0], z["personal_features"], 1e-5
    yield "cos_positive", (f["anchor"] * common)[0].sum(-1), z["cos_positive"], 1e-5
    yield "cos_negative", (common * personal)[0].sum(-1), z["cos_negative"], 1e-5
    yield from (("ce", ce, z["ce"], 1e-5), ("contrast", contrast[0], z["contrast"], 1e-5), ("loss", loss, z["loss"], 1e-5))
    for value, prefix in ((loss, "grad_"), (ce, "grad_ce_")):
        for theirs, grad in zip(leaf, torch.autograd.grad(value, list(leaf.values()), retain_graph=True), strict=True):
            yield prefix + theirs, grad, z[prefix + theirs], 1e-4


def fedotp(z):
    method = FedOTP(eps=z["eps"].item(), gamma=z["gamma"].item(), transport="balanced" if z["ot"] == "Sinkhorn" else "unbalanced")
    raw, patches = z["text_raw"].clone().requires_grad_(), z["patch_raw"].transpose(0, 1)
    t, text = F.normalize(raw, dim=-1)[None], SimpleNamespace(scale=z["scale"].item())
    logits = method.logits(text, t, {}, {}, patches[None])
    loss = F.cross_entropy(logits[0], z["labels"])
    sim = torch.einsum("bMd,kcd->bcMk", F.normalize(patches, dim=-1), t[0].detach())
    plan, iterations = method.plan(sim[None])
    limit, grad_limit = (1e-4, 2e-4) if raw.dtype == torch.float32 else (1e-10, 1e-10)
    yield from (("plan", plan[0], z["plan"], limit), ("iters", iterations[0], z["iters"], 1e-9))
    yield from (("logits", logits[0], z["logits"], limit), ("loss", loss, z["loss"], limit))
    yield "grad_text_ce", torch.autograd.grad(loss, raw, retain_graph=True)[0], z["grad_text_ce"], grad_limit
    yield "grad_text_R", torch.autograd.grad((z["R"] * logits[0]).sum(), raw)[0], z["grad_text_R"], grad_limit
    shifted, _ = method.plan((1 + sim - sim.amax((-2, -1), keepdim=True))[None])
    yield "maxsub_logits", 100 * (shifted[0] * sim).sum((-2, -1)), z["maxsub_logits"], limit


CASES = {"fedprox_mu0.5": fedprox, "fedprox_mu1": fedprox, "pgp_np1": fedpgp, "pgp_np2": fedpgp}
CASES |= {f"ot_logits_{kind}": fedotp for kind in ("cot_eps0.1", "cot_eps0.01_f64", "sinkhorn_eps0.1")}
INPUTS = {
    fedprox: ("ctx", "global_ctx", "mu", "image_raw", "emb_rows", "sd.text_projection"),
    fedotp: ("patch_raw", "text_raw", "eps", "scale"),
    fedpgp: ("sigma", "U", "V", "mu", "tau", "image_raw", "emb_rows", "sd.text_projection"),
}


def failing(case, z):
    return [name for name, ours, stored, limit in case(z) if not error(ours.detach(), stored) < limit]


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_stored(name):
    assert not failing(CASES[name], golden(name))


@pytest.mark.parametrize("name", CASES)
def test_a_perturbed_value_fails(name):
    z, case = golden(name), CASES[name]
    for key in [found for found, *_ in case(z)]:
        changed = z[key].clone().view(-1)
        changed[changed.abs().argmax()] += 1 if key == "iters" else 0.001 * changed.abs().max()
        assert failing(case, {**z, key: changed.view_as(z[key])}) == [key]
    for key in INPUTS[case]:
        wave = torch.arange(z[key].numel()).cos().view_as(z[key])
        assert failing(case, {**z, key: z[key] + 0.05 * z[key].abs().max() * wave}), key


@pytest.mark.parametrize("name", ["fedprox_mu0.5", "fedprox_mu1"])
def test_the_released_term_has_no_gradient_and_ours_has(name):
    z = golden(name)
    assert torch.equal(z["grad_official"], z["grad_ce"])
    ours = {found: value for found, value, *_ in fedprox(z)}
    assert error(ours["formula_grad"], z["grad_official"]) > 100 * 3e-5
    assert error(ours["formula_grad"] - ours["grad_ce"], z["mu"] * (z["ctx"] - z["global_ctx"])) < 1e-3
