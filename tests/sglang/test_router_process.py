"""The router itself in front of stand-in servers: what it lets through, what it must not do, and its life as our child."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from megatron_pr2.errors import ConfigError, RolloutError
from megatron_pr2.rollout.base import SamplingParams
from megatron_pr2.rollout.sglang.gateway.router import SGLangRouter
from megatron_pr2.rollout.sglang.plugin import encode_rid
from megatron_pr2.rollout.sglang.wire import Ask, generate_payload
from tests.sglang.fake_server import FakeServer, serve

pytestmark = pytest.mark.sglang

KEY = "sk-router-process-test"


@pytest.fixture(scope="module")
def fakes() -> Iterator[list[FakeServer]]:
    with serve(FakeServer()) as first, serve(FakeServer()) as second:
        # It would look the tokenizer of such a model up on the hub.
        first.info["model_path"] = second.info["model_path"] = "some-organisation/some-model"
        yield [first, second]


@pytest.fixture(scope="module")
def router(sglang_python: str, fakes: list[FakeServer], tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLangRouter]:
    log = tmp_path_factory.mktemp("router") / "router.log"
    with pytest.MonkeyPatch.context() as patch:
        # A proxy of the environment, which a router that used it could not get past.
        patch.setenv("http_proxy", "http://127.0.0.1:9")
        patch.setenv("ALL_PROXY", "http://127.0.0.1:9")
        router = SGLangRouter([f.url for f in fakes], api_key=KEY, policy="round_robin", log_path=log)
        router.start()
    yield router
    router.stop()


@pytest.fixture(autouse=True)
def forget(fakes: list[FakeServer]) -> None:
    for fake in fakes:
        fake.overrides.clear()
        fake.bodies.clear()
        fake.calls.clear()


def post(router: SGLangRouter, path: str, body: dict[str, Any], key: str | None = KEY) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.post(router.url + path, json=body, headers=headers, timeout=60, trust_env=False)


def payload(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "rid": encode_rid("a", 1),
        "input_ids": [5, 6, 7],
        "first_row": 1,
        "max_new_tokens": 3,
        "seed": -1,  # the largest that is sent
        "cache_key": "pr2.3",
    }
    return generate_payload(Ask(**(fields | changes)), SamplingParams(max_new_tokens=3, temperature=0.7, stop_token_ids=(2, 9)))


def test_every_field_of_ours_arrives_but_the_two_that_the_plugin_replaces(router: SGLangRouter, fakes: list[FakeServer]) -> None:
    sent = payload()
    assert post(router, "/generate", sent).status_code == 200
    (got,) = fakes[0].bodies + fakes[1].bodies
    assert {name: got.get(name) for name in sent} == sent | {"return_routed_experts": None, "routed_experts_start_len": None}
    # Fields that it adds must say what SGLang assumes without them.
    assert {name: value for name, value in got.items() if name not in sent and value not in (None, False)} == {"log_metrics": True}


def test_long_prompts_and_long_answers_pass_unchanged(router: SGLangRouter, fakes: list[FakeServer]) -> None:
    answer = b'{"routed_experts": "' + os.urandom(25 << 20).hex().encode() + b'"}'
    prompt = [151_000 + i % 900 for i in range(32_768)]
    seen: list[list[int]] = []
    for fake in fakes:
        fake.overrides["/generate"] = lambda body, call: (seen.append(body["input_ids"]), (200, answer))[1]
    response = post(router, "/generate", payload(input_ids=prompt))
    assert response.content == answer
    assert response.headers["content-length"] == str(len(answer))
    assert seen == [prompt]


@pytest.mark.parametrize("status", [400, 429, 500, 503])
def test_an_error_comes_through_after_one_attempt(router: SGLangRouter, fakes: list[FakeServer], status: int) -> None:
    for fake in fakes:
        fake.overrides["/generate"] = lambda body, call: (status, b"the server's own words")
    response = post(router, "/generate", payload())
    assert (response.status_code, response.text) == (status, "the server's own words")
    assert sum(fake.calls.get("/generate", 0) for fake in fakes) == 1
    for fake in fakes:  # a success closes the circuit again
        fake.overrides.clear()
    assert {post(router, "/generate", payload()).status_code for _ in fakes} == {200}


def test_requests_without_the_key_go_nowhere(router: SGLangRouter, fakes: list[FakeServer]) -> None:
    for key in (None, "sk-another"):
        assert post(router, "/generate", payload(), key).status_code == 401
    assert fakes[0].bodies + fakes[1].bodies == []


def test_what_concerns_one_server_does_not_go_through(router: SGLangRouter, fakes: list[FakeServer]) -> None:
    for path in ("/abort_request", "/pause_generation", "/update_weights_from_disk", "/begin_weight_update"):
        assert post(router, path, {"abort_all": True}).status_code == 404
    assert fakes[0].calls.keys() | fakes[1].calls.keys() <= {"/model_info"}


def test_the_key_is_neither_on_the_command_line_nor_in_the_log(router: SGLangRouter) -> None:
    assert router.pid is not None
    assert router.log_path is not None
    assert KEY not in " ".join(psutil.Process(router.pid).cmdline())
    assert KEY not in router.log_path.read_text()
    assert KEY not in str(router.settings(1, 2))


def test_it_listens_on_loopback_only_and_two_of_them_run_at_once(router: SGLangRouter, fakes: list[FakeServer]) -> None:
    second = SGLangRouter([fakes[0].url], api_key=KEY)
    second.start()
    log = second.log_path
    assert log is not None
    try:
        assert post(second, "/generate", payload()).status_code == 200
        for each in (router, second):
            assert each.pid is not None
            listening = [c for c in psutil.Process(each.pid).net_connections() if c.status == psutil.CONN_LISTEN]
            assert len(listening) == 2
            assert {c.laddr.ip for c in listening} == {"127.0.0.1"}
    finally:
        second.stop()
        second.remove_log()
    assert not second.alive()
    assert not log.exists()
    assert router.alive()


def test_web_pages_may_not_call_it(router: SGLangRouter) -> None:
    ask = {"Origin": "http://a.page.example", "Access-Control-Request-Method": "POST"}
    answer = httpx.options(router.url + "/generate", headers=ask, trust_env=False)
    assert answer.headers.get("access-control-allow-origin") not in ("*", ask["Origin"])


def test_it_never_asks_the_hub(router: SGLangRouter) -> None:
    """It tries for every model that is named by a hub id: the log must show that it went to the address that leads nowhere."""
    assert router.log_path is not None
    log = router.log_path.read_text()
    assert "http://127.0.0.1:9/api/models/some-organisation/some-model" in log
    assert "huggingface.co" not in log


def test_a_server_is_replaced(fakes: list[FakeServer]) -> None:
    with serve(FakeServer()) as third:
        router = SGLangRouter([f.url for f in fakes], api_key=KEY, policy="round_robin")
        router.start()
        try:
            router.replace_worker(fakes[0].url, third.url)
            assert router.worker_urls == [third.url, fakes[1].url]
            assert sorted(router.healthy_workers()) == sorted(router.worker_urls)
            fakes[0].calls.clear()
            assert [post(router, "/generate", payload()).status_code for _ in range(4)] == [200] * 4
            assert (fakes[0].calls.get("/generate"), fakes[1].calls["/generate"], third.calls["/generate"]) == (None, 2, 2)
        finally:
            router.stop()
            router.remove_log()


def test_a_server_that_is_not_there_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    with socket.socket() as taken:  # bound but not listening: refuses
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        router = SGLangRouter([url], api_key=None, log_path=tmp_path / "router.log", start_timeout_s=3)
        with pytest.raises(RolloutError, match=rf"not registered after 3 s: {url}.*router\.log") as caught:
            router.start()
    assert "\x1b" not in str(caught.value)
    assert not router.alive()
    assert router.pid is None


def test_its_own_end_is_described(fakes: list[FakeServer], tmp_path: Path) -> None:
    router = SGLangRouter([fakes[0].url], api_key=KEY, log_path=tmp_path / "router.log")
    router.start()
    assert router.pid is not None
    os.kill(router.pid, signal.SIGKILL)
    assert router.wait(30)
    assert not router.alive()
    assert "SGLang router was killed by signal 9" in router.describe_end()
    router.start()
    try:
        assert post(router, "/generate", payload()).status_code == 200
    finally:
        router.stop()


def test_the_address_is_checked() -> None:
    with pytest.raises(ConfigError, match="expected an IP address"):
        SGLangRouter(["http://127.0.0.1:1"], api_key=None, bind="a.host")
