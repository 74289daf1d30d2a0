"""The frozen CLIP's text tower as a function of a learnable prompt.

Shapes: n clients, c classes, m context length, w text width, d joint width, t nodes of the tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fpl.later import Later
from fpl.linear import linear

open_clip = Later("open_clip")
Precision = Literal["single", "bfloat16", "half"]
PRECISIONS = {"single": torch.float32, "bfloat16": torch.bfloat16, "half": torch.float16}
BUDGET = {"cpu": 2048, "cuda": 8192}  # nodes encoded at once: more are not faster on a CPU
# Numbers between blocks for whose backward pass everything is kept; for more, these numbers only.
KEPT = {"cpu": 2**24, "cuda": 2**27}
# Nodes besides the shared ones: up to ALONE all have attention between them, more in groups.
ALONE, GROUP = 128, 48


@dataclass(frozen=True)
class Clip:
    """A frozen open_clip model with its test transform and tokenizer.

    provenance: which model, weights (SHA-256) and transform these are.
    """

    model: nn.Module
    transform: Any = None
    tokenizer: Any = field(default_factory=lambda: open_clip.tokenizer._tokenizer)
    provenance: dict[str, str] = field(default_factory=dict)


class PromptTree(nn.Module):
    """The prompts of all classes as one tree of tokens, encoded in one pass of the text tower.

    A call takes ctx (..., m, w) to unit text features (..., c, d), with gradients to ctx; leading
    axes are clients. The text tower is causal, so the prompts "[SOS] v_1 .. v_m NAME." of all
    classes share their beginning, and nothing behind EOS matters. The tree has the m + 1 shared
    nodes and then a trie of the class names. Its nodes stand in one sequence, each with the
    position it has in its own prompt, and each attends to its ancestors only. Features and
    gradients are those of open_clip's 77-token prompts, up to rounding.

    names: of classes; underscores are read as spaces. tail: follows the name ("." in CoOp).
    budget: nodes encoded at once, or one prompt. precision: of the transformer's matrix products;
    prompts, sums between blocks, norms, features and their gradients stay in single.
    Raises ValueError for a tower that is not causal and for a name that is too long.
    """

    def __init__(
        self,
        clip: Clip,
        names: Sequence[str],
        n_ctx: int = 16,
        tail: str = ".",
        budget: int | None = None,
        precision: Precision = "single",
    ):
        super().__init__()
        tower = text_tower(clip)
        check_tower(tower)
        self.names = list(names)
        self.n_ctx = n_ctx
        self.precision = precision
        self.budget = budget or BUDGET[tower.token_embedding.weight.device.type]
        self.scale = float(clip.model.logit_scale.exp())
        self.n_cls = len(self.names)
        self.width = int(tower.token_embedding.weight.shape[1])
        self.dim = width_of(tower.text_projection)
        self.between = self.width * len(tower.transformer.resblocks)
        self.tree = Tree(tower, tokens_of(clip, names, n_ctx, tail), 1 + n_ctx)
        self._clip = clip
        self._tower = [tower]  # in a list: the shared tower is not a submodule of each tree
        self.layer = layer

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
        """Return the unit text features of a hand-written template with {} for the class name."""
        before, tail = template.split("{}")
        ctx = self.words(before)
        return PromptTree(self._clip, self.names, len(ctx), tail, self.budget)(ctx)

    def words(self, text: str) -> Float[Tensor, "m w"]:
        """Return the context that stands for ordinary words, such as "a photo of a"."""
        tokens = self._clip.tokenizer.encode(text)
        return text_tower(self._clip).token_embedding.weight[tokens].detach().clone()

    def forward(self, ctx: Float[Tensor, "*n m w"]) -> Float[Tensor, "*n c d"]:
        flat = ctx.reshape(ctx.shape[:-2].numel(), *ctx.shape[-2:])
        again = len(flat) * self.n_nodes * self.between > KEPT[ctx.device.type]
        features = torch.cat([self._encode(part, again) for part in flat.split(self.at_once)])
        return features.reshape(*ctx.shape[:-2], *features.shape[1:])

    def _encode(self, ctx: Float[Tensor, "n m w"], again: bool) -> Float[Tensor, "n c d"]:
        """Encode some clients; with `again` the backward pass computes each block once more."""
        (tower,) = self._tower
        tree = self.tree
        n = len(ctx)
        parts = [tree.sos.expand(n, -1, -1), ctx, tree.suffix.expand(n, -1, -1)]
        x = torch.cat(parts, dim=1) + tree.pos
        mask = tree.mask.repeat(n, 1, 1, 1) if len(tree.groups) > 1 else tree.mask
        *before, last = tower.transformer.resblocks
        through = partial(checkpoint, self.layer, use_reentrant=False) if again else self.layer
        with torch.autocast(x.device.type, PRECISIONS[self.precision], self.precision != "single"):
            for block in before:
                x = through(block, x, tree, mask, slice(None))
            # what the last block would make of the other nodes is read by nobody
            x = through(last, x, tree, mask, tree.leaf)
        return project(tower, x.to(tree.pos.dtype))


class Tree(nn.Module):
    """One sequence that holds the prompts of some classes: `shared` equal tokens, then a trie.

    For attention, many classes are dealt into g groups of about GROUP nodes behind the shared ones.
    A group has all ancestors of its nodes. Smaller groups are filled up to r nodes with unseen SOS.
    Buffers: sos (1, w) and suffix (t - shared, w), embeddings; pos (t, w), positions; groups (g, r)
    of nodes; mask (g, 1, r, r), -inf where a node is no ancestor; place (t,) of nodes in groups;
    leaf (c,), the nodes where classes end.
    """

    def __init__(self, tower: nn.Module, rows: list[list[int]], shared: int):
        super().__init__()
        paths, ids, depth = grow(rows, shared)
        groups = deal(paths, GROUP if len(ids) > ALONE else ALONE)
        members, sees = ancestors(groups, shared)
        place = {node: at for at, node in enumerate(sum(members, []))}
        embedding = tower.token_embedding.weight.detach()
        position = tower.positional_embedding.detach()
        on = {"device": embedding.device}
        mask = torch.zeros(sees.shape).masked_fill(~sees, -torch.inf)
        self.register_buffer("sos", embedding[rows[0][:1]])
        self.register_buffer("suffix", embedding[ids])
        self.register_buffer("pos", position[[*range(shared), *depth]])
        self.register_buffer("groups", torch.tensor(members, **on))
        self.register_buffer("mask", mask.to(embedding))
        self.register_buffer("place", torch.tensor([place[i] for i in range(len(self.pos))], **on))
        self.register_buffer("leaf", torch.tensor([path[-1] for path in sum(groups, [])], **on))


def grow(rows: list[list[int]], shared: int) -> tuple[list[list[int]], list[int], list[int]]:
    """Return each class's path of nodes behind the shared ones; every node's token and depth."""
    node: dict[tuple[int, ...], int] = {}  # the tokens behind the shared part -> the node
    paths: list[list[int]] = []
    ids: list[int] = []
    depth: list[int] = []
    for row in rows:
        path = []
        for j in range(shared, len(row)):
            key = tuple(row[shared : j + 1])
            if key not in node:
                node[key] = shared + len(ids)
                ids.append(row[j])
                depth.append(j)
            path.append(node[key])
        paths.append(path)
    return paths, ids, depth


def deal(paths: list[list[int]], most: int) -> list[list[list[int]]]:
    """Return the paths in groups of at most so many nodes, or of one path; their order stays."""
    groups: list[list[list[int]]] = [[]]
    for path in paths:
        together = {*sum(groups[-1], path)}
        if groups[-1] and len(together) > most:
            groups.append([])
        groups[-1].append(path)
    return groups


def ancestors(groups: list[list[list[int]]], shared: int) -> tuple[list[list[int]], Tensor]:
    """Return the nodes of each group, filled up to equal length, and who sees whom (g, 1, r, r)."""
    members = [[*range(shared), *sorted({*sum(group, [])})] for group in groups]
    size = max(map(len, members))
    sees = torch.zeros(len(groups), 1, size, size, dtype=torch.bool)
    sees[..., 0] = True  # SOS by all
    for seen, group, nodes in zip(sees, groups, members, strict=True):
        for path in group:
            line = torch.tensor([*range(shared), *map(nodes.index, path)])
            seen[0, line.unsqueeze(1), line] = torch.ones(len(line), len(line)).tril().bool()
    return [nodes + [0] * (size - len(nodes)) for nodes in members], sees


def layer(
    block: nn.Module,
    x: Float[Tensor, "n t w"],
    tree: Tree,
    mask: Float[Tensor, "ng 1 r r"],
    nodes: slice | Tensor,
) -> Float[Tensor, "n read w"]:
    """Run one block of the transformer with attention within groups; return it at `nodes`."""
    attn = block.attn
    qkv = linear(block.ln_1(x), attn.in_proj_weight, attn.in_proj_bias)
    dealt = len(tree.groups) > 1
    if dealt:
        qkv = qkv[:, tree.groups].flatten(0, 1)
    q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    if not dealt:
        q, mask = q[:, :, nodes], mask[:, :, nodes]
    z = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
    if dealt:
        z = z.unflatten(0, (len(x), -1)).flatten(1, 2)[:, tree.place[nodes]]
    x = x[:, nodes] + block.ls_1(linear(z, *attn.out_proj.parameters()))
    return x + block.ls_2(mlp(block.mlp, block.ln_2(x)))


def mlp(parts: nn.Sequential, x: Float[Tensor, "n t w"]) -> Float[Tensor, "n t w"]:
    """Run a block's perceptron; QuickGELU as silu(1.702 x) / 1.702 keeps one tensor, not two."""
    up, activation, down = parts
    x = linear(x, *up.parameters())
    x = F.silu(1.702 * x) / 1.702 if type(activation).__name__ == "QuickGELU" else activation(x)
    return linear(x, *down.parameters())


