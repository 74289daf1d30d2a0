"""Promise: whatever is read ends in a value or in one sentence, soon, and damage is no value.

Called by `make fuzz`, not by `make test`: each target tries new inputs for FUZZ_SECONDS (60).
"""

import contextlib
import csv
import faulthandler
import io
import json
import math
import os
import pickle
import shutil
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.io
import torch
from helpers import BACKBONE, DATA, PARAMS, ROOT, arrow, build, standing_in
from helpers.pickles import python2
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from fpl.cli.ending import OURS, SENTENCES
from fpl.data import datasets, features, foreign, manifest, matlab, pack, pickled, pictures, text
from fpl.data.datasets import own
from fpl.experiments import answers, assemble, cache, keep, records, report, stored, values
from fpl.experiments import settings as settings_of

SECONDS = float(os.environ.get("FUZZ_SECONDS", "60"))
PATIENCE = 30  # seconds that one input may take; then Python shows where it was and ends
BATCH = 50  # inputs between two looks at the clock
QUICK = settings(
    max_examples=BATCH,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)


def is_sentence(error):
    """Say whether an error is one that is shown to users as what they can mend."""
    told = text.one_line(error).strip()
    return isinstance(error, SENTENCES) and not isinstance(error, OURS) and 0 < len(told) < 5000


