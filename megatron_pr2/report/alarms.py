"""Alarms: what to look at first, a line each, with its threshold, where it happened and what to do."""

from __future__ import annotations

import pandas as pd

from megatron_pr2.replay.logprob_gap import BOUNDS, OLDER_BOUNDS
from megatron_pr2.report import formats
from megatron_pr2.report.measures import Form
from megatron_pr2.report.records import RunData
from megatron_pr2.report.summary import predicted

MISSING_SHARE = 0.001
CLIP_FRACTION = 0.2
# A gradient norm this many times the median of the rollouts before it; of so many, and not before there are so many.
SPIKE, SPIKE_ROLLOUTS, FEWEST_BEFORE = 5.0, 20, 5
DELIVERED = 0.5  # as in the warning of a push


def alarms(data: RunData, dtype: str = "") -> list[str]:
    """The alarms of a run, none where everything stayed within its threshold or was not measured.

    Args:
        dtype: the model's, by which log-probs of engine and actor may differ; the widest bound where it is not known.
    """
    frame = data.rollouts.set_index("step")

    def of(pattern: str, how: str = "mean") -> pd.Series:
        return data.columns(pattern).set_axis(frame.index).agg(how, axis=1).dropna()

    norm = of("grad_norm")
    usual = norm.shift().rolling(SPIKE_ROLLOUTS, min_periods=FEWEST_BEFORE).median()
    gap = OLDER_BOUNDS[0] if predicted(data) else BOUNDS.get(dtype, BOUNDS["bfloat16"])[0]
    missing, clipped, delivered = of("routes.missing_share"), of("mini_steps.*.clip_fraction", "max"), of("delivered.*", "min")
    gaps = of("logprob_gap.mean")
    found = [
        _line(
            f"Log-prob gap above {formats.scientific(gap)}", gaps[gaps > gap], formats.scientific,
            "engine and actor score the same tokens differently: compare weights, dtype and temperature; run megatron-pr2 doctor",
        ),
        _line(
            f"Missing routes above {formats.percent(MISSING_SHARE, 1)} of the tokens", missing[missing > MISSING_SHARE],
            formats.percent, "run megatron-pr2 doctor, and look for retractions and time-outs in the engine's log",
        ),
        _line(
            f"Clip fraction above {formats.percent(CLIP_FRACTION, 0)} in a mini-step", clipped[clipped > CLIP_FRACTION],
            formats.percent, "the policy moves too far for its rollouts: fewer mini-steps or a lower learning rate",
        ),
        _line(
            f"Gradient norm above {SPIKE:.0f} times the median of the {SPIKE_ROLLOUTS} rollouts before",
            norm[norm > SPIKE * usual], formats.fixed,
            "look at that batch's rewards and log-prob gap; if spikes return, clip gradients lower",
        ),
        _line(
            f"Delivered share of the prediction below {formats.percent(DELIVERED, 0)}", delivered[delivered < DELIVERED],
            formats.percent, "the push rounds the prediction away: push gates in fp32 where the engine keeps them so", lowest=True,
        ),
    ]  # fmt: skip
    return [line for line in found if line]


def _line(what: str, bad: pd.Series, form: Form, advice: str, *, lowest: bool = False) -> str:
    if bad.empty:
        return ""
    worst = bad.idxmin() if lowest else bad.idxmax()
    where = f"rollout step {bad.index[0]:.0f}" if len(bad) == 1 else f"{len(bad)} rollouts, first at step {bad.index[0]:.0f}"
    text = form(bad[worst]) if len(bad) == 1 else f"worst {form(bad[worst])} at step {worst:.0f}"
    return f"{what}: {where} ({text}); {advice}."
