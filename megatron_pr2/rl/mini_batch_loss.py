"""The loss of a mini-batch as settings choose it: of each micro-batch, what it is divided by, and its metrics over all ranks."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_pr2.replay.session import ReplaySession
from megatron_pr2.rl.config import AlgorithmConfig
from megatron_pr2.rl.losses import LOSS_COLUMNS, behaviour_log_ratio, behaviour_weights, decoupled_loss, diagnose
from megatron_pr2.rl.objectives import MASKING, OVER_RESPONSES, router_shift_weight
from megatron_pr2.rl.router_shift import RouterShift

logger = logging.getLogger(__name__)


class MiniBatchLoss:
    """What the actor's forward step ends with while it trains; :meth:`begin` precedes the micro-batches of a mini-batch."""

    def __init__(self, algorithm: AlgorithmConfig, device: torch.device, group: dist.ProcessGroup) -> None:
        """Args: `group` are the data-parallel ranks, `device` is where it communicates."""
        self._algorithm, self._device, self._group = algorithm, device, group
        self._router_shift = RouterShift() if algorithm.loss == "rspo" else None
        self._scale = 1.0
        self._correction: dict[str, Any] = {
            "kind": algorithm.importance,
            "cap": algorithm.importance_cap,
            "floor": algorithm.importance_floor,
            "level": algorithm.importance_level,
        }

    def log_prob_pass(self, session: ReplaySession) -> AbstractContextManager[None]:
        """Around the log-prob pass of a rollout batch."""
        return nullcontext() if self._router_shift is None else self._router_shift.keeping(session)

    def training_pass(self, session: ReplaySession) -> AbstractContextManager[None]:
        """Around the training pass of a mini-batch."""
        return nullcontext() if self._router_shift is None else self._router_shift.measuring(session)

    def begin(self, items: Sequence[dict[str, Any]]) -> None:
        """Counts the mini-batch where its loss is a mean over responses; collective then.

        Megatron-Core divides gradients by a count of tokens, by which it scales auxiliary losses too. Times tokens per response, a
        sum over responses is divided by responses.
        """
        if self._algorithm.loss not in OVER_RESPONSES:
            return
        counts = torch.zeros(2, dtype=torch.float64, device=self._device)
        for item in items:
            log_ratio = behaviour_log_ratio(item["old_logprobs"], item["rollout_logprobs"], item["mask"])
            mask = behaviour_weights(log_ratio, item["mask"], **self._correction).mask
            counts += torch.stack([mask.sum(), (mask.sum(1) > 0).sum()]).to(counts)
        dist.all_reduce(counts, group=self._group)
        tokens, responses = counts.tolist()
        self._scale = tokens / max(responses, 1.0)

    def __call__(self, item: dict[str, Any], logprobs_BS: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """(loss, loss-bearing tokens, what :meth:`metrics` adds up) of a micro-batch; Megatron-Core divides by all tokens."""
        algorithm, ratio_weights = self._algorithm, None
        if self._router_shift is not None:
            ratio_weights = router_shift_weight(self._router_shift.shift(item["micro_batch"]), algorithm.router_shift_floor)
        low, high = algorithm.clip
        assert high is not None, "validate() lets no loss without its bounds through"
        loss, sums, extremes, diagnostics = decoupled_loss(
            logprobs_BS,
            *(item[name] for name in ("old_logprobs", "rollout_logprobs", "advantages", "mask")),
            clip_low=low,
            clip_high=high,
            **self._correction,
            loss=algorithm.loss,
            threshold=algorithm.mask_threshold or 0.0,
            ratio_weights=ratio_weights,
        )
        results = {"sums": sums, "extremes": extremes, "diagnostics": diagnostics}
        return loss * self._scale, sums[0].to(torch.int), results

    def metrics(self, results: Sequence[dict[str, Any]], mini_step: int) -> dict[str, Any]:
        """Over the micro-batches of all ranks; collective.

        Returns:
            loss, clip_fraction, ratio_mean, ratio_std, ratio_min, ratio_max, approx_kl; masked_fraction of a loss that masks,
            router_shift_weight (mean) of rspo, and with a correction "importance" (losses.diagnose).
        """
        sums = torch.stack([r["sums"] for r in results]).sum(0).double()
        lows, highs = torch.stack([r["extremes"] for r in results]).double().unbind(1)
        extremes = torch.stack([-lows.min(), highs.max()])
        dist.all_reduce(sums, group=self._group)
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=self._group)
        total = dict(zip(LOSS_COLUMNS, sums.tolist(), strict=True))
        mean = {name: value / max(total["tokens"], 1.0) for name, value in total.items()}
        out: dict[str, Any] = {
            "loss": total["loss"] / max(total["divisor"], 1.0),
            "clip_fraction": mean["clipped"],
            "ratio_mean": mean["ratio"],
            "ratio_std": math.sqrt(max(0.0, mean["ratio_squared"] - mean["ratio"] ** 2)),
            "ratio_min": -extremes[0].item(),
            "ratio_max": extremes[1].item(),
            "approx_kl": mean["approx_kl"],
        }
        if self._algorithm.loss in MASKING:
            out["masked_fraction"] = mean["masked"]
        if self._router_shift is not None:
            out["router_shift_weight"] = mean["ratio_weight"]
        if self._algorithm.corrects:
            diagnostics = torch.stack([r["diagnostics"] for r in results]).sum(0)
            dist.all_reduce(diagnostics, group=self._group)
            out["importance"] = diagnose(diagnostics)
            if not total["tokens"]:
                logger.warning(
                    "mini-step %d: importance=mis dropped every token, so nothing was learned; widen its bounds", mini_step
                )
        return out
