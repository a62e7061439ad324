"""RouteTable: what may be replayed, compact storage, the wire format."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_pr2.errors import RouteError
from megatron_pr2.routes.ids import expert_dtype, replayable
from megatron_pr2.routes.table import RouteTable
from tests.helpers.ids import random_ids


@st.composite
def id_arrays(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """Ids [T, L, K], of which some rows are spoiled, and E."""
    experts = draw(st.sampled_from([2, 8, 256, 257, 300, 1000]))
    tokens, layers = draw(st.integers(0, 40)), draw(st.integers(1, 3))
    topk = draw(st.integers(1, min(4, experts)))
    seed = draw(st.integers(0, 2**32 - 1))
    ids = random_ids(tokens, layers, topk, experts, seed)
    rng = np.random.default_rng(seed)
    for row in rng.integers(0, tokens, draw(st.integers(0, 5))) if tokens else []:
        spoiled = [-1, experts, experts + 255, 70_000, 2**31 - 1, ids[row, 0, -1] if topk > 1 else -7]
        ids[row, rng.integers(layers), 0] = spoiled[rng.integers(len(spoiled))]
    return ids, experts


def can_be_replayed(row_LK: np.ndarray, experts: int) -> bool:
    """The rule in plain words: in every layer K different experts that exist."""
    return all(len(set(layer)) == len(layer) and all(0 <= e < experts for e in layer) for layer in row_LK.tolist())


@given(id_arrays())
def test_rows_are_valid_if_all_ids_exist_and_differ(case: tuple[np.ndarray, int]) -> None:
    ids, experts = case
    valid = replayable(ids, experts)
    assert valid.tolist() == [can_be_replayed(row, experts) for row in ids]


@given(id_arrays())
def test_tables_keep_valid_rows_and_blank_the_others(case: tuple[np.ndarray, int]) -> None:
    ids, experts = case
    table = RouteTable.from_ids(ids, experts)
    assert table.experts.dtype == (np.uint8 if experts <= 256 else np.uint16)
    assert (table.experts[table.valid] == ids[table.valid]).all()
    assert not table.experts[~table.valid].any()
    assert table.num_missing == (~table.valid).sum()
    assert (table.num_tokens, table.num_layers, table.topk) == ids.shape


@given(id_arrays())
def test_what_is_encoded_decodes_to_the_same(case: tuple[np.ndarray, int]) -> None:
    table = RouteTable.from_ids(*case)
    payload = table.encode()
    again = RouteTable.decode(payload)
    assert len(payload) == 20 + table.nbytes
    assert again.num_experts == table.num_experts
    assert again.experts.dtype == table.experts.dtype
    assert np.array_equal(again.experts, table.experts)
    assert np.array_equal(again.valid, table.valid)


@given(id_arrays(), st.data())
def test_truncated_and_extended_payloads_are_refused(case: tuple[np.ndarray, int], data: st.DataObject) -> None:
    payload = RouteTable.from_ids(*case).encode()
    cut = data.draw(st.integers(0, len(payload) - 1))
    for wrong in (payload[:cut], payload + b"\0"):
        with pytest.raises(RouteError, match="payload"):
            RouteTable.decode(wrong)


@given(id_arrays(), st.integers(0), st.integers(1, 255))
def test_a_corrupt_byte_is_refused_or_gives_a_consistent_table(case: tuple[np.ndarray, int], at: int, flip: int) -> None:
    """Never an id that a router cannot take, and never another exception than RouteError."""
    payload = bytearray(RouteTable.from_ids(*case).encode())
    payload[at % len(payload)] ^= flip
    try:
        table = RouteTable.decode(bytes(payload))
    except RouteError:
        return
    assert all(can_be_replayed(row, table.num_experts) for row in table.experts[table.valid])


@given(st.binary(max_size=64))
def test_garbage_is_refused_or_consistent(payload: bytes) -> None:
    try:
        table = RouteTable.decode(payload)
    except RouteError:
        return
    assert table.valid.shape == table.experts.shape[:1]


def test_wire_size_is_one_byte_per_id_and_one_bit_per_token() -> None:
    """Qwen3-30B: 48 layers x top-8 = 384 B a token; as int32 in base64 it would be 2,048."""
    table = RouteTable.from_ids(random_ids(80, 48, 8, 128), 128)
    assert table.nbytes == 80 * 384 + 10


def test_expert_ids_fit_their_dtype() -> None:
    assert [expert_dtype(n) for n in (1, 256, 257, 1 << 15)] == [np.uint8, np.uint8, np.uint16, np.uint16]
    for wrong in (0, -1, (1 << 15) + 1):
        with pytest.raises(RouteError, match="num_experts"):
            expert_dtype(wrong)


def test_ids_above_255_survive() -> None:
    ids = random_ids(50, 3, 4, 300)
    ids[0, 0] = [299, 256, 255, 0]
    table = RouteTable.decode(RouteTable.from_ids(ids, 300).encode())
    assert table.valid.all()
    assert np.array_equal(table.experts, ids)


def test_all_zero_layers_are_not_expert_zero() -> None:
    """Engines leave layers at zero that their capture missed; with K > 1 that is a row of duplicates."""
    ids = random_ids(5, 3, 2, 8)
    ids[:, 1] = 0
    ids[3, 1] = [0, 1]
    assert RouteTable.from_ids(ids, 8).valid.tolist() == [False, False, False, True, False]


def test_with_top_1_zero_may_be_a_real_choice() -> None:
    """A layer of zeros is judged over a whole rollout batch, when it begins."""
    ids = random_ids(40, 3, 1, 8)
    ids[:, 1] = 0
    table = RouteTable.from_ids(ids, 8)
    assert table.valid.all()
    assert RouteTable.decode(table.encode()).valid.all()


def engine_rows(tokens: int, layers: int = 4, topk: int = 2, experts: int = 8) -> np.ndarray:
    return random_ids(tokens - 1, layers, topk, experts).astype(np.int32)


ENGINE: dict[str, Any] = {"moe_layers": (1, 3), "num_hidden_layers": 4, "topk": 2, "num_experts": 8}


def test_engine_rows_belong_to_input_tokens_and_moe_layers() -> None:
    """Row i is input token i; dense layers come as zeros and are left out; the last token has no row."""
    rows = engine_rows(6)
    rows[:, [0, 2]] = 0
    table = RouteTable.from_engine(rows, num_tokens=6, **ENGINE)
    assert table.valid.tolist() == [True] * 5 + [False]
    assert np.array_equal(table.experts[:5], rows[:, [1, 3]])
    assert table.num_missing == 1


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8, np.uint16])
def test_engine_rows_of_any_integer_type(dtype: type) -> None:
    rows = engine_rows(6).astype(dtype)
    assert RouteTable.from_engine(rows, num_tokens=6, **ENGINE).valid[:5].all()


def test_ids_beyond_32_bits_do_not_wrap_round_to_valid_ones() -> None:
    rows = engine_rows(6).astype(np.int64)
    rows[2, 1, 0] += 2**32
    assert RouteTable.from_engine(rows, num_tokens=6, **ENGINE).valid.tolist() == [True, True, False, True, True, False]


@pytest.mark.parametrize("shape", [(6, 4, 2), (4, 4, 2), (5, 3, 2), (5, 4, 1), (5, 8), (40,)])
def test_engine_rows_of_another_shape_are_refused_by_name(shape: tuple[int, ...]) -> None:
    with pytest.raises(RouteError, match=r"request 7: .*expected \[5, 4, 2\].*same model"):
        RouteTable.from_engine(np.zeros(shape, dtype=np.int32), num_tokens=6, where="request 7", **ENGINE)


def test_ids_must_be_integers_of_three_axes() -> None:
    for wrong in (np.zeros((3, 2), dtype=np.int64), np.zeros((3, 2, 2))):
        with pytest.raises(RouteError, match="expected integers"):
            RouteTable.from_ids(wrong, 8)
    with pytest.raises(RouteError, match="integers"):
        RouteTable.from_engine(np.zeros((5, 4, 2)), num_tokens=6, **ENGINE)


@pytest.mark.parametrize(
    ("experts", "valid", "message"),
    [
        (np.zeros((3, 2), np.uint8), np.zeros(3, bool), "T, L, K"),
        (np.zeros((3, 2, 2), np.uint8), np.zeros(4, bool), "T, L, K"),
        (np.zeros((3, 2, 2), np.int64), np.zeros(3, bool), "need uint8"),
        (np.zeros((3, 2, 2), np.uint16), np.zeros(3, bool), "need uint8"),
        (np.zeros((3, 2, 2), np.uint8), np.zeros(3, np.uint8), "expected bool"),
    ],
)
def test_inconsistent_tables_are_refused(experts: np.ndarray, valid: np.ndarray, message: str) -> None:
    with pytest.raises(RouteError, match=message):
        RouteTable(experts, valid, 8)


@pytest.mark.parametrize("experts", [8, 300])
@pytest.mark.parametrize("row", [[3, 3], [1, 8], [1, 255]], ids=["duplicate", "one too far", "far"])
def test_a_table_made_by_hand_is_checked_as_any_other(row: list[int], experts: int) -> None:
    """CUDA would assert on such an id, long after the mistake; a duplicate one would leave a token with one expert less."""
    ids = np.tile(np.array([[5, 2]], dtype=expert_dtype(experts)), (70_000, 2, 1))  # more rows than one piece of the check
    valid = np.ones(len(ids), dtype=bool)
    RouteTable(ids, valid, experts)
    ids[69_000, 1] = row if experts == 8 or row == [3, 3] else [1, experts]
    with pytest.raises(RouteError, match="RouteTable: token 69000 is marked as valid, but has duplicate or out-of-range"):
        RouteTable(ids, valid, experts)
    valid[69_000] = False
    assert RouteTable(ids, valid, experts).num_missing == 1


KINDS = {
    "tensor": torch.tensor,
    "int16 tensor": lambda rows: torch.tensor(rows, dtype=torch.int16),
    "lists": lambda rows: rows.tolist(),
    "list of arrays": list,
    "tuple of tensors": lambda rows: tuple(torch.tensor(row) for row in rows),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_engines_rows_may_be_tensors_or_lists(kind: str) -> None:
    rows = random_ids(5, 4, 2, 8)
    expected = RouteTable.from_engine(rows, num_tokens=6, **ENGINE)
    made = RouteTable.from_engine(KINDS[kind](rows), num_tokens=6, **ENGINE)
    assert np.array_equal(made.experts, expected.experts)
    assert np.array_equal(made.valid, expected.valid)
    assert np.array_equal(RouteTable.from_ids(KINDS[kind](rows), 8).experts, RouteTable.from_ids(rows, 8).experts)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.zeros(5, 4, 2), r"got float32\[5, 4, 2\]; expected integers"),
        (torch.zeros(5, 4, 2, dtype=torch.bfloat16), "got float32"),
        (np.zeros((5, 4, 2), dtype=bool), "got bool"),
        ([[[1, 2]] * 4] * 4 + [[[1]] * 4], "expected values of one shape"),
        ("AAAA", "got str; expected integers"),
        (b"AAAA", "got bytes; expected integers"),
        (None, "got NoneType"),
    ],
)
def test_what_is_no_array_of_integers_is_refused(rows: Any, message: str) -> None:
    with pytest.raises(RouteError, match=f"request 7: routes: {message}"):
        RouteTable.from_engine(rows, num_tokens=6, where="request 7", **ENGINE)


def test_layers_that_there_are_not_are_refused() -> None:
    """Megatron-Core's numbers of a HybridModel are such ones: it counts attention and experts apart."""
    with pytest.raises(RouteError, match=r"moe_layers=\[1, 5\] of 4 hidden layers; \[5\] are none of them: pass pr2\.layers"):
        RouteTable.from_engine(np.zeros((5, 4, 2), dtype=int), num_tokens=6, **{**ENGINE, "moe_layers": (1, 5)})


def test_missing_tables_have_no_valid_row() -> None:
    table = RouteTable.missing(5, 3, 2, 300)
    assert table.num_missing == 5
    assert table.experts.dtype == np.uint16
