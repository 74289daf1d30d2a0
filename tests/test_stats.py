"""Promise: intervals hold the truth as often as they claim, and what is paired belongs together.

One rule decides what is called a difference.
"""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import refuses
from scipy import stats as scipy_stats

from fpl.data.partitions import Partition
from fpl.experiments import assemble, stats
from fpl.state import Clients


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


# Seeds, clients, shift of a seed; how often bootstrap, t-interval and both together should hold the
# truth. Three seeds that differ are too few for the bootstrap, as the docstring says.
COVERAGE = {
    "only clients differ": ((3, 10, 0.0), (0.94, 1.0), (0.92, 0.98), (0.97, 1.0)),
    "ten seeds that differ little": ((10, 10, 0.015), (0.93, 0.98), (0.92, 0.98), (0.94, 0.99)),
    "three seeds that differ much": ((3, 10, 0.05), (0.74, 0.85), (0.92, 0.98), (0.94, 0.99)),
    "the same with thirty clients": ((3, 30, 0.05), (0.70, 0.81), (0.92, 0.98), (0.94, 0.99)),
}


@pytest.mark.parametrize("case", COVERAGE)
def test_intervals_of_paired_differences_cover_the_truth_as_often_as_stated(case):
    how, *wanted = COVERAGE[case]
    gen, found = np.random.default_rng(1), []
    for _ in range(1000):  # 4 sigma are 0.03
        rows = drawn(gen, *how)
        difference = rows["a"] - rows["b"]
        over = stats.over_seeds(difference.mean(1))
        again = stats.two_level(difference, 300, gen)
        found.append([*np.quantile(again, [0.025, 0.975]), over["low"], over["high"]])
    low, high, t_low, t_high = np.array(found).T
    both = np.minimum(low, t_low), np.maximum(high, t_high)
    for kind, (least, most) in zip(((low, high), (t_low, t_high), both), wanted, strict=True):
        covered = np.mean((kind[0] <= 0.1) & (kind[1] >= 0.1))
        assert least <= covered <= most, covered


def claims(**partitions):
    """How often a difference is claimed of two rows that do not differ over many clients.

    partitions: of the rows, column by column.
    """
    gen = np.random.default_rng(1)
    found = 0
    for _ in range(300):
        of_client = gen.normal(0, 0.1, (1, 30))
        difference = of_client + gen.normal(0, 0.03, (5, 30))
        runs = runs_of({"a": 0.5 + difference, "b": np.full((5, 30), 0.5)})
        runs["kind"] = runs["row"].map(partitions)
        line = stats.paired(runs, "a", "b", draws=400)
        found += stats.verdict(line["low"], line["high"]) != "no difference seen"
    return found / 300


@pytest.mark.parametrize(
    "kinds", [("column",) * 2, ("column", "dirichlet"), ("dirichlet", "column")]
)
def test_clients_that_are_the_same_in_every_seed_are_not_counted_as_new_ones(kinds):
    """As rows are differences where two gains are compared, one may have them and not the other."""
    assert claims(**dict(zip("ab", kinds, strict=True))) <= 0.1


def test_clients_in_another_order_in_every_seed_are_not_paired():
    runs = runs_of({"a": [[0.5, 0.6]] * 2, "b": [[0.4, 0.6]] * 2})
    released = runs.assign(kind="pachinko", form="released", split_seed=0)
    refuses(lambda: stats.paired(released, "a", "b"), ["Pachinko", "another order", "split_seed"])
    assert stats.paired(released.assign(split_seed=3), "a", "b")["mean"] == pytest.approx(0.05)


