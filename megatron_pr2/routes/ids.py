"""Expert ids of any source: as arrays of integers, and which rows of them are routes that can be replayed.

Shape suffixes: T tokens, L MoE layers, K top-k, N rows of ids.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_pr2.errors import RouteError


def on_host(values: Any, where: str) -> npt.NDArray[Any]:
    """Values as an array on the host, whatever a trainer has them in.

    Raises:
        RouteError: they are ragged.
    """
    if hasattr(values, "detach"):  # a tensor of any device
        values = values.detach().cpu().numpy() if not values.is_floating_point() else values.detach().cpu().float().numpy()
    try:
        return np.asarray(values)
    except (TypeError, ValueError) as error:
        raise RouteError(f"{where}: expected values of one shape: {error}") from error


def integers(ids: Any, where: str) -> npt.NDArray[np.integer]:
    """Ids as an array on the host, whatever a trainer has them in.

    Raises:
        RouteError: they are no integers, or ragged.
    """
    if isinstance(ids, list | tuple) and not ids:
        return np.zeros(0, dtype=np.int64)  # numpy makes floats of it
    array = on_host(ids, where)
    if array.dtype.kind not in "iu":
        what = f"{array.dtype}{list(array.shape)}" if array.ndim else type(ids).__name__
        raise RouteError(f"{where}: got {what}; expected integers: an array, a tensor or (nested) lists")
    return array


def expert_dtype(num_experts: int) -> np.dtype:
    """Smallest unsigned dtype that holds every expert id: uint8 up to 256 experts, else uint16.

    Raises:
        RouteError: ``num_experts`` is not in [1, 32768] (on the device ids are int16, torch cannot index with uint16).
    """
    if not 1 <= num_experts <= 1 << 15:
        raise RouteError(f"num_experts={num_experts}: expected 1..32768; route tables hold at most 15-bit expert ids")
    return np.dtype(np.uint8 if num_experts <= 1 << 8 else np.uint16)


def all_distinct(ids_NK: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
    """Which rows [N, K] hold K different ids, [N] (a repeated one collapses in a routing map), at the speed of memory.

    Bytes and 16-bit ids that fill a 32- or 64-bit word (top-8 of at most 256 experts is one) are compared within the word: against
    itself rotated by every distance, where equal ids cancel to a zero lane. Other rows are sorted.
    """
    rows, topk = ids_NK.shape
    if topk < 2:
        return np.ones(rows, dtype=bool)
    lane = ids_NK.dtype.itemsize
    if lane in (1, 2) and lane * topk in (4, 8) and ids_NK.flags.c_contiguous:
        return _distinct_lanes(ids_NK.reshape(-1).view(f"<u{lane * topk}"), 8 * lane, topk)
    ordered = np.sort(ids_NK, axis=1)
    return np.asarray((ordered[:, 1:] != ordered[:, :-1]).all(axis=1))


def _distinct_lanes(words_N: npt.NDArray[np.unsignedinteger], bits: int, lanes: int) -> npt.NDArray[np.bool_]:
    word = words_N.dtype.type
    width = bits * lanes
    low = word(sum(1 << (bits * lane) for lane in range(lanes)))
    high = word(int(low) << (bits - 1))
    repeated = np.zeros_like(words_N)
    for distance in range(1, lanes // 2 + 1):
        shift = word(bits * distance)
        difference = words_N ^ ((words_N << shift) | (words_N >> word(width - int(shift))))
        # The high bit of a lane remains where the lowest zero lane is, and none if there is no zero lane.
        repeated |= (difference - low) & ~difference & high
    return np.asarray(repeated == 0)


def replayable(experts_TLK: npt.NDArray[np.integer], num_experts: int) -> npt.NDArray[np.bool_]:
    """Which rows a router can take as they are, [T]: every id in [0, E) and, in every layer, K different ids.

    With K > 1 a layer that the engine did not fill is a row of duplicates. With K = 1 zero may be a real choice: such layers show
    over a whole rollout batch only (replay.intake).
    """
    valid: npt.NDArray[np.bool_] = np.asarray(((experts_TLK >= 0) & (experts_TLK < num_experts)).all(axis=(1, 2)))
    tokens, layers, topk = experts_TLK.shape
    if topk > 1:
        valid &= all_distinct(experts_TLK.reshape(-1, topk)).reshape(tokens, layers).all(axis=1)
    return valid
