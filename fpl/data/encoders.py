"""Frozen CLIP models from open_clip: which weights they load, and what is refused and why."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.errors import RemoteEntryNotFoundError
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fpl.data.files import ROOT, sha256
from fpl.data.imported import IMPORTED
from fpl.later import Later
from fpl.prompts import Clip

open_clip = Later("open_clip")
transforms = Later("torchvision.transforms")

# the files of a model in a repository of the hub or in a folder
CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
PICKLED = "open_clip_pytorch_model.bin"  # the weights in older repositories
LOCAL = "local-dir:"
HUB = "hf-hub:"
QUICK = "-quickgelu"
# mean and deviation of colours with which pFedMoAP's released code normalises CIFAR's images (D22)
PREPROCESSINGS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}

# what open_clip has for a configuration and weights that do not fit
UNFIT = (AssertionError, AttributeError, KeyError, RuntimeError, TypeError)


def load(
    name: str,
    weights: str | Path | None = None,
    device: str = "cpu",
    image_tower: bool = True,
    preprocessing: str = "",
) -> Clip:
    """Load an open_clip model and freeze it.

    The papers use "RN50-quickgelu" and "ViT-B-16-quickgelu" with the weights "openai". Nothing in a
    weights file is run. `provenance["weights"]` is the SHA-256 of the file that is loaded, so a tag
    and its file brought by hand are the same; `provenance["architecture"]` is that of the
    configuration from which the model is built.

    name: built-in; or "hf-hub:REPOSITORY" or "local-dir:FOLDER" with their weights; or "imported".
    weights: of a built-in model, a tag or the path of a file.
    image_tower: False keeps the text tower only, all that is needed once features are there.
    preprocessing: "" for the model's own transform, or one of PREPROCESSINGS, which enlarges images
        after it has normalised them.

    Raises FileNotFoundError when the file is not there or cannot be downloaded, saying which one to
    bring; ValueError for an unknown model, tag or preprocessing, for the wrong one of GELU and
    QuickGELU, for a file that is no state dict, and for one that does not fit the model.
    """
    if preprocessing and preprocessing not in PREPROCESSINGS:
        raise ValueError(
            f"unknown preprocessing {preprocessing!r}: use {' or '.join(PREPROCESSINGS)}, "
            "or leave it empty for CLIP's own"
        )
    if name == IMPORTED:
        return without_towers(image_tower)
    source, file, options = resolve(name, str(weights or ""))
    check_plain(file)
    pretrained = None if source.startswith(LOCAL) else str(file)
    try:
        model, transform = open_clip.create_model_from_pretrained(source, pretrained, **options)
    except UNFIT as e:
        why = textwrap.shorten(str(e).partition(":\n")[2] or str(e), 160)
        raise ValueError(
            f"{file} does not load as {name} ({why}): correct `backbone` in params.yaml"
        ) from e
    model = model.float().eval().requires_grad_(False)
    if preprocessing:
        transform = released_transform(preprocessing, model.visual.image_size)
    if not image_tower:
        del model.visual
    described = " ".join(repr(transform).split())
    hashes = {"architecture": architecture(source), "weights": sha256(file)}
    provenance = {"model": name, **hashes, "transform": described}
    return Clip(model.to(device), transform, open_clip.get_tokenizer(source), provenance)


def without_towers(image_tower: bool) -> Clip:
    """Return what stands in for the CLIP of imported features (fpl.data.foreign).

    Raises ValueError where an image tower is asked for.
    """
    if image_tower:
        raise ValueError(
            "features that were imported come without a model: "
            "set `backbone` in params.yaml to one that is to encode images"
        )
    return Clip(nn.Identity(), provenance={"weights": IMPORTED})


def architecture(source: str) -> str:
    """Hash what open_clip builds a model from: sizes, heads, activation, tokenizer.

    source: a built-in name, or `local-dir:FOLDER` whose configuration has been read once.
    """
    if source.startswith(LOCAL):
        config = json.loads((Path(source.removeprefix(LOCAL)) / CONFIG).read_bytes())["model_cfg"]
    else:
        config = open_clip.get_model_config(source)
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def untrained(name: str, device: str = "cpu") -> Clip:
    """Make a built-in model with random weights, for what does not depend on them, such as time."""
    model, _, transform = open_clip.create_model_and_transforms(
        check_name(name), device=device, pretrained_text=False
    )
    provenance = {"model": name, "weights": "random"}
    return Clip(model.eval().requires_grad_(False), transform, provenance=provenance)


def released_transform(preprocessing: str, size: int | tuple[int, int]) -> Any:
    """Prepare images as the released code does: normalise with CIFAR's statistics, then enlarge."""
    square = size if isinstance(size, tuple) else (size, size)
    normalise = transforms.Normalize(*PREPROCESSINGS[preprocessing])
    return transforms.Compose([transforms.ToTensor(), normalise, transforms.Resize(square)])


