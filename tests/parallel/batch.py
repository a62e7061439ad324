"""The fixed batch of the parallel tests, and one rank's part of it, cut without the help of `megatron_pr2.parallel.grid`.

Suffixes: B sequences, S positions, T rows of a router's input on this rank.

Every layout sees the same ragged sequences; data-parallel rank d takes every dp-th of them. What is compared between layouts is
keyed by (sequence, position), so that padding, packing and the order of micro-batches cannot matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_pr2.attach import ReplaySequence
from megatron_pr2.host.attention import zigzag_positions
from megatron_pr2.parallel import grid
from megatron_pr2.replay.micro_batch import MicroBatch
from megatron_pr2.routes.table import RouteTable
from tests.helpers.ids import random_ids

VOCABULARY, PROMPT, PADDING = 64, 3, -1

# Ids are neither contiguous nor sorted, lengths are odd. Padding is token 1, which real sequences hold as well.
LENGTHS = {11: 9, 4: 21, 7: 5, 2: 13, 30: 17, 5: 7, 19: 11, 23: 15}
# (sequence, position) without a route: single ones, a run, the first token, and a whole sequence.
MISSING = {(4, 6), (4, 7), (2, 0), (23, 9), *((5, position) for position in range(7))}


@dataclass(frozen=True)
class Split:
    """How the sequences of a replica are cut into micro-batches.

    Attributes:
        size: sequences per micro-batch.
        budget: rows per micro-batch instead, padding included; a greedy split.
        reverse: the last sequence comes first.
        width: padded length of every micro-batch, for dispatchers that need equal shapes; None for the longest sequence's.
    """

    size: int = 1
    budget: int | None = None
    reverse: bool = False
    width: int | None = None


ONE = Split()


@dataclass(frozen=True)
class Place:
    """Where a rank stands, as far as tokens are concerned."""

    dp: int = 1
    dp_rank: int = 0
    cp: int = 1
    cp_rank: int = 0
    tp: int = 1
    tp_rank: int = 0

    @property
    def multiple(self) -> int:
        """What every padded length is a multiple of: two zigzag chunks per context rank, sequence parallelism on the rest."""
        return 1 if self.cp == self.tp == 1 else 2 * self.cp * self.tp

    def up(self, length: int) -> int:
        return -(-length // self.multiple) * self.multiple


def tokens(sequence: int) -> Tensor:
    """Token ids of one sequence."""
    return torch.from_numpy(np.random.default_rng([1, sequence]).integers(0, VOCABULARY, LENGTHS[sequence]))


def advantage(sequence: int) -> float:
    """Of every token of one response."""
    return float(np.random.default_rng([2, sequence]).standard_normal())


def table(sequence: int, layers: int, topk: int, experts: int) -> RouteTable:
    """Random routes of one sequence; the last token and those of MISSING have none."""
    ids = random_ids(LENGTHS[sequence], layers, topk, experts, seed=sequence)
    ids[[LENGTHS[sequence] - 1, *(p for s, p in MISSING if s == sequence)]] = -1
    return RouteTable.from_ids(ids, experts)


def replay_sequence(sequence: int, routes: RouteTable | None) -> ReplaySequence:
    """What begin_rollout takes."""
    length = LENGTHS[sequence]
    return ReplaySequence(sequence, length, PROMPT - 1, length - 1, routes)


def split(split: Split, place: Place, packed: bool, *, equal: bool, divisor: int = 1) -> list[list[int]]:
    """Sequence ids of every micro-batch of this rank's replica.

    Args:
        equal: all replicas need the same number of micro-batches (experts are exchanged between them).
        divisor: that the number of micro-batches must divide by (interleaved schedules: the pipeline size).
    """
    cuts = [_cut(list(LENGTHS)[rank :: place.dp], split, place, packed) for rank in range(place.dp)]
    mine = cuts[place.dp_rank]
    wanted = max(map(len, cuts)) if equal else len(mine)
    wanted = -(-wanted // divisor) * divisor
    while len(mine) < wanted:
        # As trainers do: the largest micro-batch that can be halved.
        largest = max((group for group in mine if len(group) > 1), key=lambda group: sum(LENGTHS[s] for s in group))
        at = mine.index(largest)
        mine[at : at + 1] = [largest[:1], largest[1:]]
    return mine


def _cut(sequences: list[int], split: Split, place: Place, packed: bool) -> list[list[int]]:
    if split.reverse:
        sequences = sequences[::-1]
    if split.budget is None:
        return [sequences[at : at + split.size] for at in range(0, len(sequences), split.size)]
    groups: list[list[int]] = []
    for sequence in sequences:
        if groups and _rows([*groups[-1], sequence], place, packed) <= split.budget:
            groups[-1].append(sequence)
        else:
            groups.append([sequence])
    return groups


def _rows(sequences: Sequence[int], place: Place, packed: bool) -> int:
    lengths = [place.up(LENGTHS[s]) for s in sequences]
    return sum(lengths) if packed else max(lengths) * len(lengths)


def micro_batch(key: Any, sequences: Sequence[int], split: Split, place: Place, packed: bool) -> dict[str, Any]:
    """One micro-batch: the model's inputs on this rank, what the loss needs, and which token each router row holds.

    Returns:
        tokens, labels, position_ids [B, S] int64; mask, advantages [B, S] float32; sequence, position [B, S] int64 (-1 for
        padding); packed_seq_params; rows [T, 2] int64, (sequence, position) of every row of this rank's routers; micro_batch.
    """
    lengths = [LENGTHS[s] for s in sequences]
    slots = [place.up(length) for length in lengths]
    if not packed:
        slots = [place.up(split.width or max(slots))] * len(slots)
    columns = [_column(s, slot) for s, slot in zip(sequences, slots, strict=True)]
    here = [zigzag_positions(slot // place.cp, place.cp, place.cp_rank) for slot in slots]
    cut = [{name: value[at] for name, value in column.items()} for column, at in zip(columns, here, strict=True)]
    join = (lambda parts: torch.cat(parts)[None]) if packed else torch.stack
    item: dict[str, Any] = {name: join([column[name] for column in cut]) for name in cut[0]}
    item["packed_seq_params"] = _boundaries(lengths, slots) if packed else None
    # The router's rows: positions first, then sequences; sequence parallelism takes a contiguous share of the positions.
    rows_SB2 = torch.stack([item["sequence"], item["position"]], dim=-1).transpose(0, 1)
    item["rows"] = rows_SB2.chunk(place.tp)[place.tp_rank].reshape(-1, 2)
    rows = grid.packed(sequences, lengths, slots) if packed else grid.padded(sequences, lengths, slots[0])
    item["micro_batch"] = MicroBatch(key, rows)
    return item


def _column(sequence: int, slot: int) -> dict[str, Tensor]:
    """One padded sequence, before any rank's share is cut from it."""
    length = LENGTHS[sequence]
    ids = torch.ones(slot, dtype=torch.int64)
    ids[:length] = tokens(sequence)
    position = torch.arange(slot)
    real, bears = position < length, (position >= PROMPT - 1) & (position < length - 1)
    return {
        "tokens": ids,
        "labels": ids.roll(-1),
        "position_ids": position,
        "mask": bears.float(),
        "advantages": bears.float() * advantage(sequence),
        "sequence": torch.where(real, sequence, PADDING),
        "position": torch.where(real, position, PADDING),
    }


def _boundaries(lengths: list[int], slots: list[int]) -> PackedSeqParams:
    def starts(sizes: list[int]) -> Tensor:
        return torch.tensor([0, *sizes]).cumsum(0).int()

    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=starts(lengths),
        cu_seqlens_kv=starts(lengths),
        cu_seqlens_q_padded=starts(slots),
        cu_seqlens_kv_padded=starts(slots),
        # Of one sequence: with the sum of several, Megatron-Core would let rotary positions run on across them.
        max_seqlen_q=max(slots),
        max_seqlen_kv=max(slots),
    )
