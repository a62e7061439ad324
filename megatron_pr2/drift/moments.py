"""Second moments of predicted and true drift: R^2, correlations and the best multiple of a prediction follow from them.

Of a sampled token, all centred over the experts, because a shift of all logits alike chooses no other expert:

    true       p - p_old          what its logits did since the old-log-prob pass
    predicted  W_p h_old          what the push that it was rolled out with predicts, in full: before hold-back's beta and rounding
    gate       (W - W_old) h_old  the part of the true drift that is the gate's own; the rest is that of its input

Sums over tokens and experts: they add up over micro-batches, ranks, mini-steps and rollout batches.

Shape suffixes: S sampled tokens, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

MOMENTS = ("predicted_squared", "predicted_true", "true_squared", "gate_squared", "gate_true")
EXPLAINED = ("r_squared", "correlation", "gate_share", "hidden_share")


def drift_moments(predicted_SE: Tensor, true_SE: Tensor, gate_SE: Tensor) -> Tensor:
    """The sums of MOMENTS over the tokens, [len(MOMENTS)] float64."""
    drifts = torch.stack((predicted_SE, true_SE, gate_SE)).double()
    centred = (drifts - drifts.mean(-1, keepdim=True)).flatten(1)
    products = centred @ centred.t()
    return torch.stack((products[0, 0], products[0, 1], products[1, 1], products[2, 2], products[2, 1]))


def explained(moments: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """What follows from moments, entry by entry; NaN where nothing drifted, or for a correlation where nothing is predicted.

    Returns EXPLAINED:
        r_squared: share of the true drift that the whole prediction explains; negative where it adds more than it explains.
        correlation: its square is the r_squared of the best multiple.
        gate_share, hidden_share: variance of the gate's own part and of the rest, relative to that of the drift. The two are
            correlated, so that they need not add up to 1.
    """
    out: dict[str, list[float]] = {name: [] for name in EXPLAINED}
    for xx, xd, dd, gg, gd in zip(*(moments[name] for name in MOMENTS), strict=True):
        out["r_squared"].append(_ratio(2 * xd - xx, dd))
        out["correlation"].append(_ratio(xd, math.sqrt(xx * dd)))
        out["gate_share"].append(_ratio(gg, dd))
        out["hidden_share"].append(_ratio(dd - 2 * gd + gg, dd))
    return out


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0.0 else math.nan
