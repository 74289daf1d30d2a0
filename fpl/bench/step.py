"""A local step and a round of pFedMoAP in six ways, from the shape of the released code to ours, compared in one run.

Every way is a method and a text encoder that go through the same `rounds.train_locally` and `rounds.evaluate`; each but the
first changes one thing of the way before it.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float
from open_clip import IMAGENET_CLASSNAMES
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from fpl import gate
from fpl.data.encoders import load, untrained
from fpl.data.files import ROOT
from fpl.methods import PFedMoAP, PromptFL, cross_entropy
from fpl.prompts import Clip, PromptTree
from fpl.rounds import Seeds, Training, evaluate, generator, run_rounds, train_locally
from fpl.state import Clients, Server, Tensors, take

NAMES = ROOT / "data" / "class_names"
LISTS = {10: "cifar10", 37: "oxfordpets", 47: "dtd", 100: "cifar100", 101: "food101", 102: "flowers102"}
MATRIX = {"cpu": 2048, "cuda": 8192}  # rows of the square matrices whose product is the machine's peak


def names(classes: int) -> list[str]:
    """The class names of the data set with that many classes, or the first of ImageNet's. Raises ValueError above 1,000."""
    if classes in LISTS:
        return (NAMES / f"{LISTS[classes]}.txt").read_text().split()
    if not 1 <= classes <= len(IMAGENET_CLASSNAMES):
        raise ValueError(f"--classes {classes}: there are names for 1 to {len(IMAGENET_CLASSNAMES)} classes")
    return IMAGENET_CLASSNAMES[:classes]


def loaded(model: str, device: str) -> Clip:
    """A model that has weights of its own, or one of open_clip's with random ones."""
    return load(model, device=device) if ":" in model else untrained(model, device)


class Prompts:
    """The usual text path: one sequence per class, ctx (n, m, w) -> unit text features (n, c, d), padded to 77 tokens or cut."""

    at_once = 1

    def __init__(self, clip: Clip, names: list[str], n_ctx: int, cut: bool):
        self.model, self.scale = clip.model, float(clip.model.logit_scale.exp())
        tokens = clip.tokenizer([f"{'X ' * n_ctx}{name.replace('_', ' ')}." for name in names])
        self.end, self.n_cls = tokens.argmax(-1), len(names)
        self.length = int(self.end.max()) + 1 if cut else tokens.shape[1]
        self.fixed = clip.model.token_embedding(tokens.to(clip.model.logit_scale.device))[:, : self.length]
        self.n_nodes = len(names) * self.length
        self.width, self.dim = clip.model.text_projection.shape

    def __call__(self, ctx: Float[Tensor, "n m w"]) -> Float[Tensor, "n c d"]:
        m, c = ctx.shape[1], len(self.fixed)
        fixed = self.fixed.expand(len(ctx), -1, -1, -1)
        x = torch.cat([fixed[:, :, :1], ctx.unsqueeze(1).expand(-1, c, -1, -1), fixed[:, :, 1 + m :]], dim=2)
        x = (x + self.model.positional_embedding[: self.length]).flatten(0, 1)
        x = self.model.transformer(x, attn_mask=self.model.attn_mask[: self.length, : self.length])
        x = x.unflatten(0, (len(ctx), c))[:, torch.arange(c), self.end]
        return F.normalize(self.model.ln_final(x) @ self.model.text_projection, dim=-1)

    @torch.no_grad()
    def images(self, x: Float[Tensor, "n b 3 s s"]) -> Float[Tensor, "n b d"]:
        """Unit image features: the image tower."""
        return self.model.encode_image(x.flatten(0, 1), normalize=True).unflatten(0, x.shape[:2])


def compiled(clip: Clip, names: list[str], n_ctx: int) -> PromptTree:
    """The prompt tree with every block of the transformer compiled; blocks that are alike share one compilation."""
    torch.compiler.reset()  # only so many versions of a function are kept, and those of other settings count
    text = PromptTree(clip, names, n_ctx)
    text.layer = torch.compile(text.layer, dynamic=False)
    return text


