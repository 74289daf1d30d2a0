"""One site: its own images, its own CLIP, and its own tensors, which it keeps in a file."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from federation.protocol import (
    KINDS,
    Agreement,
    Parcel,
    Refused,
    Words,
    agreement_of,
    check_finite,
    check_model,
    check_same,
    check_tensors,
    everybody,
    model_of,
)
from fpl import privacy
from fpl.data import features
from fpl.data.extraction import device_of
from fpl.data.files import file_lock
from fpl.experiments import stored, verbs
from fpl.experiments.values import check_choice
from fpl.prompts import Clip, PromptTree
from fpl.rounds import Cohort, Setup, evaluate, fine_tune, noise_of, train_cohort
from fpl.state import Clients, Server, Tensors, generator, take

log = logging.getLogger(__name__)
NEVER = -1  # the round of a site that has not trained yet
Images = Callable[[Agreement], Clients]  # a site's own, as one client


@dataclass
class Kept:
    """What a site keeps between two messages.

    local: what it learns, with a client axis of one. upload: what it sent in its last round.
    accuracy: on its own test images, by round; it stays here.
    """

    agreement: Agreement
    local: Tensors
    upload: Tensors = field(default_factory=dict)
    round: int = NEVER
    accuracy: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Site:
    """Answers what the server asks.

    name: as the agreement has it. folder: where features and tensors are kept. clip: the frozen
    model. images: reads the site's own images. copy: of the agreement, from elsewhere than the
    server; a site that has one holds to no other, a site without takes what the server sends.
    """

    name: str
    folder: Path
    clip: Clip
    images: Images
    copy: Agreement | None = None

    def answer(self, kind: str, asked: Parcel) -> Parcel:
        """Return the reply to a parcel of one of KINDS.

        What goes wrong is told in full in the log of the site alone: it may name files.
        """
        try:
            check_choice(kind, KINDS, "question")
            self.folder.mkdir(parents=True, exist_ok=True)
            with file_lock(self.folder / "lock"):
                return getattr(self, kind)(self.here(asked))
        except Refused as error:
            log.error("%s", error)
            return Parcel(words={"refused": str(error)})
        except (
            ValueError,
            OSError,
            RuntimeError,
            ArithmeticError,
            LookupError,
            TypeError,
        ) as error:
            return failed(self.name, error)

    def here(self, asked: Parcel) -> Parcel:
        """Return a parcel with its tensors where the model is."""
        device = device_of(self.clip)
        tensors = {}
        for group, own in asked.tensors.items():
            tensors[group] = {name: value.to(device) for name, value in own.items()}
        return Parcel(tensors, asked.words)

    def join(self, asked: Parcel) -> Parcel:
        """Tell who this is and how many training images it has, if it can take part."""
        agreement = agreement_of(json.loads(str(asked.words["agreement"])), "the agreement")
        check_model(agreement.model, model_of(self.clip.provenance), self.name)
        self.check(agreement)
        setup, _ = self.setup(agreement)
        if not self.path(agreement.key).exists():
            drawn = agreement.rules.init(setup.text, generator(agreement.seeds.init, "init"))
            device = setup.clients.feats.device
            local = {name: value.to(device).unsqueeze(0) for name, value in drawn.items()}
            self.write(Kept(agreement, local))
        size = len(setup.clients.train[self.number(agreement)])
        run, what = agreement.run, "%s joins: method %s, epsilon %g, noise %s, %d rounds"
        log.info(what, self.name, agreement.method, run.epsilon, agreement.noise, run.rounds)
        if self.copy is None:
            log.info("%s has no copy of the agreement: this is what the server says", self.name)
        model = model_of(self.clip.provenance)
        return Parcel(words={"site": self.name, "images": size, **model})

    def train(self, asked: Parcel) -> Parcel:
        """Train a round from what was received, and send exactly what the method shares.

        A site trains a round once: asked again, it sends what it has sent.
        """
        kept = self.read(str(asked.words["key"]))
        number = int(asked.words["round"])
        rounds = kept.agreement.run.rounds
        if not 0 <= number < rounds:  # all that were agreed to share an epsilon
            raise Refused(f"{self.name} has agreed to {rounds} rounds: {number} is none of them")
        if number < kept.round:
            raise Refused(f"{self.name} has trained round {kept.round}, not {number} again")
        if number > kept.round:
            begin = asked.tensors.get("begin", {})
            self.learn(kept, number, asked.tensors.get("down", {}), begin)
            self.write(kept)
        words: Words = {"site": self.name, "round": number, "key": kept.agreement.key}
        return Parcel({"shared": kept.upload}, words)

    def learn(self, kept: Kept, number: int, down: Tensors, begin: Tensors) -> None:
        """Train a round. begin: what the server knows of the shared tensors, beyond `down`."""
        setup, cohort = self.received(kept, down)
        method = setup.method
        start = method.start(kept.local, down)
        kept.local, losses = train_cohort(setup, cohort, start, number)
        log.info("round %d: mean loss %.4f in the last epoch", number, losses.mean())
        upload = {name: kept.local[name] for name in method.shared}
        if kept.agreement.private and upload:
            check_finite(begin, "server")
            upload = self.released(kept.agreement, number, upload, begin | down)
        kept.upload, kept.round = upload, number

    def evaluate(self, asked: Parcel) -> Parcel:
        """Test on the site's own images what it has after a round; tell nobody the result."""
        kept = self.read(str(asked.words["key"]))
        number = int(asked.words["round"])
        params = asked.tensors.get("params", {})
        check_tensors(params, {k: kept.local[k][0] for k in kept.agreement.rules.shared}, "server")
        setup, cohort = self.received(kept, asked.tensors.get("down", {}))
        n, i = len(setup.clients), self.number(kept.agreement)
        counted = torch.zeros(n, dtype=torch.bool, device=setup.clients.feats.device)
        counted[i] = bool(asked.words["counted"])
        server = Server(params, {}, counted, counted, number)
        local = {name: value.expand(n, *value.shape[1:]) for name, value in kept.local.items()}
        tune = partial(fine_tune, setup, [cohort], number)
        p = take(setup.method.evaluated(server, local, tune), cohort.client_ids)
        own = torch.tensor([i])
        (said,) = evaluate(setup.method, setup.text, p, cohort.context, setup.clients, own)
        kept.accuracy[str(number)] = said.right.float().mean().item()
        log.info("round %d: accuracy %.4f", number, kept.accuracy[str(number)])
        self.write(kept)
        return Parcel(words={"site": self.name, "round": number})

    def received(self, kept: Kept, down: Tensors) -> tuple[Setup, Cohort]:
        """Return what there is once the download is here. Raises Refused for one that cannot be."""
        check_finite(down, "server")
        same = {name: value for name, value in down.items() if name in kept.local}
        check_tensors(same, {name: kept.local[name] for name in same}, "server")
        setup, ids = self.setup(kept.agreement)
        context = setup.method.context(setup.text, down, ids, setup.clients)
        return setup, Cohort(ids, down, context, torch.zeros_like(ids))

    def setup(self, agreement: Agreement) -> tuple[Setup, Tensor]:
        """Return what stays the same, with all clients but without others' images; our number."""
        method, training, clip = agreement.rules, agreement.run, self.clip
        precision = training.precision
        text = PromptTree(clip, agreement.classes, method.n_ctx, precision=precision)
        i = self.number(agreement)
        clients = everybody(len(agreement.sites), i, self.images(agreement))
        method.check(text, clients)
        ids = torch.tensor([i], device=clients.feats.device)
        return Setup(method, text, clients, training, agreement.seeds), ids

    def check(self, agreement: Agreement) -> None:
        """Raise Refused for another agreement than the site's own copy, if it has one."""
        if self.copy is not None:
            check_same(self.copy, agreement, self.name)

    def number(self, agreement: Agreement) -> int:
        """Return our client number."""
        return agreement.sites.index(check_choice(self.name, agreement.sites, "site"))

    def released(
        self, agreement: Agreement, number: int, upload: Tensors, begin: Tensors
    ) -> Tensors:
        """Return an upload as it leaves the site: its change clipped, with the noise of a round.

        begin: what the server knows already. All tensors have a client axis of one.
        """
        clip, z = agreement.run.clip, noise_of(agreement.rules, agreement.run)
        if agreement.noise == "named":
            draw = generator(agreement.seeds.order, "noise", number, self.number(agreement))
            return privacy.release(upload, begin, clip, z, [draw])
        # a torch.Generator uses 32 bits of its seed, which can be searched: it adds nothing here
        wide = {name: value.double() for name, value in upload.items()}
        released = privacy.release(wide, begin, clip, 0.0, [torch.Generator()])
        for name, value in released.items():
            noise = secret_normals(value.numel()).view(value.shape).to(value.device)
            released[name] = (value + z * clip * noise).to(upload[name].dtype)
        return released

    def path(self, key: str) -> Path:
        """Return the file of what is kept for an agreement. Raises Refused for what is no key."""
        if not re.fullmatch("[0-9a-f]{64}", key):
            raise Refused(f"{self.name} was sent no key of an agreement")
        return self.folder / f"{key[:16]}.safetensors"

    def write(self, kept: Kept) -> None:
        """Write all that is kept, at once or not at all."""
        header = {"agreement": json.loads(kept.agreement.text), "round": kept.round}
        header["accuracy"] = kept.accuracy
        tensors = {"local": kept.local, "upload": kept.upload}
        stored.write(self.path(kept.agreement.key), tensors, header)

    def read(self, key: str) -> Kept:
        """Return what is kept for an agreement. Raises Refused where there is none."""
        if not self.path(key).exists():
            raise Refused(f"{self.name} has not joined this federation, or another version of it")
        tensors, header = stored.read(self.path(key), str(device_of(self.clip)))
        agreement = agreement_of(header["agreement"], str(self.path(key)))
        if agreement.key != key:
            raise Refused(f"{self.name} has agreed to something else: join again")
        self.check(agreement)  # it may have joined before it had a copy
        local, upload = tensors.get("local", {}), tensors.get("upload", {})
        return Kept(agreement, local, upload, header["round"], header["accuracy"])


