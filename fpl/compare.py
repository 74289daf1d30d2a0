"""Fresh tables against those of the repository, cell by cell."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

EXPECTED = Path("results/expected")
# How far a mean may move, in points of percent. Retraining on another processor changes the order of additions, hence last
# digits, hence a few test images; label counts change nothing. CONTRIBUTING.md says how these were measured.
TOLERANCE = {"label_prior": 0.01, "promptfl": 1.5, "fedprox": 1.5, "fedpgp": 1.5, "fedpgp_released": 1.5}  # by table or by row
TOLERANCE |= {"fedotp": 2.0, "promptfl_released": 2.0, "fedprox_released": 2.0}
USUAL = 1.0


def cells(name: str, fresh: Path, expected: Path) -> pd.DataFrame:
    """A line per row of the table: expected and fresh mean, difference, tolerance, verdict ("same", "outside", "missing")."""
    old = pd.read_csv(expected / f"{name}.csv", index_col=0)
    old = old[old["table"] == "ours"] if "table" in old else old  # published numbers stand in some tables too
    new = (
        pd.read_csv(fresh / f"{name}.csv", index_col=0) if (fresh / f"{name}.csv").exists() else pd.DataFrame(columns=old.columns)
    )
    lines = pd.DataFrame({"table": name, "expected": old["mean"], "fresh": new["mean"].reindex(old.index)})
    lines["difference"] = lines["fresh"] - lines["expected"]
    lines["tolerance"] = [TOLERANCE.get(name, TOLERANCE.get(str(row), USUAL)) for row in old.index]
    lines["verdict"] = [
        "missing" if pd.isna(d) else "same" if abs(d) <= t else "outside" for d, t in zip(lines["difference"], lines["tolerance"])
    ]
    return lines.rename_axis("row").reset_index()


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
