"""The methods, side by side: each states only what differs from PromptFL.

A method is a frozen set of hyperparameters and a few pure functions over named tensors; it owns no loop, optimiser, device or
generator. What travels can be read off it: `shared` names the tensors that a client uploads, `download` returns what it gets.
Every function works on a stack of clients: the leading axis n. Numbers are 4 bytes each (2 in half precision).

Shapes: n clients, b batch, c classes, m context length, w text width, d joint width, k experts, g gate width, h heads, M patches.
Symbols are the papers'; s = exp(logit_scale); features of images (x) and texts (t) have unit length.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fpl import gate, transport
from fpl.state import Context, Encoder, Lookup, Server, Tensors, Tune


@dataclass(frozen=True)
class PromptFL:
    """FedAvg of one shared prompt (Guo et al., 2023). Uploads and downloads the prompt: m w numbers each way."""

    n_ctx: int = 16
    shared: ClassVar[tuple[str, ...]] = ("ctx",)
    transfers: ClassVar[bool] = True  # it can classify among other class names than those that it trained with
    inputs: ClassVar[str] = "feats"  # what it sees of an image, a field of rounds.Clients: feats (d,) or patches (M, d)
    run: ClassVar[dict[str, Any]] = {}  # settings of rounds.Run that belong to the method

    def check(self, text, clients) -> None:
        """Raises ValueError, in one sentence, for hyperparameters that these clients or this model cannot have."""
        if self.n_ctx < 1:
            raise ValueError(f"n_ctx {self.n_ctx} must be at least 1: a prompt needs a vector to learn")

    def init(self, text, gen: torch.Generator) -> Tensors:
        """What one client learns, before training (no client axis); the same for every client."""
        return {"ctx": 0.02 * torch.randn(self.n_ctx, text.width, generator=gen)}

    def cohorts(self, server: Server, drawn: Int[Tensor, " m"]) -> list[Int[Tensor, " n"]]:
        """All clients, in groups that are treated alike and train at once, one group after the other; together everybody.

        `drawn` are those who train in this round, in the order in which they were drawn.
        """
        return [torch.arange(len(server.seen), device=server.seen.device)]

    def download(self, server: Server, who: Int[Tensor, " n"], clients) -> Tensors:
        """What the server sends to the clients `who`."""
        return {k: v.expand(len(who), *v.shape) for k, v in server.params.items()}

    def start(self, own: Tensors, down: Tensors) -> Tensors:
        """Where local training begins: the client's own tensors, replaced where the download has them."""
        return {k: down.get(k, v) for k, v in own.items()}

    def frozen(self, text, down: Tensors, who: Int[Tensor, " n"], clients) -> Context:
        """What the clients `who` may read in this round but not change, from their download and their own images."""
        return {}

    def ctx(self, p: Tensors) -> Float[Tensor, "n *k m w"]:
        """The prompt that these tensors stand for."""
        return p["ctx"]

    def encode(self, text: Encoder, p: Tensors) -> Float[Tensor, "n *k c d"]:
        return text(self.ctx(p))

    def logits(self, text, t: Float[Tensor, "n c d"], p: Tensors, f: Tensors, x: Float[Tensor, "n b d"]) -> Float[Tensor, "n b c"]:
        """s <x, t_c>."""
        return text.scale * x @ t.mT

    def loss(self, text, p: Tensors, f: Tensors, x: Float[Tensor, "n b *M d"], y: Int[Tensor, "n b"]) -> Float[Tensor, " n"]:
        """Mean cross-entropy of each client's batch."""
        return cross_entropy(self.logits(text, self.encode(text, p), p, f, x), y)

    def between(self, server: Server, who: Int[Tensor, " n"], own: Tensors) -> Server:
        """The server that the next cohort finds, after the clients `who` of this one trained: as it was, nobody sees them yet."""
        return server

    def aggregate(self, server: Server, who: Int[Tensor, " n"], uploads: Tensors, sizes: Int[Tensor, " n"]) -> Server:
        """sum_i (n_i / sum_j n_j) upload_i over the participants; n_i is the client's number of training images."""
        share = sizes / sizes.sum()
        mean = {k: torch.tensordot(share.to(v.dtype), v, dims=1) for k, v in uploads.items()}
        return replace(server.store(who, uploads), params=server.params | mean)

    def deploy(self, server: Server, own: Tensors, tune: Tune) -> Tensors:
        """What every client is evaluated with after the round, `own` being its tensors as training left them.

        `tune` trains tensors further on every client's own images; nobody else sees what comes of it.
        """
        return {k: server.params[k].expand_as(v) if k in server.params else v for k, v in own.items()}




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

    def frozen(self, text, down, who, clients):
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
        return tune(received, self.tune_epochs) if self.tune_epochs else received




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

    def frozen(self, text, down, who, clients):
        return {"download": down["ctx"]}

    def loss(self, text, p, f, x, y):
        return super().loss(text, p, f, x, y) + self.term(p, f)

    def term(self, p: Tensors, f: Tensors) -> Float[Tensor, " n"]:
        return self.mu / 2 * (p["ctx"] - f["download"]).square().sum((1, 2))




