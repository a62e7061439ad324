"""Numbers of one rollout step, reduced over the data-parallel ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_pr2.drift.metrics import COLUMNS
from megatron_pr2.rl.batch import Sample
from megatron_pr2.rollout.base import RolloutStats

PER_LAYER = ("agreement", "frozen_agreement", "lift", "kl_predicted", "kl_frozen", "coverage_gap")
MEANS = (*PER_LAYER, "outside_mass")
CHANGED = tuple(name for name in COLUMNS if name.startswith("changed_"))


def _reduced(values: Sequence[float], group: dist.ProcessGroup, op: Any = dist.ReduceOp.SUM) -> list[float]:
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, op=op, group=group)
    return tensor.tolist()


def step_summary(samples: Sequence[Sample], group: dist.ProcessGroup) -> dict[str, float]:
    """Reward mean and spread, response length, share of truncated responses, and the number of tokens, over all ranks."""
    rewards = np.array([s.reward for s in samples])
    lengths = [len(s.response.response_ids) for s in samples]
    truncated = sum(s.response.finish_reason == "length" for s in samples)
    count, reward, squared, length, cut, tokens = _reduced(
        [len(samples), rewards.sum(), (rewards**2).sum(), sum(lengths), truncated, sum(s.length for s in samples)], group
    )
    mean = reward / count
    return {
        "reward": mean,
        "reward_std": float(np.sqrt(max(0.0, squared / count - mean**2))),
        "response_length": length / count,
        "truncated": cut / count,
        "tokens": tokens,
    }


def rollout_summary(samples: Sequence[Sample], step: int, stats: RolloutStats, group: dist.ProcessGroup) -> dict[str, float]:
    """How responses were sampled: share of tokens from weights older than the step's, turns, and what the engine counted."""
    versions = [s.response.weight_versions[s.response.loss_mask] for s in samples]
    older = sum(int((v < step).sum()) for v in versions)
    count, tokens, old, turns = _reduced(
        [len(samples), sum(v.size for v in versions), older, sum(s.response.turns for s in samples)], group
    )
    return {**stats.extra, "older_tokens": old / max(tokens, 1.0), "turns": turns / max(count, 1.0)}


def logprob_gap(samples: Sequence[Sample], group: dist.ProcessGroup) -> dict[str, float]:
    """|log mu - log pi_old| per response token: the mismatch between the engine and the actor's old-log-prob pass.

    "kl" is the k3 estimate of KL(mu || pi_old) from the engine's samples.
    """
    with_old = [(s.old_logprobs, s.response) for s in samples if s.old_logprobs is not None]
    gaps = [(old.astype(np.float64) - response.logprobs)[response.loss_mask] for old, response in with_old]
    gap = np.concatenate([np.zeros(0), *gaps])
    count, absolute, kl = _reduced([gap.size, np.abs(gap).sum(), (np.exp(gap) - 1.0 - gap).sum()], group)
    (largest,) = _reduced([float(np.abs(gap).max(initial=0.0))], group, dist.ReduceOp.MAX)
    return {"mean": absolute / max(count, 1.0), "max": largest, "kl": kl / max(count, 1.0)}


def drift_summary(mini_steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Drift of each mini-step: means over layers, the histogram of changed experts, and what is kept per layer."""
    entries: list[dict[str, Any]] = []
    for step in mini_steps:
        drift = step["drift"]
        entries.append(
            {
                **{k: v for k, v in step.items() if k not in ("drift", "predictor", "features_absent", "hold_back")},
                **{name: _mean(drift[name]) for name in MEANS},
                "changed": [_mean(drift[name]) for name in CHANGED],
                "per_layer": {name: drift[name] for name in PER_LAYER},
            }
        )
    later = [e for e in entries if e["mini_step"] >= 2]
    out: dict[str, Any] = {name: _mean([e[name] for e in later]) for name in ("agreement", "frozen_agreement", "lift")}
    # The first mini-step too, in which nothing has drifted yet and a prediction can only be wrong.
    out["lift_all"] = _mean([e["lift"] for e in entries])
    out["mini_steps"] = entries
    if "hold_back" in mini_steps[-1]:
        out["hold_back"] = mini_steps[-1]["hold_back"]
    return out


def _mean(values: Sequence[float]) -> float:
    """Mean of the values that are numbers; NaN where there is none."""
    known = [v for v in values if not np.isnan(v)]
    return float(np.mean(known)) if known else float("nan")
