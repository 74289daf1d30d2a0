"""The report: executed notebooks, tables, figures and documents as pages that need no network.

A notebook may be a stranger's: nothing in it acts in a page or loads anything, for two reasons.
Only harmless tags are let through, and a page tells the browser to run no script but ours.
"""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from itertools import count, product
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import quote, urlsplit

import bleach  # this, bs4 and jinja2 come with nbconvert
import nbformat
import pandas as pd
import yaml
from bs4 import BeautifulSoup, Tag
from jinja2 import Environment, PackageLoader
from latex2mathml.converter import convert
from markupsafe import Markup, escape
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

from fpl.data.files import ROOT, atomic_write
from fpl.experiments.notebook import EXECUTED, TABLES
from fpl.experiments.places import results

REPORT = results() / "report"
DOCS = ROOT / "docs"
MISSING = {"", "nan", "NaN", "None", "<NA>", "NaT", "-", "–", "—"}
NUMBER = re.compile(r"[-+−]?(\d[\d,]*)?\.?\d+(e[-+]?\d+)?\s*(%|±.*|\(.*\)|\[.*\])?")
PLAIN_NUMBER = re.compile(r"-?\d+(\.\d+)?")
# The tags of pages. Of others the text is kept, unless it is none that is read.
HARMLESS = """
a abbr b blockquote br caption code dd del details div dl dt em figcaption figure h1 h2 h3 h4 h5 h6
hr i img ins kbd li ol p pre s small span strong sub summary sup table tbody td tfoot th thead tr u
ul math menclose mfrac mi mn mo mover mpadded mphantom mroot mrow mspace msqrt mstyle msub msubsup
msup mtable mtd mtext mtr munder munderover
"""
UNREAD = ["embed", "iframe", "noscript", "object", "script", "style", "svg", "template", "textarea"]
ATTRIBUTES = {
    "*": ["class", "title", "display", "stretchy", "fence", "form", "mathvariant", "accent"],
    "a": ["href"],
    "img": ["alt", "src", "width", "height"],
    "mfrac": ["linethickness"],
    "mo": ["lspace", "rspace", "minsize", "maxsize", "movablelimits", "separator"],
    "mspace": ["width"],
    "mstyle": ["displaystyle", "scriptlevel"],
    "mtable": ["columnalign"],
    "ol": ["start"],
    "td": ["colspan", "rowspan"],
    "th": ["colspan", "rowspan"],
}
PAGES = {".ipynb", ".md", ".html"}  # files that a link or a name in code leads to
PICTURE = re.compile(r"data:image/(png|jpeg|gif|webp);base64,[\w+/=\s]+", re.ASCII)
ENVIRONMENT = Environment(
    loader=PackageLoader("fpl.experiments"), autoescape=True, trim_blocks=True
)


def policy_hash(text: str) -> str:
    """Return how a page names a script or a style that may act in it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


ENVIRONMENT.filters["policy_hash"] = policy_hash


class Page(NamedTuple):
    """A page: its file, its title, its first sentence, and what follows the title."""

    file: str
    title: str
    lead: str
    body: str
    headings: list[tuple[str, str, str]]  # h2 or h3, id, text


class Section(NamedTuple):
    """The tables (name, note, table) and figures of a notebook, in a folder of its name."""

    folder: str
    page: Page | None
    tables: list[tuple[str, str, BeautifulSoup]]
    figures: list[Path]


class Renderer(IPythonRenderer):
    """Jupyter's Markdown with formulas as MathML, so that no script is needed."""

    def inline_math(self, body: str, display: str = "inline") -> str:
        known = body.strip().replace(r"\arg", r"\operatorname{arg}\,")
        try:
            return convert(known, display=display)
        except Exception:  # the converter fails in many ways where a formula is none
            return f"<code>{escape(body)}</code>"

    def block_math(self, body: str) -> str:
        # it stands in a paragraph, where a div may not
        return f'<span class="scroll">{self.inline_math(body, "block")}</span>'


