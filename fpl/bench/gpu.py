"""One script for a day with a GPU: what was tested on a CPU only, and which targets are met.

A part is made of jobs. What a job finds is kept. A job that fails, or for which its part has no
seconds left, is named with the reason, and the next one begins.
"""

from __future__ import annotations

import copy
import gc
import math
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from pandas import DataFrame
from PIL import Image
from torch import Tensor
from torch.utils import collect_env
from tqdm.auto import tqdm

from fpl.bench import features as photos
from fpl.bench.measure import machine, memory, timed
from fpl.bench.parts import Case, draw_clients, make_world
from fpl.bench.verdicts import (
    FIRST,
    IMAGE,
    LEARNING,
    PARTS,
    TEXT,
    TOLERANCE,
    WRONG,
    best_budget,
    targets,
)
from fpl.bench.ways import COMPILED, WAYS, PixelPrompts, load_model, names
from fpl.data import encoders, extraction, features, world
from fpl.data.manifest import read_manifest
from fpl.data.text import one_line
from fpl.experiments import verbs
from fpl.experiments.cache import device
from fpl.experiments.settings import ROWS, part_of
from fpl.prompts import PRECISIONS, Clip, PromptTree
from fpl.rounds import Setup, Training, run_rounds
from fpl.state import take

ENOUGH = 5.0  # seconds after which a round is not made again


class Number(NamedTuple):
    """What was measured, in which unit, and of what, if not of the job."""

    what: str
    value: float
    unit: str = ""
    of: str = ""


