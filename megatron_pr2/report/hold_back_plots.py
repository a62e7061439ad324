"""Plots of what prediction is worth per layer, and how much of it was used; None where a run does not say."""

from __future__ import annotations

import numpy as np

from megatron_pr2.report.figures import Plot, finish, label_y, layer_axis, legend, line, smoothing_window, time_axes
from megatron_pr2.report.records import Array, RunData, exists, mean, running_mean
from megatron_pr2.report.route_plots import run_heat_map
from megatron_pr2.report.summary import layer_lift, predicted
from megatron_pr2.report.theme import LIGHT, new_figure


def beta(data: RunData) -> Plot | None:
    """beta per layer over the run."""
    values = data.layer_columns("hold_back", "beta")
    if not exists(values):
        return None
    figure = run_heat_map(data, values, "viridis", 0.0, 1.0, lambda v: f"{v:.2f}")
    caption = "How much of the prediction a layer uses: 0 (dark) is R3, 1 (bright) all of it. It rises where held-out tokens gain."
    return finish(figure, "beta", "Beta per layer: how much is held back", caption)


def expected(data: RunData) -> Plot | None:
    """Lift that holding back expected, with its error, next to the lift that was measured."""
    lift, error = 100 * data.layer_columns("hold_back", "lift"), 100 * data.layer_columns("hold_back", "lift_error")
    if not exists(lift):
        return None
    centre, spread = mean(lift, axis=0), 2 * _error_of_mean(lift, error)
    measured, window = 100 * data.lift_all(), smoothing_window(data.steps.size)
    figure, axes = time_axes(data)
    axes.axhline(0, color=LIGHT["muted"], linewidth=1)
    axes.fill_between(data.steps, centre - spread, centre + spread, color=LIGHT["orange"], alpha=0.25, linewidth=0)
    line(axes, data, centre, "orange", "expected, 95 % interval")
    if exists(measured):
        line(axes, data, running_mean(measured, window), "blue", "measured")
    label_y(axes, "lift (percentage points)")
    legend(axes, 2)
    smoothed = f" (running mean of {window * data.bin_size} rollouts)" if window > 1 else ""
    caption = (
        "Mean over layers and all mini-steps: what held-out tokens of earlier rollouts promised at the beta in use, and what came"
        f"{smoothed}. A promise is that of the best of several, so expect a little less. Neither should fall below zero."
    )
    return finish(figure, "expected-lift", "Expected and measured lift", caption)


def layer_interval(data: RunData) -> Plot | None:
    """Lift of every layer with its confidence interval."""
    lift_L, error_L = layer_lift(data)
    if not exists(lift_L) or not predicted(data.records):
        return None
    figure = new_figure(3.2)
    axes = figure.add_subplot()
    axes.axhline(0, color=LIGHT["muted"], linewidth=1)
    layer = np.arange(lift_L.size) + 1
    spread_L = np.nan_to_num(2 * error_L)
    better, worse = lift_L - spread_L > 0, lift_L + spread_L < 0
    known = np.isfinite(error_L)
    for where, colour, label in (
        (better & known, "green", "above zero"),
        (worse & known, "red", "below zero"),
        (~((better | worse) & known) & np.isfinite(lift_L), "grey", "no difference that shows"),
    ):
        if where.any():
            axes.errorbar(
                layer[where],
                100 * lift_L[where],
                yerr=100 * spread_L[where],
                fmt="o",
                color=LIGHT[colour],
                markersize=4,
                elinewidth=1.6,
                label=label,
            )
    label_y(axes, "lift (percentage points)")
    layer_axis(axes, lift_L.size)
    legend(axes)
    caption = (
        "Lift over the whole run, all mini-steps, with its 95 % interval over rollouts: above zero a layer's routes are better "
        "than R3's. Of many layers one in twenty lies off zero by chance, and a bf16 engine's rounding lowers all, with R3 too."
    )
    return finish(figure, "layer-interval", "Lift per layer, and how sure it is", caption)


def _error_of_mean(values: Array, errors: Array) -> Array:
    """[P] standard error of the mean over layers, from the layers' own; as if they were independent."""
    known = np.isfinite(values) & np.isfinite(errors)
    count = np.maximum(1, known.sum(axis=0))
    return np.where(known.any(axis=0), np.sqrt((np.where(known, errors, 0.0) ** 2).sum(axis=0)) / count, np.nan)
