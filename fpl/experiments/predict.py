"""Use what a run learnt: predict, evaluate on a folder, let a new client in, adapt to its images.

import fpl
model = fpl.restore("pfedmoap-1")  # a run that was made with --keep
model.predict("holiday/*.jpg", client=3, top=3)
model.evaluate("labelled/", client="new").confusion
model.adapt("mine/").predict("other/", client="new")
"""

from __future__ import annotations

import glob
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pandas import DataFrame
from torch import Tensor
from tqdm.auto import tqdm

from fpl.data import encoders, extraction
from fpl.experiments import cache, keep, stored, values
from fpl.experiments.answers import NO_CLASS
from fpl.experiments.given import Images, Source, encode, gather, labelled, name_of, require_read
from fpl.experiments.keep import Kept
from fpl.experiments.records import RECORDS, Damaged
from fpl.experiments.settings import row_class
from fpl.experiments.values import check_choice, shown
from fpl.methods import PromptFL
from fpl.more_methods.features import AFL
from fpl.prompts import Clip, PromptTree
from fpl.rounds import TEST_ROWS, Cohort, Setup, train_cohort
from fpl.state import Clients, Server, Tensors, generator, take

NEW = "new"  # the client that took no part
SUFFIXES = (".json", keep.SUFFIX)
ADAPT = "give it labelled images of its own, with `adapt` or `fpl predict --adapt FOLDER`"


@dataclass(frozen=True)
class Classifier:
    """What one client classifies with: all that `PromptFL.logits` takes, but for images.

    t, p, reads: text features, tensors that were learnt, and what the method reads besides, each
    with a client axis of one.
    """

    method: PromptFL
    text: PromptTree
    t: Tensor | None
    p: Tensors
    reads: Tensors

    def logits(self, x: Float[Tensor, "b *M d"]) -> Float[Tensor, "b c"]:
        """Return the logits of unit image features, or of patches for a method that reads these."""
        return self.method.logits(self.text, self.t, self.p, self.reads, x.unsqueeze(0))[0]

    def example(self) -> Float[Tensor, "2 *M d"]:
        """Return unit features of two images, or of three patches of each."""
        patches = (3,) if self.method.inputs == "patches" else ()
        shape = (2, *patches, self.text.dim)
        tensors = (*self.p.values(), *self.reads.values())
        device = next((value.device for value in tensors), torch.device("cpu"))
        return F.normalize(torch.ones(shape, device=device), dim=-1)


@dataclass(frozen=True)
class Evaluation:
    """How a client does on labelled images.

    macro_f1: the mean F1 of the classes that have images. confusion: how many images of a class
    (row) were taken for which class (column). images: a line for each.
    """

    accuracy: float
    macro_f1: float
    confusion: DataFrame = field(repr=False)
    images: DataFrame = field(repr=False)


