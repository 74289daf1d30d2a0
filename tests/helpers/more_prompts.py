"""What the released FedPHA, PromptFolio, FedTPG and flip computed, beside what we compute.

Files: tests/data/golden2, in the layout of tests/data/golden. A case yields (key, index, ours,
limit, scale): what stands in the file's array `key` at `index`, how far ours may be from it, and
what the distance is divided by, the largest number there if it is None. Raw features are compared
in their direction, since ours have unit length.
"""

import dataclasses
import math
from types import SimpleNamespace

import open_clip
import torch
import torch.nn.functional as F
from pandas import DataFrame

from fpl.experiments import metrics
from fpl.methods import PromptFL
from fpl.more_methods.prompts import (
    FedPHA,
    FedTPG,
    KgCoOp,
    ProGrad,
    PromptFolio,
    project,
    write_prompt,
)
from fpl.prompts import PromptTree, text_tower
from fpl.rounds import Optimiser, Setup, Training, aggregate, train_locally
from fpl.state import Clients, Server, count_numbers
from helpers import ROOT
from helpers.runs import like
from helpers.tiny import golden, stored_clip

FOLDER = ROOT / "tests" / "data" / "golden2"
# Limits of the README of these files, in single precision: values, gradients, FedPHA's pull, one
# step at a rate of 1e-5; then in trajectories prompts, losses, logits and networks.
EXACT = 1e-9
VALUE, GRADIENT, PULL, SMALL_STEP = 2e-5, 1e-4, 3e-4, 2e-3
PROMPT, LOSS, LOGITS, NETWORK = 2e-4, 1e-3, 1e-3, 1e-3
FIRST = torch.tensor([0])


def files(*kinds):
    """Return the files whose names begin with one of these."""
    return sorted(path.stem for path in FOLDER.glob("*.npz") if path.name.startswith(kinds))


def stored(name):
    """Return a golden file, raw features in their direction."""
    z = golden(f"../{FOLDER.name}/{name}")
    raw = [key for key in z if "features" in key and key.endswith("_raw")]
    return z | {key: F.normalize(z[key], dim=-1) for key in raw}


def failing(found, z):
    """Yield the keys of what is not as stored."""
    for key, at, ours, limit, scale in found:
        ours = torch.as_tensor(ours, dtype=torch.double).detach()
        want = z[key][at].double()
        assert ours.shape == want.shape, key
        size = want.abs().max() if scale is None else scale
        if not (ours - want).abs().max() <= limit * (size or 1):
            yield key


# What a file says of its prompts, images and clients


def tokens(sentences):
    """Return the token ids (c, 77) of whole sentences."""
    return open_clip.tokenizer._tokenizer([name.replace("_", " ") for name in sentences])


def sentences(names, n_ctx):
    return [f"{'X ' * n_ctx}{name}." for name in names]


def header(z, text, n_ctx, prefix=""):
    ids = tokens(sentences(z[f"{prefix}classnames"], n_ctx))
    yield f"{prefix}token_ids", (), ids, EXACT, None
    yield "width", (), text.width, EXACT, None
    yield "scale", (), text.scale, VALUE, None


TOWERS = []  # the last few: tensors, and the tower made of them


def clip_of(z):
    """Return the text tower of a file, made once for the same tensors."""
    parts = [v for k, v in z.items() if k.startswith(("sd.", "emb_")) or k in ("heads", "layers")]
    for known, clip in TOWERS:
        if all(one is other for one, other in zip(parts, known, strict=False)):
            return clip
    TOWERS[:] = [*TOWERS[-2:], (parts, stored_clip(z))]
    return TOWERS[-1][1]


def unit(raw):
    """Return the features of one client's images."""
    return F.normalize(raw, dim=-1)[None]


def batch(z):
    return unit(z["image_raw"]), z["labels"][None]