@dataclass(frozen=True)
class FedAMP(PromptFL):
    """Each client is drawn to its own attentive mean of all prompts (Huang et al., AAAI 2021).

    u_i = (1 - sum_j xi_ij) P_i + sum_j xi_ij P_j over the last uploads of the other clients j, xi_ij = alpha A'(|P_i - P_j|^2),
    A'(z) = exp(-z / sigma) / sigma. A client starts from its own P_i, adds lam / (2 alpha) |P - u_i|^2 to the loss, and is
    evaluated with its own P_i. Without an upload yet, or alone, it trains like CoOp.

    The papers on prompts do not give alpha and sigma; alpha = sigma = 1, the usual values, makes the weight of one's own prompt
    negative where prompts are near each other. Our choice: sigma is the median of |P_i - P_j|^2 over all pairs of this round,
    alpha is `step` sigma / N, and the xi of a client are divided by their sum where it exceeds 1 (with step <= 1 it never does).
    Then the nearer the prompts come to each other, the stronger is the attraction. Uploads m w; downloads u_i, m w, and its pull.
    """

    lam: float = 1.0
    step: float = 1.0

    def check(self, text, clients):
        super().check(text, clients)
        if self.step <= 0:
            raise ValueError(f"step {self.step} must be above 0: lam / (2 alpha) divides by it (use lam 0 for no attraction)")

    def download(self, server, who, clients):
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

    def frozen(self, text, down, who, clients):
        return down

    def loss(self, text, p, f, x, y):
        return super().loss(text, p, f, x, y) + f["pull"] * (p["ctx"] - f["cloud"]).square().sum((1, 2))

    def deploy(self, server, own, tune):
        return own




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
    transfers = False

    def check(self, text, clients):
        super().check(text, clients)
        if self.memory not in ("test", "always"):
            raise ValueError(f"memory {self.memory!r} is not known: use test or always")

    def frozen(self, text, down, who, clients):
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
class FedOTP(PromptFL):
    """A shared and a private prompt, both matched to the patches of an image (Li et al., CVPR 2024).

    S are the cosines between the M patch features and a class's two text features, T the transport plan of mass `gamma` between
    patches and prompts with entropy `eps` (fpl.transport), a constant for the gradient; logits_c = s sum(T S).
    gamma and eps are those of the released scripts for CIFAR; the few-shot script's eps 0.01 works here too.
    Uploads and downloads m w, keeps m w. Needs the patch features of the images.
    """

    eps: float = 0.1
    gamma: float = 0.8
    transport: str = "unbalanced"  # or balanced, where all of the image is matched and gamma is not used
    inputs = "patches"

    def check(self, text, clients):
        super().check(text, clients)
        if self.eps < 0.003:
            raise ValueError(f"eps {self.eps} is below 0.003, where exp(-2 / eps) is 0 in double precision: take a larger one")
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma {self.gamma} is not in (0, 1]: it is the part of the image that is matched")
        if self.transport not in ("unbalanced", "balanced"):
            raise ValueError(f"transport {self.transport!r} is not known: use unbalanced or balanced")
        if clients.patches is None:
            raise ValueError("FedOTP needs patch features and there are none: make them with `fpl features --patches`")

    def init(self, text, gen):
        return {k: super(FedOTP, self).init(text, gen)["ctx"] for k in ("ctx", "local")}

    def ctx(self, p):
        return torch.stack([p["ctx"], p["local"]], dim=1)

    def logits(self, text, t, p, f, x):
        sim = torch.einsum("nbMd,nkcd->nbcMk", F.normalize(x.to(t.dtype), dim=-1), t)
        return text.scale * (self.plan(sim)[0] * sim).sum((-2, -1))

    def plan(self, sim: Float[Tensor, "n b c M k"]) -> tuple[Float[Tensor, "n b c M k"], Int[Tensor, " n"]]:
        return transport.plan(sim, self.eps, self.gamma, self.transport == "balanced")




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

    def frozen(self, text, down, who, clients):
        return {"anchor": text.zero_shot(self.template()).expand(len(who), -1, -1)} if self.mu else {}

    def template(self) -> str:
        return self.anchor

    def ctx(self, p):
        return p["ctx"] + p["u"] @ p["v"]

    def loss(self, text, p, f, x, y):
        if not self.mu:
            return super().loss(text, p, f, x, y)
        common, personal = self.pair(text, p)
        contrast = self.contrast(f["anchor"], common, personal)
        return cross_entropy(self.logits(text, personal, p, f, x), y) + self.mu * contrast

    def pair(self, text: Encoder, p: Tensors) -> Float[Tensor, "2 n *k c d"]:
        """T_g and T_p."""
        return text(torch.stack([p["ctx"], self.ctx(p)]))

    def contrast(
        self, anchor: Float[Tensor, "n c d"], common: Float[Tensor, "n c d"], personal: Float[Tensor, "n c d"]
    ) -> Float[Tensor, " n"]:
        """-log e^a / (e^a + e^b) = log(1 + e^(b - a)), features having unit length."""
        like, unlike = (anchor * common).sum(-1), (common * personal).sum(-1)
        return F.softplus((unlike - like) / self.tau).mean(-1)




