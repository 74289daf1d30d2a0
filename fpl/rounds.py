"""The one federated loop: select, train locally, aggregate, evaluate. Every method and every control goes through it.

Clients of a round that take the same number of steps train as one batch with the client axis in front: the loss is their sum,
so each client's gradient is its own, and SGD works element by element. No tensor that is trained is shared between clients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fpl.methods import Params, PromptFL, Server


@dataclass(frozen=True)
class Clients:
    """Cached image features (all images, d), labels, and which images each client trains on and is tested on."""

    feats: Float[Tensor, "images d"]
    labels: Int[Tensor, " images"]
    train: Sequence[Int[Tensor, " _own"]]
    test: Sequence[Int[Tensor, " _own"]]
    n_cls: int

    def __post_init__(self):
        for i, (train, test) in enumerate(zip(self.train, self.test, strict=True)):
            for kind, index in (("training", train), ("test", test)):
                if not len(index):
                    who = f"client {i} of {len(self.train)}"
                    raise ValueError(f"{who} has no {kind} images: use fewer clients, more shots or another partition")
        if not torch.isfinite(self.feats).all():
            bad = (~torch.isfinite(self.feats)).any(1).nonzero()[:, 0]
            found = f"features of {len(bad)} images are not finite, the first is image {bad[0]}"
            raise ValueError(f"{found}: extract them again with `fpl features`")

    def __len__(self) -> int:
        return len(self.train)

    def training(self, i: int) -> tuple[Float[Tensor, "own d"], Int[Tensor, " own"]]:
        return self.feats[self.train[i]], self.labels[self.train[i]]

    def counts(self, i: int) -> Int[Tensor, " c"]:
        """Training images of client i by class."""
        return torch.bincount(self.labels[self.train[i]], minlength=self.n_cls)


@dataclass(frozen=True)
class Run:
    """How clients train. The defaults are the paper's (pFedMoAP, section 4.1) and, where it is silent, its code's."""

    rounds: int = 10
    local_epochs: int = 5
    batch_size: int = 16
    lr: float = 0.002
    gate_lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "constant"  # or "cosine", over the local epochs
    participation: float = 1.0

    def __post_init__(self):
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"schedule {self.schedule!r} is not known: use constant or cosine")
        if not 0 < self.participation <= 1:
            raise ValueError(f"participation {self.participation} is not a fraction in (0, 1]")
        if min(self.rounds, self.local_epochs, self.batch_size) < 1:
            raise ValueError("rounds, local_epochs and batch_size must be at least 1")


@dataclass(frozen=True)
class Seeds:
    """One number each for what the run itself draws; the seeds of split and shots are the partition's."""

    init: int = 1
    order: int = 1


@dataclass(frozen=True)
class Round:
    """`accuracy` in [0, 1] of every client after round `number` (0-based), `loss` the mean of the participants' last epochs."""

    number: int
    accuracy: Float[Tensor, " n"]
    participants: Int[Tensor, " picked"]
    loss: float
    correct: list[Tensor] = field(repr=False, default_factory=list)


def generator(seed: int, stream: str, *key: int) -> torch.Generator:
    """A generator named by (seed, stream, numbers): what one client or method draws never depends on another's draws."""
    words = np.random.SeedSequence([seed, *stream.encode(), *key]).generate_state(2, np.uint64)
    return torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))


def select(n: int, participation: float, seed: int, number: int) -> Int[Tensor, " picked"]:
    """The clients of a round, in increasing order: max(int(r n), 1) of them without replacement."""
    return torch.randperm(n, generator=generator(seed, "select", number))[: max(int(participation * n), 1)].sort().values


def batches(
    index: Int[Tensor, " own"], run: Run, seed: int, number: int, client: int, stream: str = "order"
) -> Int[Tensor, "steps b"]:
    """Image numbers of each local step; the last incomplete batch of an epoch is dropped unless it is the only one."""
    gen, b = generator(seed, stream, number, client), min(run.batch_size, len(index))
    steps = len(index) // b
    epochs = [
        index[torch.randperm(len(index), generator=gen)[: steps * b].to(index.device)].view(steps, b)
        for _ in range(run.local_epochs)
    ]
    return torch.cat(epochs)


