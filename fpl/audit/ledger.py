"""The ledger of released code: what it does where its paper says something else, and what that costs, from pairs of rows.

The words and the labels of the rows stand in data/ledger.yaml, whose head says what its parts mean; the runs are those of TABLES
in params.yaml. The two rows of a pair differ by the switch that it names and by nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import yaml
from scipy.stats import f as f_distribution

from fpl.data.files import ROOT
from fpl.experiments import records, stats

T = TypeVar("T")
LEDGER = ROOT / "data" / "ledger.yaml"
TABLES = ("ledger", "ledger_views", "ledger_seeds", "ledger_domains")
ONE_RUN = "rounds of one run"


@dataclass(frozen=True)
class Pair:
    """Labels of two rows; `switch` names what differs (settings, a row of fpl.released), `rule` how `released` is reported."""

    what: str
    released: str
    paper: str
    switch: Sequence[str] = ()
    rule: str = "last round"


@dataclass(frozen=True)
class Item:
    """A defect, or a difference: its words, and the pairs that give it numbers, or why there are none (`without`)."""

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
    """Raises ValueError for an entry with a part too many or too few."""
    items = []
    for entry in yaml.safe_load(path.read_text()):
        pairs = {key: [_made(Pair, pair, path) for pair in entry.get(key, ())] for key in ("costs", "spreads")}
        items.append(_made(Item, entry | pairs, path))
    return items


def _made(cls: type[T], content: dict[str, Any], path: Path) -> T:
    try:
        return cls(**content)
    except TypeError as error:
        raise ValueError(f"{path}, {next(iter(content.values()))}: {str(error).partition(' ')[2]}") from None


def runs(results: str | Path = "results") -> pd.DataFrame:
    """The runs of all tables of the ledger; a label belongs to one row of one of them."""
    return pd.concat([records.of_table(name, results) for name in TABLES], ignore_index=True)


def best_round(runs: pd.DataFrame) -> pd.DataFrame:
    """A rule of the released code (D16): of each run of a row the round with the highest mean over clients, on test images."""
    best = runs.groupby(["seed", "round"])["accuracy"].mean().groupby("seed").idxmax()
    return runs[pd.MultiIndex.from_frame(runs[["seed", "round"]]).isin(best)]


RULES: dict[str, Callable[[pd.DataFrame], pd.DataFrame]] = stats.RULES | {"best round": best_round}


def difference(runs: pd.DataFrame, pair: Pair) -> pd.Series:
    """`stats.paired` of the two rows, `paper` after its last round. Raises as that does."""
    sides = {"released": RULES[pair.rule], "paper": stats.last_round}
    both = [rule(runs[runs["row"] == getattr(pair, side)]).assign(row=side) for side, rule in sides.items()]
    return stats.paired(pd.concat(both), "released", "paper", key="row")


def costs(items: Iterable[Item], runs: pd.DataFrame) -> pd.DataFrame:
    """A line per pair: accuracy of `released` minus that of `paper`, in points, with both intervals of `stats.paired`."""
    lines = []
    for item in items:
        for pair in item.costs:
            found = (100 * difference(runs, pair)[["mean", "low", "high", "t_low", "t_high"]]).round(2) + 0.0  # no -0.0
            named = {"item": item.item, "what": pair.what, **found.rename({"mean": "difference"})}
            lines.append(named | {"evidence": item.evidence})
    return pd.DataFrame(lines).set_index(["item", "what"])


def spreads(items: Iterable[Item], runs: pd.DataFrame) -> pd.DataFrame:
    """A line per pair: two standard deviations in points, and the ratio `released` / `paper` with its 95 % interval.

    That of `paper` is over seeds, and so is that of `released`, or over the last five rounds of one run (the root of its mean
    square over seeds). The interval is that of the variance ratio of two normal samples (F); rounds of one run are no sample.
    """
    lines = []
    for item in items:
        for pair in item.spreads:
            released, paper = (runs[runs["row"] == label] for label in (pair.released, pair.paper))
            over, n = stats.by_seed(paper, "row").std(), paper["seed"].nunique()
            found = last_rounds(released) if pair.rule == ONE_RUN else stats.by_seed(released, "row").std()
            far = math.nan if pair.rule == ONE_RUN else math.sqrt(f_distribution.ppf(0.975, n - 1, n - 1))
            ratio = found / over
            line = {"over seeds": 100 * over, "as released": 100 * found, "ratio": ratio, "low": ratio / far, "high": ratio * far}
            lines.append({"item": item.item, "what": pair.what, **line})
    return pd.DataFrame(lines).set_index(["item", "what"]).round(2)


def last_rounds(runs: pd.DataFrame) -> float:
    """Standard deviation of the last five rounds' means over clients, of a row: root of the mean square over its seeds."""
    late = runs[runs["round"] > runs["round"].max() - 5]
    return math.sqrt(late.groupby(["seed", "round"])["accuracy"].mean().groupby("seed").var().mean())


def words(items: Iterable[Item], costs: pd.DataFrame, spreads: pd.DataFrame) -> pd.DataFrame:
    """A line per item: what the code does, what the paper says, what it costs, and what is proven and what is not."""
    lines = []
    for item in items:
        numbers = [f"{p.what}: {_points(costs.loc[(item.item, p.what)])}" for p in item.costs]
        numbers += [f"{p.what}: std times {spreads.loc[(item.item, p.what), 'ratio']:.2f}" for p in item.spreads]
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
    return pd.DataFrame(lines).set_index("item")


def _points(line: pd.Series) -> str:
    return f"{line['difference']:+.2f} ({line['low']:.2f} to {line['high']:.2f})"
