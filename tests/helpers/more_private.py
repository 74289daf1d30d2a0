"""What released code does instead, around our methods' own functions, and how it is compared.

`dpfpl_run` and `FedSEPTRun` play whole runs of a release, with the defects that it has (N1, N2, ...
of its method), and return what a golden file stores of them.
"""

import functools
import math
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fpl import rounds
from fpl.more_methods.private import DPFPL, FedSEPT, rebuilt
from fpl.prompts import PromptTree
from fpl.rounds import Optimiser, Setup, Training, train_locally
from fpl.state import Clients, Server
from helpers.tiny import golden, stored_clip

# Comparison


class Found(NamedTuple):
    """A value of ours. limit: 0 for what must be equal; after: what is taken off both before."""

    name: str
    value: Tensor
    limit: float
    after: Tensor | float = 0.0


def stored(name):
    """Return inputs and outputs of newer released code, see tests/data/golden2."""
    z = golden(f"../golden2/{name}")
    return {k: v.long() if getattr(v, "dtype", None) == torch.int32 else v for k, v in z.items()}


def is_near(found, z):
    """Say whether a value is the stored one."""
    want = z[found.name].double() - found.after
    got = torch.as_tensor(found.value).detach().double() - found.after
    assert got.shape == want.shape, f"{found.name}: {got.shape}, stored is {want.shape}"
    if not found.limit:
        return torch.equal(got, want)
    return bool((got - want).abs().max() <= found.limit * want.abs().max())


def case_of(cases, name):
    """Return what is found of a file, as a function, and the inputs to change."""
    (kind,) = [kind for kind in cases if name.startswith(kind)]
    return cases[kind]


def finding(cases):
    """Return a function of a file's name: what it stores, and what is found of it."""

    @functools.cache
    def of(name):
        z = stored(name)
        case, _ = case_of(cases, name)
        return z, [*case(z)]

    return of


def failing(case, z):
    """Return the names of what is not as it is stored."""
    return {found.name for found in case if not is_near(found, z)}


def altered(value, limit):
    """Return a stored value whose largest number is another, by more than a limit."""
    flat = value.double().flatten().clone()
    at = flat.abs().argmax()
    share = max(1e-3, 30 * limit) if limit and flat[at] else 1.0
    flat[at] += share * (flat[at].abs() or 1)
    return flat.view(value.shape)


def shaken(value):
    """Return a stored input of which all numbers are others."""
    if not value.is_floating_point():
        return value.flip(-1) if value.ndim else value + 1
    wave = torch.arange(value.numel()).cos().view(value.shape)
    return value + 0.05 * value.abs().max() * wave


def unnoticed(cases, name):
    """Return the inputs of a file with other numbers for which all is still as it is stored."""
    z, (case, inputs) = stored(name), case_of(cases, name)
    there = filter(z.__contains__, inputs)
    return [key for key in there if not failing(case({**z, key: shaken(z[key])}), z)]


def unit(x):
    return F.normalize(x, dim=-1)


def text_of(z):
    """Return the class prompts of a file, whose tokens are those that it stores."""
    text = PromptTree(stored_clip(z), z["classnames"], int(z["n_ctx"]))
    tokens = text._clip.tokenizer
    for name, row in zip(z["classnames"], z["token_ids"].tolist(), strict=True):
        sentence = f"{'X ' * text.n_ctx}{name.replace('_', ' ')}."
        inner = [49406, *tokens.encode(sentence), 49407]
        assert row == inner + [0] * (77 - len(inner))
    return text


def images_of(z, i, kind="image"):
    """Return unit features of one kind of a client's images."""
    return unit(z[f"client{i}.{kind}"])


def people(z, n):
    """Return clients who train on the stored images, and the number of each one's first image."""
    images = [images_of(z, i) for i in range(n)]
    labels = torch.cat([z[f"client{i}.label"] for i in range(n)])
    parts = torch.arange(len(labels)).split([*map(len, images)])
    clients = Clients(torch.cat(images), labels, parts, parts, len(z["classnames"]))
    return clients, [int(part[0]) for part in parts]


