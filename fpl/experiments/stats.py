"""Numbers over seeds and clients, with their uncertainty. `runs` is a frame of `fpl.records.frame`; accuracies are in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

# columns of a frame of runs that are no settings
RESULTS = ("round", "client", "domain", "accuracy", "up", "down", "base", "novel", "target")


def over_seeds(values: Sequence[float], level: float = 0.95) -> pd.Series:
    """mean, sample std, and the t-interval of the mean (low, high); std and interval are nan for a single value."""
    n = len(values)
    mean, std = pd.Series(values).mean(), pd.Series(values).std()
    half = stats.t.ppf((1 + level) / 2, n - 1) * std / math.sqrt(n) if n > 1 else math.nan
    return pd.Series({"mean": mean, "std": std, "low": mean - half, "high": mean + half, "seeds": n})


def settings_of(runs: pd.DataFrame) -> list[str]:
    """The columns that together name a run."""
    return [column for column in runs.columns if column not in RESULTS]


def varied(runs: pd.DataFrame) -> list[str]:
    """What to group the runs on a data set by: row, where there are several, and settings that differ within one, seeds aside."""
    by_row = runs.groupby(["data", "row"])
    fixed = ("data", "row", "seed")
    settings = [key for key in settings_of(runs) if key not in fixed and by_row[key].nunique(dropna=False).max() > 1]
    return (["row"] if runs["row"].nunique() > 1 else []) + settings or ["row"]


def final_round(runs: pd.DataFrame) -> pd.Series:
    """For each line the last round of its run."""
    return runs.groupby(settings_of(runs), dropna=False)["round"].transform("max")


def last_round(runs: pd.DataFrame) -> pd.DataFrame:
    """The rule that picks what is reported: every client's accuracy after the last round, never the best one."""
    return runs[runs["round"] == final_round(runs)]


def last_five(runs: pd.DataFrame) -> pd.DataFrame:
    """The rule of the released code: every client's mean over the last five rounds, of which shorter runs have fewer.

    The standard deviation that the released code prints is over these five rounds of one run (D16). Here, as in the papers, it
    is over seeds; the two say different things and are not compared.
    """
    late = runs[runs["round"] > final_round(runs) - 5]
    mean = late.groupby([*settings_of(runs), "client"], dropna=False)["accuracy"].transform("mean")
    return last_round(late.assign(accuracy=mean))


RULES = {"last round": last_round, "mean of the last five rounds": last_five}


def reported(runs: pd.DataFrame, rule: str = "last round") -> pd.DataFrame:
    """One line per run and client, by one of RULES. Raises ValueError for a rule that is none, such as the best round."""
    if rule not in RULES:
        raise ValueError(f"no reporting rule {rule!r}: use one of {', '.join(map(repr, RULES))}")
    return RULES[rule](runs)


def by_seed(runs: pd.DataFrame, key: str | Sequence[str] = "method", rule: str = "last round") -> pd.Series:
    """Unweighted mean over the clients of each (key, seed), in [0, 1]; `key` is one column or a list of them."""
    keys = [key] if isinstance(key, str) else [*key]
    return reported(runs, rule).groupby([*keys, "seed"], sort=False, dropna=False)["accuracy"].mean()


def by_rule(runs: pd.DataFrame, key: str | Sequence[str] = "method") -> pd.DataFrame:
    """`by_seed` under every rule, a column each."""
    return pd.DataFrame({rule: by_seed(runs, key, rule) for rule in RULES})


def spread(runs: pd.DataFrame, key: str = "method", rule: str = "last round") -> pd.DataFrame:
    """How unequal clients are, one line per value of `key`: worst client, 10th percentile and std over clients.

    Each is taken over the clients of one run and then averaged over seeds, so "worst" is the mean of the lowest accuracies, not
    the lowest of the mean ones: with other seeds client 3 is another client. The std is that of all clients there are (divided
    by their number, like the released code's), not an estimate from a sample. The percentile is interpolated linearly.
    """
    of_run = reported(runs, rule).groupby([key, "seed"], sort=False)["accuracy"]
    measures = {"worst": of_run.min(), "tenth": of_run.quantile(0.1), "std": of_run.std(ddof=0)}
    return pd.DataFrame(measures).groupby(level=0, sort=False).mean()


