"""Promise: text from outside is shown by terminals and pages, and obeyed by none."""

import pandas as pd
import pytest
from bs4 import BeautifulSoup

from fpl import cli
from fpl.data.text import markdown, one_line
from fpl.experiments import report, tables

HOSTILE = "a\x1b[31m|b`c`\r\n<img src=x onerror=alert(1)>[d](javascript:e)\\&lt;f"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, ß 中 é", "plain, ß 中 é"),
        ("a\x1b[2J\x07b", "a\\x1b[2J\\x07b"),
        ("a\nfpl: all is well\r\n  b", "a fpl: all is well b"),
        ("a\x9b1mb\x7f", "a\\x9b1mb\\x7f"),  # the same escape in one character
        ("gpj.\u202egnp", "gpj.\\u202egnp"),  # turns the direction of writing
        ("a\u2028b\tc\0", "a\\u2028b\\tc\\x00"),
        (b"caf\xe9".decode(errors="surrogateescape"), "caf\\udce9"),  # a name that is no UTF-8
        (ValueError("x\ny"), "x y"),
    ],
)
def test_a_terminal_shows_what_it_would_obey(text, shown):
    assert one_line(text) == shown


def cells(text):
    """The cells of a table in Markdown as a page shows them, and the tags that are in them."""
    rows = BeautifulSoup(report.html_of(text), "html.parser").table("tr")
    found = [cell for row in rows for cell in row(["td", "th"])]
    return [cell.get_text() for cell in found], {tag.name for cell in found for tag in cell(True)}


def test_a_table_in_markdown_shows_every_cell_as_it_is(tmp_path):
    frame = pd.DataFrame({"class": [HOSTILE, "1e5", "007"], HOSTILE: [1.25, 2.0, 3.5]})
    texts, tags = cells(markdown(frame))
    assert tags == set()
    shown = one_line(HOSTILE)
    assert texts == ["class", shown, shown, "1.25", "1e5", "2", "007", "3.5"]
    tables.save(frame.set_index("class"), "x/y", tmp_path)
    written = (tmp_path / "x" / "y.md").read_text()
    assert cells(written)[1] == set() and "\x1b" not in written


def test_commands_print_lines_that_are_harmless(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bad = "a\x1b[31mb\nfpl: all is well"
    (tmp_path / bad).mkdir()
    for arguments in (
        ["data", "check", "own", "--root", bad],
        ["features", "verify", bad],
        ["run", "promptfl", "--params", bad],
        ["data", "list", bad, bad],
    ):
        said = ""
        try:
            cli.main(arguments)
        except SystemExit as ended:
            said = str(ended)
        printed = "".join(capsys.readouterr()) + said
        assert "\x1b" not in printed and "\\x1b" in printed, arguments
        assert not any(line.startswith("fpl: all is well") for line in printed.splitlines())
