"""A local step and a round of pFedMoAP in six ways, compared in one run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from fpl.bench.counting import VectorEncoder, count_round
from fpl.bench.measure import machine, memory, peak_speed, timed, wait
from fpl.bench.parts import Case, Parts, Pixels, make_world
from fpl.bench.ways import COMPILED, WAYS, load_model, names
from fpl.experiments.cache import device
from fpl.linear import ONEDNN
from fpl.methods import PFedMoAP
from fpl.prompts import Clip
from fpl.rounds import Training, run_rounds
from fpl.state import Tensors, take

COLUMNS = (
    "ms per step",
    "steps: times faster",
    "GFLOP per step",
    "share of peak",
    "MB at peak of a step",
    "first call, s",
    "tokens per encoding",
    "encodings forward",
    "encodings forward and backward",
    "round of parts, s",
    "rounds: times faster",
    "TFLOP per round",
    "round measured, s",
    "feature difference",
    "ctx gradient difference",
    "gate gradient difference",
)
SETTING = ["model", "classes", "batch", "clients", "steps"]


def tables(
    cases: Sequence[Case], repeats: int = 3, measure_round: bool = False
) -> Iterator[pd.DataFrame]:
    """Measure one case after the other; yield the lines so far."""
    made: list[pd.DataFrame] = []
    for case in tqdm(cases, "settings", unit="setting"):
        made.append(table(case, load_model(case.model), repeats, measure_round))
        yield pd.concat(made, ignore_index=True)


def table(case: Case, clip: Clip, repeats: int = 3, measure_round: bool = False) -> pd.DataFrame:
    """Return a line for each way.

    Ways take turns; times are medians over `repeats` turns, ratios medians of those within a turn.
    A step is one local step as `rounds.train_locally` makes it, in ms per client, GFLOP per client
    (with what is computed again to save memory), and MB in all (of 10^6 bytes, above what was in
    use before). The share is that of the speed of a product of large square matrices in the same
    turn. "round of parts" adds up the parts of a round, each measured: the experts' encodings, the
    steps of every client, and the evaluation of each on one batch. "round measured" is one that
    `run_rounds` made after another one; on a CPU only with `measure_round`. Encodings and tokens
    are counts. Arithmetic of the compiled way is that of the same without compiling, "first call"
    what its first step, encoding and evaluation took together. Differences are those to the first
    way, see `differences`.

    Raises ValueError for an unknown model and for too many classes.
    """
    listed = names(case.classes)
    found = differences(clip, listed[:10], case.method)
    world = make_world(clip, case)
    ways: dict[str, Counted] = {}
    absent = []
    for way in WAYS:
        try:
            parts = Parts(way, clip, world, listed)
            ways[way] = count(parts, [*ways.values()])
        except Exception as error:
            if way != COMPILED:
                raise
            reason, _, _ = str(error).strip().partition("\n")
            kind = type(error).__name__
            absent.append(f"{way}: not here, {kind} {reason[:100]}")
    for way, counted in ways.items():
        found.setdefault(way, {}).update(counted.line)
        if measure_round or device() == "cuda":
            found[way]["round measured, s"] = whole_round(counted.parts)
    seconds = take_turns(ways, repeats)
    lines = pd.DataFrame.from_dict(found, orient="index").loc[[*ways]]
    lines = lines.join(times(ways, seconds))
    lines = lines.reindex([*ways, *absent], columns=COLUMNS)
    lines = lines.rename_axis("way").reset_index()
    for at, name in enumerate(SETTING, start=1):
        lines.insert(at, name, getattr(case, name))
    peak = seconds["peak"].median()
    return lines.assign(**{"peak, GFLOP/s": peak, "machine": machine()})


@dataclass(frozen=True)
class Counted:
    """What was counted of a way: operations of each part, and columns of the table."""

    parts: Parts
    flops: Mapping[str, int]
    line: Mapping[str, Any]
    often: Mapping[str, float]  # how often a round makes each part


def count(parts: Parts, before: Sequence[Counted]) -> Counted:
    """Make the first calls of a way, and count.

    before: the ways before it; what is compiled cannot be counted and does what the last one does.
    """
    case = parts.world.case
    kind = type(parts.method)
    trained, read = encodings(kind, case.clients, parts.method.n_experts, case.steps)
    often = parts.in_round(read - case.clients)
    line: dict[str, Any] = {}
    if parts.way == COMPILED:
        calls = parts.calls.values()
        line["first call, s"] = sum(timed(call) for call in calls)
        flops = before[-1].flops
    else:
        flops = {part: operations(call) for part, call in parts.calls.items()}
    line |= {
        "MB at peak of a step": memory(parts.step) / 1e6,
        "tokens per encoding": parts.text.n_nodes,
        "encodings forward": read,
        "encodings forward and backward": trained,
        "GFLOP per step": flops["step"] / parts.size / 1e9,
        "TFLOP per round": sum(often[part] * flops[part] for part in often) / 1e12,
    }
    return Counted(parts, flops, line, often)


def operations(call: Any) -> int:
    """Return the floating-point operations of a call; a multiplication with its addition is two."""
    unknown = {torch.ops.aten._native_multi_head_attention: native_attention, ONEDNN: linear_map}
    with FlopCounterMode(display=False, custom_mapping=unknown) as counter:
        call()
    return counter.get_total_flops()


def native_attention(query: Sequence[int], *rest: Any, **named: Any) -> int:
    """Count PyTorch's fused self-attention (b, t, w): four maps, scores, and mixing."""
    b, t, w = query
    return 2 * b * t * (4 * w * w + 2 * t * w)


