"""Promise: clients that are unseen take no part, other data sets are tried without training, and
tables say all of it with intervals."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import BACKBONE, DATA, HALVED, PARAMS, refuses, standing_in, store_clip
from helpers.runs import equal, small

from fpl.data import encoders, extraction, partitions, world
from fpl.data.manifest import read_manifest, write_manifest
from fpl.data.partitions import Partition, is_unseen
from fpl.experiments import assemble, cache, records, runner, settings, tables, transfer
from fpl.experiments.runner import Asked
from fpl.experiments.settings import ROWS, Source
from fpl.experiments.values import build
from fpl.prompts import PromptTree
from fpl.rounds import run_rounds
from fpl.state import generator, take

# --- who is unseen

EVENLY = {(10, 2): [4, 9], (4, 1): [3], (5, 3): [1, 3, 4], (3, 2): [1, 2], (7, 0): []}


@pytest.mark.parametrize(("n", "unseen"), EVENLY)
def test_unseen_clients_stand_evenly_among_all(n, unseen):
    never = is_unseen(np.arange(n), unseen, n)
    assert np.flatnonzero(never).tolist() == EVENLY[n, unseen]


@pytest.mark.parametrize(("n", "domains", "unseen"), [(30, 6, 6), (18, 6, 6), (20, 4, 8)])
def test_every_domain_has_as_many_unseen_clients(n, domains, unseen):
    never = is_unseen(np.arange(n), unseen, n).reshape(domains, -1)
    assert never.sum(1).tolist() == [unseen // domains] * domains


REFUSED = {
    "all": ({"clients": 4, "unseen": 4}, ["unseen 4 of 4 clients", "leaves nobody who trains"]),
    "more": ({"clients": 4, "unseen": 5}, ["unseen 5 of 4 clients", "give a smaller number"]),
    "negative": ({"unseen": -1}, ["x.unseen must be greater than or equal to 0, not -1"]),
    "a share": ({"unseen": 0.2}, ["x.unseen must be of type int, not 0.2"]),
    "released": ({"unseen": 1, "form": "released"}, ["clients", "or leave none out"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_unseen_is_refused_in_one_sentence(case):
    wrong, words = REFUSED[case]
    refuses(lambda: build(Partition, wrong, "x"), words)


# --- what unseen clients do, and get

UNSEEN = [3]  # of four clients, one of whom is unseen
SEEN = [0, 1, 2]
EVERYBODYS = {"pooled", "ridge_all"}  # rows that read the images of all clients
LAST = {"rounds": 3, "unseen": 1}


def play(experiment, change=None):
    """Return the rounds of a run, with its clients changed."""
    setup = assemble.setup_of(experiment)
    clients = change(setup.clients) if change else setup.clients
    return [*run_rounds(dataclasses.replace(setup, clients=clients))]


@pytest.mark.parametrize(("participation", "number"), [(1.0, 3), (0.7, 2), (0.1, 1)])
def test_only_the_others_are_drawn_and_as_many_as_their_share(participation, number, here):
    experiment = small("promptfl", participation=participation, unseen=1, rounds=9)
    drawn = [r.participants.tolist() for r in play(experiment)]
    assert all(len(picked) == number and {*picked} <= {*SEEN} for picked in drawn)
    assert {i for picked in drawn for i in picked} == {*SEEN}
    other = dataclasses.replace(experiment, seed=2)
    again = [r.participants.tolist() for r in play(other)]
    assert (again == drawn) == (number == 3)


@pytest.mark.parametrize("row", [row for row in ROWS if row not in EVERYBODYS])
def test_the_images_of_unseen_clients_change_nothing_for_others(row, patched):
    def other(clients):
        unseen = clients.train[3]
        feats, patches = clients.feats.clone(), clients.patches
        feats[unseen] = feats[unseen].flip(-1)
        if patches is not None:
            patches = patches.index_copy(0, unseen, patches[unseen].flip(-1))
        train = [*clients.train[:3], unseen[:1]]  # and it has one only
        return dataclasses.replace(clients, feats=feats, patches=patches, train=train)

    with standing_in(patched):
        experiment = small(row, **LAST)
        *_, plain = play(experiment)
        *_, changed = play(experiment, other)
    assert plain.participants.tolist() == SEEN
    assert plain.accuracy[SEEN].tolist() == changed.accuracy[SEEN].tolist()
    assert equal(plain.state.server.params, changed.state.server.params)
    for name, value in plain.evaluated.items():
        assert torch.equal(value[SEEN], changed.evaluated[name][SEEN])


# with which an unseen client is tested: the tensors that the server sends, and those as drawn
TESTED = {
    "promptfl": (["ctx"], []),
    "fedpgp": (["ctx"], ["u", "v"]),
    "fedper": (["base"], ["head"]),
    "pfedmoap": (["ctx"], ["gate_wq", "gate_wo"]),
    "coop": ([], ["ctx"]),
    "fedamp": ([], ["ctx"]),
}


@pytest.mark.parametrize("row", TESTED)
def test_an_unseen_client_is_tested_with_what_the_server_sends(row, here):
    sent, drawn = TESTED[row]
    experiment = small(row, **LAST)
    setup = assemble.setup_of(experiment)
    *_, last = run_rounds(setup)
    params, own = last.state.server.params, take(last.evaluated, slice(3, 4))
    assert all(torch.equal(own[name][0], params[name]) for name in sent)
    begun = setup.method.init(setup.text, generator(setup.seeds.init, "init"))
    assert all(torch.equal(own[name][0], begun[name]) for name in drawn)
    seen = take(last.evaluated, slice(0, 1))
    assert not any(torch.equal(seen[name][0], begun[name]) for name in [*sent, *drawn])


def test_experts_are_for_clients_that_have_trained(here):
    *_, last = play(small("pfedmoap", **LAST))
    with_experts, without = last.cohorts
    assert with_experts.client_ids.tolist() == SEEN and "experts" in with_experts.context
    assert without.client_ids.tolist() == UNSEEN and not without.context


# --- another data set

STYLES = dataclasses.replace(DATA, name="styles", test_per_class=2)
OTHER = Source("drawn", STYLES, BACKBONE)
KEEP = Asked(keep=True)
BOUND = [row for row, kind in ROWS.items() if not kind.transfers]


def draw(last=11):
    """Make the other data set, of which test images have no label above `last`."""
    path = world.make(STYLES.folder, STYLES.seed, 2, 2, "styles")
    whole = read_manifest(path)
    rows = [r for r in whole.rows if r["split"] == "train" or int(r["label"]) <= last]
    manifest = read_manifest(write_manifest(dataclasses.replace(whole, rows=rows), path))
    clip = encoders.load(BACKBONE.name)
    for place, content in ((STYLES.features, "feats"), (STYLES.file("patches"), "patches")):
        place.unlink(missing_ok=True)
        extraction.extract(manifest, clip, place, content)


@pytest.fixture
def there(patched, here):
    """Standing in the world, with another data set."""
    if not STYLES.file("patches").exists():
        draw()
    return patched


SITES = """
methods: {zeroshot: {}}
datasets:
  site_a: {data: {name: own, root: photos_a, store: a}}
  site_b: {data: {name: own, root: photos_b, store: b}}
  site_b_views: {data: {name: own, root: photos_b, store: b, views: 2}}
