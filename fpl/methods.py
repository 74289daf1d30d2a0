"""The methods, side by side: each states only what differs from PromptFL.

A method is a frozen set of hyperparameters and a few pure functions over named tensors. It owns no
loop, device or generator. `shared` names the tensors that a client uploads, `download` returns what
it gets. Every function works on a stack of clients, the leading axis n. Shapes are those of
fpl.state; symbols the papers'; s = exp(logit_scale); features x, t have unit length.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.optim import SGD, Optimizer

from fpl import gate, transport
from fpl.prompts import PromptTree
from fpl.state import Clients, Context, Draw, Ids, Lookup, PerClient, Server, Tensors, Tune

Texts = Float[Tensor, "n *k c d"]
Images = Float[Tensor, "n b *M d"]
Labels = Int[Tensor, "n b"]
Logits = Float[Tensor, "n b c"]


@dataclass(frozen=True)
class PromptFL:
    """FedAvg of one shared prompt. Uploads and downloads the prompt: m w numbers each way."""

    key: ClassVar[str] = "promptfl"
    title: ClassVar[str] = "PromptFL"
    source: ClassVar[str] = "Guo et al., 2023 (arXiv 2208.11625)"

    n_ctx: PositiveInt = 16
    shared: ClassVar[tuple[str, ...]] = ("ctx",)  # the tensors that leave a client
    transfers: ClassVar[bool] = True  # can classify among other classes than it trained with
    inputs: ClassVar[str] = "feats"  # of an image, in Clients: feats (d,) or patches (M, d)
    training: ClassVar[dict[str, Any]] = {}  # settings of Training that belong to the method
    in_step: ClassVar[bool] = False  # clients step together and average gradients in every step
    is_control: ClassVar[bool] = False  # what a method must beat
    idle: ClassVar[tuple[str, ...]] = ()  # tensors that by symmetry have no gradient
    # settings with which it is another method; `fpl check` holds it to them
    degenerate: ClassVar[tuple[tuple[dict[str, Any], type[PromptFL]], ...]] = ()

    def __init_subclass__(cls) -> None:
        """Let a class say its own key, title and degenerate cases, and inherit none."""
        cls.key = vars(cls).get("key", cls.__name__.lower())
        cls.title = vars(cls).get("title", cls.__name__)
        cls.degenerate = vars(cls).get("degenerate", ())

    def check(self, text: PromptTree, clients: Clients) -> None:
        """Raise ValueError, in one sentence, for settings that do not fit the model or clients."""

    def clients(self, clients: Clients) -> Clients:
        """Return the clients as the method has them: as they are."""
        return clients

    def init(self, text: PromptTree, gen: torch.Generator) -> Tensors:
        """Return what one client learns, before training, without client axis; equal for all."""
        return {"ctx": 0.02 * torch.randn(self.n_ctx, text.width, generator=gen)}

    def rate_group(self, name: str) -> Literal["prompt", "gate"]:
        """Return whose learning rate a tensor has: `lr` is the prompts', `gate_lr` the gates'."""
        return "prompt"

    def cohorts(self, server: Server, drawn: Int[Tensor, " m"]) -> list[Tensor]:
        """Return all clients in groups that train one after the other; drawn: who trains."""
        return [torch.arange(len(server.has_upload), device=server.has_upload.device)]

    def download(self, server: Server, client_ids: Ids, clients: Clients) -> Tensors:
        """Return what the server sends to these clients."""
        n = len(client_ids)
        return {name: value.expand(n, *value.shape) for name, value in server.params.items()}

    def start(self, local: Tensors, down: Tensors) -> Tensors:
        """Return where local training begins: the client's own tensors, or the downloaded ones."""
        return {name: down.get(name, value) for name, value in local.items()}

    def context(
        self, text: PromptTree, down: Tensors, client_ids: Ids, clients: Clients
    ) -> Context:
        """Return what clients read and do not change, of their download, images, class names."""
        return {}

    def ctx(self, p: Tensors) -> Float[Tensor, "n *k m w"]:
        """Return the prompt that these tensors stand for."""
        return p["ctx"]

    def encode(self, text: PromptTree, p: Tensors, context: Tensors) -> Texts | None:
        """Return the text features with which clients classify, or None for a method without."""
        return text(self.ctx(p))

    def logits(
        self, text: PromptTree, t: Texts | None, p: Tensors, context: Tensors, x: Images
    ) -> Logits:
        """s <x, t_c>."""
        assert t is not None
        return text.scale * x @ t.mT

    def loss(
        self, text: PromptTree, p: Tensors, context: Tensors, x: Images, y: Labels
    ) -> PerClient:
        """Mean cross-entropy of each client's batch."""
        t = self.encode(text, p, context)
        return cross_entropy(self.logits(text, t, p, context, x), y)

    def gradients(
        self, text: PromptTree, p: Tensors, context: Tensors, x: Images, y: Labels, draw: Draw
    ) -> tuple[PerClient, Tensors]:
        """Return the loss of a step and what the optimiser gets; draw: what the step draws."""
        own = {name: value.detach().requires_grad_() for name, value in p.items()}
        loss = self.loss(text, own, context, x, y)
        loss.sum().backward()  # torch's counter of operations cannot follow autograd.grad
        return loss, {k: v.grad for k, v in own.items() if v.grad is not None}

    def optimiser(self, groups: list[Any], momentum: float, decay: float) -> Optimizer:
        """Return what makes the steps; each tensor is a group, by `name`; the loop sets its lr."""
        return SGD(groups, 0.0, momentum, weight_decay=decay)

    def after_cohort(self, server: Server, client_ids: Ids, local: Tensors) -> Server:
        """Return the server that the next cohort finds, after these clients have trained."""
        return server

    def aggregate(self, server: Server, client_ids: Ids, uploads: Tensors, sizes: Ids) -> Server:
        """sum_i (n_i / sum_j n_j) upload_i over participants; sizes: training images, n_i."""
        share = sizes / sizes.sum()
        mean = {k: torch.tensordot(share.to(v.dtype), v, dims=1) for k, v in uploads.items()}
        return replace(server.store(client_ids, uploads), params=server.params | mean)

    def evaluated(self, server: Server, local: Tensors, tune: Tune) -> Tensors:
        """Return what every client is evaluated with after the round: here the aggregate.

        local: as training left it. tune: trains tensors further on every client's own images.
        """
        params = server.params
        return {k: params[k].expand_as(v) if k in params else v for k, v in local.items()}


