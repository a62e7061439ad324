"""What one generate call does on a scripted server: re-rolls, deadlines, early stop, bounded answers, several threads."""

from __future__ import annotations

import base64
import threading
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_pr2.errors import RolloutError, RouteError
from megatron_pr2.rollout.base import Progress, RolloutRequest, SamplingParams
from megatron_pr2.rollout.sglang.config import SGLangConfig
from megatron_pr2.rollout.sglang.engine import SGLangEngine
from tests.sglang.conftest import SHAPE
from tests.sglang.fake_server import FakeServer, serve

SAMPLING = SamplingParams(max_new_tokens=4)
REQUESTS = [RolloutRequest((3, 4, 5), seed, key=str(seed), group=seed // 2) for seed in range(8)]


def engine_on(*fakes: FakeServer, **changes: Any) -> SGLangEngine:
    settings: dict[str, Any] = {"retries": 1, "retry_backoff_s": 0.01, "request_timeout_s": 5.0}
    engine = SGLangEngine(SGLangConfig(urls=tuple(fake.url for fake in fakes), **(settings | changes)), SHAPE)
    engine.start()
    return engine


def damaged(fake: FakeServer, times: int, change: Any) -> None:
    """The first answers of every request are damaged."""
    seen: dict[int, int] = {}

    def override(body: dict[str, Any], call: int) -> tuple[int, Any] | None:
        seed = body["sampling_params"].get("sampling_seed")
        if seed is None:
            return None
        with fake.lock:
            seen[seed] = seen.get(seed, 0) + 1
            if seen[seed] > times:
                return None
        answer = fake.generation(body)
        change(answer["meta_info"])
        return 200, answer

    fake.overrides["/generate"] = override


def bad_row(meta: dict[str, Any]) -> None:
    rows = np.frombuffer(base64.b64decode(meta["routed_experts"]), "<i4").copy()
    rows[:2] = 3
    meta["routed_experts"] = base64.b64encode(rows.tobytes()).decode()


@pytest.mark.parametrize(
    "change",
    [
        bad_row,
        lambda meta: meta.update(routed_experts="AAAA"),
        lambda meta: meta.update(id="another"),
        lambda meta: meta.update(output_token_logprobs=[]),
        lambda meta: meta.update(finish_reason={"type": "abort", "message": "out of memory"}),
        lambda meta: meta.update(weight_versions=[{"version": "4", "start": 0, "end": 3}]),
        lambda meta: meta.update(weight_versions=[{"version": "4", "start": 1, "end": 4}]),
        lambda meta: meta.update(num_retractions="many"),
    ],
)
def test_invalid_answers_are_retried(fake: FakeServer, change: Any) -> None:
    damaged(fake, 2, change)
    engine = engine_on(fake, rerolls=2)
    batch = engine.generate(REQUESTS, SAMPLING, return_routes=True)
    assert batch.stats.extra["rerolls"] == 16
    assert batch.stats.extra["invalid_rows"] == 0
    for response in batch.responses:
        assert response.routes is not None
        assert (response.routes.experts[:-1] == fake.routes(6)).all()
    damaged(fake, 3, change)
    if change is bad_row:  # single bad rows fall back to the current router where a retry does not help
        assert engine.generate(REQUESTS, SAMPLING, return_routes=True).stats.extra["invalid_rows"] == 8
    else:
        with pytest.raises((RolloutError, RouteError), match=r"request \d of 8"):
            engine.generate(REQUESTS, SAMPLING, return_routes=True)
    engine.close()


def test_repeated_rows_fall_back_where_a_retry_does_not_help(fake: FakeServer) -> None:
    def stale(meta: dict[str, Any]) -> None:
        rows = np.frombuffer(base64.b64decode(meta["routed_experts"]), "<i4").reshape(-1, SHAPE.num_hidden_layers, SHAPE.topk)
        meta["routed_experts"] = base64.b64encode(np.repeat(rows[:1], len(rows), axis=0).tobytes()).decode()

    prompt = tuple(range(3, 63))
    damaged(fake, 3, stale)
    engine = engine_on(fake, rerolls=2)
    batch = engine.generate([RolloutRequest(prompt, 0)], SAMPLING, return_routes=True)
    engine.close()
    assert batch.stats.extra["rerolls"] == 2
    assert batch.stats.extra["invalid_rows"] >= len(prompt) - 1
    (response,) = batch.responses
    assert response.routes is not None
    assert response.routes.num_missing == batch.stats.extra["invalid_rows"] + 1


def test_another_attempt_has_another_id(fake: FakeServer) -> None:
    fake.overrides["/generate"] = lambda body, call: (503, {}) if call % 2 == 0 else None
    engine = engine_on(fake, retries=3)
    engine.generate(REQUESTS, SAMPLING, return_routes=True)
    rids = [body.get("rid") for body in fake.bodies if "sampling_seed" in body["sampling_params"]]
    assert len(set(rids)) == len(rids)
    engine.close()


def test_a_request_that_hangs_is_aborted_and_sampled_elsewhere(fake: FakeServer) -> None:
    aborted: list[str] = []
    hung: list[str] = []

    def hang(body: dict[str, Any], call: int) -> None:
        if body["sampling_params"].get("sampling_seed") == 5 and not hung:
            hung.append(body["rid"])
            time.sleep(1.5)

    fake.overrides["/generate"] = hang
    fake.overrides["/abort_request"] = lambda body, call: (aborted.append(body["rid"]), (200, b""))[1]
    engine = engine_on(fake, request_timeout_s=0.5)
    batch = engine.generate(REQUESTS, SAMPLING, return_routes=True)
    assert len(batch.responses) == 8
    assert batch.stats.extra["timeouts"] == 1
    assert aborted == hung
    engine.close()


def test_a_response_has_a_deadline_over_all_its_attempts(fake: FakeServer) -> None:
    damaged(fake, 10**6, lambda meta: (time.sleep(0.1), meta.update(id="x")))
    engine = engine_on(fake, rerolls=1000, deadline_s=0.6)
    with pytest.raises(RolloutError, match=r"request \d of 8 .*not finished within 0.6 s; raise deadline_s"):
        engine.generate(REQUESTS, SAMPLING, return_routes=True)
    engine.close()


def test_concurrency_is_of_all_engines_together(fake: FakeServer) -> None:
    with serve(FakeServer()) as second:
        for server in (fake, second):
            server.overrides["/generate"] = lambda body, call: time.sleep(0.02)
        engine = engine_on(fake, second, concurrency=4)
        fake.most_in_flight = second.most_in_flight = 0
        engine.generate([RolloutRequest((3, 4), seed, group=seed) for seed in range(40)], SAMPLING, return_routes=True)
        assert 1 <= fake.most_in_flight <= 3
        assert 1 <= second.most_in_flight <= 3
        engine.close()


def test_another_engine_takes_over_from_a_dead_one(fake: FakeServer) -> None:
    with serve(FakeServer()) as second:
        engine = engine_on(fake, second, retries=0)
        second.overrides["/generate"] = lambda body, call: (500, {})
        second.overrides["/health"] = lambda body, call: (503, b"gone")
        batch = engine.generate([RolloutRequest((3, 4), seed, group=seed) for seed in range(20)], SAMPLING, return_routes=True)
        assert len(batch.responses) == 20
        assert batch.stats.extra["engines_lost"] == 1
        fake.overrides["/generate"] = lambda body, call: (500, {})
        fake.overrides["/health"] = lambda body, call: (503, b"gone")
        with pytest.raises(RolloutError, match="the engine died"):
            engine.generate(REQUESTS, SAMPLING, return_routes=True)
        with pytest.raises(RolloutError, match="no engine is left"):
            engine.generate(REQUESTS, SAMPLING, return_routes=True)
        engine.close()


def let_the_second_half_wait(fake: FakeServer) -> None:
    """Requests with seeds from 4 on are answered when they are aborted, with two tokens."""
    waiting: dict[str, threading.Event] = {}

    def slow(body: dict[str, Any], call: int) -> tuple[int, Any] | None:
        seed = body["sampling_params"].get("sampling_seed")
        if seed is None or seed < 4:
            return None
        event = waiting.setdefault(body["rid"], threading.Event())
        assert event.wait(10)
        answer = fake.generation(body | {"sampling_params": {"max_new_tokens": 2}})
        answer["meta_info"]["finish_reason"] = {"type": "abort"}
        return 200, answer

    fake.overrides["/generate"] = slow
    fake.overrides["/abort_request"] = lambda body, call: (waiting.setdefault(body["rid"], threading.Event()).set(), (200, b""))[1]


def test_an_early_stop_aborts_the_rest(fake: FakeServer) -> None:
    let_the_second_half_wait(fake)
    engine = engine_on(fake)
    seen: list[Progress] = []
    engine.on_progress = seen.append
    batch = engine.generate(REQUESTS, SAMPLING, return_routes=True, enough=2)
    assert batch.finished == [0, 1, 2, 3]
    assert batch.stats.extra["interrupted"] == 4
    assert seen[-1] == Progress(4, 8, 4 * 4 + 4 * 2)
    fake.overrides.pop("/generate")
    fake.bodies.clear()
    rest = engine.generate(REQUESTS[4:6], SAMPLING, return_routes=True)
    assert rest.stats.extra["resumed"] == 2
    # Two tokens were there: the input goes on behind them, and rows are asked for from the last one on.
    assert [(body["input_ids"], body["routed_experts_start_len"]) for body in fake.bodies] == [([3, 4, 5, 7, 8], 4)] * 2
    engine.forget(["6", "7"])
    assert engine.generate(REQUESTS[6:], SAMPLING, return_routes=True).stats.extra["resumed"] == 0
    engine.close()


@pytest.mark.parametrize("rows", ["asked for", "all", "one too many", "one too few"])
def test_a_server_that_sends_all_rows_is_recognised_by_their_number(fake: FakeServer, rows: str) -> None:
    """routed_experts_start_len is a field that a server, or a router before it, may not know."""

    let_the_second_half_wait(fake)
    engine = engine_on(fake, rerolls=0)
    engine.generate(REQUESTS, SAMPLING, return_routes=True, enough=2)

    def rest(body: dict[str, Any], call: int) -> tuple[int, Any] | None:
        first = body["routed_experts_start_len"]
        assert first == 4
        sent = {"asked for": first, "all": 0, "one too many": first - 1, "one too few": first + 1}[rows]
        return 200, fake.generation({**body, "routed_experts_start_len": sent})

    fake.overrides["/generate"] = rest
    if rows.startswith("one"):
        with pytest.raises((RolloutError, RouteError), match=r"routed_experts holds .* rows .*, expected 2 rows"):
            engine.generate(REQUESTS[4:6], SAMPLING, return_routes=True)
    else:
        for response in engine.generate(REQUESTS[4:6], SAMPLING, return_routes=True).responses:
            assert response.routes is not None
            whole = fake.routes(len(response.token_ids) - 1)[:, list(SHAPE.moe_layers)]
            assert np.array_equal(response.routes.experts[:-1], whole)
    engine.close()


def test_answers_wait_for_room(fake: FakeServer) -> None:
    engine = engine_on(fake, answer_bytes=1)
    fleet = engine._fleet
    assert fleet is not None
    batch = engine.generate(REQUESTS, SAMPLING, return_routes=True)
    assert len(batch.responses) == 8
    body = len(str(fake.generation(fake.bodies[-1])))
    assert 0 < fleet._budget.peak < 2 * body  # one answer at a time
    engine.close()


def test_routes_beyond_the_budget_lie_in_a_file(fake: FakeServer, tmp_path: Any) -> None:
    engine = engine_on(fake, route_bytes=200, spill_directory=str(tmp_path))
    batch = engine.generate(REQUESTS, SAMPLING, return_routes=True)
    assert engine.spill.memory_bytes <= 200
    assert batch.stats.extra["spilled_bytes"] > 0
    for response in batch.responses:
        assert response.routes is not None
        assert (response.routes.experts[:-1] == fake.routes(6)).all()
    engine.close()


def test_one_call_at_a_time(fake: FakeServer) -> None:
    fake.overrides["/generate"] = lambda body, call: time.sleep(0.3) if "rid" in body else None
    engine = engine_on(fake)
    thread = threading.Thread(target=lambda: engine.generate(REQUESTS, SAMPLING, return_routes=True))
    thread.start()
    time.sleep(0.1)
    with pytest.raises(RolloutError, match="running already"):
        engine.generate(REQUESTS, SAMPLING, return_routes=True)
    thread.join()
    engine.close()


def test_requests_that_contradict_each_other_are_refused(fake: FakeServer) -> None:
    engine = engine_on(fake)
    with pytest.raises(RolloutError, match="key '1' is given twice"):
        engine.generate([REQUESTS[1], replace(REQUESTS[2], key="1")], SAMPLING, return_routes=True)
    with pytest.raises(RolloutError, match=r"enough=5: .* 4 groups"):
        engine.generate(REQUESTS, SAMPLING, return_routes=True, enough=5)
    engine.close()
