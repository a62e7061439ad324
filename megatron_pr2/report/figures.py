"""Charts described as data: panels of lines over rollout steps, layers or positions, heat maps and rows of stacked bars."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter
from matplotlib.transforms import blended_transform_factory

from megatron_pr2.report import formats
from megatron_pr2.report.records import Array, RunData, exists
from megatron_pr2.report.theme import LIGHT, WIDTH, new_figure, ramp, to_svg

Form = Callable[[float], str]
Rows = Sequence[tuple[str, Sequence[float] | Array]]
MOST_LINES = 6
# arXiv 2606.00395 (draft), off-2: share of (token, layer) pairs with 0, 1, 2, 3 or more changed experts.
PAPER_CHANGED = (("paper: frozen, off-2", (0.769, 0.196, 0.026, 0.009)), ("paper: PR2, off-2", (0.922, 0.077, 0.001, 0.0)))
PAPER_COVERAGE_GAP = 0.0015  # upper end of the per-layer values that the draft reports
CHANGED = (("ramp1", "1 expert"), ("orange", "2 experts"), ("red", "3 or more"))
_LEGEND_ROW = 0.2  # inches


@dataclass(frozen=True)
class Plot:
    """A finished plot: `caption` says in one sentence how to read it."""

    name: str
    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class X:
    """An x axis: where its points are. `whole` axes end half a step beyond their first and last point; `ticks` replace numbers."""

    label: str
    at: npt.NDArray[Any]
    whole: bool = False
    ticks: Mapping[float, str] | None = None


@dataclass(frozen=True)
class Line:
    """A line of a panel: a value per point of the x axis, or one number for a horizontal rule.

    Attributes:
        colour: a name of theme.COLOURS, or a colour of them.
        band: half of the height of a band around the line.
        error: half of the length of each point's error bar.
        shift: along the x axis.
        style: of matplotlib's Line2D.
    """

    values: Array | float
    colour: str
    label: str | None = None
    band: Array | None = None
    error: Array | None = None
    shift: float = 0.0
    style: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        zero: the y axis starts at zero, unless it is logarithmic.
        log: "always", "wide" (if all values are positive and span more than a factor of 30) or "bytes"; not positive values are
            left out under "always" and "bytes".
        floor: smallest top of a y axis that starts at zero.
        ticks: format of the y axis' ticks; `percent` is that of shares.
        paint: draws what is no line.
    """

    y: str
    lines: Sequence[Line] = ()
    zero: bool = False
    floor: float = 0.0
    log: str = ""
    percent: bool = False
    ticks: Form | None = None
    paint: Callable[[Axes], object] | None = None


def steps(data: RunData) -> X:
    """Rollout steps of a run."""
    return X("rollout step", data.steps, whole=data.steps.size == 1)


def layers(count: int) -> X:
    """MoE layers from 1 to `count`."""
    return X("MoE layer", np.arange(count) + 1.0, whole=True)


def chart(x: X, panels: Sequence[Panel], name: str, title: str, caption: str, height: float = 2.8) -> Plot | None:
    """Panels over the same x axis; a panel without any number is left out, and without the first one there is no plot."""
    drawn = [p for p in panels if p.paint is not None or exists(*(line.values for line in p.lines if np.ndim(line.values)))]
    if not drawn or drawn[0] is not panels[0]:
        return None
    figure = new_figure(height)
    stack = figure.subplots(len(drawn), 1, sharex=True, squeeze=False)[:, 0]
    for axes, panel in zip(stack, drawn, strict=True):
        _draw(axes, x, panel)
    x_axis(stack[-1], x)
    return finish(figure, name, title, caption)


