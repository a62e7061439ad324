"""Means over seeds with their t intervals, and what an interval says in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

CONFIDENCE = 0.95

BETTER, WORSE, SAME, UNKNOWN = "better", "worse", "no different", "not known"


@dataclass(frozen=True)
class Interval:
    """A mean and half the width of its confidence interval.

    Attributes:
        mean: NaN where there is no value.
        half: NaN below two values.
        count: how many values there were.
    """

    mean: float
    half: float
    count: int

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    @property
    def known(self) -> bool:
        """Whether there is an interval at all."""
        return math.isfinite(self.half)


def interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Mean of the values that exist with Student's t interval: mean +- t(n - 1) * standard deviation / sqrt(n)."""
    known = np.array([v for v in values if math.isfinite(v)], dtype=np.float64)
    if known.size == 0:
        return Interval(math.nan, math.nan, 0)
    if known.size == 1:
        return Interval(float(known[0]), math.nan, 1)
    # Equal values have no spread, whatever the rounding of their mean says.
    spread = 0.0 if (known == known[0]).all() else float(known.std(ddof=1))
    quantile = float(stdtrit(known.size - 1, 0.5 + confidence / 2))
    return Interval(float(known.mean()), quantile * spread / math.sqrt(known.size), int(known.size))


def paired(values: Mapping[int, float], reference: Mapping[int, float]) -> Interval:
    """Interval of the mean difference `values - reference` over the seeds that both have.

    A seed decides the first weights and the prompts, which differ more between seeds than methods do within one.
    """
    return interval([values[seed] - reference[seed] for seed in values if seed in reference])


def verdict(difference: Interval, more_is_better: bool = True) -> str:
    """BETTER or WORSE where the whole interval is on one side of zero, SAME where it is not, UNKNOWN without an interval."""
    if not difference.known:
        return UNKNOWN
    above, below = (BETTER, WORSE) if more_is_better else (WORSE, BETTER)
    return above if difference.low > 0 else below if difference.high < 0 else SAME