@dataclass(frozen=True)
class PFedMoAP(PromptFL):
    """Mixture of experts over downloaded prompts (Luo et al., ICLR 2025, Algorithm 1).

    A client downloads the average prompt, where its training starts, and K prompts of other clients as frozen experts: those
    nearest to its own upload of the previous round. Its gate, which never leaves it, mixes their text features with the local
    ones: logits = s <pool(x), T_MoE> + lam s <x, t> (Eq. 10). A client that was never selected before has no upload to compare
    and trains without experts, like PromptFL (footnote 1). It is evaluated with its own prompt, before aggregation; one that was
    not selected, with the prompt and gate that it has and freshly chosen experts, even if its gate has not trained yet.

    `choice` of the K among the other clients with an upload: "knn" and "cosine" the nearest prompts, in l2 (the paper's) or by
    angle; "random" anew for every client and round; "same" for all clients, anew in every round; "fixed" by one permutation of
    the clients, drawn once (what the released code does); "oracle" the largest overlap sum_c min(p_i(c), p_j(c)) of training
    label shares, which a real server cannot know. Ties go to the smaller number.
    `mixing`: "attention" (the paper's), "uniform" attention, a "linear" router that scores the K + 1 places from the image alone,
    or their "average". `gate_kept` "private", or "aggregated" like the prompt. `pooling`: "stride" (the code's) or "mean" (D12).
    `tested` "before" aggregation, or "after" it with the average prompt, like the methods it is compared with (D25).
    Uploads m w numbers, downloads (K + 1) m w, keeps 4 (g^2 + g); an aggregated gate travels both ways.
    """

    n_experts: int = 9
    lam: float = 0.5
    d_gate: int = 128
    heads: int = 8
    gate_scale: float = 10.0
    choice: str = "knn"  # or cosine, random, same, fixed, oracle
    mixing: str = "attention"  # or uniform, linear, average
    gate_kept: str = "private"  # or aggregated
    pooling: str = "stride"  # or mean
    tested: str = "before"  # or after aggregation

    @property
    def shared(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("ctx",) if self.gate_kept == "private" else ("ctx", *gate.NAMES[self.mixing])

    def check(self, text, clients):
        super().check(text, clients)
        known = {"choice": CHOICES, "mixing": gate.NAMES, "gate_kept": ("private", "aggregated"), "pooling": gate.POOLINGS}
        known["tested"] = ("before", "after")
        for field, values in known.items():
            if getattr(self, field) not in values:
                raise ValueError(f"{field} {getattr(self, field)!r} is not known: use {', '.join(values)}")
        if min(self.heads, self.d_gate) < 1:
            raise ValueError(f"d_gate {self.d_gate} and heads {self.heads} must be at least 1")
        if self.d_gate % self.heads:
            raise ValueError(f"heads {self.heads} does not divide the gate dimension d_gate {self.d_gate}: change one of them")
        if text.dim % self.d_gate:
            raise ValueError(
                f"the gate dimension d_gate {self.d_gate} does not divide the feature width {text.dim}: take a divisor"
            )
        self.check_experts(clients)

    def check_experts(self, clients) -> None:
        if not 0 <= self.n_experts < len(clients):
            bounds = f"at least 0 and below the number of clients {len(clients)}"
            raise ValueError(f"n_experts {self.n_experts} must be {bounds}: experts are other clients")

    def init(self, text, gen):
        return {**super().init(text, gen), **gate.init(self.d_gate, gen, self.mixing, self.n_experts + 1)}

    def cohorts(self, server, drawn):
        if not self.n_experts or server.seen.sum() < 2:
            return super().cohorts(server, drawn)
        return [server.seen.nonzero()[:, 0], (~server.seen).nonzero()[:, 0]]

    def neighbours(self, server: Server, who: Int[Tensor, " n"], clients) -> Int[Tensor, "n k"]:
        """The K clients with an upload that come first by `choice`, oneself excluded, ties by number."""
        distance = CHOICES[self.choice](server, clients)[who]
        distance[:, ~server.seen] = torch.inf
        distance[torch.arange(len(who), device=who.device), who] = torch.inf
        k = min(self.n_experts, int(distance.isfinite().sum(1).min()))
        return distance.sort(dim=1, stable=True).indices[:, :k]

    def download(self, server, who, clients):
        down = super().download(server, who, clients)
        if not self.n_experts or server.seen.sum() < 2 or not server.seen[who].all():
            return down
        return {**down, "experts": server.pool["ctx"][self.neighbours(server, who, clients)]}  # (n, k, m, w)

    def frozen(self, text, down, who, clients):
        if "experts" not in down:
            return {}
        n, k = down["experts"].shape[:2]
        prompts, place = down["experts"].flatten(0, 1).unique(dim=0, return_inverse=True)  # encoded once, whoever gets them
        parts = [self.pool(text(part)).contiguous() for part in prompts.split(text.at_once)]  # never all of them at width d
        return {"experts": Lookup(torch.cat(parts), place.view(n, k))}  # (n, k, c, g)

    def pool(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n g"]:
        return gate.POOLINGS[self.pooling](x, self.d_gate)

    def logits(self, text, t, p, f, x):
        local = super().logits(text, t, p, f, x)
        if "experts" not in f:
            return local
        experts = torch.cat([self.pool(t).unsqueeze(1), f["experts"]], dim=1)
        return text.scale * gate.mix(p, self.pool(x), experts, self.heads, self.gate_scale, self.mixing) + self.lam * local

    def deploy(self, server, own, tune):
        if self.tested == "after":
            return super().deploy(server, own, tune)
        never = ~server.seen.view(-1, 1, 1)
        return {**super().deploy(server, own, tune), "ctx": torch.where(never, server.params["ctx"], own["ctx"])}


Distance = Float[Tensor, "n n"]  # from client (row) to client (column); only its order within a row matters


def l2(server: Server, clients) -> Distance:
    prompts = server.pool["ctx"].flatten(1)
    return torch.cdist(prompts, prompts, compute_mode="donot_use_mm_for_euclid_dist")




def cosine(server: Server, clients) -> Distance:
    prompts = F.normalize(server.pool["ctx"].flatten(1), dim=-1)
    return 1 - prompts @ prompts.T




def random(server: Server, clients) -> Distance:
    n = len(server.seen)
    return torch.rand(n, n, generator=server.draw("experts", server.round)).to(server.seen.device)




def same(server: Server, clients) -> Distance:
    return random(server, clients)[:1].repeat(len(server.seen), 1)




def fixed(server: Server, clients) -> Distance:
    n = len(server.seen)
    places = torch.randperm(n, generator=server.draw("experts")).argsort()  # of each client in the one permutation
    return places.float().repeat(n, 1).to(server.seen.device)




def oracle(server: Server, clients) -> Distance:
    counts = torch.stack([clients.counts(i) for i in range(len(clients))]).float()
    shares = counts / counts.sum(1, keepdim=True)
    return -torch.minimum(shares.unsqueeze(1), shares).sum(-1)


CHOICES = {"knn": l2, "cosine": cosine, "random": random, "same": same, "fixed": fixed, "oracle": oracle}
METHODS: dict[str, type[PromptFL]] = {
    "zeroshot": ZeroShot,
    "coop": CoOp,
    "promptfl": PromptFL,
    "finetuned": FineTuned,
    "fedper": FedPer,
    "fedprox": FedProx,
    "fedamp": FedAMP,
    "pfedprompt": PFedPrompt,
    "fedotp": FedOTP,
    "fedpgp": FedPGP,
    "pfedmoap": PFedMoAP,
}  # in the order of pFedMoAP's Table 1