def failed(name: str, error: Exception) -> Parcel:
    """Log why a site cannot do something, and return all that it says of that to the server."""
    log.error("%s: %s", type(error).__name__, error)
    return Parcel(words={"refused": f"{name} cannot do it, its own log says why"})


def secret_normals(n: int) -> Float[Tensor, " n"]:
    """Return standard normal numbers (n,) in double precision, which nobody can draw again.

    Each is made of 52 bits of the operating system's own randomness: there is no seed to be found.
    """
    bits = np.frombuffer(secrets.token_bytes(8 * n), "<u8") >> np.uint64(12)
    uniform = (bits + 0.5) / 2.0**52  # exact, and neither 0 nor 1
    return torch.special.ndtri(torch.from_numpy(uniform))


def read_images(root: Path, folder: Path, clip: Clip, agreement: Agreement) -> Clients:
    """Return the images of one's own as one client, with the agreed classes as labels.

    root: a folder CLASS/FILE or train/CLASS/FILE, or a CSV. folder: where features are kept.
    Raises OSError for images that cannot be read, and ValueError for classes that are not agreed.
    """
    root = root.resolve()
    patches: Any = None
    needs_patches = agreement.rules.inputs == "patches"
    with contextlib.chdir(folder):
        found = verbs.features(root, clip, patches=needs_patches)
        if needs_patches:
            path = verbs.data_of(str(root), clip).file("patches")
            device = str(found.feats.device)
            patches = features.load(path, found.provenance, device, "patches").feats
    names = [name.replace("_", " ") for name in agreement.classes]
    agreed = [names.index(check_choice(c, names, f"class in {root}")) for c in found.classes]
    labels = torch.tensor(agreed, device=found.labels.device)[found.labels]
    train, test = (torch.from_numpy((found.split == s).nonzero()[0]).to(labels) for s in SPLITS)
    return Clients(found.feats, labels, [train], [test], len(names), patches)


SPLITS = ("train", "test")
