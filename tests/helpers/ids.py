"""Random routes, and tables compared."""

from __future__ import annotations

import numpy as np

from megatron_pr2.routes.table import RouteTable


def random_ids(tokens: int, layers: int, topk: int, experts: int, seed: int = 0) -> np.ndarray:
    """Valid ids [T, L, K]: K different experts per row."""
    order = np.random.default_rng(seed).random((tokens, layers, experts)).argsort(-1)
    return order[:, :, :topk].astype(np.int64)


def assert_same_table(found: RouteTable, wanted: RouteTable) -> None:
    assert found.num_experts == wanted.num_experts
    assert found.experts.dtype == wanted.experts.dtype
    assert np.array_equal(found.experts, wanted.experts)
    assert found.valid.dtype == np.bool_
    assert np.array_equal(found.valid, wanted.valid)
