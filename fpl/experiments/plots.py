"""Figures: one style, one way to save, one function for each figure.

A function takes data frames or arrays and returns a Figure. Accuracies come in [0, 1], unless a
table is said to be in percent, and are drawn in percent. Figures are readable in greyscale and by
the colour-blind: kinds differ in lightness and in marker or hatch, never in hue alone. Importing
this module changes no global state.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from numpy import ndarray
from pandas import DataFrame, Series

from fpl.data.files import atomic_write
from fpl.experiments.notebook import TABLES
from fpl.experiments.stats import of_single
from fpl.experiments.tables import unmarked

# Okabe and Ito's colours, ordered so that neighbours differ in lightness too.
COLOURS = ["#000000", "#E69F00", "#0072B2", "#56B4E9", "#D55E00", "#009E73", "#CC79A7"]
MARKERS = "osD^vP*X"
# Markers that have room for a name inside, with the areas (square points) at which they look alike.
PLATES = {"o": 190, "s": 170, "D": 150, "^": 360, "v": 360, "h": 220}
STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.prop_cycle": plt.cycler(color=COLOURS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "errorbar.capsize": 3,
    "figure.constrained_layout.use": True,
    "figure.dpi": 100,
    "font.family": "DejaVu Sans",  # comes with matplotlib, so the same everywhere
    "font.size": 10,
    "grid.color": "#D9D9D9",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "savefig.dpi": 200,
    "savefig.facecolor": "white",
    "svg.hashsalt": "fpl",  # names inside an SVG are random without it
}
in_our_style = rc_context(STYLE)


def style() -> None:
    """Make our style that of the session. The figures of this module have it anyway."""
    plt.rcParams.update(STYLE)


@in_our_style
def save(
    fig: Figure, name: str | Path, kinds: Sequence[str] = ("png", "svg"), folder: Path = TABLES
) -> None:
    """Write a figure as PNG and SVG, each file whole or not at all.

    name: the files' name below `folder`, without a suffix, such as "10_table1/table1". The same
    figure gives the same bytes.
    """
    for kind in kinds:
        unsaid = "Software" if kind == "png" else "Date"
        with atomic_write(folder / f"{name}.{kind}") as file:
            fig.savefig(file, format=kind, metadata={unsaid: None})


def figure(
    width: float, height: float, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, ndarray]:
    """Return an empty figure, of a size in inches, and its panels (rows, columns).

    pyplot does not keep it: a notebook shows it once, as the last value of a cell, and its memory
    is freed.
    """
    fig = plt.figure(figsize=(width, height))
    plt.close(fig)
    return fig, fig.subplots(rows, columns, squeeze=False, **options)


def stacked(
    table: DataFrame, width: float, height: float, per_row: float = 0.0
) -> tuple[Figure, list[tuple[Axes, DataFrame]]]:
    """Return a figure with a panel for each data set of a table, and the part that belongs in each.

    A panel is `height` inches high, and `per_row` more for each row of its part. The index of a
    table of several data sets begins with `data`; the panel of one alone has no title.
    """
    parts = parts_of(table)
    heights = [height + per_row * len(part) for part in parts.values()]
    fig, axes = figure(width, sum(heights), len(parts), height_ratios=heights)
    for ax, name in zip(axes.flat, parts):
        ax.set_title(name)
    return fig, [*zip(axes.flat, parts.values())]


def parts_of(table: DataFrame) -> dict[str, DataFrame]:
    """Return the part of a table on each data set, by name; one alone has the empty name."""
    if "data" not in table.index.names:
        return {"": table}
    groups = table.groupby(level="data", sort=False)
    return {name: part.droplevel("data") for name, part in groups}


def single(runs: DataFrame, keys: Sequence[str]) -> Any:
    """Return what `of_single` does, also of lines that have no column `run`; raises as that."""
    return of_single(runs.assign(run=runs.get("run", "")), keys)


def look(k: int) -> dict[str, str]:
    """Return the colour and the marker of the k-th kind."""
    colour = COLOURS[k % len(COLOURS)]
    marker = MARKERS[k % len(MARKERS)]
    return {"color": colour, "marker": marker}


def kinds_of(table: DataFrame) -> Iterator[tuple[DataFrame, dict[str, str]]]:
    """Yield the part of each value of a table's first index level, and how it is drawn."""
    parts = table.groupby(level=0, sort=False)
    for k, (name, part) in enumerate(parts):
        yield part.droplevel(0), {"label": name, **look(k)}


def reach(table: DataFrame) -> list[Series]:
    """Return how far the intervals reach below and above the means."""
    mean = table["mean"]
    return [mean - table["low"], table["high"] - mean]


def name_rows(ax: Axes, names: Sequence[str], **text: Any) -> None:
    """Give a panel one line for each name, the first on top, and a grid in both directions."""
    ax.set_yticks(range(len(names)), names, **text)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.grid(axis="x")


