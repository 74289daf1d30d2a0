"""Tables in percent, made from runs, beside published numbers; as CSV and Markdown.

`runs` is always a frame of `fpl.experiments.records`. Runs on several data sets give a table with a
part for each, one under the other, and a column `data` in front.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from pandas import DataFrame, Series

from fpl.data import world
from fpl.data.datasets import DATASETS
from fpl.data.files import ROOT, atomic_write
from fpl.data.partitions import GLOBAL, is_unseen
from fpl.data.text import cell, markdown
from fpl.experiments import answers, records
from fpl.experiments.notebook import TABLES
from fpl.experiments.stats import (
    ABOVE,
    RUN,
    by_seed,
    holm,
    last_round,
    minus,
    of_single,
    over_seeds,
    paired,
    reporting_rule,
    sentence,
    spread,
    verdict,
)

if TYPE_CHECKING:  # it loads torch, which few tables need
    from fpl.experiments.settings import Source

Make = Callable[..., DataFrame]
Keys = str | Sequence[str]  # a column, or several
PAPER = "pFedMoAP (ICLR 2025, 2410.10114)"
BESIDE = "paper, mean of 5 data sets"
PRINTED = {key: dataset.title for key, dataset in DATASETS.items()}
SPELT = {style: style.capitalize() for style in world.STYLES}  # domains, as they are printed
SPELT |= {key: name for dataset in DATASETS.values() for key, name in dataset.domains.items()}
POINTS = ["mean", "std", "low", "high"]
GENERALISATION = ["local", "base", "novel", "HM"]
SCORES = {  # what stands beside the accuracy, and the column of `with_metrics` that it is made of
    "macro-F1": "macro_f1",
    "worst class": "worst_class",
    "worst client": "worst_client",
    "ECE": "ece",
    "global": GLOBAL,
}
BESIDE_EACH_OTHER = [*SCORES, "HM", "personal", "seen", "unseen", "own"]  # see `results`
OTHER = "on {}"  # the accuracy on another data set, see `with_others`
DECIMALS = {  # columns that Markdown shows with two decimals
    *POINTS,
    *GENERALISATION,
    "accuracy",
    *(f"{name}{end}" for name in BESIDE_EACH_OTHER for end in ("", " low", " high")),
    *(f"{name} std" for name in GENERALISATION),
    *("difference", "noise", "paper", "l2 norm", BESIDE),
    *("worst", "10th percentile", "std over clients"),
    *SPELT.values(),
}

NOTE_REAL = (
    f"{reporting_rule()} The column `paper`, where there is one, has the paper's mean on the same "
    "data. `up` and `down` are the numbers that a participating client sends and receives in the "
    "last round; their bytes are those of single precision."
)
NOTE_OWN = (
    "which no paper has: no value can be compared with a paper's, whose column, where there is "
    f"one, is of other images. {reporting_rule()}"
)
NOTE_DEMO = (
    "The images are drawn and the CLIP is a small one, so no value can be compared with the "
    f"paper's. {reporting_rule()}"
)
NOTE_SHORT = f"{NOTE_DEMO} To be quick: 8 images per class for training, 5 rounds."
NOTE_TABLE1 = (
    f"Table 1 of the paper in small. {NOTE_DEMO} The paper's column is its mean over five data "
    "sets of photographs. `up` and `down` are the numbers that a participating client sends and "
    "receives in the last round; their bytes are those of single precision."
)
NOTE_PAIRED = (
    "Differences in points of percent between two rows, each client compared with itself under the "
    "same seed, over the seeds that both rows have. `low` and `high` are the ends of the interval "
    "that covers both the 95 % interval of a bootstrap over seeds and clients and the 95 % "
    "t-interval over seeds. The verdict is above or below only where both leave out 0. `holm` is "
    "the larger p-value of the two after Holm's adjustment for all comparisons of the table: a "
    "verdict with more than 0.05 there may be one of the false ones that many comparisons bring."
)
NOTE_TRAFFIC = (
    "Accuracy in %, the mean over clients, after each round, with the 95 % t-interval over seeds. "
    "`kB` is what a client has sent and received until then, in single precision, the mean over "
    "all clients, whether they took part or not."
)
NOTE_CLIENTS = (
    "How unequal clients are: accuracy in % of the worst client of a run, the 10th percentile and "
    "the standard deviation over its clients, after the last round, each averaged over seeds."
)
NOTE_RESULTS = (
    "In %, after the last round: means over clients, and of these over seeds with their 95 % "
    "t-interval (low, high)."
)
NOTE_GLOBAL = (
    f"{NOTE_RESULTS} `personal` is the accuracy of each client's model on its own test images, "
    "`global` that on the test images of all clients, and HM their harmonic mean, of each seed."
)
NOTE_UNSEEN = (
    f"{NOTE_RESULTS} `seen` is the mean over the clients that train, `unseen` over those that "
    "never do and are tested with what the server sends, on their own test images. `down` is how "
    "many numbers a client receives. Where it is 0, and where clients are tested with prompts of "
    "their own (FedAMP, FedPHA), an unseen client has what every client begins with. Rows that use "
    "a client's own training images do so for unseen clients, too."
)
NOTE_OTHERS = (
    f"{NOTE_RESULTS} `own` is the accuracy of each client's model on its own test images. The "
    "other columns have it on all test images of other data sets, under their class names; "
    "nothing was trained there. A row that is bound to the classes of training has none."
)
NOTE_LEDGER = (
    "What it costs to do as the released code does: accuracy with it minus accuracy without it. "
    f"{NOTE_PAIRED}"
)
NOTE_LEDGER_SPREAD = (
    "Standard deviations in points of percent: over seeds, and what the released code makes of "
    "them; and their ratio, with its 95 % interval where it has one."
)
NOTE_LEDGER_ITEMS = (
    "Where released code does something else than its paper says, or something of which the paper "
    "says nothing; the cost in points of percent is that of the table `ledger`."
)


def note(runs: DataFrame, drawn: str) -> str:
    """Return the sentences above a table: `drawn` for runs on drawn images, else what is true."""
    if runs["images"].isin(PRINTED).any():
        return NOTE_REAL
    if runs["images"].isin(world.WORLDS).all():
        return drawn
    names = ", ".join(map(cell, runs["data"].unique()))
    return f"The images are those of {names}, {NOTE_OWN}"


def titles(runs: DataFrame) -> dict[str, str]:
    """Return the printed name of every method and control of the runs, by its key."""
    return runs.groupby("method", sort=False)["title"].first().to_dict()


def published() -> DataFrame:
    """Return data/published.csv; a mean that is no number, such as "4.2K", is nan."""
    table = pd.read_csv(ROOT / "data" / "published.csv")
    return table.assign(mean=pd.to_numeric(table["mean"], errors="coerce"))


def published_name(title: str) -> str:
    """Return a method's name as the papers print it, from the printed name that we give it."""
    return title.removesuffix(" (reconstruction)")