def cross_entropy(z: Logits, y: Labels) -> PerClient:
    """Return each client's mean cross-entropy over its batch."""
    each = F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none")
    return each.view(y.shape).mean(-1)


def check_template(name: str, template: str) -> None:
    """Raise ValueError for a template that has no single place for the class name."""
    if template.count("{}") != 1:
        raise ValueError(f"{name} {template!r} must have one {{}} where the class name goes")


@dataclass(frozen=True)
class ZeroShot(PromptFL):
    """CLIP with a hand-written template; nothing is learned, nothing is sent."""

    key = "zeroshot"
    title = "ZS-CLIP"
    source = "Radford et al., ICML 2021"
    shared = ()
    template: str = "a photo of a {}."

    def check(self, text: PromptTree, clients: Clients):
        check_template("template", self.template)

    def init(self, text: PromptTree, gen):
        return {}

    def context(self, text: PromptTree, down, client_ids, clients: Clients):
        return {"text": text.zero_shot(self.template).expand(len(client_ids), -1, -1)}

    def encode(self, text: PromptTree, p, context):
        return context["text"]


@dataclass(frozen=True)
class CoOp(PromptFL):
    """Prompt learning on each client alone. Sends nothing."""

    key = "coop"
    title = "CoOp"
    source = "Zhou et al., IJCV 2022"
    shared = ()


