"""Servers with gates for different horizons, scripted: who gets what is pushed, who is asked, and what a dead server changes."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_pr2.errors import ConfigError, RolloutError
from megatron_pr2.rollout.base import RolloutRequest, SamplingParams
from megatron_pr2.rollout.sglang.config import SGLangConfig
from megatron_pr2.rollout.sglang.engine import SGLangEngine
from tests.sglang.conftest import SHAPE
from tests.sglang.fake_server import FakeServer, serve

SAMPLING = SamplingParams(max_new_tokens=4)
OK = (200, {"success": True, "message": "fine"})
HORIZONS = (0.0, 1.0, 2.0)
# In another order than that of the servers, in which the idlest one would be right by chance.
DEALT = [HORIZONS[-1 - seed // 2 % 3] for seed in range(12)]
GATES = {horizon: [(f"gate for {horizon:g}", torch.zeros(1))] for horizon in HORIZONS}


class Server(FakeServer):
    """Takes pushes, and dies and comes back when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.dead = False
        for path in ("/begin_weight_update", "/end_weight_update"):
            self.overrides[path] = lambda body, call: OK
        self.overrides["/update_weight_version"] = self.stamp
        for path in ("/health", "/model_info", "/generate", "/server_info"):
            self.overrides[path] = lambda body, call: (503, b"gone") if self.dead else None

    def stamp(self, body: dict[str, Any], call: int) -> Any:
        self.version = body["new_version"]
        return OK

    def seeds(self) -> list[int]:
        """Of the requests that it answered since the last time."""
        bodies, self.bodies = self.bodies, []
        return sorted(body["sampling_params"]["sampling_seed"] for body in bodies if "sampling_seed" in body["sampling_params"])


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    with serve(Server()) as a, serve(Server()) as b, serve(Server()) as c:
        yield [server for server in (a, b, c) if isinstance(server, Server)]


class Pushed:
    """In place of the way of weights: notes which names went to which servers."""

    def __init__(self, engine: SGLangEngine) -> None:
        self.sent: list[tuple[str, list[int]]] = []
        self._index = {replica.url: replica.index for replica in engine.replicas}

    def __call__(self, weights: Any, targets: Any = None) -> int:
        to = [0, 1, 2] if targets is None else sorted(self._index[target.url] for target in targets)
        self.sent += [(name, to) for name, _ in weights]
        return 1


def engine_on(servers: list[Server], **changes: Any) -> tuple[SGLangEngine, Pushed]:
    settings: dict[str, Any] = {"retries": 0, "retry_backoff_s": 0.01, "request_timeout_s": 5.0}
    engine = SGLangEngine(SGLangConfig(urls=tuple(server.url for server in servers), **(settings | changes)), SHAPE)
    engine.start()
    pushed = Pushed(engine)
    engine._update.push = pushed  # type: ignore[method-assign]
    return engine, pushed


