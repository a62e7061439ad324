"""Ridge regression of logit shifts on router inputs, from tokens that are spread over ranks.

    W = argmin sum_t |W h_t - y_t|^2 + r |W|^2,    r = ridge * mean diagonal of sum_t h_t h_t^T

The sums over tokens are all that ranks exchange, so that every parallel layout gives the W of one process. Two ways to it: the
H x H sums of a layer on one rank each, or conjugate gradients on W, which need no H x H at all.

Shape suffixes: S tokens of this rank, L local MoE layers, E experts, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

# Of a layer's H x H sums; where they are larger, conjugate gradients take so many steps.
GRAM_BYTES, ITERATIONS = 1 << 30, 32
# Tokens whose inputs are there in fp32.
_AT_ONCE = 8192


def ridge_fit(
    inputs: Sequence[Tensor],
    shifts: Sequence[Tensor],
    ridge: float,
    group: dist.ProcessGroup | None,
    *,
    gram_bytes: int = GRAM_BYTES,
    iterations: int = ITERATIONS,
) -> Tensor:
    """W [L, E, H] fp32 of every layer; collective over `group`, whose ranks hold other tokens of the same layers.

    Args:
        inputs, shifts: h [S, H] and y [S, E] of every layer, y in fp32.
        ridge: relative to the mean diagonal.
        gram_bytes: above this a layer's H x H sums are not made, and conjugate gradients take so many `iterations`.
    """
    hidden = inputs[0].shape[1]
    if 4 * hidden * hidden <= gram_bytes:
        return _direct(inputs, shifts, ridge, group)
    return _conjugate_gradients(inputs, shifts, ridge, group, iterations)


def fit_bytes(layers: int, experts: int, hidden: int) -> int:
    """What :func:`ridge_fit` holds at most besides its inputs: W of every layer, and of one its sums, these and their factors in
    float64; with conjugate gradients six tensors like W.
    """
    w, sums = layers * experts * hidden, (hidden + experts) * hidden
    return 4 * w + (4 + 8 + 8) * sums if 4 * hidden * hidden <= GRAM_BYTES else 6 * 4 * w


def reduced_bytes(layers: int, experts: int, hidden: int) -> tuple[int, int]:
    """(reduced to an owner, all-reduced) bytes of a fit."""
    w = 4 * layers * experts * hidden
    if 4 * hidden * hidden <= GRAM_BYTES:
        return 4 * layers * (hidden + experts) * hidden, w
    return 0, (ITERATIONS + 1) * w + 4 * layers


def _summed(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None and group.size() > 1:
        dist.all_reduce(value, group=group)
    return value


def _direct(inputs: Sequence[Tensor], shifts: Sequence[Tensor], ridge: float, group: dist.ProcessGroup | None) -> Tensor:
    """Each layer's normal equations are solved in float64 by one rank, and its W is sent to the others."""
    size, rank = (group.size(), group.rank()) if group is not None else (1, 0)
    experts, hidden = shifts[0].shape[1], inputs[0].shape[1]
    solutions = torch.zeros(len(inputs), experts, hidden, device=inputs[0].device)
    for layer, (h_SH, y_SE) in enumerate(zip(inputs, shifts, strict=True)):
        # Sums of h h^T, and below them those of y h^T.
        sums_RH = torch.zeros(hidden + experts, hidden, device=h_SH.device)
        for h, y in zip(h_SH.split(_AT_ONCE), y_SE.split(_AT_ONCE), strict=True):
            h = h.float()
            sums_RH[:hidden].addmm_(h.t(), h)
            sums_RH[hidden:].addmm_(y.t(), h)
        if group is not None and size > 1:
            dist.reduce(sums_RH, group=group, group_dst=layer % size)
        if rank == layer % size:
            gram_HH, cross_EH = sums_RH.double().split([hidden, experts])
            diagonal = gram_HH.diagonal()
            # Without a token everything is zero, and so is W.
            diagonal.add_(ridge * diagonal.mean() + torch.finfo(torch.float32).tiny)
            solutions[layer] = torch.linalg.solve(gram_HH, cross_EH, left=False).float()
    return _summed(solutions, group)


def _conjugate_gradients(
    inputs: Sequence[Tensor], shifts: Sequence[Tensor], ridge: float, group: dist.ProcessGroup | None, iterations: int
) -> Tensor:
    """Every row of every W is a system of its own; all take a step together, which all-reduces L x E x H."""

    def summed(parts: list[Tensor]) -> Tensor:
        return _summed(torch.stack(parts), group)

    diagonal_L = summed([h_SH.float().square().sum() / h_SH.shape[1] for h_SH in inputs])
    ridge_L11 = (ridge * diagonal_L).view(-1, 1, 1)
    residual = summed([y_SE.t() @ h_SH.float() for h_SH, y_SE in zip(inputs, shifts, strict=True)])
    solution, direction = torch.zeros_like(residual), residual.clone()
    squared = residual.square().sum(-1, keepdim=True)
    for _ in range(iterations):
        image = summed([(d_EH @ (h := h_SH.float()).t()) @ h for h_SH, d_EH in zip(inputs, direction, strict=True)])
        image += ridge_L11 * direction
        # A row that is solved, or has nothing to solve, stays.
        step = _ratio(squared, (direction * image).sum(-1, keepdim=True))
        solution += step * direction
        residual -= step * image
        before, squared = squared, residual.square().sum(-1, keepdim=True)
        direction = residual + _ratio(squared, before) * direction
    return solution


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(below > 0, above / below.clamp(min=torch.finfo(below.dtype).tiny), 0.0)
