"""The headline of a run: what ran, and whether prediction earned its place.

Agreement is the share of the replayed experts that are in the current router's top-k; frozen agreement is the same for
TopK(p_old), which replay without prediction (R3) would give; lift is their difference (drift.metrics). The verdict is about
the lift over all mini-steps: the first, in which a prediction can only be wrong, is part of what a run pays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_pr2.report import formats
from megatron_pr2.report.records import Array, Record, RunData, exists, layer_values, lift_all, mean, mini_steps_of, number

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
        kind: "helped", "same", "hurt", "held" (never used), "early" (too few rollouts) or "absent" (no predictor, or nothing to
            compare).
        headline, detail: plain language.
        lift, error: mean lift over all mini-steps and rollouts and its standard error, NaN if absent.
        removed: share of the frozen routes' mismatches that prediction removed (negative: added), NaN if there were none.
    """

    kind: str
    headline: str
    detail: str
    lift: float = math.nan
    error: float = math.nan
    removed: float = math.nan


@dataclass(frozen=True)
class Held:
    """How much of the prediction was used.

    Attributes:
        layers: MoE layers that have a beta.
        beta: mean over them, in the last rollout that says so.
        zero: layers with beta = 0 there.
        always: whether beta was 0 in all layers of all rollouts.
    """

    layers: int
    beta: float
    zero: int
    always: bool


def judge(records: Sequence[Record]) -> Verdict:
    """The verdict on prediction: it helped or hurt where the mean lift is more than two standard errors away from zero and
    removes or adds at least 1 % of the mismatches that frozen routes have.
    """
    lifts = _known([lift_all(r) for r in records])
    if not predicted(records):
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
    held = held_back(records)
    if held is not None and held.always:
        return _held_verdict(held, len(records), lifts)
    if not exists(_known([number(r, "lift") for r in records])):
        return Verdict(
            "absent",
            "Prediction could not be judged",
            "No mini-step after the first has a lift: with one mini-step per rollout the policy is never newer than its routes, "
            "and a prediction can only be wrong.",
        )
    lift, error = float(lifts.mean()), standard_error(lifts)
    mismatch = 1.0 - float(mean([_frozen_all(r) for r in records]))
    removed = lift / mismatch if mismatch > 1e-12 else math.nan
    numbers = f"lift {formats.points(lift, 3)}"
    if math.isfinite(error):
        numbers += f", 95 % interval {formats.points(lift - 2 * error, 3)} to {formats.points(lift + 2 * error, 3)}"
    numbers += f", over all mini-steps of {lifts.size} rollout{'' if lifts.size == 1 else 's'}"
    if lifts.size < FEWEST_ROLLOUTS:
        detail = f"So far {numbers}; at least {FEWEST_ROLLOUTS} rollouts are needed."
        return Verdict("early", "Too few rollouts to judge prediction", detail, lift, error, removed)
    now = _held_now(held)
    significant = abs(lift) > 2 * error and (abs(removed) >= SMALLEST_EFFECT or math.isnan(removed)) and lift != 0
    if not significant:
        bound = (abs(lift) + 2 * error) / mismatch if mismatch > 1e-12 else math.nan
        most = f"; that is at most {100 * bound:.1f} % of R3's route mismatches, more or less" if math.isfinite(bound) else ""
        detail = f"Replayed routes matched the updated routers about as well as R3's frozen ones would have ({numbers}{most}).{now}"
        return Verdict("same", "Prediction made no difference to R3 that shows", detail, lift, error, removed)
    if lift > 0:
        detail = (
            f"It removed {100 * removed:.1f} % of the route mismatches that R3's frozen routes would have had ({numbers}).{now}"
        )
        return Verdict("helped", "Prediction helped: better routes than R3's", detail, lift, error, removed)
    rounding = engine_rounding(records)
    if -lift <= rounding + 2 * error:
        detail = (
            f"Replayed routes matched the updated routers worse than the actor's frozen ones would have ({numbers}), but by no "
            f"more than the engine's rounding explains: under the same weights {formats.percent(rounding)} of its experts were "
            f"not the actor's (handshake), with R3 too. A run of preset r3 would tell.{now}"
        )
        return Verdict("same", "Prediction made no difference to R3 that shows", detail, lift, error, removed)
    worse = (
        f"It caused {-100 * removed:.1f} % more route mismatches than R3's frozen routes would have had"
        if math.isfinite(removed)
        else "It caused route mismatches where R3's frozen routes would have had none"
    )
    advice = (
        "Try a smaller alpha, or preset r3." if held is not None else "Turn pr2.hold_back on, or try a smaller alpha or preset r3."
    )
    detail = f"{worse} ({numbers}).{now} {advice}"
    return Verdict("hurt", "Prediction hurt: worse routes than R3's", detail, lift, error, removed)


def predicted(records: Sequence[Record]) -> bool:
    """Whether there was a prediction at all, used or held back."""
    return any(number(r, "predictor", "tokens") > 0 or number(r, "predictor", "weight_norm") > 0 for r in records)


def held_back(records: Sequence[Record]) -> Held | None:
    """How much of the prediction was used; None where the run does not hold back, or is older than that."""
    betas = [_known(layer_values(r, "hold_back", "beta")) for r in records]
    betas = [beta for beta in betas if beta.size]
    if not betas:
        return None
    last = betas[-1]
    always = all((beta == 0).all() for beta in betas)
    return Held(last.size, float(last.mean()), int(np.count_nonzero(last == 0)), always)


def engine_rounding(records: Sequence[Record]) -> float:
    """Share of the experts that the engine chose otherwise than the actor under the same weights, by the handshakes; 0 without."""
    agreements = _known([number(r, "handshake", "route_agreement") for r in records])
    return 1.0 - float(agreements.mean()) if agreements.size else 0.0


def layer_lift(data: RunData) -> tuple[Array, Array]:
    """[layers] mean lift over all mini-steps and rollouts, and its standard error; NaN where there is none."""
    series = [_known(values) for values in data.layer_series("lift")]
    means = np.array([float(values.mean()) if values.size else math.nan for values in series])
    return means, np.array([standard_error(values) for values in series])


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


def _held_verdict(held: Held, rollouts: int, lifts: Array) -> Verdict:
    early = rollouts < FEWEST_ROLLOUTS
    detail = (
        f"Beta was 0 in all {held.layers} MoE layers of every rollout{' so far' if early else ''}: held-out tokens did not show "
        "that the prediction would pay. Such a run is neither better nor worse off than R3."
    )
    lift, error = (float(lifts.mean()), standard_error(lifts)) if lifts.size else (math.nan, math.nan)
    if math.isfinite(lift) and round(lift, 5):
        detail += f" Its lift, {formats.points(lift, 3)}, only shows how the engine's routes differ from the actor's own."
    headline = "Prediction was held back: these are R3's routes"
    return Verdict("held", headline, detail, lift, error)


def _held_now(held: Held | None) -> str:
    if held is None:
        return ""
    if not held.zero:
        return f" At the end no layer was held back entirely (mean beta {held.beta:.2f})."
    return f" At the end {held.zero} of {held.layers} layers were held back entirely (mean beta {held.beta:.2f})."


def _frozen_all(record: Record) -> float:
    """Frozen agreement over all mini-steps; the record's own, which leaves out the first, where there are no mini-steps."""
    value = float(mean([number(entry, "frozen_agreement") for entry in mini_steps_of(record)] or [math.nan]))
    return value if math.isfinite(value) else number(record, "frozen_agreement")


def _known(values: Sequence[float] | Array) -> Array:
    array = np.asarray(values, dtype=np.float64)
    return array[np.isfinite(array)]
