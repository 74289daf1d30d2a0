"""Tables 3 and 4 of pFedMoAP beside a guess that looks at no image.

The released loader of the data sets with domains pairs labels with unrelated images (D1). All that
can be learnt then is which labels a client has. This module rebuilds the clients from label counts,
scores the constant guess of each client's most frequent training label, and compares it with the
published numbers. One row fits, pFedMoAP's; others lie below the guess, or above what it allows.
Accuracies are in [0, 1]; only `wide` and `save` give percent.

Letters of shapes: n clients, c classes, v equally likely splits into train and test.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from pandas import DataFrame, Series
from tqdm.auto import tqdm

from fpl.data.files import ROOT, atomic_write
from fpl.experiments import tables
from fpl.released.splits import domain_dirichlet

Counts = dict[str, np.ndarray]  # domain -> (v, 2, c) images per split, of train and test, per class
MAJORITY = "majority guess of each client"
SHARED = "one label per domain"


def read_counts(dataset: str) -> Counts:
    """Return the label counts of a data set in data/label_prior, by domain in alphabetic order.

    There is one split (v = 1) where the file counts train and test apart. Where it has totals
    only, there is every result of the stratified 80/20 rule.
    """
    table = pd.read_csv(ROOT / "data" / "label_prior" / f"{dataset}_counts.csv")
    counts = {}
    for domain, rows in table.sort_values("label").groupby("domain"):
        if "images" in rows:
            splits = stratified(rows["images"].to_numpy())
        else:
            splits = rows[["train", "test"]].to_numpy().T[None]
        counts[str(domain)] = splits
    return counts


def stratified(totals: np.ndarray) -> np.ndarray:
    """Return the counts of train and test (v, 2, c) that an 80/20 split of totals (c,) may have.

    The test set has a fifth of all images, rounded up. Each class gives the whole part of its
    share, and the classes of the largest remainders give one more: this is the rule of
    scikit-learn's StratifiedShuffleSplit, which FedBN's preprocessing uses. Among classes of equal
    remainder scikit-learn draws by a seed that is not known here, so all ways are returned, those
    that favour the lowest labels first.
    """
    n_images = int(totals.sum())
    n_test = math.ceil(n_images / 5)
    whole, remainder = np.divmod(totals * n_test, n_images)  # whole numbers, so that a tie is a tie
    left = n_test - whole.sum()
    last = np.sort(remainder)[::-1][left - 1]  # left = 0: no remainders, and nothing is handed out
    sure = remainder > last
    tied = np.flatnonzero(remainder == last)
    splits = []
    for extra in combinations(tied, left - sure.sum()):
        test = whole + sure
        test[list(extra)] += 1
        splits.append([totals - test, test])
    return np.array(splits)


def clients(split: np.ndarray, beta: float = 0.3, seed: int = 0) -> np.ndarray:
    """Return the images per client and class (2, n, c) of one domain with counts (2, c).

    beta, seed: of the released partition, on whose list order the counts of a client do not
    depend; so sorted labels stand for FedBN's shuffled lists.
    """
    n_classes = split.shape[1]
    train, test = (np.repeat(np.arange(n_classes), count) for count in split)
    of_train, of_test = domain_dirichlet((train, test), beta=beta, seed=seed)
    counts = [
        [np.bincount(train[part], minlength=n_classes) for part in of_train],
        [np.bincount(test[part], minlength=n_classes) for part in of_test],
    ]
    return np.array(counts)


def majority(histograms: np.ndarray) -> np.ndarray:
    """Return the test accuracy (n,) of guessing each client's most frequent training label.

    histograms: (2, n, c), as `clients` returns them. Of equally frequent labels it is the lowest.
    """
    train, test = histograms
    guess = train.argmax(-1)
    correct = test[np.arange(len(test)), guess]
    return correct / test.sum(-1)


def scores(histograms: np.ndarray) -> dict[str, float]:
    """Return the accuracy of guesses on the clients (2, n, c) of one domain, as means over clients.

    majority: as above; spread: its standard deviation over the clients.
    best: each client's best constant on its test set, the most that can be expected there where
    images say nothing about labels.
    shared: the best single label for all clients of the domain, the same limit for a prompt that
    all of them share.
    """
    test = histograms[1]
    rates = test / test.sum(-1, keepdims=True)
    guess = majority(histograms)
    return {
        "majority": guess.mean(),
        "spread": guess.std(),
        "best": rates.max(-1).mean(),
        "shared": rates.mean(0).max(),
    }


def guesses(counts: Counts, beta: float = 0.3) -> DataFrame:
    """Return the `scores` of each domain, and their "average" over all clients.

    majority and spread are means over the v splits; best and shared are limits, hence the largest
    over the splits; low and high are the ends of the range of majority.
    """
    how = {"majority": "mean", "spread": "mean", "best": "max", "shared": "max"}
    rows = {}
    for domain, splits in counts.items():
        each = DataFrame([scores(clients(split, beta)) for split in splits])
        row = each.agg(how)
        row["low"] = each["majority"].min()
        row["high"] = each["majority"].max()
        rows[domain] = row
    table = DataFrame(rows).T
    variance = (table["spread"] ** 2).mean() + table["majority"].std(ddof=0) ** 2
    table.loc["average"] = table.mean()  # every domain has the same number of clients
    table.loc["average", "spread"] = np.sqrt(variance)  # over all clients
    return table.rename_axis("domain")


def published(paper: str = "pFedMoAP", names: Sequence[str] = ("Table 3", "Table 4")) -> DataFrame:
    """Return published numbers by domain, with mean and std in [0, 1] and domains in lower case.

    paper: how its name in data/published.csv begins. names: its tables.
    """
    rows = tables.published().fillna({"variant": ""})
    rows = rows[rows["paper"].str.startswith(paper) & rows["table"].isin(names)]
    rows["domain"] = rows["domain_or_split"].str.lower()
    rows[["mean", "std"]] /= 100
    columns = ["dataset", "table", "domain", "method", "variant", "mean", "std"]
    return rows[columns].reset_index(drop=True)


def comparison(guesses_of: Mapping[str, DataFrame], rows: DataFrame) -> DataFrame:
    """Return published rows and, below, two rows of ours for each data set.

    Ours are the majority guess and one label per domain. guesses_of: `guesses` by data set.
    """
    found = [rows]
    for dataset, table in guesses_of.items():
        for method, column in ((MAJORITY, "majority"), (SHARED, "shared")):
            own = table[column].rename("mean").reset_index()
            found.append(own.assign(dataset=dataset, table="ours", method=method))
    return pd.concat(found, ignore_index=True).fillna({"variant": ""})


def fit(guess: np.ndarray, values: np.ndarray) -> dict[str, float]:
    """Return how near two rows of domains are: root mean square difference and correlation r."""
    rms = np.sqrt(np.mean((guess - values) ** 2))
    r = np.corrcoef(guess, values)[0, 1]
    return {"rms": float(rms), "r": float(r)}


def fits(guess: DataFrame, rows: DataFrame) -> DataFrame:
    """Return the `fit` of the majority guess to every published row of a data set, nearest first.

    The average over domains does not count as a domain; it stands beside the fit.
    """
    by_domain = guess["majority"].drop("average")
    table = rows.pivot(index=["table", "method", "variant"], columns="domain", values="mean")
    values = table[by_domain.index].to_numpy()
    found = DataFrame([fit(by_domain, row) for row in values], table.index)
    return found.assign(average=table["average"]).sort_values("rms")


def chance(counts: Counts) -> DataFrame:
    """Return what zero-shot CLIP can expect where its class names are drawn anew in each process.

    With images unrelated to labels (D1) and names in a random order (D2), an image is right with
    probability 1 / c, whatever the model. Over processes, the mean over n test images then has the
    standard deviation sqrt((1 - 1 / c) / (c n)), with ten classes sqrt(0.09 / n); a mean over
    clients of unequal sizes has a little more. A line per domain, and their average.
    """
    lines = {}
    for domain, splits in counts.items():
        n = int(splits[0, 1].sum())
        right = 1 / splits.shape[2]
        lines[domain] = {
            "test images": n,
            "expected": right,
            "deviation": math.sqrt(right * (1 - right) / n),
        }
    table = DataFrame(lines).T.astype({"test images": int})
    variance = (table["deviation"] ** 2).mean() / len(table)
    mean = [table["test images"].sum(), table["expected"].mean(), math.sqrt(variance)]
    table.loc["average"] = mean
    return table.astype({"test images": int}).rename_axis("domain")


def at_chance(counts_of: Mapping[str, Counts], rows: DataFrame) -> DataFrame:
    """Return published rows of zero-shot CLIP beside `chance`, a line each.

    rows: as `published` returns them. away: how far the mean is from what is expected, in
    deviations of a single run; the mean of three seeds stays within 1.96 / sqrt(3) = 1.13 of them
    in 95 % of cases. spread: the published std divided by the deviation, 1 if all is as expected.
    """
    found = []
    for dataset, counts in counts_of.items():
        own = rows[rows["dataset"] == dataset]
        found.append(own.merge(chance(counts).reset_index(), on="domain"))
    table = pd.concat(found, ignore_index=True)
    table["away"] = (table["mean"] - table["expected"]) / table["deviation"]
    table["spread"] = table["std"] / table["deviation"]
    return table.set_index(["dataset", "table", "domain"]).drop(columns=["variant"])


def null(counts: Counts, values: Series, seeds: Iterable[int]) -> DataFrame:
    """Return the `fit` of published values to the majority guess under other partition seeds.

    values: by domain. There is a row for each seed. A seed under which the released rule would
    never end has no partition, and its row is nan.
    """
    wanted = values[list(counts)].to_numpy()
    rows = {}
    for seed in tqdm(seeds, desc="other seeds", unit="seed"):
        try:
            guess = [mean_majority(splits, seed) for splits in counts.values()]
        except ValueError:
            guess = [np.nan] * len(wanted)
        rows[seed] = fit(np.array(guess), wanted)
    return DataFrame(rows).T.rename_axis("seed")


def mean_majority(splits: np.ndarray, seed: int) -> float:
    """Return the majority guess of a domain under a partition seed, as mean over its splits."""
    return np.mean([majority(clients(split, seed=seed)) for split in splits])


def as_good(seeds: DataFrame, observed: Mapping[str, float]) -> dict[str, int]:
    """Return how many seeds of `null` have a partition, and how many fit as well as the observed.

    A seed may come as near (rms) or correlate as well (r).
    """
    holds = {
        "partitions": seeds["rms"].notna(),
        "as near": seeds["rms"] <= observed["rms"],
        "as correlated": seeds["r"] >= observed["r"],
    }
    return DataFrame(holds).sum().to_dict()


def wide(table: DataFrame, dataset: str) -> DataFrame:
    """Return one data set of `comparison` as it is printed: methods by domains, in percent.

    Cells have two decimals, and ± std where it is published.
    """
    rows = table[table["dataset"] == dataset]
    std = (100 * rows["std"]).map(" ± {:.2f}".format, na_action="ignore").fillna("")
    cells = rows.assign(cell=(100 * rows["mean"]).map("{:.2f}".format) + std)
    printed = cells.pivot(index="method", columns="domain", values="cell")
    return printed.loc[rows["method"].unique(), rows["domain"].unique()]


def save(table: DataFrame, path: str | Path) -> None:
    """Write `comparison` in percent: PATH.csv with a line per number, PATH.md by data set."""
    row = table["dataset"] + ", " + table["domain"] + ": " + table["method"]
    percent = table.set_index(row.rename("row"))
    percent[["mean", "std"]] *= 100
    with atomic_write(f"{path}.csv") as temporary:
        percent.to_csv(temporary, float_format="%.2f", lineterminator="\n")
    sections = []
    for dataset in table["dataset"].unique():
        cells = wide(table, dataset).to_markdown(disable_numparse=True)
        sections.append(
            f"**{dataset}**, accuracy in %: published (mean ± std) and guesses that see no image "
            f"(last two rows)\n\n{cells}\n"
        )
    with atomic_write(f"{path}.md") as temporary:
        temporary.write_text("\n".join(sections), encoding="utf-8")
