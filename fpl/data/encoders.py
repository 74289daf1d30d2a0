"""The frozen CLIP: loading it, and its text tower as a function of a learnable prompt. Only this file knows open_clip.

(`fpl.pretrain`, which makes the demo model, builds an open_clip model too.)

Shapes: c classes, m context length, w text width, d joint width, t nodes of a prompt tree; `...` are clients.
"""
from __future__ import annotations

import contextlib
import difflib
import os
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from huggingface_hub.errors import RemoteEntryNotFoundError
from jaxtyping import Float
from open_clip.modified_resnet import ModifiedResNet
from open_clip.pretrained import hf_hub_download
from open_clip.transform import Compose, InterpolationMode, Normalize, Resize, ToTensor
from open_clip.transformer import VisionTransformer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fpl.data.files import sha256
from fpl.prompts import Clip

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"  # of a model in a hub's repository or in a folder
PICKLED = "open_clip_pytorch_model.bin"  # in older repositories
RELEASED = {  # mean and deviation of colours by which pFedMoAP's released code normalises CIFAR's images (D22)
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
LOCAL, HUB, QUICK = "local-dir:", "hf-hub:", "-quickgelu"


def load(
    name: str, weights: str | Path | None = None, device: str = "cpu", image_tower: bool = True, preprocessing: str = ""
) -> Clip:
    """An open_clip model. The paper's are "RN50-quickgelu" and "ViT-B-16-quickgelu" with the weights "openai".

    `name` is a built-in model with `weights`, a tag or the path of a file; or "hf-hub:REPOSITORY" or "local-dir:FOLDER", which
    have their own. Whatever the source, `provenance["weights"]` is the SHA-256 of the file that is loaded, so a tag and its file
    brought by hand are the same. Nothing in a weights file is run. Without `image_tower` only the text tower is kept: what comes
    after the features needs no other. `preprocessing`: "" for the model's own transform, or one of RELEASED, which enlarges after
    it has normalised.

    Raises FileNotFoundError when the file is not there or cannot be downloaded, saying which one to bring, and ValueError for an
    unknown model, tag or preprocessing, the wrong one of GELU and QuickGELU, a file that is no state dict, and one that does not
    fit the model.
    """
    if preprocessing and preprocessing not in RELEASED:
        raise ValueError(
            f"unknown preprocessing {preprocessing!r}: use {' or '.join(RELEASED)}, or leave it empty for CLIP's own"
        )
    source, file, transform = resolve(name, str(weights or ""))
    check_plain(file)
    try:
        made = open_clip.create_model_from_pretrained(source, None if source.startswith(LOCAL) else str(file), **transform)
    except (AssertionError, AttributeError, KeyError, RuntimeError) as e:  # open_clip has them all for what does not fit
        why = textwrap.shorten(str(e).partition(":\n")[2] or str(e), 160)
        raise ValueError(f"{file} does not load as {name} ({why}): correct `backbone` in params.yaml") from e
    model = made[0].float().eval().requires_grad_(False)
    size, own = model.visual.image_size, made[1]
    if not image_tower:
        del model.visual
    if preprocessing:
        square = size if isinstance(size, tuple) else (size, size)
        own = Compose([ToTensor(), Normalize(*RELEASED[preprocessing]), Resize(square, InterpolationMode.BILINEAR)])
    provenance = {"model": name, "weights": sha256(file), "transform": " ".join(repr(own).split())}
    return Clip(model.to(device), own, open_clip.get_tokenizer(source), provenance)




def untrained(name: str, device: str = "cpu") -> Clip:
    """A built-in model with random weights, for what does not depend on them, such as time."""
    made = open_clip.create_model_and_transforms(check_name(name), device=device, pretrained_text=False)
    return Clip(made[0].eval().requires_grad_(False), made[2], provenance={"model": name, "weights": "random"})




def resolve(name: str, weights: str) -> tuple[str, Path, dict[str, Any]]:
    """What open_clip shall load: its name for the model, a weights file on this disk, and settings of the image transform.

    A file does not say its transform and gets that of the model's first tag, which most of its tags share.
    """
    if name.startswith((LOCAL, HUB)):
        if weights:
            raise ValueError(f"{name} has weights of its own: leave `backbone.weights` empty, not {weights!r}")
        file = model_of_hub(name.removeprefix(HUB)) if name.startswith(HUB) else Path(name.removeprefix(LOCAL)) / WEIGHTS
        return f"{LOCAL}{file.parent}", require_file(file, name), {}
    tags = open_clip.list_pretrained_tags_by_model(check_name(name))
    if not weights:
        either = f"a tag such as {tags[0]!r}, or " if tags else ""
        raise ValueError(f"{name} needs weights: set `backbone.weights` in params.yaml to {either}the path of a file")
    twin = name.removesuffix(QUICK) if name.endswith(QUICK) else name + QUICK
    if belongs(twin, weights) and not belongs(name, weights):
        activation = "QuickGELU" if twin.endswith(QUICK) else "GELU"
        raise ValueError(f"the weights {weights!r} were trained with {activation}: set `backbone.name` to {twin}, not {name}")
    known, path = open_clip.get_pretrained_cfg(name, weights), Path(weights)
    if known:
        repository, file = os.path.split(known["hf_hub"])
        files = [f"{os.path.splitext(file)[0]}.safetensors", file] if file else [WEIGHTS, PICKLED]
        instead = f"bring {file or WEIGHTS} of {repository} to any place and set `backbone.weights` to its path"
        path = from_hub(repository, files, f"the weights {weights!r} of {name}", instead)
    elif tags and not path.exists() and not path.suffix and path.name == weights:
        near = nearest(weights, tags)
        raise ValueError(f"unknown weights {weights!r} of {name}: did you mean the tag {near!r}, or the path of a file?")
    known = known or open_clip.get_pretrained_cfg(name, tags[0] if tags else "")
    transform = {f"image_{key}": known[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in known}
    return name, require_file(path, name), transform




def check_name(name: str) -> str:
    if name not in open_clip.list_models():
        raise ValueError(f"unknown model {name!r}: did you mean {nearest(name, open_clip.list_models())!r}?")
    return name




def belongs(name: str, tag: str) -> bool:
    """Whether the weights with this tag were trained as this built-in model, with its activation; open_clip would only warn."""
    known = open_clip.get_pretrained_cfg(name, tag)
    return bool(known) and known.get("quick_gelu", False) == open_clip.get_model_config(name).get("quick_gelu", False)




def nearest(name: str, valid: Sequence[str]) -> str:
    return difflib.get_close_matches(name, valid, n=1, cutoff=0.0)[0]




def model_of_hub(repository: str) -> Path:
    """The weights of a repository that holds one model; its config lies beside them."""
    instead = f"bring its {CONFIG} and {WEIGHTS} into one folder and set `backbone.name` to {LOCAL}FOLDER"
    from_hub(repository, [CONFIG], f"the model {repository}", instead)
    return from_hub(repository, [WEIGHTS, PICKLED], f"the model {repository}", instead)




def from_hub(repository: str, files: Sequence[str], what: str, instead: str) -> Path:
    """The first of these files that a model repository has. What is in the hub's cache is taken without asking the network."""
    for file in files:
        with contextlib.suppress(FileNotFoundError, ValueError):
            return Path(hf_hub_download(repository, file, local_files_only=True))
    try:
        for file in files:
            with contextlib.suppress(RemoteEntryNotFoundError):
                return Path(hf_hub_download(repository, file))
        raise FileNotFoundError(f"{repository} has none of {', '.join(files)}")
    except (OSError, ValueError) as e:
        raise FileNotFoundError(f"{what} cannot be downloaded (no network, or no longer there): {instead}") from e




def require_file(file: Path, name: str) -> Path:
    if not file.is_file():
        raise FileNotFoundError(f"no weights at {file}: put the checkpoint of {name} there, or correct `backbone` in params.yaml")
    return file




def check_plain(file: Path) -> None:
    """Raises ValueError unless the file is a state dict that can be read without running anything in it."""
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt"):
                return
        except SafetensorError as e:
            raise ValueError(f"{file} is damaged, or no safetensors file ({e}): bring it again") from e
    try:
        with warnings.catch_warnings(action="ignore"):  # "looks like a TorchScript archive", for which there is a sentence below
            content = torch.load(file, "cpu", weights_only=True)
        content = content.get("state_dict", content)
        plain = bool(content) and all(isinstance(value, Tensor) for value in content.values())
    except Exception:  # torch has many for what it does not want to read
        plain = False
    if not plain:
        kinds = "a damaged file, a pickle of more than tensors, or a TorchScript archive such as OpenAI's own .pt"
        convert = "torch.save(open_clip.load_openai_model(OLD).state_dict(), NEW)"
        instead = f"bring {WEIGHTS} of the model's repository, or convert OpenAI's by {convert}"
        raise ValueError(f"{file} is no state dict but {kinds}, which is not opened: {instead}")




def tokens(clip: Clip, images: Float[Tensor, "b 3 s s"]) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b M d"]]:
    """The pooled image feature and the M patch features behind the joint projection, none normalised, in one pass of the tower.

    As FedOTP reads them (Li et al., CVPR 2024; HongxiaLee/FedOTP at 9948611, clip/model.py): a ViT's tokens but for the class
    token, or what a ResNet's attention pool gives at every position but the mean's, which is the pooled feature.
    Raises ValueError for a tower of another kind.
    """
    tower = getattr(clip.model, "visual", None)
    if isinstance(tower, ModifiedResNet):
        made = tower.forward_intermediates(images, indices=1, intermediates_only=True)
        x = attended(tower.attnpool, made["image_intermediates"][0])
        return x[:, 0], x[:, 1:]
    by_class_token = isinstance(tower, VisionTransformer) and tower.pool_type == "tok" and tower.attn_pool is None
    if not by_class_token or tower.final_ln_after_pool:
        kinds = "open_clip's VisionTransformer, read at its class token behind the final norm, and ModifiedResNet"
        raise ValueError(f"this image tower ({type(tower).__name__}) has no patch features in the joint space: {kinds} have them")
    made = tower.forward_intermediates(images, indices=1, normalize_intermediates=True, output_fmt="NLC")
    return made["image_features"], made["image_intermediates"][0] @ tower.proj




def attended(pool: nn.Module, x: Float[Tensor, "b w h h"]) -> Float[Tensor, "b t d"]:
    """A ResNet's attention pool at all t = 1 + h h positions, the mean first; open_clip's own returns that one only."""
    x = x.flatten(2).mT
    x = torch.cat([x.mean(1, keepdim=True), x], dim=1) + pool.positional_embedding
    q, k, v = (f(x).unflatten(-1, (pool.num_heads, -1)).transpose(1, 2) for f in (pool.q_proj, pool.k_proj, pool.v_proj))
    return pool.c_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


