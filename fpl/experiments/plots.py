"""Figures: one style, one way to save, one function a figure. Importing this module changes no global state.

A function takes a DataFrame and returns a Figure; accuracies come in [0, 1] and are drawn in percent. Figures must be
readable in greyscale and by the colour-blind: kinds differ in lightness and in marker or hatch, never in hue alone.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch

from fpl.audit.label_prior import MAJORITY
from fpl.data.files import atomic_write

# Okabe and Ito's colours, ordered so that neighbours differ in lightness too.
COLOURS = ["#000000", "#E69F00", "#0072B2", "#56B4E9", "#D55E00", "#009E73", "#CC79A7"]
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


def style() -> None:
    """Makes our style that of the session. Figures of this module have it anyway."""
    plt.rcParams.update(STYLE)


def save(fig: Figure, path_without_suffix: str | Path, kinds: Sequence[str] = ("png", "svg")) -> None:
    """Writes PNG and SVG, whole or not at all; the same figure gives the same bytes."""
    for kind in kinds:
        metadata = {"Software": None} if kind == "png" else {"Date": None}
        with plt.rc_context(STYLE), atomic_write(f"{path_without_suffix}.{kind}") as file:
            fig.savefig(file, format=kind, metadata=metadata)


def _figure(**options) -> Figure:
    """An empty figure that pyplot does not keep: a notebook shows it once, as the last value of a cell, and memory is freed."""
    fig = plt.figure(**options)
    plt.close(fig)
    return fig


def label_prior(frame: pd.DataFrame, null: pd.DataFrame | None = None, observed: float | None = None) -> Figure:
    """pFedMoAP as published (points, ± std) on the majority guess (bars), per domain; frame as `label_prior.comparison`.

    With `null` (seeds; column rms) a last panel shows the distance between points and bars under other partition seeds, and
    `observed` marks that of the released seed.
    """
    datasets = dict(iter(frame[frame["domain"] != "average"].groupby("dataset", sort=False)))
    widths = [rows["domain"].nunique() for rows in datasets.values()] + [5] * (null is not None)
    with plt.rc_context(STYLE):
        fig = _figure(figsize=(0.7 * sum(widths) + 0.5, 3.6))
        axes = fig.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
        for ax, (dataset, rows) in zip(axes, datasets.items()):
            _guess_and_published(ax, rows.set_index("domain"), dataset)
        fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=3)
        if null is not None:
            _other_seeds(axes[-1], 100 * null["rms"].dropna(), 100 * observed)
    return fig


def _guess_and_published(ax: Axes, rows: pd.DataFrame, dataset: str) -> None:
    guess, paper = (100 * rows.loc[rows["method"] == method, ["mean", "std"]] for method in (MAJORITY, "pFedMoAP"))
    ax.bar(guess.index, guess["mean"], color="#F2CF8B", edgecolor="black", linewidth=0.8, label="majority guess, sees no image")
    points = {"fmt": "o", "markersize": 4, "color": "black", "elinewidth": 1.5}
    ax.errorbar(paper.index, paper["mean"], paper["std"], label="pFedMoAP as published, ± std", **points)
    ax.axhline(10, color="black", linestyle=":", linewidth=1, label="chance, 10 classes")
    ax.set(title=dataset, ylabel="accuracy (%)", ylim=(0, 55))
    ax.tick_params(axis="x", rotation=30)


def _other_seeds(ax: Axes, rms: pd.Series, observed: float) -> None:
    ax.hist(rms, bins=30, color=COLOURS[3], edgecolor="white", linewidth=0.4)
    ax.axvline(observed, color="black", linewidth=1.5)
    place = {"xycoords": ax.get_xaxis_transform(), "xytext": (5, 0), "textcoords": "offset points"}
    ax.annotate(f"released seed 0: {observed:.2f}", (observed, 0.93), **place)
    ax.set(title=f"DomainNet, {len(rms)} other seeds", xlabel="RMS distance, published to guess (points)", ylabel="seeds")
    ax.set(xlim=(0, None), ylim=(0, 1.15 * ax.get_ylim()[1]))


def panels(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The parts of a table on several data sets with their names, or the table of one, which needs no name."""
    if "data" not in table.index.names:
        return [("", table)]
    return [(str(name), part.droplevel("data")) for name, part in table.groupby(level="data", sort=False)]


