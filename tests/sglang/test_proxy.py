"""The proxy itself: honest where it should be, and each fault is the one that its record names."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.sglang import damage
from tests.sglang.conftest import SHAPE
from tests.sglang.fake_server import FakeServer
from tests.sglang.proxy import ALL_KINDS, STATUS_KINDS, FaultPlan, MisbehavingProxy, misbehaving


@pytest.fixture
def proxy(fake: FakeServer) -> Iterator[MisbehavingProxy]:
    with misbehaving(fake.url, SHAPE, hang_s=30.0) as proxy:
        yield proxy


def ask(url: str, seed: int, *, timeout: float = 20.0, tokens: int = 4) -> httpx.Response:
    request = {
        "rid": f"rid-{seed}",
        "input_ids": [3] * 5,
        "sampling_params": {"max_new_tokens": tokens, "sampling_seed": seed},
        "return_routed_experts": True,
    }
    with httpx.Client(trust_env=False, timeout=timeout, verify=False) as client:
        return client.post(f"{url}/generate", json=request)


def test_what_no_plan_is_for_passes_as_it_is(proxy: MisbehavingProxy, fake: FakeServer) -> None:
    fake.overrides["/echo"] = lambda body, call: (207, body)
    with httpx.Client(trust_env=False, verify=False) as client:
        for path in ("/server_info", "/health", "/nowhere"):
            through, direct = client.get(proxy.url + path), client.get(fake.url + path)
            assert (through.status_code, through.content) == (direct.status_code, direct.content)
        large = {"tensors": "x" * 3_000_000}
        through = client.post(f"{proxy.url}/echo", json=large)
        assert (through.status_code, through.json()) == (207, large)
    assert ask(proxy.url, 1).json() == ask(fake.url, 1).json()
    assert proxy.records == []
    proxy.plan = FaultPlan(ALL_KINDS, share=0.0)
    assert ask(proxy.url, 1).content == ask(fake.url, 1).content
    assert [(r.fault, r.request, r.rid) for r in proxy.records] == [(None, 1, "rid-1")]


ROUTES, FIELDS = list(damage.ROUTE_KINDS)[::4], list(damage.ALL_FIELD_KINDS)[::4]


@pytest.mark.parametrize("kind", [*(f"routes/{kind}" for kind in ROUTES), *(f"field/{kind}" for kind in FIELDS)])
def test_answers_are_damaged_as_recorded(proxy: MisbehavingProxy, fake: FakeServer, kind: str) -> None:
    proxy.plan = FaultPlan([kind])
    answer = ask(proxy.url, 1)
    (record,) = proxy.faults()
    assert record.damaged is not None
    assert answer.content == record.damaged.body
    assert answer.content != ask(fake.url, 1).content


def test_faults_on_the_way(proxy: MisbehavingProxy, fake: FakeServer) -> None:
    proxy.plan = FaultPlan(["cut", "close"])
    for seed in (1, 2):
        with pytest.raises(httpx.TransportError):
            ask(proxy.url, seed)
    proxy.plan = FaultPlan(["hang"])
    with pytest.raises(httpx.ReadTimeout):
        ask(proxy.url, 3, timeout=0.3)
    fake.calls.clear()
    proxy.plan = FaultPlan(STATUS_KINDS)
    assert [ask(proxy.url, 4).status_code for _ in STATUS_KINDS] == [int(kind) for kind in STATUS_KINDS]
    assert "/generate" not in fake.calls
    proxy.plan = FaultPlan(["delay"])
    began = time.monotonic()
    assert ask(proxy.url, 5).content == ask(fake.url, 5).content
    assert time.monotonic() - began >= 0.05


def test_a_duplicate_is_an_earlier_answer_to_somebody_else(proxy: MisbehavingProxy) -> None:
    proxy.plan = FaultPlan(["duplicate"])
    assert ask(proxy.url, 1).json()["meta_info"]["id"] == "rid-1"  # there is nothing to repeat yet
    assert ask(proxy.url, 2).json()["meta_info"]["id"] == "rid-1"
    assert [r.fault for r in proxy.records] == [None, "duplicate"]


def test_plans_repeat_and_keep_to_their_limits() -> None:
    def drawn(**settings: Any) -> list[str | None]:
        plan = FaultPlan(["500", "cut", "delay"], **settings)
        return [plan.next_fault(number, number % 4)[0] for number in range(200)]

    assert drawn(seed=3, share=0.4) == drawn(seed=3, share=0.4)
    assert drawn(seed=3, share=0.4) != drawn(seed=4, share=0.4)
    assert 50 < sum(f is not None for f in drawn(share=0.4)) < 110
    assert [f for f in drawn(limit=7) if f] == ["500", "cut", "delay", "500", "cut", "delay", "500"]
    assert sum(f is not None for f in drawn(per_request=2)) == 8


def test_many_calls_at_once(proxy: MisbehavingProxy) -> None:
    proxy.plan = FaultPlan(["500", "routes/all zeros", "close", "delay"], share=0.5, seed=1)

    def call(seed: int) -> int:
        try:
            return ask(proxy.url, seed).status_code
        except httpx.TransportError:
            return 0

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(call, range(120)))
    faults = [record.fault for record in proxy.faults()]
    assert found.count(500) == faults.count("500") > 0
    assert found.count(0) == faults.count("close") > 0
    assert sorted(record.request for record in proxy.records) == list(range(120))
