"""Promise: AFL and FedCLIP compute what their released code computes, whole runs included."""

from dataclasses import replace
from types import SimpleNamespace

import open_clip
import pytest
import torch
import torch.nn.functional as F
from helpers import refuses
from helpers.more_private import Found, altered, failing, finding, given, unnoticed
from helpers.more_prompts import files
from helpers.runs import RUN, equal, play
from helpers.tiny import NAMES, error, make, stored_clip

from fpl.experiments.values import build
from fpl.methods import PFedPrompt, ZeroShot
from fpl.more_methods import MORE, features, private
from fpl.more_methods.features import AFL, ZSLP, FedCLIP, ZeroShotMemory
from fpl.prompts import PromptTree
from fpl.rounds import Setup, Training, run_rounds, train_locally
from fpl.state import Clients, Server

VALUE, GRADIENT = 2e-5, 2e-4


# AFL


def whole(gram, d):
    """Return a symmetric matrix of its upper triangle."""
    matrix = torch.zeros(d, d, dtype=torch.double)
    rows, columns = torch.triu_indices(d, d)
    matrix[rows, columns] = matrix[columns, rows] = gram.double()
    return matrix


def fit(z, gamma):
    """Return the last round of a run with this gamma, its method and its text."""
    n, d, c = (int(z[name]) for name in ("num_users", "d", "C"))
    images = [z[f"client{i}.feature"] for i in range(n)] + [z["test_feature"]]
    labels = torch.cat([*(z[f"client{i}.label"] for i in range(n)), z["test_label"]])
    *train, test = torch.arange(len(labels)).split([*map(len, images)])
    clients = Clients(torch.cat(images), labels, train, [test] * n, c)
    text = SimpleNamespace(dim=d, n_cls=c, scale=1.0, at_once=100)
    method = AFL(gamma=gamma)
    (last,) = run_rounds(Setup(method, text, clients, Training(**method.training)))
    return last, method, text


def weights(method, text, statistics):
    """Return W (n, d, c) of statistics with a client axis."""
    return method.encode(text, statistics, {}).mT


def afl(z):
    """Yield what is found of clients, server, and of the removal of gamma."""
    d = int(z["d"])
    last, method, text = fit(z, z["rg"].item())
    server = last.state.server
    own = weights(method, text, server.uploads)
    accuracies = []
    sizes = [len(z[f"client{i}.label"]) for i in range(len(own))]
    yield Found("sizes", torch.tensor(sizes), 0)
    for i, gram in enumerate(server.uploads["gram"]):
        c = whole(gram, d)
        yield Found(f"client{i}.C", c, 5e-6)
        yield Found(f"client{i}.R", c.inverse(), 5e-5)
        yield Found(f"client{i}.W", own[i], 5e-5)
        guess = (z[f"client{i}.feature"] @ own[i]).argmax(-1)
        accuracies.append((guess == z[f"client{i}.label"]).double().mean())
    yield Found("local_accuracy", torch.stack(accuracies), 1e-9)
    total = whole(server.params["gram"], d)
    yield Found("agg.C", total, 5e-6)
    yield Found("agg.R", total.inverse(), 5e-5)
    yield from classifies(z, "agg", last, method, text)
    w = weights(method, text, last.evaluated)[0]
    yield Found("central_ridge", w, 5e-5)
    cleaned = fit(z, 0)
    yield Found("central_pinv", weights(*cleaned[1:], cleaned[0].evaluated)[0], 5e-4)
    if "clean.W" in z:
        yield from classifies(z, "clean", *cleaned)


def classifies(z, name, last, method, text):
    """Yield what is found of the weights with which everybody is tested."""
    w = weights(method, text, last.evaluated)[0]
    yield Found(f"{name}.W", w, 5e-5 if name == "agg" else 5e-4)
    p = {key: value[:1] for key, value in last.evaluated.items()}
    t = method.encode(text, p, {})
    logits = method.logits(text, t, p, {}, z["test_feature"][None])[0]
    yield Found(f"{name}.logits", logits, 5e-4)
    assert len(set(last.accuracy.tolist())) == 1
    yield Found(f"{name}.accuracy", 100 * last.accuracy[0].double(), 1e-6)


# FedCLIP

ADAPTER = ("w1", "b1", "w2", "b2")


