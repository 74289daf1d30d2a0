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
from dataclasses import dataclass, field
from functools import partial
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
from open_clip.transformer import QuickGELU, ResidualAttentionBlock, VisionTransformer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fpl.files import sha256

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"  # of a model in a hub's repository or in a folder
PICKLED = "open_clip_pytorch_model.bin"  # in older repositories
PRECISIONS = {"single": torch.float32, "bfloat16": torch.bfloat16, "half": torch.float16}  # of a text tower's matrix products
BUDGET = {"cpu": 2048, "cuda": 8192}  # nodes encoded at once: on a CPU more are not faster, a GPU wants more work
GROUP = 48  # nodes between which attention is computed, besides the shared ones: few waste little, many make fewer matrices
RELEASED = {  # mean and deviation of colours by which pFedMoAP's released code normalises CIFAR's images (D22)
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
LOCAL, HUB, QUICK = "local-dir:", "hf-hub:", "-quickgelu"


@dataclass(frozen=True)
class Clip:
    """A frozen open_clip model, its test transform and tokenizer; `provenance` says which model, weights and transform."""

    model: nn.Module
    transform: Any = None
    tokenizer: Any = open_clip.tokenizer._tokenizer
    provenance: dict[str, str] = field(default_factory=dict)


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
        return f"{LOCAL}{file.parent}", there(file, name), {}
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
    return name, there(path, name), transform


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


def there(file: Path, name: str) -> Path:
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


class Text(nn.Module):
    """All class prompts as one token tree: ctx (..., m, w) -> unit text features (..., c, d), with gradients to ctx.

    The text tower is causal, so the prompts "[SOS] v_1 .. v_m NAME." of all classes share their beginning, and nothing behind
    EOS matters. The tree has the m + 1 shared nodes and then a trie of the class names; its nodes stand in one sequence, each
    with the position it has in its own prompt, and each attends to its ancestors only. The weights are open_clip's own, and
    each block is run once (`layer`); a feature is read where its class ends. Features and gradients are those of the 77-token
    prompts, up to rounding.

    Clients are encoded at most `budget` nodes at a time, or one by one. Where one call has more nodes than that, only what goes
    from block to block is kept for the backward pass, which computes the rest again, a block at a time.

    `tail` follows the name ("." in CoOp's prompts). With a `precision` of PRECISIONS other than "single" the transformer computes
    its matrix products in it; prompts, the sums between blocks, norms, features and their gradients stay in single. Raises
    ValueError for a tower that is not causal or a name that is too long.
    """

    def __init__(
        self,
        clip: Clip,
        names: Sequence[str],
        n_ctx: int = 16,
        tail: str = ".",
        budget: int | None = None,
        precision: str = "single",
    ):
        super().__init__()
        tower = getattr(clip.model, "text", clip.model)  # open_clip's CustomTextCLIP keeps the text tower in a module of its own
        read_at = getattr(tower, "text_pool_type", getattr(tower, "pool_type", None))
        usual = getattr(tower, "attn_mask", None) is not None and read_at == "argmax"
        if not usual or not all(type(block) is ResidualAttentionBlock for block in tower.transformer.resblocks):
            what = "is not causal, not read at EOS, or has blocks of another kind than CLIP's"
            raise ValueError(f"this text tower {what}: the prompt tree needs one of CLIP's kind")
        self.names, self.n_ctx, self.precision = list(names), n_ctx, precision
        self.budget = budget or BUDGET[tower.token_embedding.weight.device.type]
        prompts = [f"{'X ' * n_ctx}{name.replace('_', ' ')}{tail}" for name in names]  # the X are places for the context
        rows = [[clip.tokenizer.sot_token_id, *clip.tokenizer.encode(p), clip.tokenizer.eot_token_id] for p in prompts]
        for name, row in zip(names, rows, strict=True):
            if len(row) > len(tower.positional_embedding):
                room = len(tower.positional_embedding)
                prompt = f"class name {name!r} with {n_ctx} context vectors takes {len(row)} tokens"
                raise ValueError(f"{prompt}, the text tower has {room}: shorten the name or n_ctx")
        self._clip, self._tower, self.layer = clip, [tower], layer  # in a list: the shared tower is not a submodule of each Text
        self.scale = float(clip.model.logit_scale.exp())
        self.n_cls, self.width, self.dim = (
            len(self.names),
            int(tower.token_embedding.weight.shape[1]),
            width_of(tower.text_projection),
        )
        self.tree = Tree(tower, rows, 1 + n_ctx)

    @property
    def n_nodes(self) -> int:
        """Tokens in one encoding of all classes; the usual way takes 77 c."""
        return len(self.tree.pos)

    @property
    def at_once(self) -> int:
        """How many clients may train as one batch without computing their activations twice."""
        return max(1, self.budget // self.n_nodes)

    @torch.no_grad()
    def zero_shot(self, template: str = "a photo of a {}.") -> Float[Tensor, "c d"]:
        """Unit text features of a hand-written template with one {} for the class name."""
        before, tail = template.split("{}")
        ctx = self.words(before)
        return Text(self._clip, self.names, len(ctx), tail, self.budget)(ctx)

    def words(self, text: str) -> Float[Tensor, "m w"]:
        """The context that stands for ordinary words, such as "a photo of a"."""
        return words(self._clip, text)

    def forward(self, ctx: Float[Tensor, "*n m w"]) -> Float[Tensor, "*n c d"]:
        flat = ctx.reshape(ctx.shape[:-2].numel(), *ctx.shape[-2:])
        again = len(flat) * self.n_nodes > self.budget and torch.is_grad_enabled() and ctx.requires_grad
        features = torch.cat([self._encode(part, again) for part in flat.split(self.at_once)])
        return features.reshape(*ctx.shape[:-2], *features.shape[1:])

    def _encode(self, ctx: Float[Tensor, "n m w"], again: bool) -> Float[Tensor, "n c d"]:
        (tower,), tree, n = self._tower, self.tree, len(ctx)
        x = torch.cat([tree.sos.expand(n, -1, -1), ctx, tree.suffix.expand(n, -1, -1)], dim=1) + tree.pos
        mask, *before, last = tree.mask.repeat(n, 1, 1, 1), *tower.transformer.resblocks
        through = partial(checkpoint, self.layer, use_reentrant=False) if again else self.layer
        with torch.autocast(x.device.type, PRECISIONS[self.precision], enabled=self.precision != "single"):
            for block in before:
                x = through(block, x, tree, mask, slice(None))
            x = through(last, x, tree, mask, tree.leaf)  # what it would make of the other nodes is read by nobody
        x = tower.ln_final(x.to(tree.pos.dtype))
        project = tower.text_projection
        return F.normalize(project(x) if isinstance(project, nn.Module) else x @ project, dim=-1)


class Tree(nn.Module):
    """One sequence that holds the prompts of some classes: `shared` equal tokens, then a trie of what differs.

    For attention, classes are dealt into g groups of about GROUP nodes behind the shared ones; a group has all ancestors of its
    nodes, so it is a small tree of its own. Smaller ones are filled up to r nodes with copies of SOS that nobody sees.

    Buffers: sos (1, w); suffix (t - shared, w) embeddings; pos (t, w); groups (g, r) of nodes; mask (g, 1, r, r), -inf where a
    node is no ancestor; place (t,), where a node stands in the groups; leaf (c,), the nodes where classes end.
    """

    def __init__(self, tower: nn.Module, rows: list[list[int]], shared: int):
        super().__init__()
        node: dict[tuple[int, ...], int] = {}  # the tokens behind the shared part -> place in the sequence
        depth, ids, groups = [], [], [[]]
        for row in rows:
            path = []
            for j in range(shared, len(row)):
                key = tuple(row[shared : j + 1])
                if key not in node:
                    node[key] = shared + len(ids)
                    depth.append(j)
                    ids.append(row[j])
                path.append(node[key])
            if groups[-1] and len({*sum(groups[-1], path)}) > GROUP:
                groups.append([])
            groups[-1].append(path)
        members = [[*range(shared), *sorted({*sum(group, [])})] for group in groups]
        size = max(map(len, members))
        sees = torch.zeros(len(groups), 1, size, size, dtype=torch.bool)
        sees[..., 0] = True  # SOS by all
        for seen, group, nodes in zip(sees, groups, members, strict=True):
            for path in group:
                line = torch.tensor([*range(shared), *map(nodes.index, path)])
                seen[0, line.unsqueeze(1), line] = torch.ones(len(line), len(line)).tril().bool()
        members = [nodes + [0] * (size - len(nodes)) for nodes in members]
        place = {node: at for at, node in enumerate(sum(members, []))}
        embedding, position = tower.token_embedding.weight.detach(), tower.positional_embedding.detach()
        on = {"device": embedding.device}
        self.register_buffer("sos", embedding[rows[0][:1]])
        self.register_buffer("suffix", embedding[ids])
        self.register_buffer("pos", position[[*range(shared), *depth]])
        self.register_buffer("groups", torch.tensor(members, **on))
        self.register_buffer("mask", torch.zeros(sees.shape).masked_fill(~sees, -torch.inf).to(embedding))
        self.register_buffer("place", torch.tensor([place[i] for i in range(shared + len(ids))], **on))
        self.register_buffer("leaf", torch.tensor([path[-1] for group in groups for path in group], **on))


def layer(
    block: ResidualAttentionBlock, x: Float[Tensor, "n t w"], tree: Tree, mask: Float[Tensor, "ng 1 r r"], nodes: slice | Tensor
) -> Float[Tensor, "n read w"]:
    """A block of the transformer, with attention within the groups of a tree; its output at `nodes`."""
    attn = block.attn
    qkv = F.linear(block.ln_1(x), attn.in_proj_weight, attn.in_proj_bias)[:, tree.groups]
    q, k, v = qkv.flatten(0, 1).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    z = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
    z = z.unflatten(0, (len(x), -1)).flatten(1, 2)[:, tree.place[nodes]]
    x = x[:, nodes] + block.ls_1(attn.out_proj(z))
    return x + block.ls_2(mlp(block.mlp, block.ln_2(x)))


def mlp(parts: nn.Sequential, x: Float[Tensor, "n t w"]) -> Float[Tensor, "n t w"]:
    """QuickGELU, x sigmoid(1.702 x), is silu(1.702 x) / 1.702, which keeps one tensor for the backward pass instead of two."""
    up, activation, down = parts
    if isinstance(activation, QuickGELU):
        return down(F.silu(1.702 * up(x)) / 1.702)
    return down(activation(up(x)))


def width_of(projection: Tensor | nn.Linear) -> int:
    return projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1]


def words(clip: Clip, text: str) -> Float[Tensor, "m w"]:
    """The context that stands for ordinary words, such as "a photo of a"."""
    tower = getattr(clip.model, "text", clip.model)
    return tower.token_embedding.weight[clip.tokenizer.encode(text)].detach().clone()


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