LABELS = np.repeat(np.arange(6), 60)
SPLIT = np.tile(np.repeat(["train", "test"], [40, 20]), 6)
DOMAIN = np.tile(np.repeat(["ink", "oil"], 10), 18)
HOSPITAL = np.tile(np.array(["x", "y", "z"]), 120)
PARTITIONS = {
    "pathological": {},
    "pathological, released": {"form": "released"},
    "pathological, a fixed split": {"split_seed": 3},
    "dirichlet": {"kind": "dirichlet"},
    "dirichlet, released": {"kind": "dirichlet", "form": "released"},
    "dirichlet, a fixed split": {"kind": "dirichlet", "split_seed": 3},
    "dirichlet, released, a fixed split": {
        "kind": "dirichlet",
        "form": "released",
        "split_seed": 3,
    },
    "domain": {"kind": "domain", "clients": 4},
    "domain, released": {"kind": "domain", "clients": 4, "form": "released"},
    "domain, a client each": {"kind": "domain", "clients": 2},
    "column": {"kind": "column"},
}


@pytest.mark.parametrize("case", PARTITIONS)
def test_clients_are_called_the_same_where_every_seed_deals_them_alike(case):
    asked = Partition(**({"clients": 3, "shots": 0} | PARTITIONS[case]))
    whole = Clients(torch.eye(len(LABELS)), torch.from_numpy(LABELS), [], [], 6)
    feats = SimpleNamespace(labels=whole.labels, split=SPLIT, domain=DOMAIN, client=HOSPITAL)
    found = [assemble.deal(whole, feats, asked, seed) for seed in (1, 2, 3)]
    tested = [[{*index.tolist()} for index in clients.test] for clients in found]
    alike = all(one == tested[0] for one in tested)
    each = asked.kind == "domain"
    runs = runs_of({"a": [[0.5] * asked.clients]}).assign(**dataclasses.asdict(asked))
    runs["domain"] = [f"{i * 2 // asked.clients}" if each else "" for i in runs["client"]]
    assert stats.same_clients(runs) == alike
    one_each = runs.groupby("domain", as_index=False).head(1)  # as a table of unseen clients has
    assert stats.same_clients(one_each) == alike


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
    ends = ["mean", "boot_low", "boot_high"]
    assert only_seeds[ends].tolist() == pytest.approx([0.25, 0.1, 0.4])
    only_clients = stats.paired(runs_of({"a": [[0.9, 0.6]], "b": [[0.5, 0.5]]}), "a", "b")
    assert only_clients[ends].tolist() == pytest.approx([0.25, 0.1, 0.4])
    both = stats.paired(
        runs_of({"a": [[0.9, 0.6], [0.9, 0.6]], "b": [[0.5, 0.5]] * 2}), "a", "b", draws=4000
    )
    # 1 of 16 samples each: beyond 2.5 %
    assert both[ends[1:]].tolist() == pytest.approx([0.1, 0.4])


def test_the_draws_have_a_name():
    runs = runs_of(drawn(np.random.default_rng(3), 3, 10, 0.02))
    first = stats.paired(runs, "a", "b", draws=500, seed=7)
    np.random.seed(0)
    assert stats.paired(runs, "a", "b", draws=500, seed=7).equals(first)
    assert stats.paired(runs, "a", "b", draws=500, seed=8)["boot_low"] != first["boot_low"]