def people(z):
    """Return the clients of a trajectory, and where the images of each begin."""
    n = sum(key.startswith("client") and key.endswith(".image_raw") for key in z)
    feats = torch.cat([z[f"client{i}.image_raw"] for i in range(n)])
    labels = [z[f"client{i}.labels"] for i in range(n)]
    own = torch.arange(len(feats)).split([*map(len, labels)])
    many = 1 + int(torch.cat(labels).max())
    clients = Clients(F.normalize(feats, dim=-1), torch.cat(labels), own, own, many)
    return clients, [int(index[0]) for index in own]


def nobody(d):
    """Return clients that no method here looks at."""
    return Clients(torch.zeros(1, d), torch.zeros(1, dtype=torch.long), [], [], 1)


def unused(*args):
    """Stand for what no method here asks for: further training, and what a step draws."""
    raise AssertionError(args)


# How it trains


class Told(Training):
    """Training at rates that are told, one for each local epoch that the optimiser has seen."""

    def rate(self, group, epoch, before=0):
        return self.rates[before + epoch]


def told(z, rates, epochs=1, prefix=""):
    """Return how a trajectory trains."""
    kinds = ("momentum", "weight_decay")
    training = Told(local_epochs=epochs, **{kind: z[f"{prefix}{kind}"].item() for kind in kinds})
    object.__setattr__(training, "rates", rates)
    return training


def one_step(z, method, text, p):
    """Return the tensors after one step with the batch of a file, from no momentum."""
    x, y = batch(z)
    every = torch.arange(y.numel())
    clients = Clients(x[0], y[0], [every], [every], 1 + int(y.max()))
    setup = Setup(method, text, clients, Training(lr=z["lr"].item(), local_epochs=1))
    begin = {k: v.detach() for k, v in p.items()}
    return train_locally(setup, begin, {}, {0: every[None]})[0]


def follow(setup, begin, context, order, optimiser=None):
    """Return what `train_locally` makes of one client: tensors after every step, and its losses."""
    path = []
    losses = []

    class Followed(type(setup.method)):
        def loss(self, text, p, context, x, y):
            path.append({k: v[0].detach().clone() for k, v in p.items()})
            losses.append(super().loss(text, p, context, x, y))
            return losses[-1]

    followed = dataclasses.replace(setup, method=like(Followed, setup.method))
    last, _ = train_locally(followed, begin, context, {0: order}, optimiser)
    path.append({k: v[0] for k, v in last.items()})
    return {k: torch.stack([p[k] for p in path[1:]]) for k in last}, torch.cat(losses)


def server_of(params, n):
    """Return a server of n clients, of which none has sent anything."""
    none = {k: v.new_zeros(n, *v.shape) for k, v in params.items()}
    nobody = torch.zeros(n, dtype=torch.bool)
    return Server(params, none, nobody, nobody)


def average(method, uploads, sizes, order=None):
    """Return the server's mean. With an order, as PromptFolio's release has it (N1): the upload of
    the i-th in that order has the weight of client i."""
    ids = torch.arange(len(sizes)) if order is None else order
    server = server_of({k: v[0] for k, v in uploads.items()}, len(sizes))
    return method.aggregate(server, ids, {k: v[ids] for k, v in uploads.items()}, sizes).params


def classify(method, text, p, raw, context=None):
    """Return the logits of one client's images."""
    reads = context or {}
    return method.logits(text, method.encode(text, p, reads), p, reads, unit(raw))[0].detach()


def scores(logits, labels):
    """Return accuracy and macro F1 in percent."""
    assert labels.max() < logits.shape[-1]
    said = logits.argmax(-1)
    frame = DataFrame({"predicted": said.numpy(), "label": labels.numpy()})
    right = (said == labels).double().mean()
    return 100 * right, 100 * metrics.per_class(frame)["f1"].mean()


def slopes(value, leaves):
    """Return the gradients of a value, zero where there is none."""
    found = torch.autograd.grad(value, leaves, retain_graph=True, materialize_grads=True)
    return [slope.detach() for slope in found]


# The released encoder, where it is not ours


