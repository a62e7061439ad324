"""A trainer's description of a micro-batch: which token lies in which row of it."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from megatron_pr2.errors import ReplayError, RouteError
from megatron_pr2.parallel import grid
from megatron_pr2.parallel.grid import TokenGrid
from megatron_pr2.routes.ids import on_host
from megatron_pr2.routes.scatter import RouteSlice


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """A micro-batch, described alike on every rank that works on it. Two with the same rows are equal, in whichever pass.

    Attributes:
        key: names it in messages; tells micro-batches of padding alone apart.
        grid: which token every row of the whole micro-batch holds, before context and sequence parallelism cut it.
    """

    key: Hashable
    grid: TokenGrid

    def __post_init__(self) -> None:
        try:
            hash(self.key)
        except TypeError as error:
            raise ReplayError(f"MicroBatch: key={self.key!r}; expected a number, a string or a tuple of them") from error
        if not isinstance(self.grid, TokenGrid):
            raise ReplayError(f"MicroBatch: grid is a {type(self.grid).__name__}; use MicroBatch.padded or MicroBatch.packed")

    @cached_property
    def _identity(self) -> tuple[bytes, Hashable]:
        return self.grid.fingerprint, None if (self.grid.sequence != grid.PADDING).any() else self.key

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MicroBatch) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    @classmethod
    def padded(cls, ids: Sequence[int], lengths: Sequence[int], padded_length: int, *, key: Hashable = None) -> MicroBatch:
        """A right-padded batch [B, padded_length]; its padding goes to the same few experts, packed sequences have none.

        Args:
            ids: [B] sequence ids, those of `begin_rollout`.
            lengths: [B] tokens of each.
            padded_length: columns of the model's `input_ids`.
            key: its ids unless given; two micro-batches of padding alone need one each.

        Raises:
            ConfigError: a sequence is longer than `padded_length`.
        """
        ids, lengths = _described(ids, lengths)
        (columns,) = _plain([padded_length], "padded_length")
        return cls(tuple(ids) if key is None else key, grid.padded(ids, lengths, columns))

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
        ids, lengths = _described(ids, lengths)
        slots = None if padded_lengths is None else _described(ids, padded_lengths)[1]
        return cls(tuple(ids) if key is None else key, grid.packed(ids, lengths, slots))

    @classmethod
    def from_attention_mask(cls, ids: Sequence[int], mask: Any, *, key: Hashable = None) -> MicroBatch:
        """A batch [B, S] that is padded on the right, on the left or anywhere, as its attention mask says.

        Args:
            ids: [B] sequence ids, those of `begin_rollout`.
            mask: [B, S] bool or 0/1, 1 where there is a token; an array, a tensor or nested lists. One copy, if it is on a device.
            key: its ids unless given.

        Raises:
            ReplayError: another shape or other entries. Masks of pairs of tokens, [B, 1, S, S], are another thing.
        """
        ids = _plain(ids, "ids")
        try:
            array = on_host(mask, "mask")
        except RouteError as error:
            raise ReplayError(f"MicroBatch.from_attention_mask: {error}") from error
        if array.ndim != 2 or len(array) != len(ids) or array.dtype.kind not in "biuf" or not np.isin(array, (0, 1)).all():
            raise ReplayError(
                f"MicroBatch.from_attention_mask: {array.dtype}{list(array.shape)} for {len(ids)} ids; expected [ids, columns] of "
                "0 and 1, 1 where there is a token"
            )
        return cls(tuple(ids) if key is None else key, grid.masked(ids, array.astype(bool)))

    @classmethod
    def from_packed_seq_params(
        cls, ids: Sequence[int], params: Any, lengths: Sequence[int] | None = None, *, key: Hashable = None
    ) -> MicroBatch:
        """Packed sequences (THD), as Megatron-Core's PackedSeqParams describe them; reads `cu_seqlens_q` once.

        Args:
            ids: [B] sequence ids, those of `begin_rollout`. What `params` have behind these is padding.
            params: of the whole micro-batch: `cu_seqlens_q` and, where sequences have padding of their own, `cu_seqlens_q_padded`.
            lengths: [B] tokens of each, where `cu_seqlens_q` counts padding as well.
            key: its ids unless given.

        Raises:
            ReplayError: another format than thd, fewer sequences than ids, or lengths that do not fit.
        """
        layout, given = getattr(params, "qkv_format", "thd"), getattr(params, "cu_seqlens_q", None)
        if layout != "thd" or given is None:
            raise ReplayError(
                f"MicroBatch.from_packed_seq_params: qkv_format={layout!r}, cu_seqlens_q={given!r}; expected thd. For other "
                "batches MicroBatch.padded or from_attention_mask"
            )
        ids, ends = _plain(ids, "ids"), _plain(given, "cu_seqlens_q")
        padded_ends = getattr(params, "cu_seqlens_q_padded", None)
        slots = np.diff(ends if padded_ends is None else _plain(padded_ends, "cu_seqlens_q_padded")).tolist()
        real = np.diff(ends).tolist()[: len(ids)] if lengths is None else _plain(lengths, "lengths")
        if not len(ids) == len(real) <= len(slots) or any(not 0 <= n <= slot for n, slot in zip(real, slots, strict=False)):
            raise ReplayError(
                f"MicroBatch.from_packed_seq_params: {len(ids)} ids of {real} tokens, in places of {slots}; expected as many "
                "lengths as ids, each within its place"
            )
        while len(slots) > len(ids) and not slots[-1]:
            slots.pop()  # of a cu_seqlens that is longer than its sequences
        behind = len(slots) - len(ids)
        return cls(tuple(ids) if key is None else key, grid.packed([*ids, *[-1] * behind], [*real, *[0] * behind], slots))


def listed(micro_batches: Iterable[MicroBatch]) -> list[MicroBatch]:
    """The micro-batches of a pass, which are walked more than once; generators are welcome.

    Raises:
        ReplayError: a lone micro-batch.
    """
    if isinstance(micro_batches, MicroBatch) or not isinstance(micro_batches, Iterable):
        raise ReplayError(f"a pass got one {type(micro_batches).__name__}; pass all micro-batches of the pass, as a list")
    micro_batches = list(micro_batches)
    for each in micro_batches:
        if not isinstance(each, MicroBatch):
            raise ReplayError(f"a pass got a {type(each).__name__} among its micro-batches; describe each one by a MicroBatch")
    return micro_batches


def _plain(numbers: Iterable[int], name: str) -> list[int]:
    """Trainers have lists, arrays and tensors; a micro-batch is the same whichever says it."""
    try:
        # One copy of a tensor on a device, not one per number.
        plain = [operator.index(number) for number in (numbers.tolist() if hasattr(numbers, "tolist") else numbers)]
        return np.array(plain, dtype=np.int64).tolist()
    except (TypeError, OverflowError) as error:
        what = "the ids that its sequences have in begin_rollout()" if name == "ids" else "tokens of each sequence"
        raise ReplayError(f"MicroBatch: {name}={numbers!r}; expected integers, {what}") from error


def _described(ids: Sequence[int], lengths: Sequence[int]) -> tuple[list[int], list[int]]:
    ids, lengths = _plain(ids, "ids"), _plain(lengths, "lengths")
    if len(ids) != len(lengths) or any(length < 0 for length in lengths):
        raise ReplayError(f"MicroBatch: {len(ids)} ids, lengths={lengths}; expected one length of at least 0 for each id")
    return ids, lengths


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
        real_T1: which rows hold a token, on the device, once they were asked for.
        has_backward: whether its chunk runs it with gradients.
        tokens_per_sample: of the PackedSeqParams that the chunk runs it with, or None.
    """

    micro_batch: MicroBatch
    local: TokenGrid
    slice: RouteSlice | None = None
    routes_TLK: Tensor | None = None
    missing: Tensor | None = None
    own: dict[int, Tensor] = field(default_factory=dict)
    real_T1: Tensor | None = None
    has_backward: bool = False
    tokens_per_sample: int | None = None
