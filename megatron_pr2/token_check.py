"""Is a row of the model's input the token that its route is of? Compared on the device, read once per pass.

Routes follow (sequence, position). Whether the model runs what a pipeline said of a micro-batch is seen from the token ids: those
given with the rollout (`ReplaySequence.token_ids`), or else those of the first pass that runs a token. A micro-batch that runs in
another one's place, rows in another order or shifted by one are then an error, wherever a chunk is called with integer `input_ids`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_pr2.errors import ReplayError
from megatron_pr2.layout import cut
from megatron_pr2.micro_batch import MicroBatch
from megatron_pr2.replica import RankGroup
from megatron_pr2.sequences import ReplaySequence
from megatron_pr2.tokens import TokenIndex

UNKNOWN = -1


class TokenCheck:
    """Token ids of a rollout batch as far as they are known."""

    def __init__(self, ranks: RankGroup, device: torch.device) -> None:
        self._ranks, self._device = ranks, device
        self.begin(TokenIndex({}), ())

    def begin(self, tokens: TokenIndex, sequences: Sequence[ReplaySequence]) -> None:
        """Starts anew with a rollout batch; 4 bytes per token of this rank's replica."""
        self._tokens = tokens
        ids = np.full(tokens.total + 1, UNKNOWN, dtype=np.int32)  # the last one takes what is no token of the batch
        for sequence in sequences:
            if sequence.token_ids is not None:
                ids[tokens.span(sequence.id)] = sequence.token_ids
        self._ids_N = torch.from_numpy(ids).to(self._device)
        self._wrong = torch.zeros((), dtype=torch.int64, device=self._device)
        self._looked = False

    def open(self) -> None:
        """A pass begins; what one that failed has left is forgotten."""
        self._wrong.zero_()
        self._looked = False

    def look(self, micro_batch: MicroBatch, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Compares what a chunk is called with, and remembers what was not known; no host-device synchronisation.

        Args:
            micro_batch: that the chunk runs.
            args, kwargs: of the chunk's forward; nothing is looked at unless its first argument or `input_ids` is integer [B, S] of
                this rank's rows.
        """
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        if not isinstance(input_ids, Tensor) or input_ids.is_floating_point() or input_ids.dim() != 2:
            return
        me = self._ranks.members[self._ranks.me]
        # Sequence parallelism cuts behind the embedding: the input has the rows of context parallelism.
        rows = cut(micro_batch.grid, cp_size=self._ranks.cp_size, cp_rank=me.cp_rank, tp_size=1, tp_rank=0)
        if tuple(input_ids.shape) != rows.sequence.shape[::-1]:
            return
        index_T = torch.from_numpy(self._tokens.of_grid(rows)).to(self._device, non_blocking=True)
        index_T = torch.where(index_T < 0, self._tokens.total, index_T)
        found_T = input_ids.detach().to(self._device).t().reshape(-1).to(torch.int32)
        known_T = self._ids_N[index_T]
        is_token_T = index_T < self._tokens.total
        self._wrong += (is_token_T & (known_T != UNKNOWN) & (known_T != found_T)).sum()
        self._looked = True
        self._ids_N[index_T] = torch.where(is_token_T & (known_T == UNKNOWN), found_T, known_T)

    def require(self, name: str) -> None:
        """Reads the comparison of a pass, if there was one.

        Raises:
            ReplayError: the model ran other tokens than the ones whose routes were replayed.
        """
        if self._looked and (wrong := int(self._wrong)):
            raise ReplayError(
                f"{name}: {wrong} of the tokens that the model ran on this rank are not those of their sequence and position; the "
                "micro-batches ran in another order than the pass was told of, or their description has other rows than "
                "input_ids. Routes of other tokens were replayed: do not apply this update"
            )
