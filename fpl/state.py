"""What methods and rounds share: clients, the server, tensors by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


Tensors = dict[str, Tensor]  # what clients learn, or may read, by name; every tensor has the client axis in front
Tune = Callable[[Tensors, int], Tensors]  # everybody's tensors, epochs -> the same, trained on each one's own images
Encoder = Callable[[Tensor], Tensor]  # fpl.clip.Text, seen as a function: ctx (n, m, w) -> unit features (n, c, d)


@dataclass(frozen=True)
class Server:
    """What the server holds: `params` the aggregate (no client axis), `pool` every client's last upload, `seen` who has one.

    `round` is the number of the round; `draw("experts", 3)` is a generator of the run, named by a stream and numbers.
    """

    params: Tensors
    pool: Tensors
    seen: Bool[Tensor, " n"]
    round: int = 0
    draw: Any = None

    def store(self, who: Int[Tensor, " n"], uploads: Tensors) -> Server:
        """The server with the uploads of the clients `who` in its pool."""
        pool = self.pool | {k: self.pool[k].index_copy(0, who, v) for k, v in uploads.items()}
        return replace(self, pool=pool, seen=self.seen.index_fill(0, who, True))




@dataclass(frozen=True)
class Lookup:
    """Experts' text features, held once however many clients read them: client n's are `rows[place[n]]`.

    Indexing by clients makes copies for those alone. Copies for all N would be N K C g numbers; `rows` has at most N C g.
    """

    rows: Float[Tensor, "u c g"]  # of u different prompts
    place: Int[Tensor, "n k"]

    def __getitem__(self, at: Any) -> Float[Tensor, "*at k c g"]:
        return self.rows[self.place[at]]


Context = Mapping[str, Tensor | Lookup]  # what clients may read and not change; `rounds.rows_of` makes Params of it


@dataclass(frozen=True)
class Clients:
    """Cached image features (all images, d), labels, and which images each client trains on and is tested on.

    `patches`, the features of the M patches of each image, not normalised, is for methods that ask for them. `views` are features
    of V random crops of each training image, of which an epoch sees one after the other; `place` is where an image has them.
    """

    feats: Float[Tensor, "images d"]
    labels: Int[Tensor, " images"]
    train: Sequence[Int[Tensor, " _own"]]
    test: Sequence[Int[Tensor, " _own"]]
    n_cls: int
    patches: Float[Tensor, "images M d"] | None = None
    views: Float[Tensor, "rows V d"] | None = None
    place: Int[Tensor, " images"] | None = None

    def __post_init__(self):
        for i, (train, test) in enumerate(zip(self.train, self.test, strict=True)):
            for kind, index in (("training", train), ("test", test)):
                if not len(index):
                    who = f"client {i} of {len(self.train)}"
                    raise ValueError(f"{who} has no {kind} images: use fewer clients, more shots or another partition")
        if not torch.isfinite(self.feats).all():
            bad = (~torch.isfinite(self.feats)).any(1).nonzero()[:, 0]
            found = f"features of {len(bad)} images are not finite, the first is image {bad[0]}"
            raise ValueError(f"{found}: extract them again with `fpl features`")

    def __len__(self) -> int:
        return len(self.train)

    def shown(self, inputs: str, index: Int[Tensor, "n b"], epoch: int) -> Float[Tensor, "n b *M d"]:
        """What training sees of some images in local epoch `epoch`, counted from the beginning of the run."""
        if self.views is None or self.place is None or inputs != "feats":
            return getattr(self, inputs)[index]
        return self.views[self.place[index], epoch % self.views.shape[1]]

    def training(self, i: int) -> tuple[Float[Tensor, "own d"], Int[Tensor, " own"]]:
        return self.feats[self.train[i]], self.labels[self.train[i]]

    def counts(self, i: int) -> Int[Tensor, " c"]:
        """Training images of client i by class."""
        return torch.bincount(self.labels[self.train[i]], minlength=self.n_cls)




def take(tensors: Context, at: Int[Tensor, " n"] | slice) -> Tensors:
    """What some clients have; copied out of a `Lookup`."""
    return {k: v[at] for k, v in tensors.items()}




def count_numbers(tensors: Tensors) -> int:
    """How many numbers one client's part of the tensors has."""
    return sum(v[0].numel() for v in tensors.values())


