"""Records and published numbers to tables: percent with two decimals, ours beside the paper's, as csv and markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from fpl.controls import CONTROLS
from fpl.files import writing
from fpl.privacy import noise_multiplier
from fpl.stats import by_seed, last_round, over_seeds, spread

TABLES = Path("results/tables")
PAPER = "pFedMoAP (ICLR 2025, 2410.10114)"
BESIDE = "paper, mean of 5 data sets"
GENERALISATION = ("local", "base", "novel", "HM")
WITH_STD = (*GENERALISATION, *(f"{name} std" for name in GENERALISATION))
DECIMALS = ("mean", "t_low", "t_high", "std", "low", "high", "noise", "worst", "tenth", BESIDE, *WITH_STD)
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
NOTE_ABLATION = "pFedMoAP on the demo world, accuracy in %, last round; mean, std and 95 % interval over seeds."
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


def published() -> pd.DataFrame:
    """data/published.csv with a numeric mean; what is no number there (such as "4.2K") is nan."""
    table = pd.read_csv("data/published.csv")
    return table.assign(mean=pd.to_numeric(table["mean"], errors="coerce"))


def summary(runs: pd.DataFrame, key: str | Sequence[str] = "method", rule: str = "last round") -> pd.DataFrame:
    """Mean over clients by a rule of `fpl.stats.RULES`, then over seeds: mean, std, 95 % interval; a line per value of `key`."""
    values = by_seed(runs, key, rule)
    levels = [*range(values.index.nlevels - 1)]
    return values.groupby(level=levels, sort=False, dropna=False).apply(lambda v: over_seeds(list(v))).unstack()


def table1(runs: pd.DataFrame) -> pd.DataFrame:
    """The miniature Table 1 in percent; beside it the mean of the paper's five data sets, which are other data."""
    paper = (
        published().query("paper == @PAPER and table == 'Table 1' and variant != 'lambda=0.0'").groupby("method")["mean"].mean()
    )
    own = summary(runs)
    table = percent(own)
    table.insert(0, "row", [NAMES.get(m, m) for m in own.index])
    table[BESIDE] = [paper.get(NAMES.get(m, "").removesuffix(" (reconstruction)")) for m in own.index]
    moved = last_round(runs).groupby("method")[["up", "down"]].mean().reindex(own.index).round().astype(int)
    table = table.join(moved).join(4 * moved.add_suffix(", bytes"))
    return table.rename_axis("method").round(2)


def beside(runs: pd.DataFrame, published_table: str, dataset: str, split: str = "") -> pd.DataFrame:
    """Methods and controls in percent, beside a column of a published table of pFedMoAP: other data, another CLIP."""
    theirs = published().query("paper == @PAPER and table == @published_table and dataset == @dataset")
    theirs = theirs[theirs["domain_or_split"] == split] if split else theirs
    table = percent(summary(runs))
    table.insert(0, "row", [NAMES.get(method, method) for method in table.index])
    table[f"paper, {dataset}"] = table["row"].map(theirs.set_index("method")["mean"])
    return table.rename_axis("method").round(2)


def table6(runs: pd.DataFrame) -> pd.DataFrame:
    """Methods by epsilon (0: no noise) in percent, with the noise multiplier, beside the mean of the paper's five data sets."""
    paper = published().query("paper == @PAPER and table == 'Table 6'").groupby(["method", "variant"])["mean"].mean()
    table = grid(runs, ["method", "epsilon"])
    releases, delta = runs["rounds"].iloc[0], runs["delta"].iloc[0]
    spelt = [(NAMES[m].replace("Prompt+", "PromptFL+"), f"eps={e:g}, delta={delta:g}" if e else "no DP") for m, e in table.index]
    z = [noise_multiplier(e, delta, releases) if e else 0.0 for _, e in table.index]
    table.insert(0, "row", [NAMES[method] for method, _ in table.index])
    table.insert(1, "noise", z)
    return table.assign(**{BESIDE: [paper.get(key) for key in spelt]}).round(2)


def labelled(runs: pd.DataFrame) -> pd.DataFrame:
    """A line per label of a table's rows, in percent."""
    table = grid(runs, "row")
    return table.assign(row=table.index).rename_axis("label")


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


def differences(pairs: Mapping[str, pd.Series]) -> pd.DataFrame:
    """What `fpl.stats.paired` says of several pairs, in points of percent."""
    table = pd.DataFrame(pairs).T.rename_axis("pair")
    points = ["mean", "low", "high", "t_low", "t_high"]
    return (100 * table[points]).round(2).assign(seeds=table["seeds"].astype(int), clients=table["clients"].astype(int))


def clients(runs: pd.DataFrame) -> pd.DataFrame:
    """`fpl.stats.spread` of methods and controls, in percent."""
    table = (100 * spread(runs)).round(2)
    return table.assign(row=[NAMES.get(method, method) for method in table.index])


def metrics(table: pd.DataFrame, path: Path = Path("results/metrics.json")) -> None:
    """Mean and std of every row, as DVC reads them."""
    with writing(path) as temporary:
        table[["mean", "std"]].to_json(temporary, orient="index", indent=2)


def with_bytes(table: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """The same with the bytes, in single precision, that a participant sends and receives in the last round."""
    keys = [*table.index.names]
    moved = 4 * last_round(runs).groupby(keys, sort=False, dropna=False)[["up", "down"]].mean().round().astype(int)
    return table.join(moved.add_suffix(", bytes"))


def ablation(runs: pd.DataFrame, key: str) -> pd.DataFrame:
    """One hyperparameter varied: a line per value, in percent."""
    return grid(runs, key).sort_index()


def with_controls(table: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """The table with a line for each control below; they do not depend on what the table varies."""
    controls = percent(summary(runs[runs["method"].isin(CONTROLS)])).round(2)
    return pd.concat([table, controls.rename(index=NAMES)]).rename_axis(table.index.name)


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
    with writing(folder / f"{name}.csv") as temporary:
        table.to_csv(temporary, lineterminator="\n")
    flat = table.reset_index()
    shown = flat.apply(lambda c: c.map("{:.2f}".format, na_action="ignore") if c.dtype == float and c.name in DECIMALS else c)
    with writing(folder / f"{name}.md") as temporary:
        temporary.write_text(f"{note}\n\n{shown.fillna('').to_markdown(index=False, disable_numparse=True)}\n".lstrip())
