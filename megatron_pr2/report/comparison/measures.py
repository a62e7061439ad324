"""What is compared: one number per run and measure, read from its records, and intervals over seeds per setting and method."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_pr2.report import formats
from megatron_pr2.report.comparison.runs import Setting
from megatron_pr2.report.comparison.stats import Interval, interval, paired
from megatron_pr2.report.metrics_log import first_and_last_fifth
from megatron_pr2.report.records import Array, RunData, mean, mini_steps_of, number


@dataclass(frozen=True)
class Measure:
    """A number of a run.

    Attributes:
        form: how people read a value.
        form_difference: how they read a difference of two.
        read: the number, NaN where the run has none.
        better: +1 more is better, -1 less is better, 0 neither.
        mini_step: the same per mini-step, [kappa], where that exists.
    """

    key: str
    title: str
    form: Callable[[float], str]
    form_difference: Callable[[float], str]
    read: Callable[[RunData], float]
    better: int = 0
    mini_step: Callable[[RunData], Array] | None = None


def _column(*keys: str) -> Callable[[RunData], float]:
    return lambda data: float(mean(data.column(*keys)))


def _later(key: str) -> Callable[[RunData], float]:
    return lambda data: float(mean(data.later_mini_steps(key)))


def _per_mini_step(key: str) -> Callable[[RunData], Array]:
    return lambda data: data.mini_step_means(key)


def _last_fifth(data: RunData) -> float:
    return first_and_last_fifth(data.records)["last"]


def _removed(data: RunData) -> float:
    lift, mismatch = float(mean(data.lift_all())), 1 - float(mean(data.mini_step_means("frozen_agreement")))
    return lift / mismatch if mismatch > 1e-12 else math.nan


def beta(data: RunData) -> Array:
    """[P] mean over layers of the hold-back's beta."""
    return np.asarray(mean(data.layer_columns("hold_back", "beta"), axis=0))


def ratio_variance(data: RunData) -> Array:
    """[kappa] variance of the importance ratio."""
    values = [[number(e, "ratio_std") ** 2 for e in mini_steps_of(r)] for r in data.records]
    padded = [row + [math.nan] * (data.kappa - len(row)) for row in values]
    return np.asarray(mean(np.array(padded), axis=0)) if data.kappa else np.empty(0)


def _last(values: Array) -> float:
    return float(values[-1]) if values.size else math.nan


def _number_of(value: float) -> str:
    return formats.fixed(value, 3)


def _signed(value: float) -> str:
    return formats.ABSENT if not math.isfinite(value) else f"{value:+.3f}" if abs(value) >= 5e-4 or value == 0 else f"{value:+.1e}"


def _signed_scientific(value: float) -> str:
    return formats.ABSENT if not math.isfinite(value) else f"{value:+.1e}"


def _points3(value: float) -> str:
    return formats.points(value, 3)


def _share(value: float) -> str:
    return formats.percent(value, 1)


def _share_difference(value: float) -> str:
    return formats.points(value, 1)


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if math.isfinite(value) else formats.ABSENT


def _seconds_difference(value: float) -> str:
    return f"{value:+.2f} s" if math.isfinite(value) else formats.ABSENT


