"""Promise: the ledger has every defect once, and compares rows that differ by one named switch."""

import dataclasses
import datetime
import math

import numpy as np
import pandas as pd
import pytest
from helpers import ROOT

from fpl.audit import ledger
from fpl.experiments import plots, settings, stats
from fpl.experiments.settings import ROWS
from fpl.methods import PFedMoAP, PromptFL

ITEMS = ledger.read(ROOT / "data/ledger.yaml")
PARAMS = settings.read(ROOT / "params.yaml")
PAIRS = [(item.item, pair) for item in ITEMS for pair in [*item.costs, *item.spreads]]
NAMES = [f"{item} {pair.what}" for item, pair in PAIRS]
EVIDENCE = {"proven by execution", "read in code", "read in text", "inference"}


def experiments():
    """Label -> seed -> run, of all tables of the ledger."""
    found = {}
    for table in ledger.TABLES:
        for label, experiment in PARAMS.runs(table):
            assert experiment.seed not in found.setdefault(label, {}), (
                f"two rows are called {label}"
            )
            found[label][experiment.seed] = experiment
    return found


EXPERIMENTS = experiments()


def flat(experiment):
    """All settings of a run, and those of its data set in the place of that one's name."""
    return {**experiment.settings(), **dataclasses.asdict(experiment.source.data), "data": None}


def of(rows):
    """Runs of {row: accuracies (seeds, rounds, clients)}."""
    lines = []
    for row, runs in rows.items():
        for (s, r, i), a in np.ndenumerate(np.array(runs, float)):
            line = {"row": row, "run": f"{row}-{s}", "seed": s + 1, "round": r}
            lines.append(line | {"client": i, "accuracy": a, "settings": "seed"})
    return pd.DataFrame(lines)


def item(**changes):
    return ledger.Item(
        **{"item": "D0", "kind": "B", "where": "w", "does": "d", "paper": "p", "evidence": "e"}
        | changes
    )


def test_every_defect_is_there_once():
    assert [item.item for item in ITEMS] == [f"D{i}" for i in range(1, 46)]


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: item.item)
def test_no_word_is_missing(item):
    words = {field.name: getattr(item, field.name) for field in dataclasses.fields(item)}
    optional = {key for key in ("inference", "without") if not words[key]}
    assert all(
        isinstance(v, str) and v.strip() == v != ""
        for key, v in words.items()
        if key not in {"costs", "spreads", "reports", *optional}
    )
    assert item.kind in "ABC" and item.evidence in EVIDENCE
    assert bool(item.without) != bool(item.costs or item.spreads), (
        "a number, or the reason why there is none"
    )
    assert item.evidence != "inference" or item.inference
    for report in item.reports:
        assert report.where.startswith("https://github.com/") and report.says.strip()
        assert datetime.date.fromisoformat(report.opened)


def test_what_was_read_as_an_abstract_says_so():
    """Of FedOTP, FedPGP and what came after pFedMoAP nothing else was; such items have the mark."""
    abstract = {item.item for item in ITEMS if item.read == "abstract"}
    assert {item.read for item in ITEMS} == {"abstract", "full text"}
    assert abstract == {
        item.item for item in ITEMS if not item.where.startswith(("pFedMoAP", "Summaries"))
    }, "the papers of these repositories"


def test_public_reports_stand_by_their_item_and_what_they_quote_is_a_line():
    reports = {item.item: [r.where for r in item.reports] for item in ITEMS if item.reports}
    assert reports["D1"] == ["https://github.com/HongxiaLee/FedOTP/issues/3"]
    assert "https://github.com/HongxiaLee/FedOTP/issues/2" in reports["D18"]
    line = ledger.quoted(ITEMS).iloc[0]
    assert (line["mean"], line["std"]) == pytest.approx((0.0872, 0.0173))
    assert line["table"] == reports["D1"][0] and line["domain"] == "clipart"


