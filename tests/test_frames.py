"""Promise: a frame says which run a line is of, and no result is ever taken for a setting."""

import contextlib
import csv
import functools
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import ROOT

from fpl import privacy
from fpl.audit import ledger, published
from fpl.data.datasets import DATASETS
from fpl.experiments import plots, records, stats, tables

TITLES = {"promptfl": "PromptFL", "pfedmoap": "pFedMoAP", "majority": "control: majority"}
# A twelfth method, which the package does not know, in a file of one's own.
OWN = "my_method.py:Mine"
METHODS = TITLES | {OWN: "Mine"}
CLIENTS = 4


def record(method, seed, n_rounds=6, **settings):
    """A made-up record, whose numbers depend on its settings alone."""
    gen = np.random.default_rng([seed, *json.dumps([method, settings]).encode()])
    rounds = []
    for number in range(n_rounds):
        participants = sorted(gen.choice(CLIENTS, 3, replace=False).tolist())
        rounds.append(
            {
                "round": number,
                "accuracy": gen.uniform(0.2, 0.9, CLIENTS).round(6).tolist(),
                "participants": participants,
                "loss": None,
                "up": gen.integers(100, 200, 3).tolist(),
                "down": gen.integers(100, 200, 3).tolist(),
            }
        )
    rounds[-1]["elsewhere"] = {
        "base": gen.uniform(size=CLIENTS).tolist(),
        "novel": gen.uniform(size=CLIENTS).tolist(),
    }
    fixed = {"method": method, "seed": seed, "data": "shapes", "rounds": n_rounds}
    return {
        "settings": fixed | settings,
        "title": METHODS[method],
        "is_control": method == "majority",
        "images": "shapes",
        "domains": ["photo", "photo", "sketch", "sketch"],
        "clients": ["site 1", "site 2", "site 10", "ward"],
        "rounds": rounds,
        **{"code": "code", "features": "features", "views": 0},
    }


def store(made):
    """Write records where tables look for them, and return their paths."""
    return [records.write(content) for content in made]


def some_runs():
    """Rows of several methods and values of a setting, one of which ends earlier."""
    made = [record(method, seed) for method in METHODS for seed in (1, 2, 3)]
    for lam in (0.0, 0.5):
        made += [record("pfedmoap", seed, lam=lam) for seed in (1, 2, 3)]
    made += [record("pfedmoap", seed, n_rounds=3, lam=2.0) for seed in (1, 2, 3)]
    labels = [made["settings"]["method"] for made in made[:12]]
    return made, labels + ["pfedmoap, varied"] * 9


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def everything(runs):
    """All that is made of runs: means, intervals and tables."""
    main = runs[runs["row"] != "pfedmoap, varied"]
    lam = runs[runs["row"] == "pfedmoap, varied"]
    pair = ledger.Pair("five", "pfedmoap", "promptfl", rule="mean of the last five rounds")
    item = ledger.Item("D0", "B", "where", "does", "paper", "evidence", costs=[pair])
    yield stats.by_seed(runs, ["row", "lam"])
    yield stats.spread(main)
    yield stats.paired(runs, "pfedmoap", "promptfl")
    yield pd.Series(stats.varied(runs))
    yield tables.table1(main)
    yield tables.beside(main, "CIFAR100")
    yield tables.grid(runs, ["row", "lam"])
    yield tables.grid(main, "row", "novel")
    yield tables.labelled(main)
    yield tables.with_controls(tables.ablation(lam, "lam"), main)
    yield tables.differences(runs, {"one": ("pfedmoap", OWN)})
    yield tables.differences(tables.by_settings(lam, ["lam"]), {"two": ("lam 0", "lam 0.5")})
    yield tables.traffic(runs, ["row", "lam"])
    yield tables.clients(main)
    yield tables.with_bytes(tables.grid(runs, ["row", "lam"]), runs)
    yield tables.generalisation(main)
    yield pd.DataFrame(tables.levels(main, [OWN]))
    yield published.lines(main, published.TABLE1, "shapes")
    yield ledger.costs([item], runs)


RESULTS = {  # of a client in a round
    "seconds": lambda gen: math.nan if gen.uniform() < 0.5 else gen.uniform(),
    "worst_class": lambda gen: str(gen.choice(["circle", "star"])),
}