def given(**values):
    """Return a step's `draw` for one client with these numbers, and 0 for the others."""

    def draw(name, *shape):
        return values.get(name, torch.zeros(shape)).float().view(1, *shape)

    return draw


def drawing(numbers):
    """Have local training draw numbers(name, client, step), or 0 where this is None."""

    def drawn(like, seed, client_ids, at, name, *shape):
        found = [numbers(name, i, at[1]) for i in client_ids]
        each = [torch.zeros(shape) if value is None else value.view(shape) for value in found]
        return torch.stack(each).float()

    return mock.patch.object(rounds, "normals", drawn)


def as_stored(log, z):
    """Return what was noted of a run, in the shapes of what is stored; what is not is left out."""
    found = {name: torch.stack(values) for name, values in log.items() if name in z}
    return {name: value.view(z[name].shape) for name, value in found.items()}


def training_of(z):
    """Return how a file trains; rates and decay are those of all its steps."""
    how = {name: z[name].item() for name in ("lr", "momentum", "weight_decay")}
    return Training(local_epochs=1, batch_size=int(z["batch"]), **how)


# DP-FPL

OURS = {"global": "ctx", "local": "local", "u": "u", "v": "v"}
THEIRS = {ours: theirs for theirs, ours in OURS.items()}
FACTORISED = ("dplora", "dpfpl")


def dpfpl_method(z, form, private):
    """Return our method as released: clipping whole batches, with noise that counts rounds (N6)."""
    how = {
        "n_ctx": int(z["n_ctx"]),
        "rank": int(z["rank"]),
        "factorization": form,
        "clip_by": "batch",
    }
    if private:
        sigma = math.sqrt(z["rounds"] * math.log(1 / z["delta"])) / z["noise"].item()
        how |= {"bound": z["norm_thresh"].item(), "noise": sigma}
    return DPFPL(**how)


def clients_noise(z, form, prefix, at=()):
    """Return what a client draws by our names: the stored noise over its standard deviation."""
    names = {"promptfl": ("global",), "fedotp": ("local",)}.get(form, ("u", "v"))
    if f"{prefix}noise_{names[0]}" not in z:
        return {}
    method = dpfpl_method(z, form, private=True)
    std = method.noise * method.bound / z["batch"]
    return {OURS[name]: z[f"{prefix}noise_{name}"][at] / std for name in names}


def dpfpl_step(method, text, p, batch, q, noise):
    """Return loss, prompt, factors and gradients of one client, all without its axis."""
    own = {name: value[None] for name, value in p.items()}
    low = method.factors(own, q)
    x, y = (part[None] for part in batch)
    loss, found = method.released(text, own, low, (x, y), given(**noise))
    if low and "local" in p:
        found["local"] = rebuilt(low, found, method.sign)
    prompt = method.prompt(own, low)[0].detach()
    factors, grads = ({k: v[0] for k, v in part.items()} for part in (low, found))
    return loss[0].detach(), prompt, factors, grads


class Walker:
    """Steps of a method's optimiser on tensors that are handed in and out."""

    def __init__(self, method, like, training):
        self.leaves = {name: value.clone() for name, value in like.items()}
        groups = [{"name": name, "params": [leaf]} for name, leaf in self.leaves.items()]
        self.stepper = method.optimiser(groups, training.momentum, training.weight_decay)
        for group in self.stepper.param_groups:
            group["lr"] = training.lr

    def step(self, p, grads):
        """Return the tensors after a step; what has no gradient stays."""
        for name, leaf in self.leaves.items():
            leaf.copy_(p[name])
            leaf.grad = grads.get(name)
        self.stepper.step()
        return {name: leaf.clone() for name, leaf in self.leaves.items()}


