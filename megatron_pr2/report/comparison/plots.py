"""Plots of one setting: a line or a row per method; None where nothing has a number."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from megatron_pr2.report import figures, formats
from megatron_pr2.report.comparison.numbers import Numbers, intervals
from megatron_pr2.report.comparison.runs import Setting
from megatron_pr2.report.figures import ZERO, Line, Panel, Plot, Plots, chart
from megatron_pr2.report.measures import BY_KEY, FINAL_REWARD, LATER_LIFT, LIFT, Measure
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
NONE: Mapping[str, float] = {}


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


class SettingPlots:
    """The plots of a setting, whose names begin with its slug."""

    def __init__(self, setting: Setting, numbers: Numbers, look: dict[str, Look]) -> None:
        self.setting, self.numbers, self.look, self.prefix = setting, numbers, look, f"{setting.slug}-"
        self.bands = len(setting.methods) <= MOST_BANDS

    def facts(self) -> dict[str, object]:
        """What the captions say of this setting."""
        rollouts = self.setting.lengths[0]
        curve = f" of the running mean over {window_of(rollouts)} rollouts" if window_of(rollouts) > 1 else ""
        curve += ", with 95 % intervals" if self.bands else ""
        return {"base": short_name(self.setting.baseline), "curve": curve, "window": max(1, rollouts // 6)}

    def first(self) -> Plots:
        """What is shown at once."""
        rollouts, methods = self.setting.lengths[0], self.setting.methods
        yield self._curves("reward", "mean reward", lambda d: _running(d, d["reward"], window_of(rollouts)), bands=self.bands)
        yield self._rows(FINAL_REWARD, "-difference", rule=0.0, difference=True)
        yield self._rows(LIFT, rule=0.0)
        yield self._curves("lift-curve", POINTS, lambda d: _running(d, 100 * d["lift_all"], max(1, rollouts // 6)), rules=ZERO)
        later = {name: [self.setting.data[name, seed].changed().iloc[1:] for seed in seeds] for name, seeds in methods.items()}
        yield figures.changed_rows(f"{self.prefix}changed", {short_name(m): pd.concat(t).mean() for m, t in later.items()})
        yield self._per_mini_step(BY_KEY["agreement"], PAPER_AGREEMENT_OFF_8 if self.setting.mini_steps == 8 else {})

    def more(self) -> Plots:
        """What is shown on demand."""
        yield self._curves("beta", "β, mean of the layers", lambda d: d["hold_back.beta.*"])
        yield self._rows(BY_KEY["reward_mean"], "-difference", rule=0.0, difference=True)
        yield self._rows(LATER_LIFT, rule=0.0)
        yield self._per_mini_step(LIFT)
        yield self._rows(BY_KEY["kl_predicted"], marks=BY_KEY["kl_frozen"])
        yield self._rows(BY_KEY["coverage_gap"], rule=figures.PAPER_COVERAGE_GAP)
        for key in ("ratio_variance", "clip_fraction", "approx_kl"):
            yield self._per_mini_step(BY_KEY[key])
        yield self._rows(BY_KEY["logprob_gap"])
        yield self._time()

    def _curves(
        self, key: str, y: str, read: Callable[[RunData], pd.Series], *, rules: Mapping[str, float] = NONE, bands: bool = False
    ) -> Plot | None:
        """Something over rollouts, mean over seeds."""
        lines = []
        for method, seeds in self.setting.methods.items():
            curves = pd.concat({seed: read(self.setting.data[method, seed]) for seed in seeds}, axis=1)
            values = curves.stack().rename("value").reset_index(level=0)
            half = intervals(values, ["rollout step"])["half"].reindex(curves.index) if bands else None
            look = self.look[method]
            lines.append(Line(curves.mean(axis=1), look.colour, short_name(method), half, {"linestyle": look.dashes}))
        return chart(f"{self.prefix}{key}", Panel(y, lines, rules=rules), height=2.6)

    def _per_mini_step(self, measure: Measure, rules: Mapping[str, float] = NONE) -> Plot | None:
        """A measure over the mini-steps; whiskers are intervals over seeds."""
        lines = []
        for method, look in ((method, self.look[method]) for method in self.setting.methods):
            found = self.numbers.of_mini_steps(self.setting, method, measure)
            style: dict[str, Any] = {"linestyle": look.dashes, "linewidth": 1.4, "elinewidth": 0.9, "markersize": 3}
            lines += [Line(found["mean"], look.colour, short_name(method), found["half"], style)] if len(found) else []
        panel = Panel("", lines, kind="error", spread=0.3, form=measure.unit.form, rules=rules)
        return chart(f"{self.prefix}{measure.key}-mini-steps", panel, height=2.6)

    def _rows(
        self, measure: Measure, suffix: str = "", rule: float | None = None, marks: Measure | None = None, difference: bool = False
    ) -> Plot | None:
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
            if marks is not None:
                axes.plot(self.numbers.of_method(self.setting, method, marks).mean, y, "o", markersize=6, color=LIGHT["grey"])
            fill = colour if look.dashes == "-" else "none"
            style: dict[str, Any] = {"fmt": "D", "markersize": 5.5, "color": colour, "markerfacecolor": fill, "elinewidth": 2.2}
            _, _, whiskers = axes.errorbar(found.mean, y, xerr=np.nan_to_num(found.half), **style)
            whiskers[0].set_linestyle(look.dashes)
        form = measure.unit.difference if rule == 0 and measure.unit.difference else measure.unit.form
        if form is formats.scientific:  # two digits tell values apart, but not ticks
            form = "{:.3g}".format
        axes.xaxis.set_major_formatter(lambda value, _: form(value))
        axes.margins(x=0.08)
        return figures.finish(figure, f"{self.prefix}{measure.key}{suffix}")

    def _time(self) -> Plot | None:
        """Time of a step by phase."""
        cells = self.numbers.means.reset_index()
        cells = cells[(cells["setting"] == self.setting.label) & cells["measure"].str.startswith("seconds_")]
        if cells.empty:
            return None
        table = cells.pivot(index="method", columns="measure", values="mean")[list(dict.fromkeys(cells["measure"]))]
        table = table.reindex(list(dict.fromkeys(cells["method"])))
        pace = [self.numbers.of_method(self.setting, method, BY_KEY["tokens_per_second"]).mean for method in table.index]
        ends = [f"{formats.count(value)} tok/s" if value == value else "" for value in pace]
        table = table.rename(index=short_name, columns=lambda name: name.removeprefix("seconds_").replace("_", " "))
        colours = [STACK[i % len(STACK)] for i in range(table.shape[1])]
        return figures.stacked_rows(f"{self.prefix}time", table, colours, ends, "{:g} s".format)


def _running(data: RunData, values: pd.Series, window: int) -> pd.Series:
    return smooth(values, max(1, window // data.bin_size))
