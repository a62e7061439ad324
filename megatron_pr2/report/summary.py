"""The headline of a run: what ran, and whether prediction earned its place.

Agreement is the share of the replayed experts that are in the current router's top-k; frozen agreement is the same for
TopK(p_old), which replay without prediction would give; lift is their difference (megatron_pr2.metrics).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_pr2.report import formats
from megatron_pr2.report.records import Array, Record, exists, mean, number

PRESET_TEXT = {
    "grpo": "live routes: every pass routes for itself, nothing is replayed",
    "r2": "routes recorded in the actor's old-log-prob pass are replayed in the training passes",
    "r3": "routes returned by the rollout engine are replayed in the actor's passes",
    "pr2": "the rollout engine samples with predicted routes, which are replayed while a predictor learns the routers' drift",
}

# Below this share of the mismatches a difference is not worth a predictor, however well it is measured.
SMALLEST_EFFECT = 0.01
# Fewer rollouts than this give no usable standard error.
FEWEST_ROLLOUTS = 5


@dataclass(frozen=True)
class Verdict:
    """Whether prediction helped.

    Attributes:
        kind: "helped", "same", "hurt", "early" (too few rollouts) or "absent" (no predictor, or nothing to compare).
        headline, detail: plain language.
        lift, error: mean lift over the rollouts and its standard error, NaN if absent.
        removed: share of the frozen routes' mismatches that prediction removed (negative: added), NaN if there were none.
    """

    kind: str
    headline: str
    detail: str
    lift: float = math.nan
    error: float = math.nan
    removed: float = math.nan


def judge(records: Sequence[Record]) -> Verdict:
    """The verdict on prediction: it helped or hurt where the mean lift is more than two standard errors away from zero and
    removes or adds at least 1 % of the mismatches that frozen routes have.
    """
    lifts = np.array([number(r, "lift") for r in records], dtype=np.float64)
    lifts = lifts[np.isfinite(lifts)]
    if not any(number(r, "predictor", "tokens") > 0 or number(r, "predictor", "weight_norm") > 0 for r in records):
        if not exists(lifts):
            return Verdict("absent", "Nothing was predicted", "This run has no predictor and no replayed routes to compare.")
        return Verdict(
            "absent",
            "Nothing was predicted",
            "This run has no predictor. Its lift only shows how much the replayed routes differ from the actor's own frozen "
            f"ones: {formats.points(float(lifts.mean()), 3)}.",
            float(lifts.mean()),
            standard_error(lifts),
        )
    if not exists(lifts):
        return Verdict(
            "absent",
            "Prediction could not be judged",
            "No mini-step after the first has a lift: with one mini-step per rollout the policy is never newer than its routes.",
        )
    lift, error = float(lifts.mean()), standard_error(lifts)
    mismatch = 1.0 - float(mean([number(r, "frozen_agreement") for r in records]))
    removed = lift / mismatch if mismatch > 1e-12 else math.nan
    numbers = f"lift {formats.points(lift, 3)}"
    if math.isfinite(error):
        numbers += f", standard error {100 * error:.3f}"
    if lifts.size < FEWEST_ROLLOUTS:
        detail = f"So far {numbers}; {lifts.size} of at least {FEWEST_ROLLOUTS} rollouts."
        return Verdict("early", "Too few rollouts to judge prediction", detail, lift, error, removed)
    significant = abs(lift) > 2 * error and (abs(removed) >= SMALLEST_EFFECT or math.isnan(removed)) and lift != 0
    if not significant:
        detail = f"Replayed routes matched the updated routers about as well as frozen ones would have ({numbers})."
        return Verdict("same", "Prediction made no difference", detail, lift, error, removed)
    if lift > 0:
        detail = f"It removed {100 * removed:.1f} % of the route mismatches that frozen routes would have had ({numbers})."
        return Verdict("helped", "Prediction helped", detail, lift, error, removed)
    worse = (
        f"It caused {-100 * removed:.1f} % more route mismatches than frozen routes would have had"
        if math.isfinite(removed)
        else "It caused route mismatches where frozen routes would have had none"
    )
    detail = f"{worse} ({numbers}). Try a smaller alpha, or preset r3."
    return Verdict("hurt", "Prediction hurt", detail, lift, error, removed)


def standard_error(values: Array) -> float:
    """Standard error of the mean of a series whose neighbours may be correlated (lag-1 correction); NaN below two values."""
    if values.size < 2:
        return math.nan
    deviation = values - values.mean()
    variance = float((deviation**2).sum())
    if variance == 0:
        return 0.0
    correlation = min(0.99, max(0.0, float((deviation[1:] * deviation[:-1]).sum()) / variance))
    effective = max(1.0, values.size * (1 - correlation) / (1 + correlation))
    return math.sqrt(variance / (values.size - 1) / effective)


def what_ran(records: Sequence[Record]) -> list[tuple[str, str]]:
    """(preset, explanation) of every preset among the records, in order of appearance."""
    presets = dict.fromkeys(str(r.get("preset", "unknown")) for r in records)
    return [(name, PRESET_TEXT.get(name, "a configuration of its own; see the configuration below")) for name in presets]
