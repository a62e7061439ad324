"""Tokens of a planned rollout batch: how it is cut, what each place computes, which features it keeps and moves.

A place is a rank's context- and tensor-parallel index, numbered cp * tensor + tp. All stages of a pipeline compute the same tokens,
and replicas that train equally many sequences are identical; so one replica's places stand for every rank. Rows are cut by
`ParallelLayout.cut` and tokens sampled by `tokens.sample_positions`, as in a run whose sequences have the ids 0, 1, 2, ...

Shape suffixes: P places, B sequences of a micro-batch, N tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cache

import numpy as np
import numpy.typing as npt

from megatron_pr2.config import PR2Config
from megatron_pr2.errors import ConfigError
from megatron_pr2.parallel.grid import packed, padded
from megatron_pr2.parallel.layout import Coordinates, ParallelLayout
from megatron_pr2.parallel.tokens import sample_positions, spread_order

IntArray = npt.NDArray[np.int64]
# A micro-batch of a replica, as its first sequence and the one after its last.
Part = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A rollout batch of equally long sequences, and how it is trained on.

    Attributes:
        batch: sequences, over all data-parallel replicas.
        seq: tokens of each, prompt and response.
        prompt: of these, tokens of the prompt; features are kept of the others.
        mini_steps: kappa, policy updates per rollout batch.
        micro_batch: sequences in one forward pass of a training pass.
        log_prob_micro_batch: the same in the old-log-prob pass; None cuts it as the training passes.
        padded: one column per sequence instead of packed sequences.
    """

    batch: int = 256
    seq: int = 8192
    prompt: int = 1
    mini_steps: int = 4
    micro_batch: int = 1
    log_prob_micro_batch: int | None = None
    padded: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and value < 1 and field.name != "padded":
                raise ConfigError(f"{field.name}={value}: expected at least 1")
        if self.prompt > self.seq:
            raise ConfigError(f"prompt={self.prompt}: expected at most the {self.seq} tokens of a sequence (seq)")

    def sequences(self, dp: int, data: int) -> int:
        """Sequences of one replica; the first ones take what does not divide."""
        return self.batch // data + (dp < self.batch % data)

    def training_parts(self, count: int) -> list[list[Part]]:
        """Micro-batches of every mini-step of a replica that trains `count` sequences."""
        ends = [count * (i + 1) // self.mini_steps for i in range(self.mini_steps)]
        return [_parts(start, stop, self.micro_batch) for start, stop in zip([0, *ends], ends, strict=False)]

    def log_prob_parts(self, count: int) -> list[Part]:
        """Micro-batches of the old-log-prob pass."""
        if self.log_prob_micro_batch is None:
            return [part for parts in self.training_parts(count) for part in parts]
        return _parts(0, count, self.log_prob_micro_batch)


def _parts(start: int, stop: int, size: int) -> list[Part]:
    return [(first, min(first + size, stop)) for first in range(start, stop, size)]


@dataclass(frozen=True)
class Cut:
    """A micro-batch of so many sequences on the places of a stage.

    Attributes:
        place_BN: which place computes a token.
        tokens_P: tokens on each place.
        rows_P: rows of its routers, padding included.
    """

    place_BN: npt.NDArray[np.int32]
    tokens_P: IntArray
    rows_P: IntArray


# By the number of sequences.
CutOf = Callable[[int], Cut]


@dataclass(frozen=True)
class ReplicaTokens:
    """What the places of a replica compute, keep and move in a rollout batch.

    Attributes:
        sequences: that it trains on.
        kept_sequences: whose features fit into the byte budget.
        wanted: sampled tokens of all sequences on the place that has most of them.
        routed_P, rows_P: tokens and rows whose routes a place gets, each cut of a micro-batch once.
        opened_P: of these tokens, the ones of the old-log-prob pass, whose routes travel together.
        sampled_P: tokens whose features a place keeps.
        fetched_P, sent_P: of these, tokens that a place gets from and gives to others over all training passes.
        held_P: most tokens that a place got for one mini-step.
    """

    sequences: int
    kept_sequences: int
    wanted: int
    routed_P: IntArray
    rows_P: IntArray
    opened_P: IntArray
    sampled_P: IntArray
    fetched_P: IntArray
    sent_P: IntArray
    held_P: IntArray


def replica_tokens(layout: ParallelLayout, work: Workload, config: PR2Config, count: int, room: int) -> ReplicaTokens:
    """The tokens of a replica that trains `count` sequences.

    Args:
        room: tokens whose features a rank may keep.
    """
    cut_of: CutOf = cache(lambda size: cut_micro_batch(layout, work, size))
    mini_steps, log_prob = work.training_parts(count), work.log_prob_parts(count)
    places = layout.context * layout.tensor
    zero = np.zeros(places, dtype=np.int64)
    # A micro-batch that both passes cut in the same way gets its routes once.
    distinct = {part for parts in [log_prob, *mini_steps] for part in parts}
    cuts = [cut_of(stop - start) for start, stop in distinct]
    opened = sum((cut_of(stop - start).tokens_P for start, stop in log_prob), zero)
    counts = np.zeros((count, places), dtype=np.int64)
    for sequence, place_N in _by_sequence(log_prob, cut_of):
        counts[sequence] = np.bincount(place_N[_sample(work, config, sequence)], minlength=places)
    sampled, kept = _kept(counts, room)
    fetched, sent, held = zero.copy(), zero.copy(), zero.copy()
    # Nothing moves where the log-prob pass had the same micro-batches.
    if distinct != set(log_prob):
        holder = dict(_by_sequence(log_prob, cut_of))
        for parts in mini_steps:
            arrived = zero.copy()
            for sequence, place_N in _by_sequence(parts, cut_of):
                if kept[sequence]:
                    tokens = _sample(work, config, sequence)
                    before, after = holder[sequence][tokens], place_N[tokens]
                    arrived += np.bincount(after[before != after], minlength=places)
                    sent += np.bincount(before[before != after], minlength=places)
            fetched += arrived
            held = np.maximum(held, arrived)
    routed, rows = sum((cut.tokens_P for cut in cuts), zero), sum((cut.rows_P for cut in cuts), zero)
    wanted = int(counts.sum(axis=0).max())
    return ReplicaTokens(count, int(kept.sum()), wanted, routed, rows, opened, sampled, fetched, sent, held)


def cut_micro_batch(layout: ParallelLayout, work: Workload, size: int) -> Cut:
    """Cuts a micro-batch of `size` sequences, each padded to the layout's alignment and no further."""
    slot = -(-work.seq // layout.alignment) * layout.alignment
    ids, lengths = range(size), [work.seq] * size
    grid = padded(ids, lengths, slot) if work.padded else packed(ids, lengths, [slot] * size)
    places = layout.context * layout.tensor
    place_BN = np.full((size, work.seq), -1, dtype=np.int32)
    tokens, rows = np.zeros(places, dtype=np.int64), np.zeros(places, dtype=np.int64)
    for place in range(places):
        local = layout.cut(grid, layout.rank(Coordinates(place % layout.tensor, place // layout.tensor, 0, 0)))
        _, sequence, position = local.real()
        place_BN[sequence, position] = place
        tokens[place], rows[place] = len(sequence), local.num_rows
    return Cut(place_BN, tokens, rows)


def _by_sequence(parts: list[Part], cut_of: CutOf) -> Iterator[tuple[int, npt.NDArray[np.int32]]]:
    """Every sequence with the places [N] of its tokens."""
    for start, stop in parts:
        for column, sequence in enumerate(range(start, stop)):
            yield sequence, cut_of(stop - start).place_BN[column]


def _sample(work: Workload, config: PR2Config, sequence: int) -> IntArray:
    """The positions of a sequence whose features are kept: a share of those whose output is a token of the response."""
    return sample_positions(config.seed, sequence, np.arange(work.prompt - 1, work.seq - 1), config.sample_fraction)


def _kept(counts_QP: IntArray, room: int) -> tuple[IntArray, npt.NDArray[np.bool_]]:
    """Tokens on every place, and which sequences are kept: whole ones while no place exceeds its room (FeaturePlan)."""
    load = np.zeros(counts_QP.shape[1], dtype=np.int64)
    kept = np.zeros(len(counts_QP), dtype=bool)
    for sequence in spread_order(range(len(counts_QP))).tolist():
        tokens_P = counts_QP[sequence]
        if (load + tokens_P <= room).all():
            load += tokens_P
            kept[sequence] = True
    return load, kept
