"""Numbers over clients and seeds, with their uncertainty.

`runs` is always a frame of `fpl.experiments.records`; accuracies are in [0, 1].

There is one rule for differences between rows, that of `paired`: a difference is claimed only where
both the paired bootstrap over clients and seeds and the t-interval over seeds leave out 0. Tables
show the interval that covers both, so it leaves out 0 where both do, and `verdict` reads it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from pandas import DataFrame, Series
from scipy import stats

RUN = ["row", "run"]  # these columns together tell runs apart, whatever else a frame has
# Records say accuracies to six decimals: what four of them make of nothing is below this.
ROUNDING = 3e-6


def reporting_rule() -> str:
    """Return the sentence that says which accuracy the tables report."""
    return (
        "Accuracy in % after the last round of training, never of the round that was best on test "
        "images: the mean over clients, and of that the mean, standard deviation (std) and 95 % "
        "t-interval (low, high) over seeds."
    )


def last_round(runs: DataFrame) -> DataFrame:
    """Return every client's line of the last round of its run: what `reporting_rule` says."""
    return runs[runs["round"] == final_round(runs)]


def final_round(runs: DataFrame) -> Series:
    """Return for each line the last round of its run."""
    need(runs, "row", "run")
    return runs.groupby(RUN)["round"].transform("max")


def settings_of(runs: DataFrame) -> list[str]:
    """Return the names of all settings of the runs, as their records give them."""
    need(runs, "settings")
    names = " ".join(runs["settings"].unique())
    return list(dict.fromkeys(names.split()))


def need(runs: DataFrame, *columns: str) -> None:
    """Raise ValueError where a frame has lost what tells its runs, or their settings, apart."""
    for column in columns:
        if column not in runs:
            raise ValueError(
                f"the runs have lost their column {column!r}: keep it, as records.frame gives it"
            )


def varied(runs: DataFrame) -> list[str]:
    """Return what to group the runs of one data set by, seeds aside.

    That is `row`, where there are several, and the settings that differ within a row.
    """
    settings = [key for key in settings_of(runs) if key not in ("data", "seed")]
    values = runs.groupby(["data", "row"])[settings].nunique(dropna=False).max()
    rows = ["row"] if runs["row"].nunique() > 1 else []
    return rows + list(values.index[values > 1]) or ["row"]


def by_seed(runs: DataFrame, key: str | Sequence[str] = "method") -> Series:
    """Return the reported mean over clients, without weights, of each (key, seed).

    key: a column, or several. Raises ValueError where a (key, seed) has several runs.
    """
    keys = [key] if isinstance(key, str) else [*key]
    return of_single(last_round(runs), [*keys, "seed"])["accuracy"].mean()


def of_single(lines: DataFrame, keys: Sequence[str]) -> Any:
    """Return runs' lines in groups by some columns, one of which is the seed.

    Raises ValueError for a group that has several runs: no mean is both.
    """
    groups = lines.groupby([*keys], sort=False, dropna=False)
    several = groups["run"].nunique()
    for name in several.index[several > 1]:
        shown = ", ".join(map(str, name)) if isinstance(name, tuple) else name
        raise ValueError(
            f"{several[name]} runs are called {shown}: group by a column that tells them apart"
        )
    return groups


def over_seeds(values: Sequence[float]) -> Series:
    """Return mean, sample std and 95 % t-interval (low, high) of one value per seed.

    Values that are nan are left out. A single seed has neither std nor interval: they are nan.
    """
    known = Series(values, dtype=float).dropna()
    n = len(known)
    mean = known.mean()
    std = known.std()
    half = stats.t.ppf(0.975, n - 1) * std / math.sqrt(n)
    names = ["mean", "std", "low", "high", "seeds"]
    return Series([mean, std, mean - half, mean + half, n], names)


def spread(runs: DataFrame) -> DataFrame:
    """Return how unequal the clients of each method are: worst, tenth (percentile) and std.

    Each is taken over the clients of one run and then averaged over seeds. So `worst` is the mean
    of the lowest accuracies, not the lowest of the mean ones: with another seed client 3 is another
    client. The std is that of all clients there are (divided by their number, as in the released
    code), not an estimate from a sample. The percentile is interpolated linearly.
    """
    of_run = of_single(last_round(runs), ["method", "seed"])["accuracy"]
    measures = DataFrame({"worst": of_run.min()})
    measures["tenth"] = of_run.quantile(0.1)
    measures["std"] = of_run.std(ddof=0)
    return measures.groupby(level="method", sort=False).mean()


