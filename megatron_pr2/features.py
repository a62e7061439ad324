"""FeatureStore: router inputs and logits under theta_old for a seeded sample of tokens (design decision 6).

Shape suffixes: S sampled tokens, L local MoE layers, E experts, H hidden.

Features are keyed by (sequence, position), because the log-prob pass and the training pass may split micro-batches differently.
They stay on the rank that computed them. h_old is kept in bf16, p_old in fp32: the logits cost E of E + H columns, and rounding
them to bf16 alone moves 0.4 % of the top-k slots, as much as a small update does (docs/design.md).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

IntArray = npt.NDArray[np.int64]


def sample_positions(seed: int, sequence: int, candidates: IntArray, fraction: float) -> IntArray:
    """Uniform sample without replacement of the candidate positions of one sequence, ascending.

    A function of its arguments alone, so that every rank draws the same sample. At least one position is drawn where there is one.
    """
    count = min(len(candidates), max(1, round(len(candidates) * fraction)))
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, sequence])))
    return np.sort(generator.permutation(candidates)[:count]).astype(np.int64)


class FeatureStore:
    """(h_old, p_old) of the sampled tokens of one rollout batch, for the local MoE layers.

    Attributes:
        sampled_tokens: tokens for which there is room.
        dropped_sequences: whole sequences left out because of the byte budget.
    """

    def __init__(
        self, num_layers: int, num_experts: int, hidden: int, *, budget_bytes: int, device: torch.device, h_dtype: torch.dtype
    ) -> None:
        """Args: `device` is where features are kept; `h_dtype` is what router inputs are stored as."""
        self._layers, self._experts, self._hidden = num_layers, num_experts, hidden
        self._budget, self.device, self._h_dtype = budget_bytes, device, h_dtype
        self.clear()

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one sampled token over all local layers."""
        return self._layers * (self._hidden * self._h_dtype.itemsize + self._experts * 4)

    @property
    def nbytes(self) -> int:
        """Bytes allocated now."""
        return self.sampled_tokens * self.bytes_per_token

    def clear(self) -> None:
        """Forgets everything, before the next rollout batch."""
        self._slots: dict[int, tuple[IntArray, int]] = {}
        self._written = np.zeros((self._layers, 0), dtype=bool)
        self.sampled_tokens = 0
        self.dropped_sequences = 0
        self._h_LSH = torch.empty(0)
        self._p_LSE = torch.empty(0)
        self._in_flight: list[tuple[int, Tensor, Tensor, Tensor]] = []

    def allocate(self, samples: Mapping[int, IntArray]) -> None:
        """Makes room for the sampled positions of each sequence; beyond the budget whole sequences are dropped, last ones first.

        Args:
            samples: sequence id -> ascending positions.
        """
        self.clear()
        if not self._layers:
            return
        room = self._budget // self.bytes_per_token
        for sequence, positions in samples.items():
            if self.sampled_tokens + len(positions) > room:
                self.dropped_sequences += 1
                continue
            self._slots[sequence] = (positions, self.sampled_tokens)
            self.sampled_tokens += len(positions)
        total = self.sampled_tokens
        self._written = np.zeros((self._layers, total), dtype=bool)
        self._h_LSH = torch.zeros(self._layers, total, self._hidden, dtype=self._h_dtype, device=self.device)
        self._p_LSE = torch.zeros(self._layers, total, self._experts, dtype=torch.float32, device=self.device)

    def locate(self, sequence: IntArray, position: IntArray) -> tuple[IntArray, IntArray]:
        """Rows of a micro-batch that are sampled, and the slot of each.

        Args:
            sequence, position: [T] of the router's rows, -1 for padding.

        Returns:
            rows, slots: [S] each, ascending rows.
        """
        rows, slots = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
        for sid in np.unique(sequence[sequence >= 0]):
            if int(sid) not in self._slots:
                continue
            wanted, start = self._slots[int(sid)]
            (own,) = np.nonzero(sequence == sid)
            found = np.isin(position[own], wanted)
            rows.append(own[found])
            slots.append(start + np.searchsorted(wanted, position[own][found]))
        row, slot = np.concatenate(rows), np.concatenate(slots)
        order = np.argsort(row, kind="stable")
        return row[order], slot[order]

    def write(self, layer: int, slots: IntArray, slots_device: Tensor, h_SH: Tensor, p_SE: Tensor) -> None:
        """Keeps the features of one layer of one micro-batch; `slots` are the host's copy of `slots_device`."""
        self._written[layer, slots] = True
        h = h_SH.to(self.device, self._h_dtype, non_blocking=True)
        p = p_SE.to(self.device, torch.float32, non_blocking=True)
        if self._elsewhere(h_SH):
            # Copies to pinned host memory are still on their way; reading them now would read anything.
            self._in_flight.append((layer, slots_device, h, p))
        else:
            self._h_LSH[layer].index_copy_(0, slots_device, h)
            self._p_LSE[layer].index_copy_(0, slots_device, p)

    def settle(self) -> None:
        """Waits, once, for the copies that write() started from another device, and files them."""
        if not self._in_flight:
            return
        torch.cuda.current_stream().synchronize()
        for layer, slots, h, p in self._in_flight:
            self._h_LSH[layer].index_copy_(0, slots, h)
            self._p_LSE[layer].index_copy_(0, slots, p)
        self._in_flight = []

    def written(self, slots: IntArray) -> npt.NDArray[np.bool_]:
        """Which slots were written for every layer, [S]; known on the host, costs no synchronisation."""
        return np.asarray(self._written[:, slots].all(axis=0))

    def read(self, layer: int, slots_device: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """(h_old [S, H], p_old [S, E]) of one layer on `device`."""
        self.settle()
        return (
            self._h_LSH[layer].index_select(0, slots_device).to(device, non_blocking=True),
            self._p_LSE[layer].index_select(0, slots_device).to(device, non_blocking=True),
        )

    def _elsewhere(self, tensor: Tensor) -> bool:
        return tensor.device.type != self.device.type
