"""Overlap of two selections of experts."""

from __future__ import annotations

import torch
from torch import Tensor


def membership(ids_SK: Tensor, num_experts: int) -> Tensor:
    """[S, E] float, 1 where the expert is in the set."""
    return torch.zeros(ids_SK.shape[0], num_experts, device=ids_SK.device).scatter_(1, ids_SK.long(), 1.0)
