"""Fresh tables against those of the repository, cell by cell."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

EXPECTED = Path("results/expected")
# How far a mean may move, in points of percent. Retraining on another processor changes the order of additions, hence last
# digits, hence a few test images; label counts change nothing. CONTRIBUTING.md says how these were measured.
TOLERANCE = {"label_prior": 0.01, "promptfl": 1.5, "fedprox": 1.5, "fedpgp": 1.5, "fedpgp_released": 1.5}  # by table or by row
TOLERANCE |= {"fedotp": 3.0, "promptfl_released": 2.0, "fedprox_released": 2.0}
USUAL = 1.0
VALUES = ("mean", "local", "difference")
MEASURED = ("table1", "ablation_n_experts", "ablation_d_gate", "ablation_lam", "label_prior")
UNMEASURED = 3.0  # for the other tables, of which nobody has measured how far another processor moves them


def cells(name: str, fresh: Path, expected: Path) -> pd.DataFrame:
    """A line per row of the table: expected and fresh mean, difference, tolerance, verdict ("same", "outside", "missing")."""
    old = means(expected / f"{name}.csv")
    new = means(fresh / f"{name}.csv") if (fresh / f"{name}.csv").exists() else old[:0]
    lines = pd.DataFrame({"table": name, "expected": old, "fresh": new.reindex(old.index)})
    lines["difference"] = lines["fresh"] - lines["expected"]
    usual = USUAL if name in MEASURED else UNMEASURED
    lines["tolerance"] = [TOLERANCE.get(name, max(usual, TOLERANCE.get(str(row), usual))) for row in old.index]
    lines["verdict"] = [
        "missing" if pd.isna(d) else "same" if abs(d) <= t else "outside" for d, t in zip(lines["difference"], lines["tolerance"])
    ]
    return lines.rename_axis("row").reset_index()


def means(path: Path) -> pd.Series:
    """Our means in a table, by its first column or, where that is not enough, by all that stand before the mean."""
    table = pd.read_csv(path)
    table = table[table["table"] == "ours"] if "table" in table else table  # published numbers stand in some tables too
    value = next((name for name in VALUES if name in table), None)
    if value is None:
        return pd.Series(dtype=float)
    keys = table[table.columns[: table.columns.get_loc(value)]]
    first = keys.iloc[:, 0]
    whole = keys.astype(object).fillna("").astype(str).agg(", ".join, axis=1)  # not every row has every setting
    return pd.Series(table[value].tolist(), first if first.is_unique else whole)


def all_cells(fresh: Path, expected: Path = EXPECTED) -> pd.DataFrame:
    """Every table of the repository. Raises FileNotFoundError when there is nothing to compare with."""
    names = sorted(path.stem for path in expected.glob("*.csv"))
    if not names:
        raise FileNotFoundError(f"no expected tables in {expected}: restore that folder from the repository")
    return pd.concat([cells(name, fresh, expected) for name in names], ignore_index=True)


def with_tables(text: str) -> str:
    """Markdown in which every table between a comment that names its file and `<!-- end -->` is that file's content."""
    block = re.compile(r"(<!-- (results/expected/\S+\.md) -->\n).*?(<!-- end -->)", re.DOTALL)
    return block.sub(lambda m: f"{m[1]}\n{Path(m[2]).read_text()}\n{m[3]}", text)