def keeping_underscores(z):
    """Return the stored CLIP with a tokenizer that leaves class names as the release has them."""
    clip = stored_clip(z)
    named = {name.replace("_", " "): name for name in z["classnames"]}

    def encode(sentence):
        for ours, theirs in named.items():
            if sentence.endswith(f" {ours}"):
                sentence = sentence.removesuffix(ours) + theirs
        return clip.tokenizer.encode(sentence)

    ends = {name: getattr(clip.tokenizer, name) for name in ("sot_token_id", "eot_token_id")}
    return replace(clip, tokenizer=SimpleNamespace(encode=encode, **ends))


def world(z):
    """Return FedCLIP as released, the classes, and what clients read."""
    method = FedCLIP(n_ctx=4, feature_norm=1.0)  # stored images have their length
    text = PromptTree(keeping_underscores(z), z["classnames"], 4)
    features = text.zero_shot(method.template)
    assert z["texts"] == [method.template.format(name) for name in z["classnames"]]
    for sentence, row in zip(z["texts"], z["token_ids"].tolist(), strict=True):
        inner = open_clip.tokenizer._tokenizer.encode(sentence)
        assert row == [49406, *inner, 49407] + [0] * (75 - len(inner))
    return method, text, {"text": features[None]}


def guesses(method, text, p, reads, x):
    """Return one client's logits of images."""
    own = {name: value[None] for name, value in p.items()}
    return method.logits(text, reads["text"], own, reads, x[None])[0]


def share_right(method, text, p, reads, x, y):
    return (guesses(method, text, p, reads, x).argmax(-1) == y).double().mean()


def fedclip_step(z):
    """Yield what is found of one step, and of the server's mean."""
    method, text, reads = world(z)
    x, y = z["image_raw"], z["labels"]
    yield Found("scale", torch.tensor(text.scale).double(), 1e-6)
    length = z["text_features_raw"].norm(dim=-1, keepdim=True)
    yield Found("text_features_raw", reads["text"][0] * length, VALUE)
    p = {name: z[name][None].clone().requires_grad_() for name in ADAPTER}
    attention = method.attention(p, x[None])[0]
    yield Found("attention", attention, VALUE)
    yield Found("adapted", attention * x, VALUE)
    own = {name: z[name] for name in ADAPTER}
    logits = guesses(method, text, own, reads, x)
    pairs = logits[:, y]
    each = [F.cross_entropy(part, torch.arange(len(y))) for part in (pairs, pairs.T)]
    yield Found("logits_per_image", pairs, VALUE)
    yield Found("loss_image", each[0], VALUE)
    yield Found("loss_text", each[1], VALUE)
    yield Found("class_probabilities", logits.softmax(-1), GRADIENT)
    loss, grads = method.gradients(text, p, reads, x[None], y[None], given())
    yield Found("loss", loss[0], VALUE)
    for name, value in grads.items():
        yield Found(f"grad_{name}", value[0], GRADIENT)
    yield Found("train_accuracy", share_right(method, text, own, reads, x, y), 1e-6)
    test = z["test_image"], z["test_label"]
    yield Found("test_accuracy", share_right(method, text, own, reads, *test), 1e-6)
    uploads = {k: torch.stack([z[f"comm.client{i}.{k}"] for i in range(3)]) for k in ADAPTER}
    for name, value in mean_of(method, uploads).items():
        yield Found(f"comm.server.{name}", value, 1e-6)
        yield Found(f"comm.after3.{name}", z[f"comm.client3.{name}"], 0)  # is left out


def mean_of(method, uploads):
    """Return what the server makes of uploads of clients of different sizes."""
    n = len(uploads["w1"])
    nobody = torch.zeros(n, dtype=torch.bool)
    server = Server({}, {k: torch.zeros_like(v) for k, v in uploads.items()}, nobody, nobody)
    return method.aggregate(server, torch.arange(n), uploads, torch.arange(n) + 5).params


