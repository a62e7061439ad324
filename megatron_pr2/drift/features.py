"""FeatureStore: router inputs and logits under theta_old of sampled tokens (design decision 6).

Shape suffixes: S sampled tokens, L local MoE layers, E experts, H hidden, T rows of a micro-batch.

Features are keyed by token (its flat index in the rollout batch), because the log-prob pass and the training pass may split
micro-batches differently. h_old is kept in bf16, p_old in fp32 (fp64 for routers in fp64): the logits cost E of E + H
columns, and rounding them to bf16 alone moves 0.4 % of the top-k slots, as much as a small update does (docs/design.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_pr2.parallel.grid import IntArray

if TYPE_CHECKING:  # a plan, which is made without Megatron, asks for the sizes
    from megatron.core.transformer.moe.router import TopKRouter

# Copies to host memory that may be under way beside the features themselves; then write() waits for the device, once for all.
STAGING_BYTES = 256 << 20
# Of h_old; p_old is fp32.
H_DTYPE = torch.bfloat16


@dataclass(eq=False)
class Segment:
    """Features of some tokens, ascending by token.

    Attributes:
        tokens: [S] flat token indices.
        h_LSH: bf16, or [L, S, 0] where router inputs are not kept. p_LSE: fp32 or fp64.
    """

    tokens: IntArray
    h_LSH: Tensor
    p_LSE: Tensor
    in_flight: list[tuple[int, Tensor, Tensor, Tensor]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return self.h_LSH.nbytes + self.p_LSE.nbytes


@dataclass(frozen=True)
class Located:
    """Where the features of a micro-batch's rows are.

    Attributes:
        rows: [S] on the device, rows of the router's input.
        tokens: [S] their flat token indices, on the host.
        parts: per segment the slots [S_i], on the segment's device; rows are in this order.
        count: S.
    """

    rows: Tensor
    tokens: IntArray
    parts: tuple[tuple[Segment, Tensor], ...]
    count: int


class FeatureStore:
    """(h_old, p_old) of this rank's sampled tokens of one rollout batch, for its MoE layers.

    Attributes:
        hidden: columns of h_old.
        device: where features are kept.
        peak_bytes: most bytes held at once since begin().
        routers: what the routers were under theta_old, by name, [L, ...]: "expert_bias" (fp32) where they have one, and where
            router inputs are kept "gate" [L, E, H] and, where there is one, "gate_bias".
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        hidden: int,
        *,
        device: torch.device,
        h_dtype: torch.dtype,
        p_dtype: torch.dtype = torch.float32,
    ) -> None:
        """Args: `hidden` is 0 where only p_old is kept."""
        self._layers, self._experts, self.hidden = num_layers, num_experts, hidden
        self.device, self._h_dtype, self._p_dtype = device, h_dtype, p_dtype
        self.begin(0)

    def bytes_of(self, layers: int) -> int:
        """Bytes of one sampled token over so many layers."""
        return layers * (self.hidden * self._h_dtype.itemsize + self._experts * self._p_dtype.itemsize)

    @property
    def nbytes(self) -> int:
        """Bytes held now, copies that are under way included."""
        return sum(segment.nbytes for segment in self._segments) + self._staged

    @property
    def segments(self) -> tuple[Segment, ...]:
        """What is held now, in the order in which it came."""
        return tuple(self._segments)

    def begin(self, num_tokens: int) -> None:
        """Forgets everything, before a rollout batch of so many tokens."""
        self._segments: list[Segment] = []
        self._segment_of = np.full(num_tokens, -1, dtype=np.int32)
        self._slot_of = np.zeros(num_tokens, dtype=np.int64)
        self._staged = 0
        self.peak_bytes = 0
        self.routers: dict[str, Tensor] = {}

    def add(self, tokens: IntArray) -> Segment:
        """Makes room for tokens; they can be located from now on.

        Args:
            tokens: [S] flat indices, ascending, none of them held already.
        """
        count = len(tokens)
        h_LSH = torch.zeros(self._layers, count, self.hidden, dtype=self._h_dtype, device=self.device)
        p_LSE = torch.zeros(self._layers, count, self._experts, dtype=self._p_dtype, device=self.device)
        segment = Segment(tokens, h_LSH, p_LSE)
        self._segment_of[tokens] = len(self._segments)
        self._slot_of[tokens] = np.arange(count)
        self._segments.append(segment)
        self.peak_bytes = max(self.peak_bytes, self.nbytes)
        return segment

    def remove_last(self) -> None:
        """Forgets the segment that was added last."""
        segment = self._segments.pop()
        self._segment_of[segment.tokens] = -1
        self._staged -= sum(h.nbytes + p.nbytes for *_, h, p in segment.in_flight)

    def holds(self, tokens: IntArray) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Which tokens have room here; -1 stands for no token."""
        return np.where(tokens >= 0, self._segment_of[tokens] >= 0, False) if len(self._segment_of) else tokens < -1

    def locate(self, tokens_T: IntArray, device: torch.device) -> Located:
        """The rows of a micro-batch whose features are held.

        Args:
            tokens_T: flat token index per row, -1 for padding.
            device: where the rows are wanted.
        """
        (rows,) = np.nonzero(self.holds(tokens_T))
        segment_of = self._segment_of[tokens_T[rows]]
        order, parts = [], []
        for index in np.unique(segment_of).tolist():
            (here,) = np.nonzero(segment_of == index)
            order.append(rows[here])
            slots = torch.from_numpy(self._slot_of[tokens_T[rows[here]]])
            parts.append((self._segments[index], slots.to(self.device, non_blocking=True)))
        ordered = np.concatenate(order) if order else np.zeros(0, dtype=np.int64)
        rows_S = torch.from_numpy(ordered).to(device, non_blocking=True)
        return Located(rows_S, tokens_T[ordered], tuple(parts), len(ordered))

    def keep_routers(self, routers: Sequence[TopKRouter]) -> None:
        """Copies of what moves while the rollout batch is trained on."""
        names = {"expert_bias": "expert_bias", **({"gate": "weight", "gate_bias": "bias"} if self.hidden else {})}
        for name, attribute in names.items():
            values = [value.detach() for router in routers if (value := getattr(router, attribute)) is not None]
            if values:
                self.routers[name] = torch.stack(values)
        if "expert_bias" in self.routers:
            self.routers["expert_bias"] = self.routers["expert_bias"].float()

    def gate_drift(self, layer: int, router: TopKRouter, h_SH: Tensor) -> Tensor:
        """(W - W_old) h, [S, E] fp32: what the gate's own change since theta_old does to the logits; NaN if W_old is not known."""
        if "gate" not in self.routers:
            return h_SH.new_full((len(h_SH), self._experts), torch.nan)
        bias = self.routers.get("gate_bias")
        moved_E = None if bias is None else router.bias.detach().float() - bias[layer].float()
        return F.linear(h_SH, router.weight.detach().float() - self.routers["gate"][layer].float(), moved_E)

    def write(self, layer: int, where: Located, h_SH: Tensor, p_SE: Tensor) -> None:
        """Keeps the features of one layer of one micro-batch; h_SH is [S, hidden]."""
        start = 0
        for segment, slots in where.parts:
            share = slice(start, start := start + len(slots))
            h = h_SH[share].to(self.device, self._h_dtype, non_blocking=True)
            p = p_SE[share].to(self.device, self._p_dtype, non_blocking=True)
            if h_SH.device.type != self.device.type:
                # Copies to host memory are still on their way; reading them now would read anything.
                segment.in_flight.append((layer, slots, h, p))
                self._staged += h.nbytes + p.nbytes
            else:
                segment.h_LSH[layer].index_copy_(0, slots, h)
                segment.p_LSE[layer].index_copy_(0, slots, p)
        self.peak_bytes = max(self.peak_bytes, self.nbytes)
        if self._staged > STAGING_BYTES:
            self.settle()

    def settle(self) -> None:
        """Waits, once, for the copies that write() started from another device, and files them."""
        if not any(segment.in_flight for segment in self._segments):
            return
        torch.cuda.current_stream().synchronize()
        for segment in self._segments:
            for layer, slots, h, p in segment.in_flight:
                segment.h_LSH[layer].index_copy_(0, slots, h)
                segment.p_LSE[layer].index_copy_(0, slots, p)
            segment.in_flight = []
        self._staged = 0

    def read(self, layer: int, where: Located, device: torch.device) -> tuple[Tensor, Tensor]:
        """(h_old [S, hidden], p_old [S, E]) of one layer on `device`, in the order of `where.rows`."""
        h = [segment.h_LSH[layer].index_select(0, slots) for segment, slots in where.parts]
        p = [segment.p_LSE[layer].index_select(0, slots) for segment, slots in where.parts]
        h.append(torch.empty(0, self.hidden, dtype=self._h_dtype, device=self.device))
        p.append(torch.empty(0, self._experts, dtype=self._p_dtype, device=self.device))
        return _joined(h).to(device, non_blocking=True), _joined(p).to(device, non_blocking=True)


def _joined(parts: list[Tensor]) -> Tensor:
    """One tensor without a copy where there is one; the last part is empty, for where there is none."""
    return parts[0] if len(parts) <= 2 else torch.cat(parts)
