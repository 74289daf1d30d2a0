"""Fresh tables are compared with the repository's, and a moved or missing number fails."""

import shutil
from pathlib import Path

import pandas as pd
import pytest

from fpl import cli
from fpl.data.files import ROOT
from fpl.experiments import expected, tables

TABLE1 = pd.DataFrame(
    {"mean": [21.33, 66.46, 91.15], "std": [0.0, 0.1, 1.2]},
    index=pd.Index(["majority", "zeroshot", "coop"], name="method"),
)
LAM = pd.DataFrame({"mean": [80.0, 85.25, 84.5]}, index=pd.Index([0.0, 0.5, 2.0], name="lam"))
PRIOR = pd.DataFrame(
    {"table": ["Table 3", "ours", "ours"], "mean": [47.49, 47.83, 12.21]},
    index=pd.Index(["clipart: pFedMoAP", "clipart: majority", "clipart: one label"], name="row"),
)
BOOK = "10_book"
ALL = {"table1": TABLE1, "ablation_lam": LAM, "label_prior": PRIOR}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with expected tables and equal fresh ones."""
    monkeypatch.chdir(tmp_path)
    for name, table in ALL.items():
        tables.save(table, f"{BOOK}/{name}", expected.EXPECTED)
        tables.save(table, f"{BOOK}/{name}")
    return tmp_path


def verdicts(cells):
    return {(line["table"], line["row"]): line["verdict"] for _, line in cells.iterrows()}


def fails(capsys):
    """The printed table of a comparison that ends with exit status 1."""
    with pytest.raises(SystemExit) as end:
        cli.main(["compare"])
    assert end.value.code.startswith("fpl compare: ") and "\n" not in end.value.code
    return capsys.readouterr().out


def test_equal_tables_pass(project, capsys):
    cells = expected.all_cells(tables.TABLES)
    assert verdicts(cells) == {
        (n, row): "same" for n, t in ALL.items() for row in t.index if row != "clipart: pFedMoAP"
    }
    assert (cells["difference"] == 0).all() and (cells["fresh"] == cells["expected"]).all()
    cli.main(["compare"])
    out = capsys.readouterr().out
    assert "8 of 8 cells are the expected ones within their tolerance, 0 are not" in out
    assert all(where in out for where in ("results/tables", "results/report/index.html"))


MOVES = [
    ("table1", "zeroshot", expected.USUAL, 0.01),
    ("table1", "coop", expected.USUAL, 0.01),
    ("ablation_lam", 0.5, expected.USUAL, 0.01),
    ("label_prior", "clipart: majority", expected.TOLERANCE["label_prior"], 0.001),
]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("name", "row", "tolerance", "step"), MOVES, ids=lambda value: str(value))
def test_a_cell_may_move_as_far_as_its_tolerance(name, row, tolerance, step, sign, project, capsys):
    for move, verdict in ((tolerance - step, "same"), (tolerance + step, "outside")):
        moved = ALL[name].copy()
        moved.loc[row, "mean"] += sign * move
        tables.save(moved, f"{BOOK}/{name}")
        cells = expected.all_cells(tables.TABLES)
        assert verdicts(cells) == {
            key: verdict if key == (name, row) else "same" for key in verdicts(cells)
        }
        (difference,) = cells[(cells["table"] == name) & (cells["row"] == row)]["difference"]
        assert difference == pytest.approx(sign * move)
    out = fails(capsys)
    assert (
        "7 of 8 cells are the expected ones within their tolerance, 1 are not" in out
        and out.count("outside") == 1
    )


@pytest.mark.parametrize("name", ALL)
def test_a_missing_table_fails_in_each_of_its_cells(name, project, capsys):
    (tables.TABLES / BOOK / f"{name}.csv").unlink()
    found = verdicts(expected.all_cells(tables.TABLES))
    assert len(found) == 8 and {key for key, verdict in found.items() if verdict != "same"} == {
        key for key in found if key[0] == name
    }
    assert fails(capsys).count("missing") == sum(key[0] == name for key in found)


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.drop("coop"),
        lambda table: table.assign(mean=table["mean"].where(table.index != "coop")),
    ],
)
def test_a_missing_row_or_number_fails(change, project, capsys):
    tables.save(change(TABLE1), f"{BOOK}/table1")
    found = verdicts(expected.all_cells(tables.TABLES))
    assert [key for key, verdict in found.items() if verdict == "missing"] == [("table1", "coop")]
    assert fails(capsys).count("missing") == 1


def test_published_numbers_are_not_ours_to_compare(project):
    moved = PRIOR.copy()
    moved.loc["clipart: pFedMoAP", "mean"] += 50
    tables.save(moved, f"{BOOK}/label_prior")
    assert set(verdicts(expected.all_cells(tables.TABLES)).values()) == {"same"}


def test_rows_are_told_apart_by_all_that_stands_before_the_mean_also_where_it_is_missing(tmp_path):
    table = pd.DataFrame(
        {
            "row": ["a", "b", "b"],
            "label": [None, "x", "x"],
            "k": [None, 1, 2],
            "mean": [1.0, 2.0, 3.0],
        }
    )
    table.to_csv(tmp_path / "t.csv", index=False)
    assert expected.means(tmp_path / "t.csv")["mean"].to_dict() == {
        "a, , ": 1,
        "b, x, 1.0": 2,
        "b, x, 2.0": 3,
    }


# Numbers of tables that are none of our means and no counts: spreads and what is drawn from them,
# what others printed, and what is no percentage or made of means that are compared.
BESIDE = {"std", "low", "high", "p", "holm", "seeds", "clients", "pairs", "same", "share", "ratio"}
BESIDE |= {"evenness", "l2 norm", "spearman", "distance", "vector", "published_mean"}
BESIDE |= {"published_std", "paper, mean of 5 data sets", "paper, CIFAR100"}
BESIDE |= {"paper, DomainNet (10 classes)"}
BESIDE |= {f"{of} std" for of in ("local", "base", "novel", "HM")}
PARTS = ("personal", "global", "HM", "own", "seen", "unseen", "on styles", "on shapes")
BESIDE |= {f"{of} {end}" for of in PARTS for end in ("low", "high")}
PATHS = sorted(expected.tables_in(ROOT / expected.EXPECTED))


def noticed(table, moved, folder):
    """How many cells of a table of ours are not the same in another one."""
    for where, of in (("old", table), ("new", moved)):
        (folder / where).mkdir(exist_ok=True)
        of.to_csv(folder / where / "t.csv", index=False)
    cells = expected.cells("t", folder / "new", folder / "old")
    return (cells["verdict"] != "same").sum()


@pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_whatever_number_of_ours_moves_is_noticed(path, tmp_path):
    """By 50 points or by half, in every row of every column."""
    table = pd.read_csv(path).dropna(axis=1, how="all")
    ours = table
    if "ours" in set(table.get("table", ())):
        ours = table[table["table"] == "ours"]
    assert noticed(table, table, tmp_path) == 0
    for name in {*table.select_dtypes("number")} - BESIDE:
        moved = table.assign(**{name: 1.5 * table[name] + 50})
        assert noticed(table, moved, tmp_path) >= ours[name].notna().sum(), name


def test_the_repository_is_as_expected():
    everything = ROOT / expected.EXPECTED
    assert set(expected.all_cells(everything, everything)["verdict"]) == {"same"}


def test_our_numbers_beside_published_ones_are_compared(tmp_path):
    line = {"paper": "P", "table": "Table 1", "published_mean": 71.0, "ours_mean": 80.0}
    table = pd.DataFrame([line | {"verdict": "outside", "own_mean": 82.5}])
    assert noticed(table, table.assign(published_mean=9, ours_mean=77), tmp_path) == 0
    for name in ("ours_mean", "own_mean"):
        assert noticed(table, table.assign(**{name: 76}), tmp_path) == 1


def test_further_columns_have_the_tolerance_of_their_row_and_counts_are_exact(tmp_path):
    table = pd.DataFrame({"row": ["fedotp", "coop"], "personal": [50.0] * 2, "HM": [50.0] * 2})
    table = table.assign(worst=[30.0] * 2, down=[2048] * 2)
    usual, wide = expected.UNMEASURED, expected.TOLERANCE["fedotp"]
    for name, by in (("personal", 1), ("HM", 1), ("worst", expected.FURTHER)):
        for row, most in enumerate((wide, usual)):
            for move, count in ((most * by - 0.1, 0), (most * by + 0.1, 1)):
                moved = table.copy()
                moved.loc[row, name] -= move
                assert noticed(table, moved, tmp_path) == count
    assert noticed(table, table.assign(down=2047), tmp_path) == 0
    assert noticed(table, table.assign(down=2051), tmp_path) == 2
    rows = expected.cells("t", tmp_path / "new", tmp_path / "old")["row"].tolist()
    assert rows[:3] == ["fedotp", "coop", "fedotp: HM"]


def test_nothing_to_compare_with_is_no_success(project):
    for path in expected.EXPECTED.glob("*/*.csv"):
        path.unlink()
    with pytest.raises(SystemExit, match="no expected tables in results/expected"):
        cli.main(["compare"])


@pytest.mark.parametrize("where", [expected.EXPECTED, tables.TABLES])
@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"method,mean\ncoop,9x.1\n", b'a,"b\n1,2'])
def test_a_damaged_table_is_named(where, content, project):
    path = where / BOOK / "table1.csv"
    path.write_bytes(content)
    if b"mean" in content or not content.startswith(b"a,"):
        with pytest.raises(SystemExit, match=f"{path} is no table of results"):
            cli.main(["compare"])


def test_the_repository_knows_every_tolerance():
    """No tolerance is for a table or a row that does not exist, or wider than two means over as
    many seeds may differ: sqrt(2) times half their interval."""
    paths = expected.tables_in(ROOT / expected.EXPECTED)
    rows = {row for path in paths for _, row in expected.means(path).index}
    names = {path.stem for path in paths}
    assert names >= {*expected.MEASURED}
    assert all(name in names or name in rows for name in expected.TOLERANCE)
    wide = {name: most for name, most in expected.TOLERANCE.items() if most > 3}
    moving = ("fedotp - ", "promptfolio - ", "promptfl - ", "finetuned - ")
    pairs = {name for name in wide if name.startswith(moving) or name.endswith(" - promptfl")}
    rest = {"fedotp", "promptfolio", "finetuned", "pFedMoAP - FedOTP", "against_paper_orders"}
    assert {*wide} == {*rest, *pairs} and max(wide.values()) == 5
    assert all(tolerance > 0 for tolerance in [*expected.TOLERANCE.values(), expected.USUAL])
    of_row = [(row, "10_table1/table1.csv") for row in ("fedotp", "finetuned")]
    of_row += [(row, "24_since_then/since_then.csv") for row in ("promptfolio", "finetuned")]
    newer = pd.read_csv(ROOT / expected.EXPECTED / "24_since_then/differences.csv").iloc[:, 0]
    with_promptfl = [row for row in newer if row.endswith("- promptfl")]
    of_row += [(row, "24_since_then/differences.csv") for row in with_promptfl]
    for row, name in of_row:
        table = pd.read_csv(ROOT / expected.EXPECTED / name, index_col=0)
        assert (table.loc[row, "high"] - table.loc[row, "low"]) / 2**0.5 > wide[row]


def test_what_is_accepted_is_what_is_expected_from_then_on(project):
    """A table that has another name now is expected under that one alone."""
    (old,) = tables.TABLES.glob("*/table1.csv")
    shutil.copy(old, old.with_name("renamed.csv"))
    old.unlink()
    assert "missing" in verdicts(expected.all_cells(tables.TABLES)).values()
    expected.accept(tables.TABLES)
    names = {path.name for path in expected.EXPECTED.glob("*/*.csv")}
    assert "renamed.csv" in names and "table1.csv" not in names
    assert set(verdicts(expected.all_cells(tables.TABLES)).values()) == {"same"}


def test_nothing_is_accepted_where_nothing_is_fresh(project):
    before = sorted(expected.EXPECTED.rglob("*"))
    with pytest.raises(FileNotFoundError, match="no tables in nowhere: call `fpl repro` first"):
        expected.accept(Path("nowhere"))
    assert sorted(expected.EXPECTED.rglob("*")) == before
