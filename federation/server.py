"""The server: whom it asks, what it sends, what it takes, and the file in which it goes on."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from federation.protocol import (
    Agreement,
    Parcel,
    Refused,
    Words,
    check_answered,
    check_model,
    check_tensors,
    nobody,
)
from fpl.data.extraction import device_of
from fpl.data.text import one_line
from fpl.experiments import stored
from fpl.experiments.checkpoints import server_of, server_tensors
from fpl.experiments.values import shown
from fpl.prompts import Clip, PromptTree
from fpl.rounds import Setup, begin_run, select
from fpl.state import Server, Tensors, take

log = logging.getLogger(__name__)
PAUSE = 2.0  # seconds between two looks for sites that are not there yet


class Answer(NamedTuple):
    """A reply, and the bytes of both messages with all that is around the tensors."""

    parcel: Parcel
    sent: int
    received: int


class Network(Protocol):
    """What carries parcels: Flower, or a test. An address is good as long as its site is there."""

    def addresses(self) -> list[int]:
        """Return who can be asked now."""

    def ask(self, kind: str, parcels: Mapping[int, Parcel]) -> dict[int, Answer]:
        """Return the replies that came, in any order; who is silent has none."""


@dataclass(frozen=True)
class Line:
    """What a question to a site took: bytes of the tensors, and of whole messages.

    round: in joining, the one that comes next.
    """

    round: int
    kind: str
    site: str
    down: int
    up: int
    down_message: int
    up_message: int
    refused: str = ""


@dataclass
class Coordinator:
    """Where a federation stands, and what it does next.

    path: the file with what the last finished round left; there it goes on. sizes: training images
    of sites. places: the site at an address. uploads: of the round that is under way.
    """

    agreement: Agreement
    clip: Clip
    path: Path
    sizes: dict[int, int] = field(default_factory=dict)
    places: dict[int, int] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)
    uploads: dict[int, Tensors] = field(default_factory=dict)
    down: dict[int, Tensors] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Begin, or go on. Raises ValueError for a state of another federation."""
        agreement, device = self.agreement, str(device_of(self.clip))
        method = agreement.rules
        text = PromptTree(self.clip, agreement.classes, method.n_ctx)
        world = nobody(len(agreement.sites), len(agreement.classes), text.dim, device)
        method.check(text, world)
        self.setup = Setup(method, text, world, agreement.run, agreement.seeds)
        begin = begin_run(self.setup)
        self.server, self.next = begin.server, 0
        self.rounds = agreement.run.rounds if begin.local else 1  # as in run_rounds
        if self.path.exists():
            self.go_on(device)

    def go_on(self, device: str) -> None:
        """Take what the last finished round left."""
        tensors, header = stored.read(self.path, device)
        if header["key"] != self.agreement.key:
            other = "was left by a federation with another agreement"
            raise ValueError(f"{self.path} {other}: name another folder")
        order = self.setup.seeds.order
        self.server = server_of(tensors, header["round"], order)
        self.next = header["round"] + 1
        self.sizes = {int(i): size for i, size in header["sizes"].items()}
        self.lines = [Line(**line) for line in header["lines"]]

    def write(self) -> None:
        """Write where we stand, at once or not at all."""
        header: dict[str, Any] = {"key": self.agreement.key, "round": self.server.round}
        header["sizes"] = {str(i): size for i, size in self.sizes.items()}
        header["lines"] = [asdict(line) for line in self.lines]
        stored.write(self.path, server_tensors(self.server), header)

    def meet(self, network: Network) -> None:
        """Ask whoever is new at an address which site it is."""
        here = network.addresses()
        self.places = {address: i for address, i in self.places.items() if address in here}
        invitation = Parcel(words={"agreement": self.agreement.text})
        new = {address: invitation for address in here if address not in self.places}
        for address, answer in sorted(network.ask("join", new).items() if new else ()):
            name = one_line(answer.parcel.words.get("site", ""))[:80]  # none where it refuses
            up = answer.parcel.bytes
            line = Line(self.next, "join", name, invitation.bytes, up, *answer[1:])
            try:
                self.admit(address, answer.parcel)
            except Refused as error:
                log.error("%s", error)
                line = replace(line, refused=str(error))
            self.lines.append(line)

    def admit(self, address: int, reply: Parcel) -> None:
        """Take a site in. Raises Refused for one that is not agreed on or has another model."""
        words = reply.words
        check_answered(reply, "a site does not join")
        name = str(words.get("site"))[:80]
        if name not in self.agreement.sites:
            listed = ", ".join(self.agreement.sites)
            raise Refused(f"a site calls itself {name!r}, which is none of {listed}")
        i = self.agreement.sites.index(name)
        if i in self.places.values():
            raise Refused(f"a second site calls itself {name}: the first one stays")
        check_model(self.agreement.model, words, name)
        size = words.get("images")
        if not isinstance(size, int) or not 0 < size < 2**31:
            raise Refused(f"{name} says that it has {shown(size)} training images: it needs some")
        self.sizes[i], self.places[address] = size, i

    def begin(self) -> list[int]:
        """Begin the next round, and return the clients that are to train in it."""
        drawn = select(self.setup.clients, self.setup.training, self.setup.seeds.order, self.next)
        drawn = drawn.to(self.server.has_upload.device)
        self.now: Server = self.server.begin(self.next, drawn)
        self.uploads, self.down = {}, {}
        method = self.setup.method
        for ids in filter(len, method.cohorts(self.now, drawn)):
            received = method.download(self.now, ids, self.setup.clients)
            self.down |= {i: take(received, slice(j, j + 1)) for j, i in enumerate(ids.tolist())}
        self.drawn = sorted(drawn.tolist())
        return self.drawn

    def order(self, i: int) -> Parcel:
        """Return what client i gets to train with."""
        tensors = {"down": self.down[i]}
        if self.agreement.private:  # an update is the difference to what the server knows
            known = self.server.params.items()
            tensors["begin"] = {k: v.unsqueeze(0) for k, v in known if k not in self.down[i]}
        return Parcel(tensors, {"key": self.agreement.key, "round": self.next})

    def accept(self, i: int, reply: Parcel) -> None:
        """Take an upload. Raises Refused for one that is not as it must be, and forgets it."""
        name = self.agreement.sites[i]
        words = reply.words
        check_answered(reply, f"{name} does not train")
        if words.get("key") != self.agreement.key:
            raise Refused(f"{name} sends what it learnt for another model or agreement")
        if words.get("round") != self.next:
            number = shown(words.get("round"))
            raise Refused(f"{name} sends round {number}, this is round {self.next}")
        if i not in self.drawn or i in self.uploads:
            raise Refused(f"{name} sends what it was not asked for in round {self.next}")
        found = reply.tensors.get("shared", {})
        wanted = {k: self.server.params[k].unsqueeze(0) for k in self.setup.method.shared}
        check_tensors(found, wanted, name)
        self.uploads[i] = {k: v.to(wanted[k]) for k, v in found.items()}

    def finish(self) -> None:
        """Aggregate what has come. Raises RuntimeError where nothing has."""
        if not self.uploads:
            nobody_did = f"no site has trained in round {self.next}"
            raise RuntimeError(f"{nobody_did}: start the sites, then run this again, it goes on")
        who = sorted(self.uploads)
        ids = torch.tensor(who, device=self.server.has_upload.device)
        names = self.setup.method.shared
        uploads = {k: torch.cat([self.uploads[i][k] for i in who]) for k in names}
        sizes = torch.tensor([self.sizes[i] for i in who], device=ids.device)
        self.server = self.setup.method.aggregate(self.now, ids, uploads, sizes)
        self.next += 1

    def result(self, i: int) -> Parcel:
        """Return what client i needs to test what it has after the round that was finished."""
        counted = bool(self.server.has_upload[i])
        words: Words = {"key": self.agreement.key, "round": self.server.round, "counted": counted}
        return Parcel({"down": self.down[i], "params": self.server.params}, words)

    def ask(self, network: Network, kind: str, parcels: Mapping[int, Parcel]) -> None:
        """Ask clients, take replies in the order of their numbers, and forget who is silent."""
        at = {i: address for address, i in self.places.items() if i in parcels}
        answers = network.ask(kind, {at[i]: parcels[i] for i in sorted(at)})
        for i in sorted(parcels):
            name = self.agreement.sites[i]
            if at.get(i) not in answers:
                self.places = {address: j for address, j in self.places.items() if j != i}
                log.error("%s does not answer in round %d", name, parcels[i].words["round"])
                continue
            answer, sent = answers[at[i]], parcels[i].bytes
            number = int(parcels[i].words["round"])
            line = Line(number, kind, name, sent, answer.parcel.bytes, *answer[1:])
            try:
                if kind == "train":
                    self.accept(i, answer.parcel)
                else:
                    check_answered(answer.parcel, f"{name} does not test")
            except Refused as error:
                log.error("%s", error)
                line = replace(line, refused=str(error))
            self.lines.append(line)


