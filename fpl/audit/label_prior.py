"""Tables 3 and 4 of pFedMoAP beside a guess that sees no image.

The released loader of the domain data sets pairs labels with unrelated images. All that can then be learned is which labels
a client has. The functions here rebuild the clients from label counts, score the constant guess of each client's most
frequent training label, and compare it with the published numbers. Accuracies are in [0, 1]; percent only in `wide`, `save`.

Shape letters: n clients, c classes, v equally likely splits into train and test.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from fpl.data.files import atomic_write
from fpl.released.splits import domain_dirichlet

Counts = dict[str, np.ndarray]  # domain -> (v, 2, c) images per split, train or test, and class

MAJORITY = "majority guess of each client"
SHARED = "one label per domain"


def read_counts(path: str | Path) -> Counts:
    """A file of `data/label_prior`, domains in alphabetic order.

    v = 1 where the file counts train and test apart; where it has totals only, every result of the stratified 80/20 rule.
    """
    domains = pd.read_csv(path).sort_values("label").groupby("domain")
    return {str(domain): _splits(rows) for domain, rows in domains}


def _splits(rows: pd.DataFrame) -> np.ndarray:
    if "images" in rows:
        return stratified(rows["images"].to_numpy())
    return rows[["train", "test"]].to_numpy().T[None]


def stratified(totals: np.ndarray, tenths: int = 2) -> np.ndarray:
    """Train and test counts (v, 2, c) from class totals (c,), each class as near to its share as whole images allow.

    The test set has ceil(tenths / 10 of all) images. Each class gives the whole part of its share, and the classes of the
    largest remainders one more: the rule of scikit-learn's StratifiedShuffleSplit, used in FedBN's preprocessing. Where
    classes of equal remainder compete scikit-learn draws by its seed, which is not known: all ways are returned, those that
    favour the lowest labels first.
    """
    n = int(totals.sum())
    n_test = -(-n * tenths // 10)
    whole, remainder = np.divmod(totals * n_test, n)  # whole numbers, so that a tie is a tie
    left = n_test - whole.sum()
    last = np.sort(remainder)[::-1][left - 1]  # left = 0: all remainders are 0 and nothing is handed out
    sure, tied = remainder > last, np.flatnonzero(remainder == last)
    tests = [whole + sure + np.isin(np.arange(len(totals)), extra) for extra in combinations(tied, left - sure.sum())]
    return np.array([[totals - test, test] for test in tests])


def clients(split: np.ndarray, **partition) -> np.ndarray:
    """Images per client and class (2, n, c) of one domain with counts (2, c); options as `domain_dirichlet`.

    The counts of a client do not depend on the list order (see there), so sorted labels stand for FedBN's shuffled lists.
    """
    n_classes = split.shape[1]
    labels = [np.repeat(np.arange(n_classes), count) for count in split]
    train, test = labels
    parts = domain_dirichlet(train, test, **partition)
    return np.array([[np.bincount(y[i], minlength=n_classes) for i in part] for y, part in zip(labels, parts)])


def majority(histograms: np.ndarray) -> np.ndarray:
    """Test accuracy (n,) of each client's most frequent training label (the lowest on ties); histograms (2, n, c)."""
    train, test = histograms
    return test[np.arange(len(test)), train.argmax(-1)] / test.sum(-1)


def scores(histograms: np.ndarray) -> dict[str, float]:
    """Guesses without an image on the clients of one domain, mean over the clients; histograms (2, n, c).

    majority: as above; spread: its standard deviation over the clients; best: the best constant of each client on its test
    set, the most that anything can expect there if images say nothing about labels; shared: the best single label for all
    clients of the domain, the same limit for one prompt that all of them share.
    """
    rates = histograms[1] / histograms[1].sum(-1, keepdims=True)
    guess = majority(histograms)
    return {"majority": guess.mean(), "spread": guess.std(), "best": rates.max(-1).mean(), "shared": rates.mean(0).max()}


def guesses(counts: Counts, **partition) -> pd.DataFrame:
    """`scores` of each domain, and "average" over all clients, with low and high: the range of majority over the v splits.

    majority and spread are means over the splits; best and shared are limits, so their largest values.
    """
    frame = pd.DataFrame({domain: _guess(splits, **partition) for domain, splits in counts.items()}).T
    between = frame["majority"].std(ddof=0)
    frame.loc["average"] = frame.mean()  # every domain has the same number of clients
    frame.loc["average", "spread"] = np.sqrt((frame["spread"].iloc[:-1] ** 2).mean() + between**2)  # over all clients
    return frame.rename_axis("domain")


def _guess(splits: np.ndarray, **partition) -> pd.Series:
    each = pd.DataFrame([scores(clients(split, **partition)) for split in splits])
    highest = each.max()
    limits = {"best": highest["best"], "shared": highest["shared"]}
    return pd.Series({**each.mean(), **limits, "low": each["majority"].min(), "high": highest["majority"]})


