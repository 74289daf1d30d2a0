"""Ours against published numbers: each within or beyond what seeds explain, or not run, or not comparable, and why.

Ours are lines with the columns of OURS, one per number, in percent: `table` of the pFedMoAP paper ("Table 1"), `dataset`,
`method` and `variant` as data/published.csv spells them (no variant: empty), `domain` as spelled there ("Clipart", "Average";
empty where the table has none), `mean` and sample `std` over `seeds` seeds. `lines` makes them from runs.

Published spreads hold less than ours may: the released code draws split and shots from fixed numbers, so that seeds change only
initialisation and order (D18). Runs of one fixed split are what to compare with them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from fpl.data.files import atomic_write
from fpl.experiments.stats import joint
from fpl.experiments.tables import PAPER, PRINTED, SPELT, TABLES, parts, percent, printed_name, published, summary
from fpl.methods import METHODS

KEY = ["table", "dataset", "domain", "method", "variant"]
OURS = [*KEY, "mean", "std", "seeds"]
SEEDS = 3  # of every mean and std in the pFedMoAP paper
Spelling = Mapping[Any, tuple[str, str]]
# row of ours: method and variant of Table 1; Tables 2 to 4 print pFedMoAP without a variant
MAIN_ROWS: Spelling = {row: (printed_name(row), "") for row in METHODS} | {"coop": ("CoOp", "local")}
TABLE1: Spelling = {**MAIN_ROWS, "pfedmoap": ("pFedMoAP", "lambda=0.5")}
GATES: Spelling = {
    "linear, 3 experts": ("pFedMoAP ablation", "linear projection gating, 3 experts"),
    "linear, 10 experts": ("pFedMoAP ablation", "linear projection gating, 10 experts"),
    "attention, aggregated": ("pFedMoAP ablation", "attention gating, aggregated on the server"),
}
EXPERTS: Spelling = {k: ("pFedMoAP", f"K+1={k + 1} experts") for k in (4, 9, 14, 19, 24, 29, 34, 39)}
SIZES = {32: "4.2K", 64: "16.6K", 128: "66.0K", 256: "263.2K", 512: "1.1M", 1024: "4.2M"}  # of gates of a dimension
WIDTHS: Spelling = {d: ("pFedMoAP", f"d_feature={d}, gating {n} params") for d, n in SIZES.items()}
# table of params.yaml -> table of the paper, how it spells what, and the column that has what
PLACES: dict[str, tuple[str, Spelling, str]] = {
    "table1": ("Table 1", TABLE1, "method"),
    "table2": ("Table 2", MAIN_ROWS, "method"),
    "table3": ("Table 3", MAIN_ROWS, "method"),
    "table7": ("Table 7", GATES, "row"),
    "table8": ("Table 8", EXPERTS, "n_experts"),
    "d_gate": ("Table 9", WIDTHS, "d_gate"),
    "figure5": ("Figure 5", EXPERTS, "n_experts"),
}
DOMAINS = ("domainnet10", "office_caltech10")
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
# What can never be compared: a query of published lines and why; the first that holds. `by` is the first word of the paper.
NEVER = {
    "metric.str.contains('parameters')": "a number of parameters, no accuracy",
    "by == 'pFedMoAP' and table in ('Table 3', 'Table 4', 'Table 8')": f"{LOADER}: the pFedMoAP row is what a guess of each "
    "client's most frequent label scores, and ZS-CLIP is at chance (notebook 20)",
    "table == 'Figure 5'": "read off a plot: no exact value and no spread",
    "by == 'PromptFL'": "one global model on the whole test set, without spread; here each client has its own test images",
    "by in ('FedMGP', 'pFedMMA') and dataset in ('DomainNet (10 classes)', 'Office-Caltech10')": f"{LOADER}, "
    "of which this paper's code has a copy; no spread over seeds",
    "by == 'pFedMMA'": f"{NOTE}; a mean of seven data sets",
    "by == 'Fed-Duet'": "continual learning: classes or domains arrive one after the other",
    "metric == 'CM_%'": "a score made of local, base and novel accuracy",
    "by == 'FedMGP' and table == 'Table 1'": "other protocol (base classes only, E = 2, lr 0.001, batch 8, ViT-B/16), no spread",
    "by == 'FedMGP'": "other protocol (T = 100, E = 2, ViT-B/16), no spread",
    "by == 'DP-FPL'": "other protocol (T = 100 or 200, batch 32, lr 1e-4) and the mean of the last ten epochs",
    "by == 'TOFA'": f"{NOTE}; its backbone is not stated there",
    "by == 'FedDnC' and metric == 'HM_%'": "a harmonic mean of accuracies under another protocol (8 shots, T = 100), no spread",
    "by in ('FedDnC', 'TRIP')": "domain generalisation, tested on a domain that no client has; no spread",
    "by == 'FedMVP'": f"{NOTE}; a mean of nine data sets",
}
# What to know of numbers that are compared.
CAVEATS = {
    "table in ('Table 1', 'Table 6', 'Table 7', 'Table 9')": "shots and batch size are not stated in the paper",
    "table == 'Table 2'": "which Dirichlet partition, and how many experts, is not stated in the paper",
    "table == 'Table 2' and method == 'pFedMoAP'": "the released code ends with an error at this participation (D3)",
    "method in ('Prompt+FedProx', 'PromptFL+FedProx')": "the released proximal term has no gradient (D5)",
    "variant.str.startswith('eps')": "the clipping norm, and so the noise, is not published",
    "method in ('PromptFL+FT', 'Prompt+FedPer', 'Prompt+FedAMP')": "hyperparameters are not published",
    "method == 'pFedPrompt'": "ours is a reconstruction, as the authors' code is not public",
}


def lines(
    runs: pd.DataFrame,
    table: str,
    dataset: str,
    spelling: Spelling = TABLE1,
    key: str = "method",
    domain: str = "",
    rule: str = "last round",
) -> pd.DataFrame:
    """Ours of one table and data set: runs of `fpl.records.frame`, a line per value of `key` that `spelling` has.

    `spelling` gives the published method and variant: {5: ("pFedMoAP", "K+1=5 experts")} where the key is a hyperparameter. For
    one domain, give the lines of its clients.
    """
    found = percent(summary(runs[runs[key].isin(list(spelling))], key, rule))
    names = [spelling[value] for value in found.index]
    own = found.reset_index(drop=True).assign(table=table, dataset=dataset, domain=domain)
    return own.assign(method=[method for method, _ in names], variant=[variant for _, variant in names])[OURS]


def of_tables(runs: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Ours of several tables of params.yaml, by their name in PLACES, on all their data sets; of domains the average and each.

    Of data sets that the paper has, what it does not print is left out.
    """
    found = []
    for name, of_table in runs.items():
        table, spelling, key = PLACES[name]
        for data, of in parts(of_table).items():
            if not of[key].isin(list(spelling)).any():
                continue
            place = "Table 4" if (name, data) == ("table3", "office_caltech10") else table
            dataset = PRINTED.get(data, data)
            found.append(lines(of, place, dataset, spelling, key, "Average" if data in DOMAINS else ""))
            by_domain = of[of["domain"] != ""].groupby("domain") if data in DOMAINS else []
            found += [lines(part, place, dataset, spelling, key, SPELT.get(domain, domain)) for domain, part in by_domain]
    whole = pd.concat(found, ignore_index=True)
    printed = pd.MultiIndex.from_frame(candidates().query("paper == @PAPER")[KEY])
    drawn = ~whole["dataset"].isin(PRINTED.values())
    return whole[drawn | pd.MultiIndex.from_frame(whole[KEY]).isin(printed)].reset_index(drop=True)


