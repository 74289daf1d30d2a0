"""Records and published numbers to tables: percent with two decimals, ours beside the paper's, as csv and markdown.

Of runs on several data sets a table has a part for each, one under the other, with a column `data` in front.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from fpl.data.files import ROOT, atomic_write
from fpl.experiments.stats import by_seed, last_round, over_seeds, paired, spread

TABLES = Path("results/tables")
PAPER = "pFedMoAP (ICLR 2025, 2410.10114)"
BESIDE = "paper, mean of 5 data sets"
PRINTED = {  # how the paper spells the data sets
    "flowers102": "Flowers102",
    "oxfordpets": "OxfordPets",
    "food101": "Food101",
    "caltech101": "Caltech101",
    "dtd": "DTD",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "domainnet10": "DomainNet (10 classes)",
    "office_caltech10": "Office-Caltech10",
}
DOMAINS = ("amazon", "caltech", "clipart", "dslr", "infograph", "painting", "photo", "quickdraw", "real", "sketch", "webcam")
SPELT = {name: "DSLR" if name == "dslr" else name.capitalize() for name in DOMAINS}  # as the paper prints them
GENERALISATION = ("local", "base", "novel", "HM")
WITH_STD = (*GENERALISATION, *(f"{name} std" for name in GENERALISATION))
POINTS = ("mean", "difference", "std", "low", "high", "t_low", "t_high", "noise", "worst", "10th percentile", "std over clients")
DECIMALS = (*POINTS, "paper", BESIDE, *WITH_STD, *SPELT.values())
NOTE_TABLE1 = (
    "Miniature of Table 1 on the demo world, accuracy in %, last round; mean, std and 95 % interval over seeds. "
    "The paper's column is other data and another CLIP. Up and down are the numbers that a participating client sends and "
    "receives in the last round, and their bytes in single precision."
)
NOTE_DEMO = (
    "Drawn demo world, accuracy in %, last round; mean, std and 95 % interval over seeds. Not comparable with the paper's values."
)
NOTE_SHORT = NOTE_DEMO + " 8 shots, 5 rounds."
NOTE_PAIRED = (
    "Paired differences of accuracy in points, same client and seed; low and high from a bootstrap over seeds and clients, t low "
    "and t high the t-interval over seeds, which is the safer one."
)
NOTE_CLIENTS = (
    "Accuracy in % by client of one run, last round, averaged over seeds: worst client, 10th percentile, std over clients."
)
NOTE_LEDGER = "Demo worlds: accuracy with what the released code does, minus accuracy without it. " + NOTE_PAIRED
NOTE_LEDGER_SPREAD = (
    "Standard deviations in points: over seeds, and what they become; 95 % interval of the ratio where it has one."
)
NOTE_LEDGER_ITEMS = (
    "What released code does where its paper says something else or nothing; cost in points, from the table ledger."
)
NOTE_REAL = (
    "Accuracy in %, last round; mean, std and 95 % interval over seeds. The paper's column, where there is one, is its mean on "
    "the same data. Up and down, where they stand, are the numbers that a participant sends and receives in the last round."
)
NAMES = {
    "majority": "control: the client's majority class",
    "zeroshot_own": "control: zero-shot, own classes only",
    "ridge_own": "control: ridge on own features",
    "ridge_all": "control: ridge on everybody's features, own classes only",
    "zeroshot": "ZS-CLIP",
    "coop": "CoOp",
    "promptfl": "PromptFL",
    "finetuned": "PromptFL+FT",
    "fedper": "Prompt+FedPer",
    "fedprox": "Prompt+FedProx",
    "fedamp": "Prompt+FedAMP",
    "pfedprompt": "pFedPrompt (reconstruction)",
    "fedotp": "FedOTP",
    "fedpgp": "FedPGP",
    "pfedmoap": "pFedMoAP",
    "promptfl_released": "released: PromptFL",
    "fedprox_detached": "released: FedProx's term alone",
    "fedprox_released": "released: Prompt+FedProx",
    "fedotp_released": "released: FedOTP",
    "fedpgp_two": "released: FedPGP's two prompts alone",
    "fedpgp_placeholder": "released: FedPGP's anchor alone",
    "fedpgp_released": "released: FedPGP",
    "pfedmoap_oneword": "released: pFedMoAP's one word alone",
    "pfedmoap_fixed": "released: pFedMoAP's experts alone",
    "pfedmoap_live": "released: pFedMoAP's pool alone",
    "pfedmoap_leak": "released: pFedMoAP's gate alone",
    "pfedmoap_released": "released: pFedMoAP",
}
CONTROLS = [row for row, name in NAMES.items() if name.startswith("control: ")]


def published() -> pd.DataFrame:
    """data/published.csv with a numeric mean; what is no number there (such as "4.2K") is nan."""
    table = pd.read_csv(ROOT / "data" / "published.csv")
    return table.assign(mean=pd.to_numeric(table["mean"], errors="coerce"))


def note(runs: pd.DataFrame, drawn: str) -> str:
    """What stands above a table: `drawn` where its runs are of a drawn world, else what holds for real data."""
    return NOTE_REAL if {*runs["data"]} & {*PRINTED} else drawn


def parts(runs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The runs on each data set, in their order."""
    return {str(name): of for name, of in runs.groupby("data", sort=False)}


