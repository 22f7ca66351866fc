"""Draws panels of series as one picture, PNG and SVG, readable without colour.

Every series has its own marker and dashes and is labelled at its last point. Panels are stacked vertically, so that a
picture is as readable on a phone as on paper.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
"""Okabe and Ito's palette with ochre for yellow: safe for most colour-blind readers and dark enough on white."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
WIDTH, HEIGHT, LOW, LINE = 5.4, 2.75, 2.2, 0.31  # inches: panel width, height, height if over four, estimate row
LABEL_GAP = 0.075  # between two labels at line ends, as a share of the panel's height
Mark = tuple[str, str, Any]
"""Colour, marker and dashes of a name, the same in every panel of a picture."""


@dataclass(frozen=True)
class Series:
    """Points (K,) in order, with 95 % intervals if `low` and `high` are given.

    `points` are joined only by a faint line. A `fit` is a smooth curve without points, in the colour and dashes of the
    series with the same name. A series without a name gets no label.
    """

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    kind: Literal["line", "points", "fit"] = "line"


@dataclass(frozen=True)
class Panel:
    """One pair of axes. With `labels`, which name the points of its only series, it is drawn as a list of estimates."""

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    share: bool = False  # values between 0 and 1, shown in per cent
    labels: tuple[str, ...] = ()


def save(title: str, panels: Sequence[Panel], folder: Path, name: str) -> None:
    """Writes NAME.png and NAME.svg. With one version of matplotlib, the same panels give the same bytes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style: dict[Any, Any] = {
        "font.size": 10,
        "svg.hashsalt": name,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    heights = [0.8 + LINE * len(p.labels) if p.labels else HEIGHT if len(panels) <= 4 else LOW for p in panels]
    names = list(dict.fromkeys(n for panel in panels for n in (panel.labels or [s.name for s in panel.series])))
    marks = {name: (COLOURS[i % 8], MARKERS[i % 8], DASHES[i % 4]) for i, name in enumerate(names)}
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(style):
        figure, axes = plt.subplots(
            len(panels), figsize=(WIDTH, sum(heights) + 0.4), squeeze=False, layout="constrained",
            gridspec_kw={"height_ratios": heights},
        )  # fmt: skip
        try:
            figure.suptitle(title, fontsize=11, fontweight="bold")
            for axis, panel in zip(axes[:, 0], panels, strict=True):
                if not any(series.x for series in panel.series):
                    _empty(axis, panel)
                elif panel.labels:
                    _estimates(axis, panel, marks)
                else:
                    _curves(axis, panel, marks)
            figure.savefig(folder / f"{name}.png", dpi=160, metadata={"Software": None})
            figure.set_layout_engine("none")  # keep the layout of the PNG
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})
        finally:
            plt.close(figure)


def _empty(axis: Any, panel: Panel) -> None:
    axis.set_axis_off()
    axis.set_title(panel.title, fontsize=10, loc="left")
    axis.text(0.5, 0.5, "nothing measured yet", ha="center", va="center", transform=axis.transAxes, color="0.4")


def _estimates(axis: Any, panel: Panel, marks: Mapping[str, Mark]) -> None:
    """One row per label from the top down: label, point, interval and value."""
    series = panel.series[0]
    rows = np.arange(len(panel.labels))
    if series.low:
        bars = [np.maximum(0, np.subtract(series.y, series.low)), np.maximum(0, np.subtract(series.high, series.y))]
        axis.errorbar(series.y, rows, xerr=bars, color="black", linestyle="", capsize=4, linewidth=1.2)
    for row, (value, name) in enumerate(zip(series.y, panel.labels, strict=True)):
        colour, marker, _ = marks[name]
        axis.plot(value, row, color=colour, marker=marker, markersize=7, markeredgecolor="black")
        axis.annotate(
            f"{value:.1%}" if panel.share else f"{value:.3g}", (1.02, row), xycoords=("axes fraction", "data"),
            va="center", fontsize=9,
        )  # fmt: skip
    axis.set_yticks(rows, panel.labels)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    _frame(axis, panel, "x", panel.share)
    if panel.share:
        axis.set_xlim(-0.02, 1.02)


def _curves(axis: Any, panel: Panel, marks: Mapping[str, Mark]) -> None:
    """Lines or points with bands, labelled at the right."""
    ends: list[tuple[float, float, str, str]] = []
    for series in panel.series:
        if not series.x:
            continue
        colour, marker, dashes = marks[series.name]
        x, y = np.array(series.x, float), np.array(series.y, float)
        if series.kind == "fit":
            axis.plot(x, y, color=colour, linestyle=dashes, linewidth=2.4, alpha=0.8, zorder=2)
            continue
        every = max(1, len(x) // 12) if series.kind == "line" else 1
        axis.plot(x, y, color=colour, linestyle=dashes, linewidth=1.5 if series.kind == "line" else 0.4, zorder=3)
        axis.plot(
            x, y, color=colour, linestyle="", marker=marker, markersize=5, markevery=every, markerfacecolor="white",
            zorder=4,
        )  # fmt: skip
        _interval(axis, series, colour)
        if series.name:
            ends.append((float(x[-1]), float(y[-1]), series.name, colour))
    _frame(axis, panel, "y", panel.share)
    _name_ends(axis, ends)


def _interval(axis: Any, series: Series, colour: str) -> None:
    if not series.low:
        return
    x, low, high = (np.array(values, float) for values in (series.x, series.low, series.high))
    if series.kind == "line" and len(x) > 2:
        axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0, zorder=1)
    else:
        axis.vlines(x, low, high, color=colour, linewidth=1, zorder=2)


def _frame(axis: Any, panel: Panel, values: Literal["x", "y"], share: bool) -> None:
    """Title, labels, grid, and per cent ticks on the value axis if values are shares."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    axis.set_title(panel.title, fontsize=10, loc="left")
    axis.set(xlabel=panel.x_label, ylabel=panel.y_label)
    axis.grid(alpha=0.3, linewidth=0.6)
    value_axis = axis.xaxis if values == "x" else axis.yaxis
    if share:
        value_axis.set_major_formatter(PercentFormatter(1.0))
        if values == "y":
            bottom, top = axis.get_ylim()
            axis.set_ylim(max(bottom, -0.04 * max(top, 0.05)), max(top, 0.05))
    if values == "y" and panel.x_label.startswith("step"):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _name_ends(axis: Any, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Writes each line's name right of the axes at the height of its last point, moved apart if two would overlap."""
    bottom, top = axis.get_ylim()
    heights = [(y - bottom) / (top - bottom) for _, y, _, _ in ends]
    _, right = axis.get_xlim()
    for (x, y, name, colour), height in zip(ends, spread(heights, LABEL_GAP), strict=True):
        axis.annotate(
            name, (x, y), (1.03, height), textcoords="axes fraction", va="center", fontsize=9, color=colour,
            fontweight="bold", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.7, "shrinkB": 3},
        )  # fmt: skip
    axis.set_xlim(right=right)


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Heights in the same order, pushed upwards as little as needed so that neighbours are `gap` apart.

    If that would exceed 1, the stack moves down.
    """
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    out = [0.0] * len(heights)
    last = -math.inf
    for i in order:
        last = out[i] = max(min(heights[i], 1.0), last + gap)
    limit = 1.0
    for i in reversed(order):
        out[i] = limit = min(out[i], limit)
        limit -= gap
    return out
