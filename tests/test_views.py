"""Promise: training views are random crops and flips as the official runs draw them, each given by
(seed, image, view)."""

import dataclasses
import math

import numpy as np
import open_clip
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import BACKBONE, DATA, PARAMS, refuses, store_clip

from fpl.data import encoders as clips
from fpl.data import extraction, features
from fpl.data.manifest import read_manifest, write_manifest
from fpl.data.views import Views, crop
from fpl.experiments import assemble, runner

SIZES = [(40, 40), (64, 48), (33, 90), (200, 31)]  # (width, height)


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    store_clip(folder)
    return clips.load(f"local-dir:{folder}")


def noise(i, size=(40, 40)):
    return PIL.Image.fromarray(
        np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), dtype="uint8")
    )


def manifest_of(folder, numbers):
    """Noise of several sizes; every third image is for testing."""
    (folder / "images").mkdir(parents=True)
    lines = ["path,label,class,split,domain"]
    for i in numbers:
        noise(i, SIZES[i % 4]).save(folder / f"images/{i}.png")
        lines.append(f"images/{i}.png,0,dot,{'test' if i % 3 == 2 else 'train'},photo")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return read_manifest(folder / "manifest.csv")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return manifest_of(tmp_path_factory.mktemp("data") / "set", range(12))


def stored(manifest, tower, path, number=3, seed=0, **settings):
    extraction.extract(
        manifest, tower, path, "views", Views(number, seed), extraction.Options(**settings)
    )
    return features.load(path, content="views")


def by_hand(image, name, number, seed, size=32):
    """One view in plain Pillow and numpy: the crop box first, then the resize, the flip, the
    model's mean and deviation."""
    views = Views(number + 1, seed)
    rng = views.generator(name, number)
    left, top, width, height = crop(rng, *image.size)
    view = image.crop((left, top, left + width, top + height)).resize(
        (size, size), PIL.Image.Resampling.BICUBIC
    )
    if rng.random() < 0.5:
        view = view.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.from_numpy(np.asarray(view).astype("float32") / 255)
    return ((pixels - 0.5) / 0.25).permute(2, 0, 1)  # helpers.PREPROCESS


@pytest.mark.parametrize("seed", [0, 7])
def test_a_view_is_what_pillow_gives_by_hand(seed, manifest, tower, tmp_path):
    found = stored(manifest, tower, tmp_path / "f.h5", seed=seed)
    for row in (0, 1, 2, 7):
        name = manifest.rows[int(found.rows[row])]["path"]
        with PIL.Image.open(manifest.folder / name) as image:
            own = torch.stack([by_hand(image, name, v, seed) for v in range(3)])
        drawn = Views(3, seed).draw(
            tower.transform, noise(int(found.rows[row]), image.size), name, (32, 32)
        )
        torch.testing.assert_close(drawn, own, rtol=0, atol=1e-6)
        want = F.normalize(tower.model.encode_image(own), dim=-1)
        torch.testing.assert_close(found.feats[row].float(), want, rtol=2**-10, atol=1e-5)


@pytest.mark.parametrize(
    ("interpolation", "mode"),
    [("bilinear", "shortest"), ("bicubic", "squash"), ("bicubic", "longest")],
)
def test_size_interpolation_and_normalisation_are_the_models_own(interpolation, mode):
    transform = open_clip.transform.image_transform(
        24,
        False,
        mean=(0.1, 0.2, 0.3),
        std=(0.3, 0.2, 0.1),
        resize_mode=mode,
        interpolation=interpolation,
    )
    image, view = noise(0, (50, 37)), Views(1)
    size = transform(image).shape[-2:]
    rng = view.generator("x", 0)
    left, top, width, height = crop(rng, *image.size)
    resample = PIL.Image.Resampling[interpolation.upper()]
    own = image.crop((left, top, left + width, top + height)).resize((24, 24), resample)
    own = own.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else own
    want = (torch.from_numpy(np.asarray(own).astype("float32")).permute(2, 0, 1) / 255).sub(
        torch.tensor([0.1, 0.2, 0.3])[:, None, None]
    ) / torch.tensor([0.3, 0.2, 0.1])[:, None, None]
    torch.testing.assert_close(view.draw(transform, image, "x", size)[0], want, rtol=0, atol=1e-5)


def test_a_transform_that_does_not_resize_is_refused(tower, manifest, tmp_path):
    with pytest.raises(
        ValueError,
        match="views need an image transform that begins with resizing, this one is .*ToTensor",
    ):
        Views(1).draw(torchvision.transforms.ToTensor(), noise(0), "x", (40, 40))


