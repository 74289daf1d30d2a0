"""The public verbs: load a CLIP, make features, split them into clients, train, use the result.

import fpl
clip = fpl.load()
data = fpl.features("shapes", clip)
clients = fpl.split(data, kind="pathological", clients=10, shots=16, seed=1)
result = fpl.train("pfedmoap", clip, clients, rounds=10)
result.table()
fpl.save(result, "mine.safetensors")
fpl.restore("mine.safetensors").predict("photos/", client=3)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from fpl.data import datasets, encoders, partitions, world
from fpl.data.features import Features
from fpl.data.features import load as open_features
from fpl.data.files import check_file
from fpl.data.manifest import SOURCE
from fpl.data.partitions import Partition
from fpl.experiments import cache, keep, values
from fpl.experiments.assemble import check_begin, deal, seeds_of
from fpl.experiments.extract import Request, make_features
from fpl.experiments.predict import Model, check_same, restore
from fpl.experiments.settings import Backbone, Data, check_key, part_of, row_class
from fpl.experiments.values import build, check_choice, shown
from fpl.methods import PromptFL
from fpl.prompts import Clip, PromptTree
from fpl.rounds import Round, Setup, Training, run_rounds
from fpl.state import Clients, Tensors

__all__ = ["Model", "Result", "Split", "features", "load", "restore", "save", "split", "train"]


@dataclass(frozen=True)
class Split(Clients):
    """Clients that know their classes' names, maybe their own, and the seed of their drawing.

    form: of their partition. provenance: of their features, see fpl.data.features.
    """

    classes: tuple[str, ...] = ()
    seed: int = 1
    names: tuple[str, ...] = ()
    form: str = "ours"
    provenance: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """What a run gave: what stayed the same in it, the frozen model, and every round."""

    setup: Setup
    clip: Clip = field(repr=False)
    rounds: list[Round] = field(repr=False)

    @property
    def method(self) -> PromptFL:
        """The method with its settings."""
        return self.setup.method

    @property
    def clients(self) -> Split:
        """The clients, as `split` gave them."""
        assert isinstance(self.setup.clients, Split)
        return self.setup.clients

    @property
    def accuracy(self) -> Float[Tensor, " n"]:
        """Each client's accuracy after the last round, in [0, 1]: never that of the best round."""
        return self.rounds[-1].accuracy

    @property
    def prompts(self) -> Float[Tensor, "n *k m w"] | None:
        """The prompt that each client classifies with; None where no prompt is what is learnt."""
        learnt: Tensors = self.rounds[-1].evaluated
        try:
            return self.method.ctx(learnt)
        except KeyError:
            return None

    def table(self) -> pd.DataFrame:
        """Return a line for each client: its images and classes, and accuracy in percent."""
        clients = self.clients
        everybody = range(len(clients))
        counts = [clients.counts(i) for i in everybody]
        return pd.DataFrame(
            {
                "training images": [int(count.sum()) for count in counts],
                "classes": [int((count > 0).sum()) for count in counts],
                "test images": [len(clients.test[i]) for i in everybody],
                "accuracy, %": (100 * self.accuracy).round(decimals=2).tolist(),
            },
            index=pd.Index(clients.names or everybody, name="client"),
        ).round(2)


def load(name: str = "", weights: str | Path = "", preprocessing: str = "") -> Clip:
    """Load a frozen CLIP, on a GPU when there is one; without a name, the demo's.

    name: an open_clip model such as "ViT-B-16-quickgelu" with `weights`, a tag such as "openai" or
    the path of a file; or "local-dir:FOLDER" or "hf-hub:REPOSITORY", which have their own.
    preprocessing: of images; "" for CLIP's own.
    Raises FileNotFoundError for weights that are not there and ValueError for an unknown model.
    """
    name = name or demo_clip()
    return encoders.load(name, weights, cache.device(), preprocessing=preprocessing)


def demo_clip() -> str:
    """Return the name of the demo's CLIP; within a profile it is the name that features carry."""
    return encoders.located(Backbone().name)


def features(
    images: str | Path, clip: Clip, patches: bool = False, skip_bad: bool = False
) -> Features:
    """Return the features of images, extracted once and then read from data/features.

    images: a demo world ("shapes" or "styles"), a data set under data/images by its name
    (`fpl data list`), or the path of your own: a folder CLASS/FILE or DOMAIN/CLASS/FILE, or a CSV.
    patches: those of patches, too, which FedOTP reads.
    skip_bad: leave out images that cannot be read.
    Raises OSError for images that cannot be read, and ValueError for what is no data set.
    """
    data = data_of(str(images), clip)
    request = Request({"patches"} if patches else set(), skip_bad=skip_bad)
    paths = [made.path for made in make_features(data, clip, request)]
    found = open_features(paths[0], clip.provenance, cache.device())
    if not patches:
        return found
    of_patches = open_features(data.file("patches"), found.provenance, cache.device(), "patches")
    return replace(found, patches=of_patches.feats)