def located(name: str) -> str:
    """Return the name of a model whose relative folder is here or, if not, in the repository."""
    folder = name.removeprefix(LOCAL)
    if folder == name or Path(folder).exists():
        return name
    return f"{LOCAL}{ROOT / folder}"


def resolve(name: str, weights: str) -> tuple[str, Path, dict[str, Any]]:
    """Find open_clip's name of a model, its weights on this disk and its transform's options."""
    if not name.startswith((LOCAL, HUB)):
        return resolve_built_in(name, weights)
    if weights:
        raise ValueError(
            f"{name} has weights of its own: leave `backbone.weights` empty, not {weights!r}"
        )
    if name.startswith(HUB):
        file = model_of_hub(name.removeprefix(HUB))
    else:
        file = Path(name.removeprefix(LOCAL)) / WEIGHTS
    return f"{LOCAL}{file.parent}", require_file(file, name), {}


def resolve_built_in(name: str, weights: str) -> tuple[str, Path, dict[str, Any]]:
    """Do the same for a built-in model whose weights are a tag or the path of a file.

    A file does not say its transform and gets that of the model's first tag, as most tags have.
    """
    tags = open_clip.list_pretrained_tags_by_model(check_name(name))
    if not weights:
        tag = f"a tag such as {tags[0]!r}, or " if tags else ""
        raise ValueError(
            f"{name} needs weights: "
            f"set `backbone.weights` in params.yaml to {tag}the path of a file"
        )
    check_activation(name, weights)
    config = open_clip.get_pretrained_cfg(name, weights)
    if config:
        file = download_tag(name, weights, config["hf_hub"])
    else:
        file = Path(weights)
        is_word = not file.suffix and file.name == weights
        if tags and is_word and not file.exists():
            raise ValueError(
                f"unknown weights {weights!r} of {name}: "
                f"did you mean the tag {nearest(weights, tags)!r}, or the path of a file?"
            )
        config = open_clip.get_pretrained_cfg(name, tags[0] if tags else "")
    keys = ("mean", "std", "interpolation", "resize_mode")
    options = {f"image_{key}": config[key] for key in keys if key in config}
    return name, require_file(file, name), options


def check_name(name: str) -> str:
    """Raise ValueError with the nearest name for a model that open_clip does not know."""
    models = open_clip.list_models()
    if name not in models:
        raise ValueError(f"unknown model {name!r}: did you mean {nearest(name, models)!r}?")
    return name


def check_activation(name: str, tag: str) -> None:
    """Raise ValueError for weights trained with the other activation; open_clip would only warn."""
    twin = name.removesuffix(QUICK) if name.endswith(QUICK) else name + QUICK
    if belongs(twin, tag) and not belongs(name, tag):
        activation = "QuickGELU" if twin.endswith(QUICK) else "GELU"
        raise ValueError(
            f"the weights {tag!r} were trained with {activation}: "
            f"set `backbone.name` to {twin}, not {name}"
        )


def belongs(name: str, tag: str) -> bool:
    """Say whether a built-in model has the activation with which this tag was trained."""
    config = open_clip.get_pretrained_cfg(name, tag)
    if not config:
        return False
    model = open_clip.get_model_config(name)
    return config.get("quick_gelu", False) == model.get("quick_gelu", False)


def nearest(name: str, valid: Sequence[str]) -> str:
    return difflib.get_close_matches(name, valid, n=1, cutoff=0.0)[0]


def download_tag(name: str, tag: str, place: str) -> Path:
    """Fetch the weights of a tag from its `place`, REPOSITORY/FILE of the hub."""
    repository, _, file = place.rpartition("/")
    files = [str(Path(file).with_suffix(".safetensors")), file] if file else [WEIGHTS, PICKLED]
    bring = (
        f"bring {file or WEIGHTS} of {repository} to any place "
        "and set `backbone.weights` to its path"
    )
    return download(repository, files, f"the weights {tag!r} of {name}", bring)


def model_of_hub(repository: str) -> Path:
    """Fetch the weights of a repository that holds one model; its config lies beside them."""
    what = f"the model {repository}"
    bring = (
        f"bring its {CONFIG} and {WEIGHTS} into one folder and set `backbone.name` to {LOCAL}FOLDER"
    )
    download(repository, [CONFIG], what, bring)
    return download(repository, [WEIGHTS, PICKLED], what, bring)