def real(ours: pd.DataFrame) -> bool:
    """Whether all numbers of ours are of data sets that the paper has."""
    return bool(ours["dataset"].isin(PRINTED.values()).all())


def candidates() -> pd.DataFrame:
    """Published lines: all of the pFedMoAP paper, and of others the accuracies and scores in percent of methods that are here."""
    theirs = published()
    theirs["by"] = theirs["paper"].str.split().str[0]
    ours = theirs["method"].isin([method for method, _ in TABLE1.values()]) & theirs["metric"].str.endswith("%")
    theirs = theirs[(theirs["paper"] == PAPER) | ours].reset_index(drop=True)
    theirs = theirs.fillna({"variant": "", "dataset": "", "domain_or_split": ""})
    return theirs.assign(domain=theirs["domain_or_split"].where(~theirs["domain_or_split"].str.startswith("local test"), ""))


def checked(ours: pd.DataFrame) -> pd.DataFrame:
    """Ours with empty text for missing names. Raises ValueError for missing columns, doubled lines, and accuracies in [0, 1]."""
    if missing := [column for column in OURS if column not in ours]:
        raise ValueError(f"our numbers lack the columns {', '.join(missing)}: make them with fpl.against.lines")
    ours = ours[OURS].fillna({"domain": "", "variant": ""})
    if (twice := ours.duplicated(KEY)).any():
        raise ValueError(f"two numbers of ours for {_name(ours[twice].iloc[0])}: give one for each")
    if len(ours) and ours["mean"].max() <= 1:
        raise ValueError("no number of ours is above 1: give accuracies in percent")
    return ours


