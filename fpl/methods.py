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
from torch.nn.utils.rnn import pad_sequence

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

    def check(self, text, clients):
        if self.template.count("{}") != 1:
            raise ValueError(f"template {self.template!r} must have one {{}} where the class name goes")

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
class FineTuned(PromptFL):
    """PromptFL+FT: every client fine-tunes the received prompt on its own images before it uses it (Cheng et al., 2021).

    What fine-tuning makes is neither uploaded nor where the next round starts. `tune_epochs` is our choice, no paper gives it;
    the learning rate is that of the rounds. Uploads and downloads m w, like PromptFL.
    """

    tune_epochs: int = 5

    def check(self, text, clients):
        super().check(text, clients)
        if self.tune_epochs < 0:
            raise ValueError(f"tune_epochs {self.tune_epochs} is negative: use 0 for no fine-tuning")

    def deploy(self, server, own, tune):
        received = super().deploy(server, own, tune)
        return tune(received, self.tune_epochs)[0] if self.tune_epochs else received


@dataclass(frozen=True)
class FedPer(PromptFL):
    """The first `n_base` vectors of the prompt are shared, the others never leave the client (Arivazhagan et al., 2019).

    Which part of a prompt is the base is a choice, ours that of the one public precedent: half of it, in front.
    Uploads and downloads n_base w, keeps (m - n_base) w.
    """

    n_base: int = 8
    shared = ("base",)

    def check(self, text, clients):
        super().check(text, clients)
        if not 0 <= self.n_base <= self.n_ctx:
            raise ValueError(f"n_base {self.n_base} is not between 0 and n_ctx {self.n_ctx}: it counts vectors of the prompt")

    def init(self, text, gen):
        ctx = super().init(text, gen)["ctx"]
        return {"base": ctx[: self.n_base], "head": ctx[self.n_base :]}

    def ctx(self, p):
        return torch.cat([p["base"], p["head"]], dim=-2)


@dataclass(frozen=True)
class FedProx(PromptFL):
    """Adds mu/2 |P - P_g|^2 to the loss, P_g being the download (Li et al., 2020, Eq. 2). Sends what PromptFL sends."""

    mu: float = 0.5

    def frozen(self, text, server, who, clients):
        return {"download": server.params["ctx"].expand(len(who), -1, -1)}

    def loss(self, text, p, f, x, y):
        return super().loss(text, p, f, x, y) + self.mu / 2 * (p["ctx"] - f["download"]).square().sum((1, 2))


@dataclass(frozen=True)
class FedAMP(PromptFL):
    """Each client is drawn to its own attentive mean of all prompts (Huang et al., AAAI 2021).

    u_i = (1 - sum_j xi_ij) P_i + sum_j xi_ij P_j over the last uploads of the other clients j, xi_ij = alpha A'(|P_i - P_j|^2),
    A'(z) = exp(-z / sigma) / sigma. A client starts from its own P_i, adds lam / (2 alpha) |P - u_i|^2 to the loss, and is
    evaluated with its own P_i. Without an upload yet, or alone, it trains like CoOp.

    The papers on prompts do not give alpha and sigma; alpha = sigma = 1, the usual values, makes the weight of one's own prompt
    negative where prompts are near each other. Our choice: sigma is the median of |P_i - P_j|^2 over all pairs of this round,
    alpha is `step` sigma / N, and the xi of a client are divided by their sum where it exceeds 1 (with step <= 1 it never does).
    Then the nearer the prompts come to each other, the stronger is the attraction. Uploads m w, downloads m w (u_i).
    """

    lam: float = 1.0
    step: float = 1.0

    def check(self, text, clients):
        super().check(text, clients)
        if self.step <= 0:
            raise ValueError(f"step {self.step} must be above 0: lam / (2 alpha) divides by it (use lam 0 for no attraction)")

    def start(self, server, own):
        return own

    def frozen(self, text, server, who, clients):
        prompts, seen = server.pool["ctx"].flatten(1), server.seen
        sigma = torch.pdist(prompts[seen]).square().median() if seen.sum() > 1 else prompts.new_zeros(())
        distance = torch.cdist(prompts[who], prompts, compute_mode="donot_use_mm_for_euclid_dist").square()
        xi = self.step / len(seen) * torch.exp(-distance / sigma.clamp(min=torch.finfo(sigma.dtype).tiny))
        xi = xi * seen * (who.unsqueeze(1) != torch.arange(len(seen), device=who.device))
        xi = xi / xi.sum(1, keepdim=True).clamp(min=1)
        cloud = (1 - xi.sum(1, keepdim=True)) * prompts[who] + xi @ prompts
        alpha = self.step * sigma / len(seen)
        pull = torch.where(seen[who] & (sigma > 0), self.lam / (2 * alpha), 0.0)  # equal prompts: u_i is P_i, nothing to pull to
        return {"cloud": cloud.view(len(who), *server.pool["ctx"].shape[1:]), "pull": pull}

    def loss(self, text, p, f, x, y):
        return super().loss(text, p, f, x, y) + f["pull"] * (p["ctx"] - f["cloud"]).square().sum((1, 2))