@dataclass(frozen=True)
class Model:
    """What a run learnt, with the frozen CLIP that it ran with.

    new: what the client "new" classifies with, if it was adapted.
    """

    kept: Kept
    clip: Clip
    new: Classifier | None = field(default=None, repr=False)

    @cached_property
    def text(self) -> PromptTree:
        """The prompts of the classes, as the run learnt them."""
        kept = self.kept
        return PromptTree(
            self.clip, kept.classes, kept.method.n_ctx, precision=kept.training.precision
        )

    @property
    def upright(self) -> bool:
        """Whether pictures are turned by their EXIF tag: as `extract.manifest_of` has it.

        Raises ValueError where the run does not say what its images were.
        """
        images = self.kept.about.get("images")
        if not images:
            unknown = (
                "this run does not say which data set it had, and so not how pictures are read"
            )
            raise ValueError(f"{unknown}: keep it with the name of that as `images`")
        return images == "own"

    @torch.no_grad()
    def classifier(self, client: int | str = 0) -> Classifier:
        """Return what a client classifies with.

        client: its number, its name where clients have names, or "new" for one that took no part:
        it gets what the server would send it, without experts.
        Raises ValueError for a client that is not there, and for a new one whose classifier would
        be untrained, or needs images.
        """
        number = number_of(self.kept, client)
        if number is None:
            return self.new or newcomer(self)
        cohort = next(c for c in self.kept.cohorts if (c.client_ids == number).any())
        one = cohort.client_ids == number
        p = take(self.kept.deployed, cohort.client_ids[one])
        return classifier_of(self, p, take(cohort.context, one.nonzero()[:, 0]))

    def predict(self, images: Images, client: int | str = 0, top: int = 1) -> DataFrame:
        """Return the most probable classes of images: `top` lines for each, the first one first.

        images: paths, folders (all pictures below them), patterns, pictures of Pillow, or several.
        Columns are image, rank (from 1), class, probability (share in the softmax) and error: why
        an image cannot be read. Such an image has one line, without a class.
        Raises ValueError for a URL, for what is no image, and as `classifier` does.
        """
        top = int(values.number(top, "int", "top"))
        if top < 1:
            raise ValueError(f"top is {top}: give how many classes, at least 1")
        found = gather(images)
        z, reasons = self.logits(found, client)
        shares = z.softmax(-1).cpu()
        places = z.sort(dim=-1, descending=True, stable=True).indices.cpu()
        names = names_of(self.kept, z.shape[-1])
        lines: list[dict[str, Any]] = []
        answers = zip(shares, places, strict=True)
        for number, (image, why) in enumerate(zip(found, reasons, strict=True)):
            line = {"image": name_of(image, number), "error": why}
            if why:
                lines.append(line)
                continue
            share, order = next(answers)
            for rank, place in enumerate(order[:top].tolist(), 1):
                said = {"rank": rank, "class": names[place], "probability": share[place].item()}
                lines.append(line | said)
        columns = ["image", "rank", "class", "probability", "error"]
        return DataFrame(lines, columns=columns).astype({"rank": "Int64"})

    def evaluate(self, folder: str | Path, client: int | str = 0) -> Evaluation:
        """Return how a client does on images in folders CLASS/FILE, named as the run's classes.

        Raises OSError where images cannot be read, and ValueError for other classes.
        """
        from fpl.experiments import metrics  # takes seconds

        images, labels = labelled(folder, self.kept.classes)
        z, reasons = self.logits(images, client)
        require_read(images, reasons)
        z = z.cpu()
        lines = DataFrame({"image": [*map(str, images)], "label": labels})
        lines["predicted"] = z.argmax(-1).numpy()
        lines["confidence"] = z.softmax(-1).amax(-1).numpy()
        lines["right"] = lines["label"] == lines["predicted"]
        return Evaluation(
            accuracy=float(lines["right"].mean()),
            macro_f1=float(metrics.per_class(lines)["f1"].mean()),
            confusion=metrics.confusion(lines, self.kept.classes),
            images=lines,
        )

    def adapt(self, folder: str | Path, epochs: int | None = None) -> Model:
        """Return the model with a client "new" that has trained on its own images.

        It begins as a client that comes late would, with what the server sends it, trains as the
        run did, `epochs` in place of the local epochs, and classifies with what that gives. The
        images are in folders CLASS/FILE and taken as they are, without random crops.
        Raises OSError where images cannot be read, ValueError for other classes, for a method that
        reads other clients' images and for a run that has a client "new", and FloatingPointError
        for a loss that is not finite.
        """
        training = self.kept.training
        if isinstance(self.kept.method, AFL):
            raise ValueError("AFL fits all clients at once: run it again with the new one")
        if NEW in self.kept.clients:
            raise ValueError(f"the run has a client called {NEW}: give it another name there")
        if epochs is not None:
            epochs = int(values.number(epochs, "int", "epochs"))
            if epochs < 1:
                raise ValueError(f"epochs is {epochs}: give at least 1")
            training = replace(training, local_epochs=epochs)
        if training.schedule == "zigzag":  # which goes on from client to client: here is one
            training = replace(training, schedule="constant")
        setup, server, cohort = arrive(self, people(self, *labelled(folder, self.kept.classes)))
        local = take(drawn(self), slice(None))
        start = self.kept.method.start(local, cohort.received)
        setup = replace(setup, training=training)
        p, _ = train_cohort(setup, cohort, start, server.round)
        with torch.no_grad():
            return replace(self, new=classifier_of(self, p, take(cohort.context, slice(None))))

    def encode(self, images: Sequence[Source], content: str) -> tuple[Tensor, list[str]]:
        """Return features as `given.encode` does, of images read as the run's were."""
        return encode(images, self.clip, content, self.upright)

    @torch.no_grad()
    def logits(
        self, images: Sequence[Source], client: int | str
    ) -> tuple[Float[Tensor, "read c"], list[str]]:
        """Return logits of images that can be read, and for each image why it cannot, or ""."""
        one = self.classifier(client)
        parts = [torch.zeros(0, len(self.kept.classes))]
        reasons: list[str] = []
        # as many at once as in a run: what FedOTP says of an image depends on the others
        for first in tqdm(
            range(0, len(images), TEST_ROWS),
            desc="images",
            unit=f"{TEST_ROWS} images",
            disable=len(images) <= TEST_ROWS,
        ):
            x, why = self.encode(images[first : first + TEST_ROWS], one.method.inputs)
            reasons += why
            if len(x):
                parts.append(one.logits(x))
        return torch.cat(parts[1:] or parts), reasons


