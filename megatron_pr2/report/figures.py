"""Charts from pandas data: panels of lines over the data's index, heat maps, rows of stacked bars, rows of intervals.

A label of an x axis is the name of the index; what has no number is left out, and a chart without any is None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from megatron_pr2.report import formats
from megatron_pr2.report.theme import LIGHT, STYLE, WIDTH, ramp, to_svg

Form = Callable[[float], str]
# arXiv 2606.00395 (draft), off-2: share of (token, layer) pairs with 0, 1, 2, 3 or more changed experts.
PAPER_CHANGED = {"paper: frozen, off-2": (0.769, 0.196, 0.026, 0.009), "paper: PR2, off-2": (0.922, 0.077, 0.001, 0.0)}
PAPER_COVERAGE_GAP = 0.0015  # upper end of the per-layer values that the draft reports
CHANGED = {"1 expert": "ramp1", "2 experts": "orange", "3 or more": "red"}


class Plot(NamedTuple):
    """A finished plot; captions.html.j2 says what it is called and how to read it."""

    name: str
    svg: str


Plots = Iterator[Plot | None]


class Line(NamedTuple):
    """What a panel draws: values by their index; `half` is half the height of an interval."""

    values: pd.Series
    colour: str = "blue"
    label: str | None = None
    half: pd.Series | None = None
    style: Mapping[str, Any] = {}


THIN: Mapping[str, Any] = {"linewidth": 1}
ZERO: Mapping[str, float] = {"": 0.0}


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        kind: "line" (`half` is a band), "error" (`half` is a whisker), "bar" or "area" (stacked).
        spread: width over which lines of kinds "error" and "bar" lie side by side.
        zero: the y axis starts at zero.
        log: 10 or 2: base of a log axis, if the positive values span more than a factor of 10; others are left out then.
        form: of the y axis' ticks.
        rules: label, or nothing, and place of horizontal lines to compare with.
        shade: a series filled down to zero, green above and red below.
    """

    y: str
    lines: Sequence[Line] = field(default_factory=list)
    kind: str = "line"
    spread: float = 0.0
    zero: bool = False
    log: int = 0
    form: Form | None = None
    rules: Mapping[str, float] = field(default_factory=dict)
    shade: pd.Series | None = None


def share(value: float) -> str:
    """A tick of an axis of shares."""
    return f"{100 * value:g} %"


def drawn(plots: Iterable[Plot | None]) -> list[Plot]:
    """The plots that there are; drawn in the report's style."""
    with rc_context(STYLE):
        return [plot for plot in plots if plot is not None]


def chart(name: str, *panels: Panel, height: float = 2.8) -> Plot | None:
    """Panels over the same x axis; a panel without any number is left out, and without the first one there is no plot."""
    kept = [panel for panel in panels if any(line.values.notna().any() for line in panel.lines)]
    if not kept or kept[0] is not panels[0]:
        return None
    figure = Figure(figsize=(WIDTH, height))
    stack = figure.subplots(len(kept), 1, sharex=True, squeeze=False)[:, 0]
    for axes, panel in zip(stack, kept, strict=True):
        _draw(axes, panel)
    figure.align_ylabels()
    return finish(figure, name)


def _draw(axes: Axes, panel: Panel) -> None:
    shown = [line for line in panel.lines if line.values.notna().any()]
    # Lines may lack points that others have.
    index = shown[0].values.index
    for line in shown[1:]:
        index = index.union(line.values.index)
    halves = [None if line.half is None else line.half.reindex(index) for line in shown]
    series = [line._replace(values=line.values.reindex(index), half=half) for line, half in zip(shown, halves, strict=True)]
    x = np.asarray(index, dtype=np.float64)
    width = (x[-1] - x[0]) / max(1, x.size - 1) or 1.0
    everything = pd.concat([line.values for line in series])
    positive = everything[everything > 0]
    log = panel.log if positive.max() > 10 * positive.min() else 0
    bottom = pd.Series(0.0, index=index)
    if panel.shade is not None:
        for sign, colour in ((1, "green"), (-1, "red")):
            axes.fill_between(x, 0, (sign * panel.shade).clip(lower=0) * sign, color=LIGHT[colour], alpha=0.3, linewidth=0)
    for label, at in panel.rules.items():
        axes.axhline(at, color=LIGHT["muted"], label=label or None, linewidth=1, linestyle="--" if at else "-")
    for number, line in enumerate(series):
        values = line.values.where(line.values > 0) if log else line.values
        place = x + panel.spread * (number / max(1, len(series) - 1) - 0.5) * (len(series) > 1)
        style: dict[str, Any] = {"color": LIGHT[line.colour], "label": line.label}
        if panel.kind == "area":
            top = bottom + values.fillna(0)
            axes.stairs(top, np.append(x - width / 2, x[-1] + width / 2), baseline=bottom, fill=True, alpha=0.85, **style)
            bottom = top
            continue
        if panel.kind == "bar":
            axes.bar(place, values, panel.spread / max(1, len(series) - 1), **style)
            continue
        if x.size <= 12 or panel.kind == "error":  # a line of one point would be invisible
            style |= {"marker": "o", "markersize": 4}
        style |= line.style
        if panel.kind == "error" and line.half is not None:
            axes.errorbar(place, values, yerr=line.half.fillna(0), **style)
            continue
        axes.plot(place, values, **style)
        if line.half is not None:
            axes.fill_between(x, values - line.half, values + line.half, color=style["color"], alpha=0.2, linewidth=0)
    axes.set_ylabel(panel.y)
    x_axis(axes, index, width)
    form = panel.form
    if log:
        log_scale(axes, log)
        form = form or formats.scientific
    elif panel.zero:
        axes.set_ylim(bottom=0)
    if form is not None:
        axes.yaxis.set_major_formatter(lambda value, _: form(value))


