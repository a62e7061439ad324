"""Parts: what the handle of an attached model holds, put together and, where that fails, undone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_pr2.config import PR2Config
from megatron_pr2.drift.measurement import Measurement
from megatron_pr2.drift.mini_steps import MiniSteps
from megatron_pr2.errors import AttachError, ReplayError
from megatron_pr2.parallel.consensus import largest
from megatron_pr2.parallel.groups import check_groups, communication_device, everyone, token_group
from megatron_pr2.parallel.replica import find_replica
from megatron_pr2.parallel.tokens import TokenIndex
from megatron_pr2.prediction.horizon import Horizon
from megatron_pr2.prediction.lookahead import LookAhead, LookaheadPredictor
from megatron_pr2.prediction.predictor import RoutePredictor
from megatron_pr2.prediction.strategies import make_predictor
from megatron_pr2.replay.hook import check_release, check_unpatched
from megatron_pr2.replay.micro_batch import BoundMicroBatch, MicroBatch
from megatron_pr2.replay.model_settings import check_config
from megatron_pr2.replay.passes import Passes
from megatron_pr2.replay.progress import Progress
from megatron_pr2.replay.sequences import ReplaySequence, sampled_tokens
from megatron_pr2.replay.session import Observer, ReplaySession
from megatron_pr2.replay.sites import RouterSite, give_back, unwrapped, upgrade_routers
from megatron_pr2.replay.token_check import TokenCheck
from megatron_pr2.routes.store import RouteStore
from megatron_pr2.routes.table import RouteTable


class Parts:
    """What a handle is made of, as passes, checkpoints and tests see it.

    Attributes:
        config, model_config: the settings, and Megatron's TransformerConfig.
        sites: this rank's routers, ascending by layer.
        layers, moe_layers: of the whole model, and those of them with experts (0-based): the L axis of a RouteTable.
        predictor: W_p of this rank's layers, or None.
        replica, token_group: the ranks that train the same sequences, and those that hold other tokens of the same layers.
        sequences, tokens, routes: the current rollout batch: its sequences (without routes), its tokens as one axis, its routes.
        measurement: what its passes leave behind: features, drift, the predictor's gradient.
        features, feature_plan: router inputs and logits of this rank's sampled tokens, and which rank holds which.
        horizon: over how many updates a prediction reaches, and the policy's optimizer.
        progress: which passes of the rollout batch have run.
        token_check: whether the model runs the tokens whose routes are replayed.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], config: PR2Config, optimizer: Any) -> None:
        self.config = config
        check_release()
        check_unpatched()
        self.model_config = model = unwrapped(chunks[0]).config
        check_config(model)
        check_groups(model, communication_device())
        self.sites, self.layers = upgrade_routers(chunks)
        self.moe_layers = self.layers.moe
        with ExitStack() as undo:  # an attach() that fails leaves the model as it was
            undo.callback(give_back, self.sites)
            device = next((p.device for chunk in chunks for p in chunk.parameters()), communication_device())
            if device.type == "cpu" and communication_device().type == "cuda":
                raise AttachError("the model is in host memory, its process groups are on GPUs; attach() when it is on its device")
            self.token_group = token_group(model.sequence_parallel)
            self.replica = find_replica([site.column for site in self.sites], model.sequence_parallel)
            undo.callback(self.replica.release)
            self.predictor: RoutePredictor | None = make_predictor(config, model, len(self.sites), device)
            self.horizon = Horizon(config, model, self.sites, self.predictor, self.token_group, device)
            self.horizon.optimizer = optimizer
            scores = model.moe_router_score_function
            self._look = LookAhead(chunks, self.sites, self.token_group, scores) if config.looks_ahead else None
            self.measurement = Measurement(
                config, model, self.sites, self.predictor, self.replica, self.token_group, device, self.moe_layers
            )
            self.features, self.feature_plan = self.measurement.features, self.measurement.plan
            self.routes = RouteStore(
                self.replica, len(self.moe_layers), model.moe_router_topk, model.num_moe_experts, device,
                scatter=config.routes == "engine" and config.route_delivery == "scatter",
            )  # fmt: skip
            self.token_check = TokenCheck(self.replica.ranks, chunks, device)
            self.progress = Progress(config)
            groups = everyone(self.token_group)
            self._passes = Passes(self.sites, chunks, self.replica.ranks, groups, self.routes.slices, self.token_check)
            undo.pop_all()
        self._device = device
        self.tokens = TokenIndex({})
        self.sequences: tuple[ReplaySequence, ...] = ()
        self._mini_steps = MiniSteps(config, self.progress, self.horizon, self.measurement)
        self._mode = "replay" if config.replays else "live"  # of passes after the old-log-prob pass

    @property
    def optimizer(self) -> Any:
        """The policy's optimizer, from `attach` or set later: a Megatron-Core's or a torch.optim's. None: not known.

        Raises:
            AttachError: when it is set, if a predictor needs it and it does not train the gates, or, for predictor="momentum", is
                not known to prediction.optimizer_moments.
        """
        return self.horizon.optimizer

    @optimizer.setter
    def optimizer(self, optimizer: Any) -> None:
        self.horizon.optimizer = optimizer

    @property
    def engine_agreement(self) -> float | None:
        """Share of the engine's experts that the current router chose as well in the last old-log-prob pass.

        Under the prediction that the engine had; over some rows of every sequence, all layers and all ranks.
        """
        found = self.measurement.engine_agreement
        return None if found is None else found.overall

    def recorded_tables(self, session: ReplaySession, lengths: dict[int, int]) -> dict[int, RouteTable]:
        """Tables of a :meth:`record` session, by sequence id."""
        return session.recorded_tables(lengths, len(self.moe_layers), self.model_config.num_moe_experts)

    def _looked_at(self, micro_batches: Sequence[MicroBatch]) -> dict[MicroBatch, Tensor]:
        """The rows of this rank that bear loss, of every micro-batch."""
        looked_at = {each for micro_batch in micro_batches for each in np.unique(micro_batch.grid.sequence).tolist()}
        sequences = [sequence for sequence in self.sequences if sequence.id in looked_at]
        bears = np.append(sampled_tokens(sequences, self.tokens, None, 0, 1.0), False)  # the last one is padding's, -1
        return {
            micro_batch: torch.from_numpy(np.nonzero(bears[tokens_T])[0]).to(self._device)
            for micro_batch, tokens_T in zip(micro_batches, self.measurement.rows(micro_batches), strict=True)
        }

    def _training_observer(self, watched: Sequence[MicroBatch]) -> Observer:
        """Measures drift, and keeps what a look-ahead needs of the watched micro-batches."""
        measure = self.measurement.compare
        if self._look is None or not watched:
            self._forget_watched()
            return measure
        keep = self._look.watch(self._looked_at(watched))

        def both(site: RouterSite, bound: BoundMicroBatch, h_TH: Tensor, p_TE: Tensor) -> None:
            measure(site, bound, h_TH, p_TE)
            keep(site, bound, h_TH, p_TE)

        return both

    def _end_passes(self, call: str) -> None:
        """Before a call that belongs to no pass: none may be open, and what the last one left is ended or freed."""
        self._passes.require_closed(call)
        self._mini_steps.end_open(call)
        self._forget_watched()

    def _forget_watched(self) -> None:
        if self._look is not None:
            self._look.forget()

    def _predict_ahead(self, micro_batches: list[MicroBatch], forward: Callable[[ReplaySession], object]) -> None:
        """See PR2.look_ahead."""
        if self._look is None or not isinstance(self.predictor, LookaheadPredictor):
            raise AttachError(f"look_ahead: predictor={self.config.predictor!r} is not made by a look-ahead; use 'lookahead'")
        if not callable(forward):
            raise ReplayError(f"look_ahead: forward is a {type(forward).__name__}; pass a function that runs the micro-batches")
        known = self._look.watched(micro_batches)
        # One rank alone would run another number of forwards, and wait for the others in them.
        again = torch.tensor([int(known is None)], device=self._device)
        watched = not int(largest(again, everyone(self.token_group)))
        rows = known if watched and known is not None else self._looked_at(micro_batches)

        def run(observer: Observer) -> None:
            with torch.no_grad(), self._passes.run("look-ahead", micro_batches, self._mode, observer) as session:
                forward(session)

        updates = self.horizon.average()
        if not updates:
            self.progress.warn(
                "look_ahead() after %d mini-steps of this rollout batch, and pr2.horizon is 0: it looks 0 updates ahead, which is "
                "no prediction. Call it after the last step() of a batch of several mini-steps, or set pr2.horizon to the updates "
                "that rollouts are behind", self.progress.mini_step,
            )  # fmt: skip
        multiple = max(1.0, self.predictor.size_of(updates))
        gates_LEH = self.horizon.gate_updates()
        change_LEH, squares_L = self._look.run(self.horizon.optimizer, gates_LEH, multiple, rows, run, watched=watched)
        self.predictor.look(change_LEH, squares_L, updates)
        if not math.isfinite(self.predictor.weight_norm()):
            self.measurement.pushes.start_over()
        self.progress.looked = True
