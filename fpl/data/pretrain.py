"""Train the demo CLIP: an ordinary open_clip model with its own small config, on captioned drawings.

    python -m fpl.pretrain data/demo_clip --draws 80000 --epochs 8 --stop 7 --seed 2024

The drawings come from another seed than any data set of the demo. A caption names some of the four attributes, so one
caption can be true of several images of a batch: all of them count as positives.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
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
from fpl.data.files import atomic_write

MODEL = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": 64, "patch_size": 8, "layers": 4, "width": 128, "head_width": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 3},
}
PREPROCESS = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "interpolation": "bicubic", "resize_mode": "shortest"}

# {t} texture, {s} shape, {c} colour, {d} style. Openings of different lengths make every position up to about thirty
# a place where a class name can stand: learnt prompts put it behind sixteen vectors.
OPENINGS = [
    "", "a photo of ", "a photo of ", "an image of ", "a {d} of ", "a {d} of ", "a {d} picture with ", "here we see ",
    "this is a good {d} of ", "one can see in this {d} ", "a close look at this {d} shows that there is ",
    "in the middle of the picture, not far from its centre, somebody has put ",
    "as far as anyone can tell, what is shown in this rather small {d} is nothing else than ",
    "the {d} was made by a machine in no time at all and what it shows to whoever looks at it is clearly ",
]  # fmt: skip
OBJECTS = [
    "a {t} {s}.",
    "a {t} {s}.",
    "a {t} {s}.",
    "a {c} {t} {s}.",
    "a {t} {c} {s}.",
    "{t} {s}.",
    "a {s} that is {t}.",
    "a {s}.",
    "a {c} {s}.",
]


def caption(what: world.Attributes, rng: world.Rng) -> tuple[str, np.ndarray]:
    """A sentence, and which of (shape, texture, colour, style) it names, bool (4,)."""
    text = OPENINGS[rng.integers(len(OPENINGS))] + OBJECTS[rng.integers(len(OBJECTS))]
    named = np.array([f"{{{letter}}}" in text for letter in "stcd"])
    return text.format(s=what.shape, t=what.texture, c=what.colour, d=what.style), named


def draw(number: int, seed: int) -> tuple[np.ndarray, world.Attributes]:
    rng = world.rng_of(seed, number)
    what = world.Attributes.draw(rng)
    return world.render(what, rng), what


def codes(what: world.Attributes) -> list[int]:
    """The attributes as numbers, in the order of `caption`'s mask."""
    return [
        world.SHAPES.index(what.shape),
        world.TEXTURES.index(what.texture),
        list(world.COLOURS).index(what.colour),
        world.STYLES.index(what.style),
    ]


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, true: Tensor) -> Tensor:
    """CLIP's symmetric loss with several positives. image, text: unit (b, d); true[i, j]: caption j is true of image i."""
    logits, target = scale * image @ text.T, true.float()
    to_text = F.cross_entropy(logits, target / target.sum(1, keepdim=True))
    to_image = F.cross_entropy(logits.T, target.T / target.T.sum(1, keepdim=True))
    return (to_text + to_image) / 2


def shifted(pixels: Tensor, rng: world.Rng, most: int = 4) -> Tensor:
    """The batch moved by a few pixels and perhaps mirrored: (b, 3, h, w) uint8 to the model's float input."""
    x = F.pad(pixels.float(), [most] * 4, mode="replicate")
    top, left = rng.integers(0, 2 * most + 1, 2)
    x = x[..., top : top + pixels.shape[-2], left : left + pixels.shape[-1]]
    return normalised(x.flip(-1) if rng.random() < 0.5 else x)


def normalised(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(PREPROCESS[k]).view(3, 1, 1) for k in ("mean", "std"))
    return (pixels.float() / 255 - mean) / std


def encode_captions(model: open_clip.CLIP, tokens: Tensor) -> Tensor:
    """`model.encode_text`, cut behind the longest caption: (b, 77) to (b, d)."""
    end = tokens.argmax(-1)
    n = int(end.max()) + 1
    x = model.token_embedding(tokens[:, :n]) + model.positional_embedding[:n]
    x = model.transformer(x, attn_mask=model.attn_mask[:n, :n])
    return model.ln_final(x[torch.arange(len(x)), end]) @ model.text_projection