def legend(ax: Axes, where: str = "outside lower left", columns: int = 3, **options: Any) -> None:
    """Explain the marks of a panel outside of all panels."""
    marks = ax.get_legend_handles_labels()
    ax.figure.legend(*marks, loc=where, ncols=columns, **options)


@in_our_style
def rows(table: DataFrame, controls: Collection[str] = ()) -> Figure:
    """Draw the rows of a table as points with 95 % intervals, the controls as white squares.

    table: as `tables.table1`, in percent; controls: what its column `row` says of the controls,
    without a number of seeds.
    """
    fig, shown = stacked(table, 7.5, 0.9, per_row=0.34)
    for ax, part in shown:
        name_rows(ax, part["row"])
        y = np.arange(len(part))
        is_control = unmarked(part["row"]).isin(controls)
        for here, marks, face in ((~is_control, "ko", "black"), (is_control, "ks", "white")):
            x = part["mean"][here]
            error = reach(part[here])
            ax.errorbar(x, y[here], xerr=error, fmt=marks, markerfacecolor=face)
    label = "accuracy (%) after the last round; 95 % interval over seeds"
    ax.set_xlabel(label, loc="right")
    return fig


@in_our_style
def differences(table: DataFrame, far: float = math.inf) -> Figure:
    """Draw differences with their interval, a row each; claimed ones are filled.

    table: as `tables.differences`, in points. A marker is black where the verdict is above or
    below, grey where Holm's adjustment leaves no claim of it, and else white. Differences beyond
    `far` points stand in a panel of their own, so that the others can be told apart.
    """
    if table.empty:
        raise ValueError("there are no differences to draw: of no pair were both rows run")
    parts = [
        (name, part)
        for name, of in parts_of(table).items()
        for _, part in of.groupby(of["mean"].abs() <= far)
    ]
    heights = [0.9 + 0.32 * len(part) for _, part in parts]
    fig, axes = figure(7.5, sum(heights), len(parts), height_ratios=heights)
    for ax, (name, part) in zip(axes.flat, parts):
        ax.set_title(name)
        rows = []
        for row in part.index:
            words = row if isinstance(row, tuple) else (row,)
            rows.append(", ".join(map(str, words)))
        name_rows(ax, [textwrap.fill(row, 42) for row in rows], fontsize=8)
        ax.axvline(0, color="black", linewidth=0.8)
        y = np.arange(len(part))
        ax.hlines(y, part["low"], part["high"], color="black", linewidth=1.5)
        mark_claims(ax, part["mean"], y, part)
    explain_claims(ax)
    label = "difference of accuracy (points); interval over both bootstrap and t"
    ax.set_xlabel(label, loc="right")
    return fig


def claims(table: DataFrame) -> list[str]:
    """Return how each line of `tables.differences` is filled."""
    claimed = table["verdict"].isin(["above", "below"])
    alone = claimed & (table["holm"] > 0.05)
    return [*np.select([alone, claimed], ["#AAAAAA", "black"], "white")]


def mark_claims(ax: Axes, x: Any, y: Any, table: DataFrame, marker: str = "o") -> None:
    """Draw the markers of lines of `tables.differences`, filled where they are claimed."""
    at = {"s": 30, "marker": marker, "edgecolor": "black", "zorder": 3}
    ax.scatter(x, y, facecolor=claims(table), **at)


def explain_claims(ax: Axes) -> None:
    """Add what the filling of markers means to the figure's legend."""
    kinds = {"black": "a difference", "#AAAAAA": "not after Holm"}
    kinds["white"] = "none seen, or no interval"
    for face, label in kinds.items():
        ax.scatter([], [], s=30, facecolor=face, edgecolor="black", label=label)
    legend(ax)


@in_our_style
def gains(table: DataFrame, xlabel: str) -> Figure:
    """Draw differences with their interval by value of a setting; claimed ones are filled.

    table: as `tables.differences`, of names (pair, value), filled as in `differences`.
    """
    ticks = table.index.unique(level=-1).sort_values()
    fig, shown = stacked(table, 6.5, 3.9)
    for ax, of in shown:
        ax.axhline(0, color="black", linewidth=0.8)
        parts = [*kinds_of(of)]
        for k, (part, options) in enumerate(parts):
            x = ticks.get_indexer(part.index) + 0.12 * (k - (len(parts) - 1) / 2)
            colour, marker = options["color"], options["marker"]
            ax.vlines(x, part["low"], part["high"], color=colour, linewidth=1.8)
            ax.plot([], [], color=colour, marker=marker, label=options["label"])
            mark_claims(ax, x, part["mean"], part, marker)
        ax.set_xticks(range(len(ticks)), [f"{value:g}" for value in ticks])
        ax.set_xlim(-0.5, len(ticks) - 0.5)
        ax.set_xlabel(xlabel)
        ax.set_ylabel("difference of accuracy (points)")
    explain_claims(shown[0][0])
    return fig


