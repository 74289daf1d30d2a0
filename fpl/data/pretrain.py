"""The demo CLIP: an ordinary open_clip model with a small config of its own, trained on drawings.

    python -m fpl.data.pretrain data/demo_clip --draws 80000 --epochs 8 --stop 7 --seed 2024

The drawings come from another seed than any data set of the demo. A caption names some of the four
attributes, so one caption can be true of several images of a batch: all of them count as positives.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from fpl.data import world
from fpl.data.encoders import CONFIG, WEIGHTS
from fpl.data.files import atomic_write

MODEL = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": 64, "patch_size": 8, "layers": 4, "width": 128, "head_width": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 3},
}
PREPROCESS = {
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}

# Openings of different lengths make every position up to about thirty a place where a class name
# can stand: learnt prompts put it behind sixteen vectors.
OPENINGS = [
    "",
    "a photo of ",
    "a photo of ",
    "an image of ",
    "a {style} of ",
    "a {style} of ",
    "a {style} picture with ",
    "here we see ",
    "this is a good {style} of ",
    "one can see in this {style} ",
    "a close look at this {style} shows that there is ",
    "in the middle of the picture, not far from its centre, somebody has put ",
    "as far as anyone can tell, what is shown in this rather small {style} is nothing else than ",
    "the {style} was made by a machine in no time at all and what it shows to whoever looks at it "
    "is clearly ",
]
OBJECTS = [
    "a {texture} {shape}.",
    "a {texture} {shape}.",
    "a {texture} {shape}.",
    "a {colour} {texture} {shape}.",
    "a {texture} {colour} {shape}.",
    "{texture} {shape}.",
    "a {shape} that is {texture}.",
    "a {shape}.",
    "a {colour} {shape}.",
]
WORDS = {
    "shape": world.SHAPES,
    "texture": world.TEXTURES,
    "colour": list(world.COLOURS),
    "style": world.STYLES,
}
HELD_OUT = 2000  # drawings by which the accuracy is measured


@dataclass(frozen=True)
class Recipe:
    """How the model is trained.

    epochs: over which the learning rate is scheduled.
    stop: end after this many of them, because the demo needs a model that errs.

    Raises ValueError for more epochs than are scheduled, and for fewer drawings than a batch has.
    """

    draws: int = 80_000
    epochs: int = 8
    stop: int = 7
    seed: int = 2024
    batch: int = 256
    lr: float = 1e-3

    def __post_init__(self) -> None:
        if not 1 <= self.stop <= self.epochs:
            raise ValueError(f"stop is {self.stop}: set it to 1 .. epochs, which are {self.epochs}")
        if not 1 <= self.batch <= self.draws:
            raise ValueError(f"batch is {self.batch}: set it to 1 .. draws, which are {self.draws}")

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return self.draws // self.batch


def caption(what: world.Attributes, rng: world.Rng) -> tuple[str, list[bool]]:
    """Write a sentence, and say which of (shape, texture, colour, style) it names."""
    opening = OPENINGS[rng.integers(len(OPENINGS))]
    text = opening + OBJECTS[rng.integers(len(OBJECTS))]
    return text.format(**vars(what)), [f"{{{name}}}" in text for name in WORDS]


def draw(number: int, seed: int) -> tuple[np.ndarray, world.Attributes]:
    rng = world.rng_of(seed, number)
    what = world.Attributes.draw(rng)
    return world.render(what, rng), what


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, true: Tensor) -> Tensor:
    """CLIP's symmetric loss with several positives.

    image, text: (b, d), of any length
    true: (b, b), whether the caption of a column is true of the image of a row
    """
    image = F.normalize(image.float(), dim=-1)
    text = F.normalize(text.float(), dim=-1)
    logits = scale * image @ text.T
    target = true.float()
    to_text = F.cross_entropy(logits, target / target.sum(1, keepdim=True))
    to_image = F.cross_entropy(logits.T, target.T / target.T.sum(1, keepdim=True))
    return (to_text + to_image) / 2


def shifted(pixels: Tensor, rng: world.Rng, most: int = 4) -> Tensor:
    """Move a batch (b, 3, h, w) by a few pixels and perhaps mirror it, as input of the model."""
    x = F.pad(pixels.float(), [most] * 4, mode="replicate")
    top, left = rng.integers(0, 2 * most + 1, 2)
    height, width = pixels.shape[-2:]
    x = x[..., top : top + height, left : left + width]
    return normalised(x.flip(-1) if rng.random() < 0.5 else x)


def normalised(pixels: Tensor) -> Tensor:
    """Bring pixels of 0 to 255 to the range that the model takes."""
    mean = torch.tensor(PREPROCESS["mean"])
    std = torch.tensor(PREPROCESS["std"])
    in_one = pixels.float() / 255
    return (in_one - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def encode_captions(model: open_clip.CLIP, tokens: Tensor) -> Tensor:
    """Do what `model.encode_text` does, cut behind the longest caption: (b, 77) to (b, d)."""
    end = tokens.argmax(-1)
    n = int(end.max()) + 1
    x = model.token_embedding(tokens[:, :n]) + model.positional_embedding[:n]
    x = model.transformer(x, attn_mask=model.attn_mask[:n, :n])
    return model.ln_final(x[torch.arange(len(x)), end]) @ model.text_projection


@torch.no_grad()
def zero_shot(model: open_clip.CLIP, pixels: Tensor, drawn: Sequence[world.Attributes]) -> float:
    """Measure the accuracy of "a photo of a {class}." over the 48 classes."""
    prompts = [f"a photo of a {name}." for name in world.CLASSES]
    text = model.encode_text(open_clip.tokenize(prompts), normalize=True)
    parts = [model.encode_image(normalised(x), normalize=True) for x in pixels.split(500)]
    labels = [world.CLASSES.index(f"{what.texture} {what.shape}") for what in drawn]
    right = (torch.cat(parts) @ text.T).argmax(1) == torch.tensor(labels)
    return right.float().mean().item()


def optimiser_of(model: open_clip.CLIP, lr: float) -> torch.optim.Optimizer:
    """Weights decay, but not biases, norms and the scale."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))