def dpfpl_run(z, text, lossless=False):
    """Play DP-FPL's loop, and return what is stored of it.

    As released: a step starts where the round did, in the first at the initial weights (N1), moves
    private prompts by the last client's gradient (N2), with one momentum for all (N3). lossless:
    without that, one trainer for each client.
    """
    form, n, steps = z["form"], int(z["num_users"]), int(z["steps"])
    method = dpfpl_method(z, form, private=z["noise"] > 0)
    init = {OURS[name]: z[f"init.{name}"] for name in OURS if f"init.{name}" in z}
    walkers = [Walker(method, init, training_of(z)) for _ in range(n if lossless else 1)]
    own = [init] * n
    log = {}
    for r, s in np.ndindex(int(z["rounds"]), steps):
        if s == 0:
            begin = [dict(p) for p in own]
        if not lossless:
            own = [dict(init if r == 0 else p) for p in begin]
        every = []
        for i, p in enumerate(own):
            keep(log, "start", p)
            index = z[f"client{i}.batches"][s]
            batch = images_of(z, i)[index], z[f"client{i}.label"][index]
            q = z["draw_v"][r, s, i] if form in FACTORISED else torch.zeros(text.width, 1)
            learnt = {k: v for k, v in p.items() if k in method.init(text, torch.Generator())}
            noise = clients_noise(z, form, "", (r, s, i))
            loss, _, factors, grads = dpfpl_step(method, text, learnt, batch, q, noise)
            own[i] = p | factors
            begin[i] |= factors  # u and v are what the model has last computed with
            every.append(grads)
            keep(log, "grad", grads)
            log.setdefault("loss", []).append(loss)
        mean = torch.stack([grads["ctx"] for grads in every]).mean(0)
        if "noise_server" in z:
            mean = mean + z["noise_server"][r, s]
        log.setdefault("avg_grad", []).append(mean)
        for i, p in enumerate(own):
            grads = every[i if lossless else -1] | {"ctx": mean}
            own[i] = walkers[i if lossless else 0].step(p, grads)
            keep(log, "end", own[i])
        if s == steps - 1 and "test_logits" in z:
            test_dpfpl(z, text, method, own, r, log)
    return as_stored(log, z)


def keep(log, kind, p):
    """Note tensors by the release's names."""
    for name, value in p.items():
        log.setdefault(f"{kind}.{THEIRS[name]}", []).append(value)


def test_dpfpl(z, text, method, own, r, log):
    """Note what clients say of their own and of all others' test images, with factors made anew."""
    n = len(own)
    for i, p in enumerate(own):
        learnt = {k: v[None] for k, v in p.items() if k in method.init(text, torch.Generator())}
        others = [j for j in range(n) if j != i]
        for kind, who in (("test", [i]), ("neighbor", others)):
            q = (
                z[f"{kind}_draw_v"][r, i]
                if method.factorization in FACTORISED
                else torch.zeros(1, 1)
            )
            t = text(method.prompt(learnt, method.factors(learnt, q)))[0].detach()
            logits = text.scale * torch.cat([images_of(z, j, "test_image") for j in who]) @ t.T
            labels = torch.cat([z[f"client{j}.test_label"] for j in who])
            right = 100 * (logits.argmax(-1) == labels).double().mean()
            log.setdefault(f"{kind}_logits", []).append(logits)
            log.setdefault(f"{kind}_accuracy", []).append(right)


def dpfpl_together(z, text):
    """Return all tensors before each step and after the last as our own loop has them, and losses.

    All steps of all rounds are one local epoch, so momentum goes on.
    """
    form, n, rounds_ = z["form"], int(z["num_users"]), int(z["rounds"])
    plain = dpfpl_method(z, form, private=z["noise"] > 0)
    log, losses = [], []

    class Recorded(DPFPL):
        def gradients(self, text, p, context, x, y, draw):
            loss, found = super().gradients(text, p, context, x, y, draw)
            log.append({name: value.detach().clone() for name, value in p.items()})
            losses.append(loss.detach())
            return loss, found

    def numbers(name, i, step):
        r, s = divmod(step, int(z["steps"]))
        if name == "factors":
            return z["draw_v"][r, s, i] if form in FACTORISED else None
        own = clients_noise(z, form, "", (r, s, i))
        if name != "ctx":
            return own[name]
        std = plain.noise * plain.bound / z["batch"]
        return (z["noise_server"][r, s] / std + own.get("ctx", 0)) * math.sqrt(n)

    method = Recorded(**vars(plain))
    clients, first = people(z, n)
    order = {i: first[i] + z[f"client{i}.batches"].repeat(rounds_, 1) for i in range(n)}
    names = method.init(text, torch.Generator())
    begin = {
        name: z[f"init.{THEIRS[name]}"].expand(n, *value.shape) for name, value in names.items()
    }
    with drawing(numbers):
        setup = Setup(method, text, clients, training_of(z))
        ended, _ = train_locally(setup, begin, {}, order)
    return [*log, ended], torch.stack(losses)