def rows(table: pd.DataFrame) -> Figure:
    """A table of methods and controls as points with 95 % intervals; table as `tables.table1`, in percent."""
    shown = panels(table)
    with plt.rc_context(STYLE):
        fig = _figure(figsize=(7.5, sum(0.34 * len(part) + 0.9 for _, part in shown)))
        axes = fig.subplots(len(shown), squeeze=False, height_ratios=[len(part) + 2 for _, part in shown])[:, 0]
        for ax, (name, part) in zip(axes, shown, strict=True):
            for y, line in enumerate(part[::-1].itertuples()):
                control = line.row.startswith("control")
                look = {"marker": "s" if control else "o", "markerfacecolor": "white" if control else "black"}
                ax.errorbar(line.mean, y, xerr=[[line.mean - line.low], [line.high - line.mean]], color="black", **look)
            ax.set_yticks(range(len(part)), part["row"][::-1])
            ax.set_title(name)
            ax.grid(axis="x")
        axes[-1].set_xlabel("accuracy (%) after the last round; 95 % interval over seeds", loc="right")
    return fig


def forest(table: pd.DataFrame, far: float = 5.0) -> Figure:
    """Differences in points, in the order of the table, with the bootstrap's interval (thick) and the t-interval (thin).

    table as `ledger.costs`. A marker is filled where neither interval holds 0, grey where one of them does, white where both do.
    Lines beyond `far` points stand in a panel of their own, so that the others can be told apart.
    """
    panels = [part for _, part in table.groupby(table["difference"].abs() <= far)]
    with plt.rc_context(STYLE):
        fig = _figure(figsize=(7.5, 0.27 * len(table) + 0.75 * len(panels) + 0.5))
        for ax, part in zip(fig.subplots(len(panels), height_ratios=[len(p) + 2 for p in panels], squeeze=False).flat, panels):
            for y, line in enumerate(part.itertuples()):
                held = (line.low <= 0 <= line.high) + (line.t_low <= 0 <= line.t_high)
                ax.hlines(y, line.t_low, line.t_high, color="black", linewidth=0.8)
                ax.hlines(y, line.low, line.high, color="black", linewidth=2.8)
                face = ("black", "#AAAAAA", "white")[held]
                ax.plot(line.difference, y, marker="o", color="black", markerfacecolor=face, markersize=6, zorder=3)
            ax.axvline(0, color="black", linewidth=0.8)
            ax.set_yticks(range(len(part)), [f"{what}  {item}" for item, what in part.index])
            ax.set(ylim=(len(part) - 0.4, -0.6))
            ax.grid(axis="x")
        fig.axes[-1].set_xlabel("accuracy with what the released code does minus without it (points)", loc="right")
    return fig


def curves(runs: pd.DataFrame, names: dict[str, str]) -> Figure:
    """Accuracy (%) by round, mean over clients: a line per method, a band from the lowest to the highest seed."""
    several = "data" in runs and runs["data"].nunique() > 1
    each = 100 * runs.groupby(["data"] * several + ["method", "seed", "round"], sort=False)["accuracy"].mean()
    shown = panels(each.to_frame())
    with plt.rc_context(STYLE):
        fig = _figure(figsize=(6.5, 3.6 * len(shown)))
        for ax, (name, part) in zip(fig.subplots(len(shown), squeeze=False)[:, 0], shown, strict=True):
            for k, (method, seeds) in enumerate(part["accuracy"].groupby(level="method", sort=False)):
                by_round = seeds.groupby(level="round")
                x, look = by_round.mean().index + 1, {"color": COLOURS[k % len(COLOURS)]}
                ax.plot(x, by_round.mean(), marker="osD^vP*X"[k % 8], markersize=4, label=names.get(method, method), **look)
                ax.fill_between(x, by_round.min(), by_round.max(), alpha=0.2, linewidth=0, **look)
            ax.set(title=name, xlabel="communication round", ylabel="accuracy (%), mean over clients")
            ax.legend()
    return fig


