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

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor

from megatron_pr2.config import PR2Config
from megatron_pr2.errors import AttachError, ReplayError, RouteError
from megatron_pr2.features import FeatureStore, IntArray, sample_positions
from megatron_pr2.metrics import DriftMetrics, drift_columns
from megatron_pr2.predictor import RoutePredictor, merge_gate, predicted_logits
from megatron_pr2.replay import BoundMicroBatch, MicroBatch, ReplaySession
from megatron_pr2.router import select_experts
from megatron_pr2.routes import RouteTable
from megatron_pr2.sites import RouterSite, unwrapped, upgrade_routers

logger = logging.getLogger(__name__)

# Hugging Face names of MoE gates: Qwen2/3-MoE, OLMoE, DeepSeek, GLM (mlp.gate) and Mixtral (block_sparse_moe.gate).
GATE_NAME = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:mlp|block_sparse_moe)\.gate\.weight$")


@dataclass(frozen=True)
class ReplaySequence:
    """One rolled-out sequence as this rank trains on it.

    Attributes:
        id: unique within the rollout batch.
        length: tokens, prompt and response.
        loss_start, loss_stop: input positions whose output bears loss: prompt_len - 1 to length - 1 for one prompt and response.
        routes: what the engine returned, or None when routes are live or recorded by the actor.
    """

    id: int
    length: int
    loss_start: int
    loss_stop: int
    routes: RouteTable | None = None


@dataclass(frozen=True)
class RolloutReport:
    """What begin_rollout found on this rank.

    Attributes:
        tokens: tokens that could have a route (all but the last of each sequence).
        missing: of these, tokens without a valid one.
        sampled: tokens whose features will be kept.
        dropped_sequences: sequences without features because of the byte budget.
        route_bytes, feature_bytes: bytes held.
    """

    tokens: int
    missing: int
    sampled: int
    dropped_sequences: int
    route_bytes: int
    feature_bytes: int


