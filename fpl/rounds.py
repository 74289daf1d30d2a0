"""The one federated loop: select, train locally, aggregate, evaluate.

Every method and every control goes through it. Clients of a round train as one batch with the
client axis in front: the loss is their sum, so each client's gradient is its own. Who has fewer
steps in an epoch than others rests. In rows of `fpl.released` clients leave each other things.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass as checked_dataclass
from torch import Tensor

from fpl import privacy
from fpl.methods import PromptFL
from fpl.prompts import Precision, PromptTree
from fpl.state import (
    Clients,
    Context,
    Ids,
    PerClient,
    Server,
    Tensors,
    count_numbers,
    generator,
    normals,
    take,
)

TEST_ROWS = 512  # images that are classified at once
Elsewhere = Mapping[str, tuple[PromptTree, Clients]]  # clients with other test images, by name


@checked_dataclass(frozen=True)
class Training:
    """How clients train. The defaults are the paper's (pFedMoAP, section 4.1), or its code's.

    schedule: of the learning rate over the local epochs, see `rate`. optimiser: "fresh" for each
    client and round, or "shared" by all, as in the released code. participation: the fraction of
    clients that train in a round. init_seed: of what a method draws at the beginning; order_seed:
    of participants and of the order of images; 0 stands for the run's seed. precision: of the text
    tower's matrix products. epsilon, delta: differential privacy of the uploads over all rounds
    (fpl.privacy); epsilon 0 is none, delta is pFedMoAP's. clip: the l2 norm of an update, ours.
    mechanism: "clipping" clips the updates at epsilon 0 and adds nothing.
    """

    rounds: PositiveInt = 10
    local_epochs: PositiveInt = 5
    batch_size: PositiveInt = 16
    lr: NonNegativeFloat = 0.002
    gate_lr: NonNegativeFloat = 0.01
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: NonNegativeFloat = 5e-4
    schedule: Literal["constant", "cosine", "zigzag"] = "constant"
    optimiser: Literal["fresh", "shared"] = "fresh"
    participation: Annotated[float, Field(gt=0, le=1)] = 1.0
    init_seed: NonNegativeInt = 0
    order_seed: NonNegativeInt = 0
    precision: Precision = "single"
    epsilon: Annotated[float, Field(ge=0, le=privacy.LARGEST)] = 0.0
    delta: Annotated[float, Field(gt=0, lt=1)] = 0.05
    clip: PositiveFloat = 0.4
    mechanism: Literal["gaussian", "clipping"] = "gaussian"

    def participants(self, n: int) -> int:
        """Return how many of n clients take part in a round."""
        return max(int(self.participation * n), 1)

    def rate(self, group: str, epoch: int, before: int = 0) -> float:
        """Return the learning rate of a group, "prompt" or "gate", in a local epoch of a round.

        before: local epochs that the optimiser has seen already. "zigzag" is what the schedule of
        the released pFedMoAP and PromptFL comes to (D9): a cosine that goes on, up and down,
        through all clients and rounds; 1e-5 in the very first epoch; not for the gate.
        """
        base = self.gate_lr if group == "gate" else self.lr
        if self.schedule == "cosine":
            return base * (1 + math.cos(math.pi * epoch / self.local_epochs)) / 2
        if self.schedule == "constant" or group == "gate":
            return base
        if before + epoch == 0:
            return 1e-5
        return base * (1 + math.cos(math.pi * (before + epoch - 1) / self.local_epochs)) / 2


@dataclass(frozen=True)
class Seeds:
    """The seeds of what the run itself draws; those of split and shots are the partition's."""

    init: int = 1
    order: int = 1


@dataclass(frozen=True)
class Setup:
    """What stays the same during a run."""

    method: PromptFL
    text: PromptTree
    clients: Clients
    training: Training
    seeds: Seeds = Seeds()


@dataclass
class Optimiser:
    """What SGD keeps from one training to the next: velocities, and local epochs so far."""

    velocity: Tensors = field(default_factory=dict)
    epochs: int = 0


@dataclass(frozen=True)
class State:
    """Where a run stands between two rounds; what comes next follows from it.

    local: everybody's tensors. optimiser: where one is shared, else None.
    """

    local: Tensors
    server: Server
    optimiser: Optimiser | None = None