def main_results() -> DataFrame:
    """Return the published lines of Tables 1 to 4 of the pFedMoAP paper, each of a whole data set.

    Of tables by domain that is the average. pFedMoAP has its main variant alone.
    """
    lines = published().query("paper == @PAPER and variant != 'lambda=0.0'")
    lines = lines[lines["table"].isin(["Table 1", "Table 2", "Table 3", "Table 4"])]
    split = lines["domain_or_split"]
    return lines[split.str.startswith("local test") | (split == "Average")]


def same_data(lines: DataFrame, runs: DataFrame) -> DataFrame:
    """Return the published lines that are of the data sets of the runs, of which none may be."""
    return lines[lines["dataset"].isin(runs["data"].map(PRINTED))]


def parts(runs: DataFrame) -> dict[str, DataFrame]:
    """Return the runs on each data set, in their order."""
    return {str(name): part for name, part in runs.groupby("data", sort=False)}


def several(make: Make) -> Make:
    """Let a function of runs on one data set take those on several, as this module says."""

    @functools.wraps(make)
    def made(runs: DataFrame, *arguments, **named) -> DataFrame:
        if runs.empty:
            raise ValueError("there are no runs to make a table of: choose other rows")
        if runs["data"].nunique() == 1:
            return make(runs, *arguments, **named)
        tables = {}
        for name, part in parts(runs).items():
            tables[name] = make(part, *arguments, **named)
        return pd.concat(tables, names=["data"])

    return made