def encoded(clip, names, prompts, longest):
    """Return the unit features (c, d) that the released code reads of prompts (m, w).

    The first is written over the `longest` placeholders of a sentence. If it has fewer vectors, the
    rest moves up, and the feature is still read where the sentence had its EOS (FedPHA's N4). The
    others are written before each layer, without positions (FedTPG's N2).
    """
    tower = text_tower(clip)
    ids = tokens(sentences(names, longest))
    rows = tower.token_embedding(ids)

    def put(x, ctx):
        return torch.cat([x[:, :1], ctx.expand(len(x), -1, -1), x[:, 1 + longest :]], dim=1)

    x = put(rows, prompts[0])
    x = F.pad(x, (0, 0, 0, rows.shape[1] - x.shape[1])) + tower.positional_embedding
    for i, block in enumerate(tower.transformer.resblocks, 1):
        x = put(x, prompts[i]) if i < len(prompts) else x
        x = block(x, attn_mask=tower.attn_mask)
    at_eos = tower.ln_final(x)[torch.arange(len(x)), ids.argmax(-1)]
    return F.normalize(at_eos @ tower.text_projection, dim=-1)


class ReadBehind(SimpleNamespace):
    """A text that has features of prompts of several lengths, read as `encoded` does."""

    def __call__(self, ctx):
        return torch.stack([encoded(self.clip, self.names, [p], self.longest) for p in ctx])


class Mixed(FedPHA):
    """FedPHA whose two prompts may have two lengths."""

    def three(self, text, p):
        projected = project(p["local"], p["ctx"], self.ratio)
        return [text(prompt) for prompt in (p["local"], p["ctx"], projected)]


class Deep(FedTPG):
    """FedTPG with more prompts, for deeper layers, as the release writes them."""

    def encode(self, text, p, context):
        prompts = write_prompt(p, context["frozen"], self.heads, self.self_depth)
        layers = prompts.unflatten(1, (-1, text.n_ctx))
        return torch.stack([encoded(text._clip, text.names, own, text.n_ctx) for own in layers])


# FedPHA


def pha_of(z, m):
    """Return the method of a file, what the release reads prompts with, and its placeholders."""
    clip = clip_of(z)
    settings = {"n_ctx": m, "alpha": z["alpha"].item(), "ratio": z["ratio"].item()}
    text = PromptTree(clip, z["classnames"], m)
    if not z["heterogeneous"]:
        return FedPHA(**settings), text, m
    longest = max(m, *z["user_prompt_lengths"].tolist())
    wide = {"width": text.width, "scale": text.scale}
    behind = ReadBehind(clip=clip, names=z["classnames"], longest=longest, **wide)
    return Mixed(**settings), behind, longest


def pha(z):
    method, text, longest = pha_of(z, len(z["ctx_global"]))
    yield from header(z, text, longest)
    x, y = batch(z)
    leaves = [z[f"ctx_{name}"].clone().requires_grad_() for name in ("global", "local")]
    p = {"ctx": leaves[0][None], "local": leaves[1][None]}
    found = pha_values(method, text, p, x, y)
    for key, ours in found.items():
        yield key, (), ours, VALUE, None
    for key in ("loss", "pull", "push", "ce_global"):
        stem = "grad" if key == "loss" else f"grad_{key}"
        limit = PULL if key == "pull" else GRADIENT
        for name, slope in zip(("global", "local"), slopes(found[key], leaves), strict=True):
            yield f"{stem}_ctx_{name}", (), slope, limit, None
    yield "acc", (), scores(found["logits"], y[0])[0], VALUE, None
    last = one_step(z, method, text, p)
    for ours, name in (("ctx", "global"), ("local", "local")):
        moved = (z[f"step_ctx_{name}"] - z[f"ctx_{name}"]).abs().max()
        yield f"step_ctx_{name}", (), last[ours][0], GRADIENT, moved
        yield f"n_ctx_{name}", (), last[ours].shape[1], EXACT, None
    mean = average(method, {"ctx": z["agg.uploads"]}, z["agg.sizes"])["ctx"]
    yield "agg.global", (), mean, VALUE, None
    yield from defaults(momentum="momentum", weight_decay="weight_decay")
    if z["heterogeneous"]:
        yield from pha_intended(z, p, method.ratio)