def _draw(axes: Axes, x: X, panel: Panel) -> None:
    if panel.paint is not None:
        panel.paint(axes)
    for line in panel.lines:
        colour = LIGHT.get(line.colour, line.colour)
        if np.ndim(line.values) == 0:
            axes.axhline(line.values, color=colour, label=line.label, **{"linewidth": 1, **line.style})  # type: ignore[arg-type]
            continue
        values = np.asarray(line.values)
        if panel.log in ("always", "bytes"):
            values = np.where(values > 0, values, np.nan)
        if not exists(values):
            continue
        # Short runs and layers get markers: a line of one point would be invisible.
        style: dict[str, Any] = {"marker": "o", "markersize": 4} if x.whole or x.at.size <= 12 else {}
        style |= {"color": colour, "label": line.label, **line.style}
        if line.band is not None:
            axes.fill_between(x.at, values - line.band, values + line.band, color=colour, alpha=0.2, linewidth=0)
        if line.error is not None:
            axes.errorbar(x.at + line.shift, values, yerr=line.error, **style)
        else:
            axes.plot(x.at, values, **style)
    numbers = [v for line in panel.lines if (v := np.ravel(line.values)[np.isfinite(np.ravel(line.values))]).size]
    everything = np.concatenate(numbers) if numbers else np.empty(0)
    wide = everything.size and everything.min() > 0 and everything.max() / everything.min() > 30
    if panel.log in ("always", "bytes") and (everything > 0).any():
        log_scale(axes, *((formats.size, 2) if panel.log == "bytes" else (formats.scientific, 10)))
    elif panel.log == "wide" and wide:
        log_scale(axes, formats.scientific)
    elif panel.zero:
        # Room above; an all-zero series stays visible at the bottom instead of a meaningless zoom.
        top = max(panel.floor, float(everything.max()) if everything.size else 0.0)
        axes.set_ylim(0, 1.08 * top if top > 0 else 1.0)
    if panel.percent:
        percent_axis(axes.yaxis)
    if (ticks := panel.ticks) is not None:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: ticks(value)))
    label_y(axes, panel.y)


def x_axis(axes: Axes, x: X) -> None:
    """Label and whole-numbered ticks of the x axis."""
    axes.set_xlabel(x.label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    if x.whole:
        axes.set_xlim(x.at[0] - 0.5, x.at[-1] + 0.5)
    if x.at.size == 1:
        axes.set_xticks(x.at)
    if x.ticks is not None:
        axes.set_xticks(list(x.ticks), list(x.ticks.values()))


def finish(figure: Figure, name: str, title: str, caption: str) -> Plot:
    """Draws the figure; what has labels gets a legend above the axes, where it hides no data, and the figure grows by that."""
    handles, labels = next((found for axes in figure.axes if (found := axes.get_legend_handles_labels())[1]), ([], []))
    if labels:
        fitting = (c for c in range(len(labels), 0, -1) if _legend_width(labels, c) < WIDTH - 0.2)
        columns = next(fitting, 1)
        legend = _LEGEND_ROW * math.ceil(len(labels) / columns)
        height = figure.get_figheight() + legend
        figure.set_figheight(height)
        top = 1 - (0.12 + legend) / height
        figure.subplots_adjust(bottom=0.48 / height, top=top)
        figure.axes[0].legend(
            handles,
            labels,
            loc="lower left",
            bbox_to_anchor=(0.1 / WIDTH, top),
            bbox_transform=figure.transFigure,
            ncols=columns,
            borderaxespad=0.2,
            borderpad=0.1,
            handlelength=1.2,
            columnspacing=1.2,
        )
    return Plot(name, title, caption, to_svg(figure, name))


def _legend_width(labels: Sequence[str], columns: int) -> float:
    """Inches that a legend takes: as many characters as each column's longest label has, and its line."""
    return sum(0.45 + 0.08 * max(map(len, column)) for column in np.array_split(np.array(labels, dtype=object), columns))


def label_y(axes: Axes, text: str) -> None:
    """Label of the y axis, at the same place in every plot."""
    axes.set_ylabel(text)
    figure = axes.get_figure(root=True)
    assert figure is not None
    axes.yaxis.set_label_coords(0.2 / WIDTH, 0.5, transform=blended_transform_factory(figure.transFigure, axes.transAxes))


def chosen(count: int) -> list[int]:
    """At most six of 0..count-1, evenly spread, first and last included."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, MOST_LINES))}) if count else []


def mini_step_lines(data: RunData, key: str) -> list[Line]:
    """One line per mini-step, pale to strong in their order; at most six of them."""
    values = data.mini_steps(key)
    shown = [i for i in chosen(data.kappa) if exists(values[i])]
    names = [f"mini-step {i + 1}" if i == shown[0] else f"{i + 1}" for i in shown]
    return [Line(values[i], ramp(i, data.kappa), name, style={"linewidth": 1.6}) for i, name in zip(shown, names, strict=True)]


def percent_axis(axis: Any) -> None:
    """Ticks as percent of values that are shares."""
    axis.set_major_formatter(PercentFormatter(xmax=1.0, symbol=" %"))


def log_scale(axes: Axes, form: Form, base: int = 10) -> None:
    """Log scale of the y axis, after the lines are drawn, with plain labels: matplotlib's own are formulas, which are slow."""
    axes.set_yscale("log", base=base)
    low, high = axes.get_ylim()
    if high < base * low:
        low, high = low / base, high * base
        axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(LogLocator(base, subs=(1.0, 2.0, 5.0) if base == 10 and high < 100 * low else (1.0,), numticks=7))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))
    axes.yaxis.set_minor_locator(NullLocator())


