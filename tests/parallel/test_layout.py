"""Which rank holds which token: every rule checked against its definition and, together, for completeness."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_pr2.errors import ConfigError
from megatron_pr2.parallel.grid import (
    PADDING,
    TokenGrid,
    context_parallel,
    moe_layer_indices,
    packed,
    padded,
    sequence_parallel,
)

lengths_lists = st.lists(st.integers(1, 40), min_size=1, max_size=5)


def claims(grid: TokenGrid) -> Counter[tuple[int, int]]:
    """How often every (sequence, position) is claimed; padding claims nothing, and always in both fields."""
    sequence, position = grid.rows()
    assert ((sequence == PADDING) == (position == PADDING)).all()
    return Counter((s, p) for s, p in zip(sequence.tolist(), position.tolist(), strict=True) if s != PADDING)


def everything(lengths: list[int]) -> Counter[tuple[int, int]]:
    return Counter((10 + i, p) for i, n in enumerate(lengths) for p in range(n))


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@given(lengths_lists, st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.booleans())
def test_context_and_sequence_parallel_ranks_partition_all_tokens(lengths: list[int], cp: int, tp: int, pack: bool) -> None:
    """Every (sequence, position) lives on exactly one rank, and packed batches hold the same tokens as padded ones."""
    ids = [10 + i for i in range(len(lengths))]
    multiple = 2 * cp * tp
    if pack:
        slots = [round_up(n, multiple) for n in lengths]
        grid = packed(ids, lengths, slots)
    else:
        grid = padded(ids, lengths, round_up(max(lengths), multiple))
    assert claims(grid) == everything(lengths)
    shares = [
        sequence_parallel(context_parallel(grid, cp, c), tp, t) for c in range(cp) for t in range(tp)
    ]
    assert sum((claims(share) for share in shares), Counter()) == everything(lengths)
    assert {share.num_rows for share in shares} == {grid.num_rows // (cp * tp)}


@given(st.integers(1, 5), st.sampled_from([2, 4, 8]))
def test_context_parallelism_is_the_zigzag_of_2cp_chunks(chunk: int, cp: int) -> None:
    length = 2 * cp * chunk
    grid = padded([0], [length], length)
    for rank in range(cp):
        first, second = rank, 2 * cp - 1 - rank
        expected = [c * chunk + i for c in (first, second) for i in range(chunk)]
        assert context_parallel(grid, cp, rank).position[:, 0].tolist() == expected
        assert context_parallel(packed([0], [length]), cp, rank).position[:, 0].tolist() == expected


def test_packed_sequences_are_cut_one_by_one() -> None:
    grid = context_parallel(packed([5, 6], [4, 7], [4, 8]), 2, 0)
    assert grid.sequence[:, 0].tolist() == [5, 5, 6, 6, 6, -1]
    assert grid.position[:, 0].tolist() == [0, 3, 0, 1, 6, -1]


def test_padded_rows_are_the_routers_row_order() -> None:
    """[S, B, H] flattened row-major: position first, then sequence."""
    sequence, position = padded([7, 9], [3, 2], 4).rows()
    assert sequence.tolist() == [7, 9, 7, 9, 7, -1, -1, -1]
    assert position.tolist() == [0, 0, 1, 1, 2, -1, -1, -1]


def test_sequence_parallel_shares_are_contiguous() -> None:
    grid = padded([0], [6], 8)
    assert sequence_parallel(grid, 2, 0).position[:, 0].tolist() == [0, 1, 2, 3]
    assert sequence_parallel(grid, 2, 1).position[:, 0].tolist() == [4, 5, -1, -1]


def test_one_rank_is_the_whole_grid() -> None:
    grid = padded([0], [5], 7)
    assert context_parallel(grid, 1, 0) is grid
    assert sequence_parallel(grid, 1, 0) is grid


def test_empty_micro_batches() -> None:
    for grid in (packed([], []), padded([], [], 4)):
        assert grid.num_rows == 0
        assert not claims(grid)
    assert context_parallel(packed([], []), 2, 0).num_rows == 0


@pytest.mark.parametrize(
    ("call", "settings"),
    [
        (lambda: padded([0], [5], 4), "padded_length is 4"),
        (lambda: packed([0], [5], [4]), "padded_length is 4"),
        (lambda: context_parallel(padded([0], [5], 6), 2, 0), "2 \\* context_parallel_size = 4"),
        (lambda: context_parallel(packed([0], [5], [6]), 2, 0), "2 \\* context_parallel_size = 4"),
        (lambda: sequence_parallel(padded([0], [5], 5), 2, 0), "tensor_model_parallel_size = 2"),
        (lambda: moe_layer_indices(4, [1, 0]), "moe_layer_freq has 2 entries, num_layers is 4"),
        (lambda: TokenGrid(np.zeros((2, 1), np.int64), np.zeros((3, 1), np.int64)), "expected equal"),
    ],
)
def test_errors_name_the_setting(call: object, settings: str) -> None:
    with pytest.raises(ConfigError, match=settings):
        call()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("frequency", "expected"),
    [(1, (0, 1, 2, 3)), (2, (0, 2)), ([0, 1, 1, 1], (1, 2, 3)), ([0, 0, 1, 0], (2,)), ([0, 0, 0, 0], ())],
)
def test_moe_layers_of_dense_first_and_mixed_models(frequency: int | list[int], expected: tuple[int, ...]) -> None:
    assert moe_layer_indices(4, frequency) == expected