@dataclass(frozen=True)
class Cohort:
    """Clients that are treated alike in a round: what they received and what they read."""

    client_ids: Ids
    received: Tensors
    context: Context
    positions: Int[Tensor, " trained"]  # where in client_ids those stand who train


class Answers(NamedTuple):
    """What a client says of its test images, with its share in the softmax, and if it is right."""

    predicted: Int[Tensor, " images"]
    confidence: Float[Tensor, " images"]
    right: Bool[Tensor, " images"]


@dataclass(frozen=True)
class Round:
    """What a round gave.

    number: from 0. participants: who trained. loss: the mean of their last epochs. up, down: how
    many numbers each of them sent and received. answers: every client's, on its test images.
    evaluated: the tensors that gave them. state: what the round left behind. After the last round
    only, elsewhere: accuracy of every client on other images, by name; cohorts: what clients have
    received and read.
    """

    number: int
    participants: Int[Tensor, " picked"]
    loss: float
    up: Int[Tensor, " picked"]
    down: Int[Tensor, " picked"]
    answers: list[Answers] = field(repr=False)
    evaluated: Tensors = field(repr=False)
    state: State = field(repr=False)
    elsewhere: dict[str, PerClient] = field(default_factory=dict)
    cohorts: list[Cohort] = field(repr=False, default_factory=list)

    @property
    def accuracy(self) -> PerClient:
        """Of every client, in [0, 1]."""
        return mean_right(self.answers)


def run_rounds(
    setup: Setup, elsewhere: Elsewhere | None = None, begin: State | None = None
) -> Iterator[Round]:
    """Yield the result of every round, or of those that come after `begin`.

    What is evaluated is what each client would use, all clients included. After the last round this
    is evaluated `elsewhere` too: by name, a text and the same clients with other test images,
    labelled by the classes of that text. With another text than that of training, what clients read
    (experts and the like) is made again for it from the same download, and methods that are bound
    to the classes of training (`transfers`) are left out.

    A round's downloads and contexts are made once, from the server as the cohort found it, and used
    for training and evaluation. What a method trains further to be evaluated with is forgotten.

    Raises FloatingPointError for a loss or logits that are not finite, ValueError for bad settings.
    """
    method, text, clients, training = setup.method, setup.text, setup.clients, setup.training
    method.check(text, clients)
    setup = replace(setup, clients=method.clients(clients))
    noise = noise_of(method, training)
    state = begin or begin_run(setup)
    places = (elsewhere or {}).items()
    elsewhere = {k: place for k, place in places if method.transfers or place[0] is text}
    rounds = training.rounds if state.local else 1  # nothing to learn: one round says it all
    for number in range(begin.server.round + 1 if begin else 0, rounds):
        drawn = select(clients, training, setup.seeds.order, number).to(clients.feats.device)
        server = state.server.begin(number, drawn)
        trained = train_round(setup, replace(state, server=server), drawn)
        local, cohorts = trained.local, trained.cohorts
        picked = drawn.sort().values
        server = aggregate(setup, trained.server, local, picked, noise)
        state = State(local, server, trained.optimiser)
        evaluated = method.evaluated(server, local, partial(fine_tune, setup, cohorts, number))
        test = partial(evaluate_cohorts, setup, cohorts, evaluated)
        who = picked.cpu()
        loss = trained.losses.nanmean().item()
        sent = trained.up[who], trained.down[who]
        found = Round(number, who, loss, *sent, test(text, clients), evaluated, state)
        if number == rounds - 1:
            away = {name: mean_right(test(*place)) for name, place in elsewhere.items()}
            found = replace(found, elsewhere=away, cohorts=cohorts)
        del trained, cohorts, test  # the round's experts are let go before the next are made
        yield found


