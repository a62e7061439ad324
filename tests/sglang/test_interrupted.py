"""Weights that move while responses are in work, on scripted servers: what must not be mixed, lost, or waited for."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from megatron_pr2.errors import RolloutError
from megatron_pr2.rollout.base import RolloutRequest, SamplingParams
from megatron_pr2.rollout.sglang.child_process import ChildProcess
from megatron_pr2.rollout.sglang.config import SGLangConfig
from megatron_pr2.rollout.sglang.engine import SGLangEngine
from megatron_pr2.rollout.sglang.episode import Episode
from megatron_pr2.rollout.sglang.wire import Ask, Sampled, parse_generate
from tests.sglang.conftest import SHAPE
from tests.sglang.fake_server import FakeServer, serve

SAMPLING = SamplingParams(max_new_tokens=4)
OK = (200, {"success": True, "message": "fine"})


class Server(FakeServer):
    """Takes pushes; /generate of requests (not of probes) waits until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()
        self.arrived = threading.Event()
        self.aborted: set[str] = set()
        self.refuse_end = False
        for path in ("/begin_weight_update", "/pause_generation", "/continue_generation"):
            self.overrides[path] = lambda body, call: OK
        self.overrides["/end_weight_update"] = lambda body, call: (500, {}) if self.refuse_end else OK
        self.overrides["/update_weight_version"] = self.stamp
        self.overrides["/abort_request"] = self.abort
        self.overrides["/generate"] = self.hold

    def abort(self, body: dict[str, Any], call: int) -> Any:
        self.aborted.add(body["rid"])
        return 200, b""

    def stamp(self, body: dict[str, Any], call: int) -> Any:
        self.version = body["new_version"]
        return OK

    def hold(self, body: dict[str, Any], call: int) -> Any:
        if "sampling_seed" not in body["sampling_params"]:
            return None
        versions = [self.version]
        self.arrived.set()
        while not self.go.wait(0.01):
            if body["rid"] in self.aborted:
                break
            if versions[-1] != self.version:
                versions.append(self.version)
        if versions[-1] != self.version:
            versions.append(self.version)
        answer = self.generation(body)
        meta = answer["meta_info"]
        meta["weight_versions"] = [
            {"version": v, "start": i, "end": i + 1 if i < len(versions) - 1 else 4} for i, v in enumerate(versions)
        ]
        return 200, answer


@pytest.fixture
def server() -> Iterator[Server]:
    with serve(Server()) as fake:
        assert isinstance(fake, Server)
        yield fake
        fake.go.set()


def engine_on(server: FakeServer, **changes: Any) -> SGLangEngine:
    settings: dict[str, Any] = {"retries": 0, "retry_backoff_s": 0.01, "request_timeout_s": 10.0, "interrupt": "in_place"}
    engine = SGLangEngine(SGLangConfig(urls=(server.url,), **(settings | changes)), SHAPE)
    engine.start()
    engine._update.push = lambda weights, targets=None: 1  # type: ignore[method-assign]
    return engine


def generating(engine: SGLangEngine, count: int = 1) -> tuple[threading.Thread, list[Any]]:
    out: list[Any] = []

    def run() -> None:
        try:
            out.append(engine.generate([RolloutRequest((3, 4), s, group=s) for s in range(count)], SAMPLING, return_routes=True))
        except Exception as error:
            out.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, out


def test_an_attempt_that_lives_through_two_pushes_in_place(server: Server) -> None:
    engine = engine_on(server)
    thread, out = generating(engine)
    assert server.arrived.wait(5)
    for version in (5, 6):
        time.sleep(0.05)
        engine.update_weights([], version)
        time.sleep(0.05)
    server.go.set()
    thread.join(10)
    assert not isinstance(out[0], Exception), out[0]
    assert out[0].responses[0].weight_versions.tolist() == [4, 5, 6, 6]
    engine.close()


def test_what_was_paused_in_a_push_that_failed_is_not_used(server: Server) -> None:
    """Its tokens may be from a mixture of weights, under the old label."""
    engine = engine_on(server)
    thread, out = generating(engine)
    assert server.arrived.wait(5)
    server.refuse_end = True
    with pytest.raises(RolloutError):
        engine.update_weights([], 5)
    server.go.set()
    thread.join(10)
    assert isinstance(out[0], RolloutError), out[0]
    assert "weight update failed" in str(out[0])
    engine.close()


