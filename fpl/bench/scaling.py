"""How a round of pFedMoAP grows with its parts, and what the evaluation of one client takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F

from fpl.bench.measure import machine, memory, resident, timed
from fpl.bench.parts import draw_clients
from fpl.bench.step import encodings
from fpl.bench.ways import SequentialPFedMoAP, names
from fpl.experiments.cache import device
from fpl.methods import PFedMoAP
from fpl.prompts import Clip, PromptTree
from fpl.rounds import Setup, Training, evaluate, run_rounds

GROWTH = {  # of each, the first is what it stays at while another one grows
    "clients": (10, 30, 100, 300, 1000),
    "classes": (10, 30, 100, 300, 1000),
    "steps": (5, 1, 25, 125),
    "experts": (9, 1, 3, 29),
}


def table(
    clip: Clip, growth: Mapping[str, Sequence[int]], batch: int, **settings: Any
) -> pd.DataFrame:
    """Return a line for each value of each quantity, with the cost of the second round of a run.

    With n clients and k experts each, an expert is read by k receivers in the mean. Where k grows,
    all have the clients that the largest k needs. `MB` is above what was in use before the run,
    `process MB` all of the process, weights included; MB of 10^6 bytes. settings: others of the
    method.
    """
    first = {what: values[0] for what, values in growth.items()}
    crowd = max(first["clients"], max(growth["experts"]) + 1)
    lines: list[dict[str, Any]] = []
    for what, values in growth.items():
        many = {"clients": crowd} if what == "experts" else {}
        for value in sorted(values) if len(values) > 1 else []:
            lines.append({"grows": what} | first | {what: value} | many)
    lines = lines or [{"grows": "", **first}]
    for line in lines:
        line |= cost(clip, line, batch, settings)
    return pd.DataFrame(lines).assign(batch=batch, machine=machine())


def evaluation(
    clip: Clip, images: int, classes: int, experts: int, **settings: Any
) -> pd.DataFrame:
    """Measure one client tested on many images after a round, its experts' features being there.

    `MB` (10^6 bytes) is above what was in use before, which has the features of the images.
    settings: others of the method.
    """
    text = PromptTree(clip, names(classes))
    gen = torch.Generator().manual_seed(1)
    method = PFedMoAP(n_experts=experts, **settings)
    clients = draw_clients(1, images, text.dim, classes)
    p = {}
    for name, value in method.init(text, gen).items():
        p[name] = value.unsqueeze(0).to(device())
    encoded = torch.randn(1, experts, classes, method.d_gate, generator=gen)
    features = F.normalize(encoded, dim=-1)
    context = {"experts": features.to(device())}

    def call() -> None:
        evaluate(method, text, p, context, clients, torch.tensor([0]))

    call()
    line = {
        "images": images,
        "classes": classes,
        "experts": experts,
        "seconds": timed(call),
        "MB": memory(call) / 1e6,
        "machine": machine(),
    }
    return pd.DataFrame([line])


def cost(
    clip: Clip, case: Mapping[str, Any], batch: int, settings: Mapping[str, Any]
) -> dict[str, float | None]:
    """Return what a round encodes, its seconds and its memory.

    Experts are counted as we encode them, and as if every receiver encoded its own. Clients have
    one batch of random features each, which an epoch sees `steps` times, and are tested on it.
    """
    n = case["clients"]
    steps = case["steps"]
    k = case["experts"]
    text = PromptTree(clip, names(case["classes"]))
    clients = draw_clients(n, batch, text.dim, text.n_cls)
    train = [own.repeat(steps) for own in clients.test]
    clients = replace(clients, train=train)
    method = PFedMoAP(n_experts=k, **settings)
    training = Training(rounds=2, local_epochs=1, batch_size=batch)
    rounds = run_rounds(Setup(method, text, clients, training))
    seconds = []

    def both() -> None:
        next(rounds)
        seconds.append(timed(lambda: next(rounds)))

    used = memory(both)
    trained, read = encodings(PFedMoAP, n, k, steps)
    _, alone = encodings(SequentialPFedMoAP, n, k, steps)
    says = used == used and device() == "cpu"  # nan where the system does not say
    return {
        "tokens per encoding": text.n_nodes,
        "experts encoded": read - n,
        "if by each receiver": alone - n,
        "encoded with gradients": trained,
        "seconds": seconds[0],
        "MB": used / 1e6,
        "process MB": resident("VmHWM") / 1e6 if says else None,
    }