def paired(runs: DataFrame, a: str, b: str, draws: int = 10_000, seed: int = 1) -> Series:
    """Compare two rows client by client: mean accuracy of `a` minus `b`, and its 95 % interval.

    a, b: labels of rows; the seeds that both have are compared. draws, seed: of the bootstrap,
    whose random numbers come from a generator of its own, named by (seed, "paired").

    boot_low, boot_high: percentiles of a two-level bootstrap. Each draw takes as many seeds as
    there are, with replacement, and in each taken seed, anew, as many clients as there are, with
    replacement; a and b stay together. `same_clients` are taken once for all seeds. t_low, t_high:
    the t-interval of the seeds' mean differences. low, high: the least interval that covers both.
    (The longer one of the two would not do: it can leave out 0 where the other does not.) p: the
    larger one of both p-values. One seed has no t-interval, so low, high and p are nan.

    In simulations with 3 seeds of 10 or 30 clients the bootstrap's interval held the truth in 97 %
    of cases where only clients differ, but in 75 to 80 % where seeds differ as much as clients:
    three seeds cannot show how far a fourth would be. The t-interval held it in 95 %, but is the
    shorter one where a few seeds happen to agree. The interval that covers both held it in 95 % or
    more. Where clients are the same in every seed, the t-interval is about these clients only.

    Raises ValueError where a row has no runs or several for one seed, and where the two rows have
    no seed in common or other clients.
    """
    difference = paired_differences(runs, a, b)
    means = difference.mean(1)
    # of a difference of differences one may be of other clients in every seed
    same = any(same_clients(runs[runs["row"] == row]) for row in (a, b))
    drawn = two_level(difference, draws, np.random.default_rng([seed, *b"paired"]), same)
    boot_low, boot_high = np.quantile(drawn, [0.025, 0.975])
    over = over_seeds(means.tolist())
    found = {
        "mean": over["mean"],
        "low": np.minimum(boot_low, over["low"]),  # nan where one of them is
        "high": np.maximum(boot_high, over["high"]),
        "p": np.maximum(p_of_draws(drawn), p_of_seeds(means)),
        **{"boot_low": boot_low, "boot_high": boot_high},
        **{"t_low": over["low"], "t_high": over["high"]},
        **{"seeds": len(difference), "clients": difference.shape[1]},
    }
    return Series(found)


def paired_differences(runs: DataFrame, a: str, b: str) -> np.ndarray:
    """Return accuracy of a minus b, (seeds, clients), of the seeds both have; see `paired`.

    What is left of equal ones is the rounding of records, to six decimals, and 0 here.
    """
    one = seeds_by_clients(runs, a)
    two = seeds_by_clients(runs, b)
    both = one.index.intersection(two.index)
    if both.empty or not one.columns.equals(two.columns):
        raise ValueError(
            f"{a} and {b} have no seed in common or other clients: "
            "choose runs of the same seeds and partition"
        )
    difference = (one.loc[both] - two.loc[both]).to_numpy()
    if np.isnan(difference).any():
        raise ValueError(
            f"{a} or {b} lacks some clients in some seeds: "
            "choose runs with the same number of clients"
        )
    return np.where(np.abs(difference) < ROUNDING, 0.0, difference)


def same_clients(runs: DataFrame) -> bool:
    """Return whether the partition of these runs deals the same clients in every seed.

    So it does where a column names them, where each is a domain, where the split has a seed of its
    own, and by the released rules for disjoint classes and for domains. Raises ValueError for the
    released Pachinko split without such a seed: it deals the same clients in another order each.
    """
    one = runs.iloc[0]
    kind = one.get("kind")
    if kind == "pachinko" and one["form"] == "released" and not one.get("split_seed", 0):
        orders = "stand in another order in every seed, so no seed's differences are another's"
        raise ValueError(f"clients of the released Pachinko split {orders}: set split_seed")
    by_rule = one.get("form") == "released" and kind in ("pathological", "domain")
    is_domain = kind == "domain" and runs["domain"].nunique() == one["clients"]
    return kind == "column" or one.get("split_seed", 0) > 0 or by_rule or is_domain


def p_of_draws(drawn: np.ndarray) -> float:
    """Return the two-sided p-value of a bootstrap's means, whose own draw counts in."""
    beyond = min((drawn <= 0).sum(), (drawn >= 0).sum())
    return min(1.0, 2 * (1 + beyond) / (1 + len(drawn)))


def p_of_seeds(means: np.ndarray) -> float:
    """Return the two-sided p-value of the seeds' mean differences; nan for one seed."""
    if len(means) > 1 and np.ptp(means) == 0:
        return float(means[0] == 0)
    return float(stats.ttest_1samp(means, 0).pvalue) if len(means) > 1 else math.nan


def minus(runs: DataFrame, a: str, b: str, row: str) -> DataFrame:
    """Return the lines of a row whose accuracy is that of `a` minus that of `b`.

    So `paired` can compare two differences, as between two partitions: whether a gain is larger in
    one than in the other is a question of its own, which two verdicts do not answer. That the
    clients of the two differences have nothing in common does no harm to either interval.
    Raises ValueError as `paired` does.
    """
    paired_differences(runs, a, b)  # raises
    at = ["seed", "client"]
    one = last_round(runs[runs["row"] == a])
    two = last_round(runs[runs["row"] == b])
    both = one.merge(two[[*at, "accuracy"]], on=at, suffixes=("", " of b"))
    return both.assign(row=row, accuracy=both["accuracy"] - both["accuracy of b"])


