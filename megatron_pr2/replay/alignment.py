"""Are routes and tokens aligned? An engine's routes against the actor's own choice in the old-log-prob pass.

Engine and actor hold nearly the same weights then (in bf16 about 97 % of the experts agree), and a route that lies on another
token's row agrees by chance only, top-k / experts. That is the one sign of a micro-batch whose grid names other rows than the model
runs while their number is right: nothing else would fail, and the run would train on noise.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_pr2.errors import ReplayError
from megatron_pr2.routes.overlap import membership


class AgreementCheck:
    """Counts on the device over one pass, read once at its end."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, live_SK: Tensor, replayed_SK: Tensor, num_experts: int) -> None:
        """Adds the sampled tokens of one micro-batch and layer."""
        both = membership(live_SK, num_experts) * membership(replayed_SK, num_experts)
        self._sums[0] += both.sum()
        self._sums[1] += float(live_SK.numel())

    def discard(self) -> None:
        """Forgets what was added."""
        self._sums.zero_()

    def read(self, groups: list[dist.ProcessGroup]) -> float | None:
        """Share of agreeing experts over `groups`, one after the other, and a new start; None without a sampled token."""
        for group in groups:
            if group.size() > 1:
                dist.all_reduce(self._sums, group=group)
        agreeing, experts = self._sums.tolist()
        self._sums.zero_()
        return agreeing / experts if experts else None


def require_alignment(agreement: float | None, least: float, topk: int, num_experts: int) -> None:
    """Refuses routes that belong to other tokens.

    Raises:
        ReplayError: fewer agree than `least`.
    """
    if agreement is None or agreement >= least:
        return
    raise ReplayError(
        f"only {agreement:.1%} of the replayed experts are those that the live router chooses under the weights of the rollout, "
        f"less than min_agreement={least:.0%} (unrelated tokens would agree in {topk / num_experts:.1%}): the micro-batches' grids "
        "do not say which token is in which row, or the engine ran other weights. Check padding, packing and the order of "
        "context-parallel chunks, and run the handshake"
    )