def pha_values(method, text, p, x, y):
    own, common, projected = method.three(text, p)
    logits, logits_global = (method.logits(text, t, p, {}, x)[0] for t in (own, common))
    loss = method.loss(text, p, {}, x, y)[0]
    projector = project(torch.eye(text.width)[None], p["ctx"], method.ratio)[0]
    each = own[0].unsqueeze(1), common[0].unsqueeze(1)  # classes in the place of clients
    return {
        "projector": projector,
        "null_dim": projector.trace(),
        "projected_ctx_local": project(p["local"], p["ctx"], method.ratio)[0],
        "singular_values": torch.linalg.svdvals(p["ctx"][0]),
        "features_global": common[0],
        "features_local": own[0],
        "features_projected": projected[0],
        "logits": logits,
        "logits_global": logits_global,
        "logits_eval": method.logits(text, method.encode(text, p, {}), p, {}, x)[0],
        "ce_local": F.cross_entropy(logits, y[0]),
        "ce_global": F.cross_entropy(logits_global, y[0]),
        "pull": method.pull(own, projected)[0],
        "push": method.push(own, common)[0],
        "push_rows": method.push(*each),
        "loss": loss,
        "loss_reported": loss,
    }


def pha_intended(z, p, ratio):
    """Yield the features of prompts of two lengths, read where they are meant to be."""
    clip = clip_of(z)
    names = z["classnames"]
    yield "n_ctx_local", (), z["user_prompt_lengths"][z["client"]], EXACT, None
    prompts = {"global": p["ctx"], "local": p["local"]}
    for name, ctx in prompts.items():
        ids = tokens(sentences(names, ctx.shape[1]))
        yield f"eos.token_ids_{name}", (), ids, EXACT, None
    prompts["projected"] = project(p["local"], p["ctx"], ratio)
    for name, ctx in prompts.items():
        t = PromptTree(clip, names, ctx.shape[1])(ctx)[0]
        yield f"eos.features_{name}", (), t, VALUE, None


def defaults(**settings):
    """Yield settings of the release that are our defaults, under their names and ours."""
    for theirs, ours in settings.items():
        yield theirs, (), getattr(Training(), ours), EXACT, None


def pha_run(z):
    """Momentum is fresh for every client and round, as it is here."""
    method, text, longest = pha_of(z, len(z["ctx_global_init"]))
    yield from header(z, text, longest)
    clients, first = people(z)
    n = int(z["clients"])
    own = [z[f"client{i}.ctx_local_init"] for i in range(n)]
    yield "n_ctx_global", (), method.n_ctx, EXACT, None
    yield "sizes", (), torch.tensor([*map(len, clients.train)]), EXACT, None
    if z["heterogeneous"]:
        yield "user_prompt_lengths", (), torch.tensor([*map(len, own)]), EXACT, None
    server = server_of({"ctx": z["ctx_global_init"]}, n)
    for r in range(int(z["rounds"])):
        uploads = []
        for i in range(n):
            cold = r * n + i < z["warmup_epoch"]  # one schedule for all, of local epochs
            rate = z["warmup_lr" if cold else "base_lr"]
            yield "lr", (r, i), rate.expand_as(z["lr"][r, i]), EXACT, None
            setup = Setup(method, text, clients, told(z, [rate.item()]))
            begin = {"ctx": server.params["ctx"][None], "local": own[i][None]}
            path, losses = follow(setup, begin, {}, first[i] + z[f"client{i}.batches"][r])
            yield "loss", (r, i), losses, LOSS, None
            yield f"client{i}.ctx_global", (r,), path["ctx"], PROMPT, None
            yield f"client{i}.ctx_local", (r,), path["local"], PROMPT, None
            own[i] = path["local"][-1]
            uploads.append(path["ctx"][-1])
        everybody = torch.arange(n)
        server = aggregate(setup, server, {"ctx": torch.stack(uploads)}, everybody, 0.0)
        yield "global_ctx", (r,), server.params["ctx"], PROMPT, None
        for i in range(n):
            p = {"ctx": uploads[i][None], "local": own[i][None]}
            p = method.evaluated(server, p, unused)
            logits = classify(method, text, p, z[f"client{i}.test_image_raw"])
            yield "test_logits", (r, i), logits, LOGITS, None
            yield from said(z, "test", (r, i), logits, f"client{i}.test_labels")


