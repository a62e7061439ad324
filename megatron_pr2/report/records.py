"""RunData: the numbers of a run as pandas frames, a row per rollout; what a record lacks is NaN.

Columns have the dotted names of metrics_log.flat. In a pattern `#` stands for a number, from 1, that becomes the column's name
(mini-step, layer), `*` for any number and `+` for one from 2 on, over which a mean is taken:
"mini_steps.+.per_layer.lift.#" is the lift by layer, mean over the mini-steps in which the policy is newer than the routes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
import pandas as pd

from megatron_pr2.report.metrics_log import Record, flat

# What is no mean where a point of a plot joins several rollouts.
EXTREMES = {"ratio_min": "min", "ratio_max": "max", "missing_share": "max"}


class RunData:
    """A run.

    Attributes:
        rollouts: a row per record.
        points: the same, thinned to at most `limit` rows of `bin_size` rollouts so that long runs plot quickly, by step.
        kappa: mini-steps per rollout (the largest that occurs).
        baseline, name: another run to draw beside this one, and what it is called there.
    """

    def __init__(self, records: Sequence[Record], limit: int = 400, baseline: tuple[str, Sequence[Record]] | None = None) -> None:
        self.records = records
        self.name, other = baseline or ("", None)
        self.baseline = None if other is None else RunData(other, limit)
        frame = pd.DataFrame([flat(r) for r in records], dtype=np.float64)
        # Older records have no lift over all mini-steps: that of the mini-steps, or of the later ones.
        frame["lift_all"] = self._of(frame, "lift_all").fillna(self._of(frame, "mini_steps.*.lift")).fillna(self._of(frame, "lift"))
        variance = numbered(frame, "mini_steps.#.ratio_std") ** 2
        self.rollouts = frame.join(variance.rename(columns="mini_steps.{}.ratio_variance".format))
        self.kappa = int(max([0, *(int(name.split(".")[1]) for name in frame if name.startswith("mini_steps."))]))
        self.bin_size = max(1, math.ceil(len(records) / limit))
        bins = self.rollouts.groupby(np.arange(len(records)) // self.bin_size)
        how = {name: EXTREMES.get(name.rsplit(".", 1)[-1], "mean") for name in self.rollouts}
        self.points = bins.agg(how) if self.bin_size > 1 else self.rollouts
        self.points = self.points.set_index(pd.Index(self.points["step"], name="rollout step"))

    @staticmethod
    def _of(frame: pd.DataFrame, pattern: str) -> pd.Series:
        return matching(frame, pattern).mean(axis=1)

    def __getitem__(self, pattern: str) -> pd.Series:
        """By step: the column, or the mean of those that match a pattern without `#`."""
        return self._of(self.points, pattern)

    def of_baseline(self, pattern: str) -> pd.Series | None:
        """The baseline's, at this run's steps as far as it goes; None without one."""
        if self.baseline is None:
            return None
        known, index = self.baseline[pattern].dropna(), self.points.index
        if known.empty:
            return None
        values = np.interp(index, known.index, known, left=math.nan, right=math.nan)
        return pd.Series(values, index=index)

    def table(self, pattern: str) -> pd.DataFrame:
        """By step: a column for each number that `#` stands for."""
        return numbered(self.points, pattern)

    def mean(self, pattern: str) -> float:
        """Over all rollouts."""
        return float(self._of(self.rollouts, pattern).mean())

    def means(self, pattern: str) -> pd.Series:
        """Over all rollouts, by the numbers that `#` stands for."""
        return numbered(self.rollouts, pattern).mean()

    def known(self, pattern: str) -> pd.Series:
        """The values that exist, a rollout each."""
        return self._of(self.rollouts, pattern).dropna()

    def changed(self) -> pd.DataFrame:
        """Mean shares of (token, layer) pairs with 0, 1, 2, 3 or more changed experts, by mini-step."""
        return pd.DataFrame({c: self.means(f"mini_steps.#.changed.{c + 1}") for c in range(4)})

    def group(self, name: str, frame: pd.DataFrame | None = None) -> pd.DataFrame:
        """By step: the numbers under `name` that are not always zero, of the rows that have any."""
        columns = (self.points if frame is None else frame).filter(regex=rf"^{name}\.[^.]+$").dropna(how="all").fillna(0.0)
        return columns.loc[:, (columns != 0).any()].rename(columns=lambda column: column.split(".")[1])

    def ends(self, name: str) -> tuple[float, float]:
        """Means of the first and of the last fifth of the rollouts."""
        values, fifth = self._of(self.rollouts, name), max(1, len(self.rollouts) // 5)
        return float(values[:fifth].mean()), float(values[-fifth:].mean())

    def step_seconds(self) -> pd.Series:
        """Seconds of every rollout that has some."""
        return self.rollouts.filter(regex=r"^seconds\.").sum(axis=1, min_count=1).dropna()

    def columns(self, pattern: str) -> pd.DataFrame:
        """Of all rollouts, the columns that a pattern without `#` names."""
        return matching(self.rollouts, pattern)

    def mismatches(self, name: str = "frozen_agreement") -> pd.Series:
        """Share of the experts that frozen, or with "agreement" the replayed routes get wrong, over all mini-steps; by rollout."""
        return 1.0 - self._of(self.rollouts, f"mini_steps.*.{name}").fillna(self._of(self.rollouts, name))

    def frozen_mismatch(self) -> float:
        """Their mean for frozen routes; NaN if there are none."""
        return mismatch if (mismatch := float(self.mismatches().mean())) > 1e-12 else math.nan

    def removed(self) -> float:
        """Share of the frozen routes' mismatches that prediction removed."""
        return self.mean("lift_all") / self.frozen_mismatch()


def matching(frame: pd.DataFrame, pattern: str) -> pd.DataFrame:
    """The columns that a pattern names, `#` as any number."""
    if pattern in frame:
        return frame[[pattern]]
    return frame.loc[:, [bool(_form(pattern).fullmatch(name)) for name in frame]]


def numbered(frame: pd.DataFrame, pattern: str) -> pd.DataFrame:
    """A column for each number that `#` stands for, without a gap from 1 on."""
    found = matching(frame, pattern)
    numbers = [int(match[1]) for name in found if (match := _form(pattern).fullmatch(name))]
    name = "mini-step" if pattern.startswith("mini_steps.#") else "MoE layer"
    columns = pd.RangeIndex(1, max(numbers, default=0) + 1, name=name)
    if not numbers:
        return pd.DataFrame(index=frame.index, columns=columns)
    return found.T.groupby(np.array(numbers)).mean().T.reindex(columns=columns)


def _form(pattern: str) -> re.Pattern[str]:
    signs = {"#": r"(\d+)", "*": r"\d+", "+": r"(?:[2-9]|[1-9]\d+)"}
    return re.compile("".join(signs.get(character, re.escape(character)) for character in pattern))