class Alone(PFedMoAP):
    """One client after the other, each encodes its own experts one by one, and the gate makes T_MoE (n, b, c, g)."""

    def cohorts(self, server, drawn):
        return [who for group in super().cohorts(server, drawn) for who in group.split(1)]

    def frozen(self, text, down, who, clients):
        if "experts" not in down:
            return {}
        return {"experts": torch.stack([self.pool(text(prompts)) for prompts in down["experts"].unbind(1)], dim=1)}

    def logits(self, text, t, p, f, x):
        local = PromptFL.logits(self, text, t, p, f, x)
        if "experts" not in f:
            return local
        experts = torch.cat([self.pool(t).unsqueeze(1), f["experts"]], dim=1)
        return text.scale * unfolded(p, self.pool(x), experts, self.heads, self.gate_scale) + self.lam * local


class FromPixels(Alone):
    """The image tower runs on every batch, without gradients, in training and in evaluation."""

    inputs = "pixels"

    def logits(self, text, t, p, f, x):
        return super().logits(text, t, p, f, text.images(x))


def unfolded(
    p: Tensors, image: Float[Tensor, "n b g"], experts: Float[Tensor, "n k c g"], heads: int, scale: float
) -> Float[Tensor, "n b c"]:
    """`gate.mix` as the released code has it: a query for every class, and the mixed text features themselves."""
    q = gate.linear(p, "q", image.unsqueeze(-2).expand(-1, -1, experts.shape[-2], -1)).unflatten(-1, (heads, -1))
    k, v = (gate.linear(p, part, experts).unflatten(-1, (heads, -1)) for part in "kv")
    a = torch.einsum("nbche,nkche->nhbkc", scale * q, k).softmax(-2)
    mixed = torch.einsum("nhbkc,nkche->nbche", a, v).flatten(-2)
    return (gate.linear(p, "o", mixed) * image.unsqueeze(-2)).sum(-1)


WAYS: dict[str, tuple[type[PFedMoAP], Callable[[Clip, list[str], int], Any]]] = {
    "a image tower, 77 tokens": (FromPixels, partial(Prompts, cut=False)),
    "b image features cached": (Alone, partial(Prompts, cut=False)),
    "c cut at EOS": (Alone, partial(Prompts, cut=True)),
    "d prompt tree": (Alone, PromptTree),
    "e clients stacked": (PFedMoAP, PromptTree),  # experts once for all who receive them, gate folded: what `fpl run` does
    "f compiled": (PFedMoAP, compiled),
}


@dataclass(frozen=True)
class Pixels(Clients):
    pixels: Float[Tensor, "images 3 s s"] | None = None


@dataclass(frozen=True)
class World:
    """What all ways work on: n clients who have uploaded, each with its own prompt and gate, and one batch of images.

    A client trains on its batch `steps` times an epoch and is tested on it. Images are random pixels, the same for all clients,
    with labels of their own, and their features are the image tower's: what they show does not change what a step costs.
    """

    clients: Pixels
    own: Tensors
    server: Server
    settings: dict[str, Any]  # of the method

    @classmethod
    def make(cls, clip: Clip, classes: int, n: int, batch: int, steps: int, settings: dict[str, Any]) -> World:
        gen, like = torch.Generator().manual_seed(1), clip.model.logit_scale
        size, width = clip.model.visual.image_size, clip.model.token_embedding.weight.shape[1]
        pixels = torch.randn(batch, 3, *((size, size) if isinstance(size, int) else size), generator=gen).to(like)
        with torch.no_grad():
            feats = clip.model.encode_image(pixels, normalize=True)
        labels = torch.randint(classes, (n * batch,), generator=gen).to(like.device)
        test = list(torch.arange(n * batch, device=like.device).split(batch))
        train = [own.repeat(steps) for own in test]
        text, method = SimpleNamespace(width=width), PFedMoAP(**settings)
        inits = [method.init(text, gen) for _ in range(n)]
        own = {k: torch.stack([init[k] for init in inits]).to(like) for k in inits[0]}
        seen = torch.ones(n, dtype=torch.bool, device=like.device)
        server = Server({"ctx": own["ctx"].mean(0)}, {"ctx": own["ctx"]}, seen, draw=partial(generator, 1))
        feats, pixels = feats.repeat(n, 1), pixels.repeat(n, 1, 1, 1)
        return cls(Pixels(feats, labels, train, test, classes, pixels=pixels), own, server, settings)