def linear_map(x: Sequence[int], w: Sequence[int], *rest: Any, **named: Any) -> int:
    """Count a linear map by oneDNN of rows x (..., i) with weights w (o, i)."""
    return 2 * math.prod(x) * w[0]


def encodings(kind: type[PFedMoAP], n: int, k: int, steps: int) -> tuple[int, int]:
    """Return how many prompts a round of n clients with K experts each encodes.

    With gradients, and forward only.
    """
    gen = torch.Generator().manual_seed(1)
    images = torch.randn(n * steps, 8, generator=gen)
    own = torch.arange(n * steps).split(steps)
    labels = torch.arange(n * steps) % 2
    clients = Pixels(images, labels, own, own, 2, pixels=images)
    method = kind(n_ctx=2, n_experts=k, d_gate=8, heads=1)
    training = Training(rounds=2, local_epochs=1, batch_size=1)
    return count_round(method, VectorEncoder(8, 8), clients, training)


def take_turns(ways: Mapping[str, Counted], repeats: int) -> pd.DataFrame:
    """Return seconds of each call in turns (rows).

    Column "peak" is the machine's speed in that turn, the better of before and after.
    """
    lines = []
    for _ in range(repeats):
        before = peak_speed()
        line: dict[Any, float] = {}
        for way, counted in ways.items():
            for part, call in counted.parts.calls.items():
                line[way, part] = timed(call)
        lines.append(line | {"peak": max(before, peak_speed())})
    return pd.DataFrame(lines)


def times(ways: Mapping[str, Counted], seconds: pd.DataFrame) -> pd.DataFrame:
    """Return the columns that tell of time, a line for each way."""
    step = pd.DataFrame()
    total = pd.DataFrame()
    speed = pd.DataFrame()
    for way, counted in ways.items():
        step[way] = seconds[way, "step"] / counted.parts.size
        each = [often * seconds[way, part] for part, often in counted.often.items()]
        total[way] = sum(each)
        speed[way] = counted.line["GFLOP per step"] / step[way]
    first = next(iter(ways))
    columns = {
        "ms per step": 1000 * step,
        "steps: times faster": step.rdiv(step[first], axis=0),
        "share of peak": speed.div(seconds["peak"], axis=0),
        "round of parts, s": total,
        "rounds: times faster": total.rdiv(total[first], axis=0),
    }
    return pd.DataFrame({name: values.median() for name, values in columns.items()})


def whole_round(parts: Parts) -> float:
    """Return the seconds of the second round of a run, in which everybody has experts."""
    made = run_rounds(parts.setup)
    next(made)
    return timed(lambda: next(made))


