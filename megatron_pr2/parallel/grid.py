"""Which token lives in which row on which rank: pure functions, one rule per kind of parallelism.

A router sees its input as rows [S, B, H], flattened row-major. A TokenGrid says for every row of that input which position of
which sequence it holds. A trainer describes the whole micro-batch (`padded` or `packed`); `cut` gives the rows of one rank by the
rules in the order in which Megatron-Core applies them: context parallelism first, sequence parallelism on what is left.
Pipeline parallelism cuts layers, not tokens: `moe_layer_indices` numbers the layers globally.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from megatron_pr2.errors import ConfigError

PADDING = -1
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TokenGrid:
    """Sequence id and position of every row of a router's input; both are -1 where the row is padding.

    Attributes:
        sequence: [S, B] int64.
        position: [S, B] int64, 0-based within the sequence (prompt first).
        padded_lengths: rows of each packed sequence, in order; None for a padded batch (one column per sequence).
    """

    sequence: IntArray
    position: IntArray
    padded_lengths: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.sequence.shape != self.position.shape or self.sequence.ndim != 2:
            raise ConfigError(
                f"TokenGrid: sequence {self.sequence.shape} and position {self.position.shape}; expected equal [S, B]"
            )
        if self.padded_lengths is not None and self.sequence.shape != (sum(self.padded_lengths), 1):
            raise ConfigError(
                f"TokenGrid: {self.sequence.shape} rows, packed sequences of {sum(self.padded_lengths)}; expected [sum, 1]"
            )

    @property
    def num_rows(self) -> int:
        """Rows of the router's input, padding included."""
        return self.sequence.size

    def rows(self) -> tuple[IntArray, IntArray]:
        """(sequence, position) of each row in the router's row order, [S * B] each."""
        return self.sequence.reshape(-1), self.position.reshape(-1)

    def real(self) -> tuple[IntArray, IntArray, IntArray]:
        """(row, sequence, position) of the rows that hold a token, ascending by row, [R] each."""
        sequence, position = self.rows()
        (row,) = np.nonzero(sequence != PADDING)
        return row, sequence[row], position[row]

    @cached_property
    def fingerprint(self) -> bytes:
        """Equal for grids that describe the same rows, cut in the same way."""
        digest = hashlib.blake2b(repr((self.sequence.shape, self.padded_lengths)).encode(), digest_size=16)
        digest.update(np.ascontiguousarray(self.sequence).tobytes())
        digest.update(np.ascontiguousarray(self.position).tobytes())
        return digest.digest()


def padded(sequence_ids: Sequence[int], lengths: Sequence[int], padded_length: int) -> TokenGrid:
    """Grid of a right-padded batch: one column per sequence.

    Raises:
        ConfigError: a sequence is longer than `padded_length`.
    """
    if lengths and max(lengths) > padded_length:
        raise ConfigError(f"padded micro-batch: longest sequence has {max(lengths)} tokens, padded_length is {padded_length}")
    position = np.arange(padded_length, dtype=np.int64)[:, None].repeat(len(sequence_ids), axis=1)
    real = position < np.asarray(lengths, dtype=np.int64)[None, :]
    sequence = np.broadcast_to(np.asarray(sequence_ids, dtype=np.int64)[None, :], position.shape)
    return TokenGrid(np.where(real, sequence, PADDING), np.where(real, position, PADDING))


def masked(sequence_ids: Sequence[int], real: npt.NDArray[np.bool_]) -> TokenGrid:
    """Grid of a batch that is padded anywhere.

    Args:
        real: [B, S], which columns of each row hold a token.
    """
    real = real.T
    sequence = np.broadcast_to(np.asarray(sequence_ids, dtype=np.int64)[None, :], real.shape)
    return TokenGrid(np.where(real, sequence, PADDING), np.where(real, real.cumsum(axis=0, dtype=np.int64) - 1, PADDING))


def packed(sequence_ids: Sequence[int], lengths: Sequence[int], padded_lengths: Sequence[int] | None = None) -> TokenGrid:
    """Grid of sequences packed one after the other on one token axis ([T, 1]), each padded to its own `padded_lengths`."""
    slots = list(lengths if padded_lengths is None else padded_lengths)
    columns = [padded([s], [n], slot) for s, n, slot in zip(sequence_ids, lengths, slots, strict=True)]
    if not columns:
        empty = np.zeros((0, 1), dtype=np.int64)
        return TokenGrid(empty, empty, ())
    return TokenGrid(
        np.concatenate([c.sequence for c in columns]), np.concatenate([c.position for c in columns]), tuple(slots)
    )


def context_parallel(grid: TokenGrid, cp_size: int, cp_rank: int) -> TokenGrid:
    """Rows that one context-parallel rank holds: of every padded sequence chunks r and 2 * cp - 1 - r of 2 * cp (zigzag).

    Raises:
        ConfigError: a padded length is not a multiple of 2 * cp_size.
    """
    if cp_size == 1:
        return grid
    lengths = grid.sequence.shape[:1] if grid.padded_lengths is None else grid.padded_lengths
    parts, start = [np.zeros(0, dtype=np.int64)], 0
    for length in lengths:
        if length % (2 * cp_size):
            raise ConfigError(
                f"context parallelism: padded length {length} is not a multiple of 2 * context_parallel_size = {2 * cp_size}"
            )
        chunks = np.arange(start, start + length).reshape(2 * cp_size, length // (2 * cp_size))
        parts += [chunks[cp_rank], chunks[2 * cp_size - 1 - cp_rank]]
        start += length
    index = np.concatenate(parts)
    shares = None if grid.padded_lengths is None else tuple(length // cp_size for length in lengths)
    return TokenGrid(grid.sequence[index], grid.position[index], shares)


def sequence_parallel(grid: TokenGrid, tp_size: int, tp_rank: int) -> TokenGrid:
    """Contiguous share of the token axis that one tensor-parallel rank holds under sequence parallelism.

    Raises:
        ConfigError: the token axis is not a multiple of tp_size.
    """
    if tp_size == 1:
        return grid
    length = grid.sequence.shape[0]
    if length % tp_size:
        raise ConfigError(f"sequence parallelism: {length} rows are not a multiple of tensor_model_parallel_size = {tp_size}")
    share = slice(tp_rank * length // tp_size, (tp_rank + 1) * length // tp_size)
    return TokenGrid(grid.sequence[share], grid.position[share])


def cut(grid: TokenGrid, *, cp_size: int, cp_rank: int, tp_size: int, tp_rank: int) -> TokenGrid:
    """The rows of a whole micro-batch that the routers of one rank see.

    Args:
        tp_size, tp_rank: of sequence parallelism; 1 and 0 where it is off, since then every tensor-parallel rank sees all rows.

    Raises:
        ConfigError: a length is not a multiple of what cuts it.
    """
    return sequence_parallel(context_parallel(grid, cp_size, cp_rank), tp_size, tp_rank)


def moe_layer_indices(num_layers: int, moe_layer_freq: int | Sequence[int]) -> tuple[int, ...]:
    """0-based indices of the MoE layers among all decoder layers, from Megatron-Core's `moe_layer_freq`.

    Raises:
        ConfigError: a list of another length than `num_layers`.
    """
    if isinstance(moe_layer_freq, int):
        return tuple(i for i in range(num_layers) if i % moe_layer_freq == 0)
    if len(moe_layer_freq) != num_layers:
        raise ConfigError(f"moe_layer_freq has {len(moe_layer_freq)} entries, num_layers is {num_layers}; expected equal")
    return tuple(i for i, is_moe in enumerate(moe_layer_freq) if is_moe)