# FedSEPT

ROUTER = ("query", "in_w", "in_b", "out_w", "out_b", "ln_w", "ln_b", "head_w", "head_b")


def fedsept_tensors(z, prefix=""):
    """Return our tensors of stored ones: of the attention's input maps, the last third."""
    d = int(z["d"])
    found = {"a": z[f"{prefix}A"], "b0": z[f"{prefix}B0"], "r": z[f"{prefix}R"]}
    found["a"] = found["a"].view(int(z["experts"]), int(z["n_ctx"]), int(z["rank"]))
    router = {name: z[f"{prefix}{name}"] for name in ROUTER[3:]}
    value = {"v_w": z[f"{prefix}in_w"][2 * d :], "v_b": z[f"{prefix}in_b"][2 * d :]}
    return found | value | router


def theirs_of(p, init):
    """Return tensors by the release's names; what ours lacks is as it was."""
    d = p["v_b"].shape[0]
    found = {"A": p["a"].reshape(init["A"].shape), "R": p["r"], "query": init["query"]}
    found["in_w"] = torch.cat([init["in_w"][: 2 * d], p["v_w"]])
    found["in_b"] = torch.cat([init["in_b"][: 2 * d], p["v_b"]])
    return found | {name: p[name] for name in ROUTER[3:]}


def fedsept_method(z, private=True, dropout=0.1):
    """Return our method with a file's settings."""
    names = {"n_ctx": "n_ctx", "experts": "experts", "rank": "rank", "heads": "router_heads"}
    how = {ours: int(z[theirs]) for ours, theirs in names.items()}
    how |= {"lam": z["lambda_div"].item(), "dropout": dropout}
    if private:
        how |= {"bound": z["clip"].item(), "noise": z["sigma"].item()}
    return FedSEPT(**how)


def dropped(scale):
    """Return what is drawn for a stored dropout: far below every threshold where it is 0."""
    return torch.where(scale > 0, 9.0, -9.0)


