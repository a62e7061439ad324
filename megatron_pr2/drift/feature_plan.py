"""Which rank holds the features of which sampled token, and how they follow a token that moves.

The rows of a rank depend on how a micro-batch is cut: under sequence parallelism on all of its sequences, under context parallelism
on their padded lengths. A training pass that splits micro-batches otherwise than the log-prob pass may compute a token on another
rank of the group that shares its layers (tensor x context parallel, context only without sequence parallelism) than the one that
kept its features. All ranks know the whole micro-batches, hence who holds and who needs what, and send only that; where nothing
moves nothing is communicated.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_pr2.drift.features import FeatureStore, Segment
from megatron_pr2.parallel.grid import IntArray, TokenGrid
from megatron_pr2.parallel.replica import RankGroup
from megatron_pr2.parallel.tokens import TokenIndex, fitting_share, thinning_keys


class FeaturePlan:
    """The sampled tokens of a rollout batch and where their features are; the same on every rank of the group.

    Attributes:
        sampled: which tokens are sampled, by flat token index.
        share: of those that could have been, as far as log-prob passes have seen them: below 1 where the byte budget has no room.
        moved_tokens: features that came from other ranks since begin().
    """

    def __init__(
        self,
        store: FeatureStore,
        tp_cp: RankGroup,
        *,
        budget_bytes: int,
        most_layers: int,
        device: torch.device,
        seed: int = 0,
        token_group: dist.ProcessGroup | None = None,
    ) -> None:
        """Args:
        budget_bytes: of the features on one rank.
        most_layers: MoE layers of the replica's fullest stage, by which all of its stages keep the same tokens.
        device: where the groups' backend communicates.
        seed: of the choice of tokens.
        token_group: the ranks that hold other tokens of the same layers, which all keep the same share.
        """
        self._room = budget_bytes // store.bytes_of(most_layers)
        self._store, self._tp_cp, self._device = store, tp_cp, device
        self._seed, self._token_group = seed, token_group
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
        self.share = 1.0
        self._seen: set[bytes] = set()
        # What the last log-prob pass keeps, per member, and what it had no room for.
        self._newest: list[IntArray] = []
        self._thinned: list[IntArray] = []
        self.moved_tokens = 0
        self._store.begin(tokens.total)

    def restore(self, sampled: npt.NDArray[np.bool_], held: IntArray, members: IntArray | None) -> Segment:
        """After begin_rollout: room for features of a checkpoint; collective over the token group.

        Args:
            sampled: which tokens were sampled, by flat token index.
            held: of these, the ones that the checkpoint has features of, ascending; the same on every rank of the group.
            members: of the group, who gets each of them; None, or more than a rank's budget for one, spreads them evenly.

        Returns:
            This rank's share, to be filled.
        """
        self.begin(self._tokens, sampled)
        self._thin([held], [self._room * self._tp_cp.size])
        fits = self.sampled[held]
        held, members = held[fits], None if members is None else members[fits]
        if members is None or (np.bincount(members, minlength=1) > self._room).any():
            members = np.arange(len(held)) * self._tp_cp.size // max(1, len(held))
        self._holder[held] = members
        self._load += np.bincount(members, minlength=self._tp_cp.size)
        return self._store.add(held[members == self._tp_cp.me])

    def make_room(self, grids: Sequence[TokenGrid]) -> None:
        """Before a log-prob pass: room for the sampled tokens that this rank will compute; collective over the token group.

        Where any rank of the group would exceed its budget, a smaller share of all tokens is sampled, the same on all ranks. Passes
        over parts of the rollout batch get parts of the budget.
        """
        fresh = [grid for grid in grids if grid.fingerprint not in self._seen]
        wanted = [self._wanted(fresh, member) for member in range(self._tp_cp.size)]
        holders = [self._holder[tokens] for tokens in wanted]
        # A pass over the same tokens under another cut: features stay where the first pass left them.
        elsewhere = any(((holder >= 0) & (holder != member)).any() for member, holder in enumerate(holders))
        wanted = [tokens[holder < 0] for tokens, holder in zip(wanted, holders, strict=True)]
        remaining = max(1, int((self.sampled & (self._holder < 0)).sum()))
        part = min(remaining, sum(map(len, wanted)))
        self.share = min(self.share, self._thin(wanted, [(self._room - int(load)) * part // remaining for load in self._load]))
        self._newest = [tokens[self.sampled[tokens]] for tokens in wanted]
        # First what can fail for lack of memory.
        self._store.add(self._newest[self._tp_cp.me])
        for member, tokens in enumerate(self._newest):
            self._holder[tokens] = member
            self._load[member] += len(tokens)
        if not elsewhere:
            self._seen.update(grid.fingerprint for grid in grids)

    def forget_last(self) -> None:
        """After a log-prob pass that failed on the whole group: its features are nowhere, and their room is free again."""
        for member, tokens in enumerate(self._newest):
            self._holder[tokens] = -1
            self._load[member] -= len(tokens)
        for tokens in self._thinned:
            self.sampled[tokens] = True
        self._newest = self._thinned = []
        self._store.remove_last()
        self._seen.clear()

    def _thin(self, tokens: list[IntArray], rooms: list[int]) -> float:
        """Takes tokens out of the sample until no rank of the token group exceeds its room; returns the share that stays.

        Args:
            tokens, rooms: sampled ones per member, and how many of them it has room for.
        """
        share, keys_N = 1.0, None
        if any(len(each) > room for each, room in zip(tokens, rooms, strict=True)):
            keys_N = self._keys()
            share = fitting_share([keys_N[each] for each in tokens], rooms)
        if self._token_group is not None and self._token_group.size() > 1:
            least = torch.tensor(share, dtype=torch.float64, device=self._device)
            dist.all_reduce(least, op=dist.ReduceOp.MIN, group=self._token_group)
            share = least.item()
        self._thinned = []
        if share < 1.0:
            keys_N = self._keys() if keys_N is None else keys_N
            self._thinned = [each[keys_N[each] >= share] for each in tokens]
            for each in self._thinned:
                self.sampled[each] = False
        return share

    def _keys(self) -> npt.NDArray[np.float64]:
        """Per token of the rollout batch, the same one on every rank."""
        parts = [thinning_keys(self._seed, sid, length) for sid, length in self._tokens.lengths.items()]
        return np.concatenate(parts) if parts else np.zeros(0)  # a rank may have no sequence

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
