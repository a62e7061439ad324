"""Two real engines behind SGLang's own router: routes come back, requests spread, and an engine may die."""

from __future__ import annotations

import base64
import os
import signal
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import httpx
import numpy as np
import pytest

from megatron_pr2.rollout.sglang.gateway.router import SGLangRouter
from megatron_pr2.rollout.sglang.plugin import encode_rid
from megatron_pr2.rollout.sglang.server import SGLangServer
from tests.sglang.conftest import SHAPE, TinyModel, own_server
from tests.sglang.preload import Preloaded
from tests.sglang.test_plugin import write_distribution

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

KEY = "sk-router-test"
PROMPT = [5, 17, 99, 200, 3, 44, 71, 128, 250, 9, 33, 64]
LONG = 400  # tokens: seconds of work


@pytest.fixture(scope="module")
def engines(preloaded: Preloaded, tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[SGLangServer]]:
    """Each answers with its own weight version, "engine0" or "engine1", so that answers tell who gave them."""
    folder = tmp_path_factory.mktemp("engines")
    key_file = folder / "key"
    key_file.write_text(KEY)
    # As in an environment in which this package is installed.
    path = str(write_distribution(folder / "installed"))
    engines = [
        SGLangServer(own_server(tiny.path, folder / f"{i}.log", api_key_file=str(key_file), env={"PYTHONPATH": path}))
        for i in range(2)
    ]
    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(SGLangServer.start, engines))
        for index, engine in enumerate(engines):
            name_engine(engine, index)
        yield engines
    finally:
        for engine in engines:
            engine.stop()


@pytest.fixture(scope="module")
def router(engines: list[SGLangServer], tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLangRouter]:
    log = tmp_path_factory.mktemp("router") / "router.log"
    router = SGLangRouter([e.url for e in engines], api_key=KEY, policy="round_robin", log_path=log)
    router.start()
    yield router
    router.stop()