class PR2:
    """Predictive routing replay on one model; made by :func:`attach`.

    Attributes:
        config: the settings.
        sites: this rank's routers, ascending by layer.
        moe_layers: 0-based indices of all MoE layers of the model.
        predictor: W_p of this rank's layers, or None.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], config: PR2Config) -> None:
        self.config = config
        self._chunks = list(chunks)
        self.sites, self.moe_layers = upgrade_routers(self._chunks)
        self._model_config = unwrapped(chunks[0]).config
        self._score_function = self._model_config.moe_router_score_function
        hidden, experts = self._model_config.hidden_size, self._model_config.num_moe_experts
        device = self.sites[0].router.weight.device if self.sites else torch.device("cpu")
        self._group = token_group(self._model_config.sequence_parallel)
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
            budget_bytes=config.feature_bytes,
            device=device if config.feature_device == "device" else torch.device("cpu"),
            h_dtype=torch.bfloat16,
        )
        self._device = device
        self._drift = DriftMetrics(len(self.sites), device)
        self._lengths: dict[int, int] = {}
        self._tables: dict[int, RouteTable] = {}
        self._samples: dict[Any, tuple[Any, Tensor, Tensor]] = {}
        self._learning = False
        self._features_absent = 0
        self._attached = True

    # ---- one rollout batch -------------------------------------------------------------------------------------------

    def begin_rollout(self, sequences: Sequence[ReplaySequence]) -> RolloutReport:
        """Takes the sequences of a rollout batch that this rank trains on, checks their routes and samples tokens.

        Collective over the ranks that hold other tokens of the same layers: what one of them refuses, all of them raise.

        Raises:
            RouteError: a table is absent or does not fit the model, or more tokens lack a route than `max_missing_share` allows.
        """
        self._require_attached()
        self._lengths = {s.id: s.length for s in sequences}
        self._tables = {}
        failure: RouteError | None = None
        try:
            if self.config.routes == "engine":
                self._tables = {s.id: self._checked_table(s) for s in sequences}
        except RouteError as error:
            failure = error
        tokens = sum(max(0, s.length - 1) for s in sequences)
        # The last token of a sequence was never an engine's input; it has no route by nature and is not counted as missing.
        missing = sum(int((~table.valid[:-1]).sum()) for table in self._tables.values())
        all_missing, all_tokens, failures = self._sum_over_ranks([missing, tokens, failure is not None])
        if failure is not None:
            raise failure
        if failures:
            raise RouteError(f"{failures} other rank(s) refused the routes of their sequences; their errors say why")
        if all_missing > self.config.max_missing_share * all_tokens:
            message = self._too_many_missing(all_missing, all_tokens)
            if self.config.strict:
                raise RouteError(message)
            logger.warning(message)
        self.features.allocate({s.id: self._sample(s) for s in sequences})
        return RolloutReport(
            tokens,
            missing,
            self.features.sampled_tokens,
            self.features.dropped_sequences,
            sum(t.nbytes for t in self._tables.values()),
            self.features.nbytes,
        )

    @contextmanager
    def old_logprobs(self, micro_batches: Sequence[MicroBatch]) -> Iterator[ReplaySession]:
        """The pass that computes old log-probs under theta_old: predictor off, routes replayed (or recorded), features kept."""
        mode = {"live": "live", "actor": "record", "engine": "replay"}[self.config.routes]
        predict = self._predict if self.config.routes == "actor" and self.predictor is not None else None
        with self._session(micro_batches, mode, self._keep_features, predict) as session:
            yield session
        self.features.settle()
        if mode == "record":
            self._tables = session.recorded_tables(
                self._lengths, len(self.moe_layers), self._model_config.num_moe_experts
            )

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
        try:
            with self._session(micro_batches, mode, self._measure, None) as session:
                yield session
        except BaseException:
            # What a failed pass gathered belongs to no mini-step.
            self._learning, self._features_absent = False, 0
            self._drift.discard()
            if self.predictor is not None:
                self.predictor.discard()
            raise

    def step(self, lr: float) -> dict[str, Any]:
        """Ends a mini-step: updates the predictor (if it was learning) with alpha * lr and reads the drift metrics.

        Collective over the ranks that hold other tokens of the same layers; call it on every rank, after the policy's optimizer.

        Args:
            lr: the policy's current learning rate.

        Returns:
            "drift": per-layer means (megatron_pr2.metrics.COLUMNS and lift); "predictor": tokens, grad_norm, weight_norm;
            "features_absent": sampled tokens of this rank that the old-log-prob pass kept no features of.
        """
        update = {"tokens": 0.0, "grad_norm": 0.0, "weight_norm": 0.0}
        if self.predictor is not None and self._learning:
            update = self.predictor.step(self.config.alpha * lr, self._group)
        self._learning = False
        absent, self._features_absent = self._features_absent, 0
        return {"drift": self._drift.read(self._group), "predictor": update, "features_absent": absent}

    @contextmanager
    def record(self, micro_batches: Sequence[MicroBatch]) -> Iterator[ReplaySession]:
        """Any other forward whose routes are wanted (an embedded rollout, a handshake): live routes, recorded."""
        with ReplaySession(self.sites, self._chunks, micro_batches, mode="record") as session:
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
        w_by_layer = self._all_layers()
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

    def _too_many_missing(self, missing: int, tokens: int) -> str:
        where = "all on other ranks"
        if self._tables:
            worst = max(self._tables, key=lambda sid: self._tables[sid].num_missing)
            table = self._tables[worst]
            where = f"worst of this rank is sequence {worst} with {table.num_missing} of {table.num_tokens}"
        return (
            f"{missing} of {tokens} tokens ({missing / tokens:.1%}) have no valid route, more than max_missing_share="
            f"{self.config.max_missing_share:.1%}; {where}. The engine returns duplicate, all-zero or out-of-range expert ids: run "
            "the handshake, check its version and MoE backend"
        )

    def _checked_table(self, sequence: ReplaySequence) -> RouteTable:
        table = sequence.routes
        if table is None:
            raise RouteError(f"sequence {sequence.id}: routes='engine' but the engine returned none; start it with route return on")
        router = self._model_config
        expected = (sequence.length, len(self.moe_layers), router.moe_router_topk, router.num_moe_experts)
        found = (table.num_tokens, table.num_layers, table.topk, table.num_experts)
        if found != expected:
            raise RouteError(
                f"sequence {sequence.id}: its route table is (tokens, moe layers, top-k, experts) = {found}, expected {expected}"
            )
        return table

    @contextmanager
    def _session(self, micro_batches: Sequence[MicroBatch], mode: str, observer: Any, predict: Any) -> Iterator[ReplaySession]:
        self._require_attached()
        self._samples = {}
        for micro_batch in micro_batches:
            rows, slots = self.features.locate(*micro_batch.grid.rows())
            if observer == self._measure:
                written = self.features.written(slots)
                self._features_absent += int((~written).sum())
                rows, slots = rows[written], slots[written]
            on_device = torch.from_numpy(rows).to(self._device), torch.from_numpy(slots).to(self.features.device)
            self._samples[micro_batch.key] = (slots, *on_device)
        session = ReplaySession(
            self.sites, self._chunks, micro_batches, mode=mode, tables=self._tables, observer=observer, predict=predict
        )
        with session:
            yield session

    def _sample(self, sequence: ReplaySequence) -> IntArray:
        positions = np.arange(sequence.loss_start, sequence.loss_stop, dtype=np.int64)
        table = self._tables.get(sequence.id)
        if table is not None:
            positions = positions[table.valid[positions]]
        return sample_positions(self.config.seed, sequence.id, positions, self.config.sample_fraction)

    def _predict(self, site: RouterSite, h_TH: Tensor, p_TE: Tensor) -> Tensor:
        assert self.predictor is not None
        return predicted_logits(h_TH, p_TE, self.predictor.weight_LEH[site.local]).to(p_TE.dtype)

    def _keep_features(self, site: RouterSite, bound: BoundMicroBatch, h_TH: Tensor, p_TE: Tensor) -> None:
        slots, rows, slots_device = self._samples[bound.micro_batch.key]
        if len(slots):
            self.features.write(site.local, slots, slots_device, h_TH.index_select(0, rows), p_TE.index_select(0, rows))

    def _measure(self, site: RouterSite, bound: BoundMicroBatch, h_TH: Tensor, p_TE: Tensor) -> None:
        slots, rows, slots_device = self._samples[bound.micro_batch.key]
        if not len(slots):
            return
        h_old_SH, p_old_SE = self.features.read(site.local, slots_device, p_TE.device)
        p_SE = p_TE.index_select(0, rows).float()
        current_SK = select_experts(site.router, p_SE)
        frozen_SK = select_experts(site.router, p_old_SE)
        replayed_SK = frozen_SK
        if bound.routes_LTK is not None:
            replayed_SK = bound.routes_LTK[site.local].index_select(0, rows)
        q_hat_SE = p_old_SE
        if self.predictor is not None:
            q_hat_SE = predicted_logits(h_old_SH, p_old_SE, self.predictor.weight_LEH[site.local])
            if self._learning:
                self.predictor.accumulate(site.local, h_old_SH, p_old_SE, p_SE)
        columns = drift_columns(current_SK, replayed_SK, frozen_SK, p_SE, p_old_SE, q_hat_SE, self._score_function)
        self._drift.add(site.local, columns)

    def _all_layers(self) -> dict[int, Tensor]:
        """W_p of every MoE layer of the model by 0-based layer; collective over the pipeline group where there is one."""
        assert self.predictor is not None
        own = {site.layer: self.predictor.weight_LEH[site.local] for site in self.sites}
        if not mpu.model_parallel_is_initialized() or mpu.get_pipeline_model_parallel_world_size() == 1:
            return own
        group = mpu.get_pipeline_model_parallel_group()
        parts: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(parts, {layer: w.cpu() for layer, w in own.items()}, group=group)
        return {layer: w for part in parts for layer, w in part.items()}


def token_group(sequence_parallel: bool) -> dist.ProcessGroup | None:
    """The ranks that hold other tokens of the same layers: data x context (x tensor under sequence parallelism)."""
    if not mpu.model_parallel_is_initialized():
        return None
    if sequence_parallel:
        return mpu.get_tensor_and_data_parallel_group(with_context_parallel=True)
    return mpu.get_data_parallel_group(with_context_parallel=True)


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