@in_our_style
def curves(runs: DataFrame) -> Figure:
    """Draw accuracy by round, the mean over clients: a line per title, a band over its seeds.

    The band reaches from the lowest to the highest seed. runs: a line per run, round and client,
    with columns title, seed, round and accuracy, and data where there are several data sets. Raises
    ValueError for several runs of a title and seed, where a column `run` tells them apart.
    """
    keys = ["title", "round"]
    if "data" in runs and runs["data"].nunique() > 1:
        keys.insert(0, "data")
    by_seed = single(runs, [*keys, "seed"])["accuracy"].mean()
    by_round = by_seed.groupby(level=keys, sort=False)
    table = 100 * by_round.agg(["mean", "min", "max"])
    fig, shown = stacked(table, 6.5, 3.6)
    for ax, part in shown:
        for line, options in kinds_of(part):
            x = line.index + 1
            ax.plot(x, line["mean"], markersize=4, **options)
            ax.fill_between(
                x, line["min"], line["max"], color=options["color"], alpha=0.2, linewidth=0
            )
        ax.set_xlabel("communication round")
        ax.set_ylabel("accuracy (%), mean over clients")
        ax.legend()
    return fig


@in_our_style
def curves_of_clients(runs: DataFrame) -> Figure:
    """Draw accuracy by round of one run: a grey line per client, their mean, and the worst client.

    The worst is the one with the lowest accuracy in the last round. runs: a line per round and
    client with columns round, client and accuracy.
    """
    table = 100 * runs.pivot(index="round", columns="client", values="accuracy")
    worst = table.iloc[-1].idxmin()
    x = table.index + 1
    fig, [[ax]] = figure(6.5, 3.6)
    each = ax.plot(x, table, color="#AAAAAA", linewidth=0.9, marker=".", markersize=3)
    each[0].set_label("a client")
    lowest = {"label": f"client {worst}, the worst at the end", **look(4)}
    ax.plot(x, table[worst], markersize=4, **lowest)
    ax.plot(x, table.mean(axis=1), markersize=4, linewidth=2, label="mean", **look(0))
    around = x.min() - 0.5, x.max() + 0.5
    ax.set(xlabel="communication round", ylabel="accuracy (%)", xlim=around)
    ax.locator_params(axis="x", integer=True)
    legend(ax)
    return fig


@in_our_style
def ablations(
    values: dict[str, DataFrame],
    defaults: dict[str, float],
    labels: dict[str, str],
    reference: dict[str, dict[str, float]],
) -> Figure:
    """Draw mean and 95 % interval (%) at each value of a setting, a panel per setting.

    values, defaults, labels: the table of each setting, its default, which is filled, and its name.
    reference: of each data set, which has a row of panels, the levels drawn as lines, by name.
    Raises ValueError for a table of other data sets.
    """
    size = (3.1 * len(values) + 0.6, 3.5 * len(reference))
    fig, grid = figure(*size, len(reference), len(values), sharey="row")
    for column, (key, table) in zip(grid.T, values.items()):
        parts = parts_of(table)
        if len(reference) == 1 and [*parts] == [""]:  # one data set, which has no name in the table
            parts = dict.fromkeys(reference, table)
        if parts.keys() != reference.keys():
            raise ValueError(f"the table of {key} has not the data sets of the others: give it all")
        for ax, (data, levels) in zip(column, reference.items()):
            part = parts[data]
            x = np.arange(len(part))
            ax.errorbar(x, part["mean"], reach(part), fmt="ko", markerfacecolor="white")
            default = part.index == defaults[key]
            ax.plot(x[default], part["mean"][default], "ko", zorder=3)
            for (name, level), kind in zip(levels.items(), ("--", ":", "-.")):
                ax.axhline(level, color="#555555", linestyle=kind, linewidth=1.2, label=name)
            ax.set_xticks(x, [f"{value:g}" for value in part.index])
            ax.set(title=data if len(reference) > 1 else "", xlabel=labels[key])
    for ax in grid[:, 0]:
        ax.set_ylabel("accuracy (%)")
    legend(grid[0, 0])
    return fig


@in_our_style
def lines(table: DataFrame, xlabel: str) -> Figure:
    """Draw mean and 95 % interval (%) by value of a setting, the values equally far apart.

    table: its index is (name of the line, value), with data in front of several data sets. Values
    that are words stand in the order of the table.
    """
    ticks = table.index.unique(level=-1)
    in_words = ticks.map(lambda value: isinstance(value, str)).all()
    if not in_words:
        ticks = ticks.sort_values()
    fig, shown = stacked(table, 6.8, 3.8)
    for ax, of in shown:
        for k, (part, options) in enumerate(kinds_of(of)):
            part = part.iloc[np.argsort(ticks.get_indexer(part.index))]
            x = ticks.get_indexer(part.index) + 0.06 * k
            ax.errorbar(x, part["mean"], reach(part), markersize=5, **options)
        names = [textwrap.fill(str(v), 14) if in_words else f"{v:g}" for v in ticks]
        ax.set_xticks(range(len(ticks)), names)
        ax.set_xlabel(xlabel)
        ax.set_ylabel("accuracy (%)")
    legend(shown[0][0], "outside right center", columns=1)
    return fig


