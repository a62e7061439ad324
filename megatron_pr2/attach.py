"""attach(): the one way in, and PR2, the handle that a trainer holds.

    pr2 = attach(model_chunks, PR2Config.preset("pr2"))
    pr2.begin_rollout(sequences)                             # routes that came with the rollout
    with pr2.old_logprobs(micro_batches) as session:         # old-log-prob pass: replay (or record), keep features
        forward_only(session.forward_step(forward_step))
    for mini_step, micro_batches in enumerate(mini_batches, start=1):
        with pr2.actor_update(micro_batches, mini_step=mini_step) as session:
            forward_backward(session.forward_step(forward_step))
        optimizer.step()
        report = pr2.step(lr=policy_lr)
    engine.update_weights(pr2.engine_weights(names_and_tensors))
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_pr2.agreement import AgreementCheck, require_alignment
from megatron_pr2.config import PR2Config
from megatron_pr2.errors import AttachError, ReplayError, RouteError
from megatron_pr2.feature_plan import FeaturePlan
from megatron_pr2.features import FeatureStore, Located
from megatron_pr2.groups import communication_device, every_layer, everyone, token_group, whole_model
from megatron_pr2.layout import IntArray
from megatron_pr2.live_layout import check_live_layout
from megatron_pr2.metrics import DriftMetrics, drift_columns
from megatron_pr2.predictor import RoutePredictor, merge_gate, predicted_logits
from megatron_pr2.replay import BoundMicroBatch, MicroBatch, Observer, ReplaySession
from megatron_pr2.replica import find_replica
from megatron_pr2.route_store import RouteStore
from megatron_pr2.router import select_experts
from megatron_pr2.routes import RouteTable
from megatron_pr2.sequences import (
    ReplaySequence,
    RolloutReport,
    check_sequences,
    checked_table,
    count_missing,
    sampled_tokens,
    too_many_missing,
)
from megatron_pr2.sites import RouterSite, check_config, unwrapped, upgrade_routers
from megatron_pr2.tokens import TokenIndex

logger = logging.getLogger(__name__)

# Hugging Face names of MoE gates: Qwen2/3-MoE, OLMoE, DeepSeek, GLM (mlp.gate) and Mixtral (block_sparse_moe.gate).
GATE_NAME = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:mlp|block_sparse_moe)\.gate\.weight$")


class PR2:
    """Predictive routing replay on one model; made by :func:`attach`.

    Attributes:
        config: the settings.
        sites: this rank's routers, ascending by layer.
        moe_layers: 0-based indices of all MoE layers of the model.
        predictor: W_p of this rank's layers, or None.
        routes: the routes of the rollout batch at work.
        engine_agreement: share of the engine's experts that the live router chose as well in the last old-log-prob pass, or None.
        features, feature_plan: router inputs and logits of its sampled tokens, and which rank holds which.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], config: PR2Config) -> None:
        self.config = config
        self._chunks = list(chunks)
        self._model_config = unwrapped(chunks[0]).config
        check_config(self._model_config)
        check_live_layout(self._model_config, communication_device())
        self.sites, self.moe_layers = upgrade_routers(self._chunks)
        self._score_function = self._model_config.moe_router_score_function
        hidden, experts = self._model_config.hidden_size, self._model_config.num_moe_experts
        device = self.sites[0].router.weight.device if self.sites else communication_device()
        self._group = token_group(self._model_config.sequence_parallel)
        self._replica = find_replica([site.column for site in self.sites], self._model_config.sequence_parallel)
        self.predictor: RoutePredictor | None = None
        if config.learns:
            self.predictor = RoutePredictor(
                len(self.sites),
                experts,
                hidden,
                target=config.target,
                score_function=self._score_function,
                betas=config.betas,
                eps=config.eps,
                device=device,
            )
        self.features = FeatureStore(
            len(self.sites),
            experts,
            hidden,
            device=device if config.feature_device == "device" else torch.device("cpu"),
            h_dtype=torch.bfloat16,
        )
        self.feature_plan = FeaturePlan(
            self.features, self._replica.stage, budget_bytes=config.feature_bytes, device=device
        )
        self.routes = RouteStore(
            self._replica,
            len(self.moe_layers),
            self._model_config.moe_router_topk,
            experts,
            device,
            scatter=config.routes == "engine" and config.route_delivery == "scatter",
        )
        self._device = device
        self._drift = DriftMetrics(len(self.sites), device)
        self._agreement = AgreementCheck(device)
        self.engine_agreement: float | None = None
        self._tokens = TokenIndex({})
        self._located: dict[Any, Located] = {}
        self._learning = False
        self._features_absent = 0
        self._attached = True

    # ---- one rollout batch -------------------------------------------------------------------------------------------

    def begin_rollout(self, sequences: Sequence[ReplaySequence]) -> RolloutReport:
        """Takes the sequences of a rollout batch that this rank trains on, checks their routes and samples tokens.

        Collective over the replica and over the ranks that hold other tokens of the same layers: what one of them refuses, all of
        them raise. Every rank of a replica is told of the same sequences in the same order.

        Raises:
            RouteError: a table is absent or does not fit the model, more tokens lack a route than `max_missing_share` allows, or
                the ranks of a replica were told of different sequences.
        """
        self._require_attached()
        from_engine = self.config.routes == "engine"
        tables: dict[int, RouteTable] = {}
        failure: str | None = None
        try:
            check_sequences(sequences)
            if from_engine and self.routes.is_owner:
                shape = len(self.moe_layers), self._model_config.moe_router_topk, self._model_config.num_moe_experts
                tables = {s.id: checked_table(s, *shape) for s in sequences}
        except RouteError as error:
            failure = str(error)
        tokens = TokenIndex({s.id: s.length for s in sequences})
        valid = np.zeros(tokens.total, dtype=bool)
        for sid, table in tables.items():
            valid[tokens.span(sid)] = table.valid
        failure, valid = self._agree(failure, tokens, valid)
        by_sequence = count_missing(valid, tokens) if from_engine else {}
        missing, total = sum(by_sequence.values()), sum(max(0, s.length - 1) for s in sequences)
        all_missing, all_tokens, failures = self._sum_over_ranks([missing, total, failure is not None])
        if failure is not None:
            raise RouteError(failure)
        if failures:
            raise RouteError(f"{failures} other rank(s) refused the routes of their sequences; their errors say why")
        if all_missing > self.config.max_missing_share * all_tokens:
            # Each rank of a stage counted the sequences of the whole replica.
            counts = all_missing // self._replica.stage.size, all_tokens // self._replica.stage.size
            message = too_many_missing(*counts, self.config.max_missing_share, by_sequence, tokens)
            if self.config.strict:
                raise RouteError(message)
            logger.warning(message)
        self._tokens = tokens
        self.routes.begin(tokens, tables, valid)
        sampled = sampled_tokens(
            sequences, tokens, valid if from_engine else None, self.config.seed, self.config.sample_fraction
        )
        self.feature_plan.begin(tokens, sampled)
        return RolloutReport(total, missing, self.routes.table_bytes)

    def prefetch(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Starts moving the routes of micro-batches to the ranks that will replay them; the pass that runs them finds them there.

        Optional, collective over the replica: call it before other work that the transfer can hide behind.
        """
        self._require_attached()
        if self.config.routes == "engine":
            self.routes.slices([micro_batch.grid for micro_batch in micro_batches])

    @contextmanager
    def old_logprobs(self, micro_batches: Sequence[MicroBatch]) -> Iterator[ReplaySession]:
        """The pass that computes old log-probs under theta_old: predictor off, routes replayed (or recorded), features kept.

        Raises:
            ReplayError: a micro-batch was not run exactly once, or the live router agrees with fewer of the engine's experts than
                `min_agreement`: routes and tokens are not aligned.
        """
        mode = {"live": "live", "actor": "record", "engine": "replay"}[self.config.routes]
        predict = self._predict if self.config.routes == "actor" and self.predictor is not None else None
        self._require_attached()
        self.feature_plan.make_room([micro_batch.grid for micro_batch in micro_batches])
        try:
            self._locate(micro_batches)
            with self._session(micro_batches, mode, self._keep_features, predict) as session:
                yield session
        except BaseException:
            # Features that no pass completed must not be learned from.
            self.feature_plan.forget_last()
            self._agreement.discard()
            raise
        self.features.settle()
        if mode == "replay":
            self.engine_agreement = self._agreement.read(everyone(self._group))
            topk, experts = self._model_config.moe_router_topk, self._model_config.num_moe_experts
            require_alignment(self.engine_agreement, self.config.min_agreement, topk, experts)
        if mode == "record":
            for bound, ids_TLK in session.recorded():
                self.routes.record(bound.micro_batch.grid, ids_TLK)

    @contextmanager
    def actor_update(self, micro_batches: Sequence[MicroBatch], mini_step: int) -> Iterator[ReplaySession]:
        """Forward and backward of one mini-step: routes replayed, gate weights live, drift measured, predictor gradient gathered.

        Args:
            mini_step: 1 for the first mini-step after the rollout, as in the paper; the predictor learns from 2 on, because at 1
                the policy is still the one that the features come from.

        Raises:
            ReplayError: mini_step < 1, or a micro-batch was not run exactly once.
        """
        if mini_step < 1:
            raise ReplayError(f"mini_step={mini_step}: mini-steps count from 1")
        self._learning = self.predictor is not None and mini_step >= 2
        mode = "replay" if self.config.replays else "live"
        self._require_attached()
        brought = self.feature_plan.bring([micro_batch.grid for micro_batch in micro_batches])
        try:
            self._features_absent += sum(map(self.feature_plan.absent, self._locate(micro_batches)))
            with self._session(micro_batches, mode, self._measure, None) as session:
                yield session
        except BaseException:
            # What a failed pass gathered belongs to no mini-step.
            self._learning, self._features_absent = False, 0
            self._drift.discard()
            if self.predictor is not None:
                self.predictor.discard()
            raise
        finally:
            self._located = {}
            if brought:
                self.features.remove_last()

    def step(self, lr: float) -> dict[str, Any]:
        """Ends a mini-step: updates the predictor (if it was learning) with alpha * lr and reads the drift metrics.

        Collective over the ranks that hold other tokens of the same layers; call it on every rank, after the policy's optimizer.

        Args:
            lr: the policy's current learning rate.

        Returns:
            "drift": means per MoE layer of the whole model (megatron_pr2.metrics.COLUMNS and lift); "predictor": tokens, grad_norm,
            weight_norm over all layers; "features_absent": sampled tokens of this rank that no log-prob pass kept features of.
        """
        update = {"tokens": 0.0, "grad_norm": 0.0, "weight_norm": 0.0}
        if self.predictor is not None and self._learning:
            update = self.predictor.step(self.config.alpha * lr, self._group)
        self._learning = False
        absent, self._features_absent = self._features_absent, 0
        drift, update = whole_model([site.column for site in self.sites], self._drift.read(self._group), update)
        return {"drift": drift, "predictor": update, "features_absent": absent}

    @contextmanager
    def record(self, micro_batches: Sequence[MicroBatch]) -> Iterator[ReplaySession]:
        """Any other forward whose routes are wanted (an embedded rollout, a handshake): live routes, recorded."""
        with self._session(micro_batches, "record", None, None) as session:
            yield session

    def recorded_tables(self, session: ReplaySession, lengths: dict[int, int]) -> dict[int, RouteTable]:
        """Tables of a :meth:`record` session, by sequence id."""
        return session.recorded_tables(lengths, len(self.moe_layers), self._model_config.num_moe_experts)

    # ---- weights for the engine --------------------------------------------------------------------------------------

    def engine_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Passes weights in Hugging Face names through and merges W_p into the gates on the way.

        Raises:
            AttachError: after the last weight, if not every MoE layer's gate came by (another naming would lose the prediction
                silently).
        """
        if self.predictor is None:
            yield from weights
            return
        w_by_layer = every_layer({s.layer: self.predictor.weight_LEH[s.local] for s in self.sites})
        merged = set()
        for name, tensor in weights:
            match = GATE_NAME.search(name)
            if match and int(match.group(1)) in w_by_layer:
                layer = int(match.group(1))
                merged.add(layer)
                tensor = merge_gate(tensor, w_by_layer[layer])
            yield name, tensor
        if merged != set(w_by_layer):
            raise AttachError(
                f"engine_weights: merged the gates of layers {sorted(merged)}, the model has MoE layers {sorted(w_by_layer)}; the "
                "weights' names do not follow Hugging Face's '...layers.N.mlp.gate.weight' or '...block_sparse_moe.gate.weight'"
            )

    @contextmanager
    def merged_gates(self) -> Iterator[None]:
        """The model itself with W + W_p in its gates, for an embedded rollout; the gates come back bit-identical."""
        saved = [site.router.weight.data for site in self.sites]
        try:
            if self.predictor is not None:
                for site in self.sites:
                    site.router.weight.data = self.predictor.merged(site.local, site.router.weight.data)
            yield
        finally:
            for site, data in zip(self.sites, saved, strict=True):
                site.router.weight.data = data

    # ---- life --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The predictor's state and the layers that it belongs to; empty without a predictor."""
        if self.predictor is None:
            return {}
        return {"layers": [site.layer for site in self.sites], "predictor": self.predictor.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`; an empty state leaves a zero predictor and says so.

        Raises:
            AttachError: the state belongs to other layers.
        """
        if self.predictor is None:
            return
        if not state:
            logger.info("checkpoint has no predictor: starting with W_p = 0")
            return
        layers = [site.layer for site in self.sites]
        if state["layers"] != layers:
            raise AttachError(f"predictor checkpoint holds layers {state['layers']}, this rank has {layers}")
        self.predictor.load_state_dict(state["predictor"])

    def detach(self) -> None:
        """Gives the routers back as they were; the handle cannot be used afterwards."""
        for site in self.sites:
            site.router.set_control(None)
            for name in ("_control", "attached"):
                site.router.__dict__.pop(name, None)
            site.router.__class__ = site.original
        self._replica.release()
        self._attached = False

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _require_attached(self) -> None:
        if not self._attached:
            raise AttachError("this PR2 handle was detached; attach() again")

    def _sum_over_ranks(self, values: Sequence[int]) -> list[int]:
        if self._group is None or dist.get_world_size(self._group) == 1:
            return [int(v) for v in values]
        total = torch.tensor([int(v) for v in values], dtype=torch.int64, device=self._device)
        dist.all_reduce(total, group=self._group)
        return [int(v) for v in total.tolist()]

    def _agree(
        self, failure: str | None, tokens: TokenIndex, valid: npt.NDArray[np.bool_]
    ) -> tuple[str | None, npt.NDArray[np.bool_]]:
        """The first failure within the replica, and which tokens have a route, from the rank that owns the tables."""
        ranks = self._replica.ranks
        if ranks.handle is None:
            return failure, valid
        told = list(tokens.lengths.items())
        digest = hashlib.blake2b(repr(told).encode(), digest_size=16).hexdigest()
        packed = np.packbits(valid).tobytes() if self.routes.is_owner else None
        parts: list[Any] = [None] * ranks.size
        # One bit per token and a few bytes, once per rollout batch.
        dist.all_gather_object(parts, (failure, digest, packed), group=ranks.handle)
        owners = parts[ranks.owner]
        failure = next((part[0] for part in parts if part[0] is not None), None)
        if failure is None and any(part[1] != owners[1] for part in parts):
            failure = (
                "the ranks of a replica (tensor x context x pipeline parallel) were told of different sequences; pass the same "
                "ones, in the same order, to begin_rollout() on all of them"
            )
        if failure is None and any(part[2] not in (None, owners[2]) for part in parts):
            failure = "the ranks of a replica have different routes for the same sequences; give them the same tables"
        if failure is None:
            valid = np.unpackbits(np.frombuffer(owners[2], dtype=np.uint8), count=tokens.total).astype(bool)
        return failure, valid

    def _locate(self, micro_batches: Sequence[MicroBatch]) -> list[IntArray]:
        """Finds the features of every micro-batch's rows; returns the rows' flat token indices."""
        rows = [self._tokens.of_grid(self._replica.stage.rows(micro_batch.grid)) for micro_batch in micro_batches]
        self._located = {
            micro_batch.key: self.features.locate(tokens, self._device)
            for micro_batch, tokens in zip(micro_batches, rows, strict=True)
        }
        return rows

    def _session(
        self, micro_batches: Sequence[MicroBatch], mode: str, observer: Observer | None, predict: Any
    ) -> ReplaySession:
        self._require_attached()
        return ReplaySession(
            self.sites,
            self._chunks,
            micro_batches,
            mode=mode,
            localize=self._replica.ranks.rows,
            routes=self.routes.slices,
            observer=observer,
            predict=predict,
        )

    def _predict(self, site: RouterSite, h_TH: Tensor, p_TE: Tensor) -> Tensor:
        assert self.predictor is not None
        return predicted_logits(h_TH, p_TE, self.predictor.weight_LEH[site.local]).to(p_TE.dtype)

    def _keep_features(self, site: RouterSite, bound: BoundMicroBatch, h_TH: Tensor, p_TE: Tensor) -> None:
        where = self._located[bound.micro_batch.key]
        if not where.count:
            return
        p_SE = p_TE.index_select(0, where.rows)
        self.features.write(site.local, where, h_TH.index_select(0, where.rows), p_SE)
        if bound.routes_TLK is not None:
            replayed_SK = bound.routes_TLK[:, site.local].index_select(0, where.rows)
            self._agreement.add(select_experts(site.router, p_SE.float()), replayed_SK, p_SE.shape[1])

    def _measure(self, site: RouterSite, bound: BoundMicroBatch, h_TH: Tensor, p_TE: Tensor) -> None:
        where = self._located[bound.micro_batch.key]
        if not where.count:
            return
        h_old_SH, p_old_SE = self.features.read(site.local, where, p_TE.device)
        p_SE = p_TE.index_select(0, where.rows).float()
        current_SK = select_experts(site.router, p_SE)
        frozen_SK = select_experts(site.router, p_old_SE)
        replayed_SK = frozen_SK
        if bound.routes_TLK is not None:
            replayed_SK = bound.routes_TLK[:, site.local].index_select(0, where.rows)
        q_hat_SE = p_old_SE
        if self.predictor is not None:
            q_hat_SE = predicted_logits(h_old_SH, p_old_SE, self.predictor.weight_LEH[site.local])
            if self._learning:
                self.predictor.accumulate(site.local, h_old_SH, p_old_SE, p_SE)
        columns = drift_columns(current_SK, replayed_SK, frozen_SK, p_SE, p_old_SE, q_hat_SE, self._score_function)
        self._drift.add(site.local, columns)


def attach(model_chunks: Sequence[torch.nn.Module] | torch.nn.Module, config: PR2Config) -> PR2:
    """Adds predictive routing replay to a built Megatron-Core model (plain, DDP- or Float16Module-wrapped), in place.

    Args:
        model_chunks: the model, or its virtual pipeline chunks.
        config: e.g. PR2Config.preset("pr2").

    Raises:
        AttachError: no MoE layers, a custom or sinkhorn router, another replay at work, or attached already.
    """
    chunks = [model_chunks] if isinstance(model_chunks, torch.nn.Module) else list(model_chunks)
    if not chunks:
        raise AttachError("attach() got no model chunk")
    return PR2(chunks, config)
