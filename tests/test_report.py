"""Promise: the report needs no network, its links lead somewhere, its tables sort by any column."""

import base64
import re
import tomllib
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import nbformat
import pandas as pd
import pytest
import yaml
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from fpl.data.files import ROOT
from fpl.experiments import report, tables

VOID = {"meta", "link", "br", "img", "hr", "input", "col", "wbr"}
BLOCK = {
    "div",
    "table",
    "ul",
    "ol",
    "pre",
    "p",
    "h1",
    "h2",
    "h3",
    "figure",
    "nav",
}  # what ends a paragraph that is open
PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="
)
FRAME = pd.DataFrame(
    {"mean": [9.5, None, 1234.25], "note": ["a < b", "", "<b>"]},
    index=pd.MultiIndex.from_tuples([("x", 1), ("x", 2), ("y", 1)], names=["group", "k"]),
).rename_axis(columns="kind")
WIDE = pd.DataFrame(
    [[1, 2]], columns=pd.MultiIndex.from_tuples([("clipart", "mean"), ("clipart", "std")])
)
TABLE = pd.DataFrame(
    {"mean": [81.5, 9.25, None], "text": ["1 of 3", "<&>", ""]},
    index=pd.Index(["b", "a", "c"], name="row"),
)


TEXT = r"""## Twice

$a_1 < b$, `$HOME and $PATH`, see `20_other`.

$$T = \arg\min_T x$$

## Twice

## More

| n | v |
|---|---|
| 1 | 2 % |
"""


DOCUMENT = """<!-- a comment -->
# How to read

See [things](../notebooks/10_things.ipynb#twice), `20_other`, [this part](#a-part-of-it),
[code](../fpl/cli.py).

![A dot](dot.png)

## A part, of it

| a | b |
|---|---|
| 1 | x |
"""


def shown(data):
    return new_output("execute_result", data)


