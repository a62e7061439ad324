"""The real engine against Transformers in fp32: routes, log-probs, seeds, weight pushes, scoring."""

from __future__ import annotations

import random

import httpx
import numpy as np
import pytest
import torch

from megatron_pr2.errors import RolloutError
from megatron_pr2.rollout.base import RolloutRequest, SamplingParams
from megatron_pr2.rollout.sglang.config import SGLangConfig
from megatron_pr2.rollout.sglang.engine import SGLangEngine
from tests.helpers.rounding import LOGPROB
from tests.sglang.conftest import SHAPE, TinyModel, ensure_alive

pytestmark = pytest.mark.sglang


def make_requests(count: int, seed: int = 0) -> list[RolloutRequest]:
    rng = random.Random(seed)
    return [RolloutRequest(tuple(rng.randrange(3, 260) for _ in range(rng.randrange(2, 24))), 100 + i) for i in range(count)]


def assert_matches(responses, tiny: TinyModel, gates=None, temperature: float = 1.0) -> None:
    """All routes equal, log-probs up to rounding."""
    for response in responses:
        routes, logprobs = tiny.routes_and_logprobs(list(response.token_ids), gates, temperature)
        assert response.routes is not None
        assert response.routes.valid.tolist() == [True] * (len(response.token_ids) - 1) + [False]
        got = np.sort(response.routes.experts[:-1], axis=-1)
        assert (got == routes[:-1].numpy()).all()
        np.testing.assert_allclose(response.logprobs, logprobs[len(response.prompt_ids) - 1 :], atol=LOGPROB)


def test_routes_and_logprobs_equal_transformers(fresh: SGLangEngine, tiny: TinyModel) -> None:
    batch = fresh.generate(make_requests(24), SamplingParams(16), return_routes=True)
    responses, stats = batch.responses, batch.stats
    assert_matches(responses, tiny)
    assert stats.generated_tokens == 24 * 16
    assert stats.extra["invalid_rows"] == 0
    tokens = sum(len(r.token_ids) - 1 for r in responses)
    assert stats.route_bytes >= tokens * 4 * 4 * 4 * 4 / 3
    assert {r.finish_reason for r in responses} == {"length"}
    assert [r.prompt_ids for r in responses] == [r.prompt_ids for r in make_requests(24)]


def test_logprobs_are_those_of_the_sampling_temperature(fresh: SGLangEngine, tiny: TinyModel) -> None:
    responses = fresh.generate(make_requests(4), SamplingParams(8, temperature=0.7), return_routes=True).responses
    assert_matches(responses, tiny, temperature=0.7)


def test_without_routes(fresh: SGLangEngine) -> None:
    batch = fresh.generate(make_requests(2), SamplingParams(4), return_routes=False)
    responses, stats = batch.responses, batch.stats
    assert all(r.routes is None for r in responses)
    assert stats.route_bytes == 0


def test_stop_tokens_end_the_response_and_belong_to_it(fresh: SGLangEngine) -> None:
    stops = tuple(range(100, 200))
    responses = fresh.generate(make_requests(8), SamplingParams(64, stop_token_ids=stops), return_routes=False).responses
    stopped = [r for r in responses if r.finish_reason == "stop"]
    assert stopped
    for response in stopped:
        assert response.response_ids[-1] in stops
        assert not set(response.response_ids[:-1]) & set(stops)


def test_same_seeds_give_the_same_tokens_in_any_batch(fresh: SGLangEngine) -> None:
    requests = make_requests(16) + [RolloutRequest(r.prompt_ids, r.seed + 1000) for r in make_requests(16)]
    together = fresh.generate(requests, SamplingParams(12), return_routes=True).responses
    order = random.Random(1).sample(range(len(requests)), len(requests))
    shuffled = fresh.generate([requests[i] for i in order], SamplingParams(12), return_routes=True).responses
    few = fresh.generate(requests[:3], SamplingParams(12), return_routes=True).responses
    for position, index in enumerate(order):
        assert shuffled[position].response_ids == together[index].response_ids
    assert [r.response_ids for r in few] == [r.response_ids for r in together[:3]]
    assert together[0].response_ids != together[16].response_ids  # another seed, another sample


def test_a_greedy_request_of_somebody_else_leaves_seeded_samples_alone(fresh: SGLangEngine) -> None:
    """SGLang's health check is one; it takes every request of its batch to the sampler with filters."""
    wanted = fresh.generate(make_requests(8), SamplingParams(12), return_routes=False).responses
    replica = fresh.replicas[0]
    sampling = {"temperature": 0.0, "max_new_tokens": 450, "ignore_eos": True}
    greedy = {"input_ids": [3, 4, 5], "sampling_params": sampling, "stream": True}
    key = {"authorization": f"Bearer {replica.api_key}"} if replica.api_key else {}
    with httpx.stream("POST", f"{replica.url}/generate", json=greedy, headers=key, timeout=60, trust_env=False) as answer:
        pieces = answer.iter_lines()
        next(pieces)  # it runs
        found = fresh.generate(make_requests(8), SamplingParams(12), return_routes=False).responses
        assert sum(piece.startswith("data:") for piece in pieces) > 12  # and ran all the while
    assert [r.response_ids for r in found] == [r.response_ids for r in wanted]


