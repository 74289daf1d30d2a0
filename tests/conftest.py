"""Fixtures that several test modules share. Annotated shapes are checked while tests run."""

import shutil

import checking
import jaxtyping
import pytest
import torch
import torch.nn.functional as F

# Outside the tests the shapes that these modules say cost nothing.
CORE = "prompts gate state methods rounds controls transport privacy released.methods"
CHECKED = [f"fpl.{name}" for name in CORE.split()]
with jaxtyping.install_import_hook(CHECKED, "checking.check"):
    from helpers import BACKBONE, DATA, Here, build, standing_in
    from helpers.tiny import NAMES, SMALL, make, tiny_model

    from fpl.controls import CONTROLS
    from fpl.data import encoders, extraction
    from fpl.data.manifest import read_manifest
    from fpl.experiments import records, runner
    from fpl.methods import METHODS
    from fpl.prompts import Clip, PromptTree
    from fpl.state import Clients

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def shapes_checked():
    """Shapes are checked from the beginning of each test."""
    checking.begin()


@pytest.fixture(scope="session")
def clip():
    return Clip(tiny_model())


@pytest.fixture(scope="session")
def text(clip):
    return PromptTree(clip, NAMES, n_ctx=SMALL["n_ctx"])


@pytest.fixture(scope="session")
def clients():
    """Six clients with images of their own, of which 3 to 13 are for training.

    With batches of 4 these are one to three steps in an epoch. An image has a feature and, not
    related to it, five patches.
    """
    gen = torch.Generator().manual_seed(0)
    train = [8, 4, 13, 5, 3, 9]
    test = [5, 6, 7, 8, 9, 10]
    parts = torch.randperm(sum(train + test), generator=gen).split(train + test)
    feats = F.normalize(torch.randn(sum(train + test), 32, generator=gen), dim=-1)
    labels = torch.randint(len(NAMES), (len(feats),), generator=gen)
    patches = torch.randn(len(feats), 5, 32, generator=gen)
    return Clients(feats, labels, parts[:6], parts[6:], len(NAMES), patches)


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


@pytest.fixture(scope="module")
def patched(world):
    """The world, with patches of its images."""
    with standing_in(world):
        images = read_manifest(DATA.folder / "manifest.csv")
        path = DATA.file("patches")
        extraction.extract(images, encoders.load(BACKBONE.name), path, "patches")
    return world


@pytest.fixture
def alone(here):
    """Standing in the world, where there are no records."""
    shutil.rmtree(records.RECORDS, ignore_errors=True)
    return here
