"""Mini-steps of a rollout batch: their numbers, what step() does at their end, and what is done where it was forgotten."""

from __future__ import annotations

from typing import Any

from megatron_pr2.config import PR2Config
from megatron_pr2.drift.measurement import Measurement
from megatron_pr2.drift.metrics import missing_share, scalars
from megatron_pr2.parallel.grid import IntArray
from megatron_pr2.prediction.horizon import Horizon
from megatron_pr2.replay.progress import Progress
from megatron_pr2.replay.sequences import RolloutReport


class MiniSteps:
    """Opens and ends mini-steps, on all ranks that hold other tokens alike."""

    def __init__(self, config: PR2Config, progress: Progress, horizon: Horizon, measurement: Measurement) -> None:
        self._config, self._progress, self._horizon, self._measurement = config, progress, horizon, measurement
        self._missing_share: dict[str, float] = {}
        self._scalars: dict[str, float] = {}

    def begin_batch(self, report: RolloutReport) -> None:
        """A rollout batch begins."""
        self._missing_share, self._scalars = missing_share(report), {}

    def open(self, mini_step: Any) -> int:
        """Before a training pass: ends the mini-step before, unless the pass is a further one of it, and gives its number.

        Raises:
            ReplayError: it is no integer of at least 1.
            AttachError: the predictor needs the optimizer, which is not known.
        """
        number = self._progress.number(mini_step)
        if number != self._progress.mini_step:
            self.end_open("actor_update")
        self._horizon.open()
        return number

    def ran(self, number: int, tokens: IntArray) -> None:
        """A training pass is done."""
        self._progress.ran(number, tokens)
        self._horizon.ran(number)

    def end(self, lr: Any) -> dict[str, Any]:
        """See PR2.step."""
        rate = self._horizon.rate(lr)
        if not self._progress.open:
            self._progress.warn("step() without a mini-step that it could end: call it once after each actor_update()")
        return self._end(rate)

    def end_open(self, call: str) -> None:
        """Before another call: ends a mini-step whose step() was forgotten, with a warning; collective as step() is."""
        if not self._progress.open:
            return
        can_end = self._horizon.can_end
        self._progress.warn(
            "%s() before step() ended mini-step %d: %s. Call pr2.step() after each optimizer.step()",
            call, self._progress.mini_step,
            "it is ended now" if can_end else "what it measured is lost, since neither learning rate nor optimizer is known",
        )  # fmt: skip
        if can_end:
            self._end(self._horizon.rate(None) if self._config.learns else 0.0)
        else:
            self._progress.open, self._scalars = False, {}
            self._measurement.skip()

    def _end(self, rate: float) -> dict[str, Any]:
        self._progress.open = False
        report = self._measurement.step(rate, self._progress.mini_step, self._horizon)
        self._scalars = scalars(report, self._measurement.engine_agreement, self._measurement.sample_fraction)
        return report

    def metrics(self) -> dict[str, float]:
        """See PR2.metrics."""
        untrained = self._progress.untrained
        counted = {} if untrained is None else {"pr2/untrained_sequences": float(untrained)}
        return self._missing_share | self._scalars | counted
