"""Methods that learn prompts in another way than PromptFL.

N1, N2, ... are defects of the released code, named at the method that has them. The prompt has the
16 vectors of PromptFL everywhere; the releases have 16 (FedPHA), 8 (PromptFolio) and 4 (others).
"""

from __future__ import annotations

from functools import cache
from math import sqrt
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor

from fpl.methods import Images, Labels, PromptFL, Texts, check_template, cross_entropy
from fpl.prompts import PromptTree
from fpl.state import Clients, PerClient, Tensors

Share = Annotated[float, Field(ge=0, le=1)]
TINY = 1e-8  # eigenvalues that differ by less, relative to the largest one, are equal


@dataclass(frozen=True)
class WithLocal(PromptFL):
    """PromptFL with a private prompt beside the shared one, drawn as that is."""

    def init(self, text: PromptTree, gen):
        shared = super().init(text, gen)["ctx"]
        local = super().init(text, gen)["ctx"]
        return {"ctx": shared, "local": local}


@dataclass(frozen=True)
class FedPHA(WithLocal):
    """A shared prompt G and a private prompt L, with which alone a client classifies.

    loss = CE(L) + CE(G) + mean_cj (T(L) - T(L P))^2 + mean_c max(0, alpha - |T(L) - T(G)|), with P
    of `project`. As in the release P keeps the weakest directions of G itself and is no null space
    (N1). Not as there: equal singular values give no NaN (N6), and all prompts have one length
    (with several, the release reads features behind EOS: N4). alpha, ratio and the weights of 1
    are the release's. Uploads and downloads m w, keeps m w.
    """

    key = "fedpha"
    title = "FedPHA"
    source = "Fang et al., ICML 2025"
    alpha: NonNegativeFloat = 1.0
    ratio: Share = 0.8

    def ctx(self, p):
        return p["local"]

    def loss(self, text: PromptTree, p, context, x, y):
        own, common, projected = self.three(text, p)
        z = self.logits(text, own, p, context, x)
        z_common = self.logits(text, common, p, context, x)
        ce = cross_entropy(z, y) + cross_entropy(z_common, y)
        return ce + self.pull(own, projected) + self.push(own, common)

    def three(self, text: PromptTree, p: Tensors) -> Float[Tensor, "3 n c d"]:
        """Return T(L), T(G) and T(L P)."""
        projected = project(p["local"], p["ctx"], self.ratio)
        return text(torch.stack([p["local"], p["ctx"], projected]))

    def pull(self, own: Texts, projected: Texts) -> PerClient:
        return (own - projected).square().mean((1, 2))

    def push(self, own: Texts, common: Texts) -> PerClient:
        distance = (own - common).norm(dim=-1)
        return F.relu(self.alpha - distance).mean(-1)


def project(
    rows: Float[Tensor, "n k w"], g: Float[Tensor, "n m w"], ratio: float
) -> Float[Tensor, "n k w"]:
    """Project rows on the right-singular vectors of g that have the smallest singular values.

    Of min(m, w) of them, r = int(min(m, w) (1 - ratio)) are dropped, cut off after the product in
    double precision, as in the released FedPHA: none for m = 5 and ratio 0.8 (N2). With K = g g^T
    = U diag(lam) U^T the projector is g^T f(K) g, f(lam) = 1 / lam for a vector that is kept, else
    0. The derivative of f(K) is U (D * U^T dK U) U^T, D_ij = (f_i - f_j) / (lam_i - lam_j)
    (Daleckii and Krein, 1965). Unlike that of a singular value decomposition it is finite where
    kept values are equal; where a kept and a dropped one are, there is none and we take 0 for
    the pair. Vectors of length 0 are dropped.
    """
    m, w = g.shape[1:]
    dropped = int(min(m, w) * (1 - ratio))
    g_wide = g.double()
    gram = g_wide @ g_wide.mT
    lam, u = torch.linalg.eigh(gram.detach())  # ascending
    least = TINY * lam[:, -1:]
    kept = torch.arange(m, device=g.device) < m - dropped
    f = torch.where(kept & (lam > least), 1 / lam, 0.0)
    slope = slopes(f, lam, least)
    change = u.mT @ gram @ u - lam.diag_embed()  # zero, and has a gradient
    inner = f.diag_embed() + slope * change
    coordinates = rows.double() @ g_wide.mT @ u
    return (coordinates @ inner @ u.mT @ g_wide).to(g.dtype)