def build(
    executed: Path = EXECUTED, target: Path = REPORT, tables: Path = TABLES, docs: Path = DOCS
) -> Path:
    """Write the pages of the report and return the path of the first one, the contents.

    There is a page for each executed notebook, one for all tables and figures, which are copied
    beside it, and one for each document. Raises FileNotFoundError when no notebook was executed,
    and ValueError for one that cannot be shown or is called as another page.
    """
    books = sorted(executed.glob("*.ipynb"))
    if not books:
        raise FileNotFoundError(f"no executed notebooks in {executed}: run `make repro`")
    texts = sorted(docs.glob("*.md"))
    names = {path.stem for path in books}
    taken = names & {"index", "tables", *(path.stem for path in texts)}
    if taken:
        raise ValueError(f"the report has a page {min(taken)} of its own: rename that notebook")
    soups = {path.stem: notebook(path) for path in books}
    soups |= {path.stem: document(path) for path in texts}
    for stem, soup in soups.items():
        connect(soup, soups.keys() - {stem}, names)
    read = [make_page(stem, soup) for stem, soup in soups.items()]
    results = read[: len(books)]
    sections = list_sections(tables, target / "tables", results)
    results.append(make_page("tables", render("tables", sections=sections)))
    documents = read[len(books) :]
    cite = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    contents = render("index", results=results, documents=documents, cite=cite)
    pages = [make_page("index", contents), *results, *documents]
    style = ENVIRONMENT.get_template("report.css").render()
    script = ENVIRONMENT.get_template("report.js").render()
    earlier = [None, *pages]
    later = [*pages[1:], None]
    for before, page, after in zip(earlier, pages, later):
        around = {"before": before, "after": after, "style": style, "script": script}
        html = render("page", page=page, **around)
        with atomic_write(target / page.file) as temporary:
            temporary.write_text(str(html), encoding="utf-8")
    return target / "index.html"


def notebook(path: Path) -> BeautifulSoup:
    """Return the cells of a notebook as harmless HTML. Raises ValueError if it cannot be shown."""
    exporter = HTMLExporter(
        template_name="basic",
        filters={"markdown2html": html_of},
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )
    try:
        html, _ = exporter.from_notebook_node(nbformat.read(path, as_version=4))
    except Exception as e:  # what is no notebook fails in many ways
        raise ValueError(f"{path} cannot be shown as a notebook ({e}): execute it again") from e
    soup = harmless(html)
    for image in soup("img", alt=re.compile("^No description")):  # Jupyter's words for none
        heading = image.find_previous(["h1", "h2", "h3"])
        image["alt"] = f"Figure: {heading.get_text()}" if heading else "Figure"
    return soup


def document(path: Path) -> BeautifulSoup:
    """Return a Markdown document as HTML that holds its images."""
    soup = parse(html_of(path.read_text(encoding="utf-8")))
    for image in soup("img"):
        source = path.parent / str(image["src"])
        data = base64.b64encode(source.read_bytes()).decode()
        image["src"] = f"data:image/png;base64,{data}"
    return harmless(str(soup))


def harmless(html: str) -> BeautifulSoup:
    """Return HTML with what is known to be harmless, and with those pictures that are inside it."""
    soup = parse(html)
    for tag in soup(UNREAD):
        tag.decompose()
    pictures: dict[str, str] = {}
    for image in soup("img"):
        source = str(image.get("src"))
        name = f"picture-{len(pictures)}"
        if PICTURE.fullmatch(source):
            pictures[name] = source
            image["src"] = name
        else:
            image.decompose()
    tags = HARMLESS.split()
    clean = bleach.clean(str(soup), tags, ATTRIBUTES, strip=True)
    soup = parse(clean)
    for image in soup("img"):  # two readers of broken HTML may disagree on what is in it
        image["src"] = pictures.get(str(image.get("src")), "data:,")
    return soup


def html_of(markdown: str) -> str:
    """Return Markdown as HTML."""
    renderer = Renderer(escape=False, exclude_anchor_links=True)
    return MarkdownWithMath(renderer=renderer).render(markdown)


def connect(soup: BeautifulSoup, others: Collection[str], books: Collection[str]) -> None:
    """Make the tables of a page sortable, and links of what names another page.

    others: the stems of the other pages; books: of those that are notebooks, whose stem alone is a
    name, too. Links to other files become text, those to other hosts stay.
    """
    for table in soup.select("table:has(thead):has(tbody)"):
        head, body = table("thead")[0], table("tbody")[0]
        heads = cells_of(head)
        if not heads:
            continue
        names = [" · ".join(dict.fromkeys(filter(None, column))) for column in zip(*heads)]
        if not heads[-1][-1]:  # pandas gives the names of the index a line of their own
            names = [last or name for last, name in zip(heads[-1], names)]
        table.replace_with(sortable(names, cells_of(body)))
    for code in soup("code"):
        text = code.get_text()
        stem = text if text in books else stem_of(text)
        if stem in others and not code.find_parent(["a", "pre"]):
            code.wrap(soup.new_tag("a", href=f"{quote(stem)}.html"))
    for link in soup("a", href=True):
        url = urlsplit(str(link["href"]))
        stem = stem_of(url.path)
        if stem in others and not url.scheme and not url.netloc:
            link["href"] = url._replace(path=f"{quote(stem)}.html").geturl()
        elif url.path and not url.scheme:
            link.unwrap()


def stem_of(name: str) -> str:
    """Return the stem of a page's file; the empty one of other files."""
    path = PurePosixPath(name)
    return path.stem if path.suffix in PAGES else ""


