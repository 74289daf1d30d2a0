"""The thin layer between Flower and this federation: parcels in messages, nothing else.

A SuperLink hands this file to the sites; all that it imports is what each has installed itself.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from federation import protocol
from federation.protocol import Parcel
from federation.server import Answer, Coordinator, run
from federation.site import Site, failed, read_images
from fpl.data.files import file_lock
from fpl.experiments import verbs

logging.basicConfig()
logging.getLogger("federation").setLevel(logging.INFO)
log = logging.getLogger("federation.app")  # Flower gives this file another name
server = ServerApp()
client = ClientApp()
WORDS = "words"
TYPES = {"join": MessageType.QUERY, "train": MessageType.TRAIN, "evaluate": MessageType.EVALUATE}


def record_of(parcel: Parcel) -> RecordDict:
    """Return a parcel as Flower sends it."""
    record = RecordDict({WORDS: ConfigRecord(dict(parcel.words))})
    for group, tensors in parcel.tensors.items():
        arrays = {k: Array(v.detach().cpu().contiguous().numpy()) for k, v in tensors.items()}
        record[group] = ArrayRecord(arrays)
    return record


def parcel_of(record: RecordDict) -> Parcel:
    """Return what `record_of` was given. Raises ValueError or TypeError for what it cannot be."""
    tensors = {
        str(group): {str(k): torch.from_numpy(v.numpy().copy()) for k, v in arrays.items()}
        for group, arrays in record.array_records.items()
    }
    return Parcel(tensors, dict(record.config_records[WORDS]))


def bytes_of(message: Message) -> int:
    """Return the size of a message as it travels: all objects that Flower makes of it."""
    return sum(len(part.deflate()) for part in get_all_nested_objects(message).values())


class Flower:
    """Carries parcels over a grid of SuperNodes. timeout: seconds that a question may take."""

    def __init__(self, grid: Grid, timeout: float) -> None:
        self.grid, self.timeout = grid, timeout

    def addresses(self) -> list[int]:
        """Return the ids of the nodes that are there; they are random."""
        return sorted(self.grid.get_node_ids())

    def ask(self, kind: str, parcels: Mapping[int, Parcel]) -> dict[int, Answer]:
        """Return replies by node; one that cannot be read is one that refuses."""
        made = {node: Message(record_of(p), node, TYPES[kind]) for node, p in parcels.items()}
        sent = {node: bytes_of(message) for node, message in made.items()}
        found = {}
        for reply in self.grid.send_and_receive(list(made.values()), timeout=self.timeout):
            node = reply.metadata.src_node_id
            if reply.has_error():  # its reason is the node's own text, and may be long
                code = reply.error.code
                log.error("node %d: %s fails with Flower's error code %d", node, kind, code)
            if reply.has_error() or node not in made:
                continue  # as good as silent
            try:
                parcel = parcel_of(reply.content)
            except (ValueError, TypeError, LookupError, OSError):
                parcel = Parcel(words={"refused": "what it sends cannot be read"})
            found[node] = Answer(parcel, sent[node], bytes_of(reply))
        return found


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run a federation, or go on with it."""
    config: Mapping[str, Any] = context.run_config
    clip = clip_of(config)
    agreement = protocol.read(Path(config["agreement"]), clip.provenance)
    folder = Path(config["folder"])
    network = Flower(grid, float(config["timeout"]))
    with file_lock(folder / "lock"):  # a run that was lost may still be there
        coordinator = Coordinator(agreement, clip, folder / "server.safetensors")
        run(coordinator, network, float(config["patience"]))


def clip_of(config: Mapping[str, Any]) -> verbs.Clip:
    """Return the CLIP that a configuration names."""
    names = ("clip", "weights", "preprocessing")
    return verbs.load(*(str(config.get(name, "")) for name in names))


def site_of(context: Context) -> Site:
    """Return the site of this node: what its SuperNode says, or a folder of a rehearsal.

    Raises ValueError for a node configuration that lacks something.
    """
    own: Mapping[str, Any] = context.node_config
    if "site" not in own:  # the simulation: nodes have a number only
        root = Path(str(context.run_config["rehearsal"]))
        place = sorted(path for path in root.iterdir() if path.is_dir())[int(own["partition-id"])]
        here = {"site": place.name, "folder": str(place), "images": str(place / "images")}
        own = {**context.run_config, **here, "agreement": ""}  # what is there is the server's
    if missing := [name for name in ("images", "folder") if not own.get(name)]:
        raise ValueError(f"--node-config does not say {', '.join(missing)}: see README.md")
    clip, folder = clip_of(own), Path(str(own["folder"]))
    images = partial(read_images, Path(str(own["images"])), folder, clip)
    file = str(own.get("agreement", ""))
    copy = protocol.read(Path(file), clip.provenance) if file else None
    return Site(str(own["site"]), folder, clip, images, copy)


def reply(kind: str, message: Message, context: Context) -> Message:
    """Return the reply of this site to a message, whatever happens.

    What Flower catches it sends to the server with its text, which may name files.
    """
    try:
        answer = site_of(context).answer(kind, parcel_of(message.content))
    except Exception as error:  # models, pictures and files fail in many ways
        answer = failed(str(context.node_config.get("site", "a site")), error)
    return Message(record_of(answer), reply_to=message)


@client.query()
def join(message: Message, context: Context) -> Message:
    """Say who this is."""
    return reply("join", message, context)


@client.train()
def train(message: Message, context: Context) -> Message:
    """Train a round."""
    return reply("train", message, context)


@client.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Test, and keep the result."""
    return reply("evaluate", message, context)
