"""Routes from the rank that owns them to the ranks that replay them (design decision 6).

The first rank of a replica (tensor x context x pipeline parallel) owns the tables of the sequences that the replica trains on. An
all-to-all in which only the owner sends gives every other rank its own tokens x its own MoE layers x top-k in the compact dtype:
1 / (tp * cp * pp) of what a broadcast of the table moves to it. Micro-batches travel in buckets, issued when a pass is opened (or
earlier: PR2.prefetch) and awaited when their micro-batch runs, so that the transfer overlaps with the compute of the ones before.
Cutting the shares out of the tables is the work of the owner's host, before its first micro-batch.

`slice_all` is the variant without communication, for pipelines in which every rank already has the tables.

Shape suffixes: R rows that hold a token, T rows of the local grid, L local MoE layers, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_pr2.errors import ReplayError
from megatron_pr2.parallel.grid import IntArray, TokenGrid
from megatron_pr2.parallel.replica import RankGroup
from megatron_pr2.routes.ids import expert_dtype
from megatron_pr2.routes.table import RouteTable

# The owner's bytes in one collective: on 4 gloo processes 8 small ones take twice as long as one of 18 MiB.
BUCKET_BYTES = 16 << 20

CompactIds = npt.NDArray[np.unsignedinteger]


@dataclass
class RouteSlice:
    """Routes of one micro-batch's rows on this rank, received or still in flight.

    Attributes:
        received_bytes: route bytes that this rank got from another one.
    """

    _ids: Tensor | Callable[[], Tensor]
    received_bytes: int = 0

    def ids_TLK(self) -> Tensor:
        """Compact expert ids [T, L, K] on the device, uint8 or int16; zeros where the row holds no token. Waits for them once."""
        if callable(self._ids):
            self._ids = self._ids()
        return self._ids


def pack_rows(
    sequence_R: IntArray, position_R: IntArray, tables: Mapping[int, RouteTable], columns: Sequence[int], out_RLK: CompactIds
) -> None:
    """Writes the ids of tokens into `out_RLK`, from per-sequence tables, run by run: neighbours stay neighbours in most layouts.

    Args:
        columns: the L axis of the tables that are wanted.

    Raises:
        ReplayError: a sequence has no table, or one that is too short.
    """
    if not len(columns) or not len(sequence_R):
        return
    wanted: slice | list[int] = list(columns)
    if list(columns) == list(range(columns[0], columns[0] + len(columns))):
        wanted = slice(columns[0], columns[0] + len(columns))
    breaks = np.nonzero((np.diff(sequence_R) != 0) | (np.diff(position_R) != 1))[0] + 1
    starts, stops = [0, *breaks.tolist()], [*breaks.tolist(), len(sequence_R)]
    if len(starts) * 4 > len(sequence_R):
        # Rows of several sequences alternate, as in a padded batch.
        for sid in np.unique(sequence_R).tolist():
            (rows,) = np.nonzero(sequence_R == sid)
            positions = position_R[rows]
            out_RLK[rows] = _table(tables, sid, int(positions.max())).experts[:, wanted][positions]
        return
    for start, stop in zip(starts, stops, strict=True):
        first, end = int(position_R[start]), int(position_R[stop - 1])
        out_RLK[start:stop] = _table(tables, int(sequence_R[start]), end).experts[first : end + 1, wanted]


def _table(tables: Mapping[int, RouteTable], sid: int, position: int) -> RouteTable:
    table = tables.get(sid)
    if table is None:
        raise ReplayError(f"sequence {sid} has no route table on this rank; pass it to begin_rollout() before replaying it")
    if position >= table.num_tokens:
        raise ReplayError(f"sequence {sid}: position {position} is outside its route table of {table.num_tokens} tokens")
    return table


def slice_tables(
    local: TokenGrid, tables: Mapping[int, RouteTable], columns: Sequence[int], topk: int, experts: int, device: torch.device
) -> RouteSlice:
    """This rank's slice of one micro-batch from tables that it has.

    Args:
        local: this rank's rows.

    Raises:
        ReplayError: as for :func:`pack_rows`.
    """
    rows, sequence, position = local.real()
    packed = np.empty((len(rows), len(columns), topk), dtype=expert_dtype(experts))
    pack_rows(sequence, position, tables, columns, packed)
    # torch indexes with signed ids only; int16 holds every id of a uint16 table (at most 32767 experts).
    signed = packed if packed.dtype == np.uint8 else packed.view(np.int16)
    ids_RLK, rows_R = (torch.from_numpy(each).to(device, non_blocking=True) for each in (signed, rows))
    return RouteSlice(_placed(ids_RLK, rows_R, local.num_rows))


def slice_all(
    group: RankGroup, grids: Sequence[TokenGrid], tables: Mapping[int, RouteTable], topk: int, experts: int, device: torch.device
) -> list[RouteSlice]:
    """This rank's slices of whole micro-batches, without communication."""
    columns = group.members[group.me].columns
    return [slice_tables(group.rows(grid), tables, columns, topk, experts, device) for grid in grids]