class Parts:
    """The parts of a round in one way, for the clients `who` that it treats at once: calls to be timed."""

    def __init__(self, way: str, clip: Clip, names: list[str], world: World):
        kind, encoder = WAYS[way]
        self.method, self.clients, n = kind(**world.settings), world.clients, len(world.server.seen)
        self.text = encoder(clip, names, self.method.n_ctx)
        cohorts = filter(len, self.method.cohorts(world.server, torch.arange(n)))
        self.groups = [who for cohort in cohorts for who in cohort.split(self.text.at_once)]
        self.who = self.groups[0]
        self.times = n / len(self.who)  # of the first group's cost, in a round
        self.own = take(world.own, self.who)
        experts = torch.randn(len(self.who), self.method.n_experts, len(names), self.method.d_gate).to(self.own["ctx"])
        self.order = [self.clients.test[i].unsqueeze(0) for i in self.who.tolist()]
        self.frozen, self.run = {"experts": 0.05 * experts}, Training(rounds=2, local_epochs=1, batch_size=self.order[0].shape[1])

    def step(self) -> None:
        """A local step of the clients."""
        train_locally(self.method, self.text, self.own, self.frozen, self.order, self.clients, self.run, lambda n: None)

    @torch.no_grad()
    def encode(self) -> Tensor:
        """A prompt of each of the clients encoded, without gradients."""
        return self.text(self.own["ctx"])

    def evaluate(self) -> None:
        """The clients evaluated on one batch each."""
        evaluate(self.method, self.text, self.own, self.frozen, self.clients, self.who.tolist())

    def in_round(self, experts: int, steps: int) -> dict[str, float]:
        """How often a round makes each of the calls, `experts` being its encodings of experts."""
        return {"step": steps * self.times, "encode": experts / len(self.who), "evaluate": self.times}


class Counting:
    """A text tower that costs nothing and counts prompts that it encodes, forward only, and forward and backward."""

    scale, width, dim, at_once = 1.0, 8, 8, 1000

    def __init__(self):
        self.forward = self.both = 0

    def __call__(self, ctx):
        prompts = ctx.shape[:-2].numel()
        self.both, self.forward = self.both + prompts * ctx.requires_grad, self.forward + prompts * (not ctx.requires_grad)
        return F.normalize(ctx[..., :2, :], dim=-1)

    def images(self, x):
        return x


def encodings(kind: type[PFedMoAP], n: int, k: int, steps: int) -> tuple[int, int]:
    """Prompts that a round of n clients with K experts each encodes, forward only and with gradients: counted in `rounds.run`."""
    text, images = Counting(), torch.randn(n * steps, 8, generator=torch.Generator().manual_seed(1))
    own = torch.arange(n * steps).split(steps)
    clients = Pixels(images, torch.arange(n * steps) % 2, own, own, 2, pixels=images)
    method = kind(n_ctx=2, n_experts=k, d_gate=8, heads=1)
    turns = run_rounds(method, text, clients, Training(rounds=2, local_epochs=1, batch_size=1), Seeds())
    next(turns)
    text.forward = text.both = 0
    next(turns)
    return text.forward, text.both


