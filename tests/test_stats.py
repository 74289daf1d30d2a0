"""Promise: intervals hold the truth as often as they claim, and what is paired belongs together."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from fpl.experiments import stats


def runs_of(rows, rounds=1):
    """Runs of {row: accuracies (seeds, clients)} that are 0 before their last round."""
    lines = []
    for row, table in rows.items():
        for (seed, client), accuracy in np.ndenumerate(np.array(table)):
            line = {"row": row, "method": row, "run": f"{row}-{seed}", "seed": seed}
            for number in range(rounds):
                found = accuracy if number == rounds - 1 else 0.0
                lines.append(line | {"round": number, "client": client, "accuracy": found})
    return pd.DataFrame(lines)


def drawn(gen, n_seeds, n, between):
    """Two rows whose true difference is 0.1.

    Seeds shift it by `between` and clients by 0.05; both rows share the rest.
    """
    b = gen.normal(0.5, 0.2, (n_seeds, n))
    return {
        "a": b + 0.1 + gen.normal(0, between, (n_seeds, 1)) + gen.normal(0, 0.05, (n_seeds, n)),
        "b": b,
    }


# Seeds, clients, shift of a seed; how often bootstrap and t-interval should hold the truth.
COVERAGE = {
    "only clients differ": ((3, 10, 0.0), (0.94, 1.0), (0.92, 0.98)),
    "ten seeds that differ less than clients": ((10, 10, 0.015), (0.93, 0.98), (0.92, 0.98)),
    "three seeds that differ as clients do": (
        (3, 10, 0.05),
        (0.74, 0.85),
        (0.92, 0.98),
    ),  # too few, as the docstring says
    "the same with thirty clients": ((3, 30, 0.05), (0.70, 0.81), (0.92, 0.98)),
}


@pytest.mark.parametrize("case", COVERAGE)
def test_intervals_of_paired_differences_cover_the_truth_as_often_as_stated(case):
    how, *wanted = COVERAGE[case]
    gen, found = np.random.default_rng(1), []
    for _ in range(1000):  # 4 sigma are 0.03
        rows = drawn(gen, *how)
        difference = rows["a"] - rows["b"]
        over = stats.over_seeds(difference.mean(1))
        found.append([*stats.two_level(difference, 300, gen), over["low"], over["high"]])
    low, high, t_low, t_high = np.array(found).T
    for kind, (least, most) in zip(((low, high), (t_low, t_high)), wanted):
        covered = np.mean((kind[0] <= 0.1) & (kind[1] >= 0.1))
        assert least <= covered <= most, covered


def test_a_paired_difference_is_that_of_the_means_and_pairing_narrows_it():
    runs = runs_of(drawn(np.random.default_rng(2), 5, 10, 0.01), rounds=2)
    found, mean = stats.paired(runs, "a", "b"), stats.by_seed(runs).groupby(level=0).mean()
    assert found["mean"] == pytest.approx(mean["a"] - mean["b"])
    assert (
        found["low"] < found["mean"] < found["high"] and found["high"] - found["low"] < 0.06
    )  # clients differ by 0.2
    assert found[["seeds", "clients"]].tolist() == [5, 10]
    back = stats.paired(runs, "b", "a")
    assert back["mean"] == pytest.approx(-found["mean"]) and back["low"] == pytest.approx(
        -found["high"]
    )
    assert stats.paired(runs.sample(frac=1, random_state=0), "a", "b").equals(
        found
    )  # the order of lines says nothing


def test_the_bootstrap_resamples_clients_within_seeds_and_seeds():
    """Where only seeds, or only clients, differ, samples have the values that this can give."""
    only_seeds = stats.paired(
        runs_of({"a": [[0.9] * 4, [0.6] * 4], "b": [[0.5] * 4] * 2}), "a", "b"
    )
    assert only_seeds[["mean", "low", "high"]].tolist() == pytest.approx([0.25, 0.1, 0.4])
    only_clients = stats.paired(runs_of({"a": [[0.9, 0.6]], "b": [[0.5, 0.5]]}), "a", "b")
    assert only_clients[["mean", "low", "high"]].tolist() == pytest.approx([0.25, 0.1, 0.4])
    both = stats.paired(
        runs_of({"a": [[0.9, 0.6], [0.9, 0.6]], "b": [[0.5, 0.5]] * 2}), "a", "b", draws=4000
    )
    assert both["low"] == pytest.approx(0.1) and both["high"] == pytest.approx(
        0.4
    )  # 1 of 16 samples each: beyond 2.5 %


def test_the_draws_have_a_name():
    runs = runs_of(drawn(np.random.default_rng(3), 3, 10, 0.02))
    first = stats.paired(runs, "a", "b", draws=500, seed=7)
    np.random.seed(0)
    assert stats.paired(runs, "a", "b", draws=500, seed=7).equals(first)
    assert stats.paired(runs, "a", "b", draws=500, seed=8)["low"] != first["low"]


A, B = np.full((2, 3), 0.5), np.full((2, 3), 0.4)
REFUSED = {
    "no runs of row b": runs_of({"a": A}),
    "several runs of row a have the same seed": pd.concat(
        [runs_of({"a": A, "b": B}), runs_of({"a": A}).assign(run="another")]
    ),
    "have other seeds or clients": runs_of({"a": A, "b": B[:1]}),
    "lacks some clients in some seeds": runs_of({"a": A, "b": B}).query("seed == 0 or client < 2"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_paired_is_refused(message):
    with pytest.raises(ValueError, match=message):
        stats.paired(REFUSED[message], "a", "b")


def test_spread_over_clients_by_hand():
    runs = runs_of({"a": [[0.2, 0.4, 0.9], [0.8, 0.6, 0.4]], "b": [[0.5] * 3] * 2}, rounds=2)
    found = stats.spread(runs)
    assert found.loc["a", "worst"] == pytest.approx(
        0.3
    )  # other clients: the lowest of the clients' means is 0.5
    assert found.loc["a", "tenth"] == pytest.approx((0.24 + 0.44) / 2)
    assert found.loc["a", "std"] == pytest.approx(
        (np.sqrt((0.09 + 0.01 + 0.16) / 3) + np.sqrt(0.08 / 3)) / 2
    )
    assert found.loc["b"].tolist() == pytest.approx([0.5, 0.5, 0.0])


CELLS = [
    (98.41, 0.04, 3, 98.2, 0.5, 3),
    (72.8, 1.14, 3, 66.4, 0.29, 5),
    (50.0, 2.0, 10, 50.0, 1.0, 3),
    (9.0, 0.0, 3, 9.4, 0.2, 3),
]


@pytest.mark.parametrize("cell", CELLS)
def test_the_joint_interval_is_welchs(cell):
    mean1, std1, n1, mean2, std2, n2 = cell
    p = scipy_stats.ttest_ind_from_stats(*cell, equal_var=False).pvalue
    ours, theirs = stats.Sample(mean1, std1, n1), stats.Sample(mean2, std2, n2)
    found = stats.joint(ours, theirs)
    assert found["difference"] == pytest.approx(mean1 - mean2)
    assert found["verdict"] == ("inside" if p > 0.05 else "outside")
    at_p = stats.joint(ours, theirs, level=1 - p)  # the interval that just reaches 0
    assert (
        min(abs(at_p["low"]), abs(at_p["high"])) == pytest.approx(0, abs=1e-9)
        and at_p["verdict"] == "inside"
    )
    back = stats.joint(theirs, ours)
    assert [back["low"], back["high"]] == pytest.approx([-found["high"], -found["low"]])


def test_the_joint_interval_against_numbers_worked_out_by_hand():
    """Equal spreads of 1 and three seeds.

    That is 4 degrees of freedom, t = 2.776445, and a standard error of sqrt(2 / 3).
    """
    found = stats.joint(stats.Sample(12.0, 1.0, 3), stats.Sample(10.0, 1.0, 3))
    assert [found["low"], found["high"]] == pytest.approx([2 - 2.266958, 2 + 2.266958], abs=1e-5)


@pytest.mark.parametrize(
    ("difference", "verdict"),
    [(2.26695, "inside"), (2.26697, "outside"), (-2.26695, "inside"), (-2.3, "outside")],
)
def test_the_verdict_turns_at_the_end_of_the_interval(difference, verdict):
    ours = stats.Sample(10 + difference, 1.0, 3)
    assert stats.joint(ours, stats.Sample(10.0, 1.0, 3))["verdict"] == verdict


def test_no_spread_at_all():
    theirs = stats.Sample(32.68, 0.0, 3)
    assert stats.joint(stats.Sample(32.68, 0.0, 3), theirs)["verdict"] == "inside"
    assert stats.joint(stats.Sample(32.69, 0.0, 3), theirs)["verdict"] == "outside"


MISSING = [
    (stats.Sample(1.0, 0.1, 1), stats.Sample(2.0, 0.1, 3)),
    (stats.Sample(1.0, np.nan, 3), stats.Sample(2.0, 0.1, 3)),
    (stats.Sample(np.nan, 0.1, 3), stats.Sample(2.0, 0.1, 3)),
]


@pytest.mark.parametrize("two", MISSING)
def test_without_a_spread_there_is_no_verdict(two):
    found = stats.joint(*two)
    assert found["verdict"] == "unknown" and np.isnan(found["low"]) and np.isnan(found["high"])