def summary(runs: DataFrame, key: Keys = "method") -> DataFrame:
    """Return mean, std and 95 % interval in percent over seeds, a line per value of `key`.

    Each seed counts with its mean over clients.
    """
    table = of_seeds(by_seed(runs, key))
    return (100 * table[POINTS]).assign(seeds=table["seeds"].astype(int))


def of_seeds(values: Series) -> DataFrame:
    """Return what `over_seeds` says of values by seed, the last level of their index."""
    levels = [*range(values.index.nlevels - 1)]
    groups = values.groupby(level=levels, sort=False, dropna=False)
    return groups.apply(lambda seeds: over_seeds(list(seeds))).unstack()


def titled(runs: DataFrame, key: Keys = "method") -> DataFrame:
    """Return `summary` with the printed names of the methods in front, as column `row`."""
    table = summary(runs, key)
    methods = table.index.get_level_values("method")
    table.insert(0, "row", methods.map(titles(runs)))
    return table


def marked(table: DataFrame) -> DataFrame:
    """Return a table whose column `row` says where a row has fewer seeds than others.

    So it does of several tables, too, each of which said it of its own rows.
    """
    seeds = table["seeds"]
    number = seeds.astype(str) + np.where(seeds == 1, " seed", " seeds")
    names = unmarked(table["row"])
    few = names + " (" + number + ")"
    return table.assign(row=names.where(seeds == seeds.max(), few))


def unmarked(names: Series) -> Series:
    """Return names of rows without the number of seeds that `marked` adds."""
    return names.str.replace(r" \(\d+ seeds?\)$", "", regex=True)


def add_paper(table: DataFrame, runs: DataFrame, other: Series, label: str) -> None:
    """Add the paper's means on the same data set to a table of methods, as column `paper`.

    other: where the paper does not have the images, as those of a drawn world, these means by
    method stand in their place, in a column called `label`. Other papers' data sets have no such
    column.
    """
    names = table["row"].map(published_name)
    same = same_data(main_results(), runs).set_index("method")["mean"]
    if not same.empty:
        table["paper"] = names.map(same)
    elif not runs["images"].isin(PRINTED).all():
        table[label] = names.map(other)


@several
def table1(runs: DataFrame) -> DataFrame:
    """Return Table 1: all methods beside the paper's numbers, and what they send and receive.

    A drawn world stands beside the mean of the paper's five data sets.
    """
    theirs = main_results().query("table == 'Table 1'")
    table = titled(runs)
    add_paper(table, runs, theirs.groupby("method")["mean"].mean(), BESIDE)
    table = marked(table.join(moved(runs, ["method"])).round(2))
    return with_bytes(table, runs)


@several
def orders(runs: DataFrame) -> DataFrame:
    """Return of how many pairs of methods Table 1 has the paper's order: pairs, same, share in %.

    A pair counts by its means, however near they are. Without a pair, as on data sets of which the
    paper prints nothing, the share is nan.
    """
    table = table1(runs)
    table["printed"] = table.get("paper", table.get(BESIDE, np.nan))
    both = table.dropna(subset="printed")
    ours, theirs = both["mean"].to_numpy(), both["printed"].to_numpy()
    first, second = np.triu_indices(len(both), 1)
    our_order = np.sign(ours[first] - ours[second])
    their_order = np.sign(theirs[first] - theirs[second])
    same = our_order == their_order
    share = 100 * same.mean() if same.size else np.nan
    line = {"pairs": len(same), "same": int(same.sum()), "share": share}
    what = pd.Index(["orders"], name="what")
    return DataFrame([line], index=what).round(1)


