"""Promise: every published number stands beside ours with one verdict and its reason.

A number that is off says so.
"""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from fpl import gate
from fpl.audit import published
from fpl.experiments import stats, tables
from fpl.methods import METHODS

EMPTY = pd.DataFrame(columns=published.OURS)
VERDICTS = {"inside", "outside", "not run", "not comparable"}
NAME = ["table", "setting", "dataset", "domain_or_split", "method", "variant", "metric"]
MAIN = {"table": "Table 1", "dataset": "Flowers102", "method": "pFedMoAP", "variant": "lambda=0.5"}
COOP = MAIN | {"method": "CoOp", "variant": "local"}


def theirs():
    """The pFedMoAP paper's accuracies, as if they were ours."""
    lines = published.candidates()
    return lines[
        (lines["paper"] == tables.PAPER) & lines["mean"].notna() & lines["std"].notna()
    ].assign(seeds=3)[published.OURS]


def ours(*lines):
    """Lines of MAIN with some values changed."""
    return pd.DataFrame(
        [MAIN | {"domain": "", "mean": 98.41, "std": 0.1, "seeds": 3} | line for line in lines]
    )


def line_of(compared, **where):
    found = compared[
        (compared["paper"] == tables.PAPER) & (compared[[*where]] == pd.Series(where)).all(axis=1)
    ]
    assert len(found) == 1
    return found.iloc[0]


@pytest.fixture(scope="module")
def of_their_own():
    return published.compare(theirs(), comparable=True)


@pytest.mark.parametrize("numbers", [lambda: EMPTY, theirs], ids=["none", "theirs"])
@pytest.mark.parametrize("comparable", [True, False])
def test_every_number_of_the_paper_has_one_verdict(numbers, comparable):
    compared = published.compare(numbers(), comparable)
    paper = compared[compared["paper"] == tables.PAPER]
    source = tables.published().query("paper == @tables.PAPER")
    assert len(paper) == len(source) == 280 and not paper.duplicated(NAME).any()
    pd.testing.assert_series_equal(paper["published_mean"], source["mean"], check_names=False)
    assert compared["verdict"].isin(VERDICTS).all() and (compared["why"].str.len() > 8).all()


def test_what_the_verdicts_are():
    """125 numbers can be judged; without ours they are not run, on other data not comparable."""

    def counts(*arguments):
        compared = published.compare(*arguments).query("paper == @tables.PAPER")
        return compared["verdict"].value_counts().to_dict()

    assert counts(EMPTY, True) == counts(EMPTY, False) == {"not run": 125, "not comparable": 155}
    assert counts(theirs(), True) == {"inside": 125, "not comparable": 155}
    assert counts(theirs(), False) == {"not comparable": 280}


def test_other_papers_are_listed_with_the_reason_that_keeps_them_apart(of_their_own):
    others = of_their_own[of_their_own["paper"] != tables.PAPER]
    assert (
        len(others) == 515
        and set(others["verdict"]) == {"not comparable"}
        and others["ours_mean"].isna().all()
    )
    assert set(others["method"]) <= {published.published_name(m.title) for m in METHODS.values()}


def test_rows_stand_beside_the_printed_ones_of_as_many_experts_and_numbers():
    printed = {*tables.published()["variant"]}
    for k, variant in {0: "K+1=1 experts", 4: "K+1=5 experts", 19: "K+1=20 experts"}.items():
        assert published.PLACES["table8"].spelling[k] == ("pFedMoAP", variant)
        assert (variant in printed) == (k > 0)
    for d, (method, variant) in published.PLACES["d_gate"].spelling.items():
        numbers = sum(value.numel() for value in gate.init(d, torch.Generator()).values())
        size = f"{numbers / 1e3:.1f}K" if numbers < 1e6 else f"{numbers / 1e6:.1f}M"
        assert (method, variant) == ("pFedMoAP", f"d_feature={d}, gating {size} params")
        assert variant in printed
    for label, (_, variant) in published.PLACES["table7"].spelling.items():
        assert variant in printed and all(word in variant for word in label.split(", "))


@pytest.mark.parametrize("query", [*published.NEVER, *published.CAVEATS])
def test_every_rule_holds_for_some_line(query):
    lines, why = published.candidates(), (published.NEVER | published.CAVEATS)[query]
    alone = published.NEVER if query in published.NEVER else {query: why}
    reasons = [found[0] for found in published.reasons(lines, alone) if found]
    assert why in reasons


