"""ReplaySession: routes follow the micro-batch, forward and in recomputation (design decision 4).

Shape suffixes: T rows of a router's input on this rank, L local MoE layers, K top-k, E experts.

Scope: one pass over some micro-batches. Lifecycle: `with session:` binds the routers; when a chunk runs a micro-batch forward, its
forward cursor is set (replay.cursor says how); when the gradient arrives at the chunk's output, a hook sets its backward
cursor, which activation recomputation (code that runs inside autograd's backward) uses. 1F1B, interleaved and recomputed schedules
need nothing else. On exit the routers are released whatever happened, and, if nothing was raised, every (micro-batch, layer) must
have been seen exactly once forward and at most once in recomputation.
Missing rows fall back to the current router's own top-k; padding and the last token of a sequence have no route. What a router
chooses itself is kept until it has been recomputed: recomputed logits may differ in the last bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from megatron.core.transformer.moe.moe_utils import group_limited_topk
from torch import Tensor

from megatron_pr2.errors import ReplayError
from megatron_pr2.parallel.grid import TokenGrid
from megatron_pr2.replay.cursor import Cursors, Look
from megatron_pr2.replay.micro_batch import BoundMicroBatch, MicroBatch
from megatron_pr2.replay.router import PredictiveTopKRouter, TopK, select_experts
from megatron_pr2.replay.sites import RouterSite
from megatron_pr2.routes.scatter import RouteSlice
from megatron_pr2.routes.table import RouteTable, file_rows

MODES = ("live", "record", "replay")

Observer = Callable[[RouterSite, BoundMicroBatch, Tensor, Tensor], None]
Predict = Callable[[RouterSite, BoundMicroBatch, Tensor, Tensor], Tensor]
Routes = Callable[[Sequence[TokenGrid]], list[tuple[RouteSlice, npt.NDArray[np.bool_]]]]


class _SiteControl:
    """What the session does for one router."""

    def __init__(self, session: ReplaySession, site: RouterSite) -> None:
        self._session, self._site = session, site
        self._predicted: Tensor | None = None
        self._samples = 1

    def observe(self, router: PredictiveTopKRouter, hidden: Tensor, logits: Tensor) -> None:
        """Shows the gate to the session's observer, once per micro-batch: not again when it is recomputed."""
        bound, recomputing = self._session.cursors.current(self._site)
        self._samples = self._side_by_side(bound, hidden.shape)
        if recomputing:
            return
        with torch.no_grad():
            h_TH, p_TE = (each.detach().reshape(-1, each.shape[-1]) for each in (hidden, logits))
            if self._samples > 1:
                h_TH, p_TE = (_transposed(each, len(each) // self._samples) for each in (h_TH, p_TE))
            self._predicted = self._session.predict(self._site, bound, h_TH, p_TE)
            if self._session.observer is not None:
                self._session.observer(self._site, bound, h_TH, p_TE)

    def get_replay_topk(
        self, scores: Tensor, topk: int, num_groups: int | None, group_topk: int | None, default_compute_topk: TopK
    ) -> tuple[Tensor, Tensor]:
        bound, recomputing = self._session.cursors.current(self._site)
        self._session.count(self._site, bound, recomputing)
        rows = bound.local.num_rows
        if scores.shape[0] != rows:
            raise ReplayError(
                f"layer {self._site.layer}, micro-batch {bound.micro_batch.key!r}: the router sees {scores.shape[0]} rows, the "
                f"micro-batch's grid has {rows} on this rank; the grid given to PR2 is not what the model runs, or its "
                "layers run it in parts (mlp_chunks_for_prefill above 1, under an inference context: set it to 1)"
            )

        def own(rows_RE: Tensor) -> tuple[Tensor, Tensor]:
            if group_topk and len(rows_RE) < rows:
                # The given one insists on the number of rows of the whole micro-batch.
                sizes = {"num_tokens": len(rows_RE), "num_experts": rows_RE.shape[1]}
                return group_limited_topk(rows_RE, topk, num_groups=num_groups, group_topk=group_topk, **sizes)
            return default_compute_topk(rows_RE, topk, num_groups, group_topk)

        if self._samples == 1:
            return self._choose(bound, recomputing, scores, own)
        chosen, ids = self._choose(bound, recomputing, _transposed(scores, rows // self._samples), own)
        return _transposed(chosen, self._samples), _transposed(ids, self._samples)

    def counted(self, map_TE: Tensor) -> Tensor | None:
        """Without padding; None under replay, where experts are those of an earlier router and follow no bias."""
        if self._session.mode == "replay":
            return None
        bound, _ = self._session.cursors.current(self._site)
        if (real_T1 := bound.real_T1) is None:  # the same for every layer
            real_T1 = torch.from_numpy(bound.local.sequence.reshape(-1, 1) >= 0).to(map_TE.device, non_blocking=True)
            bound.real_T1 = real_T1
        if self._samples > 1:
            real_T1 = _transposed(real_T1, self._samples)
        return map_TE & real_T1

    def _side_by_side(self, bound: BoundMicroBatch, shape: Sequence[int]) -> int:
        """How many samples of a packed micro-batch the router has side by side, as [tokens, samples, H].

        From 0.19 on Megatron-Core lays the samples of a flattened batch so where `PackedSeqParams.tokens_per_sample` is set.

        Raises:
            ReplayError: something else has another shape of input than the grid.
        """
        length, width = bound.local.sequence.shape
        if len(shape) != 3 or shape[1] == width or shape[0] * shape[1] != length * width:
            return 1  # another number of rows is refused when they are chosen for
        if width == 1 and shape[0] == bound.tokens_per_sample:
            return shape[1]
        raise ReplayError(
            f"layer {self._site.layer}, micro-batch {bound.micro_batch.key!r}: the router sees {shape[0]} x {shape[1]} rows, the "
            f"micro-batch's grid has {length} x {width} on this rank; describe a padded batch with MicroBatch.padded and packed "
            "sequences with MicroBatch.packed"
        )

    def _choose(self, bound: BoundMicroBatch, recomputing: bool, scores: Tensor, own: TopK) -> tuple[Tensor, Tensor]:
        """(scores [T, K], expert ids [T, K]) of rows in the order of the micro-batch's grid; `own` is the router's own choice."""
        missing = bound.missing
        if bound.routes_TLK is None:
            ids = self._own_ids(bound, recomputing, lambda: own(scores.detach())[1] if self._predicted is None else self._predicted)
        else:
            ids = bound.routes_TLK[:, self._site.local].long()
            if missing is not None:
                # Only for the missing rows: to select for all of them is what a replay saves.
                rows_ME = scores.detach().index_select(0, missing)
                ids.index_copy_(0, missing, self._own_ids(bound, recomputing, lambda: own(rows_ME)[1]))
        return scores.gather(1, ids), ids

    def _own_ids(self, bound: BoundMicroBatch, recomputing: bool, choose: Callable[[], Tensor]) -> Tensor:
        """What the router chose itself: in recomputation the same as in the forward, whatever the recomputed logits say.

        Kept while recording, and where recomputation is going to ask for them: a checkpointed layer runs without gradients inside
        a forward with them. Recomputation takes them out again.
        """
        site, recording = self._site.local, self._session.mode == "record"
        if recomputing and site in bound.own:
            return (bound.own[site] if recording else bound.own.pop(site)).long()
        ids = choose()
        if recording or (bound.has_backward and not torch.is_grad_enabled()):
            bound.own[site] = ids.to(self._session.id_dtype)
        return ids


def _transposed(rows_TX: Tensor, outer: int) -> Tensor:
    """Rows [outer, inner] in the order [inner, outer]."""
    return rows_TX.view(outer, -1, rows_TX.shape[-1]).transpose(0, 1).reshape(rows_TX.shape)


class ReplaySession:
    """One pass in which routes are replayed, recorded or merely observed."""

    def __init__(
        self,
        sites: Sequence[RouterSite],
        chunks: Sequence[torch.nn.Module],
        micro_batches: Sequence[MicroBatch],
        *,
        mode: str,
        localize: Callable[[TokenGrid], TokenGrid] = lambda grid: grid,
        routes: Routes | None = None,
        observer: Observer | None = None,
        predict: Predict | None = None,
        look: Look | None = None,
    ) -> None:
        """Args:
        sites, chunks: this rank's routers and the model chunks that they live in.
        micro_batches: every micro-batch of the pass; keys must differ.
        mode: "live", "record" or "replay".
        localize: gives this rank's rows of a whole micro-batch.
        routes: gives this rank's routes of whole micro-batches and which rows have one, for "replay".
        observer: sees (site, micro-batch, h [T, H], p [T, E]) once per forward.
        look: sees what a chunk is called with, per micro-batch.
        predict: while recording, logits by which the routes are chosen instead of the router's own.
        """
        if mode not in MODES:
            raise ReplayError(f"replay mode {mode!r}: expected one of {', '.join(MODES)}")
        self.mode, self.observer = mode, observer
        self._sites, self._predict = list(sites), predict
        self.cursors = Cursors(chunks, look)
        self._micro_batches = list(micro_batches)
        self._localize, self._routes = localize, routes
        self._bound: dict[Hashable, BoundMicroBatch] = {}
        self._seen: Counter[tuple[Hashable, int, bool]] = Counter()
        self.missing_rows = 0
        self.replayed_rows = 0
        many = bool(self._sites) and self._sites[0].router.num_experts > 256
        # torch indexes with signed ids only, hence int16 beyond 256 experts.
        self.id_dtype = torch.int16 if many else torch.uint8
        keys = Counter(micro_batch.key for micro_batch in self._micro_batches)
        if twice := [key for key, times in keys.items() if times > 1]:
            raise ReplayError(f"two micro-batches of one pass have the same key {twice[0]!r}; keys must differ: give key=...")
        if len(set(self._micro_batches)) < len(self._micro_batches):
            raise ReplayError("two micro-batches of one pass have the same rows; give each sequence once")

    def __enter__(self) -> ReplaySession:
        if any(site.router.router_replay is not None for site in self._sites):
            raise ReplayError("another pass is open on this model; passes follow each other, one cannot be opened inside another")
        for site in self._sites:
            site.router.set_control(_SiteControl(self, site))
        try:
            self._bind()
            self.cursors.open(self._bound)
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        self._release()
        if exc_type is None:
            self._check_complete()

    def begin(self, chunk: torch.nn.Module, micro_batch: MicroBatch) -> None:
        """Announces that the next forward of `chunk` (wrapped or not) is this micro-batch; without it, order decides.

        Raises:
            ReplayError: the chunk or the micro-batch is not part of this session.
        """
        self.cursors.begin(chunk, micro_batch)

    def end(self, chunk: torch.nn.Module, micro_batch: MicroBatch, output: Any) -> None:
        """After a forward that `begin` announced: recomputation in the backward of its output finds this micro-batch again."""
        self.cursors.end(chunk, micro_batch, output)

    def forward_step(
        self, function: Callable[..., Any], locate: Callable[[Any], MicroBatch] = lambda item: item["micro_batch"]
    ) -> Callable[..., Any]:
        """Wraps a Megatron forward step `(data_iterator, model) -> (output, loss_func)`: micro-batches are known by identity.

        Args:
            function: the pipeline's own forward step; it takes its batch by `next(data_iterator)`. Where Megatron gives it None
                (tensor-parallel ranks that are sent their batch, inner pipeline stages), micro-batches run in the pass's order.
            locate: finds the MicroBatch in what the iterator yields.
        """
        return self.cursors.forward_step(function, locate)

    def predict(self, site: RouterSite, bound: BoundMicroBatch, h_TH: Tensor, p_TE: Tensor) -> Tensor | None:
        """Expert ids [T, K] chosen by prediction while recording, or None for the router's own."""
        if self._predict is None or self.mode != "record":
            return None
        return select_experts(site.router, self._predict(site, bound, h_TH, p_TE))

    def count(self, site: RouterSite, bound: BoundMicroBatch, recomputing: bool) -> None:
        """Counts one selection of one layer for one micro-batch (invariant I4); host integers only."""
        self._seen[bound.micro_batch.key, site.local, recomputing] += 1

    def recorded(self) -> Iterator[tuple[BoundMicroBatch, Tensor]]:
        """What the pass recorded: every micro-batch with its ids [T, L, K] on the device.

        Raises:
            ReplayError: a layer was not recorded.
        """
        for bound in self._bound.values():
            if len(bound.own) != len(self._sites):
                raise ReplayError(f"micro-batch {bound.micro_batch.key!r}: only {len(bound.own)} layers were recorded")
            if self._sites:
                yield bound, torch.stack([bound.own[site.local] for site in self._sites], dim=1)

    def recorded_tables(self, lengths: Mapping[int, int], num_columns: int, num_experts: int) -> dict[int, RouteTable]:
        """What the pass recorded, as one table per sequence; tokens and layers of other ranks stay missing or zero.

        One device-to-host copy per micro-batch.
        """
        tables: dict[int, RouteTable] = {}
        columns = [site.column for site in self._sites]
        for bound, ids_TLK in self.recorded():
            rows, sequence, position = bound.local.real()
            if unknown := set(sequence.tolist()) - set(lengths):
                raise ReplayError(f"recorded_tables: no length of the sequences {sorted(unknown)}, which were recorded")
            ids_RLK = ids_TLK.cpu().numpy()[rows]
            file_rows(
                tables, ids_RLK, sequence, position,
                columns=columns, lengths=lengths, num_columns=num_columns, num_experts=num_experts,
            )  # fmt: skip
        return tables

    def _bind(self) -> None:
        for micro_batch in self._micro_batches:
            self._bound[micro_batch.key] = BoundMicroBatch(micro_batch, self._localize(micro_batch.grid))
        if self.mode != "replay":
            return
        if self._routes is None:
            raise ReplayError("a replay session needs routes; open it with PR2.old_logprobs() or PR2.actor_update()")
        # Also on a pipeline rank without MoE layers: the others of its replica are sending.
        found = self._routes([micro_batch.grid for micro_batch in self._micro_batches])
        for bound, (routes, valid) in zip(self._bound.values(), found, strict=True):
            bound.slice = routes
            if not self._sites:
                continue
            (missing,) = np.nonzero(~valid)
            self.missing_rows += len(missing)
            self.replayed_rows += int(valid.sum())
            if len(missing):
                bound.missing = torch.from_numpy(missing).to(self._sites[0].router.weight.device, non_blocking=True)

    def _release(self) -> None:
        self.cursors.close()
        for site in self._sites:
            site.router.set_control(None)
        for bound in self._bound.values():
            # A trainer may keep the session; the routes belong to the rollout batch.
            bound.slice = bound.routes_TLK = bound.real_T1 = None
            if self.mode != "record":
                bound.own.clear()

    def _check_complete(self) -> None:
        for bound in self._bound.values():
            for site in self._sites:
                forward = self._seen[bound.micro_batch.key, site.local, False]
                again = self._seen[bound.micro_batch.key, site.local, True]
                if forward != 1 or again > 1:
                    raise ReplayError(
                        f"micro-batch {bound.micro_batch.key!r}, layer {site.layer}: routed {forward} times forward and {again} "
                        "times in recomputation; expected once, and at most once"
                    )
