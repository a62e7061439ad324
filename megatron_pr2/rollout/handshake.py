"""The handshake: an engine that silently returns wrong routes is refused before the first rollout (design decision 5)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_pr2.errors import ConfigError, RolloutError
from megatron_pr2.rollout.base import Probe, RolloutEngine

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
    """Raises ConfigError for an engine that cannot return routes where they are to be replayed."""
    if not engine.returns_routes:
        raise ConfigError(
            f"pr2.routes='engine', but the {engine.name} engine returns no routes; start it with route return on, or use "
            "pr2.routes=actor (preset r2)"
        )


def handshake(engine: RolloutEngine, actor: RolloutEngine, probe_ids: Sequence[int], dtype: str) -> HandshakeReport:
    """Scores one probe with every server behind an engine and with the actor, after the same (merged) weights went to all of them.

    Args:
        actor: the actor's own model as an engine; collective, like every engine.
        probe_ids: a few dozen token ids.
        dtype: of the engine, selects the thresholds.

    Returns:
        The worst of the servers' reports.

    Raises:
        ConfigError: fewer than two tokens, which have no log-prob to compare.
        RolloutError: routes or log-probs differ by more than rounding explains.
    """
    if len(probe_ids) < 2:
        raise ConfigError(f"handshake: the probe has {len(probe_ids)} tokens; expected two or more. Did the tokenizer encode it?")
    (want,) = actor.score(probe_ids)
    reports = [compare(probe, want, dtype) for probe in engine.score(probe_ids)]
    if not reports:
        raise RolloutError(f"handshake: no server behind {engine.name} answered the probe")
    return min(reports, key=lambda report: (report.route_agreement, -report.logprob_mean))


def compare(probe: Probe, want: Probe, dtype: str) -> HandshakeReport:
    """One engine's probe against what it should be; raises RolloutError as :func:`handshake`."""
    got = probe.routes
    if got.experts.shape != want.routes.experts.shape or probe.logprobs.shape != want.logprobs.shape:
        raise RolloutError(
            f"handshake: {probe.name} returned routes {got.experts.shape} and {probe.logprobs.shape[0]} log-probs, {want.name} has "
            f"{want.routes.experts.shape} and {want.logprobs.shape[0]}; they do not run the same model"
        )
    both = got.valid & want.routes.valid
    missing = int((want.routes.valid & ~got.valid).sum())
    equal = (got.experts[both][..., :, None] == want.routes.experts[both][..., None, :]).any(-1)
    gap = np.abs(probe.logprobs.astype(np.float64) - want.logprobs.astype(np.float64))
    report = HandshakeReport(float(equal.mean()) if equal.size else 0.0, missing, float(gap.mean()), float(gap.max()))
    least, most = THRESHOLDS[dtype]
    # Written so that a NaN is refused.
    if not (report.route_agreement >= least and report.logprob_mean <= most and missing == 0):
        raise RolloutError(
            f"handshake with {probe.name} failed: {report.route_agreement:.2%} of the probe's routes agree with the actor's "
            f"(at least {least:.1%} expected for {dtype}), {missing} rows are missing (0 expected), log-probs differ by "
            f"{report.logprob_mean:.2e} on average (at most {most:.0e}). The engine returns routes that it did not take, or the "
            "weights did not reach it: check its version, MoE backend, overlap schedule and the names of the pushed weights"
        )
    logger.info("handshake with %s: %s", probe.name, report)
    return report