tables: {10_table1: {table1: {data: [site_a, site_b, site_b_views], rows: [zeroshot]}}}
"""


def test_two_sets_of_own_data_are_others_to_each_other(tmp_path):
    (tmp_path / "params.yaml").write_text(SITES)
    with standing_in(tmp_path):
        read = settings.read()
    for name, other in (("site_a", "site_b"), ("site_b", "site_a"), ("site_b_views", "site_a")):
        assert [source.name for source in transfer.others(read, name)] == [other]


def kept(row, **changes):
    """Return the name of a run that kept what it learnt."""
    (path,) = runner.sweep([small(row, **changes)], asked=KEEP)
    return path.stem


def zero_shot(source):
    """Return the zero-shot accuracy on all test images, without the machinery of runs."""
    clip, feats = cache.load_cached(source.data, source.backbone, "cpu")
    test = feats.split == "test"
    t = PromptTree(clip, feats.classes).zero_shot()
    return ((feats.feats[test] @ t.T).argmax(-1) == feats.labels[test]).float().mean().item()


def test_zero_shot_elsewhere_is_that_of_the_images_and_names_there(there):
    found = transfer.accuracies(kept("zeroshot"), OTHER)
    assert found == pytest.approx([zero_shot(OTHER)] * 4) and 0 < found[0] < 1


@pytest.mark.parametrize("row", [row for row in ROWS if ROWS[row].transfers])
def test_on_its_own_data_set_it_is_the_global_accuracy(row, there):
    """All test images are dealt to somebody, so both are over the same images."""
    run = kept(row)
    (path,) = records.RECORDS.glob(f"{run}.json")
    recorded = records.read(path)["rounds"][-1]["elsewhere"][partitions.GLOBAL]
    own = transfer.accuracies(run, PARAMS.source())
    assert own == pytest.approx(recorded, abs=1e-6)
    elsewhere = transfer.accuracies(run, OTHER)
    assert len(elsewhere) == 4 and all(0 <= accuracy <= 1 for accuracy in elsewhere)


@pytest.mark.parametrize("row", BOUND)
def test_a_method_that_is_bound_to_its_classes_has_no_number(row, there):
    assert all(math.isnan(accuracy) for accuracy in transfer.accuracies(kept(row), OTHER))


def test_other_images_give_other_numbers_without_another_run(there):
    run = kept("zeroshot")
    before = transfer.accuracies(run, OTHER)
    draw(last=5)
    after = transfer.accuracies(run, OTHER)
    assert after == pytest.approx([zero_shot(OTHER)] * 4) and after != before
    STYLES.manifest.unlink()
    draw()  # all again
    assert transfer.accuracies(run, OTHER) == before


def test_a_method_of_ones_own_is_tried_elsewhere_too(there):
    """Its row is called FILE.py:CLASS, or the class is given."""
    row = "halved.py:Halved"
    Path("halved.py").write_text(HALVED)
    (path,) = runner.sweep([PARAMS.experiment(row, 1)], asked=KEEP)
    recorded = records.read(path)["rounds"][-1]["elsewhere"][partitions.GLOBAL]
    for method in (row, settings.row_class(row)):
        own = transfer.accuracies(path, PARAMS.source(), method)
        assert own == pytest.approx(recorded, abs=1e-6)
    wanted = transfer.accuracies(path, OTHER, row)
    on = tables.OTHER.format("drawn")
    called = {row: None, "mine": {"mine": row}}
    for name, methods in called.items():
        (other,) = runner.sweep([small("zeroshot")], asked=KEEP)
        runs = records.frame([path, other], [name, "zeroshot"])
        lines = tables.with_others(runs, [OTHER], methods)
        assert lines[lines["row"] == name][on].tolist() == wanted
        assert lines[lines["row"] == "zeroshot"][on].tolist() == transfer.accuracies(other, OTHER)
    unnamed = records.frame([path])
    refuses(lambda: tables.with_others(unnamed, [OTHER]), ["Halved", "your own", "give it"])


def test_a_run_that_kept_nothing_is_named(there):
    (path,) = runner.sweep([small("promptfl", seed=7)])
    with pytest.raises(FileNotFoundError, match=f"{path.stem}.*kept nothing: .*--keep"):
        transfer.accuracies(path.stem, OTHER)


def test_features_of_another_clip_are_refused(there):
    run = kept("promptfl")
    store_clip(there / "other_clip", seed=1)
    backbone = settings.Backbone("local-dir:other_clip")
    data = dataclasses.replace(STYLES, store="by_other")
    manifest = read_manifest(STYLES.folder / "manifest.csv")
    extraction.extract(manifest, encoders.load(backbone.name), data.features)
    refuses(lambda: transfer.accuracies(run, Source("x", data, backbone)), [run, "this CLIP has"])


def test_others_are_what_the_same_backbone_sees_of_other_images():
    another = settings.Backbone("local-dir:other")
    names = {"again": DATA, "one": STYLES, "twice": STYLES, "far": dataclasses.replace(DATA)}
    sources = {name: Source(name, data, BACKBONE) for name, data in names.items()}
    sources["far"] = dataclasses.replace(sources["one"], name="far", backbone=another)
    table = settings.Table({"zeroshot": {}}, ("shapes", *sources))
    asked = dataclasses.replace(PARAMS, datasets=sources, tables={"t": table})
    assert [source.name for source in transfer.others(asked, "shapes")] == ["one"]
    assert [source.name for source in transfer.others(asked, "twice")] == ["shapes"]
    assert transfer.others(asked, "far") == []


# --- tables


def frame(values, **columns):
    """Lines of one method's last round: (seed, client, accuracy, global)."""
    lines = pd.DataFrame(values, columns=["seed", "client", "accuracy", "global"])
    about = {"row": "a", "method": "a", "title": "A", "data": "x", "round": 1, **columns}
    return lines.assign(run=lines["seed"].astype(str), **about)


