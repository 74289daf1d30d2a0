"""Promise: what a run learnt is in one file beside its record, where that was asked for."""

import dataclasses
import shutil

import pytest
import torch
import yaml
from helpers import BACKBONE, DATA, refuses, standing_in
from helpers.runs import equal, small

from fpl.experiments import assemble, cache, keep, records, runner, settings, stored
from fpl.experiments.runner import Asked
from fpl.experiments.settings import ROWS
from fpl.methods import PromptFL
from fpl.state import take

KEEP = Asked(keep=True)
PART = {"participation": 0.75}  # not everybody takes part


def kept_path(experiment):
    (path,) = runner.sweep([experiment], asked=KEEP)
    return path.with_suffix(keep.SUFFIX)


def kept_of(experiment):
    return keep.read(kept_path(experiment))


@pytest.mark.parametrize("row", ROWS)
def test_the_file_has_what_the_last_round_was_evaluated_with(row, patched):
    with standing_in(patched):
        experiment = small(row, **PART)
        kept = kept_of(experiment)
        setup = assemble.setup_of(experiment)
        *_, last = assemble.rounds_of(experiment)
    assert kept.method == experiment.method and kept.training == experiment.run
    assert kept.classes == setup.text.names and kept.seeds == setup.seeds and kept.n == 4
    assert equal(kept.deployed, last.evaluated)
    server, left = kept.server, last.state.server
    assert equal(server.params, left.params) and equal(server.uploads, left.uploads)
    assert equal(server.memory, left.memory) and server.round == left.round
    assert torch.equal(server.has_upload, left.has_upload)
    assert torch.equal(server.returned, left.returned)
    for mine, theirs in zip(kept.cohorts, last.cohorts, strict=True):
        everybody = torch.arange(len(theirs.client_ids))
        assert torch.equal(mine.client_ids, theirs.client_ids)
        assert equal(mine.received, take(theirs.received, everybody))
        assert equal(take(mine.context, everybody), take(theirs.context, everybody))


def rows_of(tensors):
    """Yield every vector of joint width that a file has."""
    for _, value in stored.flatten(tensors):
        if value.ndim > 1 and value.shape[-1] == 32 and value.is_floating_point():
            yield from value.flatten(0, -2)


@pytest.mark.parametrize("row", ROWS)
def test_it_has_nothing_of_the_images_unless_they_are_what_a_method_reads(row, patched):
    with standing_in(patched):
        (path,) = runner.sweep([small(row, **PART)], asked=KEEP)
        tensors, _ = stored.read(path.with_suffix(keep.SUFFIX))
        _, feats = cache.load_cached(DATA, BACKBONE, "cpu")
    images = {tuple(row.tolist()) for row in feats.feats}
    found = [row for row in rows_of(tensors) if tuple(row.tolist()) in images]
    has_memory = row in ("pfedprompt", "zeroshot_memory")
    assert bool(found) == has_memory, "its memory is the features of training images"


def test_what_is_equal_for_several_stands_once(patched):
    with standing_in(patched):
        (path,) = runner.sweep([small("promptfl", **PART)], asked=KEEP)
        tensors, _ = stored.read(path.with_suffix(keep.SUFFIX))
    received = tensors["cohorts"]["0"]["received"]["ctx"]
    assert received["rows"].shape == (1, 2, 16) and received["place"].tolist() == [0] * 4


def test_a_run_whose_file_is_missing_or_damaged_is_made_again(here):
    experiment = small("promptfl", **PART)
    (path,) = runner.sweep([experiment])
    before, file = path.read_bytes(), path.with_suffix(keep.SUFFIX)
    file.unlink(missing_ok=True)
    runner.sweep([experiment])
    assert not file.exists(), "nobody asked for it"
    runner.sweep([experiment], asked=KEEP)
    whole = file.read_bytes()
    file.write_bytes(whole[:-4])
    with pytest.warns(UserWarning, match="safetensors is damaged: its run is made again"):
        runner.sweep([experiment], asked=KEEP)
    assert file.read_bytes() == whole and path.read_bytes() == before


@pytest.mark.parametrize("order", [["both", "kept"], ["kept", "both"]])
def test_a_table_keeps_what_it_says(order, here):
    shutil.rmtree(records.RECORDS, ignore_errors=True)
    tables = {
        "10_x": {
            "kept": {"rows": ["promptfl"], "keep": True},
            "both": {"rows": ["promptfl", "coop"]},
        }
    }
    asked = {"data": dataclasses.asdict(DATA), "backbone": {"name": BACKBONE.name}, "seeds": [1]}
    asked |= {"partition": {"clients": 4, "shots": 2}, "run": {"rounds": 1, "local_epochs": 1}}
    here.joinpath("t.yaml").write_text(yaml.safe_dump(asked | {"tables": tables}))
    runner.tables(settings.read(here / "t.yaml"), order, jobs=1)
    files = {path.name.split("-")[0]: path for path in records.RECORDS.glob("*.safetensors")}
    assert [*files] == ["promptfl"] and len([*records.RECORDS.glob("*.json")]) == 2
    here.joinpath("t.yaml").write_text(yaml.safe_dump({"tables": {"x": {"t": {"keep": "often"}}}}))
    refuses(lambda: settings.read(here / "t.yaml"), ["tables.x.t.keep", "often"])


def test_the_class_of_a_method_of_ones_own_is_said_by_whoever_reads(here):
    """No file says what code is run."""

    @dataclasses.dataclass(frozen=True)
    class Mine(PromptFL):
        key = "mine"

    experiment = dataclasses.replace(small("promptfl", **PART), row="mine", method=Mine(n_ctx=2))
    *_, last = assemble.rounds_of(experiment)
    clip, _ = cache.load_cached(DATA, BACKBONE, "cpu")
    keep.write(here / "mine.safetensors", keep.of_run(assemble.setup_of(experiment), last, clip))
    refuses(lambda: keep.read(here / "mine.safetensors"), ["mine.safetensors", "Mine", "method"])
    refuses(lambda: keep.read(here / "mine.safetensors", PromptFL), ["mine.safetensors", "Mine"])
    assert keep.read(here / "mine.safetensors", Mine).method == experiment.method
    of_package = kept_path(small("promptfl", **PART))
    words = ["is of PromptFL, a row of the table: leave out the method"]
    refuses(lambda: keep.read(of_package, Mine), words)


def test_clients_that_receive_nothing_are_kept(patched):
    """FedPer with no vector shared receives tensors without numbers."""
    with standing_in(patched):
        kept = kept_of(small("fedper", n_base=0))
    (cohort,) = kept.cohorts
    assert cohort.received["base"].shape[:2] == (4, 0)


def test_the_file_of_another_run_is_made_again(here):
    asked = Asked(keep=True)
    runs = runner.sweep([small("promptfl", seed) for seed in (1, 2)], asked=asked)
    mine, theirs = (path.with_suffix(keep.SUFFIX) for path in runs)
    whole = mine.read_bytes()
    shutil.copy(theirs, mine)
    runner.sweep([small("promptfl", 1)], asked=asked)
    assert mine.read_bytes() == whole