def several(make: Callable[..., pd.DataFrame]) -> Callable[..., pd.DataFrame]:
    """Let a function of runs on one data set take those on several; `data` becomes the first level of the table's index."""

    @functools.wraps(make)
    def made(runs: pd.DataFrame, *arguments, **named) -> pd.DataFrame:
        if "data" not in runs or runs["data"].nunique() < 2:
            return make(runs, *arguments, **named)
        return pd.concat({name: make(of, *arguments, **named) for name, of in parts(runs).items()}, names=["data"])

    return made


def of_paper(runs: pd.DataFrame) -> pd.Series:
    """The paper's means on the data set of the runs, by its name of the method; empty for a data set that it does not have."""
    found = published().query("paper == @PAPER and variant != 'lambda=0.0'")
    here = found["dataset"].isin([PRINTED[name] for name in {*runs["data"]} & {*PRINTED}])
    main = found["table"].isin(["Table 1", "Table 2", "Table 3", "Table 4"])
    whole = found["domain_or_split"].str.startswith("local test") | (found["domain_or_split"] == "Average")
    return found[here & main & whole].set_index("method")["mean"]


def printed_name(method: str) -> str:
    return NAMES.get(method, method).removesuffix(" (reconstruction)")


def summary(runs: pd.DataFrame, key: str | Sequence[str] = "method", rule: str = "last round") -> pd.DataFrame:
    """Mean over clients by a rule of `fpl.stats.RULES`, then over seeds: mean, std, 95 % interval; a line per value of `key`."""
    values = by_seed(runs, key, rule)
    levels = [*range(values.index.nlevels - 1)]
    return values.groupby(level=levels, sort=False, dropna=False).apply(lambda v: over_seeds(list(v))).unstack()


@several
def table1(runs: pd.DataFrame) -> pd.DataFrame:
    """Table 1 in percent; beside it the paper's numbers or, for a drawn world, the mean of its five data sets."""
    same, theirs = of_paper(runs), published().query("paper == @PAPER and table == 'Table 1' and variant != 'lambda=0.0'")
    five = theirs.groupby("method")["mean"].mean()
    own = summary(runs)
    table = percent(own)
    table.insert(0, "row", [NAMES.get(m, m) for m in own.index])
    table["paper" if len(same) else BESIDE] = [(same if len(same) else five).get(printed_name(m)) for m in own.index]
    moved = last_round(runs).groupby("method")[["up", "down"]].mean().reindex(own.index).round().astype(int)
    table = table.join(moved).join(4 * moved.add_suffix(", bytes"))
    return table.rename_axis("method").round(2)