@dataclass(frozen=True)
class PFedPrompt(PromptFL):
    """pFedPrompt (Guo et al., WWW 2023): reconstruction, not the authors' algorithm, of which there is no public code.

    A shared prompt, trained like PromptFL's, finds the users' consensus; a memory of the client's own training images, itself
    not trained, adds what is its own. We take Tip-Adapter's form, with its defaults: keys K (r, d) are the features of the r
    training images, values V (r, c) their labels one-hot, logits = s <x, t> + blend exp(-beta (1 - <x, K>)) V.
    `memory` "test" uses it in evaluation only; "always" in training too, where every image finds itself in the memory.
    Uploads and downloads m w, keeps r d features and r labels.
    """

    blend: float = 1.0
    beta: float = 5.5
    memory: str = "test"  # or "always"

    def check(self, text, clients):
        super().check(text, clients)
        if self.memory not in ("test", "always"):
            raise ValueError(f"memory {self.memory!r} is not known: use test or always")

    def frozen(self, text, server, who, clients):
        keys, labels = zip(*map(clients.training, who.tolist()), strict=True)
        values = [F.one_hot(y, clients.n_cls).to(x.dtype) for x, y in zip(keys, labels, strict=True)]
        stack = lambda parts: pad_sequence(parts, batch_first=True)  # noqa: E731  # (n, r, *); an image of zeros has no label
        return {"keys": stack(list(keys)), "values": stack(values)}

    def logits(self, text, t, p, f, x):
        consensus = super().logits(text, t, p, f, x)
        if "keys" not in f:
            return consensus
        return consensus + self.blend * torch.exp(-self.beta * (1 - x @ f["keys"].mT)) @ f["values"]

    def loss(self, text, p, f, x, y):
        return super().loss(text, p, f if self.memory == "always" else {}, x, y)


@dataclass(frozen=True)
class FedPGP(PromptFL):
    """A shared prompt plus a private term of low rank (Cui et al., ICML 2024).

    The client classifies with T_p, the text features of ctx + U V, U (m, rank), V (rank, w). The loss adds mu times the mean over
    classes of -log e^{cos(T_0, T_g)/tau} / (e^{cos(T_0, T_g)/tau} + e^{cos(T_g, T_p)/tau}): T_g, of ctx alone, is to be like the
    frozen CLIP's T_0 and unlike T_p. T_0 is that of `anchor`, a template; the released code takes "X .. X {}." with n_ctx X.
    rank, mu and tau are those of the released script, U and V drawn like the prompt; one prompt, where the script has two.
    Uploads and downloads m w, keeps rank (m + w).
    """

    rank: int = 8
    mu: float = 0.5
    tau: float = 0.5
    anchor: str = "a photo of a {}."

    def check(self, text, clients):
        super().check(text, clients)
        if self.rank < 0:
            raise ValueError(f"rank {self.rank} is negative: use 0 for no personal term")
        if self.tau <= 0:
            raise ValueError(f"tau {self.tau} must be above 0: the contrast divides by it")
        if self.anchor.count("{}") != 1:
            raise ValueError(f"anchor {self.anchor!r} needs one {{}}, the place of the class name")

    def init(self, text, gen):
        shapes = {"u": (self.n_ctx, self.rank), "v": (self.rank, text.width)}
        return {**super().init(text, gen), **{k: 0.02 * torch.randn(*shape, generator=gen) for k, shape in shapes.items()}}

    def frozen(self, text, server, who, clients):
        return {"anchor": text.zero_shot(self.anchor).expand(len(who), -1, -1)} if self.mu else {}

    def ctx(self, p):
        return p["ctx"] + p["u"] @ p["v"]

    def loss(self, text, p, f, x, y):
        if not self.mu:
            return super().loss(text, p, f, x, y)
        common, personal = text(torch.stack([p["ctx"], self.ctx(p)]))
        contrast = self.contrast(f["anchor"], common, personal)
        return cross_entropy(self.logits(text, personal, p, f, x), y) + self.mu * contrast

    def contrast(
        self, anchor: Float[Tensor, "n c d"], common: Float[Tensor, "n c d"], personal: Float[Tensor, "n c d"]
    ) -> Float[Tensor, " n"]:
        """-log e^a / (e^a + e^b) = log(1 + e^(b - a)), features having unit length."""
        like, unlike = (anchor * common).sum(-1), (common * personal).sum(-1)
        return F.softplus((unlike - like) / self.tau).mean(-1)


@dataclass(frozen=True)
class PFedMoAP(PromptFL):
    """Mixture of experts over downloaded prompts (Luo et al., ICLR 2025, Algorithm 1).

    A client downloads the average prompt, where its training starts, and K prompts of other clients, the nearest to its own
    upload of the previous round, as frozen experts. Its gate, which never leaves it, mixes their text features with the local
    ones: logits = s <pool(x), T_MoE> + lam s <x, t> (Eq. 10). A client that was never selected before has no upload to compare
    and trains without experts, like PromptFL (footnote 1). It is evaluated with its own prompt, before aggregation; one that was
    not selected, with the prompt and gate that it has and freshly chosen experts, even if its gate has not trained yet.
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


METHODS: dict[str, type[PromptFL]] = {
    "zeroshot": ZeroShot,
    "coop": CoOp,
    "promptfl": PromptFL,
    "finetuned": FineTuned,
    "fedper": FedPer,
    "fedprox": FedProx,
    "fedamp": FedAMP,
    "pfedprompt": PFedPrompt,
    "fedpgp": FedPGP,
    "pfedmoap": PFedMoAP,
}  # in the order of pFedMoAP's Table 1