def noise_of(method: PromptFL, training: Training) -> float:
    """Return the noise multiplier that the run's privacy asks for; 0 for no noise.

    Raises ValueError for a method whose clients have of each other what is no upload.
    """
    if not training.epsilon and training.mechanism != "clipping":
        return 0.0
    ways = {type(method).after_cohort, type(method).clients}
    share_more = ways != {PromptFL.after_cohort, PromptFL.clients} or method.in_step
    if training.optimiser == "shared" or share_more:
        left = "clients of this row have things of each other that are no uploads"
        raise ValueError(f"{left}: use epsilon 0 and mechanism gaussian, or another row")
    if not training.epsilon or not method.shared:
        return 0.0
    return privacy.noise_multiplier(training.epsilon, training.delta, training.rounds)


def begin_run(setup: Setup) -> State:
    """Return what there is before the first round; all clients have the same tensors."""
    n = len(setup.clients)
    device = setup.clients.feats.device
    drawn = setup.method.init(setup.text, generator(setup.seeds.init, "init"))
    init = {name: value.to(device) for name, value in drawn.items()}
    local = {name: value.expand(n, *value.shape).clone() for name, value in init.items()}
    nobody = torch.zeros(n, dtype=torch.bool, device=device)
    server = Server(
        params={name: init[name] for name in setup.method.shared},
        uploads={name: torch.zeros_like(local[name]) for name in setup.method.shared},
        has_upload=nobody,
        returned=nobody,
        draw=partial(generator, setup.seeds.order),
    )
    return State(local, server, Optimiser() if setup.training.optimiser == "shared" else None)


def select(clients: Clients, training: Training, seed: int, number: int) -> Int[Tensor, " picked"]:
    """Return the clients of a round in the order in which they are drawn, without replacement."""
    if clients.turns:
        return clients.turns[number]
    order = torch.randperm(len(clients), generator=generator(seed, "select", number))
    return order[: training.participants(len(clients))]


@dataclass
class Trained:
    """A round after local training."""

    local: Tensors
    server: Server
    optimiser: Optimiser | None
    cohorts: list[Cohort]
    losses: PerClient  # nan for clients that did not train
    up: Ids  # numbers sent
    down: Ids


def train_round(setup: Setup, state: State, drawn: Int[Tensor, " picked"]) -> Trained:
    """Let the clients that were drawn train on their own images, one cohort after the other."""
    method = setup.method
    n = len(setup.clients)
    losses = torch.full((n,), torch.nan, device=drawn.device)
    up = torch.zeros(n, dtype=torch.long)
    down = torch.zeros(n, dtype=torch.long)
    number = state.server.round
    optimiser = copy.deepcopy(state.optimiser)  # a state stays as it is
    made = Trained(state.local, state.server, optimiser, [], losses, up, down)
    times = len(batches(setup, int(drawn[0]), number)) if method.in_step else 1
    for client_ids in filter(len, method.cohorts(state.server, drawn)):
        received = method.download(made.server, client_ids, setup.clients)
        context = method.context(setup.text, received, client_ids, setup.clients)
        positions = torch.isin(client_ids, drawn).nonzero()[:, 0]
        if optimiser and len(positions) > 1:
            only = "a shared optimiser is for rows of fpl.released"
            raise ValueError(f"{only}, whose clients train one after the other: take fresh")
        cohort = Cohort(client_ids, received, context, positions)
        made.cohorts.append(cohort)
        start = method.start(take(made.local, client_ids), received)
        ended, losses[client_ids[positions]] = train_cohort(
            setup, cohort, take(start, positions), number, optimiser=optimiser
        )
        trained_ids = client_ids[positions]
        made.local = {k: v.index_copy(0, trained_ids, ended[k]) for k, v in made.local.items()}
        sent = {name: made.local[name] for name in method.shared}
        up[client_ids.cpu()] = times * count_numbers(sent)
        down[client_ids.cpu()] = times * count_numbers(received)
        made.server = method.after_cohort(made.server, trained_ids, made.local)
    return made


