"""Plots of a comparison with a row per method of one setting: seeds, means, intervals, shares; None where nothing has a number."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megatron_pr2.report import formats
from megatron_pr2.report.comparison import measures
from megatron_pr2.report.comparison.looks import Look, legend, short_name
from megatron_pr2.report.comparison.measures import Measure, against_baseline, of_method, per_seed
from megatron_pr2.report.comparison.runs import Setting
from megatron_pr2.report.comparison.stats import Interval
from megatron_pr2.report.figures import Plot, finish, percent_axis
from megatron_pr2.report.records import Array, RunData, exists, mean, number
from megatron_pr2.report.route_plots import PAPER_CHANGED, PAPER_COVERAGE_GAP
from megatron_pr2.report.theme import LIGHT, STACK, WIDTH, new_figure

# Number of changed experts, colour, name.
SHARES = ((1, "ramp1", "1 expert"), (2, "orange", "2 experts"), (3, "red", "3 or more"))


def difference(setting: Setting, look: Mapping[str, Look], measure: Measure = measures.FINAL_REWARD) -> Plot | None:
    """Paired difference to the baseline."""
    base = per_seed(setting, setting.baseline, measure)
    rows: dict[str, tuple[Interval, list[float]]] = {}
    for method in setting.methods:
        if method != setting.baseline:
            own = per_seed(setting, method, measure)
            rows[method] = (
                against_baseline(setting, method, measure),
                [own[seed] - base[seed] for seed in own if seed in base],
            )
    title = f"{measure.title}, difference to {short_name(setting.baseline)}".capitalize()
    caption = (
        f"Seed by seed against {setting.baseline}: small dots are seeds, the line is the 95 % interval of their mean. An interval "
        "that crosses zero shows no difference."
    )
    return forest(rows, look, f"{setting.slug}-{measure.key}-difference", title, caption, measure.form_difference, zero=True)


def values(
    setting: Setting,
    look: Mapping[str, Look],
    measure: Measure,
    caption: str,
    *,
    zero: bool = False,
    reference: float | None = None,
    marks: Mapping[str, float] | None = None,
) -> Plot | None:
    """A measure of every method; `reference` is a line to compare with, `marks` a dot per method."""
    rows = {
        method: (of_method(setting, method, measure), list(per_seed(setting, method, measure).values()))
        for method in setting.methods
    }
    form = measure.form_difference if zero else measure.form
    title = measure.title[0].upper() + measure.title[1:]
    return forest(rows, look, f"{setting.slug}-{measure.key}", title, caption, form, zero=zero, reference=reference, marks=marks)


def forest(
    rows: Mapping[str, tuple[Interval, Sequence[float]]],
    look: Mapping[str, Look],
    name: str,
    title: str,
    caption: str,
    form: Callable[[float], str],
    *,
    zero: bool = False,
    reference: float | None = None,
    marks: Mapping[str, float] | None = None,
) -> Plot | None:
    """One row per method: its seeds, their mean and the interval of it."""
    rows = {method: row for method, row in rows.items() if math.isfinite(row[0].mean)}
    if not rows:
        return None
    figure, axes = _rows(list(rows))
    if zero or reference is not None:
        axes.axvline(0 if zero else reference, color=LIGHT["muted"], linewidth=1, linestyle="-" if zero else "--")  # type: ignore[arg-type]
    for y, (method, (estimate, seeds)) in zip(_positions(len(rows)), rows.items(), strict=True):
        colour = LIGHT[look[method].colour]
        axes.plot(seeds, [y] * len(seeds), linestyle="none", marker="o", markersize=3, color=colour, alpha=0.5)
        if estimate.known:
            axes.plot([estimate.low, estimate.high], [y, y], color=colour, linewidth=2.2, linestyle=look[method].line)
        if marks is not None:
            axes.plot([marks.get(method, math.nan)], [y], marker="o", markersize=6, color=LIGHT["grey"])
        filled = colour if look[method].line == "-" else "none"
        axes.plot([estimate.mean], [y], marker="D", markersize=5.5, color=colour, markerfacecolor=filled)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=3))
    # Two digits tell values apart, but not ticks.
    tick = (lambda value: f"{value:.3g}") if form is formats.scientific else form
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    axes.margins(x=0.08)
    return finish(figure, name, title, caption)


def changed(setting: Setting, look: Mapping[str, Look]) -> Plot | None:
    """Deviation histogram per method next to the paper's."""
    rows: dict[str, tuple[float, ...]] = {}
    for method, replicates in setting.methods.items():
        shares = mean(np.stack([later_changed(setting.data[method, seed]) for seed in replicates]), axis=0)
        if exists(shares):
            rows[method] = tuple(shares)
    if not rows:
        return None
    rows |= PAPER_CHANGED
    figure, axes = _rows(list(rows), extra=0.35)
    left = np.zeros(len(rows))
    position = _positions(len(rows))
    table = np.array(list(rows.values()))
    for column, colour, label in SHARES:
        axes.barh(position, table[:, column], 0.62, left=left, color=LIGHT[colour], label=label)
        left += table[:, column]
    for y, end, same in zip(position, left, table[:, 0], strict=True):
        axes.text(end + 0.01 * left.max(), y, formats.percent(same, 1), va="center", fontsize=9, color=LIGHT["muted"])
    axes.set_xlim(0, 1.3 * max(float(left.max()), 1e-6))
    percent_axis(axes.xaxis)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
    legend(axes, [label for _, _, label in SHARES])
    caption = (
        "Share of (token, layer) pairs with 1, 2 or more experts that the updated router would not choose, mini-steps from the "
        "second on; the number is the share without any. Shorter bars are better."
    )
    return finish(figure, f"{setting.slug}-changed", "Changed experts per token and layer", caption)