@several
def beside(runs: pd.DataFrame, published_table: str, dataset: str, split: str = "") -> pd.DataFrame:
    """Methods and controls in percent, beside the paper's numbers on the same data set; then the mean over each domain's clients.

    For a drawn world these are those of a column of a published table of pFedMoAP: other data, another CLIP.
    """
    same, theirs = of_paper(runs), published().query("paper == @PAPER and table == @published_table and dataset == @dataset")
    theirs = theirs[theirs["domain_or_split"] == split] if split else theirs
    table = percent(summary(runs))
    table.insert(0, "row", [NAMES.get(method, method) for method in table.index])
    theirs = same if len(same) else theirs.set_index("method")["mean"]
    table["paper" if len(same) else f"paper, {dataset}"] = table["row"].map(theirs)
    for domain, of in runs[runs["domain"] != ""].groupby("domain"):
        table[SPELT.get(domain, domain)] = 100 * summary(of)["mean"]
    return table.rename_axis("method").round(2)


@several
def table6(runs: pd.DataFrame) -> pd.DataFrame:
    """Methods by epsilon (0: no noise) in percent, with the noise multiplier, beside the paper's numbers or their mean."""
    from fpl.privacy import noise_multiplier  # loads torch, which no other table needs

    theirs = published().query("paper == @PAPER and table == 'Table 6'")
    same = theirs[theirs["dataset"].isin([PRINTED.get(name) for name in runs["data"].unique()])]
    paper = (same if len(same) else theirs).groupby(["method", "variant"])["mean"].mean()
    table = grid(runs, ["method", "epsilon"])
    releases, delta = runs["rounds"].iloc[0], runs["delta"].iloc[0]
    spelt = [(NAMES[m].replace("Prompt+", "PromptFL+"), f"eps={e:g}, delta={delta:g}" if e else "no DP") for m, e in table.index]
    z = [noise_multiplier(e, delta, releases) if e else 0.0 for _, e in table.index]
    table.insert(0, "row", [NAMES[method] for method, _ in table.index])
    table.insert(1, "noise", z)
    return table.assign(**{"paper" if len(same) else BESIDE: [paper.get(key) for key in spelt]}).round(2)


@several
def labelled(runs: pd.DataFrame) -> pd.DataFrame:
    """A line per label of a table's rows, in percent."""
    table = grid(runs, "row")
    return table.assign(row=table.index).rename_axis("label")


@several
def grid(runs: pd.DataFrame, keys: str | Sequence[str], value: str = "accuracy") -> pd.DataFrame:
    """A line per value of a setting, or combination of several, in percent; `value`: a column of what was found elsewhere."""
    return percent(summary(runs.assign(accuracy=runs[value]), keys)).round(2)


def named(table: pd.DataFrame, levels: Sequence[str]) -> pd.DataFrame:
    """The same with some levels of its index made one, called row; what a row lacks is left out."""
    flat = table.reset_index()
    labels = [
        ", ".join(
            str(v) if isinstance(v, str) else f"{level} {v:g}" for level, v in zip(levels, line, strict=True) if pd.notna(v)
        )
        for line in flat[[*levels]].itertuples(index=False)
    ]
    others = [level for level in table.index.names if level not in levels]
    return flat.assign(row=labels).set_index(["row", *others])[[*table.columns]]


