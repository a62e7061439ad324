"""The handshake: an engine whose routes or log-probs are not the actor's is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megatron_pr2.errors import ConfigError, RolloutError
from megatron_pr2.rollout.base import Probe
from megatron_pr2.rollout.handshake import handshake, require_routes
from megatron_pr2.routes.table import RouteTable
from tests.helpers.ids import random_ids

TOKENS, LAYERS, TOPK, EXPERTS = 40, 3, 4, 16
PROBE = list(range(TOKENS))


class ScoringEngine:
    """Answers every probe with the same log-probs and routes."""

    name = "scripted"

    def __init__(self, ids: np.ndarray, logprobs: np.ndarray) -> None:
        self._table = RouteTable.from_ids(ids, EXPERTS)
        self._logprobs = logprobs.astype(np.float32)

    def score(self, token_ids: Any) -> list[Probe]:
        return [Probe(self.name, self._logprobs, self._table)]


def answers(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Ids of an actor (the last token has no route) and log-probs."""
    ids = random_ids(TOKENS, LAYERS, TOPK, EXPERTS, seed)
    ids[-1] = -1
    return ids, -np.random.default_rng(seed).exponential(1.0, TOKENS - 1)


def shake(ids: np.ndarray, logprobs: np.ndarray, dtype: str = "float32") -> Any:
    return handshake(ScoringEngine(ids, logprobs), ScoringEngine(*answers()), PROBE, dtype)  # type: ignore[arg-type]


def test_equal_answers_are_accepted_in_any_order_of_the_experts() -> None:
    ids, logprobs = answers()
    report = shake(ids[:, :, ::-1], logprobs + 1e-5)
    assert report.route_agreement == 1.0
    assert report.missing == 0
    assert report.logprob_mean == pytest.approx(1e-5, rel=0.1)


def test_other_routes_are_refused() -> None:
    _, logprobs = answers()
    with pytest.raises(RolloutError, match=r"handshake with scripted failed: 2\d\.\d\d% .*check its version, MoE backend"):
        shake(answers(seed=1)[0], logprobs)


def test_rows_shifted_by_one_token_are_refused() -> None:
    ids, logprobs = answers()
    ids[1:-1] = ids[:-2].copy()
    with pytest.raises(RolloutError, match="agree with the actor's"):
        shake(ids, logprobs)


def test_one_wrong_slot_is_refused_in_fp32_and_taken_for_rounding_in_bf16() -> None:
    ids, logprobs = answers()
    ids[3, 1, 0] = next(expert for expert in range(EXPERTS) if expert not in ids[3, 1])
    with pytest.raises(RolloutError, match=r"99\.79%"):
        shake(ids, logprobs)
    assert shake(ids, logprobs, "bfloat16").route_agreement > 0.99


@pytest.mark.parametrize("spoil", [-1, 0])
def test_missing_rows_are_refused(spoil: int) -> None:
    """Out of range, or the zeros of a layer that the engine's capture missed."""
    ids, logprobs = answers()
    ids[5, 1] = spoil
    with pytest.raises(RolloutError, match="1 rows are missing"):
        shake(ids, logprobs)


@pytest.mark.parametrize("gap", [0.01, np.nan, np.inf])
def test_a_gap_of_the_logprobs_is_refused(gap: float) -> None:
    ids, logprobs = answers()
    with pytest.raises(RolloutError, match="log-probs differ"):
        shake(ids, logprobs + gap)
    with pytest.raises(RolloutError, match="log-probs differ"):
        shake(ids, logprobs + 20 * gap, "bfloat16")


def test_another_model_is_refused() -> None:
    ids, logprobs = answers()
    with pytest.raises(RolloutError, match="do not run the same model"):
        shake(ids[:, :2], logprobs)
    with pytest.raises(RolloutError, match="do not run the same model"):
        shake(ids, logprobs[:-1])


def test_an_engine_without_a_single_route_is_refused() -> None:
    ids, logprobs = answers()
    with pytest.raises(RolloutError, match=r"0\.00%"):
        shake(np.full_like(ids, -1), logprobs)


def test_an_engine_without_route_return_is_refused_where_routes_are_replayed() -> None:
    engine = ScoringEngine(*answers())
    engine.returns_routes = True  # type: ignore[attr-defined]
    require_routes(engine)  # type: ignore[arg-type]
    engine.returns_routes = False  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="the scripted engine returns no routes"):
        require_routes(engine)  # type: ignore[arg-type]
