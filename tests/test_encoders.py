"""Promise: an encoder is the model that its weights file was made from, whatever brought the file,
and nothing in it is run."""

import collections
import gc
import hashlib
import json
import os
import pickle

import numpy as np
import open_clip
import PIL.Image
import pytest
import torch
from helpers.tiny import NAMES
from huggingface_hub import constants
from safetensors.torch import save_file

from fpl.data import encoders as clips
from fpl.prompts import PromptTree

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}
TOWERS = {
    "small-ViT": {"image_size": 32, "patch_size": 16, "layers": 2, "width": 64},
    "small-RN": {"image_size": 64, "patch_size": None, "layers": [1, 2, 1, 1], "width": 8},
}
QUICK = "-quickgelu"
VIT, RESNET = (f"{name}{QUICK}" for name in TOWERS)
TRANSFORM = {"mean": (0.4, 0.5, 0.6), "resize_mode": "squash"}  # open_clip's default is another


@pytest.fixture(scope="module", autouse=True)
def nothing_left():
    """What earlier modules left open is collected, with its warnings, before a test listens."""
    gc.collect()


@pytest.fixture(scope="module", autouse=True)
def small_models():
    """The two kinds of towers in small widths; open_clip knows them, and weights "openai", as it
    knows the real ones."""
    with pytest.MonkeyPatch.context() as patch:
        for name, vision in TOWERS.items():
            weights = {"hf_hub": f"owner/{name}.openai/", "quick_gelu": True, **TRANSFORM}
            for suffix in ("", QUICK):
                config = {
                    "embed_dim": 24,
                    "quick_gelu": bool(suffix),
                    "vision_cfg": vision,
                    "text_cfg": TEXT,
                }
                patch.setitem(open_clip.factory._MODEL_CONFIGS, name + suffix, config)
                patch.setitem(open_clip.pretrained._PRETRAINED, name + suffix, {"openai": weights})
        yield


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch):
    """An empty cache of the hub, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def original(name, dtype=torch.float32):
    """A model of which no weight and no running statistic is 0 or 1: whatever is left out on
    loading would be seen."""
    with torch.device("meta"):  # nothing is drawn that is not used
        model = open_clip.CLIP(**open_clip.get_model_config(name)).eval().requires_grad_(False)
    model.to_empty(device="cpu").attn_mask.fill_(-torch.inf).triu_(1)
    noise = 0.05 * torch.randn(2**20 + 1, generator=torch.Generator().manual_seed(0))
    for number, (key, value) in enumerate(model.state_dict().items()):
        drawn = (
            noise.roll(number)
            .repeat(-(-value.numel() // len(noise)))[: value.numel()]
            .reshape(value.shape)
        )
        scale = value.dim() == 1 and key.endswith(("weight", "running_var"))  # of norms
        value.copy_((scale + drawn).to(dtype))
    return model


@pytest.fixture(scope="module")
def originals(small_models):
    return {name: original(name) for name in (VIT, RESNET)}


@torch.no_grad()
def image_features(clip, model):
    gen = np.random.default_rng(1)
    images = [
        PIL.Image.fromarray(gen.integers(0, 256, (80, 100, 3)).astype("uint8")) for _ in range(2)
    ]
    return model.encode_image(torch.stack([clip.transform(image) for image in images]))


def same_features(clip, model):
    """Both towers and the scale of a loaded CLIP are those of the model."""
    words, own = clip.tokenizer(NAMES), image_features(clip, model)
    assert own.isfinite().all() and not torch.equal(own[0], own[1])
    assert torch.equal(image_features(clip, clip.model), own)
    assert torch.equal(clip.model.encode_text(words), model.encode_text(words))
    assert torch.equal(clip.model.logit_scale, model.logit_scale)


def as_module(model):
    return {f"module.{key}": value for key, value in model.state_dict().items()}


FORMATS = {  # how a state dict is stored -> file name, writer
    "safetensors": ("w.safetensors", lambda model, path: save_file(model.state_dict(), path)),
    "torch": ("w.pt", lambda model, path: torch.save(model.state_dict(), path)),
    "torch before 1.6": (
        "w.pth",
        lambda model, path: torch.save(
            model.state_dict(), path, _use_new_zipfile_serialization=False
        ),
    ),
    "training checkpoint": (
        "epoch_3.pt",
        lambda model, path: torch.save(
            {"epoch": 3, "name": "run", "state_dict": as_module(model), "optimizer": {}}, path
        ),
    ),
}


def stored(model, folder, format="safetensors"):
    name, write = FORMATS[format]
    folder.mkdir(parents=True, exist_ok=True)
    write(model, folder / name)
    return folder / name


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", [VIT, RESNET])
def test_features_are_those_of_the_model_that_was_stored(name, format, originals, tmp_path):
    path = stored(originals[name], tmp_path, format)
    clip = clips.load(name, path)
    same_features(clip, originals[name])
    assert clip.provenance["model"] == name and clip.provenance["weights"] == digest(path)


@pytest.mark.parametrize(("name", "dim"), [("ViT-B-16-quickgelu", 512), ("RN50-quickgelu", 1024)])
def test_checkpoints_in_the_shapes_of_the_papers_towers(name, dim, tmp_path):
    model = original(name, torch.float16)  # as OpenAI's are
    path = tmp_path / "w.safetensors"
    save_file(
        {
            key: value.half() if value.is_floating_point() else value
            for key, value in model.state_dict().items()
        },
        path,
    )
    clip = clips.load(name, path)
    same_features(clip, model)
    assert PromptTree(clip, NAMES).zero_shot().shape == (len(NAMES), dim)


@pytest.mark.parametrize("name", [VIT, RESNET])
def test_the_text_tower_alone_gives_the_same_text_features(name, originals, tmp_path):
    path = stored(originals[name], tmp_path)
    whole, text = clips.load(name, path), clips.load(name, path, image_tower=False)
    assert not hasattr(text.model, "visual") and text.provenance == whole.provenance
    assert torch.equal(PromptTree(text, NAMES).zero_shot(), PromptTree(whole, NAMES).zero_shot())


@pytest.mark.parametrize("key", ["visual.proj", "text_projection", "logit_scale"])
def test_one_other_weight_is_another_hash(key, originals, tmp_path):
    weights, seen = originals[VIT].state_dict(), []
    for change in (0, 1):
        changed = weights[key].clone()
        changed.view(-1)[0] += change
        save_file({**weights, key: changed}, tmp_path / f"{change}.safetensors")
        seen.append(clips.load(VIT, tmp_path / f"{change}.safetensors").provenance)
    assert seen[0]["weights"] != seen[1]["weights"]
    assert {**seen[0], "weights": ""} == {**seen[1], "weights": ""}


@pytest.mark.parametrize("name", [VIT, "folder"])
def test_another_configuration_of_the_same_weights_is_another_model(
    name, originals, tmp_path, monkeypatch
):
    """Here two attention heads for one, which fit the same weights."""
    path = stored(originals[VIT], tmp_path).rename(tmp_path / clips.WEIGHTS)
    usual = open_clip.get_model_config(VIT)
    two_heads = {**usual, "text_cfg": {**usual["text_cfg"], "heads": 2}}
    assert two_heads != usual
    made = []
    for config in (usual, two_heads):
        whole = {"model_cfg": config, "preprocess_cfg": TRANSFORM}
        path.with_name(clips.CONFIG).write_text(json.dumps(whole))
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, VIT, config)
        is_folder = name == "folder"
        clip = clips.load(f"local-dir:{tmp_path}") if is_folder else clips.load(VIT, path)
        made.append(clip.provenance)
    assert made[0]["architecture"] != made[1]["architecture"]
    assert {**made[0], "architecture": ""} == {**made[1], "architecture": ""}


def in_hub(hub, repository, *files):
    """Files in the hub's cache, as a download leaves them."""
    folder = hub / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for file in files:
        os.symlink(file, snapshot / file.name)