@pytest.mark.parametrize(("item", "pair"), PAIRS, ids=NAMES)
def test_the_rows_of_a_pair_differ_by_the_named_switch_alone(item, pair):
    """Runs that were equal by mistake would cost nothing, and say so.

    A setting that another one overrides is such a mistake.
    """
    assert {*pair.switch} <= {*ROWS, *settings.parameter_names(), "views"}
    released, paper = EXPERIMENTS[pair.released], EXPERIMENTS[pair.paper]
    both = released.keys() & paper.keys()
    assert len(both) == min(len(released), len(paper)) >= 3 and both <= {*PARAMS.seeds}
    for seed in both:
        one, other = flat(released[seed]), flat(paper[seed])
        differ = {key for key in one if one[key] != other[key]}
        assert one.keys() == other.keys() and differ == {
            "method" if name in ROWS else name for name in pair.switch
        }
        assert all(name in (one["method"], other["method"]) for name in pair.switch if name in ROWS)
        assert "method" not in differ or type(released[seed].method) is not type(paper[seed].method)
    assert pair.switch or pair.rule != "last round"
    assert pair.rule in {*ledger.RULES, ledger.ONE_RUN}


def test_every_run_is_for_a_number():
    assert EXPERIMENTS.keys() == {
        label for _, pair in PAIRS for label in (pair.released, pair.paper)
    }


def test_every_item_with_a_number_is_in_the_tables_of_the_notebook():
    gen = np.random.default_rng(1)
    runs = of({label: gen.uniform(size=(3, 6, 4)) for label in EXPERIMENTS})
    costs, spreads = ledger.costs(ITEMS, runs), ledger.spreads(ITEMS, runs)
    assert [*costs.index, *spreads.index] == [
        (i.item, p.what) for which in ("costs", "spreads") for i in ITEMS for p in getattr(i, which)
    ]
    assert (
        costs.notna().all(axis=None)
        and (costs["low"] <= costs["difference"]).all()
        and (costs["difference"] <= costs["high"]).all()
    )
    words = ledger.words(ITEMS, costs, spreads)
    assert words.index.tolist() == [item.item for item in ITEMS]
    for i in ITEMS:
        said = words.loc[i.item, "cost"]
        assert (
            said == f"no number: {i.without}"
            if i.without
            else all(p.what in said for p in [*i.costs, *i.spreads])
        )
    book = (ROOT / "notebooks/21_ledger.ipynb").read_text()
    assert all(
        f'\\"21_ledger/{name}\\"' in book
        for name in ("ledger", "attribution", "half_precision", "ledger_spread", "ledger_items")
    )


def test_a_cost_by_hand():
    """Four clients in two seeds; the rounds before the last say nothing."""
    runs = of(
        {
            "theirs": [[[0, 0], [0.8, 0.6]], [[0, 0], [0.9, 0.5]]],
            "ours": [[[1, 1], [0.9, 0.5]], [[1, 1], [1.0, 0.7]]],
        }
    )
    table = ledger.costs([item(costs=[ledger.Pair("it", "theirs", "ours", ["lam"])])], runs)
    line = table.loc[("D0", "it")]
    assert line["difference"] == pytest.approx(-7.5)  # of -10, 10, -10, -20
    half = 12.706 * np.std([0, -15], ddof=1) / math.sqrt(2)
    assert line[["low", "high"]].tolist() == pytest.approx([-7.5 - half, -7.5 + half], abs=0.01)
    assert line["seeds"] == 2 and line["verdict"] == stats.UNSEEN and line["evidence"] == "e"
    same = ledger.costs([item(costs=[ledger.Pair("it", "ours", "ours", ["lam"])])], runs).loc[
        ("D0", "it")
    ]
    assert (same[["difference", "low", "high"]] == 0).all() and same["holm"] == 1
    with pytest.raises(ValueError, match="no runs of row"):
        ledger.costs([item(costs=[ledger.Pair("it", "nowhere", "ours")])], runs)