@dataclass(frozen=True)
class FineTuned(PromptFL):
    """PromptFL whose clients fine-tune the received prompt before they use it.

    What fine-tuning makes is neither uploaded nor where the next round starts. `tune_epochs` is our
    choice, no paper gives it; the learning rate is that of the rounds. Uploads and downloads m w.
    """

    key = "finetuned"
    title = "PromptFL+FT"
    source = "Cheng et al., 2021, on PromptFL"
    degenerate = (({"tune_epochs": 0}, PromptFL),)
    tune_epochs: NonNegativeInt = 5

    def evaluated(self, server, local, tune):
        received = super().evaluated(server, local, tune)
        return tune(received, self.tune_epochs) if self.tune_epochs else received


@dataclass(frozen=True)
class FedPer(PromptFL):
    """The first `n_base` vectors of the prompt are shared, the others never leave the client.

    Which part of a prompt is the base is a choice, ours that of the one public precedent: half of
    it, in front. Uploads and downloads n_base w, keeps (m - n_base) w.
    """

    key = "fedper"
    title = "Prompt+FedPer"
    source = "Arivazhagan et al., 2019, on PromptFL"
    degenerate = (({"n_ctx": 16, "n_base": 16}, PromptFL), ({"n_base": 0}, CoOp))
    shared = ("base",)
    n_base: NonNegativeInt = 8

    def check(self, text: PromptTree, clients: Clients):
        if self.n_base > self.n_ctx:
            bounds = f"n_base {self.n_base} is not between 0 and n_ctx {self.n_ctx}"
            raise ValueError(f"{bounds}: it counts vectors of the prompt")

    def init(self, text: PromptTree, gen):
        ctx = super().init(text, gen)["ctx"]
        return {"base": ctx[: self.n_base], "head": ctx[self.n_base :]}

    def ctx(self, p):
        return torch.cat([p["base"], p["head"]], dim=-2)


@dataclass(frozen=True)
class FedProx(PromptFL):
    """Adds mu/2 |P - P_g|^2 to the loss, P_g being the download (Li et al., 2020, Eq. 2).

    Sends what PromptFL sends.
    """

    key = "fedprox"
    title = "Prompt+FedProx"
    source = "Li et al., 2020, on PromptFL"
    degenerate = (({"mu": 0}, PromptFL),)
    mu: NonNegativeFloat = 0.5

    def context(self, text: PromptTree, down, client_ids, clients: Clients):
        return {"download": down["ctx"]}

    def loss(self, text: PromptTree, p, context, x, y):
        return super().loss(text, p, context, x, y) + self.term(p, context)

    def term(self, p: Tensors, context: Tensors) -> PerClient:
        return self.mu / 2 * (p["ctx"] - context["download"]).square().sum((1, 2))


@dataclass(frozen=True)
class FedAMP(PromptFL):
    """Each client is drawn to its own attentive mean of all prompts (Huang et al., AAAI 2021).

    u_i = (1 - sum_j xi_ij) P_i + sum_j xi_ij P_j over the last uploads of the other clients j,
    xi_ij = alpha A'(|P_i - P_j|^2), A'(z) = exp(-z / sigma) / sigma. A client starts from its own
    P_i, adds `attraction` / (2 alpha) |P - u_i|^2 to the loss (lambda there), and is evaluated with
    its own P_i. Without an upload yet, or alone, it trains like CoOp.

    The papers on prompts do not give alpha and sigma (both 1 would make one's own weight negative).
    Our choice: sigma is the median of |P_i - P_j|^2 over all pairs of the first round with two
    uploads, and stays; alpha is `step` sigma / N, and the xi of a client are divided by their sum
    where it exceeds 1. Uploads m w; downloads u_i, m w, and its pull.
    """

    key = "fedamp"
    title = "Prompt+FedAMP"
    source = "Huang et al., AAAI 2021, on PromptFL"
    degenerate = (({"attraction": 0}, CoOp),)
    attraction: NonNegativeFloat = 1.0
    step: PositiveFloat = 1.0

    def download(self, server, client_ids, clients: Clients):
        prompts = server.uploads["ctx"].flatten(1)
        seen = server.has_upload
        everybody = torch.arange(len(seen), device=client_ids.device)
        sigma = server.memory.get("sigma", prompts.new_zeros(()))
        distance = l2_distance(prompts[client_ids], prompts).square()
        least = torch.finfo(sigma.dtype).tiny
        xi = self.step / len(seen) * torch.exp(-distance / sigma.clamp(min=least))
        xi = xi * seen * (client_ids.unsqueeze(1) != everybody)
        xi = xi / xi.sum(1, keepdim=True).clamp(min=1)
        cloud = (1 - xi.sum(1, keepdim=True)) * prompts[client_ids] + xi @ prompts
        alpha = self.step * sigma / len(seen)
        # where all prompts are equal, u_i is P_i and there is nothing to pull to
        pulled = seen[client_ids] & (sigma > 0)
        pull = torch.where(pulled, self.attraction / (2 * alpha), 0.0)
        shape = server.uploads["ctx"].shape[1:]
        return {"cloud": cloud.view(len(client_ids), *shape), "pull": pull}

    def context(self, text: PromptTree, down, client_ids, clients: Clients):
        return down

    def loss(self, text: PromptTree, p, context, x, y):
        away = (p["ctx"] - context["cloud"]).square().sum((1, 2))
        return super().loss(text, p, context, x, y) + context["pull"] * away

    def aggregate(self, server, client_ids, uploads, sizes):
        after = super().aggregate(server, client_ids, uploads, sizes)
        prompts = after.uploads["ctx"][after.has_upload].flatten(1)
        if after.memory or len(prompts) < 2:
            return after
        return replace(after, memory={"sigma": torch.pdist(prompts).square().median()})

    def evaluated(self, server, local, tune):
        return local