@in_our_style
def traffic(table: DataFrame, kind: str) -> Figure:
    """Draw accuracy (%) by round against what a client has sent and received until then.

    table: as `tables.traffic`, its index (row, variant, round): rows differ in colour and marker,
    variants in the line. kind: what the variants are. The last round has a marker and its interval.
    A row that sends nothing is a level line at its last round. Raises ValueError for more variants
    than there are kinds of lines.
    """
    lines = ("-", "--", ":", "-.")
    variants = [*table.index.unique(level=-2).dropna().sort_values()]  # a row may have none
    if len(variants) > len(lines):
        raise ValueError(f"{len(lines)} values of {kind} can be drawn, not {len(variants)}")
    fig, shown = stacked(table, 7.2, 4.2)
    for ax, of in shown:
        rows = [*of.index.unique(level=0)]
        for (row, variant), part in of.groupby(level=[0, 1], sort=False, dropna=False):
            line = lines[variants.index(variant)] if variant in variants else lines[0]
            draw_traffic(ax, part, line, **look(rows.index(row)))
        for k, row in enumerate(rows):
            ax.plot([], [], label=row, **look(k))
        for variant, line in zip(variants, lines):
            ax.plot([], [], color="black", linestyle=line, label=f"{kind} {variant:g}")
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter("")
        ax.set_xlabel("kB sent and received by a client, all rounds so far")
        ax.set_ylabel("accuracy (%), mean over clients")
    legend(shown[0][0], "outside right center", columns=1)
    return fig


def draw_traffic(ax: Axes, part: DataFrame, line: str, color: str, marker: str) -> None:
    """Draw a line of `traffic`."""
    if part["kB"].max() == 0:
        ax.axhline(part["mean"].iloc[-1], linewidth=1, linestyle=line, color=color)
        return
    ax.plot(part["kB"], part["mean"], linewidth=1.6, linestyle=line, color=color)
    last = part.iloc[-1:]
    ax.errorbar(last["kB"], last["mean"], reach(last), color=color, marker=marker, elinewidth=1)


@in_our_style
def by_client(runs: DataFrame) -> Figure:
    """Draw the accuracy of every client in every seed, the worst of each seed, and the mean.

    runs: a line per run and client with columns title, seed and accuracy; a title has a row. Raises
    ValueError for several runs of a title and seed, where a column `run` tells them apart.
    """
    single(runs, ["title", "seed"])
    row, titles = runs["title"].factorize()
    percent = 100 * runs["accuracy"]
    worst = percent.groupby([row, runs["seed"]]).min()
    mean = percent.groupby(row).mean()
    fig, [[ax]] = figure(6.5, 0.34 * len(titles) + 1.1)
    name_rows(ax, [textwrap.fill(title, 30) for title in titles], fontsize=8)
    ax.scatter(percent, row, s=36, marker="|", color="#777777", linewidth=1, label="a client")
    ax.scatter(
        worst,
        worst.index.get_level_values(0),
        s=30,
        marker="v",
        facecolor="white",
        edgecolor="#D55E00",
        linewidth=1.3,
        label="worst client of a seed",
    )
    ax.scatter(mean, mean.index - 0.25, s=22, marker="D", color="black", label="mean")
    ax.set_xlabel("accuracy on the client's own test images (%)", loc="right")
    legend(ax)
    return fig


@in_our_style
def bars(
    values: Sequence[float], names: Sequence[str], title: str, xlabel: str, mark: int | None = None
) -> Figure:
    """Draw horizontal bars, the first on top; `mark` is the number of the one that is filled."""
    fig, [[ax]] = figure(6, 0.28 * len(values) + 0.9)
    colours = ["#BBBBBB"] * len(values)
    if mark is not None:
        colours[mark] = "#0072B2"
    name_rows(ax, names)
    ax.barh(range(len(values)), values, color=colours, edgecolor="black", linewidth=0.6)
    ax.set_title(title)
    ax.set_xlabel(xlabel)
    return fig


@in_our_style
def side_by_side(table: DataFrame, xlabel: str) -> Figure:
    """Draw a line per row, named as the index, with a mark for each column's value."""
    fig, [[ax]] = figure(6.5, 0.28 * len(table) + 1.3)
    name_rows(ax, table.index)
    y = range(len(table))
    ax.hlines(y, table.min(axis=1), table.max(axis=1), color="#AAAAAA", linewidth=1.2)
    for k, column in enumerate(table):
        ax.plot(table[column], y, linestyle="none", label=column, **look(k))
    ax.set_xlabel(xlabel)
    legend(ax)
    return fig


