"""RouteStore: the routes of one rollout batch, wherever they come from, as slices for the micro-batches of this rank.

A slice is made once per micro-batch and kept until the next rollout: a training pass that cuts its micro-batches as the log-prob
pass did replays without moving anything again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_pr2.errors import ReplayError
from megatron_pr2.parallel.grid import TokenGrid
from megatron_pr2.parallel.replica import Replica
from megatron_pr2.parallel.tokens import TokenIndex
from megatron_pr2.routes.scatter import RouteSlice, scatter_tables, slice_all
from megatron_pr2.routes.table import RouteTable, file_rows

BoolArray = npt.NDArray[np.bool_]


class RouteStore:
    """Routes of the sequences that this replica trains on.

    Attributes:
        valid: which tokens have a route, by flat token index; the same on every rank of the replica.
        received_bytes: route bytes that came from other ranks since begin().
    """

    def __init__(
        self, replica: Replica, num_columns: int, topk: int, num_experts: int, device: torch.device, *, scatter: bool
    ) -> None:
        """Args:
        num_columns: MoE layers of the whole model.
        scatter: the owner's tables are sent; otherwise every rank slices its own.
        """
        self._replica, self._num_columns, self._topk, self._experts = replica, num_columns, topk, num_experts
        self._device, self._scatter = device, scatter
        self.begin(TokenIndex({}), {}, np.zeros(0, dtype=bool))

    @property
    def is_owner(self) -> bool:
        """Whether this rank has to be given the tables."""
        return not self._scatter or self._replica.ranks.me == self._replica.ranks.owner

    @property
    def table_bytes(self) -> int:
        """Bytes of the tables held by this rank."""
        return sum(table.nbytes for table in self._tables.values())

    def tables(self) -> Mapping[int, RouteTable]:
        """Tables per sequence: an engine's where it is owned, recorded ones with this stage's layers.

        Collective over the tensor and context parallel ranks.
        """
        self._gather_recorded()
        return self._tables

    def begin(self, tokens: TokenIndex, tables: Mapping[int, RouteTable], valid: BoolArray) -> None:
        """Takes the routes of a new rollout batch and forgets the last one's.

        Args:
            tables: per sequence, on ranks that own them.
            valid: per flat token index.
        """
        self._tokens, self._tables, self.valid = tokens, dict(tables), valid
        self._slices: dict[bytes, RouteSlice] = {}
        self._recorded: list[tuple[TokenGrid, Tensor]] = []
        self._gathered = True
        self.received_bytes = 0

    def slices(self, grids: Sequence[TokenGrid]) -> list[tuple[RouteSlice, BoolArray]]:
        """Per whole micro-batch the routes of this rank's rows, and which rows [T] have one; collective over the replica.

        Every rank of the replica asks for the same micro-batches in the same order.

        Raises:
            ReplayError: a micro-batch holds tokens of sequences that begin() was not given.
        """
        for grid in grids:
            self._require_known(grid)
        wanted = {grid.fingerprint: grid for grid in grids}
        missing = {key: grid for key, grid in wanted.items() if key not in self._slices}
        if missing:
            self._gather_recorded()
            deliver = scatter_tables if self._scatter else slice_all
            made = deliver(
                self._replica.ranks, list(missing.values()), self._tables, self._topk, self._experts, self._device
            )
            self._slices.update(zip(missing, made, strict=True))
            self.received_bytes += sum(each.received_bytes for each in made)
        return [(self._slices[grid.fingerprint], self._valid_rows(grid)) for grid in grids]

    def _valid_rows(self, grid: TokenGrid) -> BoolArray:
        index = self._tokens.of_grid(self._replica.ranks.rows(grid))
        return np.where(index >= 0, self.valid[index], False) if len(self.valid) else index >= 0

    def record(self, grid: TokenGrid, ids_TLK: Tensor) -> None:
        """Keeps what this rank's routers chose for a micro-batch, as its slice."""
        self._slices[grid.fingerprint] = RouteSlice(ids_TLK)
        self._recorded.append((grid, ids_TLK))
        self._gathered = False

    def mark_recorded(self, grids: Sequence[TokenGrid]) -> None:
        """After a recorded pass: its tokens have routes, also where a pipeline stage recorded none."""
        for grid in grids:
            index = self._tokens.of_grid(grid)
            self.valid[index[index >= 0]] = True

    def _gather_recorded(self) -> None:
        """Tables of this stage's layers from what its ranks recorded: another cut may give this rank tokens of another one.

        Collective over the tensor and context parallel ranks: each of them comes here with the same micro-batches.
        """
        if self._gathered:
            return
        group = self._replica.tp_cp
        places = [[group.rows(grid, member).real() for grid, _ in self._recorded] for member in range(group.size)]
        own = zip(places[group.me], self._recorded, strict=True)
        # One copy to the host, once per rollout and only if the passes are cut differently.
        mine = torch.cat([ids[torch.from_numpy(rows).to(ids.device)] for (rows, *_), (_, ids) in own])
        counts = [sum(len(rows) for rows, *_ in parts) for parts in places]
        for parts, share in zip(places, _all_gathered(mine.contiguous(), counts, group.handle), strict=True):
            _, sequence, position = (np.concatenate(each) for each in zip(*parts, strict=True))
            file_rows(
                self._tables, share.cpu().numpy(), sequence, position, columns=group.members[group.me].columns,
                lengths=self._tokens.lengths, num_columns=self._num_columns, num_experts=self._experts,
            )  # fmt: skip
        self._gathered = True

    def _require_known(self, grid: TokenGrid) -> None:
        _, sequence, position = grid.real()
        unknown = self._tokens.of(sequence, position) < 0
        if unknown.any():
            first = int(np.argmax(unknown))
            sid, at = int(sequence[first]), int(position[first])
            if sid not in self._tokens.lengths:
                raise ReplayError(f"sequence {sid} has no routes; pass it to begin_rollout() before replaying it")
            raise ReplayError(f"sequence {sid}: position {at} is outside its {self._tokens.lengths[sid]} tokens")


def _all_gathered(mine: Tensor, counts: Sequence[int], group: dist.ProcessGroup | None) -> list[Tensor]:
    """Everyone's rows; collectives want equal shapes, so shares are padded to the longest."""
    if group is None or len(counts) == 1:
        return [mine]
    longest = max(counts)
    padded = mine.new_zeros(longest, *mine.shape[1:])
    padded[: len(mine)] = mine
    parts = [torch.empty_like(padded) for _ in counts]
    # As bytes: neither gloo nor NCCL knows int16.
    dist.all_gather([part.view(torch.uint8) for part in parts], padded.view(torch.uint8), group=group)
    return [part[:count] for part, count in zip(parts, counts, strict=True)]
