"""Fresh tables against those of the repository, cell by cell."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pandas as pd

from fpl.data.files import atomic_write

EXPECTED = Path("results/expected")
ENDINGS = ("csv", "md", "json", "png")  # of what is expected
# How far a mean may move, in points of percent, by table or by row. Retraining on another processor
# changes the order of additions, hence last digits, hence a few test images; label counts change
# nothing. docs/contributing.md says how these were measured.
TOLERANCE = {
    "label_prior": 0.01,
    "promptfl": 2.5,  # of ten seeds; rounding moves single ones by several points
    "fedprox": 2.5,
    "fedpgp": 1.5,
    "fedper": 1.5,
    # five of its seeds were moved by three points
    **dict.fromkeys(("finetuned", "finetuned - coop", "finetuned - ridge_own"), 4.5),
    "fedpgp_released": 3.0,
    "fedotp": 4.5,  # three seeds, of which one moves by several points
    **dict.fromkeys(("pFedMoAP - FedOTP", "fedotp - coop", "fedotp - ridge_own"), 5.0),
    # a seed or two of it end elsewhere with another instruction set
    "promptfolio": 5.0,
    **dict.fromkeys(("promptfolio - coop", "promptfolio - ridge_own"), 5.0),
    **dict.fromkeys(("promptfolio - promptfl", "promptfolio - pfedmoap"), 5.0),
    # five seeds of PromptFL, which rounding moved by two points
    **dict.fromkeys(("fedpha - promptfl", "fedtpg - promptfl", "kgcoop - promptfl"), 4.5),
    **dict.fromkeys(("prograd - promptfl", "afl - promptfl", "fedclip - promptfl"), 4.5),
    **dict.fromkeys(("zslp - promptfl", "zeroshot_memory - promptfl", "dpfpl - promptfl"), 4.5),
    **dict.fromkeys(("fedsept - promptfl", "dpfpl, noise - promptfl"), 4.5),
    **dict.fromkeys(("promptfl - coop", "promptfl - ridge_own"), 4.5),
    "promptfl_released": 2.0,
    "fedprox_released": 2.0,
    "against_paper_orders": 5.0,  # its rows are differences, FedOTP's too
}
USUAL = 1.0
MEASURED = ("table1", "ablation_n_experts", "ablation_d_gate", "ablation_lam")
UNMEASURED = 3.5  # for other tables: nobody has measured how far another processor moves them
# Columns of our numbers: those of a table are the first of these and all that follow it, but for
# what is OTHER: spreads, counts, print, and what is no percentage or is made of our means.
VALUES = {"mean", "local", "difference", "personal", "seen", "own", "accuracy", "over seeds"}
VALUES |= {"half, changed", "ours_mean", "ours_difference"}
OTHER = re.compile("(.*[ _])?(std|low|high)|p|holm|seeds|clients|share|ratio|evenness|paper.*")
# Columns that are counted or computed, not trained. They may move by this part of them.
FACTS = {"numbers", "trained", "read", "noise", "releases", "epsilon"}
FACTS |= {"up", "down", "up, bytes", "down, bytes"}
EXACT = 1e-3
# What one client or class decides moves further than a mean: by so many times as much.
EXTREME = {"worst", "10th percentile", "worst class", "worst client"}
EXTREME |= {"lowest client", "highest client"}
FURTHER = 3


def cells(name: str, fresh: Path, expected: Path) -> pd.DataFrame:
    """Return a line per cell of a table: expected and fresh number, difference, tolerance, verdict.

    name: of the table's file below both folders, without a suffix. A cell of the first column is
    called as its row, of others "row: column". The verdict is "same", "outside" or "missing".
    """
    old = means(expected / f"{name}.csv")
    path = fresh / f"{name}.csv"
    new = means(path) if path.exists() else old[:0]
    table = Path(name).name
    lines = pd.DataFrame({"table": table, "expected": old, "fresh": new.reindex(old.index)})
    lines["difference"] = lines["fresh"] - lines["expected"]
    found = zip(old.index, old)
    lines["tolerance"] = [tolerance(table, of, row, value) for (of, row), value in found]
    lines["verdict"] = "same"
    lines.loc[lines["difference"].abs() > lines["tolerance"], "verdict"] = "outside"
    lines.loc[lines["difference"].isna(), "verdict"] = "missing"
    first = old.index.unique(0)[:1]
    lines.index = [row if of in first else f"{row}: {of}" for of, row in old.index]
    return lines.rename_axis("row").reset_index()


def tolerance(table: str, column: str, row: str, value: float) -> float:
    """Return how far a cell may move, in points of percent, or in what it is counted in."""
    if column in FACTS:
        return EXACT * abs(value)
    if table in TOLERANCE:
        return TOLERANCE[table]
    usual = USUAL if table in MEASURED else UNMEASURED
    points = max(usual, TOLERANCE.get(str(row), usual))
    return FURTHER * points if column in EXTREME else points


def means(path: Path) -> pd.Series:
    """Return our numbers in a table, by column and row, those of the first column first.

    A row is named by the first column or, if it repeats, all before the numbers. Raises ValueError
    for a file that is no such table.
    """
    try:
        return means_of(pd.read_csv(path))
    except (ValueError, TypeError, LookupError) as error:
        what = "make it again with `fpl notebook`, or restore it from the repository"
        raise ValueError(f"{path} is no table of results ({error}): {what}") from None


def means_of(table: pd.DataFrame) -> pd.Series:
    """Return the numbers that `means` does, of a table that is read."""
    if "ours" in set(table.get("table", ())):  # published numbers stand in it too
        table = table[table["table"] == "ours"]
    there = [name for name in table if name in VALUES]
    there += [name for name in table.select_dtypes("number") if name in FACTS]
    if not there:
        return pd.Series(dtype=float)
    start = table.columns.get_loc(there[0])
    keys = table[table.columns[:start]].astype(object)
    first = keys.iloc[:, 0]
    whole = keys.fillna("").astype(str).agg(", ".join, axis=1)  # not every row has every setting
    numbers = table.iloc[:, start + 1 :].select_dtypes("number")
    further = [name for name in numbers if not OTHER.fullmatch(name)]
    found = table[[there[0], *further]].astype(float)
    return found.set_axis(first if first.is_unique else whole).unstack().dropna()


def all_cells(fresh: Path, expected: Path = EXPECTED) -> pd.DataFrame:
    """Return the cells of every table of the repository.

    Raises FileNotFoundError when there is nothing to compare with.
    """
    names = sorted(path.relative_to(expected).with_suffix("") for path in tables_in(expected))
    if not names:
        raise FileNotFoundError(
            f"no expected tables in {expected}: restore that folder from the repository"
        )
    return pd.concat([cells(str(name), fresh, expected) for name in names], ignore_index=True)


def tables_in(folder: Path) -> list[Path]:
    """Return the tables of all notebooks that every machine can make.

    Those of benches have no expected values, and those of real features need files of others.
    """
    return [path for path in folder.glob("*/*.csv") if path.parent.name not in ("bench", "real")]


def accept(fresh: Path, expected: Path = EXPECTED) -> None:
    """Take over fresh tables and figures as the expected ones, and no other of their notebooks.

    Raises FileNotFoundError where nothing is fresh.
    """
    names = results_in(fresh)
    if not names:
        raise FileNotFoundError(f"there are no tables in {fresh}: call `fpl repro` first")
    for name in names:
        with atomic_write(expected / name) as temporary:
            shutil.copyfile(fresh / name, temporary)
    notebooks = {name.parent for name in names}
    for old in results_in(expected) - names:
        if old.parent in notebooks:
            (expected / old).unlink()


def results_in(folder: Path) -> set[Path]:
    """Return the tables and figures of all notebooks, relative to the folder."""
    return {path.relative_to(folder) for end in ENDINGS for path in folder.glob(f"*/*.{end}")}
