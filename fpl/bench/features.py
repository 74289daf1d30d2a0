"""What features cost: their extraction, reading a file of them into memory, and its size."""

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

from fpl.bench.measure import timed
from fpl.data import extraction, features
from fpl.data.datasets import DATASETS
from fpl.data.manifest import Manifest
from fpl.experiments.cache import device
from fpl.prompts import Clip

TOWERS = {"RN50": (1024, 49), "ViT-B/16": (512, 196)}  # joint width d, patches M at 224 pixels
BYTES = 2  # of a number in half precision
PHOTO = (512, 384)  # pixels, as Food101's


def extract(clip: Clip, images: int, batch: int, workers: int, repeats: int) -> pd.DataFrame:
    """Compare the whole extraction with the bare model on the same pixels, and with decoding.

    Rates are medians, the share is the median over turns. The bare model has its batches on its
    device, where an image of 224 pixels takes 0.6 MB, and half precision on a GPU.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        manifest = draw_photos(folder, images)
        options = extraction.Options(workers)
        decoded = extraction.Images(manifest, clip.transform)
        loader = DataLoader(decoded, batch, num_workers=workers)
        pixels = []
        for x, *_ in loader:
            pixels.append(x.flatten(0, 1).to(device()))
        ways = {
            "bare model": lambda: encode_bare(clip, pixels),
            "extraction": lambda: extraction.extract(
                manifest, clip, folder / "features.h5", options=options
            ),
            "decoding alone": lambda: deque(loader, maxlen=0),
        }
        table = rates(ways, images, repeats)
    model = clip.provenance["model"]
    about = {"model": model, "device": device(), "batch": batch, "workers": workers}
    return table.assign(**about)


def rates(ways: dict[str, Callable[[], object]], images: int, repeats: int) -> pd.DataFrame:
    """Let calls take turns, once without counting and then `repeats` times; a line for each."""
    turns = []
    for _ in range(repeats + 1):
        turns.append({way: timed(call) for way, call in ways.items()})
    seconds = pd.DataFrame(turns[1:])
    median = seconds.median()
    first = seconds.columns[0]
    share = seconds.rdiv(seconds[first], axis=0)
    columns = {
        "images": images,
        "seconds": median,
        "images/s": images / median,
        f"share of {first}": share.median(),
    }
    table = pd.DataFrame(columns)
    return table.rename_axis("way").reset_index()


@torch.no_grad()
def encode_bare(clip: Clip, pixels: list[Tensor]) -> Tensor:
    """Encode batches that are on the device of the model."""
    is_cuda = device() == "cuda"
    with torch.autocast(device(), torch.float16, enabled=is_cuda):
        encoded = [extraction.image_features(clip, x, "feats") for x in pixels]
    return torch.cat(encoded).cpu()


def draw_photos(folder: Path, images: int) -> Manifest:
    """Write JPEG files of a photograph's size in pixels and, at about 90 kB, in bytes.

    They show smooth colours under some noise.
    """
    manifest = list_photos(folder, images)
    for number, row in enumerate(manifest.rows):
        rng = np.random.default_rng([0, number])
        colours = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        coarse = Image.fromarray(colours)
        smooth = coarse.resize(PHOTO, Image.Resampling.BICUBIC)
        width, height = PHOTO
        noise = rng.normal(0, 8, (height, width, 1))
        noisy = np.asarray(smooth) + noise
        photo = Image.fromarray(noisy.clip(0, 255).astype("uint8"))
        photo.save(folder / row["path"], quality=90)
    return manifest


def list_photos(folder: Path, images: int) -> Manifest:
    """Return the manifest of that many images of one class."""
    common = {"label": "0", "class": "photo", "split": "train", "domain": "photo"}
    rows = [{"path": f"{i:06d}.jpg", **common} for i in range(images)]
    return Manifest(folder, rows, ["photo"], "drawn")


def read(images: int, repeats: int, dim: int = 512) -> pd.DataFrame:
    """Compare reading the array of a features file with opening the file with all its checks.

    It was written a moment ago.
    """
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "features.h5"
        manifest = list_photos(Path(place), images)
        with features.written(path) as f:
            extraction.create(f, manifest, "feats", (dim,), {"content": "feats"})
            rng = np.random.default_rng(0)
            f["feats"][:] = rng.standard_normal((images, dim), dtype=np.float32)
        ways = {
            "array alone": lambda: read_array(path),
            "features.load": lambda: features.load(path),
        }
        size = path.stat().st_size / 2**20
        return rates(ways, images, repeats).assign(d=dim, MiB=size)


def read_array(path: Path) -> np.ndarray:
    """Return the features of a file, unchecked."""
    with h5py.File(path) as f:
        return f["feats"][:]


def sizes(views: int) -> pd.DataFrame:
    """List megabytes (10^6) of features with either tower: pooled, patches, and views.

    Of training and test images as Table 5 of pFedMoAP counts them; images for validation, where a
    data set lists them, add to it.
    """
    lines = []
    for name, dataset in DATASETS.items():
        paper = dataset.layouts[dataset.best]
        train = paper.train or 0
        images = train + (paper.test or 0)
        for tower, (dim, patches) in TOWERS.items():
            megabytes = dim * BYTES / 1e6
            lines.append(
                {
                    "data set": name,
                    "images": images,
                    "tower": tower,
                    "d": dim,
                    "pooled MB": round(images * megabytes, 1),
                    "patches MB": round(patches * images * megabytes, 1),
                    f"{views} views MB": round(views * train * megabytes, 1),
                }
            )
    return pd.DataFrame(lines)
