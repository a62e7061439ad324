"""Plots of one setting: a line or a row per method; None where nothing has a number."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from megatron_pr2.report import figures, formats
from megatron_pr2.report.comparison.numbers import Numbers, intervals
from megatron_pr2.report.comparison.runs import Setting
from megatron_pr2.report.figures import PAPER_COVERAGE_GAP, ZERO, Line, Panel, Plot, Plots, chart
from megatron_pr2.report.measures import BY_KEY, FINAL_REWARD, KL_PREDICTED, LATER_LIFT, LIFT, Measure
from megatron_pr2.report.plots import POINTS, smooth, window_of
from megatron_pr2.report.records import RunData
from megatron_pr2.report.theme import LIGHT, STACK

# More intervals than this on top of each other cannot be distinguished; the rows below the curves show them.
MOST_BANDS = 4
# arXiv 2606.00395 (draft), off-8: agreement falls from the second to the first of these over the mini-steps.
PAPER_AGREEMENT_OFF_8 = {"paper, off-8": 0.9825, "": 0.9975}
PALETTE = ("grey", "red", "blue", "purple", "orange", "green")
FEW = ("blue", "orange", "green", "purple")
DASHES = ("-", ":", "-.")
HOLD = "+hold"
NAME_WIDTH = 26
PER_MINI_STEP = {
    "lift_all": "Lift by mini-step: predicted routes are the same in all of them, so the first ones lose and the later ones gain.",
    "ratio_variance": "How differently the updated policy scores the sampled tokens: growth over the mini-steps means instability.",
    "clip_fraction": "Share of tokens whose ratio was clipped: the policy learns nothing from them.",
    "approx_kl": "Estimated KL of the updated policy from the one that sampled.",
}


class Look(NamedTuple):
    """How a method is drawn, the same in every plot."""

    colour: str
    dashes: str = "-"


def looks(settings: Sequence[Setting]) -> dict[str, Look]:
    """A look per method; one that only adds hold-back to another is drawn in its colour, dashed."""
    names = list(dict.fromkeys(name for setting in settings for name in setting.methods))
    baselines = {setting.baseline for setting in settings}
    bases = [name for name in dict.fromkeys(name.removesuffix(HOLD) for name in names) if name not in baselines]
    palette = FEW if len(bases) <= len(FEW) else PALETTE
    colours = {base: Look(palette[i % len(palette)], DASHES[i // len(palette) % len(DASHES)]) for i, base in enumerate(bases)}
    own = {name: colours.get(name.removesuffix(HOLD), Look("ink")) for name in names}
    return {name: look._replace(dashes="--") if name.endswith(HOLD) else look for name, look in own.items()}


def short_name(name: str) -> str:
    """A name that fits beside a plot."""
    return name if len(name) <= NAME_WIDTH else f"{name[: NAME_WIDTH - 9]}…{name[-8:]}"


def capital(text: str) -> str:
    """With a capital letter, the rest as it is."""
    return text[0].upper() + text[1:]


class SettingPlots:
    """The plots of a setting, whose names begin with its slug."""

    def __init__(self, setting: Setting, numbers: Numbers, look: dict[str, Look]) -> None:
        self.setting, self.numbers, self.look = setting, numbers, look

    def first(self) -> Plots:
        """What is shown at once."""
        rollouts = self.setting.lengths[0]
        window = window_of(rollouts)
        bands = len(self.setting.methods) <= MOST_BANDS
        caption = "Mean over seeds" + (f" of the running mean over {window} rollouts" if window > 1 else "")
        caption = f"{caption}{', with 95 % intervals' if bands else ''}. Higher is better."
        yield self._curves("reward", "Reward", caption, "mean reward", lambda d: _running(d, d["reward"], window), bands=bands)
        yield self._difference(FINAL_REWARD)
        caption = (
            "Agreement of the replayed routes minus that of frozen ones in the same run, all mini-steps: small dots are seeds, "
            "the line is the 95 % interval of their mean. Above zero prediction helps."
        )
        yield self._values(LIFT, caption, rule=0.0)

        window = max(1, rollouts // 6)
        caption = f"Running mean over {window} rollouts, mean over seeds: above zero prediction helps, below zero it hurts."
        curve = lambda d: _running(d, 100 * d["lift_all"], window)  # noqa: E731
        yield self._curves("lift-curve", "Lift over the run", caption, POINTS, curve, ZERO)

        changed = {
            short_name(method): pd.concat([self.setting.data[method, seed].changed().iloc[1:] for seed in seeds]).mean()
            for method, seeds in self.setting.methods.items()
        }
        caption = (
            "Share of (token, layer) pairs with 1, 2 or more experts that the updated router would not choose, mini-steps from the "
            "second on; the number is the share without any. Shorter bars are better."
        )
        yield figures.changed_rows(f"{self.setting.slug}-changed", "Changed experts per token and layer", caption, changed)

        caption = (
            "Share of the replayed experts that the updated router would choose too, higher is better; whiskers are 95 % intervals "
            "over seeds. The paper reports 96 to 99 %, and 99.75 % falling to 98.25 % over the mini-steps of off-8."
        )
        yield self._per_mini_step(BY_KEY["agreement"], caption, PAPER_AGREEMENT_OFF_8 if self.setting.mini_steps == 8 else {})

    def more(self) -> Plots:
        """What is shown on demand."""
        caption = "Share of the prediction that is used: 0 is replay without prediction, 1 the whole prediction."
        yield self._curves("beta", "Hold-back", caption, "β, mean of the layers", lambda d: d["hold_back.beta.*"])
        yield self._difference(BY_KEY["reward_mean"])
        caption = "Lift without the first mini-step, in which nothing has drifted yet and prediction can only cost."
        yield self._values(LATER_LIFT, caption, rule=0.0)
        caption = "KL(ρ‖q̂), mini-steps from the second on, lower is better; the grey dot is KL(ρ‖ρ_old) of frozen routes there."
        yield self._values(KL_PREDICTED, caption, marks=BY_KEY["kl_frozen"])
        caption = (
            "Router probability of its own top-k minus that of the replayed experts, lower is better. "
            f"The dashed line is the largest per-layer value that the paper reports, {PAPER_COVERAGE_GAP}."
        )
        yield self._values(BY_KEY["coverage_gap"], caption, rule=PAPER_COVERAGE_GAP)
        for key, caption in PER_MINI_STEP.items():
            yield self._per_mini_step(BY_KEY[key], caption)
        caption = "Mean |log-prob of the engine - log-prob of the actor| of the same tokens before any update, lower is better."
        yield self._values(BY_KEY["logprob_gap"], caption)
        yield self._time()

    def _curves(
        self, name: str, title: str, caption: str, y: str, read: Callable[[RunData], pd.Series],
        rules: Mapping[str, float] | None = None, bands: bool = False,
    ) -> Plot | None:  # fmt: skip
        """Something over rollouts, mean over seeds."""
        lines = []
        for method, seeds in self.setting.methods.items():
            curves = pd.concat({seed: read(self.setting.data[method, seed]) for seed in seeds}, axis=1)
            half = intervals(curves.stack().rename("value").reset_index(level=0), ["rollout step"])["half"] if bands else None
            half = None if half is None else half.reindex(curves.index)
            look = self.look[method]
            lines.append(Line(curves.mean(axis=1), look.colour, short_name(method), half, {"linestyle": look.dashes}))
        return chart(f"{self.setting.slug}-{name}", title, caption, Panel(y, lines, rules=rules or {}), height=2.6)

    def _per_mini_step(self, measure: Measure, caption: str, rules: Mapping[str, float] | None = None) -> Plot | None:
        """A measure over the mini-steps; whiskers are intervals over seeds."""
        lines = []
        for method, look in ((method, self.look[method]) for method in self.setting.methods):
            found = self.numbers.of_mini_steps(self.setting, method, measure)
            style: dict[str, Any] = {"linestyle": look.dashes, "linewidth": 1.4, "elinewidth": 0.9, "markersize": 3}
            lines += [Line(found["mean"], look.colour, short_name(method), found["half"], style)] if len(found) else []
        title = f"{capital(measure.short_title)} per mini-step"
        panel = Panel("", lines, kind="error", spread=0.3, form=measure.unit.form, rules=rules or {})
        return chart(f"{self.setting.slug}-{measure.key}-mini-steps", title, caption, panel, height=2.6)

    def _difference(self, measure: Measure) -> Plot | None:
        """Paired differences to the baseline."""
        base = self.setting.baseline
        caption = (
            f"Seed by seed against {base}: small dots are seeds, the line is the 95 % interval of their mean. An interval "
            "that crosses zero shows no difference."
        )
        title = f"{measure.title}, difference to {short_name(base)}".capitalize()
        return self._rows(measure, title, caption, "-difference", rule=0.0, difference=True)

    def _values(self, measure: Measure, caption: str, **options: Any) -> Plot | None:
        """A measure of every method."""
        return self._rows(measure, capital(measure.title), caption, **options)

    def _rows(
        self, measure: Measure, title: str, caption: str, suffix: str = "", *,
        rule: float | None = None, marks: Measure | None = None, difference: bool = False,
    ) -> Plot | None:  # fmt: skip
        """A row per method: its seeds, their mean and its interval; `rule` is a line to compare with, `marks` a dot per method."""
        seeds = self.numbers.seeds(self.setting, measure, difference=difference)
        if seeds.empty:
            return None
        figure, axes = figures.named_rows(len(seeds))
        axes.set_yticks(range(len(seeds)), map(short_name, seeds.index))
        if rule is not None:
            axes.axvline(rule, color=LIGHT["muted"], linewidth=1, linestyle="--" if rule else "-")
        read = self.numbers.against_baseline if difference else self.numbers.of_method
        for y, (method, values) in enumerate(seeds.iterrows()):
            look, found = self.look[method], read(self.setting, method, measure)
            colour = LIGHT[look.colour]
            axes.plot(values, [y] * len(values), linestyle="none", marker="o", markersize=3, color=colour, alpha=0.5)
            ends = [found.mean - found.half, found.mean + found.half]
            axes.plot(ends, [y, y], color=colour, linewidth=2.2, linestyle=look.dashes)
            if marks is not None:
                mark = self.numbers.of_method(self.setting, method, marks).mean
                axes.plot([mark], [y], marker="o", markersize=6, color=LIGHT["grey"])
            fill = colour if look.dashes == "-" else "none"
            axes.plot([found.mean], [y], marker="D", markersize=5.5, color=colour, markerfacecolor=fill)
        form = measure.unit.difference if rule == 0 and measure.unit.difference else measure.unit.form
        if form is formats.scientific:  # two digits tell values apart, but not ticks
            form = "{:.3g}".format
        axes.xaxis.set_major_formatter(lambda value, _: form(value))
        axes.margins(x=0.08)
        return figures.finish(figure, f"{self.setting.slug}-{measure.key}{suffix}", title, caption)

    def _time(self) -> Plot | None:
        """Time of a step by phase."""
        cells = self.numbers.means.reset_index()
        cells = cells[(cells["setting"] == self.setting.label) & cells["measure"].str.startswith("seconds_")]
        if cells.empty:
            return None
        table = cells.pivot(index="method", columns="measure", values="mean")[list(dict.fromkeys(cells["measure"]))]
        table = table.reindex([method for method in self.setting.methods if method in table.index])
        pace = [self.numbers.of_method(self.setting, method, BY_KEY["tokens_per_second"]).mean for method in table.index]
        ends = [f"{formats.count(value)} tok/s" if value == value else "" for value in pace]
        table.index = table.index.map(short_name)
        table.columns = [name.removeprefix("seconds_").replace("_", " ") for name in table]
        caption = "Mean time of one rollout step by phase; it includes whatever else the machine was doing at that time."
        colours = [STACK[i % len(STACK)] for i in range(table.shape[1])]
        return figures.stacked_rows(f"{self.setting.slug}-time", "Time per step", caption, table, colours, ends, "{:g} s".format)


def _running(data: RunData, values: pd.Series, window: int) -> pd.Series:
    return smooth(values, max(1, window // data.bin_size))
