"""A trainer's description of a micro-batch: which token lies in which row of it."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from megatron_pr2.errors import ReplayError
from megatron_pr2.parallel import grid
from megatron_pr2.parallel.grid import TokenGrid
from megatron_pr2.routes.scatter import RouteSlice


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch, described alike on every rank that works on it.

    Attributes:
        key: identifies it within a pass.
        grid: which token every row of the whole micro-batch holds, before context and sequence parallelism cut it.
    """

    key: Hashable
    grid: TokenGrid

    @classmethod
    def padded(cls, ids: Sequence[int], lengths: Sequence[int], padded_length: int, *, key: Hashable = None) -> MicroBatch:
        """A right-padded batch [B, padded_length].

        Args:
            ids: [B] sequence ids, those of `begin_rollout`.
            lengths: [B] tokens of each.
            padded_length: columns of the model's `input_ids`.
            key: its ids unless given; two micro-batches of padding alone need one each.

        Raises:
            ConfigError: a sequence is longer than `padded_length`.
        """
        ids, lengths = _plain(ids), _plain(lengths)
        return cls(tuple(ids) if key is None else key, grid.padded(ids, lengths, int(padded_length)))

    @classmethod
    def packed(
        cls, ids: Sequence[int], lengths: Sequence[int], padded_lengths: Sequence[int] | None = None, *, key: Hashable = None
    ) -> MicroBatch:
        """Sequences one after the other in one row (THD), as `PackedSeqParams` describes them to the model.

        Args:
            ids: [B] sequence ids, those of `begin_rollout`.
            lengths: [B] tokens of each.
            padded_lengths: [B] tokens of each with its own padding (`cu_seqlens_q_padded`); `lengths` unless given.
            key: its ids unless given.

        Raises:
            ConfigError: a sequence is longer than its padded length.
        """
        ids, lengths = _plain(ids), _plain(lengths)
        slots = None if padded_lengths is None else _plain(padded_lengths)
        return cls(tuple(ids) if key is None else key, grid.packed(ids, lengths, slots))


def listed(micro_batches: Iterable[MicroBatch]) -> list[MicroBatch]:
    """The micro-batches of a pass, which are walked more than once; generators are welcome.

    Raises:
        ReplayError: a lone micro-batch.
    """
    if isinstance(micro_batches, MicroBatch):
        raise ReplayError("a pass got one MicroBatch; pass all micro-batches of the pass, as a list")
    return list(micro_batches)


def _plain(numbers: Iterable[int]) -> list[int]:
    """Trainers have lists, arrays and tensors; a micro-batch is the same whichever says it."""
    # One copy of a tensor on a device, not one per number.
    return [int(number) for number in (numbers.tolist() if hasattr(numbers, "tolist") else numbers)]


@dataclass
class BoundMicroBatch:
    """A micro-batch with what this rank's routers need of it.

    Attributes:
        local: which token every row of the routers' input holds on this rank.
        slice: its routes, perhaps still on their way; None when nothing is replayed.
        routes_TLK: compact ids of the local layers on the device, from the time that the micro-batch runs.
        missing: rows [M] without a route, for which the current router chooses, or None.
        own: compact ids [T, K], or [M, K] of the missing rows, that the router of each local layer chose itself; while recording,
            and between a forward and its recomputation.
        has_backward: whether its chunk runs it with gradients.
        tokens_per_sample: of the PackedSeqParams that the chunk runs it with, or None.
    """

    micro_batch: MicroBatch
    local: TokenGrid
    slice: RouteSlice | None = None
    routes_TLK: Tensor | None = None
    missing: Tensor | None = None
    own: dict[int, Tensor] = field(default_factory=dict)
    has_backward: bool = False
    tokens_per_sample: int | None = None
