"""Ours against published numbers: within or beyond what seeds explain, not run, or not comparable.

Ours are lines with the columns of OURS, one per number, in percent: `table` of the pFedMoAP paper
("Table 1"); `dataset`, `method` and `variant` as data/published.csv spells them (no variant:
empty); `domain` as spelled there ("Clipart", "Average"; empty where the table has none); mean and
sample std over a number of seeds. `lines` makes them from runs.

Published standard deviations hold less than ours may: the released code draws the split and the
shots from fixed numbers, so that seeds change only initialisation and order (D18). Runs of one
fixed split are what to compare with them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pandas import DataFrame, Series
from scipy import stats

from fpl.data.datasets import DATASETS
from fpl.data.files import atomic_write
from fpl.experiments import tables
from fpl.experiments.settings import Data
from fpl.experiments.stats import Sample, joint
from fpl.experiments.tables import PAPER, PRINTED, published, published_name

KEY = ["table", "dataset", "domain", "method", "variant"]
OURS = [*KEY, "mean", "std", "seeds"]
SEEDS = 3  # of every mean and std in the pFedMoAP paper


@dataclass(frozen=True)
class Place:
    """Where a table of params.yaml stands in the pFedMoAP paper, and how that spells its rows.

    table: of the paper. key: the column of the runs whose values tell its rows apart.
    spelling: the method and the variant that are printed, by value of the key. A method that is
    not in it has its printed name and no variant.
    """

    table: str
    key: str
    spelling: Mapping[Any, tuple[str, str]]


LOCAL = {"coop": ("CoOp", "local")}
GATES = {
    "linear, 3 experts": ("pFedMoAP ablation", "linear projection gating, 3 experts"),
    "linear, 10 experts": ("pFedMoAP ablation", "linear projection gating, 10 experts"),
    "attention, aggregated": ("pFedMoAP ablation", "attention gating, aggregated on the server"),
}
EXPERTS = {k: ("pFedMoAP", f"K+1={k + 1} experts") for k in range(40)}
SIZES = {32: "4.2K", 64: "16.6K", 128: "66.0K", 256: "263.2K", 512: "1.1M", 1024: "4.2M"}
WIDTHS = {d: ("pFedMoAP", f"d_feature={d}, gating {n} params") for d, n in SIZES.items()}
TABLE1 = Place("Table 1", "method", LOCAL | {"pfedmoap": ("pFedMoAP", "lambda=0.5")})
PLACES = {  # by the table's name in params.yaml
    "table1": TABLE1,
    "table2": Place("Table 2", "method", LOCAL),
    "table3": Place("Table 3", "method", LOCAL),
    "table7": Place("Table 7", "row", GATES),
    "table8": Place("Table 8", "n_experts", EXPERTS),
    "d_gate": Place("Table 9", "d_gate", WIDTHS),
    "figure5": Place("Figure 5", "n_experts", EXPERTS),
}
MAIN = ("Table 1", "pFedMoAP", "lambda=0.5")
SAME_RUN = {  # numbers that the paper prints again in another table: (table, method, variant)
    ("Table 6", "PromptFL", "no DP"): ("Table 1", "PromptFL", ""),
    ("Table 6", "PromptFL+FedProx", "no DP"): ("Table 1", "Prompt+FedProx", ""),
    ("Table 6", "pFedMoAP", "no DP"): MAIN,
    ("Table 7", "pFedMoAP", "attention gating, kept local (default)"): MAIN,
    ("Table 9", "pFedMoAP", "d_feature=128, gating 66.0K params"): MAIN,
    ("Table 8", "pFedMoAP", "K+1=20 experts"): ("Table 3", "pFedMoAP", ""),
}
LOADER = "images and labels look unrelated, as they are in the released loader (D1, D2)"
NOTE = "read in a third-party note: no spread, and the protocol is not settled"
# What can never be compared: a query of published lines, and why; the first one that holds counts.
# `by` is the first word of the paper.
NEVER = {
    "metric.str.contains('parameters')": "a number of parameters, no accuracy",
    "by == 'pFedMoAP' and table in ('Table 3', 'Table 4', 'Table 8')": (
        f"{LOADER}: the pFedMoAP row is what a guess of each client's most frequent label scores, "
        "and ZS-CLIP is at chance (notebook 20)"
    ),
    "table == 'Figure 5'": "read off a plot: no exact value and no spread",
    "by == 'PromptFL'": (
        "one global model on the whole test set, without spread; "
        "here each client has its own test images"
    ),
    "by in ('FedMGP', 'pFedMMA') and dataset in ('DomainNet (10 classes)', 'Office-Caltech10')": (
        f"{LOADER}, of which this paper's code has a copy; no spread over seeds"
    ),
    "by == 'pFedMMA'": f"{NOTE}; a mean of seven data sets",
    "by == 'Fed-Duet'": "continual learning: classes or domains arrive one after the other",
    "by == 'pFedMoAP' and table == 'Table 1' and variant == 'lambda=0.0'": (
        "run in our own form only: it stands in notebook 11"
    ),
    "variant.str.startswith('eps')": (
        "neither the clipping norm, and so the noise, nor the accountant is published (notebook 19)"
    ),
    "metric == 'CM_%'": "a score made of local, base and novel accuracy",
    "by == 'FedMGP' and table == 'Table 1'": (
        "other protocol (base classes only, E = 2, lr 0.001, batch 8, ViT-B/16), no spread"
    ),
    "by == 'FedMGP'": "other protocol (T = 100, E = 2, ViT-B/16), no spread",
    "by == 'DP-FPL'": (
        "other protocol (T = 100 or 200, batch 32, lr 1e-4) and the mean of the last ten epochs"
    ),
    "by == 'TOFA'": f"{NOTE}; its backbone is not stated there",
    "by == 'FedDnC' and metric == 'HM_%'": (
        "a harmonic mean of accuracies under another protocol (8 shots, T = 100), no spread"
    ),
    "by in ('FedDnC', 'TRIP')": (
        "domain generalisation, tested on a domain that no client has; no spread"
    ),
    "by == 'FedMVP'": f"{NOTE}; a mean of nine data sets",
}
# What to know of numbers that are compared: all that hold.
CAVEATS = {
    "table in ('Table 1', 'Table 6', 'Table 7', 'Table 9')": (
        "shots and batch size are not stated in the paper"
    ),
    "table == 'Table 2'": (
        "which Dirichlet partition, and how many experts, is not stated in the paper"
    ),
    "table == 'Table 2' and method == 'pFedMoAP'": (
        "the released code ends with an error at this participation (D3)"
    ),
    "method in ('Prompt+FedProx', 'PromptFL+FedProx')": (
        "the released proximal term has no gradient (D5)"
    ),
    "method in ('PromptFL+FT', 'Prompt+FedPer', 'Prompt+FedAMP')": (
        "hyperparameters are not published"
    ),
    "method == 'pFedPrompt'": "ours is a reconstruction, as the authors' code is not public",
}

# Rows of Table 1 whose clients train a prompt, or part of one, for themselves.
LOCAL_ROWS = ("CoOp", "PromptFL+FT", "Prompt+FedPer", "Prompt+FedAMP")


def local_rows() -> DataFrame:
    """Return rows of the published Table 1, in percent, as means over its data sets.

    The rows are those of LOCAL_ROWS, and pFedMoAP's with lambda 0. All are tested on a client's own
    classes, which are disjoint from others'.
    """
    theirs = published().fillna({"variant": ""}).query("paper == @PAPER and table == 'Table 1'")
    own = theirs["method"].isin(LOCAL_ROWS)
    without = (theirs["method"] == "pFedMoAP") & (theirs["variant"] == "lambda=0.0")
    rows = theirs[own | without].groupby(["method", "variant"], sort=False)["mean"]
    return rows.agg(["mean", "min", "max", "size"]).rename(columns={"size": "data sets"}).round(2)


def question() -> str:
    """Return what is hard to understand in Table 1, with its numbers from data/published.csv."""
    means = local_rows()["mean"]
    own = means.loc[[*LOCAL_ROWS]]
    gate = means["pFedMoAP"].iloc[0]
    return (
        f"prompts trained on the client's own classes have {own.min():.0f} to {own.max():.0f} % on "
        f"them, mean over data sets, where pFedMoAP with lambda 0 has {gate:.0f} %: were these "
        "rows run in this protocol, or carried over from another paper's table?"
    )


def caveats() -> dict[str, str]:
    """Return CAVEATS, and the `question` on the rows that it is about."""
    return {**CAVEATS, f"table == 'Table 1' and method in {LOCAL_ROWS}": question()}


def lines(runs: DataFrame, place: Place, dataset: str, domain: str = "") -> DataFrame:
    """Return ours of one table and data set: a line per value of the key that has a printed name.

    For one domain, give the lines of its clients.
    """
    spelling = spelling_of(runs, place)
    found = tables.summary(runs[runs[place.key].isin([*spelling])], place.key)
    found[["method", "variant"]] = [spelling[value] for value in found.index]
    found[["table", "dataset", "domain"]] = place.table, dataset, domain
    return found.reset_index(drop=True)[OURS]


def spelling_of(runs: DataFrame, place: Place) -> dict[Any, tuple[str, str]]:
    """Return the method and the variant that the paper prints, by value of the place's key."""
    spelling = {}
    if place.key == "method":
        for method, title in tables.titles(runs).items():
            spelling[method] = (published_name(title), "")
    return spelling | {**place.spelling}