def outcome(call, *arguments):
    """Return (what a call gives,), or () where it ends in a sentence. Raises anything else."""
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    try:
        return (call(*arguments),)
    except Exception as error:
        if not is_sentence(error):
            raise
        return ()
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def fuzz(record_property):
    """Return a function that gives inputs of a strategy to a function until the time is over."""

    def run(strategy, call):
        tried = 0

        @QUICK
        @given(strategy)
        def once(given):
            nonlocal tried
            tried += 1
            call(given)

        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            once()
        record_property("inputs", tried)

    return run


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with drawn images, a random CLIP, their features and a pack of these."""
    folder = build(tmp_path_factory.mktemp("world"))
    with standing_in(folder):
        shutil.copy(ROOT / "params.yaml", folder)
        pack.export({"feats": DATA.features}, DATA.name, Path("shapes.pack"))
        yield folder


def damaged(content, most=3):
    """Return a strategy: bytes with some of them changed, cut out, doubled or put in."""
    places = st.integers(0, max(len(content) - 1, 0))
    some = st.binary(max_size=8)
    kinds = st.sampled_from(["flip", "cut", "end", "double", "put"])
    changes = st.tuples(kinds, places, places, some)

    def apply(steps):
        made = bytearray(content)
        for kind, a, b, new in steps:
            if kind == "flip" and made:
                made[a % len(made)] ^= 1 << b % 8
            elif kind == "cut":
                del made[a : a + 1 + b % 64]
            elif kind == "end":
                del made[a:]
            elif kind == "double":
                made[a:a] = made[b : b + 64]
            else:
                made[a:a] = new
        return bytes(made)

    return st.lists(changes, min_size=1, max_size=most).map(apply)


WORDS = "0 1 -1 1e999 nan .inf 010 1:30 1:3 0x1F yes ~ null a: [ ] { } & * *a &a | > ! !!python"
PIECES = [*WORDS.split(), "#", ",", " ", "\n", "\n  ", ": ", "- "]
YAML = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=30).map("".join)
ODD = ["1:3", "0,1", "1e-3", "9" * 400, "-0", "1:1000000000", "1:2:1e-9", "\u0663", "1_0"]
SIMPLE = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    st.sampled_from(ODD),
)
NESTED = st.recursive(
    SIMPLE,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=10,
)


def test_values(fuzz):
    def read(given):
        words, value = given
        outcome(values.plain, words, "x")
        outcome(values.several, words, "x")
        outcome(values.several, str(value), "x")
        outcome(values.assignments, [words, str(value)], "name=value")
        outcome(values.seed, value)
        for kind in ("int", "float"):
            for number in outcome(values.number, value, kind, "x"):
                assert math.isfinite(number)

    fuzz(st.tuples(YAML, NESTED), read)


def test_settings_files(fuzz, world):
    path = Path("given.yaml")

    def read(given):
        path.write_bytes(given)
        outcome(settings_of.read, path)

    demo = (ROOT / "params.yaml").read_bytes()
    other = st.one_of(YAML.map(str.encode), NESTED.map(lambda x: json.dumps(x).encode()))
    fuzz(damaged(demo) | other | other.map(lambda text: b"run:\n  rounds: " + text), read)


def test_settings_on_the_command_line(fuzz, world):
    whole = settings_of.read(Path("params.yaml"))
    names = sorted(settings_of.parameter_names())
    row = st.sampled_from(sorted(settings_of.ROWS))

    def read(given):
        name, changes, seed, place = given
        outcome(lambda: whole.experiment(name, seed, **changes))
        outcome(settings_of.read, Path("params.yaml"), [place])

    sections = st.sampled_from(["data", "backbone", "run", "datasets", "seeds", "methods", "x"])
    place = st.builds("{}.{}={}".format, sections, st.sampled_from([*names, "x", ""]), SIMPLE)
    changes = st.dictionaries(st.sampled_from(names), NESTED, max_size=3)
    fuzz(st.tuples(row, changes, SIMPLE, place), read)


ROUND = {"round": 0, "accuracy": [0.5, 1.0], "participants": [0, 1], "loss": 1.0}
RECORD = {
    "settings": {"method": "promptfl", "seed": 1, "data": "shapes", "rounds": 1},
    **{"code": "c" * 16, "features": "f" * 64, "views": 0, "title": "PromptFL"},
    **{"is_control": False, "images": "shapes", "domains": ["x", "y"], "clients": []},
    "rounds": [{**ROUND, "up": [3, 3], "down": [4, 4]}],
}


def test_records(fuzz, tmp_path):
    with contextlib.chdir(tmp_path):
        path = records.write(RECORD)
        whole = records.read(path)
        content = path.read_bytes()

        def read(given):
            path.write_bytes(given)
            for found in outcome(records.read, path):
                assert found == whole
            outcome(records.frame, [path])

        def altered(change):
            key, value = change
            return json.dumps({**json.loads(content), key: value}).encode()

        change = st.tuples(st.sampled_from(sorted(json.loads(content))), NESTED).map(altered)
        fuzz(damaged(content, 1) | damaged(content) | change, read)


def test_answers(fuzz):
    names = ("label", "predicted", "confidence")
    whole = {name: answers.squeezed(np.array([0, 1, 2])) for name in names}
    whole["sizes"] = [2, 1]
    asked = st.fixed_dictionaries({k: NESTED | st.just(v) for k, v in whole.items()})
    fuzz(asked, lambda packed: outcome(answers.unpack, packed))


def test_what_a_run_learnt(fuzz, world):
    """Damaged files, and headers of another structure behind a checksum that is right."""
    path = Path("learnt.safetensors")
    experiment = PARAMS.experiment("pfedmoap", 1, participation=0.5)
    *_, last = assemble.rounds_of(experiment)
    clip, _ = cache.load_cached(DATA, BACKBONE, "cpu")
    keep.write(path, keep.of_run(assemble.setup_of(experiment), last, clip))
    whole = keep.read(path)
    tensors, header = stored.read(path)
    content = path.read_bytes()

    def read(given):
        if isinstance(given, bytes):
            path.write_bytes(given)
        else:
            stored.write(path, tensors, {**header, given[0]: given[1]})
        for found in outcome(keep.read, path):
            assert found.n == whole.n

    change = st.tuples(st.sampled_from(sorted(header)), SIMPLE | NESTED)
    fuzz(damaged(content, 1) | damaged(content) | change, read)


def test_sealed_records_of_another_structure(fuzz, tmp_path):
    """Their checksum is right, so whoever wrote them was no fault of the disk."""
    with contextlib.chdir(tmp_path):

        def read(given):
            key, value, inner = given
            record = {**RECORD, key: value} if inner is None else {**RECORD}
            if inner is not None:
                record["rounds"] = [{**RECORD["rounds"][0], inner: value}]
            for path in outcome_of_writing(record):
                outcome(records.frame, [path])

        def outcome_of_writing(record):
            try:
                return [records.write(record)]
            except Exception:  # only what can be written is read
                return []

        inner = st.none() | st.sampled_from([*ROUND, "up", "elsewhere"])
        fuzz(st.tuples(st.sampled_from(sorted(RECORD)), NESTED, inner), read)


def test_indexes(fuzz, tmp_path):
    with contextlib.chdir(tmp_path):
        records.save_index("10_x", "x", [records.write(RECORD)], ["a"])
        path = Path("results/runs/10_x/x.json")
        content = path.read_bytes()

        def read(given):
            path.write_bytes(given)
            outcome(records.of_table, "x")

        fuzz(damaged(content) | NESTED.map(lambda x: json.dumps(x).encode()), read)


TABLE = "path,label,class,split,domain,client\n" + "".join(
    f"{name}.png,{label},class {label},{split},,site {label}\n"
    for name, label, split in [("a", 0, "train"), ("b", 1, "train"), ("c", 0, "test")]
)
USUAL = ["0", "1", "train", "TEST", "a.png", "/a", "../a", ""]
CELLS = st.text(max_size=10) | st.sampled_from(USUAL)


def as_table(rows):
    file = io.StringIO()
    csv.writer(file).writerows([TABLE.splitlines()[0].split(","), *rows])
    return file.getvalue().encode(errors="replace")


CSV = damaged(TABLE.encode()) | st.lists(st.lists(CELLS, max_size=7), max_size=5).map(as_table)


def test_manifests(fuzz, tmp_path):
    path = tmp_path / "manifest.csv"

    def read(given):
        path.write_bytes(given)
        outcome(manifest.read_manifest, path)

    fuzz(CSV, read)


def test_lists_of_own_images(fuzz, tmp_path):
    path = tmp_path / "list.csv"
    for name in "abc":
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")

    def read(given):
        path.write_bytes(given)
        outcome(own.read_own, path)

    fuzz(CSV, read)


SPLIT = {
    "train": [["a/1.jpg", 0, "a"], ["b/1.jpg", 1, "b"]],
    "val": [],
    "test": [["a/2.jpg", 0, "a"]],
}


def test_lists_of_data_sets(fuzz, tmp_path):
    folder = tmp_path / "dtd"
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    path = folder / "split_zhou_DescribableTextures.json"
    for split in manifest.SPLITS:
        (folder / f"labels/{split}1.txt").write_text("a/1.jpg\nb/1.jpg\n")

    def read(given):
        content, words = given
        path.write_bytes(content)
        outcome(datasets.read, "dtd", tmp_path, "coop")
        (folder / "labels/test1.txt").write_bytes(words)
        outcome(datasets.read, "dtd", tmp_path, "torchvision")

    content = json.dumps(SPLIT).encode()
    other = NESTED.map(lambda x: json.dumps({**SPLIT, "test": x}).encode())
    deep = st.integers(1, 200_000).map(lambda n: b"[" * n)
    fuzz(st.tuples(damaged(content) | other | deep, damaged(b"a/1.jpg\nb/1.jpg\n")), read)


def test_features(fuzz, world):
    path = Path("given.h5")
    content = DATA.features.read_bytes()
    whole = features.load(DATA.features)

    def read(given):
        path.write_bytes(given)
        for found in outcome(features.load, path):
            assert found.feats.equal(whole.feats) and found.labels.equal(whole.labels)
            assert found.classes == whole.classes and found.provenance == whole.provenance
        outcome(features.header, path)

    fuzz(damaged(content, 1) | damaged(content), read)


def test_packs(fuzz, world):
    path = Path("given.pack")
    content = Path("shapes.pack").read_bytes()
    said = pack.verify(Path("shapes.pack"))
    target = {"feats": Path("unpacked.h5")}

    def read(given):
        path.write_bytes(given)
        for found in outcome(pack.verify, path):
            assert found == said
        target["feats"].unlink(missing_ok=True)
        model = features.load(DATA.features).provenance["model"]
        for _ in outcome(pack.unpack, path, target, DATA.name, model):
            whole = features.load(DATA.features).feats
            assert features.load(target["feats"]).feats.equal(whole)

    fuzz(damaged(content, 1) | damaged(content), read)


def test_pickles(fuzz, tmp_path):
    path = tmp_path / "batch"
    data = {"labels": [0, 1], "names": ["a", b"b"], "data": np.arange(12, dtype=np.uint8)}
    written = [pickle.dumps(data, protocol) for protocol in range(6)] + [python2(data)]

    def read(given):
        path.write_bytes(given)
        outcome(pickled.read, path)

    fuzz(st.one_of(*map(damaged, written), st.binary(max_size=60)), read)


def test_files_of_matlab(fuzz, tmp_path):
    path = tmp_path / "x.mat"
    written = []
    for compressed in (False, True):
        file = io.BytesIO()
        scipy.io.savemat(file, {"labels": np.arange(9.0)[None]}, do_compression=compressed)
        written.append(file.getvalue())

    def read(given):
        path.write_bytes(given)
        outcome(matlab.read, path)

    fuzz(st.one_of(*map(damaged, written)), read)


def caches(folder):
    """Write what others may have cached; return each source and its files to damage."""
    feats = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    labels = np.arange(8) % 2
    split = np.array(["train"] * 4 + ["val"] * 2 + ["test"] * 2)
    np.savez(folder / "cache.npz", features=feats, labels=labels, split=split)
    table = pd.DataFrame(feats, columns=[f"f{i}" for i in range(4)])
    table.assign(label=labels, split=split).to_csv(folder / "cache.csv", index=False)
    columns = {"embedding": feats, "label": labels, "split": split.tolist()}
    arrow.save(folder / "saved", columns)
    tip = folder / "tip"
    tip.mkdir()
    for name, x in {"val_f": feats[4:6], "val_l": labels[4:6]}.items():
        torch.save(torch.from_numpy(x), tip / f"{name}.pt")
        torch.save(torch.from_numpy(x), tip / f"{name.replace('val', 'test')}.pt")
    sources = {folder / "cache.npz": ["."], folder / "cache.csv": ["."], tip: ["val_f.pt"]}
    return sources | {folder / "saved": ["data-00000-of-00001.arrow", "state.json"]}


def test_caches_of_others(fuzz, tmp_path):
    found = [
        (source, source / name) for source, names in caches(tmp_path).items() for name in names
    ]
    whole = {path: path.read_bytes() for _, path in found}
    names = tmp_path / "names.txt"
    names.write_text("a\nb\n")
    made = tmp_path / "made.h5"

    def read(given):
        (source, path), content = given
        path.write_bytes(content)
        made.unlink(missing_ok=True)
        for _ in outcome(foreign.bring, source, names, made, {"data": "own"}):
            length = features.load(made).feats.norm(dim=1)
            assert (length - 1).abs().max() < 1e-2
        path.write_bytes(whole[path])

    damage = st.sampled_from(found).flatmap(
        lambda one: st.tuples(st.just(one), damaged(whole[one[1]]))
    )
    fuzz(damage, read)


KINDS = "PNG RGBA, PNG I;16, PNG P, JPEG RGB, GIF P, TIFF F, TIFF CMYK, BMP RGB, WEBP RGB, PPM L"


def test_pictures(fuzz):
    written = []
    for kind in KINDS.split(", "):
        form, mode = kind.split(" ")
        file = io.BytesIO()
        Image.new(mode, (9, 7)).save(file, form)
        written.append(file.getvalue())

    def read(given):
        for upright in (False, True):
            for image in outcome(pictures.decode, given, upright):
                assert image.mode == "RGB"

    fuzz(st.one_of(*map(damaged, written)), read)


def test_executed_notebooks(fuzz, tmp_path):
    path = tmp_path / "10_x.ipynb"
    output = {"output_type": "display_data", "metadata": {}, "data": {"text/html": "<b>x</b>"}}
    code = {"cell_type": "code", "metadata": {}, "execution_count": 1, "source": "x", "id": "a"}
    words = {"cell_type": "markdown", "metadata": {}, "source": "# x\n$a_1$", "id": "b"}
    book = {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [words, code]}
    code["outputs"] = [output]
    content = json.dumps(book).encode()
    tags = "<b> <table> <thead> <tr> <th rowspan=9> <td> <tbody> </table> <img src=x> <math> $ <"
    html = st.lists(st.sampled_from(tags.split()) | st.text(max_size=5), max_size=20).map(" ".join)

    def page():
        soup = report.notebook(path)
        report.connect(soup, ["10_y"])
        return report.make_page("10_x", soup)

    def read(given):
        path.write_bytes(given)
        for made in outcome(page):
            assert "<script" not in made.body

    def with_html(text):
        output["data"] = {"text/html": text}
        words["source"] = text
        return json.dumps(book).encode()

    fuzz(damaged(content) | html.map(with_html), read)


def test_what_is_shown(fuzz):
    def read(given):
        line = text.one_line(given)
        assert line.isprintable() and text.cell(given).isprintable()
        assert not any(c in text.cell(given).replace("\\\\", "").replace("\\|", "") for c in "|")

    signs = ["\x1b[31m", "\r", "\n", "|", "`", "<", "&", "\\", "\u202e", "\udcff"]
    fuzz(st.text() | st.lists(st.sampled_from(signs)).map("".join), read)
