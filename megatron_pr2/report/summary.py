"""The headline of a run: what ran, and whether prediction helped.

Agreement is the share of the replayed experts that are in the current router's top-k; frozen agreement is the same for
TopK(p_old), which replay without prediction (R3) would give; lift is their difference (drift.metrics). The verdict is about
the lift over all mini-steps: the first, in which a prediction can only be wrong, counts as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd

from megatron_pr2.report import formats
from megatron_pr2.report.records import RunData, numbered

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


def judge(data: RunData) -> Verdict:
    """The verdict on prediction: it helped or hurt where the mean lift is more than two standard errors away from zero and
    removes or adds at least 1 % of the mismatches that frozen routes have.
    """
    lifts = data.known("lift_all")
    lift, error = float(lifts.mean()), standard_error(lifts)
    if not predicted(data):
        detail = "This run has no predictor, and no drift was measured."
        if lifts.size:
            only = "Its lift only shows how much the replayed routes differ from the actor's own frozen ones"
            detail = f"This run has no predictor. {only}: {formats.points(lift, 3)}."
        return Verdict("absent", NO_PREDICTION, detail, lift, error)
    betas = held_back(data)
    if len(betas) and (betas.fillna(0.0) == 0).all(axis=None):
        so_far = " so far" if len(data.records) < FEWEST_ROLLOUTS else ""
        detail = (
            f"Beta was 0 in all {betas.iloc[-1].count()} MoE layers of every rollout{so_far}: held-out tokens showed no gain. "
            "Such a run is neither better nor worse off than R3."
        )
        if math.isfinite(lift) and round(lift, 5):
            detail += f" Its lift, {formats.points(lift, 3)}, only shows how the engine's routes differ from the actor's own."
        return Verdict("held", "Prediction stayed disabled (hold-back): these are R3's routes", detail, lift, error)
    if data.known("lift").empty:
        return Verdict(
            "absent",
            "Prediction could not be judged",
            "No mini-step after the first has a lift: drift is not measured (pr2.drift=false), or there is one mini-step per "
            "rollout, so that the policy is never newer than its routes and a prediction can only be wrong.",
        )
    removed = data.removed()
    numbers = f"lift {formats.points(lift, 3)}"
    if math.isfinite(error):
        numbers += f", 95 % interval {formats.points(lift - 2 * error, 3)} to {formats.points(lift + 2 * error, 3)}"
    numbers += f", over all mini-steps of {formats.count(lifts.size, 'rollout')}"
    now = ""
    if len(betas):
        last = betas.iloc[-1].dropna()
        now = f" In the last rollout beta was 0 in {(last == 0).sum()} of {last.size} layers (mean beta {last.mean():.2f})."

    def verdict(kind: str, headline: str, detail: str) -> Verdict:
        return Verdict(kind, headline, detail, lift, error, removed)

    if lifts.size < FEWEST_ROLLOUTS:
        detail = f"So far {numbers}; at least {FEWEST_ROLLOUTS} rollouts are needed."
        return verdict("early", "Too few rollouts to judge prediction", detail)
    if not abs(lift) > 2 * error or abs(removed) < SMALLEST_EFFECT or not lift:
        bound = (abs(lift) + 2 * error) / data.frozen_mismatch()
        most = f"; that is at most {100 * bound:.1f} % of R3's route mismatches, more or less" if math.isfinite(bound) else ""
        detail = f"Replayed routes matched the updated routers about as well as R3's frozen ones would have ({numbers}{most}).{now}"
        return verdict("same", NO_DIFFERENCE, detail)
    if lift > 0:
        share = f"It removed {100 * removed:.1f} % of the route mismatches that R3's frozen routes would have had"
        return verdict("helped", "Prediction helped: better routes than R3's", f"{share} ({numbers}).{now}")
    rounding = engine_rounding(data)
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
    advice = "Try a smaller alpha, or preset r3." if len(betas) else "Turn pr2.hold_back on, or try a smaller alpha or preset r3."
    return verdict("hurt", "Prediction hurt: worse routes than R3's", f"{worse} ({numbers}).{now} {advice}")


def predicted(data: RunData) -> bool:
    """Whether there was a prediction at all, used or disabled."""
    return any((data.known(f"predictor.{name}") > 0).any() for name in ("tokens", "weight_norm"))


def held_back(data: RunData) -> pd.DataFrame:
    """The share of the prediction that was used, by MoE layer, of the rollouts that say so; empty without hold-back."""
    return numbered(data.rollouts, "hold_back.beta.#").dropna(how="all")


def engine_rounding(data: RunData) -> float:
    """Share of the experts that the engine chose otherwise than the actor under the same weights, by the handshakes; 0 without."""
    agreements = data.known("handshake.route_agreement")
    return 1.0 - float(agreements.mean()) if len(agreements) else 0.0


def layer_lift(data: RunData) -> tuple[pd.Series, pd.Series]:
    """Mean lift of every layer over all mini-steps and rollouts, and its standard error."""
    lifts = numbered(data.rollouts, "mini_steps.*.per_layer.lift.#")
    return lifts.mean(), lifts.apply(standard_error)


def standard_error(values: pd.Series) -> float:
    """Standard error of the mean of a series whose neighbours may be correlated (lag-1 correction); NaN below two values."""
    deviation = (values.dropna() - values.mean()).to_numpy()
    count, variance = deviation.size, float((deviation**2).sum())
    if count < 2 or variance == 0:
        return 0.0 if count > 1 else math.nan
    correlation = min(0.99, max(0.0, float((deviation[1:] * deviation[:-1]).sum()) / variance))
    effective = max(1.0, count * (1 - correlation) / (1 + correlation))
    return math.sqrt(variance / (count - 1) / effective)


def what_ran(data: RunData) -> list[tuple[str, str]]:
    """(preset, explanation) of every preset among the records, in order of appearance."""
    presets = dict.fromkeys(str(r.get("preset", "unknown")) for r in data.records)
    return [(name, PRESET_TEXT.get(name, "a configuration of its own; see the configuration below")) for name in presets]
