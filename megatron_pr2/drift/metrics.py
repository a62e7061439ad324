"""Drift metrics: how far the replayed routes are from what the current router would choose.

Shape suffixes: S sampled tokens, L local MoE layers, E experts, K top-k.

Everything is accumulated on the device, per layer, over the sampled tokens of the training passes, and read once per mini-step
(invariant I8). Names and definitions follow arXiv 2606.00395.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_pr2.drift.moments import MOMENTS, explained
from megatron_pr2.replay.alignment import Agreement
from megatron_pr2.replay.scores import divergence_terms
from megatron_pr2.replay.sequences import RolloutReport

COLUMNS = (
    "tokens",  # sampled tokens seen
    "changed_0",  # tokens whose replayed set equals the current top-k
    "changed_1",
    "changed_2",
    "changed_3+",
    "agreement",  # share of the replayed experts that are in the current top-k
    "frozen_agreement",  # the same for TopK(p_old): what replay without prediction would give
    "kl_predicted",  # KL(rho || q_hat)
    "kl_frozen",  # KL(rho || rho_old)
    "coverage_gap",  # mass of rho on its own top-k minus its mass on the replayed set
    "outside_mass",  # mass of rho outside the replayed set
)


def drift_columns(
    current_SK: Tensor,
    replayed_SK: Tensor,
    frozen_SK: Tensor,
    p_SE: Tensor,
    p_old_SE: Tensor,
    q_hat_SE: Tensor,
    score_function: str,
) -> Tensor:
    """Sums over the tokens of every column of COLUMNS, [..., len(COLUMNS)] float64.

    Sets are compared by looking up their K ids, and what is only a combination of sums is made of sums: on a GPU it is the number
    of operators that costs, on a CPU the [S, E] temporaries. Several layers go at once with a layer axis in front.

    Args:
        current_SK, replayed_SK, frozen_SK: [..., S, K] expert ids chosen by the current router, replayed, and chosen from p_old.
        p_SE, p_old_SE, q_hat_SE: [..., S, E] fp32 logits: current, under theta_old, predicted.
    """
    topk = current_SK.shape[-1]
    steps, combine = _constants(topk, p_SE.device)
    rho_SE, kl_NSE = divergence_terms(p_SE, torch.stack((q_hat_SE, p_old_SE)), score_function)
    kl = kl_NSE.sum((-2, -1)).movedim(0, -1)
    if score_function != "softmax":
        # As Megatron-Core normalises them where it balances load.
        rho_SE = rho_SE / (rho_SE.sum(-1, keepdim=True) + 1e-20)
    # Of (replayed, frozen, current), per token: how many are in the current top-k, and their mass; [..., S, 3].
    ids = torch.cat((replayed_SK.long(), frozen_SK.long(), current_SK.long()), dim=-1)
    own_SE = torch.zeros_like(p_SE).scatter_(-1, ids[..., 2 * topk :], 1.0)
    kept = own_SE.gather(-1, ids).unflatten(-1, (3, topk)).sum(-1)
    mass = rho_SE.gather(-1, ids).unflatten(-1, (3, topk)).sum(-1)
    changed = kept[..., :1].clamp(min=topk - 3) == steps
    sums = [each.sum(-2, dtype=torch.float64) for each in (changed, kept, mass)]
    return torch.cat((*sums, kl.double()), dim=-1) @ combine


@cache
def _constants(topk: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(kept experts when 0, 1, 2, 3 or more changed; the matrix from raw sums to COLUMNS); once, since it is a copy to the device.

    Raw sums are changed_0 .. changed_3+, kept of (replayed, frozen, current), mass of (replayed, frozen, current), the two KLs.
    """
    any_change, share = torch.ones(4, dtype=torch.float64), 1.0 / topk
    columns = torch.zeros(len(COLUMNS), 12, dtype=torch.float64)
    rows = {name: columns[index] for index, name in enumerate(COLUMNS)}
    rows["tokens"][:4] = any_change
    for changed in range(4):
        columns[1 + changed, changed] = 1.0
    rows["agreement"][4] = rows["frozen_agreement"][5] = share
    rows["kl_predicted"][10] = rows["kl_frozen"][11] = 1.0
    rows["coverage_gap"][9], rows["coverage_gap"][7] = 1.0, -1.0
    rows["outside_mass"][:4], rows["outside_mass"][7] = any_change, -1.0
    steps = torch.arange(topk, topk - 4, -1, dtype=torch.float32)
    return steps.to(device, non_blocking=True), columns.t().contiguous().to(device, non_blocking=True)