def train_locally(
    method: PromptFL,
    text,
    start: Params,
    frozen: Params,
    order: Int[Tensor, "n steps b"],
    clients: Clients,
    run: Run,
    tick: Callable[[int], object],
) -> tuple[Params, Float[Tensor, " n"]]:
    """SGD from a copy of `start` with a fresh optimiser; what was learnt, and each client's mean loss in the last epoch."""
    params = {k: v.clone().requires_grad_() for k, v in start.items()}
    rate = {k: run.gate_lr if k.startswith("gate_") else run.lr for k in params}
    sgd = torch.optim.SGD(
        [{"params": [v], "lr": rate[k]} for k, v in params.items()], momentum=run.momentum, weight_decay=run.weight_decay
    )
    per_epoch, losses = order.shape[1] // run.local_epochs, []
    for step, index in enumerate(order.unbind(1)):
        if run.schedule == "cosine":
            share = (1 + math.cos(math.pi * (step // per_epoch) / run.local_epochs)) / 2
            for group, base in zip(sgd.param_groups, rate.values(), strict=True):
                group["lr"] = base * share
        loss = method.loss(text, params, frozen, clients.feats[index], clients.labels[index])
        sgd.zero_grad()
        loss.sum().backward()
        sgd.step()
        losses.append(loss.detach())
        tick(1)
    return {k: v.detach() for k, v in params.items()}, torch.stack(losses[-per_epoch:]).mean(0)


def train_cohorts(
    method: PromptFL,
    text,
    cohorts: list[tuple[Tensor, Params]],
    clients: Clients,
    run: Run,
    seed: int,
    number: int,
    tick: Callable[[int], object],
    who: Int[Tensor, " picked"],
    stream: str,
    begin: Params,
    epochs: int,
) -> tuple[Params, Float[Tensor, " n"]]:
    """Everybody's tensors after the clients `who` trained from `begin`, and their losses (nan for the others).

    `cohorts` are clients with the frozen tensors that they read; `stream` names the generator of the order of images.
    """
    run, ended = replace(run, local_epochs=epochs), begin
    losses = torch.full((len(clients),), torch.nan, device=clients.feats.device)
    for cohort, frozen in cohorts if begin else []:
        for group, order in same_shape(cohort, who, clients, run, seed, number, stream):
            here = torch.isin(cohort, group)
            trained, loss = train_locally(
                method,
                text,
                {k: v[group] for k, v in begin.items()},
                {k: v[here] for k, v in frozen.items()},
                order,
                clients,
                run,
                tick,
            )
            if not torch.isfinite(loss).all():
                where = group[~torch.isfinite(loss)].tolist()
                raise FloatingPointError(f"the loss of clients {where} is not finite in round {number}: lower lr or gate_lr")
            ended = {k: v.index_copy(0, group, trained[k]) for k, v in ended.items()}
            losses[group] = loss
    return ended, losses


@torch.no_grad()
def evaluate(
    method: PromptFL, text, p: Params, frozen: Params, clients: Clients, who: list[int], rows: int = 512
) -> list[Tensor]:
    """For each client whether each of its test images is classified correctly; text features are computed once per client."""
    t, right = method.encode(text, p), []
    for n, i in enumerate(who):
        mine = lambda tensors: {k: v[n : n + 1] for k, v in tensors.items()}  # noqa: B023, E731
        t_i, p_i, f_i = None if t is None else t[n : n + 1], mine(p), mine(frozen)
        parts = [
            method.logits(text, t_i, p_i, f_i, clients.feats[part].unsqueeze(0))[0].argmax(-1)
            for part in clients.test[i].split(rows)
        ]
        right.append(torch.cat(parts) == clients.labels[clients.test[i]])
    return right


def run(
    method: PromptFL, text, clients: Clients, cfg: Run, seeds: Seeds, tick: Callable[[int], object] = lambda n: None
) -> Iterator[Round]:
    """Yield every round's result. What is evaluated is what each client would deploy, all clients included.

    A method may train further what it deploys; this is evaluated and then forgotten, and its order of images is drawn apart.

    A round's frozen tensors (experts and the like) are made once, from the server as the round found it, and used for
    training and evaluation. Raises FloatingPointError when a loss is no longer finite, ValueError for settings that cannot be.
    """
    n, device = len(clients), clients.feats.device
    method.check(text, clients)
    init = {k: v.to(device) for k, v in method.init(text, generator(seeds.init, "init")).items()}
    own = {k: v.expand(n, *v.shape).clone() for k, v in init.items()}
    server = Server(
        {k: init[k] for k in method.shared},
        {k: torch.zeros_like(own[k]) for k in method.shared},
        torch.zeros(n, dtype=torch.bool, device=device),
    )
    sizes = torch.tensor([len(index) for index in clients.train], device=device)
    for number in range(cfg.rounds if init else 1):  # nothing to learn: one round says it all
        picked = select(n, cfg.participation, seeds.order, number).to(device)
        cohorts = [(who, method.frozen(text, server, who, clients)) for who in method.cohorts(server) if len(who)]
        train = partial(train_cohorts, method, text, cohorts, clients, cfg, seeds.order, number, tick)
        ended, losses = train(picked, "order", method.start(server, own), cfg.local_epochs)
        own = {k: v.index_copy(0, picked, ended[k][picked]) for k, v in own.items()}
        server = method.aggregate(server, picked, {k: own[k][picked] for k in method.shared}, sizes[picked])
        deployed = method.deploy(server, own, partial(train, torch.arange(n, device=device), "tune"))
        correct = [torch.empty(0)] * n
        for who, frozen in cohorts:
            for i, right in zip(
                who.tolist(),
                evaluate(method, text, {k: v[who] for k, v in deployed.items()}, frozen, clients, who.tolist()),
                strict=True,
            ):
                correct[i] = right
        accuracy = torch.stack([right.float().mean() for right in correct]).cpu()
        yield Round(number, accuracy, picked.cpu(), losses.nanmean().item(), correct)


def same_shape(
    who: Tensor, picked: Tensor, clients: Clients, run: Run, seed: int, number: int, stream: str
) -> list[tuple[Tensor, Tensor]]:
    """The selected clients of a cohort in groups whose local steps have one shape, with their image numbers (n, steps, b)."""
    groups: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
    for i in who[torch.isin(who, picked)].tolist():
        order = batches(clients.train[i], run, seed, number, i, stream)
        groups.setdefault(tuple(order.shape), []).append((i, order))
    return [(torch.tensor([i for i, _ in g], device=who.device), torch.stack([order for _, order in g])) for g in groups.values()]
