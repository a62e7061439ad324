"""An own router: what it refuses, when it is ready, and its restart after a restart that failed. No process is started."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_pr2.errors import ConfigError, RolloutError
from megatron_pr2.rollout.sglang.child_process import ChildProcess
from megatron_pr2.rollout.sglang.config import SGLangConfig
from megatron_pr2.rollout.sglang.gateway.router import SGLangRouter
from megatron_pr2.rollout.sglang.servers import SGLangServers
from tests.sglang.conftest import SHAPE


def test_an_address_beyond_this_machine_needs_a_key() -> None:
    with pytest.raises(ConfigError, match=r"bind='0.0.0.0' lets other machines reach it"):
        SGLangRouter(["http://127.0.0.1:1"], api_key=None, bind="0.0.0.0")


def test_all_servers_must_be_healthy_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    router = SGLangRouter.__new__(SGLangRouter)
    seen = iter([["a"], ["b"], ["b"], ["a", "b"]])
    monkeypatch.setattr(router, "healthy_workers", lambda: next(seen), raising=False)
    monkeypatch.setattr(router, "wait", lambda timeout_s: False, raising=False)
    router._wait_for({"a", "b"}, time.monotonic() + 60)
    assert next(seen, None) is None


def test_readiness_is_asked_for_a_few_times_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    process, pauses = ChildProcess.__new__(ChildProcess), []
    monkeypatch.setattr(process, "wait", lambda timeout_s: pauses.append(timeout_s), raising=False)
    process.await_ready(lambda: len(pauses) == 2, time.monotonic() + 60, str)
    assert min(pauses) >= 0.25


def test_a_router_that_died_with_a_server_comes_back_after_a_restart_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    servers = SGLangServers(SGLangConfig(model_path="m", router="own"), SHAPE)
    front = SimpleNamespace(close=lambda: None)
    fleet: Any = SimpleNamespace(lost={}, front=front)
    dead: Any = SimpleNamespace(alive=lambda: False, describe_end=lambda: "killed", stop=lambda: None)
    servers.fleet, servers._router, servers._loop = fleet, dead, SimpleNamespace()  # type: ignore[assignment]
    outcomes = iter([RolloutError("no memory"), None])

    def revive() -> None:
        if (error := next(outcomes)) is not None:
            raise error

    monkeypatch.setattr(servers, "revive", revive)
    monkeypatch.setattr(servers, "_start_router", lambda fleet, loop: setattr(fleet, "front", front))
    with pytest.raises(RolloutError, match="no memory"):
        servers.restart()
    assert fleet.front is None
    servers.restart()
    assert fleet.front is front