class FedCLIPRun:
    """FedCLIP's run: three domains train, a fourth is only tested on."""

    def __init__(self, z):
        self.z = z
        self.method, self.text, self.reads = world(z)
        self.names = [i for i in range(4) if i != int(z["test_env"])]
        self.log = {}

    def batches(self, i):
        """Return the images and labels of each batch of a domain."""
        z = self.z
        parts = z[f"client{i}.batch_index"].split(z[f"client{i}.batch_sizes"].tolist())
        return [(z[f"client{i}.image"][part], z[f"client{i}.label"][part]) for part in parts]

    def train(self, i, p):
        """Return the tensors of a domain after each step of a round."""
        z, method = self.z, self.method
        leaves = {name: value.clone() for name, value in p.items()}
        groups = [{"name": name, "params": [leaf]} for name, leaf in leaves.items()]
        stepper = method.optimiser(groups, 0.0, z["weight_decay"].item())
        path = []
        for group in stepper.param_groups:
            group["lr"] = z["lr"].item()
            assert group["betas"] == (z["beta1"], z["beta2"]) and group["eps"] == z["eps"]
        for x, y in int(z["wk_iters"]) * self.batches(i):
            own = {name: leaf[None].clone().requires_grad_() for name, leaf in leaves.items()}
            seen = x[None], y[None], given()
            _, grads = method.gradients(self.text, own, self.reads, *seen)
            if not grads:
                assert len(x) == 1, "a batch of one image is passed over"
                continue
            for name, leaf in leaves.items():
                leaf.grad = grads[name][0]
            stepper.step()
            path.append({name: leaf.clone() for name, leaf in leaves.items()})
        return path

    def note(self, name, value):
        self.log.setdefault(name, []).append(value)

    def test(self, p):
        """Note accuracies and probabilities of all domains with the server's adapter."""
        for kind, who in (("train", self.names), ("val", self.names), ("test", range(4))):
            prefix = "" if kind == "train" else f"{kind}_"
            right, shares = [], []
            for i in who:
                x, y = (self.z[f"client{i}.{prefix}{part}"] for part in ("image", "label"))
                z = guesses(self.method, self.text, p, self.reads, x)
                right.append((z.argmax(-1) == y).double().mean())
                shares.append(z.softmax(-1))
            self.note(f"{kind}_accuracy", torch.stack(right))
            if kind != "train":
                self.note(f"{kind}_probabilities", torch.stack(shares))

    def play(self):
        server = {name: self.z[f"init.{name}"] for name in ADAPTER}
        for _ in range(int(self.z["rounds"])):
            paths = {i: self.train(i, server) for i in self.names}
            per_epoch = len(paths[self.names[0]]) // int(self.z["wk_iters"])
            for name in ADAPTER:
                each = [torch.stack([p[name] for p in paths[i]]) for i in self.names]
                steps = torch.stack(each).unflatten(1, (-1, per_epoch)).transpose(0, 1)
                self.note(f"after_step.{name}", steps)
            ends = {k: torch.stack([paths[i][-1][k] for i in self.names]) for k in ADAPTER}
            server = mean_of(self.method, ends)
            self.test(server)
        return {name: torch.stack(values) for name, values in self.log.items()}


def fedclip_run(z):
    """Yield what is found of a whole run."""
    found = FedCLIPRun(z).play()
    best = found["val_accuracy"].mean(1)
    yield Found("best_round", best.argmax() if best.any() else torch.tensor(0), 0)
    for name, value in found.items():
        if name.startswith("after_step"):
            begin = z[f"init.{name.split('.')[1]}"].double()
            yield Found(name, value, 3e-4)
            yield Found(name, value, 2e-2, begin)
        elif "accuracy" in name:  # four digits are printed
            yield Found(name, value.round(decimals=4), 1e-9)
        else:
            yield Found(name, value, 2e-3)


CASES = {
    "afl": (afl, ("client0.feature", "client1.label", "test_feature")),
    "fedclip_step": (fedclip_step, ("image_raw", "labels", "w1", "b1", "w2", "b2", "emb_rows")),
    "fedclip_run": (fedclip_run, ("init.w1", "init.b2", "lr", "weight_decay")),
}
FILES = files("afl", "fedclip")
found = finding(CASES)


@pytest.mark.parametrize("name", FILES)
def test_what_is_computed_is_what_is_stored(name):
    z, case = found(name)
    assert case and not failing(case, z)


@pytest.mark.parametrize("name", FILES)
def test_a_perturbed_value_fails(name):
    z, case = found(name)
    for one in case:
        changed = {**z, one.name: altered(z[one.name], one.limit)}
        assert failing(case, changed) == {one.name}


@pytest.mark.parametrize("name", FILES)
def test_a_perturbed_input_fails(name):
    assert not unnoticed(CASES, name)


# What the methods promise besides


def fitted(text, clients, gamma=0.01):
    """Return W of a run of AFL, and what a client has sent and received."""
    method = AFL(n_ctx=4, gamma=gamma)
    (last,) = run_rounds(Setup(method, text, clients, Training(**method.training)))
    up, down = {*last.up.tolist()}, {*last.down.tolist()}
    return weights(method, text, last.evaluated)[0], up, down