@pytest.mark.parametrize("table", ["costs", "spreads"])
def test_rows_that_differ_by_more_than_the_switch_are_refused(table):
    """As where params.yaml changes a setting of one of them."""
    runs = of({"theirs": [[[0.8, 0.6]], [[0.9, 0.5]]], "ours": [[[0.9, 0.5]], [[1.0, 0.7]]]})
    is_ours = runs["row"] == "ours"
    method = is_ours.map({True: "pfedmoap", False: "pfedmoap_live"})
    runs = runs.assign(settings="method lam eps seed", lam=0.5, eps=1.0, method=method)
    runs.loc[~is_ours, "settings"] = "method lam seed"
    runs.loc[~is_ours, "eps"] = np.nan  # theirs has no such setting
    pair = ledger.Pair("it", "theirs", "ours", ["pfedmoap_live"])
    getattr(ledger, table)([item(**{table: [pair]})], runs)
    runs.loc[is_ours, "lam"] = 0.3
    with pytest.raises(ValueError, match="^theirs and ours differ by lam, too: give both the same"):
        getattr(ledger, table)([item(**{table: [pair]})], runs)
    named = dataclasses.replace(pair, switch=["lam", "pfedmoap_live"])
    getattr(ledger, table)([item(**{table: [named]})], runs)


def test_the_interval_of_a_cost_is_that_of_pairs():
    """Clients differ much, their differences do not: the interval is narrow, and holds the mean."""
    ours = np.random.default_rng(2).uniform(0.2, 0.8, (3, 1, 10))
    theirs = ours - 0.1 + np.random.default_rng(3).normal(0, 0.01, ours.shape)
    line = ledger.costs(
        [item(costs=[ledger.Pair("it", "theirs", "ours")])], of({"theirs": theirs, "ours": ours})
    ).loc[("D0", "it")]
    assert -11.5 < line["low"] < line["difference"] < line["high"] < -8.5
    assert line["verdict"] == stats.BELOW


def test_p_values_are_adjusted_for_all_lines_of_the_table():
    """One difference that is there among nine that are not: alone it counts for more."""
    gen = np.random.default_rng(4)
    ours = gen.uniform(0.2, 0.8, (5, 1, 10))
    rows = {str(k): ours + gen.normal(0, 0.02, ours.shape) for k in range(9)}
    rows |= {"ours": ours, "far": ours + gen.normal(0.015, 0.01, ours.shape)}
    pairs = [ledger.Pair(name, name, "ours") for name in rows if name != "ours"]
    many = ledger.costs([item(costs=pairs)], of(rows))["holm"]
    alone = ledger.costs([item(costs=pairs[-1:])], of(rows))["holm"]
    assert many["D0", "far"] == pytest.approx(10 * alone["D0", "far"], abs=0.001)  # 4 decimals
    assert (many >= many["D0", "far"]).all() and many.max() == 1


def test_both_orders_of_an_account_add_up_and_need_not_agree():
    """Two seeds of two clients; the gain of testing early is 4 points alone and 1 with experts."""
    base = np.array([[[0.5, 0.6]], [[0.52, 0.62]]])
    steps = {ledger.PROMPTFL: 0, ledger.BEFORE: 0.04, ledger.AFTER: 0.09, ledger.PFEDMOAP: 0.1}
    gen = np.random.default_rng(0)
    noisy = {name: base + step + gen.normal(0, 1e-3, base.shape) for name, step in steps.items()}
    runs = of(noisy)
    p = [stats.paired(runs, *rows)["p"] for rows in ledger.STEPS.values()]
    assert ledger.attribution(runs)["holm"].tolist() == pytest.approx(stats.holm(p), abs=1e-4)
    table = ledger.attribution(of({name: base + step for name, step in steps.items()}))
    assert table["difference"].tolist() == pytest.approx([10, 4, 6, 9, 1])
    assert table["share"].tolist() == [100, 40, 60, 90, 10]
    orders = table["difference"].groupby(level="order", sort=False).sum()
    assert orders.tolist() == pytest.approx([10, 10, 10])
    assert (table["low"] <= table["difference"]).all()
    assert (table["difference"] <= table["high"]).all()