def requests(count: int = 12) -> list[RolloutRequest]:
    """The seed says which horizon it is for."""
    return [RolloutRequest((3, 4, 5), seed, key=str(seed), group=seed // 6, horizon=DEALT[seed]) for seed in range(count)]


def seeds_of(*horizons: float) -> list[int]:
    return [seed for seed, horizon in enumerate(DEALT) if horizon in horizons]


def sampled_under(**other: float) -> list[float]:
    """The horizons that were dealt, but for those that others stand in for: `_1=0.0`."""
    return [other.get(f"_{horizon:g}", horizon) for horizon in DEALT]


def test_each_request_goes_to_the_servers_of_its_horizon(servers: list[Server]) -> None:
    engine, pushed = engine_on(servers)
    engine.update_weights([("everything else", torch.zeros(1))], 1, GATES)
    # The weights once to all, the gates to one group each.
    assert pushed.sent == [("everything else", [0, 1, 2]), ("gate for 0", [0]), ("gate for 1", [1]), ("gate for 2", [2])]
    assert {replica.label for replica in engine.replicas} == {"1"}
    batch = engine.generate(requests(), SAMPLING, return_routes=True)
    assert [server.seeds() for server in servers] == [seeds_of(horizon) for horizon in HORIZONS]
    assert [response.horizon for response in batch.responses] == DEALT
    assert batch.stats.extra["other_horizon"] == 0
    assert [probe.horizon for probe in engine.score([3, 4, 5])] == list(HORIZONS)
    engine.close()


def test_fewer_horizons_than_servers_are_shared_out(servers: list[Server]) -> None:
    engine, pushed = engine_on(servers)
    engine.update_weights([], 1, {horizon: GATES[horizon] for horizon in (0.0, 2.0)})
    assert pushed.sent == [("gate for 0", [0, 1]), ("gate for 2", [2])]
    batch = engine.generate(requests(), SAMPLING, return_routes=True)
    assert servers[2].seeds() == seeds_of(2.0)
    assert sorted(servers[0].seeds() + servers[1].seeds()) == seeds_of(0.0, 1.0)
    # Of two that are equally near to 1 the one that predicts less.
    assert [response.horizon for response in batch.responses] == sampled_under(_1=0.0)
    assert batch.stats.extra["other_horizon"] == 4
    engine.close()


def test_a_group_without_a_server_is_served_by_the_nearest(servers: list[Server], caplog: pytest.LogCaptureFixture) -> None:
    engine, pushed = engine_on(servers)
    engine.update_weights([], 1, GATES)
    servers[2].dead = True
    with caplog.at_level(logging.WARNING):
        batch = engine.generate(requests(), SAMPLING, return_routes=True)
    assert [response.horizon for response in batch.responses] == sampled_under(_2=1.0)
    assert batch.stats.extra["other_horizon"] == 4
    assert batch.stats.extra["engines_lost"] == 1
    assert "4 responses were sampled under gates for another horizon" in caplog.text
    # It is back before the next push, with its own gates.
    servers[2].dead = False
    pushed.sent.clear()
    for server in servers:
        server.seeds()
    engine.update_weights([], 2, GATES)
    assert ("gate for 2", [2]) in pushed.sent
    batch = engine.generate(requests(), SAMPLING, return_routes=True)
    assert servers[2].seeds() == seeds_of(2.0)
    assert batch.stats.extra["other_horizon"] == 0
    engine.close()


def test_gates_of_a_group_whose_servers_stay_away_go_nowhere(servers: list[Server]) -> None:
    engine, pushed = engine_on(servers)
    engine.update_weights([], 1, GATES)
    servers[1].dead = True
    engine.update_weights([], 2, GATES)
    assert pushed.sent[3:] == [("gate for 0", [0]), ("gate for 1", []), ("gate for 2", [2])]
    batch = engine.generate(requests(), SAMPLING, return_routes=True)
    assert [response.horizon for response in batch.responses] == sampled_under(_1=0.0)
    assert [probe.horizon for probe in engine.score([3, 4, 5])] == [0.0, 2.0]
    engine.close()


def test_another_server_of_the_group_takes_over(servers: list[Server]) -> None:
    engine, _ = engine_on(servers)
    engine.update_weights([], 1, {horizon: GATES[horizon] for horizon in (0.0, 2.0)})
    servers[0].dead = True
    asked = [request for request in requests() if request.horizon != 1.0]
    batch = engine.generate(asked, SAMPLING, return_routes=True)
    assert batch.stats.extra["other_horizon"] == 0
    assert servers[1].seeds() == seeds_of(0.0)
    engine.close()


def stop_in_the_middle(server: Server) -> None:
    """Its requests are answered when they are aborted, with two tokens."""
    waiting: dict[str, threading.Event] = {}

    def slow(body: dict[str, Any], call: int) -> tuple[int, Any] | None:
        if "sampling_seed" not in body["sampling_params"]:
            return None
        assert waiting.setdefault(body["rid"], threading.Event()).wait(10)
        answer = server.generation(body | {"sampling_params": {"max_new_tokens": 2}})
        answer["meta_info"]["finish_reason"] = {"type": "abort"}
        return 200, answer

    def abort(body: dict[str, Any], call: int) -> tuple[int, Any]:
        waiting.setdefault(body["rid"], threading.Event()).set()
        return 200, b""

    server.overrides |= {"/generate": slow, "/abort_request": abort}


@pytest.mark.parametrize("dies", [False, True])
def test_what_is_carried_over_keeps_its_horizon_or_starts_again(servers: list[Server], dies: bool) -> None:
    """A response has one horizon: what a group without servers has sampled is not continued under other gates."""
    engine, _ = engine_on(servers)
    engine.update_weights([], 1, GATES)
    stop_in_the_middle(servers[2])
    asked = [RolloutRequest((3, 4, 5), seed, key=str(seed), group=seed, horizon=HORIZONS[seed]) for seed in range(3)]
    batch = engine.generate(asked, SAMPLING, return_routes=True, enough=2)
    assert batch.finished == [0, 1]
    servers[2].overrides["/generate"] = lambda body, call: (500, {}) if servers[2].dead else None
    servers[2].dead = dies
    for server in servers:
        server.seeds()
    batch = engine.generate(asked[2:], SAMPLING, return_routes=True)
    (response,) = batch.responses
    assert response.horizon == (1.0 if dies else 2.0)
    assert batch.stats.extra["other_horizon"] == int(dies)
    assert [server.seeds() for server in servers] == [[], [2] if dies else [], [] if dies else [2]]
    assert response.response_ids == ((7, 8, 9, 10) if dies else (7, 8, 7, 8))
    assert response.routes is not None
    assert response.routes.num_missing == 1
    engine.close()


def test_turns_push_gates_alone_to_all_servers_that_hold_the_version(servers: list[Server]) -> None:
    engine, pushed = engine_on(servers)
    with pytest.raises(RolloutError, match="no server is left that holds version 1; push all weights first"):
        engine.update_gates(GATES[1.0], 1, 1.0)
    engine.update_weights([("everything else", torch.zeros(1))], 1, {0.0: GATES[0.0]})
    assert {replica.horizon for replica in engine.replicas} == {0.0}
    servers[1].dead = True
    asked_before = [server.calls.get("/health") for server in servers]
    engine.update_gates(GATES[1.0], 1, 1.0)
    # Which would take SGLang a second.
    assert [server.calls.get("/health") for server in servers] == asked_before
    assert pushed.sent[2:] == [("gate for 1", [0, 2])]
    servers[0].overrides["/model_info"] = lambda body, call: (401, {})  # whoever asks for a key lives
    assert engine.replicas[0].why_dead(generates=False) is None
    servers[0].overrides["/model_info"] = lambda body, call: None
    # It has not the other weights: it must not come back by a push of gates.
    servers[1].dead = False
    engine.update_gates(GATES[2.0], 1, 2.0)
    assert pushed.sent[3:] == [("gate for 2", [0, 2])]
    asked = [request for request in requests() if request.horizon == 2.0]
    keys = []
    for server in servers:
        server.seeds()
        server.overrides["/generate"] = lambda body, call: keys.append(body["extra_key"])
    assert [response.horizon for response in engine.generate(asked, SAMPLING, return_routes=True).responses] == [2.0] * 4
    assert servers[1].seeds() == []
    # Nothing that other gates of the same version computed is taken from a cache.
    assert set(keys) == {"pr2.1.2"}
    engine.update_weights([("everything else", torch.zeros(1))], 2, {0.0: GATES[0.0]})
    assert [replica.horizon for replica in engine.replicas] == [0.0] * 3
    engine.close()


def test_what_servers_cannot_hold_is_refused(servers: list[Server]) -> None:
    engine, _ = engine_on(servers)
    with pytest.raises(ConfigError, match="gates for 4 horizons and 3 servers, with one set each"):
        engine.begin_push(1, (0.0, 1.0, 2.0, 3.0))
    engine.config = SGLangConfig(urls=engine.config.urls, router="http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="does not know which server has which gates"):
        engine.begin_push(1, HORIZONS)
    engine.config = SGLangConfig(model_path="x", push="disk")
    with pytest.raises(ConfigError, match="all servers load the same gates"):
        engine.begin_push(1, HORIZONS)
    engine.close()


def test_gates_do_not_change_under_responses_that_only_pause(servers: list[Server]) -> None:
    engine, pushed = engine_on(servers, interrupt="in_place")
    engine.update_weights([], 1, {0.0: GATES[0.0]})
    go, arrived = threading.Event(), threading.Event()

    def hold(body: dict[str, Any], call: int) -> None:
        if "sampling_seed" in body["sampling_params"]:
            arrived.set()
            go.wait(10)

    for server in servers:
        server.overrides["/generate"] = hold
        for path in ("/pause_generation", "/continue_generation"):
            server.overrides[path] = lambda body, call: OK
    out: list[Any] = []
    thread = threading.Thread(
        target=lambda: out.append(engine.generate([RolloutRequest((3, 4), 0, horizon=0.0)], SAMPLING, return_routes=True))
    )
    thread.start()
    assert arrived.wait(5)
    before = list(pushed.sent)
    with pytest.raises(RolloutError, match="gates for another horizon in the middle of responses"):
        engine.update_gates(GATES[1.0], 1, 1.0)
    assert pushed.sent == before
    go.set()
    thread.join()
    assert out[0].responses[0].horizon == 0.0
    engine.close()