@pytest.mark.parametrize("name", RESULTS)
@pytest.mark.parametrize("way", ["in the record", "in the frame"])
def test_a_new_result_changes_no_number(name, way):
    made, labels = some_runs()
    before = records.frame(store(made), labels)
    gen = np.random.default_rng(0)
    if way == "in the frame":
        after = before.assign(**{name: [RESULTS[name](gen) for _ in range(len(before))]})
    else:
        for found in [found for content in made for found in content["rounds"]]:
            found[name] = [RESULTS[name](gen) for _ in range(CLIENTS)]
        after = records.frame(store(made), labels)
    assert after[name].nunique() > 1
    for old, new in zip(everything(before), everything(after), strict=True):
        assert new.equals(old)


def test_every_setting_is_one_and_no_result_is():
    made, labels = some_runs()
    runs = records.frame(store(made), labels)
    assert stats.settings_of(runs) == ["data", "method", "rounds", "seed", "lam"]
    assert stats.varied(runs) == ["row", "rounds", "lam"]
    assert stats.varied(runs[runs["row"] == "promptfl"]) == ["row"]
    lam = runs.query("row == 'pfedmoap, varied' and rounds == 6")
    assert stats.varied(lam) == ["lam"]


CHANGES = {
    "concat": lambda runs: pd.concat([runs[:200], runs[200:]], ignore_index=True),
    "groupby": lambda runs: pd.concat([part for _, part in runs.groupby("method")]),
    "query": lambda runs: runs.query("round >= 0"),
    "assign": lambda runs: runs.assign(note="x"),
    "merge": lambda runs: runs.merge(runs[["run"]].drop_duplicates().assign(more=1)),
    "copy": lambda runs: pd.DataFrame(runs.to_dict("list")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_done_to_a_frame_loses_no_setting(change):
    made, labels = some_runs()
    runs = records.frame(store(made), labels)
    changed = CHANGES[change](runs)
    assert set(stats.settings_of(changed)) == set(stats.settings_of(runs))
    assert set(stats.varied(changed)) == {"row", "rounds", "lam"}


@pytest.mark.parametrize("column", ["run", "row", "settings"])
def test_a_column_that_is_lost_is_missed_in_one_sentence(column):
    made, labels = some_runs()
    runs = records.frame(store(made), labels).drop(columns=column)
    with pytest.raises(ValueError, match=f"lost their column '{column}': keep it") as error:
        stats.settings_of(runs) if column == "settings" else stats.by_seed(runs)
    assert "\n" not in str(error.value)


def test_one_record_under_two_labels_is_two_rows():
    (path,) = store([record("promptfl", 1)])
    runs = records.frame([path, path], ["one", "other"])
    assert len(runs) == 2 * 6 * CLIENTS and runs["run"].nunique() == 1
    both = stats.by_seed(runs, "row")
    assert both["one", 1] == both["other", 1] == stats.by_seed(runs[runs["row"] == "one"]).iloc[0]


def test_a_setting_does_not_hide_another_column():
    for taken in ("accuracy", "title", "run", "up", "novel"):
        with pytest.raises(ValueError, match=f"the setting {taken} has the name of another"):
            records.frame(store([record("promptfl", 1, **{taken: 1})]))


def test_what_a_frame_says_of_clients():
    content = record("promptfl", 1, n_rounds=2)
    runs = records.frame(store([content]))
    assert runs["row"].eq("promptfl").all() and runs["title"].eq("PromptFL").all()
    assert runs["domain"].tolist() == 2 * content["domains"]
    assert runs["client_name"].tolist() == 2 * content["clients"]
    for found in content["rounds"]:
        lines = runs[runs["round"] == found["round"]].set_index("client")
        assert lines["accuracy"].tolist() == found["accuracy"]
        for name in ("up", "down"):
            moved = lines[name].dropna()
            assert moved.to_dict() == dict(zip(found["participants"], found[name]))
    assert runs[runs["round"] == 0][["base", "novel", "target"]].isna().all(axis=None)
    last = runs[runs["round"] == 1]
    assert last["novel"].tolist() == content["rounds"][1]["elsewhere"]["novel"]
    content["domains"] = content["clients"] = []
    assert records.frame(store([content]))[["domain", "client_name"]].eq("").all(axis=None)


def test_a_method_of_ones_own_is_in_all_tables():
    made, labels = some_runs()
    runs = records.frame(store(made[:12]), labels[:12])
    table = tables.table1(runs)
    assert table["row"].tolist() == list(METHODS.values())
    assert table.loc[OWN, ["mean", "low", "high", "up, bytes", "down, bytes"]].notna().all()
    assert math.isnan(table.loc[OWN, tables.BESIDE]) and table.loc["promptfl", tables.BESIDE] > 0
    assert tables.clients(runs).loc[OWN, "row"] == "Mine"
    ablation = tables.ablation(runs[runs["method"] == OWN], "rounds")
    assert tables.with_controls(ablation, runs).index.tolist() == ["6", "control: majority"]


def test_a_byte_of_a_record_or_an_index_that_has_changed_is_noticed():
    (path,) = store([record("promptfl", 1, n_rounds=1)])
    records.save_index("10_table1", "mine", [path], ["a"])
    (index,) = Path("results/runs").glob("*/mine.json")
    whole = records.of_table("mine")
    gen = np.random.default_rng(0)
    for changed in (path, index):
        content = changed.read_bytes()
        for place in range(0, len(content), 3):
            other = bytearray(content)
            other[place] ^= 1 << gen.integers(8)
            changed.write_bytes(other)
            with contextlib.suppress(records.Damaged):  # a space may become another space
                assert records.of_table("mine").equals(whole), place
        for other in (b"", content[:-9], b"[" * 10**5, b"[1]", b"{}", b"\xff", b"1" * 5000):
            changed.write_bytes(other)
            with pytest.raises(records.Damaged, match=f"{changed} is damaged: .*`fpl sweep mine`"):
                records.of_table("mine")
        changed.write_bytes(content)


def test_a_record_under_the_name_of_another_is_noticed():
    one, other = store([record("promptfl", seed) for seed in (1, 2)])
    one.write_bytes(other.read_bytes())
    with pytest.raises(records.Damaged, match=f"{one} holds another run than its name says"):
        records.frame([one, other])


BUILT = {
    "rounds": [None, 3, "x", [None], [{}], [{"accuracy": 1}]],
    "settings": [],
    "domains": [["photo"], 7],
    "title": [],
}


@pytest.mark.parametrize("part", BUILT)
def test_a_record_of_another_structure_is_refused_in_a_sentence(part):
    content = record("promptfl", 1)
    (path,) = store([content])
    for value in BUILT[part]:
        records.seal(content | {part: value}, path)
        with pytest.raises(records.Damaged, match=f"{path} is not built as a record is"):
            records.frame([path])
    del content[part]
    records.seal(content, path)
    with pytest.raises(records.Damaged, match=str(path)):
        records.frame([path])


def test_a_table_is_found_in_the_folder_of_its_notebook():
    paths = store([record("promptfl", seed) for seed in (1, 2)])
    with pytest.raises(
        FileNotFoundError, match="the runs of table mine were not made .*`fpl sweep"
    ):
        records.of_table("mine")
    records.save_index("10_table1", "mine", paths, ["a", "b"])
    assert records.of_table("mine").groupby("row")["seed"].first().to_dict() == {"a": 1, "b": 2}
    records.save_index("11_other", "mine", paths, ["a", "b"])
    with pytest.raises(ValueError, match="table mine has several indexes, .*10_table1.*11_other"):
        records.of_table("mine")
    records.save_index("12_third", "other", paths, ["a", "b"], "elsewhere")
    paths[0].unlink()
    with pytest.raises(FileNotFoundError, match="1 of 2 runs of table other were not made"):
        records.of_table("other", "elsewhere")


def test_the_last_round_is_reported_never_the_best():
    content = record("promptfl", 1, n_rounds=3)
    content["rounds"][0]["accuracy"] = [1.0] * CLIENTS
    runs = records.frame(store([content]))
    last = content["rounds"][-1]["accuracy"]
    assert stats.last_round(runs)["accuracy"].tolist() == last
    assert stats.by_seed(runs).tolist() == pytest.approx([np.mean(last)])
    assert "after the last round" in stats.reporting_rule()
    for note in (tables.NOTE_REAL, tables.NOTE_DEMO, tables.NOTE_SHORT, tables.NOTE_TABLE1):
        assert stats.reporting_rule() in note


def test_a_row_passes_that_is_clearly_above_every_base():
    lines = {
        "new - coop": ("above", 0.01),
        "new - ridge": ("above", 0.02),
        "old - coop": ("above", 0.01),
        "old - ridge": ("above", 0.06),  # Holm's adjustment leaves nothing of it
        "other - coop": ("below", 0.01),
        "other - ridge": ("above", 0.01),
    }
    table = pd.DataFrame.from_dict(lines, orient="index", columns=["verdict", "holm"])
    table = table.rename_axis("pair")
    assert tables.passing(table, ["coop", "ridge"]) == ["new"]
    assert tables.passing(table, ["coop"]) == ["new", "old"]
    assert tables.passing(table.iloc[4:5], ["coop"]) == []
    several = pd.concat({"a": table, "b": table.iloc[:1]}, names=["data"])
    assert tables.passing(several, ["coop", "ridge"]) == ["new, a"]


def test_a_table_of_differences_says_one_interval_a_verdict_and_holms_p():
    made, labels = some_runs()
    runs = records.frame(store(made[:12]), labels[:12])
    pairs = tables.pairs_of(runs, [("pfedmoap", "promptfl"), (OWN, "majority"), ("gone", OWN)])
    assert [*pairs] == ["pfedmoap - promptfl", f"{OWN} - majority"]
    pairs |= {"twice": ("pfedmoap", "promptfl", OWN, "majority")}
    table = tables.differences(runs, pairs)
    wanted = ["mean", "low", "high", "p", "holm", "verdict", "seeds", "clients"]
    assert [*table] == wanted and [*table.index] == [*pairs]
    for name, (a, b) in [*pairs.items()][:2]:
        found = stats.paired(runs, a, b)
        points = (100 * found[["mean", "low", "high"]]).round(2)
        assert table.loc[name, ["mean", "low", "high"]].tolist() == points.tolist()
        assert table.loc[name, "verdict"] == stats.verdict(found["low"], found["high"])
    first, other, twice = table["mean"]
    assert twice == pytest.approx(first - other, abs=0.011)
    assert table["holm"].tolist() == pytest.approx(stats.holm(table["p"]), abs=2e-4)
    said = tables.sentences(table).splitlines()
    assert len(said) == 3 and said[0].startswith("* *pfedmoap minus promptfl*: ")
    assert all(line.verdict in text for line, text in zip(table.itertuples(), said))
    assert tables.sentences(table, ["twice"]) == said[2]


def test_holms_p_is_of_all_lines_of_the_table_on_several_data_sets_too():
    made = [
        record(method, seed, data=data)
        for data in ("shapes", "styles", "dtd")
        for method in ("promptfl", "pfedmoap")
        for seed in (1, 2, 3)
    ]
    runs = records.frame(store(made))
    table = tables.differences(runs, {"a - b": ("promptfl", "pfedmoap")})
    assert table.index.names == ["data", "pair"] and len(table) == 3
    assert table["holm"].tolist() == pytest.approx(stats.holm(table["p"]), abs=3e-4)
    assert (table["holm"] > table["p"]).any()


def test_a_table_without_pairs_is_empty():
    runs = records.frame(store([record("promptfl", 1)]))
    assert tables.differences(runs, tables.pairs_of(runs, [("promptfl", "gone")])).empty


AVERAGES = {
    "by_seed": stats.by_seed,
    "spread": stats.spread,
    "table1": tables.table1,
    "clients": tables.clients,
    "results": functools.partial(tables.results, columns={"personal": "accuracy"}),
    "generalisation": tables.generalisation,
    "traffic": functools.partial(tables.traffic, keys=["method"]),
    "curves": lambda runs: plots.curves(runs.assign(title=runs["method"])),
    "by_client": lambda runs: plots.by_client(runs.assign(title=runs["method"])),
}


@pytest.mark.parametrize("average", AVERAGES)
def test_two_rows_of_one_method_are_no_average(average):
    made = [record("pfedmoap", 1, n_experts=k) for k in (0, 2)]
    runs = records.frame(store(made), ["none", "two"])
    with pytest.raises(ValueError, match="2 runs are called pfedmoap, [01, ]+: group by a column"):
        AVERAGES[average](runs)


def test_a_row_without_the_value_that_others_have_stays(monkeypatch):
    """In the table of base and novel classes, and in the figure of traffic."""
    made = [record("pfedmoap", 1, rank=rank) for rank in (1, 4)] + [record("promptfl", 1)]
    runs = records.frame(store(made)).assign(base=0.5, novel=0.5)
    assert len(tables.generalisation(runs, "rank")) == 3
    table = tables.traffic(runs, ["row", "rank"])
    assert len(table) == len(runs["round"].unique()) * 3
    drawn = []
    monkeypatch.setattr(plots, "draw_traffic", lambda ax, part, line, **look: drawn.append(line))
    plots.traffic(table, "rank")
    assert drawn == ["-", "--", "-"]


LOW_AND_HIGH = ["low", *["high"] * (CLIENTS - 1)]


def test_a_domain_may_be_called_as_a_column_is():
    made = [record("promptfl", seed) | {"domains": LOW_AND_HIGH} for seed in (1, 2)]
    runs = records.frame(store(made))
    plain = tables.table1(runs)
    table = tables.beside(runs, "CIFAR100")
    assert (table[["low", "high"]].to_numpy() == plain[["low", "high"]].to_numpy()).all()
    assert {"domain low", "domain high"} <= {*table.columns}


def test_ablations_are_drawn_by_the_name_of_the_data_set():
    """Tables may have their data sets in another order; with others they are refused."""

    def table(values):
        index = pd.MultiIndex.from_tuples([(on, 1.0) for on in values], names=["data", "k"])
        means = [*values.values()]
        return pd.DataFrame({"mean": means, "low": means, "high": means}, index)

    first, second = table({"a": 30.0, "b": 70.0}), table({"b": 71.0, "a": 31.0})
    reference = {"a": {"control": 20.0}, "b": {"control": 60.0}}
    names = {"k": "K", "g": "G"}
    figure = plots.ablations({"k": first, "g": second}, {"k": 1.0, "g": 2.0}, names, reference)
    found = {}
    for ax in figure.axes:
        *_, level = [line.get_ydata()[0] for line in ax.lines if line.get_label() == "control"]
        dots = [line for line in ax.lines if line.get_marker() == "o" and len(line.get_ydata())]
        filled = [line for line in dots if line.get_markerfacecolor() == "k"]
        point = ax.lines[0].get_ydata()[0]
        found[ax.get_title("left"), ax.get_xlabel()] = point, level, len(filled)
    assert found == {
        ("a", "K"): (30, 20, 1),
        ("b", "K"): (70, 60, 1),
        ("a", "G"): (31, 20, 0),
        ("b", "G"): (71, 60, 0),
    }
    alone = plots.ablations({"k": first.loc["a"]}, {"k": 1.0}, names, {"a": {"control": 20.0}})
    assert [ax.get_title("left") for ax in alone.axes] == [""]
    with pytest.raises(ValueError, match="the table of g has not the data sets of the others"):
        plots.ablations({"k": first, "g": table({"a": 1.0})}, {"k": 1, "g": 2}, names, reference)


def test_nothing_to_show_is_said_in_a_sentence():
    runs = records.frame(store([record("promptfl", 1)]))
    with pytest.raises(ValueError, match="^there are no runs to make a table of"):
        tables.grid(runs[runs["row"] == "gone"], "method")
    with pytest.raises(ValueError, match="^there are no differences to draw"):
        plots.differences(tables.differences(runs, {}))


def test_differences_at_values_of_a_setting_keep_pair_and_value_apart():
    made, labels = some_runs()
    runs = tables.by_settings(records.frame(store(made), labels), ["row", "lam"])
    names = [f"pfedmoap, varied, lam {lam:g}" for lam in (0, 0.5)]
    table = tables.differences(runs, {("a - b", 0.5): names, ("a - b", 2.0): names[::-1]})
    assert table.index.names == ["pair", "at"] and table["mean"].sum() == 0
    assert "* *a minus b, at 0.5*: " in tables.sentences(table)


def test_a_row_of_fewer_seeds_says_so():
    made = [record("promptfl", seed) for seed in (1, 2, 3)]
    made += [record("pfedmoap", 1), *(record(OWN, seed) for seed in (1, 2))]
    runs = records.frame(store(made))
    wanted = ["PromptFL", "pFedMoAP (1 seed)", "Mine (2 seeds)"]
    for make in (tables.table1, tables.clients, lambda runs: tables.beside(runs, "CIFAR100")):
        assert make(runs)["row"].tolist() == wanted
    labelled = tables.labelled(runs)["row"].tolist()
    assert labelled == ["promptfl", "pfedmoap (1 seed)", f"{OWN} (2 seeds)"]
    pair = tables.differences(runs, {"one": ("promptfl", OWN)})
    assert pair["seeds"].tolist() == [2]
    alone = tables.table1(runs[runs["row"] == OWN])
    assert alone["row"].tolist() == ["Mine"]
    both = tables.marked(pd.concat([tables.table1(runs), alone]))
    assert both["row"].tolist() == [*wanted, "Mine (2 seeds)"]


@pytest.mark.parametrize("images", [*DATASETS, "shapes", "own"])
@pytest.mark.parametrize("methods", [("promptfl", "pfedmoap"), ("promptfl", "majority")])
def test_orders_are_counted_also_where_the_paper_prints_no_pair(images, methods):
    made = [record(method, 1, data=images) | {"images": images} for method in methods]
    runs = records.frame(store(made))
    line = tables.orders(runs).iloc[0]
    printed = {*tables.main_results()["dataset"]}
    there = tables.PRINTED.get(images, "DTD") in printed  # others stand beside the paper's mean
    assert line["pairs"] == (there and "pfedmoap" in methods)
    assert math.isnan(line["share"]) == (line["pairs"] == 0)


def test_traffic_adds_up_what_all_clients_sent_and_received():
    """By hand: bytes of four clients, of whom those that take part move some in each round."""
    content = record("promptfl", 1, n_rounds=3)
    table = tables.traffic(records.frame(store([content])), ["row"])
    moved = [sum(found["up"] + found["down"]) / CLIENTS for found in content["rounds"]]
    assert table["kB"].tolist() == pytest.approx((4 * np.cumsum(moved) / 1000).round(3).tolist())
    means = [100 * np.mean(found["accuracy"]) for found in content["rounds"]]
    assert table["mean"].tolist() == pytest.approx(means, abs=1e-3)
    assert [*table.index] == [("promptfl", number) for number in range(3)]


def test_measures_of_one_run_become_rows():
    made = [record("promptfl", seed) for seed in (1, 2)]
    runs = records.frame(store(made))
    both = tables.by_measures(runs, {"own": "accuracy", "new": "novel"})
    last = made[0]["rounds"][-1]
    for name, values in (("own", last["accuracy"]), ("new", last["elsewhere"]["novel"])):
        found = stats.seeds_by_clients(both, f"promptfl, {name}")
        assert found.loc[1].tolist() == pytest.approx(values)
    lacking = tables.by_measures(runs.assign(novel=math.nan), {"own": "accuracy", "new": "novel"})
    assert {*lacking["row"]} == {"promptfl, own"}


def test_table_6_tells_clipped_uploads_from_noisy_and_untouched_ones():
    how = [{"epsilon": 0.0}, {"epsilon": 50.0}, {"epsilon": 5.0}]
    how += [{"epsilon": 0.0, "mechanism": "clipping"}]
    made = [
        record("promptfl", seed, **({"delta": 0.05, "mechanism": "gaussian"} | changes))
        for changes in how
        for seed in (1, 2)
    ]
    table = tables.table6(records.frame(store(made)))
    steps = ["untouched", "clipped", "clipped, epsilon 50", "clipped, epsilon 5"]
    assert [*table.index] == [("promptfl", step) for step in steps]
    assert table["noise"].tolist()[:2] == [0, 0] and 0 < table["noise"].iloc[2] < 1
    assert table[tables.BESIDE].notna().tolist() == [True, False, True, False]


def test_table_6_has_the_noise_of_each_method_by_itself():
    """A row that has one round and sends nothing stands first."""
    how = {"epsilon": 5.0, "delta": 0.05, "mechanism": "gaussian"}
    made = [record("majority", seed, 1, **how) for seed in (1, 2)]
    for run in made:
        run["rounds"][0]["up"] = [0, 0, 0]
    made += [record("promptfl", seed, 5, **how) for seed in (1, 2)]
    noise = tables.table6(records.frame(store(made)))["noise"].droplevel("uploads")
    wanted = privacy.noise_multiplier(5.0, 0.05, 5)
    assert noise.to_dict() == {"majority": 0, "promptfl": pytest.approx(wanted, abs=0.01)}


def test_table_6_stands_beside_the_mean_of_the_papers_data_sets():
    how = {"epsilon": 0.0, "delta": 0.05, "mechanism": "gaussian"}
    runs = records.frame(store([record("promptfl", seed, **how) for seed in (1, 2)]))
    with open(ROOT / "data/published.csv") as f:
        lines = [line for line in csv.DictReader(f) if line["table"] == "Table 6"]
    one = {"paper": tables.PAPER, "method": "PromptFL", "variant": "no DP"}
    these = [float(line["mean"]) for line in lines if one.items() <= line.items()]
    assert len(these) == 5
    (found,) = tables.table6(runs)[tables.BESIDE]
    assert found == pytest.approx(sum(these) / 5, abs=0.005)


def test_each_run_has_its_own_last_round():
    """An ablation over the number of rounds has runs of one row and seed that end differently."""
    made = [record("promptfl", seed, n_rounds) for n_rounds in (1, 4) for seed in (1, 2)]
    found = stats.by_seed(records.frame(store(made)), "rounds")
    for content in made:
        settings = content["settings"]
        last = np.mean(content["rounds"][-1]["accuracy"])
        assert found[settings["rounds"], settings["seed"]] == pytest.approx(last)


BY_HAND = {  # mean, sample std, and t for n - 1 degrees of freedom in mean -+ t std / sqrt(n)
    "three": ([0.80, 0.82, 0.87], 0.83, math.sqrt((0.03**2 + 0.01**2 + 0.04**2) / 2), 4.302653),
    "two": ([0.5, 0.7], 0.6, math.sqrt(0.02), 12.706205),
    "equal": ([0.4, 0.4, 0.4, 0.4], 0.4, 0.0, 3.182446),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_uncertainty_over_seeds(case):
    values, mean, std, t = BY_HAND[case]
    half = t * std / math.sqrt(len(values))
    wanted = {"mean": mean, "std": std, "low": mean - half, "high": mean + half}
    wanted["seeds"] = len(values)
    assert stats.over_seeds(values).to_dict() == pytest.approx(wanted, rel=1e-6, abs=1e-6)


def test_one_seed_has_no_uncertainty():
    found = stats.over_seeds([0.7])
    assert found["mean"] == 0.7 and found["seeds"] == 1
    assert found[["std", "low", "high"]].isna().all()


def by_hand(made, method, value="accuracy"):
    """The mean over clients of every seed of a method, in percent, from its records' last round."""
    own = [content for content in made if content["settings"]["method"] == method]
    last = [content["rounds"][-1] for content in own]
    found = [line if value == "accuracy" else line["elsewhere"] for line in last]
    return 100 * np.array([line[value] for line in found])


def printed_by(lines):
    """Printed means by method, in the order of data/published.csv, read without pandas."""
    found = {}
    for line in lines:
        found.setdefault(line["method"], []).append(float(line["mean"]))
    return found


def test_columns_of_a_table_are_what_their_names_say():
    """By hand, from the records: means over clients, then over seeds; bytes are four a number."""
    made = [record(method, seed) for method in TITLES for seed in (1, 2, 3)]
    runs = records.frame(store(made))
    table, novel = tables.table1(runs), tables.grid(runs, "method", "novel")
    unequal, domains = tables.clients(runs), tables.beside(runs, "CIFAR100")
    levels = tables.levels(runs, [*TITLES])["shapes"]
    for method, title in TITLES.items():
        last = [c["rounds"][-1] for c in made if c["settings"]["method"] == method]
        values = by_hand(made, method)
        assert table.loc[method, "mean"] == pytest.approx(values.mean(), abs=0.006)
        assert levels[title] == pytest.approx(values.mean())
        assert novel.loc[method, "mean"] == pytest.approx(
            by_hand(made, method, "novel").mean(), abs=0.006
        )
        for way in ("up", "down"):
            numbers = round(np.mean([line[way] for line in last]))
            assert table.loc[method, way] == numbers
            assert table.loc[method, f"{way}, bytes"] == 4 * numbers
        assert domains.loc[method, tables.SPELT.get("photo", "photo")] == pytest.approx(
            values[:, :2].mean(), abs=0.006
        )
        assert domains.loc[method, tables.SPELT.get("sketch", "sketch")] == pytest.approx(
            values[:, 2:].mean(), abs=0.006
        )
        wanted = {
            "mean": values.mean(),
            "worst": values.min(1).mean(),
            "10th percentile": np.quantile(values, 0.1, axis=1).mean(),
            "std over clients": values.std(1).mean(),
        }
        for name, value in wanted.items():
            assert unequal.loc[method, name] == pytest.approx(value, abs=0.006), name


def test_a_table_stands_beside_the_printed_means_of_its_own_data_set():
    with (ROOT / "data" / "published.csv").open(newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["paper"] == tables.PAPER]
    table1 = [line for line in lines if line["table"] == "Table 1"]
    main = [line for line in table1 if line["variant"] != "lambda=0.0"]
    made = [record(method, 1) for method in TITLES]
    drawn = tables.table1(records.frame(store(made)))
    real = [content | {"images": "flowers102"} for content in made]
    for content in real:
        content["settings"] = content["settings"] | {"data": "flowers102"}
    own = tables.table1(records.frame(store(real)))
    cifar = tables.beside(records.frame(store(made)), "CIFAR100")
    of_cifar = [line for line in lines if line["dataset"] == "CIFAR100"]
    of_cifar = [line for line in of_cifar if line["table"] == "Table 2"]
    for method, title in (("promptfl", "PromptFL"), ("pfedmoap", "pFedMoAP")):
        every = printed_by(main)[title]
        assert len(every) == 5
        assert drawn.loc[method, tables.BESIDE] == pytest.approx(np.mean(every), abs=0.006)
        flowers = printed_by([line for line in main if line["dataset"] == "Flowers102"])[title]
        assert own.loc[method, "paper"] == flowers[0] and tables.BESIDE not in own
        (printed,) = printed_by([x for x in of_cifar if x["variant"] != "lambda=0.0"])[title]
        assert cifar.loc[method, "paper, CIFAR100"] == printed


def test_an_order_is_the_papers_where_both_put_the_same_row_first():
    """PromptFL is printed below pFedMoAP, FedProx below PromptFL."""
    level = {"promptfl": 0.5, "pfedmoap": 0.9, "fedprox": 0.7}
    titles = TITLES | {"fedprox": "Prompt+FedProx"}
    made = []
    for method, accuracy in level.items():
        content = record("promptfl", 1) | {"title": titles[method]}
        content["settings"] = content["settings"] | {"method": method}
        for found in content["rounds"]:
            found["accuracy"] = [accuracy] * CLIENTS
        made.append(content)
    line = tables.orders(records.frame(store(made))).iloc[0]
    assert (line["pairs"], line["same"], line["share"]) == (3, 2, 66.7)


def test_an_ablation_is_in_ascending_order():
    made = [record("pfedmoap", 1, lam=lam) for lam in (2.0, 0.0, 0.5)]
    table = tables.ablation(records.frame(store(made)), "lam")
    assert table.index.tolist() == [0.0, 0.5, 2.0]


def test_the_note_above_a_table_tells_real_images_from_drawn_and_own_ones():
    (path,) = store([record("promptfl", 1)])
    runs = records.frame([path])
    assert tables.note(runs, "drawn") == "drawn"
    assert tables.note(runs.assign(images="dtd"), "drawn") == tables.NOTE_REAL
    assert "those of shapes" in tables.note(runs.assign(images="own"), "drawn")
