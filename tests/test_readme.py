"""Promise: the README is one screen and a map, and pages say no number but those of the results."""

import json
import re
from pathlib import Path

import pytest
import safetensors

from fpl.data.files import ROOT
from fpl.experiments import expected, pages

PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in pages.pages(ROOT)}
PAGES["CHANGELOG.md"] = (ROOT / "CHANGELOG.md").read_text()
README = PAGES["README.md"]
BLOCK = re.compile(r"^```.*?^```|^ {4}[^\n]*$", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"`[^`\n]+`|\$[^$\n]+\$")  # and formulas
RESULT = re.compile(r"\d+\.\d+|\d+ ?%|\d+(?:\.\d+)? points")
# decimals and percentages that are no results
NO_RESULTS = re.compile(
    r"Dir\(0\.\d\)|YAML 1\.2|3\.11 to 3\.13|arXiv \d{4}\.\d{5}|95 % interval|licen[cs]es?/\S+"
)


def without_code(text):
    return CODE.sub("", BLOCK.sub("", text))


def visible(text):
    """What a reader sees: without the comments."""
    return re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)


def unbound(text):
    """The results that a page says without a mark."""
    text = visible(pages.MARK.sub("", without_code(text)))
    return RESULT.findall(NO_RESULTS.sub("", text))


def test_the_first_screen_has_a_picture_and_the_two_commands_with_what_they_take():
    screen = "\n".join(README.splitlines()[:40])
    assert re.search(r"^!\[.+\]\(results/expected/\S+\.png\)\n\n\*.+", screen, re.MULTILINE)
    commands = re.search(
        r"^```\nmake repro +# (.+)\nmake test +# (.+)\n```\n", screen, re.MULTILINE
    )
    assert commands and all("minutes on two cores" in what for what in commands.groups())
    assert "GB" in screen and README.index("\n```\nmake repro") < README.index("```python")


def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(visible(line)) > 120] == []


def test_the_readme_leads_to_every_page():
    assert [name for name in PAGES if name != "README.md" and f"({name})" not in README] in (
        [],
        ["CONTRIBUTING.md"],  # which hosts show by themselves
    )


@pytest.mark.parametrize("name", PAGES)
def test_links_resolve(name):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", without_code(PAGES[name]))
    missing = [link for link in links if "://" not in link]
    assert [link for link in missing if not (ROOT / name).parent.joinpath(link).exists()] == []


