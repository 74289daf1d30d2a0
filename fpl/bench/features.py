"""What features cost: extraction measured beside the bare model, reading a file into memory, the size of every data set's."""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from fpl.bench.step import timed
from fpl.data import encoders as clips
from fpl.data import features
from fpl.data.datasets import DATASETS
from fpl.prompts import Clip

TOWERS = {"RN50": (1024, 49), "ViT-B/16": (512, 196)}  # joint width d, patches M of an image of 224 pixels
BYTES = 2  # of a number in half precision
PHOTO = (512, 384)  # pixels, as Food101's


def extraction(model: str, weights: str, images: int, batch: int, workers: int, repeats: int, device: str) -> pd.DataFrame:
    """Images per second of the whole extraction, of the bare model on the same pixels in memory, and of decoding alone.

    Rates are medians, the share is the median over turns. The bare model has its batches on its device, where an image of 224
    pixels takes 0.6 MB, and half precision on a GPU. Without `weights` they are random.
    """
    clip = clips.load(model, weights, device) if weights or ":" in model else clips.untrained(model, device)
    with tempfile.TemporaryDirectory() as folder:
        manifest = photos(Path(folder), images)
        loader = DataLoader(features.Images(manifest, range(images), clip.transform, None), batch, num_workers=workers)
        pixels = [x.flatten(0, 1).to(device) for x, _ in loader]
        table = rates(
            {
                "bare model": lambda: bare(clip, pixels),
                "extraction": lambda: features.extract(manifest, clip, Path(folder) / "features.h5", workers=workers),
                "decoding alone": lambda: deque(loader, maxlen=0),
            },
            images,
            repeats,
        )
    return table.assign(model=model, device=device, batch=batch, workers=workers)


def rates(ways: dict[str, Callable[[], object]], images: int, repeats: int) -> pd.DataFrame:
    """Calls that take turns, once without counting and then `repeats` times: a line for each, compared with the first."""
    seconds = pd.DataFrame([{way: timed(call) for way, call in ways.items()} for _ in range(repeats + 1)]).iloc[1:]
    first, median = seconds.columns[0], seconds.median()
    share = seconds.rdiv(seconds[first], axis=0).median()
    table = pd.DataFrame({"images": images, "seconds": median, "images/s": images / median, f"share of {first}": share})
    return table.rename_axis("way").reset_index()


@torch.no_grad()
def bare(clip: Clip, pixels: list[Tensor]) -> Tensor:
    with torch.autocast(pixels[0].device.type, torch.float16, enabled=pixels[0].is_cuda):
        return torch.cat([features.CONTENT["feats"](clip, x) for x in pixels]).cpu()


def photos(folder: Path, images: int) -> features.Manifest:
    """JPEG files of a photograph's size in pixels and, at about 90 kB, in bytes: smooth colours under some noise."""
    manifest = listed(folder, images)
    for number, row in enumerate(manifest.rows):
        rng = np.random.default_rng([0, number])
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(PHOTO, Image.Resampling.BICUBIC)
        noisy = np.asarray(coarse) + rng.normal(0, 8, (*PHOTO[::-1], 1))
        Image.fromarray(noisy.clip(0, 255).astype("uint8")).save(folder / row["path"], quality=90)
    return manifest


def listed(folder: Path, images: int) -> features.Manifest:
    """The manifest of that many images of one class."""
    common = {"label": "0", "class": "photo", "split": "train", "domain": "photo"}
    return features.Manifest(folder, [{"path": f"{i:06d}.jpg", **common} for i in range(images)], ["photo"], "drawn")


def reading(images: int, repeats: int, dim: int = 512) -> pd.DataFrame:
    """Reading the array of a features file into memory, and opening the file with all its checks; it was written a moment ago."""
    with tempfile.TemporaryDirectory() as folder:
        path, manifest = Path(folder) / "features.h5", listed(Path(folder), images)
        features.create(path, manifest, "feats", (dim,), {"content": "feats"})
        with h5py.File(path, "r+") as f:
            f["feats"][:] = np.random.default_rng(0).standard_normal((images, dim), dtype=np.float32)
            f.attrs["sha256"] = features.digest(f)
        ways = {"array alone": lambda: array(path), "features.load": lambda: features.load(path)}
        return rates(ways, images, repeats).assign(d=dim, MiB=path.stat().st_size / 2**20)


def array(path: Path) -> np.ndarray:
    with h5py.File(path) as f:
        return f["feats"][:]


def sizes(views: int) -> pd.DataFrame:
    """Megabytes (10^6) of features with either tower: pooled, patches, and views of training images.

    Of training and test images as Table 5 of pFedMoAP counts them; images for validation, where a data set lists them, add to it.
    """
    lines = []
    for name, dataset in DATASETS.items():
        lists = next(iter(dataset.layouts.values()))  # the paper's
        train, test = lists.train or 0, lists.test or 0
        for tower, (dim, patches) in TOWERS.items():
            pooled = (train + test) * dim * BYTES
            line = {"data set": name, "images": train + test, "tower": tower, "d": dim}
            stored = {"pooled MB": pooled, "patches MB": patches * pooled, f"{views} views MB": views * train * dim * BYTES}
            lines.append(line | {kind: round(size / 1e6, 1) for kind, size in stored.items()})
    return pd.DataFrame(lines)