A, B = np.full((2, 3), 0.5), np.full((2, 3), 0.4)
REFUSED = {
    "no runs of row b": runs_of({"a": A}),
    "several runs of row a have the same seed": pd.concat(
        [runs_of({"a": A, "b": B}), runs_of({"a": A}).assign(run="another")]
    ),
    "no seed in common": pd.concat([runs_of({"a": A}), runs_of({"b": B[:1]}).assign(seed=7)]),
    "or other clients": runs_of({"a": A, "b": B[:, :2]}),
    "lacks some clients in some seeds": runs_of({"a": A, "b": B}).query("seed == 0 or client < 2"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_paired_is_refused(message):
    with pytest.raises(ValueError, match=message):
        stats.paired(REFUSED[message], "a", "b")


def test_rows_are_compared_on_the_seeds_that_both_have():
    many = drawn(np.random.default_rng(5), 10, 8, 0.02)
    few = runs_of({"a": many["a"][:3], "b": many["b"]})
    found = stats.paired(few, "a", "b")
    assert found["seeds"] == 3
    assert found.equals(stats.paired(runs_of({k: v[:3] for k, v in many.items()}), "a", "b"))


def of_differences(*seeds):
    """Two rows whose clients differ by these numbers, a list of clients for each seed."""
    difference = np.array(seeds)
    return runs_of({"a": 0.5 + difference, "b": np.full(difference.shape, 0.5)})


# Seeds by clients; whether the bootstrap and the t-interval leave out 0; the verdict.
RULE = {
    "both": ([[0.1, 0.11]] * 2 + [[0.12, 0.1]] * 2, (True, True), "above"),
    "both, below": ([[-0.1, -0.11]] * 2 + [[-0.12, -0.1]] * 2, (True, True), "below"),
    "the bootstrap alone": ([[0.01, 0.02], [0.2, 0.21], [0.01, 0.02]], (True, False), None),
    "the t-interval alone": ([[0.4, -0.2], [0.41, -0.2], [0.39, -0.2]], (False, True), None),
    "neither": ([[0.1, -0.1], [0.05, 0.02], [-0.1, 0.0]], (False, False), None),
    "equal rows": ([[0.0, 0.0]] * 3, (False, False), None),
}


@pytest.mark.parametrize("case", RULE)
def test_a_difference_is_claimed_only_where_both_intervals_leave_out_0(case):
    values, leave_out, said = RULE[case]
    found = stats.paired(of_differences(*values), "a", "b")
    ends = [(found["boot_low"], found["boot_high"]), (found["t_low"], found["t_high"])]
    assert tuple(low > 0 or high < 0 for low, high in ends) == leave_out
    assert found["low"] == min(low for low, _ in ends)
    assert found["high"] == max(high for _, high in ends)
    assert stats.verdict(found["low"], found["high"]) == (said or "no difference seen")
    assert (found["p"] <= 0.05) == (said is not None)


def test_one_seed_claims_nothing():
    found = stats.paired(of_differences([0.3, 0.31, 0.32]), "a", "b")
    assert found[["low", "high", "p"]].isna().all() and found["boot_low"] > 0
    assert stats.verdict(found["low"], found["high"]) == "unknown"


def test_p_is_that_of_the_t_test_where_it_is_the_larger():
    runs = of_differences([0.1, 0.12], [0.3, 0.31], [0.2, 0.21])
    wanted = scipy_stats.ttest_1samp([0.11, 0.305, 0.205], 0).pvalue
    assert stats.paired(runs, "a", "b")["p"] == pytest.approx(wanted)


def test_p_of_draws_counts_both_sides_the_draw_at_hand_and_those_at_0():
    """By hand: 2 (1 + beyond) / (1 + draws), at most 1."""
    drawn = np.array([0.1] * 96 + [0.0, -0.1, -0.2])
    for values in (drawn, -drawn):
        assert stats.p_of_draws(values) == pytest.approx(2 * 4 / 100)
    assert stats.p_of_draws(np.array([0.1] * 99)) == pytest.approx(2 / 100)
    assert stats.p_of_draws(np.zeros(99)) == 1


def test_a_draw_is_the_mean_of_its_clients_accuracies():
    """Nine clients of ten at 0 and one at 1: means of draws are near 0.1, medians would be 0."""
    values = np.zeros((1, 10))
    values[0, 0] = 1
    drawn = stats.two_level(values, 4000, np.random.default_rng(0))
    assert drawn.mean() == pytest.approx(0.1, abs=0.01)


HOLM = [
    ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # the textbook's
    ([0.5, 0.9], [1.0, 1.0]),
    ([0.02, np.nan, 0.01], [0.02, np.nan, 0.02]),
    ([], []),
]


@pytest.mark.parametrize(("p", "wanted"), HOLM)
def test_holm_by_hand(p, wanted):
    assert stats.holm(p) == pytest.approx(wanted, nan_ok=True)


def test_holm_keeps_false_claims_of_a_whole_table_rare():
    """Twenty comparisons, of which nothing is true: some are claimed alone, hardly any after it."""
    gen = np.random.default_rng(6)
    p = gen.uniform(size=(2000, 20))
    assert np.mean([min(stats.holm(table)) <= 0.05 for table in p]) == pytest.approx(0.05, abs=0.02)
    assert (p.min(1) <= 0.05).mean() > 0.5


def test_a_seed_without_a_value_is_no_seed():
    assert stats.over_seeds([0.5, 0.6, np.nan]).equals(stats.over_seeds([0.5, 0.6]))


def test_rows_of_other_clients_have_no_difference_of_differences():
    runs = runs_of({"a": np.full((2, 6), 0.5), "b": np.full((2, 4), 0.4)})
    with pytest.raises(ValueError, match="other clients"):
        stats.minus(runs, "a", "b", "x")


def test_the_difference_of_two_differences_is_that_of_the_means():
    gen = np.random.default_rng(7)
    gen_rows = {row: gen.uniform(size=(4, 6)) for row in "abcd"}
    runs = runs_of(gen_rows)
    both = pd.concat([stats.minus(runs, "a", "b", "x"), stats.minus(runs, "c", "d", "y")])
    mean = {row: values.mean() for row, values in gen_rows.items()}
    wanted = mean["a"] - mean["b"] - (mean["c"] - mean["d"])
    assert stats.paired(both, "x", "y")["mean"] == pytest.approx(wanted)


EQUAL = {
    "in binary": (0.8, 0.6, 0.5, 0.3),
    "in records": (0.833333, 0.666667, 0.5, 0.333333),  # 5/6 - 4/6 and 3/6 - 2/6
}


@pytest.mark.parametrize("rounded", EQUAL)
def test_equal_gains_differ_by_nothing_whatever_their_rounding(rounded):
    rows = dict(zip("abcd", EQUAL[rounded], strict=True))
    runs = runs_of({row: np.full((4, 6), value) for row, value in rows.items()})
    both = pd.concat([stats.minus(runs, "a", "b", "x"), stats.minus(runs, "c", "d", "y")])
    found = stats.paired(both, "x", "y")
    assert found["mean"] == 0 and stats.verdict(found["low"], found["high"]) == stats.UNSEEN


LINE = {"mean": 1.2, "low": 0.3, "high": 2.1, "holm": 0.01, "verdict": "above", "seeds": 10}
SAID = {
    "a minus b: +1.20 points [0.30, 2.10] over 10 seeds: above": {},
    "a minus b: +1.20 points [-0.30, 2.10] over 3 seeds: no difference seen": {
        "low": -0.3,
        "verdict": "no difference seen",
        "seeds": 3,
        "holm": 0.2,
    },
    "a minus b: +1.20 points over 1 seed: unknown": {
        "low": np.nan,
        "high": np.nan,
        "holm": np.nan,
        "verdict": "unknown",
        "seeds": 1,
    },
    "a minus b: +1.20 points [0.30, 2.10] over 10 seeds: above, but not among all comparisons of "
    "the table (Holm: p = 0.120)": {"holm": 0.12},
    "a minus b: +1.20 points [0.30, 2.10] over 10 seeds: below, but not among all comparisons of "
    "the table (Holm: p = 0.060)": {"holm": 0.06, "verdict": "below"},
}


@pytest.mark.parametrize("said", SAID)
def test_a_sentence_says_what_the_line_says(said):
    assert stats.sentence("a minus b", LINE | SAID[said]) == said


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


def test_a_mistaken_loader_moves_all_that_belongs_to_an_image_by_the_seed_of_the_split():
    n = len(LABELS)
    numbers = torch.arange(n)
    patches = numbers.view(n, 1, 1).expand(n, 2, n).float()
    whole = Clients(torch.eye(n), torch.from_numpy(LABELS), [], [], 6, patches, place=numbers)
    feats = SimpleNamespace(labels=whole.labels, split=SPLIT, domain=DOMAIN, client=None)
    asked = Partition("domain", 4, 0, loader="both", split_seed=3)
    one, other = (assemble.deal(whole, feats, asked, seed) for seed in (1, 2))
    image = one.feats.argmax(1)
    assert torch.equal(one.place, image) and torch.equal(one.patches[:, 0, 0], image.float())
    assert torch.equal(one.labels, other.labels) and torch.equal(one.feats, other.feats)
