"""The headline of a run: what ran, and whether prediction helped.

Agreement is the share of the replayed experts that are in the current router's top-k; frozen agreement is the same for
TopK(p_old), which replay without prediction (R3) would give; lift is their difference (drift.metrics). The verdict is about
the lift over all mini-steps: the first, in which a prediction can only be wrong, counts as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_pr2.report import formats
from megatron_pr2.report.records import Array, Record, RunData, exists, layer_values, lift_all, mean, mini_steps_of, number

PRESET_TEXT = {
    "grpo": "nothing is replayed, every pass uses the model's own router",
    "r2": "routes recorded in the actor's old-log-prob pass are replayed in the training passes",
    "r3": "routes returned by the rollout engine are replayed in the actor's passes",
    "pr2": "the rollout engine samples with predicted routes, which are replayed while a predictor learns the routers' drift",
}
# Below this share of the mismatches a difference is not worth a predictor, however well it is measured.
SMALLEST_EFFECT = 0.01
# Fewer rollouts than this give no usable standard error.
FEWEST_ROLLOUTS = 5
NO_PREDICTION = "Nothing was predicted"
NO_DIFFERENCE = "Prediction made no measurable difference to R3"


@dataclass(frozen=True)
class Verdict:
    """Whether prediction helped.

    Attributes:
        kind: "helped", "same", "hurt", "held" (disabled throughout by hold-back), "early" (too few rollouts) or "absent" (no
            predictor, or nothing to compare).
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
    """How much of the prediction was used: in the last rollout that says so, `layers` MoE layers have a mean `beta`, and it is 0 in
    `zero` of them; `always` if it was 0 in all layers of all rollouts.
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
    lift, error = (float(lifts.mean()), standard_error(lifts)) if lifts.size else (math.nan, math.nan)
    if not predicted(records):
        if not lifts.size:
            return Verdict("absent", NO_PREDICTION, "This run has no predictor and no replayed routes to compare.")
        only = "Its lift only shows how much the replayed routes differ from the actor's own frozen ones"
        return Verdict("absent", NO_PREDICTION, f"This run has no predictor. {only}: {formats.points(lift, 3)}.", lift, error)
    held = held_back(records)
    if held is not None and held.always:
        return _held_verdict(held, len(records), lift, error)
    if not exists([number(r, "lift") for r in records]):
        return Verdict(
            "absent",
            "Prediction could not be judged",
            "No mini-step after the first has a lift: with one mini-step per rollout the policy is never newer than its routes, "
            "and a prediction can only be wrong.",
        )
    mismatch = 1.0 - float(mean([_frozen_all(r) for r in records]))
    removed = lift / mismatch if mismatch > 1e-12 else math.nan
    numbers = f"lift {formats.points(lift, 3)}"
    if math.isfinite(error):
        numbers += f", 95 % interval {formats.points(lift - 2 * error, 3)} to {formats.points(lift + 2 * error, 3)}"
    numbers += f", over all mini-steps of {lifts.size} rollout{'' if lifts.size == 1 else 's'}"
    now = ""
    if held is not None:
        now = f" In the last rollout beta was 0 in {held.zero} of {held.layers} layers (mean beta {held.beta:.2f})."

    def verdict(kind: str, headline: str, detail: str) -> Verdict:
        return Verdict(kind, headline, detail, lift, error, removed)

    if lifts.size < FEWEST_ROLLOUTS:
        detail = f"So far {numbers}; at least {FEWEST_ROLLOUTS} rollouts are needed."
        return verdict("early", "Too few rollouts to judge prediction", detail)
    if not abs(lift) > 2 * error or abs(removed) < SMALLEST_EFFECT or not lift:
        bound = (abs(lift) + 2 * error) / mismatch if mismatch > 1e-12 else math.nan
        most = f"; that is at most {100 * bound:.1f} % of R3's route mismatches, more or less" if math.isfinite(bound) else ""
        detail = f"Replayed routes matched the updated routers about as well as R3's frozen ones would have ({numbers}{most}).{now}"
        return verdict("same", NO_DIFFERENCE, detail)
    if lift > 0:
        share = f"It removed {100 * removed:.1f} % of the route mismatches that R3's frozen routes would have had"
        return verdict("helped", "Prediction helped: better routes than R3's", f"{share} ({numbers}).{now}")
    rounding = engine_rounding(records)
    if -lift <= rounding + 2 * error:
        detail = (
            f"Replayed routes matched the updated routers worse than the actor's frozen ones would have ({numbers}), but by no "
            f"more than the engine's rounding explains: under the same weights {formats.percent(rounding)} of its experts were "
            f"not the actor's (handshake), with R3 too. Compare with a run of preset r3.{now}"
        )
        return verdict("same", NO_DIFFERENCE, detail)
    worse = "It caused route mismatches where R3's frozen routes would have had none"
    if math.isfinite(removed):
        worse = f"It caused {-100 * removed:.1f} % more route mismatches than R3's frozen routes would have had"
    advice = "Turn pr2.hold_back on, or try a smaller alpha or preset r3." if held is None else "Try a smaller alpha, or preset r3."
    return verdict("hurt", "Prediction hurt: worse routes than R3's", f"{worse} ({numbers}).{now} {advice}")


def _held_verdict(held: Held, rollouts: int, lift: float, error: float) -> Verdict:
    so_far = " so far" if rollouts < FEWEST_ROLLOUTS else ""
    detail = (
        f"Beta was 0 in all {held.layers} MoE layers of every rollout{so_far}: held-out tokens showed no gain. Such a run is "
        "neither better nor worse off than R3."
    )
    if math.isfinite(lift) and round(lift, 5):
        detail += f" Its lift, {formats.points(lift, 3)}, only shows how the engine's routes differ from the actor's own."
    return Verdict("held", "Prediction stayed disabled (hold-back): these are R3's routes", detail, lift, error)


def predicted(records: Sequence[Record]) -> bool:
    """Whether there was a prediction at all, used or disabled."""
    return any(number(r, "predictor", "tokens") > 0 or number(r, "predictor", "weight_norm") > 0 for r in records)


def held_back(records: Sequence[Record]) -> Held | None:
    """How much of the prediction was used; None without hold-back, also in records that are older than that."""
    betas = [beta for r in records if (beta := _known(layer_values(r, "hold_back", "beta"))).size]
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
    series = data.layer_series("lift")
    return mean(series, axis=1), np.array([standard_error(_known(values)) for values in series])


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


def _frozen_all(record: Record) -> float:
    """Frozen agreement over all mini-steps; the record's own, which leaves out the first, where there are no mini-steps."""
    value = float(mean([number(entry, "frozen_agreement") for entry in mini_steps_of(record)]))
    return value if math.isfinite(value) else number(record, "frozen_agreement")


def _known(values: Sequence[float] | Array) -> Array:
    array = np.asarray(values, dtype=np.float64)
    return array[np.isfinite(array)]