def download(repository: str, files: Sequence[str], what: str, bring: str) -> Path:
    """Fetch the first of these files that a repository has, from the hub's cache or the network.

    Raises FileNotFoundError saying `what` is missing and what to `bring` in its place.
    """
    hub_file = open_clip.pretrained.hf_hub_download
    for file in files:
        with contextlib.suppress(FileNotFoundError, ValueError):
            return Path(hub_file(repository, file, local_files_only=True))
    try:
        for file in files:
            with contextlib.suppress(RemoteEntryNotFoundError):
                return Path(hub_file(repository, file))
        raise FileNotFoundError(f"{repository} has none of {', '.join(files)}")
    except (OSError, ValueError) as e:
        raise FileNotFoundError(
            f"{what} cannot be downloaded (no network, or no longer there): {bring}"
        ) from e


def require_file(file: Path, name: str) -> Path:
    if not file.is_file():
        raise FileNotFoundError(
            f"no weights at {file}: "
            f"put the checkpoint of {name} there, or correct `backbone` in params.yaml"
        )
    return file


def check_plain(file: Path) -> None:
    """Raise ValueError unless a file is a state dict, to be read without running anything in it."""
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt"):
                return
        except SafetensorError as e:
            raise ValueError(
                f"{file} is damaged, or no safetensors file ({e}): bring it again"
            ) from e
    if not is_state_dict(file):
        raise ValueError(
            f"{file} is no state dict but a damaged file, a pickle of more than tensors, or a "
            "TorchScript archive such as OpenAI's own .pt, which is not opened: bring "
            f"{WEIGHTS} of the model's repository, or convert OpenAI's by "
            "torch.save(open_clip.load_openai_model(OLD).state_dict(), NEW)"
        )


def is_state_dict(file: Path) -> bool:
    """Say whether PyTorch's restricted reader finds named tensors, and nothing else, in a file."""
    try:
        with warnings.catch_warnings(action="ignore"):  # `check_plain` has a better sentence
            content = torch.load(file, "cpu", weights_only=True)
        weights = content.get("state_dict", content)
        return bool(weights) and all(isinstance(value, Tensor) for value in weights.values())
    except Exception:  # torch has many for what it does not want to read
        return False


def tokens(
    clip: Clip, images: Float[Tensor, "b 3 s s"]
) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b M d"]]:
    """Encode images: their pooled features, and those of their M patches in the joint space.

    None of them is normalised. Patches are what FedOTP reads (Li et al., CVPR 2024;
    HongxiaLee/FedOTP at 9948611, clip/model.py): a ViT's tokens but for the class token, or what a
    ResNet's attention pool gives at every position but the mean's, which is the pooled feature.
    Raises ValueError for a tower of another kind.
    """
    tower: Any = getattr(clip.model, "visual", None)
    if isinstance(tower, open_clip.modified_resnet.ModifiedResNet):
        found = tower.forward_intermediates(images, indices=1, intermediates_only=True)
        x = attention_pool(tower.attnpool, found["image_intermediates"][0])
        return x[:, 0], x[:, 1:]
    is_vit = isinstance(tower, open_clip.transformer.VisionTransformer)
    if not is_vit or tower.pool_type != "tok" or tower.attn_pool or tower.final_ln_after_pool:
        raise ValueError(
            f"this image tower ({type(tower).__name__}) has no patch features in the joint space: "
            "open_clip's VisionTransformer, read at its class token behind the final norm, and "
            "ModifiedResNet have them"
        )
    found = tower.forward_intermediates(
        images, indices=1, normalize_intermediates=True, output_fmt="NLC"
    )
    return found["image_features"], found["image_intermediates"][0] @ tower.proj


def attention_pool(pool: Any, x: Float[Tensor, "b w s s"]) -> Float[Tensor, "b t d"]:
    """Apply a ResNet's attention pool at all t = 1 + s s positions, the mean first.

    open_clip's own returns the mean's only.
    """
    x = x.flatten(2).mT
    x = torch.cat([x.mean(1, keepdim=True), x], dim=1) + pool.positional_embedding

    def heads(project: nn.Module) -> Tensor:
        return project(x).unflatten(-1, (pool.num_heads, -1)).transpose(1, 2)

    mixed = F.scaled_dot_product_attention(
        heads(pool.q_proj), heads(pool.k_proj), heads(pool.v_proj)
    )
    return pool.c_proj(mixed.transpose(1, 2).flatten(2))
