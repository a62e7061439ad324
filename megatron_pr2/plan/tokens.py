"""Tokens of a planned rollout batch: how it is cut, what each place computes, which features it keeps and moves.

A place is a rank's context- and tensor-parallel index, numbered cp * tensor + tp. All stages of a pipeline compute the same tokens,
and replicas that train equally many sequences are identical; so one replica's places stand for every rank. Rows are cut by
`ParallelLayout.cut` and tokens sampled and thinned as in a run whose sequences have the ids 0, 1, 2, ...

Shape suffixes: P places, B sequences of a micro-batch, N tokens of a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_pr2.config import PR2Config
from megatron_pr2.errors import ConfigError
from megatron_pr2.parallel.grid import packed, padded
from megatron_pr2.parallel.layout import Coordinates, ParallelLayout
from megatron_pr2.parallel.tokens import fitting_share, sample_positions, thinning_keys

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
        horizons: pushes of each version, for so many horizons (`engine_weights(horizon=)`).
        look_ahead: share of a replica's sequences that a look-ahead runs over; the trainer's by default.
        watched: they are of the last mini-step, which was watched for it (`actor_update(watched=)`), as the trainer does.
    """

    batch: int = 256
    seq: int = 8192
    prompt: int = 1
    mini_steps: int = 4
    micro_batch: int = 1
    log_prob_micro_batch: int | None = None
    padded: bool = False
    horizons: int = 1
    look_ahead: float = 0.25
    watched: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and value < 1 and field.name not in ("padded", "look_ahead", "watched"):
                raise ConfigError(f"{field.name}={value}: expected at least 1")
        if not 0.0 < self.look_ahead <= 1.0:
            raise ConfigError(f"look_ahead={self.look_ahead}: expected a share of the sequences, above 0 and at most 1")
        if self.prompt > self.seq:
            raise ConfigError(f"prompt={self.prompt}: expected at most the {self.seq} tokens of a sequence (seq)")

    def sequences(self, dp: int, data: int) -> int:
        """Sequences of one replica; the first ones take what does not divide."""
        return self.batch // data + (dp < self.batch % data)

    def training_parts(self, count: int) -> list[list[Part]]:
        """Micro-batches of every mini-step of a replica that trains `count` sequences."""
        ends = [count * i // self.mini_steps for i in range(self.mini_steps + 1)]
        return [_parts(start, stop, self.micro_batch) for start, stop in pairwise(ends)]

    def looked_at(self, count: int) -> int:
        """Sequences of a replica's look-ahead."""
        wanted = math.ceil(self.look_ahead * count)
        return min(wanted, count - count * (self.mini_steps - 1) // self.mini_steps) if self.watched else wanted

    def log_prob_parts(self, count: int) -> list[Part]:
        """Micro-batches of the old-log-prob pass."""
        if self.log_prob_micro_batch is None:
            return [part for parts in self.training_parts(count) for part in parts]
        return _parts(0, count, self.log_prob_micro_batch)


def _parts(start: int, stop: int, size: int) -> list[Part]:
    return [(first, min(first + size, stop)) for first in range(start, stop, size)]


class Cut(NamedTuple):
    """A micro-batch on the places of a stage: which place computes a token [B, N]; tokens and rows, padding included, of each."""

    place_BN: npt.NDArray[np.int32]
    tokens_P: IntArray
    rows_P: IntArray


@dataclass(frozen=True)
class ReplicaTokens:
    """What the places of a replica compute, keep and move in a rollout batch.

    Attributes:
        sequences: that it trains on.
        routed_P, rows_P: tokens and rows whose routes a place gets, each cut of a micro-batch once.
        opened_P: of these tokens, the ones of the old-log-prob pass, whose routes travel together.
        sampled_P: tokens whose features a place keeps.
        fetched_P, sent_P: of these, tokens that a place gets from and gives to others over all training passes.
        held_P: most tokens that a place got for one mini-step.
        looked_P: loss-bearing tokens that a place computes in a look-ahead.
    """

    sequences: int
    routed_P: IntArray
    rows_P: IntArray
    opened_P: IntArray
    sampled_P: IntArray
    fetched_P: IntArray
    sent_P: IntArray
    held_P: IntArray
    looked_P: IntArray


@dataclass(frozen=True)
class Sample:
    """The sampled tokens of one sequence, as many as sample_fraction says.

    Attributes:
        positions, keys: where they are, and what decides which of them stay where there is no room for all.
        places: that compute them in the old-log-prob pass.
    """

    positions: IntArray
    keys: npt.NDArray[np.float64]
    places: npt.NDArray[np.int32]


def sampled(layout: ParallelLayout, work: Workload, config: PR2Config, count: int) -> list[Sample]:
    """The sampled tokens of a replica that trains `count` sequences: tokens of the response, by their outputs."""
    cut_of = cache(lambda size: cut_micro_batch(layout, work, size))
    samples = []
    for sequence, place_N in _by_sequence(work.log_prob_parts(count), cut_of):
        candidates = np.arange(work.prompt - 1, work.seq - 1 if config.drift else work.prompt - 1)
        positions = sample_positions(config.seed, sequence, candidates, config.sample_fraction)
        keys = thinning_keys(config.seed, sequence, work.seq)[positions]
        samples.append(Sample(positions, keys, place_N[positions]))
    return samples


def share_of_room(samples: list[Sample], room: int) -> float:
    """The largest share of a replica's sampled tokens for which every rank has room: tokens whose features it may keep."""
    if not samples:
        return 1.0
    keys, places = (np.concatenate(each) for each in zip(*((s.keys, s.places) for s in samples), strict=True))
    of_place = [keys[places == place] for place in range(int(places.max(initial=0)) + 1)]
    return fitting_share(of_place, [room] * len(of_place))


def replica_tokens(layout: ParallelLayout, work: Workload, samples: list[Sample], share: float) -> ReplicaTokens:
    """The tokens of a replica that keeps features of a share of its sampled tokens."""
    cut_of, count = cache(lambda size: cut_micro_batch(layout, work, size)), len(samples)
    mini_steps, log_prob = work.training_parts(count), work.log_prob_parts(count)
    # A micro-batch that both passes cut in the same way gets its routes once.
    distinct = {part for parts in [log_prob, *mini_steps] for part in parts}
    cuts, opened = ([cut_of(stop - start) for start, stop in parts] for parts in (distinct, log_prob))
    zero = np.zeros(layout.context * layout.tensor, dtype=np.int64)
    kept = [(s.positions[s.keys < share], s.places[s.keys < share]) for s in samples]
    fetched, sent, held = zero.copy(), zero.copy(), zero.copy()
    # Nothing moves where the log-prob pass had the same micro-batches.
    for parts in mini_steps if distinct != set(log_prob) else []:
        arrived = zero.copy()
        for sequence, place_N in _by_sequence(parts, cut_of):
            positions, before = kept[sequence]
            after = place_N[positions]
            arrived += np.bincount(after[before != after], minlength=len(zero))
            sent += np.bincount(before[before != after], minlength=len(zero))
        fetched += arrived
        held = np.maximum(held, arrived)
    looked_at = _parts(0, work.looked_at(count), work.micro_batch)
    looked = [place_N[work.prompt - 1 : work.seq - 1] for _, place_N in _by_sequence(looked_at, cut_of)]
    return ReplicaTokens(
        sequences=count,
        routed_P=sum((cut.tokens_P for cut in cuts), zero),
        rows_P=sum((cut.rows_P for cut in cuts), zero),
        opened_P=sum((cut.tokens_P for cut in opened), zero),
        sampled_P=sum((np.bincount(places, minlength=len(zero)) for _, places in kept), zero),
        fetched_P=fetched,
        sent_P=sent,
        held_P=held,
        looked_P=sum((np.bincount(places, minlength=len(zero)) for places in looked), zero),
    )


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


def _by_sequence(parts: list[Part], cut_of: Callable[[int], Cut]) -> Iterator[tuple[int, npt.NDArray[np.int32]]]:
    """Every sequence with the places [N] of its tokens."""
    for start, stop in parts:
        yield from zip(range(start, stop), cut_of(stop - start).place_BN, strict=True)
