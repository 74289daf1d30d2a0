"""Promise: the prompt tree gives the features and gradients of open_clip's own 77-token prompts.

It takes a fraction of the tokens.
"""

from contextlib import contextmanager
from typing import get_args

import open_clip
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT
from helpers.tiny import NAMES, error, golden, stored_clip, tiny_model

from fpl import linear as maps
from fpl.data.encoders import load
from fpl.prompts import KEPT, PRECISIONS, Clip, Precision, PromptTree

LONGEST = " ".join(["cat"] * 58)  # with SOS, 16 context vectors, the full stop and EOS: 77 tokens
LISTS = {
    "all lengths": [
        "cat",
        "golden retriever",
        "bishop of llandaff",
        "pseudopseudohypoparathyroidism",
        LONGEST[4:],
        LONGEST,
    ],
    "one class": ["cat"],
    "prefixes": ["ice cream", "ice", "ice cream van", "ice hockey", "cream"],
    "many groups": [
        f"{a} {b} {c}" for a in ("ice", "cream") for b in ("cat", "dog", "bus") for c in range(20)
    ],
    "spelling": [
        "spaghetti_carbonara",
        "Abyssinian",
        "colt's foot",
        "hard-leaved pocket orchid",
        "BMX",
    ],
}
FEW = ["golden retriever", "golden_eagle", LONGEST]
TEMPLATES = [
    "a photo of a {}.",
    "a photo of a {}, a type of flower.",
    "a photo of {}, a type of food.",
    "{} texture.",
]


def towers(kind):
    if kind == "demo":
        return load(f"local-dir:{ROOT}/data/demo_clip")
    if kind == "ViT-B-16":  # its text tower; the image tower, which no prompt meets, is a tiny one
        return Clip(tiny_model(embed_dim=512, **open_clip.get_model_config(kind)["text_cfg"]))
    if kind == "custom":  # other names of the same things in open_clip
        return Clip(tiny_model(open_clip.CustomTextCLIP, proj_bias=True))
    return Clip(tiny_model())


@pytest.fixture(scope="module", params=["tiny", "custom", "demo"])
def tower(request):
    return towers(request.param)


def encode_text(clip, prompts, ctx=None):
    """open_clip's own text path; `ctx` is put over the embeddings of positions 1..m."""
    embedding = getattr(clip.model, "text", clip.model).token_embedding

    def put(module, args, x):
        if ctx is None:
            return x
        return torch.cat([x[:, :1], ctx.expand(len(x), -1, -1), x[:, 1 + len(ctx) :]], dim=1)

    with embedding.register_forward_hook(put):
        return clip.model.encode_text(clip.tokenizer(prompts), normalize=True)


def compare(clip, names, n_ctx=16):
    """Largest difference of the features, relative difference of a gradient."""
    gen = torch.Generator().manual_seed(1)
    text = PromptTree(clip, names, n_ctx)
    start = 0.02 * torch.randn(n_ctx, text.width, generator=gen)
    r = torch.randn(len(names), text.dim, generator=gen)
    prompts = [f"{'X ' * n_ctx}{name.replace('_', ' ')}." for name in names]
    found = []
    for encode in (text, lambda ctx: encode_text(clip, prompts, ctx)):
        ctx = start.clone().requires_grad_()
        features = encode(ctx)
        (r * features).sum().backward()
        found.append((features.detach(), ctx.grad))
    (ours, our_grad), (theirs, their_grad) = found
    return (ours - theirs).abs().max(), (our_grad - their_grad).norm() / their_grad.norm()


@pytest.mark.parametrize("names", LISTS.values(), ids=LISTS)
def test_features_and_gradients_are_those_of_77_tokens(tower, names):
    features, gradient = compare(tower, names)
    assert features < 1e-5 and gradient < 1e-4


@pytest.mark.parametrize("n_ctx", [1, 4])
def test_any_context_length(tower, n_ctx):
    features, gradient = compare(tower, LISTS["prefixes"], n_ctx)
    assert features < 1e-5 and gradient < 1e-4


def test_logits_have_the_towers_own_scale(text):
    assert text.scale == pytest.approx(1 / 0.07, rel=1e-5)  # what open_clip starts from


