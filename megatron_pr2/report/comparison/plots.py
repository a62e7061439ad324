"""Plots of a comparison over rollouts and mini-steps: a line per method of one setting; None where nothing has a number."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megatron_pr2.report.comparison import measures
from megatron_pr2.report.comparison.looks import Look, figure_for, legend, short_name
from megatron_pr2.report.comparison.measures import Measure
from megatron_pr2.report.comparison.runs import Setting
from megatron_pr2.report.comparison.stats import interval
from megatron_pr2.report.figures import Plot, finish, label_y, smoothing_window
from megatron_pr2.report.records import Array, RunData, exists, mean, running_mean
from megatron_pr2.report.theme import LIGHT

# More intervals than this on top of each other cannot be told apart; the rows below the curves show them.
MOST_BANDS = 4
# arXiv 2606.00395 (draft), off-8: agreement falls from the first to the second of these over the mini-steps.
PAPER_AGREEMENT_OFF_8 = (0.9975, 0.9825)
PAPER = "paper, off-8"


def reward(setting: Setting, look: Mapping[str, Look]) -> Plot | None:
    """Mean reward over rollouts."""
    window = smoothing_window(setting.rollouts)
    caption = "Mean over seeds" + (f" of the running mean over {window} rollouts" if window > 1 else "")
    bands = len(setting.methods) <= MOST_BANDS
    return _curves(
        setting,
        look,
        lambda data: running_mean(data.column("reward"), max(1, window // data.bin_size)),
        "reward",
        "Reward",
        "mean reward",
        f"{caption}{', with 95 % intervals' if bands else ''}. Higher is better.",
        bands=bands,
    )


def lift_curve(setting: Setting, look: Mapping[str, Look]) -> Plot | None:
    """Lift over rollouts."""
    window = max(1, setting.rollouts // 6)
    return _curves(
        setting,
        look,
        lambda data: 100 * running_mean(data.lift_all(), max(1, window // data.bin_size)),
        "lift-curve",
        "Lift over the run",
        "lift (percentage points)",
        f"Running mean over {window} rollouts, mean over seeds: above zero prediction helps, below zero it hurts.",
        zero=True,
    )


def beta_curve(setting: Setting, look: Mapping[str, Look]) -> Plot | None:
    """How much of the prediction hold-back lets through."""
    return _curves(
        setting,
        look,
        measures.beta,
        "beta",
        "Hold-back",
        "β, mean of the layers",
        "What share of the prediction is used: 0 is replay without prediction, 1 the whole prediction.",
    )


def _curves(
    setting: Setting,
    look: Mapping[str, Look],
    read: Callable[[RunData], Array],
    name: str,
    title: str,
    y: str,
    caption: str,
    *,
    zero: bool = False,
    bands: bool = False,
) -> Plot | None:
    lines = {
        method: np.stack([_padded(read(setting.curves[method, seed]), setting) for seed in replicates])
        for method, replicates in setting.methods.items()
    }
    lines = {method: values for method, values in lines.items() if exists(values)}
    if not lines:
        return None
    figure = figure_for(list(lines), 2.6)
    axes = figure.add_subplot()
    if zero:
        axes.axhline(0, color=LIGHT["muted"], linewidth=1)
    steps = next(iter(setting.curves.values())).steps
    for method, values in lines.items():
        colour, dashes = LIGHT[look[method].colour], look[method].line
        marker = "o" if steps.size <= 2 else None
        axes.plot(
            steps, mean(values, axis=0), color=colour, linestyle=dashes, label=short_name(method), linewidth=1.8, marker=marker
        )
        if bands:
            at = [interval(column) for column in values.T.tolist()]
            axes.fill_between(steps, [i.low for i in at], [i.high for i in at], color=colour, alpha=0.13, linewidth=0)
    axes.set_xlabel("rollout step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    label_y(axes, y)
    legend(axes, list(lines))
    return finish(figure, f"{setting.slug}-{name}", title, caption)


def _padded(values: Array, setting: Setting) -> Array:
    size = next(iter(setting.curves.values())).steps.size
    return values if values.size == size else np.full(size, np.nan)


def per_mini_step(
    setting: Setting, look: Mapping[str, Look], measure: Measure, caption: str, *, band: tuple[float, float] | None = None
) -> Plot | None:
    """A measure over the mini-steps; whiskers are intervals over seeds, `band` a range to compare with."""
    read = measure.mini_step
    assert read is not None
    series = {m: np.stack([read(setting.data[m, seed]) for seed in seeds]) for m, seeds in setting.methods.items()}
    series = {method: table for method, table in series.items() if exists(table)}
    if not series:
        return None
    names = [*([PAPER] if band is not None else []), *series]
    figure = figure_for(names, 2.6)
    axes = figure.add_subplot()
    if band is not None:
        axes.axhspan(min(band), max(band), color=LIGHT["grid"], alpha=0.7, linewidth=0, label=PAPER)
    for index, (method, table) in enumerate(series.items()):
        estimates = [interval(column) for column in table.T.tolist()]
        x = np.arange(table.shape[1]) + 1 + 0.3 * (index / max(1, len(series) - 1) - 0.5) * (len(series) > 1)
        half = [e.half if e.known else 0.0 for e in estimates]
        axes.errorbar(
            x,
            [e.mean for e in estimates],
            yerr=half,
            color=LIGHT[look[method].colour],
            linestyle=look[method].line,
            label=short_name(method),
            linewidth=1.4,
            elinewidth=0.9,
            marker="o",
            markersize=3,
        )
    axes.set_xlabel("mini-step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: measure.form(value)))
    legend(axes, names)
    title = f"{measure.title.split(',')[0]} per mini-step"
    return finish(figure, f"{setting.slug}-{measure.key}-mini-steps", title[0].upper() + title[1:], caption)