@dataclass(frozen=True)
class PFedPrompt(PromptFL):
    """pFedPrompt: a reconstruction, not the authors' algorithm, of which there is no public code.

    A shared prompt, trained like PromptFL's, finds the users' consensus; a memory of the client's
    own training images, itself not trained, adds what is its own. We take Tip-Adapter's form with
    its defaults: keys K (r, d) are the features of the r training images, values V (r, c) their
    labels one-hot, logits = s <x, t> + blend exp(-beta (1 - <x, K>)) V. memory "test" uses it in
    evaluation only; "always" in training too, where every image finds itself in the memory.
    Uploads and downloads m w, keeps r d features and r labels.
    """

    key = "pfedprompt"
    title = "pFedPrompt (reconstruction)"
    source = "Guo et al., WWW 2023"
    degenerate = (({"blend": 0}, PromptFL),)
    transfers = False
    blend: NonNegativeFloat = 1.0
    beta: NonNegativeFloat = 5.5
    memory: Literal["test", "always"] = "test"

    def context(self, text: PromptTree, down, client_ids, clients: Clients):
        keys = []
        values = []
        for i in client_ids.tolist():
            x, y = clients.training(i)
            keys.append(x)
            values.append(F.one_hot(y, clients.n_cls).to(x.dtype))
        # (n, r, *), filled up with images of zeros that have no label
        return {
            "keys": pad_sequence(keys, batch_first=True),
            "values": pad_sequence(values, batch_first=True),
        }

    def logits(self, text: PromptTree, t, p, context, x):
        consensus = super().logits(text, t, p, context, x)
        if "keys" not in context:
            return consensus
        near = torch.exp(-self.beta * (1 - x @ context["keys"].mT))
        return consensus + self.blend * near @ context["values"]

    def loss(self, text: PromptTree, p, context, x, y):
        return super().loss(text, p, context if self.memory == "always" else {}, x, y)


