"""attach(): the one way in, and PR2, the handle that a trainer holds.

    from megatron_pr2.attach import MicroBatch, PR2Config, ReplaySequence, attach

    pr2 = attach(model_chunks, PR2Config.preset("pr2"))
    pr2.begin_rollout(sequences)                             # routes that came with the rollout
    with pr2.old_logprobs(all_micro_batches):                # old-log-prob pass: replay (or record), keep features
        forward_backward(..., forward_only=True)
    for mini_step, micro_batches in enumerate(mini_batches, start=1):
        with pr2.actor_update(micro_batches, mini_step=mini_step):
            forward_backward(...)
        optimizer.step()
        pr2.step(lr=policy_lr)
    pr2.end_rollout()
    engine.update_weights(pr2.engine_weights(names_and_tensors))
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_pr2.checkpoint import checkpoint
from megatron_pr2.config import PR2Config
from megatron_pr2.drift.feature_plan import FeaturePlan
from megatron_pr2.drift.features import FeatureStore
from megatron_pr2.drift.measurement import Measurement
from megatron_pr2.drift.scalars import Scalars
from megatron_pr2.errors import AttachError, ReplayError
from megatron_pr2.parallel.groups import check_groups, communication_device, every_layer, everyone, token_group, whole_model
from megatron_pr2.parallel.replica import find_replica
from megatron_pr2.parallel.tokens import TokenIndex
from megatron_pr2.prediction.gates import merge_gates
from megatron_pr2.prediction.horizon import Forecast
from megatron_pr2.prediction.predictor import RoutePredictor, merge_gate
from megatron_pr2.prediction.strategies import make_predictor
from megatron_pr2.replay.alignment import require_alignment
from megatron_pr2.replay.consensus import agree_on_outcome, agree_on_pass
from megatron_pr2.replay.hook import check_release, check_unpatched
from megatron_pr2.replay.intake import take_in
from megatron_pr2.replay.micro_batch import MicroBatch, listed
from megatron_pr2.replay.model_settings import check_config
from megatron_pr2.replay.sequences import ReplaySequence, RolloutReport, sampled_tokens
from megatron_pr2.replay.session import Observer, Predict, ReplaySession
from megatron_pr2.replay.sites import give_back, unwrapped, upgrade_routers
from megatron_pr2.replay.token_check import TokenCheck
from megatron_pr2.routes.store import RouteStore
from megatron_pr2.routes.table import RouteTable

__all__ = ["PR2", "MicroBatch", "PR2Config", "ReplaySequence", "RouteTable", "attach"]  # what a pipeline needs, in one place

class PR2:
    """Predictive routing replay on one model; made by :func:`attach`.

    Attributes:
        config: the settings.
        sites: this rank's routers, ascending by layer.
        layers: of the whole model, by Megatron-Core's numbers and by Hugging Face's.
        predictor: W_p of this rank's layers, or None.
        routes: the routes of the rollout batch at work.
        engine_agreement: share of the engine's experts that the live router chose as well in the last old-log-prob pass, or None.
        model_config: Megatron's TransformerConfig.
        replica, token_group: the ranks that train the same sequences, and those that hold other tokens of the same layers.
        sequences, tokens: the rollout batch at work (without its routes), and its tokens as one axis.
        measurement: what its passes leave behind: features, drift, the predictor's gradient.
        forecast: over how many updates a prediction reaches, and the policy's optimizer.
        token_check: whether the model runs the tokens whose routes are replayed.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], config: PR2Config) -> None:
        self.config = config
        check_release()
        check_unpatched()
        self._chunks = list(chunks)
        self.model_config = unwrapped(chunks[0]).config
        check_config(self.model_config)
        check_groups(self.model_config, communication_device())
        self.sites, self.layers = upgrade_routers(self._chunks)
        with ExitStack() as undo:  # an attach() that fails leaves the model as it was
            undo.callback(give_back, self.sites)
            experts = self.model_config.num_moe_experts
            device = next((p.device for chunk in self._chunks for p in chunk.parameters()), communication_device())
            if device.type == "cpu" and communication_device().type == "cuda":
                raise AttachError("the model is in host memory, its process groups are on GPUs; attach() when it is on its device")
            self.token_group = token_group(self.model_config.sequence_parallel)
            self.replica = find_replica([site.column for site in self.sites], self.model_config.sequence_parallel)
            self.predictor: RoutePredictor | None = make_predictor(config, self.model_config, len(self.sites), device)
            self.forecast = Forecast(config, self.model_config, self.sites, self.predictor, self.token_group, device)
            self.measurement = Measurement(
                config, self.model_config, self.sites, self.predictor, self.replica, device
            )
            self.routes = RouteStore(
                self.replica,
                len(self.moe_layers),
                self.model_config.moe_router_topk,
                experts,
                device,
                scatter=config.routes == "engine" and config.route_delivery == "scatter",
            )
            self._device = device
            self.engine_agreement: float | None = None
            self._scalars = Scalars()
            self.token_check = TokenCheck(self.replica.ranks, self._chunks, device)
            self._open = False
            self.tokens = TokenIndex({})
            self.sequences: tuple[ReplaySequence, ...] = ()
            self._attached = True
            undo.pop_all()

    def follow(self, optimizer: Any) -> None:
        """Tells which optimizer trains the policy; predictor="momentum" reads from it how the gates move, after every update.

        Args:
            optimizer: Megatron-Core's, sharded or not (prediction.optimizer_moments). Other strategies need none and ignore it.

        Raises:
            AttachError: it does not train the gates.
        """
        self.forecast.watch(optimizer)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """0-based indices of all MoE layers of the model among its decoder layers: the L axis of a RouteTable."""
        return self.layers.moe

    @property
    def features(self) -> FeatureStore:
        """Router inputs and logits of the sampled tokens that this rank holds."""
        return self.measurement.features

    @property
    def feature_plan(self) -> FeaturePlan:
        """Which rank holds the features of which sampled token."""
        return self.measurement.plan

    # ---- one rollout batch -------------------------------------------------------------------------------------------

    def begin_rollout(self, sequences: Sequence[ReplaySequence]) -> RolloutReport:
        """Takes the sequences of a rollout batch that this rank trains on, checks their routes and samples tokens.

        Collective over the replica and over the ranks that hold other tokens of the same layers: what one of them refuses, all of
        them raise. Every rank of a replica is told of the same sequences in the same order.

        Raises:
            RouteError: a table is absent or does not fit the model, more tokens lack a route than `max_missing_share` allows, or
                the ranks of a replica were told of different sequences.
        """
        self._require_idle("begin_rollout")
        batch = take_in(
            sequences,
            self.config,
            self.model_config,
            len(self.moe_layers),
            self.replica,
            is_owner=self.routes.is_owner,
            sum_over_ranks=self._sum_over_ranks,
        )
        self.tokens = tokens = batch.tokens
        self.sequences = tuple(replace(sequence, routes=None, token_ids=None) for sequence in sequences)
        self.token_check.begin(tokens, sequences)
        self.routes.begin(tokens, batch.tables, batch.valid if batch.valid is not None else np.zeros(tokens.total, dtype=bool))
        sampled = sampled_tokens(sequences, tokens, batch.valid, self.config.seed, self.config.sample_fraction)
        self.forecast.end_batch()
        self.measurement.begin(self.sequences, tokens, sampled, self.forecast.known_horizon(self.sequences))
        self._scalars.rollout(report := batch.report(self.routes.table_bytes))
        return report

    def prefetch(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Starts moving the routes of micro-batches to the ranks that will replay them; the pass that runs them finds them there.

        Optional, collective over the replica: call it before other work that the transfer can hide behind.
        """
        self._require_attached()
        micro_batches = listed(micro_batches)
        if self.config.routes == "engine":
            agree_on_pass(self.replica.ranks, micro_batches)
            self.routes.slices([micro_batch.grid for micro_batch in micro_batches])

    @contextmanager
    def old_logprobs(self, micro_batches: Sequence[MicroBatch]) -> Iterator[ReplaySession]:
        """The pass that computes old log-probs under theta_old: predictor off, routes replayed (or recorded), features kept.

        Collective over all ranks of the model: each opens it equally often, without micro-batches where it has none. All ranks of a
        replica pass the same ones in the same order.

        Raises:
            ReplayError: a micro-batch was not run exactly once, or the live router agrees with fewer of the engine's experts than
                `min_agreement`: routes and tokens are not aligned.
        """
        mode = {"live": "live", "actor": "record", "engine": "replay"}[self.config.routes]
        predict = self.measurement.predict if self.config.routes == "actor" and self.predictor is not None else None
        self._require_idle("old_logprobs")
        micro_batches = listed(micro_batches)
        agree_on_pass(self.replica.ranks, micro_batches)
        self.measurement.open_log_prob_pass(micro_batches)
        try:
            with self._pass("old_logprobs", micro_batches, mode, self.measurement.keep_features, predict) as session:
                yield session
            if mode == "replay":
                self.engine_agreement = self.measurement.agreement.read(everyone(self.token_group))
                topk, experts = self.model_config.moe_router_topk, self.model_config.num_moe_experts
                require_alignment(self.engine_agreement, self.config.min_agreement, topk, experts)
        except BaseException:
            self.measurement.abort_log_prob_pass()
            raise
        self.measurement.close_log_prob_pass()
        if mode == "record":
            self.routes.mark_recorded([micro_batch.grid for micro_batch in micro_batches])
            for bound, ids_TLK in session.recorded():
                self.routes.record(bound.micro_batch.grid, ids_TLK)

    @contextmanager
    def actor_update(self, micro_batches: Sequence[MicroBatch], mini_step: int) -> Iterator[ReplaySession]:
        """Forward and backward of one mini-step: routes replayed, gate weights live, drift measured, predictor gradient gathered.

        Collective over all ranks of the model, as `old_logprobs` is.

        Args:
            mini_step: 1 for the first mini-step after the rollout, as in the paper; the predictor learns from 2 on, because at 1
                the policy is still the one that the features come from.

        Raises:
            ReplayError: mini_step < 1, or a micro-batch was not run exactly once.
        """
        if mini_step < 1:
            raise ReplayError(f"mini_step={mini_step}: mini-steps count from 1")
        mode = "replay" if self.config.replays else "live"
        self._require_idle("actor_update")
        micro_batches = listed(micro_batches)
        self.forecast.require_optimizer()
        agree_on_pass(self.replica.ranks, micro_batches)
        brought = False
        try:
            brought = self.measurement.open_training_pass(micro_batches, learning=self.config.learns and mini_step >= 2)
            with self._pass(f"mini-step {mini_step}", micro_batches, mode, self.measurement.compare) as session:
                yield session
        except BaseException:
            self.measurement.discard()
            raise
        finally:
            self.measurement.close_training_pass(brought)
        self.forecast.ran(mini_step)

    def step(self, lr: float) -> dict[str, Any]:
        """Ends a mini-step: updates the predictor (if it was learning) with alpha * lr and reads the drift metrics.

        Collective over the ranks that hold other tokens of the same layers; call it on every rank, after the policy's optimizer.

        Args:
            lr: the policy's current learning rate.

        Returns:
            "drift": means per MoE layer of the whole model (drift.metrics.COLUMNS and lift); "predictor": tokens, grad_norm,
            weight_norm over all layers; "features_absent": sampled tokens of this rank that no log-prob pass kept features of;
            "hold_back", where a prediction can be held back: per MoE layer of the whole model `beta`, which this batch was rolled
            out with, `lift`, the gain in agreement over all mini-steps that was expected of it, and `lift_error`, its standard
            error.

        Raises:
            AttachError: predictor="momentum" and the optimizer does not train the gates with Adam.
        """
        self._require_idle("step")
        update = {"tokens": 0.0, "grad_norm": 0.0, "weight_norm": 0.0}
        measured = self.measurement
        if self.predictor is not None:
            if measured.learning:
                measured.learning = False
                update = self.predictor.step(self.config.alpha * lr, self.token_group)
            if self.config.follows:
                self.forecast.update()
                update["weight_norm"] = self.predictor.weight_norm()
        absent, drift = measured.features_absent, measured.drift.read(self.token_group)
        if measured.hold_back is not None:
            measured.hold_back.read(self.token_group)
        measured.discard()
        held = {} if measured.hold_back is None else measured.hold_back.used
        columns = [site.column for site in self.sites]
        per_layer, update = whole_model(columns, drift | {f"hold_back.{name}": values for name, values in held.items()}, update)
        report = {"drift": {name: per_layer[name] for name in drift}, "predictor": update, "features_absent": absent}
        if held:
            report["hold_back"] = {name: per_layer[f"hold_back.{name}"] for name in held}
        self._scalars.step(report, self.engine_agreement)
        return report

    def metrics(self) -> dict[str, float]:
        """The last step in a few numbers for any logger, `pr2/lift` and others (megatron_pr2.drift.scalars); not collective."""
        return dict(self._scalars.values)

    def end_rollout(self) -> None:
        """After the last mini-step: lets go of routes and features, whose memory a colocated engine needs. Not collective.

        What the batch says of the prediction counts from the next push on; without this call from the push after the next
        begin_rollout() on.
        """
        self._require_idle("end_rollout")
        self.tokens, self.sequences = TokenIndex({}), ()
        self.token_check.begin(self.tokens, ())
        self.routes.begin(self.tokens, {}, np.zeros(0, dtype=bool))
        self.measurement.end()
        self.forecast.end_batch()

    @contextmanager
    def replay(self, micro_batches: Sequence[MicroBatch]) -> Iterator[ReplaySession]:
        """A further pass over the rollout's tokens under other weights (a proximal policy, say), with the same routes.

        Nothing is learned from it and nothing kept: features are of the weights that the routes were predicted from. Routes that
        the actor records must have been recorded before. Collective as `actor_update` is.

        Raises:
            ReplayError: a micro-batch was not run exactly once.
        """
        self._require_idle("replay")
        micro_batches = listed(micro_batches)
        agree_on_pass(self.replica.ranks, micro_batches)
        with self._pass("replay", micro_batches, "replay" if self.config.replays else "live") as session:
            yield session

    @contextmanager
    def record(self, micro_batches: Sequence[MicroBatch]) -> Iterator[ReplaySession]:
        """Any other forward whose routes are wanted (an embedded rollout, a handshake): live routes, recorded."""
        self._require_idle("record")
        micro_batches = listed(micro_batches)
        self._open = True
        try:
            localize = self.replica.ranks.rows
            with ReplaySession(self.sites, self._chunks, micro_batches, mode="record", localize=localize) as session:
                yield session
        finally:
            self._open = False

    def recorded_tables(self, session: ReplaySession, lengths: dict[int, int]) -> dict[int, RouteTable]:
        """Tables of a :meth:`record` session, by sequence id."""
        return session.recorded_tables(lengths, len(self.moe_layers), self.model_config.num_moe_experts)

    # ---- weights for the engine --------------------------------------------------------------------------------------

    def engine_weights(
        self, weights: Iterable[tuple[str, Tensor]], *, own_stage: bool = False
    ) -> Iterator[tuple[str, Tensor]]:
        """Passes weights in Hugging Face names through and merges W_p into the gates on the way.

        Collective over the pipeline group at the call (not while the result is walked), unless `own_stage`.

        Args:
            weights: of the whole model, or with `own_stage` of this pipeline stage only.

        Raises:
            AttachError: after the last weight, if not every MoE layer's gate came by (another naming would lose the prediction
                silently).
        """
        if self.predictor is None:
            return iter(weights)
        own = {site.layer: w_EH for site in self.sites if (w_EH := self.measurement.prediction(site)) is not None}
        return merge_gates(weights, own if own_stage else every_layer(own), self.layers)

    @contextmanager
    def merged_gates(self) -> Iterator[None]:
        """The model itself with W + W_p in its gates, for an embedded rollout; the gates come back bit-identical."""
        saved = [site.router.weight.data for site in self.sites]
        try:
            for site in self.sites:
                if (w_EH := self.measurement.prediction(site)) is not None:
                    site.router.weight.data = merge_gate(site.router.weight.data, w_EH)
            yield
        finally:
            for site, data in zip(self.sites, saved, strict=True):
                site.router.weight.data = data

    # ---- life --------------------------------------------------------------------------------------------------------

    def save(self, directory: str | Path, *, rollout: bool = False) -> None:
        """Writes W_p and what goes with it into a directory of its own; any parallel layout loads it. Collective over all ranks.

        A pipeline that would rather have it in its own `dist_checkpointing` call: checkpoint.checkpoint.sharded_state_dict.

        Args:
            rollout: also keeps the rollout batch at work, for a checkpoint between two mini-steps.

        Raises:
            CheckpointError: on every rank, if any rank could not write.
        """
        checkpoint.save(self, directory, rollout=rollout)

    def load(self, directory: str | Path, *, sequences: Sequence[int] | None = None) -> None:
        """Restores what :meth:`save` wrote; collective over all ranks.

        Args:
            sequences: takes up the rollout batch as well: the ids of what this rank's replica trains on.

        Raises:
            CheckpointError: on every rank, if any rank cannot read it, or it is of a model of another size.
        """
        self._require_idle("load")
        checkpoint.load(self, directory, sequences=sequences)

    def detach(self) -> None:
        """Gives the routers back as they were; the handle cannot be used afterwards.

        Raises:
            ReplayError: a pass is open.
        """
        if not self._attached:
            return
        self._require_idle("detach")
        give_back(self.sites)
        self.replica.release()
        self._attached = False

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _require_attached(self) -> None:
        if not self._attached:
            raise AttachError("this PR2 handle was detached; attach() again")

    def _require_idle(self, call: str) -> None:
        self._require_attached()
        if self._open:
            raise ReplayError(
                f"{call}: another pass is open on this model; close it first. Passes follow each other, and `step` follows them"
            )

    def _sum_over_ranks(self, values: Sequence[int]) -> list[int]:
        if self.token_group is None or dist.get_world_size(self.token_group) == 1:
            return [int(v) for v in values]
        total = torch.tensor([int(v) for v in values], dtype=torch.int64, device=self._device)
        dist.all_reduce(total, group=self.token_group)
        return [int(v) for v in total.tolist()]

    @contextmanager
    def _pass(
        self,
        name: str,
        micro_batches: Sequence[MicroBatch],
        mode: str,
        observer: Observer | None = None,
        predict: Predict | None = None,
    ) -> Iterator[ReplaySession]:
        """A session over micro-batches of the rollout batch at work, whose tokens are compared with what the model runs."""
        session = ReplaySession(
            self.sites,
            self._chunks,
            micro_batches,
            mode=mode,
            localize=self.replica.ranks.rows,
            routes=self.routes.slices,
            observer=observer,
            predict=predict,
            look=self.token_check.look,
        )
        try:
            self.token_check.open(micro_batches)
            incomplete, ran = None, False
            self._open = True
            try:
                with session:
                    yield session
                    ran = True
            except ReplayError as error:
                if not ran:
                    raise
                incomplete = error
            finally:
                self._open = False
                self.token_check.close()
            agree_on_outcome(everyone(self.token_group), name, incomplete, self.token_check)
        except BaseException:
            self.token_check.forget()
            raise
        self.token_check.keep()


def attach(model_chunks: Sequence[torch.nn.Module] | torch.nn.Module, config: PR2Config) -> PR2:
    """Adds predictive routing replay to a built Megatron-Core model (plain, DDP- or Float16Module-wrapped), in place.

    Collective over all ranks of the default process group, which all hold a part of the model.

    Args:
        model_chunks: the model, or its virtual pipeline chunks.
        config: e.g. PR2Config.preset("pr2").

    Raises:
        AttachError: no MoE layers, a custom or sinkhorn router, another replay at work, or attached already.
    """
    chunks = [model_chunks] if isinstance(model_chunks, torch.nn.Module) else list(model_chunks)
    if not chunks:
        raise AttachError("attach() got no model chunk")
    if not isinstance(config, PR2Config):
        raise AttachError(f"attach() got {config!r} as its config; pass PR2Config.preset('pr2'), or another preset")
    return PR2(chunks, config)