def train(folder: Path, recipe: Recipe, workers: int = 2) -> None:
    """Draw the images, train the model on them and save it after every epoch."""
    started = time.time()
    total = recipe.draws + HELD_OUT
    with ProcessPoolExecutor(workers) as pool:
        made = pool.map(partial(draw, seed=recipe.seed), range(total), chunksize=500)
        images, drawn = zip(*tqdm(made, total=total, desc="drawing"), strict=True)
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    codes = []
    for what in drawn:
        said = vars(what)
        codes.append([words.index(said[name]) for name, words in WORDS.items()])
    attributes = torch.tensor(codes)

    torch.manual_seed(recipe.seed)  # open_clip initialises its modules from the global generator
    model = open_clip.CLIP(**MODEL)
    optimiser = optimiser_of(model, recipe.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, recipe.lr, total_steps=recipe.epochs * recipe.steps, pct_start=0.05
    )
    rng = world.rng_of(recipe.seed, total)
    bar = tqdm(total=recipe.stop * recipe.steps, desc="training", unit="step")
    for epoch in range(recipe.stop):
        order = torch.from_numpy(rng.permutation(recipe.draws)).split(recipe.batch)
        for index in order[: recipe.steps]:
            captions = [caption(drawn[i], rng) for i in index.tolist()]
            loss = step(model, pixels[index], attributes[index], captions, rng)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            with torch.no_grad():
                model.logit_scale.clamp_(max=float(np.log(100)))
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}")
        model.eval()
        accuracy = zero_shot(model, pixels[recipe.draws :], drawn[recipe.draws :])
        seconds = round(time.time() - started)
        scale = model.logit_scale.exp().item()
        bar.write(f"epoch {epoch}: zero-shot {accuracy:.3f}, scale {scale:.1f}, {seconds} s")
        result = {"epochs": epoch + 1, "zero_shot": round(accuracy, 4), "seconds": seconds}
        save(model, folder, {**vars(recipe), "of": recipe.epochs, **result})
        model.train()


def step(
    model: open_clip.CLIP,
    pixels: Tensor,
    attributes: Tensor,
    captions: Sequence[tuple[str, list[bool]]],
    rng: world.Rng,
) -> Tensor:
    """Compute the loss of a batch of drawings and their captions; attributes (b, 4)."""
    texts, named = zip(*captions, strict=True)
    same = attributes[:, None] == attributes[None]
    true = (same | ~torch.tensor(named)[None]).all(-1)
    # the fused kernel's backward is slow on CPUs
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        image = model.encode_image(shifted(pixels, rng))
        text = encode_captions(model, open_clip.tokenize(list(texts)))
    return contrastive_loss(image, text, model.logit_scale.exp(), true)


def save(model: open_clip.CLIP, folder: Path, made_by: dict) -> None:
    """Write half-precision weights and the config, which open_clip loads as `local-dir:`."""
    versions = {"torch": torch.__version__, "open_clip": open_clip.__version__}
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    with atomic_write(folder / WEIGHTS) as temporary:
        save_file(weights, temporary, metadata={"made_by": json.dumps({**made_by, **versions})})
    config = {"model_cfg": MODEL, "preprocess_cfg": PREPROCESS}
    with atomic_write(folder / CONFIG) as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("folder", type=Path)
    for option in fields(Recipe):
        kind = type(option.default)
        parser.add_argument(f"--{option.name}", type=kind, default=option.default)
    options = vars(parser.parse_args())
    train(options.pop("folder"), Recipe(**options))
