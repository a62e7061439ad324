"""Plots of learning, the policy update, the engine-actor gap and the cost of a run; None where a run has no such numbers."""

from __future__ import annotations

import numpy as np

from megatron_pr2.report import formats
from megatron_pr2.report.figures import (
    Plot,
    finish,
    from_zero,
    label_y,
    legend,
    line,
    log_if_wide,
    log_scale,
    mini_step_lines,
    percent_axis,
    smoothing_window,
    step_axis,
    time_axes,
)
from megatron_pr2.report.records import RunData, exists, running_mean
from megatron_pr2.report.theme import LIGHT, STACK, new_figure


def reward(data: RunData) -> Plot | None:
    """Mean reward of every rollout and its running mean."""
    values = data.column("reward")
    if not exists(values):
        return None
    figure, axes = time_axes(data)
    window = smoothing_window(values.size)
    line(axes, data, values, "blue", "per rollout", linewidth=1, alpha=0.4 if window > 1 else 1.0)
    if window > 1:
        line(axes, data, running_mean(values, window), "blue", f"running mean ({window * data.bin_size} rollouts)", linewidth=2.4)
        legend(axes)
    label_y(axes, "mean reward")
    return finish(figure, "reward", "Reward", "Higher is better: the strong line averages out the luck of single rollouts.")


def response_length(data: RunData) -> Plot | None:
    """Mean response length, and the share of responses that hit the limit."""
    length, truncated = data.column("response_length"), data.column("truncated")
    if not exists(length):
        return None
    figure = new_figure(3.0)
    if exists(truncated):
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
        line(bottom, data, truncated, "orange")
        from_zero(bottom, truncated)
        percent_axis(bottom.yaxis)
        label_y(bottom, "cut off")
        step_axis(bottom, data)
    else:
        top = figure.subplots()
        step_axis(top, data)
    line(top, data, length, "blue")
    label_y(top, "tokens")
    caption = "A length that runs away, or a rising share of responses cut off at the limit, says that the policy degenerates."
    return finish(figure, "length", "Response length", caption)


def turns(data: RunData) -> Plot | None:
    """Mean turns of a response; None where every response was a single turn."""
    values = data.column("rollout", "turns")
    if not (values > 1).any():
        return None
    figure, axes = time_axes(data)
    line(axes, data, values, "blue")
    from_zero(axes, values)
    label_y(axes, "turns per response")
    caption = "Times that the policy wrote, with an environment's reply in between: more turns mean that it asks more often."
    return finish(figure, "turns", "Turns", caption)


def clip_fraction(data: RunData) -> Plot | None:
    """Share of clipped tokens per mini-step."""
    values = data.mini_steps("clip_fraction")
    if not exists(values):
        return None
    figure, axes = time_axes(data)
    mini_step_lines(axes, data, values)
    from_zero(axes, values)
    percent_axis(axes.yaxis)
    label_y(axes, "clipped tokens")
    caption = "Tokens whose importance ratio left the clip range: later mini-steps clip more, because the policy has moved further."
    return finish(figure, "clip", "Clip fraction", caption)


def importance_ratio(data: RunData) -> Plot | None:
    """Spread of the importance ratio in the last mini-step."""
    centre, spread = data.last_mini_step("ratio_mean"), data.last_mini_step("ratio_std")
    low, high = data.last_mini_step("ratio_min", np.nanmin), data.last_mini_step("ratio_max", np.nanmax)
    if not exists(centre):
        return None
    figure, axes = time_axes(data)
    axes.fill_between(data.steps, centre - spread, centre + spread, color=LIGHT["blue"], alpha=0.25, linewidth=0)
    line(axes, data, centre, "blue", "mean ± std")
    line(axes, data, high, "orange", "max", linewidth=1)
    line(axes, data, low, "green", "min", linewidth=1)
    log_if_wide(axes, centre, low, high)
    label_y(axes, "ratio")
    legend(axes)
    caption = "New over sampling policy in the last, stalest mini-step: a widening band or far extremes mean instability."
    return finish(figure, "ratio", "Importance ratio", caption)


def gradient_norm(data: RunData) -> Plot | None:
    """Gradient norm of the policy."""
    values = data.column("grad_norm")
    if not exists(values):
        return None
    figure, axes = time_axes(data)
    line(axes, data, values, "blue")
    log_if_wide(axes, values)
    label_y(axes, "policy gradient norm")
    caption = "Calm is good: an isolated spike is one bad batch, steady growth is a warning."
    return finish(figure, "gradient", "Policy gradient norm", caption)