@several
def beside(runs: DataFrame, dataset: str) -> DataFrame:
    """Return methods and controls beside the paper's numbers, then the means over domains.

    A domain's mean is that over its clients.

    dataset: what a drawn world stands beside, as Tables 2 to 4 of the paper call it.
    """
    theirs = main_results().query("dataset == @dataset").set_index("method")["mean"]
    table = titled(runs)
    add_paper(table, runs, theirs, f"paper, {dataset}")
    for domain, part in runs[runs["domain"] != ""].groupby("domain"):
        name = SPELT.get(domain, domain)  # of one's own domains one may be called "low", say
        table[f"domain {name}" if name in table else name] = summary(part)["mean"]
    return marked(table.round(2))


def with_uploads(runs: DataFrame) -> DataFrame:
    """Return runs with a column `uploads`: what is done to what clients send, in words."""
    clipped = runs["mechanism"] == "clipping"
    noisy = "clipped, epsilon " + runs["epsilon"].map("{:g}".format)
    plain = clipped.map({True: "clipped", False: "untouched"})
    return runs.assign(uploads=plain.where(runs["epsilon"] == 0, noisy))


@several
def table6(runs: DataFrame) -> DataFrame:
    """Return Table 6: methods by what is done to uploads, the noise, the paper's numbers.

    noise: the multiplier, its standard deviation over the clipping norm; rows of a method stand in
    its order. A drawn world stands beside the mean of the paper's data sets.
    """
    theirs = published().query("paper == @PAPER and table == 'Table 6'")
    same = same_data(theirs, runs)
    label = BESIDE if same.empty else "paper"
    lines = theirs if same.empty else same
    means = lines.groupby(["method", "variant"])["mean"].mean()
    table = titled(with_uploads(runs), ["method", "uploads", "epsilon"]).reset_index("epsilon")
    of = {method: part for method, part in runs.groupby("method")}
    levels = zip(table.index.get_level_values("method"), table["epsilon"])
    table.insert(2, "noise", [multiplier(of[method], epsilon) for method, epsilon in levels])
    delta = runs["delta"].iloc[0]
    paper = []
    for (_, uploads), row, epsilon in zip(table.index, table["row"], table["epsilon"]):
        name = row.replace("Prompt+", "PromptFL+")
        variant = "no DP" if uploads == "untouched" else f"eps={epsilon:g}, delta={delta:g}"
        paper.append(means.get((name, variant)))
    table[label] = paper
    table["order"] = table.index.get_level_values("method").factorize()[0]
    table["clipped"] = table.index.get_level_values("uploads") != "untouched"
    order = ["order", "clipped", "noise"]
    return table.sort_values(order).drop(columns=order[:2]).round(2)


def multiplier(runs: DataFrame, epsilon: float) -> float:
    """Return the noise multiplier of one method's runs at some epsilon.

    It is 0 for epsilon 0, and where nothing is sent.
    """
    from fpl.privacy import noise_multiplier  # it loads torch, which few tables need

    if not epsilon or not runs["up"].sum():
        return 0.0
    delta = float(runs["delta"].iloc[0])
    return noise_multiplier(float(epsilon), delta, int(runs["rounds"].iloc[0]))


@several
def grid(runs: DataFrame, keys: Keys, value: str = "accuracy") -> DataFrame:
    """Return a line per value of a column, or per combination of the values of several.

    value: the result that is averaged, such as the accuracy on the domain held out, "target".
    """
    return summary(runs.assign(accuracy=runs[value]), keys).round(2)


