"""The one federated loop: select, train locally, aggregate, evaluate. Every method and every control goes through it.

Clients of a round train as one batch with the client axis in front: the loss is their sum, so each client's gradient is its own,
and SGD works element by element. Who has fewer steps in an epoch than others rests. No tensor that is trained is shared between
clients.
(`fpl.released` has rows whose clients train one after the other and leave each other things, as in the released code.)
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fpl import privacy
from fpl.methods import PromptFL
from fpl.state import Clients, Context, Server, Tensors, count_numbers, take

CHOICES = {
    "schedule": ("constant", "cosine", "zigzag"),
    "optimiser": ("fresh", "shared"),
    "precision": ("single", "bfloat16", "half"),
}


@dataclass(frozen=True)
class Training:
    """How clients train. The defaults are the paper's (pFedMoAP, section 4.1) and, where it is silent, its code's."""

    rounds: int = 10
    local_epochs: int = 5
    batch_size: int = 16
    lr: float = 0.002
    gate_lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "constant"  # or "cosine", over the local epochs; or "zigzag", the released code's (rate)
    optimiser: str = "fresh"  # for each client and round; or "shared" by all, like the released code's
    participation: float = 1.0
    init_seed: int = 0  # of what a method draws at the beginning; 0: the run's
    order_seed: int = 0  # of participants and of the order of images; 0: the run's
    precision: str = "single"  # or "bfloat16" or "half": of the text tower's matrix products, nothing else
    epsilon: float = 0.0  # of differential privacy of the uploads over all rounds (fpl.privacy); 0: none
    delta: float = 0.05  # pFedMoAP's
    clip: float = 0.4  # l2 norm of an update, ours: the median of PromptFL's and FedProx's on the demo, whose range is 0.2 to 0.8

    def __post_init__(self):
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is not known: use {', '.join(known)}")
        if not 0 < self.participation <= 1:
            raise ValueError(f"participation {self.participation} is not a fraction in (0, 1]")
        if min(self.rounds, self.local_epochs, self.batch_size) < 1:
            raise ValueError("rounds, local_epochs and batch_size must be at least 1")
        if not 0 <= self.epsilon <= privacy.LARGEST:
            raise ValueError(f"epsilon {self.epsilon} is not between 0 and {privacy.LARGEST:g}: use 0 for no privacy")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta {self.delta} is not in (0, 1): it is the probability that epsilon does not hold")
        if not 0 < self.clip < math.inf:
            raise ValueError(f"clip {self.clip} must be a number above 0: it is the largest norm of an update")

    def participants(self, n: int) -> int:
        """How many of n clients take part in a round."""
        return max(int(self.participation * n), 1)

    def rate(self, tensor: str, epoch: int, before: int = 0) -> float:
        """Learning rate of a tensor in local epoch `epoch` of a training, `before` local epochs having gone before it.

        "zigzag" is what the schedule of the released pFedMoAP and PromptFL comes to (D9): a cosine over the local epochs that
        goes on, up and down, through all clients and rounds of a shared optimiser; 1e-5 in the very first; not for the gate.
        """
        base = self.gate_lr if tensor.startswith("gate_") else self.lr
        if self.schedule == "constant" or (self.schedule == "zigzag" and tensor.startswith("gate_")):
            return base
        if self.schedule == "cosine":
            return base * (1 + math.cos(math.pi * epoch / self.local_epochs)) / 2
        at = before + epoch
        return base * (1 + math.cos(math.pi * (at - 1) / self.local_epochs)) / 2 if at else 1e-5




@dataclass
class Optimiser:
    """What SGD keeps from one training to the next where it is shared: velocities (one client's) and local epochs so far."""

    velocity: Tensors = field(default_factory=dict)
    epochs: int = 0




@dataclass(frozen=True)
class Seeds:
    """One number each for what the run itself draws; the seeds of split and shots are the partition's."""

    init: int = 1
    order: int = 1




@dataclass(frozen=True)
class Round:
    """`accuracy` in [0, 1] of every client after round `number` (0-based), `loss` the mean of the participants' last epochs.

    `up` and `down`: how many numbers each participant sent and received. `elsewhere`: accuracy of every client on other images,
    by name, after the last round only. `deployed` is what every client was evaluated with, `server` what the round left behind;
    what clients read in the next round follows from it (`download`, `frozen`).
    """

    number: int
    accuracy: Float[Tensor, " n"]
    participants: Int[Tensor, " picked"]
    loss: float
    up: Int[Tensor, " picked"]
    down: Int[Tensor, " picked"]
    correct: list[Tensor] = field(repr=False, default_factory=list)
    elsewhere: dict[str, Float[Tensor, " n"]] = field(default_factory=dict)
    deployed: Tensors = field(repr=False, default_factory=dict)
    server: Server | None = field(repr=False, default=None)




def generator(seed: int, stream: str, *key: int) -> torch.Generator:
    """A generator named by (seed, stream, numbers): what one client or method draws never depends on another's draws."""
    words = np.random.SeedSequence([seed, *stream.encode(), *key]).generate_state(2, np.uint64)
    return torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))