def test_what_is_hard_to_understand_in_table_1_is_asked_with_its_numbers(of_their_own):
    """Rows of prompts trained on a client's own classes; whoever mends a number mends the words."""
    found = line_of(of_their_own, **COOP)["why"]
    assert published.question() in found and found.startswith("no further apart")
    others = of_their_own.query("table == 'Table 1' and method in ('PromptFL', 'pFedMoAP')")
    assert not others["why"].str.contains("carried over").any()
    source = tables.published().query("paper == @tables.PAPER and table == 'Table 1'")
    means = source.fillna({"variant": ""}).groupby(["method", "variant"])["mean"].mean()
    own = means[[*published.LOCAL_ROWS]]
    gate = means["pFedMoAP", "lambda=0.0"]
    assert f"have {own.min():.0f} to {own.max():.0f} %" in found and f"has {gate:.0f} %" in found
    assert gate - own.max() > 10, "else there is nothing to ask"


@pytest.mark.parametrize(
    ("where", "part"),
    [
        ({"table": "Table 3", "domain_or_split": "Sketch", "method": "CoOp"}, "released loader"),
        (
            {"table": "Table 8", "domain_or_split": "Average", "variant": "K+1=30 experts"},
            "released loader",
        ),
        ({"table": "Figure 5", "variant": "K+1=5 experts"}, "plot"),
        (
            {"table": "Table 9", "metric": "gating_parameters", "variant": "d_feature=32"},
            "parameters",
        ),
    ],
)
def test_reasons_why_not(of_their_own, where, part):
    found = line_of(of_their_own, **where)
    assert found["verdict"] == "not comparable" and part in found["why"] and np.isnan(found["low"])


def test_a_difference_is_given_where_both_numbers_exist_though_not_judged(of_their_own):
    assert (
        line_of(of_their_own, table="Table 4", domain_or_split="Average", method="pFedMoAP")[
            "difference"
        ]
        == 0
    )
    plot = published.compare(
        ours({"table": "Figure 5", "dataset": "CIFAR10", "variant": "K+1=5 experts", "mean": 84.0}),
        True,
    )
    found = line_of(plot, table="Figure 5", variant="K+1=5 experts")
    assert found["difference"] == pytest.approx(0.8) and found["verdict"] == "not comparable"


@pytest.mark.parametrize(
    ("mean", "verdict"),
    [(98.41, "inside"), (98.49, "inside"), (97.0, "outside"), (99.5, "outside")],
)
def test_a_number_that_is_off_changes_the_verdict_of_its_line_and_of_no_other(
    of_their_own, mean, verdict
):
    numbers = theirs()
    numbers.loc[(numbers[[*MAIN]] == pd.Series(MAIN)).all(axis=1), ["mean", "std"]] = mean, 0.01
    compared = published.compare(numbers, comparable=True)
    found = line_of(compared, **MAIN)
    assert (found["verdict"], found["difference"]) == (verdict, pytest.approx(mean - 98.41))
    interval = stats.joint(
        stats.Sample(mean, 0.01, 3), stats.Sample(98.41, 0.04, 3)
    )  # as published
    assert found[["low", "high"]].tolist() == pytest.approx(
        interval[["low", "high"]].tolist(), abs=0.005
    )
    assert (found["low"] <= 0 <= found["high"]) == (verdict == "inside")
    rest = compared.index != found.name
    pd.testing.assert_frame_equal(compared[rest], of_their_own[rest])


def test_missing_cells_and_single_seeds():
    compared = published.compare(
        ours({"std": np.nan, "seeds": 1}, {"dataset": "DTD", "mean": 89.0}), comparable=True
    )
    assert (
        line_of(compared, **MAIN)["verdict"] == "not comparable"
        and "one seed" in line_of(compared, **MAIN)["why"]
    )
    assert line_of(compared, **MAIN | {"dataset": "DTD"})["verdict"] == "inside"
    missing = line_of(compared, **COOP)
    assert (
        missing["verdict"] == "not run"
        and missing[["ours_mean", "seeds", "difference", "low"]].isna().all()
    )