class FedSEPTRun:
    """FedSEPT's loop as released, with one momentum for all (N4). log: what is stored of it."""

    def __init__(self, z, text):
        self.z, self.text = z, text
        self.clients, self.first = people(z, int(z["num_users"]))
        n = len(self.clients)
        self.log, self.seen = {}, []
        self.method = self.recorded(fedsept_method(z, bool(z["private"])))
        self.setup = Setup(self.method, text, self.clients, training_of(z))
        self.init = {name: z[f"init.{name}"] for name in ("A", *ROUTER)}
        begin = fedsept_tensors(z, "init.")
        self.local = {name: value.expand(n, *value.shape).clone() for name, value in begin.items()}
        nobody = torch.zeros(n, dtype=torch.bool)
        uploads = {"a": torch.zeros_like(self.local["a"])}
        self.server = Server({"a": begin["a"]}, uploads, nobody, nobody)
        self.optimiser = Optimiser()
        self.trained = [0] * n

    def recorded(self, method):
        seen, note = self.seen, self.note

        class Recorded(FedSEPT):
            def gradients(self, text, p, context, x, y, draw):
                loss, found = super().gradients(text, p, context, x, y, draw)
                seen.append({name: value[0].detach().clone() for name, value in p.items()})
                note("loss", loss[0].detach())
                return loss, found

        return Recorded(**vars(method))

    def note(self, name, value):
        self.log.setdefault(name, []).append(torch.as_tensor(value))

    def play(self):
        for t in range(int(self.z["rounds"])):
            users = participants(self.z, t)
            for j, i in enumerate(users):
                self.train(t, j, i)
            who = torch.tensor(users)
            sizes = torch.tensor([len(self.clients.train[i]) for i in users])
            uploads = {"a": self.local["a"][who]}
            self.server = self.method.aggregate(self.server, who, uploads, sizes)
            self.note("order", who)
            self.note("global_A", self.server.params["a"].reshape(self.init["A"].shape))
            self.test()
        for i, times in enumerate(self.trained if self.z["private"] else ()):
            rate = self.setup.training.batch_size / len(self.clients.train[i])
            steps = times * int(self.z["steps"])
            self.note("epsilon_spent", epsilon_of(self.z["sigma"].item(), rate, steps, 1e-5))
        return as_stored(self.log, self.z)

    def train(self, t, j, i):
        """Train client i, the j-th of round t."""
        down = self.method.download(self.server, torch.tensor([i]), self.clients)
        begin = self.method.start({k: v[[i]] for k, v in self.local.items()}, down)
        order = {i: self.first[i] + self.z[f"client{i}.batches"][self.trained[i]]}

        def numbers(name, i, step):
            if name == "noise":
                return self.z["noise"][t, j, step]
            return dropped(self.z["dropout_scale"][t, j, step])

        self.seen.clear()
        with drawing(numbers):
            ended, _ = train_locally(self.setup, begin, {}, order, self.optimiser)
        last = {name: value[0] for name, value in ended.items()}
        for kind, path in (("start", self.seen), ("end", [*self.seen[1:], last])):
            for p in path:
                for name, value in theirs_of(p, self.init).items():
                    self.note(f"{kind}.{name}", value)
        for name, value in ended.items():
            self.local[name][i] = value[0]
        self.trained[i] += 1

    def test(self):
        """Test every client on its own images and on those of each other one."""
        own = self.method.evaluated(self.server, self.local, lambda p, epochs: p)
        n = len(self.clients)
        right = torch.zeros(n, n, dtype=torch.double)
        for i in range(n):
            p = {name: value[[i]] for name, value in own.items()}
            t = self.method.encode(self.text, p, {}).detach()
            for j in range(n):
                x = images_of(self.z, j, "test_image")[None]
                logits = self.method.logits(self.text, t, p, {}, x)[0]
                right[i, j] = (logits.argmax(-1) == self.z[f"client{j}.test_label"]).double().mean()
                if i == j:
                    self.note("test_logits", logits)
        others = 1 - torch.eye(n)
        self.note("test_accuracy_mean", 100 * right.diag().mean())
        self.note("cross_accuracy_mean", 100 * (others * right).sum() / others.sum())


def participants(z, t):
    """Return who trains in a round of the release."""
    n = int(z["num_users"])
    most = max(1, int(z["frac"] * n))
    if most == n:
        return [*range(n)]
    drawn = np.random.default_rng(int(z["seed"]) + t).choice(n, most, replace=False)
    return sorted(drawn.tolist())


def epsilon_of(sigma, rate, steps, delta):
    """Return the epsilon of Opacus' Renyi accountant, as the release asks for it (but see N3)."""
    from opacus.accountants import RDPAccountant

    spent = RDPAccountant()
    spent.history = [(sigma, min(1.0, rate), steps)] if steps else []
    return spent.get_epsilon(delta) if steps else 0.0


def sigma_of(epsilon, rate, steps, delta):
    """Return the noise multiplier that the release takes for an epsilon."""
    from opacus.accountants.utils import get_noise_multiplier

    asked = {"target_epsilon": epsilon, "target_delta": delta, "steps": steps}
    return get_noise_multiplier(**asked, sample_rate=min(1.0, rate), accountant="rdp")


# FedMGP


def apart(features, kind):
    """Return FedMGP's term of the unit text features (k, c, d) of k groups of prompts, 3a02697.

    The release adds its absolute value to the loss. "cos", the mean of 1 - cos over pairs, is least
    where the groups are equal. "l1" and "l2" are minus a distance, and would drive them apart, but
    their absolute value is the distance itself. So all three, called diversity, pull the groups
    together: alone, each makes their cosine larger. What would drive them apart is minus the
    absolute value: cos less a constant, or minus the distance.
    """
    k = len(features)
    one, other = torch.triu_indices(k, k, 1)
    a, b = features[one], features[other]
    terms = {
        "cos": 1 - (a * b).sum(-1),
        "l1": -(a - b).abs().mean(-1),
        "l2": -((a - b).square().sum(-1) + 1e-8).sqrt(),
    }
    return terms[kind].mean()
