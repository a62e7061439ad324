"""What every plot of the report shares: the Plot record, time axes, and lines that also show a single point."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter
from matplotlib.transforms import blended_transform_factory

from megatron_pr2.report import formats
from megatron_pr2.report.records import Array, RunData
from megatron_pr2.report.theme import LIGHT, WIDTH, new_figure, ramp, to_svg

MOST_LINES = 6


@dataclass(frozen=True)
class Plot:
    """A finished plot: `caption` says in one sentence how to read it."""

    name: str
    title: str
    caption: str
    svg: str


def finish(figure: Figure, name: str, title: str, caption: str) -> Plot:
    """Draws the figure."""
    return Plot(name, title, caption, to_svg(figure, name))


def time_axes(data: RunData, height: float = 3.0) -> tuple[Figure, Axes]:
    """One pair of axes over rollout steps."""
    figure = new_figure(height)
    axes = figure.add_subplot()
    step_axis(axes, data)
    return figure, axes


def step_axis(axes: Axes, data: RunData) -> None:
    """Labels the x axis as rollout steps."""
    axes.set_xlabel("rollout step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    if data.steps.size == 1:
        axes.set_xlim(data.steps[0] - 0.5, data.steps[0] + 0.5)
        axes.set_xticks(data.steps)


def line(axes: Axes, data: RunData, values: Array, colour: str, label: str | None = None, **options: Any) -> None:
    """Values over rollout steps; short runs get markers, so that a single rollout is visible."""
    if data.steps.size <= 12:
        options = {"marker": "o", "markersize": 4, **options}
    axes.plot(data.steps, values, color=LIGHT.get(colour, colour), label=label, **options)


def legend(axes: Axes, columns: int = 3) -> None:
    """Legend above the axes, where it hides no data; makes the room it needs."""
    entries = axes.get_legend_handles_labels()[1]
    rows = math.ceil(len(entries) / columns)
    figure = axes.figure
    assert isinstance(figure, Figure)
    figure.subplots_adjust(top=1 - (0.12 + 0.2 * rows) / figure.get_figheight())
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=columns,
        borderaxespad=0.2,
        borderpad=0.1,
        handlelength=1.2,
        columnspacing=1.2,
    )


def label_y(axes: Axes, text: str) -> None:
    """Label of the y axis, at the same place in every plot."""
    axes.set_ylabel(text)
    figure = axes.get_figure(root=True)
    assert figure is not None
    axes.yaxis.set_label_coords(0.2 / WIDTH, 0.5, transform=blended_transform_factory(figure.transFigure, axes.transAxes))


def chosen(count: int, most: int = MOST_LINES) -> list[int]:
    """At most `most` of 0..count-1, evenly spread, first and last included."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most))}) if count else []


def mini_step_lines(axes: Axes, data: RunData, values: Array) -> None:
    """One line per mini-step ([kappa, P]), pale to strong in their order; at most six of them."""
    shown = [i for i in chosen(data.kappa) if np.isfinite(values[i]).any()]
    for i in shown:
        line(axes, data, values[i], ramp(i, data.kappa), f"mini-step {i + 1}" if i == shown[0] else f"{i + 1}", linewidth=1.6)
    if shown:
        legend(axes, len(shown))


def percent_axis(axis: Any, digits: int | None = None) -> None:
    """Ticks as percent of values that are shares."""
    axis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=digits, symbol=" %"))


def log_if_wide(axes: Axes, *series: Array) -> None:
    """Log scale if the positive values span more than a factor of 30, which needs all of them to be positive."""
    values = np.concatenate([s[np.isfinite(s)].ravel() for s in series])
    if values.size and values.min() > 0 and values.max() / values.min() > 30:
        log_scale(axes, formats.scientific)


def from_zero(axes: Axes, *series: Array) -> None:
    """y axis from zero with room above; an all-zero series stays visible at the bottom instead of a meaningless zoom."""
    top = max((float(np.nanmax(s)) for s in series if np.isfinite(s).any()), default=0.0)
    axes.set_ylim(0, 1.08 * top if top > 0 and math.isfinite(top) else 1.0)


def log_scale(axes: Axes, form: Callable[[float], str], base: int = 10) -> None:
    """Log scale of the y axis, after the lines are drawn, with plain labels.

    Matplotlib's own ticks are formulas, which take longer than the rest of a plot. `base` 2 suits bytes.
    """
    axes.set_yscale("log", base=base)
    low, high = axes.get_ylim()
    if high < base * low:
        low, high = low / base, high * base
        axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(LogLocator(base, subs=(1.0, 2.0, 5.0) if base == 10 and high < 100 * low else (1.0,), numticks=7))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))
    axes.yaxis.set_minor_locator(NullLocator())


def heat_map(
    values: Array, span: tuple[float, float], colours: str, low: float, high: float, form: Callable[[float], str]
) -> tuple[Figure, Axes]:
    """[L, X] values as colours, a row per MoE layer, with a colour bar.

    Args:
        span: what the left and the right end of the x axis are; its label is left to the caller.
        colours: a colour map, from `low` to `high`.
        form: of the colour bar's numbers.
    """
    figure = new_figure(min(5.0, 2.0 + 0.05 * values.shape[0]))
    axes = figure.add_subplot()
    image = axes.imshow(
        values,
        aspect="auto",
        interpolation="none",  # the SVG embeds one pixel per value and the browser scales it
        origin="lower",
        cmap=colours,
        vmin=low,
        vmax=high,
        extent=(*span, 0.5, values.shape[0] + 0.5),
    )
    axes.grid(visible=False)
    label_y(axes, "MoE layer")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    figure.subplots_adjust(right=1 - 1.0 / WIDTH)
    box = axes.get_position()
    bar = figure.colorbar(image, cax=figure.add_axes((box.x1 + 0.1 / WIDTH, box.y0, 0.12 / WIDTH, box.height)))
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_locator(MaxNLocator(nbins=4))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))
    return figure, axes


def layer_axis(axes: Axes, layers: int) -> None:
    """Labels the x axis as MoE layers, from 1 to `layers`."""
    axes.set_xlabel("MoE layer")
    axes.set_xlim(0.5, layers + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))


def smoothing_window(points: int) -> int:
    """Window of the running means: a fifteenth of the run, at least 1."""
    return max(1, points // 15)