def compare(ours: pd.DataFrame, comparable: bool) -> pd.DataFrame:
    """A line for each published number of `candidates`: theirs, ours, ours minus theirs with its 95 % interval, verdict, why.

    Verdicts: "inside" (the joint interval of `fpl.stats.joint` holds 0), "outside", "not run" (there is none of ours), "not
    comparable" (a rule of NEVER, or one side has no spread, or `comparable` is False: ours are of other data or another CLIP).
    Means and stds of ours are rounded to two decimals first, as printed; the published ones are over three seeds. A number
    that the paper prints again (SAME_RUN) is compared with the same run of ours. No correction is made for the many
    comparisons: of 20 equal numbers one falls outside. Only the pFedMoAP paper is looked up in ours. Ours of a method that a
    table does not print (FedOTP in Table 2) have no line.

    Raises ValueError for lines that `checked` refuses and, where comparable, for a misspelled line of ours.
    """
    theirs, ours = candidates(), checked(ours)
    if comparable and len(unknown := ours[_misspelled(ours, theirs)]):
        raise ValueError(f"no published number for {_name(unknown.iloc[0])}: spell it as data/published.csv does")
    repeated = _repeated(ours).round({"mean": 2, "std": 2}).rename(columns={"mean": "ours_mean", "std": "ours_std"})
    merged = theirs.rename(columns={"mean": "published_mean", "std": "published_std"}).merge(
        repeated.assign(paper=PAPER), on=["paper", *KEY], how="left", validate="many_to_one"
    )
    never, caveats = _why(merged, NEVER), _why(merged, CAVEATS)
    judged = [_judge(line, comparable, no, but) for line, no, but in zip(merged.itertuples(), never, caveats)]
    shown = ["paper", "table", "setting", "dataset", "domain_or_split", "method", "variant", "backbone", "metric"]
    shown += ["published_mean", "published_std", "ours_mean", "ours_std", "seeds"]
    return merged[shown].astype({"seeds": "Int64"}).join(pd.DataFrame(judged)).round({"difference": 2, "low": 2, "high": 2})


def _name(line: pd.Series) -> str:
    return ", ".join(str(line[column]) for column in KEY if line[column] != "")


def _misspelled(ours: pd.DataFrame, theirs: pd.DataFrame) -> pd.Series:
    """Lines of ours at a place, or of a method, that is not printed, or with another variant than the table prints."""
    paper = theirs[theirs["paper"] == PAPER]
    index = pd.MultiIndex.from_frame
    printed = lambda *columns: index(ours[[*columns]]).isin(index(paper[[*columns]]))  # noqa: E731
    variant = ~printed("table", "method") | printed("table", "method", "variant")
    return ~(printed("table", "dataset", "domain") & variant & ours["method"].isin(theirs["method"]))


def _repeated(ours: pd.DataFrame) -> pd.DataFrame:
    """Ours, and what the paper prints again, unless ours have a line of its own for it."""
    where = pd.MultiIndex.from_frame(ours[["table", "method", "variant"]])
    again = [ours[where == run].assign(table=t, method=m, variant=v) for (t, m, v), run in SAME_RUN.items()]
    return pd.concat([ours, *again]).drop_duplicates(KEY)


def _why(theirs: pd.DataFrame, rules: Mapping[str, str]) -> list[list[str]]:
    """For each line the reasons whose query holds, in the order of the rules."""
    holds = {why: theirs.eval(query).to_numpy(bool) for query, why in rules.items()}
    return [[why for why in holds if holds[why][at]] for at in range(len(theirs))]


def _judge(line: Any, comparable: bool, never: list[str], caveats: list[str]) -> dict[str, Any]:
    seeds = 0 if math.isnan(line.seeds) else int(line.seeds)
    found = joint(line.ours_mean, line.ours_std, seeds, line.published_mean, line.published_std, SEEDS)
    only = {"difference": found["difference"], "low": math.nan, "high": math.nan}
    if never:
        return only | {"verdict": "not comparable", "why": never[0]}
    if not seeds:
        return only | {"verdict": "not run", "why": "there is no number of ours"}
    if not comparable:
        return only | {"verdict": "not comparable", "why": "ours are of other data or another CLIP"}
    if found["verdict"] == "unknown":
        return only | {"verdict": "not comparable", "why": "no spread: one seed, or none printed"}
    apart = {"inside": "no further apart than seeds explain", "outside": "further apart than seeds explain"}
    return {**found, "why": "; ".join([apart[found["verdict"]], *caveats])}


