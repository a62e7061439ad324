"""Passes over a model: all ranks agree at the beginning on what they run, and at the end on whether it counts.

What goes wrong inside a pass is raised at once by the rank that sees it and is not agreed upon: the others are in the model's own
collectives then, and the reason would wait behind them unseen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from megatron_pr2.errors import AttachError, ReplayError
from megatron_pr2.parallel.consensus import attempt, digest, largest
from megatron_pr2.parallel.groups import gathered
from megatron_pr2.parallel.replica import RankGroup
from megatron_pr2.replay.micro_batch import MicroBatch, listed
from megatron_pr2.replay.session import Observer, Predict, ReplaySession, Routes
from megatron_pr2.replay.sites import RouterSite
from megatron_pr2.replay.token_check import TokenCheck


def agree_on_pass(ranks: RankGroup, micro_batches: Iterable[MicroBatch]) -> list[MicroBatch]:
    """Refuses a pass that the ranks of a replica cut differently: their transfers would not fit together, or wait for ever.

    Raises:
        ReplayError: on every rank of the replica.
    """
    if ranks.handle is None:
        return listed(micro_batches)
    described, failure = attempt(lambda: listed(micro_batches))
    mine = digest(*(micro_batch.grid.fingerprint for micro_batch in described or ()))
    failures, marks = zip(*gathered((failure, mine), ranks.handle), strict=True)
    if failure := next((each for each in (failure, *failures) if each is not None), None):
        raise ReplayError(failure)
    if len(set(marks)) > 1:
        raise ReplayError(
            "the ranks of a replica (tensor x context x pipeline parallel) describe different micro-batches for one pass; each "
            "passes the same whole micro-batches in the same order"
        )
    return described or []


def agree_on_outcome(
    groups: Sequence[dist.ProcessGroup], name: str, incomplete: ReplayError | None, tokens: TokenCheck
) -> None:
    """After the last micro-batch of a pass; one small reduction and one read.

    Args:
        incomplete: what this rank refuses of its own micro-batches.
        tokens: whether it ran other tokens.

    Raises:
        ReplayError: on every rank, if any of them refuses.
    """
    groups = [group for group in groups if group.size() > 1]
    elsewhere = 0
    if groups:
        refused = torch.full_like(tokens.wrong, incomplete is not None)
        elsewhere = int(largest(torch.maximum(tokens.wrong, refused), groups))
    if incomplete is not None:
        raise incomplete
    if elsewhere or not groups:
        tokens.require(name)
    if elsewhere:
        raise ReplayError(f"{name}: another rank refused this pass; its error says why. Do not apply this update")


class Passes:
    """Opens sessions on one model, one at a time.

    Attributes:
        attached: False after PR2.detach().
    """

    def __init__(
        self,
        sites: Sequence[RouterSite],
        chunks: Sequence[torch.nn.Module],
        ranks: RankGroup,
        groups: Sequence[dist.ProcessGroup],
        routes: Routes,
        tokens: TokenCheck,
    ) -> None:
        """Args:
        ranks: that work on the same sequences.
        groups: over which a refusal is known everywhere, one after the other.
        """
        self._sites, self._chunks, self._ranks, self._groups = list(sites), list(chunks), ranks, groups
        self._routes, self._tokens = routes, tokens
        self._open, self.attached = False, True

    def require_attached(self) -> None:
        """Refuses what is called after PR2.detach()."""
        if not self.attached:
            raise AttachError("this PR2 handle was detached; attach() again")

    def require_closed(self, call: str) -> None:
        """Refuses what is called while a pass is open."""
        self.require_attached()
        if self._open:
            raise ReplayError(
                f"{call}: another pass is open on this model; close it first. Passes follow each other, and `step` follows them"
            )

    def agreed(self, micro_batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """The micro-batches of a pass, the same on all ranks of the replica."""
        return agree_on_pass(self._ranks, micro_batches)

    @contextmanager
    def run(
        self,
        name: str,
        micro_batches: Sequence[MicroBatch],
        mode: str,
        observer: Observer | None = None,
        predict: Predict | None = None,
    ) -> Iterator[ReplaySession]:
        """A session over micro-batches of the current rollout batch, whose tokens are compared with what the model runs.

        Raises:
            ReplayError: on every rank, if any of them ran other micro-batches or tokens.
        """
        session = ReplaySession(
            self._sites, self._chunks, micro_batches, mode=mode, localize=self._ranks.rows, routes=self._routes,
            observer=observer, predict=predict, look=self._tokens.look,
        )  # fmt: skip
        try:
            self._tokens.open(micro_batches)
            incomplete, ran = None, False
            try:
                with self._opened(session):
                    yield session
                    ran = True
            except ReplayError as error:
                if not ran:
                    raise
                incomplete = error
            finally:
                self._tokens.close()
            agree_on_outcome(self._groups, name, incomplete, self._tokens)
        except BaseException:
            self._tokens.forget()
            raise
        self._tokens.keep()

    @contextmanager
    def record(self, micro_batches: Sequence[MicroBatch]) -> Iterator[ReplaySession]:
        """A session over any micro-batches, in which the model's own routes are recorded."""
        self.require_closed("record")
        session = ReplaySession(self._sites, self._chunks, listed(micro_batches), mode="record", localize=self._ranks.rows)
        with self._opened(session):
            yield session

    @contextmanager
    def _opened(self, session: ReplaySession) -> Iterator[None]:
        self._open = True
        try:
            with session:
                yield
        finally:
            self._open = False
