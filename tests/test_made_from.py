"""Promise: what a number was made from is checked: the place, the lists and the pixels of its
images, also where an extraction was interrupted."""

import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import os
import shutil
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image
import pytest
import torch
from helpers import BACKBONE, refuses, standing_in, store_clip
from helpers.extracting import Stop, extract, stepping
from helpers.processes import Python

from fpl.data import encoders, extraction, features, seen
from fpl.data.manifest import read_manifest
from fpl.experiments import cache
from fpl.experiments.extract import Request, make_features
from fpl.experiments.settings import Data

OWN = Data(name="own", root="photos")
AGAIN = "images have changed (1 of 10)"


def draw(path, seed):
    """Noise; every file has the same size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype="uint8")
    PIL.Image.fromarray(noise).save(path.with_suffix(".bmp"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    store_clip(folder / "clip")
    for i in range(10):
        draw(folder / f"photos/{'ab'[i % 2]}/{i}", i)
    shutil.copytree(folder / "photos", folder / "others")
    with standing_in(folder):
        list(make_features(OWN, encoders.load(BACKBONE.name), Request(workers=0)))
    return folder


@pytest.fixture
def project(made, tmp_path):
    """A project of its own with ten images and their features."""
    shutil.copytree(made, tmp_path / "project")  # with the times of the files
    with standing_in(tmp_path / "project") as folder:
        yield folder


@pytest.fixture
def clip(project):
    return encoders.load(BACKBONE.name)


def once_more(clip, data=OWN, **how):
    """Why each file is made again."""
    return [made.why for made in make_features(data, clip, Request(workers=0, **how))]


def load(data=OWN):
    return cache.load_cached(data, BACKBONE, "cpu")


@pytest.mark.parametrize(
    "change",
    [{"root": "others"}, {"root": "/nowhere"}, {"layout": "coop"}, {"root": "photos/a"}],
    ids=str,
)
def test_runs_are_of_the_images_that_the_settings_name(change, project):
    asked = dataclasses.replace(OWN, **change)
    words = ["data/own holds images of", "photos", *change.values(), "run `fpl features`"]
    refuses(lambda: load(asked), words)
    for same in ("./photos", str(project / "photos")):
        load(dataclasses.replace(OWN, root=same))


@pytest.mark.parametrize("text", [None, "", "{", "[]", "3", '{"root": 5}', '{"root": "x\\u0000"}'])
def test_a_project_that_does_not_say_it_is_refused(text, project):
    source = OWN.folder / "source.json"
    source.unlink()
    if text is not None:
        source.write_text(text)
    refuses(load, ["data/own", "run `fpl features`"])


def test_without_a_manifest_the_features_of_another_data_set_are_refused(project):
    shutil.rmtree(OWN.folder)
    load()
    other = Data(name="dtd")
    shutil.copy(OWN.features, other.features)
    refuses(lambda: load(other), ["was made with data 'own', asked for is 'dtd'"])


def test_what_is_there_is_not_made_again(project, clip):
    before = [path.stat().st_mtime_ns for path in OWN.features.parent.iterdir()]
    os.utime("photos/a/0.bmp", ns=(1, 1))  # as a copy has
    assert once_more(clip) == once_more(clip, rehash=True) == [""]
    (OWN.folder / "seen.json").write_text("damaged")
    assert once_more(clip) == [""]
    assert [path.stat().st_mtime_ns for path in OWN.features.parent.iterdir()] == before


def test_two_sessions_make_a_file_once(project, clip, monkeypatch):
    """The second waits for the first, and then finds it."""
    OWN.features.unlink()
    begun, goes_on = threading.Event(), threading.Event()
    called = []

    def slow(*arguments):
        called.append(arguments)
        begun.set()
        goes_on.wait()
        return real(*arguments)

    real = extraction.extract
    monkeypatch.setattr(extraction, "extract", slow)
    said = pytest.warns(UserWarning, match="another process is making data/features/own.h5")
    with said, ThreadPoolExecutor(2) as pool:
        first = pool.submit(once_more, clip)
        begun.wait()
        second = pool.submit(once_more, clip)
        concurrent.futures.wait([second], timeout=1)
        goes_on.set()
    assert first.result() == second.result() == [""]
    assert len(called) == 1 and [path.name for path in OWN.features.parent.iterdir()] == ["own.h5"]


@pytest.mark.parametrize("how", [{}, {"fresh": True}])
def test_what_fails_lets_others_make_it(how, project, clip, monkeypatch):
    """Also where processes that decode for it outlive it."""
    OWN.features.unlink()
    context = multiprocessing.get_context("fork")
    decoding = context.Process(target=time.sleep, args=(60,), daemon=True)

    def fails(*_):
        decoding.start()
        raise OSError("a disk is broken")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="a disk is broken"):
        patched.setattr(extraction, "extract", fails)
        once_more(clip, **how)
    with warnings.catch_warnings(action="error"):
        assert once_more(clip, **how) == [""]
    decoding.kill()
    decoding.join()


def test_other_pixels_under_the_same_name_are_other_features(project, clip):
    every = {"contents": {"patches"}, "views": 1}
    assert once_more(clip, **every) == ["", "", ""]
    before = features.load(OWN.features)
    draw(project / "photos/a/0", 99)
    # first are the pooled features: what belongs to the old ones is refused meanwhile
    assert once_more(clip) == [AGAIN]
    found = features.load(OWN.features)
    same = (found.feats == before.feats).all(1)
    assert found.image_id[~same].tolist() == ["../../photos/a/0.bmp"]
    assert found.sha256 != before.sha256
    for content in ("patches", "views"):
        path = OWN.file(content)
        stale = functools.partial(features.load, path, found.provenance, content=content)
        refuses(stale, ["was made with images "])
    assert once_more(clip, **every)[0] == ""
    assert once_more(clip, **every) == ["", "", ""]
    for content in ("patches", "views"):
        features.load(OWN.file(content), found.provenance, content=content)


def test_other_pixels_of_the_same_size_and_time_are_found_on_request(project, clip):
    status = os.stat("photos/a/0.bmp")
    draw(project / "photos/a/0", 99)
    os.utime("photos/a/0.bmp", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert once_more(clip) == [""]
    assert once_more(clip, rehash=True) == [AGAIN]


def test_the_same_images_have_the_same_checksum_whatever_their_times(project, clip):
    before = OWN.features.read_bytes()
    for path in (project / "photos").rglob("*.bmp"):
        os.utime(path, ns=(1, 1))
    assert once_more(clip, fresh=True) == ["you ask for it"]
    assert OWN.features.read_bytes() == before


def test_data_may_be_a_link_to_another_disk(project, clip, tmp_path):
    (tmp_path / "scratch/deep").mkdir(parents=True)
    os.rename("data", tmp_path / "scratch/deep/data")
    os.symlink(tmp_path / "scratch/deep/data", "data")
    once_more(clip)
    manifest = read_manifest(OWN.manifest)
    assert all((manifest.folder / row["path"]).exists() for row in manifest.rows)
    load()


@pytest.mark.parametrize("content", features.CONTENT)
def test_whatever_fails_in_a_transform_is_one_bad_image(content, project, clip):
    manifest = read_manifest(OWN.manifest)
    raw = PIL.Image.open("photos/a/0.bmp").tobytes()

    def fail(image):
        if image.tobytes() == raw:
            raise RecursionError("too deep")
        return image

    tower = stepping(clip, fail) if content != "views" else clip
    if content == "views":
        steps = [*clip.transform.transforms, lambda x: fail_at(x, clip)]
        tower = dataclasses.replace(clip, transform=type(clip.transform)(steps))
    with pytest.raises(OSError, match=r"of \d+ images cannot be read: .* \(too deep\)"):
        extract(manifest, tower, project / "f.h5", content)


def fail_at(pixels, clip):
    if pixels.mean() > -1.9:  # of noise, and not of the blank one
        raise RecursionError("too deep")
    return pixels


def flip(path, position):
    raw = bytearray(path.read_bytes())
    raw[position] ^= 16
    path.write_bytes(raw)


def other_line(path):
    """A line of the progress file says that other features were written."""
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line.replace('", "", "', '", "", "0') for line in lines))


LEFT = {
    "nothing": lambda partial, progress: None,
    "a flipped byte of features": lambda partial, progress: flip(partial, 70),
    "a flipped byte of what is done": lambda partial, progress: flip(progress, -50),
    "a flipped byte of the request": lambda partial, progress: flip(progress, 200),
    "a changed line": lambda partial, progress: other_line(progress),
    "an empty array": lambda partial, progress: partial.write_bytes(b""),
    "a cut array": lambda partial, progress: os.truncate(partial, 70),
    "nonsense for an array": lambda partial, progress: partial.write_bytes(b"nonsense" * 1000),
    "no array": lambda partial, progress: partial.unlink(),
    "an empty progress": lambda partial, progress: progress.write_bytes(b""),
    "a cut progress": lambda partial, progress: os.truncate(progress, 300),
    "a cut line": lambda partial, progress: os.truncate(progress, progress.stat().st_size - 9),
    "nonsense for a progress": lambda partial, progress: progress.write_bytes(b"\xff\x00\n\n1 {}"),
    "no progress": lambda partial, progress: progress.unlink(),
    "an image that has changed": lambda partial, progress: None,
}


@pytest.mark.parametrize("case", LEFT)
def test_what_an_interruption_left_is_checked_before_it_is_used(
    case, project, clip, monkeypatch, tmp_path
):
    monkeypatch.setitem(extraction.BATCH, "cpu", 2)
    monkeypatch.setattr(extraction, "CHUNK", 4)
    manifest = read_manifest(OWN.manifest)
    path, numbers = tmp_path / "f.h5", iter(range(100))

    def stop(image):
        if next(numbers) == 9:
            raise Stop
        return image

    with pytest.raises(Stop):
        extraction.extract(manifest, stepping(clip, stop), path)
    LEFT[case](path.with_suffix(".partial"), path.with_suffix(".progress"))
    if case == "an image that has changed":
        draw(manifest.folder / manifest.rows[1]["path"], 99)
    extraction.extract(manifest, clip, path)
    whole = extraction.extract(manifest, clip, tmp_path / "whole.h5")
    assert path.read_bytes() == whole.read_bytes()
    assert not path.with_suffix(".partial").exists()


def test_the_hashes_are_those_of_the_files(project):
    known = json.loads((OWN.folder / "seen.json").read_text())
    assert len(known) == 10
    found = features.load(OWN.features)
    assert found.provenance["images"] == seen.summary(known)
    assert torch.equal(found.feats.norm(dim=-1) > 0.9, torch.ones(10, dtype=torch.bool))


ORPHANS = """
import os, signal, sys
from torch.utils.data import DataLoader
from fpl.data import extraction

loader = DataLoader(range(9), num_workers=2, worker_init_fn=extraction.begin_worker)
arriving = iter(loader)
print(*(worker.pid for worker in arriving._workers), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_who_decodes_does_not_outlive_a_killed_parent(project):
    process = Python(project, "-c", ORPHANS)
    out, err = process.communicate(timeout=240)  # whose end the workers hold, too
    assert len(out.split()) == 2, err
