"""The engine behind a proxy that misbehaves: every wrong answer is rejected, and the batch is what it would have been without."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator, Sequence
from http.server import ThreadingHTTPServer
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import psutil
import pytest

from megatron_pr2.errors import RolloutError, RouteError
from megatron_pr2.rollout.base import RolloutBatch, RolloutRequest, RolloutResponse, SamplingParams
from megatron_pr2.rollout.sglang.config import SGLangConfig
from megatron_pr2.rollout.sglang.engine import SGLangEngine
from tests.helpers.rounding import LOGPROB
from tests.sglang import damage
from tests.sglang.conftest import SHAPE
from tests.sglang.fake_server import FakeServer, serve
from tests.sglang.proxy import STATUS_KINDS, FaultPlan, MisbehavingProxy, misbehaving

SAMPLING = SamplingParams(max_new_tokens=6)
# Told by their content: each must cost an attempt, and none may be replayed.
BAD_ROUTES = [f"routes/{kind}" for kind in (*damage.ROUTES_REFUSED, *damage.ROUTES_WITH_BAD_ROWS)]
BAD_FIELDS = [f"field/{kind}" for kind in (*damage.FIELD_KINDS, *damage.ID_KINDS, *damage.STRICT_KINDS, *damage.ABORT_KINDS)]
BROKEN_LINKS = ["cut", "close", *STATUS_KINDS]


def attach(url: str, **changes: Any) -> SGLangEngine:
    settings: dict[str, Any] = {
        "urls": (url,), "retries": 8, "retry_backoff_s": 0.005, "request_timeout_s": 30.0, "rerolls": 12, "concurrency": 32,
    }  # fmt: skip
    return SGLangEngine(SGLangConfig(**(settings | changes)), SHAPE)


def requests(count: int, seed: int = 0) -> list[RolloutRequest]:
    rng = Random(seed)
    prompts = [tuple(rng.choices(range(3, 250), k=rng.randint(2, 24))) for _ in range(count)]
    return [RolloutRequest(prompt, seed * 10_000 + i) for i, prompt in enumerate(prompts)]


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[MisbehavingProxy]:
    """In front of the fake server, which must not refuse connections by itself when many come at once."""
    monkeypatch.setattr(ThreadingHTTPServer, "request_queue_size", 128)
    with serve(FakeServer()) as fake, misbehaving(fake.url, SHAPE, hang_s=30.0) as proxy:
        yield proxy


@pytest.fixture
def client(proxy: MisbehavingProxy) -> Iterator[SGLangEngine]:
    """Behind the proxy; the tests of the real server below have their own."""
    engine = attach(proxy.url)
    engine.start()
    yield engine
    engine.close()


def assert_honest(batch: RolloutBatch, asked: list[RolloutRequest]) -> None:
    """Every response is there, in order, with the fake's tokens and routes."""
    assert [r.prompt_ids for r in batch.responses] == [r.prompt_ids for r in asked]
    for response in batch.responses:
        assert response.response_ids == tuple(range(7, 7 + SAMPLING.max_new_tokens))
        assert response.routes is not None
        assert response.routes.num_missing == 1
        rows = FakeServer().routes(len(response.prompt_ids) + SAMPLING.max_new_tokens - 1)
        assert np.array_equal(response.routes.experts[:-1], rows)


