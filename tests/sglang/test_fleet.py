"""Several real engines behind one client: equal answers wherever they come from, a death in the middle, SGLang's router."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_pr2.errors import RolloutError
from megatron_pr2.rollout.base import SamplingParams
from megatron_pr2.rollout.sglang.config import SGLangConfig
from megatron_pr2.rollout.sglang.engine import SGLangEngine
from tests.sglang.conftest import SHAPE, TinyModel, ensure_alive, own_server
from tests.sglang.test_engine import assert_matches, make_requests

pytestmark = [
    pytest.mark.sglang,
    pytest.mark.slow,
    pytest.mark.usefixtures("preloaded"),
]


@pytest.fixture(scope="module")
def pair(tiny: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLangEngine]:
    """Two own servers."""
    directory = tmp_path_factory.mktemp("pair")
    config = own_server(tiny.path, directory / "log", engines=2, max_total_tokens=8192, weight_bucket_bytes=1 << 20)
    engine = SGLangEngine(config, SHAPE)
    engine.start()
    yield engine
    engine.close()


def served(engine: SGLangEngine) -> list[int]:
    """Attempts in flight per engine, the most that were seen while a batch was sampled."""
    return [replica.load for replica in engine.replicas]


def test_two_engines_share_a_batch_and_hold_the_same_weights(pair: SGLangEngine, tiny: TinyModel) -> None:
    merged = tiny.merged_gates(seed=31)
    pair.update_weights(merged.items(), 1)
    most = [0, 0]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            most[:] = map(max, most, served(pair))

    watcher = threading.Thread(target=watch)
    watcher.start()
    batch = pair.generate(make_requests(48, seed=1), SamplingParams(24), return_routes=True)
    done.set()
    watcher.join()
    assert min(most) > 0
    assert_matches(batch.responses, tiny, merged)
    probes = pair.score([3, 4, 5, 6])
    assert len({probe.name for probe in probes}) == 2


def test_responses_of_one_prompt_go_to_one_engine(pair: SGLangEngine, tiny: TinyModel) -> None:
    pair.update_weights(tiny.gates().items(), 2)
    prompts = [tuple(range(40 + i, 120 + i)) for i in range(6)]
    requests = [replace(r, prompt_ids=prompts[i % 6], group=i % 6) for i, r in enumerate(make_requests(24, seed=2))]
    batch = pair.generate(requests[:6], SamplingParams(2), return_routes=True)
    again = pair.generate(requests, SamplingParams(2), return_routes=True)
    assert batch.stats.extra["cached_tokens"] == 0
    assert again.stats.extra["cached_tokens"] > 0.5 * 24 * 79
    assert_matches(again.responses, tiny)


def test_an_engine_that_dies_in_the_middle_costs_no_response(pair: SGLangEngine, tiny: TinyModel) -> None:
    merged = tiny.merged_gates(seed=32)
    pair.update_weights(merged.items(), 3)
    requests, sampling = make_requests(64, seed=9), SamplingParams(128)
    before = pair.generate(requests, sampling, return_routes=True)
    server = pair.replicas[1].server
    assert server is not None
    assert server.pid is not None
    killer = threading.Timer(0.7, os.killpg, (server.pid, signal.SIGKILL))
    killer.start()
    batch = pair.generate(requests, sampling, return_routes=True)
    killer.join()
    assert batch.stats.extra["engines_lost"] == 1
    assert [r.response_ids for r in batch.responses] == [r.response_ids for r in before.responses]
    assert_matches(batch.responses, tiny, merged)
    with pytest.raises(RolloutError, match="killed by signal 9"):
        ensure_alive(pair)
    # The next push restarts it first.
    pair.update_weights(tiny.gates().items(), 4)
    ensure_alive(pair)
    after = pair.generate(make_requests(32, seed=3), SamplingParams(8), return_routes=True)
    assert after.stats.extra["engines_lost"] == 0
    assert_matches(after.responses, tiny)
    assert {replica.label for replica in pair.replicas} == {"4"}


def test_an_engine_that_dies_between_two_rollouts_is_back_at_the_next_push(pair: SGLangEngine, tiny: TinyModel) -> None:
    server = pair.replicas[0].server
    assert server is not None
    assert server.pid is not None
    os.killpg(server.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while server.alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    pair.update_weights(tiny.gates().items(), 5)
    batch = pair.generate(make_requests(16, seed=4), SamplingParams(8), return_routes=True)
    assert_matches(batch.responses, tiny)


def gates_for(tiny: TinyModel, horizon: float) -> dict[str, torch.Tensor]:
    """W + a W_p; a is 0 for horizon 0."""
    merged = tiny.merged_gates(seed=34)
    return {name: w + horizon / 2 * (merged[name] - w) for name, w in tiny.gates().items()}


@pytest.mark.parametrize("turns", [False, True])
def test_horizon_groups(pair: SGLangEngine, tiny: TinyModel, turns: bool) -> None:
    """One version, gates by horizon: the first group is r3 bit by bit, the other takes TopK((W + a W_p) h)."""
    requests = make_requests(32, seed=6)
    pair.update_weights(tiny.gates().items(), 8)
    r3 = pair.generate(requests, SamplingParams(16), return_routes=True).responses
    dealt = [replace(request, horizon=float(place % 2)) for place, request in enumerate(requests)]
    gates = {horizon: gates_for(tiny, horizon) for horizon in (0.0, 1.0)}
    rest = {name: weight for name, weight in tiny.model.state_dict().items() if name.endswith("norm.weight")}
    if turns:
        responses = []
        pair.update_weights(rest.items(), 9, {0.0: gates[0.0].items()})
        for horizon in (0.0, 1.0):
            if horizon:
                pair.update_gates(gates[horizon].items(), 9, horizon)
            responses.append(pair.generate(dealt[int(horizon) :: 2], SamplingParams(16), return_routes=True).responses)
        first, second = responses
    else:
        pair.update_weights(rest.items(), 9, {horizon: own.items() for horizon, own in gates.items()})
        assert [probe.horizon for probe in pair.score([3, 4, 5, 6])] == [0.0, 1.0]
        batch = pair.generate(dealt, SamplingParams(16), return_routes=True)
        assert batch.stats.extra["other_horizon"] == 0
        first, second = batch.responses[::2], batch.responses[1::2]
    assert {version for response in (*first, *second) for version in response.weight_versions.tolist()} == {9}
    assert [response.horizon for response in (*first, *second)] == [0.0] * 16 + [1.0] * 16
    for got, want in zip(first, r3[::2], strict=True):
        assert got.response_ids == want.response_ids
        assert np.array_equal(got.routes.experts, want.routes.experts)
        np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-5)
    assert_matches(first, tiny)
    assert_matches(second, tiny, gates[1.0])
    assert [r.response_ids for r in second] != [r.response_ids for r in r3[1::2]]


def test_a_group_whose_server_is_killed_is_served_by_the_other(pair: SGLangEngine, tiny: TinyModel) -> None:
    gates = {horizon: gates_for(tiny, horizon) for horizon in (0.0, 1.0)}
    pair.update_weights((), 10, {horizon: own.items() for horizon, own in gates.items()})
    dealt = [replace(request, horizon=float(place % 2)) for place, request in enumerate(make_requests(48, seed=7))]
    server = pair.replicas[1].server
    assert server is not None
    assert server.pid is not None
    killer = threading.Timer(0.7, os.killpg, (server.pid, signal.SIGKILL))
    killer.start()
    batch = pair.generate(dealt, SamplingParams(128), return_routes=True)
    killer.join()
    assert batch.stats.extra["engines_lost"] == 1
    others = [response for response, request in zip(batch.responses, dealt, strict=True) if response.horizon != request.horizon]
    assert len(others) == batch.stats.extra["other_horizon"] > 0
    # Whatever it was dealt, each is wholly of the gates that it names.
    for horizon, own in gates.items():
        assert_matches([response for response in batch.responses if response.horizon == horizon], tiny, own)
    pair.update_weights(tiny.model.state_dict().items(), 11, {horizon: own.items() for horizon, own in gates.items()})
    after = pair.generate(dealt, SamplingParams(8), return_routes=True)
    assert after.stats.extra["other_horizon"] == 0
    assert_matches(after.responses[1::2], tiny, gates[1.0])


@pytest.fixture
def routed(pair: SGLangEngine, tmp_path: Any) -> Iterator[SGLangEngine]:
    key = tmp_path / "key"
    key.write_text(pair.replicas[0].api_key or "")
    urls = tuple(replica.url for replica in pair.replicas)
    config = SGLangConfig(
        urls=urls, api_key_file=str(key), router="own", log_path=str(tmp_path / "log"), retry_backoff_s=0.1, request_timeout_s=120.0
    )
    engine = SGLangEngine(config, SHAPE)
    engine.start()
    yield engine
    engine.close()


def test_sglangs_router_in_front(routed: SGLangEngine, pair: SGLangEngine, tiny: TinyModel) -> None:
    merged = tiny.merged_gates(seed=33)
    routed.update_weights(merged.items(), 6)
    requests = make_requests(32, seed=5)
    batch = routed.generate(requests, SamplingParams(16), return_routes=True)
    assert_matches(batch.responses, tiny, merged)
    for replica in pair.replicas:
        replica.labels.append("6")
    direct = pair.generate(requests, SamplingParams(16), return_routes=True)
    assert [r.response_ids for r in batch.responses] == [r.response_ids for r in direct.responses]
    stopped = routed.generate(
        [r.__class__(r.prompt_ids, r.seed, key=str(i), group=i) for i, r in enumerate(requests)],
        SamplingParams(100, stop_token_ids=(5, 6, 7)),
        return_routes=True,
        enough=4,
    )
    assert len(stopped.finished) == 4
