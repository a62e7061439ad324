"""CollectiveEngine: one engine on rank 0, the same answers and the same failures on every rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_pr2.errors import AttachError, ConfigError, EnvironmentFailed, PR2Error, RolloutError, RouteError
from megatron_pr2.rollout.base import Probe, RolloutBatch, RolloutRequest, RolloutResponse, RolloutStats, SamplingParams
from megatron_pr2.rollout.collective import CollectiveEngine, share
from megatron_pr2.routes.table import RouteTable
from tests.helpers.distributed import pool
from tests.helpers.ids import random_ids

SAMPLING = SamplingParams(4)


class ScriptedEngine:
    """Answers by a fixed rule; fails in the method named `fails`."""

    name = "scripted"

    def __init__(self, fails: str = "", error: Exception | None = None) -> None:
        self.fails, self.error = fails, error or ValueError("out of order")
        self.returns_routes = False
        self.received: list[str] = []
        self.versions: list[int] = []
        self.closed = 0

    def _maybe_fail(self, method: str) -> None:
        if method == self.fails:
            raise self.error

    def start(self) -> None:
        self._maybe_fail("start")
        self.returns_routes = True

    def restart(self) -> None:
        self._maybe_fail("restart")

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        for name, _ in weights:
            self.received.append(name)
            self._maybe_fail("update_weights")  # after the first one
        self.versions.append(version)

    def generate(
        self, requests: list[RolloutRequest], sampling: SamplingParams, *, return_routes: bool, enough: int | None = None
    ) -> RolloutBatch:
        self._maybe_fail("generate")
        responses = []
        for request in requests:
            ids = (request.seed, request.seed + 1)
            taken = random_ids(len(request.prompt_ids) + 2, 2, 2, 8, request.seed)
            routes = RouteTable.from_ids(taken, 8) if return_routes else None
            logprobs = -np.array(ids, dtype=np.float32)
            ones = np.ones(2)
            responses.append(
                RolloutResponse(request.prompt_ids, ids, logprobs, routes, "length", 3 * ones.astype(np.int64), ones.astype(bool))
            )
        stats = RolloutStats(1.5, 2 * len(requests), 99, {"load": 0.5})
        return RolloutBatch(responses, stats, list(range(len(requests))))

    def score(self, token_ids: Any) -> list[Probe]:
        self._maybe_fail("score")
        return [Probe("scripted", np.arange(len(token_ids) - 1, dtype=np.float32), RouteTable.missing(len(token_ids), 2, 2, 8))]

    def close(self) -> None:
        self.closed += 1


def collective(engine: ScriptedEngine, data_parallel_size: int = 2) -> CollectiveEngine:
    rank = dist.get_rank()
    return CollectiveEngine(
        engine if rank == 0 else None,  # type: ignore[arg-type]
        data_parallel_rank=rank if data_parallel_size == 2 else 0,
        data_parallel_size=data_parallel_size,
        name="scripted",
    )


def exported(walked: list[str], fails: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights whose export is a collective, as the bridge's is: a rank that stops early leaves the others hanging."""
    for i in range(4):
        total = torch.ones(1)
        dist.all_reduce(total)
        walked.append(f"w{i}")
        yield f"w{i}", total
    if fails:
        raise KeyError("the gates did not come by")


def working_job() -> dict[str, Any]:
    own = ScriptedEngine()
    engine = collective(own)
    engine.start()
    walked: list[str] = []
    engine.update_weights(exported(walked), 3)
    requests = [RolloutRequest((1, 2, i), seed=i) for i in range(6)]
    batch = engine.generate(requests, SAMPLING, return_routes=True)
    responses, stats = batch.responses, batch.stats
    plain = engine.generate(requests, SAMPLING, return_routes=False).responses
    everything = collective(own, data_parallel_size=1).generate(requests, SAMPLING, return_routes=False).responses
    (probe,) = engine.score([5, 6, 7])
    logprobs, routes = probe.logprobs, probe.routes
    engine.restart()
    engine.close()
    engine.close()
    return {
        "returns_routes": engine.returns_routes,
        "walked": walked,
        "received": own.received,
        "versions": own.versions,
        "seeds": [r.response_ids[0] for r in responses],
        "routes": [r.routes.experts.tolist() for r in responses],
        "plain": [r.routes for r in plain],
        "all": [r.response_ids[0] for r in everything],
        "stats": stats,
        "score": (logprobs.tolist(), routes.num_tokens),
        "closed": own.closed,
    }


