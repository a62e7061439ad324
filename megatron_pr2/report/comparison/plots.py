"""Plots of one setting: a line or a row per method; None where nothing has a number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megatron_pr2.report import figures, formats
from megatron_pr2.report.comparison import measures
from megatron_pr2.report.comparison.measures import Measure, differences, of_method, of_mini_steps, per_seed
from megatron_pr2.report.comparison.runs import Setting
from megatron_pr2.report.comparison.stats import interval
from megatron_pr2.report.figures import Line, Panel, Plot, X, chart
from megatron_pr2.report.plots import POINTS, ZERO, Plots
from megatron_pr2.report.records import Array, RunData, exists, mean, running_mean
from megatron_pr2.report.theme import LIGHT, STACK

# More intervals than this on top of each other cannot be distinguished; the rows below the curves show them.
MOST_BANDS = 4
# arXiv 2606.00395 (draft), off-8: agreement falls from the second to the first of these over the mini-steps.
PAPER_AGREEMENT_OFF_8 = (0.9825, 0.9975)
PALETTE = ("grey", "red", "blue", "purple", "orange", "green")
FEW = ("blue", "orange", "green", "purple")
DASHES = ("-", ":", "-.")
HOLD = "+hold"
_NAME_WIDTH = 26


@dataclass(frozen=True)
class Look:
    """How a method is drawn, the same in every plot."""

    colour: str
    line: str = "-"


def looks(settings: Sequence[Setting]) -> dict[str, Look]:
    """A look per method; one that only adds hold-back to another is drawn in its colour, dashed."""
    names = list(dict.fromkeys(name for setting in settings for name in setting.methods))
    baselines = {setting.baseline for setting in settings}
    bases = [name for name in dict.fromkeys(name.removesuffix(HOLD) for name in names) if name not in baselines]
    palette = FEW if len(bases) <= len(FEW) else PALETTE
    colours = {base: Look(palette[i % len(palette)], DASHES[i // len(palette) % len(DASHES)]) for i, base in enumerate(bases)}
    own = {name: colours.get(name.removesuffix(HOLD), Look("ink")) for name in names}
    return {name: Look(look.colour, "--") if name.endswith(HOLD) else look for name, look in own.items()}


def short_name(name: str) -> str:
    """A name that fits beside a plot."""
    return name if len(name) <= _NAME_WIDTH else f"{name[: _NAME_WIDTH - 9]}…{name[-8:]}"


def first(setting: Setting, look: Mapping[str, Look]) -> Plots:
    """What is shown of a setting at once."""
    window = figures.smoothing_window(setting.rollouts)
    bands = len(setting.methods) <= MOST_BANDS
    caption = "Mean over seeds" + (f" of the running mean over {window} rollouts" if window > 1 else "")
    yield _curves(
        setting,
        look,
        lambda data: running_mean(data.column("reward"), max(1, window // data.bin_size)),
        ("reward", "Reward", f"{caption}{', with 95 % intervals' if bands else ''}. Higher is better."),
        "mean reward",
        bands=bands,
    )
    yield _difference(setting, look, measures.FINAL_REWARD)
    caption = (
        "Agreement of the replayed routes minus that of frozen ones in the same run, all mini-steps: small dots are seeds, "
        "the line is the 95 % interval of their mean. Above zero prediction helps."
    )
    yield _values(setting, look, measures.LIFT, caption, rule=0.0)

    window = max(1, setting.rollouts // 6)
    caption = f"Running mean over {window} rollouts, mean over seeds: above zero prediction helps, below zero it hurts."
    yield _curves(
        setting,
        look,
        lambda data: 100 * running_mean(data.lift_all(), max(1, window // data.bin_size)),
        ("lift-curve", "Lift over the run", caption),
        POINTS,
        rules=(ZERO,),
    )

    rows = []
    for method, seeds in setting.methods.items():
        later = np.concatenate([setting.data[method, seed].changed_means()[1:] for seed in seeds])
        rows += [(short_name(method), mean(later, axis=0))] if exists(later) else []
    caption = (
        "Share of (token, layer) pairs with 1, 2 or more experts that the updated router would not choose, mini-steps from the "
        "second on; the number is the share without any. Shorter bars are better."
    )
    yield (
        figures.changed_rows(rows, "", f"{setting.slug}-changed", "Changed experts per token and layer", caption) if rows else None
    )

    caption = (
        "Share of the replayed experts that the updated router would choose too, higher is better; whiskers are 95 % intervals "
        "over seeds. The paper reports 96 to 99 %, and 99.75 % falling to 98.25 % over the mini-steps of off-8."
    )
    band = PAPER_AGREEMENT_OFF_8 if setting.mini_steps == 8 else None
    yield _per_mini_step(setting, look, measures.AGREEMENT, caption, band=band)


def more(setting: Setting, look: Mapping[str, Look]) -> Plots:
    """What is shown of a setting on demand."""
    caption = "Share of the prediction that is used: 0 is replay without prediction, 1 the whole prediction."
    yield _curves(setting, look, measures.beta, ("beta", "Hold-back", caption), "β, mean of the layers")
    yield _difference(setting, look, measures.MEAN_REWARD)
    caption = "Lift without the first mini-step, in which nothing has drifted yet and prediction can only cost."
    yield _values(setting, look, measures.LATER_LIFT, caption, rule=0.0)
    caption = "Lift by mini-step: predicted routes are the same in all of them, so the first ones lose and the later ones gain."
    yield _per_mini_step(setting, look, measures.LIFT, caption)
    caption = "KL(ρ‖q̂), mini-steps from the second on, lower is better; the grey dot is KL(ρ‖ρ_old) of frozen routes there."
    marks = {method: of_method(setting, method, measures.KL_FROZEN).mean for method in setting.methods}
    yield _values(setting, look, measures.KL_PREDICTED, caption, marks=marks)
    caption = (
        "Router probability of its own top-k minus that of the replayed experts, lower is better. "
        f"The dashed line is the largest per-layer value that the paper reports, {figures.PAPER_COVERAGE_GAP}."
    )
    yield _values(setting, look, measures.COVERAGE, caption, rule=figures.PAPER_COVERAGE_GAP)
    caption = "How differently the updated policy scores the sampled tokens: growth over the mini-steps means instability."
    yield _per_mini_step(setting, look, measures.RATIO_VARIANCE, caption)
    caption = "Share of tokens whose ratio was clipped: the policy learns nothing from them."
    yield _per_mini_step(setting, look, measures.CLIP, caption)
    caption = "Estimated KL of the updated policy from the one that sampled."
    yield _per_mini_step(setting, look, measures.POLICY_KL, caption)
    caption = "Mean |log-prob of the engine - log-prob of the actor| of the same tokens before any update, lower is better."
    yield _values(setting, look, measures.GAP, caption)
    yield _time(setting)


def _curves(
    setting: Setting,
    look: Mapping[str, Look],
    read: Callable[[RunData], Array],
    words: tuple[str, str, str],
    y: str,
    *,
    rules: Iterable[Line] = (),
    bands: bool = False,
) -> Plot | None:
    """[P] something over rollouts; `words` are name, title and caption."""
    curves = setting.curves()
    lines = list(rules)
    for method, seeds in setting.methods.items():
        table = np.stack([read(curves[method, seed]) for seed in seeds])
        half = np.array([interval(column).half for column in table.T.tolist()]) if bands else None
        style = {"linestyle": look[method].line}
        lines.append(Line(mean(table, axis=0), look[method].colour, short_name(method), half, style=style))
    name, title, caption = words
    return chart(
        figures.steps(next(iter(curves.values()))), [Panel(y, lines)], f"{setting.slug}-{name}", title, caption, height=2.6
    )


def _per_mini_step(
    setting: Setting, look: Mapping[str, Look], measure: Measure, caption: str, *, band: tuple[float, float] | None = None
) -> Plot | None:
    """A measure over the mini-steps; whiskers are intervals over seeds, `band` a range of the paper to compare with."""
    lines = []
    for index, method in enumerate(setting.methods):
        found = of_mini_steps(setting, method, measure)
        values, half = np.array([i.mean for i in found]), np.nan_to_num([i.half for i in found])
        shift = 0.3 * (index / max(1, len(setting.methods) - 1) - 0.5) * (len(setting.methods) > 1)
        style: dict[str, Any] = {"linestyle": look[method].line, "linewidth": 1.4, "elinewidth": 0.9, "markersize": 3}
        line = Line(values, look[method].colour, short_name(method), error=half, shift=shift, style=style)
        lines += [line] if exists(values) else []

    def paint(axes: Axes) -> None:
        if band is not None:
            axes.axhspan(*band, color=LIGHT["grid"], alpha=0.7, linewidth=0, label="paper, off-8")

    panel = Panel("", lines, paint=paint if lines else None, ticks=measure.unit.form)
    title = f"{measure.short_title[0].upper()}{measure.short_title[1:]} per mini-step"
    name = f"{setting.slug}-{measure.key}-mini-steps"
    return chart(X("mini-step", np.arange(setting.kappa) + 1.0, whole=True), [panel], name, title, caption, height=2.6)


def _difference(setting: Setting, look: Mapping[str, Look], measure: Measure) -> Plot | None:
    """Paired differences to the baseline."""
    seeds = {method: differences(setting, method, measure) for method in setting.methods if method != setting.baseline}
    title = f"{measure.title}, difference to {short_name(setting.baseline)}".capitalize()
    caption = (
        f"Seed by seed against {setting.baseline}: small dots are seeds, the line is the 95 % interval of their mean. An interval "
        "that crosses zero shows no difference."
    )
    return _forest(setting, look, measure, seeds, "-difference", title, caption, rule=0.0)


def _values(setting: Setting, look: Mapping[str, Look], measure: Measure, caption: str, **options: Any) -> Plot | None:
    """A measure of every method."""
    seeds = {method: per_seed(setting, method, measure) for method in setting.methods}
    return _forest(setting, look, measure, seeds, "", measure.title[0].upper() + measure.title[1:], caption, **options)


def _forest(
    setting: Setting,
    look: Mapping[str, Look],
    measure: Measure,
    seeds: Mapping[str, Mapping[int, float]],
    suffix: str,
    title: str,
    caption: str,
    *,
    rule: float | None = None,
    marks: Mapping[str, float] | None = None,
) -> Plot | None:
    """One row per method: its seeds, their mean and its interval; `rule` is a line to compare with, `marks` a dot per method."""
    rows = {method: list(values.values()) for method, values in seeds.items() if exists(list(values.values()))}
    if not rows:
        return None
    figure, axes, position = figures.named_rows([short_name(method) for method in rows])
    if rule is not None:
        axes.axvline(rule, color=LIGHT["muted"], linewidth=1, linestyle="--" if rule else "-")
    for y, (method, values) in zip(position, rows.items(), strict=True):
        colour, dashes, found = LIGHT[look[method].colour], look[method].line, interval(values)
        axes.plot(values, [y] * len(values), linestyle="none", marker="o", markersize=3, color=colour, alpha=0.5)
        if found.known:
            axes.plot([found.low, found.high], [y, y], color=colour, linewidth=2.2, linestyle=dashes)
        if marks is not None:
            axes.plot([marks[method]], [y], marker="o", markersize=6, color=LIGHT["grey"])
        axes.plot([found.mean], [y], marker="D", markersize=5.5, color=colour, markerfacecolor=colour if dashes == "-" else "none")
    form = measure.unit.difference if rule == 0 and measure.unit.difference else measure.unit.form
    if form is formats.scientific:  # two digits tell values apart, but not ticks
        form = "{:.3g}".format
    axes.xaxis.set_major_locator(MaxNLocator(nbins=3))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))
    axes.margins(x=0.08)
    return figures.finish(figure, f"{setting.slug}-{measure.key}{suffix}", title, caption)


def _time(setting: Setting) -> Plot | None:
    """Time of a step by phase."""
    phases = {key: measures.phase_seconds(data) for key, data in setting.data.items()}
    names = list(dict.fromkeys(name for found in phases.values() for name in found))
    if not names:
        return None
    rows, ends = [], []
    for method, seeds in setting.methods.items():
        row = [float(np.mean([phases[method, seed].get(name, 0.0) for seed in seeds])) for name in names]
        rows.append((short_name(method), row))
        pace = of_method(setting, method, measures.THROUGHPUT).mean
        ends.append(f"{formats.count(pace)} tok/s" if math.isfinite(pace) else "")
    figure, axes = figures.stacked_rows(
        rows, [(STACK[i % len(STACK)], name.replace("_", " ")) for i, name in enumerate(names)], ends
    )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} s"))
    caption = "Mean time of one rollout step by phase; it includes whatever else the machine was doing at that time."
    return figures.finish(figure, f"{setting.slug}-time", "Time per step", caption)