@several
def labelled(runs: DataFrame) -> DataFrame:
    """Return a line per label of a table's rows."""
    table = grid(runs, "row")
    return marked(table.assign(row=table.index).rename_axis("label"))


@several
def ablation(runs: DataFrame, key: str) -> DataFrame:
    """Return a line per value of one hyperparameter, in ascending order."""
    return grid(runs, key).sort_index()


def with_controls(table: DataFrame, runs: DataFrame) -> DataFrame:
    """Return an ablation with the controls below, which do not depend on its values."""
    if "data" in table.index.names:
        found = {}
        for name, part in parts(runs).items():
            found[name] = with_controls(table.loc[name], part)
        return pd.concat(found, names=["data"])
    below = grid(runs[runs["control"]], "method").rename(index=titles(runs))
    whole = pd.concat([table.rename(index="{:g}".format), below])
    return whole.rename_axis(table.index.name)


def levels(runs: DataFrame, methods: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return for each data set the means of some methods in percent, by their printed names."""
    found = {}
    for name, part in parts(runs).items():
        means = 100 * by_seed(part).groupby(level="method").mean()
        found[name] = {titles(runs)[method]: means[method] for method in methods}
    return found


def named(table: DataFrame, levels: Sequence[str]) -> DataFrame:
    """Return a table with some levels of its index joined to one, called `row`, as `in_words`."""
    levels = [levels] if isinstance(levels, str) else levels
    flat = table.reset_index()
    others = [level for level in table.index.names if level not in levels]
    return flat.assign(row=in_words(flat, levels)).set_index(["row", *others])[[*table.columns]]


def in_words(frame: DataFrame, columns: Sequence[str]) -> list[str]:
    """Return some columns of each line as one text.

    Words stand for themselves and numbers have their column's name; what a line lacks is left out.
    """
    rows = []
    for line in frame[[*columns]].to_dict("records"):
        there = {name: value for name, value in line.items() if pd.notna(value)}
        words = [v if isinstance(v, str) else f"{name} {v:g}" for name, v in there.items()]
        rows.append(", ".join(words))
    return rows


def by_settings(runs: DataFrame, columns: Sequence[str]) -> DataFrame:
    """Return runs whose rows are told apart by these columns, for `differences`."""
    return runs.assign(row=in_words(runs, columns))


def by_measures(runs: DataFrame, measures: Mapping[str, str]) -> DataFrame:
    """Return runs with a row "label, measure" for each measure, for `differences`.

    measures: of each name the column that is compared as the accuracy; rows that lack it are left
    out.
    """
    frames = []
    runs = runs.reset_index(drop=True)  # those of several tables have the same numbers
    for name, column in measures.items():
        there = runs[last_round(runs)[column].notna().reindex(runs.index, fill_value=False)]
        frames.append(there.assign(row=there["row"] + f", {name}", accuracy=there[column]))
    return pd.concat(frames, ignore_index=True)


def pairs_of(runs: DataFrame, asked: Sequence[tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """Return those of the pairs of rows of which both were run, named "a - b" for `differences`."""
    there = {*runs["row"]}
    return {f"{a} - {b}": (a, b) for a, b in asked if {a, b} <= there}


def differences(runs: DataFrame, pairs: Mapping[Any, Sequence[str]]) -> DataFrame:
    """Return `differences_on` each data set, and holm: the p of all lines, adjusted together."""
    table = differences_on(runs, pairs)
    holms = Series(holm(table["p"].tolist()), table.index).round(4)
    table.insert(table.columns.get_loc("p") + 1, "holm", holms)
    return table.assign(p=table["p"].round(4))


@several
def differences_on(runs: DataFrame, pairs: Mapping[Any, Sequence[str]]) -> DataFrame:
    """Return what `fpl.experiments.stats.paired` says of pairs of rows, in points of percent.

    pairs: for each line's name the labels of two rows; the second is subtracted from the first. Of
    four rows a, b, c, d it is (a - b) - (c - d). A name may have two parts, a pair and where it is
    compared.
    """
    lines = {name: compared(runs, labels) for name, labels in pairs.items()}
    found = DataFrame(lines, ["mean", "low", "high", "p", "seeds", "clients"]).T
    table = (100 * found[["mean", "low", "high"]]).round(2) + 0.0  # no -0.0
    table["p"] = found["p"].astype(float)
    table["verdict"] = [verdict(*ends) for ends in found[["low", "high"]].to_numpy()]
    numbers = found[["seeds", "clients"]].astype(int)
    return table.join(numbers).rename_axis(["pair", "at"][: table.index.nlevels])


def compared(runs: DataFrame, labels: Sequence[str]) -> Series:
    """Return `stats.paired` of two rows, or of the differences of two and two."""
    a, b, *two = labels
    if not two:
        return paired(runs, a, b)
    c, d = two
    both = pd.concat([minus(runs, a, b, "first"), minus(runs, c, d, "second")])
    return paired(both, "first", "second")


def sentences(table: DataFrame, names: Sequence[str] = ()) -> str:
    """Return lines of `differences` as a list of sentences in Markdown.

    So prose says no number that is not the table's. names: of the pairs that are said; without
    any, all.
    """
    flat = table.reset_index()
    if names:
        flat = flat[flat["pair"].isin(names)]
    wholes = in_words(flat, [name for name in ("data", "pair", "at") if name in flat])
    said = []
    for whole, line in zip(wholes, flat.to_dict("records")):
        name = cell(whole.replace(" - ", " minus "))
        said.append(f"* {sentence(f'*{name}*', line)}")
    return "\n".join(said)


def passing(table: DataFrame, bases: Sequence[str]) -> list[str]:
    """Return the rows that are clearly above all the bases, Holm's adjustment included.

    table: as `differences`, with pairs named "row - base"; on several data sets, a row's name says
    on which.
    """
    flat = table.reset_index()
    clear = flat[(flat["verdict"] == ABOVE) & (flat["holm"] <= 0.05)]
    names = clear["pair"].str.rsplit(" - ", n=1)
    where = names.str[0] + (", " + clear["data"] if "data" in clear else "")
    passed = names.str[1].groupby(where, sort=False).agg(set)
    return [str(name) for name, found in passed.items() if found >= {*bases}]


@several
def clients(runs: DataFrame) -> DataFrame:
    """Return for each method the mean over clients and how unequal they are, as `stats.spread`."""
    mean = by_seed(runs).groupby(level="method", sort=False).mean().rename("mean")
    table = 100 * pd.concat([mean, spread(runs)], axis=1)
    table.insert(0, "row", table.index.map(titles(runs)))
    columns = {"tenth": "10th percentile", "std": "std over clients"}
    table["seeds"] = by_seed(runs).groupby(level="method", sort=False).size()
    return marked(table.round(2).rename(columns=columns))


def with_bytes(table: DataFrame, runs: DataFrame) -> DataFrame:
    """Return a table with the bytes, in single precision, that a participant sends and receives.

    They are those of the last round.
    """
    numbers = moved(runs, [*table.index.names])
    return table.join(4 * numbers.add_suffix(", bytes"))


def moved(runs: DataFrame, keys: list[str]) -> DataFrame:
    """Return how many numbers a participant sends (up) and receives (down) in the last round."""
    groups = last_round(runs).groupby(keys, sort=False, dropna=False)
    return groups[["up", "down"]].mean().round().astype(int)


@several
def traffic(runs: DataFrame, keys: Sequence[str]) -> DataFrame:
    """Return accuracy in percent by round beside what has travelled until then.

    A line per combination of the keys' values and round; kB: sent and received by a client in all
    rounds so far, in single precision, the mean over all clients and seeds.
    """
    numbers = runs["up"].fillna(0) + runs["down"].fillna(0)
    kept = [*keys, "seed", "round"]
    lines = of_single(runs.assign(kB=4 * numbers / 1000), kept)
    means = lines[["kB", "accuracy"]].mean()
    of_run = means.groupby(level=kept[:-1], sort=False, dropna=False)
    means["kB"] = of_run["kB"].cumsum()
    of_round = means.groupby(level=[*keys, "round"], sort=False, dropna=False)
    table = 100 * of_round["accuracy"].apply(lambda seeds: over_seeds(list(seeds))).unstack()
    table.insert(0, "kB", of_round["kB"].mean())
    return table[["kB", "mean", "low", "high"]].round(3).assign(seeds=of_round.size())


@several
def generalisation(runs: DataFrame, key: str = "method") -> DataFrame:
    """Return FedPGP's base-to-novel table: mean and std over seeds, a line per value of `key`.

    Its runs have only base classes in training. `local` is the accuracy on each client's own test
    images, `base` on the test images of all base classes and `novel` on those of all novel ones,
    each the mean over clients. HM = 3 / (1 / local + 1 / base + 1 / novel) of each seed; this is
    what later papers say, but no released code has the formula, so whether FedPGP's own tables use
    it is not verified. Methods that cannot tell novel classes apart have neither `novel` nor HM.
    """
    columns = {"accuracy": "local", "base": "base", "novel": "novel"}
    groups = of_single(last_round(runs), [key, "seed"])
    found = groups[[*columns]].mean().rename(columns=columns)
    found["HM"] = 3 / (1 / found).sum(axis=1, skipna=False)
    seeds = (100 * found).groupby(level=key, sort=False, dropna=False)
    table = seeds.mean().join(seeds.std().add_suffix(" std"))
    return table.assign(seeds=seeds.size()).round(2)


def with_metrics(runs: DataFrame) -> DataFrame:
    """Return the last round of runs with more results of each client, from what their records keep.

    macro_f1, worst_class, ece: as `fpl.experiments.metrics.scores`. worst_client: the lowest
    accuracy of the run's clients. Any function of runs takes them, such as `grid` and
    `by_measures`. Raises ValueError for a record of before predictions were kept.
    """
    from fpl.experiments.metrics import scores as of_clients  # it loads torch: few tables need it

    def found(run: str) -> DataFrame:
        answered = answers.read(records.RECORDS / f"{run}.json")
        return of_clients(answered).drop(columns="accuracy")

    lines = with_found(runs, found)
    return lines.assign(worst_client=lines.groupby(RUN)["accuracy"].transform("min"))


def with_found(runs: DataFrame, found: Make) -> DataFrame:
    """Return the last round of runs with what `found` says of each run's clients, by its name."""
    last = last_round(runs)
    of_runs = {run: found(run) for run in last["run"].unique()}
    return last.join(pd.concat(of_runs, names=["run", "client"]), on=["run", "client"])


def with_others(
    runs: DataFrame, sources: Sequence[Source], methods: Mapping[str, str] | None = None
) -> DataFrame:
    """Return the last round of runs with each client's accuracy on other data sets.

    The column of a data set is called by OTHER. sources: as `fpl.experiments.transfer.others` gives
    them. methods: FILE.py:CLASS of rows that are methods of your own and have other names. The runs
    must have kept what they learnt: their table says `keep: true`. Raises FileNotFoundError where
    they have not, and ValueError for a method of your own that nothing names.
    """
    from fpl.experiments.transfer import accuracies  # it loads torch

    named = {row: row for row in runs["row"] if ".py:" in row}
    named |= methods or {}
    pairs = zip(runs["run"], runs["row"], strict=True)
    own = {run: named[row] for run, row in pairs if row in named}

    def found(run: str) -> DataFrame:
        method = own.get(run)
        return DataFrame({OTHER.format(to.name): accuracies(run, to, method) for to in sources})

    return with_found(runs, found)


def with_unseen(runs: DataFrame) -> DataFrame:
    """Return the last round of runs with the accuracy of seen and unseen clients in two columns.

    seen_accuracy is that of clients that train, unseen_accuracy of those that never do; others have
    nan there. Raises ValueError where a run has no unseen clients.
    """
    last = last_round(runs)
    columns = [last[name].to_numpy() for name in ("client", "unseen", "clients")]
    if not (columns[1] > 0).all():
        raise ValueError("these runs have no unseen clients: set `unseen` for their table")
    never = is_unseen(*columns)
    seen, unseen = (last["accuracy"].where(these) for these in (~never, never))
    return last.assign(seen_accuracy=seen, unseen_accuracy=unseen)


@several
def scores(runs: DataFrame, key: str = "method") -> DataFrame:
    """Return macro-F1, worst class, worst client, ECE and global accuracy beside the accuracy.

    A line per value of `key`, in percent; each with its 95 % interval over seeds, named "low" and
    "high" behind the name. docs/results.md says what they are.
    """
    lines = with_metrics(runs)
    table = summary(lines, key).join(intervals(means(lines, SCORES, key)))
    return marked(with_rows(table, runs).round(2))


@several
def results(runs: DataFrame, columns: Mapping[str, str], hm: bool = False) -> DataFrame:
    """Return several results of each row beside each other, with 95 % intervals over seeds.

    columns: of each name the column of the runs, as in {"personal": "accuracy", "global": GLOBAL}.
    hm: with the harmonic mean of all, of each seed's means over clients, as "HM". A line per
    method, in percent; a row that lacks a result has neither it nor HM.
    """
    found = means(last_round(runs), columns, "method")
    seeds = found.groupby(level="method", sort=False).size()
    if hm:
        found["HM"] = len(columns) / (1 / found).sum(axis=1, skipna=False)
    table = intervals(found).assign(seeds=seeds)
    return marked(with_rows(table, runs).round(2))


def means(lines: DataFrame, columns: Mapping[str, str], key: str) -> DataFrame:
    """Return means over clients of several results by their names, for each (key, seed)."""
    groups = of_single(lines, [key, "seed"])
    return DataFrame({name: groups[column].mean() for name, column in columns.items()})


def intervals(found: DataFrame) -> DataFrame:
    """Return of each column of `means`, in percent, the mean over seeds and its interval's ends."""
    table: dict[str, Series] = {}
    for name, values in found.items():
        over = 100 * of_seeds(values)
        table |= {name: over["mean"], f"{name} low": over["low"], f"{name} high": over["high"]}
    return DataFrame(table)


def with_rows(table: DataFrame, runs: DataFrame) -> DataFrame:
    """Return a table with its rows' names in front; methods have their printed ones."""
    named = titles(runs) if table.index.name == "method" else {}
    rows = [named.get(value, str(value)) for value in table.index]
    return table.assign(row=rows)[["row", *table]]


def metrics(table: DataFrame, path: Path = TABLES / "10_table1" / "metrics.json") -> None:
    """Write the mean and std of every row, as DVC reads them."""
    with atomic_write(path) as temporary:
        table[["mean", "std"]].to_json(temporary, orient="index", indent=2)


def save(table: DataFrame, name: str, folder: Path = TABLES, note: str = "") -> None:
    """Write a table as CSV and as Markdown, above which the note stands.

    name: the files' name below `folder`, without a suffix, such as "10_table1/table1".
    """
    with atomic_write(folder / f"{name}.csv") as temporary:
        table.to_csv(temporary, lineterminator="\n")
    shown = table.reset_index()
    for column in shown:
        decimal = column in DECIMALS or str(column).startswith(OTHER.format(""))
        if decimal and shown[column].dtype == float:
            shown[column] = shown[column].map("{:.2f}".format, na_action="ignore")
    text = markdown(shown.fillna(""), disable_numparse=True)
    with atomic_write(folder / f"{name}.md") as temporary:
        temporary.write_text(f"{note}\n\n{text}\n".lstrip())
