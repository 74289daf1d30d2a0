"""Promise: the report needs no network, its links lead somewhere, its tables sort by any column."""

import base64
import hashlib
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
    tables.save(TABLE, "lam", folder / "tables" / "10_things", note="What `it` says: my\\_photos.")
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
        and "What it says: my_photos. lam.csv" in soup.main.get_text()
        and soup.select_one("h3 + p > code").get_text() == "it"
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


LINKS = {
    "`20_other`": "20_other.html",
    "`notebooks/20_other.ipynb`": "20_other.html",
    "`docs/data.md`": "data.html",
    "`data`": None,
    "`fpl/data/`": None,
    "`fpl/20_other`": None,
    "`data.csv`": None,
    "[x](../notebooks/20_other.ipynb#a)": "20_other.html#a",
    "[x](data.md)": "data.html",
    "[x](../fpl/data/)": None,
    "[x](../fpl/data.py)": None,
    "[x](//host.example/data.md)": None,
    "[x](https://host.example/owner/data)": "https://host.example/owner/data",
    "[x](https://host.example/data.html)": "https://host.example/data.html",
    "[x](https://host.example/20_other.ipynb)": "https://host.example/20_other.ipynb",
    "[x](mailto:20_other.md)": "mailto:20_other.md",
}


@pytest.mark.parametrize("text", LINKS)
def test_only_what_names_a_page_leads_to_it(text):
    soup = report.harmless(report.html_of(text))
    report.connect(soup, {"20_other", "data"}, {"10_things", "20_other"})
    assert [link["href"] for link in soup("a")] == ([LINKS[text]] if LINKS[text] else [])
    assert soup.get_text().strip() == ("x" if "[x]" in text else text.strip("`"))


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


HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<img src='https://elsewhere.example/pixel.png'>",
    "<img src='data:image/svg+xml;base64,PHN2Zz4='>",
    "<svg onload=alert(1)><script>alert(1)</script><a href='javascript:alert(1)'>x</a></svg>",
    "<iframe srcdoc='<script>alert(1)</script>'></iframe>",
    "<object data='data:text/html,<script>alert(1)</script>'></object><embed src=x>",
    "<a href='java\nscript:alert(1)'>x</a> <a href='&#106;avascript:alert(1)'>x</a>",
    "<a href='data:text/html,<script>alert(1)</script>'>x</a>",
    "<math><mtext><table><mglyph><style><img src=x onerror=alert(1)></style></mglyph></table>",
    "<math href='javascript:alert(1)'><mi xlink:href='javascript:alert(1)'>x</mi></math>",
    "<!--><img src=x onerror=alert(1)>-->",
    "<noscript><p title='</noscript><img src=x onerror=alert(1)>'></noscript>",
    "<meta http-equiv=refresh content='0;url=https://elsewhere.example'><base href='//x.y'>",
    "<form action='https://elsewhere.example'><input formaction=x><button>x</button></form>",
    "<p style='position:fixed;background:url(https://x.y)' onclick=alert(1)>x</p>",
    "<details open ontoggle=alert(1)>x</details><video><source onerror=alert(1)></video>",
    r"$\text{<img src=x onerror=alert(1)>}$",
    r"$\frac$",
    "[x](javascript:alert(1)) ![x](https://elsewhere.example/pixel.png)",
    "<table><thead><tr><th onmouseover=alert(1) rowspan=99999 colspan=x><img src=x onerror=y></th>"
    "</tr></thead><tbody><tr><td><script>alert(1)</script></td></tr></tbody><tbody></tbody></table>",
    "<table><thead></thead><tbody></tbody></table>",
]
ACTIVE = {"data", "formaction", "poster", "srcdoc", "srcset", "style", "xlink:href"}


@pytest.fixture(scope="module")
def strange(tmp_path_factory):
    """The page of a stranger's executed notebook, whose name is hostile, too."""
    folder = tmp_path_factory.mktemp("strange")
    outputs = [shown({"text/html": text}) for text in HOSTILE]
    outputs += [shown({"image/svg+xml": HOSTILE[4]}), shown({"text/markdown": HOSTILE[1]})]
    outputs += [shown({"application/javascript": "alert(1)"}), shown({"text/latex": HOSTILE[17]})]
    outputs.append(new_output("stream", text="\x1b[31m<script>alert(1)</script>"))
    title = new_markdown_cell("# <img src=x onerror=alert(1)>&lt;script&gt;")
    told = [title, *map(new_markdown_cell, HOSTILE), new_code_cell("<script>", outputs=outputs)]
    book = new_notebook(cells=told)
    name = 'javascript:alert(1)"><script>'
    nbformat.write(book, folder / f"{name}.ipynb")
    report.build(folder, folder / "report", folder / "tables", folder / "docs")
    return [path.read_text() for path in sorted((folder / "report").glob("*.html"))]


