"""The project's pages, whose tables and numbers come from the files of the results."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from fpl.data.files import atomic_write
from fpl.experiments.expected import MEASURED, TOLERANCE, UNMEASURED, USUAL

# A mark is a comment that says what stands between it and the next `<!-- end -->`. Its first word
# is `=` for a number; then come a file and, after semicolons, what is wanted of it.
MARK = re.compile(
    r"(?P<mark><!-- (?P<number>= )?"
    r"(?P<what>tolerances|(?:results/expected|docs)/[^;\s]+\.(?:csv|json|md))"
    r"(?P<fields>(?:; [^;\n]+?)*) -->)"
    r".*?(?P<end><!-- end -->)",
    re.DOTALL,
)
CHOICE = re.compile(r"([^=|]+)=(.+)")  # of rows: column=value, or column=value | value
CONVERSION = re.compile(r"(.+?)(?: ([*/]) (-?[\d.]+))?")  # of a number: column, or column * 100
FORMAT = re.compile(r",?\.\d[fg]")  # of a number: .0f, or ,.0f with a comma at thousands


def filled_in(text: str) -> str:
    """A markdown page with each table and number that has a mark filled in from the file it names.

    `<!-- results/expected/table1.md -->` stands for a whole file,
    `<!-- results/expected/table1.md; row | low as from; method=coop | fedper -->` for some columns
    and rows of its table, `<!-- = results/expected/table1.csv; method=coop; mean -->` for a number
    with two decimals, `<!-- = docs/measured.csv; name=x; value / 60; .0f -->` for one that is
    converted and rounded, and `<!-- tolerances -->` for the tolerances of `fpl compare`.
    Raises ValueError for a mark that chooses no row, and for a number that stands in several.
    """
    return MARK.sub(fill_mark, text)


def fill_mark(found: re.Match) -> str:
    """A mark, what belongs behind it, and its end."""
    fields = [field.strip() for field in found["fields"].split(";")[1:]]
    if found["number"]:
        return f"{found['mark']}{number(Path(found['what']), fields)}{found['end']}"
    if found["what"] == "tolerances":
        inside = tolerances()
    elif fields:
        inside = part(Path(found["what"]), fields)
    else:
        inside = Path(found["what"]).read_text().rstrip("\n")
    return f"{found['mark']}\n\n{inside}\n\n{found['end']}"


def number(path: Path, fields: Sequence[str]) -> str:
    """The one number of a csv or json file that the fields choose, converted and formatted."""
    if not FORMAT.fullmatch(fields[-1]):
        fields = [*fields, ".2f"]
    *choices, column, style = fields
    rows = chosen(path, choices)
    if len(rows) != 1:
        raise ValueError(f"{path}: {'; '.join(choices)} chooses {len(rows)} rows, not one")
    name, operator, factor = CONVERSION.fullmatch(column).groups(default="1")  # type: ignore
    value, factor = float(cell(rows[0], name, path)), float(factor)
    return format(value / factor if operator == "/" else value * factor, style)


def part(path: Path, fields: Sequence[str]) -> str:
    """Some columns and rows of a markdown file's table, as a table."""
    columns, *choices = fields
    pairs = [name.strip().partition(" as ") for name in columns.split(" | ")]
    rows = chosen(path, choices)
    if not rows:
        raise ValueError(f"{path}: {'; '.join(choices)} chooses no row")
    titles = [title or name for name, _, title in pairs]
    cells = [[cell(row, name, path) for name, _, _ in pairs] for row in rows]
    return markdown(titles, cells)


def chosen(path: Path, choices: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a file whose values are among those that each choice admits."""
    rows = table_of(path)
    for choice in choices:
        column, values = CHOICE.fullmatch(choice).groups()  # type: ignore
        admitted = [value.strip() for value in values.split(" | ")]
        rows = [row for row in rows if any(alike(cell(row, column, path), v) for v in admitted)]
    return rows


def cell(row: dict[str, str], column: str, path: Path) -> str:
    if column not in row:
        raise ValueError(f"{path} has no column {column!r}, it has {', '.join(row)}")
    return row[column]


def alike(a: str, b: str) -> bool:
    """Whether two cells are the same text or the same number."""
    try:
        return float(a) == float(b)
    except ValueError:
        return a == b


def table_of(path: Path) -> list[dict[str, str]]:
    """The rows of a csv file, a json list of records, or the first table of a markdown file."""
    text = path.read_text()
    if path.suffix == ".csv":
        return list(csv.DictReader(text.splitlines()))
    if path.suffix == ".json":
        records = json.loads(text)
        return [{name: str(value) for name, value in row.items()} for row in records]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [line.strip("|").split("|") for line in lines]
    names, _, *rows = [[word.strip() for word in words] for words in cells]
    return [dict(zip(names, row, strict=True)) for row in rows]


def tolerances() -> str:
    """How far a cell may move before `fpl compare` fails, as a markdown table."""
    others = f"other rows of {', '.join(MEASURED)}"
    lines = {**TOLERANCE, others: USUAL, "any other table": UNMEASURED}
    rows = [(what, f"{points:g}") for what, points in lines.items()]
    return markdown(["row or table", "may move by, in points"], rows)


def markdown(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def pages(root: Path) -> list[Path]:
    """The markdown pages below a folder that may have marks."""
    names = ("README.md", "CONTRIBUTING.md", "data/demo_clip/README.md", "docs/*.md")
    return [page for name in names for page in sorted(root.glob(name))]


def fill_pages(root: Path = Path()) -> None:
    """Fill in the tables and numbers of all pages, from the files that the marks name from here."""
    for page in pages(root):
        with atomic_write(page) as temporary:
            temporary.write_text(filled_in(page.read_text()))