def scatter_tables(
    group: RankGroup,
    grids: Sequence[TokenGrid],
    tables: Mapping[int, RouteTable] | None,
    topk: int,
    experts: int,
    device: torch.device,
) -> list[RouteSlice]:
    """This rank's slices of whole micro-batches' routes, sent by the replica's owner; collective over the replica, asynchronous.

    Args:
        group: the replica's ranks.
        grids: the whole micro-batches, the same on every rank of the replica.
        tables: per sequence; read on the owner only.
        device: where the ids are wanted, and where the group's backend communicates.

    Raises:
        ReplayError: on the owner, before the micro-batch is sent: a sequence without table, or one that is too short.
    """
    if group.size == 1 or group.handle is None:
        return slice_all(group, grids, tables or {}, topk, experts, device)
    slices: list[RouteSlice] = []
    per_token = sum(len(member.columns) for member in group.members) / (group.cp_size * group.tp_size)
    per_token *= topk * expert_dtype(experts).itemsize
    start, size = 0, 0.0
    for index, grid in enumerate(grids):
        size += grid.num_rows * per_token
        if size >= BUCKET_BYTES or index == len(grids) - 1:
            slices += _scatter_bucket(group, grids[start : index + 1], tables or {}, topk, experts, device)
            start, size = index + 1, 0.0
    return slices


def _scatter_bucket(
    group: RankGroup, grids: Sequence[TokenGrid], tables: Mapping[int, RouteTable], topk: int, experts: int, device: torch.device
) -> list[RouteSlice]:
    """One collective for some micro-batches."""
    nothing = torch.empty(0, dtype=torch.uint8, device=device)
    if group.me == group.owner:
        outgoing, sizes = _outgoing(group, grids, tables, topk, experts)
        sent = torch.from_numpy(outgoing).to(device, non_blocking=True)
        work = dist.all_to_all_single(nothing, sent, [0] * group.size, sizes, group=group.handle, async_op=True)
        # Its own share is cut while the others' are under way.
        own = slice_all(group, grids, tables, topk, experts, device)
        return [RouteSlice(partial(_sent, work, each)) for each in own]
    columns = group.members[group.me].columns
    locals_ = [group.rows(grid) for grid in grids]
    rows = [local.real()[0] for local in locals_]
    dtype = torch.uint8 if expert_dtype(experts).itemsize == 1 else torch.int16
    received = torch.empty(sum(map(len, rows)), len(columns), topk, dtype=dtype, device=device)
    flat = received.view(-1).view(torch.uint8)
    incoming = [len(flat) if i == group.owner else 0 for i in range(group.size)]
    work = dist.all_to_all_single(flat, nothing, incoming, [0] * group.size, group=group.handle, async_op=True)
    parts = received.split([len(each) for each in rows])
    # The row numbers go to the device now: in the middle of a pass such a copy may wait for all that is queued there.
    places = [torch.from_numpy(each).to(device, non_blocking=True) for each in rows]
    return [
        RouteSlice(partial(_received, work, part, each, local.num_rows), part.nbytes)
        for part, each, local in zip(parts, places, locals_, strict=True)
    ]


def _sent(work: dist.Work, own: RouteSlice) -> Tensor:
    work.wait()
    return own.ids_TLK()


def _received(work: dist.Work, ids_RLK: Tensor, rows_R: Tensor, num_rows: int) -> Tensor:
    work.wait()
    return _placed(ids_RLK, rows_R, num_rows)


def _outgoing(
    group: RankGroup, grids: Sequence[TokenGrid], tables: Mapping[int, RouteTable], topk: int, experts: int
) -> tuple[npt.NDArray[np.uint8], list[int]]:
    """What the owner sends, one member after the other, and the bytes for each."""
    dtype = expert_dtype(experts)
    # The stages of a pipeline compute the same tokens.
    shares: dict[tuple[int, int], list[tuple[IntArray, IntArray]]] = {}
    for i, member in enumerate(group.members):
        if (member.cp_rank, member.tp_rank) not in shares:
            shares[member.cp_rank, member.tp_rank] = [group.rows(grid, i).real()[1:] for grid in grids]
    tokens = [shares[member.cp_rank, member.tp_rank] for member in group.members]
    counts = [0 if i == group.owner else sum(len(sequence) for sequence, _ in tokens[i]) for i in range(group.size)]
    sizes = [
        count * len(member.columns) * topk * dtype.itemsize for count, member in zip(counts, group.members, strict=True)
    ]
    outgoing = np.empty(sum(sizes), dtype=np.uint8)
    start = 0
    for member, count, size, parts in zip(group.members, counts, sizes, tokens, strict=True):
        share = outgoing[start : start + size].view(dtype).reshape(count, len(member.columns), topk)
        start, row = start + size, 0
        for sequence, position in parts if size else ():
            pack_rows(sequence, position, tables, member.columns, share[row : row + len(sequence)])
            row += len(sequence)
    return outgoing, sizes


def _placed(ids_RLK: Tensor, rows_R: Tensor, num_rows: int) -> Tensor:
    """[T, L, K] from the ids of the rows that hold a token; zeros elsewhere."""
    if len(rows_R) == num_rows:
        return ids_RLK
    placed = ids_RLK.new_zeros(num_rows, *ids_RLK.shape[1:])
    return placed.index_copy_(0, rows_R, ids_RLK)
