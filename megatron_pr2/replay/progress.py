"""Progress: how far a rollout batch is, and what a trainer forgot, repeated or called out of order.

Errors are for what would give wrong routes; the rest is warned of, once per kind. All ranks of a replica see the same calls and
micro-batches, so that they count and refuse alike.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_pr2.config import PR2Config
from megatron_pr2.errors import ReplayError
from megatron_pr2.parallel.grid import IntArray
from megatron_pr2.parallel.tokens import TokenIndex
from megatron_pr2.replay.micro_batch import MicroBatch

logger = logging.getLogger(__name__)


class Progress:
    """The passes of the current rollout batch.

    Attributes:
        mini_step: the last one whose forward and backward ran; 0 before the first.
        open: step() has not followed it yet.
        looked: look_ahead() has run.
        scored, trained: which tokens an old-log-prob pass and a training pass ran, by flat token index.
        untrained: sequences that no training pass ran, of the batch that end_rollout() ended; None after begin_rollout().
    """

    def __init__(self, config: PR2Config) -> None:
        self._config = config
        self._warned: set[str] = set()
        self.untrained: int | None = None
        self._start(TokenIndex({}))

    def _start(self, tokens: TokenIndex) -> None:
        self._tokens = tokens
        self.mini_step, self.open, self.looked = 0, False, False
        self.scored, self.trained = np.zeros((2, tokens.total), dtype=bool)

    def begin(self, tokens: TokenIndex) -> None:
        """A rollout batch begins; the one before may have ended without end_rollout()."""
        self._finish(
            "begin_rollout() again, and nothing was trained on since the last one: its %d sequences are dropped. Call it once per "
            "rollout batch, with all of its sequences"
        )
        self._start(tokens)
        self.untrained = None

    def end(self) -> None:
        """The rollout batch ends."""
        self._finish("end_rollout(), and nothing was trained on since begin_rollout(): its %d sequences are dropped")
        self._start(TokenIndex({}))

    def _finish(self, dropped: str) -> None:
        total = len(self._tokens.lengths)
        if not total:
            return
        self.untrained = sum(not self.trained[self._tokens.span(sid)].any() for sid in self._tokens.lengths)
        if not self.mini_step:
            self.warn(dropped, total)
        elif self.untrained:
            self.warn(
                "%d of the %d sequences of this rank's replica were never trained on when their rollout batch ended "
                "(pr2/untrained_sequences counts them after end_rollout): give actor_update() all of its micro-batches, or "
                "begin_rollout() only what is trained on", self.untrained, total,
            )  # fmt: skip
        if self.mini_step and self._config.looks_ahead and not self.looked:
            self.warn(
                "no look_ahead() in this rollout batch: the next push is predicted with what an earlier one found, or not at all. "
                "Call pr2.look_ahead(micro_batches, forward) after the last step() of each batch"
            )
        if self.mini_step == 1 and self._config.learns:
            self.warn(
                "one update per rollout batch (mini_step stays 1): the predictor learns from the second on, so it never learns; "
                "make mini-batches smaller (verl: ppo_mini_batch_size), or use preset r3"
            )
        elif self.mini_step == 1 and self._config.follows and not self._config.horizon:
            self.warn(
                "one update per rollout batch (mini_step stays 1), and pr2.horizon is 0: momentum is extrapolated over 0 updates, "
                "which is no prediction; set pr2.horizon to the updates that rollouts are behind, or use preset r3"
            )

    def number(self, mini_step: Any) -> int:
        """The number of the mini-step that is going to run.

        Args:
            mini_step: as the trainer counts; None for the next one.

        Raises:
            ReplayError: it is no integer of at least 1.
        """
        if mini_step is None:
            return self.mini_step + 1
        try:
            number = operator.index(mini_step)
        except TypeError:
            number = 0
        if number < 1 or isinstance(mini_step, bool):
            raise ReplayError(f"mini_step={mini_step!r}: mini-steps count from 1; leave it out, and PR2 counts them")
        if number < self.mini_step or (number == self.mini_step and not self.open):
            self.warn(
                "mini_step=%d after mini-step %d of the same rollout batch: it counts the updates since the rollout, over all "
                "epochs; the predictor learns from 2 on, and its horizon is made of it. Leave it out, and PR2 counts them",
                number, self.mini_step,
            )  # fmt: skip
        return number

    def ran(self, number: int, tokens: IntArray) -> None:
        """A mini-step's forward and backward are done; step() is to come."""
        self.mini_step, self.open = number, True
        self.trained[tokens] = True

    def score(self, micro_batches: Sequence[MicroBatch]) -> IntArray:
        """Before an old-log-prob pass: the tokens that it is going to run.

        Raises:
            ReplayError: one of them twice.
        """
        if self.mini_step:
            self.warn(
                "old_logprobs() after mini-step %d of the same rollout batch: its routes and features are of weights that the "
                "rollout was not sampled with; call it once, over the whole batch, before the first update", self.mini_step,
            )  # fmt: skip
        return self.once(micro_batches)

    def train(self, micro_batches: Sequence[MicroBatch]) -> IntArray:
        """Before a training pass: the tokens that it is going to run.

        Raises:
            ReplayError: one of them twice, or not in the old-log-prob pass, which should have recorded its routes.
        """
        index = self.once(micro_batches)
        absent = int((~self.scored[index]).sum())
        if absent and self._config.routes == "actor":
            raise ReplayError(
                f"{absent} of the {len(index)} tokens of this mini-step were in no old_logprobs() pass, which records their routes "
                "(routes='actor'); run it over the whole rollout batch before the first update"
            )
        if absent and (self._config.learns or (self._config.predicts and self._config.hold_back)):
            self.warn(
                "%d of the %d tokens of a mini-step were in no old_logprobs() pass, which keeps what prediction learns from and is "
                "judged on; run it over the whole rollout batch before the first update", absent, len(index),
            )  # fmt: skip
        return index

    def once(self, micro_batches: Sequence[MicroBatch]) -> IntArray:
        """The tokens of a pass, by flat token index; those that are not of the rollout batch are left out.

        Raises:
            ReplayError: a token twice.
        """
        parts = [self._tokens.of_grid(micro_batch.grid) for micro_batch in micro_batches]
        index = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
        index = index[index >= 0]
        times = np.bincount(index, minlength=self._tokens.total)
        if (times > 1).any():
            (at,) = self._tokens.sequence_of(np.flatnonzero(times > 1)[:1])
            twice = list(self._tokens.lengths)[at]
            raise ReplayError(
                f"sequence {twice} is twice in this pass: it would be replayed, learned from and counted twice. Give a copy that "
                "only fills a batch the length 0 in MicroBatch, or an id and routes of its own"
            )
        return index

    def warn(self, message: str, *arguments: Any) -> None:
        """Says once per kind, and on the first rank alone, what a trainer should change."""
        if message in self._warned:
            return
        self._warned.add(message)
        if not dist.is_initialized() or dist.get_rank() == 0:
            logger.warning(message, *arguments)