@dataclass(frozen=True)
class FedOTP(PromptFL):
    """A shared and a private prompt, both matched to the patches of an image.

    S are the cosines between the M patch features and a class's two text features, T the transport
    plan of mass `gamma` between patches and prompts with entropy `eps` (fpl.transport), a constant
    for the gradient; logits_c = s sum(T S). gamma and eps are those of the released scripts for
    CIFAR; the few-shot script's eps 0.01 works here too. transport "balanced" matches all of the
    image and does not use gamma. Uploads and downloads m w, keeps m w. Needs patch features.
    """

    key = "fedotp"
    title = "FedOTP"
    source = "Li et al., CVPR 2024"
    inputs = "patches"
    # below 0.006, double precision does not hold exp(4 / eps)
    eps: Annotated[float, Field(ge=0.006)] = 0.1
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.8
    transport: Literal["unbalanced", "balanced"] = "unbalanced"

    def check(self, text: PromptTree, clients: Clients):
        if clients.patches is None:
            ways = "`fpl features --patches`, or fpl.features(.., patches=True)"
            raise ValueError(f"FedOTP needs patch features and there are none: make them by {ways}")

    def init(self, text: PromptTree, gen):
        return {name: super(FedOTP, self).init(text, gen)["ctx"] for name in ("ctx", "local")}

    def ctx(self, p):
        return torch.stack([p["ctx"], p["local"]], dim=1)

    def logits(self, text: PromptTree, t, p, context, x):
        # in the order in which `plan` reads, and normalised in place: both save time
        patches = x.transpose(1, 2).to(t.dtype, copy=True, memory_format=torch.contiguous_format)
        patches /= patches.norm(dim=-1, keepdim=True).clamp_(min=1e-12)
        sim = torch.einsum("nMbd,nkcd->nMbkc", patches, t).permute(0, 2, 4, 1, 3)
        plan, _ = self.plan(sim)
        return text.scale * (plan * sim).sum((-2, -1))

    def plan(self, sim: Float[Tensor, "n b c M k"]):
        return transport.plan(sim, self.eps, self.gamma, self.transport == "balanced")


@dataclass(frozen=True)
class FedPGP(PromptFL):
    """A shared prompt plus a private term of low rank.

    The client classifies with T_p, the text features of ctx + U V, U (m, rank), V (rank, w). The
    loss adds mu times the mean over classes of
    -log e^{cos(T_0, T_g)/tau} / (e^{cos(T_0, T_g)/tau} + e^{cos(T_g, T_p)/tau}):
    T_g, of ctx alone, is to be like the frozen CLIP's T_0 and unlike T_p. T_0 is that of `anchor`,
    a template; the released code takes "X .. X {}." with n_ctx X. rank, mu and tau are those of the
    released script, U and V drawn like the prompt; one prompt, where the script has two.
    Uploads and downloads m w, keeps rank (m + w).
    """

    key = "fedpgp"
    title = "FedPGP"
    source = "Cui et al., ICML 2024"
    degenerate = (({"rank": 0, "mu": 0}, PromptFL),)
    rank: NonNegativeInt = 8
    mu: NonNegativeFloat = 0.5
    tau: PositiveFloat = 0.5
    anchor: str = "a photo of a {}."

    def check(self, text: PromptTree, clients: Clients):
        check_template("anchor", self.anchor)

    def init(self, text: PromptTree, gen):
        drawn = super().init(text, gen)
        drawn["u"] = 0.02 * torch.randn(self.n_ctx, self.rank, generator=gen)
        drawn["v"] = 0.02 * torch.randn(self.rank, text.width, generator=gen)
        return drawn

    def context(self, text: PromptTree, down, client_ids, clients: Clients):
        if not self.mu:
            return {}
        return {"anchor": text.zero_shot(self.anchor).expand(len(client_ids), -1, -1)}

    def ctx(self, p):
        return p["ctx"] + p["u"] @ p["v"]

    def loss(self, text: PromptTree, p, context, x, y):
        if not self.mu:
            return super().loss(text, p, context, x, y)
        common, personal = self.pair(text, p)
        contrast = self.contrast(context["anchor"], common, personal)
        return cross_entropy(self.logits(text, personal, p, context, x), y) + self.mu * contrast

    def pair(self, text: PromptTree, p: Tensors) -> Float[Tensor, "2 n *k c d"]:
        """Return T_g and T_p."""
        return text(torch.stack([p["ctx"], self.ctx(p)]))

    def contrast(self, anchor: Texts, common: Texts, personal: Texts) -> PerClient:
        """-log e^a / (e^a + e^b) = log(1 + e^(b - a)), features having unit length."""
        like = (anchor * common).sum(-1)
        unlike = (common * personal).sum(-1)
        return F.softplus((unlike - like) / self.tau).mean(-1)