def said(z, prefix, at, logits, labels):
    """Yield accuracy and macro F1 of what was said of some images."""
    kinds = zip(("accuracy", "macro_f1"), scores(logits, z[labels]), strict=True)
    for kind, ours in kinds:
        if f"{prefix}_{kind}" in z:
            yield f"{prefix}_{kind}", at, ours, VALUE, 100


# PromptFolio


def folio_of(z):
    """Return the method of a file, its text, and the two prompts, the shared one first."""
    ctx = z["ctx"] if "ctx_init" not in z else z["ctx_init"]
    method = PromptFolio(ctx.shape[1], theta=z["theta"].item())
    return method, PromptTree(clip_of(z), z["classnames"], method.n_ctx), ctx


def both(ctx):
    """Return a pair of prompts as one client's tensors."""
    return {"ctx": ctx[None, 0], "local": ctx[None, 1]}


def folio(z):
    method, text, ctx = folio_of(z)
    yield from header(z, text, method.n_ctx)
    yield "n_ctx", (), method.n_ctx, EXACT, None
    x, y = batch(z)
    leaf = ctx.clone().requires_grad_()
    p = both(leaf)
    t = method.encode(text, p, {})
    # logits of unit vectors are coordinates of features
    mixed = method.logits(text, t, p, {}, torch.eye(text.dim)[None])[0].T / text.scale
    loss = method.loss(text, p, {}, x, y)[0]
    logits = method.logits(text, t, p, {}, x)[0]
    for place, name in enumerate(("global", "local")):
        for kind in ("features", "features_raw"):
            yield kind.replace("features", f"features_{name}"), (), t[0, place], VALUE, None
    found = {"mixed": mixed, "mixed_norm": mixed.norm(dim=-1), "logits": logits, "loss": loss}
    for key, ours in found.items():
        yield key, (), ours, VALUE, None
    yield "grad_ctx", (), slopes(loss, [leaf])[0], GRADIENT, None
    yield "acc", (), scores(logits, y[0])[0], VALUE, None
    last = one_step(z, method, text, p)
    moved = (z["step_ctx"] - ctx).abs().max()
    yield "step_ctx", (), method.ctx(last)[0], SMALL_STEP, moved
    yield "logits_eval", (), classify(method, text, last, z["image_raw"]), VALUE, None
    yield from defaults(momentum="momentum", weight_decay="weight_decay")
    yield from defaults(base_lr="lr", max_epoch="local_epochs")
    uploads = both(z["agg.uploads"].transpose(0, 1))
    uploads = {k: v[0] for k, v in uploads.items()}
    shared = {"ctx": uploads["ctx"]}
    yield "agg.formula_global", (), average(method, shared, z["agg.sizes"])["ctx"], VALUE, None
    params = average(method, shared, z["agg.sizes"], z["agg.users"])
    yield "agg.global", (), params["ctx"], VALUE, None
    deployed = method.evaluated(server_of(params, len(z["agg.sizes"])), uploads, unused)
    yield "agg.deployed", (), method.ctx(deployed), VALUE, None


