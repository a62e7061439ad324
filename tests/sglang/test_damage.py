"""Damaged answers against the parser: every one is refused, or exactly the damaged rows come back invalid."""

from __future__ import annotations

import json
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest

from megatron_pr2.errors import PR2Error, RolloutError, RouteError
from megatron_pr2.hf.shape import ModelShape
from megatron_pr2.rollout.sglang import wire
from megatron_pr2.rollout.sglang.routes import parse_body
from megatron_pr2.rollout.sglang.wire import Ask, Sampled
from tests.helpers.ids import random_ids
from tests.sglang import damage
from tests.sglang.damage import Damaged, damage_field, damage_routes, encoded

WORTH_ANOTHER_TRY = (wire.AnswerError, RouteError)
SHAPES = [
    ModelShape(4, (0, 1, 2, 3), 16, 4, 260),
    ModelShape(5, (1, 2, 4), 128, 8, 260),  # dense layers in between
    ModelShape(2, (0, 1), 512, 6, 260),  # two bytes per id
    ModelShape(3, (0, 1, 2), 256, 8, 260),  # every byte is an id
]


def honest(shape: ModelShape, rng: Random, *, first_row: int = 0) -> tuple[Ask, dict[str, Any]]:
    """What was asked, and SGLang's answer to it."""
    prompt, sampled = rng.randint(first_row + 3, first_row + 20), rng.randint(2, 20)
    rows = prompt + sampled - 1 - first_row
    ids = random_ids(rows, shape.num_hidden_layers, shape.topk, shape.num_experts, seed=rng.randrange(10**6))
    dense = sorted(set(range(shape.num_hidden_layers)) - set(shape.moe_layers))
    ids[:, dense] = 0
    ask = Ask(f"pr2.{rng.getrandbits(64):x}.r{first_row}.", [3] * prompt, first_row, sampled, 7, "pr2.4")
    tokens = [rng.randrange(200) for _ in range(sampled)]
    answer = {
        "output_ids": tokens,
        "meta_info": {
            "id": ask.rid,
            "finish_reason": {"type": "length", "length": sampled},
            "weight_version": "4",
            "weight_versions": [{"version": "4", "start": 0, "end": sampled}],
            "cached_tokens": 0,
            "num_retractions": 0,
            "output_token_logprobs": [[-1.5, token, None] for token in tokens],
            "routed_experts": encoded(ids),
        },
    }
    return ask, answer


def parsed(body: bytes, ask: Ask, shape: ModelShape) -> Sampled:
    return wire.parse_generate(parse_body(bytearray(body), "r"), ask, shape, {"4": 4}, "r")


def check(damaged: Damaged, ask: Ask, shape: ModelShape, answer: dict[str, Any]) -> None:
    """The verdict of the parser is that of the reference; rows that are not damaged are the honest ones."""
    if damaged.refused:
        with pytest.raises(WORTH_ANOTHER_TRY, match=r"^r: "):
            parsed(damaged.body, ask, shape)
        return
    table = parsed(damaged.body, ask, shape).routes
    assert table is not None
    assert set(np.nonzero(~table.valid[:-1])[0].tolist()) == damaged.invalid
    assert not table.valid[-1]
    assert not table.experts[~table.valid].any()
    wanted = damage.decoded(answer["meta_info"]["routed_experts"], shape)[:, shape.moe_layers]
    for row in sorted(set(range(len(wanted))) - damaged.invalid - damaged.unseen):
        assert np.array_equal(table.experts[row], wanted[row])


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"top-{shape.topk} of {shape.num_experts}")
def test_honest_answers_are_accepted(shape: ModelShape) -> None:
    for seed in range(20):
        ask, answer = honest(shape, Random(seed), first_row=seed % 3)
        found = parsed(json.dumps(answer).encode(), ask, shape)
        assert found.routes is not None
        assert np.array_equal(
            found.routes.experts[:-1], damage.decoded(answer["meta_info"]["routed_experts"], shape)[:, shape.moe_layers]
        )
        assert found.invalid_rows == 0


