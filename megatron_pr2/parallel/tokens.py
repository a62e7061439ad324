"""Tokens of a rollout batch as one axis: (sequence, position) to a flat index, and the sample that predictors learn from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from megatron_pr2.parallel.grid import IntArray, TokenGrid


class TokenIndex:
    """Numbers the tokens of the sequences of a rollout batch, in order; the same on every rank that trains these sequences.

    Attributes:
        lengths: tokens per sequence id.
        total: tokens of all sequences.
    """

    def __init__(self, lengths: Mapping[int, int]) -> None:
        self.lengths = dict(lengths)
        starts = np.cumsum([0, *self.lengths.values()])
        self._start = dict(zip(self.lengths, starts[:-1].tolist(), strict=True))
        self.total = int(starts[-1])
        ids = np.array(list(self.lengths), dtype=np.int64)
        order = np.argsort(ids)
        self._ids, self._starts = ids[order], starts[:-1][order]
        self._lengths = np.array(list(self.lengths.values()), dtype=np.int64)[order]

    def span(self, sequence: int) -> slice:
        """The flat indices of one sequence."""
        start = self._start[sequence]
        return slice(start, start + self.lengths[sequence])

    def of(self, sequence: IntArray, position: IntArray) -> IntArray:
        """Flat index per row, [T]; -1 for padding and for tokens that the rollout batch does not have."""
        if not len(self._ids):
            return np.full(sequence.shape, -1, dtype=np.int64)
        at = np.minimum(np.searchsorted(self._ids, sequence), len(self._ids) - 1)
        known = (self._ids[at] == sequence) & (position >= 0) & (position < self._lengths[at])
        return np.where(known, self._starts[at] + position, -1)

    def sequence_of(self, tokens: IntArray) -> IntArray:
        """Which sequence a token belongs to, counted in the order of `lengths`."""
        ends = np.cumsum(list(self.lengths.values()))
        return np.searchsorted(ends, tokens, side="right").astype(np.int64)

    def of_grid(self, grid: TokenGrid) -> IntArray:
        """Flat index of every row of a grid, in the router's row order, [T]."""
        return self.of(*grid.rows())


def sample_positions(seed: int, sequence: int, candidates: IntArray, fraction: float) -> IntArray:
    """Uniform sample without replacement of the candidate positions of one sequence, ascending.

    A function of its arguments alone, so that every rank draws the same sample. At least one position is drawn where there is one.
    """
    count = min(len(candidates), max(1, round(len(candidates) * fraction)))
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, sequence])))
    return np.sort(generator.permutation(candidates)[:count]).astype(np.int64)


def thinned_positions(seed: int, sequence: int, candidates: IntArray, share: float) -> IntArray:
    """Each candidate position of one sequence with the same chance, ascending; of a few there may be none.

    A function of its arguments alone, and independent of what :func:`sample_positions` draws from the same ones.
    """
    return candidates[_uniform(seed, sequence, 1, len(candidates)) < share]


def thinning_keys(seed: int, sequence: int, length: int) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each token of one sequence: where there is no room for all that are sampled, small ones are kept.

    A function of its arguments alone, and independent of the other two choices.
    """
    return _uniform(seed, sequence, 2, length)


def fitting_share(keys: Iterable[npt.NDArray[np.float64]], rooms: Iterable[int]) -> float:
    """The largest share of tokens that no rank lacks room for: of those whose key is below it.

    Args:
        keys: of the tokens on each rank (:func:`thinning_keys`).
        rooms: tokens that each rank has room for.
    """
    pairs = zip(keys, rooms, strict=True)
    return min((float(np.partition(each, room)[room]) for each, room in pairs if len(each) > room), default=1.0)


def _uniform(seed: int, sequence: int, purpose: int, count: int) -> npt.NDArray[np.float64]:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, sequence, purpose]))).random(count)