def test_one_fit_of_all_images_is_what_afl_finds_however_they_are_dealt(text, clients):
    x, y = clients.feats, clients.labels
    images = torch.cat(list(clients.train))
    alone = replace(clients, train=[images], test=clients.test[:1])
    one, up, down = fitted(text, alone, gamma=0.06)
    six, *_ = fitted(text, clients, gamma=0.01)
    target = F.one_hot(y[images], len(NAMES)).double()
    gram = x[images].double().T @ x[images].double() + 0.06 * torch.eye(32)
    want = torch.linalg.solve(gram, x[images].double().T @ target)
    assert error(one, want) < 1e-5 and error(six, want) < 1e-5
    assert (up, down) == ({32 * 33 // 2 + 32 * 6}, {32 * 6})


def test_with_fewer_images_than_dimensions_afl_takes_the_solution_of_least_norm(text, clients):
    """N3: what the release then inverts is singular."""
    few = replace(clients, train=[part[:3] for part in clients.train])
    images = torch.cat(list(few.train))
    assert len(images) < 32
    x = clients.feats[images].double()
    target = F.one_hot(clients.labels[images], len(NAMES)).double()
    w, *_ = fitted(text, few, gamma=0)
    assert error(w, torch.linalg.pinv(x) @ target) < 1e-3
    released = torch.linalg.inv((x.T @ x).float()) @ (x.T @ target).float()
    assert not error(released, torch.linalg.pinv(x) @ target) < 0.5


def test_the_regularisation_of_many_images_is_not_taken_for_rounding():
    """As features of a real CLIP, these have a large common part and differ little in others."""
    gen = torch.Generator().manual_seed(1)
    apart = torch.logspace(0, -3, 64) * torch.randn(20_000, 64, generator=gen)
    x = F.normalize(1 + apart, dim=-1)
    y = torch.randint(3, (len(x),), generator=gen)
    everybody = Clients(x, y, [torch.arange(len(x))], [torch.arange(9)], 3)
    method = AFL(gamma=0.02)
    text = SimpleNamespace(dim=64, n_cls=3, at_once=1, scale=1.0)
    (last,) = run_rounds(Setup(method, text, everybody, Training(**method.training)))
    target = F.one_hot(y, 3).double()
    gram = x.double().T @ x.double() + 0.02 * torch.eye(64)
    want = torch.linalg.solve(gram, x.double().T @ target)
    assert error(weights(method, text, last.evaluated)[0], want) < 0.1


def test_without_a_step_zslp_is_zero_shot(text, clients):
    still = play(make(ZSLP), text, clients, replace(RUN, lr=0.0, weight_decay=0.0))
    moved = play(make(ZSLP), text, clients)
    (zero_shot,) = play(make(ZeroShot), text, clients).rounds
    found = [torch.cat([a.predicted for a in log.rounds[-1].answers]) for log in (still, moved)]
    assert torch.equal(found[0], torch.cat([a.predicted for a in zero_shot.answers]))
    assert not torch.equal(*found)


def test_the_memory_is_that_of_pfedprompt(text, clients):
    ours, theirs = make(ZeroShotMemory, blend=0.8, beta=2.0), make(PFedPrompt, blend=0.8, beta=2.0)
    ids = torch.arange(6)
    memory = theirs.context(text, {}, ids, clients)
    reads = ours.context(text, {}, ids, clients)
    x = clients.feats[torch.stack([part[:3] for part in clients.test])]
    t = text.zero_shot(ours.template).expand(6, -1, -1)
    wanted = theirs.logits(text, t, {}, memory, x)
    assert error(ours.logits(text, ours.encode(text, {}, reads), {}, reads, x), wanted) < 1e-6
    assert not ours.init(text, torch.Generator()) and not ours.shared


def adapter(text, clients, **changes):
    """Return FedCLIP, tensors of two clients and what they read."""
    method = make(FedCLIP, **changes)
    drawn = method.init(text, torch.Generator().manual_seed(0))
    p = {
        name: value.expand(2, *value.shape).clone().requires_grad_()
        for name, value in drawn.items()
    }
    return method, p, method.context(text, {}, torch.arange(2), clients)


def test_a_batch_of_one_image_teaches_nothing_by_contrast(text, clients):
    index = torch.stack([part[:1] for part in clients.train[:2]])
    x, y = clients.feats[index], clients.labels[index]
    for contrast in ("batch", "class"):
        method, p, reads = adapter(text, clients, contrast=contrast)
        loss, found = method.gradients(text, p, reads, x, y, given())
        assert bool(found) == (contrast == "class") == bool(loss.any())


def test_contrast_within_a_batch_punishes_images_of_one_class(text, clients):
    """N1: without any error the loss is the mean log of how many images of its class one has."""
    method, p, reads = adapter(text, clients, contrast="batch")

    class Perfect(FedCLIP):
        def logits(self, text, t, p, context, x):
            return 1e4 * x

    y = torch.tensor([[0, 0, 0, 1, 1, 2], [3, 3, 3, 3, 3, 3]])
    x = F.one_hot(y, len(NAMES)).float()
    bound = torch.tensor([[3, 3, 3, 2, 2, 1], [6.0] * 6]).log().mean(1)
    assert torch.allclose(Perfect(n_ctx=4).loss(text, p, reads, x, y), bound)
    assert Perfect(n_ctx=4, contrast="class").loss(text, p, reads, x, y).max() < 1e-6


def test_fedclip_trains_in_the_loop_as_step_by_step(text, clients):
    method = make(FedCLIP)
    training = Training(lr=0.01, weight_decay=0.2, batch_size=4)
    drawn = method.init(text, torch.Generator().manual_seed(0))
    begin = {name: value[None] for name, value in drawn.items()}
    reads = method.context(text, {}, torch.tensor([0]), clients)
    order = clients.train[0].view(2, 4)
    setup = Setup(method, text, clients, replace(training, local_epochs=1))
    ended, _ = train_locally(setup, begin, reads, {0: order})
    p = {name: value.clone().requires_grad_() for name, value in begin.items()}
    adam = torch.optim.Adam(p.values(), 0.01, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)
    for index in order:
        adam.zero_grad()
        x, y = clients.feats[index][None], clients.labels[index][None]
        method.loss(text, p, reads, x, y).sum().backward()
        adam.step()
    assert equal(ended, {name: value.detach() for name, value in p.items()})


WRONG = {
    "a template without a place": (FedCLIP, {"template": "a picture"}, "template 'a picture'"),
    "a template with two": (ZSLP, {"template": "{} {}"}, "one {} where the class name goes"),
    "one of the memory's": (ZeroShotMemory, {"template": ""}, "template ''"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused_in_one_sentence(case, text, clients):
    kind, changes, words = WRONG[case]
    refuses(lambda: make(kind, **changes).check(text, clients), [words])


VALUES = {
    "gamma below 0": (AFL, {"gamma": -1}, "afl.gamma"),
    "no length": (FedCLIP, {"feature_norm": 0}, "fedclip.feature_norm"),
    "another contrast": (FedCLIP, {"contrast": "all"}, "'all'"),
    "when a memory is used that nothing trains with": (
        ZeroShotMemory,
        {"memory": "always"},
        "'memory'",
    ),
}


@pytest.mark.parametrize("case", VALUES)
def test_values_that_cannot_be_are_refused(case):
    kind, changes, words = VALUES[case]
    refuses(lambda: build(kind, changes, kind.key), [words])


D, C, W, M = 32, 6, 32, 4  # of the tiny CLIP: joint width, classes, width of its text, prompt
COSTS = {  # numbers up, down and kept, of a step where clients meet in every step
    "afl": (D * (D + 1) // 2 + D * C, D * C, 0),
    "fedclip": (2 * (D * D + D), 2 * (D * D + D), 0),
    "zslp": (C * D, C * D, 0),
    "zeroshot_memory": (0, 0, 0),
    "fedsept": (4 * M * 2, 4 * M * 2, M * W + 2 * W + 2 * (D * D + D) + 6 * D + 4),
    "dpfpl": (M * W, M * W, M * W),
}


@pytest.mark.parametrize("row", COSTS)
def test_what_travels_is_what_the_docstring_says(row, text, clients):
    assert {*COSTS} == {kind.key for kind in (*features.ROWS, *private.ROWS)}
    method = make(MORE[row])
    training = replace(RUN, **method.training)
    first, *_ = run_rounds(Setup(method, text, clients, training))
    steps = training.local_epochs if method.in_step else 1  # of one batch
    drawn = method.init(text, torch.Generator())
    kept = sum(value.numel() for name, value in drawn.items() if name not in method.shared)
    up, down = ({*sent.tolist()} for sent in (first.up, first.down))
    assert (up, down, kept) == ({steps * COSTS[row][0]}, {steps * COSTS[row][1]}, COSTS[row][2])
