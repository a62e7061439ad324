"""How far router scores have moved since the log-prob pass, per token: what RSPO's weight is made of.

Shape suffixes: S rows of a padded micro-batch, B sequences, T = S * B, L MoE layers, K top-k, E experts.

    shift = mean over L and K of |log score(theta) - log score(theta_old)|    of the K experts that the old policy activated

with softmax scores over all experts (https://arxiv.org/abs/2510.23027). A process has all layers and all rows of its micro-batches
here: the reference trainer has no pipeline stages and no sequence parallelism. Kept per token: L * K scores and ids, 5 or 6 bytes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron_pr2.replay.micro_batch import BoundMicroBatch, MicroBatch
from megatron_pr2.replay.router import select_experts
from megatron_pr2.replay.session import Observer, ReplaySession
from megatron_pr2.replay.sites import RouterSite


class RouterShift:
    """The old policy's experts and log-scores of a rollout batch, and the shift of the micro-batches that train on it."""

    def __init__(self) -> None:
        self._old: dict[int, tuple[Tensor, Tensor]] = {}  # by sequence: ids and log-scores, [S, L, K]
        self._shifts: dict[MicroBatch, list[Tensor]] = {}  # [T] of each layer so far

    @contextmanager
    def keeping(self, session: ReplaySession) -> Iterator[None]:
        """A log-prob pass under theta_old over all of the rollout batch."""
        layers: dict[MicroBatch, list[tuple[Tensor, Tensor]]] = defaultdict(list)

        def keep(site: RouterSite, bound: BoundMicroBatch, h_TH: Tensor, p_TE: Tensor) -> None:
            ids_TK = _activated(session, site, bound, h_TH, p_TE)
            log_scores_TK = torch.log_softmax(p_TE.float(), dim=-1).gather(1, ids_TK)
            layers[bound.micro_batch].append((ids_TK.to(session.id_dtype), log_scores_TK))

        with _also(session, keep):
            yield
        self._old = {}
        for micro_batch, of_layers in layers.items():
            ids_SBLK, log_scores_SBLK = (
                torch.stack(each, dim=1).unflatten(0, micro_batch.grid.sequence.shape) for each in zip(*of_layers, strict=True)
            )
            for column, sequence in enumerate(micro_batch.grid.sequence[0].tolist()):
                self._old[sequence] = ids_SBLK[:, column], log_scores_SBLK[:, column]

    @contextmanager
    def measuring(self, session: ReplaySession) -> Iterator[None]:
        """A training pass over some of these sequences; :meth:`shift` is complete once a micro-batch has run forward."""

        def measure(site: RouterSite, bound: BoundMicroBatch, h_TH: Tensor, p_TE: Tensor) -> None:
            ids_TK, old_TK = self._rows(bound.micro_batch, site.local)
            now_TK = torch.log_softmax(p_TE.float(), dim=-1).gather(1, ids_TK.long())
            self._shifts.setdefault(bound.micro_batch, []).append((now_TK - old_TK).abs().mean(1))

        with _also(session, measure):
            yield
        self._shifts = {}

    def shift(self, micro_batch: MicroBatch) -> Tensor:
        """[B, S] fp32; of no meaning where the micro-batch is padding."""
        shift_T = torch.stack(self._shifts.pop(micro_batch)).mean(0)
        return shift_T.view(micro_batch.grid.sequence.shape).t()

    def _rows(self, micro_batch: MicroBatch, layer: int) -> tuple[Tensor, Tensor]:
        """(ids, log-scores) [T, K] of one layer, padded to this micro-batch's rows; it may be cut otherwise than the old pass."""
        rows = len(micro_batch.grid.sequence)
        old = [self._old[sequence] for sequence in micro_batch.grid.sequence[0].tolist()]
        ids, log_scores = (
            torch.stack([torch.nn.functional.pad(x[:rows, layer], (0, 0, 0, rows - len(x[:rows]))) for x in each], dim=1)
            for each in zip(*old, strict=True)
        )
        return ids.flatten(0, 1), log_scores.flatten(0, 1)


@contextmanager
def _also(session: ReplaySession, observer: Observer) -> Iterator[None]:
    """Shows the routers' inputs and logits to a further observer."""
    first = session.observer

    def both(site: RouterSite, bound: BoundMicroBatch, h_TH: Tensor, p_TE: Tensor) -> None:
        if first is not None:
            first(site, bound, h_TH, p_TE)
        observer(site, bound, h_TH, p_TE)

    session.observer = both
    try:
        yield
    finally:
        session.observer = first


def _activated(session: ReplaySession, site: RouterSite, bound: BoundMicroBatch, h_TH: Tensor, p_TE: Tensor) -> Tensor:
    """Expert ids [T, K] that the pass uses: replayed ones, else those chosen by prediction, else the router's own."""
    if bound.routes_TLK is None:
        predicted_TK = session.predict(site, bound, h_TH, p_TE)
        return select_experts(site.router, p_TE) if predicted_TK is None else predicted_TK
    ids_TK = bound.routes_TLK[:, site.local].long()
    if bound.missing is not None:
        ids_TK.index_copy_(0, bound.missing, select_experts(site.router, p_TE.index_select(0, bound.missing)))
    return ids_TK