class DriftMetrics:
    """Per-layer sums of drift columns on the device, with those of drift.moments where they are measured."""

    def __init__(self, num_layers: int, device: torch.device, *, moments: bool = False) -> None:
        self._names = COLUMNS + MOMENTS * moments
        self._sums_LC = torch.zeros(num_layers, len(self._names), dtype=torch.float64, device=device)

    def add(self, layer: int | slice, columns_C: Tensor) -> None:
        """Adds one micro-batch's sums of one local layer, or of several with a layer axis in front: COLUMNS, then any MOMENTS."""
        self._sums_LC[layer] += columns_C

    def discard(self) -> None:
        """Forgets what was added since the last read."""
        self._sums_LC.zero_()

    def read(self, group: dist.ProcessGroup | None) -> dict[str, list[float]]:
        """Reduces over `group` (every rank of it calls), returns per-layer means and `tokens`, and starts over.

        `lift` is agreement minus frozen agreement: what prediction gained. With moments also what they say (`explained`). Layers
        without a sampled token read NaN.
        """
        if group is not None and dist.get_world_size(group) > 1:
            dist.all_reduce(self._sums_LC, group=group)
        sums = self._sums_LC.to("cpu", copy=True)
        self._sums_LC.zero_()
        means = sums[:, 1:] / sums[:, :1]
        out = {"tokens": sums[:, 0].tolist()}
        out |= {name: means[:, i].tolist() for i, name in enumerate(self._names[1:])}
        out["lift"] = [a - b for a, b in zip(out["agreement"], out["frozen_agreement"], strict=True)]
        return out | (explained(out) if MOMENTS[0] in out else {})


def missing_share(report: RolloutReport) -> dict[str, float]:
    """`pr2/missing_share`: tokens of this rank's replica without a valid route, of those that could have one."""
    return {"pr2/missing_share": report.missing / report.tokens} if report.tokens else {}


def scalars(
    report: Mapping[str, Any], engine_agreement: Agreement | None, sample_fraction: float | None = None
) -> dict[str, float]:
    """What a logger wants: a step's report in a few plain numbers, averaged over MoE layers. What was not measured is absent.

    | Key | What it is |
    | --- | --- |
    | `pr2/engine_agreement` | engine's experts that the current router chose as well in the last old-log-prob pass |
    | `pr2/engine_agreement_min` | the same of the layer where it is lowest |
    | `pr2/agreement`, `pr2/frozen_agreement`, `pr2/lift`, ... | COLUMNS and lift, means over sampled tokens |
    | `pr2/r_squared`, `/correlation`, `/gate_share`, `/hidden_share` | drift.moments.explained: predicted against true drift |
    | `pr2/predictor/tokens`, `/grad_norm`, `/weight_norm` | the predictor's last update |
    | `pr2/hold_back/beta`, `/lift`, `/lift_error` | the share of W_p that is used, and the measured gain that decides it |
    | `pr2/delivered` | share of beta W_p that arrived in the gates as they were pushed |
    | `pr2/unjudged` | sampled tokens of this rank whose weights are none of the last pushes |
    | `pr2/features_absent` | sampled tokens of this rank that no log-prob pass kept features of |
    | `pr2/sample_fraction` | share of loss-bearing tokens with features: the setting, or what `feature_bytes` allows |

    Args:
        report: what `PR2.step` returns.
    """
    drift: Mapping[str, Sequence[float]] = report["drift"]
    held: Mapping[str, Sequence[float]] = report.get("hold_back", {})
    delivered: Sequence[float] = report.get("delivered", ())
    found: dict[str, float | None] = {
        "pr2/engine_agreement": None if engine_agreement is None else engine_agreement.overall,
        "pr2/engine_agreement_min": None if engine_agreement is None else engine_agreement.least_layer,
        "pr2/features_absent": float(report["features_absent"]),
        "pr2/sample_fraction": sample_fraction,
        **{f"pr2/{name}": _mean(values, drift["tokens"]) for name, values in drift.items() if name not in ("tokens", *MOMENTS)},
        **{f"pr2/predictor/{name}": value for name, value in report["predictor"].items()},
        **{f"pr2/hold_back/{name}": _mean(values, [1.0] * len(values)) for name, values in held.items()},
        "pr2/delivered": _mean(delivered, [1.0] * len(delivered)),
        "pr2/unjudged": report.get("unjudged"),
    }
    return {key: value for key, value in found.items() if value is not None and math.isfinite(value)}


def _mean(values: Sequence[float], weights: Sequence[float]) -> float | None:
    """Weighted mean of what is finite; None if nothing is."""
    pairs = [(v, w) for v, w in zip(values, weights, strict=True) if math.isfinite(v) and w > 0]
    total = sum(w for _, w in pairs)
    return sum(v * w for v, w in pairs) / total if total else None
