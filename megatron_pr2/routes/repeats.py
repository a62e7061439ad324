"""Runs of identical rows: an engine that returns a stale buffer repeats valid rows, which no check of single rows sees.

Equal tokens may honestly take equal experts in every layer (a text of one repeated token does at every position), so only rows that
equal their predecessor although the token differs are counted, ids in the engine's order. With a chance of 3/4 per layer, more than
was measured on average in any model, a run of r such rows is among n rows by chance less than once in a million where
n (3/4)^(r layers) < 1e-6.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_pr2.routes.table import RouteTable


def longest_repeat(table: RouteTable, token_ids: Any) -> int:
    """Most rows in succession that equal their predecessor in every layer while the token differs; both rows valid.

    Args:
        token_ids: integers, one per row of the table.
    """
    return int(np.diff(_run_edges(table, token_ids)).max()) - 1


def repeated_rows(table: RouteTable, token_ids: Any) -> npt.NDArray[np.bool_]:
    """[T] bool: the rows of runs that are longer than `most_repeats`; arguments as for `longest_repeat`."""
    found, edges = np.zeros(table.num_tokens, dtype=bool), _run_edges(table, token_ids)
    for run in np.flatnonzero(np.diff(edges) - 1 > most_repeats(table.num_tokens, table.num_layers)):
        found[edges[run] + 2 : edges[run + 1] + 1] = True
    return found


def _run_edges(table: RouteTable, token_ids: Any) -> npt.NDArray[np.int64]:
    """Pairs of rows (i, i + 1) that are no repeat, and both ends; a run is between two of them."""
    ids, rows = np.asarray(token_ids), table.experts
    same = (rows[1:] == rows[:-1]).all(axis=(1, 2)) & table.valid[1:] & table.valid[:-1] & (ids[1:] != ids[:-1])
    (breaks,) = np.nonzero(~same)
    return np.concatenate(([-1], breaks, [len(same)]))


def most_repeats(rows: int, layers: int) -> int:
    """The longest run that is taken for chance."""
    return 3 + math.ceil(math.log(1e6 * max(1, rows)) / (layers * math.log(4 / 3)))
