"""What a round of pFedMoAP costs as clients, classes, local steps or experts grow, one at a time, in the code of `fpl run`; and
what the evaluation of one client on many images takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F

from fpl.bench import step
from fpl.methods import PFedMoAP
from fpl.prompts import Clip, PromptTree
from fpl.rounds import Seeds, Training, evaluate, run_rounds
from fpl.state import Clients

GROWTH = {  # of each, the first is what it stays at while another one grows
    "clients": (10, 30, 100, 300, 1000),
    "classes": (10, 30, 100, 300, 1000),
    "steps": (5, 1, 25, 125),
    "experts": (9, 1, 3, 29),
}


def table(clip: Clip, growth: dict[str, Sequence[int]], batch: int, device: str, **settings) -> pd.DataFrame:
    """A line for each value of each quantity, with counts, seconds and memory of the second round of a run.

    With N clients and K experts each, an expert is read by K receivers in the mean. Where K grows, all have the clients that the
    largest K needs. Clients have one batch of random features each, which an epoch sees `steps` times, and are tested on it.
    `MB` is above what was in use before the run, `process MB` all of the process, weights included; MB of 10^6 bytes.
    `settings` are others of the method.
    """
    first = {what: values[0] for what, values in growth.items()}
    crowd = max(first["clients"], max(growth["experts"]) + 1)
    cases = [
        (what, {**first, what: value, **({"clients": crowd} if what == "experts" else {})})
        for what, values in growth.items()
        for value in (sorted(values) if len(values) > 1 else [])
    ]
    lines = [
        {"grows": what, **case, **cost(clip, **case, batch=batch, device=device, settings=settings)}
        for what, case in cases or [("", first)]
    ]
    return pd.DataFrame(lines).assign(batch=batch, machine=step.machine(device))


def evaluation(clip: Clip, images: int, classes: int, experts: int, device: str, **settings) -> pd.DataFrame:
    """One client tested on many images, as `rounds.run` does after every round, its experts' features being there.

    `MB` (10^6 bytes) is above what was in use before, which has the features of the images. `settings` are others of the method.
    """
    text, gen = PromptTree(clip, step.names(classes)), torch.Generator().manual_seed(1)
    method = PFedMoAP(n_experts=experts, **settings)
    feats = F.normalize(torch.randn(images, text.dim, generator=gen), dim=-1).to(device)
    everything = [torch.arange(images, device=device)]
    clients = Clients(feats, torch.zeros(images, dtype=torch.long, device=device), everything, everything, classes)
    own = {k: v.unsqueeze(0).to(device) for k, v in method.init(text, gen).items()}
    frozen = {"experts": F.normalize(torch.randn(1, experts, classes, method.d_gate, generator=gen), dim=-1).to(device)}

    def call() -> None:
        evaluate(method, text, own, frozen, clients, [0])

    call()
    line = {"images": images, "classes": classes, "experts": experts, "seconds": step.timed(call)}
    return pd.DataFrame([line | {"MB": step.memory(call, device) / 1e6, "machine": step.machine(device)}])


def cost(
    clip: Clip, clients: int, classes: int, steps: int, experts: int, batch: int, device: str, settings: dict[str, Any]
) -> dict[str, float]:
    """Counts are of prompts encoded in a round: experts' as we do it, and if every receiver encoded its own."""
    text, gen = PromptTree(clip, step.names(classes)), torch.Generator().manual_seed(1)
    feats = F.normalize(torch.randn(clients * batch, text.dim, generator=gen), dim=-1).to(device)
    labels = torch.randint(classes, (clients * batch,), generator=gen).to(device)
    test = list(torch.arange(clients * batch, device=device).split(batch))
    images = Clients(feats, labels, [own.repeat(steps) for own in test], test, classes)
    cfg = Training(rounds=2, local_epochs=1, batch_size=batch)
    made, seconds = run_rounds(PFedMoAP(n_experts=experts, **settings), text, images, cfg, Seeds()), []

    def both():
        next(made)
        seconds.append(step.timed(lambda: next(made)))

    used = step.memory(both, device)
    forward, backward = step.encodings(PFedMoAP, clients, experts, steps)
    return {
        "tokens per encoding": text.n_nodes,
        "experts encoded": forward - clients,
        "if by each receiver": step.encodings(step.Alone, clients, experts, steps)[0] - clients,
        "encoded with gradients": backward,
        "seconds": seconds[0],
        "MB": used / 1e6,
        "process MB": step.resident("VmHWM") / 1e6 if used == used and device == "cpu" else None,
    }