def test_an_interrupt_at_the_end_of_a_push_stays_what_it_is(server: Server) -> None:
    engine = engine_on(server)
    fleet = engine._fleet
    assert fleet is not None
    go_on = fleet.go_on

    async def interrupted() -> None:
        fleet.go_on = go_on  # type: ignore[method-assign]
        await go_on()
        raise ZeroDivisionError

    fleet.go_on = interrupted  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        engine.update_weights([], 5)
    engine.update_weights([], 6)
    engine.close()


def test_requests_of_a_failed_call_are_stopped_at_the_server(server: Server) -> None:
    def refuse_one(body: dict[str, Any], call: int) -> Any:
        if body["sampling_params"].get("sampling_seed") == 1:
            server.arrived.wait(5)
            time.sleep(0.1)
            return 400, {"error": "too long"}
        return server.hold(body, call)

    server.overrides["/generate"] = refuse_one
    engine = engine_on(server, interrupt="abort")
    thread, out = generating(engine, 2)
    thread.join(10)
    assert isinstance(out[0], RolloutError)
    assert len(server.aborted) == 1
    engine.close()


def test_enough_is_enough_even_if_the_rest_fails(server: Server) -> None:
    """The engine fails what it is told to abort after the batch was complete."""

    def slow(body: dict[str, Any], call: int) -> Any:
        if body["sampling_params"].get("sampling_seed") != 1:
            return None
        while body["rid"] not in server.aborted:
            time.sleep(0.01)
        return 500, {}

    server.overrides["/generate"] = slow
    engine = engine_on(server, interrupt="abort", rerolls=0)
    requests = [RolloutRequest((3, 4), s, group=s, key=str(s)) for s in range(2)]
    assert engine.generate(requests, SAMPLING, return_routes=True, enough=1).finished == [0]
    engine.close()


def test_a_stop_token_in_the_step_of_an_abort_ends_the_turn() -> None:
    episode = Episode(RolloutRequest((3, 4), 0), SamplingParams(8, stop_token_ids=(7,)), SHAPE, return_routes=False)
    episode.extend(Sampled([5, 7], np.zeros(2, np.float32), np.zeros(2, np.int64), None, "abort"), "here")
    assert episode.finish_reason == "stop"


def test_an_abort_in_the_queue_after_a_retraction_is_no_fault(server: Server) -> None:
    ask = Ask("pr2.a.r0.", [3, 4], 0, 4, 0, "pr2.4")
    answer = server.generation({"input_ids": [3, 4], "rid": ask.rid, "sampling_params": {"max_new_tokens": 2}})
    answer["meta_info"] |= {"finish_reason": {"type": "abort"}, "num_retractions": 1}
    del answer["meta_info"]["routed_experts"]
    sampled = parse_generate(answer, ask, SHAPE, {"4": 4}, "here")
    assert (sampled.token_ids, sampled.finish, sampled.routes) == ([], "abort", None)


def test_a_response_stays_within_what_the_server_takes(server: Server) -> None:
    server.go.set()
    server.overrides.pop("/generate")
    server.info["max_req_input_len"] = 5
    engine = engine_on(server)
    (response,) = engine.generate([RolloutRequest((3, 4, 5), 0)], SAMPLING, return_routes=True).responses
    assert len(response.response_ids) == 2
    with pytest.raises(RolloutError, match="request 0: its prompt has 5 tokens"):
        engine.generate([RolloutRequest((3,) * 5, 0)], SAMPLING, return_routes=True)
    engine.close()


def test_a_process_that_cannot_be_started_does_not_hang() -> None:
    process = ChildProcess("thing")
    out: list[Any] = []

    def start() -> None:
        try:
            process.start([sys.executable, "-c", "0"], {"A": 1})  # type: ignore[dict-item]
        except Exception as error:
            out.append(error)

    thread = threading.Thread(target=start, daemon=True)
    thread.start()
    thread.join(5)
    assert len(out) == 1