def slopes(
    f: Float[Tensor, "n m"], lam: Float[Tensor, "n m"], least: Float[Tensor, "n 1"]
) -> Float[Tensor, "n m m"]:
    """Return D, with the limit -1 / lam^2 between equal values that are kept."""
    f_i, f_j = f.unsqueeze(2), f.unsqueeze(1)
    gap = lam.unsqueeze(2) - lam.unsqueeze(1)
    equal = gap.abs() <= least.unsqueeze(2)
    return torch.where(equal, -f_i * f_j, (f_i - f_j) / gap)


@dataclass(frozen=True)
class PromptFolio(WithLocal):
    """A shared and a private prompt whose text features are mixed, with a fixed share.

    logits = s <x, (1 - theta) T(G) + theta T(L)>, the mixture not of unit length, both prompts
    trained. theta is the release's. Not as there: an upload has the weight of its own client's
    images (N1), and momentum, private prompts' included, does not go from client to client (N3).
    Uploads and downloads m w, keeps m w.
    """

    key = "promptfolio"
    title = "PromptFolio"
    source = "Pan et al., NeurIPS 2024 (arXiv 2409.19610)"
    degenerate = (({"theta": 0}, PromptFL),)
    theta: Share = 0.4

    def ctx(self, p):
        return torch.stack([p["ctx"], p["local"]], dim=1)

    def logits(self, text: PromptTree, t, p, context, x):
        common, own = t.unbind(1)
        mixed = (1 - self.theta) * common + self.theta * own
        return super().logits(text, mixed, p, context, x)


@dataclass(frozen=True)
class Guided(PromptFL):
    """PromptFL that reads the frozen CLIP's text features of the class names in a `template`."""

    template: str = "a photo of a {}."

    def check(self, text: PromptTree, clients: Clients):
        check_template("template", self.template)

    def context(self, text: PromptTree, down, client_ids, clients: Clients):
        frozen = text.zero_shot(self.template)
        return {"frozen": frozen.expand(len(client_ids), -1, -1)}