@several
def differences(runs: pd.DataFrame, pairs: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """What `fpl.stats.paired` says of several pairs of rows, by their labels, in points of percent."""
    table = pd.DataFrame({name: paired(runs, a, b, key="row") for name, (a, b) in pairs.items()}).T.rename_axis("pair")
    points = ["mean", "low", "high", "t_low", "t_high"]
    return (100 * table[points]).round(2).assign(seeds=table["seeds"].astype(int), clients=table["clients"].astype(int))


@several
def clients(runs: pd.DataFrame) -> pd.DataFrame:
    """Mean over clients and `fpl.stats.spread` of methods and controls, in percent."""
    mean = by_seed(runs).groupby(level=0, sort=False).mean().rename("mean")
    table = (100 * spread(runs).join(mean)).round(2)
    table.insert(0, "row", [NAMES.get(method, method) for method in table.index])
    return table[["row", "mean", "worst", "tenth", "std"]].rename(columns={"tenth": "10th percentile", "std": "std over clients"})


def metrics(table: pd.DataFrame, path: Path = Path("results/metrics.json")) -> None:
    """Mean and std of every row, as DVC reads them."""
    with atomic_write(path) as temporary:
        table[["mean", "std"]].to_json(temporary, orient="index", indent=2)


def with_bytes(table: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """The same with the bytes, in single precision, that a participant sends and receives in the last round."""
    keys = [*table.index.names]
    moved = 4 * last_round(runs).groupby(keys, sort=False, dropna=False)[["up", "down"]].mean().round().astype(int)
    return table.join(moved.add_suffix(", bytes"))


@several
def ablation(runs: pd.DataFrame, key: str) -> pd.DataFrame:
    """One hyperparameter varied: a line per value, in percent."""
    return grid(runs, key).sort_index()


def with_controls(table: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """The table with a line for each control below; they do not depend on what the table varies."""
    if "data" in table.index.names:
        of = parts(runs)
        return pd.concat({name: with_controls(table.loc[name], of[name]) for name in table.index.unique("data")}, names=["data"])
    controls = percent(summary(runs[runs["method"].isin(CONTROLS)])).round(2)
    return pd.concat([table.rename(index="{:g}".format), controls.rename(index=NAMES)]).rename_axis(table.index.name)


def levels(runs: pd.DataFrame, methods: Sequence[str]) -> dict[str, dict[str, float]]:
    """For each data set the mean of some rows in percent, by their printed names."""
    means = {name: 100 * by_seed(of).groupby(level=0).mean() for name, of in parts(runs).items()}
    return {name: {NAMES[method]: of[method] for method in methods} for name, of in means.items()}


@several
def generalisation(runs: pd.DataFrame, key: str = "method") -> pd.DataFrame:
    """FedPGP's base-to-novel table in percent, of runs with classes "base", a line per value of `key`; mean and std over seeds.

    "local" is each client's own test images, "base" the test images of all base classes, "novel" of all novel ones, each the mean
    over clients after the last round; HM = 3 / (1 / local + 1 / base + 1 / novel) of each seed. The formula is what follow-up
    work says; no released code has it, so whether FedPGP's own tables use it is not verified. Methods that cannot classify among
    novel classes have neither "novel" nor HM.
    """
    columns = {"accuracy": "local", "base": "base", "novel": "novel"}
    found = last_round(runs).groupby([key, "seed"], sort=False)[[*columns]].mean().rename(columns=columns)
    found["HM"] = 3 / (1 / found).sum(axis=1, skipna=False)
    seeds = (100 * found).groupby(level=key, sort=False)
    return seeds.mean().join(seeds.std().add_suffix(" std")).assign(seeds=seeds.size()).round(2)


def percent(summary: pd.DataFrame) -> pd.DataFrame:
    columns = ["mean", "std", "low", "high"]
    return (100 * summary[columns]).assign(seeds=summary["seeds"].astype(int))


def save(table: pd.DataFrame, name: str, folder: Path = TABLES, note: str = "") -> None:
    """NAME.csv and NAME.md; the note stands above the markdown table."""
    with atomic_write(folder / f"{name}.csv") as temporary:
        table.to_csv(temporary, lineterminator="\n")
    flat = table.reset_index()
    shown = flat.apply(lambda c: c.map("{:.2f}".format, na_action="ignore") if c.dtype == float and c.name in DECIMALS else c)
    with atomic_write(folder / f"{name}.md") as temporary:
        temporary.write_text(f"{note}\n\n{shown.fillna('').to_markdown(index=False, disable_numparse=True)}\n".lstrip())