class TestFake:
    """Against a server whose honest answers are known."""

    @pytest.mark.slow
    def test_the_batch_completes_although_hundreds_of_route_payloads_were_corrupted(
        self, proxy: MisbehavingProxy, client: SGLangEngine
    ) -> None:
        proxy.plan = FaultPlan(BAD_ROUTES, seed=1, share=0.5, per_request=8)
        asked = requests(300)
        batch = client.generate(asked, SAMPLING, return_routes=True)
        assert_honest(batch, asked)
        faults = proxy.faults()
        assert len(faults) >= 200
        assert {record.fault for record in faults} == set(BAD_ROUTES)
        assert len(proxy.records) == len(asked) + len(faults)  # each corrupted answer cost one attempt
        assert batch.stats.extra["rerolls"] == len(faults)
        assert batch.stats.extra["invalid_rows"] == 0

    def test_rows_that_stay_bad_are_left_to_the_router_and_counted(self, proxy: MisbehavingProxy) -> None:
        """Without attempts to spare: exactly the damaged rows are invalid."""
        engine = attach(proxy.url, rerolls=0)
        engine.start()
        proxy.plan = FaultPlan([f"routes/{kind}" for kind in damage.ROUTES_WITH_BAD_ROWS], seed=2)
        asked = requests(60)
        batch = engine.generate(asked, SAMPLING, return_routes=True)
        engine.close()
        invalid = {record.request: record.damaged.invalid for record in proxy.faults() if record.damaged is not None}
        assert len(invalid) == 60
        for request, response in zip(asked, batch.responses, strict=True):
            assert response.routes is not None
            assert set(np.nonzero(~response.routes.valid[:-1])[0].tolist()) == invalid[request.seed]
        assert batch.stats.extra["invalid_rows"] == sum(map(len, invalid.values()))

    def test_routes_that_stay_unreadable_are_an_error(self, proxy: MisbehavingProxy) -> None:
        engine = attach(proxy.url, rerolls=2)
        engine.start()
        proxy.plan = FaultPlan(["routes/rows lost"])
        with pytest.raises(RouteError, match=r"expected .* rows"):
            engine.generate(requests(1), SAMPLING, return_routes=True)
        engine.close()
        assert len(proxy.records) == 3

    @pytest.mark.slow
    def test_wrong_fields_are_sampled_anew(self, proxy: MisbehavingProxy, client: SGLangEngine) -> None:
        proxy.plan = FaultPlan(BAD_FIELDS, seed=3, share=0.5, per_request=8)
        asked = requests(200, seed=1)
        batch = client.generate(asked, SAMPLING, return_routes=True)
        assert_honest(batch, asked)
        assert {record.fault for record in proxy.faults()} == set(BAD_FIELDS)
        assert batch.stats.extra["rerolls"] == len(proxy.faults())

    def test_answers_to_somebody_else_are_not_taken(self, proxy: MisbehavingProxy, client: SGLangEngine) -> None:
        """Equal prompts, so that nothing but the id of the attempt differs."""
        proxy.plan = FaultPlan(["duplicate"], seed=4, share=0.5, per_request=8)
        asked = [RolloutRequest((3, 4, 5), i) for i in range(80)]
        batch = client.generate(asked, SAMPLING, return_routes=True)
        assert_honest(batch, asked)
        assert len(proxy.faults()) > 20
        assert batch.stats.extra["rerolls"] == len(proxy.faults())

    @pytest.mark.slow
    def test_broken_connections_and_passing_refusals_are_tried_again(self, proxy: MisbehavingProxy, client: SGLangEngine) -> None:
        proxy.plan = FaultPlan(BROKEN_LINKS, seed=5, share=0.4, per_request=8)
        asked = requests(150, seed=2)
        batch = client.generate(asked, SAMPLING, return_routes=True)
        assert_honest(batch, asked)
        found = Counter(record.fault for record in proxy.faults())
        assert set(found) == set(BROKEN_LINKS)
        assert batch.stats.extra["retries"] == sum(found.values())

    def test_late_answers_are_waited_for(self, proxy: MisbehavingProxy, client: SGLangEngine) -> None:
        proxy.plan = FaultPlan(["delay"], seed=6, share=0.5, per_request=8)
        asked = requests(60, seed=3)
        batch = client.generate(asked, SAMPLING, return_routes=True)
        assert_honest(batch, asked)
        assert batch.stats.extra["rerolls"] == batch.stats.extra["retries"] == 0

    def test_answers_that_never_come_are_given_up(self, proxy: MisbehavingProxy) -> None:
        engine = attach(proxy.url, request_timeout_s=1.5)
        engine.start()
        proxy.plan = FaultPlan(["hang"], limit=3)
        asked = requests(20, seed=4)
        batch = engine.generate(asked, SAMPLING, return_routes=True)
        engine.close()
        assert_honest(batch, asked)
        assert batch.stats.extra["timeouts"] == 3

    @pytest.mark.parametrize("kind", damage.VERSION_KINDS)
    def test_foreign_weights_end_the_call(self, proxy: MisbehavingProxy, client: SGLangEngine, kind: str) -> None:
        proxy.plan = FaultPlan([f"field/{kind}"], limit=1)
        with pytest.raises(RolloutError, match="sampled from weights of version"):
            client.generate(requests(3), SAMPLING, return_routes=True)

    @pytest.mark.slow
    def test_everything_at_once(self, proxy: MisbehavingProxy, client: SGLangEngine) -> None:
        kinds = [*BAD_ROUTES, *BAD_FIELDS, *BROKEN_LINKS, "delay", "duplicate"]
        Random(7).shuffle(kinds)
        proxy.plan = FaultPlan(kinds, seed=7, share=0.4, per_request=8)
        asked = requests(400, seed=5)
        batch = client.generate(asked, SAMPLING, return_routes=True)
        assert_honest(batch, asked)
        wrong = [record for record in proxy.faults() if record.fault != "delay"]
        assert len(wrong) > 200
        assert batch.stats.extra["rerolls"] + batch.stats.extra["retries"] == len(wrong)

    def test_answers_in_flight_keep_to_their_budget(self, proxy: MisbehavingProxy) -> None:
        engine = attach(proxy.url, answer_bytes=20_000)
        engine.start()
        proxy.plan = FaultPlan(["delay", "cut", "routes/ids out of range"], seed=8, share=0.5, per_request=8)
        asked = requests(100, seed=6)
        batch = engine.generate(asked, SAMPLING, return_routes=True)
        assert_honest(batch, asked)
        assert engine._fleet is not None
        budget = engine._fleet._budget
        assert 5_000 < budget.peak <= 20_000
        assert budget.in_use == 0
        engine.close()