def folio_run(z):
    """The release's momentum goes on from client to client (N3), and weights are N1's."""
    method, text, ctx = folio_of(z)
    yield from header(z, text, method.n_ctx)
    clients, first = people(z)
    n, epochs = int(z["clients"]), int(z["epochs"])
    yield "n_ctx", (), method.n_ctx, EXACT, None
    yield "sizes", (), torch.tensor([*map(len, clients.train)]), EXACT, None
    yield "rounds", (), len(z["order"]), EXACT, None
    yield "base_lr", (), z["lr"].max(), EXACT, None
    yield "warmup_lr", (), 1e-5, EXACT, None
    yield "warmup_epoch", (), z["lr"].flatten()[0] == 1e-5, EXACT, None
    for i in range(n):
        logits = classify(method, text, both(ctx), z[f"client{i}.test_image_raw"])
        yield "initial_test_logits", i, logits, VALUE, None
        yield from said(z, "initial_test", i, logits, f"client{i}.test_labels")
    training = told(z, z["lr"][..., 0].flatten().tolist(), epochs)
    setup = Setup(method, text, clients, training)
    optimiser = Optimiser()
    trained = [0] * n
    local = {k: v.expand(n, -1, -1).clone() for k, v in both(ctx).items()}
    server = server_of({"ctx": ctx[0]}, n)
    for r, order in enumerate(z["order"]):
        for k, i in enumerate(order.tolist()):
            rows = z[f"client{i}.batches"][trained[i] : trained[i] + epochs]
            trained[i] += epochs
            begin = {"ctx": server.params["ctx"][None], "local": local["local"][[i]]}
            path, losses = follow(setup, begin, {}, first[i] + rows.flatten(0, 1), optimiser)
            pairs = torch.stack([path["ctx"], path["local"]], dim=1)
            yield "ctx", (r, k), pairs.unflatten(0, (epochs, -1)), PROMPT, None
            yield "loss", (r, k), losses.unflatten(0, (epochs, -1)), LOSS, None
            p = {name: steps[-1:] for name, steps in path.items()}
            local = {name: v.index_copy(0, torch.tensor([i]), p[name]) for name, v in local.items()}
            logits = classify(method, text, p, z[f"client{i}.test_image_raw"])
            yield "local_test_logits", (r, k), logits, LOGITS, None
        params = average(method, {"ctx": local["ctx"]}, z["sizes"], order)
        server = dataclasses.replace(server, params=params)
        yield "global_ctx", r, params["ctx"], PROMPT, None
        deployed = method.evaluated(server, local, unused)
        yield "deployed_ctx", r, method.ctx(deployed)[order], PROMPT, None
        for k, i in enumerate(order.tolist()):
            p = {name: v[[i]] for name, v in deployed.items()}
            logits = classify(method, text, p, z[f"client{i}.test_image_raw"])
            yield "test_logits", (r, k), logits, LOGITS, None
            yield from said(z, "test", (r, k), logits, f"client{i}.test_labels")


# KgCoOp and ProGrad, federated


KINDS = {"KgCoOp": KgCoOp, "ProGrad": ProGrad}
UNUSED = 512 * 512 + 512 + 512  # numbers that the released KgCoOp uploads and never uses (N3)


def guided(z):
    kind = KINDS[z["algorithm"][0]]
    (template,) = z["teacher_template"]
    method = kind(len(z["ctx"]), template=template, weight=1.0)
    if kind is ProGrad:
        method = dataclasses.replace(method, rule="flip")
    text = PromptTree(clip_of(z), z["classnames"], method.n_ctx)
    yield from header(z, text, method.n_ctx)
    yield "n_ctx", (), method.n_ctx, EXACT, None
    told_by = [template.format(name) for name in z["classnames"]]
    yield "teacher_token_ids", (), tokens(told_by), EXACT, None
    x, y = batch(z)
    leaf = z["ctx"].clone().requires_grad_()
    p = {"ctx": leaf[None]}
    context = method.context(text, {}, FIRST, nobody(text.dim))
    yield "teacher_features", (), context["frozen"][0], VALUE, None
    t = method.encode(text, p, context)
    ce = PromptFL.loss(method, text, p, context, x, y)[0]
    add = method.away(t, context) if kind is KgCoOp else method.pair(text, p, context, x, y)[1]
    logits = method.logits(text, t, p, context, x)[0]
    loss, slope = method.gradients(text, p, context, x, y, unused)
    found = {"features_raw": t[0], "logits": logits, "logits_eval": logits}
    for key, ours in (found | {"ce": ce, "add_loss": add[0], "loss": loss[0]}).items():
        yield key, (), ours, VALUE, None
    (own,), (general,) = slopes(ce, [leaf]), slopes(add, [leaf])
    for key, ours in {"grad_ce_ctx": own, "grad_add_ctx": general}.items():
        yield key, (), ours, GRADIENT, None
    yield "grad_ctx", (), slope["ctx"][0], GRADIENT, None
    sent = count_numbers({name: p[name] for name in method.shared})
    yield "uploaded_numbers", (), sent + UNUSED * (kind is KgCoOp), EXACT, None
    if kind is ProGrad:
        scale = own.norm() * general.norm()
        yield "formula_dot", (), (own * general).sum(), GRADIENT, scale
        paper = dataclasses.replace(method, rule="paper")
        _, projected = paper.gradients(text, p, context, x, y, unused)
        yield "formula_grad", (), projected["ctx"][0], GRADIENT, None
    yield from guided_run(z, method, text)