def of_tables(runs: Mapping[str, DataFrame]) -> DataFrame:
    """Return ours of several tables on all their data sets; of domains the average and each.

    runs: by the table's name in PLACES. Of data sets that the paper has, what it does not print is
    left out.
    """
    found = []
    for name, whole in runs.items():
        place = PLACES[name]
        spelt = whole[whole[place.key].isin([*spelling_of(whole, place)])]
        for data, part in tables.parts(spelt).items():
            found += of_data(part, place, data)
    ours = pd.concat(found, ignore_index=True)
    printed = among(ours, candidates().query("paper == @PAPER"), KEY)
    drawn = ~ours["dataset"].isin(PRINTED.values())
    return ours[drawn | printed].reset_index(drop=True)


def of_data(runs: DataFrame, place: Place, data: str) -> list[DataFrame]:
    """Return the `lines` of the runs on one data set: of all clients, and of each domain's."""
    if data == "office_caltech10" and place.table == "Table 3":
        place = replace(place, table="Table 4")
    dataset = PRINTED.get(data, data)
    domains = DATASETS[data].domains if data in DATASETS else {}
    found = [lines(runs, place, dataset, "Average" if domains else "")]
    for domain, part in runs.groupby("domain"):
        if domain in domains:
            found.append(lines(part, place, dataset, domains[domain]))
    return found