def test_seeded_samples_follow_the_distribution(fresh: SGLangEngine, tiny: TinyModel) -> None:
    prompt, draws = (5, 6, 7), 800
    responses = fresh.generate([RolloutRequest(prompt, s) for s in range(draws)], SamplingParams(1), return_routes=False).responses
    counts = np.bincount([r.response_ids[0] for r in responses], minlength=260)
    with torch.no_grad():
        p = tiny.model(torch.tensor([prompt])).logits[0, -1].softmax(-1).double().numpy()
    likely = p * draws > 5
    statistic = ((counts - p * draws) ** 2 / (p * draws))[likely].sum()
    degrees = likely.sum()
    assert degrees > 10
    # Fixed seeds: this is one number. A sampler that ignores p is off by thousands.
    assert statistic < degrees + 5 * np.sqrt(2 * degrees)


def test_empty_push_is_refused_and_blocks_sampling(fresh: SGLangEngine, tiny: TinyModel) -> None:
    with pytest.raises(RolloutError, match="no tensors were given"):
        fresh.update_weights([], 3)
    with pytest.raises(RolloutError, match="call update_weights"):
        fresh.generate(make_requests(1), SamplingParams(1), return_routes=True)
    fresh.update_weights(tiny.gates().items(), 4)
    fresh.generate(make_requests(1), SamplingParams(1), return_routes=True)


def test_failing_exporter_leaves_a_server_that_can_be_pushed_again(fresh: SGLangEngine, tiny: TinyModel) -> None:
    def broken():
        yield from list(tiny.merged_gates(1).items())[:2]
        raise KeyError("exporter broke")

    with pytest.raises(KeyError, match="exporter broke"):
        fresh.update_weights(broken(), 3)
    fresh.update_weights(tiny.gates().items(), 4)
    responses = fresh.generate(make_requests(2), SamplingParams(4), return_routes=True).responses
    assert_matches(responses, tiny)


def test_weights_of_a_wrong_shape_are_refused(fresh: SGLangEngine, tiny: TinyModel) -> None:
    name = next(iter(tiny.gates()))
    with pytest.raises(RolloutError, match="was refused"):
        fresh.update_weights([(name, torch.zeros(3, 64))], 3)
    with pytest.raises(RolloutError, match="failed and may have replaced"):
        fresh.generate(make_requests(1), SamplingParams(1), return_routes=True)
    fresh.update_weights(tiny.gates().items(), 4)


def test_ids_outside_the_vocabulary_never_reach_the_server(fresh: SGLangEngine) -> None:
    with pytest.raises(RolloutError, match=r"request 1.*0\.\.259"):
        fresh.generate([RolloutRequest((3,), 0), RolloutRequest((3, 260), 0)], SamplingParams(1), return_routes=True)
    ensure_alive(fresh)


def test_too_long_prompt_is_refused_by_name(fresh: SGLangEngine) -> None:
    with pytest.raises(RolloutError, match=r"request 0: its prompt has 600 tokens, .* 5\d\d at most"):
        fresh.generate([RolloutRequest((3,) * 600, 0)], SamplingParams(1), return_routes=True)


def test_server_wants_the_key_and_keeps_it_to_itself(engine: SGLangEngine) -> None:
    server = engine.replicas[0].server
    assert server is not None
    assert server.log_path is not None
    assert httpx.get(f"{server.url}/server_info", trust_env=False).status_code == 401
    assert server.api_key not in server.log_path.read_text()
    with open(f"/proc/{server.pid}/cmdline") as cmdline:
        assert server.api_key not in cmdline.read()


def test_attach_to_a_running_server_and_leave_it_running(fresh: SGLangEngine, tiny: TinyModel, tmp_path) -> None:
    assert fresh.replicas[0].server is not None
    key = tmp_path / "key"
    key.write_text(fresh.replicas[0].server.api_key + "\n")
    guest = SGLangEngine(SGLangConfig(urls=(fresh.replicas[0].url,), api_key_file=str(key)), SHAPE)
    guest.start()
    assert guest.weight_version == 1
    merged = tiny.merged_gates(seed=2)
    guest.update_weights(merged.items(), 2)
    responses = guest.generate(make_requests(3), SamplingParams(4), return_routes=True).responses
    assert_matches(responses, tiny, merged)
    guest.close()
    with pytest.raises(RolloutError, match="weights of version 2, expected 1"):
        fresh.generate(make_requests(1), SamplingParams(1), return_routes=True)
    fresh.update_weights(tiny.gates().items(), 3)
    fresh.generate(make_requests(1), SamplingParams(1), return_routes=True)


def test_attach_with_a_wrong_shape_is_refused_at_once(engine: SGLangEngine, tmp_path) -> None:
    from dataclasses import replace

    assert engine.replicas[0].server is not None
    key = tmp_path / "key"
    key.write_text(engine.replicas[0].server.api_key)
    guest = SGLangEngine(SGLangConfig(urls=(engine.replicas[0].url,), api_key_file=str(key)), replace(SHAPE, topk=8))
    with pytest.raises(RolloutError, match=r"probe after the start failed.*top-8"):
        guest.start()
