"""Promise: what is said of real features can be found again, by whoever fetches the same files.

The files themselves are not in the repository; small ones of the same form stand for them here.
"""

import hashlib
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import ROOT, Here, refuses, standing_in

from fpl.audit import real_features
from fpl.data.datasets import DATASETS
from fpl.experiments import runner, settings, tables
from fpl.experiments.expected import tables_in

PROFILE = ROOT / "real" / "profile.yaml"
SOURCES = real_features.sources()
CLASSES, SHOTS, D = 12, 4, 8


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Settings and sources of the same names with few classes, shots and seeds; their files."""
    made = {key: replace(source, classes=CLASSES) for key, source in SOURCES.items()}
    for key, source in made.items():
        files = write(tmp_path / "clones" / key, source.train)
        made[key] = replace(source, folder=key, files=files)
    monkeypatch.setattr(real_features, "sources", lambda: made)
    monkeypatch.setattr(runner, "ProcessPoolExecutor", Here)
    read = settings.read(PROFILE)
    few = {"shots": [1, 16], "concentration": [1]}
    kept = {}
    for name, table in read.tables.items():
        kept[name] = replace(table, vary={key: few[key] for key in table.vary})
    with standing_in(tmp_path):
        yield replace(read, seeds=read.seeds[:2], tables=kept), Path("clones"), made


def write(folder, train):
    """Write a cache in Tip-Adapter's layout, and return the hashes of its files."""
    gen = torch.Generator().manual_seed(len(folder.name))
    means = torch.randn(CLASSES, D, generator=gen)
    folder.mkdir(parents=True)
    found = {}
    for part, images in ((train, SHOTS), ("test", 6)):
        labels = torch.arange(CLASSES).repeat_interleave(images)
        feats = means[labels] + 0.5 * torch.randn(len(labels), D, generator=gen)
        if part == "keys":
            one_hot = torch.nn.functional.one_hot(labels, CLASSES)
            found |= {"keys_16shots.pt": feats.T, "values_16shots.pt": one_hot}
        else:
            found |= {f"{part}_f.pt": feats, f"{part}_l.pt": labels}
    for name, x in found.items():
        torch.save(x, folder / name)
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in found}


def test_a_folder_with_the_files_gives_all_tables(small):
    read, folder, _ = small
    found = real_features.measure(folder, read)
    there = real_features.expected()
    assert [*found] == sorted(there, key=[*found].index)
    for name, table in found.items():
        saved = pd.read_csv(f"results/tables/{real_features.BOOK}/{name}.csv", index_col=0)
        assert len(saved) == len(table)
        assert [*saved] == [*there[name]] and {*saved.index} == {*there[name].index}, name
        assert saved["backbone"].notna().all()
    wider = found["even"].query("method == 'ridge_own'")["mean"]
    assert (wider > found["even"].query("method == 'majority'")["mean"]).all()


def test_another_file_is_refused_before_anything_is_imported(small):
    read, folder, made = small
    key = [*made][-1]
    path = folder / key / "test_f.pt"
    torch.save(torch.load(path, weights_only=True) + 1e-3, path)
    refuses(lambda: real_features.measure(folder, read), [str(path), "another file"])
    path.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
        real_features.measure(folder, read)
    assert not Path("data/features").exists()


def test_settings_without_these_runs_are_refused(small):
    refuses(lambda: real_features.measure(small[1], settings.Settings()), ["folder real"])


def test_every_data_set_of_the_profile_has_its_source():
    read = settings.read(PROFILE)
    asked = {on for table in read.tables.values() for on in table.data}
    assert asked == {*SOURCES}
    for key, source in SOURCES.items():
        data = read.source(key).data
        assert data.store == key and DATASETS[data.name].title.replace("-", "") in (
            source.title.replace("-", "")
        )
        assert len({*source.names}) == DATASETS[data.name].classes
        assert ("val_f.pt" if source.train == "val" else "keys_16shots.pt") in source.files
        assert source.backbone.lower().endswith(("rn50", "b/32", "b/16"))


def test_no_row_needs_what_the_features_lack():
    read = settings.read(PROFILE)
    rows = {experiment.row for name in read.tables for _, experiment in read.runs(name)}
    assert rows == {"majority", "ridge_own", "ridge_all", "afl"}


def test_the_expected_tables_hold_together():
    found = real_features.expected()
    for table in found.values():
        if "low" in table:
            whole = table.dropna(subset=["low", "high"])
            mean = whole["mean"]
            assert ((whole["low"] <= mean) & (mean <= whole["high"])).all()
    beside = found["beside"]
    published = beside[beside["method"] == "published"]
    theirs = tables.published().query("paper == @tables.PAPER and table == 'Table 1'")
    theirs = theirs[theirs["dataset"].isin(published["data set"])]
    assert np.allclose(sorted(published["mean"]), sorted(theirs["mean"]))
    assert (published["backbone"] == "RN50").all()


def test_the_page_names_every_repository_and_every_hash_is_in_the_sources():
    page = (ROOT / "docs" / "real_features.md").read_text()
    for clone in {source.folder.split("/")[0] for source in SOURCES.values()}:
        assert re.search(rf"git clone https://github\.com/\S+/{clone}\b", page)
        assert re.search(rf"git -C {clone} checkout [0-9a-f]{{7,40}}\n", page)
    hashes = [sha256 for source in SOURCES.values() for sha256 in source.files.values()]
    assert all(re.fullmatch("[0-9a-f]{64}", sha256) for sha256 in hashes)


def test_a_stranger_without_the_files_is_not_asked_for_their_tables():
    there = [path.parent.name for path in tables_in(ROOT / "results" / "expected")]
    assert there and "real" not in there


def test_no_features_are_in_the_repository():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, text=True, stdout=subprocess.PIPE, check=False
    )
    assert not re.findall(r"\S+\.(?:pt|h5)$", listed.stdout, re.MULTILINE)
