"""Synthetic metrics records that look like a real run's."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from megatron_pr2.routes.table import RouteTable

LAYERS = 6


def record(
    step: int,
    total: int = 60,
    preset: str = "pr2",
    kappa: int = 4,
    layers: int = LAYERS,
    gain: float = 0.3,
    seed: int = 0,
    hold_back: bool = False,
) -> dict[str, Any]:
    """A record of the metrics schema.

    Args:
        gain: share of the frozen mismatches that prediction removes at the end of the run; negative adds mismatches.
        hold_back: the record says how much of the prediction was used: more from rollout to rollout, least in the last layer,
            nothing at all if gain is not above 0.
    """
    rng = np.random.default_rng([seed, step])
    done = step / max(1, total - 1)
    learned = preset == "pr2"
    replay = preset != "grpo"
    learning = (1 - math.exp(-4 * done)) * gain if learned else 0.0
    mini_steps = []
    for i in range(kappa):
        stale = 0.004 + 0.006 * i
        depth = np.linspace(1.4, 0.6, layers)
        frozen = 1 - (0.0 if i == 0 else 1.0) * stale * depth * rng.uniform(0.9, 1.1, layers)
        cost = stale * depth * (learning if i else -0.3 * abs(learning))
        agreement = frozen + cost * rng.uniform(0.7, 1.3, layers)
        kl_frozen = stale**2 * 20 * rng.uniform(0.8, 1.2, layers) * (i > 0)
        kl_predicted = kl_frozen * (1 - learning) + 1e-5
        gap = 0.03 * (1 - agreement)
        miss = float(1 - agreement.mean()) * 4
        drift = {
            "changed": [1 - miss, 0.93 * miss, 0.06 * miss, 0.01 * miss],
            "agreement": float(agreement.mean()),
            "frozen_agreement": float(frozen.mean()),
            "lift": float((agreement - frozen).mean()),
            "kl_predicted": float(kl_predicted.mean()),
            "kl_frozen": float(kl_frozen.mean()),
            "coverage_gap": float(gap.mean()),
            "outside_mass": float(0.2 + gap.mean()),
            "per_layer": {
                "agreement": agreement.tolist(),
                "lift": (agreement - frozen).tolist(),
                "kl_predicted": kl_predicted.tolist(),
                "kl_frozen": kl_frozen.tolist(),
                "coverage_gap": gap.tolist(),
            },
        }
        if learned:
            drift["per_layer"] |= moments(stale * depth * (i > 0), abs(learning))
        if not replay:
            drift = {name: None for name in drift} | {"per_layer": {name: [] for name in drift["per_layer"]}}
        mini_steps.append(
            {
                "mini_step": i + 1,
                "loss": float(rng.normal(-0.003, 0.002)),
                "clip_fraction": float(0.004 * i * rng.uniform(0.6, 1.4)),
                "grad_norm": float(rng.lognormal(-0.3, 0.25)),
                "ratio_mean": float(rng.normal(1, 0.002)),
                "ratio_std": float(0.02 + 0.012 * i * rng.uniform(0.8, 1.2)),
                "ratio_min": float(0.8 - 0.04 * i * rng.uniform(0.8, 1.2)),
                "ratio_max": float(1.25 + 0.08 * i * rng.uniform(0.8, 1.6)),
                "approx_kl": float(2e-4 * (1 + i)),
                **drift,
            }
        )
    later = mini_steps[1:] if replay else []

    def over_later(name: str) -> float | None:
        return float(np.mean([entry[name] for entry in later])) if later else None

    success = 0.15 + 0.7 / (1 + math.exp(-8 * (done - 0.45)))
    tokens = 4000 + int(rng.integers(-200, 200))
    out = {
        "step": step,
        "seed": seed,
        "preset": preset,
        "wall_seconds": 5.9,
        "reward": float(np.clip(success + rng.normal(0, 0.04), 0, 1)),
        "reward_std": float(math.sqrt(success * (1 - success))),
        "response_length": float(7.5 + 3 * done + rng.normal(0, 0.3)),
        "truncated": float(max(0, 0.05 - 0.05 * done + rng.normal(0, 0.005))),
        "policy_loss": float(rng.normal(-0.003, 0.002)),
        "clip_fraction": float(np.mean([entry["clip_fraction"] for entry in mini_steps])),
        "grad_norm": float(rng.lognormal(-0.3, 0.25)),
        "lr": 3e-4,
        "tokens_per_second": float(rng.normal(2100, 60)),
        "agreement": over_later("agreement"),
        "frozen_agreement": over_later("frozen_agreement"),
        "lift": over_later("lift"),
        "logprob_gap": {
            "mean": float(rng.lognormal(-9, 0.2)),
            "max": float(rng.lognormal(-6, 0.3)),
            "kl": float(rng.lognormal(-16, 0.3)),
        },
        "routes": {
            "tokens": tokens if replay else 0,
            "missing": int(step % 17 == 5) * 3 if replay else 0,
            "missing_share": (step % 17 == 5) * 3 / tokens if replay else 0.0,
            "sampled": 900 if replay else 0,
            "sample_fraction": 0.125,
            "features_absent": 0,
        },
        "predictor": {
            "weight_norm": 0.4 * (1 - math.exp(-3 * done)) + 0.001 if learned else 0.0,
            "grad_norm": float(rng.lognormal(-4, 0.3)) if learned else 0.0,
            "tokens": 12000 if learned else 0,
        },
        "seconds": {
            "push": 0.2,
            "rollout": float(3 + 0.5 * done + rng.normal(0, 0.1)),
            "old_logprobs": 0.4,
            "update": float(2 + rng.normal(0, 0.05)),
            "checkpoint": 0.8 if step % 10 == 9 else 0.0,
        },
        "bytes": {
            "routes": 123456 if replay else 0,
            "features": 234567 if learned else 0,
            "weights": 3456789,
        },
        "mini_steps": mini_steps,
    }
    if replay:
        out["lift_all"] = float(np.mean([entry["lift"] for entry in mini_steps]))
    if hold_back and learned:
        out["hold_back"] = held(np.linspace(1.2, -0.2, layers) * min(1.0, 3 * done) * (gain > 0), step, gain, rng)
    return out


def moments(drift: np.ndarray, learning: float) -> dict[str, Any]:
    """Of a prediction of half the size that would fit best: its correlation with the drift is sqrt(learning), in every layer."""
    true, predicted = drift**2, np.maximum(learning * drift**2, 1e-12) / 4
    return {
        "predicted_squared": predicted.tolist(),
        "predicted_true": (np.sqrt(learning * true * predicted)).tolist(),
        "true_squared": true.tolist(),
        "gate_squared": (0.04 * true).tolist(),
        "gate_true": (0.06 * true).tolist(),
    }


def held(beta: np.ndarray, step: int, gain: float, rng: np.random.Generator) -> dict[str, Any]:
    """What a record says of holding back; nothing is known of a gain in the first rollouts."""
    beta = np.round(beta.clip(0, 1) * 8) / 8
    expected = beta * 0.01 * gain + (beta > 0) * rng.normal(0, 2e-4, beta.size)
    unknown = [None] * beta.size
    return {
        "beta": beta.tolist(),
        "lift": unknown if step < 3 else expected.tolist(),
        "lift_error": unknown if step < 3 else ((beta > 0) * 4e-4).tolist(),
    }


def run(total: int = 60, **options: Any) -> list[dict[str, Any]]:
    """The records of a run."""
    return [record(step, total, **options) for step in range(total)]


def route_tables(
    seed: int, sequences: int = 12, layers: int = 8, experts: int = 32, topk: int = 4, drift: float = 0.0
) -> dict[int, RouteTable]:
    """Routes of some sequences, with uneven load and sticky neighbours.

    Args:
        drift: noise on the router's logits, more in early layers and late positions; without it the
            same seed has the same sequences.
    """
    rng = np.random.default_rng(seed)
    noise = np.random.default_rng([seed, 1])
    popularity = rng.normal(0, 0.7, (layers, experts))
    out = {}
    for sid in range(sequences):
        tokens = int(rng.integers(40, 200))
        fresh = rng.normal(0, 1, (tokens, layers, experts))
        logits = popularity + fresh + 0.8 * np.concatenate([fresh[:1], fresh[:-1]])
        place = np.linspace(0.5, 1.5, tokens)[:, None, None] * np.linspace(1.5, 0.5, layers)[:, None]
        logits += drift * place * noise.normal(0, 1, logits.shape)
        ids = (-logits).argsort(-1)[..., :topk]
        ids[-1] = experts  # the last token was never an input
        out[sid] = RouteTable.from_ids(ids, experts)
    return out
