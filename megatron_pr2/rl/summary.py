"""Numbers of one rollout step, reduced over the data-parallel ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_pr2.attach import PR2, RolloutReport
from megatron_pr2.drift.metrics import COLUMNS
from megatron_pr2.rl.batch import Sample
from megatron_pr2.rollout.base import RolloutStats

PER_LAYER = ("agreement", "frozen_agreement", "lift", "kl_predicted", "kl_frozen", "coverage_gap")
MEANS = (*PER_LAYER, "outside_mass")
# What a mini-step's report has beside the drift, and the record of a step in another place.
ELSEWHERE = ("drift", "predictor", "features_absent", "hold_back", "delivered", "unjudged")
CHANGED = tuple(name for name in COLUMNS if name.startswith("changed_"))


def _reduced(values: Mapping[str, float], group: dist.ProcessGroup, op: Any = dist.ReduceOp.SUM) -> dict[str, float]:
    tensor = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(tensor, op=op, group=group)
    return dict(zip(values, tensor.tolist(), strict=True))


def rollout_summary(samples: Sequence[Sample], step: int, stats: RolloutStats, group: dist.ProcessGroup) -> dict[str, Any]:
    """Rewards and responses; in "rollout" the share of tokens from older weights, turns, and what the engine counted."""
    responses = [sample.response for sample in samples]
    rewards = np.array([sample.reward for sample in samples])
    versions = np.concatenate([response.weight_versions[response.loss_mask] for response in responses])
    total = _reduced(
        {
            "samples": len(samples),
            "reward": rewards.sum(),
            "reward_squared": (rewards**2).sum(),
            "length": sum(len(response.response_ids) for response in responses),
            "truncated": sum(response.finish_reason == "length" for response in responses),
            "tokens": sum(sample.length for sample in samples),
            "sampled": versions.size,
            "older": (versions < step).sum(),
            "turns": sum(response.turns for response in responses),
        },
        group,
    )
    count, mean = total["samples"], total["reward"] / total["samples"]
    return {
        "reward": mean,
        "reward_std": float(np.sqrt(max(0.0, total["reward_squared"] / count - mean**2))),
        "response_length": total["length"] / count,
        "truncated": total["truncated"] / count,
        "tokens": int(total["tokens"]),
        "rollout": {**stats.extra, "older_tokens": total["older"] / max(total["sampled"], 1.0), "turns": total["turns"] / count},
    }


def replay_summary(
    report: RolloutReport, pr2: PR2, mini_steps: Sequence[dict[str, Any]], group: dist.ProcessGroup
) -> dict[str, Any]:
    """Tokens with and without routes and features ("routes"), and what they take in memory ("bytes")."""
    counts = {**asdict(report), "sampled": pr2.feature_plan.sampled_tokens}
    total = _reduced({**counts, "feature_bytes": pr2.features.nbytes}, group)
    routes: dict[str, Any] = {name: int(value) for name, value in total.items()}
    num_bytes = {"routes": routes.pop("route_bytes"), "features": routes.pop("feature_bytes")}
    routes["missing_share"] = routes["missing"] / max(1, routes["tokens"])
    # Engine and actor hold the same weights then, up to the prediction.
    if (agreement := pr2.measurement.engine_agreement) is not None:
        routes["agreement"], routes["agreement_min"] = agreement.overall, agreement.least_layer
    if pr2.measurement.sample_fraction is not None:
        routes["sample_fraction"] = pr2.measurement.sample_fraction
    routes["features_absent"] = sum(step["features_absent"] for step in mini_steps)
    return {"routes": routes, "bytes": num_bytes}


def update_summary(mini_steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over the mini-steps of what the actor reported."""
    names = {"policy_loss": "loss", "clip_fraction": "clip_fraction", "grad_norm": "grad_norm"}
    out: dict[str, Any] = {ours: float(np.mean([step[name] for step in mini_steps])) for ours, name in names.items()}
    corrections = [step["importance"] for step in mini_steps if "importance" in step]
    if corrections:
        out["importance"] = {name: float(np.mean([each[name] for each in corrections])) for name in corrections[0]}
    return out | drift_summary(mini_steps) | {"predictor": mini_steps[-1]["predictor"]}


def logprob_gap(samples: Sequence[Sample], group: dist.ProcessGroup) -> dict[str, float]:
    """|log mu - log pi_old| per response token: the mismatch between the engine and the actor's old-log-prob pass.

    "kl" is the k3 estimate of KL(mu || pi_old) from the engine's samples.
    """
    with_old = [(s.old_logprobs, s.response) for s in samples if s.old_logprobs is not None]
    gaps = [(old.astype(np.float64) - response.logprobs)[response.loss_mask] for old, response in with_old]
    gap = np.concatenate([np.zeros(0), *gaps])
    total = _reduced({"tokens": gap.size, "mean": np.abs(gap).sum(), "kl": (np.exp(gap) - 1.0 - gap).sum()}, group)
    tokens = max(total.pop("tokens"), 1.0)
    largest = _reduced({"max": np.abs(gap).max(initial=0.0)}, group, dist.ReduceOp.MAX)
    return {name: value / tokens for name, value in total.items()} | largest


def drift_summary(mini_steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Drift of each mini-step: means over layers, the histogram of changed experts, and what is kept per layer."""
    entries: list[dict[str, Any]] = []
    for step in mini_steps:
        drift = step["drift"]
        entries.append(
            {
                **{k: v for k, v in step.items() if k not in ELSEWHERE},
                **{name: _mean(drift.get(name, [])) for name in MEANS},
                "changed": [_mean(drift.get(name, [])) for name in CHANGED],
                "per_layer": {name: drift.get(name, []) for name in PER_LAYER},
            }
        )
    later = [e for e in entries if e["mini_step"] >= 2]
    out: dict[str, Any] = {name: _mean([e[name] for e in later]) for name in ("agreement", "frozen_agreement", "lift")}
    # The first mini-step too, in which nothing has drifted yet and a prediction can only be wrong.
    out["lift_all"] = _mean([e["lift"] for e in entries])
    out["mini_steps"] = entries
    if "hold_back" in mini_steps[-1]:
        out["hold_back"] = mini_steps[-1]["hold_back"]
    if "delivered" in mini_steps[-1]:
        # Of the push that the batch was rolled out with: the same in every mini-step.
        out["delivered"] = mini_steps[-1]["delivered"]
    return out


def _mean(values: Sequence[float]) -> float:
    """Mean of the values that are numbers; NaN where there is none."""
    known = [v for v in values if not np.isnan(v)]
    return float(np.mean(known)) if known else float("nan")
