"""What several test modules need: here a small world of files, a random CLIP and its features.

`helpers.tiny` has what stands in for CLIP and its clients in memory, and the golden files;
`helpers.runs` plays whole runs and watches them.
"""

import contextlib
import json
from concurrent.futures import Future
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from fpl.data import encoders, extraction, world
from fpl.data.manifest import read_manifest
from fpl.experiments import settings

ROOT = Path(__file__).parents[2]
DATA = settings.Data(train_per_class=2, test_per_class=1)
BACKBONE = settings.Backbone("local-dir:clip")
VISION = {"image_size": 32, "patch_size": 16, "layers": 1, "width": 32, "head_width": 16}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1}
MODEL = {"embed_dim": 32, "vision_cfg": VISION, "text_cfg": TEXT}
PREPROCESS = {
    "mean": [0.5] * 3,
    "std": [0.25] * 3,
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
PARAMS = settings.Settings(
    data=DATA,
    backbone=BACKBONE,
    partition=settings.Partition(clients=4, shots=2),
    run=settings.Training(rounds=2, local_epochs=1, batch_size=8),
    methods={
        "promptfl": {"n_ctx": 2},
        "pfedmoap": {"n_ctx": 2, "n_experts": 2, "d_gate": 16, "heads": 4},
    },
)

OTHER = {  # of every setting to which 1 cannot be added, a value that is not the default
    "kind": "even",
    "form": "released",
    "loader": "both",
    "classes": "base",
    "held_out": "sketch",
    "schedule": "cosine",
    "optimiser": "shared",
    "momentum": 0.5,
    "participation": 0.5,
    "delta": 0.5,
    "precision": "bfloat16",
    "template": "a {}.",
    "memory": "always",
    "anchor": "a {}.",
    "transport": "balanced",
    "gamma": 0.5,
    "choice": "random",
    "mixing": "linear",
    "gate_kept": "aggregated",
    "pooling": "mean",
    "tested": "after",
    "mechanism": "clipping",
}


# a file with a method of one's own
HALVED = """
from dataclasses import dataclass

from fpl.methods import PromptFL


@dataclass(frozen=True)
class Halved(PromptFL):
    n_ctx: int = 2

    def ctx(self, p):
        return p["ctx"] / 2
"""


def store_clip(folder, seed=0):
    """Write a random open_clip model in the layout that `local-dir:` loads."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        weights = {k: v.contiguous() for k, v in open_clip.CLIP(**MODEL).state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    config = {"model_cfg": MODEL, "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(config))


@contextlib.contextmanager
def standing_in(folder):
    """Stand in `folder` as the project's root."""
    with contextlib.chdir(folder):
        yield folder


def build(folder):
    """Make images, model and features under `folder`, where the settings above look for them."""
    with standing_in(folder):
        store_clip(Path("clip"))
        world.make(DATA.folder, DATA.seed, DATA.train_per_class, DATA.test_per_class)
        manifest = read_manifest(DATA.folder / "manifest.csv")
        extraction.extract(manifest, encoders.load(BACKBONE.name), DATA.features)
    return folder


def refuses(call, words):
    """Hold that a call ends in a ValueError of one line that has all the words."""
    with pytest.raises(ValueError) as error:
        call()
    said = str(error.value)
    assert "\n" not in said and all(word in said for word in words), said


class Here:
    """The executor's interface, with the work done at once in this process."""

    def __init__(self, *args, **kwargs):
        self.cancelled = False

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def submit(self, call, *args):
        future = Future()
        try:
            future.set_result(call(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, **kwargs):
        self.cancelled = True