@pytest.mark.sglang
class TestReal:
    """Against the real server on CPU, with the key that it asks for."""

    @pytest.fixture
    def key(self, fresh: SGLangEngine, tmp_path: Path) -> dict[str, str]:
        file = tmp_path / "key"
        file.touch(0o600)
        file.write_text(fresh.replicas[0].api_key or "")
        return {"api_key_file": str(file)}

    def test_corrupted_answers_change_nothing_of_what_comes_back(self, fresh: SGLangEngine, key: dict[str, str]) -> None:
        asked = requests(150, seed=7)
        wanted = fresh.generate(asked, SAMPLING, return_routes=True).responses
        with misbehaving(fresh.replicas[0].url, SHAPE) as proxy:
            engine = attach(proxy.url, **key)
            engine.start()
            kinds = [*BAD_ROUTES, *BAD_ROUTES, *BAD_FIELDS, *BROKEN_LINKS, "delay", "duplicate"]
            Random(8).shuffle(kinds)
            proxy.plan = FaultPlan(kinds, seed=8, share=0.8, limit=450, per_request=6)
            batch = engine.generate(asked, SAMPLING, return_routes=True)
            engine.close()
        faults = [record.fault or "" for record in proxy.faults()]
        assert sum(fault.startswith("routes/") for fault in faults) >= 200
        assert [r.prompt_ids for r in batch.responses] == [r.prompt_ids for r in asked]
        assert_same(batch.responses, wanted)
        assert batch.stats.extra["rerolls"] + batch.stats.extra["retries"] == len(faults) - faults.count("delay")

    @pytest.mark.exhaustive
    def test_two_thousand_requests_come_back_and_memory_stays(self, fresh: SGLangEngine, key: dict[str, str]) -> None:
        asked = [RolloutRequest(tuple(Random(i).choices(range(3, 250), k=8)), i) for i in range(2000)]
        engine = attach(fresh.replicas[0].url, concurrency=64, request_timeout_s=300.0, **key)
        engine.start()
        process = psutil.Process()
        engine.generate(asked[:500], SAMPLING, return_routes=True)
        gc.collect()
        before = process.memory_info().rss
        batch = engine.generate(asked, SAMPLING, return_routes=True)
        during = process.memory_info().rss
        assert [r.prompt_ids for r in batch.responses] == [r.prompt_ids for r in asked]
        assert all(len(r.response_ids) == SAMPLING.max_new_tokens for r in batch.responses)
        assert all(r.routes is not None and r.routes.num_missing == 1 for r in batch.responses)
        assert sum(batch.stats.extra[name] for name in ("rerolls", "retries", "timeouts", "invalid_rows")) == 0
        del batch
        engine.generate(asked, SAMPLING, return_routes=True)
        gc.collect()
        after = process.memory_info().rss
        engine.close()
        assert during - before < 48 << 20
        assert after - during < 16 << 20


def assert_same(found: Sequence[RolloutResponse], wanted: Sequence[RolloutResponse]) -> None:
    """Tokens, log-probs and routes; of thousands of rows two may differ, where two experts were as good in another batch."""
    rows = 0
    for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert one.routes is not None
        assert other.routes is not None
        assert one.response_ids == other.response_ids, f"response {number}"
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=LOGPROB, err_msg=f"response {number}")
        np.testing.assert_array_equal(one.routes.valid, other.routes.valid, err_msg=f"response {number}")
        differ = np.sort(one.routes.experts, axis=-1) != np.sort(other.routes.experts, axis=-1)
        rows += int(differ.any(axis=-1).sum())
    assert rows <= 2
