"""Images of one's own: a CSV file that lists them, or folders."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from fpl.data.datasets.layouts import images_in, stratified
from fpl.data.manifest import SPLITS, Manifest, Row, assemble, read_table


def read_own(root: Path) -> Manifest:
    """The manifest of a CSV file, or of a folder of images.

    Raises FileNotFoundError where neither is.
    """
    if root.is_file():
        return assemble(root.parent, read_csv(root), inside=False)
    if root.is_dir():
        return assemble(root, read_folder(root))
    raise FileNotFoundError(
        f"no own data at {root}: give a CSV file or a folder CLASS/FILE or DOMAIN/CLASS/FILE"
    )


def read_folder(root: Path) -> list[Row]:
    """Read images CLASS/FILE, DOMAIN/CLASS/FILE or {train,val,test}/CLASS/FILE.

    Labels are in the order of the sorted class names. Where no splits are given, a fifth of each
    domain's images is for testing, stratified by class.
    """
    flat = images_in(root, 2)
    deep = images_in(root, 3)
    if bool(flat) == bool(deep):
        found = f"both {flat[0]} and {deep[0]}" if flat else "no images"
        raise ValueError(
            f"{root} holds {found}: images must be in CLASS/FILE, "
            "or all of them in DOMAIN/CLASS/FILE"
        )
    names = sorted({path.parts[-2] for path in flat or deep})
    tops = defaultdict(list)
    for path in flat or deep:
        name = path.parts[-2]
        top = path.parts[0] if deep else "own"
        tops[top].append(Row(str(path), names.index(name), name, top, top))
    if tops.keys() <= set(SPLITS):
        return [row._replace(domain="own") for split in SPLITS for row in tops[split]]
    return [row for top, rows in tops.items() for row in stratified(rows, top)]


def read_csv(path: Path) -> list[Row]:
    """Read a CSV file: path, split, class or label or both, and maybe domain and client."""
    columns, table = read_table(path, optional={"domain"})
    if not {"path", "split"} <= columns or not {"class", "label"} & columns:
        raise ValueError(
            f"{path} needs the columns path, split, and class or label in its first line, "
            f"it has {sorted(columns)}"
        )
    for line, row in enumerate(table, start=2):
        check(row, columns, f"{path}, line {line}")
    if not {"class", "label"} <= columns:
        key = "class" if "class" in columns else "label"
        names = {row[key] for row in table}
        order = sorted(names, key=int if all(name.isdecimal() for name in names) else str)
        for row in table:
            row["class"] = row[key]
            row["label"] = str(order.index(row[key]))
    rows = []
    for row in table:
        domain = row.get("domain") or "own"
        client = row.get("client", "")
        rows.append(Row(row["path"], int(row["label"]), row["class"], row["split"], domain, client))
    return rows


def check(row: dict[str, str], columns: set[str], where: str) -> None:
    """Raise ValueError for a row that lacks a value or has one that is not allowed."""
    if not all(row[column] for column in columns - {"domain"}):
        raise ValueError(f"{where}: needs one value for each column, not {list(row.values())}")
    if row["split"] not in SPLITS:
        raise ValueError(f"{where}: the split is train, val or test, not {row['split']!r}")
    if {"class", "label"} <= columns and not row["label"].isdecimal():
        raise ValueError(f"{where}: beside a class the label is 0, 1, .., not {row['label']!r}")
