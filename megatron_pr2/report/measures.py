"""MEASURES: the one table of what pages, Markdown and CSV files say of a run. A line here is a column, and a row, in all of them.

A measure is one number per run, read from its records, and the same per mini-step where that exists.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pandas as pd

from megatron_pr2.report import formats
from megatron_pr2.report.records import RunData

Form = Callable[[float], str]


class Unit(NamedTuple):
    """How people read a value, and a difference of two; without the latter no interval is shown."""

    form: Form
    difference: Form | None


class Measure(NamedTuple):
    """A column.

    Attributes:
        key: in CSV files and in the names of plots.
        title: heading of its columns and plots.
        better: +1 more is better, -1 less is better, 0 neither.
        column: of RunData, as a pattern; the key by default. Or how to read the number of a run. `{kappa}` is the last mini-step.
        each: the name of a mini-step's number; the key by default.
    """

    key: str
    title: str
    unit: Unit
    better: int = 0
    column: str | Callable[[RunData], float] = ""
    each: str = ""

    @property
    def short_title(self) -> str:
        """Without what it says of mini-steps."""
        return self.title.split(",")[0]

    def read(self, data: RunData) -> float:
        """The number of a run, NaN where it has none."""
        column = self.column or self.key
        return data.mean(column.format(kappa=data.kappa)) if isinstance(column, str) else column(data)

    def per_mini_step(self, data: RunData) -> pd.Series:
        """Mean over the rollouts by mini-step; empty where there is none."""
        return data.means(f"mini_steps.#.{self.each or self.key}").dropna()


def _pp(digits: int) -> Form:
    return partial(formats.points, digits=digits)


def _seconds(sign: str = "") -> Form:
    return lambda value: f"{value:{sign}.2f} s" if math.isfinite(value) else formats.ABSENT


NUMBER = Unit(formats.fixed, partial(formats.fixed, sign="+"))
POINTS = Unit(_pp(3), _pp(3))
PERCENT = Unit(formats.percent, formats.points)
PERCENT_1 = Unit(partial(formats.percent, digits=1), _pp(1))
SCIENTIFIC = Unit(formats.scientific, partial(formats.scientific, sign="+"))
SHARE = Unit(formats.percent, None)
TOKENS = Unit(formats.count, NUMBER.difference)
SECONDS = Unit(_seconds(), _seconds("+"))

FINAL_REWARD = Measure("reward_final", "final reward", NUMBER, 1, lambda data: data.ends("reward")[1])
# The first mini-step, in which a prediction can only be wrong, counts as well: the verdict is about all of them.
LIFT = Measure("lift_all", "lift", POINTS, 1, each="lift")
LATER_LIFT = Measure("lift", "lift, mini-steps from the second on", POINTS, 1, each="none")
MEASURES = (
    # Shares of (token, layer) pairs with so many changed experts.
    *(
        Measure(f"changed_{c}", title, SHARE, each=f"changed.{c + 1}")
        for c, title in enumerate(("0 changed", "1", "2", "3 or more"))
    ),
    FINAL_REWARD,
    Measure("reward_mean", "mean reward", NUMBER, 1, "reward"),
    LIFT,
    LATER_LIFT,
    Measure("mismatches_removed", "mismatches removed", PERCENT_1, 1, RunData.removed),
    Measure("agreement", "agreement", PERCENT, 1),
    Measure("frozen_agreement", "frozen agreement", PERCENT),
    Measure("kl_predicted", "KL(ρ‖q̂)", SCIENTIFIC, -1, "mini_steps.+.kl_predicted"),
    Measure("kl_frozen", "KL(ρ‖ρ_old)", SCIENTIFIC, 0, "mini_steps.+.kl_frozen"),
    Measure("coverage_gap", "coverage gap", SCIENTIFIC, -1, "mini_steps.+.coverage_gap"),
    Measure("outside_mass", "mass outside", SCIENTIFIC, 0, "mini_steps.+.outside_mass"),
    Measure("ratio_variance", "ratio variance, last mini-step", SCIENTIFIC, -1, "mini_steps.{kappa}.ratio_variance"),
    Measure("clip_fraction", "clip fraction", PERCENT),
    Measure("approx_kl", "policy KL, last mini-step", SCIENTIFIC, 0, "mini_steps.{kappa}.approx_kl"),
    Measure("logprob_gap", "log-prob gap, engine to actor", SCIENTIFIC, -1, "logprob_gap.mean"),
    Measure("hold_back_beta", "hold-back β", NUMBER, 0, "hold_back.beta.*"),
    Measure("delivered", "share of the prediction that arrived", PERCENT, 1, "delivered.*"),
    Measure("step_seconds", "time per step", SECONDS, -1, "wall_seconds"),
    Measure("tokens_per_second", "tokens per second", TOKENS, 1),
)
BY_KEY = {measure.key: measure for measure in MEASURES}
