"""The executed notebooks, tables and figures as pages that need no network: results/report/index.html."""

from __future__ import annotations

import csv
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import nbformat
import yaml
from bs4 import BeautifulSoup, Tag  # this and jinja2 come with nbconvert
from jinja2 import DictLoader, Environment
from latex2mathml.converter import convert
from markupsafe import Markup, escape
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

from fpl.data.files import ROOT, atomic_write
from fpl.experiments.notebook import EXECUTED

REPORT = Path("results/report")
MISSING = {"", "nan", "NaN", "None", "<NA>", "NaT", "-", "–", "—"}
NUMBER = re.compile(r"[-+−]?(\d[\d,]*)?\.?\d+(e[-+]?\d+)?\s*(%|±.*|\(.*\)|\[.*\])?")
STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --soft: #f5f5f3; --line: #d6d6d2; --link: #00539c; --dim: #5c5c5c; --word: #7a3e9d; --text: #4a6349 }
@media screen and (prefers-color-scheme: dark) { :root { --ink: #e4e4e0; --paper: #17191c; --soft: #22252a; --line: #3d4147; --link: #8ec2f5; --dim: #a3a7ad; --word: #d3a6f0; --text: #a5c3a2 } }
* { box-sizing: border-box }
body { font: 17px/1.55 system-ui, sans-serif; max-width: 76rem; margin: 0 auto; padding: 1rem 1.2rem 3rem; color: var(--ink); background: var(--paper); overflow-wrap: anywhere }
p, li, img { max-width: min(100%, 50rem) } a { color: var(--link) } h1, h2, h3 { line-height: 1.25 } h2 { margin-top: 2.2em } img { height: auto; background: #fff }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; list-style: none; margin: 0; padding: 0 0 .5rem } ol li { margin-bottom: .7rem }
header { border-bottom: 1px solid var(--line) } footer { border-top: 1px solid var(--line); margin-top: 3rem; padding-top: .6rem }
.toc { border-left: 3px solid var(--line); padding-left: .9rem; margin: 1.2rem 0; font-size: .9rem } .toc ul { display: block; padding: 0 } .toc .h3 { padding-left: 1rem }
figure { margin: 1.5rem 0; break-inside: avoid } code { font-size: .88em } pre code { font-size: inherit } .output_wrapper pre { border-left: 3px solid var(--line) }
pre { background: var(--soft); padding: .6rem .8rem; overflow-x: auto; font-size: .82rem; line-height: 1.4; overflow-wrap: normal }
.highlight :is(.c1, .sd, .s1, .s2, .sa) { color: var(--text) } .highlight :is(.k, .kn, .kc, .ow, .nd) { color: var(--word) } .highlight :is(.nc, .nf) { font-weight: 600 }
.scroll { display: block; overflow: auto; margin: 1rem 0; background: linear-gradient(90deg, var(--paper) 40%, transparent) left / 2rem 100% no-repeat local, linear-gradient(270deg, var(--paper) 40%, transparent) right / 2rem 100% no-repeat local,
  linear-gradient(90deg, var(--line), transparent) left / .8rem 100% no-repeat, linear-gradient(270deg, var(--line), transparent) right / .8rem 100% no-repeat } /* a shade where there is more to scroll to */
.scroll:has(> math) { max-width: 50rem } .long { max-height: 85vh }
table { border-collapse: collapse; width: max-content; font-size: .85rem; font-variant-numeric: tabular-nums; overflow-wrap: normal } tbody tr:hover { background: var(--soft) }
td, th { padding: .25rem .5rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; max-width: min(17rem, 45vw) } thead th { position: sticky; top: 0; background: var(--paper); vertical-align: bottom }
.n { text-align: right } td.n { white-space: nowrap } th.n { width: 1rem } th button { all: unset; cursor: pointer } th button:hover { color: var(--link) }
button:focus-visible { outline: 2px solid var(--link); outline-offset: 2px } th button::after { content: "\\a0↕"; color: var(--dim); font-weight: normal }
[aria-sort=ascending] button::after { content: "\\a0↑" } [aria-sort=descending] button::after { content: "\\a0↓" }
@media print { body { max-width: none; font-size: 10pt } header, footer, .toc, button::after { display: none } .scroll { overflow: visible; max-height: none } table { font-size: 7.5pt; width: auto } thead th { position: static } pre { white-space: pre-wrap; overflow-wrap: anywhere } h1, h2, h3 { break-after: avoid } tr, img { break-inside: avoid } }
"""
SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0], rows = [...body.rows], heads = [...table.tHead.rows[0].cells];
  const text = (row, i) => row.cells[i].textContent.trim(), number = s => parseFloat(s.replaceAll(",", "").replace("−", "-"));
  heads.forEach((head, i) => head.firstElementChild.addEventListener("click", () => {
    const order = { none: "ascending", ascending: "descending", descending: "none" }[head.getAttribute("aria-sort")];
    heads.forEach(other => other.setAttribute("aria-sort", other === head ? order : "none"));
    const two = head.className === "n" ? (a, b) => number(a) - number(b) : (a, b) => a.localeCompare(b, "en", { numeric: true });
    const by = (a, b) => (a === "–") - (b === "–") || (order === "descending" ? two(b, a) : two(a, b));
    body.append(...(order === "none" ? rows : [...rows].sort((a, b) => by(text(a, i), text(b, i)))));
  }));
}
"""
TEMPLATES = {
    "page": """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ page.title }} · fpl</title><link rel="icon" href="data:,"><style>{{ style }}</style></head><body>
<header><nav aria-label="Report"><ul><li><a href="index.html">Contents</a></li><li><a href="results.html">Results</a></li>
<li><a href="index.html#how-to-cite">How to cite</a></li></ul></nav></header><main><h1>{{ page.title }}</h1>
{% if page.toc | length > 2 %}<nav class="toc" aria-label="On this page"><ul>
{% for level, id, text in page.toc %}<li class="{{ level }}"><a href="#{{ id }}">{{ text }}</a></li>{% endfor %}</ul></nav>{% endif %}
{{ page.body | safe }}</main>
<footer><nav aria-label="Previous and next"><ul>{% if before %}<li><a rel="prev" href="{{ before.file }}">← {{ before.title }}</a></li>{% endif %}
{% if after %}<li><a rel="next" href="{{ after.file }}">{{ after.title }} →</a></li>{% endif %}</ul></nav></footer>
<script>{{ script }}</script></body></html>
""",
    "index": """<h1>Federated prompt learning of CLIP, reproduced</h1><p>The executed notebooks in reading order, then all tables and figures.</p>
<ol>{% for page in pages %}<li><a href="{{ page.file }}">{{ page.title }}</a><br>{{ page.lead }}</li>{% endfor %}</ol>
<h2>How to cite</h2><p>{{ cite.message }}</p><p>{{ authors }}. <em>{{ cite.title }}</em>. Version {{ cite.version }}.</p>
<pre>{{ bibtex }}</pre>""",
    "results": """{% macro see(page) %}{% if page %}; see <a href="{{ page.file }}">{{ page.title }}</a>{% endif %}{% endmacro %}
<h1>Tables and figures</h1><p>Every table and figure with its files. A click on a header sorts a table: up, down, and back as it was.</p>
<h2>Tables</h2>{% for name, files, page, note, table in tables %}<h3>{{ name }}</h3>
<p>{{ note }} <a href="tables/{{ files[0] }}">{{ files[0] }}</a>{{ see(page) }}</p>{{ table | safe }}{% else %}<p>No table was made yet.</p>{% endfor %}
<h2>Figures</h2>{% for name, files, page in figures %}<h3>{{ name }}</h3>
<figure><img src="figures/{{ files[-1] }}" alt="{{ name }}{{ ', a figure of: ' + page.title if page }}"><figcaption>
{% for file in files %}<a href="figures/{{ file }}">{{ file }}</a>{{ ", " if not loop.last }}{% endfor %}{{ see(page) }}</figcaption></figure>
{% else %}<p>No figure was made yet.</p>{% endfor %}""",
    "table": """{% macro n(loop) %}{% if loop.index0 in numeric %} class="n"{% endif %}{% endmacro %}<div class="scroll{{ " long" if rows | length > 40 }}"><table><thead><tr>
{% for head in heads %}<th scope="col" aria-sort="none"{{ n(loop) }}><button type="button">{{ head | safe }}</button></th>{% endfor %}</tr></thead>
<tbody>{% for row in rows %}<tr>{% for cell in row %}<td{{ n(loop) }}>{{ cell | safe }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>""",
}
ENVIRONMENT = Environment(loader=DictLoader(TEMPLATES), autoescape=True)


class Page(NamedTuple):
    file: str
    title: str
    lead: str  # its first sentence
    body: str  # without the title
    toc: list[tuple[str, str, str]]  # (h2 or h3, id, text)


class Renderer(IPythonRenderer):
    """nbconvert's Markdown with formulas as MathML, so that no script is needed."""

    def inline_math(self, body: str, display: str = "inline") -> str:
        return convert(body.strip().replace(r"\arg", r"\operatorname{arg}\,"), display=display)  # it does not know \arg

    def block_math(self, body: str) -> str:
        return f'<span class="scroll">{self.inline_math(body, "block")}</span>'  # it stands in a paragraph


def build(
    executed: Path = EXECUTED,
    target: Path = REPORT,
    tables: Path = Path("results/tables"),
    figures: Path = Path("results/figures"),
) -> Path:
    """A page per executed notebook, one with all tables and figures, and a contents page, whose path is returned.

    Raises FileNotFoundError when no notebook was executed.
    """
    sources = sorted(executed.glob("*.ipynb"))
    if not sources:
        raise FileNotFoundError(f"no executed notebooks in {executed}: run `make repro`")
    pages = [page(source.stem, notebook(source, {other.stem for other in sources} - {source.stem})) for source in sources]
    pages.append(page("results", results(target, tables, figures, pages)))
    cite = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    authors = " and ".join(author["name"] for author in cite["authors"])
    fields = {"author": f"{{{authors}}}", "title": f"{{{cite['title']}}}", "version": cite["version"]}
    bibtex = "@software{fpl,\n" + "".join(f"  {name} = {{{value}}},\n" for name, value in fields.items()) + "}"
    index = page("index", render("index", pages=pages, cite=cite, authors=authors, bibtex=bibtex))
    for before, this, after in zip([None, index, *pages], [index, *pages], [*pages, None]):
        with atomic_write(target / this.file) as temporary:
            whole = render("page", page=this, before=before, after=after, style=Markup(STYLE), script=Markup(SCRIPT))
            temporary.write_text(str(whole), encoding="utf-8")
    return target / "index.html"


def notebook(path: Path, others: set[str]) -> BeautifulSoup:
    """The cells as HTML, without the styles, scripts and prompts that come with outputs; names of other notebooks are links."""
    renderer = Renderer(escape=False, exclude_anchor_links=True)
    filters = {"markdown2html": lambda source: MarkdownWithMath(renderer=renderer).render(source)}
    exporter = HTMLExporter(template_name="basic", filters=filters, exclude_input_prompt=True, exclude_output_prompt=True)
    soup = parsed(exporter.from_notebook_node(nbformat.read(path, as_version=4))[0])
    for tag in soup(["style", "script"]):
        tag.decompose()
    for table in soup.select("table:has(thead):has(tbody)"):
        head, body = table(["thead", "tbody"])
        heads = grid(head)
        indexed = not heads[-1][-1]  # pandas gives the names of the index a line of their own
        names = [
            column[-1] if indexed and column[-1] else " · ".join(dict.fromkeys(filter(None, column))) for column in zip(*heads)
        ]
        table.replace_with(sortable(names, grid(body)))
    for image in soup("img", alt=re.compile("^No description")):  # nbconvert's words where the notebook has none
        image["alt"] = "Figure: " + "".join(h.get_text() for h in image.find_all_previous(["h1", "h2", "h3"], limit=1))
    for code in soup("code"):
        stem = re.sub(r"^notebooks/|\.ipynb$", "", code.get_text())
        if stem in others and not code.find_parent(["a", "pre"]):
            code.wrap(soup.new_tag("a", href=f"{stem}.html"))
    return soup


def grid(part: Tag) -> list[list[str]]:
    """The cells' inner HTML; a cell that spans rows or columns is repeated, so that rows can change their order."""
    cells: dict[tuple[int, int], str] = {}
    for i, row in enumerate(part("tr")):
        for cell in row(["td", "th"]):
            j = next(j for j in range(len(cells) + 1) if (i, j) not in cells)
            down, right = (int(str(cell.get(span) or 1)) for span in ("rowspan", "colspan"))
            inner = cell.decode_contents().replace("\xa0", " ").strip()
            cells |= {(i + a, j + b): inner for a in range(down) for b in range(right)}
    return [[cells[key] for key in sorted(cells) if key[0] == i] for i in range(len(part("tr")))]


def sortable(heads: list[str], rows: list[list[str]]) -> BeautifulSoup:
    """A table of HTML cells with a button in each header; columns of numbers, with or without gaps, sort as numbers."""
    plain = [[Markup(cell).striptags() for cell in row] for row in rows]
    present = [[text for text in column if text not in MISSING] for column in zip(*plain)]
    numeric = {j for j, column in enumerate(present) if column and all(NUMBER.fullmatch(text) for text in column)}
    shown = [["–" if text in MISSING else cell for cell, text in zip(row, texts)] for row, texts in zip(rows, plain)]
    return render("table", heads=[head or "row" for head in heads], rows=shown, numeric=numeric)


def results(target: Path, tables: Path, figures: Path, pages: list[Page]) -> BeautifulSoup:
    """Every table and figure with its files, which are copied beside the page."""
    entries: dict[str, dict[str, list[str]]] = {"tables": {}, "figures": {}}
    for file in [*sorted(tables.glob("*.csv")), *sorted(figures.glob("*.png")), *sorted(figures.glob("*.svg"))]:
        kind = "tables" if file.suffix == ".csv" else "figures"
        entries[kind].setdefault(file.stem, []).append(file.name)
        with atomic_write(target / kind / file.name) as temporary:
            shutil.copyfile(file, temporary)

    def about(name: str) -> Page | None:  # the notebook whose name it begins with: ablation_lam is of 11_ablations
        return next((page for page in pages if name.startswith(re.sub(r"^\d+_|s?\.html$", "", page.file))), None)

    listed = [(name, files, about(name), *table(tables / files[0])) for name, files in entries["tables"].items()]
    return render("results", tables=listed, figures=[(name, files, about(name)) for name, files in entries["figures"].items()])


def table(path: Path) -> tuple[str, BeautifulSoup]:
    """The note above a table, from its Markdown file, and the CSV file as a sortable table; a column has one number of decimals."""
    with path.open(newline="", encoding="utf-8") as file:
        heads, *rows = ([str(escape(cell)) for cell in row] for row in csv.reader(file))
    for j in range(len(heads)):
        digits = max((len(row[j].partition(".")[2]) for row in rows if re.fullmatch(r"-?\d+\.\d+", row[j])), default=0)
        for row in rows:
            row[j] = f"{float(row[j]):.{digits}f}" if digits and re.fullmatch(r"-?\d+(\.\d+)?", row[j]) else row[j]
    twin = path.with_suffix(".md")
    note, *blocks = twin.read_text(encoding="utf-8").split("\n\n") if twin.exists() else [""]
    return note if len(blocks) == 1 else "", sortable(heads, rows)  # more blocks: the note is of the first one only


def page(stem: str, soup: BeautifulSoup) -> Page:
    """The page of a body: its title, first sentence and table of contents, after its headings are given ids."""
    toc: list[tuple[str, str, str]] = []
    for heading in soup(["h2", "h3"]):
        slug = re.sub(r"\W+", "-", heading.get_text().lower()).strip("-")
        while any(slug == other for _, other, _ in toc):
            slug += "-2"
        heading["id"] = slug
        toc.append((heading.name, slug, heading.get_text()))
    title = soup.h1.extract().get_text() if soup.h1 else stem
    first = " ".join(soup.p.get_text().split()) if soup.p else ""
    lead = re.match(r".+?[.!?](?=\s+[A-Z]|$)", first)
    return Page(f"{stem}.html", title, lead[0] if lead else first, str(soup), toc)


def parsed(text: str) -> BeautifulSoup:
    return BeautifulSoup(text, "html.parser")


def render(template: str, **values: object) -> BeautifulSoup:
    return parsed(ENVIRONMENT.get_template(template).render(**values))
