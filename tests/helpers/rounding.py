"""Bounds on rounding that follow from a dtype and a size, so that a test passes on any processor.

Kernels differ from one processor to the next in the order in which they add, so that a number read off one machine's results is no
bound. `factor * eps * terms` is one: each of `terms` additions and multiplications rounds once, and a factor stands for what is
done before and after (exponentials, a division).
"""

from __future__ import annotations

import torch
from torch import Tensor


def rounding(terms: int, *, dtype: torch.dtype = torch.float32, factor: float = 8.0) -> float:
    """Relative error of a value that is reached through sums of `terms` terms."""
    return factor * torch.finfo(dtype).eps * terms


def assert_near(
    actual: Tensor, expected: Tensor, terms: int, *, dtype: torch.dtype | None = None, factor: float = 8.0, msg: str = ""
) -> None:
    """Every entry is what is expected, up to rounding as a share of the largest expected entry.

    Args:
        terms: as for :func:`rounding`.
        dtype: that was computed in; of `actual` if None.
    """
    bound = rounding(terms, dtype=dtype or actual.dtype, factor=factor) * float(expected.abs().max())
    error = float((actual.double() - expected.double()).abs().max())
    assert actual.shape == expected.shape, f"{msg}: {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    # Written so that a NaN is refused.
    assert error <= bound, f"{msg}: deviates by {error:.2e}, more than the {bound:.2e} that rounding explains"


# Of a log-prob of a small model in fp32: sums over its hidden size, 64 at most, layer after layer.
LOGPROB = rounding(64, factor=16.0)
# Of a log-prob, a norm or a share in bf16, where whatever is stored is rounded: a few of its steps.
BF16 = rounding(1, dtype=torch.bfloat16, factor=4.0)
