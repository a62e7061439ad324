"""Samples and how they are cut into micro-batches of padded [B, S] tensors.

A model input is the whole sequence: token t predicts token t + 1. Loss is borne by the positions prompt_len - 1 .. length - 2,
whose outputs are the response's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_pr2.attach import ReplaySequence
from megatron_pr2.errors import RolloutError
from megatron_pr2.parallel.grid import padded
from megatron_pr2.replay.micro_batch import MicroBatch
from megatron_pr2.rollout.base import RolloutResponse


@dataclass
class Sample:
    """One response with what training needs of it.

    Attributes:
        id: unique over the whole run.
        reward, advantage: of the whole response.
        old_logprobs: [len(response_ids)] float32, of no meaning where the response's loss_mask is off.
        snapshot_logprobs: the same under the weights at the start of the rollout batch, where there was a pass under them.
    """

    id: int
    response: RolloutResponse
    reward: float
    advantage: float
    old_logprobs: npt.NDArray[np.float32] | None = None
    snapshot_logprobs: npt.NDArray[np.float32] | None = None

    @property
    def length(self) -> int:
        return len(self.response.prompt_ids) + len(self.response.response_ids)

    @property
    def loss_span(self) -> tuple[int, int]:
        """Input positions whose outputs are the response's tokens; the response's loss_mask says which of them bear loss."""
        return len(self.response.prompt_ids) - 1, self.length - 1

    def rollout_logprobs(self) -> npt.NDArray[np.float32]:
        """The engine's log-probs of the response, [len(response_ids)] float32.

        Raises:
            RolloutError: they are not one finite number for every token that bears loss.
        """
        logprobs = np.asarray(self.response.logprobs, dtype=np.float32)
        tokens = len(self.response.response_ids)
        if logprobs.shape != (tokens,):
            raise RolloutError(
                f"sample {self.id}: {logprobs.shape} log-probs for {tokens} response tokens; expected one each. "
                "Ask the engine for them, or set old_logprobs=recompute, importance=none and loss=grpo"
            )
        bad = ~np.isfinite(logprobs) & self.response.loss_mask
        if bad.any():
            raise RolloutError(
                f"sample {self.id}: the engine's log-prob of response token {int(bad.argmax())} is {logprobs[bad.argmax()]}, and "
                f"{int(bad.sum())} of {bad.size} are not finite; a sampled token has a finite one. Set old_logprobs=recompute, "
                "importance=none and loss=grpo to do without them"
            )
        return logprobs

    def replay_sequence(self, mini_step: int | None = None, version: int = 0) -> ReplaySequence:
        """What PR2 has to know of it; `mini_step` is the one that will train on it, from 1, `version` that of the last push."""
        response = self.response
        versions = response.weight_versions[response.loss_mask]
        return ReplaySequence(
            self.id,
            self.length,
            *self.loss_span,
            routes=response.routes,
            loss_mask=response.loss_mask,
            mini_step=mini_step,
            horizon=response.horizon,
            token_ids=response.token_ids,
            versions=response.weight_versions,
            older=bool((versions < version).any()),
        )


def micro_batches(
    samples: Sequence[Sample], size: int, pad_id: int, *, rollout_logprobs: bool = False
) -> list[dict[str, Any]]:
    """Cuts samples into micro-batches of `size` sequences, in order.

    Args:
        rollout_logprobs: the engine's are needed; zeros otherwise.

    Returns:
        One dict per micro-batch: tokens, labels, position_ids [B, S] int64; mask, advantages, old_logprobs, rollout_logprobs [B, S]
        float32; samples; micro_batch, by which a replay session finds it.

    Raises:
        RolloutError: the engine's log-probs are needed, and a sampled token has none.
    """
    out = []
    for start in range(0, len(samples), size):
        chunk = list(samples[start : start + size])
        width = max(sample.length for sample in chunk)
        item: dict[str, Any] = {
            "tokens": torch.full((len(chunk), width), pad_id, dtype=torch.int64),
            "labels": torch.full((len(chunk), width), pad_id, dtype=torch.int64),
            "position_ids": torch.arange(width, dtype=torch.int64).repeat(len(chunk), 1),
            **{name: torch.zeros(len(chunk), width) for name in ("mask", "advantages", "old_logprobs", "rollout_logprobs")},
            "samples": chunk,
        }
        for row, sample in enumerate(chunk):
            ids = torch.tensor(sample.response.token_ids, dtype=torch.int64)
            item["tokens"][row, : len(ids)] = ids
            item["labels"][row, : len(ids) - 1] = ids[1:]
            first, stop = sample.loss_span
            item["mask"][row, first:stop] = torch.from_numpy(sample.response.loss_mask.astype(np.float32))
            item["advantages"][row, first:stop] = sample.advantage
            if sample.old_logprobs is not None:
                item["old_logprobs"][row, first:stop] = torch.from_numpy(sample.old_logprobs)
            if rollout_logprobs:
                item["rollout_logprobs"][row, first:stop] = torch.from_numpy(sample.rollout_logprobs())
        item["micro_batch"] = MicroBatch(chunk[0].id, padded([s.id for s in chunk], [s.length for s in chunk], width))
        out.append(item)
    return out
