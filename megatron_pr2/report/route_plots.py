"""Plots of the routes: how well what was replayed matches what the updated routers would choose; None where nothing was."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_pr2.report import formats
from megatron_pr2.report.figures import (
    Plot,
    chosen,
    finish,
    from_zero,
    heat_map,
    label_y,
    layer_axis,
    legend,
    line,
    log_if_wide,
    mini_step_lines,
    percent_axis,
    smoothing_window,
    step_axis,
    time_axes,
)
from megatron_pr2.report.records import Array, RunData, exists, mean, running_mean
from megatron_pr2.report.theme import LIGHT, WIDTH, new_figure

# arXiv 2606.00395 (draft), off-2: share of (token, layer) pairs with 0, 1, 2, 3 or more changed experts.
PAPER_CHANGED = {
    "paper: frozen, off-2": (0.769, 0.196, 0.026, 0.009),
    "paper: PR2, off-2": (0.922, 0.077, 0.001, 0.0),
}
PAPER_COVERAGE_GAP = 0.0015  # upper end of the per-layer values that the draft reports


def lift(data: RunData) -> Plot | None:
    """Lift of prediction over frozen routes."""
    values, later = data.lift_all(), data.column("lift")
    if not exists(later):
        return None
    figure, axes = time_axes(data)
    window = smoothing_window(values.size)
    axes.axhline(0, color=LIGHT["muted"], linewidth=1)
    smooth = 100 * running_mean(values, window)
    for above, colour in ((True, "green"), (False, "red")):
        axes.fill_between(
            data.steps, 0, smooth, where=(smooth >= 0) == above, interpolate=True, color=LIGHT[colour], alpha=0.3, linewidth=0
        )
    if window > 1:
        line(axes, data, 100 * values, "grey", linewidth=1, alpha=0.5)
    line(axes, data, smooth, "ink", "all mini-steps", linewidth=1.8)
    line(axes, data, 100 * running_mean(later, window), "blue", "from the second on", linewidth=1.2)
    legend(axes)
    label_y(axes, "lift (percentage points)")
    smoothed = f" Running means of {window * data.bin_size} rollouts." if window > 1 else ""
    caption = (
        "Agreement of the replayed routes minus that of frozen ones, which are R3's: above zero the run is better off than R3, "
        f"below zero worse. In the first mini-step, part of the dark line only, a prediction can only be wrong.{smoothed}"
    )
    return finish(figure, "lift", "Lift: better or worse off than R3", caption)


def agreement(data: RunData) -> Plot | None:
    """Agreement of replayed and current routes, a line per mini-step."""
    values = data.mini_steps("agreement")
    if not exists(values):
        return None
    figure, axes = time_axes(data)
    mini_step_lines(axes, data, values)
    percent_axis(axes.yaxis)
    label_y(axes, "agreement")
    caption = "Share of the replayed experts that the current router would choose too: later mini-steps are staler and lie lower."
    return finish(figure, "agreement", "Agreement per mini-step", caption)


def mismatch(data: RunData) -> Plot | None:
    """Mean mismatch per mini-step, frozen next to replayed."""
    replayed, frozen = 1 - data.mini_step_means("agreement"), 1 - data.mini_step_means("frozen_agreement")
    if not exists(replayed):
        return None
    figure = new_figure(3.0)
    axes = figure.add_subplot()
    position = np.arange(data.kappa) + 1
    for offset, values, colour, label in ((-0.2, frozen, "grey", "frozen"), (0.2, replayed, "blue", "replayed")):
        axes.bar(position + offset, np.nan_to_num(values), 0.38, color=LIGHT[colour], label=label)
    axes.set_xlabel("mini-step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="x", visible=False)
    from_zero(axes, frozen, replayed)
    percent_axis(axes.yaxis)
    label_y(axes, "1 − agreement")
    legend(axes)
    caption = (
        "Experts that replay gets wrong, lower is better: a blue bar below its grey one is what prediction gained; in mini-step 1 "
        "the policy has not moved, so that looking ahead can only cost."
    )
    return finish(figure, "mismatch", "Mismatch: frozen and replayed", caption)


def changed(data: RunData) -> Plot | None:
    """Deviation histogram per mini-step next to the paper's."""
    means = data.changed_means()
    if not exists(means):
        return None
    rows: dict[str, tuple[float, ...]] = {
        f"mini-step {i + 1}": tuple(means[i]) for i in chosen(data.kappa) if exists(means[i])
    } | PAPER_CHANGED
    figure = changed_bars(rows)
    caption = "How many of a token's replayed experts the current router would not choose: shorter bars are better."
    return finish(figure, "changed", "Changed experts per token and layer", caption)


