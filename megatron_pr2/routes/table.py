"""RouteTable: the experts that every token of one sequence took, in every MoE layer.

Shape suffixes (legend in docs/design.md): T tokens, L MoE layers, K top-k, E experts; N rows of ids, R tokens of several sequences.

Scope: one table per sequence, in host memory, as compact as the ids allow (design decision 6). Row ``t`` belongs to *input*
token ``t``. The last sampled token was never an input, so an engine returns one row fewer than there are tokens; that row is
present here and marked invalid. A row that is not valid is never replayed: its token falls back to the current router (design
decision 5).

Tables travel without copies: pickle protocol 5 takes the arrays out of band (Ray's object store keeps them that way and hands out
views), and `encode_into` / `decode` write to and read from a buffer in place (shared memory, a file's mapping). Arrays that come
back so are read-only; nothing in this package writes to a table that it was given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from megatron_pr2.errors import RouteError

if TYPE_CHECKING:
    from typing_extensions import Buffer

# tokens, layers, top-k, experts, bytes per id
_HEADER_BYTES = 5 * 4
# Rows per piece of a check hold about so many ids: the piece and what is made of it stay in the cache.
_PIECE_IDS = 64 << 10


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
    """Which rows a router can take as they are, [T]: every id in [0, E) and, in every layer, K different ids."""
    valid: npt.NDArray[np.bool_] = np.asarray(((experts_TLK >= 0) & (experts_TLK < num_experts)).all(axis=(1, 2)))
    tokens, layers, topk = experts_TLK.shape
    if topk > 1:
        valid &= all_distinct(experts_TLK.reshape(-1, topk)).reshape(tokens, layers).all(axis=1)
    return valid


def row_validity(experts_TLK: npt.NDArray[np.integer], num_experts: int) -> npt.NDArray[np.bool_]:
    """Which rows of an engine's ids are routes that it took: those that can be replayed, in layers that it filled.

    With K > 1 an all-zero layer is a row of duplicates. With K = 1 zero may be a real choice; a layer that sends *every* token
    of at least 32 to expert 0 while another layer does not is taken for a layer that the engine did not fill. Rows that cannot
    be replayed anyway (the last token's, an engine's gaps) do not count as tokens here.

    Args:
        experts_TLK: [T, L, K] integer ids, any signed or unsigned dtype.
        num_experts: E.

    Returns:
        [T] bool.
    """
    _, layers, topk = experts_TLK.shape
    valid = replayable(experts_TLK, num_experts)
    if topk == 1 and num_experts > 1 and layers > 1 and np.count_nonzero(valid) >= 32:
        zero_layers = (experts_TLK[valid] == 0).all(axis=(0, 2))
        if zero_layers.any() and not zero_layers.all():
            return np.zeros_like(valid)
    return valid


def file_rows(
    tables: dict[int, RouteTable],
    ids_RLK: npt.NDArray[np.integer],
    sequence_R: npt.NDArray[np.int64],
    position_R: npt.NDArray[np.int64],
    *,
    columns: Sequence[int],
    lengths: Mapping[int, int],
    num_columns: int,
    num_experts: int,
) -> None:
    """Files the ids that some layers took for some tokens, and marks the tokens valid; tables that are absent are made.

    Args:
        tables: per sequence id, changed in place.
        columns: the layers, as indices on the L axis of the tables.
        lengths: tokens per sequence id.
        num_columns: L of the tables.
    """
    for sid in np.unique(sequence_R).tolist():
        here = sequence_R == sid
        if sid not in tables:
            tables[sid] = RouteTable.missing(lengths[sid], num_columns, ids_RLK.shape[2], num_experts)
        tables[sid].experts[np.ix_(position_R[here], np.asarray(columns, dtype=np.int64))] = ids_RLK[here]
        tables[sid].valid[position_R[here]] = True


@dataclass(frozen=True)
class RouteTable:
    """Routes of one sequence.

    Attributes:
        experts: [T, L, K] uint8 or uint16, ids in the order of the engine's top-k. Rows that are not valid hold zeros.
        valid: [T] bool; False where the token falls back to the current router.
        num_experts: E, for checks on the way.
    """

    experts: npt.NDArray[np.unsignedinteger]
    valid: npt.NDArray[np.bool_]
    num_experts: int

    def __post_init__(self) -> None:
        if self.experts.ndim != 3 or self.valid.shape != self.experts.shape[:1]:
            raise RouteError(
                f"RouteTable: experts {self.experts.shape} and valid {self.valid.shape}; expected [T, L, K] and [T]"
            )
        if self.experts.dtype != expert_dtype(self.num_experts):
            raise RouteError(
                f"RouteTable: experts are {self.experts.dtype}; {self.num_experts} experts need {expert_dtype(self.num_experts)}"
            )
        if self.valid.dtype != np.bool_:
            raise RouteError(f"RouteTable: valid is {self.valid.dtype}; expected bool")

    @property
    def num_tokens(self) -> int:
        return self.experts.shape[0]

    @property
    def num_layers(self) -> int:
        return self.experts.shape[1]

    @property
    def topk(self) -> int:
        return self.experts.shape[2]

    @property
    def num_missing(self) -> int:
        """Rows that fall back to the current router, the last sampled token included."""
        return int(self.valid.size - np.count_nonzero(self.valid))

    @property
    def nbytes(self) -> int:
        """Bytes on the wire: ids plus one validity bit per token."""
        return self.experts.nbytes + (self.num_tokens + 7) // 8

    @classmethod
    def from_ids(cls, ids_TLK: npt.NDArray[np.integer], num_experts: int) -> RouteTable:
        """Validates and compacts ids of the MoE layers; invalid rows are marked and zeroed, never replayed.

        Args:
            ids_TLK: [T, L, K] integer ids, one row per token.
            num_experts: E.
        """
        if ids_TLK.ndim != 3 or not np.issubdtype(ids_TLK.dtype, np.integer):
            raise RouteError(f"routes: got {ids_TLK.dtype}{list(ids_TLK.shape)}; expected integers [tokens, moe_layers, topk]")
        valid = row_validity(ids_TLK, num_experts)
        experts = np.zeros(ids_TLK.shape, dtype=expert_dtype(num_experts))
        experts[valid] = ids_TLK[valid]
        return cls(experts, valid, num_experts)

    @classmethod
    def from_engine(
        cls,
        rows: npt.NDArray[np.integer],
        *,
        num_tokens: int,
        moe_layers: Sequence[int],
        num_hidden_layers: int,
        topk: int,
        num_experts: int,
        where: str = "response",
    ) -> RouteTable:
        """Table from what a rollout engine returned for all hidden layers and every input token.

        Args:
            rows: [num_tokens - 1, num_hidden_layers, K] integers; row i belongs to input token i.
            num_tokens: prompt + generated tokens.
            moe_layers: 0-based indices of the MoE layers among the hidden layers, ascending.
            num_hidden_layers: hidden layers of the model, dense ones included.
            topk: K.
            num_experts: E.
            where: named in the error.

        Raises:
            RouteError: a wrong number of rows, layers or ids per row.
        """
        expected = (num_tokens - 1, num_hidden_layers, topk)
        if rows.shape != expected:
            raise RouteError(
                f"{where}: engine returned routes of shape {list(rows.shape)}, expected {list(expected)} "
                f"(prompt+generated-1 rows, hidden layers, top-k); check that engine and actor run the same model"
            )
        taken = cls.from_ids(rows[:, np.asarray(moe_layers, dtype=np.int64), :], num_experts)
        table = cls.missing(num_tokens, len(moe_layers), topk, num_experts)
        table.experts[:-1], table.valid[:-1] = taken.experts, taken.valid
        return table

    @classmethod
    def missing(cls, num_tokens: int, num_layers: int, topk: int, num_experts: int) -> RouteTable:
        """A table without a single valid row."""
        return cls(
            np.zeros((num_tokens, num_layers, topk), dtype=expert_dtype(num_experts)),
            np.zeros(num_tokens, dtype=bool),
            num_experts,
        )

    @property
    def encoded_size(self) -> int:
        """Bytes that :meth:`encode_into` writes."""
        return _HEADER_BYTES + self.nbytes

    def encode(self) -> bytes:
        """Compact, self-describing bytes (little-endian header of five uint32, ids, packed validity bits)."""
        return b"".join(part.data for part in self._wire_parts())

    def encode_into(self, buffer: Buffer) -> int:
        """Writes what :meth:`encode` returns to the start of a buffer; ids that are contiguous go straight to their place.

        Args:
            buffer: writable and contiguous, at least `encoded_size` bytes, e.g. `multiprocessing.shared_memory.SharedMemory.buf`.

        Returns:
            `encoded_size`; the rest of the buffer is left alone.

        Raises:
            RouteError: the buffer is too small, or cannot be written to.
        """
        out = _as_bytes(buffer, "encode_into")
        if not out.flags.writeable or len(out) < self.encoded_size:
            raise RouteError(
                f"encode_into: got a {'writable' if out.flags.writeable else 'read-only'} buffer of {len(out)} bytes; "
                f"expected a writable one of at least encoded_size={self.encoded_size}"
            )
        start = 0
        for part in self._wire_parts():
            out[start : start + part.nbytes] = part
            start += part.nbytes
        return start

    @classmethod
    def decode(cls, payload: Buffer) -> RouteTable:
        """Inverse of :meth:`encode`, without a copy of the ids: they are a read-only view into `payload` and keep it alive.

        Args:
            payload: any contiguous buffer of exactly the encoded bytes; cut larger ones, as in `shm.buf[:size]`.

        Raises:
            RouteError: the payload is truncated, too long or contradicts its own header, or a row that it marks as valid cannot be
                replayed.
        """
        data = _as_bytes(payload, "route payload")
        if len(data) < _HEADER_BYTES:
            raise RouteError(f"route payload of {len(data)} bytes is shorter than its {_HEADER_BYTES}-byte header")
        tokens, layers, topk, num_experts, itemsize = data[:_HEADER_BYTES].view("<u4").tolist()
        dtype = expert_dtype(num_experts)
        ids_end = _HEADER_BYTES + tokens * layers * topk * dtype.itemsize
        size = ids_end + (tokens + 7) // 8
        if itemsize != dtype.itemsize or len(data) != size:
            raise RouteError(
                f"route payload of {len(data)} bytes does not match its header: "
                f"[{tokens}, {layers}, {topk}] of {num_experts} experts needs {size} bytes"
            )
        ids = data[_HEADER_BYTES:ids_end].view(_little_endian(dtype)).astype(dtype, copy=False)
        ids.flags.writeable = False
        valid = np.unpackbits(data[ids_end:], count=tokens).view(np.bool_)
        table = cls(ids.reshape(tokens, layers, topk), valid, num_experts)
        # In pieces: the check needs as much memory for 32K tokens as for some hundred.
        step = max(1, _PIECE_IDS // max(1, layers * topk))
        for first in range(0, tokens, step):
            piece = slice(first, first + step)
            if (valid[piece] & ~replayable(table.experts[piece], num_experts)).any():
                raise RouteError("route payload marks rows as valid that hold duplicate or out-of-range expert ids")
        return table

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        # Only contiguous arrays that are no subclass (np.memmap is one) leave the stream; what is neither is copied once.
        arrays = (np.ascontiguousarray(np.asarray(each)) for each in (self.experts, self.valid))
        return type(self), (*arrays, self.num_experts)

    def _wire_parts(self) -> list[npt.NDArray[np.uint8]]:
        header = np.array([*self.experts.shape, self.num_experts, self.experts.itemsize], dtype="<u4")
        ids = np.ascontiguousarray(self.experts, dtype=_little_endian(self.experts.dtype))
        return [part.reshape(-1).view(np.uint8) for part in (header, ids, np.packbits(self.valid))]


def _little_endian(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return dtype.newbyteorder("<")


def _as_bytes(buffer: Buffer, name: str) -> npt.NDArray[np.uint8]:
    """A view of the whole buffer."""
    try:
        view = memoryview(buffer)
        return np.frombuffer(view, dtype=np.uint8) if view.nbytes else np.empty(0, dtype=np.uint8)
    except (BufferError, TypeError, ValueError) as error:
        raise RouteError(f"{name}: expected a contiguous buffer of bytes: {error}") from error
