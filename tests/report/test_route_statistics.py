"""Numbers about route tables: on routes that can be counted by hand, and against plain loops on random ones."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_pr2.errors import DataError
from megatron_pr2.report import route_statistics
from megatron_pr2.report.route_statistics import CHANGED, compare, describe, position_edges, shared_experts
from megatron_pr2.routes.files import RouteFile, save_routes
from megatron_pr2.routes.table import RouteTable
from tests.report.synthetic import route_tables


def table(rows, experts=4):
    """Routes of one layer; None is a missing row."""
    topk = len(next(row for row in rows if row is not None))
    ids = np.array([[row if row is not None else [experts] * topk] for row in rows])
    return RouteTable.from_ids(ids, experts)


@pytest.fixture
def pair(tmp_path):
    """Writes two files and opens them."""
    opened = []

    def write(first, second):
        for name, tables in (("first", first), ("second", second)):
            save_routes(tmp_path / name, tables)
            opened.append(RouteFile(tmp_path / name))
        return opened[-2:]

    yield write
    for file in opened:
        file.close()


def test_numbers_of_one_file():
    numbers = describe({0: table([[0, 1], [1, 0], [1, 2], None]), 5: table([None, [0, 1], None, [0, 1]])})
    assert (numbers.sequences, numbers.tokens, numbers.missing, numbers.missing_last) == (2, 8, 3, 1)
    np.testing.assert_allclose(numbers.load, [[1.6, 2.0, 0.4, 0]])
    layer = numbers.layers.loc[1]
    assert (layer["busiest"], layer["unused"]) == (pytest.approx(2.0), 0.25)
    p = np.array([0.4, 0.5, 0.1])
    assert layer["entropy"] == pytest.approx(-(p * np.log(p)).sum() / np.log(4))
    # Neighbours with routes: rows 0-1 (the same set in another order) and 1-2 of the first sequence.
    assert numbers.neighbours == 2
    assert layer["stickiness"] == 3 / 4
    assert layer["chance"] == pytest.approx((0.8**2 + 1.0**2 + 0.2**2) / 2)


def test_stickiness_of_unrelated_neighbours_is_chance():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1, (20000, 2, 8)) + np.array([0, 0, 0, 0, 0, 1, 1, 2])
    ids = logits.argsort(-1)[..., :3]
    numbers = describe({0: RouteTable.from_ids(ids, 8)})
    np.testing.assert_allclose(numbers.layers["stickiness"], numbers.layers["chance"], rtol=0.01)
    repeated = describe({0: RouteTable.from_ids(ids[:1].repeat(9, 0), 8)})
    assert (repeated.layers["stickiness"] == 1).all()


def test_the_extremes_of_balance():
    for rows, experts, expected in (
        ([[0, 1], [2, 3]], 4, [1.0, 1.0, 0.0]),
        ([[2], [2], [2]], 4, [4.0, 0.0, 0.75]),
        ([[0], [0]], 1, [1.0, 0.0, 0.0]),
    ):
        found = describe({0: table(rows, experts)}).layers
        np.testing.assert_allclose(found.loc[1, ["busiest", "entropy", "unused"]], expected)


def test_without_a_route_there_are_no_numbers():
    numbers = describe({0: RouteTable.missing(3, 2, 1, 4), 1: RouteTable.missing(0, 2, 1, 4)})
    assert (numbers.tokens, numbers.missing, numbers.missing_last, numbers.neighbours) == (3, 3, 1, 0)
    assert numbers.layers.shape == (2, 5)
    assert numbers.layers.isna().all(axis=None)
    with pytest.raises(DataError, match="no route tables"):
        describe({})


def test_numbers_are_those_of_loops(pair):
    first, second = route_tables(3, sequences=3, layers=2), route_tables(3, sequences=3, layers=2, drift=0.5)
    first[1].valid[7] = False
    numbers = describe(first)
    load, repeated = np.zeros((2, 32), dtype=int), np.zeros(2, dtype=int)
    kept, changed, touched = np.zeros(2, dtype=int), np.zeros((2, 4), dtype=int), 0
    for sid, routes in first.items():
        for t in np.flatnonzero(routes.valid):
            for layer in range(2):
                taken = set(routes.experts[t, layer].tolist())
                load[layer, list(taken)] += 1
                if t and routes.valid[t - 1]:
                    repeated[layer] += len(taken & set(routes.experts[t - 1, layer].tolist()))
            both = [len(set(routes.experts[t, layer].tolist()) & set(second[sid].experts[t, layer].tolist())) for layer in range(2)]
            kept += both
            touched += min(both) < 4
            for layer in range(2):
                changed[layer, min(3, 4 - both[layer])] += 1
    routed = numbers.tokens - numbers.missing
    np.testing.assert_allclose(numbers.load, load * 32 / (4 * routed))
    np.testing.assert_allclose(numbers.layers["stickiness"], repeated / (4 * numbers.neighbours))
    difference = compare(*pair(first, second))
    assert (difference.touched, difference.tokens) == (touched, routed)
    np.testing.assert_allclose(difference.layers["agreement"], kept / (4 * routed))
    np.testing.assert_allclose(difference.layers[list(CHANGED)], changed / routed)
    assert 0 < touched < difference.tokens


def test_difference_of_two_files(pair):
    first = {0: table([[0, 1], [0, 1], [0, 1], None]), 1: table([[2, 3]]), 8: table([[0, 1]])}
    second = {0: table([[1, 0], [1, 2], [2, 3], [0, 1]]), 1: RouteTable.missing(1, 1, 2, 4)}
    difference = compare(*pair(first, second))
    assert (difference.sequences, difference.only_first, difference.only_second) == (2, 1, 0)
    assert (difference.tokens, difference.skipped, difference.touched) == (3, 2, 2)
    np.testing.assert_allclose(difference.layers, [[0.5, 1 / 3, 1 / 3, 1 / 3, 0]])
    assert [*difference.positions.index, difference.end] == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(difference.positions[1], [1.0, 0.5, 0.0, np.nan])


def test_nothing_in_common(pair):
    difference = compare(*pair({0: table([[0, 1], None])}, {0: table([None, [0, 1]])}))
    assert (difference.tokens, difference.skipped) == (0, 2)
    assert difference.layers.isna().all(axis=None)
    empty = RouteTable.missing(0, 1, 2, 4)
    assert compare(*pair({0: empty}, {0: empty})).tokens == 0


def test_what_cannot_be_compared_says_why(pair):
    one = {0: table([[0, 1], [0, 1]])}
    with pytest.raises(DataError, match=r"first has 1 MoE layers, top-2 of 4 experts; .*second has 1 MoE layers, top-1 of 4"):
        compare(*pair(one, {0: table([[0], [1]])}))
    with pytest.raises(DataError, match="share no sequence"):
        compare(*pair(one, {1: one[0]}))
    with pytest.raises(DataError, match=r"sequence 0 has 2 tokens in .*first and 3 in .*second \(1 of 1 differ\)"):
        compare(*pair(one, {0: table([[0, 1], [0, 1], [0, 1]])}))


def test_shared_experts_ignore_order():
    a = np.array([[[0, 1, 2]], [[5, 3, 1]]])
    b = np.array([[[2, 0, 1]], [[1, 7, 8]]])
    assert shared_experts(a, b).tolist() == [[3], [1]]


@pytest.mark.parametrize("lengths", [[1], [3, 3], [100], list(range(1, 60)), [5, 0, 4000], [0]])
def test_position_bins_hold_about_as_many_tokens(lengths):
    edges = position_edges(lengths)
    assert edges[0] == 0
    assert edges[-1] == max(1, *lengths, 0)
    assert (np.diff(edges) > 0).all()
    assert len(edges) <= route_statistics.POSITION_BINS + 1
    at = np.concatenate([np.arange(length) for length in lengths])
    counts = np.histogram(at, edges)[0] if at.size else np.zeros(1)
    assert counts.sum() == sum(lengths)
    if at.size > 100:
        # One position of every sequence more or less.
        assert np.ptp(counts) <= 2 * len(lengths)