def paired(
    runs: pd.DataFrame, a: str, b: str, key: str = "method", rule: str = "last round", draws: int = 10_000, seed: int = 1
) -> pd.Series:
    """Accuracy of row `a` minus row `b`, of the same client in the same seed: mean difference and two 95 % intervals.

    low, high: percentiles of a two-level bootstrap. Each of `draws` samples takes as many seeds as there are, with replacement,
    and then in each taken seed, anew, as many of its clients as there are, with replacement; a and b stay together. Its numbers
    come from a generator of their own, named by (`seed`, "paired"). t_low, t_high: t-interval of the seeds' mean differences.
    In simulations with 3 seeds of 10 or 30 clients the bootstrap's interval held the truth in 97 % of cases where only clients
    differ, but in 75 to 80 % where seeds differ as much as clients: three seeds cannot show how far a fourth would be. The
    t-interval, several times as wide, held it in 95 %. Both take the clients of a seed for other clients than those of the next.

    Raises ValueError where a row has no runs, or several for one seed, and where the two rows have other seeds or clients.
    """
    one, two = (_table(runs[runs[key] == row], f"{key} {row}", rule) for row in (a, b))
    if not (one.index.equals(two.index) and one.columns.equals(two.columns)):
        raise ValueError(f"{a} and {b} have other seeds or clients: choose runs of the same seeds and partition")
    difference = (one - two).to_numpy()
    if np.isnan(difference).any():
        raise ValueError(f"{a} or {b} lacks some clients in some seeds: choose runs with the same number of clients")
    low, high = two_level(difference, draws, np.random.default_rng([seed, *b"paired"]))
    over = over_seeds(difference.mean(1).tolist())
    named = {"mean": over["mean"], "low": low, "high": high, "t_low": over["low"], "t_high": over["high"]}
    return pd.Series(named | dict(zip(("seeds", "clients"), difference.shape)))


def two_level(values: np.ndarray, draws: int, gen: np.random.Generator) -> tuple[float, float]:
    """Percentiles 2.5 and 97.5 of the mean of `values` (seeds, clients), seeds drawn anew and clients within each drawn seed."""
    n_seeds, n = values.shape
    seeds, clients = gen.integers(n_seeds, size=(draws, n_seeds, 1)), gen.integers(n, size=(draws, n_seeds, n))
    low, high = np.quantile(values[seeds, clients].mean((1, 2)), [0.025, 0.975])
    return float(low), float(high)


def _table(runs: pd.DataFrame, what: str, rule: str) -> pd.DataFrame:
    """Accuracy, seeds by clients."""
    lines = reported(runs, rule)
    if lines.empty:
        raise ValueError(f"no runs of {what}: make them with `fpl sweep`, or name another row")
    if lines.duplicated(["seed", "client"]).any():
        raise ValueError(f"several runs of {what} have the same seed: choose one setting first")
    return lines.pivot(index="seed", columns="client", values="accuracy")


def joint(mean1: float, std1: float, n1: int, mean2: float, std2: float, n2: int, level: float = 0.95) -> pd.Series:
    """difference mean1 - mean2 of two means over seeds, its Welch interval (low, high), and verdict.

    Welch's t-interval takes sample standard deviations and does not take the two for equal. The verdict is "inside" where the
    interval holds 0, ends included, else "outside"; "unknown" where a mean or std is missing or there is one seed. "inside" is
    no proof of equality: with three seeds each, it reaches 2 to 2.5 times the larger std to either side.
    """
    difference = mean1 - mean2
    if min(n1, n2) < 2 or math.isnan(difference + std1 + std2):
        return pd.Series({"difference": difference, "low": math.nan, "high": math.nan, "verdict": "unknown"})
    squares = std1**2 / n1, std2**2 / n2
    total = sum(squares)
    free = total**2 / (squares[0] ** 2 / (n1 - 1) + squares[1] ** 2 / (n2 - 1)) if total else math.inf
    half = stats.t.ppf((1 + level) / 2, free) * math.sqrt(total)
    verdict = "inside" if abs(difference) <= half + 1e-9 else "outside"
    return pd.Series({"difference": difference, "low": difference - half, "high": difference + half, "verdict": verdict})
