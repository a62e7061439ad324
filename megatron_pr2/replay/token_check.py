"""Is a row of the model's input the token that its route is of? Compared on the device, read once per pass.

Routes follow (sequence, position). Whether the model runs what a pipeline said of a micro-batch is seen from the token ids: those
given with the rollout (`ReplaySequence.token_ids`), or else those of the first pass that runs a token. A micro-batch that runs in
another one's place, rows in another order or shifted by one are then an error, wherever a chunk with an embedding is called with
integer `input_ids`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_pr2.errors import ReplayError
from megatron_pr2.parallel.grid import TokenGrid, cut
from megatron_pr2.parallel.replica import RankGroup
from megatron_pr2.parallel.tokens import TokenIndex
from megatron_pr2.replay.micro_batch import MicroBatch
from megatron_pr2.replay.sequences import ReplaySequence
from megatron_pr2.replay.sites import unwrapped

UNKNOWN = -1


class TokenCheck:
    """Token ids of a rollout batch as far as they are known.

    Attributes:
        wrong: [] int64 on the device, tokens of the current pass that are others than those known.
    """

    def __init__(self, ranks: RankGroup, chunks: Sequence[torch.nn.Module], device: torch.device) -> None:
        self._ranks, self._device = ranks, device
        # Inner pipeline stages may be given anything in the place of tokens.
        self._embeds = any(_embeds(unwrapped(chunk)) for chunk in chunks)
        self.begin(TokenIndex({}), ())

    def begin(self, tokens: TokenIndex, sequences: Sequence[ReplaySequence]) -> None:
        """Starts over with a rollout batch; 4 bytes per token of this rank's replica, and during a pass 4 per row of it.

        Where some sequence came without ids, a pass holds 4 bytes per token once more.
        """
        self._tokens = tokens
        ids = np.full(tokens.total + 1, UNKNOWN, dtype=np.int32)  # the last one takes what is no token of the batch
        for sequence in sequences:
            if sequence.token_ids is not None:
                ids[tokens.span(sequence.id)] = sequence.token_ids
        self._rows: dict[bytes, tuple[tuple[int, ...], Tensor]] = {}
        with torch.inference_mode(False):  # a trainer may begin a rollout inside of it; later passes write here
            self._ids_N = torch.from_numpy(ids).to(self._device)
            self.wrong = torch.zeros((), dtype=torch.int64, device=self._device)
            self._before: Tensor | None = None
        self._given = bool(sequences) and all(sequence.token_ids is not None for sequence in sequences)
        self._looked = False

    def open(self, micro_batches: Sequence[MicroBatch]) -> None:
        """A pass begins. Which token each row of its micro-batches is goes to the device now, not while they run."""
        self.wrong.zero_()
        self._looked = False
        if self._embeds and not self._given:
            with torch.inference_mode(False):
                self._before = self._ids_N.clone()
        grids = {micro_batch.grid.fingerprint: micro_batch.grid for micro_batch in micro_batches if self._embeds}
        self._rows = {fingerprint: self._rows_of(grid) for fingerprint, grid in grids.items()}

    def close(self) -> None:
        """A pass has run its micro-batches."""
        self._rows = {}

    def keep(self) -> None:
        """Every rank has accepted the pass: what it ran is what later ones are compared with."""
        self._before = None

    def forget(self) -> None:
        """The pass was refused or broke off; its ids may be those of other tokens."""
        if self._before is not None:
            self._ids_N, self._before = self._before, None  # no operator: the device itself may have failed

    def look(self, chunk: torch.nn.Module, micro_batch: MicroBatch, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Compares what a chunk is called with, and remembers what was not known; operators on the device only.

        Args:
            chunk: without wrappers; nothing is looked at unless it has the embedding.
            micro_batch: that it runs.
            args, kwargs: of its forward; nothing is looked at unless the first argument or `input_ids` is integer [B, S] of this
                rank's rows, nor where `decoder_input` stands in for the embedding.
        """
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        if not _embeds(chunk) or not isinstance(input_ids, Tensor) or input_ids.is_floating_point():
            return
        if kwargs.get("decoder_input") is not None:
            return  # the model does not look at input_ids then
        shape, index_T = self._rows[micro_batch.grid.fingerprint]
        if tuple(input_ids.shape) != shape:
            return
        index_T = index_T.long()
        found_T = input_ids.detach().to(self._device).t().reshape(-1).to(torch.int32)
        known_T = self._ids_N[index_T]
        is_token_T = index_T < self._tokens.total
        self.wrong += (is_token_T & (known_T != UNKNOWN) & (known_T != found_T)).sum()
        self._looked = True
        self._ids_N[index_T] = torch.where(is_token_T & (known_T == UNKNOWN), found_T, known_T)

    def require(self, name: str) -> None:
        """Reads the comparison of a pass, if there was one.

        Raises:
            ReplayError: the model ran other tokens than the ones whose routes were replayed.
        """
        if self._looked and (wrong := int(self.wrong)):
            raise ReplayError(
                f"{name}: {wrong} of the tokens that the model ran on this rank are not those of their sequence and position; the "
                "micro-batches ran in another order than the pass was told of, or their description has other rows than "
                "input_ids. Routes of other tokens were replayed: do not apply this update"
            )

    def _rows_of(self, grid: TokenGrid) -> tuple[tuple[int, ...], Tensor]:
        """(shape of this rank's input_ids, flat index of the token in each of its rows); int32, to be held for a pass."""
        me = self._ranks.members[self._ranks.me]
        # Sequence parallelism cuts behind the embedding: the input has the rows of context parallelism.
        rows = cut(grid, cp_size=self._ranks.cp_size, cp_rank=me.cp_rank, tp_size=1, tp_rank=0)
        index = self._tokens.of_grid(rows)
        index[index < 0] = self._tokens.total
        host = torch.from_numpy(index.astype(np.int32))
        if self._device.type == "cuda":
            host = host.pin_memory()  # from pageable memory the copy would wait for what the device is doing
        return rows.sequence.shape[::-1], host.to(self._device, non_blocking=True)


def _embeds(chunk: torch.nn.Module) -> bool:
    """Whether a chunk turns token ids into embeddings; what does not say so is taken for a whole model."""
    return bool(getattr(chunk, "pre_process", True))