def test_the_account_begins_with_promptfl():
    """The row that stands for it is one of pFedMoAP that `fpl check` holds to be PromptFL."""
    run = EXPERIMENTS[ledger.PROMPTFL][PARAMS.seeds[0]]
    settings, other = next(case for case in PFedMoAP.degenerate if case[1] is PromptFL)
    assert all(getattr(run.method, name) == value for name, value in settings.items())
    assert {*ledger.STEPS.values()} <= {(a, b) for a in EXPERIMENTS for b in EXPERIMENTS}


def test_the_best_round_by_hand():
    """A round is chosen for all clients of a run together, the first of equal ones."""
    runs = of({"a": [[[0.2, 0.9], [0.9, 0.1], [0.5, 0.6]], [[0.1, 0.1], [0.3, 0.3], [0.2, 0.3]]]})
    best = ledger.best_round(runs)
    assert best[["seed", "round", "accuracy"]].to_numpy().tolist() == [
        [1, 0, 0.2],
        [1, 0, 0.9],
        [2, 1, 0.3],
        [2, 1, 0.3],
    ]
    pair = ledger.Pair("best", "a", "a", rule="best round")
    assert (
        ledger.costs([item(costs=[pair])], runs).loc[("D0", "best"), "difference"] == 2.5
    )  # the last rounds have 0.55 and 0.25


def test_the_mean_of_the_last_five_rounds_by_hand():
    """Every client's own mean; a run of fewer rounds has them all."""
    curve = [0.9, 0.1, 0.2, 0.3, 0.4, 0.6]  # the first is the best
    runs = of({"long": [[[v, v + 0.1] for v in curve]], "short": [[[0.9, 1.0], [0.1, 0.2]]]})
    found = ledger.last_five(runs[runs["row"] == "long"])
    assert found["accuracy"].tolist() == pytest.approx([0.32, 0.42])
    assert found["round"].tolist() == [5, 5]
    found = ledger.last_five(runs[runs["row"] == "short"])
    assert found["accuracy"].tolist() == pytest.approx([0.5, 0.6])


def test_spreads_by_hand():
    """Two seeds of one client; F(1, 1) has 647.789 at 0.975."""
    runs = of({"fixed": [[[0.5]], [[0.6]]], "free": [[[0.4]], [[0.8]]]})
    line = ledger.spreads(
        [item(spreads=[ledger.Pair("it", "fixed", "free", ["split_seed"])])], runs
    ).loc[("D0", "it")]
    assert line.tolist() == pytest.approx(
        [28.28, 7.07, 0.25, 0.25 / math.sqrt(647.789), 0.25 * math.sqrt(647.789)], abs=0.01
    )


def test_a_ratio_of_other_numbers_of_seeds():
    """Four seeds beside two: F(3, 1) has 864.163 at 0.975, F(1, 3) 17.4434."""
    free = [[[0.4]], [[0.8]]]
    runs = of({"fixed": [[[0.5]], [[0.6]], [[0.5]], [[0.6]]], "free": free})
    pair = ledger.Pair("it", "fixed", "free", ["split_seed"])
    line = ledger.spreads([item(spreads=[pair])], runs).loc[("D0", "it")]
    ratio = math.sqrt(0.01 / 3) / math.sqrt(0.08)
    ends = [ratio / math.sqrt(864.163), ratio * math.sqrt(17.4434)]
    assert line[["ratio", "low", "high"]].tolist() == pytest.approx([ratio, *ends], abs=0.01)


