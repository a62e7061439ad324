"""Drift metrics: how far the replayed routes are from what the current router would choose.

Shape suffixes: S sampled tokens, L local MoE layers, E experts, K top-k.

Everything is accumulated on the device, per layer, over the sampled tokens of the training passes, and read once per mini-step
(invariant I8). Names and definitions follow arXiv 2606.00395.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_pr2.predictor import divergence, score

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


def membership(ids_SK: Tensor, num_experts: int) -> Tensor:
    """[S, E] float, 1 where the expert is in the set."""
    return torch.zeros(ids_SK.shape[0], num_experts, device=ids_SK.device).scatter_(1, ids_SK.long(), 1.0)


def drift_columns(
    current_SK: Tensor,
    replayed_SK: Tensor,
    frozen_SK: Tensor,
    p_SE: Tensor,
    p_old_SE: Tensor,
    q_hat_SE: Tensor,
    score_function: str,
) -> Tensor:
    """Sums over the tokens of every column of COLUMNS, [len(COLUMNS)].

    Args:
        current_SK, replayed_SK, frozen_SK: expert ids chosen by the current router, replayed, and chosen from p_old.
        p_SE, p_old_SE, q_hat_SE: fp32 logits: current, under theta_old, predicted.
    """
    topk, experts = current_SK.shape[1], p_SE.shape[1]
    current, replayed = membership(current_SK, experts), membership(replayed_SK, experts)
    kept = (current * replayed).sum(1)
    changed = topk - kept
    rho = score(p_SE, score_function)
    rho = rho / rho.sum(-1, keepdim=True)
    columns = [
        torch.ones_like(kept),
        (changed == 0).float(),
        (changed == 1).float(),
        (changed == 2).float(),
        (changed >= 3).float(),
        kept / topk,
        (current * membership(frozen_SK, experts)).sum(1) / topk,
        divergence(p_SE, q_hat_SE, score_function),
        divergence(p_SE, p_old_SE, score_function),
        (rho * current).sum(1) - (rho * replayed).sum(1),
        1.0 - (rho * replayed).sum(1),
    ]
    return torch.stack([c.sum() for c in columns])


class DriftMetrics:
    """Per-layer sums of drift columns on the device."""

    def __init__(self, num_layers: int, device: torch.device) -> None:
        self._sums_LC = torch.zeros(num_layers, len(COLUMNS), dtype=torch.float64, device=device)

    def add(self, layer: int, columns_C: Tensor) -> None:
        """Adds one micro-batch's sums of one local layer."""
        self._sums_LC[layer] += columns_C

    def discard(self) -> None:
        """Forgets what was added since the last read."""
        self._sums_LC.zero_()

    def read(self, group: dist.ProcessGroup | None) -> dict[str, list[float]]:
        """Reduces over `group` (every rank of it calls), returns per-layer means and `tokens`, and starts anew.

        `lift` is agreement minus frozen agreement: what prediction gained. Layers without a sampled token read NaN.
        """
        if group is not None and dist.get_world_size(group) > 1:
            dist.all_reduce(self._sums_LC, group=group)
        sums = self._sums_LC.to("cpu", copy=True)
        self._sums_LC.zero_()
        means = sums[:, 1:] / sums[:, :1]
        out = {"tokens": sums[:, 0].tolist()}
        out |= {name: means[:, i].tolist() for i, name in enumerate(COLUMNS[1:])}
        out["lift"] = [a - b for a, b in zip(out["agreement"], out["frozen_agreement"], strict=True)]
        return out