class TestRoutes:
    @pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"top-{shape.topk} of {shape.num_experts}")
    @pytest.mark.parametrize("kind", damage.ROUTE_KINDS)
    def test_damage_is_refused_or_stays_in_its_rows(self, kind: str, shape: ModelShape) -> None:
        """20 payloads of every kind and model: 3,520 in all."""
        refused = bad_rows = 0
        for seed in range(20):
            rng = Random(f"{kind}:{seed}")
            ask, answer = honest(shape, rng, first_row=seed % 2)
            other = honest(shape, Random(seed + 1000))[1]["meta_info"]["routed_experts"]
            damaged = damage_routes(kind, answer, shape, rng, other)
            check(damaged, ask, shape, answer)
            refused += damaged.refused
            bad_rows += bool(damaged.invalid)
            if kind in damage.ROUTES_REFUSED:
                assert damaged.refused
            elif kind in damage.ROUTES_WITH_BAD_ROWS:
                assert damaged.invalid
                assert not damaged.unseen
            elif kind in damage.ROUTES_UNSEEN:
                assert not damaged.refused
                assert not damaged.invalid
        assert refused == (20 if kind in damage.ROUTES_REFUSED else 0)
        if kind in damage.ROUTES_WITH_LUCK:
            assert bad_rows > 10

    @pytest.mark.parametrize("kind", damage.ROUTES_UNSEEN)
    def test_what_the_content_cannot_show(self, kind: str) -> None:
        """True to life in every respect: what is left is the handshake, the answer's id, and TCP's checksum."""
        ask, answer = honest(SHAPES[0], Random(5))
        damaged = damage_routes(kind, answer, SHAPES[0], Random(6))
        assert damaged.unseen
        table = parsed(damaged.body, ask, SHAPES[0]).routes
        assert table is not None
        assert table.num_missing == 1

    def test_a_swapped_answer_is_told_by_its_id(self) -> None:
        """Two requests of equal lengths: only the id says whose answer it is."""
        ask, _ = honest(SHAPES[0], Random(5))
        other_ask, other = honest(SHAPES[0], Random(5))
        other["meta_info"]["id"] = "pr2.other.r0."
        with pytest.raises(wire.AnswerError, match=r"r: .*'pr2\.other\.r0\.'"):
            parsed(json.dumps(other).encode(), ask, SHAPES[0])
        assert other_ask.input_ids == ask.input_ids


class TestFields:
    @pytest.mark.parametrize("kind", [*damage.FIELD_KINDS, *damage.ID_KINDS, *damage.STRICT_KINDS])
    def test_damage_is_refused_and_worth_another_try(self, kind: str) -> None:
        for seed in range(5):
            ask, answer = honest(SHAPES[0], Random(seed))
            damaged = damage_field(kind, answer, Random(f"{kind}:{seed}"))
            check(damaged, ask, SHAPES[0], answer)

    @pytest.mark.parametrize("kind", damage.VERSION_KINDS)
    def test_foreign_weights_are_an_error(self, kind: str) -> None:
        """Somebody else updates the server: another try would not help."""
        ask, answer = honest(SHAPES[0], Random(1))
        with pytest.raises(RolloutError, match="r: sampled from weights of version"):
            parsed(damage_field(kind, answer, Random(2)).body, ask, SHAPES[0])


def test_no_change_of_a_byte_raises_anything_else_than_an_error_of_this_package() -> None:
    """Blindly, anywhere in the body: bytes changed, lost, repeated or moved."""
    accepted = 0
    for seed in range(2000):
        rng = Random(seed)
        ask, answer = honest(SHAPES[seed % len(SHAPES)], rng)
        body = bytearray(json.dumps(answer).encode())
        first, last = sorted(rng.choices(range(len(body)), k=2))
        at = rng.randrange(len(body))
        change = rng.choice(["change", "lose", "repeat", "move"])
        if change == "change":
            body[at] = rng.randrange(256)
        elif change == "lose":
            del body[first:last]
        elif change == "repeat":
            body[at:at] = body[first:last]
        else:
            piece = body[first:last]
            del body[first:last]
            body[at:at] = piece
        try:
            found = parsed(bytes(body), ask, SHAPES[seed % len(SHAPES)])
        except PR2Error:
            continue
        accepted += 1
        assert found.routes is not None
        assert found.routes.num_tokens == len(ask.input_ids) + len(found.token_ids)
    assert accepted < 500


def test_a_row_that_is_repeated_over_other_tokens_is_missing() -> None:
    shape = SHAPES[0]
    ask, answer = honest(shape, Random(0))
    ids = random_ids(80, 4, 4, 16, seed=1)
    ask = replace(ask, input_ids=list(range(3, 81 - len(answer["output_ids"]) + 3)))
    num = len(ask.input_ids) + len(answer["output_ids"]) - 1
    ids = ids[:num]
    answer["meta_info"]["routed_experts"] = encoded(ids)
    assert parsed(json.dumps(answer).encode(), ask, shape).invalid_rows == 0
    ids[5:60] = ids[5]
    answer["meta_info"]["routed_experts"] = encoded(ids)
    found = parsed(json.dumps(answer).encode(), ask, shape)
    assert found.invalid_rows == 54
    assert found.routes is not None
    assert np.flatnonzero(~found.routes.valid).tolist() == [*range(6, 60), num]
