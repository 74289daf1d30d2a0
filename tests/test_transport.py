"""Promise: the transport plan is the released solver's, and is one where that underflows."""

import itertools
import math

import pytest
import torch
from helpers.tiny import error, golden

from fpl.transport import plan

FILES = ["ot_solver_eps0.1_g0.8", "ot_solver_eps0.01_g1_f64"]
CASES = list(itertools.product(FILES, ["cot", "sinkhorn"]))
LIMIT = {torch.float32: 3e-5, torch.float64: 1e-9}


def solve(z, kind, **changes):
    """Return the plan and its iterations for a golden file's similarities and settings."""
    settings = {name: z[name].item() for name in ("eps", "gamma", "max_iter", "thresh")}
    found, iterations = plan(z["sim"][None], balanced=kind == "sinkhorn", **{**settings, **changes})
    return found[0], int(iterations)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_plan_and_iterations_are_the_released_ones(name, kind):
    z = golden(name)
    found, iterations = solve(z, kind)
    assert error(found, z[f"{kind}_plan"]) < LIMIT[z["sim"].dtype]
    assert iterations == int(z[f"{kind}_iters"])


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_limit_is_the_released_one_and_has_the_marginals(name, kind):
    z = golden(name)
    z, limit = {**z, "sim": z["sim"].double()}, LIMIT[z["sim"].dtype]
    found, _ = solve(z, kind, thresh=0.0, max_iter=int(z[f"conv_{kind}_iters"]))
    assert error(found, z[f"conv_{kind}_plan"]) < limit
    patches, prompts = z["sim"].shape[1:]
    mass = z["gamma"].item() if kind == "cot" else 1.0
    assert torch.allclose(found.sum(1), torch.full_like(found[:, 0], mass / prompts), rtol=1e-9)
    assert (found.sum(2) * patches).max() < 1 + 2e-4
    if kind == "sinkhorn":
        assert (found.sum(2) * patches).min() > 1 - 2e-4


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_perturbed_value_fails(name, kind):
    z, limit = golden(name), LIMIT[golden(name)["sim"].dtype]
    stored = z[f"{kind}_plan"].clone().view(-1)
    stored[stored.argmax()] *= 1.001
    assert error(solve(z, kind)[0], stored.view_as(z["sim"])) > limit
    other = {"gamma": 0.5} if kind == "cot" else {"eps": 1.0}
    for changes in ({"eps": 1.01 * z["eps"].item()}, other):
        assert error(solve(z, kind, **changes)[0], z[f"{kind}_plan"]) > limit
    z["sim"][3, 4, 1] += 0.01
    assert error(solve(z, kind)[0], z[f"{kind}_plan"]) > limit


def test_the_scale_of_the_kernel_moves_the_truncated_plan_and_not_the_limit():
    z = golden("ot_solver_eps0.1_g0.8")
    sim = z["sim"].double()
    shifted = 1 + sim - sim.amax((1, 2), keepdim=True)  # the kernel divided by its maximum

    def solved(thresh, max_iter):
        found = [plan(s[None], 0.1, 0.8, False, max_iter, thresh) for s in (sim, shifted)]
        return [one[0] for one, _ in found]

    truncated = solved(1e-3, 100)
    assert error(truncated[1], z["maxsub_cot_plan"]) < 3e-5
    assert error(truncated[1], truncated[0]) > 1e-3
    assert error(*solved(0.0, 3000)) < 1e-9


def test_axes_behind_the_first_are_problems_of_one_batch():
    sim = golden("ot_solver_eps0.1_g0.8")["sim"]
    folded, _ = plan(sim.view(1, 3, 2, 2, *sim.shape[1:]))
    flat, _ = plan(sim[None])
    assert torch.equal(folded.flatten(0, 3), flat[0])


def test_a_clients_plan_does_not_depend_on_other_clients():
    sim = golden("ot_solver_eps0.1_g0.8")["sim"]
    sim = sim.view(3, 4, *sim.shape[1:])
    sim = torch.stack([sim[0], 0.1 * sim[1], sim[2]])  # the second is easier
    together, iterations = plan(sim)
    alone = [plan(s[None]) for s in sim]
    assert len(set(iterations.tolist())) > 1 and iterations.tolist() == [int(n) for _, n in alone]
    assert all(torch.equal(one, many[0]) for one, (many, _) in zip(together, alone, strict=True))


def in_logarithms(sim, eps, gamma, steps):
    """The unbalanced plan of (M, 2) cosines, without a kernel that could overflow."""
    cost = (sim.double() - 1) / eps
    rows, column = -math.log(len(sim)), math.log(gamma / 2)
    v = torch.zeros(2, dtype=torch.double)
    for _ in range(steps):
        u = (rows - torch.logsumexp(cost + v, 1)).clamp(max=0)
        v = column - torch.logsumexp(cost + u.unsqueeze(1), 0)
    return (u.unsqueeze(1) + cost + v).exp()


@pytest.mark.parametrize("eps", [0.006, 0.031, 0.045, 0.047, 0.1])
def test_cosines_as_far_apart_as_can_be_have_the_plan_of_logarithms(eps):
    gen = torch.Generator().manual_seed(1)
    sim = 2 * torch.rand(40, 9, 2, generator=gen) - 1
    found, _ = plan(sim[None], eps, 1.0, False, 100, 0.0)
    for one, mine in zip(sim, found[0], strict=True):
        assert error(mine, in_logarithms(one, eps, 1.0, 100)) < 1e-3


@pytest.mark.parametrize("balanced", [False, True])
def test_cosines_whose_kernel_underflows_still_give_a_plan(balanced):
    sim = (0.05 * torch.rand(2, 49, 2, generator=torch.Generator().manual_seed(1))).requires_grad_()
    assert math.exp(-1 / 0.001) == 0.0
    found, _ = plan(sim, eps=0.001, gamma=0.8, balanced=balanced)
    assert torch.isfinite(found).all() and not found.requires_grad
    column = (1.0 if balanced else 0.8) / 2
    assert torch.allclose(found.sum(1), torch.full((2, 2), column), rtol=1e-3)