def table(
    model: str,
    classes: int,
    batch: int = 16,
    steps: int = 25,
    repeats: int = 3,
    device: str = "cpu",
    measure_round: bool = False,
    clip: Clip | None = None,
    n: int = 10,
    settings: dict[str, Any] | None = None,
) -> pd.DataFrame:
    """A line for each way. Ways take turns; times are medians over `repeats` turns, ratios medians of those within a turn.

    A step is one local step as `rounds.train_locally` makes it, in ms per client, GFLOP per client (with what is computed again
    to save memory), and MB in all (of 10^6 bytes, above what was in use before). The share is that of the speed of a product of
    large square matrices in the same turn.
    "round of parts" adds up the parts of a round, each measured: the experts' encodings, `steps` steps of every client, and the
    evaluation of each on one batch. "round measured" is one that `rounds.run` made after another one; on a CPU only where asked
    for. Encodings and tokens are counts. Arithmetic of the compiled way is that of the same without compiling, `first call` what
    its first step, encoding and evaluation took together. Differences are of the first way's: of the text features, the largest;
    of the gradients, the largest relative to the largest entry; in double precision, for two clients with one expert, two
    images and at most ten of the classes, by the same code. Raises ValueError for an unknown model and too many classes.
    """
    clip, listed, settings = clip or loaded(model, device), names(classes), settings or {}
    off = differences(clip, listed[:10], settings)
    world = World.make(clip, classes, n, batch, steps, settings)
    parts, lines, flops = {}, {}, {}
    for way, (kind, encoder) in WAYS.items():
        ready = Parts(way, clip, listed, world)
        forward, both = encodings(kind, n, ready.method.n_experts, steps)
        often = ready.in_round(forward - n, steps)
        try:
            flops[way], used, first = first_calls(ready, encoder is not compiled, device)
        except Exception as error:
            if encoder is not compiled:
                raise
            lines[f"{way}: not here, {type(error).__name__} {str(error).strip().partition(chr(10))[0][:100]}"] = {}
            continue
        flops[way] = flops[way] or flops["e clients stacked"]
        parts[way] = ready
        lines[way] = {
            "tokens per encoding": ready.text.n_nodes,
            "encodings forward": forward,
            "encodings forward and backward": both,
            "GFLOP per step": flops[way]["step"] / len(ready.who) / 1e9,
            "TFLOP per round": sum(often[part] * flops[way][part] for part in often) / 1e12,
            "MB at peak of a step": used / 1e6,
            "first call, s": first,
            **off.get(way, {}),
        }
    seconds = turns({(way, part): getattr(ready, part) for way, ready in parts.items() for part in flops[way]}, repeats, device)
    for way, ready in parts.items():
        often = ready.in_round(lines[way]["encodings forward"] - n, steps)
        step = seconds[way, "step"] / len(ready.who)
        total = sum(often[part] * seconds[way, part] for part in often)
        speed = lines[way]["GFLOP per step"] / step
        if ready is parts[next(iter(parts))]:
            first_step, first_total = step, total
        lines[way] |= {
            "ms per step": 1000 * step.median(),
            "steps: times faster": (first_step / step).median(),
            "share of peak": (speed / seconds["peak", "GFLOP/s"]).median(),
            "round of parts, s": total.median(),
            "rounds: times faster": (first_total / total).median(),
            "round measured, s": whole_round(ready) if measure_round or device == "cuda" else None,
        }
    about = {"model": model, "classes": classes, "batch": batch, "clients": n, "steps": steps}
    peak = {"peak, GFLOP/s": seconds["peak", "GFLOP/s"].median(), "machine": machine(device)}
    return pd.DataFrame([{"way": way} | about | {c: line.get(c) for c in COLUMNS} | peak for way, line in lines.items()])


COLUMNS = (
    *("ms per step", "steps: times faster", "GFLOP per step", "share of peak", "MB at peak of a step", "first call, s"),
    *("tokens per encoding", "encodings forward", "encodings forward and backward"),
    *("round of parts, s", "rounds: times faster", "TFLOP per round", "round measured, s"),
    *("feature difference", "ctx gradient difference", "gate gradient difference"),
)


def shown(lines: pd.DataFrame) -> str:
    """Markdown: for every setting a table with a column for each way."""
    pages = [f"{lines['machine'].iloc[0]}; peak {lines['peak, GFLOP/s'].median():.4g} GFLOP/s"]
    for (model, classes, batch, n, steps), part in lines.groupby(["model", "classes", "batch", "clients", "steps"], sort=False):
        upright = part.set_index("way")[list(COLUMNS)].dropna(how="all").T.dropna(how="all")
        text = printed(upright)
        pages.append(f"{model}, {classes} classes, batches of {batch}, {n} clients, {steps} steps each")
        pages.append(text.rename_axis("").to_markdown(disable_numparse=True))
        pages += [way for way in part["way"] if way not in text]
    return "\n\n".join(pages)