def differences(
    clip: Clip, names: Sequence[str], method: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """Return how far each way's features and gradients are from those of the first.

    Of text features the largest difference, of gradients the largest relative to the largest entry;
    in double precision, by the same code, for two clients with one expert and two images.
    """
    clip.model.double()
    small = Case("", len(names), 2, 2, 1, {**method, "n_experts": 1})
    world = make_world(clip, small)
    found: dict[str, dict[str, Tensor]] = {}
    for way in WAYS:
        try:
            features, learnt = all_gradients(Parts(way, clip, world, names))
        except Exception:
            if way != COMPILED:
                raise
            continue
        ctx = learnt.pop("ctx")
        flat = [value.flatten() for value in learnt.values()]
        of_gate = torch.cat(flat)
        found[way] = {"feature": features, "ctx gradient": ctx, "gate gradient": of_gate}
    clip.model.float()
    first = next(iter(found.values()))
    scale: dict[str, Any] = {what: x.abs().max() for what, x in first.items()}
    scale["feature"] = 1
    lines: dict[str, dict[str, float]] = {}
    for way, tensors in found.items():
        lines[way] = {}
        for what, x in tensors.items():
            largest = (x - first[what]).abs().max()
            lines[way][f"{what} difference"] = (largest / scale[what]).item()
    return lines


def all_gradients(parts: Parts) -> tuple[Tensor, Tensors]:
    """Return text features and gradients of all clients in a round, with their experts."""
    method = parts.method
    text = parts.text
    clients = parts.world.clients
    features = []
    learnt = []
    for ids in parts.groups:
        down = method.download(parts.world.server, ids, clients)
        context = method.context(text, down, ids, clients)
        reads = take(context, slice(None))
        own = [clients.train[i] for i in ids.tolist()]
        index = torch.stack(own)
        x = clients.training_inputs(method.inputs, index, 0)
        p = take(parts.world.local, ids)
        for value in p.values():
            value.requires_grad_()
        loss = method.loss(text, p, reads, x, clients.labels[index])
        found = torch.autograd.grad(loss.sum(), [*p.values()])
        learnt.append(dict(zip(p, found)))
        features.append(text(p["ctx"]).detach())
    stacked = {}
    for name in learnt[0]:
        stacked[name] = torch.cat([gradients[name] for gradients in learnt])
    return torch.cat(features), stacked


def shown(lines: pd.DataFrame) -> str:
    """Return markdown: for every setting a table with a column for each way."""
    peak = lines["peak, GFLOP/s"].median()
    pages = [f"{lines['machine'].iloc[0]}; peak {peak:.4g} GFLOP/s"]
    for setting, part in lines.groupby(SETTING, sort=False):
        model, classes, batch, n, steps = setting
        by_way = part.set_index("way")[[*COLUMNS]]
        upright = by_way.dropna(how="all").T
        text = printed(upright.dropna(how="all"))
        work = f"batches of {batch}, {n} clients, {steps} steps each"
        pages.append(f"{model}, {classes} classes, {work}")
        pages.append(text.rename_axis("").to_markdown(disable_numparse=True))
        pages += [way for way in part["way"] if way not in text]
    return "\n\n".join(pages)


def summary(lines: pd.DataFrame) -> str:
    """Return markdown: the machine, and a line of `ratios` for every setting."""
    found = printed(ratios(lines)).to_markdown(index=False, disable_numparse=True)
    return f"{lines['machine'].iloc[0]}\n\n{found}"


def printed(table: pd.DataFrame) -> pd.DataFrame:
    """Return the same as text: numbers of four digits, large ones with all before the point."""

    def text(x: Any) -> str:
        if isinstance(x, str):
            return x
        if pd.isna(x):
            return ""
        return f"{x:.4g}" if x < 1e4 else f"{x:.0f}"

    return table.astype(object).map(text)


def ratios(lines: pd.DataFrame) -> pd.DataFrame:
    """Return for every setting the ms per step of each way, and how many times (f) is faster."""
    found = []
    setting = ["model", "classes", "batch"]
    for key, part in lines.groupby(setting, sort=False):
        ways = part.set_index(part["way"].str[0])
        line = dict(zip(setting, key))
        line |= ways["ms per step"].add_suffix(", ms").to_dict()
        line["f, share of peak"] = ways["share of peak"]["f"]
        for what in ("steps", "rounds"):
            faster = ways[f"{what}: times faster"]
            line[f"{what}, a / f"] = faster["f"]
            line[f"{what}, b / f"] = faster["f"] / faster["b"]
        found.append(line)
    return pd.DataFrame(found)


def profile(case: Case, clip: Clip, kinds: int = 12) -> pd.DataFrame:
    """Return where a step of all clients spends its own time in the last two ways.

    kinds: how many operations, those that take most, of a second call.
    """
    lines = []
    world = make_world(clip, case)
    for way in list(WAYS)[-2:]:
        parts = Parts(way, clip, world, names(case.classes))
        parts.step()
        with torch.profiler.profile() as kept:
            parts.step()
            wait()
        own = f"self_{'device' if device() == 'cuda' else 'cpu'}_time_total"
        events = kept.key_averages()
        table = pd.DataFrame(
            {
                "way": way,
                "kind": [event.key[:60] for event in events],
                "calls": [event.count for event in events],
                "ms": [getattr(event, own) / 1000 for event in events],
            }
        )
        table["share"] = table["ms"] / table["ms"].sum()
        lines.append(table.nlargest(kinds, "ms"))
    return pd.concat(lines, ignore_index=True)
