"""A comparison as CSV: every number of every run, and means with intervals."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_pr2.report.comparison.measures import MEASURES, against_baseline, of_method, values_of
from megatron_pr2.report.comparison.runs import Setting
from megatron_pr2.report.comparison.stats import Interval, verdict
from megatron_pr2.report.metrics_log import replace_atomically

CELLS = ("run", "method", "mini_steps", "lr", "setting", "seed", "rollouts", "measure", "mini_step", "value")
SUMMARY = (
    "method", "mini_steps", "lr", "setting", "measure", "seeds", "mean", "low", "high", "baseline", "common_seeds", "difference",
    "difference_low", "difference_high", "verdict",
)  # fmt: skip


def write_cells(settings: Sequence[Setting], path: Path) -> None:
    """Tidy long format: one row per run, measure and mini-step.

    `mini_step` is empty for a number of the whole run (means over rollouts; comparison_measures has them).
    `changed_0` ... `changed_3` are the shares of (token, layer) pairs with so many changed experts, `changed_3` with 3 or more;
    `seconds_*` the mean seconds of a step's phases.
    """
    _write(path, CELLS, _cells(settings))


def write_summary(settings: Sequence[Setting], path: Path) -> None:
    """One row per setting, method and measure: mean over seeds, 95 % t interval, and the paired difference to the baseline.

    `verdict` is about that difference, and empty for measures of which neither more nor less is better.
    """
    _write(path, SUMMARY, _summary(settings))


def _cells(settings: Sequence[Setting]) -> Iterable[Sequence[object]]:
    for setting in settings:
        for method, seed, run in setting.runs():
            data = setting.data[method, seed]
            head = (run.name, method, setting.mini_steps, setting.lr, setting.label, seed, setting.rollouts)
            for measure, mini_step, value in values_of(data):
                yield (*head, measure.key, mini_step, value)
            for position, shares in enumerate(data.changed_means().tolist(), start=1):
                yield from ((*head, f"changed_{c}", position, share) for c, share in enumerate(shares) if math.isfinite(share))
            for phase in data.keys_of("seconds"):
                times = [float(r["seconds"].get(phase) or 0.0) for r in data.records if r.get("seconds")]
                yield (*head, f"seconds_{phase}", None, sum(times) / len(times))


def _summary(settings: Sequence[Setting]) -> Iterable[Sequence[object]]:
    for setting in settings:
        for method in setting.methods:
            head = (method, setting.mini_steps, setting.lr, setting.label)
            for measure in MEASURES:
                mean = of_method(setting, method, measure)
                if not mean.count:
                    continue
                row = (*head, measure.key, mean.count, *_three(mean))
                if method == setting.baseline:
                    yield (*row, setting.baseline, None, None, None, None, None)
                    continue
                difference = against_baseline(setting, method, measure)
                word = verdict(difference, measure.better > 0) if measure.better and difference.count else None
                yield (*row, setting.baseline, difference.count, *_three(difference), word)


def _three(value: Interval) -> tuple[float | None, ...]:
    return tuple(v if math.isfinite(v) else None for v in (value.mean, value.low, value.high))


def _write(path: Path, headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(headings)
    writer.writerows(
        ["" if value is None else f"{value:.8g}" if isinstance(value, float) else value for value in row] for row in rows
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_atomically(path, text.getvalue().encode())
