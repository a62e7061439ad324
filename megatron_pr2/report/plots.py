"""The plots of a run's report, section by section; a plot that the run has no numbers for is None."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from matplotlib.axes import Axes

from megatron_pr2.report import figures, formats
from megatron_pr2.report.figures import Line, Panel, Plot, X, chart
from megatron_pr2.report.records import RunData, exists, mean, running_mean
from megatron_pr2.report.summary import layer_lift, predicted
from megatron_pr2.report.theme import LIGHT, STACK

Plots = Iterator[Plot | None]
THIN: dict[str, object] = {"linewidth": 1}
POINTS = "lift (percentage points)"
ZERO = Line(0.0, "muted")


def learning(data: RunData) -> Plots:
    """What the policy achieves."""
    x, reward = figures.steps(data), data.column("reward")
    window = figures.smoothing_window(reward.size)
    label = f"running mean ({window * data.bin_size} rollouts)"
    smooth = Line(running_mean(reward, window), "blue", label, style={"linewidth": 2.4})
    lines = [Line(reward, "blue", "per rollout", style={**THIN, "alpha": 0.4}), smooth] if window > 1 else [Line(reward, "blue")]
    caption = "Higher is better: the strong line averages over neighbouring rollouts."
    yield chart(x, [Panel("mean reward", lines)], "reward", "Reward", caption)

    length = Panel("tokens", [Line(data.column("response_length"), "blue")])
    cut = Panel("cut off", [Line(data.column("truncated"), "orange")], zero=True, percent=True)
    caption = "A length that runs away, or a rising share of responses cut off at the limit, says that the policy degenerates."
    yield chart(x, [length, cut], "length", "Response length", caption)

    turns = data.column("rollout", "turns")
    caption = "Times that the policy wrote, with an environment's reply in between: more turns mean that it asks more often."
    panel = Panel("turns per response", [Line(turns, "blue")], zero=True)
    yield chart(x, [panel], "turns", "Turns", caption) if (turns > 1).any() else None


def routes(data: RunData) -> Plots:
    """How well what was replayed matches what the updated routers would choose."""
    x = figures.steps(data)
    yield _lift(data)
    yield _expected_lift(data)
    yield _mismatch(data)

    caption = "Share of the replayed experts that the current router would choose too: later mini-steps are staler and lie lower."
    panel = Panel("agreement", figures.mini_step_lines(data, "agreement"), percent=True)
    yield chart(x, [panel], "agreement", "Agreement per mini-step", caption)

    means = data.changed_means()
    caption = "How many of a token's replayed experts the current router would not choose: shorter bars are better."
    rows = [(f"mini-step {i + 1}", means[i]) for i in figures.chosen(data.kappa) if exists(means[i])]
    yield figures.changed_rows(rows, " unchanged", "changed", "Changed experts per token and layer", caption) if rows else None

    frozen = Line(data.later_mini_steps("kl_frozen"), "grey", "to the frozen router")
    prediction = Line(data.later_mini_steps("kl_predicted"), "blue", "to the prediction")
    caption = (
        "KL(ρ‖q̂) and KL(ρ‖ρ_old): where blue is below grey, the updated router is closer to the prediction than to the old one."
    )
    panel = Panel("KL from current (nats)", [frozen, prediction], zero=True, log="wide")
    yield chart(x, [panel], "kl", "Distance to the updated router", caption)

    average, per_layer = data.later_mini_steps("coverage_gap"), data.layers("coverage_gap")
    worst = np.array([np.nanmax(c) if exists(c) else np.nan for c in per_layer.T])
    lines = [
        Line(worst, "orange", "worst layer", style=THIN),
        Line(average, "blue", "mean of layers"),
        Line(figures.PAPER_COVERAGE_GAP, "muted", "paper's max", style={"linestyle": "--"}),
    ]
    caption = "Router probability of its own top-k minus that of the replayed experts: what replay leaves out, lower is better."
    yield chart(x, [Panel("coverage gap", lines, zero=True)], "coverage", "Coverage gap", caption)

    weight = data.column("predictor", "weight_norm")
    panels = [
        Panel("weight norm", [Line(weight, "purple")], zero=True),
        Panel("gradient", [Line(data.column("predictor", "grad_norm"), "orange")], zero=True),
    ]
    caption = "It starts at zero and should settle: a weight norm that keeps growing while lift falls asks for a smaller alpha."
    yield chart(x, panels, "predictor", "Predictor", caption) if (np.nan_to_num(weight) > 0).any() else None


def _lift(data: RunData) -> Plot | None:
    values, later = 100 * data.lift_all(), 100 * data.column("lift")
    if not exists(later):
        return None
    window = figures.smoothing_window(values.size)
    smooth = running_mean(values, window)

    def paint(axes: Axes) -> None:
        for above, colour in ((True, "green"), (False, "red")):
            where = (smooth >= 0) == above
            axes.fill_between(data.steps, 0, smooth, where=where, interpolate=True, color=LIGHT[colour], alpha=0.3, linewidth=0)

    lines = [ZERO, Line(values, "grey", style={**THIN, "alpha": 0.5})] if window > 1 else [ZERO]
    lines += [Line(smooth, "ink", "all mini-steps"), Line(running_mean(later, window), "blue", "from the second on", style=THIN)]
    caption = (
        "Agreement of the replayed routes minus that of frozen ones, which are R3's: above zero the run is better off than R3, "
        "below zero worse. In the first mini-step, part of the dark line only, a prediction can only be wrong."
        f"{_smoothed(window, data)}"
    )
    return chart(figures.steps(data), [Panel(POINTS, lines, paint=paint)], "lift", "Lift: better or worse off than R3", caption)


def _expected_lift(data: RunData) -> Plot | None:
    """Lift that the held-out tokens predicted, with its error, next to the lift that was measured."""
    lift_LP, error_LP = 100 * data.layer_columns("hold_back", "lift"), 100 * data.layer_columns("hold_back", "lift_error")
    if not exists(lift_LP):
        return None
    # Standard error of the mean over layers, as if they were independent.
    known = np.isfinite(lift_LP) & np.isfinite(error_LP)
    error = np.sqrt((np.where(known, error_LP, 0.0) ** 2).sum(axis=0)) / np.maximum(1, known.sum(axis=0))
    spread = np.where(known.any(axis=0), 2 * error, np.nan)
    window = figures.smoothing_window(data.steps.size)
    lines = [
        ZERO,
        Line(mean(lift_LP, axis=0), "orange", "expected, 95 % interval", band=spread),
        Line(running_mean(100 * data.lift_all(), window), "blue", "measured"),
    ]
    caption = (
        "Mean over layers and all mini-steps: the gain on held-out tokens of earlier rollouts at the beta in use, and the measured "
        "lift. The expectation is that of the best of several beta values, so it is a little too high. Neither should fall below "
        f"zero.{_smoothed(window, data)}"
    )
    return chart(figures.steps(data), [Panel(POINTS, lines)], "expected-lift", "Expected and measured lift", caption)


def _smoothed(window: int, data: RunData) -> str:
    return f" Running means of {window * data.bin_size} rollouts." if window > 1 else ""


def _mismatch(data: RunData) -> Plot | None:
    """Mean mismatch per mini-step, frozen next to replayed."""
    replayed, frozen = 1 - data.mini_step_means("agreement"), 1 - data.mini_step_means("frozen_agreement")
    if not exists(replayed):
        return None
    position = np.arange(data.kappa) + 1.0

    def paint(axes: Axes) -> None:
        for offset, values, colour, label in ((-0.2, frozen, "grey", "frozen"), (0.2, replayed, "blue", "replayed")):
            axes.bar(position + offset, np.nan_to_num(values), 0.38, color=LIGHT[colour], label=label)
        axes.grid(axis="x", visible=False)

    caption = (
        "Experts that replay gets wrong, lower is better: a blue bar below its grey one is what prediction gained; in mini-step 1 "
        "the policy has not moved, so that looking ahead can only cost."
    )
    panel = Panel("1 − agreement", percent=True, paint=paint)
    return chart(X("mini-step", position, whole=True), [panel], "mismatch", "Mismatch: frozen and replayed", caption)


def per_layer(data: RunData) -> Plots:
    """The same by MoE layer."""
    yield _layer_interval(data)
    x, beta = figures.steps(data), data.layer_columns("hold_back", "beta")
    caption = "Share of the prediction that is used: 0 (dark) is R3, 1 (bright) all of it. It rises where held-out tokens gain."
    yield figures.heat_map(x, beta, "viridis", 0.0, 1.0, lambda v: f"{v:.2f}", "beta", "Beta per layer", caption)

    agreement, lift = data.layers("agreement"), data.layers("lift")
    mismatch = 1 - mean(agreement, axis=1)
    frozen = mismatch + mean(lift, axis=1) if lift.shape == agreement.shape else np.full_like(mismatch, np.nan)
    lines = [Line(frozen, "grey", "frozen"), Line(mismatch, "blue", "replayed")]
    caption = "Mean mismatch of every MoE layer, lower is better: the distance from grey down to blue is the layer's lift."
    panel = Panel("1 − agreement", lines, zero=True, percent=True)
    yield chart(figures.layers(mismatch.size), [panel], "layer-profile", "Mismatch per layer", caption) if mismatch.size else None

    caption = "Every row is an MoE layer: a dark row is a layer whose routing moves fast."
    low, high = (float(np.nanmin(agreement)), float(np.nanmax(agreement))) if exists(agreement) else (0.0, 0.0)
    high = max(high, low + 1e-6)
    yield figures.heat_map(x, agreement, "viridis", low, high, formats.percent, "layer-agreement", "Agreement per layer", caption)

    # The 99th percentile: one noisy rollout must not wash out all others.
    limit = max(1e-4, float(np.nanpercentile(np.abs(lift), 99))) if exists(lift) else 0.0
    caption = "Blue layers gain from prediction, red layers lose, white ones show no difference."
    yield figures.heat_map(x, lift, "RdBu", -limit, limit, formats.points, "layer-lift", "Lift per layer", caption)


def _layer_interval(data: RunData) -> Plot | None:
    """Lift of every layer with its confidence interval."""
    lift_L, error_L = layer_lift(data)
    if not predicted(data.records):
        return None
    spread_L = np.nan_to_num(2 * error_L)
    known = np.isfinite(error_L)
    better, worse = (lift_L - spread_L > 0) & known, (lift_L + spread_L < 0) & known
    kinds = ((better, "green", "above zero"), (worse, "red", "below zero"), (~(better | worse), "grey", "no measurable difference"))
    lines = [
        Line(np.where(where, 100 * lift_L, np.nan), colour, label, error=100 * spread_L, style={"linestyle": "", "elinewidth": 1.6})
        for where, colour, label in kinds
    ]
    caption = (
        "Lift over the whole run, all mini-steps, with its 95 % interval over rollouts: above zero a layer's routes are better "
        "than R3's. Of many layers one in twenty lies off zero by chance, and a bf16 engine's rounding lowers all, with R3 too."
    )
    return chart(
        figures.layers(lift_L.size), [Panel(POINTS, [ZERO, *lines])], "layer-interval", "Lift per layer, with interval", caption
    )


def policy(data: RunData) -> Plots:
    """How far an update moves the policy."""
    x, low, high = figures.steps(data), data.last_mini_step("ratio_min", np.nanmin), data.last_mini_step("ratio_max", np.nanmax)
    lines = [
        Line(data.last_mini_step("ratio_mean"), "blue", "mean ± std", band=data.last_mini_step("ratio_std")),
        Line(high, "orange", "max", style=THIN),
        Line(low, "green", "min", style=THIN),
    ]
    caption = "New over sampling policy in the last, stalest mini-step: a widening band or far extremes mean instability."
    yield chart(x, [Panel("ratio", lines, log="wide")], "ratio", "Importance ratio", caption)

    caption = "Tokens whose importance ratio left the clip range: later mini-steps clip more, because the policy has moved further."
    panel = Panel("clipped tokens", figures.mini_step_lines(data, "clip_fraction"), zero=True, percent=True)
    yield chart(x, [panel], "clip", "Clip fraction", caption)

    caption = "Calm is good: an isolated spike is one bad batch, steady growth is a warning."
    panel = Panel("policy gradient norm", [Line(data.column("grad_norm"), "blue")], log="wide")
    yield chart(x, [panel], "gradient", "Policy gradient norm", caption)


def engine(data: RunData) -> Plots:
    """How engine and actor differ."""
    x = figures.steps(data)
    series = (("mean", "blue", "mean |gap|"), ("max", "orange", "max |gap|"), ("kl", "grey", "KL"))
    lines = [Line(data.column("logprob_gap", key), colour, label) for key, colour, label in series]
    caption = "How differently engine and actor score the same tokens before any update: lower is better, growth is a warning."
    yield chart(x, [Panel("nats", lines, log="always")], "gap", "Log-prob gap, engine to actor", caption)

    share = data.column("routes", "missing_share", reduce=np.nanmax)
    style = {"drawstyle": "steps-mid", "clip_on": False, "linewidth": 2.2}
    caption = "Tokens that arrived without a usable route and fell back to the current router: look into anything above zero."
    panel = Panel("missing", [Line(share, "red", style=style)], zero=True, floor=0.001, percent=True)
    yield chart(x, [panel], "missing", "Missing routes", caption) if data.total("routes", "tokens") else None


def cost(data: RunData) -> Plots:
    """Time and bytes."""
    x = figures.steps(data)
    seconds = {name: np.nan_to_num(data.column("seconds", name)) for name in data.keys_of("seconds")}
    colours = [LIGHT[STACK[i % len(STACK)]] for i in range(len(seconds))]

    def paint(axes: Axes) -> None:
        labels = [name.replace("_", " ") for name in seconds]
        if data.steps.size > 1:
            axes.stackplot(data.steps, list(seconds.values()), labels=labels, colors=colours, alpha=0.85, linewidth=0, step="mid")
            return
        bottom = np.zeros(1)
        for label, values, colour in zip(labels, seconds.values(), colours, strict=True):
            axes.bar(data.steps, values, 0.4, bottom=bottom, color=colour, label=label)
            bottom = bottom + values

    caption = "The height is the time of one step; the thickest layer is what to speed up."
    yield chart(x, [Panel("seconds", paint=paint)], "seconds", "Time per phase", caption) if seconds else None

    lines = [
        Line(data.column("bytes", name), STACK[i % len(STACK)], name.replace("_", " "))
        for i, name in enumerate(data.keys_of("bytes"))
    ]
    caption = "What one step moves or keeps, on a log scale: routes, sampled features and the weights pushed to the engine."
    yield chart(x, [Panel("bytes per step", lines, log="bytes")], "bytes", "Bytes per phase", caption)
