"""The methods, side by side: each states only what differs from PromptFL.

A method is a frozen set of hyperparameters and a few pure functions over named tensors; it owns no loop, optimiser, device or
generator. `shared` names the tensors that leave a client. Every function works on a stack of clients: the leading axis n.

Shapes: n clients, b batch, c classes, m context length, w text width, d joint width, k experts, g gate width, h heads.
Symbols are the papers'; s = exp(logit_scale); features of images (x) and texts (t) have unit length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fpl import gate

Params = dict[str, Tensor]  # what clients learn, or may read, by name; every tensor has the client axis in front
Tune = Callable[[Params, int], tuple[Params, Tensor]]  # everybody's tensors, epochs -> trained on each one's own images, losses
Encoder = Callable[[Tensor], Tensor]  # fpl.clip.Text, seen as a function: ctx (n, m, w) -> unit features (n, c, d)


@dataclass(frozen=True)
class Server:
    """What the server holds: `params` the aggregate (no client axis), `pool` every client's last upload, `seen` who has one."""

    params: Params
    pool: Params
    seen: Bool[Tensor, " n"]


@dataclass(frozen=True)
class PromptFL:
    """FedAvg of one shared prompt (Guo et al., 2023). Uploads and downloads the prompt: m w numbers each way."""

    n_ctx: int = 16
    shared: ClassVar[tuple[str, ...]] = ("ctx",)

    def check(self, text, clients) -> None:
        """Raises ValueError, in one sentence, for hyperparameters that these clients or this model cannot have."""
        if self.n_ctx < 1:
            raise ValueError(f"n_ctx {self.n_ctx} must be at least 1: a prompt needs a vector to learn")

    def init(self, text, gen: torch.Generator) -> Params:
        """What one client learns, before training (no client axis); the same for every client."""
        return {"ctx": 0.02 * torch.randn(self.n_ctx, text.width, generator=gen)}

    def start(self, server: Server, own: Params) -> Params:
        """Where local training begins: the client's own tensors, the shared ones replaced by the download."""
        return {k: server.params[k].expand_as(v) if k in server.params else v for k, v in own.items()}

    def cohorts(self, server: Server) -> list[Int[Tensor, " n"]]:
        """Clients that this round treats alike; together everybody."""
        return [torch.arange(len(server.seen), device=server.seen.device)]

    def frozen(self, text, server: Server, who: Int[Tensor, " n"], clients) -> Params:
        """What the clients `who` may read in this round but not change."""
        return {}

    def ctx(self, p: Params) -> Float[Tensor, "n m w"]:
        """The prompt that these tensors stand for."""
        return p["ctx"]

    def encode(self, text: Encoder, p: Params) -> Float[Tensor, "n c d"]:
        return text(self.ctx(p))

    def logits(self, text, t: Float[Tensor, "n c d"], p: Params, f: Params, x: Float[Tensor, "n b d"]) -> Float[Tensor, "n b c"]:
        """s <x, t_c>."""
        return text.scale * x @ t.mT

    def loss(self, text, p: Params, f: Params, x: Float[Tensor, "n b d"], y: Int[Tensor, "n b"]) -> Float[Tensor, " n"]:
        """Mean cross-entropy of each client's batch."""
        return cross_entropy(self.logits(text, self.encode(text, p), p, f, x), y)

    def aggregate(self, server: Server, who: Int[Tensor, " n"], uploads: Params, sizes: Int[Tensor, " n"]) -> Server:
        """sum_i (n_i / sum_j n_j) upload_i over the participants; n_i is the client's number of training images."""
        share = sizes / sizes.sum()
        params = {k: torch.tensordot(share.to(v.dtype), v, dims=1) for k, v in uploads.items()}
        pool = {k: v.index_copy(0, who, uploads[k]) for k, v in server.pool.items()}
        return Server(params, pool, server.seen.index_fill(0, who, True))

    def deploy(self, server: Server, own: Params, tune: Tune) -> Params:
        """What every client is evaluated with after the round, `own` being its tensors as training left them.

        `tune` trains tensors further on every client's own images; nobody else sees what comes of it.
        """
        return self.start(server, own)


def cross_entropy(z: Float[Tensor, "n b c"], y: Int[Tensor, "n b"]) -> Float[Tensor, " n"]:
    """Of each client, the mean over its batch."""
    return F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none").view(y.shape).mean(-1)


