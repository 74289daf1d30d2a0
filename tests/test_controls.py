"""Promise: each control is what its name says, computed here a second time by hand."""

import numpy as np
import pytest
import torch
from helpers.tiny import SMALL

from fpl.controls import CONTROLS, Majority, RidgeAll, RidgeOwn, ZeroShotOwn
from fpl.experiments import tables
from fpl.rounds import Seeds, Training, run_rounds
from fpl.state import Clients

EVERYBODY = torch.arange(6)


def correct(method, text, clients):
    """Which test images of each client are classified correctly, through the one loop."""
    (only,) = run_rounds(method, text, clients, Training(rounds=3), Seeds())
    return only.correct


def same(found, predictions, clients):
    want = [
        torch.as_tensor(guess) == clients.labels[test]
        for guess, test in zip(predictions, clients.test, strict=True)
    ]
    return len(found) == len(want) and all(map(torch.equal, found, want))


def own(clients, i):
    """The training classes of client i."""
    return clients.labels[clients.train[i]].unique()


def lstsq(x, y, n_cls, alpha):
    """argmin |[X 1] [W; b] - Y|^2 + alpha |W|^2 as least squares with the rows [sqrt(alpha) I, 0] -> 0."""
    d = x.shape[1]
    rows = np.vstack(
        [
            np.hstack([x, np.ones((len(x), 1))]),
            np.hstack([np.sqrt(alpha) * np.eye(d), np.zeros((d, 1))]),
        ]
    )
    solution = np.linalg.lstsq(
        rows, np.vstack([np.eye(n_cls)[y], np.zeros((d, n_cls))]), rcond=None
    )[0]
    return solution[:-1], solution[-1]


def test_majority_with_ties(text, clients):
    labels = torch.tensor([5, 2, 2, 5] + [4, 3, 3] + [0] + [0, 1, 2, 3, 4, 5] * 3)
    few = Clients(
        clients.feats[:26],
        labels,
        torch.arange(8).split([4, 3, 1]),
        torch.arange(8, 26).split(6),
        n_cls=6,
    )
    found = correct(Majority(), text, few)
    assert [c.nonzero()[:, 0].tolist() for c in found] == [
        [2],
        [3],
        [0],
    ]  # the first is a tie of 2 and 5


@pytest.mark.parametrize("template", ["a photo of a {}.", "a drawing of a {}."])
def test_zero_shot_among_own_classes(text, clients, template):
    t = text.zero_shot(template)
    guesses = [
        own(clients, i)[(clients.feats[test] @ t[own(clients, i)].T).argmax(-1)]
        for i, test in enumerate(clients.test)
    ]
    assert same(
        correct(ZeroShotOwn(n_ctx=SMALL["n_ctx"], template=template), text, clients),
        guesses,
        clients,
    )


@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_ridge_on_own_images(text, clients, alpha):
    fits = [
        lstsq(*(a.numpy() for a in clients.training(i)), clients.n_cls, alpha)
        for i in range(len(clients))
    ]
    context = RidgeOwn(alpha=alpha).context(text, None, EVERYBODY, clients)
    for i, (w, b) in enumerate(fits):
        assert np.allclose(context["w"][i], w, atol=1e-5) and np.allclose(
            context["b"][i], b, atol=1e-5
        )
    guesses = [
        (clients.feats[test].numpy() @ w + b).argmax(-1)
        for (w, b), test in zip(fits, clients.test, strict=True)
    ]
    assert same(correct(RidgeOwn(alpha=alpha), text, clients), guesses, clients)


def test_the_penalty_is_chosen_by_leaving_one_training_image_out(text, clients):
    """alpha 0 against refitting without each image in turn, for the powers of ten from 0.001 to 1000."""
    context = RidgeOwn().context(text, None, EVERYBODY, clients)
    chosen = set()
    for i in range(len(clients)):
        x, y = (a.numpy() for a in clients.training(i))
        errors = {}
        for alpha in 10.0 ** np.arange(-3, 4):
            fits = [
                lstsq(np.delete(x, k, 0), np.delete(y, k), clients.n_cls, alpha)
                for k in range(len(x))
            ]
            left = [x[k] @ w + b - np.eye(clients.n_cls)[y[k]] for k, (w, b) in enumerate(fits)]
            errors[alpha] = np.square(left).sum()
        best = min(errors, key=errors.get)
        chosen.add(best)
        assert np.allclose(context["w"][i], lstsq(x, y, clients.n_cls, best)[0], atol=1e-5)
    assert len(chosen) > 1, "a penalty that is the same for all clients would pass unnoticed"


@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_ridge_on_everybodys_images_among_own_classes(text, clients, alpha):
    everything = torch.cat(list(clients.train))
    w, b = lstsq(
        clients.feats[everything].numpy(), clients.labels[everything].numpy(), clients.n_cls, alpha
    )
    context = RidgeAll(alpha=alpha).context(text, None, EVERYBODY, clients)
    assert all(
        np.allclose(context["w"][i], w, atol=1e-5) and np.allclose(context["b"][i], b, atol=1e-5)
        for i in EVERYBODY
    )
    guesses = []
    for i, test in enumerate(clients.test):
        mine = own(clients, i).numpy()
        guesses.append(mine[(clients.feats[test].numpy() @ w + b)[:, mine].argmax(-1)])
    assert same(correct(RidgeAll(alpha=alpha), text, clients), guesses, clients)


def test_tables_know_them_by_name():
    assert [*CONTROLS] == tables.CONTROLS