def guided_run(z, method, text):
    """Two rounds, with a new optimiser in each, as here."""
    clients, first = people(z)
    n = len(clients)
    everybody = torch.arange(n)
    yield "fed.sizes", (), torch.tensor([*map(len, clients.train)]), EXACT, None
    setup = Setup(method, text, clients, told(z, [z["fed.lr"].item()], 1, "fed."))
    server = server_of({"ctx": z["fed.ctx_init"]}, n)
    for r in range(len(z["fed.ctx_end"])):
        begin = method.download(server, everybody, clients)
        context = method.context(text, begin, everybody, clients)
        order = {i: first[i] + z[f"client{i}.batches"][r] for i in range(n)}
        ended, losses = train_locally(setup, begin, context, order)
        yield "fed.ctx_end", r, ended["ctx"], PROMPT, None
        yield "fed.mean_loss", r, losses, LOSS, None
        server = aggregate(setup, server, ended, everybody, 0.0)
        yield "fed.global_ctx", r, server.params["ctx"], PROMPT, None


# FedTPG


def tpg_of(z):
    """Return the method of a file."""
    kind = Deep if z["ctx_depth"] > 1 else FedTPG
    return kind(int(z["n_ctx"]), heads=int(z["net_heads"]), self_depth=int(z["self_depth"]))


def part(z, prefix):
    """Return the tensors of a file whose names begin like this."""
    return {k.removeprefix(prefix): v for k, v in z.items() if k.startswith(prefix)}


def tpg_text(z, method, clip, prefix):
    """Return the text of a file's class names, and what a client reads of them."""
    text = PromptTree(clip, z[f"{prefix}classnames"], method.n_ctx)
    method.check(text, nobody(text.dim))
    return text, method.context(text, {}, FIRST, nobody(text.dim))


def tpg_header(z, text, prefix):
    yield from header(z, text, text.n_ctx, prefix)
    yield f"{prefix}name_token_ids", (), tokens(text.names), EXACT, None


def tpg(z):
    method = tpg_of(z)
    clip = clip_of(z)
    leaves = {k: v.clone().requires_grad_() for k, v in part(z, "net.").items()}
    assert {*leaves} == {*method.shared}
    p = {k: v[None] for k, v in leaves.items()}
    for prefix in ("", "test_"):
        text, context = tpg_text(z, method, clip, prefix)
        yield from tpg_header(z, text, prefix)
        x = unit(z[f"{prefix}image_raw"])
        ctx = write_prompt(p, context["frozen"], method.heads, method.self_depth)[0]
        t = method.encode(text, p, context)
        found = {
            "name_features": context["frozen"][0],
            "ctx": ctx.unflatten(0, (int(z["ctx_depth"]), method.n_ctx)),
            "features": t[0],
            "features_raw": t[0],
            "logits": method.logits(text, t, p, context, x)[0],
        }
        for key, ours in found.items():
            yield f"{prefix}{key}", (), ours, VALUE, None
        if prefix:
            continue
        loss, slope = method.gradients(text, p, context, x, z["labels"][None], unused)
        yield "loss", (), loss[0], VALUE, None
        for key, ours in slope.items():
            scale = z[f"grad.{key[:-2]}wk"].abs().max() if key in method.idle else None
            yield f"grad.{key}", (), ours[0], GRADIENT, scale


