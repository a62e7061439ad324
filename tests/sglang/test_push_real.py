"""Weight pushes into a real server: several senders, several targets, failures in the middle, requests in flight."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_pr2.errors import RolloutError
from megatron_pr2.rollout.sglang.http import HttpClient
from megatron_pr2.rollout.sglang.push.distributed import WeightSender
from megatron_pr2.rollout.sglang.push.session import PushSession, PushTarget
from tests.helpers.distributed import pool
from tests.sglang.conftest import TinyModel
from tests.sglang.plain_server import PlainServer, other_model

pytestmark = [
    pytest.mark.sglang,
    pytest.mark.usefixtures("preloaded"),
]


@pytest.fixture(scope="module")
def server(plain: PlainServer) -> PlainServer:
    return plain


@pytest.fixture(scope="module")
def other(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return other_model(tiny, tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture
def sender(server: PlainServer) -> Iterator[WeightSender]:
    sender = WeightSender([server.target()])
    yield sender
    sender.close()


def weights_of(model: TinyModel) -> dict[str, torch.Tensor]:
    return load_file(f"{model.path}/model.safetensors")


def push(server: PlainServer, sender: WeightSender, model: TinyModel, label: str) -> int:
    session = PushSession(server.http)
    session.begin()
    sent = sender.push(iter(weights_of(model).items()))
    session.finish(label, flush_cache=True)
    return sent


def test_one_sender_pushes_a_model_and_keeps_its_channel(
    server: PlainServer, tiny: TinyModel, other: TinyModel, sender: WeightSender
) -> None:
    for model, label in ((other, "a"), (tiny, "b"), (other, "c")):
        sent = push(server, sender, model, label)
        assert sent == sum(tensor.nbytes for tensor in weights_of(model).values())
        assert server.version() == label
        server.assert_serves(model, label)
        if label == "a":
            (first,) = sender._channels.values()
            group = first._group
            assert group is not None
        assert first._group is group
    sender.retarget([server.target()])  # another connection: another channel
    assert [channel._group for channel in sender._channels.values()] == [None]
    assert first not in sender._channels.values()
    assert first._group is None


def test_a_sender_outlives_the_client_that_it_was_lent(server: PlainServer, tiny: TinyModel) -> None:
    """A replica that is restarted closes its client before the sender hears of it."""
    client = HttpClient(server.url, api_key=server.api_key)
    sender = WeightSender([server.target()], client=lambda _: client)
    push(server, sender, tiny, "j")
    client.close()
    sender.retarget([])
    assert not sender._channels


def test_one_stream_goes_to_several_targets(server: PlainServer, tiny: TinyModel, other: TinyModel) -> None:
    """Two groups with one server stand for two servers: each gets every bucket, and neither waits for the other."""
    sender = WeightSender([server.target(), server.target(bucket_bytes=48 << 10)])
    try:
        assert push(server, sender, tiny, "d") == sum(tensor.nbytes for tensor in weights_of(tiny).values())
        server.assert_serves(tiny, "d")
    finally:
        sender.close()


def test_senders_that_push_at_the_same_time(server: PlainServer, tiny: TinyModel, other: TinyModel) -> None:
    """The server serialises buckets of different groups; nobody deadlocks, nothing is lost."""
    weights = list(weights_of(other).items())
    senders = [WeightSender([server.target(bucket_bytes=16 << 10)]) for _ in range(4)]
    session = PushSession(server.http)
    session.begin()
    failures: list[BaseException] = []

    def part(index: int) -> None:
        try:
            senders[index].push(iter(weights[index::4]))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=part, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failures
    session.finish("e", flush_cache=True)
    server.assert_serves(other, "e")
    for each in senders:
        each.close()


def test_requests_in_flight_keep_the_cache_and_their_versions(
    server: PlainServer, tiny: TinyModel, sender: WeightSender
) -> None:
    """Paused in place: a flush is refused by name, without one the push goes through and nothing in flight is aborted."""
    push(server, sender, tiny, "old")
    payload = {
        "input_ids": [5, 6, 7],
        "sampling_params": {"max_new_tokens": 400, "temperature": 1.0, "ignore_eos": True},
        "stream": True,
    }
    started, chunks = threading.Event(), []

    def generate() -> None:
        headers = {"Authorization": f"Bearer {server.api_key}"}
        with httpx.stream("POST", f"{server.url}/generate", json=payload, headers=headers, timeout=120.0) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    chunks.append(json.loads(line.removeprefix("data: ")))
                    started.set()

    request = threading.Thread(target=generate)
    request.start()
    assert started.wait(60)
    server.post("/pause_generation", {"mode": "in_place"})
    session = PushSession(server.http)
    session.begin()
    sender.push(tiny.merged_gates(3).items())
    with pytest.raises(RolloutError, match="the cache still holds what the old weights computed"):
        session.finish("new", flush_cache=True)
    assert server.version() == "old"
    session.begin()
    sender.push(tiny.merged_gates(3).items())
    session.finish("new", flush_cache=False)
    server.post("/continue_generation")
    request.join(120)
    done = chunks[-1]["meta_info"]
    assert done["finish_reason"]["type"] == "length"
    assert done["completion_tokens"] == 400
    assert [span["version"] for span in done["weight_versions"]] == ["old", "new"]
    push(server, sender, tiny, "again")
    server.assert_serves(tiny, "again")


def test_a_refused_bucket_leaves_everything_usable(server: PlainServer, tiny: TinyModel, sender: WeightSender) -> None:
    """Outside a session the server does not even take part: that must not cost a timeout, however large the bucket."""
    sender.retarget([server.target(bucket_bytes=128 << 20, timeout_s=600.0)])
    with pytest.raises(RolloutError, match=r"http://127.0.0.1:\d+: the bucket from big on was not taken: .*must run between"):
        sender.push([("big", torch.zeros(64 << 20, dtype=torch.uint8))])
    push(server, sender, tiny, "f")
    server.assert_serves(tiny, "f")


def test_a_session_left_open_is_closed_by_the_next_push(server: PlainServer, tiny: TinyModel, sender: WeightSender) -> None:
    PushSession(server.http).begin()
    push(server, sender, tiny, "g")
    server.assert_serves(tiny, "g")


# ---- expert-parallel ranks -------------------------------------------------------------------------------------------


class OneServer:
    """The engine of rank 0: one running server."""

    name = "one server"
    returns_routes = True

    def __init__(self, target: PushTarget) -> None:
        self.http = HttpClient(target.url, api_key=target.api_key)
        self.target, self.session, self.sender = target, PushSession(self.http), WeightSender([target])
        self.abandoned = 0

    def begin_push(self, version: int, horizons: Any = (), *, gates_only: bool = False) -> list[PushTarget]:
        self.session.begin()
        return [self.target]

    def push_part(self, weights: Any, targets: Any = None) -> int:
        return self.sender.push(weights)

    def finish_push(self, version: int) -> None:
        self.session.finish(str(version), flush_cache=True)

    def abandon_push(self) -> None:
        self.abandoned += 1
        self.session.abandon()

    def close(self) -> None:
        self.sender.close()
        self.http.close()


def breaking(weights: Iterator[tuple[str, torch.Tensor]], rank: int, count: int) -> Iterator[tuple[str, torch.Tensor]]:
    """A rank whose weights become nonsense after a while."""
    for index, (name, tensor) in enumerate(weights):
        wrong = dist.get_rank() == rank and index >= count
        yield name, tensor.new_zeros((*tensor.shape[:-1], 3)) if wrong else tensor


def expert_parallel_job(path: str, target: PushTarget, failing_rank: int | None) -> dict[str, Any]:
    from megatron_pr2 import host
    from megatron_pr2.attach import attach
    from megatron_pr2.hf.bridge import load_model
    from megatron_pr2.hf.owned_export import owned_engine_weights
    from megatron_pr2.rollout.collective import CollectiveEngine
    from tests.helpers import toy

    host.init(expert=2)
    bridge, chunks = load_model(path, dtype=torch.float32, wrap_with_ddp=False)
    pr2 = attach(chunks, toy.preset("pr2"))
    pr2.predictor.weight_LEH.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(0))
    rank = dist.get_rank()
    own = OneServer(target) if rank == 0 else None
    engine = CollectiveEngine(own, data_parallel_rank=rank, data_parallel_size=2, name="one server")  # type: ignore[arg-type]
    assert engine.takes_owned_weights
    raised = ""
    if failing_rank is not None:
        try:
            engine.update_owned_weights(breaking(owned_engine_weights(pr2, bridge, chunks), failing_rank, 20), 40)
        except RolloutError as error:
            raised = str(error)
    names: list[str] = []

    def noted() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in owned_engine_weights(pr2, bridge, chunks):
            names.append(name)
            yield name, tensor

    engine.update_owned_weights(noted(), 41)
    engine.close()
    return {
        "raised": raised,
        "names": names,
        "abandoned": own.abandoned if own is not None else 0,
        "w": pr2.predictor.weight_LEH.clone(),
    }


@pytest.mark.parametrize("failing_rank", [None, 0, 1])
def test_expert_parallel_ranks_push_what_they_own(
    server: PlainServer, other: TinyModel, failing_rank: int | None
) -> None:
    results = pool(2).run(expert_parallel_job, other.path, server.target(), failing_rank, timeout=300)
    if failing_rank is not None:
        assert len({result["raised"] for result in results}) == 1
        assert results[0]["raised"].startswith(f"rank {failing_rank}: weight update: {server.url}: the bucket from ")
        assert "was refused" in results[0]["raised"]
        assert results[0]["abandoned"] == 1
    names = [name for result in results for name in result["names"]]
    assert sorted(names) == sorted(weights_of(other))
    assert not any(".experts.1." in name for name in results[1]["names"])
    gates = {name: gate + results[0]["w"][layer] for layer, (name, gate) in enumerate(other.gates().items())}
    server.assert_serves(other, "41", gates)


# ---- memory ----------------------------------------------------------------------------------------------------------


def memory_job(target: PushTarget, tensors: int) -> tuple[int, int]:
    """(bytes sent, most bytes of tensors that were held at once on the way), for tensors of 4 MiB"""
    from tests.drift.test_memory import Meter

    sender = WeightSender([target])
    with Meter(arrays=False) as meter:
        sent = sender.push((f"nobody.knows.me.{index}", torch.ones(1 << 20)) for index in range(tensors))
    sender.close()
    return sent, meter.torch_peak


def test_a_sender_holds_a_bucket_not_a_model(server: PlainServer, tiny: TinyModel, sender: WeightSender) -> None:
    session = PushSession(server.http)
    session.begin()
    ((sent, peak),) = pool(1).run(memory_job, server.target(bucket_bytes=16 << 20), 48, timeout=120)
    session.finish("h", flush_cache=True)
    assert sent == 192 << 20
    assert peak <= (2 * 16 + 4) << 20  # a bucket, what it is packed from, and the tensor that opened the next one
    push(server, sender, tiny, "i")
    server.assert_serves(tiny, "i")