def post(url: str, path: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(url + path, json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=120, trust_env=False)


def name_engine(engine: SGLangServer, index: int) -> None:
    answer = post(engine.url, "/update_weight_version", {"new_version": f"engine{index}", "abort_all_requests": False})
    assert answer.status_code == 200, answer.text


def request(
    start: int | None, *, prompt: list[int] = PROMPT, new: int = 8, unique: str | None = None, **fields: Any
) -> dict[str, Any]:
    return {
        "rid": encode_rid(unique or uuid.uuid4().hex, start),
        "input_ids": prompt,
        "sampling_params": {"temperature": 1.0, "max_new_tokens": new, "ignore_eos": True, "sampling_seed": 7},
        **fields,
    }


def generate(url: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = post(url, "/generate", body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def rows(answer: dict[str, Any]) -> np.ndarray:
    """[rows, layers, top-k] of an answer's routes."""
    raw = np.frombuffer(base64.b64decode(answer["meta_info"]["routed_experts"]), "<i4")
    return raw.reshape(-1, SHAPE.num_hidden_layers, SHAPE.topk)


def engine_of(answer: dict[str, Any]) -> str:
    return answer["meta_info"]["weight_version"]


def wait_until(condition: Callable[[], bool], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "this never happened"
        time.sleep(0.1)


def random_prompts(count: int, length: int = 40) -> list[list[int]]:
    return np.random.default_rng(0).integers(3, SHAPE.vocab_size, (count, length)).tolist()


def test_routes_through_the_router_are_those_of_the_engine(engines: list[SGLangServer], router: SGLangRouter) -> None:
    direct = generate(engines[0].url, request(None, return_routed_experts=True))
    expected = rows(direct)
    assert len(expected) == len(PROMPT) + 8 - 1
    for start in (0, 5, len(PROMPT)):
        seen = set()
        for _ in engines:
            asked = request(start)
            answer = generate(router.url, asked)
            np.testing.assert_array_equal(rows(answer), expected[start:])
            assert answer["output_ids"] == direct["output_ids"]
            assert answer["meta_info"]["id"] == asked["rid"]
            seen.add(engine_of(answer))
        assert seen == {"engine0", "engine1"}


def test_it_is_the_request_id_that_brings_them(engines: list[SGLangServer], router: SGLangRouter) -> None:
    """Without this the client would have to be told: the field alone is dropped, and an id without a wish brings none."""
    for asked in (request(None), request(None, return_routed_experts=True), request(None) | {"rid": "pr2-looks-similar.r0"}):
        assert "routed_experts" not in generate(router.url, asked)["meta_info"]
    assert "routed_experts" not in generate(engines[0].url, request(None))["meta_info"]


def test_groups_stay_together_and_spread(engines: list[SGLangServer]) -> None:
    """cache_aware; also a second router in front of the same engines."""
    router = SGLangRouter([e.url for e in engines], api_key=KEY, policy="cache_aware")
    router.start()
    try:
        prompts = random_prompts(8)
        order = [index for index in range(8) for _ in range(4)]
        with ThreadPoolExecutor(32) as pool:
            answers = list(pool.map(lambda index: generate(router.url, request(0, prompt=prompts[index], new=16)), order))
        chosen = [{engine_of(a) for a, index in zip(answers, order, strict=True) if index == group} for group in range(8)]
        assert Counter(len(group) for group in chosen).most_common(1)[0][0] == 1
        assert {engine_of(a) for a in answers} == {"engine0", "engine1"}
        # The same beginning for all: without a low threshold it would lead every request to one engine. Long enough that the
        # first ones are still running when the last one comes, also on a busy machine.
        shared = [prompts[0] + tail for tail in random_prompts(48, 8)]
        with ThreadPoolExecutor(48) as pool:
            answers = list(pool.map(lambda prompt: generate(router.url, request(0, prompt=prompt, new=160)), shared))
        assert min(Counter(map(engine_of, answers)).values()) >= 8
        assert len(Counter(map(engine_of, answers))) == 2
    finally:
        router.stop()
        router.remove_log()


def test_an_abort_at_every_engine_stops_this_request_alone(engines: list[SGLangServer], router: SGLangRouter) -> None:
    """SGLang aborts by the beginning of an id: "job1" must not take "job10" with it."""
    asked = [request(0, new=LONG, unique=unique) for unique in ("job1", "job10", "job1-")]
    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(generate, router.url, each) for each in asked]
        time.sleep(0.5)
        while not futures[0].done():  # an abort that overtakes its request is lost
            for engine in engines:
                assert post(engine.url, "/abort_request", {"rid": asked[0]["rid"]}).status_code == 200
        aborted, *others = [future.result() for future in futures]
    assert aborted["meta_info"]["finish_reason"]["type"] == "abort"
    assert len(aborted["output_ids"]) < LONG
    if aborted["output_ids"]:  # it may have been stopped in the queue
        assert len(rows(aborted)) == len(PROMPT) + len(aborted["output_ids"]) - 1
    for other in others:
        assert other["meta_info"]["finish_reason"]["type"] == "length"


class ImpatientRouter(SGLangRouter):
    """Finds out soon."""

    health: ClassVar[dict[str, Any]] = {}

    def settings(self, port: int, metrics_port: int) -> dict[str, Any]:
        soon = {"health_check_interval_secs": 1, "health_check_timeout_secs": 3}
        return super().settings(port, metrics_port) | soon | self.health


class ImpatientRouterWithSGLangsHealth(ImpatientRouter):
    """What the router does unless it is told otherwise."""

    health: ClassVar[dict[str, Any]] = {"health_check_endpoint": "/health"}


def test_an_engine_that_is_paused_for_an_update_stays_registered(engines: list[SGLangServer]) -> None:
    urls = [e.url for e in engines]
    ours, default = ImpatientRouter(urls, api_key=KEY), ImpatientRouterWithSGLangsHealth(urls, api_key=KEY)
    try:
        ours.start()
        default.start()
        assert post(engines[0].url, "/pause_generation", {"mode": "in_place"}).status_code == 200
        wait_until(lambda: urls[0] not in default.healthy_workers())
        assert sorted(ours.healthy_workers()) == sorted(urls)
    finally:
        assert post(engines[0].url, "/continue_generation", {}).status_code == 200
        for router in (ours, default):
            router.stop()
            router.remove_log()


def test_an_engine_is_killed_and_another_takes_its_place(engines: list[SGLangServer], router: SGLangRouter) -> None:
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(post, router.url, "/generate", request(0, prompt=prompt, new=LONG)) for prompt in random_prompts(4)]
        time.sleep(0.7)
        assert engines[0].pid is not None
        os.kill(engines[0].pid, signal.SIGKILL)
        answers = [future.result() for future in futures]
    assert sorted(answer.status_code for answer in answers) == [200, 200, 500, 500]
    assert all("call_upstream" in a.text or "read_response_body_failed" in a.text for a in answers if a.status_code == 500)
    wait_until(lambda: not engines[0].alive())
    restarted = threading.Thread(target=engines[0].start)
    restarted.start()

    def noticed() -> bool:
        # Until then every failure is visible to the client, and repeating the request is all that it takes.
        first, second = (post(router.url, "/generate", request(0, new=1)) for _ in range(2))
        assert 200 in (first.status_code, second.status_code)
        return router.healthy_workers() == [engines[1].url]

    wait_until(noticed)
    assert {engine_of(generate(router.url, request(0, new=1))) for _ in range(4)} == {"engine1"}
    restarted.join()
    assert engines[0].alive()
    name_engine(engines[0], 0)
    router.replace_worker(router.worker_urls[0], engines[0].url)
    assert {engine_of(generate(router.url, request(0))) for _ in range(4)} == {"engine0", "engine1"}