def restore(
    run: str | Path, clip: Clip | None = None, method: str | type[PromptFL] | None = None
) -> Model:
    """Return what a run learnt, ready to be used.

    run: its record, the file that it kept, or the name of these in results/records, which may be
    cut where no other run that has kept something begins so. clip: the model, if not to be loaded.
    method: the class of a method of your own, or "FILE.py:CLASS".
    Raises FileNotFoundError for a run that is not there or has kept nothing, and ValueError for a
    name that several have, a damaged file, a method of your own that is not given, and a model that
    is not the run's.
    """
    path = file_of(run)
    first = next(clip.model.parameters(), None) if clip else None  # imported features have none
    device = cache.device() if first is None else str(first.device)
    kind = row_class(method) if isinstance(method, str) else method
    try:
        kept = keep.read(path, kind, device)
    except stored.Foreign:
        named = "name a run that was made with --keep"
        raise stored.Foreign(f"{path} is no file of a run: {named}") from None
    except Damaged as error:
        raise Damaged(f"{error}: make its run again, with --keep") from None
    run = kept.about.get("run", path.stem)
    if run != path.stem and path.with_suffix(".json").is_file():
        raise ValueError(f"{path} is of {run}, not of the record beside it: make its run again")
    clip = clip or load(kept, path, device)
    made = {**dict.fromkeys(clip.provenance, ""), **kept.provenance}
    check_same(clip, made, f"{path} was")
    return Model(kept, clip)


def file_of(run: str | Path) -> Path:
    """Return the file that a run has kept. Raises FileNotFoundError or ValueError for none."""
    path = Path(run)
    stem = path.with_suffix("") if path.suffix in SUFFIXES else path
    if stem.parent == Path() and not path.is_file():
        stem = RECORDS / stem
    near = stem.parent.glob(f"{glob.escape(stem.name)}*")
    found = sorted({path.with_suffix("") for path in near if path.suffix in SUFFIXES})
    # not seed 10 for seed 1, nor a row's released form for the row
    found = [one for one in found if f"{one.name}-".startswith(f"{stem.name}-")] or found
    kept = [one for one in found if Path(f"{one}{keep.SUFFIX}").is_file()]
    found = [stem] if stem in found else kept or found
    if not found:
        make = "make it with `fpl run`, and --keep"
        raise FileNotFoundError(f"there is no run {stem.name} in {stem.parent}: {make}")
    if len(found) > 1:
        some = f"{found[0].name} and {found[1].name}"
        raise ValueError(f"{len(found)} runs begin with {run}, {some} among them: write more of it")
    if found[0] not in kept:
        again = "call the same `fpl run` again, with --keep"
        raise FileNotFoundError(f"{found[0]}.json is of a run that kept nothing: {again}")
    return Path(f"{found[0]}{keep.SUFFIX}")