def test_results_stand_beside_each_other_with_their_interval_and_harmonic_mean():
    lines = frame([(1, 0, 1.0, 0.2), (1, 1, 0.6, 0.4), (2, 0, 0.5, 0.5), (2, 1, 0.5, 0.5)])
    before = lines.assign(round=0, accuracy=0.0)
    lacks = lines.assign(row="b", method="b", title="B", run="b" + lines["run"])
    lacks["global"] = math.nan
    columns = {"personal": "accuracy", "global": "global"}
    found = tables.results(pd.concat([lines, before, lacks]), columns, hm=True)
    first = 200 / (1 / 0.8 + 1 / 0.3)
    half = 12.7062 / math.sqrt(2)  # of the t-interval over two seeds, in standard deviations
    spread = {"personal": 30 / math.sqrt(2), "global": 20 / math.sqrt(2)}
    wanted = {"personal": 65, "global": 40, "HM": (first + 50) / 2, "seeds": 2}
    for name, std in spread.items():
        wanted |= {f"{name} low": wanted[name] - half * std}
        wanted |= {f"{name} high": wanted[name] + half * std}
    assert found.loc["a", [*wanted]].to_dict() == pytest.approx(wanted, abs=0.02)
    assert found["row"].tolist() == ["A", "B"] and found.loc["b", "personal"] == 65
    assert found.loc["b", ["global", "HM", "HM low"]].isna().all()


