"""Whole runs of a method on the tiny CLIP, and what happened in them."""

import dataclasses
from types import SimpleNamespace

import torch

from fpl import rounds
from fpl.experiments.settings import ROWS
from fpl.methods import METHODS
from fpl.rounds import Seeds, Setup, Training
from fpl.state import take
from helpers import PARAMS
from helpers.tiny import error, make

# Methods that train something.
LEARNING = {
    name: kind
    for name, kind in METHODS.items()
    if make(kind).init(SimpleNamespace(width=8), torch.Generator())
}
RUN = Training(rounds=3, local_epochs=2, batch_size=4, lr=0.02, gate_lr=0.05)
HALF = dataclasses.replace(RUN, participation=0.5)
SEEDS = Seeds(init=3, order=4)


# Settings that fit the tiny CLIP and the small world.
SIZES = {"n_ctx": 2, "n_base": 1, "n_experts": 2, "d_gate": 16, "heads": 4, "rank": 1}


def small(row, seed=1, **changes):
    """Return an experiment in the small world; what the row itself fixes stays as it is."""
    kind = ROWS[row]
    wanted = {name: n for name, n in SIZES.items() if name in kind.__dataclass_fields__}
    if row == "pfedmoap_oneword":
        wanted["n_ctx"] = 1
    own = {name: value for name, value in changes.items() if name not in kind.training}
    return PARAMS.experiment(row, seed, **wanted | own)


def like(kind, method):
    """Return a method of another class with the settings of this one."""
    return kind(**{f.name: getattr(method, f.name) for f in dataclasses.fields(method)})


def watch(method):
    """Return the same method and a log.

    batches and logits as called; those of training for evaluation are `tuned`. Then per round who
    took part, the uploads, the servers, everybody's local tensors and those that were evaluated.
    """
    log = SimpleNamespace(batches=[], logits=[], tuned=[], tuning=False)
    log.who = []
    log.uploads = []
    log.servers = []
    log.local = []
    log.evaluated = []

    class Watched(type(method)):
        def loss(self, text, p, context, x, y):
            value = super().loss(text, p, context, x, y)
            number = len(log.servers) - log.tuning
            (log.tuned if log.tuning else log.batches).append((number, x, y, value))
            return value

        def logits(self, text, t, p, context, x):
            if not log.tuning:
                own = {k: v.detach().clone() for k, v in p.items()}
                grad = torch.is_grad_enabled()
                log.logits.append((grad, len(log.servers), own, t, context, x))
            return super().logits(text, t, p, context, x)

        def aggregate(self, server, client_ids, uploads, sizes):
            log.who.append(client_ids.tolist())
            log.uploads.append({k: v.clone() for k, v in uploads.items()})
            log.servers.append(super().aggregate(server, client_ids, uploads, sizes))
            return log.servers[-1]

        def evaluated(self, server, local, tune):
            log.local.append(local)
            log.tuning = True
            log.evaluated.append(super().evaluated(server, local, tune))
            log.tuning = False
            return log.evaluated[-1]

    return like(Watched, method), log


def play(method, text, clients, training=RUN, seeds=SEEDS):
    """Return the log of a whole run; `rounds` are its results."""
    watched, log = watch(method)
    log.rounds = list(rounds.run_rounds(Setup(watched, text, clients, training, seeds)))
    return log


def rights(r):
    """Return for each client whether each of its test images is right after a round."""
    return [found.right for found in r.answers]


def equal(a, b):
    """Say whether two dicts of tensors are the same to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def near(a, b):
    """Say whether two dicts of tensors are the same up to rounding over some steps."""
    return a.keys() == b.keys() and all(error(a[k], b[k]) < 1e-4 for k in a)


def always(same, a, b):
    """Say whether it is so in every round."""
    return len(a) == len(b) and all(map(same, a, b))


def read(method, text, server, client_ids, clients):
    """Return what these clients may read, by way of what they download."""
    down = method.download(server, client_ids, clients)
    return take(method.context(text, down, client_ids, clients), slice(None))


def images(clients, x):
    """Return image numbers of features (n, b, d), or of patches (n, b, M, d); all differ."""
    stored = clients.feats
    if x.ndim == 4:
        x = x[..., 0, :]
        stored = clients.patches[:, 0]
    return (x.unsqueeze(-2) == stored).all(-1).int().argmax(-1)


def owners(clients):
    """Return the client of each image number; no image has two."""
    found = {}
    for parts in (clients.train, clients.test):
        for i, part in enumerate(parts):
            found |= dict.fromkeys(part.tolist(), i)
    return found


def by_client(clients, steps):
    """Return client -> (round, batch, loss) of its steps, from what `loss` was called with.

    Labels are checked on the way.
    """
    found = {}
    owner = owners(clients)
    for t, x, y, losses in steps:
        index = images(clients, x)
        assert torch.equal(clients.labels[index], y)
        for batch, loss in zip(index.tolist(), losses.tolist(), strict=True):
            found.setdefault(owner[batch[0]], []).append((t, batch, loss))
    return found


def batches(clients, log):
    """Return client -> (round, batch) of its steps."""
    steps = by_client(clients, log.batches)
    return {i: [(t, batch) for t, batch, _ in own] for i, own in steps.items()}


def calls(clients, log, training):
    """Yield (round, client, its tensors, its experts or None) for each client in `logits`."""
    owner = owners(clients)
    for grad, aggregated, p, _, context, x in log.logits:
        if grad != training:
            continue
        for n, image in enumerate(images(clients, x)[:, 0].tolist()):
            experts = context["experts"][n] if "experts" in context else None
            own = {k: v[n] for k, v in p.items()}
            yield aggregated - (not training), owner[image], own, experts
