"""Records of runs, and the frames of lines that tables and figures are made from.

A record is a file with one line of JSON: a run's settings, what each round found, the printed name
of its method, and the hashes of code and features. `fpl sweep` also leaves an index for each table:
its records, with the label of the row that each belongs to. Reading them needs no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from fpl.data.files import atomic_write
from fpl.data.partitions import ELSEWHERE

RECORDS = Path("results/records")
# What a record says of a round that is not a list with a number for each client.
OTHER = {"round", "participants", "loss", "up", "down", "elsewhere"}


def save_index(
    folder: str,
    table: str,
    paths: Iterable[Path],
    rows: Iterable[str],
    results: str | Path = "results",
) -> None:
    """Write which records a table is made of, each with the label of its row.

    folder: the name of the notebook that the table belongs to.
    """
    pairs = zip(paths, rows, strict=True)
    entries = [{"row": row, "record": path.name} for path, row in pairs]
    with atomic_write(Path(results) / "runs" / folder / f"{table}.json") as temporary:
        temporary.write_text(json.dumps(entries, indent=0) + "\n")


def of_table(table: str, results: str | Path = "results") -> pd.DataFrame:
    """Return all runs of a table, as `frame` does.

    Raises FileNotFoundError where the runs were not made or some of their records are gone, and
    ValueError where several notebooks have a table of this name.
    """
    found = sorted(Path(results).glob(f"runs/*/{table}.json"))
    if len(found) > 1:
        places = ", ".join(map(str, found))
        raise ValueError(f"table {table} has several indexes, {places}: delete the outdated ones")
    entries = json.loads(found[0].read_text()) if found else []
    paths = [RECORDS / entry["record"] for entry in entries]
    missing = sum(not path.exists() for path in paths)
    if missing or not paths:
        what = f"{missing} of {len(paths)} runs" if paths else "the runs"
        where = Path(results) / "runs"
        raise FileNotFoundError(
            f"{what} of table {table} were not made ({where}): call `fpl sweep {table}` first"
        )
    return frame(paths, [entry["row"] for entry in entries])


def frame(paths: Iterable[Path], rows: Iterable[str] | None = None) -> pd.DataFrame:
    """Return a line per run, round and client.

    rows: for each record the label of its row in a table; without them, the key of its method.

    Columns are
    * row, run: the label, and the name of the record. A record may stand under two labels.
    * title, control: the printed name of the method, and whether it is a control.
    * images: the data set, of which `data` names a use with a backbone and a partition.
    * settings: the names of the run's settings, separated by spaces. They travel with every line,
      so that settings are told from results whatever is done to the frame.
    * a column for each setting, missing where a method does not have it.
    * round, client, domain ("" where the partition is not by domain), accuracy in [0, 1], and any
      other result of which the record has a number for each client.
    * up, down: the numbers that a participant sent and received, missing for other clients.
    * base, novel, target: the accuracy on base classes, on novel classes and on the domain held
      out, in the last round of runs that are tested there.

    Raises ValueError where a setting has the name of another column.
    """
    paths = list(paths)
    heads: list[dict[str, Any]] = []
    settings = []
    results = []
    for path, label in zip(paths, rows or [""] * len(paths), strict=True):
        record = json.loads(path.read_text())
        own = record["settings"]
        results += [{"of": len(heads), **line} for line in lines_of(record)]
        settings.append(own)
        heads.append(
            {
                "row": label or own["method"],
                "run": path.stem,
                "title": record["title"],
                "control": record["is_control"],
                "images": record["images"],
                "settings": " ".join(own),
            }
        )
    head = pd.DataFrame(heads)
    middle = pd.DataFrame(settings)
    tail = pd.DataFrame(results).set_index("of")
    for taken in middle.columns.intersection([*head, *tail]):
        raise ValueError(f"the setting {taken} has the name of another column: rename it")
    return head.join(middle).join(tail).reset_index(drop=True)


def lines_of(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the results of a record, a line per round and client."""
    for found in record["rounds"]:
        participants = found["participants"]
        up = dict(zip(participants, found["up"], strict=True))
        down = dict(zip(participants, found["down"], strict=True))
        n = len(found["accuracy"])
        each = dict.fromkeys(ELSEWHERE, [math.nan] * n)
        each |= found.get("elsewhere", {})
        for name in found.keys() - OTHER:
            each[name] = found[name]
        for client in range(n):
            yield {
                "round": found["round"],
                "client": client,
                "domain": record["domains"][client] if record["domains"] else "",
                "up": up.get(client, math.nan),
                "down": down.get(client, math.nan),
                **{name: values[client] for name, values in each.items()},
            }
