"""Hand on one client's classifier, for whoever has open_clip and not this package.

Where logits are linear in the image's feature, a file NAME.safetensors has unit text features:

import json
from safetensors import safe_open
with safe_open("client.safetensors", "pt") as file:
    weight, scale = file.get_tensor("weight"), file.get_tensor("logit_scale")  # (c, d), ()
    names = json.loads(file.metadata()["fpl"])["classes"]
logits = scale * clip.encode_image(pixels, normalize=True) @ weight.T

Others (with a gate, a memory, a bias) are a program NAME.pt2 of torch.export, from unit features
(b, d) to logits (b, c):

import torch
logits = torch.export.load("client.pt2").module()(clip.encode_image(pixels, normalize=True))

Both say model, hash of weights, and transform. There is no pickle in them.
"""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from fpl.data.files import atomic_write, check_file
from fpl.experiments.predict import Classifier, Model, names_of
from fpl.experiments.records import RECORDS
from fpl.methods import PromptFL

LINEAR, PROGRAM = ".safetensors", ".pt2"
EXPORTS = RECORDS.with_name("exports")
TOLD = "fpl"  # the entry of the header, or the extra file, that has what is told


def export(model: Model, client: int | str, path: str | Path) -> Path:
    """Write a client's classifier and return the file, with the ending of its kind.

    Raises ValueError for another ending, as `Model.classifier` does, and for logits that
    torch.export cannot follow: those of FedOTP, whose transport stops when its numbers say so.
    """
    one = on_cpu(model.classifier(client))
    linear = type(one.method).logits is PromptFL.logits
    ending = LINEAR if linear else PROGRAM
    path = Path(path)
    if path.suffix != ending:
        if path.suffix[1:].isidentifier():  # that of a name such as run-0.5 is none
            raise ValueError(f"{one.method.title} is written as NAME{ending}: correct {path}")
        path = path.with_name(f"{path.name}{ending}")
    check_file(path)
    x = one.example()
    write = write_linear if linear else write_program
    write(one, x, described(model, client, one.logits(x).shape[-1]), path)
    return path


def on_cpu(one: Classifier) -> Classifier:
    """Return a classifier with its tensors on the CPU, where everybody can read them."""
    p = {name: value.cpu() for name, value in one.p.items()}
    reads = {name: value.cpu() for name, value in one.reads.items()}
    t = None if one.t is None else one.t.cpu()
    return replace(one, t=t, p=p, reads=reads)


def described(model: Model, client: int | str, columns: int) -> str:
    """Return what is written beside the numbers, as JSON; classes are in the order of logits."""
    kept = model.kept
    who = client if isinstance(client, str) else int(client)
    own = {"classes": names_of(kept, columns), "method": kept.method.title, "client": who}
    return json.dumps({**kept.provenance, **own})


def write_linear(one: Classifier, x: Tensor, told: str, path: Path) -> None:
    """Write unit text features and the scale."""
    assert one.t is not None, "PromptFL's logits have text features"
    tensors = {"weight": one.t[0].contiguous(), "logit_scale": torch.tensor(one.text.scale)}
    with atomic_write(path) as temporary:
        temporary.write_bytes(save(tensors, {TOLD: told}))  # its own files are for oneself only


class Program(nn.Module):
    """A classifier as torch.export takes it."""

    def __init__(self, one: Classifier) -> None:
        super().__init__()
        self.classify = one.logits

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(x)


def write_program(one: Classifier, x: Tensor, told: str, path: Path) -> None:
    """Write what torch.export makes of a classifier, for any number of images."""
    free = {axis: torch.export.Dim(name) for axis, name in enumerate("bM"[: x.ndim - 1])}
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # torch shows all that it has understood
            program = torch.export.export(Program(one), (x,), dynamic_shapes=(free,))
    except Exception as error:  # torch has many for what it cannot follow
        why = f"torch.export cannot follow how it classifies ({type(error).__name__})"
        raise ValueError(f"{one.method.title} is not exported: {why}; use `fpl predict`") from error
    program._example_inputs = None  # they would be pickled
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        torch.export.save(program, file, extra_files={f"{TOLD}.json": told})
