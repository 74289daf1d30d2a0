"""Promise: patch features are those that the image tower has behind the joint projection, and their
file is like the other."""

import dataclasses
import json
import tracemalloc

import open_clip
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
import yaml
from helpers import BACKBONE, DATA, PARAMS, ROOT, build, refuses, standing_in
from helpers.tiny import error

from fpl import cli
from fpl.data import encoders as clips
from fpl.data import extraction, features
from fpl.data.manifest import read_manifest
from fpl.experiments import cache, runner, verbs
from fpl.prompts import Clip

VIT = {"image_size": 32, "patch_size": 8, "layers": 2, "width": 32, "head_width": 16}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32}
TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 1, "layers": 1}
TOWERS = {  # open_clip class, image tower, QuickGELU, number of patches
    "vit": (open_clip.CLIP, VIT, False, 16),
    "vit, quick gelu": (open_clip.CLIP, VIT, True, 16),
    "vit, custom text": (open_clip.CustomTextCLIP, VIT, False, 16),
    "resnet": (open_clip.CLIP, RESNET, True, 4),
    "resnet, custom text": (open_clip.CustomTextCLIP, RESNET, False, 4),
}


def random_clip(kind=open_clip.CLIP, vision=VIT, quick_gelu=False):
    """No weight and no running statistic is 0 or 1, as some are before training: whatever is left
    out would be seen."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = (
            kind(embed_dim=24, vision_cfg=vision, text_cfg=TEXT, quick_gelu=quick_gelu)
            .eval()
            .requires_grad_(False)
        )
        for name, value in model.visual.state_dict().items():
            if value.is_floating_point():
                value.add_(
                    torch.rand_like(value)
                    if name.endswith("running_var")
                    else 0.1 * torch.randn_like(value)
                )
    return Clip(model)


@pytest.fixture(params=TOWERS)
def case(request):
    """A random CLIP in double precision, three images, the number of patches."""
    kind, vision, quick_gelu, patches = TOWERS[request.param]
    clip, gen = random_clip(kind, vision, quick_gelu), torch.Generator().manual_seed(1)
    clip.model.double()
    size = vision["image_size"]
    return clip, torch.randn(3, 3, size, size, generator=gen, dtype=torch.float64), patches


def vit_by_hand(tower, image):
    """All tokens of one image, the class token first; one patch of pixels after the other."""
    size = tower.conv1.kernel_size[0]
    pixels = image.unfold(1, size, size).unfold(2, size, size).permute(1, 2, 0, 3, 4).flatten(0, 1)
    embedded = [
        tower.class_embedding,
        *((tower.conv1.weight * patch).sum((1, 2, 3)) for patch in pixels),
    ]
    x = tower.ln_pre(torch.stack(embedded) + tower.positional_embedding)[None]
    for block in tower.transformer.resblocks:
        x = block(x)
    return torch.stack([tower.proj.T @ tower.ln_post(token) for token in x[0]])


def resnet_by_hand(tower, image):
    """The attention pool's output at the mean and at every position of one image's last feature
    map."""
    x = image[None]
    for number in "123":
        for layer in ("conv", "bn", "act"):
            x = getattr(tower, layer + number)(x)
    for layer in (tower.avgpool, tower.layer1, tower.layer2, tower.layer3, tower.layer4):
        x = layer(x)
    pool, places = (
        tower.attnpool,
        [x[0, :, i, j] for i in range(x.shape[2]) for j in range(x.shape[3])],
    )
    x = torch.stack([sum(places) / len(places), *places]) + pool.positional_embedding
    width, out = x.shape[1] // pool.num_heads, []
    for query in pool.q_proj(x):
        heads = []
        for h in range(pool.num_heads):
            own = slice(h * width, (h + 1) * width)
            weight = (pool.k_proj(x)[:, own] @ query[own] / width**0.5).softmax(0)
            heads.append(weight @ pool.v_proj(x)[:, own])
        out.append(pool.c_proj(torch.cat(heads)))
    return torch.stack(out)


def test_tokens_are_those_of_the_modules_one_by_one(case):
    clip, images, patches = case
    pooled, found = clips.tokens(clip, images)
    by_hand = (
        resnet_by_hand
        if isinstance(clip.model.visual, open_clip.modified_resnet.ModifiedResNet)
        else vit_by_hand
    )
    own = torch.stack([by_hand(clip.model.visual, image) for image in images])
    assert found.shape == (3, patches, 24) and own.flatten(0, 1).std(0).min() > 1e-3
    assert error(pooled, own[:, 0]) < 1e-12
    assert error(found, own[:, 1:]) < 1e-12


def test_pooled_is_what_the_model_gives(case):
    clip, images, _ = case
    assert error(clips.tokens(clip, images)[0], clip.model.encode_image(images)) < 1e-12


def test_one_pass_that_leaves_the_model_as_it_was(case):
    clip, images, _ = case
    before = {name: value.clone() for name, value in clip.model.state_dict().items()}
    settings = [
        {k: v for k, v in vars(m).items() if isinstance(v, bool | int | str)}
        for m in clip.model.modules()
    ]
    convolutions, calls = (
        [m for m in clip.model.visual.modules() if isinstance(m, torch.nn.Conv2d)],
        [],
    )
    handles = [
        m.register_forward_hook(lambda module, *_: calls.append(module)) for m in convolutions
    ]
    clips.tokens(clip, images)
    for handle in handles:
        handle.remove()
    assert len(calls) == len(convolutions) and set(calls) == set(convolutions)
    assert all(torch.equal(value, before[name]) for name, value in clip.model.state_dict().items())
    assert settings == [
        {k: v for k, v in vars(m).items() if isinstance(v, bool | int | str)}
        for m in clip.model.modules()
    ]
    assert not any(
        m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m)
        for m in clip.model.modules()
    )


OTHERS = {
    "attention pooler": {**VIT, "attentional_pool": True},
    "mean of the patches": {**VIT, "pool_type": "avg"},
    "norm behind the pooling": {**VIT, "final_ln_after_pool": True},
}


@pytest.mark.parametrize("name", [*OTHERS, "another architecture", "no image tower"])
def test_a_tower_without_patch_features_is_refused(name, manifest, tower, tmp_path):
    clip = dataclasses.replace(tower, model=random_clip(vision=OTHERS.get(name, VIT)).model)
    if name not in OTHERS:
        del clip.model.visual
    if name == "another architecture":
        clip.model.visual = torch.nn.Flatten()
    with pytest.raises(
        ValueError,
        match=r"^this image tower \(\w+\) has no patch features.* VisionTransformer.* ModifiedR",
    ) as e:
        extraction.extract(manifest, clip, tmp_path / "f.h5", content="patches")
    assert "\n" not in str(e.value) and not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with standing_in(build(tmp_path_factory.mktemp("world"))) as folder:
        yield folder


@pytest.fixture(scope="module")
def manifest(world):
    return read_manifest(world / DATA.folder / "manifest.csv")


@pytest.fixture(scope="module")
def tower(world):
    return clips.load(BACKBONE.name)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("clip", (4, 32)), (f"{ROOT}/data/demo_clip", (64, 256))],
    ids=["random", "demo"],
)
def test_both_files_are_one_pass(name, shape, manifest, tmp_path):
    """Patches stay as they are stored, in half precision and not normalised; the pooled ones of the
    other file go with them."""
    clip = clips.load(f"local-dir:{name}")
    pixels = [
        clip.transform(PIL.Image.open(manifest.folder / row["path"]).convert("RGB"))
        for row in manifest.rows
    ]
    pooled, patches = clips.tokens(clip, torch.stack(pixels))
    assert torch.equal(pooled, clip.model.encode_image(torch.stack(pixels)))
    stored = {
        c: features.load(
            extraction.extract(manifest, clip, tmp_path / f"{c}.h5", content=c), content=c
        )
        for c in features.CONTENT
    }
    assert stored["patches"].feats.dtype == torch.float16 and stored["patches"].feats.shape == (
        len(pixels),
        *shape,
    )
    torch.testing.assert_close(stored["patches"].feats.float(), patches, rtol=2**-10, atol=1e-5)
    torch.testing.assert_close(
        stored["feats"].feats, F.normalize(pooled, dim=-1), rtol=2**-10, atol=1e-6
    )
    assert torch.equal(stored["patches"].labels, stored["feats"].labels)


@pytest.mark.parametrize(("held", "wanted"), [("feats", "patches"), ("patches", "feats")])
def test_one_is_not_opened_as_the_other(held, wanted, manifest, tower, tmp_path):
    path = extraction.extract(manifest, tower, tmp_path / "f.h5", content=held)
    with pytest.raises(ValueError) as refused:
        features.load(path, content=wanted)
    assert str(refused.value).startswith(
        f"{path} was made with content {held!r}, asked for is {wanted!r}: run `fpl features"
    )


def test_a_missing_file_says_how_it_is_made(tmp_path):
    with pytest.raises(FileNotFoundError, match="f.h5: make them with `fpl features --patches`"):
        features.load(tmp_path / "f.h5", content="patches")


def test_opening_takes_little_more_memory_than_the_file(manifest, tower, tmp_path):
    """What numpy and HDF5 allocate; the tensor shares it."""
    path, made = tmp_path / "f.h5", features.provenance(manifest, tower, "patches")
    with features.written(path) as f:
        extraction.create(f, manifest, "patches", (1024, 64), made)
        f["patches"][:, 0] = 1
    tracemalloc.start()
    try:
        loaded = features.load(path, made, content="patches")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert loaded.feats.nbytes == len(manifest.rows) * 1024 * 64 * 2
    assert loaded.feats.nbytes < peak < 1.2 * loaded.feats.nbytes


def test_the_command_makes_both_files(world, tmp_path):
    settings = {
        "data": {"train_per_class": 2, "test_per_class": 1},
        "backbone": {"name": f"local-dir:{world}/clip"},
    }
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(settings))
    with standing_in(tmp_path):
        cli.main(["features"])
        assert not DATA.file("patches").exists()
        alone = DATA.features.read_bytes()
        cli.main(["features", "--patches"])
        assert DATA.features.read_bytes() == alone
        assert sorted(path.name for path in DATA.features.parent.iterdir()) == [
            "shapes.h5",
            "shapes_patches.h5",
        ]
        pooled = features.load(DATA.features)
        assert len(
            features.load(DATA.file("patches"), pooled.provenance, content="patches").feats
        ) == len(pooled.feats)


def test_python_trains_on_patches_as_the_command_line_does(here, patched):
    small = {"n_ctx": 2, "rounds": 1}
    (path,) = runner.sweep([PARAMS.experiment("fedotp", 1, **small)])
    clip = verbs.load(BACKBONE.name)
    clients = verbs.split(verbs.features("shapes", clip, patches=True), clients=4, shots=2)
    same = {"local_epochs": 1, "batch_size": 8}
    result = verbs.train("fedotp", clip, clients, progress=False, **small, **same)
    want = json.loads(path.read_text())["rounds"][0]
    assert result.accuracy.tolist() == pytest.approx(want["accuracy"], abs=1e-6)
    assert result.rounds[0].loss == pytest.approx(want["loss"], rel=1e-5)
    without = verbs.split(verbs.features("shapes", clip), clients=4, shots=2)
    refuses(lambda: verbs.train("fedotp", clip, without), ["patches=True"])


def test_other_patches_are_another_run(here, patched):
    experiment = PARAMS.experiment("fedotp", 1)
    (before,) = runner.keys_of([experiment])
    plain = runner.keys_of([PARAMS.experiment("promptfl", 1)])
    held_before = cache.patches_of(DATA, BACKBONE, "cpu")
    path = DATA.file("patches")
    content = path.read_bytes()
    with features.h5py.File(path, locking=False) as f:
        held = {name: f[name][:] for name in f}
        made = dict(f.attrs)
    try:
        path.unlink()
        with features.written(path) as f:
            f.attrs["provenance"] = made["provenance"]
            for name, value in held.items():
                f[name] = value / 2 if name == "patches" else value
        (after,) = runner.keys_of([experiment])
        assert after.path != before.path
        assert torch.equal(cache.patches_of(DATA, BACKBONE, "cpu"), held_before / 2)
        assert runner.keys_of([PARAMS.experiment("promptfl", 1)]) == plain
    finally:
        path.write_bytes(content)