def ablations(
    values: dict[str, pd.DataFrame], defaults: dict[str, float], labels: dict[str, str], reference: dict[str, dict[str, float]]
) -> Figure:
    """One panel per hyperparameter: mean and 95 % interval (%) at each value, the default filled, references as lines.

    A row of panels per data set; `reference` has the levels of each, by name.
    """
    with plt.rc_context(STYLE):
        fig = _figure(figsize=(3.1 * len(values) + 0.6, 3.5 * len(reference)))
        grid = fig.subplots(len(reference), len(values), sharey="row", squeeze=False)
        for column, (key, table) in zip(grid.T, values.items(), strict=True):
            for ax, (data, part), levels in zip(column, panels(table), reference.values(), strict=True):
                for x, line in enumerate(part.itertuples()):
                    face = "black" if line.Index == defaults[key] else "white"
                    error = [[line.mean - line.low], [line.high - line.mean]]
                    ax.errorbar(x, line.mean, yerr=error, marker="o", color="black", markerfacecolor=face)
                for (name, level), kind in zip(levels.items(), ("--", ":", "-."), strict=False):
                    ax.axhline(level, color="#555555", linestyle=kind, linewidth=1.2, label=name)
                ax.set_xticks(range(len(part)), [f"{v:g}" for v in part.index])
                ax.set(xlabel=labels[key], title=data)
        for ax in grid[:, 0]:
            ax.set(ylabel="accuracy (%)")
        fig.legend(*fig.axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=3)
    return fig


def lines(table: pd.DataFrame, x: str, xlabel: str, names: dict[str, str]) -> Figure:
    """Mean and 95 % interval (%) by value of a setting, at equal distances, a line per row; index of the table (row, x)."""
    with plt.rc_context(STYLE):
        shown, ticks = panels(table), sorted(table.index.get_level_values(x).unique())
        fig = _figure(figsize=(6.8, 3.8 * len(shown)))
        for ax, (name, of) in zip(fig.subplots(len(shown), squeeze=False)[:, 0], shown, strict=True):
            for k, (row, part) in enumerate(of.groupby(level="row", sort=False)):
                part = part.droplevel("row").sort_index()
                look = {"color": COLOURS[k % len(COLOURS)], "label": names.get(row, row)}
                at = [ticks.index(value) + 0.06 * k for value in part.index]
                error = [part["mean"] - part["low"], part["high"] - part["mean"]]
                ax.errorbar(at, part["mean"], yerr=error, marker="osD^vP*X"[k % 8], markersize=5, **look)
            ax.set_xticks(range(len(ticks)), [f"{value:g}" for value in ticks])
            ax.set(xlabel=xlabel, ylabel="accuracy (%)", title=name)
        fig.legend(*fig.axes[0].get_legend_handles_labels(), loc="outside right center")
    return fig


def cost(table: pd.DataFrame, names: dict[str, str]) -> Figure:
    """Accuracy (%) with 95 % interval against kilobytes that a participant receives in a round; table as `tables.with_bytes`."""
    with plt.rc_context(STYLE):
        shown = panels(table)
        fig = _figure(figsize=(6.8, 3.8 * len(shown)))
        for ax, (name, of) in zip(fig.subplots(len(shown), squeeze=False)[:, 0], shown, strict=True):
            for k, (row, part) in enumerate(of.groupby(level="row", sort=False)):
                error = [part["mean"] - part["low"], part["high"] - part["mean"]]
                look = {"color": COLOURS[k % len(COLOURS)], "label": names.get(row, row), "linestyle": "none"}
                ax.errorbar(part["down, bytes"] / 1000, part["mean"], yerr=error, marker="osD^"[k % 4], **look)
            ax.set(xlabel="kB received by a client in a round", ylabel="accuracy (%)", xscale="log", title=name)
            ax.set_xticks(sorted({*of["down, bytes"] / 1000}))
            ax.xaxis.set_major_formatter("{x:.3g}")
            ax.minorticks_off()
            ax.legend()
    return fig


