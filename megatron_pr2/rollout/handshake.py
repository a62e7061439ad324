"""The handshake: an engine that silently returns wrong routes is refused before the first rollout (design decision 5)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_pr2.errors import ConfigError, RolloutError
from megatron_pr2.rollout.base import RolloutEngine

logger = logging.getLogger(__name__)

# (share of equal (token, layer, slot) routes at least, mean |log-prob difference| at most), by the engine's dtype. fp32 engines
# agree in all routes but for ties within rounding; bf16 ones in about 97 % (measured on SGLang against Transformers).
THRESHOLDS = {"float32": (0.999, 1e-3), "bfloat16": (0.90, 0.1), "float16": (0.90, 0.1)}


@dataclass(frozen=True)
class HandshakeReport:
    """How engine and actor compare on the probe.

    Attributes:
        route_agreement: share of the actor's experts that the engine chose too, over tokens with a valid row.
        missing: tokens of the probe without a valid row, the last one not counted.
        logprob_mean, logprob_max: absolute differences.
    """

    route_agreement: float
    missing: int
    logprob_mean: float
    logprob_max: float


def require_routes(engine: RolloutEngine) -> None:
    """Refuses an engine that cannot return routes where they are to be replayed.

    Raises:
        ConfigError: `engine.returns_routes` is False.
    """
    if not engine.returns_routes:
        raise ConfigError(
            f"pr2.routes='engine', but the {engine.name} engine returns no routes; start it with route return on, or use "
            "pr2.routes=actor (preset r2)"
        )


def handshake(engine: RolloutEngine, actor: RolloutEngine, probe_ids: Sequence[int], dtype: str) -> HandshakeReport:
    """Scores one probe with both and compares; call it after the same (merged) weights went to the engine.

    Args:
        engine: the rollout engine.
        actor: the actor's own model as an engine; collective, like every engine.
        probe_ids: a few dozen token ids.
        dtype: of the engine, selects the thresholds.

    Raises:
        RolloutError: routes or log-probs differ by more than rounding explains.
    """
    want_logprobs, want = actor.score(probe_ids)
    got_logprobs, got = engine.score(probe_ids)
    if got.experts.shape != want.experts.shape or got_logprobs.shape != want_logprobs.shape:
        raise RolloutError(
            f"handshake: {engine.name} returned routes {got.experts.shape} and {got_logprobs.shape[0]} log-probs, the actor has "
            f"{want.experts.shape} and {want_logprobs.shape[0]}; engine and actor do not run the same model"
        )
    both = got.valid & want.valid
    missing = int((want.valid & ~got.valid).sum())
    equal = (got.experts[both][..., :, None] == want.experts[both][..., None, :]).any(-1)
    gap = np.abs(got_logprobs.astype(np.float64) - want_logprobs.astype(np.float64))
    report = HandshakeReport(float(equal.mean()) if equal.size else 0.0, missing, float(gap.mean()), float(gap.max()))
    least, most = THRESHOLDS[dtype]
    # Written so that a NaN is refused.
    if not (report.route_agreement >= least and report.logprob_mean <= most and missing == 0):
        raise RolloutError(
            f"handshake with {engine.name} failed: {report.route_agreement:.2%} of the probe's routes agree with the actor's "
            f"(at least {least:.1%} expected for {dtype}), {missing} rows are missing (0 expected), log-probs differ by "
            f"{report.logprob_mean:.2e} on average (at most {most:.0e}). The engine returns routes that it did not take, or the "
            "weights did not reach it: check its version, MoE backend, overlap schedule and the names of the pushed weights"
        )
    logger.info("handshake with %s: %s", engine.name, report)
    return report