Job = Callable[[], Iterable[Number]]


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    case: of a round; classes: how many, in turn. demo: the model of devices and precision. drawn:
    training and test images of a class of the demo's world; rounds, seeds: of runs on it. images:
    to extract. budgets: nodes. trial: sizes are small, and nothing is compiled. seconds: of a part,
    in place of those of PARTS, which end in under ten minutes.
    """

    case: Case = field(default_factory=lambda: Case("ViT-B-16-quickgelu", 102))
    classes: Sequence[int] = (10, 102)
    demo: str = field(default_factory=verbs.demo_clip)
    drawn: tuple[int, int] = (16, 20)
    rounds: int = 5
    seeds: Sequence[int] = (1, 2, 3)
    images: int = 2048
    repeats: int = 2
    budgets: Sequence[int] = (2048, 4096, 8192, 16384, 32768)
    trial: bool = False
    seconds: Mapping[str, float] = field(default_factory=dict)


def small() -> Sizes:
    """Return sizes that a CPU measures in seconds."""
    return Sizes(
        case=Case(verbs.demo_clip(), 3, batch=2, clients=3, steps=2, method={"n_experts": 2}),
        classes=(3,),
        drawn=(2, 1),
        rounds=1,
        seeds=(1, 2),
        images=4,
        repeats=1,
        budgets=(64, 128),
        trial=True,
    )


class Work:
    """The jobs of every part, and what several of them need, made by the first."""

    def __init__(self, sizes: Sizes):
        self.sizes = sizes
        others = [f"cuda:{i}" for i in range(1, torch.cuda.device_count())]
        ways = (FIRST, *list(WAYS)[-2:])
        each: dict[str, dict[str, Job]] = {part: {} for part in PARTS}
        each["devices"] = {row: partial(self.row, row) for row in ROWS}
        each["devices"]["image tower"] = self.image_tower
        for row in LEARNING:
            for kind in PRECISIONS:
                each["precision"][f"{row}, {kind}"] = partial(self.accuracy, row, kind)
        each["extraction"]["extraction"] = self.extraction
        for n in sizes.classes:
            for way in ways:
                each["rounds"][f"{n} classes, {way}"] = partial(self.whole_rounds, n, way)
        for nodes in sizes.budgets:
            each["budget"][f"{nodes} nodes"] = partial(self.encoding, nodes)
        each["several GPUs"]["all"] = partial(self.on_all, others)
        self.jobs = each

    @cached_property
    def clip(self) -> Clip:
        """The model whose speed is measured."""
        return load_model(self.sizes.case.model)

    @cached_property
    def demos(self) -> tuple[Clip, Clip]:
        """The demo's model on the CPU, and here."""
        return encoders.load(self.sizes.demo), load_model(self.sizes.demo)

    @cached_property
    def drawings(self) -> features.Features:
        """Features of the demo's world."""
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            manifest = read_manifest(world.make(folder, 1, *self.sizes.drawn))
            path = extraction.extract(manifest, self.demos[1], folder / "drawn.h5")
            return features.load(path, device=device())

    def row(self, row: str) -> Iterator[Number]:
        """Train four clients here and on the CPU, from the same random images."""
        asked = part_of({"n_experts": 2, "d_gate": 16, "heads": 4}, ROWS[row])
        asked |= {"rounds": 2, "local_epochs": 1, "batch_size": 4, "lr": 0.02} | ROWS[row].training
        cpu, here = [
            answers(verbs.train(row, clip, random_clients(clip), progress=False, **asked))
            for clip in self.demos
        ]
        pairs = [*zip(cpu, here, strict=True)]
        texts = [distance(t, other) for (t, _), (other, _) in pairs if t is not None]
        if texts:
            yield Number(TEXT, max(texts))
        counts = [count_changed(z, other) for (_, z), (_, other) in pairs]
        yield Number("other predictions", sum(changed for changed, _ in counts), "images")
        yield Number(WRONG, sum(wrong for _, wrong in counts), "images")

    def image_tower(self) -> Iterator[Number]:
        """Encode the same random pixels here and on the CPU, in single precision."""
        shape = self.demos[0].transform(Image.new("RGB", (64, 64))).shape
        x = torch.randn(8, *shape, generator=torch.Generator().manual_seed(1))
        cpu, here = [
            extraction.image_features(clip, x.to(extraction.device_of(clip)), "feats").cpu()
            for clip in self.demos
        ]
        yield Number(IMAGE, distance(cpu, here))

    def accuracy(self, row: str, kind: str) -> Iterator[Number]:
        """Train a row on the demo's world in a precision."""
        asked = part_of(dict(self.sizes.case.method), ROWS[row])
        asked |= {"rounds": self.sizes.rounds, "precision": kind}
        found: list[float] = []

        def train(seed: int) -> None:
            clients = verbs.split(self.drawings, seed)
            result = verbs.train(row, self.demos[1], clients, progress=False, **asked)
            found.append(100 * result.accuracy.mean().item())

        first, *others = self.sizes.seeds
        peak = memory(partial(train, first))
        for seed in others:
            train(seed)
        yield Number("accuracy", statistics.mean(found), "%")
        yield Number("range over seeds", max(found) - min(found), "points")
        yield Number("at peak", peak / 1e6, "MB")

    def extraction(self) -> Iterator[Number]:
        """Extract beside the bare model on the same images, and beside decoding alone."""
        sizes = self.sizes
        batch = extraction.BATCH[device()]
        asked = sizes.images, batch, workers(), sizes.repeats
        tables: list[DataFrame] = []
        peak = memory(lambda: tables.append(photos.extract(self.clip, *asked)))
        for line in tables[0].to_dict("records"):
            yield Number("rate", line["images/s"], "images/s", line["way"])
            yield Number("share of bare model", line["share of bare model"], of=line["way"])
        yield Number("at peak", peak / 1e6, "MB", "all, with every image's pixels")

    def whole_rounds(self, classes: int, way: str) -> Iterator[Number]:
        """Measure rounds with experts; one is made before, or two where they compile."""
        case = replace(self.sizes.case, classes=classes)
        method = WAYS[way][0](**case.method)
        text = in_half(way, self.clip, names(classes), method.n_ctx)
        clients = make_world(self.clip, case).clients
        training = Training(rounds=6, local_epochs=1, batch_size=case.batch)
        one = partial(next, run_rounds(Setup(method, text, clients, training)))
        taken: list[float] = []
        with torch.compiler.set_stance("force_eager" if self.sizes.trial else "default"):
            before = timed(one) + (timed(one) if way == COMPILED else 0)
            yield Number("before, compiling included", before, "s")
            peak = memory(lambda: taken.append(timed(one)))
            while len(taken) < 3 and sum(taken) < ENOUGH:
                taken.append(timed(one))
        yield Number("round", statistics.median(taken), "s")
        yield Number("at peak", peak / 1e6, "MB")

    def encoding(self, nodes: int) -> Iterator[Number]:
        """Encode as many prompts as a budget of nodes has room for, with their gradients."""
        listed = names(max(self.sizes.classes))
        text = PromptTree(self.clip, listed, budget=nodes, precision="half")
        n = text.at_once
        gen = torch.Generator().manual_seed(1)
        drawn = 0.02 * torch.randn(n, text.n_ctx, text.width, generator=gen)
        ctx = drawn.to(device()).requires_grad_()

        def call() -> None:
            torch.autograd.grad(text(ctx).sum(), ctx)

        call()
        yield Number("at peak", memory(call) / 1e6, "MB")
        seconds = statistics.median(timed(call) for _ in range(5))
        yield Number("prompts at once", n)
        yield Number("an encoding", 1000 * seconds / n, "ms")

    def on_all(self, others: Sequence[str]) -> Iterator[Number]:
        """Extract on the first device and with the others, each once before it counts."""
        yield Number("GPUs", torch.cuda.device_count())
        if not others:
            return
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            manifest = photos.draw_photos(folder, self.sizes.images)
            for of, used in (("one", ()), ("all", others)):
                options = extraction.Options(workers(), used)
                call = partial(extraction.extract, manifest, self.clip, options=options)
                call(folder / "first.h5")
                seconds = timed(partial(call, folder / "second.h5"))
                yield Number("rate", self.sizes.images / seconds, "images/s", of)