def train_cohort(
    setup: Setup,
    cohort: Cohort,
    begin: Tensors,
    number: int,
    stream: str = "order",
    optimiser: Optimiser | None = None,
) -> tuple[Tensors, PerClient]:
    """Return what the cohort's clients that train make of `begin`, which is theirs; their losses.

    number: of the round. stream: names the order of the images.
    """
    client_ids = cohort.client_ids[cohort.positions]
    ended = {name: value.clone() for name, value in begin.items()}
    losses = torch.full((len(client_ids),), torch.nan, device=client_ids.device)
    if not begin:
        return ended, losses
    first = number * setup.training.local_epochs
    for part, order in group_by_batch_size(setup, client_ids, number, stream):
        context = take(cohort.context, cohort.positions[part])
        trained, loss = train_locally(setup, take(begin, part), context, order, optimiser, first)
        losses[part] = loss
        lost = client_ids[part][~torch.isfinite(loss)]
        if len(lost):
            found = f"the loss of clients {lost.tolist()} is not finite in round {number}"
            raise FloatingPointError(f"{found}: lower lr or gate_lr")
        # in place: a copy of everybody's for every group would grow with the square of the clients
        for name, value in trained.items():
            ended[name][part] = value
    return ended, losses


def group_by_batch_size(
    setup: Setup, client_ids: Ids, number: int, stream: str
) -> list[tuple[Int[Tensor, " part"], dict[int, Tensor]]]:
    """Return groups that train at once, most steps first: positions in client_ids, batches."""
    groups: dict[int, list[tuple[int, int, Tensor]]] = {}
    for position, i in enumerate(client_ids.tolist()):
        order = batches(setup, i, number, stream)
        groups.setdefault(order.shape[1], []).append((position, i, order))
    parts = []
    for group in groups.values():
        group.sort(key=lambda entry: -len(entry[2]))
        size = len(group) if setup.method.in_step else setup.text.at_once
        for start in range(0, len(group), size):
            positions, ids, orders = zip(*group[start : start + size], strict=True)
            part = torch.tensor(positions, device=client_ids.device)
            parts.append((part, dict(zip(ids, orders, strict=True))))
    return parts


def batches(
    setup: Setup, client: int, number: int, stream: str = "order"
) -> Int[Tensor, "steps b"]:
    """Return the image numbers of each local step of a client in a round.

    The last incomplete batch of an epoch is dropped unless it is the only one.
    """
    index = setup.clients.train[client]
    gen = generator(setup.seeds.order, stream, number, client)
    b = min(setup.training.batch_size, len(index))
    steps = len(index) // b
    epochs = []
    for _ in range(setup.training.local_epochs):
        order = torch.randperm(len(index), generator=gen)[: steps * b]
        epochs.append(index[order.to(index.device)].view(steps, b))
    return torch.cat(epochs)