def x_axis(axes: Axes, index: pd.Index, width: float) -> None:
    """Label and whole-numbered ticks of the x axis."""
    axes.set_xlabel(index.name)
    axes.label_outer()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    if len(index) <= 12:
        axes.set_xlim(index[0] - width / 2, index[-1] + width / 2)
    if len(index) == 1:
        axes.set_xticks(index)


def log_scale(axes: Axes, base: int) -> None:
    """Log scale of the y axis over a decade at least; minor ticks would be formulas, which are slow."""
    axes.set_yscale("log", base=base)
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(base, subs=(1.0, 2.0, 5.0) if base == 10 and high < 100 * low else (1.0,), numticks=7))
    axes.yaxis.set_minor_locator(NullLocator())


def finish(figure: Figure, name: str) -> Plot:
    """Draws the figure; what has labels gets a legend above the axes, where it hides no data, and the figure grows by that."""
    handles, labels = next((found for axes in figure.axes if (found := axes.get_legend_handles_labels())[1]), ([], []))
    if labels:
        widths = [0.45 + 0.08 * len(label) for label in labels]
        columns = len(labels) if sum(widths) < WIDTH else max(1, int(WIDTH / max(widths)))
        figure.set_figheight(figure.get_figheight() + 0.2 * math.ceil(len(labels) / columns))
        figure.legend(handles, labels, loc="outside upper left", ncols=columns, handlelength=1.2, columnspacing=1.2, borderpad=0.1)
    return Plot(name, to_svg(figure, name))


def mini_step_lines(table: pd.DataFrame) -> list[Line]:
    """One line per mini-step, pale to strong in their order; at most six of them."""
    shown = [i for i in chosen(table.shape[1]) if table.iloc[:, i].notna().any()]
    names = [f"mini-step {i + 1}" if i == shown[0] else f"{i + 1}" for i in shown]
    return [Line(table.iloc[:, i], ramp(i, table.shape[1]), name) for i, name in zip(shown, names, strict=True)]


def chosen(count: int) -> list[int]:
    """At most six of 0..count-1, evenly spread, first and last included."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, 6))}) if count else []


def heat_map(
    name: str, table: pd.DataFrame, low: float | None, high: float | None, form: Form, colours: str = "viridis",
    ticks: Mapping[float, str] | None = None,
) -> Plot | None:
    """Values as colours from `low` to `high` (or all that occur): the index along x, a row per column; `form`: of the bar."""
    if not table.notna().any(axis=None):
        return None
    figure = Figure(figsize=(WIDTH, min(5.0, 2.0 + 0.05 * table.shape[1])))
    axes = figure.add_subplot()
    x = np.asarray(table.index, dtype=np.float64)
    width = (x[-1] - x[0]) / max(1, x.size - 1) or 1.0
    image = axes.imshow(
        table.T,
        aspect="auto",
        interpolation="none",  # the SVG embeds one pixel per value and the browser scales it
        origin="lower",
        cmap=colours,
        vmin=low,
        vmax=high,
        extent=(x[0] - width / 2, x[-1] + width / 2, 0.5, table.shape[1] + 0.5),
    )
    axes.grid(visible=False)
    axes.set_ylabel("MoE layer")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    x_axis(axes, table.index, width)
    if ticks is not None:
        axes.set_xticks(list(ticks), list(ticks.values()))
    bar = figure.colorbar(image, ax=axes, format=lambda value, _: form(value))
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_locator(MaxNLocator(nbins=4))
    # Values that read alike are one tick.
    inside = [tick for tick in bar.get_ticks() if image.norm.vmin <= tick <= image.norm.vmax]
    bar.set_ticks(list({form(tick): tick for tick in reversed(inside)}.values()))
    return finish(figure, name)


def named_rows(count: int) -> tuple[Figure, Axes]:
    """Axes for rows with names, the first on top."""
    figure = Figure(figsize=(WIDTH, 0.75 + 0.24 * count))
    axes = figure.add_subplot()
    axes.grid(axis="y", visible=False)
    axes.set_ylim(count - 0.4, -0.6)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=3))
    return figure, axes


def stacked_rows(name: str, table: pd.DataFrame, colours: Iterable[str], ends: list[str], form: Form, label: str = "") -> Plot:
    """A bar per row whose parts, the columns, follow each other; `ends` are written behind the bars."""
    figure, axes = named_rows(len(table))
    left = pd.Series(0.0, index=table.index)
    for (part, values), colour in zip(table.fillna(0.0).items(), colours, strict=False):
        bars = axes.barh(table.index, values, 0.62, left=left, color=LIGHT[colour], label=part)
        left += values
    axes.bar_label(bars, ends, padding=4, fontsize=9, color=LIGHT["muted"])
    axes.set_xlim(0, (1.12 + 0.035 * max(map(len, ends))) * max(float(left.max()), 1e-6))
    axes.xaxis.set_major_formatter(lambda value, _: form(value))
    axes.set_xlabel(label)
    return finish(figure, name)


def changed_rows(name: str, rows: Mapping[str, Sequence[float]], note: str = "") -> Plot | None:
    """Shares of (token, layer) pairs with 1, 2, 3 or more changed experts next to the paper's; the share with 0 is written."""
    every = {**rows, **PAPER_CHANGED}
    table = pd.DataFrame(map(list, every.values()), index=list(every), columns=["0", *CHANGED]).dropna()
    ends = [f"{formats.percent(unchanged, 1)}{note}" for unchanged in table.pop("0")]
    label = "share of (token, layer) pairs"
    if len(table) == len(PAPER_CHANGED):
        return None
    return stacked_rows(name, table, CHANGED.values(), ends, share, label)
