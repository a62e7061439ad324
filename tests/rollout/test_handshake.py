"""The handshake: an engine whose routes or log-probs are not the actor's is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megatron_pr2.errors import ConfigError, RolloutError
from megatron_pr2.rollout.base import Probe
from megatron_pr2.rollout.handshake import PROBE_TOKENS, handshake, probe_of, require_routes
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

    def score(self, token_ids: Any, horizon: float | None = None) -> list[Probe]:
        return [Probe(self.name, self._logprobs, self._table)]


class Groups:
    """An actor with gates for each of several horizons, or servers that hold one set each."""

    name = "groups"

    def __init__(self, seeds: dict[float, int]) -> None:
        self._seeds = seeds

    def score(self, token_ids: Any, horizon: float | None = None) -> list[Probe]:
        out = []
        for each, seed in self._seeds.items():
            ids, logprobs = answers(seed)
            if horizon in (None, each):
                out.append(Probe(f"{each:g}", logprobs.astype(np.float32), RouteTable.from_ids(ids, EXPERTS), each))
        return out


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


def test_each_group_of_servers_is_judged_with_its_gates() -> None:
    actor: Any = Groups({0.0: 1, 1.0: 2, 2.0: 3})
    servers: Any = Groups({0.0: 1, 2.0: 3})
    assert handshake(servers, actor, PROBE, "float32").route_agreement == 1.0
    wrong: Any = Groups({0.0: 1, 2.0: 2})
    with pytest.raises(RolloutError, match="handshake with 2 failed"):
        handshake(wrong, actor, PROBE, "float32")


def test_other_routes_are_refused() -> None:
    _, logprobs = answers()
    with pytest.raises(RolloutError, match=r"handshake with scripted failed: 2\d\.\d\d% .*3 of 3 layers .*check its version, MoE"):
        shake(answers(seed=1)[0], logprobs)


def test_rows_shifted_by_one_token_are_refused() -> None:
    ids, logprobs = answers()
    ids[1:-1] = ids[:-2].copy()
    with pytest.raises(RolloutError, match="agree with the actor's"):
        shake(ids, logprobs)


def spoilt(share: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The actor's answers with another expert in a share of the slots."""
    ids, logprobs = answers()
    for row, layer, slot in np.argwhere(np.random.default_rng(seed).random(ids[:-1].shape) < share):
        ids[row, layer, slot] = next(expert for expert in range(EXPERTS) if expert not in ids[row, layer])
    return ids, logprobs


def test_a_gate_of_less_precision_is_refused_in_fp32_and_taken_for_rounding_in_bf16() -> None:
    """A near tie is no fault: a few slots of 468 may differ."""
    assert shake(*spoilt(0.002)).route_agreement < 1.0
    with pytest.raises(RolloutError, match=r"9[67]\.\d\d% of the probe's routes .*at least 99\.97% expected for float32"):
        shake(*spoilt(0.03))
    assert shake(*spoilt(0.03), "bfloat16").route_agreement > 0.94


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_layer_that_is_wrong_is_refused_and_named(dtype: str) -> None:
    """5 of 48 layers are 0.9 of all routes, one of 24 is 0.96: a mean that bf16 could explain."""
    for layers, wrong in ((48, (3, 8, 20, 30, 47)), (24, (9,))):
        ids = random_ids(TOKENS, layers, TOPK, EXPERTS, 0)
        ids[-1] = -1
        logprobs, damaged = answers()[1], ids.copy()
        damaged[:-1, list(wrong)] = random_ids(TOKENS, layers, TOPK, EXPERTS, 1)[:-1, list(wrong)]
        numbers = [2 * layer for layer in range(layers)]
        engine, actor = ScoringEngine(damaged, logprobs), ScoringEngine(ids, logprobs)
        named = "|".join(str(2 * layer) for layer in wrong)
        with pytest.raises(RolloutError, match=rf"in layer ({named}) .*; {len(wrong)} of {layers} layers"):
            handshake(engine, actor, PROBE, dtype, numbers)  # type: ignore[arg-type]


def test_a_probe_that_proves_nothing_is_refused() -> None:
    ids, logprobs = answers()
    engine = ScoringEngine(ids[-5:], logprobs[-4:])
    with pytest.raises(ConfigError, match=r"5 tokens, too few .*top-4 of 16 experts in bfloat16 needs 7"):
        handshake(engine, engine, PROBE[:5], "bfloat16")  # type: ignore[arg-type]
    assert handshake(ScoringEngine(ids, logprobs), ScoringEngine(ids, logprobs), PROBE, "bfloat16").least_layer_agreement == 1.0  # type: ignore[arg-type]
    assert probe_of([1, 2, 3], 7) == [1, 2, 3, 1, 2, 3, 1]
    assert len(probe_of(range(1000))) == PROBE_TOKENS


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
