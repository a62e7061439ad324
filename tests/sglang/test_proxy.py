"""The proxy itself: honest where it should be, and each fault is the one that its record names."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.sglang import damage
from tests.sglang.conftest import SHAPE
from tests.sglang.fake_server import FakeServer, serve
from tests.sglang.proxy import ALL_KINDS, STATUS_KINDS, FaultPlan, MisbehavingProxy, misbehaving


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with serve(FakeServer()) as fake:
        yield fake


@pytest.fixture
def proxy(fake: FakeServer) -> Iterator[MisbehavingProxy]:
    with misbehaving(fake.url, SHAPE, hang_s=30.0) as proxy:
        yield proxy


def request(seed: int, *, tokens: int = 4, prompt: int = 5) -> dict[str, Any]:
    return {
        "rid": f"rid-{seed}",
        "input_ids": [3] * prompt,
        "sampling_params": {"max_new_tokens": tokens, "sampling_seed": seed},
        "return_routed_experts": True,
    }


def ask(url: str, seed: int, *, timeout: float = 20.0, **lengths: int) -> httpx.Response:
    with httpx.Client(trust_env=False, timeout=timeout, verify=False) as client:
        return client.post(f"{url}/generate", json=request(seed, **lengths))


def test_without_a_plan_everything_passes_as_it_is(proxy: MisbehavingProxy, fake: FakeServer) -> None:
    fake.overrides["/echo"] = lambda body, call: (207, body)
    with httpx.Client(trust_env=False, verify=False) as client:
        for path in ("/server_info", "/model_info", "/health", "/nowhere"):
            through, direct = client.get(proxy.url + path), client.get(fake.url + path)
            assert (through.status_code, through.content) == (direct.status_code, direct.content)
        large = {"tensors": "x" * 3_000_000}
        through = client.post(f"{proxy.url}/echo", json=large)
        assert (through.status_code, through.json()) == (207, large)
        assert ask(proxy.url, 1).json() == ask(fake.url, 1).json()
    assert proxy.records == []
    assert proxy.passed["/echo"] == 1


def test_with_a_plan_other_paths_pass_and_honest_answers_too(proxy: MisbehavingProxy, fake: FakeServer) -> None:
    proxy.plan = FaultPlan(ALL_KINDS, share=0.0)
    assert ask(proxy.url, 1).content == ask(fake.url, 1).content
    with httpx.Client(trust_env=False, verify=False) as client:
        assert client.post(f"{proxy.url}/flush_cache").text == "ok"
    assert [(r.fault, r.request, r.rid) for r in proxy.records] == [(None, 1, "rid-1")]
    assert proxy.faults() == []


@pytest.mark.parametrize("kind", damage.ROUTE_KINDS)
def test_routes_are_damaged_as_recorded(proxy: MisbehavingProxy, fake: FakeServer, kind: str) -> None:
    proxy.plan = FaultPlan([f"routes/{kind}"])
    answer = ask(proxy.url, 1)
    (record,) = proxy.faults()
    assert record.damaged is not None
    assert answer.content == record.damaged.body
    assert answer.content != ask(fake.url, 1).content
    assert record.damaged.refused == (kind in damage.ROUTES_REFUSED)


@pytest.mark.parametrize("kind", damage.ALL_FIELD_KINDS)
def test_other_fields_are_damaged_as_recorded(proxy: MisbehavingProxy, fake: FakeServer, kind: str) -> None:
    proxy.plan = FaultPlan([f"field/{kind}"])
    answer = ask(proxy.url, 1)
    (record,) = proxy.faults()
    assert record.damaged is not None
    assert answer.content == record.damaged.body
    assert answer.content != ask(fake.url, 1).content


@pytest.mark.parametrize("kind", STATUS_KINDS)
def test_refusals_do_not_reach_the_server(proxy: MisbehavingProxy, fake: FakeServer, kind: str) -> None:
    proxy.plan = FaultPlan([kind])
    assert ask(proxy.url, 1).status_code == int(kind)
    assert "/generate" not in fake.calls


def test_an_answer_is_cut_off_under_the_header_of_the_whole(proxy: MisbehavingProxy, fake: FakeServer) -> None:
    proxy.plan = FaultPlan(["cut"])
    whole = len(ask(fake.url, 1).content)
    with socket.create_connection(("127.0.0.1", int(proxy.url.rsplit(":", 1)[1])), timeout=20) as link:
        body = json.dumps(request(1)).encode()
        link.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        received = b""
        try:
            while piece := link.recv(65536):
                received += piece
        except ConnectionError:
            pass
    if received:  # a reset may take what was not read yet with it
        assert f"content-length: {whole}".encode() in received
        assert len(received.partition(b"\r\n\r\n")[2]) < whole
    with pytest.raises(httpx.TransportError):
        ask(proxy.url, 2)


def test_a_connection_is_closed_without_an_answer(proxy: MisbehavingProxy) -> None:
    proxy.plan = FaultPlan(["close"])
    with pytest.raises(httpx.RemoteProtocolError):
        ask(proxy.url, 1)


def test_a_delayed_answer_is_honest(proxy: MisbehavingProxy, fake: FakeServer) -> None:
    proxy.plan = FaultPlan(["delay"])
    began = time.monotonic()
    assert ask(proxy.url, 1).content == ask(fake.url, 1).content
    assert time.monotonic() - began >= 0.05


def test_a_hanging_answer_ends_with_the_client(proxy: MisbehavingProxy) -> None:
    proxy.plan = FaultPlan(["hang"])
    with pytest.raises(httpx.ReadTimeout):
        ask(proxy.url, 1, timeout=0.3)
    proxy.plan = None
    assert ask(proxy.url, 1).status_code == 200


def test_a_duplicate_is_an_earlier_answer_to_somebody_else(proxy: MisbehavingProxy) -> None:
    proxy.plan = FaultPlan(["duplicate"])
    assert ask(proxy.url, 1).json()["meta_info"]["id"] == "rid-1"  # there is nothing to repeat yet
    assert ask(proxy.url, 2).json()["meta_info"]["id"] == "rid-1"
    assert [r.fault for r in proxy.records] == [None, "duplicate"]


def test_routes_are_swapped_with_those_of_another_length(proxy: MisbehavingProxy, fake: FakeServer) -> None:
    proxy.plan = FaultPlan([])
    first = ask(proxy.url, 1, tokens=9).json()["meta_info"]["routed_experts"]
    proxy.plan = FaultPlan(["routes/of another length"])
    assert ask(proxy.url, 2).json()["meta_info"]["routed_experts"] == first
    assert len(base64.b64decode(first)) == (5 + 9 - 1) * SHAPE.num_hidden_layers * SHAPE.topk * 4


def test_a_client_that_hangs_up_is_hung_up_on_at_the_server(proxy: MisbehavingProxy, fake: FakeServer) -> None:
    """As SGLang needs it to abort the request."""
    proxy.plan = FaultPlan([])
    gone = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        proxy._upstream = f"http://127.0.0.1:{listener.getsockname()[1]}"

        def server() -> None:
            link, _ = listener.accept()
            with link:
                link.settimeout(20)
                while link.recv(65536):
                    pass
                gone.set()

        thread = threading.Thread(target=server)
        thread.start()
        with pytest.raises(httpx.ReadTimeout):
            ask(proxy.url, 1, timeout=0.3)
        assert gone.wait(10)
        thread.join()


def test_a_dead_server_is_a_broken_connection(proxy: MisbehavingProxy) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        proxy._upstream = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(httpx.TransportError):
        ask(proxy.url, 1)


def test_plans_repeat_and_keep_to_their_limits() -> None:
    def drawn(**settings: Any) -> list[str | None]:
        plan = FaultPlan(["500", "cut", "delay"], **settings)
        return [plan.next_fault(number, number % 4)[0] for number in range(200)]

    assert drawn(seed=3, share=0.4) == drawn(seed=3, share=0.4)
    assert drawn(seed=3, share=0.4) != drawn(seed=4, share=0.4)
    assert 50 < sum(f is not None for f in drawn(share=0.4)) < 110
    some = [f for f in drawn(limit=7) if f]
    assert some == ["500", "cut", "delay", "500", "cut", "delay", "500"]
    assert sum(f is not None for f in drawn(per_request=2)) == 8
    with pytest.raises(AssertionError, match="no such faults"):
        FaultPlan(["nonsense"])


def test_many_calls_at_once(proxy: MisbehavingProxy, fake: FakeServer) -> None:
    proxy.plan = FaultPlan(["500", "routes/all zeros", "close", "delay"], share=0.5, seed=1)

    def call(seed: int) -> int:
        try:
            return ask(proxy.url, seed).status_code
        except httpx.TransportError:
            return 0

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(call, range(120)))
    faults = [record.fault for record in proxy.faults()]
    assert len(proxy.records) == 120
    assert found.count(500) == faults.count("500") > 0
    assert found.count(0) == faults.count("close") > 0
    assert sorted(record.request for record in proxy.records) == list(range(120))
