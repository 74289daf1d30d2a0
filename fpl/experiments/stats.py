"""Numbers over clients and seeds, with their uncertainty.

`runs` is always a frame of `fpl.experiments.records`; accuracies are in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from pandas import DataFrame, Series
from scipy import stats

RUN = ["row", "run"]  # these columns together tell runs apart, whatever else a frame has


def reporting_rule() -> str:
    """Return the sentence that says which accuracy the tables report."""
    return (
        "Accuracy in % after the last round of training, never of the round that was best on test "
        "images: the mean over clients, and of that the mean, standard deviation (std) and 95 % "
        "interval (low, high) over seeds."
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

    key: a column, or several.
    """
    keys = [key] if isinstance(key, str) else [*key]
    groups = last_round(runs).groupby([*keys, "seed"], sort=False, dropna=False)
    return groups["accuracy"].mean()


def over_seeds(values: Sequence[float]) -> Series:
    """Return mean, sample std and 95 % t-interval (low, high) of one value per seed.

    A single seed has neither std nor interval: they are nan.
    """
    n = len(values)
    mean = Series(values).mean()
    std = Series(values).std()
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
    of_run = last_round(runs).groupby(["method", "seed"], sort=False)["accuracy"]
    measures = {"worst": of_run.min(), "tenth": of_run.quantile(0.1), "std": of_run.std(ddof=0)}
    return DataFrame(measures).groupby(level="method", sort=False).mean()


def paired(runs: DataFrame, a: str, b: str, draws: int = 10_000, seed: int = 1) -> Series:
    """Compare two rows client by client: mean accuracy of `a` minus `b`, and two 95 % intervals.

    a, b: labels of rows. draws, seed: of the bootstrap, whose random numbers come from a generator
    of its own, named by (seed, "paired").

    low, high: percentiles of a two-level bootstrap. Each draw takes as many seeds as there are,
    with replacement, and in each taken seed, anew, as many clients as there are, with replacement;
    a and b stay together. t_low, t_high: the t-interval of the seeds' mean differences.

    In simulations with 3 seeds of 10 or 30 clients the bootstrap's interval held the truth in 97 %
    of cases where only clients differ, but in 75 to 80 % where seeds differ as much as clients:
    three seeds cannot show how far a fourth would be. The t-interval, several times as wide, held
    it in 95 %. Both take the clients of one seed for other clients than those of the next.

    Raises ValueError where a row has no runs or several for one seed, and where the two rows have
    other seeds or clients.
    """
    one = seeds_by_clients(runs, a)
    two = seeds_by_clients(runs, b)
    if not (one.index.equals(two.index) and one.columns.equals(two.columns)):
        raise ValueError(
            f"{a} and {b} have other seeds or clients: choose runs of the same seeds and partition"
        )
    difference = (one - two).to_numpy()
    if np.isnan(difference).any():
        raise ValueError(
            f"{a} or {b} lacks some clients in some seeds: "
            "choose runs with the same number of clients"
        )
    over = over_seeds(difference.mean(1).tolist())
    low, high = two_level(difference, draws, np.random.default_rng([seed, *b"paired"]))
    return Series(
        {
            "mean": over["mean"],
            "low": low,
            "high": high,
            "t_low": over["low"],
            "t_high": over["high"],
            "seeds": len(one),
            "clients": one.shape[1],
        }
    )


def seeds_by_clients(runs: DataFrame, row: str) -> DataFrame:
    """Return the reported accuracy of a row, seeds by clients; raises as `paired` says."""
    lines = last_round(runs[runs["row"] == row])
    if lines.empty:
        raise ValueError(f"no runs of row {row}: make them with `fpl sweep`, or name another row")
    if lines.duplicated(["seed", "client"]).any():
        raise ValueError(f"several runs of row {row} have the same seed: choose one setting first")
    return lines.pivot(index="seed", columns="client", values="accuracy")


def two_level(values: np.ndarray, draws: int, gen: np.random.Generator) -> tuple[float, float]:
    """Return percentiles 2.5 and 97.5 of the mean of values (seeds, clients).

    Seeds are drawn anew, and clients within each drawn seed.
    """
    n_seeds, n = values.shape
    seeds = gen.integers(n_seeds, size=(draws, n_seeds, 1))
    clients = gen.integers(n, size=(draws, n_seeds, n))
    means = values[seeds, clients].mean((1, 2))
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


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
