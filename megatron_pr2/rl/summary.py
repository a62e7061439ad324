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
from megatron_pr2.drift.moments import EXPLAINED, MOMENTS
from megatron_pr2.replay.logprob_gap import Sums, measured
from megatron_pr2.rl.batch import Sample
from megatron_pr2.rollout.base import RolloutStats

PER_LAYER = ("agreement", "frozen_agreement", "lift", "kl_predicted", "kl_frozen", "coverage_gap")
MEANS = (*PER_LAYER, *EXPLAINED, "outside_mass")
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
    for name in ("masked_fraction", "router_shift_weight"):
        if name in mini_steps[0]:
            out[name] = float(np.mean([step[name] for step in mini_steps]))
    corrections = [step["importance"] for step in mini_steps if "importance" in step]
    if corrections:
        out["importance"] = {name: float(np.mean([each[name] for each in corrections])) for name in corrections[0]}
    return out | drift_summary(mini_steps) | {"predictor": mini_steps[-1]["predictor"]}


def logprob_gap(samples: Sequence[Sample], step: int, group: dist.ProcessGroup) -> tuple[Sums, Sums]:
    """The engine's log-probs against those of the snapshot pass: of tokens sampled by the weights of `step`, and by older ones."""
    known = [(sample.snapshot_logprobs, sample.response) for sample in samples if sample.snapshot_logprobs is not None]
    out = []
    for older in (False, True):
        masks = [response.loss_mask & ((response.weight_versions < step) == older) for _, response in known]
        sums = measured([response.logprobs for _, response in known], [snapshot for snapshot, _ in known], masks)
        total = torch.tensor([*sums.values, sums.kl], dtype=torch.float64)
        largest = torch.tensor(sums.largest, dtype=torch.float64)
        dist.all_reduce(total, group=group)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        *values, kl = total.tolist()
        out.append(Sums(np.array(values), largest.item(), kl))
    return out[0], out[1]


def gap_summary(gaps: Sequence[Sums]) -> dict[str, Any]:
    """Of all tokens: mean and max |gap|, and the k3 estimate of KL(mu || snapshot); nothing where nothing was compared."""
    tokens = sum(sums.tokens for sums in gaps)
    if not tokens:
        return {}
    mean, kl = sum(sums.values[1] for sums in gaps) / tokens, sum(sums.kl for sums in gaps) / tokens
    return {"logprob_gap": {"mean": float(mean), "kl": kl, "max": max(sums.largest for sums in gaps)}}


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
                "per_layer": {name: drift.get(name, []) for name in PER_LAYER}
                | {name: drift[name] for name in (*EXPLAINED, *MOMENTS) if name in drift},
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
