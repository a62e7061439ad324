"""Which rank holds the features of which sampled token, and how they follow a token that moves.

The rows of a rank depend on how a micro-batch is cut: under sequence parallelism on all of its sequences, under context parallelism
on their padded lengths. A training pass that splits micro-batches otherwise than the log-prob pass may compute a token on another
rank of the group that shares its layers (tensor x context parallel, context only without sequence parallelism) than the one that
kept its features. All ranks know the whole micro-batches, hence who holds and who needs what, and send only that; where nothing
moves nothing is communicated.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_pr2.drift.features import FeatureStore, Segment
from megatron_pr2.parallel.grid import IntArray, TokenGrid
from megatron_pr2.parallel.replica import RankGroup
from megatron_pr2.parallel.tokens import TokenIndex, spread_order

logger = logging.getLogger(__name__)


class FeaturePlan:
    """The sampled tokens of a rollout batch and where their features are; the same on every rank of the group.

    Attributes:
        sampled: which tokens are sampled, by flat token index.
        dropped_sequences: left out because of the byte budget.
        moved_tokens: features that came from other ranks since begin().
    """

    def __init__(
        self, store: FeatureStore, tp_cp: RankGroup, *, budget_bytes: int, most_layers: int, device: torch.device
    ) -> None:
        """Args:
        budget_bytes: of the features on one rank.
        most_layers: MoE layers of the replica's fullest stage, by which all of its stages drop the same sequences.
        device: where the group's backend communicates.
        """
        self._per_token = store.bytes_of(most_layers)
        self._store, self._tp_cp, self._budget, self._device = store, tp_cp, budget_bytes, device
        self._warned = False
        self.begin(TokenIndex({}), np.zeros(0, dtype=bool))

    @property
    def sampled_tokens(self) -> int:
        """Tokens whose features this rank keeps."""
        return sum(len(segment.tokens) for segment in self._store.segments)

    def begin(self, tokens: TokenIndex, sampled: npt.NDArray[np.bool_]) -> None:
        """Forgets the last rollout batch."""
        self._tokens, self.sampled = tokens, sampled
        self._holder = np.full(tokens.total, -1, dtype=np.int32)
        self._load = np.zeros(self._tp_cp.size, dtype=np.int64)
        self._dropped: set[int] = set()
        self._seen: set[bytes] = set()
        # What the last log-prob pass keeps, per member.
        self._newest: list[IntArray] = []
        self.moved_tokens = 0
        self._store.begin(tokens.total)

    @property
    def dropped_sequences(self) -> int:
        return len(self._dropped)

    def restore(self, sampled: npt.NDArray[np.bool_], held: IntArray, members: IntArray | None) -> Segment:
        """After begin_rollout: room for features of a checkpoint.

        Args:
            sampled: which tokens were sampled, by flat token index.
            held: of these, the ones that the checkpoint has features of, ascending; the same on every rank of the group.
            members: of the group, who gets each of them; None, or more than a rank's budget for one, spreads them evenly.

        Returns:
            This rank's share, to be filled.
        """
        self.begin(self._tokens, sampled)
        room = self._budget // self._per_token
        if members is None or (np.bincount(members, minlength=1) > room).any():
            if len(held) > room * self._tp_cp.size:
                # Whole sequences: the one with which the room ends, and all after it.
                ids = list(self._tokens.lengths)
                order = spread_order(ids)
                counts = np.bincount(self._tokens.sequence_of(held), minlength=len(ids))[order]
                for place in order[np.cumsum(counts) > room * self._tp_cp.size].tolist():
                    self._dropped.add(ids[place])
                    self.sampled[self._tokens.span(ids[place])] = False
                held = held[self.sampled[held]]
            members = np.arange(len(held)) * self._tp_cp.size // max(1, len(held))
        self._holder[held] = members
        self._load += np.bincount(members, minlength=self._tp_cp.size)
        return self._store.add(held[members == self._tp_cp.me])

    def make_room(self, grids: Sequence[TokenGrid]) -> None:
        """Before a log-prob pass: room for the sampled tokens that this rank will compute.

        Whole sequences are dropped where any rank of the group would exceed its budget; which ones has nothing to do with their
        order, or the predictor would see the first mini-steps only.
        """
        fresh = [grid for grid in grids if grid.fingerprint not in self._seen]
        wanted = [self._wanted(fresh, member) for member in range(self._tp_cp.size)]
        holders = [self._holder[tokens] for tokens in wanted]
        # A pass over the same tokens under another cut: features stay where the first pass left them.
        elsewhere = any(((holder >= 0) & (holder != member)).any() for member, holder in enumerate(holders))
        wanted = [tokens[holder < 0] for tokens, holder in zip(wanted, holders, strict=True)]
        counts = np.zeros((self._tp_cp.size, len(self._tokens.lengths)), dtype=np.int64)
        for member, tokens in enumerate(wanted):
            np.add.at(counts[member], self._tokens.sequence_of(tokens), 1)
        room = self._budget // self._per_token
        ids = list(self._tokens.lengths)
        for place in spread_order(ids).tolist():
            sequence = ids[place]
            if not counts[:, place].any():
                continue
            if (self._load + counts[:, place] > room).any():
                self._dropped.add(sequence)
                self.sampled[self._tokens.span(sequence)] = False
            else:
                self._load += counts[:, place]
        if self._dropped and not self._warned:
            self._warned = True
            logger.warning(
                "feature_bytes=%d has room for %d of the %d sequences whose router inputs should be kept; lower sample_fraction "
                "(megatron-pr2 plan says what fits), or raise feature_bytes",
                self._budget, len(ids) - len(self._dropped), len(ids),
            )  # fmt: skip
        self._newest = [tokens[self.sampled[tokens]] for tokens in wanted]
        # First what can fail for lack of memory.
        self._store.add(self._newest[self._tp_cp.me])
        for member, tokens in enumerate(self._newest):
            self._holder[tokens] = member
        if not elsewhere:
            self._seen.update(grid.fingerprint for grid in grids)

    def forget_last(self) -> None:
        """After a log-prob pass that failed on the whole group: its features are nowhere, and their room is free again."""
        for member, tokens in enumerate(self._newest):
            self._holder[tokens] = -1
            self._load[member] -= len(tokens)
        self._newest = []
        self._store.remove_last()
        self._seen.clear()

    def absent(self, tokens_T: IntArray) -> int:
        """Sampled tokens among a micro-batch's rows whose features no log-prob pass kept."""
        own = tokens_T[tokens_T >= 0]
        return int((self.sampled[own] & ~self._store.holds(own)).sum())

    def bring(self, grids: Sequence[TokenGrid]) -> bool:
        """Before a training pass: fetches the features of tokens that this rank computes and another one holds.

        Collective over the group. What it fetched is the store's last segment and has to be removed after the pass.

        Returns:
            Whether there is such a segment.
        """
        if self._tp_cp.size == 1 or all(grid.fingerprint in self._seen for grid in grids):
            return False
        sends: list[list[IntArray]] = [[] for _ in range(self._tp_cp.size)]
        for receiver in range(self._tp_cp.size):
            needed = self._wanted(grids, receiver)
            holder = self._holder[needed]
            for sender in range(self._tp_cp.size):
                moving = needed[holder == sender] if sender != receiver else needed[:0]
                sends[sender].append(moving)
        if not any(len(moving) for row in sends for moving in row):
            return False
        self._exchange(sends)
        return True

    def _wanted(self, grids: Sequence[TokenGrid], member: int) -> IntArray:
        """The sampled tokens that a member computes, ascending."""
        parts = [self._tokens.of_grid(self._tp_cp.rows(grid, member)) for grid in grids]
        tokens = np.unique(np.concatenate(parts)) if parts else np.zeros(0, dtype=np.int64)
        tokens = tokens[tokens >= 0]
        return tokens[self.sampled[tokens]]

    def _exchange(self, sends: list[list[IntArray]]) -> None:
        me = self._tp_cp.me
        outgoing = sends[me]
        incoming = [sends[sender][me] for sender in range(self._tp_cp.size)]
        arriving = np.concatenate(incoming)
        where = self._store.locate(np.concatenate(outgoing), self._device)
        back = torch.argsort(where.rows)
        segment = self._store.add(np.sort(arriving))
        slots = torch.from_numpy(np.searchsorted(segment.tokens, arriving)).to(self._store.device, non_blocking=True)
        splits = [len(part) for part in incoming], [len(part) for part in outgoing]
        # Layer by layer, so that what is under way stays small.
        try:
            for layer in range(len(segment.h_LSH)):
                h, p = self._store.read(layer, where, self._device)
                for source, target in ((h, segment.h_LSH[layer]), (p, segment.p_LSE[layer])):
                    if not source.shape[1]:
                        continue
                    received = _moved(source.index_select(0, back), *splits, self._tp_cp.handle)
                    target.index_copy_(0, slots, received.to(target.device))
        except BaseException:
            # Half of them would be learned from as zeros.
            self._store.remove_last()
            raise
        self.moved_tokens += len(arriving)


def _moved(rows: Tensor, incoming: list[int], outgoing: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """All-to-all of rows as bytes: not every backend knows every dtype."""
    sent = rows.contiguous().view(torch.uint8)
    received = torch.empty(sum(incoming), sent.shape[1], dtype=torch.uint8, device=rows.device)
    dist.all_to_all_single(received, sent, incoming, outgoing, group=group)
    return received.view(rows.dtype)
