"""Numbers: a frame with a row per run, measure and mini-step, and the means over seeds and differences that are made from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd
from scipy.special import stdtrit

from megatron_pr2.report.comparison.runs import Setting
from megatron_pr2.report.measures import MEASURES, Form, Measure

CONFIDENCE = 0.95
BETTER, WORSE, SAME, UNKNOWN = "better", "worse", "no different", "not known"
CELLS = ["run", "method", "mini_steps", "lr", "setting", "seed", "rollouts", "measure", "mini_step", "value"]
KEY = ["setting", "method", "measure"]


class Interval(NamedTuple):
    """A mean and half the width of its confidence interval: NaN where there is no value, or fewer than two."""

    mean: float = math.nan
    half: float = math.nan
    seeds: int = 0

    def verdict(self, better: int = 1) -> str:
        """BETTER or WORSE where the whole interval is on one side of zero, SAME where it is not, UNKNOWN without an interval."""
        if not math.isfinite(self.half):
            return UNKNOWN
        return SAME if abs(self.mean) <= self.half else BETTER if self.mean * better > 0 else WORSE

    def text(self, measure: Measure, form: Form | None = None) -> str:
        """ "0.512 ± 0.031", or the mean alone where there is one seed."""
        of_half = measure.unit.difference
        text = (form or measure.unit.form)(self.mean)
        return f"{text} ± {of_half(self.half).lstrip('+')}" if of_half and math.isfinite(self.half) else text


def intervals(table: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Means of `value` by group with Student's t interval: mean +- t(n - 1) * standard deviation / sqrt(n)."""
    found = table.groupby(by, sort=False)["value"].agg(["mean", "count", "sem", "nunique"])
    # Equal values have no spread, whatever the rounding of their mean says.
    spread = found["sem"].where((found["nunique"] > 1) | (found["count"] < 2), 0.0)
    half = stdtrit((found["count"] - 1).clip(lower=1), 0.5 + CONFIDENCE / 2) * spread
    return found.assign(half=half, low=found["mean"] - half, high=found["mean"] + half)[["mean", "low", "high", "half", "count"]]


def interval(values: pd.Series) -> Interval:
    """Of the values that exist."""
    found = intervals(pd.DataFrame({"value": values.dropna(), "all": 0}), ["all"])
    return Interval(*found[["mean", "half", "count"]].iloc[0]) if len(found) else Interval()


class Numbers:
    """What is known of the methods.

    A seed decides the first weights and the prompts, which differ more between seeds than methods do within one: a method is
    compared with its setting's baseline seed by seed.

    Attributes:
        cells: tidy, with columns CELLS; a number of the whole run has no mini-step. Besides MEASURES there are `seconds_*`, the
            mean seconds of a step's phases.
        means, mini_steps, compared: intervals over seeds, by KEY: of the numbers of whole runs, per mini-step, and of the paired
            differences to the baseline.
    """

    def __init__(self, settings: Sequence[Setting]) -> None:
        rows = []
        for setting in settings:
            for method, seed, run in setting.runs():
                data = setting.data[method, seed]
                head = (run.name, method, setting.mini_steps, setting.lr, setting.label, seed, setting.lengths[0])
                for m in MEASURES:
                    rows.append((*head, m.key, None, m.read(data)))
                    rows += [(*head, m.key, step, value) for step, value in m.per_mini_step(data).items()]
                phases = data.group("seconds", data.rollouts).mean()
                rows += [(*head, f"seconds_{phase}", None, value) for phase, value in phases.items()]
        self.cells = pd.DataFrame(rows, columns=CELLS).astype({"mini_step": "Int64"}).dropna(subset="value")
        self.whole = self.cells[self.cells["mini_step"].isna()]
        base = self.whole[self.whole["method"] == self.whole["setting"].map({s.label: s.baseline for s in settings})]
        paired = self.whole.merge(base, on=["setting", "seed", "measure"], suffixes=("", "_base"))
        paired = paired[paired["method"] != paired["method_base"]]
        self.differences = paired.assign(value=paired["value"] - paired["value_base"])
        self.means, self.compared = intervals(self.whole, KEY), intervals(self.differences, KEY)
        self.mini_steps = intervals(self.cells[self.cells["mini_step"].notna()], [*KEY, "mini_step"])

    def of_method(self, setting: Setting, method: str, measure: Measure) -> Interval:
        """Mean over seeds."""
        return _at(self.means, (setting.label, method, measure.key))

    def against_baseline(self, setting: Setting, method: str, measure: Measure) -> Interval:
        """Mean of the paired differences."""
        return _at(self.compared, (setting.label, method, measure.key))

    def of_mini_steps(self, setting: Setting, method: str, measure: Measure) -> pd.DataFrame:
        """Intervals by mini-step, without a row where nothing is known."""
        key = (setting.label, method, measure.key)
        found = self.mini_steps.loc[key] if key in self.mini_steps.index else self.mini_steps.iloc[:0].droplevel(KEY)
        return found.rename_axis("mini-step")

    def seeds(self, setting: Setting, measure: Measure, *, difference: bool = False) -> pd.DataFrame:
        """The number of every run of a setting, or its difference to the baseline: a row per method, a column per seed."""
        table = self.differences if difference else self.whole
        chosen = table[(table["setting"] == setting.label) & (table["measure"] == measure.key)]
        return chosen.pivot(index="method", columns="seed", values="value").reindex(list(dict.fromkeys(chosen["method"])))

    def over_settings(self, method: str, measure: Measure, *, difference: bool) -> Interval:
        """One interval for all settings that have the method, of its values or of its differences to each other baseline.

        Runs of one seed start from the same weights whatever the setting, so they are no independent observations: each seed's mean
        over the settings is one. Seeds that some of these settings lack are left out.
        """
        table = self.differences if difference else self.whole
        chosen = table[(table["method"] == method) & (table["measure"] == measure.key)]
        return interval(chosen.pivot(index="seed", columns="setting", values="value").dropna().mean(axis=1))


def _at(table: pd.DataFrame, key: tuple[object, ...]) -> Interval:
    return Interval(*table.loc[key, ["mean", "half", "count"]]) if key in table.index else Interval()
