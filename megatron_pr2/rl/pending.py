"""Samples that wait for their training step, as parts of a checkpoint: with `rollout.delay` a batch is sampled a step ahead.

Every rank writes the samples that it holds; one that reads takes its share of them, on whatever number of ranks.

    pending.samples    [N, 5] int64: id, tokens of the prompt and of the response, turns, whether the response ended by itself
    pending.scores     [N, 3] fp64: reward, advantage, horizon (NaN: the average)
    pending.tokens     [T, 4] int64: id, weight version (-1: not sampled), whether it bears loss, whether it has a route
    pending.logprobs   [T] fp32, the engine's; 0 for prompts
    pending.routes     [T, L, K] uint8 or int16, where routes are an engine's

Shape suffixes: N samples, T their tokens, prompts and responses, L MoE layers, K top-k.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_pr2.checkpoint import files
from megatron_pr2.errors import CheckpointError
from megatron_pr2.parallel.groups import gathered
from megatron_pr2.rl.batch import Sample
from megatron_pr2.rollout.base import RolloutResponse
from megatron_pr2.rollout.collective import share
from megatron_pr2.routes.ids import expert_dtype
from megatron_pr2.routes.table import RouteTable

SAMPLES, SCORES, TOKENS, LOGPROBS, ROUTES = (f"pending.{name}" for name in ("samples", "scores", "tokens", "logprobs", "routes"))


def pending_shards(samples: Sequence[Sample], group: dist.ProcessGroup) -> dict[str, Any]:
    """This rank's samples as shards of the whole batch; collective over the data-parallel `group`."""
    parts = [_token_rows(sample.response) for sample in samples]
    rows = []
    for sample in samples:
        response = sample.response
        lengths = len(response.prompt_ids), len(response.response_ids)
        rows.append([sample.id, *lengths, response.turns, response.finish_reason == "stop"])
    scores = [[s.reward, s.advantage, math.nan if s.response.horizon is None else s.response.horizon] for s in samples]
    kinds = {
        SAMPLES: torch.tensor(rows, dtype=torch.int64),
        SCORES: torch.tensor(scores, dtype=torch.float64),
        **{key: torch.cat([part[key] for part in parts]) for key in parts[0]},
    }
    counts = gathered({key: len(kind) for key, kind in kinds.items()}, group)
    shards = {}
    for key, kind in kinds.items():
        first, total = sum(count[key] for count in counts[: group.rank()]), sum(count[key] for count in counts)
        shards[key] = files.uneven_shard(key, kind, (first,), (total, *kind.shape[1:]))
    return shards


def _token_rows(response: RolloutResponse) -> dict[str, torch.Tensor]:
    """What is known of each token."""
    prompt, table = len(response.prompt_ids), response.routes
    tokens_T4 = np.zeros((len(response.token_ids), 4), dtype=np.int64)
    tokens_T4[:, 0], tokens_T4[:prompt, 1] = response.token_ids, -1
    tokens_T4[prompt:, 1], tokens_T4[prompt:, 2] = response.weight_versions, response.loss_mask
    logprobs_T = np.concatenate([np.zeros(prompt, dtype=np.float32), response.logprobs.astype(np.float32)])
    rows = {TOKENS: torch.from_numpy(tokens_T4), LOGPROBS: torch.from_numpy(logprobs_T)}
    if table is not None:
        tokens_T4[:, 3] = table.valid
        rows[ROUTES] = torch.from_numpy(table.experts.astype(np.int16 if table.experts.dtype.itemsize > 1 else np.uint8))
    return rows


def read_pending(directory: Path, group: dist.ProcessGroup, num_experts: int) -> list[Sample]:
    """This rank's share of a checkpoint's samples, in the order of their ids; collective over all ranks.

    Raises:
        CheckpointError: on every rank, if there are none, or any rank cannot read its part.
    """
    return files.together(lambda: _read(files.RowReader(directory), directory, group, num_experts))


def _read(reader: files.RowReader, directory: Path, group: dist.ProcessGroup, num_experts: int) -> list[Sample]:
    if reader.shape(SAMPLES) is None:
        raise CheckpointError(f"{directory} holds no samples that wait for training, as a run with rollout.delay keeps them")
    rows, scores = reader.read(SAMPLES).numpy(), reader.read(SCORES).numpy()
    own = np.argsort(rows[:, 0])[share(len(rows), group.size(), group.rank())]
    stops = np.cumsum(rows[:, 1] + rows[:, 2])
    starts = stops - rows[:, 1] - rows[:, 2]
    # In the old layout a rank's samples lie side by side.
    first, last = int(starts[own].min()), int(stops[own].max())
    tokens_T4, logprobs_T = reader.read(TOKENS, first, last).numpy(), reader.read(LOGPROBS, first, last).numpy()
    with_routes = reader.shape(ROUTES) is not None
    if with_routes:
        experts_TLK = reader.read(ROUTES, first, last).numpy().view(expert_dtype(num_experts))
    samples = []
    for place in own.tolist():
        sid, prompt, _, turns, ended = rows[place].tolist()
        reward, advantage, horizon = scores[place].tolist()
        span = slice(int(starts[place]) - first, int(stops[place]) - first)
        ids, versions, bears, valid = tokens_T4[span].T
        response = RolloutResponse(
            prompt_ids=tuple(ids[:prompt].tolist()),
            response_ids=tuple(ids[prompt:].tolist()),
            logprobs=logprobs_T[span][prompt:],
            routes=RouteTable(experts_TLK[span], valid.astype(bool), num_experts) if with_routes else None,
            finish_reason="stop" if ended else "length",
            weight_versions=versions[prompt:],
            loss_mask=bears[prompt:].astype(bool),
            turns=turns,
            horizon=None if math.isnan(horizon) else horizon,
        )
        samples.append(Sample(sid, response, reward, advantage))
    return samples