FINAL_REWARD = Measure("reward_final", "final reward", _number_of, _signed, _last_fifth, 1)
MEAN_REWARD = Measure("reward_mean", "mean reward", _number_of, _signed, _column("reward"), 1)
# The first mini-step, in which a prediction can only be wrong, is part of what a run pays: the verdict is about all of them.
LATER_LIFT = Measure("lift", "lift, mini-steps from the second on", _points3, _points3, _column("lift"), 1)
LIFT = Measure("lift_all", "lift", _points3, _points3, lambda data: float(mean(data.lift_all())), 1, _per_mini_step("lift"))
AGREEMENT = Measure("agreement", "agreement", formats.percent, formats.points, _column("agreement"), 1, _per_mini_step("agreement"))
FROZEN = Measure(
    "frozen_agreement",
    "frozen agreement",
    formats.percent,
    formats.points,
    _column("frozen_agreement"),
    0,
    _per_mini_step("frozen_agreement"),
)
REMOVED = Measure("mismatches_removed", "mismatches removed", _share, _share_difference, _removed, 1)
KL_PREDICTED = Measure(
    "kl_predicted",
    "KL(ρ‖q̂)",
    formats.scientific,
    _signed_scientific,
    _later("kl_predicted"),
    -1,
    _per_mini_step("kl_predicted"),
)
KL_FROZEN = Measure(
    "kl_frozen", "KL(ρ‖ρ_old)", formats.scientific, _signed_scientific, _later("kl_frozen"), 0, _per_mini_step("kl_frozen")
)
COVERAGE = Measure(
    "coverage_gap",
    "coverage gap",
    formats.scientific,
    _signed_scientific,
    _later("coverage_gap"),
    -1,
    _per_mini_step("coverage_gap"),
)
RATIO_VARIANCE = Measure(
    "ratio_variance",
    "ratio variance, last mini-step",
    formats.scientific,
    _signed_scientific,
    lambda data: _last(ratio_variance(data)),
    -1,
    ratio_variance,
)
CLIP = Measure(
    "clip_fraction", "clip fraction", formats.percent, formats.points, _column("clip_fraction"), 0, _per_mini_step("clip_fraction")
)
POLICY_KL = Measure(
    "approx_kl",
    "policy KL, last mini-step",
    formats.scientific,
    _signed_scientific,
    lambda data: _last(data.mini_step_means("approx_kl")),
    0,
    _per_mini_step("approx_kl"),
)
GAP = Measure(
    "logprob_gap", "log-prob gap, engine to actor", formats.scientific, _signed_scientific, _column("logprob_gap", "mean"), -1
)
BETA = Measure("hold_back_beta", "hold-back β", _number_of, _signed, lambda data: float(mean(beta(data))))
STEP_TIME = Measure("step_seconds", "time per step", _seconds, _seconds_difference, _column("wall_seconds"), -1)
THROUGHPUT = Measure("tokens_per_second", "tokens per second", formats.count, _signed, _column("tokens_per_second"), 1)

MEASURES = (
    FINAL_REWARD, MEAN_REWARD, LIFT, LATER_LIFT, REMOVED, AGREEMENT, FROZEN, KL_PREDICTED, KL_FROZEN, COVERAGE, RATIO_VARIANCE,
    CLIP, POLICY_KL, GAP, BETA, STEP_TIME, THROUGHPUT,
)  # fmt: skip


def per_seed(setting: Setting, method: str, measure: Measure) -> dict[int, float]:
    """The number of every run of a method."""
    for seed in setting.methods[method]:
        if (method, seed, measure.key) not in setting.read:
            setting.read[method, seed, measure.key] = measure.read(setting.data[method, seed])
    return {seed: setting.read[method, seed, measure.key] for seed in setting.methods[method]}


def of_method(setting: Setting, method: str, measure: Measure) -> Interval:
    """Mean over seeds."""
    return interval(list(per_seed(setting, method, measure).values()))


def against_baseline(setting: Setting, method: str, measure: Measure) -> Interval:
    """Mean paired difference to the setting's baseline over the seeds that both have."""
    return paired(per_seed(setting, method, measure), per_seed(setting, setting.baseline, measure))


def over_settings(settings: Sequence[Setting], method: str, measure: Measure, *, difference: bool) -> Interval:
    """One interval for all settings that have the method.

    Runs of one seed start from the same weights whatever the setting, so they are no independent observations: each seed's mean
    over the settings is one. Seeds that some of these settings lack are left out.

    Args:
        difference: of differences to each setting's baseline (settings whose baseline is the method itself are left out).
    """
    rows: list[dict[int, float]] = []
    for setting in settings:
        if method not in setting.methods or (difference and method == setting.baseline):
            continue
        own = per_seed(setting, method, measure)
        reference = per_seed(setting, setting.baseline, measure) if difference else dict.fromkeys(own, 0.0)
        row = {seed: own[seed] - reference[seed] for seed in own if seed in reference}
        rows.append({seed: value for seed, value in row.items() if math.isfinite(value)})
    rows = [row for row in rows if row]
    common = set.intersection(*(set(row) for row in rows)) if rows else set()
    return interval([float(np.mean([row[seed] for row in rows])) for seed in sorted(common)])


def values_of(data: RunData) -> Iterator[tuple[Measure, int | None, float]]:
    """(measure, mini-step or None for the whole run, value) of everything that a run has a number for."""
    for measure in MEASURES:
        if math.isfinite(value := measure.read(data)):
            yield measure, None, value
        if measure.mini_step is not None:
            for position, value in enumerate(measure.mini_step(data).tolist(), start=1):
                if math.isfinite(value):
                    yield measure, position, value