@in_our_style
def steps(values: Sequence[float], every: int, title: str, xlabel: str, ylabel: str) -> Figure:
    """Draw a sequence as points on a line, with a vertical line before every `every` of them."""
    fig, [[ax]] = figure(7.5, 2.6)
    ax.plot(values, "ko-", markersize=3, linewidth=0.8)
    for x in range(0, len(values), every):
        ax.axvline(x - 0.5, color="#BBBBBB", linewidth=0.8)
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel, xlim=(-0.5, len(values) - 0.5))
    return fig


@in_our_style
def partition(images: DataFrame) -> Figure:
    """Draw who has what: a bubble for each client, class and domain, its area the images.

    images: a line per image with columns client (0, 1, ..), class (its name) and domain.
    """
    counts = images.value_counts(["client", "class", "domain"]).reset_index()
    classes = np.unique(images["class"])
    clients = images["client"].max() + 1
    largest = counts["count"].max()
    width = np.clip(0.2 * len(classes), 5, 12.5) + 1.5
    height = np.clip(0.26 * clients, 2, 12.4) + 1.6
    fig, [[ax]] = figure(width, height)
    domains = counts.groupby("domain")
    for k, (domain, of) in enumerate(domains):
        beside = 0.1 * (k - (len(domains) - 1) / 2)
        ax.scatter(
            np.searchsorted(classes, of["class"]) + beside,
            of["client"],
            s=90 * of["count"] / largest,
            marker=MARKERS[k % len(MARKERS)],
            color=COLOURS[(k + 2) % len(COLOURS)],
            edgecolor="black",
            linewidth=0.3,
            label=domain,
        )
    named = classes if len(classes) <= 60 else []
    ax.set_xticks(range(len(named)), named, rotation=90, fontsize=7)
    ax.set(
        title=f"{len(images)} images; the largest bubble is {largest} of them",
        xlabel=f"class ({len(classes)})",
        ylabel="client",
        xlim=(-0.8, len(classes) - 0.2),
        ylim=(clients - 0.4, -0.6),
    )
    if len(domains) > 1:
        legend(ax, columns=6)
    return fig


@in_our_style
def heat(
    matrix: DataFrame,
    title: str,
    label: str,
    xlabel: str = "",
    ylabel: str = "",
    dots: DataFrame | None = None,
) -> Figure:
    """Draw a matrix as shades, light to dark, named as its index and columns; hatched where nan.

    label: what the shades are. dots: of the matrix's shape, areas of white discs, the largest 1.
    """
    columns = [str(name) for name in matrix.columns]
    wide = np.clip(4.6 / len(columns), 0.18, 0.42)
    high = np.clip(7 / len(matrix), 0.16, 0.3)
    fig, [[ax]] = figure(wide * len(columns) + 2.2, high * len(matrix) + 1.2)
    ax.patch.set(hatch="//////", edgecolor="#CCCCCC")
    shades = ax.imshow(matrix, cmap="cividis_r", aspect="auto")
    fig.colorbar(shades, label=label)
    if dots is not None:
        areas = 2000 * min(wide, high) ** 2 * dots.to_numpy()
        y, x = areas.nonzero()
        ax.scatter(x, y, areas[y, x], color="white", edgecolor="black", linewidth=0.8)
    upright = max(map(len, columns)) > 3
    ax.set_xticks(
        range(len(columns)), columns, fontsize=min(10, 45 * wide), rotation=90 if upright else 0
    )
    ax.set_yticks(range(len(matrix)), matrix.index, fontsize=min(10, 50 * high))
    ax.grid(visible=False)
    ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
    return fig


@in_our_style
def confusion(counts: DataFrame, title: str) -> Figure:
    """Draw how many images of a class (row) were taken for which class (column).

    counts: as `metrics.confusion`. A cell has the number of images where there is room, and as
    shade their share among those of the class; one without images is empty.
    """
    share = 100 * counts.div(counts.sum(axis=1), axis=0)
    cell = np.clip(8 / len(counts.columns), 0.12, 0.45)
    fig, [[ax]] = figure(cell * len(counts.columns) + 2.8, cell * len(counts) + 2)
    shades = ax.imshow(share.where(counts > 0), cmap="cividis_r", vmin=0, vmax=100)
    fig.colorbar(shades, label="% of the class", shrink=0.8)
    there = np.argwhere(counts.to_numpy()) if cell > 0.2 else []
    for y, x in there:
        inside = {"ha": "center", "va": "center", "fontsize": min(9, 30 * cell)}
        colour = "white" if share.iat[y, x] > 50 else "black"
        ax.annotate(counts.iat[y, x], (x, y), color=colour, **inside)
    names = {"fontsize": min(9, 36 * cell)}
    ax.set_xticks(range(len(counts.columns)), counts.columns, rotation=90, **names)
    ax.set_yticks(range(len(counts)), counts.index, **names)
    ax.grid(visible=False)
    ax.set(title=title, xlabel="taken for", ylabel="class")
    return fig


