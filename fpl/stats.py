"""Numbers over seeds, with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
from scipy import stats

RESULTS = ("round", "client", "accuracy", "up", "down")  # columns of a frame of runs that are no settings


def over_seeds(values: Sequence[float], level: float = 0.95) -> pd.Series:
    """mean, sample std, and the t-interval of the mean (low, high); std and interval are nan for a single value."""
    n = len(values)
    mean, std = pd.Series(values).mean(), pd.Series(values).std()
    half = stats.t.ppf((1 + level) / 2, n - 1) * std / math.sqrt(n) if n > 1 else math.nan
    return pd.Series({"mean": mean, "std": std, "low": mean - half, "high": mean + half, "seeds": n})


def last_round(runs: pd.DataFrame) -> pd.DataFrame:
    """The rule that picks what is reported: every client's accuracy after the last round, never the best one."""
    settings = [column for column in runs.columns if column not in RESULTS]  # together they name a run
    final = runs.groupby(settings, dropna=False)["round"].transform("max")
    return runs[runs["round"] == final]


def by_seed(runs: pd.DataFrame, key: str | Sequence[str] = "method") -> pd.Series:
    """Unweighted mean over the clients of each (key or keys, seed), last round, in [0, 1]."""
    keys = [key] if isinstance(key, str) else [*key]
    return last_round(runs).groupby([*keys, "seed"], sort=False, dropna=False)["accuracy"].mean()
