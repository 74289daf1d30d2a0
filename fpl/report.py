"""The executed notebooks as pages that need no network: results/report/index.html."""

from __future__ import annotations

import html
import re
from pathlib import Path

import nbformat
from latex2mathml.converter import convert
from nbconvert import HTMLExporter

from fpl.files import writing
from fpl.notebook import EXECUTED

REPORT = Path("results/report")
STYLE = """
body { font: 17px/1.55 system-ui, sans-serif; max-width: 54rem; margin: 0 auto; padding: 1rem 1.2rem 4rem; color: #1b1b1b }
nav { border-bottom: 1px solid #ccc; padding-bottom: .4rem } nav a { margin-right: 1rem }
h1 { line-height: 1.2 } a { color: #00539c } img, svg { max-width: 100%; height: auto }
pre { background: #f5f5f5; padding: .6rem .8rem; overflow-x: auto; font-size: .82rem; line-height: 1.4 }
.jp-OutputArea-output, .jp-RenderedHTMLCommon { overflow-x: auto } .prompt, .jp-InputPrompt, .jp-OutputPrompt, .anchor-link { display: none }
table { display: block; overflow-x: auto; border-collapse: collapse; border: none; font-size: .85rem } td, th { border: none; padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right }
td:first-child, th:first-child { text-align: left } .highlight .c1, .highlight .sd { color: #5a6b5a } .highlight .k, .highlight .kn { color: #7a3e9d }
math[display=block] { margin: .6rem 0; overflow-x: auto }
"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><nav><a href="index.html">Contents</a></nav>
{body}
</body></html>
"""


def build(executed: Path = EXECUTED, target: Path = REPORT) -> Path:
    """One page per executed notebook and a table of contents. Raises FileNotFoundError when no notebook was executed."""
    sources = sorted(executed.glob("*.ipynb"))
    if not sources:
        raise FileNotFoundError(f"no executed notebooks in {executed}: run `make repro`")
    entries = []
    for source in sources:
        book = nbformat.read(source, as_version=4)
        title = heading(book)
        write(target / f"{source.stem}.html", title, body(book))
        entries.append(f'<li><a href="{source.stem}.html">{html.escape(title)}</a></li>')
    write(target / "index.html", "fpl: federated prompt learning of CLIP, reproduced", contents(entries))
    return target / "index.html"


def heading(book: nbformat.NotebookNode) -> str:
    first = next(cell.source for cell in book.cells if cell.cell_type == "markdown")
    return first.splitlines()[0].lstrip("# ")


def contents(entries: list[str]) -> str:
    return (
        "<h1>Federated prompt learning of CLIP, reproduced</h1>\n<p>The executed notebooks, in reading order.</p>\n<ol>\n"
        + "\n".join(entries)
        + "\n</ol>"
    )


def body(book: nbformat.NotebookNode) -> str:
    """The notebook's content as HTML; formulas become MathML first, so that no script is needed."""
    for cell in book.cells:
        if cell.cell_type == "markdown":
            cell.source = formulas(cell.source)
    inside, _ = HTMLExporter(template_name="basic", anchor_link_text="").from_notebook_node(book)
    return inside


def formulas(text: str) -> str:
    text = re.sub(r"\$\$(.+?)\$\$", lambda m: convert(m[1].strip(), display="block"), text, flags=re.DOTALL)
    return re.sub(r"(?<![\\$])\$([^$\n]+?)\$", lambda m: convert(m[1]), text)


def write(path: Path, title: str, content: str) -> None:
    with writing(path) as temporary:
        temporary.write_text(PAGE.format(title=html.escape(title), style=STYLE, body=content))