def logprob_gap(data: RunData) -> Plot | None:
    """Difference of the log-probs of engine and actor for the same tokens."""
    series = {name: data.column("logprob_gap", name) for name in ("mean", "max", "kl")}
    if not exists(*series.values()):
        return None
    figure, axes = time_axes(data)
    for (name, values), colour in zip(series.items(), ("blue", "orange", "grey"), strict=True):
        if exists(values):
            label = {"mean": "mean |gap|", "max": "max |gap|", "kl": "KL"}[name]
            positive = np.where(values > 0, values, np.nan)
            line(axes, data, positive, colour, label, linewidth=1 if name == "max" else 1.8)
    if any((values > 0).any() for values in series.values()):
        log_scale(axes, formats.scientific)
        legend(axes)
    label_y(axes, "nats")
    caption = "How differently engine and actor score the same tokens before any update: lower is better, growth is a warning."
    return finish(figure, "gap", "Log-prob gap, engine to actor", caption)


def missing_routes(data: RunData) -> Plot | None:
    """Share of tokens without a valid route."""
    share = data.column("routes", "missing_share", reduce=np.nanmax)
    if not exists(share) or data.total("routes", "tokens") == 0:
        return None
    figure, axes = time_axes(data)
    line(axes, data, share, "red", drawstyle="steps-mid", clip_on=False, linewidth=2.2)
    axes.set_ylim(0, max(0.001, 1.08 * float(np.nanmax(share))))
    percent_axis(axes.yaxis, 2)
    label_y(axes, "missing")
    caption = "Tokens that arrived without a usable route, so that the live router decided: anything above zero deserves a look."
    return finish(figure, "missing", "Missing routes", caption)


def seconds(data: RunData) -> Plot | None:
    """Time of every phase, stacked."""
    names = data.keys_of("seconds")
    if not names:
        return None
    figure, axes = time_axes(data)
    values = np.nan_to_num(np.stack([data.column("seconds", name) for name in names]))
    colours = [LIGHT[STACK[i % len(STACK)]] for i in range(len(names))]
    labels = [name.replace("_", " ") for name in names]
    if data.steps.size > 1:
        axes.stackplot(data.steps, values, labels=labels, colors=colours, alpha=0.85, linewidth=0, step="mid")
    else:
        for i, label in enumerate(labels):
            axes.bar(data.steps, values[i], 0.4, bottom=values[:i].sum(0), color=colours[i], label=label)
    from_zero(axes, values.sum(0))
    label_y(axes, "seconds")
    legend(axes)
    caption = "The height is the time of one step; the thickest layer is what to speed up."
    return finish(figure, "seconds", "Time per phase", caption)


def transferred(data: RunData) -> Plot | None:
    """Bytes that every phase moved."""
    names = data.keys_of("bytes")
    if not names:
        return None
    figure, axes = time_axes(data)
    series = [data.column("bytes", name) for name in names]
    for i, (name, values) in enumerate(zip(names, series, strict=True)):
        line(axes, data, np.where(values > 0, values, np.nan), STACK[i % len(STACK)], name.replace("_", " "))
    log_scale(axes, formats.size, base=2)
    label_y(axes, "bytes per step")
    legend(axes)
    caption = "What one step moves or keeps, on a log scale: routes, sampled features and the weights pushed to the engine."
    return finish(figure, "bytes", "Bytes per phase", caption)


def predictor(data: RunData) -> Plot | None:
    """Weight and gradient norm of the predictor."""
    weight, gradient = data.column("predictor", "weight_norm"), data.column("predictor", "grad_norm")
    if not (np.nan_to_num(weight) > 0).any():
        return None
    figure = new_figure(3.0)
    top, bottom = figure.subplots(2, 1, sharex=True)
    line(top, data, weight, "purple")
    from_zero(top, weight)
    label_y(top, "weight norm")
    line(bottom, data, gradient, "orange")
    from_zero(bottom, gradient)
    label_y(bottom, "gradient")
    step_axis(bottom, data)
    caption = "It starts at zero and should settle: a weight norm that keeps growing while lift falls asks for a smaller alpha."
    return finish(figure, "predictor", "Predictor", caption)
