"""What is compared: MEASURES is the one table from which the CSV, the Markdown and the page take their columns and plots.

A measure is one number per run, read from its records; over the seeds of a method it becomes an interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_pr2.report import formats
from megatron_pr2.report.comparison.runs import Setting
from megatron_pr2.report.comparison.stats import Interval, interval, paired
from megatron_pr2.report.figures import Form
from megatron_pr2.report.metrics_log import first_and_last_fifth
from megatron_pr2.report.page import Cell
from megatron_pr2.report.records import Array, RunData, mean, mini_steps_of, number


@dataclass(frozen=True)
class Unit:
    """How people read a value, and a difference of two; without the latter no interval is shown."""

    form: Form
    difference: Form | None


@dataclass(frozen=True)
class Measure:
    """A column.

    Attributes:
        key: in CSV files and in the names of plots.
        title: heading of its columns and plots.
        read: the number of a run, NaN where it has none.
        better: +1 more is better, -1 less is better, 0 neither.
        per_mini_step: the same per mini-step, [kappa], where that exists.
    """

    key: str
    title: str
    unit: Unit
    read: Callable[[RunData], float]
    better: int = 0
    per_mini_step: Callable[[RunData], Array] | None = None

    @property
    def short_title(self) -> str:
        """Without what it says of mini-steps."""
        return self.title.split(",")[0]

    def cell(self, value: Interval, difference: bool = False) -> Cell:
        """ "0.512 ± 0.031", or the mean alone where there is one seed."""
        form = self.unit.difference or self.unit.form
        text = (form if difference else self.unit.form)(value.mean)
        known = self.unit.difference is not None and value.known and math.isfinite(value.mean)
        return Cell(f"{text} ± {form(value.half).lstrip('+')}" if known else text)


def _column(*keys: str) -> Callable[[RunData], float]:
    return lambda data: float(mean(data.column(*keys)))


def _later(key: str) -> Callable[[RunData], float]:
    return lambda data: float(mean(data.later_mini_steps(key)))


def _each(key: str) -> Callable[[RunData], Array]:
    return lambda data: data.mini_step_means(key)


def _last(read: Callable[[RunData], Array]) -> Callable[[RunData], float]:
    return lambda data: float(values[-1]) if (values := read(data)).size else math.nan


def _changed(experts: int) -> Callable[[RunData], Array]:
    return lambda data: data.changed_means()[:, experts]


def _removed(data: RunData) -> float:
    mismatch = 1 - float(mean(data.mini_step_means("frozen_agreement")))
    return float(mean(data.lift_all())) / mismatch if mismatch > 1e-12 else math.nan


def _ratio_variance(data: RunData) -> Array:
    values = [[number(e, "ratio_std") ** 2 for e in mini_steps_of(r)] for r in data.records]
    padded = [row + [math.nan] * (data.kappa - len(row)) for row in values]
    return np.asarray(mean(np.array(padded), axis=0)) if data.kappa else np.empty(0)


def beta(data: RunData) -> Array:
    """[P] mean over layers of the hold-back's beta."""
    return np.asarray(mean(data.layer_columns("hold_back", "beta"), axis=0))


def phase_seconds(data: RunData) -> dict[str, float]:
    """Mean seconds of a step's phases."""
    timed = [r for r in data.records if r.get("seconds")]
    return {name: float(np.nan_to_num([number(r, "seconds", name) for r in timed]).mean()) for name in data.keys_of("seconds")}


def _finite(form: str, small: str | None = None, unit: str = "") -> Form:
    """A format; `small` where `form` would show nothing but zeros."""

    def text(value: float) -> str:
        if not math.isfinite(value):
            return formats.ABSENT
        return f"{value:{small if small and 0 < abs(value) < 5e-4 else form}}{unit}"

    return text


NUMBER = Unit(formats.fixed, _finite("+.3f", "+.1e"))
POINTS = Unit(lambda v: formats.points(v, 3), lambda v: formats.points(v, 3))
PERCENT = Unit(formats.percent, formats.points)
PERCENT_1 = Unit(lambda v: formats.percent(v, 1), lambda v: formats.points(v, 1))
SCIENTIFIC = Unit(formats.scientific, _finite("+.1e"))
SHARE = Unit(formats.percent, None)
TOKENS = Unit(formats.count, NUMBER.difference)
SECONDS = Unit(_finite(".2f", unit=" s"), _finite("+.2f", unit=" s"))