def load(kept: Kept, path: Path, device: str) -> Clip:
    """Return the CLIP with which a run was made. Raises as `encoders.load` does.

    A run that does not say how it was loaded may have had one that brings its weights.
    """
    name = kept.provenance.get("model", "")
    known = kept.about.get("backbone") or {"name": name, "weights": "", "preprocessing": ""}
    if "backbone" not in kept.about and not name.startswith((encoders.LOCAL, encoders.HUB)):
        raise ValueError(f"{path} does not say which weights {name} had: give the CLIP as clip")
    name = encoders.located(known["name"])
    place = name.removeprefix(encoders.LOCAL)
    if place != name and not Path(place).exists():
        folder = known["name"].removeprefix(encoders.LOCAL)
        instead = "call from the folder of that run's settings, or give the CLIP to `fpl.restore`"
        raise FileNotFoundError(f"there is no folder {folder}, of the CLIP of {path}: {instead}")
    return encoders.load(name, known["weights"], device, preprocessing=known["preprocessing"])


def check_same(clip: Clip, made: Mapping[str, str], what: str) -> None:
    """Raise ValueError unless the CLIP's provenance is the one with which something was made.

    Of a model in a folder, which may stand elsewhere, the name says nothing.
    """
    for name, was in made.items():
        now = clip.provenance.get(name, "")
        moved = all(text.startswith(encoders.LOCAL) for text in (was, now))
        if was != now and not moved:
            same = max(0, len(os.path.commonprefix([was, now])) - 20)
            one, other = (shown(text[same : same + 60]) for text in (was, now))
            raise ValueError(
                f"{what} made with another {name} ({one}) than this CLIP has ({other}): "
                "load that one"
            )


def number_of(kept: Kept, client: int | str) -> int | None:
    """Return a client's number, None for "new"; a name comes before a number.

    Raises ValueError for a client that is not there.
    """
    text = str(client)
    if isinstance(client, str) and text in kept.clients:
        return [*kept.clients].index(text)
    if text == NEW:
        return None
    if text.isdecimal() and len(text) < 10 and int(text) < kept.n:
        return int(text)
    there = f"there are 0 to {kept.n - 1}, and {NEW}"
    if kept.clients and not text.isdecimal():
        check_choice(text, kept.clients, f"client ({there})")
    raise ValueError(f"there is no client {shown(client)}: {there}")


def classifier_of(model: Model, p: Tensors, reads: Tensors) -> Classifier:
    """Return a classifier of tensors with a client axis of one."""
    method = model.kept.method
    return Classifier(method, model.text, method.encode(model.text, p, reads), p, reads)


def names_of(kept: Kept, columns: int) -> list[str]:
    """Return the class that each column of logits stands for; some rows have more columns."""
    return [*kept.classes, *[NO_CLASS] * (columns - len(kept.classes))]


# A client that took no part


class Own(Sequence):
    """Whose images are whose where only those of the last client are known, if they are."""

    def __init__(self, n: int, title: str, images: Tensor | None = None) -> None:
        self.n, self.title, self.images = n, title, images

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: Any) -> Tensor:
        if i != self.n - 1:
            self.refuse("images of all clients, which no file keeps: take another row")
        if self.images is None:
            self.refuse(f"images of the client: {ADAPT}")
        return self.images

    def refuse(self, what: str) -> NoReturn:
        raise ValueError(f"{self.title} classifies with {what}")


@dataclass(frozen=True)
class People(Clients):
    """Clients whose images are not all here, such as those of a run and behind them a new one."""

    def __post_init__(self) -> None:
        """Leave it to what stands for images, as `Own`, to say what is missing."""