def test_rounding_is_no_spread_to_divide_by():
    """Clients that change places have the same mean in every seed, but for its last digits.

    So have others whose accuracies are as near as records say them.
    """
    accuracies = np.array([0.1, 0.3, 0.55, 0.7, 0.45, 0.9, 0.2, 0.33, 0.61, 0.875])
    gen = np.random.default_rng(0)
    free = [[gen.permutation(accuracies)] for _ in range(10)]
    runs = of({"free": free, "fixed": [[accuracies]] * 10, "far": [[[v] * 10] for v in (0.1, 0.9)]})
    assert 0 < stats.by_seed(runs[runs["row"] == "free"], "row").std() < 1e-15
    near = runs.assign(accuracy=runs["accuracy"] + 1e-6 * (runs["seed"] % 2))
    runs = runs.where(runs["row"] != "free", near)
    for label, found in (("fixed", 0), ("free", 0), ("far", 56.57)):
        one = item(spreads=[ledger.Pair("it", label, "free", ["split_seed"])])
        spreads = ledger.spreads([one], runs)
        line = spreads.loc[("D0", "it")]
        assert line[["over seeds", "as released"]].tolist() == [0, found]
        assert line[["ratio", "low", "high"]].isna().all()
        assert ledger.numbers(one, None, spreads) == "it: no spread to compare with"


def test_an_item_says_the_numbers_of_its_tables():
    pair = ledger.Pair("cost", "a", "b"), ledger.Pair("spread", "a", "b", ["split_seed"])
    line = {"difference": 1.0, "low": 0.5, "high": 1.5, "verdict": "above"}
    costs = pd.DataFrame([line], pd.MultiIndex.from_tuples([("D0", "cost")]))
    spreads = pd.DataFrame({"ratio": [0.25]}, pd.MultiIndex.from_tuples([("D0", "spread")]))
    said = ledger.numbers(item(costs=pair[:1], spreads=pair[1:]), costs, spreads)
    assert said == "cost: +1.00 (0.50 to 1.50, above); spread: std times 0.25"


def test_the_spread_of_the_last_five_rounds():
    means = [[9, 1, 2, 3, 4, 5], [9, 2, 4, 6, 8, 10]]  # the first is not one of the five
    runs = of({"a": [[[m / 100 - 0.01, m / 100 + 0.01] for m in seed] for seed in means]})
    assert ledger.spread_of_rounds(runs) == pytest.approx(math.sqrt((2.5 + 10) / 2) / 100)
    line = ledger.spreads(
        [item(spreads=[ledger.Pair("it", "a", "a", rule=ledger.ONE_RUN)])], runs
    ).loc[("D0", "it")]
    assert (
        line["as released"] == 2.5
        and line["over seeds"] == pytest.approx(3.54)
        and math.isnan(line["low"])
    )


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"cost": []}, "cost"),
        ({"does": None}, "does"),
        ({"costs": [{"what": "x"}]}, "released"),
        ({"reports": [{"where": "x"}]}, "opened"),
    ],
)
def test_a_wrong_entry_is_refused(tmp_path, change, word):
    entry = {k: v for k, v in (vars(item()) | change).items() if v}
    if "cost" in change:
        entry["cost"] = ["x"]
    (tmp_path / "ledger.yaml").write_text(f"- {entry}")
    with pytest.raises(ValueError, match=f"ledger.yaml.*{word}"):
        ledger.read(tmp_path / "ledger.yaml")


def test_the_figure_shows_what_is_claimed():
    lines = [
        ("D1", "far", -60, -64, -56, "below", 0.01),
        ("D2", "both", 0.2, -1, 2, "no difference seen", 1),
        ("D3", "one", 0.5, 0.2, 0.8, "above", 0.2),
        ("D4", "none", 0.5, 0.3, 0.9, "above", 0.04),
    ]
    columns = ["item", "what", "mean", "low", "high", "verdict", "holm"]
    table = pd.DataFrame(lines, columns=columns).set_index(["item", "what"])
    figure = plots.differences(table, far=5.0)
    labels = [[t.get_text() for t in ax.get_yticklabels()] for ax in figure.axes]
    assert labels == [["D1, far"], ["D2, both", "D3, one", "D4, none"]]
