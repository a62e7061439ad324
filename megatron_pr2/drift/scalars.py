"""What a logger wants: the last step's report in a few plain numbers, averaged over MoE layers.

| Key | What it is |
| --- | --- |
| `pr2/missing_share` | tokens of this rank's replica without a valid route, of those that could have one |
| `pr2/engine_agreement` | engine's experts that the live router chose as well in the last old-log-prob pass |
| `pr2/agreement`, `pr2/frozen_agreement`, `pr2/lift`, ... | drift (megatron_pr2.drift.metrics.COLUMNS), means over sampled tokens |
| `pr2/predictor/tokens`, `/grad_norm`, `/weight_norm` | the predictor's last update |
| `pr2/hold_back/beta`, `/lift`, `/lift_error` | how much of a prediction is believed, and why |
| `pr2/features_absent` | sampled tokens of this rank that no log-prob pass kept features of |

What was not measured is absent, not zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_pr2.replay.sequences import RolloutReport


class Scalars:
    """The numbers of one PR2 handle, brought up to date by each rollout batch and step."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def rollout(self, report: RolloutReport) -> None:
        """Starts anew with a rollout batch."""
        self.values = {"pr2/missing_share": report.missing / report.tokens} if report.tokens else {}

    def step(self, report: Mapping[str, Any], engine_agreement: float | None) -> None:
        """Takes what a step reports."""
        found: dict[str, float | None] = {
            "pr2/engine_agreement": engine_agreement,
            "pr2/features_absent": float(report["features_absent"]),
        }
        drift: Mapping[str, Sequence[float]] = report["drift"]
        tokens = drift["tokens"]
        found |= {f"pr2/{name}": _mean(values, tokens) for name, values in drift.items() if name != "tokens"}
        found |= {f"pr2/predictor/{name}": value for name, value in report["predictor"].items()}
        held: Mapping[str, Sequence[float]] = report.get("hold_back", {})
        found |= {f"pr2/hold_back/{name}": _mean(values, [1.0] * len(values)) for name, values in held.items()}
        kept = {key: value for key, value in self.values.items() if key == "pr2/missing_share"}
        self.values = kept | {key: value for key, value in found.items() if value is not None and math.isfinite(value)}


def _mean(values: Sequence[float], weights: Sequence[float]) -> float | None:
    """Weighted mean of what is finite; None if nothing is."""
    pairs = [(v, w) for v, w in zip(values, weights, strict=True) if math.isfinite(v) and w > 0]
    total = sum(w for _, w in pairs)
    return sum(v * w for v, w in pairs) / total if total else None