def printed(table: pd.DataFrame) -> pd.DataFrame:
    """The same as text: four digits, whole numbers with all."""
    text = lambda x: x if isinstance(x, str) else "" if pd.isna(x) else f"{x:.4g}" if x < 1e4 else f"{x:.0f}"  # noqa: E731
    return table.astype(object).map(text)


def summary(lines: pd.DataFrame) -> str:
    """Markdown: the machine, and a line of `ratios` for every setting."""
    found = printed(ratios(lines))
    return f"{lines['machine'].iloc[0]}\n\n{found.to_markdown(index=False, disable_numparse=True)}"


def turns(calls: dict[tuple[str, str], Callable[[], object]], repeats: int, device: str) -> pd.DataFrame:
    """Seconds of each call in turns (rows), and the machine's peak in that turn, the better of before and after."""
    lines = []
    for _ in range(repeats):
        before = peak(device)
        line = {key: timed(call) for key, call in calls.items()}
        lines.append(line | {("peak", "GFLOP/s"): max(before, peak(device))})
    return pd.DataFrame(lines)


def first_calls(parts: Parts, counted: bool, device: str) -> tuple[dict[str, int], float, float | None]:
    """Floating-point operations (a multiplication with its addition is two) of each part, and bytes at the peak of a step.

    What is compiled cannot be counted: of it, the seconds of the first calls.
    """
    calls = {part: getattr(parts, part) for part in ("step", "encode", "evaluate")}
    if not counted:
        seconds = timed(lambda: [call() for call in calls.values()])
        return {}, memory(parts.step, device), seconds
    done, used = {}, {}
    attention = {torch.ops.aten._native_multi_head_attention: native_attention}
    for part, call in calls.items():
        with FlopCounterMode(display=False, custom_mapping=attention) as counter:
            used[part] = memory(call, device)
        done[part] = counter.get_total_flops()
    return done, used["step"], None


def native_attention(query, key, value, width, *rest, out_shape=None, **named) -> int:
    """Of PyTorch's fused self-attention (b, t, w), used without gradients: four maps, scores, and mixing."""
    b, t, w = query
    return 2 * b * t * (4 * w * w + 2 * t * w)


def gradients(method: PromptFL, text, p: Tensors, f: Tensors, x: Tensor, y: Tensor) -> tuple[Tensor, Tensors]:
    """Text features, and the gradients of the clients' losses to what they learn."""
    p = {k: v.clone().requires_grad_() for k, v in p.items()}
    t = method.encode(text, p)
    z = method.logits(text, t, p, f, x)
    cross_entropy(z, y).sum().backward()
    return t.detach(), {k: v.grad for k, v in p.items()}