def heat_map(
    x: X, values: Array, colours: str, low: float, high: float, form: Form, name: str, title: str, caption: str
) -> Plot | None:
    """[L, X] values as colours from `low` to `high`, a row per MoE layer; `form` is that of the colour bar's numbers."""
    if not exists(values):
        return None
    figure = new_figure(min(5.0, 2.0 + 0.05 * values.shape[0]))
    axes = figure.add_subplot()
    half = (x.at[-1] - x.at[0]) / max(1, x.at.size - 1) / 2 or 0.5
    image = axes.imshow(
        values,
        aspect="auto",
        interpolation="none",  # the SVG embeds one pixel per value and the browser scales it
        origin="lower",
        cmap=colours,
        vmin=low,
        vmax=high,
        extent=(x.at[0] - half, x.at[-1] + half, 0.5, values.shape[0] + 0.5),
    )
    axes.grid(visible=False)
    label_y(axes, "MoE layer")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    x_axis(axes, x)
    figure.subplots_adjust(right=1 - 1.0 / WIDTH)
    box = axes.get_position()
    bar = figure.colorbar(image, cax=figure.add_axes((box.x1 + 0.1 / WIDTH, box.y0, 0.12 / WIDTH, box.height)))
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_locator(MaxNLocator(nbins=4))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))
    return finish(figure, name, title, caption)


def named_rows(names: Sequence[str]) -> tuple[Figure, Axes, Array]:
    """Axes with a named row per entry, the first on top, and the rows' positions."""
    figure = new_figure(0.75 + 0.24 * len(names))
    axes = figure.add_subplot()
    # Labels of the ticks at the right end need half of their width.
    figure.subplots_adjust(left=(0.25 + 0.085 * max(map(len, names))) / WIDTH, right=1 - 0.42 / WIDTH)
    position = np.arange(len(names), dtype=np.float64)[::-1]
    axes.set_yticks(position, list(names))
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.grid(axis="y", visible=False)
    return figure, axes, position


def stacked_rows(rows: Rows, parts: Sequence[tuple[str, str]], ends: Sequence[str]) -> tuple[Figure, Axes]:
    """A bar per row whose parts, (colour, label), follow each other; `ends` are written behind the bars."""
    figure, axes, position = named_rows([name for name, _ in rows])
    left = np.zeros(len(rows))
    for column, (colour, label) in zip(np.nan_to_num([row for _, row in rows]).T, parts, strict=True):
        axes.barh(position, column, 0.62, left=left, color=LIGHT[colour], label=label)
        left += column
    room = 0.015 * float(left.max())
    for y, end, text in zip(position, left, ends, strict=True):
        axes.text(end + room, y, text, va="center", fontsize=9, color=LIGHT["muted"])
    axes.set_xlim(0, (1.12 + 0.035 * max(map(len, ends))) * max(float(left.max()), 1e-6))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
    return figure, axes


def changed_rows(rows: Rows, note: str, name: str, title: str, caption: str) -> Plot:
    """Shares of (token, layer) pairs with 1, 2, 3 or more changed experts next to the paper's; the share with 0 is written."""
    rows = [*rows, *PAPER_CHANGED]
    ends = [f"{formats.percent(shares[0], 1)}{note}" for _, shares in rows]
    figure, axes = stacked_rows([(row, shares[1:]) for row, shares in rows], CHANGED, ends)
    percent_axis(axes.xaxis)
    axes.set_xlabel("share of (token, layer) pairs")
    return finish(figure, name, title, caption)


def smoothing_window(points: int) -> int:
    """Window of the running means: a fifteenth of the run, at least 1."""
    return max(1, points // 15)
