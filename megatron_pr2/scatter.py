"""Routes from the rank that owns them to the ranks that replay them (design decision 6).

The first rank of a replica (tensor x context x pipeline parallel) owns the tables of the sequences that the replica trains on. Per
micro-batch one all-to-all, in which only the owner sends, gives every other rank its own tokens x its own MoE layers x top-k in the
compact dtype: 1 / (tp * cp * pp) of what a broadcast of the table moves to it. It is issued when a pass is opened and awaited when
its micro-batch runs, so that it overlaps with the compute of the micro-batches before it.

`slice_tables` is the variant without communication, for pipelines in which every rank already has the tables.

Shape suffixes: R rows that hold a token, T rows of the local grid, L local MoE layers, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_pr2.errors import ReplayError
from megatron_pr2.layout import IntArray, TokenGrid
from megatron_pr2.replica import RankGroup
from megatron_pr2.routes import RouteTable, expert_dtype

CompactIds = npt.NDArray[np.unsignedinteger]


@dataclass
class RouteSlice:
    """Routes of one micro-batch's rows on this rank; perhaps still on their way.

    Attributes:
        received_bytes: route bytes that this rank got from another one.
    """

    _ids: Tensor | Callable[[], Tensor]
    received_bytes: int = 0

    def ids_LTK(self) -> Tensor:
        """Compact expert ids [L, T, K] on the device, uint8 or int16; zeros where the row holds no token. Waits for them once."""
        if callable(self._ids):
            self._ids = self._ids()
        return self._ids


def pack_rows(
    sequence_R: IntArray, position_R: IntArray, tables: Mapping[int, RouteTable], columns: Sequence[int], topk: int, experts: int
) -> CompactIds:
    """Ids [R, L, K] of tokens, from per-sequence tables, in the compact dtype.

    Args:
        columns: the L axis of the tables that are wanted.

    Raises:
        ReplayError: a sequence has no table, or one that is too short.
    """
    packed = np.empty((len(sequence_R), len(columns), topk), dtype=expert_dtype(experts))
    for sid in np.unique(sequence_R).tolist() if len(columns) else ():
        table = tables.get(sid)
        if table is None:
            raise ReplayError(f"sequence {sid} has no route table on this rank; pass it to begin_rollout() before replaying it")
        (rows,) = np.nonzero(sequence_R == sid)
        positions = position_R[rows]
        if positions.max(initial=0) >= table.num_tokens:
            raise ReplayError(
                f"sequence {sid}: position {positions.max()} is outside its route table of {table.num_tokens} tokens"
            )
        packed[rows] = _columns(table.experts, columns)[positions]
    return packed


def slice_tables(
    local: TokenGrid, tables: Mapping[int, RouteTable], columns: Sequence[int], topk: int, experts: int, device: torch.device
) -> RouteSlice:
    """The local variant: this rank's slice from tables that it has.

    Raises:
        ReplayError: as for :func:`pack_rows`.
    """
    rows, sequence, position = local.real()
    packed = pack_rows(sequence, position, tables, columns, topk, experts)
    return RouteSlice(_placed(torch.from_numpy(_signed(packed)).to(device, non_blocking=True), rows, local.num_rows))


def scatter_tables(
    group: RankGroup,
    grid: TokenGrid,
    tables: Mapping[int, RouteTable] | None,
    topk: int,
    experts: int,
    device: torch.device,
) -> RouteSlice:
    """This rank's slice of a whole micro-batch's routes, sent by the replica's owner; collective over the replica, asynchronous.

    Args:
        group: the replica's ranks.
        grid: the whole micro-batch, the same on every rank of the replica.
        tables: per sequence; read on the owner only.
        device: where the ids are wanted, and where the group's backend communicates.

    Raises:
        ReplayError: on the owner, before anything is sent: a sequence without table, or one that is too short.
    """
    local = group.rows(grid)
    rows, _, _ = local.real()
    columns = group.members[group.me].columns
    itemsize = expert_dtype(experts).itemsize
    if group.size == 1 or group.handle is None:
        return slice_tables(local, tables or {}, columns, topk, experts, device)
    if group.me == group.owner:
        outgoing, sizes = _outgoing(group, grid, tables or {}, topk, experts)
        own = slice_tables(local, tables or {}, columns, topk, experts, device)
        sent = torch.from_numpy(outgoing).to(device, non_blocking=True)
        nothing = torch.empty(0, dtype=torch.uint8, device=device)
        work = dist.all_to_all_single(nothing, sent, [0] * group.size, sizes, group=group.handle, async_op=True)

        def finish() -> Tensor:
            work.wait()
            return own.ids_LTK()

        return RouteSlice(finish)
    expected = len(rows) * len(columns) * topk * itemsize
    received = torch.empty(expected, dtype=torch.uint8, device=device)
    incoming = [expected if i == group.owner else 0 for i in range(group.size)]
    nothing = torch.empty(0, dtype=torch.uint8, device=device)
    work = dist.all_to_all_single(received, nothing, incoming, [0] * group.size, group=group.handle, async_op=True)

    def place() -> Tensor:
        work.wait()
        ids = received if itemsize == 1 else received.view(torch.int16)
        return _placed(ids.view(len(rows), len(columns), topk), rows, local.num_rows)

    return RouteSlice(place, expected)


def _outgoing(
    group: RankGroup, grid: TokenGrid, tables: Mapping[int, RouteTable], topk: int, experts: int
) -> tuple[npt.NDArray[np.uint8], list[int]]:
    """What the owner sends, and the bytes for each member."""
    parts: list[npt.NDArray[np.uint8]] = []
    for index, member in enumerate(group.members):
        if index == group.owner:
            parts.append(np.empty(0, dtype=np.uint8))
            continue
        _, sequence, position = group.rows(grid, index).real()
        packed = pack_rows(sequence, position, tables, member.columns, topk, experts)
        parts.append(packed.reshape(-1).view(np.uint8))
    return np.concatenate(parts), [len(part) for part in parts]


def _columns(experts_TLK: CompactIds, columns: Sequence[int]) -> CompactIds:
    """Some layers of a table; a view where they are neighbours, as a pipeline stage's are."""
    if len(columns) and list(columns) == list(range(columns[0], columns[0] + len(columns))):
        return experts_TLK[:, columns[0] : columns[0] + len(columns)]
    return experts_TLK[:, list(columns)]


def _signed(ids: CompactIds) -> npt.NDArray[np.integer]:
    """torch indexes with signed ids only; int16 holds every id of a uint16 table (at most 32767 experts)."""
    return ids if ids.dtype == np.uint8 else ids.view(np.int16)


def _placed(ids_RLK: Tensor, rows: IntArray, num_rows: int) -> Tensor:
    """[L, T, K] from the ids of the rows that hold a token."""
    ids_LRK = ids_RLK.transpose(0, 1)
    if len(rows) == num_rows:
        return ids_LRK.contiguous()
    placed = ids_RLK.new_zeros(ids_RLK.shape[1], num_rows, ids_RLK.shape[2])
    return placed.index_copy_(1, torch.from_numpy(rows).to(ids_RLK.device, non_blocking=True), ids_LRK)
