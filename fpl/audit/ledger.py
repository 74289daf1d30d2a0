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
from fpl.experiments import records, stats, tables

T = TypeVar("T")
LEDGER = ROOT / "data" / "ledger.yaml"
TABLES = ("ledger", "ledger_views", "ledger_seeds", "ledger_domains")
ONE_RUN = "rounds of one run"
NO_SPREAD = 1e-6  # a standard deviation below it is the rounding of records
NOTE_ATTRIBUTION = (
    "What makes pFedMoAP differ from PromptFL, in both orders of the two changes between them. "
    f"{tables.NOTE_PAIRED} `share` is the part of the whole difference in %, without an interval."
)


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
class Report:
    """Where somebody else has reported the item, or what it looks like, in public.

    where: an address. opened: the day, as text. says: what it reports.
    quotes: accuracies that it copies from a paper, as lines of `label_prior.published`, in percent.
    """

    where: str
    opened: str
    says: str
    quotes: Sequence[dict[str, Any]] = ()


@dataclass(frozen=True)
class Item:
    """A defect or a difference: its words, and the pairs that give it numbers.

    read: how much of the paper behind `paper` could be read: its "full text", or its "abstract"
    alone. without: why there are no pairs.
    """

    item: str
    kind: str
    where: str
    does: str
    paper: str
    evidence: str
    inference: str = ""
    read: str = "full text"
    reports: Sequence[Report] = ()
    costs: Sequence[Pair] = ()
    spreads: Sequence[Pair] = ()
    without: str = ""


def read(path: Path = LEDGER) -> list[Item]:
    """Return the items of the ledger; raises ValueError where one lacks a part or has another."""
    items = []
    for entry in yaml.safe_load(path.read_text()):
        for key, kind in (("costs", Pair), ("spreads", Pair), ("reports", Report)):
            entry[key] = [build(kind, part, path) for part in entry.get(key, ())]
        items.append(build(Item, entry, path))
    return items


def build(kind: type[T], content: dict[str, Any], path: Path) -> T:
    """Return an Item, a Pair or a Report from its entry; raises as `read` says."""
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
    """Return `stats.paired` of the two rows, `paper` after its last round.

    Raises as that does, and as `check_switch`.
    """
    released = RULES[pair.rule](runs[runs["row"] == pair.released])
    paper = stats.last_round(runs[runs["row"] == pair.paper])
    both = pd.concat([released.assign(row="released"), paper.assign(row="paper")])
    found = stats.paired(both, "released", "paper")
    check_switch(runs, pair)
    return found


def check_switch(runs: DataFrame, pair: Pair) -> None:
    """Raise ValueError where the two rows of a pair differ by more than its switch.

    Such as where params.yaml changes the settings of one and not of the other.
    """
    both = runs[runs["row"].isin([pair.released, pair.paper])].drop_duplicates("row")
    common = set.intersection(*(set(names.split()) for names in both["settings"]))
    differ = {name for name in common - {"seed"} if both[name].nunique(dropna=False) > 1}
    switch = {"data" if name == "views" else name for name in pair.switch}
    more = differ - switch - {"method"}
    if more:
        raise ValueError(
            f"{pair.released} and {pair.paper} differ by {', '.join(sorted(more))}, too: "
            f"give both the same in params.yaml (the ledger compares {pair.what})"
        )


def costs(items: Iterable[Item], runs: DataFrame) -> DataFrame:
    """Return a line per pair: what the released code's way costs, in points, with its interval.

    A difference is the accuracy of `released` minus that of `paper`, its interval and verdict are
    those of `stats.paired`, and `holm` adjusts its p-value for all lines of the table.
    """
    lines = {}
    for item in items:
        for pair in item.costs:
            found = in_points(difference(runs, pair))
            lines[item.item, pair.what] = found | {"evidence": item.evidence}
    table = DataFrame(lines.values(), pd.MultiIndex.from_tuples(lines, names=["item", "what"]))
    table["holm"] = Series(stats.holm(table["holm"]), table.index).round(4)
    return table


def in_points(found: Series) -> dict[str, Any]:
    """Return a line of `stats.paired` in points of percent; `holm` is its p-value as it is."""
    points = (100 * found[["mean", "low", "high"]]).round(2) + 0.0  # no -0.0
    line: dict[str, Any] = points.rename({"mean": "difference"}).to_dict()
    line |= {"seeds": int(found["seeds"]), "verdict": stats.verdict(found["low"], found["high"])}
    return line | {"holm": found["p"]}