def people(model: Model, images: Sequence[Source] = (), labels: Sequence[int] = ()) -> People:
    """Return the clients of a run and a new one with these images, if there are any."""
    kept = model.kept
    device = extraction.device_of(model.clip)
    feats, patches = torch.zeros(0, model.text.dim, device=device), None
    if images:
        feats, reasons = model.encode(images, "feats")
        require_read(images, reasons)
        if kept.method.inputs == "patches":
            patches, _ = model.encode(images, "patches")
    known = torch.arange(len(feats), device=device) if images else None
    parts = Own(kept.n + 1, kept.method.title, known)
    y = torch.tensor(labels, dtype=torch.long, device=device)
    return People(feats, y, parts, parts, len(kept.classes), patches)


def drawn(model: Model) -> Tensors:
    """Return what a client learns as it was before training, with a client axis of one."""
    kept = model.kept
    made = kept.method.init(model.text, generator(kept.seeds.init, "init"))
    device = extraction.device_of(model.clip)
    return {name: value.to(device).unsqueeze(0) for name, value in made.items()}


def with_room(server: Server) -> Server:
    """Return the server in the round after the last, with a client more that has sent nothing."""

    def longer(x: Tensor) -> Tensor:
        return torch.cat([x, torch.zeros_like(x[:1])])

    return replace(
        server,
        uploads={name: longer(value) for name, value in server.uploads.items()},
        has_upload=longer(server.has_upload),
        returned=longer(server.returned),
        round=server.round + 1,
    )


def arrive(model: Model, clients: Clients) -> tuple[Setup, Server, Cohort]:
    """Return what there is when a new client, the last one, has received what the server sends."""
    kept = model.kept
    server = with_room(kept.server)
    ids = torch.tensor([kept.n], device=server.has_upload.device)
    received = kept.method.download(server, ids, clients)
    context = kept.method.context(model.text, received, ids, clients)
    setup = Setup(kept.method, model.text, clients, kept.training, kept.seeds)
    return setup, server, Cohort(ids, received, context, torch.zeros_like(ids))


def newcomer(model: Model) -> Classifier:
    """Return what a client that was never drawn is evaluated with after the last round.

    Raises ValueError where that was never trained, or needs images of the client's own.
    """
    _, server, cohort = arrive(model, people(model))
    begin = drawn(model)
    n = len(server.has_upload)
    everybody = {name: value.expand(n, *value.shape[1:]) for name, value in begin.items()}
    evaluated = model.kept.method.evaluated(server, everybody, lambda p, epochs: p)
    p = take(evaluated, cohort.client_ids)
    one = classifier_of(model, p, take(cohort.context, slice(None)))
    check_trained(one, begin)
    return one


def check_trained(one: Classifier, begin: Tensors) -> None:
    """Raise ValueError if all that a new client classifies with is as it was drawn.

    Warns if a part is. What is not used, as a gate without experts, counts for nothing.
    """
    title = one.method.title
    used = used_of(one)
    fresh = [name for name in used if torch.equal(one.p[name], begin[name])]
    if fresh and fresh == used:
        raise ValueError(f"{title} gives a new client nothing that was trained: {ADAPT}")
    if fresh:
        untrained = f"what a new client classifies with is partly untrained ({', '.join(fresh)})"
        warnings.warn(f"{title}: {untrained}: {ADAPT}", stacklevel=5)


@torch.enable_grad()
def used_of(one: Classifier) -> list[str]:
    """Return the tensors of a client on which its logits depend, and not by rounding alone."""
    p = {name: value.detach().requires_grad_() for name, value in one.p.items()}
    t = one.method.encode(one.text, p, one.reads)
    z = replace(one, t=t, p=p).logits(one.example())
    if not z.requires_grad:
        return []
    found = torch.autograd.grad(z.sum(), [*p.values()], allow_unused=True)
    used = [name for name, slope in zip(p, found, strict=True) if slope is not None]
    return [name for name in used if name not in one.method.idle]
