"""The handshake: an engine that silently returns wrong routes is refused before the first rollout (design decision 5)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_pr2.errors import ConfigError, RolloutError
from megatron_pr2.rollout.base import Probe, RolloutEngine
from megatron_pr2.routes.agreement import enough_rows, least_hits, least_share

logger = logging.getLogger(__name__)

# Mean |log-prob difference| at most, by the engine's dtype; the bound on routes is in routes.agreement.
LARGEST_GAP = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.1}
# So many that a gate in 8 bits shows in fp32, also in a model of few layers: over all layers some thousand slots.
PROBE_TOKENS = 256


@dataclass(frozen=True)
class HandshakeReport:
    """How engine and actor compare on the probe.

    Attributes:
        route_agreement: share of the actor's experts that the engine chose too, over tokens with a valid row.
        least_layer, least_layer_agreement: the MoE layer where it is lowest (0-based, of the whole model), and how low.
        missing: tokens of the probe without a valid row, the last one not counted.
        logprob_mean, logprob_max: absolute differences.
    """

    route_agreement: float
    least_layer: int
    least_layer_agreement: float
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


def probe_of(token_ids: Sequence[int], tokens: int = PROBE_TOKENS) -> list[int]:
    """A probe of so many tokens from a shorter or longer text: repeated, or cut."""
    return (list(token_ids) * -(-tokens // max(1, len(token_ids))))[:tokens]


def handshake(
    engine: RolloutEngine, actor: RolloutEngine, probe_ids: Sequence[int], dtype: str, layers: Sequence[int] | None = None
) -> HandshakeReport:
    """Scores one probe with every server behind an engine and with the actor, each server against the actor with its gates.

    Args:
        actor: the actor's own model as an engine; collective, like every engine.
        probe_ids: PROBE_TOKENS token ids or more.
        dtype: of the engine, selects the thresholds.
        layers: numbers of the MoE layers in the model (0-based), for messages; counted among themselves if None.

    Returns:
        The worst of the servers' reports.

    Raises:
        ConfigError: fewer tokens than a verdict on a single layer needs.
        RolloutError: routes or log-probs differ by more than rounding explains.
    """
    if len(probe_ids) < 2:
        raise ConfigError(f"handshake: the probe has {len(probe_ids)} tokens; expected two or more. Did the tokenizer encode it?")
    probes = engine.score(probe_ids)
    if not probes:
        raise RolloutError(f"handshake: no server behind {engine.name} answered the probe")
    # All of them before anything that one rank may refuse alone: it is collective.
    wants = {horizon: actor.score(probe_ids, horizon)[0] for horizon in dict.fromkeys(probe.horizon for probe in probes)}
    for want in wants.values():
        topk, experts = want.routes.topk, want.routes.num_experts
        needed = enough_rows(least_share(dtype, topk, experts), topk, experts)
        if int(want.routes.valid.sum()) < needed:
            raise ConfigError(
                f"handshake: the probe has {len(probe_ids)} tokens, too few to tell one layer's routes from unrelated ones "
                f"(top-{topk} of {experts} experts in {dtype} needs {needed + 1}); give {PROBE_TOKENS}, e.g. probe_of(token_ids)"
            )
    reports = [compare(probe, wants[probe.horizon], dtype, layers) for probe in probes]
    return min(reports, key=lambda report: (report.route_agreement, -report.logprob_mean))


def compare(probe: Probe, want: Probe, dtype: str, layers: Sequence[int] | None = None) -> HandshakeReport:
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
    rows, num_layers, topk = equal.shape
    hits_L = equal.sum((0, 2))
    worst = int(hits_L.argmin())
    layer = list(range(num_layers) if layers is None else layers)[worst]
    shares = (float(hits.sum()) / max(1, rows * topk * count) for hits, count in ((hits_L, num_layers), (hits_L[worst], 1)))
    overall, of_layer = shares
    report = HandshakeReport(overall, layer, of_layer, missing, float(gap.mean()), float(gap.max()))
    least, most = least_share(dtype, topk, got.num_experts), LARGEST_GAP[dtype]
    wrong_layers = int((hits_L < least_hits(least, rows * topk)).sum())
    agrees = rows and not wrong_layers and hits_L.sum() >= least_hits(least, equal.size)
    # Written so that a NaN is refused.
    if not (agrees and report.logprob_mean <= most and missing == 0):
        raise RolloutError(
            f"handshake with {probe.name} failed: {overall:.2%} of the probe's routes agree with the actor's, {of_layer:.2%} in "
            f"layer {layer} (0-based), the worst; {wrong_layers} of {num_layers} layers are below the bound (at least {least:.2%} "
            f"expected for {dtype}, less an allowance for {rows} tokens); {missing} rows are missing (0 expected), log-probs "
            f"differ by {report.logprob_mean:.2e} on average (at most {most:.0e}). The engine returns routes that it did not take, "
            "or the weights did not reach it as they were pushed (one layer, another dtype): check its version, MoE backend, "
            "quantization, overlap schedule and the names of the pushed weights"
        )
    logger.info("handshake with %s: %s", probe.name, report)
    return report