def among(lines: DataFrame, others: DataFrame, columns: list[str]) -> np.ndarray:
    """Return for each line whether others have one with the same values in some columns."""
    index = pd.MultiIndex.from_frame
    return index(lines[columns]).isin(index(others[columns]))


def real(ours: DataFrame) -> bool:
    """Return whether all numbers of ours are of data sets that the paper has."""
    return bool(ours["dataset"].isin(PRINTED.values()).all())


def changed(sets: Iterable[Data]) -> list[str]:
    """Return which data sets of the paper have other numbers of images here than are published.

    As where a domain is missing, or the files that say a split. Only sets whose images are listed
    here are looked at.
    """
    found = []
    manifests = {data.name: data.manifest for data in sets}  # one for all features of a set
    for name, manifest in manifests.items():
        if name in PRINTED and manifest.exists():
            best = DATASETS[name].layouts[DATASETS[name].best]
            here = pd.read_csv(manifest)["split"].value_counts()
            if (here.get("train"), here.get("test")) != (best.train, best.test):
                found.append(name)
    return found


def candidates() -> DataFrame:
    """Return the published lines that are compared or listed.

    These are all of the pFedMoAP paper and, of the methods of its tables and FedPGP, what other
    papers print in percent: accuracies and scores.
    """
    theirs = published()
    theirs["by"] = theirs["paper"].str.split().str[0]
    methods = [*tables.main_results()["method"], "FedPGP"]
    listed = theirs["method"].isin(methods) & theirs["metric"].str.endswith("%")
    theirs = theirs[(theirs["paper"] == PAPER) | listed].reset_index(drop=True)
    theirs = theirs.fillna({"variant": "", "dataset": "", "domain_or_split": ""})
    split = theirs["domain_or_split"]
    return theirs.assign(domain=split.where(~split.str.startswith("local test"), ""))


def checked(ours: DataFrame) -> DataFrame:
    """Return ours with empty text for missing names.

    Raises ValueError for missing columns, for two lines of one name and for accuracies in [0, 1].
    """
    missing = ", ".join(column for column in OURS if column not in ours)
    if missing:
        raise ValueError(f"our numbers lack the columns {missing}: make them with published.lines")
    ours = ours[OURS].fillna({"domain": "", "variant": ""})
    twice = ours[ours.duplicated(KEY)]
    if len(twice):
        raise ValueError(f"two numbers of ours for {name_of(twice)}: give one for each")
    if len(ours) and ours["mean"].max() <= 1:
        raise ValueError("no number of ours is above 1: give accuracies in percent")
    return ours


