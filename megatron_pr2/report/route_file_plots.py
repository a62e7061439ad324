"""Plots of saved route tables: load and stickiness of one file, difference of two; None where there is nothing to show."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from megatron_pr2.report import formats
from megatron_pr2.report.figures import Plot, chosen, finish, from_zero, heat_map, label_y, layer_axis, legend, percent_axis
from megatron_pr2.report.records import Array, exists
from megatron_pr2.report.route_plots import PAPER_CHANGED, changed_bars
from megatron_pr2.report.route_statistics import RouteDifference, RouteStatistics
from megatron_pr2.report.theme import LIGHT, new_figure


def load(statistics: RouteStatistics, number: int) -> Plot | None:
    """Load of every expert in every layer; `number` is the file's, for the plot's name."""
    share_LE = statistics.share_LE()
    if not exists(share_LE):
        return None
    # The 99.5th percentile: one expert that does it all must not make all others look idle.
    high = max(2.0, float(np.percentile(share_LE, 99.5)))
    figure, axes = heat_map(share_LE, (-0.5, share_LE.shape[1] - 0.5), "viridis", 0.0, high, lambda v: f"{v:g}×")
    axes.set_xlabel("expert")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    caption = "Tokens that took the expert, relative to an even load (1×): dark ones idle, bright ones are bottlenecks."
    return finish(figure, f"load-{number}", "Load of the experts", caption)


def balance(statistics: RouteStatistics, number: int) -> Plot | None:
    """Busiest expert and entropy per layer."""
    imbalance_L, entropy_L = statistics.imbalance_L(), statistics.entropy_L()
    if not exists(imbalance_L):
        return None
    figure = new_figure(3.4)
    top, bottom = figure.subplots(2, 1, sharex=True)
    _per_layer(top, imbalance_L, "orange")
    top.axhline(1, color=LIGHT["muted"], linewidth=1, linestyle="--")
    from_zero(top, imbalance_L, np.array([1.1]))
    label_y(top, "busiest ÷ mean")
    _per_layer(bottom, entropy_L, "blue")
    bottom.set_ylim(0, 1.05)
    label_y(bottom, "entropy")
    layer_axis(bottom, entropy_L.size)
    caption = (
        "Above: load of a layer's busiest expert, 1 would be even. Below: entropy of the load, 1 would be even, and 0 means that "
        "one expert does all the work."
    )
    return finish(figure, f"balance-{number}", "Balance per layer", caption)


def stickiness(statistics: RouteStatistics, number: int) -> Plot | None:
    """Experts that neighbouring tokens share, next to chance."""
    sticky_L, chance_L = statistics.stickiness_L(), statistics.chance_L()
    if not exists(sticky_L):
        return None
    figure = new_figure(3.0)
    axes = figure.add_subplot()
    _per_layer(axes, chance_L, "grey", "by chance, at this load")
    _per_layer(axes, sticky_L, "purple", "neighbouring tokens")
    from_zero(axes, sticky_L, chance_L)
    percent_axis(axes.yaxis)
    label_y(axes, "shared experts")
    layer_axis(axes, sticky_L.size)
    legend(axes, 2)
    caption = "Share of a token's experts that the token before it took too: far above chance, load comes in bursts of neighbours."
    return finish(figure, f"sticky-{number}", "Stickiness of routes", caption)


def changed(difference: RouteDifference) -> Plot | None:
    """Deviation histogram of two files next to the paper's."""
    shares = difference.changed()
    if not exists(shares):
        return None
    figure = changed_bars({"these two files": tuple(shares.tolist()), **PAPER_CHANGED})
    caption = (
        "How many of a token's experts the second file lacks, per MoE layer. The paper's rows compare replayed with current routes "
        "in training."
    )
    return finish(figure, "files-changed", "Changed experts per token and layer", caption)


def agreement(difference: RouteDifference) -> Plot | None:
    """Agreement of two files per layer."""
    values_L = difference.agreement_L()
    if not exists(values_L):
        return None
    figure = new_figure(3.0)
    axes = figure.add_subplot()
    _per_layer(axes, 1 - values_L, "blue")
    from_zero(axes, 1 - values_L)
    percent_axis(axes.yaxis)
    label_y(axes, "1 − agreement")
    layer_axis(axes, values_L.size)
    caption = "Share of a token's experts that the second file does not have: a high point is a layer whose routes differ most."
    return finish(figure, "files-layers", "Difference per layer", caption)


def positions(difference: RouteDifference) -> Plot | None:
    """Agreement of two files by the tokens' position."""
    values_LP = difference.agreement_LP()
    if not exists(values_LP):
        return None
    figure = new_figure(3.0)
    axes = figure.add_subplot()
    mean_P = 1 - values_LP.mean(axis=0)
    axes.stairs(mean_P, difference.edges, color=LIGHT["blue"], linewidth=1.8, baseline=None)
    from_zero(axes, mean_P)
    percent_axis(axes.yaxis)
    label_y(axes, "1 − agreement")
    axes.set_xlabel("position in the sequence")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    caption = (
        "Mean over layers; every step averages about as many tokens. A rise says that something builds up along the sequence, such "
        "as an engine's numerics; a level line says that the position does not matter."
    )
    return finish(figure, "files-positions", "Difference by position", caption)


def layers_by_position(difference: RouteDifference) -> Plot | None:
    """Agreement of two files per layer and position."""
    values_LP = difference.agreement_LP()
    if not exists(values_LP) or values_LP.shape[0] < 2 or values_LP.shape[1] < 2:
        return None
    values = 1 - values_LP
    high = max(1e-4, float(np.nanmax(values)))
    figure, axes = heat_map(values, (0.5, values.shape[1] + 0.5), "viridis", 0.0, high, lambda v: formats.percent(v, 1))
    edges = difference.edges
    shown = chosen(len(edges))
    axes.set_xticks([i + 0.5 for i in shown], [str(edges[i]) for i in shown])
    axes.set_xlabel("position in the sequence")
    caption = "1 − agreement by layer and position: a bright column is a place in the sequence, a bright row a layer."
    return finish(figure, "files-layers-positions", "Difference per layer and position", caption)


def _per_layer(axes: Axes, values_L: Array, colour: str, label: str | None = None) -> None:
    axes.plot(np.arange(values_L.size) + 1, values_L, color=LIGHT[colour], marker="o", markersize=3.5, label=label)