@dataclass(frozen=True)
class ZeroShot(PromptFL):
    """CLIP with a hand-written template; nothing is learned, nothing is sent."""

    template: str = "a photo of a {}."
    shared = ()

    def init(self, text, gen):
        return {}

    def frozen(self, text, server, who, clients):
        return {"text": text.zero_shot(self.template).expand(len(who), -1, -1)}

    def encode(self, text, p):
        return None

    def logits(self, text, t, p, f, x):
        return super().logits(text, f["text"], p, f, x)


@dataclass(frozen=True)
class CoOp(PromptFL):
    """Prompt learning on each client alone (Zhou et al., 2022). Sends nothing."""

    shared = ()


@dataclass(frozen=True)
class PFedMoAP(PromptFL):
    """Mixture of experts over downloaded prompts (Luo et al., ICLR 2025, Algorithm 1).

    A client downloads the average prompt, where its training starts, and K prompts of other clients, the nearest to its own
    upload of the previous round, as frozen experts. Its gate, which never leaves it, mixes their text features with the local
    ones: logits = s <pool(x), T_MoE> + lam s <x, t> (Eq. 10). A client that was never selected before has no upload to compare
    and trains without experts, like PromptFL (footnote 1). It is evaluated with its own prompt, before aggregation.
    Uploads m w numbers, downloads (K + 1) m w, keeps 4 (g^2 + g).
    """

    n_experts: int = 9
    lam: float = 0.5
    d_gate: int = 128
    heads: int = 8
    gate_scale: float = 10.0

    def check(self, text, clients):
        super().check(text, clients)
        if min(self.heads, self.d_gate) < 1:
            raise ValueError(f"d_gate {self.d_gate} and heads {self.heads} must be at least 1")
        if self.d_gate % self.heads:
            raise ValueError(f"heads {self.heads} does not divide the gate dimension d_gate {self.d_gate}: change one of them")
        if text.dim % self.d_gate:
            raise ValueError(
                f"the gate dimension d_gate {self.d_gate} does not divide the feature width {text.dim}: take a divisor"
            )
        if not 0 <= self.n_experts < len(clients):
            bounds = f"at least 0 and below the number of clients {len(clients)}"
            raise ValueError(f"n_experts {self.n_experts} must be {bounds}: experts are other clients")

    def init(self, text, gen):
        return {**super().init(text, gen), **gate.init(self.d_gate, gen)}

    def cohorts(self, server):
        if not self.n_experts or server.seen.sum() < 2:
            return super().cohorts(server)
        return [server.seen.nonzero()[:, 0], (~server.seen).nonzero()[:, 0]]

    def neighbours(self, server: Server, who: Int[Tensor, " n"]) -> Int[Tensor, "n k"]:
        """The K clients whose uploads are nearest in l2 to one's own, oneself excluded, ties by number."""
        prompts = server.pool["ctx"].flatten(1)
        distance = torch.cdist(prompts[who], prompts, compute_mode="donot_use_mm_for_euclid_dist")
        distance[:, ~server.seen] = torch.inf
        distance[torch.arange(len(who), device=who.device), who] = torch.inf
        k = min(self.n_experts, int(server.seen.sum()) - 1)
        return distance.sort(dim=1, stable=True).indices[:, :k]

    def frozen(self, text, server, who, clients):
        if not self.n_experts or server.seen.sum() < 2 or not server.seen[who].all():
            return {}
        pooled = gate.pool(text(server.pool["ctx"]), self.d_gate)  # every prompt encoded once, whoever downloads it
        return {"experts": pooled[self.neighbours(server, who)]}  # (n, k, c, g)

    def logits(self, text, t, p, f, x):
        local = super().logits(text, t, p, f, x)
        if "experts" not in f:
            return local
        experts = torch.cat([gate.pool(t, self.d_gate).unsqueeze(1), f["experts"]], dim=1)
        return text.scale * gate.mix(p, gate.pool(x, self.d_gate), experts, self.heads, self.gate_scale) + self.lam * local

    def deploy(self, server, own, tune):
        never = ~server.seen.view(-1, 1, 1)
        return {**own, "ctx": torch.where(never, server.params["ctx"], own["ctx"])}


METHODS: dict[str, type[PromptFL]] = {"zeroshot": ZeroShot, "coop": CoOp, "promptfl": PromptFL, "pfedmoap": PFedMoAP}