def orders(ours: pd.DataFrame, published: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, float]]:
    """Which of two methods is better: published against ours, where the numbers themselves say nothing to each other.

    `published` are lines of one table of `fpl.tables.published()`, `ours` as for `compare`, of which the same table counts; a
    method is known by its name and variant. Its number is the mean over data sets, of those that both have or, if there are
    none (the demo), of all; a method that lacks one is left out. Domain tables count by their average. The std of a mean over
    data sets takes these as independent. A difference is "apart" if its Welch interval leaves out 0: seeds that two rows of
    ours share are not used (`fpl.stats.paired` does), and nothing is corrected for the many pairs.

    Returns a line per pair, and a summary: pairs, agree (same sign), clear (apart in both), clear_agree, and Kendall's tau-b of
    the means. Raises ValueError when the two have fewer than two methods in common, or `published` is not of one table.
    """
    theirs = published.assign(domain=published["domain_or_split"], seeds=SEEDS).fillna({"variant": ""})
    if len(theirs[["paper", "table"]].drop_duplicates()) != 1:
        raise ValueError("the order of methods is that of one table: choose the lines of one paper and table")
    ours = checked(ours)
    ours = ours[ours["table"] == theirs["table"].iloc[0]]
    shared = set(ours["dataset"]) & set(theirs["dataset"])
    a, b = (_levels(side[side["dataset"].isin(shared)] if shared else side) for side in (theirs, ours))
    both = a.join(b, lsuffix="_published", rsuffix="_ours", how="inner")
    if len(both) < 2:
        raise ValueError("ours and the published table share fewer than two methods: spell them as data/published.csv does")
    pairs = pd.DataFrame([_pair(both.loc[first], both.loc[second]) for first, second in combinations(both.index, 2)])
    clear = pairs[pairs["published_apart"] & pairs["ours_apart"]]
    tau = stats.kendalltau(both["mean_published"], both["mean_ours"]).statistic
    counts = {"pairs": len(pairs), "agree": int(pairs["same"].sum())}
    return pairs, counts | {"clear": len(clear), "clear_agree": int(clear["same"].sum()), "tau": round(float(tau), 4)}


def _levels(side: pd.DataFrame) -> pd.DataFrame:
    """mean, std and seeds of each (method, variant) over data sets."""
    average = side["domain"] == "Average"
    wide = side[average | ~average.any()].pivot(index=["method", "variant"], columns=["dataset", "domain"], values=OURS[-3:])
    wide = wide[wide["mean"].notna().all(axis=1)]
    std = np.sqrt((wide["std"] ** 2).sum(axis=1, skipna=False)) / wide["std"].shape[1]
    return pd.DataFrame({"mean": wide["mean"].mean(axis=1), "std": std, "seeds": wide["seeds"].min(axis=1)})


def _pair(first: pd.Series, second: pd.Series) -> dict[str, Any]:
    line: dict[str, Any] = {"first": " ".join(first.name).strip(), "second": " ".join(second.name).strip()}
    for side in ("published", "ours"):
        numbers = [row[f"{column}_{side}"] for row in (first, second) for column in ("mean", "std", "seeds")]
        found = joint(*numbers)
        line |= {f"{side}_difference": round(found["difference"], 2), f"{side}_apart": found["verdict"] == "outside"}
    return line | {"same": bool(np.sign(line["published_difference"]) == np.sign(line["ours_difference"]))}


def save(compared: pd.DataFrame, pairs: pd.DataFrame | None = None, folder: Path = TABLES) -> None:
    """against_paper.csv and .json (a list of records, null for what is missing), and the pairs as against_paper_orders.csv."""
    tables = {"against_paper": compared} | ({} if pairs is None else {"against_paper_orders": pairs})
    for name, table in tables.items():
        with atomic_write(folder / f"{name}.csv") as temporary:
            table.to_csv(temporary, index=False, lineterminator="\n")
    records = json.loads(compared.to_json(orient="records"))
    with atomic_write(folder / "against_paper.json") as temporary:
        temporary.write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