@in_our_style
def reliability(table: DataFrame) -> Figure:
    """Draw accuracy by confidence, with the line on which both are equal, and how many images.

    table: as `metrics.reliability`. The title says the mean distance from the line over images.
    """
    fig, [[upper], [lower]] = figure(5.2, 5.2, 2, 1, sharex=True, height_ratios=[3, 1])
    there = table[table["images"] > 0]
    width = there["high"] - there["low"]
    box = {"width": width, "align": "edge", "edgecolor": "black", "linewidth": 0.6}
    upper.bar(there["low"], 100 * there["accuracy"], color="#56B4E9", label="accuracy", **box)
    upper.plot([0, 1], [0, 100], color="#555555", linestyle="--", linewidth=1.2, label="calibrated")
    at = there["confidence"], 100 * there["accuracy"]
    upper.vlines(at[0], 100 * at[0], at[1], color="#D55E00", linewidth=1.5)
    mean = {"label": "at the bin's mean confidence", "clip_on": False}
    upper.plot(*at, "o", color="#D55E00", markersize=4, **mean)
    distance = (there["confidence"] - there["accuracy"]).abs()
    error = 100 * (distance * there["images"]).sum() / there["images"].sum()
    upper.set_title(f"expected calibration error {error:.2f} %")
    upper.set_ylabel("accuracy (%)")
    lower.bar(there["low"], there["images"], color="#BBBBBB", **box)
    lower.set(xlabel="confidence", ylabel="images", xlim=(0, 1), ylim=(0.5, None), yscale="log")
    lower.yaxis.set_major_formatter("{x:g}")
    lower.minorticks_off()
    legend(upper, columns=2)
    return fig


@in_our_style
def mask(sees: ndarray, shared: int) -> Figure:
    """Draw the attention mask of a prompt tree: dark where a row's node sees a column's node."""
    fig, [[ax]] = figure(4.6, 4.6)
    ax.imshow(sees, cmap="Greys", interpolation="nearest")
    for draw in (ax.axhline, ax.axvline):
        draw(shared - 0.5, color="#D55E00", linewidth=1)
    ax.grid(visible=False)
    ax.set(title=f"{len(sees)} nodes, the first {shared} shared", xlabel="seen node", ylabel="node")
    return fig


@in_our_style
def pictures(images: Sequence[ndarray], titles: Sequence[str], per_line: int = 6) -> Figure:
    """Draw images beside each other and under each other, each under its title."""
    high = math.ceil(len(images) / per_line)
    fig, axes = figure(1.5 * per_line, 1.75 * high, high, per_line)
    for ax in axes.flat:
        ax.axis("off")
    for ax, image, title in zip(axes.flat, images, titles):
        ax.imshow(image)
        ax.set_title(title, fontsize=8, loc="center")
    return fig


@in_our_style
def scatter(points: ndarray, groups: Sequence[str], title: str) -> Figure:
    """Draw points (p, 2) with a colour and a marker for each group."""
    fig, [[ax]] = figure(6.5, 4)
    for k, group in enumerate(sorted(set(groups))):
        x, y = points[np.array(groups) == group].T
        ax.scatter(x, y, s=9, alpha=0.7, label=group, **look(k))
    ax.grid(visible=False)
    ax.set(title=title, xticks=[], yticks=[])
    legend(ax, "outside right upper", columns=1)
    return fig


@in_our_style
def expert_shares(worlds: dict[str, DataFrame]) -> Figure:
    """Draw the share of attention (%) by rank of the expert, 0 the client's own.

    Grey dots are clients, black ones their mean, and a line is an even share. worlds: a panel each,
    with a line per client and a column per rank, in [0, 1].
    """
    widths = [shares.shape[1] for shares in worlds.values()]
    fig, [axes] = figure(6.5, 3.2, 1, len(worlds), width_ratios=widths)
    for ax, name in zip(axes, worlds):
        each = 100 * worlds[name].to_numpy()
        n, k = each.shape
        x = np.arange(k)
        even = 100 / k
        beside = np.linspace(-0.2, 0.2, n)[:, None]
        ax.scatter(x + beside, each, s=9, color="#999999", label="a client")
        mean = each.mean(0)
        ax.scatter(x, mean, s=34, marker="D", color="black", label="mean over clients")
        ax.axhline(even, color="#D55E00", linestyle="--", linewidth=1.2, label="even share")
        ax.set_xticks(x, ["own", *x[1:]])
        ax.set_xlabel("expert, by nearness")
        ax.set_ylim(0, max(2 * even, 1.1 * each.max()))
        ax.set_title(name)
    axes[0].set_ylabel("share of attention (%)")
    legend(axes[0])
    return fig