def train_locally(
    setup: Setup,
    begin: Tensors,
    context: Tensors,
    order: Mapping[int, Int[Tensor, "_steps b"]],
    optimiser: Optimiser | None = None,
    first: int = 0,
) -> tuple[Tensors, PerClient]:
    """Train clients at once from a copy of `begin`; return tensors and last mean losses.

    order: the image numbers of each client's steps, clients with more steps first. optimiser: goes
    on as it was left; without one, it is fresh. first: of the local epochs, since the run began.
    """
    kept = optimiser or Optimiser()
    method, training = setup.method, setup.training
    ids, orders = zip(*order.items(), strict=True)
    leaves = {name: [*value.clone()] for name, value in begin.items()}
    groups = [{"name": name, "params": own} for name, own in leaves.items()]
    stepper = method.optimiser(groups, training.momentum, training.weight_decay)
    for name in leaves.keys() & kept.velocity.keys():
        stepper.state[leaves[name][0]]["momentum_buffer"] = kept.velocity[name]
    steps = [len(own) // training.local_epochs for own in orders]  # of an epoch
    for epoch in range(training.local_epochs):
        losses = torch.zeros(len(ids), device=setup.clients.feats.device)
        for group in stepper.param_groups:
            group["lr"] = training.rate(method.rate_group(group["name"]), epoch, kept.epochs)
        for step in range(steps[0]):
            n = sum(own > step for own in steps)  # who has no gradient is left alone
            at = [own[epoch * many + step] for own, many in zip(orders[:n], steps[:n], strict=True)]
            index = torch.stack(at)
            x = setup.clients.training_inputs(method.inputs, index, first + epoch)
            p = {k: torch.stack(own[:n]).requires_grad_() for k, own in leaves.items()}
            draw = partial(normals, x, setup.seeds.order, ids[:n], (first + epoch, step))
            seen = take(context, slice(n)), x, setup.clients.labels[index]
            loss, found = method.gradients(setup.text, p, *seen, draw)
            stepper.zero_grad()
            for name, gradient in found.items():
                for own, grad in zip(leaves[name], gradient, strict=False):
                    own.grad = grad
            stepper.step()
            losses[:n] += loss.detach()
    for name, own in leaves.items():
        if optimiser and own[0] in stepper.state:
            kept.velocity[name] = stepper.state[own[0]]["momentum_buffer"]
    kept.epochs += training.local_epochs
    ended = {name: torch.stack(own) for name, own in leaves.items()}
    return ended, losses / torch.tensor(steps, device=losses.device)


def fine_tune(
    setup: Setup, cohorts: Sequence[Cohort], number: int, p: Tensors, epochs: int
) -> Tensors:
    """Return everybody's tensors, trained further on each client's own images."""
    longer = replace(setup, training=replace(setup.training, local_epochs=epochs))
    for cohort in cohorts:
        everybody = torch.arange(len(cohort.client_ids), device=cohort.client_ids.device)
        whole = replace(cohort, positions=everybody)
        ended, _ = train_cohort(longer, whole, take(p, cohort.client_ids), number, "tune")
        p = {k: v.index_copy(0, cohort.client_ids, ended[k]) for k, v in p.items()}
    return p


def aggregate(
    setup: Setup, server: Server, local: Tensors, picked: Int[Tensor, " picked"], noise: float
) -> Server:
    """Send the participants' shared tensors, with noise where it is asked for, to the server."""
    uploads = {name: local[name][picked] for name in setup.method.shared}
    if uploads and (noise or setup.training.mechanism == "clipping"):
        gens = [generator(setup.seeds.order, "noise", server.round, i) for i in picked.tolist()]
        uploads = privacy.release(uploads, server.params, setup.training.clip, noise, gens)
    sizes = torch.tensor([len(index) for index in setup.clients.train], device=picked.device)
    return setup.method.aggregate(server, picked, uploads, sizes[picked])


def evaluate_cohorts(
    setup: Setup, cohorts: Sequence[Cohort], p: Tensors, text: PromptTree, clients: Clients
) -> list[Answers]:
    """Return every client's answers on its test images."""
    answers: dict[int, Answers] = {}
    for cohort in cohorts:
        ids = cohort.client_ids
        context = cohort.context
        if text is not setup.text:
            context = setup.method.context(text, cohort.received, ids, clients)
        found = evaluate(setup.method, text, take(p, ids), context, clients, ids)
        answers |= zip(ids.tolist(), found, strict=True)
    return [answers[i] for i in range(len(clients))]


@torch.no_grad()
def evaluate(
    method: PromptFL, text: PromptTree, p: Tensors, context: Context, clients: Clients, ids: Ids
) -> list[Answers]:
    """Return the answers of these clients on their test images; p, context: theirs."""
    images = getattr(clients, method.inputs)
    answers = []
    for first in range(0, len(ids), text.at_once):  # all text features would be too much
        chunk = slice(first, first + text.at_once)
        p_chunk = take(p, chunk)
        reads = take(context, chunk)
        encoded = method.encode(text, p_chunk, reads)
        for n, i in enumerate(ids[chunk].tolist()):
            one = slice(n, n + 1)
            t = None if encoded is None else encoded[one]
            classify = partial(method.logits, text, t, take(p_chunk, one), take(reads, one))
            parts = clients.test[i].split(TEST_ROWS)
            z = torch.cat([classify(images[part].unsqueeze(0))[0] for part in parts])
            if z.isnan().any():
                raise FloatingPointError(f"client {i} has logits that are no numbers: lower lr")
            right = z.argmax(-1) == clients.labels[clients.test[i]]
            answers.append(Answers(z.argmax(-1), z.softmax(-1).amax(-1), right))
    return answers


def mean_right(answers: Sequence[Answers]) -> PerClient:
    """Return each client's accuracy."""
    return torch.stack([found.right.float().mean() for found in answers]).cpu()