def test_ours_are_rounded_as_the_paper_prints():
    """A row without any spread, such as zero-shot on one split, must not fail by digits that no
    paper prints."""
    zero = {
        "table": "Table 2",
        "dataset": "CIFAR100",
        "method": "ZS-CLIP",
        "variant": "",
        "std": 0.0,
    }
    for mean, verdict in ((32.6849, "inside"), (32.69, "outside")):
        found = line_of(
            published.compare(ours(zero | {"mean": mean}), True),
            table="Table 2",
            dataset="CIFAR100",
            method="ZS-CLIP",
        )
        assert found["verdict"] == verdict


def test_a_number_printed_again_is_the_same_run():
    lines = (
        theirs()
        .set_index(["table", "method", "variant"])[["dataset", "domain", "mean", "std"]]
        .sort_index()
    )
    for again, first in published.SAME_RUN.items():
        assert lines.loc[[again]].values.tolist() == lines.loc[[first]].values.tolist()
    compared = published.compare(ours({}), comparable=True)
    again = {
        "table": "Table 7",
        "dataset": "Flowers102",
        "variant": "attention gating, kept local (default)",
    }
    assert line_of(compared, **again)["verdict"] == "inside"
    own = published.compare(ours({}, again | {"mean": 90.0}), comparable=True)
    assert (
        line_of(own, **again)["verdict"] == "outside"
        and line_of(own, **MAIN)["verdict"] == "inside"
    )