def step(method: PromptFL, text, ctx: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Text features and the gradient of the loss to the context, of a method that learns nothing else."""
    t, found = gradients(method, text, {"ctx": ctx}, {}, x, y)
    return t, found["ctx"]


def all_gradients(way: str, clip: Clip, names: list[str], world: World) -> tuple[Tensor, Tensors]:
    """Text features and gradients of all clients in a round, group by group, with the experts that they download."""
    parts = Parts(way, clip, names, world)
    found = []
    for who in parts.groups:
        down = parts.method.download(world.server, who, world.clients)
        reads = take(parts.method.frozen(parts.text, down, who, world.clients), slice(None))
        images = getattr(world.clients, parts.method.inputs)
        index = torch.stack([world.clients.train[i] for i in who.tolist()])
        y = world.clients.labels[index]
        found.append(gradients(parts.method, parts.text, take(world.own, who), reads, images[index], y))
    features, learnt = zip(*found, strict=True)
    return torch.cat(features), {k: torch.cat([one[k] for one in learnt]) for k in learnt[0]}


def differences(clip: Clip, names: list[str], settings: dict[str, Any], dtype=torch.float64) -> dict[str, dict[str, float]]:
    """Of each way that can be had here: how far its features and gradients are from those of the first."""
    clip.model.to(dtype)
    world, found, lines = World.make(clip, len(names), 2, 2, 1, settings | {"n_experts": 1}), {}, {}
    for way, (_, encoder) in WAYS.items():
        try:
            features, learnt = all_gradients(way, clip, names, world)
        except Exception:
            if encoder is not compiled:
                raise
            continue
        of_gate = torch.cat([v.flatten() for k, v in learnt.items() if k != "ctx"])
        found[way] = {"feature": features, "ctx gradient": learnt["ctx"], "gate gradient": of_gate}
        first = next(iter(found.values()))
        lines[way] = {
            f"{what} difference": ((x - first[what]).abs().max() / (1 if what == "feature" else first[what].abs().max())).item()
            for what, x in found[way].items()
        }
    clip.model.float()
    return lines


def whole_round(parts: Parts) -> float:
    """Seconds of the second round of a run, in which everybody has experts."""
    made = run_rounds(parts.method, parts.text, parts.clients, parts.run, Seeds())
    next(made)
    return timed(lambda: next(made))


def timed(call: Callable[[], object]) -> float:
    """Seconds; a GPU is waited for."""
    wait()
    begin = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - begin


def wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak(device: str) -> float:
    """GFLOP/s of a product of square matrices in single precision, the best of three."""
    a = torch.randn(MATRIX[device], MATRIX[device], device=device)
    return max(2 * len(a) ** 3 / timed(lambda: a @ a) for _ in range(3)) / 1e9


def memory(call: Callable[[], object], device: str) -> float:
    """Bytes in use at the peak of a call, above those before it; nan where the system does not say."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system, so that it counts when it is taken again
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    except (AttributeError, OSError):
        return float("nan")
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def resident(what: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    return 1024 * int(re.search(rf"{what}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])


def machine(device: str) -> str:
    """The machine in words."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    name = found[1] if found else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads on {os.cpu_count()} cores, torch {torch.__version__}"


def profile(
    model: str,
    classes: int,
    batch: int,
    device: str,
    kinds: int = 12,
    clip: Clip | None = None,
    n: int = 10,
    settings: dict[str, Any] | None = None,
) -> pd.DataFrame:
    """Where a step of all clients spends its own time in the last two ways: the operations that take most, of a second call."""
    clip, lines = clip or loaded(model, device), []
    world = World.make(clip, classes, n, batch, 1, settings or {})
    for way in list(WAYS)[-2:]:
        parts = Parts(way, clip, names(classes), world)
        parts.step()
        with torch.profiler.profile() as kept:
            parts.step()
            wait()
        own = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
        by_kind = sorted(((getattr(e, own) / 1000, e.key, e.count) for e in kept.key_averages()), reverse=True)
        total = sum(ms for ms, _, _ in by_kind)
        lines += [{"way": way, "kind": key[:60], "calls": c, "ms": ms, "share": ms / total} for ms, key, c in by_kind[:kinds]]
    return pd.DataFrame(lines)


def ratios(lines: pd.DataFrame) -> pd.DataFrame:
    """For every setting the ms per step of each way, and how many times the last is faster than the first two, step and round."""
    found = []
    for (model, classes, batch), part in lines.groupby(["model", "classes", "batch"], sort=False):
        ways = part.set_index(part["way"].str[0])
        line = {"model": model, "classes": classes, "batch": batch, **ways["ms per step"].add_suffix(", ms")}
        line["f, share of peak"] = ways["share of peak"]["f"]
        for what in ("steps", "rounds"):
            of = ways[f"{what}: times faster"]
            line |= {f"{what}, a / f": of["f"], f"{what}, b / f": of["f"] / of["b"]}
        found.append(line)
    return pd.DataFrame(found)


def tables(models: Sequence[str], classes: Sequence[int], batches: Sequence[int], **named) -> Iterator[pd.DataFrame]:
    """`table` of every combination, one after the other: the lines so far."""
    made: list[pd.DataFrame] = []
    for setting in tqdm([*itertools.product(models, classes, batches)], "settings", unit="setting"):
        made.append(table(*setting, **named))
        yield pd.concat(made, ignore_index=True)