ABOVE, BELOW, UNSEEN, UNKNOWN = "above", "below", "no difference seen", "unknown"


def verdict(low: float, high: float) -> str:
    """Return what an interval of `paired` claims; "unknown" where there is none, as of one seed.

    "no difference seen" is no proof of equality: the interval says how large one may be.
    """
    if math.isnan(low) or math.isnan(high):
        return UNKNOWN
    if low > 0:
        return ABOVE
    return BELOW if high < 0 else UNSEEN


def holm(p: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values of the comparisons of one table (Holm, 1979).

    If those at most 0.05 are called differences, the chance of one false call or more in the whole
    table is at most 5 %. The smallest of n is multiplied by n, the next by n - 1, and so on, and
    none may be below one before it. nan stays nan and counts as no comparison.
    """
    values = np.array(p, float)
    adjusted = np.full(len(values), math.nan)
    order = [i for i in np.argsort(values, kind="stable") if not math.isnan(values[i])]
    many = np.arange(len(order), 0, -1)
    adjusted[order] = np.maximum.accumulate(values[order] * many).clip(max=1)
    return adjusted.tolist()


def sentence(name: str, line: Mapping[str, Any]) -> str:
    """Return a comparison in words: "a minus b: +1.20 points [0.30, 2.10] over 10 seeds: above".

    line: mean, low, high in points of percent, holm, verdict and seeds, as `tables.differences` has
    them. Where Holm's adjustment leaves nothing of a claim, that is said, too.
    """
    said = line["verdict"]
    count = int(line["seeds"])
    seeds = f"{count} seed" if count == 1 else f"{count} seeds"
    interval = f" [{line['low']:.2f}, {line['high']:.2f}]" if said != UNKNOWN else ""
    if said in (ABOVE, BELOW) and line["holm"] > 0.05:
        said += f", but not among all comparisons of the table (Holm: p = {line['holm']:.3f})"
    return f"{name}: {line['mean']:+.2f} points{interval} over {seeds}: {said}"


def seeds_by_clients(runs: DataFrame, row: str) -> DataFrame:
    """Return the reported accuracy of a row, seeds by clients; raises as `paired` says."""
    lines = last_round(runs[runs["row"] == row])
    if lines.empty:
        raise ValueError(f"no runs of row {row}: make them with `fpl sweep`, or name another row")
    if lines.duplicated(["seed", "client"]).any():
        raise ValueError(f"several runs of row {row} have the same seed: choose one setting first")
    return lines.pivot(index="seed", columns="client", values="accuracy")


def two_level(
    values: np.ndarray, draws: int, gen: np.random.Generator, same: bool = False
) -> np.ndarray:
    """Return `draws` means of values (seeds, clients) drawn anew.

    Seeds are drawn, and clients within each drawn seed, or for all seeds where they are the `same`.
    """
    n_seeds, n = values.shape
    seeds = gen.integers(n_seeds, size=(draws, n_seeds, 1))
    clients = gen.integers(n, size=(draws, 1 if same else n_seeds, n))
    return values[seeds, clients].mean((1, 2))


class Sample(NamedTuple):
    """What is known of an accuracy: its mean and sample std over a number of seeds."""

    mean: float
    std: float
    seeds: int


def joint(a: Sample, b: Sample, level: float = 0.95) -> Series:
    """Return the difference of two means, its Welch interval (low, high) and a verdict.

    Welch's t-interval does not take the two standard deviations for equal. The verdict is "inside"
    where the interval holds 0, ends included, and else "outside"; it is "unknown" where a mean or
    std is missing or there is one seed. "inside" is no proof of equality: with three seeds each,
    the interval reaches 2 to 2.5 times the larger std to either side.
    """
    difference = a.mean - b.mean
    half = math.nan
    verdict = "unknown"
    if min(a.seeds, b.seeds) > 1 and not math.isnan(difference + a.std + b.std):
        half = welch(a, b, level)
        verdict = "inside" if abs(difference) <= half + 1e-9 else "outside"
    names = ["difference", "low", "high", "verdict"]
    return Series([difference, difference - half, difference + half, verdict], names)


def welch(a: Sample, b: Sample, level: float) -> float:
    """Return half the length of Welch's interval of the difference of two means."""
    one = a.std**2 / a.seeds
    two = b.std**2 / b.seeds
    total = one + two
    if total == 0:
        return 0.0
    freedom = total**2 / (one**2 / (a.seeds - 1) + two**2 / (b.seeds - 1))
    return stats.t.ppf((1 + level) / 2, freedom) * math.sqrt(total)