def zero_shot(model: open_clip.CLIP, pixels: Tensor, labels: Tensor) -> float:
    """Accuracy of "a photo of a {class}." over the 48 classes."""
    with torch.no_grad():
        text = model.encode_text(open_clip.tokenize([f"a photo of a {name}." for name in world.CLASSES]), normalize=True)
        image = torch.cat([model.encode_image(normalised(x), normalize=True) for x in pixels.split(500)])
    return ((image @ text.T).argmax(1) == labels).float().mean().item()


def train(
    folder: Path, draws: int, epochs: int, stop: int, seed: int, batch: int = 256, lr: float = 1e-3, workers: int = 2
) -> None:
    started = time.time()
    with ProcessPoolExecutor(workers) as pool:
        drawn = list(
            tqdm(pool.map(partial(draw, seed=seed), range(draws + 2000), chunksize=500), total=draws + 2000, desc="drawing")
        )
    pixels = torch.from_numpy(np.stack([image for image, _ in drawn])).permute(0, 3, 1, 2)
    attributes = torch.tensor([codes(what) for _, what in drawn])
    held_labels = torch.tensor([what.label for _, what in drawn[draws:]])

    torch.manual_seed(seed)  # open_clip initialises its modules from the global generator
    model = open_clip.CLIP(**MODEL)
    decay = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    optimiser = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}], lr=lr, betas=(0.9, 0.98)
    )
    steps = epochs * (draws // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.05)
    rng, bar = world.rng_of(seed, draws + 2000), tqdm(total=stop * (draws // batch), desc="training", unit="step")
    for epoch in range(stop):
        for index in torch.from_numpy(rng.permutation(draws)).split(batch)[: draws // batch]:
            texts, named = zip(*(caption(drawn[i][1], rng) for i in index.tolist()), strict=True)
            says = torch.from_numpy(np.stack(named))
            a = attributes[index]
            true = ((a[:, None] == a[None]) | ~says[None]).all(-1)
            with (
                torch.autocast("cpu", torch.bfloat16),
                sdpa_kernel(SDPBackend.MATH),
            ):  # the fused kernel's backward is slow on CPUs
                image = model.encode_image(shifted(pixels[index], rng))
                text = encode_captions(model, open_clip.tokenize(list(texts)))
            loss = contrastive_loss(
                F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1), model.logit_scale.exp(), true
            )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            with torch.no_grad():
                model.logit_scale.clamp_(max=float(np.log(100)))
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}")
        model.eval()
        accuracy = zero_shot(model, pixels[draws:], held_labels)
        bar.write(
            f"epoch {epoch}: zero-shot {accuracy:.3f}, scale {model.logit_scale.exp().item():.1f}, {time.time() - started:.0f} s"
        )
        options = {"draws": draws, "epochs": epoch + 1, "of": epochs, "seed": seed, "batch": batch, "lr": lr}
        result = {"zero_shot": round(accuracy, 4), "seconds": round(time.time() - started)}
        save(model, folder, {**options, **result, "torch": torch.__version__, "open_clip": open_clip.__version__})
        model.train()


def save(model: open_clip.CLIP, folder: Path, made_by: dict) -> None:
    """Half-precision weights and the config in the layout that open_clip loads as `local-dir:`."""
    with atomic_write(folder / "open_clip_model.safetensors") as temporary:
        save_file(
            {k: v.half().contiguous() for k, v in model.state_dict().items()},
            temporary,
            metadata={"made_by": json.dumps(made_by)},
        )
    with atomic_write(folder / "open_clip_config.json") as temporary:
        temporary.write_text(json.dumps({"model_cfg": MODEL, "preprocess_cfg": PREPROCESS}, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--draws", type=int, default=80_000)
    parser.add_argument("--epochs", type=int, default=8, help="length of the learning-rate schedule")
    parser.add_argument("--stop", type=int, default=7, help="end after this many of them: the demo needs a model that errs")
    parser.add_argument("--seed", type=int, default=2024)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    options = parser.parse_args()
    train(options.folder, options.draws, options.epochs, options.stop, options.seed, options.batch, options.lr)