@pytest.mark.parametrize("name", [VIT, RESNET])
def test_whatever_brings_the_file_it_is_the_same_encoder(name, originals, hub, tmp_path):
    path = stored(originals[name], tmp_path / "folder").rename(tmp_path / "folder" / clips.WEIGHTS)
    config = {"model_cfg": open_clip.get_model_config(name), "preprocess_cfg": TRANSFORM}
    path.with_name(clips.CONFIG).write_text(json.dumps(config))
    in_hub(hub, f"owner/{name.removesuffix(QUICK)}.openai", path)
    in_hub(hub, "owner/model", path, path.with_name(clips.CONFIG))
    by = {
        "tag": clips.load(name, "openai"),
        "path": clips.load(name, path),
        "folder": clips.load(f"local-dir:{path.parent}"),
        "repository": clips.load("hf-hub:owner/model"),
    }
    assert by["tag"].provenance == by["path"].provenance
    for clip in by.values():
        same_features(clip, originals[name])
        assert clip.provenance["weights"] == digest(path)
        resize, normalise = clip.transform.transforms[0], clip.transform.transforms[-1]
        assert len(resize.size) == 2 and tuple(normalise.mean) == TRANSFORM["mean"]


def test_an_older_repository_has_a_pickled_state_dict(originals, hub, tmp_path):
    path = stored(originals[VIT], tmp_path, "torch").rename(
        tmp_path / "open_clip_pytorch_model.bin"
    )
    in_hub(hub, "owner/small-ViT.openai", path)
    clip = clips.load(VIT, "openai")
    same_features(clip, originals[VIT])
    assert clip.provenance["weights"] == digest(path)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])
    return path