@dataclass(frozen=True)
class PFedMoAP(PromptFL):
    """Mixture of experts over downloaded prompts (Algorithm 1).

    A client downloads the average prompt, where its training starts, and K prompts of other clients
    as frozen experts: those nearest to its own last upload. Its gate, which never leaves it, mixes
    their text features with the local ones: logits = s <pool(x), T_MoE> + lam s <x, t> (Eq. 10). A
    client that was never selected before trains without experts, like PromptFL (footnote 1). It is
    evaluated with its own prompt, before aggregation; one that was not selected, with the prompt
    and gate that it has and freshly chosen experts, or without as long as its gate has not trained.

    choice of the K among the other clients with an upload: "knn" and "cosine" the nearest prompts,
    in l2 (the paper's) or by angle; "random" anew for every client and round; "same" for all
    clients, anew in every round; "fixed" by one permutation of the clients, drawn once (what the
    released code does); "oracle" the largest overlap sum_c min(p_i(c), p_j(c)) of training label
    shares, which a real server cannot know; "disjoint" the smallest. Ties: the smaller number.
    mixing: "attention" (the paper's), "uniform" attention, a "linear" router that scores the K + 1
    places from the image alone, or their "average". gate_kept: "private", or "aggregated" like the
    prompt. pooling: "stride" (the code's) or "mean" (D12). tested: "before" aggregation, or "after"
    it with the average prompt, like the methods it is compared with (D25).
    Uploads m w, downloads (K + 1) m w, keeps 4 (g^2 + g); an aggregated gate travels both ways.
    """

    key = "pfedmoap"
    title = "pFedMoAP"
    source = "Luo et al., ICLR 2025 (arXiv 2410.10114)"
    # equal for all experts, or for all classes
    idle: ClassVar[tuple[str, ...]] = ("gate_bk", "gate_bv", "gate_bo")
    degenerate = (({"n_experts": 0, "tested": "after"}, PromptFL),)
    n_experts: NonNegativeInt = 9
    lam: NonNegativeFloat = 0.5
    d_gate: PositiveInt = 128
    heads: PositiveInt = 8
    gate_scale: NonNegativeFloat = 10.0
    choice: Literal["knn", "cosine", "random", "same", "fixed", "oracle", "disjoint"] = "knn"
    mixing: gate.Mixing = "attention"
    gate_kept: Literal["private", "aggregated"] = "private"
    pooling: gate.Pooling = "stride"
    tested: Literal["before", "after"] = "before"

    @property
    def shared(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("ctx",) if self.gate_kept == "private" else ("ctx", *gate.names(self.mixing))

    def check(self, text: PromptTree, clients: Clients):
        if self.d_gate % self.heads:
            raise ValueError(f"heads {self.heads} does not divide d_gate {self.d_gate}: change one")
        if text.dim % self.d_gate:
            wrong = f"d_gate {self.d_gate} does not divide the feature width {text.dim}"
            raise ValueError(f"{wrong}: take a divisor")
        self.check_experts(clients)

    def check_experts(self, clients: Clients) -> None:
        if self.n_experts >= len(clients):
            wrong = f"n_experts {self.n_experts} must be below the number of clients {len(clients)}"
            raise ValueError(f"{wrong}: experts are other clients")

    def init(self, text: PromptTree, gen):
        prompt = super().init(text, gen)
        return prompt | gate.init(self.d_gate, gen, self.mixing, self.n_experts + 1)

    def rate_group(self, name):
        return "gate" if name in gate.names(self.mixing) else "prompt"

    def cohorts(self, server, drawn):
        if not self.n_experts or server.has_upload.sum() < 2:
            return super().cohorts(server, drawn)
        return [server.returned.nonzero()[:, 0], (~server.returned).nonzero()[:, 0]]

    def neighbours(self, server: Server, client_ids: Ids, clients: Clients) -> Int[Tensor, "n k"]:
        """Return the K clients with an upload that come first by `choice`, never oneself."""
        distance = CHOICES[self.choice](server, clients)[client_ids]
        distance[:, ~server.has_upload] = torch.inf
        distance[torch.arange(len(client_ids), device=client_ids.device), client_ids] = torch.inf
        k = min(self.n_experts, int(distance.isfinite().sum(1).min()))
        return distance.sort(dim=1, stable=True).indices[:, :k]

    def download(self, server, client_ids, clients: Clients):
        down = super().download(server, client_ids, clients)
        others = server.has_upload.sum() - 1
        if not self.n_experts or others < 1 or not server.returned[client_ids].all():
            return down
        chosen = self.neighbours(server, client_ids, clients)
        return {**down, "experts": server.uploads["ctx"][chosen]}  # (n, k, m, w)

    def context(self, text: PromptTree, down, client_ids, clients: Clients):
        if "experts" not in down:
            return {}
        n, k = down["experts"].shape[:2]
        # each is encoded once, whoever reads it, and never all of them are there at width d
        prompts, place = down["experts"].flatten(0, 1).unique(dim=0, return_inverse=True)
        parts = [self.pool(text(part)).contiguous() for part in prompts.split(text.at_once)]
        return {"experts": Lookup(torch.cat(parts), place.view(n, k))}  # (n, k, c, g)

    def pool(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n g"]:
        return gate.pool(x, self.d_gate, self.pooling)

    def logits(self, text: PromptTree, t, p, context, x):
        local = super().logits(text, t, p, context, x)
        if "experts" not in context:
            return local
        experts = torch.cat([self.pool(t).unsqueeze(1), context["experts"]], dim=1)
        mixed = gate.mix(p, self.pool(x), experts, self.heads, self.gate_scale, self.mixing)
        return text.scale * mixed + self.lam * local

    def evaluated(self, server, local, tune):
        aggregate = super().evaluated(server, local, tune)
        if self.tested == "after":
            return aggregate
        never = ~server.has_upload.view(-1, 1, 1)
        return {**aggregate, "ctx": torch.where(never, server.params["ctx"], local["ctx"])}


def l2_distance(one: Float[Tensor, "n w"], other: Float[Tensor, "k w"]) -> Float[Tensor, "n k"]:
    """Return |one - other|, computed from differences: equal prompts have distance 0."""
    return torch.cdist(one, other, compute_mode="donot_use_mm_for_euclid_dist")


Distance = Float[Tensor, "n n"]  # from client (row) to client; only the order in a row matters


def knn(server: Server, clients: Clients) -> Distance:
    prompts = server.uploads["ctx"].flatten(1)
    return l2_distance(prompts, prompts)


def cosine(server: Server, clients: Clients) -> Distance:
    prompts = F.normalize(server.uploads["ctx"].flatten(1), dim=-1)
    return 1 - prompts @ prompts.T


def random(server: Server, clients: Clients) -> Distance:
    n = len(server.has_upload)
    drawn = torch.rand(n, n, generator=server.draw("experts", server.round))
    return drawn.to(server.has_upload.device)


def fixed(server: Server, clients: Clients) -> Distance:
    n = len(server.has_upload)
    place = torch.randperm(n, generator=server.draw("experts")).argsort()
    return place.float().repeat(n, 1).to(server.has_upload.device)


def oracle(server: Server, clients: Clients) -> Distance:
    counts = torch.stack([clients.counts(i) for i in range(len(clients))]).float()
    shares = counts / counts.sum(1, keepdim=True)
    return -torch.minimum(shares.unsqueeze(1), shares).sum(-1)


CHOICES = {
    **{f.__name__: f for f in (knn, cosine, random)},
    "same": lambda server, clients: random(server, clients)[:1].expand(len(clients), -1),
    **{f.__name__: f for f in (fixed, oracle)},
    "disjoint": lambda server, clients: -oracle(server, clients),
}


# In the order of pFedMoAP's Table 1.
TABLE_1 = (ZeroShot, CoOp, PromptFL, FineTuned, FedPer, FedProx, FedAMP, PFedPrompt, FedOTP, FedPGP)
METHODS: dict[str, type[PromptFL]] = {kind.key: kind for kind in (*TABLE_1, PFedMoAP)}