FINAL_REWARD = Measure("reward_final", "final reward", NUMBER, lambda data: first_and_last_fifth(data.records)["last"], 1)
MEAN_REWARD = Measure("reward_mean", "mean reward", NUMBER, _column("reward"), 1)
# The first mini-step, in which a prediction can only be wrong, counts as well: the verdict is about all of them.
LIFT = Measure("lift_all", "lift", POINTS, lambda data: float(mean(data.lift_all())), 1, _each("lift"))
LATER_LIFT = Measure("lift", "lift, mini-steps from the second on", POINTS, _column("lift"), 1)
REMOVED = Measure("mismatches_removed", "mismatches removed", PERCENT_1, _removed, 1)
AGREEMENT = Measure("agreement", "agreement", PERCENT, _column("agreement"), 1, _each("agreement"))
FROZEN = Measure("frozen_agreement", "frozen agreement", PERCENT, _column("frozen_agreement"), 0, _each("frozen_agreement"))
KL_PREDICTED = Measure("kl_predicted", "KL(ρ‖q̂)", SCIENTIFIC, _later("kl_predicted"), -1, _each("kl_predicted"))
KL_FROZEN = Measure("kl_frozen", "KL(ρ‖ρ_old)", SCIENTIFIC, _later("kl_frozen"), 0, _each("kl_frozen"))
COVERAGE = Measure("coverage_gap", "coverage gap", SCIENTIFIC, _later("coverage_gap"), -1, _each("coverage_gap"))
RATIO_VARIANCE = Measure(
    "ratio_variance", "ratio variance, last mini-step", SCIENTIFIC, _last(_ratio_variance), -1, _ratio_variance
)
CLIP = Measure("clip_fraction", "clip fraction", PERCENT, _column("clip_fraction"), 0, _each("clip_fraction"))
POLICY_KL = Measure("approx_kl", "policy KL, last mini-step", SCIENTIFIC, _last(_each("approx_kl")), 0, _each("approx_kl"))
GAP = Measure("logprob_gap", "log-prob gap, engine to actor", SCIENTIFIC, _column("logprob_gap", "mean"), -1)
BETA = Measure("hold_back_beta", "hold-back β", NUMBER, lambda data: float(mean(beta(data))))
STEP_TIME = Measure("step_seconds", "time per step", SECONDS, _column("wall_seconds"), -1)
THROUGHPUT = Measure("tokens_per_second", "tokens per second", TOKENS, _column("tokens_per_second"), 1)
# Shares of (token, layer) pairs with so many changed experts, 3 or more in the last.
CHANGED = tuple(
    Measure(f"changed_{c}", title, SHARE, lambda _: math.nan, per_mini_step=_changed(c))
    for c, title in enumerate(("0 changed", "1", "2", "3 or more"))
)

MEASURES = (
    *CHANGED, FINAL_REWARD, MEAN_REWARD, LIFT, LATER_LIFT, REMOVED, AGREEMENT, FROZEN, KL_PREDICTED, KL_FROZEN, COVERAGE,
    RATIO_VARIANCE, CLIP, POLICY_KL, GAP, BETA, STEP_TIME, THROUGHPUT,
)  # fmt: skip


def per_seed(setting: Setting, method: str, measure: Measure) -> dict[int, float]:
    """The number of every run of a method."""
    for seed in setting.methods[method]:
        if (method, seed, measure.key) not in setting.read:
            setting.read[method, seed, measure.key] = measure.read(setting.data[method, seed])
    return {seed: setting.read[method, seed, measure.key] for seed in setting.methods[method]}


def differences(setting: Setting, method: str, measure: Measure) -> dict[int, float]:
    """Of a method to the baseline, by seed."""
    return paired(per_seed(setting, method, measure), per_seed(setting, setting.baseline, measure))


def of_method(setting: Setting, method: str, measure: Measure) -> Interval:
    """Mean over seeds."""
    return interval(per_seed(setting, method, measure).values())


def against_baseline(setting: Setting, method: str, measure: Measure) -> Interval:
    """Mean of the paired differences to the setting's baseline."""
    return interval(differences(setting, method, measure).values())


def of_mini_steps(setting: Setting, method: str, measure: Measure) -> list[Interval]:
    """Mean over seeds of every mini-step; empty where the measure does not exist per mini-step."""
    if (read := measure.per_mini_step) is None:
        return []
    values = [read(setting.data[method, seed]) for seed in setting.methods[method]]
    return [interval(float(v[position]) for v in values if position < v.size) for position in range(setting.kappa)]


def over_settings(settings: Sequence[Setting], method: str, measure: Measure, *, difference: bool) -> Interval:
    """One interval for all settings that have the method, of its values or of its differences to each other baseline.

    Runs of one seed start from the same weights whatever the setting, so they are no independent observations: each seed's mean
    over the settings is one. Seeds that some of these settings lack are left out.
    """
    read = differences if difference else per_seed
    rows = []
    for setting in settings:
        if method in setting.methods and not (difference and method == setting.baseline):
            rows.append({seed: value for seed, value in read(setting, method, measure).items() if math.isfinite(value)})
    rows = [row for row in rows if row]
    common = set.intersection(*map(set, rows)) if rows else set()
    return interval([float(np.mean([row[seed] for row in rows])) for seed in sorted(common)])
