"""Records of runs, and the data frames that tables and figures are made from.

A record is one file with one JSON line: settings, per-client accuracy of every round, seconds, and hashes of code and features.
A sweep leaves for each table an index, the records of its runs with the labels of their rows. Whoever only reads needs no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from fpl.data.files import atomic_write
from fpl.data.partitions import ELSEWHERE

RECORDS = Path("results/records")


def index_path(table: str, results: str | Path = "results") -> Path:
    return Path(results) / "runs" / f"{table}.json"


def save_index(table: str, paths: Iterable[Path], rows: Iterable[str], results: str | Path = "results") -> None:
    """Say which records, with which labels, a table is made of."""
    entries = [{"row": row, "record": path.name} for path, row in zip(paths, rows, strict=True)]
    with atomic_write(index_path(table, results)) as temporary:
        temporary.write_text(json.dumps(entries, indent=0) + "\n")


def of_table(table: str, results: str | Path = "results") -> pd.DataFrame:
    """All runs of a table, as `frame`. Raises FileNotFoundError when they were not made, or some of them are gone."""
    index = index_path(table, results)
    entries = json.loads(index.read_text()) if index.exists() else []
    missing = sum(not (RECORDS / entry["record"]).exists() for entry in entries)
    if missing or not entries:
        what = f"{missing} of {len(entries)} runs" if entries else "the runs"
        raise FileNotFoundError(f"{what} of table {table} were not made ({index}): call `fpl sweep {table}` first")
    return frame([RECORDS / entry["record"] for entry in entries], [entry["row"] for entry in entries])


def frame(paths: Iterable[Path], rows: Iterable[str] | None = None) -> pd.DataFrame:
    """One line per run, round and client: the label of the row (by default its method), all settings, then round, client, its
    domain ("" but of the partition by domain), accuracy in [0, 1], numbers up and down.

    Of clients that did not participate in a round, up and down are missing. Accuracies on base classes, novel classes and the
    domain held out are missing but in the last round of runs that are tested there.
    """
    paths = list(paths)
    lines: list[dict[str, Any]] = []
    for path, label in zip(paths, rows or [""] * len(paths), strict=True):
        record = json.loads(path.read_text())
        domains = record["domains"] or [""] * len(record["rounds"][0]["accuracy"])
        settings = {"row": label or record["settings"]["method"], **record["settings"]}
        for r in record["rounds"]:
            moved = {i: {"up": up, "down": down} for i, up, down in zip(r["participants"], r["up"], r["down"], strict=True)}
            away = {name: r.get("elsewhere", {}).get(name, [math.nan] * len(r["accuracy"])) for name in ELSEWHERE}
            lines += [
                {**settings, "round": r["round"], "client": i, "domain": domains[i], "accuracy": a, **moved.get(i, {})}
                | {name: values[i] for name, values in away.items()}
                for i, a in enumerate(r["accuracy"])
            ]
    return pd.DataFrame(lines)
