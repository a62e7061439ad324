"""W + W_p in the dtype of a push, by seeded stochastic rounding.

A bf16 weight of 0.02 has steps of 1.2e-4: rounding to the nearest value drops every entry of W_p below half a step, and what a
predictor learns is mostly smaller. Rounding up with a probability equal to the remainder delivers every entry on average;
tools/bench_gate_rounding.py measures what that does to routes (design decision 2).

The random numbers depend on the seed and the layer alone: every rank that merges the same gate gets the same bits, and so does a
push that is repeated.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Bits of fp32's significand that a dtype has not.
_DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}


def merge_gate(gate_EH: Tensor, w_EH: Tensor, dtype: torch.dtype | None = None, *, seed: int = 0, layer: int = 0) -> Tensor:
    """W + W_p, added in fp32 and cast once; where W_p is 0 the result is W, bit by bit.

    Args:
        w_EH: or several of them, [J, E, H], which are rounded by the same random numbers.
        dtype: of the result; None is the gate's.
        seed, layer: of the random numbers; the layer's number in the whole model.
    """
    dtype, w_EH = dtype or gate_EH.dtype, w_EH.to(gate_EH.device)
    merged_EH = gate_EH.detach().float() + w_EH
    if (bits := _DROPPED_BITS.get(dtype)) is not None:
        # On the host, where every machine draws the same numbers.
        generator = torch.Generator().manual_seed(seed * 1_000_003 + layer)
        drawn_EH = torch.randint(0, 1 << bits, gate_EH.shape, generator=generator, dtype=torch.int32).to(gate_EH.device)
        # Added below the last bit that is kept: a carry rounds away from zero with the probability of the remainder.
        merged_EH = ((merged_EH.view(torch.int32) + drawn_EH) >> bits << bits).view(torch.float32)
    return torch.where(w_EH == 0, gate_EH.detach().to(dtype), merged_EH.to(dtype))
