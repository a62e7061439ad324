"""Runs of identical rows."""

from __future__ import annotations

from megatron_pr2.routes.repeats import longest_repeat, most_repeats, repeated_rows
from megatron_pr2.routes.table import RouteTable
from tests.helpers.ids import random_ids


def test_a_repeated_row_is_counted_where_tokens_differ() -> None:
    ids = random_ids(68, 4, 4, 16, 0)
    tokens = list(range(68))
    assert longest_repeat(RouteTable.from_ids(ids, 16), tokens) == 0
    ids[10:40] = ids[10]
    table = RouteTable.from_ids(ids, 16)
    assert longest_repeat(table, tokens) == 29 > most_repeats(68, 4)
    assert repeated_rows(table, tokens).nonzero()[0].tolist() == list(range(11, 40))
    assert not repeated_rows(table, [7] * 68).any()
    assert longest_repeat(table, [7] * 68) == 0  # a text of one token takes the same experts everywhere
    table.valid[20] = False
    assert longest_repeat(table, tokens) == 18
    assert longest_repeat(RouteTable.missing(1, 4, 4, 16), [3]) == 0
    assert all(most_repeats(16_000, layers) < 6 for layers in (48, 94))