def later_changed(data: RunData) -> Array:
    """[4] shares of 0, 1, 2, 3 or more changed experts, mean over the mini-steps from the second on."""
    means = data.changed_means()
    return np.asarray(mean(means[1:], axis=0)) if len(means) > 1 else np.full(4, np.nan)


def divergence(setting: Setting, look: Mapping[str, Look]) -> Plot | None:
    """KL from the current router to the prediction, next to the frozen router's."""
    caption = "KL(ρ‖q̂), mini-steps from the second on, lower is better; the grey dot is KL(ρ‖ρ_old) of frozen routes there."
    marks = {method: of_method(setting, method, measures.KL_FROZEN).mean for method in setting.methods}
    return values(setting, look, measures.KL_PREDICTED, caption, marks=marks)


def coverage(setting: Setting, look: Mapping[str, Look]) -> Plot | None:
    """Coverage gap next to the paper's largest."""
    caption = (
        "Router probability of its own top-k minus that of the replayed experts, lower is better. "
        f"The dashed line is the largest per-layer value that the paper reports, {PAPER_COVERAGE_GAP}."
    )
    return values(setting, look, measures.COVERAGE, caption, reference=PAPER_COVERAGE_GAP)


def time(setting: Setting, look: Mapping[str, Look]) -> Plot | None:
    """Time of a step by phase."""
    names = list(dict.fromkeys(name for data in setting.data.values() for name in data.keys_of("seconds")))
    if not names:
        return None
    figure, axes = _rows(list(setting.methods), extra=0.2 + 0.2 * math.ceil(len(names) / 3))
    position, left = _positions(len(setting.methods)), np.zeros(len(setting.methods))
    for index, name in enumerate(names):
        width = np.array([_phase(setting, method, name) for method in setting.methods])
        axes.barh(position, width, 0.62, left=left, color=LIGHT[STACK[index % len(STACK)]], label=name.replace("_", " "))
        left += width
    for y, end, method in zip(position, left, setting.methods, strict=True):
        pace = of_method(setting, method, measures.THROUGHPUT).mean
        text = f"{formats.count(pace)} tok/s" if math.isfinite(pace) else ""
        axes.text(end + 0.01 * left.max(), y, text, va="center", fontsize=9, color=LIGHT["muted"])
    axes.set_xlim(0, 1.35 * max(float(left.max()), 1e-6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} s"))
    legend(axes, names)
    caption = "Mean time of one rollout step by phase; it includes whatever else the machine was doing at that time."
    return finish(figure, f"{setting.slug}-time", "Time per step", caption)


def _phase(setting: Setting, method: str, phase: str) -> float:
    per_run = [[number(r, "seconds", phase) for r in setting.data[method, seed].records] for seed in setting.methods[method]]
    return float(np.mean([np.nan_to_num(row).mean() for row in per_run]))


def _rows(names: Sequence[str], extra: float = 0.0) -> tuple[Figure, Axes]:
    """Axes with a named row per method, the first on top."""
    figure = new_figure(0.75 + extra + 0.24 * len(names))
    axes = figure.add_subplot()
    longest = max(len(short_name(name)) for name in names)
    # Labels of the ticks at the right end need half of their width.
    figure.subplots_adjust(left=(0.25 + 0.085 * longest) / WIDTH, right=1 - 0.42 / WIDTH)
    axes.set_yticks(_positions(len(names)), [short_name(name) for name in names])
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.grid(axis="y", visible=False)
    return figure, axes


def _positions(count: int) -> Array:
    return np.arange(count, dtype=np.float64)[::-1]