@pytest.mark.parametrize("name", PAGES)
def test_every_page_says_what_the_results_say(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert pages.filled_in(PAGES[name]) == PAGES[name], "run `fpl accept`"


@pytest.mark.parametrize("name", PAGES)
def test_every_comment_is_a_mark_with_an_end(name):
    comments = re.findall(r"<!--.*?-->", PAGES[name], re.DOTALL)
    marks = [found["mark"] for found in pages.MARK.finditer(PAGES[name])]
    assert [comment for comment in comments if comment != "<!-- end -->"] == marks


@pytest.mark.parametrize("name", PAGES)
def test_no_number_breaks_its_paragraph(name):
    """Markdown takes a line that begins with a comment for the end of the paragraph."""
    assert re.findall(r"^ *<!-- = .*", BLOCK.sub("", PAGES[name]), re.MULTILINE) == []


@pytest.mark.parametrize("name", [name for name in PAGES if name != "data/demo_clip/README.md"])
def test_no_result_is_written_by_hand(name):
    text = PAGES[name]
    if name == "CHANGELOG.md":  # versions, and a tolerance that was corrected
        text = re.sub(r"\d+\.\d+\.\d+|\d points in the documentation", "", text)
    assert unbound(text) == []


def test_the_model_card_says_what_the_file_of_the_weights_says():
    card = PAGES["data/demo_clip/README.md"]
    weights = ROOT / "data" / "demo_clip" / "open_clip_model.safetensors"
    with safetensors.safe_open(weights, "pt") as file:
        made = json.loads(file.metadata()["made_by"])
    assert unbound(card) == [
        f"{weights.stat().st_size / 1e6:.1f}",
        f"{100 * made['zero_shot']:.2f}",
    ]
    how_long = f"--epochs {made['of']} --stop {made['epochs']}"
    options = f"--draws {made['draws']} {how_long} --seed {made['seed']}"
    assert options in card and f"{made['seconds'] / 60:.0f} minutes" in card


def test_a_number_written_by_hand_is_found():
    assert unbound("It has 95.78 %, and 3 points more than `78.1 %`.") == ["95.78", "3 points"]
    assert unbound("In 95 % of cases.") == ["95 %"]
    assert (
        unbound(
            "<!-- = docs/measured.csv; name=x; value -->1.50<!-- end --> %, Python 3.11 to 3.13"
        )
        == []
    )


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder with a table as csv and markdown, and a list of records."""
    monkeypatch.chdir(tmp_path)
    folder = Path("results/expected/part")
    folder.mkdir(parents=True)
    (folder / "t.csv").write_text(
        'method,k,mean,"up, bytes"\na,1.0,95.7,4096\nb,1,90.04,0\nb,2,-1.5,\n'
    )
    (folder / "t.md").write_text(
        "A note.\n\n| method | k | mean |\n|:---|:---|:---|\n| a | 1 | 95.70 |\n| b | 2 | |\n"
    )
    (folder / "t.json").write_text('[{"way": "x", "seconds": 1026.98}]')
    return "results/expected/part/t"


@pytest.mark.parametrize(
    ("mark", "value"),
    [
        ("csv; method=a; mean", "95.70"),
        ("csv; method=b; k=1; mean", "90.04"),
        ("csv; method=b; k=2.0; mean * -1; .1f", "1.5"),
        ("csv; method=a; up, bytes; ,.0f", "4,096"),
        ("json; way=x; seconds / 60; .0f", "17"),
        ("md; method=a; mean", "95.70"),
    ],
)
def test_a_number_is_filled_in(mark, value, results):
    text = f"It is <!-- = {results}.{mark} -->old<!-- end --> %, <!-- end -->"
    assert (
        pages.filled_in(text)
        == f"It is <!-- = {results}.{mark} -->{value}<!-- end --> %, <!-- end -->"
    )


@pytest.mark.parametrize(
    ("fields", "table"),
    [
        ("", "A note.\n\n| method | k | mean |\n|:---|:---|:---|\n| a | 1 | 95.70 |\n| b | 2 | |"),
        (
            "; mean as accuracy | method",
            "| accuracy | method |\n| --- | --- |\n| 95.70 | a |\n|  | b |",
        ),
        ("; k; method=c | b", "| k |\n| --- |\n| 2 |"),
    ],
)
def test_a_table_or_a_part_of_it_is_filled_in(fields, table, results):
    mark = f"<!-- {results}.md{fields} -->"
    assert pages.filled_in(f"{mark}\nold\n<!-- end -->\n") == f"{mark}\n\n{table}\n\n<!-- end -->\n"


@pytest.mark.parametrize(
    ("mark", "problem"),
    [
        ("= {}.csv; method=b; mean", "method=b chooses 2 rows, not one"),
        ("= {}.csv; method=c; mean", "method=c chooses 0 rows, not one"),
        ("= {}.csv; method=a; meen", "has no column 'meen', it has method, k, mean"),
        ("{}.md; k; method=c", "method=c chooses no row"),
    ],
)
def test_a_mark_that_fits_nothing_is_refused(mark, problem, results):
    with pytest.raises(ValueError, match=problem):
        pages.filled_in(f"<!-- {mark.format(results)} --><!-- end -->")


def test_all_pages_are_filled_in(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for name, text in PAGES.items():
        page = tmp_path / name
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(re.sub(r"-->[\d.,]+<!-- end", "-->0<!-- end", text))
    assert (tmp_path / "docs" / "results.md").read_text() != PAGES["docs/results.md"]
    pages.fill_pages(tmp_path)
    assert {name: (tmp_path / name).read_text() for name in PAGES} == PAGES


def test_the_page_on_tolerances_has_those_of_the_code():
    table = {
        row: float(points)
        for row, points in re.findall(r"^\| (.+) \| ([\d.]+) \|$", pages.tolerances(), re.MULTILINE)
    }
    assert {name: table[name] for name in expected.TOLERANCE} == expected.TOLERANCE
    assert set(table) - set(expected.TOLERANCE) - {"any other table"} == {
        f"other rows of {', '.join(expected.MEASURED)}"
    }
    assert pages.tolerances() in PAGES["docs/contributing.md"]
