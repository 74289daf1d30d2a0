"""Promise: the gate is that of the released pFedMoAP, value by value and gradient by gradient."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import error, golden

from fpl import gate
from fpl.methods import PFedMoAP

FILES = {name: golden(name) for name in ("gate_d64_f64", "gate_d512_k9", "gate_d1024_k2")}
CASES = [
    (name, key.removesuffix(".logits"))
    for name, z in FILES.items()
    for key in z
    if key.endswith(".logits")
]
LETTERS = [kind + part for part in "qkvo" for kind in "wb"]
NO_GRADIENT = ("bk", "bv", "bo")  # in exact arithmetic; stored is rounding noise


def weights(z, **changed):
    """Return the stored gate with the client axis in front."""
    p = {}
    for name in LETTERS:
        stored = changed.get(name, z[name]).unsqueeze(0)
        p[f"gate_{name}"] = stored.clone().requires_grad_()
    return p


def results(z, case, **changed):
    """Return logits, loss, attention and every gradient of a gate."""
    scale, lam = (float(part[1:]) for part in case.split("_"))
    method = PFedMoAP(lam=lam, d_gate=int(z["d_gate"]), heads=int(z["heads"]), gate_scale=scale)
    g = method.d_gate
    p = weights(z, **changed)
    raw = z["text_raw"].clone().requires_grad_()
    image = F.normalize(z["image_raw"], dim=-1).unsqueeze(0)
    t = F.normalize(raw, dim=-1)
    t.retain_grad()
    experts = gate.pool(F.normalize(z["experts_raw"], dim=-1), g).unsqueeze(0)
    text = SimpleNamespace(scale=z["scale"])
    logits = method.logits(text, t.unsqueeze(0), p, {"experts": experts}, image)[0]
    loss = F.cross_entropy(logits, z["labels"])
    loss.backward()
    pooled = torch.cat([gate.pool(t, g)[None, None], experts], dim=1)
    share = gate.attention(p, gate.pool(image, g), pooled, method.heads, scale)[0]
    share = share.movedim(3, 0)  # (c, h, b, k)
    found = {"logits": logits, "loss": loss, "attn_per_head": share, "attn_mean": share.mean(1)}
    found |= {f"grad_{name}": p[f"gate_{name}"].grad[0] for name in LETTERS}
    return found | {"grad_text_raw": raw.grad, "grad_text": t.grad, "experts": experts[0]}


def compare(z, case, **changed):
    """Return each error as a share of its limit, of everything that is stored."""
    found = results(z, case, **changed)
    single = z["wq"].dtype == torch.float32
    value, gradient = (9e-6, 2e-4) if single else (3e-12, 1e-11)
    assert error(found.pop("experts"), z["experts_pooled"]) < value
    shares = {}
    for name, got in found.items():
        if f"{case}.{name}" in z:
            letter = name.removeprefix("grad_")
            scale = z[f"{case}.grad_wo"].abs().max() if letter in NO_GRADIENT else None
            limit = gradient if name.startswith("grad") else value
            shares[name] = error(got.detach(), z[f"{case}.{name}"], scale) / limit
    return shares


@pytest.mark.parametrize(("name", "case"), CASES)
def test_golden_values_and_gradients(name, case):
    shares = compare(FILES[name], case)
    assert {"logits", "loss"} <= shares.keys() and max(shares.values()) < 1, shares


def test_golden_files_hold_attention_and_all_gradients():
    stored = {n for name, case in CASES for n in compare(FILES[name], case)}
    gradients = {f"grad_{n}" for n in ("text_raw", "text", *LETTERS)}
    assert stored == {"logits", "loss", "attn_per_head", "attn_mean"} | gradients


@pytest.mark.parametrize("letter", [n for n in LETTERS if n != "bk"])
@pytest.mark.parametrize("name", FILES)
def test_a_changed_weight_is_noticed(name, letter):
    z = FILES[name]
    changed = z[letter].clone()
    changed.view(-1)[0] += 0.05 * changed.abs().max()
    assert max(compare(z, "s10_l0.5", **{letter: changed}).values()) > 1


def test_the_key_bias_changes_nothing():
    z = FILES["gate_d64_f64"]
    assert max(compare(z, "s10_l0.5", bk=z["bk"] + 1).values()) < 1


@pytest.mark.parametrize("name", FILES)
def test_without_experts_the_gate_and_lam_are_not_used(name):
    z = FILES[name]
    t, image = (F.normalize(z[k], dim=-1).unsqueeze(0) for k in ("text_raw", "image_raw"))
    found = PFedMoAP(lam=7.0).logits(SimpleNamespace(scale=z["scale"]), t, {}, {}, image)[0]
    assert error(found, z["logits_noexpert"]) < (9e-6 if found.dtype == torch.float32 else 3e-12)


@pytest.fixture
def stack():
    """Gates of three clients, images (3, 6, 16) and experts (3, 5, 4, 16), the local one first."""
    gen = torch.Generator().manual_seed(1)
    gates = [gate.init(16, gen) for _ in range(3)]
    p = {k: torch.stack([one[k] for one in gates]) for k in gates[0]}
    return p, torch.randn(3, 6, 16, generator=gen), torch.randn(3, 5, 4, 16, generator=gen)


def test_the_order_of_the_nonlocal_experts_does_not_matter(stack):
    p, image, experts = stack
    turned = gate.mix(p, image, experts[:, [0, 3, 1, 4, 2]], heads=4)
    assert error(turned, gate.mix(p, image, experts, heads=4)) < 1e-5


def test_stacked_gates_equal_single_ones(stack):
    p, image, experts = stack
    alone = []
    for i in range(3):
        own = {k: v[i] for k, v in p.items()}
        alone.append(gate.mix(own, image[i], experts[i], heads=4))
    assert error(gate.mix(p, image, experts, heads=4), torch.stack(alone)) < 1e-5


@pytest.mark.parametrize(
    ("g", "numbers"), [(128, 66_048), (256, 263_168), (512, 1_050_624), (1024, 4_198_400)]
)
def test_size_of_the_gate_is_that_of_table_9(g, numbers):
    p = gate.init(g, torch.Generator().manual_seed(1))
    assert sum(v.numel() for v in p.values()) == numbers
    # PyTorch's Linear: uniform in +- 1 / sqrt(g)
    assert all(0.95 < v.abs().max() * g**0.5 <= 1 for v in p.values())
