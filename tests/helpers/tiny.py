"""A tiny random CLIP, settings of methods that fit it, and the golden files."""

import dataclasses

import numpy as np
import open_clip
import torch

from fpl.prompts import Clip
from helpers import ROOT, TEXT, VISION

NAMES = ["red_square", "red circle", "Blue square", "painter's palette", "cat", "golden retriever"]
SMALL = {
    "n_ctx": 4,
    "n_experts": 2,
    "d_gate": 16,
    "heads": 4,
    "n_base": 3,
    "rank": 2,
    "tune_epochs": 3,
}


def tiny_model(kind=open_clip.CLIP, embed_dim=32, quick_gelu=False, **text_cfg):
    """Return a random open_clip model; `text_cfg` changes its text tower."""
    text = {**TEXT, "width": 32, "heads": 2, "layers": 2, **text_cfg}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(embed_dim=embed_dim, vision_cfg=VISION, text_cfg=text, quick_gelu=quick_gelu)
    return model.eval().requires_grad_(False)


def make(kind, **changes):
    """Return a method with settings that fit the tiny CLIP."""
    names = {f.name for f in dataclasses.fields(kind)}
    small = {name: value for name, value in SMALL.items() if name in names}
    if kind.key == "pfedmoap_oneword":
        small["n_ctx"] = 1
    return kind(**{**small, **changes})


def golden(name):
    """Return inputs and outputs of the released code, see tests/data/golden.

    Floats become tensors, `source` names what was executed.
    """
    with np.load(ROOT / f"tests/data/golden/{name}.npz", allow_pickle=False) as z:
        arrays = {k: z[k] for k in z.files if k != "source"}
    return {
        k: v.tolist() if v.dtype.kind == "U" else torch.from_numpy(v) for k, v in arrays.items()
    }


def stored_clip(z):
    """Return the frozen text tower of a golden file.

    Of the token embedding only the rows in use are stored.
    """
    weights = {k.removeprefix("sd."): v for k, v in z.items() if k.startswith("sd.")}
    width, dim = weights["text_projection"].shape
    shape = {"width": width, "heads": int(z["heads"]), "layers": int(z["layers"])}
    model = tiny_model(embed_dim=dim, quick_gelu=True, **shape)
    embedding = torch.zeros(49408, width).index_copy(0, z["emb_ids"], z["emb_rows"])
    weights["token_embedding.weight"] = embedding
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.startswith("visual.") for name in missing)
    return Clip(model)


def error(got, want, scale=None):
    """Return max |got - want| / max |want|, the measure of the golden files."""
    assert got.shape == want.shape
    scale = want.abs().max() if scale is None else scale
    return ((got.double() - want.double()).abs().max() / scale).item()
