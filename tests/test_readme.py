"""The README begins with the two commands, its tables are the expected ones, and what it links to is there."""

import re

from fpl import compare, notebook

TEXT = (notebook.ROOT / "README.md").read_text()


def test_begins_with_the_two_commands():
    assert re.match(r"# .+\n\n```\nmake repro\b.*\nmake test\b.*\n```\n", TEXT)


def test_tables_are_the_expected_ones(monkeypatch):
    monkeypatch.chdir(notebook.ROOT)
    assert "| ZS-CLIP" in TEXT and "prompt tree" in TEXT
    assert compare.with_tables(TEXT) == TEXT


def test_links_resolve():
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert links and not [link for link in links if not (notebook.ROOT / link).exists()]
