"""The nouns that methods and rounds share: tensors by name, clients, the server, and named draws.

Shapes, here and everywhere: n clients, b batch, c classes, m context length, w text width, d joint
width, k experts, g gate width, h heads, M patches of an image, V random crops of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# What clients learn, by name. Every tensor has the client axis in front.
Tensors = dict[str, Tensor]
# Everybody's tensors and a number of epochs -> the same, trained on each client's own images.
Tune = Callable[[Tensors, int], Tensors]
# The name of a draw and a shape -> standard normal numbers (n, *shape), each client's its own.
Draw = Callable[..., Tensor]
# Numbers of clients, and one number for each.
Ids = Int[Tensor, " n"]
PerClient = Float[Tensor, " n"]


@dataclass(frozen=True)
class Lookup:
    """Experts' text features, held once however many clients read them.

    Client n's are `rows[place[n]]`. Indexing copies for the clients that are asked for only: copies
    for all would hold n k c g numbers, `rows` has at most n c g.
    """

    rows: Float[Tensor, "u c g"]  # of u different prompts
    place: Int[Tensor, "n k"]

    def __getitem__(self, positions: Any) -> Float[Tensor, "*n k c g"]:
        return self.rows[self.place[positions]]


# What clients may read in a round and not change, by name; `take` makes Tensors of it.
Context = Mapping[str, Tensor | Lookup]


def take(tensors: Context, positions: Ids | slice) -> Tensors:
    """Return what the clients at these positions have, copied out of a `Lookup`."""
    return {name: value[positions] for name, value in tensors.items()}


def count_numbers(tensors: Tensors) -> int:
    """Return how many numbers one client's part of the tensors has."""
    return sum(value[0].numel() for value in tensors.values())


def generator(seed: int, stream: str, *numbers: int) -> torch.Generator:
    """Return a generator named by (seed, stream, numbers): draws do not depend on others'."""
    words = np.random.SeedSequence([seed, *stream.encode(), *numbers]).generate_state(2, np.uint64)
    return torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))


def normals(
    like: Tensor, seed: int, client_ids: Sequence[int], numbers: Sequence[int], name: str, *shape
) -> Tensor:
    """Return standard normal numbers (n, *shape), each client's from a generator of its own."""
    gens = [generator(seed, name, *numbers, i) for i in client_ids]
    return torch.stack([torch.randn(shape, generator=gen) for gen in gens]).to(like)


@dataclass(frozen=True)
class Server:
    """What the server holds."""

    params: Tensors  # the aggregate of what is shared, without a client axis
    uploads: Tensors  # the last upload of every client
    has_upload: Bool[Tensor, " n"]  # who has sent one
    returned: Bool[Tensor, " n"]  # who was drawn, up to now, when it and others had one
    round: int = 0
    draw: Any = None  # draw("experts", 3): the run's generator of that stream and those numbers
    memory: Tensors = field(default_factory=dict)  # what a method keeps from round to round

    def begin(self, number: int, drawn: Ids) -> Server:
        """Return the server at the beginning of a round in which these clients train."""
        others = self.has_upload.sum() > 1
        comes_back = torch.zeros_like(self.returned).index_fill(0, drawn, others) & self.has_upload
        return replace(self, round=number, returned=self.returned | comes_back)

    def store(self, client_ids: Ids, uploads: Tensors) -> Server:
        """Return the server after the clients `client_ids` have sent these uploads."""
        last = dict(self.uploads)
        for name, value in uploads.items():
            last[name] = last[name].index_copy(0, client_ids, value)
        has_upload = self.has_upload.index_fill(0, client_ids, True)
        return replace(self, uploads=last, has_upload=has_upload)


@dataclass(frozen=True)
class Clients:
    """Cached image features and labels, and which images each client trains on and is tested on.

    feats: unit features of all images; patches: those of their patches, not normalised, for methods
    that ask for them. views: features of V random crops of each training image, of which a local
    epoch sees one after the other; place: an image's row of `views`. turns: who trains when.

    Raises ValueError for a client without images and for features that are not finite.
    """

    feats: Float[Tensor, "images d"]
    labels: Int[Tensor, " images"]
    train: Sequence[Int[Tensor, " _own"]]
    test: Sequence[Int[Tensor, " _own"]]
    n_cls: int
    patches: Float[Tensor, "images M d"] | None = None
    views: Float[Tensor, "rows V d"] | None = None
    place: Int[Tensor, " images"] | None = None
    turns: Sequence[Int[Tensor, " _picked"]] | None = None

    def __post_init__(self) -> None:
        for kind, parts in (("training", self.train), ("test", self.test)):
            for i, index in enumerate(parts):
                if len(index) == 0:
                    advice = "use fewer clients, more shots or another partition"
                    raise ValueError(f"client {i} of {len(parts)} has no {kind} images: {advice}")
        bad = (~torch.isfinite(self.feats)).any(1).nonzero()[:, 0]
        if len(bad):
            found = f"features of {len(bad)} images are not finite, the first is image {bad[0]}"
            raise ValueError(f"{found}: extract them again with `fpl features`")

    def __len__(self) -> int:
        return len(self.train)

    def training_inputs(
        self, inputs: str, index: Int[Tensor, "n b"], epoch: int
    ) -> Float[Tensor, "n b *M d"]:
        """Return what training sees of some images in a local epoch, counted from round 0.

        inputs: "feats" or "patches"; random crops stand for feats where there are any.
        """
        if self.views is None or self.place is None or inputs != "feats":
            return getattr(self, inputs)[index]
        return self.views[self.place[index], epoch % self.views.shape[1]]

    def training(self, i: int) -> tuple[Float[Tensor, "own d"], Int[Tensor, " own"]]:
        """Return features and labels of the training images of client i."""
        return self.feats[self.train[i]], self.labels[self.train[i]]

    def counts(self, i: int) -> Int[Tensor, " c"]:
        """Return how many training images of each class client i has."""
        return torch.bincount(self.labels[self.train[i]], minlength=self.n_cls)