def data_of(images: str, clip: Clip) -> Data:
    """Return the settings of a data set; features of every model have a file of their own."""
    known = [*world.WORLDS, *datasets.DATASETS]
    is_demo = clip.provenance["model"] == Backbone().name
    model = hashlib.sha256(repr(clip.provenance).encode()).hexdigest()[:8]
    if images in known:
        data = Data(name=images, store="" if is_demo else f"{images}_{model}")
        drawn = data.folder / SOURCE  # a world that is there stays as it was drawn
        there = drawn.exists() and images in world.WORLDS
        return replace(data, **part_of(json.loads(drawn.read_text()), Data)) if there else data
    path = Path(images)
    if not path.exists():
        check_choice(images, known, "data set, and no path of images of your own:")
    place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    return Data(name="own", root=images, store=f"{path.stem}_{place}_{model}")


def split(data: Features, seed: int = 1, **partition: Any) -> Split:
    """Deal images to clients.

    partition: fields of fpl.data.partitions.Partition, such as kind="dirichlet", clients=10,
    concentration=0.3, shots=16. Raises ValueError for unknown ones and for images that cannot be
    dealt as asked.
    """
    asked = build(Partition, partition, "split")
    if asked.unseen:
        instead = "leave it out, or use `fpl run`"
        raise ValueError(f"split.unseen is for runs of a settings file: {instead}")
    nobody: list[Tensor] = []
    labels = data.labels.cpu().numpy()
    names = partitions.client_names(asked, labels, data.domain, data.client)
    whole = Split(
        *(data.feats, data.labels, nobody, nobody, len(data.classes), data.patches),
        classes=tuple(data.classes),
        seed=values.seed(seed),
        names=tuple(names),
        form=asked.form,
        provenance=data.provenance,
    )
    dealt = deal(whole, data, asked, whole.seed)
    assert isinstance(dealt, Split)
    return dealt


def train(
    method: str | type[PromptFL] | PromptFL,
    clip: Clip,
    clients: Split,
    seed: int | None = None,
    progress: bool = True,
    **settings: Any,
) -> Result:
    """Train a method on clients, and evaluate it after every round.

    method: a key such as "pfedmoap", FILE.py:CLASS, a class of your own, or an instance of one.
    seed: of what training draws; by default that of the split. progress: show a bar.
    settings: of the method (n_experts=5) and of fpl.rounds.Training (rounds=10); what is not given
    has its default there. params.yaml is not read.
    Raises ValueError for what is no method or no split, for features of another model than `clip`
    and for settings that are unknown or out of range, and FloatingPointError when the loss is no
    longer finite.
    """
    kind = kind_of(method)
    if not isinstance(clients, Split):
        given = type(clients).__name__
        raise ValueError(f"clients are a Split, not {given}: deal the images with `fpl.split`")
    model = {k: v for k, v in clients.provenance.items() if k in clip.provenance}
    check_same(clip, model, "the features of these clients were")
    if clients.form == "released" and hasattr(kind, "turns"):
        whose = f"the code of {kind.title} draws who trains together with the split"
        raise ValueError(f"{whose}, which `fpl.split` does not: use `fpl run {kind.key}`")
    valid = [known.name for cls in (kind, Training) for known in fields(cls)]
    for name in settings:
        check_choice(name, sorted(valid), f"setting of {kind.title}")
    chosen = part_of(settings, kind)
    if isinstance(method, PromptFL):
        chosen = vars(method) | chosen
    made = build(kind, chosen, kind.key)
    training = build(Training, kind.training | part_of(settings, Training), kind.key)
    names = clients.classes[: clients.n_cls]
    text = PromptTree(clip, names, made.n_ctx, precision=training.precision)
    drawn = clients.seed if seed is None else values.seed(seed)
    setup = Setup(made, text, clients, training, seeds_of(training, drawn))
    check_begin(setup)
    rounds = run_rounds(setup)
    bar = tqdm(rounds, made.title, training.rounds, unit="round", disable=not progress)
    return Result(setup, clip, list(bar))


def kind_of(method: Any) -> type[PromptFL]:
    """Return the class of a method. Raises ValueError for what is none."""
    kind = row_class(method) if isinstance(method, str) else method
    kind = kind if isinstance(kind, type) else type(kind)
    if not issubclass(kind, PromptFL):
        known = "a row such as 'promptfl', FILE.py:CLASS, or a subclass of fpl.methods.PromptFL"
        raise ValueError(f"{shown(method)} is no method: give {known}")
    check_key(kind)
    return kind


def save(result: Result, path: str | Path) -> Path:
    """Keep what a run learnt in one file, which `restore` reads; see fpl.experiments.keep.

    path: ends in .safetensors. Raises ValueError for another ending, and OSError where no file can
    be written.
    """
    path = Path(path)
    if path.suffix != keep.SUFFIX:
        raise ValueError(f"{path} must end in {keep.SUFFIX}: it is a file of that kind")
    check_file(path)
    last, clients = result.rounds[-1], result.clients
    about = {"images": clients.provenance.get("data", "")}
    keep.write(path, keep.of_run(result.setup, last, result.clip, clients.names, **about))
    return path