def workers() -> int:
    """Return how many processes decode images."""
    return min(os.cpu_count() or 1, 16) if device() == "cuda" else 0


class HalfPixels(PixelPrompts):
    """The released code's shape with weights in half precision, as the released code has them."""

    def __call__(self, ctx: Float[Tensor, "n m w"]) -> Float[Tensor, "n c d"]:
        return super().__call__(ctx.half()).float()

    def images(self, x: Float[Tensor, "n b 3 s s"]) -> Float[Tensor, "n b d"]:
        """Return unit image features."""
        return super().images(x.half()).float()


def in_half(way: str, clip: Clip, listed: Sequence[str], n_ctx: int) -> Any:
    """Return the text encoder of a way, in half precision."""
    if way == FIRST:
        halved = replace(clip, model=copy.deepcopy(clip.model).half())
        return HalfPixels(halved, listed, n_ctx)
    text = WAYS[way][1](clip, listed, n_ctx)
    text.precision = "half"
    return text


def random_clients(clip: Clip) -> verbs.Split:
    """Draw four clients with eight images each, where the model is; patches are drawn, too."""
    place = extraction.device_of(clip)
    classes = tuple(names(10))
    drawn = draw_clients(4, 8, PromptTree(clip, classes).dim, len(classes))
    gen = torch.Generator().manual_seed(2)
    patches = torch.randn(32, 4, drawn.feats.shape[1], generator=gen).to(place)
    own = [index.to(place) for index in drawn.test]
    tensors = drawn.feats.to(place), drawn.labels.to(place)
    return verbs.Split(*tensors, own, own, len(classes), patches, classes=classes)