def bars(values: Sequence[float], names: Sequence[str], title: str, xlabel: str, mark: int | None = None) -> Figure:
    """Horizontal bars, the first on top; `mark` fills one of them."""
    with plt.rc_context(STYLE):
        fig = _figure(figsize=(6, 0.28 * len(values) + 0.9))
        ax = fig.subplots()
        colours = ["#0072B2" if i == mark else "#BBBBBB" for i in range(len(values))]
        ax.barh(range(len(values)), values, color=colours, edgecolor="black", linewidth=0.6)
        ax.set_yticks(range(len(values)), names)
        ax.invert_yaxis()
        ax.grid(axis="x")
        ax.set(title=title, xlabel=xlabel)
    return fig


def steps(values: Sequence[float], every: int, title: str, xlabel: str, ylabel: str) -> Figure:
    """A sequence as points on a line, with a vertical line before every `every` of them."""
    with plt.rc_context(STYLE):
        fig = _figure(figsize=(7.5, 2.6))
        ax = fig.subplots()
        ax.plot(values, marker="o", markersize=3, color="black", linewidth=0.8)
        for x in range(0, len(values), every):
            ax.axvline(x - 0.5, color="#BBBBBB", linewidth=0.8)
        ax.set(title=title, xlabel=xlabel, ylabel=ylabel, xlim=(-0.5, len(values) - 0.5))
    return fig


def partition(images: pd.DataFrame) -> Figure:
    """Who has what: a bubble for each client and class, its area the number of images, its colour and marker the domain.

    images: one line per image with columns client (0, 1, ..), class (names), domain.
    """
    counts = images.groupby(["client", "class", "domain"], sort=False).size().rename("images").reset_index()
    classes, domains = sorted(counts["class"].unique()), sorted(counts["domain"].unique())
    clients, named = int(counts["client"].max()) + 1, len(classes) <= 60
    with plt.rc_context(STYLE):
        fig = _figure(figsize=(min(max(0.2 * len(classes), 5) + 1.5, 14), min(max(0.26 * clients, 2) + 1.6, 14)))
        ax = fig.subplots()
        for k, (domain, rows) in enumerate(counts.groupby("domain")):
            at = [classes.index(name) + 0.1 * (k - (len(domains) - 1) / 2) for name in rows["class"]]
            look = {"marker": "osD^vP*X"[k % 8], "color": COLOURS[(k + 2) % len(COLOURS)], "edgecolor": "black", "linewidth": 0.3}
            ax.scatter(at, rows["client"], s=90 * rows["images"] / counts["images"].max(), label=domain, **look)
        ax.set(xlabel=f"class ({len(classes)})", ylabel="client", xlim=(-0.8, len(classes) - 0.2), ylim=(clients - 0.4, -0.6))
        ax.set_xticks(*((range(len(classes)), classes) if named else ([],)))
        ax.tick_params(axis="x", rotation=90, labelsize=7)
        ax.set_title(f"{len(images)} images; the largest bubble is {counts['images'].max()} of them")
        if len(domains) > 1:
            fig.legend(*ax.get_legend_handles_labels(), loc="outside lower left", ncols=6)
    return fig


def heat(
    matrix: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    label: str,
    xlabel: str = "",
    ylabel: str = "",
    dots: np.ndarray | None = None,
) -> Figure:
    """A matrix as shades, light to dark; hatched where it is nan. `dots`, of its shape: white discs of these areas, largest 1."""
    wide, high = min(0.42, max(4.6 / len(columns), 0.18)), min(0.3, max(7 / len(rows), 0.16))
    with plt.rc_context(STYLE | {"ytick.labelsize": min(10, 50 * high), "xtick.labelsize": min(10, 45 * wide)}):
        fig = _figure(figsize=(wide * len(columns) + 2.2, high * len(rows) + 1.2))
        ax = fig.subplots()
        ax.patch.set(hatch="//////", edgecolor="#CCCCCC")
        shades = ax.imshow(matrix, cmap="cividis_r", aspect="auto")
        if dots is not None:
            y, x = np.nonzero(dots)
            ax.scatter(x, y, s=2000 * min(wide, high) ** 2 * dots[y, x], color="white", edgecolor="black", linewidth=0.8)
        ax.set_xticks(range(len(columns)), columns, rotation=90 if max(map(len, columns)) > 3 else 0)
        ax.set_yticks(range(len(rows)), rows)
        ax.grid(visible=False)
        ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
        fig.colorbar(shades, label=label)
    return fig


