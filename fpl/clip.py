"""The frozen CLIP: loading it, and its text tower as a function of a learnable prompt. Only this file knows open_clip.

(`fpl.pretrain`, which makes the demo model, builds an open_clip model too.)

Shapes: c classes, m context length, w text width, d joint width, t nodes of a prompt tree; `...` are clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from jaxtyping import Float
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fpl.files import sha256


@dataclass(frozen=True)
class Clip:
    """A frozen open_clip model, its test transform and tokenizer; `provenance` says which model, weights and transform."""

    model: nn.Module
    transform: Any = None
    tokenizer: Any = open_clip.tokenizer._tokenizer
    provenance: dict[str, str] = field(default_factory=dict)


def load(name: str, weights: str | Path | None = None, device: str = "cpu", image_tower: bool = True) -> Clip:
    """An open_clip model by name: "local-dir:FOLDER" with its own weights, or such as "ViT-B-16-quickgelu" with a tag or a file.

    Without `image_tower` only the text tower is kept: what comes after the features needs no other.
    Raises FileNotFoundError with the missing path when a weights file is not there.
    """
    local = name.removeprefix("local-dir:") if name.startswith("local-dir:") else None
    file = Path(local) / "open_clip_model.safetensors" if local else Path(weights) if weights and Path(weights).suffix else None
    if file and not file.is_file():
        raise FileNotFoundError(f"no weights at {file}: put the checkpoint of {name} there, or correct `backbone` in params.yaml")
    made = open_clip.create_model_from_pretrained(name, str(weights) if weights else None, device=device)
    model, transform = made[0].float().eval().requires_grad_(False), made[1]
    if not image_tower:
        del model.visual
    provenance = {
        "model": name,
        "weights": sha256(file) if file else str(weights),
        "transform": " ".join(repr(transform).split()),
    }
    return Clip(model, transform, open_clip.get_tokenizer(name), provenance)


class Text(nn.Module):
    """All class prompts as one token tree: ctx (..., m, w) -> unit text features (..., c, d), with gradients to ctx.

    The text tower is causal, so the prompts "[SOS] v_1 .. v_m NAME." of all classes share their beginning, and nothing behind
    EOS matters. The tree has the m + 1 shared nodes and then a trie of the class names; its nodes stand in one sequence, each
    with the position it has in its own prompt, and each attends to its ancestors only. The transformer is open_clip's own, run
    once; a feature is read where its class ends. Features and gradients are those of the 77-token prompts, up to rounding.

    Names are divided into trees of at most `classes_per_tree` classes and `budget` nodes. More than `budget` nodes in all
    (clients times trees) are encoded in pieces of at most that many, whose activations are computed again in the backward
    pass, so memory is bounded whatever the number of classes and clients.

    `tail` follows the name ("." in CoOp's prompts). Raises ValueError for a tower that is not causal or a name that is too long.
    """

    def __init__(
        self, clip: Clip, names: Sequence[str], n_ctx: int = 16, tail: str = ".", budget: int = 4096, classes_per_tree: int = 128
    ):
        super().__init__()
        tower = getattr(clip.model, "text", clip.model)  # open_clip's CustomTextCLIP keeps the text tower in a module of its own
        read_at = getattr(tower, "text_pool_type", getattr(tower, "pool_type", None))
        if getattr(tower, "attn_mask", None) is None or read_at != "argmax":
            raise ValueError("this text tower is not causal and read at EOS: the prompt tree needs one of CLIP's kind")
        self.names, self.n_ctx, self.budget = list(names), n_ctx, budget
        prompts = [f"{'X ' * n_ctx}{name.replace('_', ' ')}{tail}" for name in names]  # the X are places for the context
        rows = [[clip.tokenizer.sot_token_id, *clip.tokenizer.encode(p), clip.tokenizer.eot_token_id] for p in prompts]
        for name, row in zip(names, rows, strict=True):
            if len(row) > len(tower.positional_embedding):
                room = len(tower.positional_embedding)
                prompt = f"class name {name!r} with {n_ctx} context vectors takes {len(row)} tokens"
                raise ValueError(f"{prompt}, the text tower has {room}: shorten the name or n_ctx")
        self._clip, self._tower = clip, [tower]  # in a list: the shared tower is not a submodule of each Text
        self.scale = float(clip.model.logit_scale.exp())
        self.n_cls, self.width, self.dim = (
            len(self.names),
            int(tower.token_embedding.weight.shape[1]),
            width_of(tower.text_projection),
        )
        groups: list[list[list[int]]] = [[]]
        for row in rows:
            nodes = sum(len(r) - 1 - n_ctx for r in [*groups[-1], row])  # before what names have in common is found
            if groups[-1] and (len(groups[-1]) == classes_per_tree or 1 + n_ctx + nodes > budget):
                groups.append([])
            groups[-1].append(row)
        self.trees = nn.ModuleList(Tree(tower, group, 1 + n_ctx) for group in groups)

    @property
    def n_nodes(self) -> int:
        """Tokens in one encoding of all classes; the usual way takes 77 c."""
        return sum(len(tree.pos) for tree in self.trees)

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
        recompute = len(flat) * self.n_nodes > self.budget and torch.is_grad_enabled() and ctx.requires_grad
        features = torch.cat([self._in_parts(tree, flat, recompute) for tree in self.trees], dim=-2)
        return features.reshape(*ctx.shape[:-2], *features.shape[1:])

    def _in_parts(self, tree: Tree, ctx: Float[Tensor, "n m w"], recompute: bool) -> Float[Tensor, "n c d"]:
        parts = ctx.split(max(1, self.budget // len(tree.pos)))
        if recompute:
            return torch.cat([checkpoint(self._encode, tree, part, use_reentrant=False) for part in parts])
        return torch.cat([self._encode(tree, part) for part in parts])

    def _encode(self, tree: Tree, ctx: Float[Tensor, "n m w"]) -> Float[Tensor, "n c d"]:
        (tower,) = self._tower
        n = len(ctx)
        x = torch.cat([tree.sos.expand(n, -1, -1), ctx, tree.suffix.expand(n, -1, -1)], dim=1) + tree.pos
        x = tower.ln_final(tower.transformer(x, attn_mask=tree.mask)[:, tree.leaf])
        project = tower.text_projection
        return F.normalize(project(x) if isinstance(project, nn.Module) else x @ project, dim=-1)


class Tree(nn.Module):
    """One sequence that holds the prompts of some classes: `shared` equal tokens, then a trie of what differs.

    Buffers: sos (1, w); suffix (t - shared, w) embeddings; pos (t, w); mask (t, t), -inf where a node is no ancestor; leaf (c,).
    """

    def __init__(self, tower: nn.Module, rows: list[list[int]], shared: int):
        super().__init__()
        node: dict[tuple[int, ...], int] = {}  # the tokens behind the shared part -> place in the sequence
        parent, depth, ids, leaf = [], [], [], []
        for row in rows:
            at = shared - 1
            for j in range(shared, len(row)):
                key = tuple(row[shared : j + 1])
                if key not in node:
                    node[key] = shared + len(ids)
                    parent.append(at)
                    depth.append(j)
                    ids.append(row[j])
                at = node[key]
            leaf.append(at)
        sees = torch.eye(shared + len(ids), dtype=torch.bool)
        sees[:shared, :shared] = torch.ones(shared, shared).tril().bool()
        for i, up in enumerate(parent, start=shared):
            sees[i] |= sees[up]
        embedding, position = tower.token_embedding.weight.detach(), tower.positional_embedding.detach()
        self.register_buffer("sos", embedding[rows[0][:1]])
        self.register_buffer("suffix", embedding[ids])
        self.register_buffer("pos", position[[*range(shared), *depth]])
        self.register_buffer(
            "mask", torch.zeros(sees.shape, device=embedding.device).masked_fill(~sees.to(embedding.device), -torch.inf)
        )
        self.register_buffer("leaf", torch.tensor(leaf, device=embedding.device))


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
