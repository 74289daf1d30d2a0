"""Shared by the tests: a tiny random CLIP, clients of unequal size, the golden files. Shapes are checked while tests run."""

import dataclasses
from pathlib import Path

import jaxtyping
import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F

# The annotated shapes of these modules are checked at every call; outside the tests they cost nothing.
CHECKED = [
    *(f"fpl.{name}" for name in ("prompts", "gate", "state", "methods", "rounds", "controls", "transport", "privacy")),
    "fpl.released.methods",
]
with jaxtyping.install_import_hook(CHECKED, "beartype.beartype"):
    from helpers import Here, build, standing_in

    from fpl.controls import CONTROLS
    from fpl.experiments import runner
    from fpl.methods import METHODS
    from fpl.prompts import Clip, PromptTree
    from fpl.state import Clients

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]
NAMES = ["red_square", "red circle", "Blue square", "painter's palette", "cat", "golden retriever"]
SMALL = {"n_ctx": 4, "n_experts": 2, "d_gate": 16, "heads": 4, "n_base": 3, "rank": 2, "tune_epochs": 3}


def tiny_model(kind=open_clip.CLIP, embed_dim=32, quick_gelu=False, **text_cfg):
    """A random open_clip model; `text_cfg` changes its text tower."""
    vision = {"image_size": 32, "patch_size": 16, "layers": 1, "width": 32, "head_width": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2, **text_cfg}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(embed_dim=embed_dim, vision_cfg=vision, text_cfg=text, quick_gelu=quick_gelu).eval().requires_grad_(False)


def make(kind):
    """A method with settings that fit the tiny CLIP."""
    return kind(**{f.name: SMALL[f.name] for f in dataclasses.fields(kind) if f.name in SMALL})


def golden(name):
    """Inputs and outputs of the released code, see tests/data/golden; floats become tensors, `source` names what was executed."""
    with np.load(ROOT / f"tests/data/golden/{name}.npz", allow_pickle=False) as z:
        return {k: z[k].tolist() if z[k].dtype.kind == "U" else torch.from_numpy(z[k]) for k in z.files if k != "source"}


def stored_clip(z):
    """The frozen text tower of a golden file; of the token embedding only the rows in use are stored."""
    weights = {k.removeprefix("sd."): v for k, v in z.items() if k.startswith("sd.")}
    width, dim = weights["text_projection"].shape
    model = tiny_model(embed_dim=dim, quick_gelu=True, width=width, heads=int(z["heads"]), layers=int(z["layers"]))
    weights["token_embedding.weight"] = torch.zeros(49408, width).index_copy(0, z["emb_ids"], z["emb_rows"])
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.startswith("visual.") for name in missing)
    return Clip(model)


def error(got, want, scale=None):
    """max |got - want| / max |want|, the measure of the golden files."""
    assert got.shape == want.shape
    return ((got.double() - want.double()).abs().max() / (want.abs().max() if scale is None else scale)).item()


@pytest.fixture(scope="session")
def clip():
    return Clip(tiny_model())


@pytest.fixture(scope="session")
def text(clip):
    return PromptTree(clip, NAMES, n_ctx=SMALL["n_ctx"])


@pytest.fixture(scope="session")
def clients():
    """Six clients with images of their own, of which 3 to 13 for training: with batches of 4, one to three steps in an epoch.

    An image has a feature and, not related to it, five patches.
    """
    gen, train, test = torch.Generator().manual_seed(0), [8, 4, 13, 5, 3, 9], [5, 6, 7, 8, 9, 10]
    parts = torch.randperm(sum(train + test), generator=gen).split(train + test)
    feats = F.normalize(torch.randn(sum(train + test), 32, generator=gen), dim=-1)
    labels, patches = torch.randint(len(NAMES), (len(feats),), generator=gen), torch.randn(len(feats), 5, 32, generator=gen)
    return Clients(feats, labels, parts[:6], parts[6:], len(NAMES), patches)


@pytest.fixture(params=METHODS)
def method(request):
    return make(METHODS[request.param])


@pytest.fixture(params=[*METHODS, *CONTROLS])
def row(request):
    """A method or a control: whatever is a row of a table."""
    return make({**METHODS, **CONTROLS}[request.param])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with drawn images, a random CLIP and their features."""
    return build(tmp_path_factory.mktemp("world"))


@pytest.fixture
def here(world, monkeypatch):
    """Standing in the world, with the workers' work done in this process."""
    monkeypatch.setattr(runner, "ProcessPoolExecutor", Here)
    with standing_in(world):
        yield world
