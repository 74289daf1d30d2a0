"""The README begins with the two commands, its tables are the expected ones, and what it links to is there."""

import re

from fpl.data import files
from fpl.experiments import expected

TEXT = (files.ROOT / "README.md").read_text()


def test_begins_with_the_two_commands():
    assert re.match(r"# .+\n\n```\nmake repro\b.*\nmake test\b.*\n```\n", TEXT)


def test_tables_are_the_expected_ones(monkeypatch):
    monkeypatch.chdir(files.ROOT)
    assert "| ZS-CLIP" in TEXT and "prompt tree" in TEXT
    assert expected.with_tables(TEXT) == TEXT


def test_links_resolve():
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert links and not [link for link in links if not (files.ROOT / link).exists()]