def test_seen_and_unseen_clients_are_told_apart():
    values = [(seed, i, i / 4, 0.5) for seed in (1, 2) for i in range(4)]
    runs = frame(values, clients=4, unseen=2)
    apart = tables.with_unseen(runs)
    columns = {"seen": "seen_accuracy", "unseen": "unseen_accuracy"}
    found = tables.results(apart, columns).loc["a"]
    assert (found["seen"], found["unseen"]) == (25.0, 50.0)  # of 0 and 2, and of 1 and 3
    refuses(
        lambda: tables.with_unseen(runs.assign(unseen=0)), ["no unseen clients", "set `unseen`"]
    )


def test_a_table_has_columns_for_other_data_sets(there, tmp_path):
    experiments = [small(row) for row in ("zeroshot", "promptfl", "ridge_own")]
    runs = records.frame(runner.sweep(experiments, asked=KEEP))
    lines = tables.with_others(runs, [OTHER])
    on = tables.OTHER.format("drawn")
    wanted = transfer.accuracies(runs["run"].iloc[0], OTHER)
    assert lines[lines["method"] == "zeroshot"][on].tolist() == wanted
    assert lines[lines["method"] == "ridge_own"][on].isna().all()
    table = tables.results(lines, {"own": "accuracy", on: on})
    assert table.loc["zeroshot", on] == pytest.approx(100 * wanted[0], abs=0.01)
    tables.save(table, "t", tmp_path)
    assert f"{100 * wanted[0]:.2f}" in (tmp_path / "t.md").read_text()


def test_a_data_set_that_papers_print_has_no_column_of_other_images():
    lines = frame([(1, 0, 0.5, 0.5), (2, 0, 0.5, 0.5)], domain="", row="zeroshot")
    lines = lines.assign(method="zeroshot", title="ZS-CLIP")
    for images, column in (("shapes", True), ("pacs", False)):
        table = tables.beside(lines.assign(images=images, data=images), "DomainNet (10 classes)")
        assert ("paper, DomainNet (10 classes)" in table) == column and "paper" not in table
    printed = lines.assign(images="domainnet10", data="domainnet10")
    assert "paper" in tables.beside(printed, "DomainNet (10 classes)")


def test_the_seed_of_the_order_says_who_of_the_others_is_drawn(here):
    drawn = []
    for seed in (1, 2):
        asked = small("promptfl", seed, participation=0.7, unseen=1, rounds=9, order_seed=7)
        drawn.append([turn.tolist() for turn in assemble.setup_of(asked).clients.turns])
    assert drawn[0] == drawn[1]