def cells_of(part: Tag) -> list[list[str]]:
    """Return the inner HTML of cells by row, that of a cell in all rows and columns it spans.

    So rows stay whole when they change their order.
    """
    cells: dict[int, dict[int, str]] = defaultdict(dict)
    rows = part("tr")
    for i, row in enumerate(rows):
        for cell in row(["td", "th"]):
            j = next(j for j in count() if j not in cells[i])
            inner = cell.decode_contents().replace("\xa0", " ").strip()
            high = span(cell, "rowspan", len(rows) - i)
            wide = span(cell, "colspan", 1000)  # browsers take no more, either
            for down, right in product(range(high), range(wide)):
                cells[i + down][j + right] = inner
    return [[row[j] for j in sorted(row)] for row in cells.values()]


def span(cell: Tag, name: str, most: int) -> int:
    """Return how many rows or columns a cell spans."""
    text = str(cell.get(name, "1"))
    return min(int(text), most) if re.fullmatch("[1-9][0-9]{0,5}", text) else 1


def sortable(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> BeautifulSoup:
    """Return a table of HTML cells whose headers are buttons.

    Columns of numbers, with or without gaps, are marked: they sort as numbers.
    """
    numeric = []
    for j, column in enumerate(zip(*rows)):
        texts = [Markup(cell).striptags() for cell in column]
        if is_numeric(texts):
            numeric.append(j)
    return render("table", heads=heads, rows=rows, numeric=numeric, missing=MISSING)


def is_numeric(texts: Sequence[str]) -> bool:
    """Return whether there is something in a column, and all that there is are numbers."""
    present = [text for text in texts if text not in MISSING]
    return bool(present) and all(NUMBER.fullmatch(text) for text in present)


def list_sections(tables: Path, target: Path, pages: Sequence[Page]) -> list[Section]:
    """Return the tables and figures of each folder, which has the name of its notebook.

    Their files are copied to the same folder below `target`.
    """
    page_of = {page.file: page for page in pages}
    sections = []
    for folder in sorted(path for path in tables.glob("*") if path.is_dir()):
        made = sorted(folder.glob("*.csv"))
        figures = sorted([*folder.glob("*.png"), *folder.glob("*.svg")])
        for path in made + figures:
            with atomic_write(target / folder.name / path.name) as temporary:
                shutil.copyfile(path, temporary)
        page = page_of.get(f"{folder.name}.html")
        listed = [(path.stem, *read_table(path)) for path in made]
        if made or figures:
            sections.append(Section(folder.name, page, listed, figures))
    return sections


def read_table(path: Path) -> tuple[str, BeautifulSoup]:
    """Return the note above a table as HTML, from its Markdown file, and its CSV as a table."""
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    columns = [align(frame[name].map(escape)) for name in frame]
    table = sortable([escape(name) for name in frame], [*zip(*columns)])
    twin = path.with_suffix(".md")
    if not twin.exists():
        return "", table
    note, *blocks = twin.read_text(encoding="utf-8").split("\n\n")
    # with more blocks, the note is of the first one only
    return inline(note) if len(blocks) == 1 else "", table


def inline(markdown: str) -> str:
    """Return a paragraph of Markdown as harmless HTML of what is in it."""
    return (harmless(html_of(markdown)).p or Tag(name="p")).decode_contents()


def align(cells: Sequence[str]) -> list[str]:
    """Return the cells of a column with as many decimals in each number as the longest has."""
    numbers = {cell for cell in cells if PLAIN_NUMBER.fullmatch(cell)}
    digits = max((len(cell.partition(".")[2]) for cell in numbers), default=0)
    if not digits:
        return [*cells]
    return [filled(cell, digits) if cell in numbers else cell for cell in cells]


def filled(number: str, digits: int) -> str:
    """Return a number with so many decimals, of which none is made up."""
    whole, _, part = number.partition(".")
    return f"{whole}.{part:0<{digits}}"


def make_page(stem: str, soup: BeautifulSoup) -> Page:
    """Return the page of a body, whose headings get the ids that GitHub gives them."""
    headings = []
    taken: Counter[str] = Counter()
    for heading in soup(["h2", "h3"]):
        text = heading.get_text()
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        same = taken[slug]
        taken[slug] += 1
        place = f"{slug}-{same}" if same else slug
        heading["id"] = place
        headings.append((heading.name, place, text))
    title = soup.h1.extract().get_text() if soup.h1 else stem
    lead = " ".join(soup.p.get_text().split()) if soup.p else ""
    lead = lead.removeprefix("Question. ")  # with which a notebook begins
    sentence = re.match(r".+?[.!?](?=\s+[A-Z]|$)", lead)
    if sentence:
        lead = sentence[0]
    return Page(f"{stem}.html", title, lead, str(soup), headings)


def parse(html: str) -> BeautifulSoup:
    """Return HTML as a tree of its tags."""
    return BeautifulSoup(html, "html.parser")


def render(template: str, **values: object) -> BeautifulSoup:
    """Return the HTML of one of our templates."""
    return parse(ENVIRONMENT.get_template(f"{template}.html.j2").render(**values))