def published(path: str | Path, paper: str = "pFedMoAP", tables: Iterable[str] = ("Table 3", "Table 4")) -> pd.DataFrame:
    """Rows of `data/published.csv`: dataset, table, domain (lower case), method, variant, mean and std in [0, 1]."""
    rows = pd.read_csv(path).fillna({"variant": ""})
    rows = rows[rows["paper"].str.startswith(paper) & rows["table"].isin(list(tables))]
    domain, mean, std = rows["domain_or_split"].str.lower(), pd.to_numeric(rows["mean"]) / 100, rows["std"] / 100
    rows = rows.assign(domain=domain, mean=mean, std=std)
    return rows[["dataset", "table", "domain", "method", "variant", "mean", "std"]].reset_index(drop=True)


def comparison(guesses_of: Mapping[str, pd.DataFrame], rows: pd.DataFrame) -> pd.DataFrame:
    """The published rows, and for each data set two rows of ours: the majority guess and one label per domain."""
    ours = [
        pd.DataFrame({"dataset": dataset, "table": "ours", "domain": frame.index, "method": method, "mean": frame[column].array})
        for dataset, frame in guesses_of.items()
        for method, column in ((MAJORITY, "majority"), (SHARED, "shared"))
    ]
    return pd.concat([rows, *ours], ignore_index=True).fillna({"variant": ""})


def fit(guess: np.ndarray, values: np.ndarray) -> dict[str, float]:
    """Root mean square difference, in [0, 1], and Pearson correlation of two rows of domains, both (domains,)."""
    return {"rms": float(np.sqrt(np.mean((guess - values) ** 2))), "r": float(np.corrcoef(guess, values)[0, 1])}


def fits(guess: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """`fit` of the majority guess to every published row of one data set, nearest first; the average is not a domain."""
    domains = guess.index.drop("average")
    table = rows.pivot(index=["table", "method", "variant"], columns="domain", values="mean")
    frame = pd.DataFrame([fit(guess.loc[domains, "majority"], row) for row in table[domains].to_numpy()], table.index)
    return frame.assign(average=table["average"]).sort_values("rms")


def null(counts: Counts, values: pd.Series, seeds: Iterable[int]) -> pd.DataFrame:
    """`fit` of published values, indexed by domain, to the majority guess under other partition seeds, one row a seed.

    A seed under which the released rule would never end has no partition: its row is NaN.
    """
    seeds, values = list(seeds), values[list(counts)].to_numpy()
    rows = [_fit_of_seed(counts, values, seed) for seed in tqdm(seeds, desc="other seeds", unit="seed")]
    return pd.DataFrame(rows, pd.Index(seeds, name="seed"))


def _fit_of_seed(counts: Counts, values: np.ndarray, seed: int) -> dict[str, float]:
    try:
        guess = [np.mean([majority(clients(split, seed=seed)) for split in splits]) for splits in counts.values()]
    except ValueError:
        return {"rms": np.nan, "r": np.nan}
    return fit(np.array(guess), values)


def as_good(seeds: pd.DataFrame, observed: Mapping[str, float]) -> dict[str, int]:
    """Of the seeds of `null`: how many have a partition, come as near (rms), and correlate as well (r) as the observed fit."""
    near, correlated = seeds["rms"] <= observed["rms"], seeds["r"] >= observed["r"]
    return {"partitions": int(seeds["rms"].count()), "as near": int(near.sum()), "as correlated": int(correlated.sum())}


def wide(frame: pd.DataFrame, dataset: str) -> pd.DataFrame:
    """One data set of `comparison` as printed: methods by domains, percent with two decimals, ± std where published."""
    rows = frame[frame["dataset"] == dataset]
    cells = rows.assign(cell=[_percent(mean, std) for mean, std in zip(rows["mean"], rows["std"])])
    table = cells.pivot(index="method", columns="domain", values="cell")
    return table.loc[rows["method"].unique(), rows["domain"].unique()]


def _percent(mean: float, std: float) -> str:
    return f"{100 * mean:.2f}" if np.isnan(std) else f"{100 * mean:.2f} ± {100 * std:.2f}"


def save(frame: pd.DataFrame, path: str | Path) -> None:
    """Writes `comparison` in percent to `path`.csv (one line a number, "row" names it) and `path`.md (one table a data set)."""
    name = frame["dataset"] + ", " + frame["domain"] + ": " + frame["method"]
    percent = frame.assign(row=name, mean=100 * frame["mean"], std=100 * frame["std"]).set_index("row")
    with atomic_write(f"{path}.csv") as file:
        percent.to_csv(file, float_format="%.2f", lineterminator="\n")
    with atomic_write(f"{path}.md") as file:
        file.write_text("\n".join(_markdown(frame, dataset) for dataset in frame["dataset"].unique()), encoding="utf-8")


def _markdown(frame: pd.DataFrame, dataset: str) -> str:
    title = f"**{dataset}**, accuracy in %: published (mean ± std) and guesses that see no image (last two rows)"
    return f"{title}\n\n{wide(frame, dataset).to_markdown(disable_numparse=True)}\n"