def run(coordinator: Coordinator, network: Network, patience: float = 60.0) -> None:
    """Run all rounds that are left.

    patience: seconds to wait for all sites at the beginning. Raises TimeoutError where some never
    came, and RuntimeError for a round without any.
    """
    gather(coordinator, network, patience)
    while coordinator.next < coordinator.rounds:
        coordinator.meet(network)
        drawn = coordinator.begin()
        coordinator.ask(network, "train", {i: coordinator.order(i) for i in drawn})
        coordinator.finish()
        last = coordinator.next == coordinator.rounds
        if last or coordinator.agreement.evaluate == "every":
            everyone = range(len(coordinator.agreement.sites))
            results = {i: coordinator.result(i) for i in everyone}
            coordinator.ask(network, "evaluate", results)
        # whoever is killed before this asks again for the round, and gets the same uploads
        coordinator.write()


def gather(coordinator: Coordinator, network: Network, patience: float) -> None:
    """Wait for all sites; of one that has been here before the rounds do not depend."""
    until = time.monotonic() + patience
    sites = coordinator.agreement.sites
    while True:
        coordinator.meet(network)
        if len(coordinator.places) == len(sites):
            return
        if time.monotonic() >= until:
            break
        time.sleep(min(PAUSE, patience))
    missing = [name for i, name in enumerate(sites) if i not in coordinator.sizes]
    if missing:
        raise TimeoutError(f"{', '.join(missing)} did not join: start these sites")
