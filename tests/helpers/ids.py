"""Random routes."""

from __future__ import annotations

import numpy as np


def random_ids(tokens: int, layers: int, topk: int, experts: int, seed: int = 0) -> np.ndarray:
    """Valid ids [T, L, K]: K different experts per row."""
    order = np.random.default_rng(seed).random((tokens, layers, experts)).argsort(-1)
    return order[:, :, :topk].astype(np.int64)