def test_text_tower_of_vit_b_16():
    features, gradient = compare(towers("ViT-B-16"), FEW)
    assert features < 1e-5 and gradient < 1e-4


def test_a_name_that_does_not_fit_is_refused_in_one_sentence(clip):
    with pytest.raises(
        ValueError,
        match=r"^class name 'cat .*' with 16 context vectors takes 78 tokens, .* 77: shorten[^.]*$",
    ):
        PromptTree(clip, ["dog", LONGEST + " cat"], n_ctx=16)


@pytest.mark.parametrize(
    "other",
    [{"kind": open_clip.CustomTextCLIP, "no_causal_mask": True}, {"qk_norm": True}],
    ids=str,
)
def test_a_tower_of_another_kind_is_refused(other):
    with pytest.raises(
        ValueError, match="not causal, not read at EOS, or has blocks of another kind"
    ):
        PromptTree(Clip(tiny_model(**other)), NAMES)


def test_stacked_clients_equal_single_ones(text):
    ctx = torch.randn(
        2, 3, text.n_ctx, text.width, generator=torch.Generator().manual_seed(1)
    ).requires_grad_()
    r = torch.randn(2, 3, text.n_cls, text.dim, generator=torch.Generator().manual_seed(2))
    stacked, alone = text(ctx), torch.stack([torch.stack([text(c) for c in row]) for row in ctx])
    assert error(stacked, alone) < 1e-5
    assert error(*(torch.autograd.grad((r * t).sum(), ctx)[0] for t in (stacked, alone))) < 1e-4


@contextmanager
def passes(clip):
    """The nodes of every pass through the first block's perceptron, forward and backward."""
    seen = []
    norm = clip.model.transformer.resblocks[0].ln_2  # before the perceptron
    count = lambda module, args: seen.append(args[0].shape[:2].numel())  # noqa: E731
    with norm.register_forward_pre_hook(count):
        yield seen


def test_a_thousand_classes_are_encoded_client_by_client_and_block_by_block(clip, monkeypatch):
    foods = food101()
    names = [f"{a} {b}" for a in foods[:40] for b in foods[40:65]]
    gen = torch.Generator().manual_seed(1)
    ctx, r = torch.randn(3, 4, 32, generator=gen), torch.randn(3, len(names), 32, generator=gen)
    found, saved = {}, {}
    for budget in (1024, 10**9):
        monkeypatch.setitem(KEPT, "cpu", budget)
        text, sizes, leaf = (
            PromptTree(clip, names, 4, budget=budget),
            [],
            ctx.clone().requires_grad_(),
        )
        keep = lambda x, sizes=sizes: (sizes.append(x.numel()), x)[1]  # noqa: E731
        with passes(clip) as seen, torch.no_grad():
            text(ctx)
        assert seen == ([text.n_nodes] * 3 if budget == 1024 else [3 * text.n_nodes])
        with passes(clip) as seen, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            features = text(leaf)
            (r * features).sum().backward()
        assert seen == ([text.n_nodes] * 6 if budget == 1024 else [3 * text.n_nodes])
        found[budget], saved[budget] = (features.detach(), leaf.grad), sum(sizes)
    for one, other in zip(found[1024], found[10**9], strict=True):
        assert error(one, other) < 1e-5
    assert saved[1024] < saved[10**9] / 3


def test_nothing_is_computed_twice_that_there_is_room_for(clip, monkeypatch):
    text = PromptTree(clip, NAMES, 16, budget=3 * PromptTree(clip, NAMES, 16).n_nodes + 1)
    assert text.at_once == 3 and PromptTree(clip, NAMES, 16, budget=1).at_once == 1
    monkeypatch.setitem(KEPT, "cpu", 6 * text.n_nodes * text.between)
    # of seven: three pieces, each once more in the backward pass
    for n, expected in ((3, 1), (6, 2), (7, 6)):
        with passes(clip) as seen:
            text(torch.zeros(n, 16, text.width, requires_grad=True)).sum().backward()
        assert len(seen) == expected


