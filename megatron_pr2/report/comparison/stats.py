"""Means over seeds with their t intervals, and what an interval says in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

CONFIDENCE = 0.95

BETTER, WORSE, SAME, UNKNOWN = "better", "worse", "no different", "not known"


@dataclass(frozen=True)
class Interval:
    """A mean and half the width of its confidence interval: NaN where there is no value, or fewer than two."""

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
        return math.isfinite(self.half)


def interval(values: Iterable[float]) -> Interval:
    """Mean of the values that exist with Student's t interval: mean +- t(n - 1) * standard deviation / sqrt(n)."""
    known = np.array([v for v in values if math.isfinite(v)], dtype=np.float64)
    if known.size < 2:
        return Interval(float(known[0]) if known.size else math.nan, math.nan, known.size)
    # Equal values have no spread, whatever the rounding of their mean says.
    spread = 0.0 if (known == known[0]).all() else float(known.std(ddof=1))
    quantile = float(stdtrit(known.size - 1, 0.5 + CONFIDENCE / 2))
    return Interval(float(known.mean()), quantile * spread / math.sqrt(known.size), known.size)


def paired(values: Mapping[int, float], reference: Mapping[int, float]) -> dict[int, float]:
    """Differences `values - reference` over the seeds that both have.

    A seed decides the first weights and the prompts, which differ more between seeds than methods do within one.
    """
    return {seed: values[seed] - reference[seed] for seed in values if seed in reference}


def verdict(difference: Interval, more_is_better: bool = True) -> str:
    """BETTER or WORSE where the whole interval is on one side of zero, SAME where it is not, UNKNOWN without an interval."""
    if not difference.known:
        return UNKNOWN
    above, below = (BETTER, WORSE) if more_is_better else (WORSE, BETTER)
    return above if difference.low > 0 else below if difference.high < 0 else SAME
