"""The plots of a run's report, section by section; a plot that the run has no numbers for is None."""

from __future__ import annotations

import pandas as pd

from megatron_pr2.report import figures, formats
from megatron_pr2.report.figures import PAPER_COVERAGE_GAP, THIN, ZERO, Line, Panel, Plot, Plots, changed_rows, chart, share
from megatron_pr2.report.moments import Explained
from megatron_pr2.report.records import RunData
from megatron_pr2.report.summary import layer_lift, predicted
from megatron_pr2.report.theme import STACK

POINTS = "lift (percentage points)"


def smooth(values: pd.Series, window: int) -> pd.Series:
    """Mean of the last `window` values that exist."""
    return values.rolling(window, min_periods=1).mean()


def window_of(points: int) -> int:
    """Window of the running means: a fifteenth of the run, at least 1."""
    return max(1, points // 15)


def beside(data: RunData, lines: list[Line], pattern: str, window: int = 1) -> list[Line]:
    """The lines, and the baseline's where there is one."""
    values = data.of_baseline(pattern)
    return lines if values is None else [*lines, Line(smooth(values, window), "purple", data.name, style={"linestyle": "--"})]


def learning(data: RunData) -> Plots:
    """What the policy achieves."""
    reward = data["reward"]
    window = window_of(reward.size)
    line = Line(smooth(reward, window), "blue", f"running mean ({window * data.bin_size} rollouts)", style={"linewidth": 2.4})
    lines = [Line(reward, "blue", "per rollout", style={**THIN, "alpha": 0.4}), line] if window > 1 else [Line(reward)]
    yield chart("reward", Panel("mean reward", beside(data, lines, "reward", window)))

    cut = Panel("cut off", beside(data, [Line(data["truncated"], "orange")], "truncated"), zero=True, form=share)
    yield chart("length", Panel("tokens", beside(data, [Line(data["response_length"])], "response_length")), cut)

    turns = data["rollout.turns"]
    if (turns > 1).any():
        yield chart("turns", Panel("turns per response", [Line(turns)], zero=True))


def routes(data: RunData) -> Plots:
    """How well what was replayed matches what the updated routers would choose."""
    yield _lift(data)
    yield _expected_lift(data)

    table = pd.DataFrame({name: 1 - data.means(f"mini_steps.#.{name}") for name in ("frozen_agreement", "agreement")})
    bars = [Line(table["frozen_agreement"], "grey", "frozen"), Line(table["agreement"], "blue", "replayed")]
    if data.baseline is not None:
        bars.append(Line(1 - data.baseline.means("mini_steps.#.agreement"), "purple", data.name))
    panel = Panel("1 − agreement", bars, kind="bar", spread=0.8 - 0.8 / len(bars), form=share)
    yield chart("mismatch", panel)

    lines = beside(data, figures.mini_step_lines(data.table("mini_steps.#.agreement")), "mini_steps.*.agreement")
    panel = Panel("agreement", lines, form=share)
    yield chart("agreement", panel)

    changed = data.changed()
    rows = {f"mini-step {step}": shares for step, shares in changed.iloc[figures.chosen(len(changed))].iterrows()}
    yield changed_rows("changed", rows, " unchanged")

    lines = [
        Line(data["mini_steps.+.kl_frozen"], "grey", "to the frozen router"),
        Line(data["mini_steps.+.kl_predicted"], "blue", "to the prediction"),
    ]
    yield chart("kl", Panel("KL from current (nats)", lines, zero=True, log=10))

    worst = data.table("mini_steps.+.per_layer.coverage_gap.#").max(axis=1)
    lines = [Line(worst, "orange", "worst layer", style=THIN), Line(data["mini_steps.+.coverage_gap"], "blue", "mean of layers")]
    lines = beside(data, lines, "mini_steps.+.coverage_gap")
    panel = Panel("coverage gap", lines, zero=True, rules={"paper's max": PAPER_COVERAGE_GAP})
    yield chart("coverage", panel)

    weight = data["predictor.weight_norm"]
    gradient = Panel("gradient", [Line(data["predictor.grad_norm"], "orange")], zero=True)
    if (weight > 0).any():
        yield chart("predictor", Panel("weight norm", [Line(weight, "purple")], zero=True), gradient)


def _lift(data: RunData) -> Plot | None:
    values, later = 100 * data["lift_all"], 100 * data["lift"]
    if later.isna().all():
        return None
    window = window_of(values.size)
    mean = smooth(values, window)
    lines = [Line(values, "grey", style={**THIN, "alpha": 0.5})] if window > 1 else []
    lines += [Line(mean, "ink", "all mini-steps"), Line(smooth(later, window), "blue", "from the second on", style=THIN)]
    return chart("lift", Panel(POINTS, lines, rules=ZERO, shade=mean))


def _expected_lift(data: RunData) -> Plot | None:
    """Lift that the held-out tokens predicted, with its error, next to the lift that was measured."""
    lift_PL, error_PL = 100 * data.table("hold_back.lift.#"), 100 * data.table("hold_back.lift_error.#")
    if lift_PL.isna().all(axis=None):
        return None
    # Standard error of the mean over layers, as if they were independent.
    known = error_PL.where(lift_PL.notna())
    error = (known**2).sum(axis=1, min_count=1) ** 0.5 / known.count(axis=1)
    window = window_of(len(lift_PL))
    lines = [
        Line(lift_PL.mean(axis=1), "orange", "expected, 95 % interval", half=2 * error),
        Line(smooth(100 * data["lift_all"], window), "blue", "measured"),
    ]
    return chart("expected-lift", Panel(POINTS, lines, rules=ZERO))


def prediction(data: RunData) -> Plots:
    """How much of the routers' drift is predicted; layers along x, a line per mini-step."""
    found = Explained.of(data)

    def lines(table: pd.DataFrame) -> list[Line]:
        return figures.mini_step_lines(table.T)

    yield chart("r-squared", Panel("R²", lines(found.r_squared), rules=ZERO))

    sums = found.correlation_sums
    yield chart("correlation", Panel("sum of correlations", [Line(sums)], rules={"one gate pays above": 1.0}))

    later = [each.iloc[1:].mean() for each in (found.gate_share, found.hidden_share)]
    bars = [Line(later[0], "orange", "gate"), Line(later[1], "blue", "router's input")]
    yield chart("drift-parts", Panel("share of the drift", bars, kind="bar", spread=0.4, zero=True, form=share))

    yield chart("multiples", Panel("multiple", lines(found.multiple), rules={"as predicted": 1.0}))


def per_layer(data: RunData) -> Plots:
    """The same by MoE layer."""
    if predicted(data):
        lift_L, error_L = layer_lift(data)
        better, worse = lift_L > 2 * error_L, lift_L < -2 * error_L
        neither = ~(better | worse)
        kinds = ((better, "green", "above zero"), (worse, "red", "below zero"), (neither, "grey", "no measurable difference"))
        style = {"linestyle": "", "elinewidth": 1.6}
        lines = [Line(100 * lift_L.where(where), colour, label, 200 * error_L, style) for where, colour, label in kinds]
        yield chart("layer-interval", Panel(POINTS, lines, kind="error", rules=ZERO))

    beta = data.table("hold_back.beta.#")
    yield figures.heat_map("beta", beta, 0.0, 1.5 if (beta > 1.0).any(axis=None) else 1.0, "{:.2f}".format)

    agreement, lift = (data.table(f"mini_steps.+.per_layer.{name}.#") for name in ("agreement", "lift"))
    mismatch = 1 - agreement.mean()
    lines = [Line(mismatch + lift.mean(), "grey", "frozen"), Line(mismatch, "blue", "replayed")]
    yield chart("layer-profile", Panel("1 − agreement", lines, zero=True, form=share))

    yield figures.heat_map("layer-agreement", agreement, None, None, formats.percent)

    # The 99th percentile: one noisy rollout must not wash out all others.
    limit = max(1e-4, float(lift.abs().stack().quantile(0.99))) if lift.size else 0.0
    yield figures.heat_map("layer-lift", lift, -limit, limit, formats.points, colours="RdBu")


def policy(data: RunData) -> Plots:
    """How far an update moves the policy."""
    last = f"mini_steps.{data.kappa}.ratio_"
    lines = [
        Line(data[f"{last}mean"], "blue", "mean ± std", half=data[f"{last}std"]),
        Line(data[f"{last}max"], "orange", "max", style=THIN),
        Line(data[f"{last}min"], "green", "min", style=THIN),
    ]
    yield chart("ratio", Panel("ratio", lines, log=10))

    lines = beside(data, figures.mini_step_lines(data.table("mini_steps.#.clip_fraction")), "mini_steps.*.clip_fraction")
    yield chart("clip", Panel("clipped tokens", lines, zero=True, form=share))

    yield chart("gradient", Panel("policy gradient norm", beside(data, [Line(data["grad_norm"])], "grad_norm"), log=10))


def engine(data: RunData) -> Plots:
    """How engine and actor differ."""
    series = (("mean", "blue", "mean |gap|"), ("max", "orange", "max |gap|"), ("kl", "grey", "KL"))
    lines = [Line(data[f"logprob_gap.{name}"], colour, label) for name, colour, label in series]
    yield chart("gap", Panel("nats", beside(data, lines, "logprob_gap.mean"), log=10))

    missing = Line(data["routes.missing_share"], "red", style={"drawstyle": "steps-mid", "linewidth": 2.2})
    if (data["routes.tokens"] > 0).any():
        yield chart("missing", Panel("missing", [missing], zero=True, form=share))


def cost(data: RunData) -> Plots:
    """Time and bytes."""
    seconds, size = ([(name.replace("_", " "), values) for name, values in data.group(key).items()] for key in ("seconds", "bytes"))
    lines = [[Line(values, STACK[i % 6], name) for i, (name, values) in enumerate(group)] for group in (seconds, size)]
    yield chart("seconds", Panel("seconds", lines[0], kind="area", zero=True))
    yield chart("bytes", Panel("bytes per step", lines[1], log=2, form=formats.size))
