"""The frozen CLIP's text tower as a function of a learnable prompt."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from torch.utils.checkpoint import checkpoint

from dataclasses import dataclass, field
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from jaxtyping import Float
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from torch import Tensor, nn

PRECISIONS = {"single": torch.float32, "bfloat16": torch.bfloat16, "half": torch.float16}  # of a text tower's matrix products
BUDGET = {"cpu": 2048, "cuda": 8192}  # nodes encoded at once: on a CPU more are not faster, a GPU wants more work
GROUP = 48  # nodes between which attention is computed, besides the shared ones: few waste little, many make fewer matrices


@dataclass(frozen=True)
class Clip:
    """A frozen open_clip model, its test transform and tokenizer; `provenance` says which model, weights and transform."""

    model: nn.Module
    transform: Any = None
    tokenizer: Any = open_clip.tokenizer._tokenizer
    provenance: dict[str, str] = field(default_factory=dict)




class PromptTree(nn.Module):
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
        return PromptTree(self._clip, self.names, len(ctx), tail, self.budget)(ctx)

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