def tpg_run(z):
    """Clients have class names of their own; momentum and rates go on with each client."""
    method = tpg_of(z)
    clip = clip_of(z)
    clients, first = people(z)
    n, rounds = int(z["clients"]), int(z["rounds"])
    yield "sizes", (), torch.tensor([*map(len, clients.train)]), EXACT, None
    yield "ctx_depth", (), len(z["init.soft_prompt"]) / method.n_ctx, EXACT, None
    texts = [tpg_text(z, method, clip, f"client{i}.") for i in range(n)]
    for i, (text, _) in enumerate(texts):
        yield from tpg_header(z, text, f"client{i}.")
    rates = [z["base_lr"].item() / 2 * (1 + math.cos(math.pi * t / rounds)) for t in range(rounds)]
    optimisers = [Optimiser() for _ in range(n)]
    server = server_of(part(z, "init."), n)
    for r, order in enumerate(z["order"].tolist()):
        ends = []
        for k, i in enumerate(order):
            text, context = texts[i]
            turn = optimisers[i].epochs
            yield "lr", (r, k), torch.full_like(z["lr"][r, k], rates[turn]), GRADIENT, None
            setup = Setup(method, text, clients, told(z, rates))
            begin = method.download(server, FIRST, clients)
            rows = first[i] + z[f"client{i}.batches"][turn]
            path, losses = follow(setup, begin, context, rows, optimisers[i])
            yield "loss", (r, k), losses, LOSS, None
            yield "soft_prompt", (r, k), path["soft_prompt"], PROMPT, None
            ends.append({name: steps[-1] for name, steps in path.items()})
            for name, ours in ends[-1].items():
                yield f"end.{name}", (r, k), ours, NETWORK, size_of(z, f"end.{name}")
        uploads = {name: torch.stack([end[name] for end in ends]) for name in ends[0]}
        picked = torch.tensor(order)
        server = method.aggregate(server, picked, uploads, z["sizes"][picked])
    for name, ours in server.params.items():
        yield f"final.{name}", (), ours, NETWORK, size_of(z, f"final.{name}")
    yield from tpg_tests(z, method, texts, server)


def size_of(z, key):
    """Return what the distance of a network's tensor is divided by: of key biases, the query's."""
    return z[f"{key[:-2]}bq"].abs().max() if key.endswith(".bk") else None


def tpg_tests(z, method, texts, server):
    """Yield what the last network says of every client's classes, and of all classes."""
    p = method.download(server, FIRST, nobody(1))
    for i, (text, context) in enumerate(texts):
        logits = classify(method, text, p, z[f"client{i}.test_image_raw"], context)
        yield f"client{i}.test_logits", (), logits, 3 * LOGITS, None
        yield from said(z, "local_test", i, logits, f"client{i}.test_labels")
    text, context = tpg_text(z, method, text._clip, "all_")
    yield from tpg_header(z, text, "all_")
    logits = classify(method, text, p, z["all_image_raw"], context)
    yield "all_test_logits", (), logits, 3 * LOGITS, None
    yield from said(z, "all_test", (), logits, "all_labels")


SINGLE = {"pha": pha, "folio": folio, "kg": guided, "pg": guided, "tpg": tpg}
RUNS = {"pha": pha_run, "folio": folio_run, "tpg": tpg_run}


def case(name, z):
    """Yield the comparisons of a file."""
    kind = name.split("_")[0]
    return (RUNS if "rounds" in z else SINGLE)[kind](z)


def unseen(z):
    """Return inputs that may be others without a change."""
    found = {k for k in z if k.endswith(".bk") and k.startswith(("net.", "init."))}
    if "ratio" in z and "rounds" not in z:
        m = len(z["ctx_global"])
        cut = [int(m * (1 - z["ratio"].item() * by)) for by in (1, 0.5)]
        found |= {"ratio"} if cut[0] == cut[1] else set()
    if "warmup_epoch" in z and not z["warmup_epoch"]:
        found |= {"warmup_lr"}
    if "ctx_depth" in z and "weight_decay" in z and z["weight_decay"] < 1e-3:
        found |= {"weight_decay"}
    return found