def test_nothing_acts_or_loads_in_a_strangers_notebook(strange):
    assert len(strange) == 3
    for text in strange:
        soup = BeautifulSoup(text, "html.parser")
        (script,) = soup("script")
        assert "alert" not in script.string and script.parent.name == "body"
        assert not soup.main(["style", "svg", "iframe", "object", "embed", "form", "input", "base"])
        assert not soup(["noscript", "mglyph", "video", "template"])
        for tag in soup.main(True):
            assert not any(name.startswith("on") or name in ACTIVE for name in tag.attrs), tag
            assert "script:" not in str(tag.get("href", "")), tag
            assert tag.name != "img" or tag["src"].startswith("data:"), tag
        assert len(soup("meta", attrs={"http-equiv": True})) == 1


def test_a_browser_is_told_to_run_our_script_alone(site):
    for soup in site.values():
        (policy,) = soup("meta", attrs={"http-equiv": "Content-Security-Policy"})
        said = dict(part.split(" ", 1) for part in policy["content"].split("; "))
        assert said["default-src"] == said["base-uri"] == said["form-action"] == "'none'"
        for kind, tag in (("style-src", soup.style), ("script-src", soup.script)):
            digest = hashlib.sha256(tag.string.encode()).digest()
            assert said[kind] == f"'sha256-{base64.b64encode(digest).decode()}'"
        assert said["img-src"] == "'self' file: data:"


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"cells": 1}', '{"nbformat": 4, "cells": [1]}']
)
def test_what_is_no_notebook_is_named(tmp_path, content):
    (tmp_path / "10_x.ipynb").write_text(content)
    with pytest.raises(ValueError, match="10_x.ipynb cannot be shown as a notebook"):
        report.build(tmp_path, tmp_path / "report", tmp_path, tmp_path)


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


@pytest.mark.parametrize("name", ["index", "tables", "reading"])
def test_a_notebook_that_is_called_as_another_page_is_refused(name, tmp_path):
    nbformat.write(cells("A thing", "It."), tmp_path / f"{name}.ipynb")
    (tmp_path / "reading.md").write_text(DOCUMENT)
    with pytest.raises(ValueError, match=f"a page {name} of its own: rename that notebook"):
        report.build(tmp_path, tmp_path / "report", tmp_path, tmp_path)
    assert not (tmp_path / "report").exists()


def test_figures_whose_names_differ_in_case_are_two(site, tmp_path):
    nbformat.write(cells("A thing", "It."), tmp_path / "10_things.ipynb")
    (tmp_path / "tables/10_things").mkdir(parents=True)
    for name in ("lam.png", "Lam.png"):
        (tmp_path / "tables/10_things" / name).write_bytes(base64.b64decode(PIXEL))
    report.build(tmp_path, tmp_path / "report", tmp_path / "tables", tmp_path / "none")
    soup = BeautifulSoup((tmp_path / "report/tables.html").read_text(), "html.parser")
    assert {image["src"].rpartition("/")[2] for image in soup("img")} == {"lam.png", "Lam.png"}


LONG = ["0.1", "0.30000000000000004", "12345678901234567890", "-3", "none"]


def test_numbers_are_filled_up_and_no_digit_is_made_up():
    found = report.align(LONG)
    assert found[:2] == ["0.10000000000000000", "0.30000000000000004"]
    assert found[2:] == ["12345678901234567890." + 17 * "0", "-3." + 17 * "0", "none"]


def test_the_script_leaves_tables_alone_that_have_no_buttons(site):
    """As one without a head; else no table behind it could be sorted."""
    soup = named(site, "10_things")
    (selector,) = re.findall(r'querySelectorAll\("(table[^"]*)"\)', soup.script.string)
    page = BeautifulSoup("<table><tr><td>1</td></tr></table>" + str(soup), "html.parser")
    assert page.select(selector) == page("table")[1:]


def test_a_notebook_is_listed_with_its_question():
    body = "<h1>A title</h1><p><strong>Question.</strong> What is it? And more.</p>"
    page = report.make_page("10_things", BeautifulSoup(body, "html.parser"))
    assert (page.title, page.lead) == ("A title", "What is it?")
