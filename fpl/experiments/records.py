"""Records of runs, and the frames of lines that tables and figures are made from.

A record is a file with one line of JSON: a run's settings, what each round found, the printed name
of its method, and the hashes of code and features. `fpl sweep` also leaves an index for each table:
its records, with the label of the row that each belongs to. Both carry a checksum, which whoever
reads them compares. Reading them needs no torch.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from fpl.data.files import atomic_write
from fpl.data.partitions import ELSEWHERE, GLOBAL
from fpl.experiments import places

RECORDS = Path("results/records")
# What a record says of a round that is not a list with a number for each client.
OTHER = {"round", "participants", "loss", "up", "down", "elsewhere"}
# Names that no setting can have: those of a frame's other columns, and OTHER.
TAKEN = OTHER | {"row", "run", "title", "control", "images", "settings", "client", "domain"}
TAKEN |= {"client_name", "accuracy", *ELSEWHERE}
CHECKSUM = "sha256"
# What JSON of another structure than ours ends in.
UNFIT = (LookupError, TypeError, ValueError, AttributeError, RecursionError)


class Key(NamedTuple):
    """All that the numbers of a run depend on, by which its record is found.

    code, features: their hashes. views: random crops of each training image.
    """

    settings: Mapping[str, Any]
    code: str
    features: str
    views: int

    @property
    def path(self) -> Path:
        """Where the record is or will be: row and seed, which people read, and a hash of all."""
        features = f"{self.features} {self.views}" if self.views else self.features
        digest = checksum([self.settings, self.code, features])
        return RECORDS / f"{self.settings['method']}-{self.settings['seed']}-{digest[:16]}.json"


def checksum(content: Any) -> str:
    """Return the hash of what JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class Damaged(ValueError):
    """A file is not what was written: its bytes have changed, or its name."""


def write(record: Mapping[str, Any]) -> Path:
    """Write a record where its key says, and return that place."""
    path = key_of(record).path
    seal(record, path)
    return path


def read(path: Path) -> dict[str, Any]:
    """Return a record. Raises Damaged for one that has changed or has another one's name."""
    record = unseal(path)
    try:
        name = key_of(record).path.name
    except UNFIT:
        name = ""
    if name != path.name:
        raise Damaged(f"{path} holds another run than its name says")
    return record


def key_of(record: Mapping[str, Any]) -> Key:
    """Return by what a record is found."""
    return Key(*(record[name] for name in Key._fields))


def is_whole(path: Path, reader: Callable[[Path], Any] = read) -> bool:
    """Return whether there is a record, or what `reader` reads, and warn of one that is damaged."""
    try:
        return path.is_file() and bool(reader(path))
    except Damaged as error:
        warnings.warn(f"{error}: its run is made again", stacklevel=2)
        return False


def seal(content: Mapping[str, Any], path: Path) -> None:
    """Write one line of JSON with a checksum of all that it says."""
    sealed = {**content, CHECKSUM: checksum(content)}
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(sealed, sort_keys=True) + "\n")


def unseal(path: Path) -> dict[str, Any]:
    """Return what was sealed. Raises Damaged where it has changed since."""
    try:
        content = json.loads(path.read_text())
        whole = content.pop(CHECKSUM) == checksum(content)
    except UNFIT:
        whole = False
    if not whole:
        raise Damaged(f"{path} is damaged")
    return content


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
    names = [path.name for path in paths]
    index = {"rows": [*zip(rows, names, strict=True)]}
    seal(index, Path(results) / "runs" / folder / f"{table}.json")


def of_table(table: str, results: str | Path | None = None) -> pd.DataFrame:
    """Return all runs of a table, as `frame` does.

    Raises FileNotFoundError where the runs were not made or some of their records are gone, and
    ValueError where a file is damaged or several notebooks have a table of this name.
    """
    results = Path(results or places.results())
    found = sorted(results.glob(f"runs/*/{glob.escape(table)}.json"))
    if len(found) > 1:
        listed = ", ".join(map(str, found))
        raise ValueError(f"table {table} has several indexes, {listed}: delete the outdated ones")
    try:
        index = unseal(found[0])["rows"] if found else []
        paths = [RECORDS / name for _, name in index]
        missing = sum(not path.is_file() for path in paths)
        if missing or not paths:
            what = f"{missing} of {len(paths)} runs" if paths else "the runs"
            where = results / "runs"
            raise FileNotFoundError(
                f"{what} of table {table} were not made ({where}): call `fpl sweep {table}` first"
            )
        return frame(paths, [row for row, _ in index])
    except Damaged as error:
        raise Damaged(f"{error}: call `fpl sweep {table}`, which makes it again") from None


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
    * round, client, domain ("" where the partition is not by domain), client_name ("" where it is
      not by the column client), accuracy in [0, 1], and any other result of which the record has a
      number for each client.
    * up, down: the numbers that a participant sent and received, missing for other clients.
    * base, novel, target: the accuracy on base classes, on novel classes and on the domain held
      out, in the last round of runs that are tested there.

    Raises ValueError where a record is damaged, or a setting has the name of another column.
    """
    paths = list(paths)
    heads: list[dict[str, Any]] = []
    settings = []
    results = []
    for path, label in zip(paths, rows or [""] * len(paths), strict=True):
        record = read(path)
        try:
            lines = [{"of": len(heads), **line} for line in lines_of(record)]
            if not lines:
                raise ValueError
            results += lines
            own = dict(record["settings"])
            heads.append(head_of(record, label))
        except UNFIT:
            raise Damaged(f"{path} is not built as a record is") from None
        settings.append(own)
    head = pd.DataFrame(heads)
    middle = pd.DataFrame(settings)
    tail = pd.DataFrame(results).set_index("of")
    for taken in middle.columns.intersection([*head, *tail]):
        raise ValueError(f"the setting {taken} has the name of another column: rename it")
    return head.join(middle).join(tail).reset_index(drop=True)


def head_of(record: dict[str, Any], label: str) -> dict[str, Any]:
    """Return what a record says of the whole run, under the label of a row."""
    return {
        "row": label or record["settings"]["method"],
        "run": key_of(record).path.stem,
        "title": record["title"],
        "control": record["is_control"],
        "images": record["images"],
        "settings": " ".join(record["settings"]),
    }


def lines_of(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the results of a record, a line per round and client."""
    for found in record["rounds"]:
        participants = found["participants"]
        up = dict(zip(participants, found["up"], strict=True))
        down = dict(zip(participants, found["down"], strict=True))
        n = len(found["accuracy"])
        each = dict.fromkeys((GLOBAL, *ELSEWHERE), [math.nan] * n)
        each |= found.get("elsewhere", {})
        for name in found.keys() - OTHER:
            each[name] = found[name]
        for client in range(n):
            yield {
                "round": found["round"],
                "client": client,
                "domain": record["domains"][client] if record["domains"] else "",
                "client_name": record["clients"][client] if record["clients"] else "",
                "up": up.get(client, math.nan),
                "down": down.get(client, math.nan),
                **{name: values[client] for name, values in each.items()},
            }