def name_of(lines: DataFrame) -> str:
    """Return what the first line is called in a message."""
    return ", ".join(filter(None, lines[KEY].iloc[0]))


def compare(ours: DataFrame, comparable: bool) -> DataFrame:
    """Return a line for each published number of `candidates`, with ours, a verdict and its reason.

    comparable: False where ours are of other data or another CLIP, so that there is no verdict.

    The difference is ours minus theirs, with its 95 % interval. Verdicts are "inside" (the joint
    interval of `stats.joint` holds 0), "outside", "not run" (there is none of ours) and "not
    comparable" (a rule of NEVER, or one side has no std, or ours are not comparable). Means and
    stds of ours are rounded to two decimals first, as those in print are, which are over three
    seeds. A number that the paper prints again (SAME_RUN) is compared with the same run of ours.
    No correction is made for the many comparisons: of 20 equal numbers one falls outside. Only the
    pFedMoAP paper is looked up in ours. Ours of a method that a table does not print (FedOTP in
    Table 2) have no line.

    Raises ValueError for lines that `checked` refuses and, where comparable, for a misspelled line.
    """
    theirs = candidates().rename(columns={"mean": "published_mean", "std": "published_std"})
    ours = checked(ours)
    unknown = ours[misspelled(ours, theirs)]
    if comparable and len(unknown):
        name = name_of(unknown)
        raise ValueError(f"no published number for {name}: spell it as data/published.csv does")
    rounded = with_repeated(ours).round({"mean": 2, "std": 2}).assign(paper=PAPER)
    rounded = rounded.rename(columns={"mean": "ours_mean", "std": "ours_std"})
    merged = theirs.merge(rounded, "left", on=["paper", *KEY], validate="many_to_one")
    never = reasons(merged, NEVER)
    known = reasons(merged, caveats())
    judged = []
    for line, no, but in zip(merged.itertuples(), never, known):
        judged.append(judge(line, comparable, no, but))
    numbers = ["published_mean", "published_std", "ours_mean", "ours_std", "seeds"]
    shown = merged[[*merged.loc[:, "paper":"metric"], *numbers]].astype({"seeds": "Int64"})
    return shown.join(DataFrame(judged)).round({"difference": 2, "low": 2, "high": 2})


def misspelled(ours: DataFrame, theirs: DataFrame) -> Series:
    """Return which lines of ours have a place, a method or a variant that is not printed.

    A variant is looked for only in tables that print the method.
    """
    paper = theirs[theirs["paper"] == PAPER]
    place = among(ours, paper, ["table", "dataset", "domain"])
    method = among(ours, paper, ["table", "method"])
    variant = among(ours, paper, ["table", "method", "variant"])
    return ~(place & (variant | ~method) & ours["method"].isin(theirs["method"]))


def with_repeated(ours: DataFrame) -> DataFrame:
    """Return ours, and what the paper prints again unless ours have a line of its own for it."""
    columns = ["table", "method", "variant"]
    found = [ours]
    for again, first in SAME_RUN.items():
        same = ours[(ours[columns] == first).all(axis=1)]
        found.append(same.assign(**dict(zip(columns, again))))
    return pd.concat(found).drop_duplicates(KEY)


def reasons(theirs: DataFrame, rules: Mapping[str, str]) -> list[list[str]]:
    """Return for each line the reasons whose query holds, in the order of the rules."""
    holds = DataFrame({why: theirs.eval(query) for query, why in rules.items()})
    return [list(holds.columns[line]) for line in holds.to_numpy(bool)]


def judge(line: Any, comparable: bool, never: list[str], caveats: list[str]) -> dict[str, Any]:
    """Return difference, interval, verdict and reason of one line of `compare`."""
    seeds = 0 if math.isnan(line.seeds) else int(line.seeds)
    ours = Sample(line.ours_mean, line.ours_std, seeds)
    theirs = Sample(line.published_mean, line.published_std, SEEDS)
    found = joint(ours, theirs).to_dict()
    apart = {"inside": "no further apart than seeds explain"}
    apart["outside"] = "further apart than seeds explain"
    unjudged = {"low": math.nan, "high": math.nan, "verdict": "not comparable"}
    if never:
        return found | unjudged | {"why": never[0]}
    if not seeds:
        return found | unjudged | {"verdict": "not run", "why": "there is no number of ours"}
    if not comparable:
        return found | unjudged | {"why": "ours are of other data or another CLIP"}
    if found["verdict"] == "unknown":
        return found | unjudged | {"why": "no spread: one seed, or none printed"}
    return found | {"why": "; ".join([apart[found["verdict"]], *caveats])}