REFUSED = {
    "lack the columns variant": ours({}).drop(columns="variant"),
    "two numbers of ours for Table 1, Flowers102, pFedMoAP, lambda=0.5": ours({}, {}),
    "percent": ours({"mean": 0.98}),
    "no published number for Table 1, Flowers": ours({"dataset": "Flowers"}),
    "no published number for Table 2, CIFAR10, pFedMoAP, lambda=0.5": ours(
        {"table": "Table 2", "dataset": "CIFAR10"}
    ),
    "no published number for Table 1, Flowers102, FedMoAP": ours({"method": "FedMoAP"}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_numbers_of_ours_that_say_nothing_are_refused(message):
    with pytest.raises(ValueError, match=message):
        published.compare(REFUSED[message], comparable=True)


def test_a_method_that_a_table_does_not_print_is_left_out():
    extra = [
        {"method": "FedPGP", "variant": ""},
        {"table": "Table 2", "dataset": "CIFAR10", "method": "FedOTP", "variant": ""},
    ]
    pd.testing.assert_frame_equal(
        published.compare(ours({}, *extra), True), published.compare(ours({}), True)
    )


def test_runs_become_lines():
    titles = {"coop": "CoOp", "pfedmoap": "pFedMoAP", "pfedprompt": "pFedPrompt (reconstruction)"}
    accuracy = {"coop": (0.6, 0.7), "pfedmoap": (0.9, 0.92), "pfedprompt": (0.5, 0.5)}
    lines = []
    for method, title in titles.items():
        for seed, least in enumerate(accuracy[method]):
            line = {"method": method, "title": title, "row": method, "run": f"{method}-{seed}"}
            line |= {"seed": seed, "round": 0, "lam": 0.5}
            for client in (0, 1):
                lines.append(line | {"client": client, "accuracy": least + 0.1 * client})
    runs = pd.DataFrame(lines)
    made = published.lines(runs, published.TABLE1, "DTD")
    assert list(made) == published.OURS
    names = [["CoOp", "local"], ["pFedMoAP", "lambda=0.5"], ["pFedPrompt", ""]]
    assert made[["method", "variant"]].values.tolist() == names
    assert made["mean"].tolist() == pytest.approx([70.0, 96.0, 55.0])
    assert made["std"].tolist() == pytest.approx([50**0.5, 2**0.5, 0.0])
    found = line_of(published.compare(made, True), table="Table 1", dataset="DTD", method="CoOp")
    assert found["ours_mean"] == pytest.approx(70.0) and found["seeds"] == 2
    place = published.Place("Table 1", "lam", {0.5: ("pFedMoAP", "lambda=0.5")})
    one = runs[runs["method"] == "pfedmoap"]
    assert published.lines(one, place, "DTD")["variant"].tolist() == ["lambda=0.5"]


def of_table(*means, std=0.1, table="Table 1", datasets=("one",), domain="", methods="abcdef"):
    """Made-up lines that serve as published ones and as ours.

    Methods a, b, ... have these means on each data set.
    """
    place = {
        "paper": "a paper",
        "table": table,
        "domain": domain,
        "domain_or_split": domain,
        "variant": None,
    }
    return pd.DataFrame(
        [
            place | {"dataset": d, "method": m, "mean": mean, "std": std, "seeds": 3}
            for d in datasets
            for m, mean in zip(methods, means)
        ]
    )


def test_orders_of_a_made_up_table():
    """a < b < c published; ours turn b and c round, too little to tell."""
    pairs, summary = published.orders(of_table(50, 60, 70), of_table(50, 60, 70))
    assert summary == {"pairs": 3, "agree": 3, "clear": 3, "clear_agree": 3, "tau": 1.0}
    pairs, summary = published.orders(
        of_table(80, 90.1, 90, datasets=["demo"]), of_table(50, 60, 70)
    )
    assert pairs[["first", "second"]].values.tolist() == [["a", "b"], ["a", "c"], ["b", "c"]]
    assert (
        pairs["published_difference"].tolist() == [-10, -20, -10] and pairs["published_apart"].all()
    )
    assert pairs["ours_difference"].tolist() == pytest.approx([-10.1, -10, 0.1])
    assert pairs["ours_apart"].tolist() == [True, True, False] and pairs["same"].tolist() == [
        True,
        True,
        False,
    ]
    assert summary == {
        "pairs": 3,
        "agree": 2,
        "clear": 2,
        "clear_agree": 2,
        "tau": pytest.approx(1 / 3, abs=1e-4),
    }


def test_orders_take_the_means_over_the_data_sets_that_both_have():
    printed = pd.concat(
        [of_table(50, 60, datasets=["one", "two"]), of_table(90, 10, datasets=["three"])]
    )
    pairs, _ = published.orders(of_table(50, 60, datasets=["one"]), printed)
    assert pairs["published_difference"].tolist() == [-10]
    pairs, _ = published.orders(
        of_table(50, 60, datasets=["demo"]), printed
    )  # none in common: all of them
    assert pairs["published_difference"].tolist() == [20]
    gap = printed[~((printed["dataset"] == "two") & (printed["method"] == "b"))]
    with pytest.raises(ValueError, match="fewer than two methods"):
        published.orders(of_table(50, 60, datasets=["demo"]), gap)


def test_a_mean_over_data_sets_is_surer_than_one():
    """Two of the same spread on four data sets: half the standard error."""
    apart = [
        published.orders(
            of_table(50, 50.15, std=0.1, datasets=list(d)), of_table(1, 2, datasets=list(d))
        )[0]
        for d in ("w", "wxyz")
    ]
    assert [bool(pairs["ours_apart"].iloc[0]) for pairs in apart] == [False, True]


def test_domain_tables_count_by_their_average():
    printed = pd.concat([of_table(50, 60, domain="Average"), of_table(90, 10, domain="Sketch")])
    assert published.orders(of_table(1.5, 2), printed)[0]["published_difference"].tolist() == [-10]


def test_orders_are_those_of_one_table():
    two = pd.concat([of_table(1, 2), of_table(1, 2, table="Table 2")])
    with pytest.raises(ValueError, match="one paper and table"):
        published.orders(of_table(10, 20), two)
    assert published.orders(two, of_table(1, 2))[1]["pairs"] == 1  # of ours, those of that table


def test_files_for_people_and_machines(tmp_path, of_their_own):
    pairs, _ = published.orders(of_table(50, 60), of_table(50, 60))
    compared = published.compare(ours({}), comparable=True)
    published.save(compared, pairs, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "against_paper.csv",
        "against_paper.json",
        "against_paper_orders.csv",
    ]
    records = json.loads(
        (tmp_path / "against_paper.json").read_text(), parse_constant=lambda name: pytest.fail(name)
    )
    assert len(records) == len(compared) == len(pd.read_csv(tmp_path / "against_paper.csv"))
    assert list(records[0]) == list(compared)
    missing, made = (
        next(r for r in records if all(r[k] == v for k, v in where.items()))
        for where in (COOP, MAIN)
    )
    assert (
        missing["verdict"] == "not run"
        and missing["ours_mean"] is None
        and missing["seeds"] is None
    )
    assert (made["seeds"], made["published_mean"], made["low"] < 0) == (3, 98.41, True)