def mask(sees: np.ndarray, shared: int) -> Figure:
    """The attention mask of a prompt tree: dark where the node of a row sees the node of a column."""
    with plt.rc_context(STYLE):
        fig = _figure(figsize=(4.6, 4.6))
        ax = fig.subplots()
        ax.imshow(sees, cmap="Greys", interpolation="nearest")
        ax.axhline(shared - 0.5, color="#D55E00", linewidth=1)
        ax.axvline(shared - 0.5, color="#D55E00", linewidth=1)
        ax.grid(visible=False)
        ax.set(title=f"{len(sees)} nodes, the first {shared} shared", xlabel="seen node", ylabel="node")
    return fig


def pictures(images: Sequence[np.ndarray], titles: Sequence[str], per_line: int = 6) -> Figure:
    lines = -(-len(images) // per_line)
    with plt.rc_context(STYLE):
        fig = _figure(figsize=(1.5 * per_line, 1.75 * lines))
        for ax in fig.subplots(lines, per_line, squeeze=False).flat:
            ax.axis("off")
        for ax, image, title in zip(fig.axes, images, titles, strict=False):
            ax.imshow(image)
            ax.set_title(title, fontsize=8, loc="center")
    return fig


def scatter(points: np.ndarray, groups: Sequence[str], title: str) -> Figure:
    """Points (p, 2) with one colour and one marker per group."""
    kinds = sorted(set(groups))
    with plt.rc_context(STYLE):
        fig = _figure(figsize=(6.5, 4))
        ax = fig.subplots()
        for k, kind in enumerate(kinds):
            here = points[np.array(groups) == kind]
            ax.scatter(*here.T, s=9, marker="os^vD*PXph<>"[k % 12], color=COLOURS[k % len(COLOURS)], alpha=0.7, label=kind)
        ax.grid(visible=False)
        ax.set(title=title, xticks=[], yticks=[])
        fig.legend(loc="outside right upper")
    return fig


def expert_shares(worlds: dict[str, pd.DataFrame]) -> Figure:
    """Share of attention (%) by rank of the expert, 0 the local one: grey dots are clients, black the mean, a line even shares.

    A panel per world; its frame has a line per client and a column per rank, in [0, 1].
    """
    with plt.rc_context(STYLE):
        fig = _figure(figsize=(6.5, 3.2))
        widths = [len(shares.columns) for shares in worlds.values()]
        for ax, (name, shares) in zip(fig.subplots(1, len(worlds), width_ratios=widths, squeeze=False)[0], worlds.items()):
            x, each = np.arange(len(shares.columns)), 100 * shares.to_numpy()
            beside = np.linspace(-0.2, 0.2, len(each))[:, None]
            ax.scatter(*np.broadcast_arrays(x + beside, each), s=9, color="#999999", label="a client")
            ax.scatter(x, each.mean(0), s=34, marker="D", color="black", label="mean over clients")
            ax.axhline(100 / len(x), color="#D55E00", linestyle="--", linewidth=1.2, label="even share")
            ax.set_xticks(x, ["own", *map(str, x[1:])])
            ax.set(title=name, xlabel="expert, by nearness", ylim=(0, max(200 / len(x), 1.1 * each.max())))
        fig.axes[0].set(ylabel="share of attention (%)")
        fig.legend(*fig.axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=3)
    return fig


def prompt_map(
    points: np.ndarray, names: Sequence[str], kinds: Sequence[str], arrows: Sequence[tuple[int, int]], variance: Sequence[float]
) -> Figure:
    """Prompts in the plane, (n, 2), each with its name and the marker of its kind, and arrows (from, to) between their places.

    `variance`: part of the variance on each axis. Where most points lie close together, a second panel enlarges that part.
    Markers that would cover each other are moved apart until they touch.
    """
    away = np.linalg.norm(points - np.median(points, axis=0), axis=1)
    crowd = away <= 2 * np.median(away)
    close = len(points) > 12 and np.prod(np.ptp(points[crowd], axis=0)) < np.prod(np.ptp(points, axis=0)) / 8
    areas = [points, points[crowd]] if close else [points]
    sides = [np.ptp(area, axis=0).clip(1e-9) for area in areas]
    heights = [min(max(5.4 * high / wide, 3), 5.4) for wide, high in sides]
    with plt.rc_context(STYLE):
        fig = _figure(figsize=(6.5, sum(heights) + 0.8 * len(areas)))
        axes = fig.subplots(len(areas), 1, height_ratios=heights, squeeze=False)[:, 0]
        for ax, area, (wide, high), tall in zip(axes, areas, sides, heights):
            inch = max(wide / 5, high / (tall - 0.5))
            (x, y), named = (area.min(0) + area.max(0)) / 2, ~crowd if close and ax is axes[0] else np.full(len(points), True)
            ax.set(xlim=(x - 2.8 * inch, x + 2.8 * inch), ylim=(y - tall / 2 * inch, y + tall / 2 * inch))
            ax.set_aspect("equal")
            at = points.copy()
            at[named] = _apart(points[named], 0.24 * inch)
            _prompts(ax, at, [name if n else "" for name, n in zip(names, named, strict=True)], kinds, arrows)
            ax.set_xlabel(f"first axis, {100 * variance[0]:.0f} % of the variance")
            ax.set_ylabel(f"second axis, {100 * variance[1]:.0f} %")
        if close:
            axes[1].set_title("the crowd of the panel above, enlarged")
        if len({*kinds}) > 1:
            fig.legend(*axes[-1].get_legend_handles_labels(), loc="outside lower left", ncols=3, markerscale=0.6)
    return fig


def _apart(points: np.ndarray, least: float) -> np.ndarray:
    """The points (n, 2), those closer than `least` to another moved away from it."""
    moved = points + 1e-6 * least * np.arange(len(points))[:, None] * [1, -1]  # equal points need a direction
    for _ in range(200):
        gap = moved[:, None] - moved
        far = np.linalg.norm(gap, axis=-1) + np.diag(np.full(len(points), np.inf))
        moved = moved + (gap * (0.5 * (least - far).clip(0) / far)[..., None]).sum(1)
    return moved


def _prompts(ax: Axes, points: np.ndarray, names: Sequence[str], kinds: Sequence[str], arrows: Sequence[tuple[int, int]]) -> None:
    """Markers, small where there is no name, and arrows between them."""
    for a, b in arrows:
        look = {"arrowstyle": "-|>", "color": "#999999", "linewidth": 0.6, "mutation_scale": 7, "shrinkA": 6, "shrinkB": 6}
        ax.add_patch(FancyArrowPatch(points[a], points[b], zorder=1, **look))
    for k, kind in enumerate(dict.fromkeys(kinds)):
        here = np.array(kinds) == kind
        look = {"marker": "osD^vh"[k % 6], "edgecolor": COLOURS[k % len(COLOURS)], "facecolor": "white", "linewidth": 1.6}
        size = (190, 170, 150, 360, 360, 220)[k % 6] * np.array([1 if name else 0.15 for name in names])
        ax.scatter(*points[here].T, s=size[here], zorder=2, label=kind, **look)
    for at, name in zip(points, names, strict=True):
        ax.annotate(name, at, ha="center", va="center_baseline", fontsize=8, zorder=3, annotation_clip=True)
    ax.grid(visible=False)


def against(panels: dict[str, tuple[np.ndarray, np.ndarray, str]], ylabel: str) -> Figure:
    """Pairs as points, with the means of up to eight parts of x, each of as many pairs; panels: title -> (x, y, x's label)."""
    lines = -(-len(panels) // 2)
    with plt.rc_context(STYLE):
        fig = _figure(figsize=(6.5, 2.9 * lines))
        axes = fig.subplots(lines, 2, squeeze=False).ravel()
        for ax in axes[len(panels) :]:
            ax.remove()
        for ax, (title, (x, y, xlabel)) in zip(axes, panels.items()):
            ax.scatter(x, y, s=9, color="#56B4E9", edgecolor="none", alpha=0.6)
            order = np.argsort(x, kind="stable")
            parts = np.array_split(order, min(8, len(np.unique(x))))
            middle = [(x[part].mean(), y[part].mean()) for part in parts]
            ax.plot(*np.transpose(middle), marker="D", markersize=5, color="black", linewidth=1.2)
            ax.set(title=title, xlabel=xlabel, ylim=(0, None))
            ax.xaxis.get_major_locator().set_params(integer=bool(np.all(x == np.round(x))))
        for ax in axes[: len(panels) : 2]:
            ax.set(ylabel=ylabel)
    return fig


def by_client(runs: pd.DataFrame, names: dict[str, str]) -> Figure:
    """Accuracy (%) of every client in every seed, a row per method; the mean over them, and the worst client of each seed.

    `runs`: a line per run and client, columns method, seed, accuracy.
    """
    methods = [*dict.fromkeys(runs["method"])]
    with plt.rc_context(STYLE):
        fig = _figure(figsize=(6.5, 0.34 * len(methods) + 1.1))
        ax = fig.subplots()
        for y, method in enumerate(methods):
            each = 100 * runs.loc[runs["method"] == method].set_index("seed")["accuracy"]
            worst = each.groupby(level="seed").min()
            ax.scatter(each, [y] * len(each), s=36, marker="|", color="#777777", linewidth=1, label="a client")
            look = {"marker": "v", "facecolor": "white", "edgecolor": "#D55E00", "linewidth": 1.3}
            ax.scatter(worst, [y] * len(worst), s=30, label="worst client of a seed", **look)
            ax.scatter(each.mean(), y - 0.25, s=22, marker="D", color="black", label="mean", zorder=3)
        labels = [textwrap.fill(names.get(method, method), 30) for method in methods]
        ax.set_yticks(range(len(methods)), labels, fontsize=8)
        ax.set(ylim=(len(methods) - 0.4, -0.6))
        ax.grid(axis="both")
        ax.set_xlabel("accuracy on the client's own test images (%)", loc="right")
        handles, texts = ax.get_legend_handles_labels()
        fig.legend(handles[:3], texts[:3], loc="outside lower left", ncols=3)
    return fig


def growth(table: pd.DataFrame) -> Figure:
    """Counts, seconds and memory of a round against each quantity that grows; table as `bench_scaling.table`."""
    rows = {
        "prompts encoded": ["encoded with gradients", "if by each receiver", "experts encoded"],
        "seconds": ["seconds"],
        "MB": ["MB"],
    }
    parts = dict(iter(table.groupby("grows", sort=False)))
    with plt.rc_context(STYLE):
        fig = _figure(figsize=(2.5 * len(parts) + 0.8, 6.4))
        grid = fig.subplots(len(rows), len(parts), sharex="col", sharey="row", squeeze=False)
        for line, (label, columns) in zip(grid, rows.items(), strict=True):
            line[0].set(ylabel=label)
            for ax, (what, part) in zip(line, parts.items(), strict=True):
                for column, marker, colour in zip(columns, "osD", ("#000000", "#777777", "#0072B2"), strict=False):
                    face = "white" if marker == "s" else colour
                    ax.plot(part[what], part[column], marker=marker, color=colour, markerfacecolor=face, label=column)
                ax.set(xscale="log", yscale="log")
                ax.minorticks_off()
                ax.set_xticks(part[what], [f"{x:g}" for x in part[what]])
        for ax, what in zip(grid[-1], parts, strict=True):
            ax.set(xlabel=what)
        fig.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower left", ncols=3)
    return fig
