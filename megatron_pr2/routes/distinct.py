"""Rows of expert ids without a repeated one, at the speed of memory (a repeated id collapses in a routing map)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# Shape suffixes: N rows, K ids per row.


def all_distinct(ids_NK: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
    """Which rows hold K different ids, [N].

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
