"""A response put together from any number of attempts, turns and versions is the one that a single attempt would have brought."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_pr2.errors import RolloutError, RouteError
from megatron_pr2.hf.shape import ModelShape
from megatron_pr2.rollout.base import RolloutRequest, SamplingParams
from megatron_pr2.rollout.sglang.episode import Episode
from megatron_pr2.rollout.sglang.plugin import decode_rid
from megatron_pr2.rollout.sglang.wire import Sampled
from megatron_pr2.routes.table import RouteTable
from tests.helpers.ids import random_ids

SHAPE = ModelShape(num_hidden_layers=3, moe_layers=(1, 2), num_experts=8, topk=2, vocab_size=100)
PROMPT = (3, 4, 5, 6)


def part(whole: np.ndarray, start: int, stop: int) -> RouteTable:
    """What an attempt returns of the rows of tokens start .. stop - 1: the last one's is missing."""
    table = RouteTable.from_ids(whole[start:stop], SHAPE.num_experts)
    table.experts[-1:] = 0
    table.valid[-1:] = False
    return table


@given(st.data(), st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(0, 1000))
def test_any_cut_into_attempts_and_turns_gives_the_same_response(data: Any, lengths: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    sampling = SamplingParams(max_new_tokens=sum(lengths), max_turns=100)
    episode = Episode(RolloutRequest(PROMPT, seed), sampling, SHAPE, return_routes=True)
    tokens, logprobs, versions, mask = list(PROMPT), [], [], []
    ids = random_ids(len(PROMPT) + 8 * len(lengths) + sum(lengths) + 1, 2, 2, 8, seed)
    for index, length in enumerate(lengths):
        ask = episode.ask("pr2.1")
        assert ask.input_ids == tokens
        assert ask.first_row == decode_rid(ask.rid) == episode.known_rows
        assert ask.max_new_tokens == sampling.max_new_tokens - sum(lengths[:index])
        new = rng.integers(0, 100, length).tolist()
        finish = "stop" if index < len(lengths) - 1 and data.draw(st.booleans()) else "abort"
        first = ask.first_row
        assert first is not None
        sampled = Sampled(
            token_ids=new,
            logprobs=rng.normal(size=length).astype(np.float32),
            versions=np.full(length, index, dtype=np.int64),
            routes=part(ids, first, len(tokens) + length),
            finish=finish,
        )
        tokens += new
        logprobs.append(sampled.logprobs)
        versions.append(sampled.versions)
        mask += [True] * length
        episode.extend(sampled, "here")
        if finish == "stop":
            reply = rng.integers(0, 100, data.draw(st.integers(1, 8))).tolist()
            episode.take_turn(reply, "here")
            tokens += reply
            logprobs.append(np.zeros(len(reply), dtype=np.float32))
            versions.append(np.full(len(reply), -1))
            mask += [False] * len(reply)
    response = episode.response("here")
    assert response.finish_reason == "length"
    assert list(response.token_ids) == tokens
    assert response.routes is not None
    want = RouteTable.from_ids(ids[: len(tokens)], 8)
    assert (response.routes.experts[:-1] == want.experts[:-1]).all()
    assert response.routes.valid.tolist() == [True] * (len(tokens) - 1) + [False]
    assert (response.logprobs == np.concatenate(logprobs)).all()
    assert (response.weight_versions == np.concatenate(versions)).all()
    assert response.loss_mask.tolist() == mask


def sampled(count: int, finish: str, rows: RouteTable | None = None) -> Sampled:
    return Sampled([7] * count, np.zeros(count, np.float32), np.zeros(count, np.int64), rows, finish)


def test_an_abort_before_the_first_token_changes_nothing() -> None:
    episode = Episode(RolloutRequest(PROMPT, 0), SamplingParams(8), SHAPE, return_routes=True)
    episode.extend(sampled(0, "abort"), "here")
    assert episode.ask("k").input_ids == list(PROMPT)
    assert episode.finish_reason is None
    with pytest.raises(RolloutError, match="not finished"):
        episode.response("here")


def test_a_reply_that_does_not_fit_ends_the_response() -> None:
    for sampling in (SamplingParams(2), SamplingParams(9, max_turns=1), SamplingParams(9, max_length=len(PROMPT) + 5)):
        episode = Episode(RolloutRequest(PROMPT, 0), sampling, SHAPE, return_routes=False)
        episode.extend(sampled(2, "stop"), "here")
        episode.take_turn((1, 2, 3), "here")
        assert episode.finish_reason == "length"
        assert episode.response("here").response_ids == (7, 7)


def test_an_unusable_reply_is_refused() -> None:
    episode = Episode(RolloutRequest(PROMPT, 0), SamplingParams(9), SHAPE, return_routes=False)
    episode.extend(sampled(2, "stop"), "here")
    with pytest.raises(RolloutError, match=r"here: the environment's reply.*0\.\.99"):
        episode.take_turn((1, 100), "here")


def test_rows_that_do_not_follow_are_refused() -> None:
    ids = random_ids(10, 2, 2, 8, 0)
    episode = Episode(RolloutRequest(PROMPT, 0), SamplingParams(9), SHAPE, return_routes=True)
    episode.extend(sampled(1, "abort", part(ids, 0, 5)), "here")
    for rows in (part(ids, 3, 6), RouteTable.missing(2, 3, 2, 8)):
        with pytest.raises(RouteError, match=r"of an attempt, expected \(2, 2, 2\)"):
            episode.extend(sampled(1, "stop", rows), "here")
    with pytest.raises(RouteError, match="without the last one"):
        episode.extend(sampled(1, "stop", RouteTable.from_ids(ids[4:6], 8)), "here")
    episode.extend(sampled(1, "stop", part(ids, 4, 6)), "here")
    episode.take_turn((1, 2), "here")
    episode.resume(RolloutRequest(PROMPT, 0), SamplingParams(1))
    with pytest.raises(RouteError, match="5 rows for 8 tokens"):
        episode.response("here")
