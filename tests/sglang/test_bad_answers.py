"""A server that misbehaves in every way that a client can see: nothing wrong is accepted, every error names its request."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from megatron_pr2.errors import PR2Error, RolloutError, RouteError
from megatron_pr2.rollout.base import RolloutRequest, SamplingParams
from megatron_pr2.rollout.sglang.config import SGLangConfig
from megatron_pr2.rollout.sglang.engine import SGLangEngine
from tests.sglang.conftest import SHAPE, ensure_alive
from tests.sglang.fake_server import FakeServer, serve

REQUESTS = [RolloutRequest((3, 4, 5), seed) for seed in (11, 12)]
SAMPLING = SamplingParams(max_new_tokens=4)
ROWS = 3 + 4 - 1


def attach(url: str, **changes: Any) -> SGLangEngine:
    settings: dict[str, Any] = {"urls": (url,), "retries": 2, "retry_backoff_s": 0.01, "request_timeout_s": 5.0}
    return SGLangEngine(SGLangConfig(**(settings | changes)), SHAPE)


@pytest.fixture
def engine(fake: FakeServer) -> Iterator[SGLangEngine]:
    engine = attach(fake.url)
    engine.start()
    yield engine
    engine.close()


def damage(fake: FakeServer, change: Callable[[dict[str, Any]], Any]) -> None:
    """From now on, /generate answers the second request (seed 12) with `change` applied."""

    def override(body: dict[str, Any], call: int) -> tuple[int, Any] | None:
        if body["sampling_params"].get("sampling_seed") != 12:
            return None
        answer = fake.generation(body)
        changed = change(answer)
        return 200, answer if changed is None else changed

    fake.overrides["/generate"] = override


def with_routes(change: Callable[[np.ndarray], np.ndarray | None]) -> Callable[[dict[str, Any]], None]:
    def apply(answer: dict[str, Any]) -> None:
        meta = answer["meta_info"]
        rows = np.frombuffer(base64.b64decode(meta["routed_experts"]), "<i4").reshape(-1, 4, 4).copy()
        changed = change(rows)
        meta["routed_experts"] = base64.b64encode((rows if changed is None else changed).tobytes()).decode()

    return apply


def set_meta(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda answer: answer["meta_info"].update(fields)


def test_honest_answers_are_accepted(engine: SGLangEngine, fake: FakeServer) -> None:
    batch = engine.generate(REQUESTS, SAMPLING, return_routes=True)
    responses, stats = batch.responses, batch.stats
    assert [r.response_ids for r in responses] == [(7, 8, 9, 10)] * 2
    assert responses[0].routes is not None
    assert (responses[0].routes.experts[:-1] == fake.routes(ROWS)).all()
    assert responses[0].weight_version == 4
    assert stats.extra["invalid_rows"] == 0
    sent = fake.bodies[-1]["sampling_params"]
    assert (sent["top_p"], sent["top_k"], sent["repetition_penalty"], sent["ignore_eos"]) == (1.0, -1, 1.0, True)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (with_routes(lambda rows: rows[:-1]), RouteError, r"5 rows .*expected 6 rows"),
        (set_meta(routed_experts=None), RouteError, "--enable-return-routed-experts"),
        (set_meta(weight_versions=[{"version": "3", "start": 0, "end": 4}]), RolloutError, "version 3, expected 4"),
        (set_meta(output_token_logprobs=[]), RolloutError, "0 entries in output_token_logprobs, expected 4"),
        (set_meta(output_token_logprobs=[[-1.0, 99, None]] * 4), RolloutError, "names other tokens"),
        (set_meta(output_token_logprobs=[[None, 7 + i, None] for i in range(4)]), RolloutError, "not finite"),
        (set_meta(output_token_logprobs=[[0.5, 7 + i, None] for i in range(4)]), RolloutError, "above 0"),
        (set_meta(finish_reason={"type": "abort", "message": "retracted"}), RolloutError, "abort"),
        (lambda a: a.pop("meta_info"), RolloutError, "no meta_info"),
        (lambda a: a.update(output_ids=[]), RolloutError, "no output_ids"),
        (lambda a: b"<html>proxy error</html>", RolloutError, "not JSON"),
    ],
)
def test_a_wrong_answer_is_an_error_that_names_the_request(
    engine: SGLangEngine, fake: FakeServer, change: Any, kind: type[PR2Error], message: str
) -> None:
    damage(fake, change)
    with pytest.raises(kind, match=message) as caught:
        engine.generate(REQUESTS, SAMPLING, return_routes=True)
    assert "request 1 of 2 (seed 12)" in str(caught.value)


def test_sampled_ids_outside_the_vocabulary_are_an_error(engine: SGLangEngine, fake: FakeServer) -> None:
    def change(answer: dict[str, Any]) -> None:
        answer["output_ids"][0] = 260
        answer["meta_info"]["output_token_logprobs"][0][1] = 260

    damage(fake, change)
    with pytest.raises(RolloutError, match=r"request 1 .*260.*0\.\.259"):
        engine.generate(REQUESTS, SAMPLING, return_routes=True)


def test_an_oversized_answer_is_refused_while_it_arrives(engine: SGLangEngine, fake: FakeServer) -> None:
    damage(fake, lambda answer: json.dumps(answer).encode() + b" " * 1_000_000)
    with pytest.raises(RolloutError, match=r"request 1 .*more than the expected \d+ bytes"):
        engine.generate(REQUESTS, SAMPLING, return_routes=True)


def test_passing_500s_are_retried(engine: SGLangEngine, fake: FakeServer) -> None:
    calls = fake.calls["/generate"]
    fake.overrides["/generate"] = lambda body, call: (503, {"error": "busy"}) if call - calls <= 2 else None
    batch = engine.generate(REQUESTS[:1], SAMPLING, return_routes=True)
    responses, stats = batch.responses, batch.stats
    assert len(responses) == 1
    assert stats.extra["retries"] == 2


def test_lasting_500s_are_an_error(engine: SGLangEngine, fake: FakeServer) -> None:
    fake.overrides["/generate"] = lambda body, call: (500, {"error": "scheduler is gone"})
    with pytest.raises(RolloutError, match=r"request 0 .*failed 3 times although the server is alive.*scheduler is gone"):
        engine.generate(REQUESTS[:1], SAMPLING, return_routes=True)


def test_500s_of_a_sick_server_are_its_death(engine: SGLangEngine, fake: FakeServer) -> None:
    fake.overrides["/generate"] = lambda body, call: (500, {"error": "scheduler is gone"})
    fake.overrides["/health"] = lambda body, call: (503, b"")
    calls = fake.calls["/generate"]
    with pytest.raises(RolloutError, match=r"request 0 .*engine died: .*/health answers 503"):
        engine.generate(REQUESTS[:1], SAMPLING, return_routes=True)
    assert fake.calls["/generate"] == calls + 1  # a dead engine is not asked again


def test_refusals_are_not_retried(engine: SGLangEngine, fake: FakeServer) -> None:
    calls = fake.calls["/generate"]
    fake.overrides["/generate"] = lambda body, call: (400, {"error": "prompt too long"})
    with pytest.raises(RolloutError, match=r"request 0 .*HTTP 400: .*prompt too long"):
        engine.generate(REQUESTS[:1], SAMPLING, return_routes=True)
    assert fake.calls["/generate"] == calls + 1


def test_time_out(fake: FakeServer) -> None:
    engine = attach(fake.url, request_timeout_s=0.3)
    engine.start()
    release = threading.Event()

    def hang(body: dict[str, Any], call: int) -> None:
        release.wait(20)

    fake.overrides["/generate"] = hang
    try:
        with pytest.raises(RolloutError, match=r"request \d .*no answer within 0.3 s"):
            engine.generate(REQUESTS, SAMPLING, return_routes=True)
    finally:
        release.set()
        engine.close()


def test_server_that_goes_away_between_requests() -> None:
    with serve(FakeServer()) as fake:
        engine = attach(fake.url)
        engine.start()
    with pytest.raises(RolloutError, match=r"request \d .*engine died: .*does not answer"):
        engine.generate(REQUESTS, SAMPLING, return_routes=True)
    with pytest.raises(RolloutError, match="does not answer"):
        ensure_alive(engine)
    engine.close()


def test_no_server_at_all() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    engine = attach(f"http://127.0.0.1:{port}")
    with pytest.raises(RolloutError, match=f"SGLang server http://127.0.0.1:{port}: .*does not answer"):
        engine.start()
    with pytest.raises(RolloutError, match=r"call start\(\)"):
        engine.generate(REQUESTS, SAMPLING, return_routes=True)


def test_waiting_for_a_slot_does_not_count_as_waiting_for_an_answer(fake: FakeServer) -> None:
    engine = attach(fake.url, concurrency=1, request_timeout_s=1.0)
    engine.start()
    fake.overrides["/generate"] = lambda body, call: time.sleep(0.2)
    responses = engine.generate([RolloutRequest((3, 4), seed) for seed in range(8)], SAMPLING, return_routes=True).responses
    engine.close()
    assert len(responses) == 8


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"enable_return_routed_experts": False}, "--enable-return-routed-experts"),
        ({"version": "0.5.15"}, "wrong routes without an error"),
        ({"pp_size": 2}, "pp_size=2"),
    ],
)
def test_unfit_servers_are_refused(fake: FakeServer, info: dict[str, Any], message: str) -> None:
    fake.info.update(info)
    with pytest.raises(RolloutError, match=message):
        attach(fake.url).start()


def test_an_engine_that_records_no_routes_is_refused_at_the_start(fake: FakeServer) -> None:
    def zeros(body: dict[str, Any], call: int) -> tuple[int, Any]:
        answer = fake.generation(body)
        rows = np.zeros((len(body["input_ids"]), 4, 4), "<i4")
        answer["meta_info"]["routed_experts"] = base64.b64encode(rows.tobytes()).decode()
        return 200, answer

    fake.overrides["/generate"] = zeros
    with pytest.raises(RolloutError, match="6 of 6 rows of the probe's routes are unusable"):
        attach(fake.url).start()


def test_score_flushes_the_cache_first(engine: SGLangEngine, fake: FakeServer) -> None:
    flushed = fake.calls["/flush_cache"]
    (probe,) = engine.score([3, 4, 5, 6])
    logprobs, table = probe.logprobs, probe.routes
    assert fake.calls["/flush_cache"] == flushed + 1
    assert logprobs.tolist() == [-1.0] * 3
    assert (table.experts == fake.routes(4)).all()
    assert table.num_missing == 0
    fake.overrides["/flush_cache"] = lambda body, call: (400, b"requests are running")
    with pytest.raises(RolloutError, match=r"score: .*requests are running"):
        engine.score([3, 4, 5, 6])


def test_score_with_too_few_logprobs(engine: SGLangEngine, fake: FakeServer) -> None:
    def cached(body: dict[str, Any], call: int) -> tuple[int, Any]:
        answer = fake.generation(body)
        del answer["meta_info"]["input_token_logprobs"][1]
        return 200, answer

    fake.overrides["/generate"] = cached
    with pytest.raises(RolloutError, match="score: 3 entries in input_token_logprobs, expected 4"):
        engine.score([3, 4, 5, 6])


WEIGHTS = [("model.layers.0.mlp.gate.weight", torch.zeros(16, 64))]


@pytest.mark.parametrize("path", ["/begin_weight_update", "/init_weights_update_group"])
def test_a_refused_push_blocks_sampling(engine: SGLangEngine, fake: FakeServer, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_pr2.rollout.sglang.push.channel._CONNECT_TIMEOUT_S", 0.5)
    for each in ("/begin_weight_update", "/end_weight_update"):
        fake.overrides[each] = lambda body, call: (200, {"success": True, "message": "Success"})
    fake.overrides[path] = lambda body, call: (400, {"success": False, "message": "no, thanks"})
    with pytest.raises(RolloutError, match=r"weight update: .*no, thanks"):
        engine.update_weights(WEIGHTS, 5)
    with pytest.raises(RolloutError, match=r"cannot sample: .*call update_weights\(\)"):
        engine.generate(REQUESTS, SAMPLING, return_routes=True)


def test_proxies_of_the_environment_are_not_asked(fake: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    engine = attach(fake.url)
    engine.start()
    ensure_alive(engine)
    engine.close()