def changed_bars(rows: Mapping[str, Sequence[float]]) -> Figure:
    """One bar per row: shares of (token, layer) pairs with 0, 1, 2, 3 or more changed experts; the first is said in words."""
    figure = new_figure(1.2 + 0.3 * len(rows))
    axes = figure.add_subplot()
    figure.subplots_adjust(left=1.6 / WIDTH)
    position = np.arange(len(rows))[::-1]
    shares = np.nan_to_num(np.array(list(rows.values())))
    left = np.zeros(len(rows))
    for column, colour, label in ((1, "ramp1", "1 expert"), (2, "orange", "2 experts"), (3, "red", "3 or more")):
        axes.barh(position, shares[:, column], 0.62, left=left, color=LIGHT[colour], label=label)
        left += shares[:, column]
    for y, end, same in zip(position, left, shares[:, 0], strict=True):
        text = f"{formats.percent(same, 1)} unchanged"
        axes.text(end + 0.015 * left.max(), y, text, va="center", fontsize=9, color=LIGHT["muted"])
    axes.set_yticks(position, list(rows))
    axes.set_xlim(0, 1.6 * max(float(left.max()), 1e-6))
    axes.grid(axis="y", visible=False)
    percent_axis(axes.xaxis)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.set_xlabel("share of (token, layer) pairs")
    legend(axes)
    return figure


def divergence(data: RunData) -> Plot | None:
    """KL from the current router to the prediction and to the frozen router."""
    predicted, frozen = data.later_mini_steps("kl_predicted"), data.later_mini_steps("kl_frozen")
    if not exists(predicted, frozen):
        return None
    figure, axes = time_axes(data)
    line(axes, data, frozen, "grey", "to the frozen router")
    line(axes, data, predicted, "blue", "to the prediction")
    log_if_wide(axes, predicted, frozen)
    if axes.get_yscale() == "linear":
        from_zero(axes, predicted, frozen)
    label_y(axes, "KL from current (nats)")
    legend(axes, 2)
    caption = (
        "KL(ρ‖q̂) against KL(ρ‖ρ_old): where blue is below grey, the updated router is closer to the prediction than to the old "
        "router."
    )
    return finish(figure, "kl", "Distance to the updated router", caption)


def coverage(data: RunData) -> Plot | None:
    """Probability mass that replay misses."""
    average, layers = data.later_mini_steps("coverage_gap"), data.layers("coverage_gap")
    if not exists(average):
        return None
    figure, axes = time_axes(data)
    if exists(layers):
        line(axes, data, np.array([np.nanmax(c) if exists(c) else np.nan for c in layers.T]), "orange", "worst layer", linewidth=1)
    line(axes, data, average, "blue", "mean of layers")
    axes.axhline(PAPER_COVERAGE_GAP, color=LIGHT["muted"], linewidth=1, linestyle="--", label="paper's max")
    axes.set_ylim(bottom=0)
    label_y(axes, "coverage gap")
    legend(axes)
    caption = "Router probability of its own top-k minus that of the replayed experts: what replay leaves out, lower is better."
    return finish(figure, "coverage", "Coverage gap", caption)


def layer_agreement(data: RunData) -> Plot | None:
    """Agreement per layer over the run."""
    values = data.layers("agreement")
    if not exists(values):
        return None
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    figure = run_heat_map(data, values, "viridis", low, high if high > low else low + 1e-6, formats.percent)
    caption = "Every row is an MoE layer: a dark row is a layer whose routing moves fast."
    return finish(figure, "layer-agreement", "Agreement per layer", caption)


def layer_lift(data: RunData) -> Plot | None:
    """Lift per layer over the run."""
    values = data.layers("lift")
    if not exists(values):
        return None
    # The 99th percentile: one noisy rollout must not wash out all others.
    limit = max(1e-4, float(np.nanpercentile(np.abs(values), 99)))
    figure = run_heat_map(data, values, "RdBu", -limit, limit, formats.points)
    caption = "Blue layers profit from prediction, red layers suffer from it, white ones do not care."
    return finish(figure, "layer-lift", "Lift per layer", caption)


def layer_profile(data: RunData) -> Plot | None:
    """Mismatch per layer, mean over the run."""
    replayed, frozen = data.layers("agreement"), data.layers("lift")
    if not exists(replayed):
        return None
    rows = mean(replayed, axis=1)
    frozen_rows = rows - mean(frozen, axis=1) if frozen.shape == replayed.shape else np.full_like(rows, np.nan)
    figure = new_figure(3.0)
    axes = figure.add_subplot()
    layer = np.arange(rows.size) + 1
    axes.plot(layer, 1 - frozen_rows, color=LIGHT["grey"], marker="o", markersize=3.5, label="frozen")
    axes.plot(layer, 1 - rows, color=LIGHT["blue"], marker="o", markersize=3.5, label="replayed")
    layer_axis(axes, rows.size)
    from_zero(axes, 1 - rows, 1 - frozen_rows)
    percent_axis(axes.yaxis)
    label_y(axes, "1 − agreement")
    legend(axes)
    caption = "Mean mismatch of every MoE layer, lower is better: the distance from grey down to blue is the layer's lift."
    return finish(figure, "layer-profile", "Mismatch per layer", caption)


def run_heat_map(data: RunData, values: Array, colours: str, low: float, high: float, form: Callable[[float], str]) -> Figure:
    """Layers over rollout steps, [L, P] values as colours."""
    first, last = float(data.steps[0]), float(data.steps[-1])
    half = (last - first) / max(1, data.steps.size - 1) / 2 if last > first else 0.5
    figure, axes = heat_map(values, (first - half, last + half), colours, low, high, form)
    step_axis(axes, data)
    return figure
