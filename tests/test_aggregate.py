"""Promise: the server averages the uploads, weighted by numbers of training images."""

import pytest
import torch
from helpers.tiny import error, golden

from fpl.methods import PromptFL
from fpl.state import Server

# theirs in half precision, ours always in single
LIMITS = {"fedavg_all": 5e-7, "fedavg_subset_order": 5e-7, "fedavg_half": 2e-3}


def named(z, prompt, prefix):
    """Return the tensors of a golden file that begin like this."""
    found = {k.removeprefix(prefix): v for k, v in z.items() if k.startswith(prefix)}
    return {"prompt": z[prompt], **found}


def aggregate(z, who, sizes):
    """Return all stored tensors, and the server after the clients `who` have uploaded theirs."""
    stacks = named(z, "prompts", "w.")
    none = {k: torch.zeros_like(v) for k, v in stacks.items()}
    params = {k: v[0] for k, v in none.items()}
    nobody = torch.zeros(len(sizes), dtype=torch.bool)
    server = Server(params, none, nobody, nobody)
    uploads = {k: v[who] for k, v in stacks.items()}
    return stacks, PromptFL().aggregate(server, who, uploads, sizes[who])


def errors(z, server):
    want = named(z, "avg_prompt", "avg.")
    assert want.keys() == server.params.keys() and len(want) == 4
    return [error(server.params[k], v) for k, v in want.items()]


@pytest.mark.parametrize(("name", "limit"), LIMITS.items())
def test_golden_average(name, limit):
    z = golden(name)
    _, server = aggregate(z, z["users"], z["n"])
    assert max(errors(z, server)) < limit


@pytest.mark.parametrize(("name", "limit"), LIMITS.items())
def test_sizes_matter_and_order_does_not(name, limit):
    z = golden(name)
    assert min(errors(z, aggregate(z, z["users"], torch.ones_like(z["n"]))[1])) > limit
    assert max(errors(z, aggregate(z, z["users"].flip(0), z["n"])[1])) < limit


def test_the_pool_keeps_the_last_upload_of_every_client_and_who_has_one():
    z = golden("fedavg_subset_order")
    stacks, server = aggregate(z, z["users"], z["n"])
    assert server.has_upload.nonzero()[:, 0].tolist() == sorted(z["users"].tolist())
    for k, v in stacks.items():
        assert torch.equal(server.uploads[k][server.has_upload], v[server.has_upload])
        assert not server.uploads[k][~server.has_upload].any()
    two = {k: v[[0, 1]] for k, v in stacks.items()}
    newer = PromptFL().aggregate(server, torch.tensor([1, 5]), two, torch.tensor([3, 1]))
    prompts = stacks["prompt"]
    assert newer.has_upload.nonzero()[:, 0].tolist() == [0, 1, 5, 6]
    assert torch.equal(newer.uploads["prompt"][[0, 1, 5, 6]], prompts[[0, 0, 1, 6]])
    assert error(newer.params["prompt"], 0.75 * prompts[0] + 0.25 * prompts[1]) < 1e-6
    assert server.has_upload.sum() == 3  # the older server is not changed