def orders(ours: DataFrame, published: DataFrame) -> tuple[DataFrame, dict[str, float]]:
    """Compare which of two methods is better, where the numbers themselves cannot be compared.

    ours: as for `compare`; the lines of the same table count.
    published: the lines of one table of `tables.published`.

    A method is known by its name and variant. Its number is the mean over data sets: those that
    both sides have or, if there are none (the demo), all; a method that lacks one is left out.
    Tables by domain count by their average. The std of a mean takes the data sets as independent.
    A difference is "apart" if its Welch interval leaves out 0. That two rows of ours share their
    seeds is not used (`stats.paired` does), and nothing is corrected for the many pairs.

    Returns a line per pair, and a summary: pairs; agree (same sign); clear (apart on both sides);
    clear_agree; tau (Kendall's tau-b of the means). Raises ValueError where the two have fewer than
    two methods in common, or `published` is not of one table.
    """
    theirs = published.assign(domain=published["domain_or_split"], seeds=SEEDS)
    theirs = theirs.fillna({"variant": ""})
    if len(theirs[["paper", "table"]].drop_duplicates()) != 1:
        raise ValueError("an order of methods is that of one table: choose one paper and table")
    ours = checked(ours)
    ours = ours[ours["table"] == theirs["table"].iloc[0]]
    shared = {*ours["dataset"]} & {*theirs["dataset"]}
    if shared:
        ours = ours[ours["dataset"].isin(shared)]
        theirs = theirs[theirs["dataset"].isin(shared)]
    both = pd.concat({"published": levels(theirs), "ours": levels(ours)}, axis=1, join="inner")
    if len(both) < 2:
        raise ValueError(
            "ours and the published table share fewer than two methods: "
            "spell them as data/published.csv does"
        )
    pairs = DataFrame([pair(both.loc[[*two]]) for two in combinations(both.index, 2)])
    clear = pairs[pairs["published_apart"] & pairs["ours_apart"]]
    tau = stats.kendalltau(both["published", "mean"], both["ours", "mean"]).statistic
    counts = {"pairs": len(pairs), "agree": int(pairs["same"].sum())}
    counts |= {"clear": len(clear), "clear_agree": int(clear["same"].sum())}
    return pairs, counts | {"tau": round(float(tau), 4)}


def levels(side: DataFrame) -> DataFrame:
    """Return mean, std and seeds of each (method, variant) over the data sets of one side."""
    average = side["domain"] == "Average"
    if average.any():
        side = side[average]
    wide = side.pivot(index=["method", "variant"], columns="dataset", values=OURS[-3:])
    wide = wide[wide["mean"].notna().all(axis=1)]
    squares = (wide["std"] ** 2).sum(axis=1, skipna=False)
    table = DataFrame({"mean": wide["mean"].mean(axis=1)})
    table["std"] = np.sqrt(squares) / wide["std"].shape[1]
    return table.assign(seeds=wide["seeds"].min(axis=1))


def pair(both: DataFrame) -> dict[str, Any]:
    """Return the line of two methods, from the two lines of their `levels` on both sides."""
    first, second = (" ".join(name).strip() for name in both.index)
    line: dict[str, Any] = {"first": first, "second": second}
    for side in ("published", "ours"):
        a, b = both[side].to_numpy()
        found = joint(Sample(*a), Sample(*b))
        line[f"{side}_difference"] = round(found["difference"], 2)
        line[f"{side}_apart"] = found["verdict"] == "outside"
    same = np.sign(line["published_difference"]) == np.sign(line["ours_difference"])
    return line | {"same": bool(same)}


def save(compared: DataFrame, pairs: DataFrame, folder: Path) -> None:
    """Write against_paper.csv and .json, and the pairs of `orders` as against_paper_orders.csv.

    In JSON it is a list of records, with null for what is missing.
    """
    for name, table in {"against_paper": compared, "against_paper_orders": pairs}.items():
        with atomic_write(folder / f"{name}.csv") as temporary:
            table.to_csv(temporary, index=False, lineterminator="\n")
    records = json.loads(compared.to_json(orient="records"))
    with atomic_write(folder / "against_paper.json") as temporary:
        text = json.dumps(records, indent=1, ensure_ascii=False)
        temporary.write_text(f"{text}\n", encoding="utf-8")
