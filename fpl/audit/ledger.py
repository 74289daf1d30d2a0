"""The ledger of released code: where it does something else than its paper, and what that costs.

Its words, and the labels of the rows that are compared, stand in data/ledger.yaml, whose head says
what its parts mean. The rows are those of TABLES in params.yaml. The two rows of a pair differ by
the switch that the pair names and by nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import yaml
from pandas import DataFrame, Series
from scipy.stats import f as f_distribution

from fpl.data.files import ROOT
from fpl.experiments import records, stats

T = TypeVar("T")
LEDGER = ROOT / "data" / "ledger.yaml"
TABLES = ("ledger", "ledger_views", "ledger_seeds", "ledger_domains")
ONE_RUN = "rounds of one run"


@dataclass(frozen=True)
class Pair:
    """Two rows to compare, by their labels.

    switch: what differs between them, settings or a method of fpl.released.
    rule: how `released` is reported, one of RULES; for spreads also ONE_RUN.
    """

    what: str
    released: str
    paper: str
    switch: Sequence[str] = ()
    rule: str = "last round"


@dataclass(frozen=True)
class Item:
    """A defect or a difference: its words, and the pairs that give it numbers.

    without: why there are no pairs.
    """

    item: str
    kind: str
    where: str
    does: str
    paper: str
    evidence: str
    inference: str = ""
    costs: Sequence[Pair] = ()
    spreads: Sequence[Pair] = ()
    without: str = ""


def read(path: Path = LEDGER) -> list[Item]:
    """Return the items of the ledger; raises ValueError where one lacks a part or has another."""
    items = []
    for entry in yaml.safe_load(path.read_text()):
        for key in ("costs", "spreads"):
            entry[key] = [build(Pair, pair, path) for pair in entry.get(key, ())]
        items.append(build(Item, entry, path))
    return items


def build(kind: type[T], content: dict[str, Any], path: Path) -> T:
    """Return an Item or a Pair from its entry; raises as `read` says."""
    try:
        return kind(**content)
    except TypeError as error:
        name = next(iter(content.values()))
        problem = str(error).partition(" ")[2]
        raise ValueError(f"{path}, {name}: {problem}") from None


def runs(results: str | Path | None = None) -> DataFrame:
    """Return the runs of all tables of the ledger, each of whose labels is that of one row."""
    found = [records.of_table(name, results) for name in TABLES]
    return pd.concat(found, ignore_index=True)


def best_round(runs: DataFrame) -> DataFrame:
    """Return of each run of a row the round with the highest mean over clients, on test images.

    Released code reports it (D16); no table of ours does.
    """
    means = runs.groupby(["seed", "round"])["accuracy"].mean()
    best = means.groupby("seed").idxmax()
    return runs[pd.MultiIndex.from_frame(runs[["seed", "round"]]).isin(best)]


def last_five(runs: DataFrame) -> DataFrame:
    """Return every client's mean over the last five rounds of its run, of a row.

    Released code reports it (D16), with the standard deviation over these five rounds of one run.
    Ours is over seeds, as in the papers; the two say different things.
    """
    late = five_rounds(runs)
    mean = late.groupby(["seed", "client"])["accuracy"].transform("mean")
    return stats.last_round(late.assign(accuracy=mean))


def five_rounds(runs: DataFrame) -> DataFrame:
    """Return the lines of the last five rounds of each run, of which shorter runs have fewer."""
    return runs[runs["round"] > stats.final_round(runs) - 5]


RULES = {
    "last round": stats.last_round,
    "best round": best_round,
    "mean of the last five rounds": last_five,
}


def difference(runs: DataFrame, pair: Pair) -> Series:
    """Return `stats.paired` of the two rows, `paper` after its last round; raises as that does."""
    released = RULES[pair.rule](runs[runs["row"] == pair.released])
    paper = stats.last_round(runs[runs["row"] == pair.paper])
    both = pd.concat([released.assign(row="released"), paper.assign(row="paper")])
    return stats.paired(both, "released", "paper")


def costs(items: Iterable[Item], runs: DataFrame) -> DataFrame:
    """Return a line per pair: what the released code's way costs, in points, with both intervals.

    A difference is the accuracy of `released` minus that of `paper`, as `stats.paired` gives it.
    """
    lines = []
    for item in items:
        for pair in item.costs:
            found = 100 * difference(runs, pair)[["mean", "low", "high", "t_low", "t_high"]]
            points = found.round(2) + 0.0  # no -0.0
            named = {"item": item.item, "what": pair.what, **points.rename({"mean": "difference"})}
            lines.append(named | {"evidence": item.evidence})
    return DataFrame(lines).set_index(["item", "what"])


def spreads(items: Iterable[Item], runs: DataFrame) -> DataFrame:
    """Return a line per pair: two standard deviations in points, and their ratio with its interval.

    The ratio is `released` / `paper`. The one of `paper` is over seeds, and so is that of
    `released`, unless the pair's rule is ONE_RUN. The 95 % interval is that of the variance ratio
    of two normal samples (F); the rounds of one run are no sample, and have none.
    """
    lines = []
    for item in items:
        for pair in item.spreads:
            released = runs[runs["row"] == pair.released]
            paper = runs[runs["row"] == pair.paper]
            over = stats.by_seed(paper, "row").std()
            if pair.rule == ONE_RUN:
                found = spread_of_rounds(released)
                far = math.nan
            else:
                found = stats.by_seed(released, "row").std()
                freedom = paper["seed"].nunique() - 1
                far = math.sqrt(f_distribution.ppf(0.975, freedom, freedom))
            ratio = found / over
            lines.append(
                {
                    "item": item.item,
                    "what": pair.what,
                    "over seeds": 100 * over,
                    "as released": 100 * found,
                    "ratio": ratio,
                    "low": ratio / far,
                    "high": ratio * far,
                }
            )
    return DataFrame(lines).set_index(["item", "what"]).round(2)


def spread_of_rounds(runs: DataFrame) -> float:
    """Return the standard deviation over the last five rounds' means over clients, of a row.

    Over the row's seeds it is the root of the mean square.
    """
    means = five_rounds(runs).groupby(["seed", "round"])["accuracy"].mean()
    return math.sqrt(means.groupby("seed").var().mean())


def words(items: Iterable[Item], costs: DataFrame, spreads: DataFrame) -> DataFrame:
    """Return a line per item: what the code does, what the paper says, what it costs.

    Beside them stands what is proven, and what is not.
    """
    lines = []
    for item in items:
        numbers = []
        for pair in item.costs:
            line = costs.loc[(item.item, pair.what)]
            interval = f"({line['low']:.2f} to {line['high']:.2f})"
            numbers.append(f"{pair.what}: {line['difference']:+.2f} {interval}")
        for pair in item.spreads:
            ratio = spreads.loc[(item.item, pair.what), "ratio"]
            numbers.append(f"{pair.what}: std times {ratio:.2f}")
        lines.append(
            {
                "item": item.item,
                "kind": item.kind,
                "where": item.where,
                "the released code": item.does,
                "the paper": item.paper,
                "cost": "; ".join(numbers) or f"no number: {item.without}",
                "evidence": item.evidence,
                "inference": item.inference,
            }
        )
    return DataFrame(lines).set_index("item")