def cells(title, first):
    code = new_code_cell(
        "x = 1", outputs=[shown({"text/html": f._repr_html_()}) for f in (FRAME, WIDE)]
    )
    loads = "<script src='https://x.y'></script>"
    image = new_code_cell(
        "plot()", outputs=[shown({"image/png": PIXEL}), shown({"text/html": loads})]
    )
    return new_notebook(
        cells=[new_markdown_cell(f"# {title}\n\n{first}"), code, new_markdown_cell(TEXT), image]
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A site of two notebooks, a document, a table and two figures: file -> parsed page."""
    folder = tmp_path_factory.mktemp("results")
    for name in ("executed", "docs", "tables/10_things", "tables/20_other", "tables/30_not_run"):
        (folder / name).mkdir(parents=True)
    for name, title, first in (
        ("20_other", "Other", "No end"),
        ("10_things", "A & thing", "It has `code` (v. 1.5) and e.g. more. And more."),
    ):
        nbformat.write(cells(title, first), folder / "executed" / f"{name}.ipynb")
    tables.save(TABLE, "lam", folder / "tables" / "10_things", note="What it says.")
    for name in ("10_things/all.svg", "10_things/all.png", "30_not_run/late.png"):
        (folder / "tables" / name).write_bytes(base64.b64decode(PIXEL))
    (folder / "docs" / "reading.md").write_text(DOCUMENT)
    (folder / "docs" / "dot.png").write_bytes(base64.b64decode(PIXEL))
    index = report.build(folder / "executed", folder / "report", folder / "tables", folder / "docs")
    assert index == folder / "report" / "index.html"
    return {
        path: BeautifulSoup(path.read_text(), "html.parser")
        for path in sorted(index.parent.glob("*.html"))
    }


def named(site, name):
    return next(soup for path, soup in site.items() if path.name == f"{name}.html")


def column(table, i):
    return [row("td")[i].get_text() for row in table.tbody("tr")]


class Strict(HTMLParser):
    """Notes elements not closed in order, attributes that stand twice, and blocks in paragraphs."""

    def __init__(self):
        super().__init__()
        self.open, self.wrong = [], []

    def handle_starttag(self, tag, attrs):
        if len(dict(attrs)) < len(attrs) or (tag in BLOCK and "p" in self.open):
            self.wrong.append((tag, self.getpos()))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.wrong.append((tag, self.getpos()))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append((tag, self.getpos()))


def test_pages_are_well_formed(site):
    for path in site:
        parser = Strict()
        parser.feed(path.read_text())
        parser.close()
        assert parser.wrong == [] and parser.open == [], path.name
        assert path.read_text().startswith("<!DOCTYPE html>")


def test_ids_are_unique_and_every_link_leads_somewhere(site):
    for path, soup in site.items():
        ids = [tag["id"] for tag in soup.select("[id]")]
        assert len(ids) == len(set(ids)), path.name
        for link in soup.select("a[href]"):
            at = urlsplit(link["href"])
            target = path.parent / unquote(at.path) if at.path else path
            assert not at.scheme and target.is_file(), link
            assert not at.fragment or site[target].find(id=at.fragment), link


def test_nothing_is_loaded_from_elsewhere(site):
    for path, soup in site.items():
        for tag in soup.select("[src], link, [srcset], [poster], [data], iframe, object, embed"):
            source = tag.get("src") or tag.get("href")
            assert source.startswith("data:") or (path.parent / source).is_file(), tag
        assert not any(
            script.get("src") or re.search("http|import", script.string)
            for script in soup("script")
        )
        assert all(not re.search(r"url\(|@import", style.string) for style in soup("style"))
        assert len(soup("style")) == len(soup("script")) == 1


def test_images_say_what_they_are(site):
    images = [image for soup in site.values() for image in soup("img")]
    assert len(images) == 5 and all(
        image["alt"] and "No description" not in image["alt"] for image in images
    )


def test_every_header_of_every_table_is_a_button(site):
    found = [table for soup in site.values() for table in soup("table")]
    assert len(found) == 2 * 3 + 2
    for table in found:
        assert "scroll" in table.parent["class"]
        (row,) = table.thead("tr")
        assert all(len(line("td")) == len(row("th")) for line in table.tbody("tr"))
        for head in row("th"):
            assert head["aria-sort"] == "none" and head["scope"] == "col"
            (button,) = [child for child in head.children if child.name]
            assert (
                button.name == "button"
                and button["type"] == "button"
                and button.get_text(strip=True)
            )


def test_rows_stay_whole_and_numbers_sort_as_numbers(site):
    table, wide, plain = named(site, "10_things")("table")
    assert [head.get_text() for head in table("th")] == ["group", "k", "mean", "note"]
    assert [column(table, i) for i in range(3)] == [
        ["x", "x", "y"],
        ["1", "2", "1"],
        ["9.50", "–", "1234.25"],
    ]
    assert column(table, 3) == ["a < b", "–", "<b>"]
    assert [head.get_text() for head in wide("th")] == ["row", "clipart · mean", "clipart · std"]
    assert [head.get("class") for head in table("th")] == [None, ["n"], ["n"], None]
    assert column(plain, 1) == ["2 %"] and plain("th")[1]["class"] == ["n"]


@pytest.mark.parametrize(
    ("values", "numeric"),
    [
        (["1", "", "nan"], True),
        (["-1.5e-3", "1,024", "−2"], True),
        (["9.18 ± 0.62", "5 %", ".5 (1 to 2)"], True),
        (["1", "2 of 3"], False),
        (["v1", "2"], False),
        (["", "None"], False),
    ],
)
def test_a_column_is_numeric_when_all_that_is_there_is(values, numeric):
    table = report.sortable(["x"], [[value] for value in values])
    assert (table.th.get("class") == ["n"]) == numeric


def test_tables_and_figures_stand_with_their_notebook_and_a_copy_of_each_file(site):
    soup = named(site, "tables")
    assert [head.get_text() for head in soup(["h2", "h3"])] == [
        "A & thing",
        "lam",
        "figure all",
        "30_not_run",
        "figure late",
    ]
    (table,) = soup("table")
    assert [column(table, i) for i in range(3)] == [
        ["b", "a", "c"],
        ["81.50", "9.25", "–"],
        ["1 of 3", "<&>", "–"],
    ]
    assert (
        "Made by 10_things." in soup.main.get_text()
        and "What it says. lam.csv" in soup.main.get_text()
    )
    folder = next(iter(site)).parent
    copy = pd.read_csv(folder / soup.select_one("a[href$=csv]")["href"], index_col=0)
    pd.testing.assert_frame_equal(copy, TABLE.replace("", None), check_dtype=False)
    assert [image["src"] for image in soup("img")] == [
        "tables/10_things/all.svg",
        "tables/30_not_run/late.png",
    ]
    assert [link.get_text() for link in soup("figcaption")[0]("a")] == ["all.png", "all.svg"]


def test_documents_are_pages_whose_links_lead_to_pages_or_nowhere(site):
    soup = named(site, "reading").main
    assert [link["href"] for link in soup("a")] == [
        "10_things.html#twice",
        "20_other.html",
        "#a-part-of-it",
    ]
    assert "code" in soup.get_text() and "comment" not in soup.get_text()
    assert soup.img["src"] == f"data:image/png;base64,{PIXEL}"
    assert [item.a["href"] for item in named(site, "index")("ol")[1]("li")] == ["reading.html"]


def test_contents_are_in_reading_order_with_a_sentence_each(site):
    entries = [item.get_text("|") for item in named(site, "index").ol("li")]
    assert entries[:2] == ["A & thing|It has code (v. 1.5) and e.g. more.", "Other|No end"]
    assert len(entries) == 3 and entries[2].startswith("Tables and figures|")


def test_pages_lead_on_and_back_and_through_themselves(site):
    order = ["index", "10_things", "20_other", "tables", "reading"]
    for before, name, after in zip([None, *order], order, [*order[1:], None]):
        for rel, other in (("prev", before), ("next", after)):
            links = named(site, name).select(f"a[rel={rel}]")
            assert [link["href"] for link in links] == ([f"{other}.html"] if other else [])
    toc = named(site, "10_things").select(".toc a")
    assert [(link.get_text(), link["href"]) for link in toc] == [
        ("Twice", "#twice"),
        ("Twice", "#twice-1"),
        ("More", "#more"),
    ]
    assert not named(site, "index").select(".toc")
    assert [link["href"] for link in named(site, "10_things").main.select("a:has(code)")] == [
        "20_other.html"
    ]


def test_formulas_are_mathml_and_code_is_left_alone(site):
    soup = named(site, "10_things")
    assert [formula["display"] for formula in soup("math")] == ["inline", "block"]
    assert "$HOME and $PATH" in [code.get_text() for code in soup("code")]


@pytest.mark.parametrize(
    "source", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem
)
def test_the_converter_knows_every_formula_of_the_notebooks(source):
    soup = report.notebook(source)
    assert not [formula for formula in soup("math") if "\\" in formula.get_text()]
    assert not [
        text
        for text in soup.find_all(string=re.compile(r"\$\S[^$]*\$"))
        if not text.find_parent(["code", "pre"])
    ]


def test_it_is_cited_by_the_version_of_the_package(site):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == project["version"] and cited["authors"] == [
        {"name": "The fpl developers"}
    ]
    text = named(site, "index").get_text()
    assert (
        f"{cited['title']}. Version {project['version']}." in text
        and f"version = {{{project['version']}}}" in text
    )


def test_without_an_executed_notebook_it_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="no executed notebooks in .*: run `make repro`"):
        report.build(tmp_path, tmp_path / "report", tmp_path, tmp_path)
    assert not (tmp_path / "report").exists()


def test_a_notebook_is_listed_with_its_question():
    body = "<h1>A title</h1><p><strong>Question.</strong> What is it? And more.</p>"
    page = report.make_page("10_things", BeautifulSoup(body, "html.parser"))
    assert (page.title, page.lead) == ("A title", "What is it?")
