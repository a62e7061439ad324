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
from megatron_pr2.routes.ids import expert_dtype, integers, replayable

if TYPE_CHECKING:
    from typing_extensions import Buffer

# tokens, layers, top-k, experts, bytes per id
_HEADER_BYTES = 5 * 4
# Rows per piece of a check hold about so many ids: the piece and what is made of it stay in the cache.
_PIECE_IDS = 64 << 10


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
        self._check_rows()

    def _check_rows(self) -> None:
        # In pieces: the check needs as much memory for 32K tokens as for some hundred.
        step = max(1, _PIECE_IDS // max(1, self.num_layers * self.topk))
        for first in range(0, self.num_tokens, step):
            piece = slice(first, first + step)
            wrong = self.valid[piece] & ~replayable(self.experts[piece], self.num_experts)
            if wrong.any():
                raise RouteError(
                    f"RouteTable: token {first + int(np.argmax(wrong))} is marked as valid, but has duplicate or out-of-range "
                    f"expert ids (top-{self.topk} of {self.num_experts}); RouteTable.from_ids and from_engine find such rows"
                )

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
    def checked(
        cls, experts: npt.NDArray[np.unsignedinteger], valid: npt.NDArray[np.bool_], num_experts: int
    ) -> RouteTable:
        """A table of arrays whose rows have been checked, as those of another table have: not read again."""
        table = object.__new__(cls)
        for name, value in (("experts", experts), ("valid", valid), ("num_experts", num_experts)):
            object.__setattr__(table, name, value)
        return table

    @classmethod
    def from_ids(cls, ids_TLK: Any, num_experts: int) -> RouteTable:
        """Validates and compacts ids of the MoE layers; invalid rows are marked and zeroed, never replayed.

        Args:
            ids_TLK: [T, L, K] integer ids, one row per token: an array, a tensor or nested lists.
            num_experts: E.
        """
        ids_TLK = integers(ids_TLK, "routes")
        if ids_TLK.ndim != 3:
            raise RouteError(f"routes: got {ids_TLK.dtype}{list(ids_TLK.shape)}; expected integers [tokens, moe_layers, topk]")
        valid = replayable(ids_TLK, num_experts)
        experts = np.zeros(ids_TLK.shape, dtype=expert_dtype(num_experts))
        experts[valid] = ids_TLK[valid]
        return cls.checked(experts, valid, num_experts)

    @classmethod
    def from_engine(
        cls,
        rows: Any,
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
            rows: [num_tokens - 1, num_hidden_layers, K] integers as an array, a tensor or nested lists; row i belongs to input
                token i.
            num_tokens: prompt + generated tokens.
            moe_layers: 0-based indices of the MoE layers among the hidden layers, ascending.
            num_hidden_layers: hidden layers of the model, dense ones included.
            topk: K.
            num_experts: E.
            where: named in the error.

        Raises:
            RouteError: a wrong number of rows, layers or ids per row, something else than integers, or layers that there are not.
        """
        rows = integers(rows, f"{where}: routes")
        if outside := [layer for layer in moe_layers if not 0 <= layer < num_hidden_layers]:
            raise RouteError(
                f"{where}: moe_layers={list(moe_layers)} of {num_hidden_layers} hidden layers; {outside} are none of them: pass "
                "pr2.layers.hidden_moe and pr2.layers.hidden_count"
            )
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
        """A table without a single valid row: every token of its sequence uses the model's own router, and counts as missing."""
        experts = np.zeros((num_tokens, num_layers, topk), dtype=expert_dtype(num_experts))
        return cls.checked(experts, np.zeros(num_tokens, dtype=bool), num_experts)

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
        try:
            return cls(ids.reshape(tokens, layers, topk), valid, num_experts)
        except RouteError as error:
            raise RouteError(f"route payload: {error}") from error

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        # Only contiguous arrays that are no subclass (np.memmap is one) leave the stream; what is neither is copied once.
        arrays = (np.ascontiguousarray(np.asarray(each)) for each in (self.experts, self.valid))
        return type(self).checked, (*arrays, self.num_experts)

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