def select(n: int, run_rounds: Training, seed: int, number: int) -> Int[Tensor, " picked"]:
    """The clients of a round, as drawn, without replacement."""
    return torch.randperm(n, generator=generator(seed, "select", number))[: run_rounds.participants(n)]




def batches(
    index: Int[Tensor, " own"], run_rounds: Training, seed: int, number: int, client: int, stream: str = "order"
) -> Int[Tensor, "steps b"]:
    """Image numbers of each local step; the last incomplete batch of an epoch is dropped unless it is the only one."""
    gen, b = generator(seed, stream, number, client), min(run_rounds.batch_size, len(index))
    steps = len(index) // b
    epochs = [
        index[torch.randperm(len(index), generator=gen)[: steps * b].to(index.device)].view(steps, b)
        for _ in range(run_rounds.local_epochs)
    ]
    return torch.cat(epochs)




def train_locally(
    method: PromptFL,
    text,
    start: Tensors,
    frozen: Tensors,
    order: Sequence[Int[Tensor, "_steps b"]],
    clients: Clients,
    run_rounds: Training,
    tick: Callable[[int], object],
    shared: Optimiser | None = None,
    first: int = 0,
) -> tuple[Tensors, Float[Tensor, " n"]]:
    """SGD from a copy of `start`; what was learnt, and each client's mean loss in the last epoch.

    `order` has the image numbers of each client's steps, clients with more steps first: in the later steps of an epoch those
    that have any left go on. The optimiser is fresh, or goes on as `shared` left off, and leaves its state there. `first` is the
    number of the first local epoch since the beginning of the run.
    """
    if shared and len(order) > 1:
        raise ValueError("a shared optimiser is for clients that train one after the other: take a row of fpl.released, or fresh")
    shared = shared or Optimiser()
    leaves = {k: [own.clone().requires_grad_() for own in v] for k, v in start.items()}
    sgd = torch.optim.SGD([{"params": v} for v in leaves.values()], 0.0, run_rounds.momentum, weight_decay=run_rounds.weight_decay)
    for k in leaves.keys() & shared.velocity.keys():
        sgd.state[leaves[k][0]]["momentum_buffer"] = shared.velocity[k]
    steps = [len(own) // run_rounds.local_epochs for own in order]  # of an epoch
    for epoch in range(run_rounds.local_epochs):
        losses = torch.zeros(len(order), device=clients.feats.device)
        for k, group in zip(leaves, sgd.param_groups, strict=True):
            group["lr"] = run_rounds.rate(k, epoch, shared.epochs)
        for step in range(steps[0]):
            n = sum(own > step for own in steps)  # who has no gradient is left alone by SGD
            index = torch.stack([own[epoch * many + step] for own, many in zip(order[:n], steps[:n], strict=True)])
            x = clients.shown(method.inputs, index, first + epoch)
            params, reads = {k: torch.stack(v[:n]) for k, v in leaves.items()}, take(frozen, slice(n))
            loss = method.loss(text, params, reads, x, clients.labels[index])
            sgd.zero_grad()
            loss.sum().backward()
            sgd.step()
            losses[:n] += loss.detach()
            tick(1)
    shared.velocity = {k: sgd.state[v[0]]["momentum_buffer"] for k, v in leaves.items() if v[0] in sgd.state}
    shared.epochs += run_rounds.local_epochs
    return {k: torch.stack(v).detach() for k, v in leaves.items()}, losses / torch.tensor(steps, device=losses.device)




def train_cohort(
    method: PromptFL,
    text,
    clients: Clients,
    seed: int,
    number: int,
    tick: Callable[[int], object],
    who: Int[Tensor, " n"],
    begin: Tensors,
    frozen: Context,
    at: Int[Tensor, " n"],
    run_rounds: Training,
    stream: str,
    shared: Optimiser | None = None,
) -> tuple[Tensors, Float[Tensor, " n"]]:
    """What the clients `who` make of `begin` on their own images, and their losses.

    `who` and `begin` are of those who train; `frozen` is of their whole cohort, in which they are the rows `at`: it is indexed
    for one group of them at a time, since rows for all would be copies. `stream` names the order of the images.
    """
    ended, losses = {k: v.clone() for k, v in begin.items()}, torch.full((len(who),), torch.nan, device=clients.feats.device)
    for part, order in group_by_batch_size(who, clients, run_rounds, seed, number, stream, text.at_once) if begin else []:
        begins, reads, first = take(begin, part), take(frozen, at[part]), number * run_rounds.local_epochs
        trained, losses[part] = train_locally(method, text, begins, reads, order, clients, run_rounds, tick, shared, first)
        if not torch.isfinite(losses[part]).all():
            where = who[part][~torch.isfinite(losses[part])].tolist()
            raise FloatingPointError(f"the loss of clients {where} is not finite in round {number}: lower lr or gate_lr")
        for k, v in trained.items():
            ended[k][part] = v  # in place: a copy of everybody's for every group would grow with the square of the clients
    return ended, losses




def group_by_batch_size(
    who: Int[Tensor, " n"], clients: Clients, run_rounds: Training, seed: int, number: int, stream: str, most: int
) -> list[tuple[Tensor, list[Tensor]]]:
    """Clients in groups of at most `most` whose batches have one size: places in `who`, and the image numbers of each one's steps
    (steps, b), most steps first."""
    groups: dict[int, list[tuple[int, Tensor]]] = {}
    for at, i in enumerate(who.tolist()):
        order = batches(clients.train[i], run_rounds, seed, number, i, stream)
        groups.setdefault(order.shape[1], []).append((at, order))
    parts = []
    for group in groups.values():
        group.sort(key=lambda one: -len(one[1]))
        parts += [group[k : k + most] for k in range(0, len(group), most)]
    return [(torch.tensor([at for at, _ in part], device=who.device), [order for _, order in part]) for part in parts]




@torch.no_grad()
def evaluate(
    method: PromptFL, text, p: Tensors, frozen: Context, clients: Clients, who: list[int], rows: int = 512
) -> list[Tensor]:
    """For each client whether each of its test images is classified correctly; text features are computed once per client."""
    images, right = getattr(clients, method.inputs), []
    for first in range(0, len(who), text.at_once):  # all clients' text features at once would be too much
        encoded = method.encode(text, take(p, slice(first, first + text.at_once)))
        for n, i in enumerate(who[first : first + text.at_once]):
            one = slice(first + n, first + n + 1)
            t, p_i, f_i = None if encoded is None else encoded[n : n + 1], take(p, one), take(frozen, one)
            parts = [
                method.logits(text, t, p_i, f_i, images[part].unsqueeze(0))[0].argmax(-1) for part in clients.test[i].split(rows)
            ]
            right.append(torch.cat(parts) == clients.labels[clients.test[i]])
    return right




def mean_correct(correct: list[Tensor]) -> Float[Tensor, " n"]:
    return torch.stack([right.float().mean() for right in correct]).cpu()




def run_rounds(
    method: PromptFL,
    text,
    clients: Clients,
    cfg: Training,
    seeds: Seeds,
    tick: Callable[[int], object] = lambda n: None,
    elsewhere: Mapping[str, tuple[Any, Clients]] = {},
) -> Iterator[Round]:
    """Yield every round's result. What is evaluated is what each client would deploy, all clients included.

    After the last round this is evaluated `elsewhere` too: by name, a text and the same clients with other test images, labelled
    by the classes of that text. With another text than that of training, what clients read (experts and the like) is made again
    for it from the same download, and methods that are bound to the classes of training (`transfers`) are left out.

    A round's download and frozen tensors (experts and the like) are made once, from the server as the cohort found it, and used
    for training and evaluation. A method may train further what it deploys; this is evaluated and then forgotten, and its order
    of images is drawn apart. With an epsilon the server gets uploads as `privacy.release` makes them, each an update of its
    aggregate; a client keeps what it trained. Raises FloatingPointError when a loss is no longer finite, ValueError for settings
    that cannot be.
    """
    n, device = len(clients), clients.feats.device
    method.check(text, clients)
    if cfg.epsilon and (cfg.optimiser == "shared" or type(method).between is not PromptFL.between):
        left = "clients of this row leave each other things that are no uploads"
        raise ValueError(f"{left}, which epsilon {cfg.epsilon} would not cover: use epsilon 0, or another row")
    z = privacy.noise_multiplier(cfg.epsilon, cfg.delta, cfg.rounds) if cfg.epsilon and method.shared else 0.0
    init = {k: v.to(device) for k, v in method.init(text, generator(seeds.init, "init")).items()}
    own = {k: v.expand(n, *v.shape).clone() for k, v in init.items()}
    server = Server(
        {k: init[k] for k in method.shared},
        {k: torch.zeros_like(own[k]) for k in method.shared},
        torch.zeros(n, dtype=torch.bool, device=device),
        draw=partial(generator, seeds.order),
    )
    sizes = torch.tensor([len(index) for index in clients.train], device=device)
    shared = Optimiser() if cfg.optimiser == "shared" else None
    rounds = cfg.rounds if init else 1  # nothing to learn: one round says it all
    for number in range(rounds):
        drawn = select(n, cfg, seeds.order, number).to(device)
        server, picked = replace(server, round=number), drawn.sort().values
        cohorts, losses = [], torch.full((n,), torch.nan, device=device)
        frozen: Context = {}  # the last round's experts are let go
        up, down = (torch.zeros(n, dtype=torch.long) for _ in range(2))
        train = partial(train_cohort, method, text, clients, seeds.order, number, tick)
        for who in filter(len, method.cohorts(server, drawn)):
            received = method.download(server, who, clients)
            frozen = method.frozen(text, received, who, clients)
            cohorts.append((who, received, frozen))
            at = torch.isin(who, picked).nonzero()[:, 0]
            begin = take(method.start(take(own, who), received), at)
            ended, losses[who[at]] = train(who[at], begin, frozen, at, cfg, "order", shared)
            own = {k: v.index_copy(0, who[at], ended[k]) for k, v in own.items()}
            up[who.cpu()], down[who.cpu()] = count_numbers({k: own[k] for k in method.shared}), count_numbers(received)
            server = method.between(server, who[at], own)
        uploads = {k: own[k][picked] for k in method.shared}
        if z:
            gens = [generator(seeds.order, "noise", number, i) for i in picked.tolist()]
            uploads = privacy.release(uploads, server.params, cfg.clip, z, gens)
        server = method.aggregate(server, picked, uploads, sizes[picked])

        def tune(p: Tensors, epochs: int) -> Tensors:
            longer = replace(cfg, local_epochs=epochs)
            for who, _, frozen in cohorts:  # noqa: B023
                ended, _ = train(who, take(p, who), frozen, torch.arange(len(who), device=device), longer, "tune")  # noqa: B023
                p = {k: v.index_copy(0, who, ended[k]) for k, v in p.items()}
            return p

        deployed = method.deploy(server, own, tune)

        def tested(on: Any, images: Clients) -> list[Tensor]:
            correct = [torch.empty(0)] * n
            for who, received, frozen in cohorts:  # noqa: B023
                reads = frozen if on is text else method.frozen(on, received, who, images)
                found = evaluate(method, on, take(deployed, who), reads, images, who.tolist())  # noqa: B023
                for i, right in zip(who.tolist(), found, strict=True):
                    correct[i] = right
            return correct

        correct, who = tested(text, clients), picked.cpu()
        places = {k: place for k, place in elsewhere.items() if method.transfers or place[0] is text}
        away = {k: mean_correct(tested(*place)) for k, place in places.items()} if number == rounds - 1 else {}
        yield Round(
            number, mean_correct(correct), who, losses.nanmean().item(), up[who], down[who], correct, away, deployed, server
        )


