"""The headline of a run: what ran, and whether prediction helped.

Agreement is the share of the replayed experts that are in the current router's top-k; frozen agreement is the same for
TopK(p_old), which replay without prediction (R3) would give; lift is their difference (drift.metrics). Replayed experts that
are not in the current router's top-k are stale slots, and the headline is the share of R3's that prediction removed, over all
mini-steps: the first, in which a prediction can only be wrong, counts as well.
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
    "pr2-lookahead": "the rollout engine samples with routes predicted by a look-ahead of the policy, which are replayed",
}
# Below this share of the mismatches a difference is not worth a predictor, however well it is measured.
SMALLEST_EFFECT = 0.01
# Fewer rollouts than this give no usable standard error.
FEWEST_ROLLOUTS = 5
NO_PREDICTION = "No gain over R3: nothing was predicted"
NO_DIFFERENCE = "No measurable gain over R3"


@dataclass(frozen=True)
class Verdict:
    """Whether prediction helped.

    Attributes:
        kind: "helped", "same", "hurt", "held" (disabled throughout by hold-back), "early" (too few rollouts) or "absent" (no
            predictor, or nothing to compare).
        lift, error: mean lift over all mini-steps and rollouts and its standard error, NaN if absent.
        removed: share of the frozen routes' stale slots that prediction removed (negative: added), NaN if there were none.
    """

    kind: str
    headline: str
    detail: str
    lift: float = math.nan
    error: float = math.nan
    removed: float = math.nan


def judge(data: RunData) -> Verdict:
    """The verdict on prediction: it helped or hurt where the share of R3's stale slots that it removed is more than two standard
    errors away from zero, and at least 1 %; where R3 has none, by the mean lift.
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
        why = "one set of gates for all mini-steps could gain nothing" if _by_moments(data) else "held-out tokens showed no gain"
        detail = (
            f"Beta was 0 in all {betas.iloc[-1].count()} MoE layers of every rollout{so_far}: {why}. "
            "Such a run is neither better nor worse off than R3."
        )
        if math.isfinite(lift) and round(lift, 5):
            detail += f" Its lift, {formats.points(lift, 3)}, only shows how the engine's routes differ from the actor's own."
        return Verdict("held", "No gain over R3: prediction stayed disabled (hold-back)", detail, lift, error)
    if data.known("lift").empty:
        return Verdict(
            "absent",
            "The gain over R3 cannot be judged",
            "No mini-step after the first has a lift: drift is not measured (pr2.drift=false), or there is one mini-step per "
            "rollout, so that the policy is never newer than its routes and a prediction can only be wrong.",
        )
    removed, removed_error = data.removed(), ratio_error(data.rollouts["lift_all"], data.mismatches())
    certain = abs(removed) > 2 * removed_error if math.isfinite(removed_error) else abs(lift) > 2 * error
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
        return verdict("early", "The gain over R3 cannot be judged yet: too few rollouts", detail)
    share = _interval(100 * abs(removed), 100 * removed_error, ".1f", " %")
    difference = NO_DIFFERENCE
    if math.isfinite(removed):
        difference += f": {_interval(100 * removed, 100 * removed_error, '.1f', ' %')} of its stale slots removed"
    if not certain or abs(removed) < SMALLEST_EFFECT or not lift:
        detail = f"Replayed routes matched the updated routers about as well as R3's frozen ones would have ({numbers}).{now}"
        return verdict("same", difference, detail)
    stale = f"Of R3's frozen routes {formats.percent(data.frozen_mismatch())} would have been stale"
    if lift > 0:
        return verdict("helped", f"Prediction removed {share} of R3's stale slots", f"{stale} ({numbers}).{now}")
    rounding = engine_rounding(data)
    if -lift <= rounding + 2 * error:
        detail = (
            f"Replayed routes matched the updated routers worse than the actor's frozen ones would have ({numbers}), but by no "
            f"more than the engine's rounding explains: under the same weights {formats.percent(rounding)} of its experts were "
            f"not the actor's (handshake), with R3 too. Compare with a run of preset r3.{now}"
        )
        return verdict("same", difference, detail)
    worse, headline = "R3's frozen routes would have had no stale slot", "Prediction added stale slots where R3 has none"
    if math.isfinite(removed):
        worse, headline = stale, f"Prediction added {share} to R3's stale slots"
    advice = "Try a smaller alpha, or preset r3." if len(betas) else "Turn pr2.hold_back on, or try a smaller alpha or preset r3."
    if _by_moments(data):
        advice = "Give each mini-step gates of its own (rollout.groups), or use preset r3."
    return verdict("hurt", headline, f"{worse} ({numbers}).{now} {advice}")


def predicted(data: RunData) -> bool:
    """Whether there was a prediction at all, used or disabled."""
    return any((data.known(f"predictor.{name}") > 0).any() for name in ("tokens", "weight_norm"))


def _by_moments(data: RunData) -> bool:
    """Whether hold-back judges a look-ahead, by moments."""
    return not numbered(data.rollouts, "hold_back.correlations.#").dropna(how="all").empty


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


def ratio_error(part: pd.Series, whole: pd.Series) -> float:
    """Standard error of a ratio of two means over rollouts, from its residuals, of which neighbours may be correlated."""
    mean = float(whole.mean())
    return standard_error(part - part.mean() / mean * whole) / mean if mean > 1e-12 else math.nan


def against(data: RunData, other: RunData, name: str) -> str:
    """What a run gained over another one, in a sentence: over the steps that both have, with 95 % intervals."""
    pairs = [each.rollouts.assign(stale=each.mismatches("agreement")).set_index("step") for each in (data, other)]
    both = pairs[0].join(pairs[1], how="inner", lsuffix="", rsuffix="_other")
    said = []
    stale = both[["stale", "stale_other"]].dropna()
    if len(stale) and stale["stale_other"].mean() > 1e-12:
        fewer = stale["stale_other"] - stale["stale"]
        share, error = fewer.mean() / stale["stale_other"].mean(), ratio_error(fewer, stale["stale_other"])
        said.append(f"{_interval(100 * share, 100 * error, '.1f', ' %')} of its stale slots removed")
    else:
        said.append("stale slots were not measured in both")
    if "reward" in both and "reward_other" in both:
        reward = both["reward"] - both["reward_other"]
        said.append(f"reward {_interval(float(reward.mean()), standard_error(reward), '+.3f')}")
    return f"Against {name}, over {formats.count(len(both), 'rollout step')} that both have: {'; '.join(said)}."


def _interval(value: float, error: float, form: str, unit: str = "") -> str:
    known = f" (95 % interval {value - 2 * error:{form}} to {value + 2 * error:{form}}{unit})" if math.isfinite(error) else ""
    return f"{value:{form}}{unit}{known}"


def what_ran(data: RunData) -> list[tuple[str, str]]:
    """(preset, explanation) of every preset among the records, in order of appearance."""
    presets = dict.fromkeys(str(r.get("preset", "unknown")) for r in data.records)
    return [(name, PRESET_TEXT.get(name, "a configuration of its own; see the configuration below")) for name in presets]