@pytest.mark.parametrize("template", TEMPLATES)
def test_zero_shot_is_encode_text_of_the_template(tower, template):
    found = PromptTree(tower, NAMES, n_ctx=4).zero_shot(template)
    assert (
        error(
            found, encode_text(tower, [template.format(name.replace("_", " ")) for name in NAMES])
        )
        < 1e-5
    )


@pytest.mark.parametrize("name", ["text_w32_n5", "text_w64_n16"])
def test_golden_prompts_of_the_released_code(name):
    z = golden(name)
    ctx = z["ctx"].clone().requires_grad_()
    features = PromptTree(stored_clip(z), z["classnames"], int(z["n_ctx"]))(ctx)
    (z["R"] * features).sum().backward()
    assert error(features.detach(), z["end.features"]) < 5e-6
    assert error(ctx.grad, z["end.grad_ctx"]) < 2e-5


@pytest.mark.parametrize("case", ["words0", "words1"])
def test_golden_context_made_of_words(case):
    z = golden("text_w32_n5")
    clip, phrase, want = (
        stored_clip(z),
        z[f"{case}.text"],
        F.normalize(z[f"{case}.features_raw"], dim=-1),
    )
    ctx = PromptTree(clip, z["classnames"]).words(phrase)
    text = PromptTree(clip, z["classnames"], n_ctx=len(ctx))
    assert torch.equal(ctx, z[f"{case}.ctx"])
    assert error(text(ctx), want) < 5e-6
    assert error(text.zero_shot(f"{phrase} {{}}."), want) < 5e-6


def food101():
    return (ROOT / "data/class_names/food101.txt").read_text().split()


def test_food101_takes_427_tokens_instead_of_7777(clip):
    names = food101()
    assert PromptTree(clip, names, n_ctx=16).n_nodes == 427
    assert clip.tokenizer(names).numel() == 7777


@pytest.mark.parametrize("precision", ["bfloat16", "half"])
def test_a_lower_precision_is_of_the_transformer_alone(clip, precision):
    """Features and gradients come in single precision and are near those of it.

    They have 8 or 11 bits instead of 24.
    """
    assert get_args(Precision) == tuple(PRECISIONS)
    made, gen = {}, torch.Generator().manual_seed(1)
    start, r = (
        0.02 * torch.randn(3, 16, 32, generator=gen),
        torch.randn(3, len(NAMES), 32, generator=gen),
    )
    for kind in ("single", precision):
        ctx, text = start.clone().requires_grad_(), PromptTree(clip, NAMES, 16, precision=kind)
        features = text(ctx)
        (r * features).sum().backward()
        made[kind] = features.detach(), ctx.grad, text.zero_shot()
    (low, low_grad, low_zero), (full, grad, zero) = made[precision], made["single"]
    bound = {"bfloat16": 0.03, "half": 0.005}[precision]
    assert (
        0 < (low - full).norm() / full.norm() < bound
        and 0 < (low_grad - grad).norm() / grad.norm() < bound
    )
    assert low.dtype == low_grad.dtype == torch.float32 and torch.equal(low_zero, zero)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(
    ("dtype", "low", "there", "calls"),
    [
        (torch.float32, False, True, 2),  # there and back
        (torch.float64, False, True, 0),
        (torch.float32, True, True, 0),
        (torch.float32, False, False, 0),
    ],
)
def test_a_frozen_linear_map_is_pytorchs_whoever_computes_it(
    dtype, low, there, calls, biased, monkeypatch
):
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(3, 7, 5, generator=gen, dtype=dtype).mT.requires_grad_()
    w = torch.randn(4, 7, generator=gen, dtype=dtype)
    b = torch.randn(4, generator=gen, dtype=dtype) if biased else None
    seen = []
    real = maps.ONEDNN
    assert real or not torch.backends.mkldnn.is_available()
    count = (lambda *given: seen.append(given) or real(*given)) if there and real else None
    monkeypatch.setattr(maps, "ONEDNN", count)
    found = []
    for linear in (maps.linear, F.linear):
        x.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            y = linear(x, w, b)
        y.float().square().sum().backward()
        found.append((y.detach(), x.grad))
    assert len(seen) == (calls if real else 0)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
