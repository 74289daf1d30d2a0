"""The promises that every method keeps, checked on a small random CLIP: what `fpl check` runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import cache, partial
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from fpl.experiments.stored import check_names
from fpl.experiments.values import build
from fpl.methods import PromptFL
from fpl.prompts import Clip, PromptTree
from fpl.rounds import Round, Setup, State, Training, aggregate, begin_run, run_rounds, train_round
from fpl.state import Clients, Context, Lookup, Server, Tensors, generator, normals, take

NAMES = ["red square", "red circle", "blue square", "palette", "cat", "golden retriever"]
N_CLIENTS = 12
N_IMAGES = 4  # of each client, for training and for testing
DIM = 256
# Two runs that differ in the order of additions only.
NEAR = 1e-3


def check(kind: type[PromptFL], settings: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each promise that a method breaks; none when all hold.

    settings: of the method, over its defaults. Raises ValueError for settings that cannot be.
    """
    method = build(kind, dict(settings), kind.key)
    training = build(Training, {"rounds": 3, "local_epochs": 2, "lr": 0.02} | kind.training, "run")
    clients = small_clients()
    text = PromptTree(small_clip(), NAMES, method.n_ctx)
    method.check(text, clients)
    small = Setup(method, text, clients, training)
    broken = []
    for name, promise in PROMISES.items():
        try:
            said = promise(small)
        except Exception as error:  # whatever a method of one's own may raise
            said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if said:
            broken.append(f"{kind.title} breaks the promise that {name}: {said}")
    return broken


@cache
def small_clip() -> Clip:
    vision = {"image_size": 32, "patch_size": 16, "layers": 1, "width": 32, "head_width": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)  # open_clip draws from the global generator, which is put back
        model = open_clip.CLIP(embed_dim=DIM, vision_cfg=vision, text_cfg=text)
    return Clip(model.eval().requires_grad_(False))


def small_clients() -> Clients:
    """Return clients that have as many images each, of several classes."""
    gen = torch.Generator().manual_seed(0)
    images = 2 * N_CLIENTS * N_IMAGES
    feats = F.normalize(torch.randn(images, DIM, generator=gen), dim=-1)
    patches = torch.randn(images, 5, DIM, generator=gen)
    labels = torch.randint(len(NAMES), (images,), generator=gen)
    parts = torch.arange(images).split(N_IMAGES)
    return Clients(feats, labels, parts[:N_CLIENTS], parts[N_CLIENTS:], len(NAMES), patches)


def run(small: Setup, method: PromptFL | None = None) -> list[Round]:
    """Return the rounds of a run of the setup's method, or of another one in its place."""
    return [*run_rounds(replace(small, method=method or small.method))]


def after_a_round(small: Setup) -> tuple[Tensors, Server]:
    """Return everybody's tensors and the server, as they stand when all have trained once."""
    everybody = torch.arange(len(small.clients))
    trained = train_round(small, begin_run(small), everybody)
    server = aggregate(small, trained.server, trained.local, everybody, 0.0)
    return trained.local, server.begin(1, everybody)


def second_round(small: Setup) -> tuple[Tensors, Context]:
    """Return everybody's tensors, and what everybody reads in the second round."""
    local, server = after_a_round(small)
    everybody = torch.arange(len(small.clients))
    down = small.method.download(server, everybody, small.clients)
    return local, small.method.context(small.text, down, everybody, small.clients)


def gradients(small: Setup) -> str:
    """Every tensor that a method declares has a gradient, of each client."""
    local, context = second_round(small)
    if not local:
        return ""
    method, clients = small.method, small.clients
    p = {name: value.clone().requires_grad_() for name, value in local.items()}
    index = torch.stack([*clients.train])
    x = getattr(clients, method.inputs)[index]
    reads = take(context, slice(None))
    draw = partial(normals, x, small.seeds.order, range(len(clients)), (1, 0))
    y = clients.labels[index]
    _, found = method.gradients(small.text, p, reads, x, y, draw)
    without = []
    for name, value in p.items():
        alive = name in found and bool(found[name].flatten(1).norm(dim=1).min() > 0)
        if not alive and value.numel() and name not in method.idle:
            without.append(name)
    if not without:
        return ""
    return f"{', '.join(without)} has none, at least of one client"


def leaves(small: Setup) -> str:
    """What leaves a client is what `shared` names, and private tensors reach nobody else."""
    method = small.method
    local = begin_run(small).local
    unknown = [name for name in method.shared if name not in local]
    if unknown:
        return f"shared names {', '.join(unknown)}, which init does not make"
    _, server = after_a_round(small)
    if {*server.params} != {*method.shared}:
        return f"the server has {', '.join(server.params)}, shared names {', '.join(method.shared)}"
    drawn = torch.arange(1, len(small.clients))
    changed = {name: value.clone() for name, value in local.items()}
    for name, value in changed.items():
        if name not in method.shared:
            value[0] += 1
    one = train_round(small, State(local, server), drawn).local
    other = train_round(small, State(changed, server), drawn).local
    reached = []
    for name, value in one.items():
        if not torch.equal(value[1:], other[name][1:]):
            reached.append(name)
    if not reached:
        return ""
    return f"a private tensor of client 0 changed {', '.join(reached)} of others"