# Between PromptFL and pFedMoAP stand two changes (D25): each can be made first.
PROMPTFL, BEFORE = "pfedmoap, no experts, tested after", "pfedmoap, no experts"
AFTER, PFEDMOAP = "pfedmoap, tested after", "pfedmoap"
TESTED, EXPERTS = "tested before averaging", "experts and gate"
STEPS = {
    ("both changes", f"{TESTED}, {EXPERTS}"): (PFEDMOAP, PROMPTFL),
    ("when it is tested goes first", TESTED): (BEFORE, PROMPTFL),
    ("when it is tested goes first", EXPERTS): (PFEDMOAP, BEFORE),
    ("experts go first", EXPERTS): (AFTER, PROMPTFL),
    ("experts go first", TESTED): (PFEDMOAP, AFTER),
}


def attribution(runs: DataFrame) -> DataFrame:
    """Return what makes pFedMoAP differ from PromptFL, in points, in both orders of the changes.

    With no experts, tested after averaging, pFedMoAP is PromptFL. Each order adds up to the whole
    difference, and how much of it a change has depends on the order: no one order is the right one.
    share: the part of the whole difference in percent, without an interval.
    """
    lines = [in_points(stats.paired(runs, *rows)) for rows in STEPS.values()]
    table = DataFrame(lines, pd.MultiIndex.from_tuples(STEPS, names=["order", "change"]))
    table["holm"] = Series(stats.holm(table["holm"]), table.index).round(4)
    whole = table["difference"].iloc[0]
    share = 100 * table["difference"] / whole if whole else math.nan
    return table.assign(share=share).round({"share": 0})


def spreads(items: Iterable[Item], runs: DataFrame) -> DataFrame:
    """Return a line per pair: two standard deviations in points, and their ratio with its interval.

    The ratio is `released` / `paper`. The one of `paper` is over seeds, and so is that of
    `released`, unless the pair's rule is ONE_RUN. The 95 % interval is that of the variance ratio
    of two normal samples (F); the rounds of one run are no sample, and have none. Where `paper` has
    no spread, there is no ratio.
    """
    lines = []
    for item in items:
        for pair in item.spreads:
            check_switch(runs, pair)
            released = runs[runs["row"] == pair.released]
            paper = runs[runs["row"] == pair.paper]
            over = stats.by_seed(paper, "row").std()
            if pair.rule == ONE_RUN:
                found = spread_of_rounds(released)
                far = near = math.nan
            else:
                found = stats.by_seed(released, "row").std()
                ours, theirs = (rows["seed"].nunique() - 1 for rows in (paper, released))
                far = math.sqrt(f_distribution.ppf(0.975, theirs, ours))
                near = math.sqrt(f_distribution.ppf(0.975, ours, theirs))
            ratio = found / over if over > NO_SPREAD else math.nan
            lines.append(
                {
                    "item": item.item,
                    "what": pair.what,
                    "over seeds": 100 * over,
                    "as released": 100 * found,
                    "ratio": ratio,
                    "low": ratio / far,
                    "high": ratio * near,
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

    Beside them stands what is proven and what is not, how much of the paper was read, and where
    others have reported it.
    """
    lines = []
    for item in items:
        lines.append(
            {
                "item": item.item,
                "kind": item.kind,
                "where": item.where,
                "the released code": item.does,
                "the paper": item.paper,
                "read": item.read,
                "cost": numbers(item, costs, spreads) or f"no number: {item.without}",
                "evidence": item.evidence,
                "inference": item.inference,
                "public reports": "; ".join(map(cited, item.reports)),
            }
        )
    return DataFrame(lines).set_index("item")


def numbers(item: Item, costs: DataFrame, spreads: DataFrame) -> str:
    """Return the numbers of an item in words; nothing where it has no pairs."""
    said = []
    for pair in item.costs:
        line = costs.loc[(item.item, pair.what)]
        interval = f"({line['low']:.2f} to {line['high']:.2f}, {line['verdict']})"
        said.append(f"{pair.what}: {line['difference']:+.2f} {interval}")
    for pair in item.spreads:
        ratio = spreads.loc[(item.item, pair.what), "ratio"]
        times = f"std times {ratio:.2f}"
        if math.isnan(ratio):
            times = "no spread to compare with"
        said.append(f"{pair.what}: {times}")
    return "; ".join(said)


def cited(report: Report) -> str:
    """Return a report in words."""
    return f"{report.says} ({report.where}, {report.opened})"


def quoted(items: Iterable[Item]) -> DataFrame:
    """Return the accuracies that reports copy, in [0, 1], with the report's address as `table`."""
    lines = []
    for item in items:
        for report in item.reports:
            lines += [{"variant": "", **line, "table": report.where} for line in report.quotes]
    found = DataFrame(lines)
    found[["mean", "std"]] /= 100
    return found