@dataclass(frozen=True)
class FedTPG(Guided):
    """A shared network writes the prompt, from the names of the classes: see `write_prompt`.

    The server takes the clients' plain mean; this and the settings are the release's. Not as there:
    all clients read the names of all classes; single precision (N3); no prompts for deeper layers,
    of which the second wipes out the first (N2). Uploads and downloads m w + 14 w^2 + 2 w d + 17 w
    + 2 d, and 16 w^2 + 17 w for each layer of self_depth.
    """

    key = "fedtpg"
    title = "FedTPG"
    source = "Qiu et al., ICLR 2024 (arXiv 2310.06123)"
    template: str = "{}"
    heads: PositiveInt = 4
    self_depth: NonNegativeInt = 0

    @property
    def shared(self) -> tuple[str, ...]:  # type: ignore[override]
        return names_of(self.self_depth)

    @property
    def idle(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(name for name in self.shared if name.endswith(".bk"))  # unseen by softmax

    def check(self, text: PromptTree, clients: Clients):
        super().check(text, clients)
        check_heads(self.heads, text.width)

    def init(self, text: PromptTree, gen):
        return network(self.n_ctx, text.width, text.dim, self.self_depth, gen)

    def encode(self, text: PromptTree, p, context):
        return text(write_prompt(p, context["frozen"], self.heads, self.self_depth))

    def gradients(self, text: PromptTree, p, context, x, y, draw):
        loss, found = super().gradients(text, p, context, x, y, draw)
        return loss, found | {k: torch.zeros_like(p[k]) for k in self.idle}  # not its rounding

    def aggregate(self, server, client_ids, uploads, sizes):
        return super().aggregate(server, client_ids, uploads, torch.ones_like(sizes))


def check_heads(heads: int, width: int) -> None:
    """Raise ValueError for heads of attention that do not share out a width."""
    if width % heads:
        raise ValueError(f"heads {heads} is no divisor of width {width}: take one")


def network(m: int, w: int, d: int, depth: int, gen: torch.Generator) -> Tensors:
    """Return FedTPG's network as the release draws it: as PyTorch does, queries like a prompt.

    Maps to query, key and value are drawn as parts of one (3 w, .) matrix.
    """

    def uniform(half: float, *shape: int) -> Tensor:
        drawn = torch.rand(*shape, generator=gen)
        return half * (2 * drawn - 1)

    p = {"soft_prompt": 0.02 * torch.randn(m, w, generator=gen)}
    blocks = {"cross": d}  # and the width of what it reads
    blocks |= {f"self{i}": w for i in range(depth)}
    for block, read in blocks.items():
        norms = {"ln_q": w, "ln_kv": d} if block == "cross" else {"ln": w}
        norms["ff.ln"] = w
        for part, width in norms.items():
            p[f"{block}.{part}.weight"] = torch.ones(width)
            p[f"{block}.{part}.bias"] = torch.zeros(width)
        for part, width in {"q": w, "k": read, "v": read}.items():
            half = sqrt(6 / (3 * w + width))
            p[f"{block}.w{part}"] = uniform(half, w, width)
            p[f"{block}.b{part}"] = torch.zeros(w)
        p[f"{block}.wo"] = uniform(1 / sqrt(w), w, w)
        p[f"{block}.bo"] = torch.zeros(w)
        for part, (out, width) in {"fc1": (8 * w, w), "fc2": (w, 4 * w)}.items():
            half = 1 / sqrt(width)
            p[f"{block}.ff.{part}.weight"] = uniform(half, out, width)
            p[f"{block}.ff.{part}.bias"] = uniform(half, out)
    return p


@cache
def names_of(depth: int) -> tuple[str, ...]:
    """Return the names of the network's tensors."""
    return tuple(network(1, 1, 1, depth, torch.Generator()))


def write_prompt(
    p: Tensors, names: Float[Tensor, "n c d"], heads: int, depth: int
) -> Float[Tensor, "n m w"]:
    """Return the prompts that FedTPG's networks p write for classes with these text features.

    A = MHA(LN(Q), LN(E)), R = A + FF(A), then `depth` times R <- R + MHA(LN(R)), R <- R + FF(R),
    and R is the prompt. Q (m, w): learnt queries; E (c, d): unit features of the bare names; MHA:
    attention with h heads; FF: a gated layer. Only the first attention has no residual.
    """
    queries = norm(p, "cross.ln_q", p["soft_prompt"])
    read = norm(p, "cross.ln_kv", names)
    x = attend(p, "cross", queries, read, heads)
    x = x + feed_forward(p, "cross.ff", x)
    for i in range(depth):
        seen = norm(p, f"self{i}.ln", x)
        x = x + attend(p, f"self{i}", seen, seen, heads)
        x = x + feed_forward(p, f"self{i}.ff", x)
    return x


def linear(p: Tensors, weight: str, bias: str, x: Tensor) -> Tensor:
    """Run one linear map; each client has its own."""
    mapped = x @ p[weight].mT
    return mapped + p[bias].unsqueeze(1)


def norm(p: Tensors, name: str, x: Float[Tensor, "n k w"]) -> Float[Tensor, "n k w"]:
    """Run one layer norm; each client has its own gain and bias."""
    gain = p[f"{name}.weight"].unsqueeze(1)
    bias = p[f"{name}.bias"].unsqueeze(1)
    return F.layer_norm(x, x.shape[-1:]) * gain + bias


def attend(
    p: Tensors, name: str, x: Float[Tensor, "n m w"], read: Float[Tensor, "n c d"], heads: int
) -> Float[Tensor, "n m w"]:
    """Run one attention, of x to what is read."""

    def through(part: str, value: Tensor) -> Tensor:
        mapped = linear(p, f"{name}.w{part}", f"{name}.b{part}", value)
        return mapped.unflatten(-1, (heads, -1)).transpose(1, 2)

    q = through("q", x)
    k = through("k", read)
    v = through("v", read)
    found = F.scaled_dot_product_attention(q, k, v)
    together = found.transpose(1, 2).flatten(2)
    return linear(p, f"{name}.wo", f"{name}.bo", together)


def feed_forward(p: Tensors, name: str, x: Float[Tensor, "n m w"]) -> Float[Tensor, "n m w"]:
    """Run one gated layer: the first half of what is inside times the gelu of the second."""
    seen = norm(p, f"{name}.ln", x)
    inside = linear(p, f"{name}.fc1.weight", f"{name}.fc1.bias", seen)
    value, gate = inside.chunk(2, dim=-1)
    gated = value * F.gelu(gate)
    return linear(p, f"{name}.fc2.weight", f"{name}.fc2.bias", gated)


@dataclass(frozen=True)
class KgCoOp(Guided):
    """PromptFL whose text features T stay near the frozen CLIP's, Z.

    Adds weight (1 - mean_c cos(T_c, Z_c)) to the loss. weight is KgCoOp's own, and that of FedTPG's
    comparison; the federated release (flip) has 1 (N1), and uploads a network besides that it never
    uses (N3). Z is made anew for other class names (N5). Uploads and downloads m w.
    """

    key = "kgcoop"
    title = "KgCoOp (federated)"
    source = "Yao et al., CVPR 2023, on PromptFL"
    degenerate = (({"weight": 0}, PromptFL),)
    weight: NonNegativeFloat = 8.0

    def loss(self, text: PromptTree, p, context, x, y):
        t = self.encode(text, p, context)
        z = self.logits(text, t, p, context, x)
        return cross_entropy(z, y) + self.weight * self.away(t, context)

    def away(self, t: Texts | None, context: Tensors) -> PerClient:
        assert t is not None
        cosine = (t * context["frozen"]).sum(-1)
        return 1 - cosine.mean(-1)


@dataclass(frozen=True)
class ProGrad(Guided):
    """PromptFL that learns nothing against what the frozen CLIP says of an image.

    g is the gradient of the cross-entropy CE, k that of KL = -mean_b sum_c q_bc log softmax(z_b)_c
    with the frozen CLIP's softmax q. Rule "paper" steps along g where <g, k> >= 0, else along
    g - weight <g, k> / |k|^2 k; rule "flip", as that federated release does instead (N2), along the
    gradient of CE + weight KL. Both have weight 1. Uploads and downloads m w.
    """

    key = "prograd"
    title = "ProGrad (federated)"
    source = "Zhu et al., ICCV 2023, on PromptFL"
    degenerate = (({"weight": 0}, PromptFL),)
    weight: NonNegativeFloat = 1.0
    rule: Literal["paper", "flip"] = "paper"

    def loss(self, text: PromptTree, p, context, x, y):
        ce, soft = self.pair(text, p, context, x, y)
        return ce + self.weight * soft if self.rule == "flip" else ce

    def pair(
        self, text: PromptTree, p: Tensors, context: Tensors, x: Images, y: Labels
    ) -> tuple[PerClient, PerClient]:
        """Return CE and KL."""
        t = self.encode(text, p, context)
        z = self.logits(text, t, p, context, x)
        q = self.logits(text, context["frozen"], p, context, x).softmax(-1)
        soft = -(q * z.log_softmax(-1)).sum(-1)
        return cross_entropy(z, y), soft.mean(-1)

    def gradients(self, text: PromptTree, p, context, x, y, draw):
        if self.rule == "flip":
            return super().gradients(text, p, context, x, y, draw)
        ce, soft = self.pair(text, p, context, x, y)
        (g,) = torch.autograd.grad(ce.sum(), p["ctx"], retain_graph=True)
        (k,) = torch.autograd.grad(soft.sum(), p["ctx"])
        against = (g * k).sum((1, 2)).clamp(max=0)
        size = k.square().sum((1, 2)).clamp(min=torch.finfo(k.dtype).tiny)
        share = self.weight * against / size
        return ce, {"ctx": g - share.view(-1, 1, 1) * k}


ROWS: tuple[type[PromptFL], ...] = (FedPHA, PromptFolio, FedTPG, KgCoOp, ProGrad)