def stacked(small: Setup) -> str:
    """Clients that train as one batch learn what each learns alone."""
    alone = PromptTree(small_clip(), NAMES, small.method.n_ctx, budget=1)
    return difference(run(small), run(replace(small, text=alone)))


def client_order(small: Setup) -> str:
    """Results do not depend on the order of the clients."""
    small = replace(small, method=drawing_alike(small.method))
    order = torch.randperm(len(small.clients), generator=generator(1, "order"))
    train = [small.clients.train[i] for i in order.tolist()]
    test = [small.clients.test[i] for i in order.tolist()]
    other = replace(small, clients=replace(small.clients, train=train, test=test))
    back = order.argsort()
    rounds = []
    for r in run(other):
        evaluated = {name: value[back] for name, value in r.evaluated.items()}
        rounds.append(replace(r, evaluated=evaluated))
    return difference(run(small), rounds)


def drawing_alike(method: PromptFL) -> PromptFL:
    """Return the method with steps in which all clients draw the same: draws go by number."""

    class Alike(type(method)):  # type: ignore[misc]
        def gradients(self, text: PromptTree, p, context, x, y, draw):
            same = partial(normals, x, 0, [0] * len(x), (0, 0))
            return super().gradients(text, p, context, x, y, same)

    return Alike(**{f.name: getattr(method, f.name) for f in fields(method)})


def expert_order(small: Setup) -> str:
    """Logits do not depend on the order of the experts that a client reads."""
    local, context = second_round(small)
    ordered = {name for name, value in context.items() if isinstance(value, Lookup)}
    if not ordered:
        return ""
    method, text = small.method, small.text
    reads = take(context, slice(None))
    turned = {k: v.flip(1) if k in ordered else v for k, v in reads.items()}
    x = getattr(small.clients, method.inputs)[torch.stack([*small.clients.test])]
    classify = partial(method.logits, text, method.encode(text, local, reads), local)
    return far(classify(reads, x), classify(turned, x), "logits")


def named(small: Setup) -> str:
    """What a method learns, and what it reads, can be kept in a file."""
    for tensors in second_round(small):
        check_names(tensors)
    return ""


def repeated(small: Setup) -> str:
    """Two runs are equal to the bit."""
    for one, other in zip(run(small), run(small), strict=True):
        for name, value in one.evaluated.items():
            if not torch.equal(value, other.evaluated[name]):
                return f"{name} differs after round {one.number}"
        if not torch.equal(one.accuracy, other.accuracy):
            return f"accuracy differs after round {one.number}"
    return ""


def degenerate(small: Setup) -> str:
    """With the settings that it declares, a method is another one."""
    for settings, kind in small.method.degenerate:
        same = replace(small.method, **settings)
        base: PromptFL = build(kind, {"n_ctx": same.n_ctx}, kind.key)
        here = replace(small, text=PromptTree(small_clip(), NAMES, same.n_ctx))
        for one, other in zip(run(here, same), run(here, base), strict=True):
            answers = zip(one.answers, other.answers)
            equal = all(torch.equal(a.right, b.right) for a, b in answers)
            if not equal or abs(one.loss - other.loss) > NEAR * abs(other.loss):
                return f"with {settings} it is not {kind.title}, from round {one.number} on"
    return ""


def difference(one: list[Round], other: list[Round]) -> str:
    """Return in what two runs differ by more than rounding."""
    for a, b in zip(one, other, strict=True):
        for name, value in a.evaluated.items():
            said = far(value, b.evaluated[name], f"{name} after round {a.number}")
            if said:
                return said
    return ""


def far(one: Tensor, other: Tensor, what: str) -> str:
    """Return a sentence where two tensors differ by more than rounding."""
    if not one.numel():
        return ""
    largest = one.abs().max().clamp(min=1e-12)
    away = ((one - other).abs().max() / largest).item()
    return f"{what} differs by {away:.2g} of its largest number" if away > NEAR else ""


PROMISES: dict[str, Callable[[Setup], str]] = {
    "every declared tensor has a gradient": gradients,
    "exactly what is shared leaves a client": leaves,
    "clients in one batch learn what each learns alone": stacked,
    "the order of clients does not matter": client_order,
    "the order of experts does not matter": expert_order,
    "every tensor has a name that a file can hold": named,
    "two runs are equal": repeated,
    "its degenerate cases are the methods that it declares": degenerate,
}