def text_tower(clip: Clip) -> nn.Module:
    """Return the text tower, which open_clip's CustomTextCLIP keeps in a module of its own."""
    return getattr(clip.model, "text", clip.model)


def check_tower(tower: nn.Module) -> None:
    """Raise ValueError for a text tower that is not of CLIP's kind."""
    read_at = getattr(tower, "text_pool_type", getattr(tower, "pool_type", None))
    causal = getattr(tower, "attn_mask", None) is not None
    kinds = {*map(type, tower.transformer.resblocks)}
    usual = kinds == {open_clip.transformer.ResidualAttentionBlock}
    if not (causal and read_at == "argmax" and usual):
        what = "is not causal, not read at EOS, or has blocks of another kind than CLIP's"
        raise ValueError(f"this text tower {what}: the prompt tree needs one of CLIP's kind")


def tokens_of(clip: Clip, names: Sequence[str], n_ctx: int, tail: str) -> list[list[int]]:
    """Return each prompt's tokens. Raises ValueError for too many, or for the same ones twice."""
    room = len(text_tower(clip).positional_embedding)
    rows: dict[tuple[int, ...], str] = {}
    for name in names:
        inner = clip.tokenizer.encode(f"{'X ' * n_ctx}{name.replace('_', ' ')}{tail}")
        row = (clip.tokenizer.sot_token_id, *inner, clip.tokenizer.eot_token_id)
        if len(row) > room:
            prompt = f"class name {name!r} with {n_ctx} context vectors takes {len(row)} tokens"
            raise ValueError(f"{prompt}, the text tower has {room}: shorten the name or n_ctx")
        if row in rows:
            raise ValueError(f"classes {rows[row]!r} and {name!r} have the same tokens: rename one")
        rows[row] = name
    return [*map(list, rows)]


def project(tower: nn.Module, x: Float[Tensor, "n c w"]) -> Float[Tensor, "n c d"]:
    """Return unit features in the joint space of what the transformer gives at EOS."""
    x = tower.ln_final(x)
    projection = tower.text_projection
    x = projection(x) if isinstance(projection, nn.Module) else x @ projection
    return F.normalize(x, dim=-1)


def width_of(projection: Tensor | nn.Linear) -> int:
    """Return the joint width d, which open_clip's two kinds of projection say differently."""
    return projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1]
