"""From the bytes of an answer to a compact table: the same as decoding step by step, and nothing else gets through."""

from __future__ import annotations

import base64
import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_pr2.errors import RolloutError, RouteError
from megatron_pr2.hf.shape import ModelShape
from megatron_pr2.rollout.sglang.routes import decode_table, parse_body, split_routes
from megatron_pr2.routes.ids import all_distinct
from megatron_pr2.routes.table import RouteTable
from tests.helpers.ids import random_ids


def model(layers: int = 4, moe: tuple[int, ...] | None = None, experts: int = 128, topk: int = 8) -> ModelShape:
    return ModelShape(layers, tuple(range(layers)) if moe is None else moe, experts, topk, 1000)


def encoded(rows: np.ndarray) -> bytes:
    return base64.b64encode(rows.astype("<i4").tobytes())


def step_by_step(rows: np.ndarray, shape: ModelShape) -> RouteTable:
    return RouteTable.from_engine(
        rows,
        num_tokens=len(rows) + 1,
        moe_layers=shape.moe_layers,
        num_hidden_layers=shape.num_hidden_layers,
        topk=shape.topk,
        num_experts=shape.num_experts,
    )


def body_of(routes: bytes, text: str = "") -> bytearray:
    meta = {"id": "x", "routed_experts": routes.decode(), "finish_reason": {"type": "stop"}}
    return bytearray(json.dumps({"text": text, "output_ids": [1, 2], "meta_info": meta}).encode())


@given(
    st.sampled_from([(4, 1), (8, 2), (8, 4), (128, 8), (64, 6), (300, 8), (300, 4), (512, 10)]),
    st.integers(1, 5),
    st.integers(1, 400),
    st.integers(0, 2**31),
)
def test_tables_are_those_of_decoding_step_by_step(kind: tuple[int, int], layers: int, rows: int, seed: int) -> None:
    """With any share of rows that no engine should return."""
    experts, topk = kind
    rng = np.random.default_rng(seed)
    moe = tuple(sorted(rng.choice(layers, size=rng.integers(1, layers + 1), replace=False).tolist()))
    shape = model(layers, moe, experts, topk)
    ids = random_ids(rows, layers, topk, experts, seed=seed % 1000).astype(np.int64)
    for bad in (-1, experts, 0, 2**31 - 1, 256, 65536):
        ids[rng.random(rows) < 0.1 * rng.random(), rng.integers(layers), rng.integers(topk)] = bad
    found = decode_table(encoded(ids), num_tokens=rows + 1, shape=shape, where="r")
    wanted = step_by_step(ids, shape)
    assert np.array_equal(found.experts, wanted.experts)
    assert found.experts.dtype == wanted.experts.dtype
    assert np.array_equal(found.valid, wanted.valid)


@given(st.sampled_from([(np.uint8, 4), (np.uint8, 8), (np.uint16, 2), (np.uint16, 4), (np.uint8, 6), (np.int32, 8)]), st.data())
def test_repeated_ids_are_found(kind: tuple[type, int], data: st.DataObject) -> None:
    dtype, topk = kind
    ids = np.array(data.draw(st.lists(st.lists(st.integers(0, 12), min_size=topk, max_size=topk), max_size=40)), dtype=dtype)
    ids = ids.reshape(-1, topk)
    assert all_distinct(ids).tolist() == [len(set(row)) == topk for row in ids.tolist()]
    if dtype is np.uint8 and len(ids):
        assert all_distinct(ids * np.uint8(20)).tolist() == [len(set(row)) == topk for row in ids.tolist()]


def test_the_routes_are_cut_out_of_the_body_and_stay_where_they_are() -> None:
    routes = encoded(random_ids(9, 4, 8, 128))
    body = body_of(routes, text='a "routed_experts": "AAAA" in what was said')
    rest, view = split_routes(body)
    assert bytes(view) == routes
    assert view.obj is body
    assert json.loads(rest)["meta_info"]["routed_experts"] == ""
    answer = parse_body(body, "r")
    assert answer["meta_info"]["routed_experts"].obj is body
    assert answer["text"].startswith('a "routed_experts"')


@pytest.mark.parametrize(
    "body",
    [b'{"meta_info": {"routed_experts": null}}', b'{"meta_info": {}}', b'{"meta_info": {"routed_experts": "AA'],
)
def test_bodies_without_routes_are_left_alone(body: bytes) -> None:
    rest, view = split_routes(bytearray(body))
    assert rest == body
    assert view is None


def test_two_routes_are_not_chosen_between() -> None:
    body = bytearray(b'{"meta_info": {"routed_experts": "AAAA"}, "routed_experts": "BBBB"}')
    assert split_routes(body)[1] is None
    assert parse_body(body, "r")["meta_info"]["routed_experts"] == "AAAA"


def test_what_is_not_json_is_said() -> None:
    with pytest.raises(RolloutError, match="r: /generate answered with something that is not JSON"):
        parse_body(bytearray(b'{"meta_info": {"routed_experts": "AAAA"'), "r")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda routes: routes[:-1], "no multiple of 4"),
        (lambda routes: routes[:-4], "expected 7 rows"),
        (lambda routes: routes + b"AAAA", "expected 7 rows"),
        (lambda routes: b"", "expected 7 rows"),
        (lambda routes: b"!" + routes[1:], "not valid base64"),
        (lambda routes: routes[:40] + b"==" + routes[42:], "not valid base64"),
        (lambda routes: routes[:40] + b"\n\n\n\n" + routes[44:], "not valid base64"),
        (lambda routes: "é" + routes.decode()[1:], "not valid base64"),
        (lambda routes: None, "--enable-return-routed-experts"),
        (lambda routes: 7, "--enable-return-routed-experts"),
    ],
)
def test_damaged_payloads_are_refused(change: object, message: str) -> None:
    routes = encoded(random_ids(7, 4, 8, 128))
    with pytest.raises(RouteError, match=message):
        decode_table(change(routes), num_tokens=8, shape=model(), where="r")  # type: ignore[operator]


def test_the_peak_is_little_more_than_the_payload() -> None:
    """Body, table and a piece of work; not the body as text, the ids as int32 and their copies."""
    shape = model(48)
    routes = encoded(random_ids(4095, 48, 8, 128).astype(np.int32))
    body = body_of(routes)
    tracemalloc.start()
    try:
        held = bytearray(body)
        answer = parse_body(held, "r")
        table = decode_table(answer["meta_info"]["routed_experts"], num_tokens=4096, shape=shape, where="r")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert table.num_missing == 1
    assert peak < 1.5 * len(routes)