@pytest.mark.parametrize("number", [0, -1])
def test_no_view_is_refused(number):
    with pytest.raises(ValueError, match=f"views must be at least 1 for an image, not {number}"):
        Views(number)


@pytest.mark.parametrize("size", [*SIZES, (1, 1), (2, 300), (300, 2)])
def test_a_crop_lies_in_the_image(size):
    for i in range(500):
        left, top, w, h = crop(np.random.default_rng([1, i]), *size)
        assert (
            left >= 0
            and top >= 0
            and w > 0
            and h > 0
            and left + w <= size[0]
            and top + h <= size[1]
        )


def of_crops(boxes, width, height):
    """Area, log aspect and centre of boxes (left, top, width, height), relative to the image:
    (boxes, 4)."""
    left, top, w, h = np.array(boxes, dtype=float).T
    return np.stack(
        [w * h / (width * height), np.log(w / h), (left + w / 2) / width, (top + h / 2) / height],
        axis=1,
    )


@pytest.mark.parametrize("size", [(320, 240), (100, 400), (400, 100)])
def test_crops_are_distributed_as_those_of_torchvision(size):
    """Deciles of area, aspect and centre over 4,000 draws of each."""
    width, height = size
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draw = torchvision.transforms.RandomResizedCrop.get_params
        theirs = [
            draw(torch.empty(3, height, width), [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)
        ]
    ours = of_crops([crop(np.random.default_rng([1, i]), *size) for i in range(4000)], *size)
    theirs = of_crops([(left, top, w, h) for top, left, h, w in theirs], *size)
    deciles = np.arange(0.1, 1, 0.1)
    spread = theirs.max(0) - theirs.min(0)
    assert (
        np.abs(np.quantile(ours, deciles, axis=0) - np.quantile(theirs, deciles, axis=0))
        <= 0.04 * spread
    ).all()
    assert ours[:, 0].min() < 0.1 and abs(ours[:, 1]).max() > 0.9 * math.log(4 / 3)


def test_about_half_of_the_views_are_flipped(tower):
    """Of an image that is dark on its left: a view of it is dark on its left too, unless it is
    flipped."""
    ramp = PIL.Image.fromarray(
        np.repeat(np.linspace(0, 255, 64, dtype="uint8")[None, :, None], 64, axis=0).repeat(
            3, axis=2
        )
    )
    views = Views(1000).draw(tower.transform, ramp, "ramp", (32, 32))
    flipped = int((views[..., :8].mean((1, 2, 3)) > views[..., -8:].mean((1, 2, 3))).sum())
    assert 420 < flipped < 580  # five standard deviations


def test_views_differ_by_number_by_image_and_by_seed(tower):
    image = noise(0)

    def draw(name, seed, n=8):
        return Views(n, seed).draw(tower.transform, image, name, (32, 32))

    every = torch.cat([draw(name, seed) for name in ("a.png", "b.png") for seed in (0, 1)]).flatten(
        1
    )
    assert len(every.unique(dim=0)) == 32
    assert torch.equal(draw("a.png", 0), draw("a.png", 0))
    assert torch.equal(
        draw("a.png", 0, 3), draw("a.png", 0)[:3]
    )  # more views leave the first as they are


def test_an_images_views_do_not_depend_on_the_others(manifest, tower, tmp_path):
    """Nor on their order in the manifest."""
    whole = stored(manifest, tower, tmp_path / "whole.h5")
    few = manifest_of(tmp_path / "few", [9, 4, 0])
    found = stored(few, tower, tmp_path / "few.h5")
    same = [manifest.rows[int(i)]["path"] for i in whole.rows]
    own = whole.feats[[same.index(row["path"]) for row in few.rows]]
    torch.testing.assert_close(
        found.feats, own, rtol=0, atol=1e-3
    )  # other batches: the last bit may differ
    assert len(own.flatten(0, 1).unique(dim=0)) == 9


@pytest.mark.parametrize(("number", "batch"), [(1, 64), (3, 64), (5, 4), (70, 64)])
def test_same_bytes_whatever_the_workers(number, batch, manifest, tower, tmp_path, monkeypatch):
    """Also where one image has more views than the tower sees at once."""
    monkeypatch.setitem(extraction.BATCH, "cpu", batch)
    files = [tmp_path / f"{workers}.h5" for workers in (0, 1, 3)]
    found = [
        stored(manifest, tower, path, number, workers=workers) for workers, path in enumerate(files)
    ]
    assert len({path.read_bytes() for path in files}) == 1
    assert found[0].feats.shape == (8, number, 32) and found[0].feats.dtype == torch.float16
    torch.testing.assert_close(
        found[0].feats.float().norm(dim=-1), torch.ones(8, number), rtol=0, atol=2e-3
    )


def test_rows_are_the_training_images_numbers_among_the_pooled_features(manifest, tower, tmp_path):
    pooled = features.load(extraction.extract(manifest, tower, tmp_path / "f.h5"))
    found = stored(manifest, tower, tmp_path / "views.h5")
    assert (
        found.rows.tolist()
        == [i for i in range(12) if i % 3 != 2]
        == np.flatnonzero(pooled.split == "train").tolist()
    )
    assert torch.equal(pooled.labels[found.rows], found.labels)


@pytest.mark.parametrize("views", [Views(2), Views(3, 1)])
def test_other_views_are_another_request(views, manifest, tower, tmp_path):
    """A partial file of them is not continued."""
    path, whole = tmp_path / "f.h5", stored(manifest, tower, tmp_path / "whole.h5", 3, 0)

    save = extraction.Partial.save

    def last(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extraction.Partial, "save", last)
        with pytest.raises(KeyboardInterrupt):
            extraction.extract(manifest, tower, path, "views", views=views)
    assert path.with_suffix(".progress").exists()
    assert stored(manifest, tower, path, 3, 0).sha256 == whole.sha256


def test_a_data_set_without_training_images_has_no_views(manifest, tower, tmp_path):
    none = dataclasses.replace(
        manifest, rows=[row for row in manifest.rows if row["split"] == "test"]
    )
    with pytest.raises(ValueError, match="^no training images in "):
        extraction.extract(none, tower, tmp_path / "f.h5", "views")


def test_crops_are_the_same_wherever_a_data_set_lies(manifest, tower, tmp_path):
    """A manifest that is written elsewhere has paths that lead to the images from there."""
    here = stored(manifest, tower, tmp_path / "here.h5")
    found = []
    for folder in (tmp_path / "near", tmp_path / "far/away/from/here"):
        moved = read_manifest(write_manifest(manifest, folder / "manifest.csv"))
        assert moved.rows[0]["path"].startswith("../")
        found.append(stored(moved, tower, folder / "there.h5").feats)
    near, far = found
    assert torch.equal(near, far) and near.shape == here.feats.shape


CROPPED = dataclasses.replace(DATA, views=2)


@pytest.fixture
def cropping(here):
    """Make crops of the small world's images, which are taken away at the end."""

    def make(number=2, seed=0):
        CROPPED.file("views").unlink(missing_ok=True)
        images = read_manifest(DATA.folder / "manifest.csv")
        there = clips.load(BACKBONE.name)
        extraction.extract(images, there, CROPPED.file("views"), "views", Views(number, seed))
        return dataclasses.replace(PARAMS, data=CROPPED)

    yield make
    CROPPED.file("views").unlink()


def test_other_crops_are_another_run(cropping):
    plain, keys = runner.keys_of([PARAMS.experiment("promptfl", 1)]), []
    for seed in (0, 1):
        keys += runner.keys_of([cropping(seed=seed).experiment("promptfl", 1)])
    assert keys[0].path != keys[1].path
    assert runner.keys_of([PARAMS.experiment("promptfl", 1)]) == plain


@pytest.mark.parametrize("number", [1, 3])
def test_another_number_of_crops_is_refused(number, cropping):
    experiment = cropping(number).experiment("promptfl", 1)
    refuses(lambda: assemble.setup_of(experiment), [f"has {number} views", "--views 2"])


def test_patches_are_of_whole_images(cropping, patched):
    experiment = cropping().experiment("fedotp", 1, n_ctx=2)
    refuses(lambda: assemble.setup_of(experiment), ["fedotp reads patches", "data.views to 0"])


def test_training_images_without_crops_are_refused(cropping, monkeypatch):
    """As in a pack of somebody else's: they would train on crops of another image."""
    experiment = cropping().experiment("promptfl", 1)
    whole = features.load

    def half(path, *request):
        found = whole(path, *request)
        if request[-1] != "views":
            return found
        return dataclasses.replace(found, feats=found.feats[1:], rows=found.rows[1:])

    with monkeypatch.context() as patch:
        patch.setattr(features, "load", half)
        words = ["no crops of 1 training images", "--views 2"]
        refuses(lambda: assemble.setup_of(experiment), words)
    assert assemble.setup_of(experiment).clients.views.shape[:2] == (60, 2)