@in_our_style
def prompt_map(
    points: ndarray,
    names: Sequence[str],
    kinds: Sequence[str],
    arrows: Sequence[tuple[int, int]],
    variance: Sequence[float],
) -> Figure:
    """Draw prompts in the plane, (n, 2), each with its name, and arrows (from, to) between them.

    kinds: of each prompt, which has a marker of its kind. variance: the part of the variance on
    each axis. Where most points lie close together, a second panel enlarges that part and has their
    names. Markers that would cover each other are moved apart until they touch.
    """
    everybody = np.full(len(points), True)
    views = [(everybody, everybody)]
    crowd = crowded(points)
    if len(points) > 12 and area(points[crowd]) < area(points) / 8:
        views = [(everybody, ~crowd), (crowd, everybody)]
    heights = [height_of(points[inside]) for inside, _ in views]
    size = (6.5, sum(heights) + 0.8 * len(views))
    fig, axes = figure(*size, len(views), height_ratios=heights)
    for ax, height, (inside, large) in zip(axes.flat, heights, views):
        inch = frame(ax, points[inside], height)
        at = points.copy()
        at[large] = move_apart(points[large], 0.24 * inch)
        draw_arrows(ax, at, arrows)
        draw_prompts(ax, at, np.where(large, names, ""), np.array(kinds))
        ax.set_xlabel(f"first axis, {100 * variance[0]:.0f} % of the variance")
        ax.set_ylabel(f"second axis, {100 * variance[1]:.0f} %")
    if len(views) > 1:
        ax.set_title("the crowd of the panel above, enlarged")
    if len(set(kinds)) > 1:
        legend(ax, markerscale=0.6)
    return fig


def crowded(points: ndarray) -> ndarray:
    """Return which points (n, 2) are not far from the median, compared with the others."""
    away = np.linalg.norm(points - np.median(points, axis=0), axis=1)
    return away <= 2 * np.median(away)


def area(points: ndarray) -> float:
    """Return the area of the rectangle around points (n, 2)."""
    return np.prod(np.ptp(points, axis=0))


def height_of(points: ndarray) -> float:
    """Return the height in inches of a panel for points (n, 2)."""
    wide, high = np.ptp(points, axis=0).clip(1e-9)
    return np.clip(5.4 * high / wide, 3, 5.4)


def frame(ax: Axes, points: ndarray, height: float) -> float:
    """Show these points in a panel of 5.6 inches by `height`; return what an inch stands for."""
    side = np.ptp(points, axis=0).clip(1e-9)
    inch = max(side / (5, height - 0.5))
    middle = (points.min(0) + points.max(0)) / 2
    corner = inch * np.array([2.8, height / 2])
    limits = np.transpose([middle - corner, middle + corner])
    ax.axis(limits.ravel())
    ax.set_aspect("equal")
    return inch


def move_apart(points: ndarray, least: float) -> ndarray:
    """Return the points (n, 2) with those closer than `least` to another moved away from it."""
    places = np.arange(len(points))[:, None]
    moved = points + 1e-6 * least * places * [1, -1]  # equal points need a direction
    for _ in range(200):
        gap = moved[:, None] - moved
        far = np.linalg.norm(gap, axis=-1)
        np.fill_diagonal(far, np.inf)
        push = 0.5 * (least - far).clip(0) / far
        moved = moved + (gap * push[..., None]).sum(1)
    return moved


def draw_arrows(ax: Axes, points: ndarray, arrows: Sequence[tuple[int, int]]) -> None:
    """Draw thin arrows between some of the points, which end at the markers' edges."""
    options = {
        "arrowstyle": "-|>",
        "color": "#999999",
        "linewidth": 0.6,
        "mutation_scale": 7,
        "shrinkA": 6,
        "shrinkB": 6,
    }
    for start, end in arrows:
        ax.add_patch(FancyArrowPatch(points[start], points[end], zorder=1, **options))


def draw_prompts(ax: Axes, points: ndarray, names: ndarray, kinds: ndarray) -> None:
    """Draw markers with a name inside, small ones where the name is empty."""
    for k, kind in enumerate(dict.fromkeys(kinds)):
        here = kinds == kind
        marker = [*PLATES][k % len(PLATES)]
        ax.scatter(
            *points[here].T,
            s=PLATES[marker] * np.where(names[here] == "", 0.15, 1),
            marker=marker,
            facecolor="white",
            edgecolor=COLOURS[k % len(COLOURS)],
            linewidth=1.6,
            zorder=2,
            label=kind,
        )
    inside = {"ha": "center", "va": "center_baseline", "annotation_clip": True}
    for at, name in zip(points, names):
        ax.annotate(name, at, fontsize=8, zorder=3, **inside)
    ax.grid(visible=False)


