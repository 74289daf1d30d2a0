"""Promise: each control is what its name says, computed here a second time by hand."""

import numpy as np
import pytest
import torch
from helpers.tiny import SMALL

from fpl.controls import CONTROLS, Majority, RidgeAll, RidgeOwn, ZeroShotOwn
from fpl.methods import METHODS
from fpl.rounds import Setup, Training, run_rounds
from fpl.state import Clients

EVERYBODY = torch.arange(6)


def correct(method, text, clients):
    """Which test images of each client are classified correctly, through the one loop."""
    (only,) = run_rounds(Setup(method, text, clients, Training(rounds=3)))
    return [found.right for found in only.answers]


def same(found, predictions, clients):
    pairs = zip(predictions, clients.test, strict=True)
    want = [torch.as_tensor(guess) == clients.labels[test] for guess, test in pairs]
    return len(found) == len(want) and all(map(torch.equal, found, want))


def own(clients, i):
    """The training classes of client i."""
    return clients.labels[clients.train[i]].unique()


def lstsq(x, y, n_cls, alpha):
    """Return argmin |[X 1] [W; b] - Y|^2 + alpha |W|^2, by least squares.

    The penalty is in the rows [sqrt(alpha) I, 0], which are to give 0.
    """
    d = x.shape[1]
    images = np.hstack([x, np.ones((len(x), 1))])
    penalty = np.hstack([np.sqrt(alpha) * np.eye(d), np.zeros((d, 1))])
    target = np.vstack([np.eye(n_cls)[y], np.zeros((d, n_cls))])
    solution = np.linalg.lstsq(np.vstack([images, penalty]), target, rcond=None)[0]
    return solution[:-1], solution[-1]


def fit_of(clients, i, alpha):
    x, y = clients.training(i)
    return lstsq(x.numpy(), y.numpy(), clients.n_cls, alpha)


def read(method, text, clients):
    return method.context(text, {}, EVERYBODY, clients)


def test_majority_with_ties(text, clients):
    labels = torch.tensor([5, 2, 2, 5] + [4, 3, 3] + [0] + [0, 1, 2, 3, 4, 5] * 3)
    train = torch.arange(8).split([4, 3, 1])
    few = Clients(clients.feats[:26], labels, train, torch.arange(8, 26).split(6), n_cls=6)
    found = correct(Majority(), text, few)
    # the first is a tie of 2 and 5
    assert [c.nonzero()[:, 0].tolist() for c in found] == [[2], [3], [0]]


@pytest.mark.parametrize("template", ["a photo of a {}.", "a drawing of a {}."])
def test_zero_shot_among_own_classes(text, clients, template):
    t = text.zero_shot(template)
    guesses = []
    for i, test in enumerate(clients.test):
        mine = own(clients, i)
        guesses.append(mine[(clients.feats[test] @ t[mine].T).argmax(-1)])
    method = ZeroShotOwn(n_ctx=SMALL["n_ctx"], template=template)
    assert same(correct(method, text, clients), guesses, clients)


@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_ridge_on_own_images(text, clients, alpha):
    context = read(RidgeOwn(alpha=alpha), text, clients)
    guesses = []
    for i, test in enumerate(clients.test):
        w, b = fit_of(clients, i, alpha)
        assert np.allclose(context["w"][i], w, atol=1e-5)
        assert np.allclose(context["b"][i], b, atol=1e-5)
        guesses.append((clients.feats[test].numpy() @ w + b).argmax(-1))
    assert same(correct(RidgeOwn(alpha=alpha), text, clients), guesses, clients)


def test_the_penalty_is_chosen_by_leaving_one_training_image_out(text, clients):
    """alpha 0 against refitting without each image in turn, for powers of ten from 0.001 on."""
    context = read(RidgeOwn(), text, clients)
    n_cls = clients.n_cls
    chosen = set()
    for i in range(len(clients)):
        x, y = (a.numpy() for a in clients.training(i))
        errors = {}
        for alpha in 10.0 ** np.arange(-3, 4):
            errors[alpha] = 0
            for k in range(len(x)):
                w, b = lstsq(np.delete(x, k, 0), np.delete(y, k), n_cls, alpha)
                errors[alpha] += np.square(x[k] @ w + b - np.eye(n_cls)[y[k]]).sum()
        best = min(errors, key=errors.get)
        chosen.add(best)
        assert np.allclose(context["w"][i], lstsq(x, y, n_cls, best)[0], atol=1e-5)
    assert len(chosen) > 1, "a penalty that is the same for all clients would pass unnoticed"


@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_ridge_on_everybodys_images_among_own_classes(text, clients, alpha):
    everything = torch.cat(list(clients.train))
    x = clients.feats[everything].numpy()
    w, b = lstsq(x, clients.labels[everything].numpy(), clients.n_cls, alpha)
    context = read(RidgeAll(alpha=alpha), text, clients)
    guesses = []
    for i, test in enumerate(clients.test):
        assert np.allclose(context["w"][i], w, atol=1e-5)
        assert np.allclose(context["b"][i], b, atol=1e-5)
        mine = own(clients, i).numpy()
        guesses.append(mine[(clients.feats[test].numpy() @ w + b)[:, mine].argmax(-1)])
    assert same(correct(RidgeAll(alpha=alpha), text, clients), guesses, clients)


def test_they_say_that_they_are_controls():
    assert all(kind.is_control for kind in CONTROLS.values())
    assert not any(kind.is_control for kind in METHODS.values())