def saved(content, path):
    torch.save(content, path)
    return path


class Node(torch.nn.Module):
    def forward(self):
        return 0


def torchscript(model, path):
    """An archive as OpenAI's are: the weights in half precision, and three numbers more."""
    top = Node()
    numbers = {"input_resolution": 32, "context_length": 77, "vocab_size": 49408}
    for name, value in (
        model.state_dict() | {name: torch.tensor(number) for name, number in numbers.items()}
    ).items():
        *parents, leaf = name.split(".")
        node = top
        for parent in parents:
            node = node._modules.setdefault(parent, Node())
        node.register_buffer(leaf, value.half() if value.is_floating_point() else value)
    torch.jit.script(top).save(str(path))
    return path


# model; its weights, or how to make them of (originals, a folder); what the sentence must say
REFUSED = {
    "RN50 without QuickGELU": (
        "RN50",
        "openai",
        "'openai' were trained with QuickGELU",
        "`backbone.name` to RN50-quickgelu",
    ),
    "ViT-B/16 without QuickGELU": (
        "ViT-B-16",
        "openai",
        "with QuickGELU",
        "`backbone.name` to ViT-B-16-quickgelu",
    ),
    "QuickGELU where GELU was": (
        "ViT-B-16-quickgelu",
        "laion2b_s34b_b88k",
        "trained with GELU",
        "to ViT-B-16, not",
    ),
    "unknown model": (
        "ViT-B16-quickgelu",
        "openai",
        "unknown model 'ViT-B16-quickgelu': did you mean 'ViT-B-16-quickgelu'?",
    ),
    "unknown tag": (
        "RN50-quickgelu",
        "open-ai",
        "unknown weights 'open-ai' of RN50-quickgelu",
        "'openai'",
    ),
    "no weights named": (
        "RN50-quickgelu",
        None,
        "RN50-quickgelu needs weights",
        "`backbone.weights`",
        "'openai'",
    ),
    "no file": ("RN50-quickgelu", "some/where", "no weights at some/where", "RN50-quickgelu"),
    "weights of a folder": (
        "local-dir:x",
        "openai",
        "local-dir:x has weights of its own",
        "'openai'",
    ),
    "no network": (
        "RN50-quickgelu",
        "openai",
        "'openai' of RN50-quickgelu cannot be downloaded",
        "bring open_clip_model.safetensors of timm/resnet50_clip.openai to any place",
        "`backbone.weights` to its path",
    ),
    "no network, a file of another name": (
        "ViTamin-S",
        "datacomp1b",
        "bring pytorch_model.bin of jienengchen/ViTamin-S to",
    ),
    "no network, a repository": (
        "hf-hub:owner/model",
        None,
        "owner/model cannot be downloaded",
        "open_clip_config.json and open_clip_model.safetensors",
        "`backbone.name` to local-dir:",
    ),
    "another tower": (
        VIT,
        lambda models, folder: stored(models[RESNET], folder),
        "w.safetensors does not load as small-ViT",
    ),
    "another width": (
        "ViT-B-16",
        lambda models, folder: stored(models[VIT], folder),
        "w.safetensors does not load",
        "width",
    ),
    "a weight is missing": (
        VIT,
        lambda models, folder: saved({"logit_scale": torch.ones(())}, folder / "w.pt"),
        "w.pt does not load as small-ViT-quickgelu",
        "Missing key(s)",
    ),
    "a cut file": (
        VIT,
        lambda models, folder: cut(stored(models[VIT], folder)),
        "w.safetensors is damaged",
    ),
    "a cut state dict": (
        VIT,
        lambda models, folder: cut(stored(models[VIT], folder, "torch")),
        "w.pt is no",
        "damaged",
    ),
    "no state dict": (
        VIT,
        lambda models, folder: saved(torch.ones(3), folder / "w.pt"),
        "w.pt is no state dict",
    ),
    "an empty one": (
        VIT,
        lambda models, folder: saved({"state_dict": {}}, folder / "w.pt"),
        "w.pt is no state dict",
    ),
    "numbers": (
        VIT,
        lambda models, folder: saved({"epoch": 3}, folder / "w.pt"),
        "w.pt is no state dict",
    ),
    "TorchScript": (
        VIT,
        lambda models, folder: torchscript(models[VIT], folder / "ViT-B-16.pt"),
        "ViT-B-16.pt is no state dict but",
        "TorchScript",
        "bring open_clip_model.safetensors",
        "torch.save(open_clip.load_openai_model(OLD).state_dict(), NEW)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_loaded_is_one_sentence(case, originals, tmp_path, recwarn):
    name, weights, *parts = REFUSED[case]
    weights = weights(originals, tmp_path) if callable(weights) else weights
    recwarn.clear()
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        clips.load(name, weights)
    message = str(refused.value)
    assert "\n" not in message and len(message.replace(str(tmp_path), "")) < 350
    assert [part for part in parts if part not in message] == []
    assert not recwarn.list


def test_the_conversion_that_is_advised_for_torchscript(originals, tmp_path):
    old, new = torchscript(originals[VIT], tmp_path / "old.pt"), tmp_path / "new.pt"
    torch.save(open_clip.load_openai_model(str(old)).state_dict(), new)
    same_features(clips.load(VIT, new), original(VIT, torch.float16))


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Stumble:
    """PyTorch's restricted reading raises TypeError for it, after which open_clip's loader reads
    without saying how."""

    def __reduce__(self):
        return collections.OrderedDict, (), (None, {})


def pickled(content, path):
    path.write_bytes(pickle.dumps(content))


def numpy_archive(content, path):
    with path.open("wb") as file:
        np.savez(file, content=np.array(content, dtype=object))


HOSTILE = {  # file name, writer, what would run it
    "torch": ("w.pt", torch.save, lambda path: torch.load(path, weights_only=False)),
    "torch, behind another ending": (
        "w.bin",
        torch.save,
        lambda path: torch.load(path, weights_only=False),
    ),
    "torch before 1.6": (
        "w.pt",
        lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
        lambda path: torch.load(path, weights_only=False),
    ),
    "pickle": (
        "w.pt",
        lambda content, path: path.write_bytes(pickle.dumps(content)),
        lambda path: pickle.loads(path.read_bytes()),
    ),
    "pickle named safetensors": (
        "w.safetensors",
        lambda content, path: path.write_bytes(pickle.dumps(content)),
        lambda path: pickle.loads(path.read_bytes()),
    ),
    "numpy archive": (
        "w.npz",
        numpy_archive,
        lambda path: np.load(path, allow_pickle=True)["content"],
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_pickle_is_refused_and_does_not_run(case, originals, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # not even when PyTorch is told to
    file, write, run = HOSTILE[case]
    path, ran = tmp_path / file, tmp_path / "ran"
    write({"state_dict": originals[VIT].state_dict(), "extra": Hostile(ran)}, path)
    with pytest.raises(ValueError, match=f"{file} is "):
        clips.load(VIT, path)
    assert not ran.exists()
    run(path)
    assert ran.exists(), "the trap does not work"


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_the_released_preprocessing_of_cifar(name, originals, tmp_path):
    """D22: CIFAR's own statistics, and bilinear enlargement after the normalisation."""
    path, gen = stored(originals[VIT], tmp_path), np.random.default_rng(2)
    usual, released = clips.load(VIT, path), clips.load(VIT, path, preprocessing=name)
    image = PIL.Image.fromarray(gen.integers(0, 256, (32, 32, 3)).astype("uint8"))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in clips.PREPROCESSINGS[name])
    x = (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - mean) / std
    size = usual.transform(image).shape[-2:]
    expected = torch.nn.functional.interpolate(
        x.unsqueeze(0), size, mode="bilinear", align_corners=False
    )[0]
    assert torch.allclose(released.transform(image), expected, atol=1e-5)
    assert not torch.allclose(usual.transform(image), expected, atol=0.1)
    assert (
        usual.provenance["transform"] != released.provenance["transform"]
    )  # so features of one are refused with the other
    with pytest.raises(ValueError, match="unknown preprocessing 'cifar': use cifar10 or cifar100"):
        clips.load(VIT, path, preprocessing="cifar")