@in_our_style
def against(panels: dict[str, tuple[ndarray, ndarray, str]], ylabel: str) -> Figure:
    """Draw pairs (x, y) as points, and the means of up to eight parts of x with as many pairs each.

    panels: of each title x, y, and x's label.
    """
    high = math.ceil(len(panels) / 2)
    fig, axes = figure(6.5, 2.9 * high, high, 2)
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    for ax, title in zip(axes.flat, panels):
        x, y, xlabel = panels[title]
        order = np.argsort(x, kind="stable")
        several = min(8, len(np.unique(x)))
        parts = np.array_split(order, several)
        means_x = [x[part].mean() for part in parts]
        means_y = [y[part].mean() for part in parts]
        ax.scatter(x, y, s=9, color="#56B4E9", edgecolor="none", alpha=0.6)
        ax.plot(means_x, means_y, "kD-", markersize=5, linewidth=1.2)
        whole = np.all(x == np.round(x))
        ax.locator_params(axis="x", integer=bool(whole))
        ax.set_title(title)
        ax.set_xlabel(xlabel)
        ax.set_ylim(0, None)
    for ax in axes[:, 0]:
        ax.set_ylabel(ylabel)
    return fig


@in_our_style
def growth(table: DataFrame) -> Figure:
    """Draw counts, seconds and memory of a round by each quantity that grows.

    table: as `bench.scaling.table`.
    """
    measures = {
        "prompts encoded": ["encoded with gradients", "if by each receiver", "experts encoded"],
        "seconds": ["seconds"],
        "MB": ["MB"],
    }
    parts = table.groupby("grows", sort=False)
    size = (2.5 * len(parts) + 0.8, 6.4)
    fig, grid = figure(*size, len(measures), len(parts), sharex="col", sharey="row")
    for line, (label, columns) in zip(grid, measures.items()):
        line[0].set_ylabel(label)
        for ax, (what, part) in zip(line, parts):
            for k, column in enumerate(columns):
                ax.plot(part[what], part[column], label=column, **look(k))
            ax.set(xscale="log", yscale="log")
            ax.minorticks_off()
            ax.set_xticks(part[what], [f"{x:g}" for x in part[what]])
            ax.set_xlabel(what)
            ax.label_outer()
    legend(grid[0, 0])
    return fig


@in_our_style
def label_prior(frame: DataFrame, guess: str, null: DataFrame, observed: float) -> Figure:
    """Draw pFedMoAP as published (points, ± std) on the majority guess (bars), by domain.

    A last panel has the distance between points and bars under other partition seeds.

    frame: as `label_prior.comparison`; guess: what its column `method` says of the guess; null: a
    line per seed with a column rms; observed: the rms of the released seed.
    """
    domains = frame[frame["domain"] != "average"]
    datasets = domains.groupby("dataset", sort=False)
    widths = [*datasets["domain"].nunique(), 5]
    size = (0.7 * sum(widths) + 0.5, 3.6)
    fig, [axes] = figure(*size, 1, len(widths), width_ratios=widths)
    for ax, (dataset, part) in zip(axes, datasets):
        guessed = part["method"] == guess
        published = part["method"] == "pFedMoAP"
        draw_guess(ax, part[guessed], part[published])
        ax.set_title(dataset)
    legend(axes[0])
    draw_other_seeds(axes[-1], 100 * null["rms"].dropna(), 100 * observed)
    return fig


def draw_guess(ax: Axes, guess: DataFrame, paper: DataFrame) -> None:
    """Draw the guess as bars, the published numbers as points, and chance as a line."""
    ax.bar(
        guess["domain"],
        100 * guess["mean"],
        color="#F2CF8B",
        edgecolor="black",
        linewidth=0.8,
        label="majority guess, sees no image",
    )
    ax.errorbar(
        paper["domain"],
        100 * paper["mean"],
        100 * paper["std"],
        fmt="ko",
        markersize=4,
        elinewidth=1.5,
        label="pFedMoAP as published, ± std",
    )
    ax.axhline(10, color="black", linestyle=":", linewidth=1, label="chance, 10 classes")
    ax.set_ylim(0, 55)
    ax.set_ylabel("accuracy (%)")
    ax.tick_params(axis="x", rotation=30)


def draw_other_seeds(ax: Axes, rms: Series, observed: float) -> None:
    """Draw how often which distance occurs, and where the released seed's stands."""
    ax.hist(rms, bins=30, color="#56B4E9", edgecolor="white", linewidth=0.4)
    ax.axvline(observed, color="black", linewidth=1.5)
    ax.annotate(
        f"released seed 0: {observed:.2f}",
        (observed, 0.93),
        xycoords=ax.get_xaxis_transform(),
        xytext=(5, 0),
        textcoords="offset points",
    )
    ax.set(
        title=f"DomainNet, {len(rms)} other seeds",
        xlabel="RMS distance, published to guess (points)",
        ylabel="seeds",
        xlim=(0, None),
        ylim=(0, 1.15 * ax.get_ylim()[1]),
    )
