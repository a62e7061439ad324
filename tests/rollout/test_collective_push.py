"""update_owned_weights: every rank sends its part, and what any rank meets is raised on every rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_pr2.errors import ConfigError, RolloutError
from megatron_pr2.rollout.collective import CollectiveEngine
from megatron_pr2.rollout.sglang.push.session import PushTarget
from tests.helpers.distributed import pool

KEY = "s3cret"
# Nobody listens there: only a rank that has something to send would notice.
TARGET = PushTarget("http://127.0.0.1:9", KEY, 2, "gloo", "cpu", 1 << 20, 5.0)


class PushedEngine:
    """The engine of rank 0; fails in the method named `fails`."""

    name = "pushed"
    returns_routes = True

    def __init__(self, fails: str = "") -> None:
        self.fails = fails
        self.calls: list[str] = []
        self.received: list[str] = []
        self.sent_to: list[tuple[str, list[str] | None]] = []

    def _called(self, method: str) -> None:
        self.calls.append(method)
        if method == self.fails:
            raise RolloutError(f"{method} failed")

    def begin_push(self, version: int, horizons: Sequence[float] = (), *, gates_only: bool = False) -> list[PushTarget]:
        self._called("begin_gates" if gates_only else "begin_push")
        return [replace(TARGET, url=f"http://127.0.0.1:{place}", horizon=h) for place, h in enumerate(horizons)] or [TARGET]

    def push_part(self, weights: Iterable[tuple[str, torch.Tensor]], targets: Sequence[PushTarget] | None = None) -> int:
        for name, _ in weights:
            self.received.append(name)
            self.sent_to.append((name, None if targets is None else [target.url for target in targets]))
            if self.fails == "push_part":
                self._called("push_part")
        return len(self.received)

    def finish_push(self, version: int) -> None:
        self._called("finish_push")

    def abandon_push(self) -> None:
        self._called("abandon_push")

    def close(self) -> None:
        pass


class WholeModelEngine:
    """An engine that knows nothing of parts."""

    name = "whole"
    returns_routes = True


def collective(engine: Any) -> CollectiveEngine:
    rank = dist.get_rank()
    return CollectiveEngine(engine if rank == 0 else None, data_parallel_rank=rank, data_parallel_size=2, name="pushed")


def owned(walked: list[str], yielding: tuple[int, ...], fails_on: int | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """An export with a collective at every step, of which the ranks in `yielding` own the results."""
    for i in range(4):
        total = torch.ones(1)
        dist.all_reduce(total)
        walked.append(f"w{i}")
        if dist.get_rank() in yielding:
            yield f"w{i}", total
    if dist.get_rank() == fails_on:
        raise KeyError("a gate did not come by")
    if fails_on == -1:
        raise ConfigError("the experts' shards cannot be joined")


def push_job(fails: str, yielding: tuple[int, ...], fails_on: int | None) -> dict[str, Any]:
    own = PushedEngine(fails)
    engine = collective(own)
    assert engine.takes_owned_weights
    walked: list[str] = []
    raised = ""
    try:
        engine.update_owned_weights(owned(walked, yielding, fails_on), 1)
    except RolloutError as error:
        raised = str(error)
    except ConfigError as error:
        raised = f"ConfigError: {error}"
    first, own.calls, own.received, own.fails = (own.calls, own.received), [], [], ""
    engine.update_owned_weights(owned([], (0,)), 2)  # all ranks are in step
    engine.close()
    return {"raised": raised, "walked": walked, "calls": first[0], "received": first[1], "again": own.calls}


def test_every_rank_walks_its_part_and_rank_0_controls() -> None:
    results = pool(2).run(push_job, "", (0,), None, timeout=60)
    for result in results:
        assert result["raised"] == ""
        assert result["walked"] == ["w0", "w1", "w2", "w3"]
    assert results[0]["calls"] == results[0]["again"] == ["begin_push", "finish_push"]
    assert results[0]["received"] == ["w0", "w1", "w2", "w3"]
    assert results[1]["calls"] == []


@pytest.mark.parametrize(
    ("fails", "yielding", "fails_on", "raised", "calls"),
    [
        ("begin_push", (0,), None, "begin_push failed", ["begin_push"]),
        ("push_part", (0,), None, "rank 0: push_part failed", ["begin_push", "push_part", "abandon_push"]),
        ("finish_push", (0,), None, "finish_push failed", ["begin_push", "finish_push", "abandon_push"]),
        ("", (0,), 1, "rank 1: KeyError: 'a gate did not come by'", ["begin_push", "abandon_push"]),
        ("", (0,), 0, "rank 0: KeyError: 'a gate did not come by'", ["begin_push", "abandon_push"]),
        ("", (0,), -1, "ConfigError: rank 0, 1: the experts' shards cannot be joined", ["begin_push", "abandon_push"]),
        ("", (), None, "no tensors were given", ["begin_push", "abandon_push"]),
        ("abandon_push", (0,), 1, "rank 1: KeyError: 'a gate did not come by'", ["begin_push", "abandon_push"]),
    ],
)
def test_a_failure_anywhere_is_raised_everywhere(
    fails: str, yielding: tuple[int, ...], fails_on: int | None, raised: str, calls: list[str]
) -> None:
    results = pool(2).run(push_job, fails, yielding, fails_on, timeout=60)
    for result in results:
        assert raised in result["raised"]
        assert KEY not in result["raised"]
        assert result["walked"] == ([] if fails == "begin_push" else ["w0", "w1", "w2", "w3"])
    assert results[0]["calls"] == calls
    assert results[0]["again"] == ["begin_push", "finish_push"]


def test_a_sender_whose_server_is_not_there_is_heard_of_everywhere() -> None:
    for result in pool(2).run(push_job, "", (0, 1), None, timeout=60):
        assert "rank 1: weight update: http://127.0.0.1:9: " in result["raised"]
        assert "does not answer" in result["raised"]
        assert KEY not in result["raised"]
        assert result["walked"] == ["w0", "w1", "w2", "w3"]


def groups_job(fails_on: int | None) -> dict[str, Any]:
    own = PushedEngine()
    engine = collective(own)
    walked: list[str] = []

    def gates(name: str) -> Iterator[tuple[str, torch.Tensor]]:
        walked.append(name)
        if dist.get_rank() == 0:
            yield name, torch.ones(1)
        if dist.get_rank() == fails_on and name == "gate 0":
            raise KeyError("not finite")

    raised = ""
    try:
        engine.update_owned_weights(owned([], (0,)), 1, {0.0: gates("gate 0"), 2.0: gates("gate 2")})
        engine.update_owned_gates(gates("gate 5"), 1, 5.0)
    except RolloutError as error:
        raised = str(error)
    engine.close()
    return {"raised": raised, "walked": walked, "calls": own.calls, "sent_to": own.sent_to}


def test_gates_go_to_the_servers_of_their_horizon() -> None:
    first, second = pool(2).run(groups_job, None, timeout=60)
    assert first["raised"] == ""
    assert first["calls"] == ["begin_push", "finish_push", "begin_gates", "finish_push"]
    everyone = [(f"w{i}", None) for i in range(4)]
    gates = [("gate 0", ["http://127.0.0.1:0"]), ("gate 2", ["http://127.0.0.1:1"]), ("gate 5", ["http://127.0.0.1:0"])]
    assert first["sent_to"] == everyone + gates
    assert second["walked"] == ["gate 0", "gate 2", "gate 5"]
    for result in pool(2).run(groups_job, 1, timeout=60):
        assert "rank 1: KeyError: 'not finite'" in result["raised"]
        assert result["walked"] == ["gate 0", "gate 2"]
        assert result["calls"] in ([], ["begin_push", "abandon_push"])


def whole_model_job() -> tuple[bool, str]:
    engine = collective(WholeModelEngine())
    try:
        engine.update_owned_weights([], 1)
    except RolloutError as error:
        return engine.takes_owned_weights, str(error)
    return engine.takes_owned_weights, ""


def test_an_engine_that_takes_the_whole_model_says_so() -> None:
    for takes, raised in pool(2).run(whole_model_job, timeout=60):
        assert not takes
        assert "call update_weights()" in raised