@torch.no_grad()
def answers(result: verbs.Result) -> list[tuple[Tensor | None, Float[Tensor, "images c"]]]:
    """Return every client's text features, where it has any, and logits on its test images."""
    setup, last = result.setup, result.rounds[-1]
    method, text, clients = setup.method, setup.text, setup.clients
    found = []
    for cohort in last.cohorts:
        for at, i in enumerate(cohort.client_ids):
            p = take(last.evaluated, i.view(1))
            reads = take(cohort.context, slice(at, at + 1))
            t = method.encode(text, p, reads)
            x = getattr(clients, method.inputs)[clients.test[int(i)]].unsqueeze(0)
            z = method.logits(text, t, p, reads, x)
            found.append((t if t is None else t.cpu(), z[0].cpu()))
    return found


def distance(a: Tensor, b: Tensor) -> float:
    """Return the largest difference. Raises FloatingPointError for one that is not finite."""
    largest = (a - b).abs().max().item()
    if not math.isfinite(largest):
        raise FloatingPointError("features are not finite")
    return largest


def count_changed(
    z: Float[Tensor, "images c"], other: Float[Tensor, "images c"]
) -> tuple[int, int]:
    """Return how many predictions differ, and how many of these are no ties.

    In a tie the two best logits, of `z`, are no further apart than the tolerance.
    """
    changed = z.argmax(-1) != other.argmax(-1)
    first, second = z.topk(2).values.unbind(-1)
    tie = first - second <= TOLERANCE * z[z.isfinite()].abs().max()
    return int(changed.sum()), int((changed & ~tie).sum())


@contextmanager
def within(seconds: float, over: str) -> Iterator[None]:
    """Raise TimeoutError in the block when its seconds are over, and again if that is caught."""

    def stop(*_: object) -> None:
        raise TimeoutError(over)

    if seconds <= 0:
        stop()
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 10)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def play(part: str, jobs: Mapping[str, Job], seconds: float, report: dict[str, Any]) -> None:
    """Do the jobs of a part in its seconds; numbers and failures are added to the report."""
    end = time.monotonic() + seconds
    for label, job in tqdm(jobs.items(), part, unit="job"):
        why = ""
        try:
            with within(end - time.monotonic(), f"the part's {seconds:g} s are over"):
                for what, value, unit, of in job():
                    line = {"part": part, "of": of or label, "what": what}
                    # JSON has no nan, which is memory of which the system says nothing
                    known = value if math.isfinite(value) else None
                    report["numbers"].append({**line, "value": known, "unit": unit})
        except Exception as error:
            why = one_line(f"{type(error).__name__}: {error}")[:200]
            report["failures"].append({"part": part, "of": label, "why": why})
        if why.startswith("OutOfMemory"):
            tidy()
    tidy()


def tidy() -> None:
    """Give back the memory of jobs that ended early, if the device still listens."""
    with suppress(Exception):
        gc.collect()
        torch.cuda.empty_cache()


def reports(sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Make one part after the other; yield all that is known so far, as JSON can hold it."""
    work = Work(sizes)
    report: dict[str, Any] = {"versions": versions(), "sizes": asdict(sizes)}
    report |= {"device": device(), "numbers": [], "failures": []}
    for part, jobs in work.jobs.items():
        _, usual = PARTS[part]
        play(part, jobs, sizes.seconds.get(part, usual), report)
        yield report | {"targets": targets(report), "best budget, nodes": best_budget(report)}


def versions() -> dict[str, Any]:
    """Return what the numbers depend on."""
    half = torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
    return {
        "card": card(),
        "machine": machine(),
        "GPUs": torch.cuda.device_count(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),
        "driver": collect_env.get_nvidia_driver_version(collect_env.run),
        "matrix products in single": torch.get_float32_matmul_precision(),
        "TF32 in convolutions": torch.backends.cudnn.allow_tf32,
        "half precision in sums of half": half,
    }


def card() -> str:
    """Return the name of the GPU, or "cpu"."""
    return torch.cuda.get_device_name() if device() == "cuda" else "cpu"