def test_every_rank_gets_its_share_and_all_of_the_rest() -> None:
    results = pool(2).run(working_job)
    for rank, result in enumerate(results):
        assert result["returns_routes"]
        assert result["walked"] == ["w0", "w1", "w2", "w3"]
        assert result["seeds"] == [3 * rank, 3 * rank + 1, 3 * rank + 2]
        assert result["routes"] == [random_ids(5, 2, 2, 8, seed).tolist() for seed in result["seeds"]]
        assert result["plain"] == [None] * 3
        assert result["all"] == list(range(6))  # model-parallel ranks of one data-parallel rank see the same
        assert result["stats"] == RolloutStats(1.5, 12, 99, {"load": 0.5})
        assert result["score"] == ([0.0, 1.0], 3)
    assert results[0]["received"] == results[0]["walked"]
    assert results[0]["versions"] == [3]
    assert [result["closed"] for result in results] == [2, 0]


def turns_job(dealt: list[float]) -> tuple[list[float | None], list[int], list[int], RolloutStats] | str:
    own = ScriptedEngine()
    engine = collective(own)
    requests = [RolloutRequest((1, 2), seed=i, horizon=horizon) for i, horizon in enumerate(dealt)]
    turns: list[float | None] = []
    try:
        batch = engine.generate_in_turns(requests, SAMPLING, turns.append, return_routes=False)
    except RolloutError as error:
        return str(error)
    return turns, [response.response_ids[0] for response in batch.responses], batch.finished, batch.stats


def test_horizons_in_turns_give_every_rank_the_same_share() -> None:
    dealt = [1.0, 0.0, 0.0, 1.0, 2.0, 2.0, 0.0, 2.0, 1.0, 0.0, 1.0, 2.0]
    for rank, result in enumerate(pool(2).run(turns_job, dealt)):
        turns, seeds, finished, stats = result
        assert turns == [0.0, 1.0, 2.0]
        assert seeds == list(range(6 * rank, 6 * rank + 6))
        assert finished == list(range(12))
        assert stats == RolloutStats(3 * 1.5, 24, 3 * 99, {"load": 1.5})
    for result in pool(2).run(turns_job, [0.0, 0.0, 1.0, 1.0]):
        assert "dealt unequally" in result


def failing_job(method: str, error: Exception | None) -> tuple[str, str, list[str], bool]:
    """(what this rank raised, its message, the weights that it walked, whether the engine still works afterwards)"""
    own = ScriptedEngine(method, error)
    engine = collective(own)
    walked: list[str] = []
    requests = [RolloutRequest((1,), seed=i) for i in range(5 if method == "share" else 4)]
    calls = {
        "start": engine.start,
        "restart": engine.restart,
        "update_weights": lambda: engine.update_weights(exported(walked), 0),
        "export": lambda: engine.update_weights(exported(walked, fails=True), 0),
        "export of one rank": lambda: engine.update_weights(exported(walked, fails=dist.get_rank() == 1), 0),
        "generate": lambda: engine.generate(requests, SAMPLING, return_routes=False),
        "share": lambda: engine.generate(requests, SAMPLING, return_routes=False),
        "score": lambda: engine.score([1, 2]),
    }
    try:
        calls[method]()
        raised = message = ""
    except PR2Error as failure:
        raised, message = type(failure).__name__, str(failure)
    own.fails = ""
    return raised, message, walked, len(engine.generate(requests[:4], SAMPLING, return_routes=False).responses) == 2


OUT_OF_ORDER = "ValueError: out of order"


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        *((method, None, OUT_OF_ORDER) for method in ("start", "restart", "generate", "score")),
        ("update_weights", None, f"rank 0: {OUT_OF_ORDER}"),
        ("generate", RolloutError("the server is down"), "the server is down"),
        ("generate", RouteError("no routes"), "no routes"),
        # Another engine would not help: these are not tried again.
        ("generate", ConfigError("the probe is short"), "the probe is short"),
        ("generate", EnvironmentFailed("the tool"), "the tool"),
        ("update_weights", AttachError("other gates"), "rank 0: other gates"),
        # engine_weights() raises after the last weight, on all ranks alike.
        ("export", None, "rank 0, 1: KeyError: 'the gates did not come by'"),
        ("export of one rank", None, "rank 1: KeyError: 'the gates did not come by'"),
        ("share", None, "5 requests cannot be shared equally by 2 data-parallel ranks"),
    ],
)
def test_a_failure_is_raised_on_every_rank(method: str, error: Exception | None, message: str) -> None:
    """And leaves all of them in step: the next call works."""
    kind = type(error) if isinstance(error, AttachError | ConfigError | EnvironmentFailed) else RolloutError
    for raised, said, walked, works in pool(2).run(failing_job, method, error, timeout=60):
        assert (raised, said) == (kind.__name__, message)
        assert works
        assert walked == (["w0", "w1", "w2", "w3"] if method.startswith(("update_weights", "export")) else [])


def test_shares_are_contiguous() -> None:
    assert [list(range(6))[share(6, 3, i)] for i in range(3)] == [[0, 1], [2, 3], [4, 5]]
    assert list(range(0))[share(0, 2, 1)] == []
