"""What the passes of a rollout batch leave behind: features in the log-prob pass, drift and the predictor's gradient in training.

Both happen in observers that a ReplaySession calls once per router and micro-batch, on the device, without a synchronisation.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_pr2.config import PR2Config
from megatron_pr2.drift.feature_plan import FeaturePlan
from megatron_pr2.drift.features import H_DTYPE, FeatureStore, Located
from megatron_pr2.drift.metrics import DriftMetrics, drift_columns
from megatron_pr2.drift.moments import MOMENTS
from megatron_pr2.drift.pushed import Pushed, RowsOfPush, moments, predicted, rows_of
from megatron_pr2.errors import ReplayError
from megatron_pr2.parallel.grid import IntArray
from megatron_pr2.parallel.groups import everyone, whole_model
from megatron_pr2.parallel.replica import Replica
from megatron_pr2.parallel.tokens import TokenIndex
from megatron_pr2.prediction.hold_back import HoldBack
from megatron_pr2.prediction.horizon import Horizon
from megatron_pr2.prediction.multiples import Multiples
from megatron_pr2.prediction.predictor import RoutePredictor, shift_logits
from megatron_pr2.prediction.pushes import Version
from megatron_pr2.replay.alignment import Agreement, AgreementCheck, compared_rows
from megatron_pr2.replay.micro_batch import BoundMicroBatch, MicroBatch
from megatron_pr2.replay.router import select_experts
from megatron_pr2.replay.sequences import ReplaySequence, held_out_tokens, horizons
from megatron_pr2.replay.sites import RouterSite


@dataclass(frozen=True)
class SampledRows:
    """The sampled tokens among a micro-batch's rows on this rank.

    Attributes:
        where: their features, S of them.
        learning: which of these S are learned from, on the device; None for all.
        of_pushes: by the push that they were rolled out with; tokens of an unknown one are in none.
        horizon_S1: updates until they are trained on, relative to the average, on the device; None if that is not known.
    """

    where: Located
    learning: Tensor | None
    of_pushes: Sequence[RowsOfPush]
    horizon_S1: Tensor | None


class Measurement:
    """Features, drift metrics and the predictor's gradient of the current rollout batch.

    Attributes:
        features, plan: router inputs and logits of the sampled tokens, and which rank holds which.
        agreement, engine_agreement: of an engine's routes with what the current router chooses under the prediction that they were
            taken with, in this and in the last log-prob pass.
        drift: metrics of the training passes.
        hold_back: chooses the share of W_p that is used, or None.
        pushes: what engines got.
        held_out: which tokens predictions are judged on, by flat token index; none without hold-back.
        sample_fraction: share of the loss-bearing tokens that features are kept of, in the last log-prob pass; None: not known.
        learning: whether the training pass adds to the predictor's gradient.
        features_absent: sampled tokens of the training passes that no log-prob pass kept features of.
    """

    def __init__(
        self,
        config: PR2Config,
        model_config: Any,
        sites: Sequence[RouterSite],
        predictor: RoutePredictor | None,
        replica: Replica,
        token_group: dist.ProcessGroup | None,
        device: torch.device,
        moe_layers: Sequence[int],
    ) -> None:
        """Args: `device` is the routers'; `moe_layers` are those of the whole model."""
        self._config, self._sites, self._predictor = config, list(sites), predictor
        self._tp_cp, self._token_group, self._device = replica.tp_cp, token_group, device
        self._score_function = model_config.moe_router_score_function
        self.features = FeatureStore(
            len(sites), model_config.num_moe_experts, model_config.hidden_size if config.keeps_inputs else 0,
            device=device if config.feature_device == "device" else torch.device("cpu"), h_dtype=H_DTYPE,
            p_dtype=torch.float64 if model_config.moe_router_dtype == "fp64" else torch.float32,
        )  # fmt: skip
        # The pipeline stage with most layers decides what there is room for, so that all of them keep the same tokens.
        layers = max(len(member.columns) for member in replica.ranks.members)
        self.plan = FeaturePlan(
            self.features, replica.tp_cp, budget_bytes=config.feature_bytes, most_layers=layers, device=device,
            seed=config.seed, token_group=token_group,
        )  # fmt: skip
        self.agreement = AgreementCheck(
            moe_layers, [site.column for site in sites], model_config, replica.tp_cp.handle, everyone(token_group), device,
            config.min_agreement,
        )  # fmt: skip
        self.engine_agreement: Agreement | None = None
        self.drift = DriftMetrics(len(sites), device, moments=config.keeps_inputs)
        # A look-ahead is judged by the moments of drift, anything else by experts of tokens that it did not learn from.
        judged, decay, confidence = config.predicts and config.hold_back, config.hold_back_decay, config.hold_back_confidence
        self._multiples = Multiples(len(sites), decay=decay) if judged and config.looks_ahead else None
        self._counts: HoldBack | None = None
        if judged and self._multiples is None:
            self._counts = HoldBack(len(sites), decay=decay, confidence=confidence, device=device)
        self.hold_back: HoldBack | Multiples | None = self._multiples or self._counts
        self.pushes = Pushed(config, self._sites, predictor, self.hold_back)
        self.learning = False
        self._located: dict[Hashable, SampledRows] = {}
        self._row_horizons: dict[Hashable, Tensor] = {}
        self._forget()

    def _forget(self) -> None:
        # Located features would outlive the batch, and its budget, through them.
        self._tokens, self._located, self._row_horizons = TokenIndex({}), {}, {}
        self.held_out = np.zeros(0, dtype=bool)
        self._horizon: npt.NDArray[np.float32] | None = None
        self.sample_fraction: float | None = None
        self.pushes.forget()
        # A mini-step that was never ended by step() belongs to the last batch.
        self.discard()

    def begin(
        self,
        sequences: Sequence[ReplaySequence],
        tokens: TokenIndex,
        valid: npt.NDArray[np.bool_],
        sampled: npt.NDArray[np.bool_],
        horizon: float | None,
        version: Version | None = None,
    ) -> None:
        """Forgets the last rollout batch.

        Args:
            valid, sampled: which tokens of the new one have a route, and which are sampled.
            horizon: updates that sequences are away on average, where each says its mini-step and is predicted for its own number.
            version: of the weights that sequences were rolled out with that do not say so themselves.
        """
        self._forget()
        self._tokens = tokens
        self.pushes.begin(sequences, tokens, sampled, horizon, version)
        self.held_out = np.zeros(tokens.total, dtype=bool)
        if self._counts is not None:
            self.held_out = held_out_tokens(sequences, tokens, sampled, self._config.seed, self._config.held_out_share)
        self._horizon = horizons(sequences, tokens, horizon, self._predictor.size_of) if horizon and self._predictor else None
        compared = compared_rows(tokens, valid, self._config.seed)
        self.agreement.begin(tokens, compared, self.pushes.older(sequences, version), predicted=self.pushes.predicts)
        self.plan.begin(tokens, sampled)

    def end(self) -> None:
        """After the last mini-step: frees everything that belongs to the rollout batch, and updates hold-back with its outcome."""
        self._forget()
        if self.hold_back is not None:
            self.hold_back.close_batch()
        self.plan.begin(TokenIndex({}), np.zeros(0, dtype=bool))

    def predict(self, site: RouterSite, bound: BoundMicroBatch, h_TH: Tensor, p_TE: Tensor) -> Tensor:
        """The logits [T, E] that routes are recorded by: p + beta W_p h, each token's for as many updates as it is away."""
        if not self.pushes.in_use:
            raise ReplayError("old_logprobs() before begin_rollout(): there is no rollout batch to predict the routes of")
        shift_TE = shift_logits(h_TH, self.pushes.in_use[0].delta(site.local))
        if self._row_horizons:
            shift_TE = shift_TE * self._row_horizons[bound.micro_batch.key]
        return (p_TE + shift_TE).to(p_TE.dtype)  # added in fp32, or in fp64 for routers in fp64

    @contextmanager
    def log_prob_pass(self, micro_batches: Sequence[MicroBatch]) -> Iterator[None]:
        """Makes room for the features of the sampled tokens that this rank is going to compute, and keeps them unless it fails."""
        rows = self.rows(micro_batches)
        if self._config.drift:
            self.plan.make_room([micro_batch.grid for micro_batch in micro_batches])
            self.features.keep_routers([site.router for site in self._sites])
            self.sample_fraction = self.plan.share * self._config.sample_fraction
        try:
            if self._horizon is not None:
                for micro_batch, tokens_T in zip(micro_batches, rows, strict=True):
                    of_rows = np.append(self._horizon, np.float32(1.0))[tokens_T]  # -1 is padding
                    self._row_horizons[micro_batch.key] = self._to_device(of_rows[:, None])  # [T, 1]; padding is 1
            self._locate(micro_batches, rows)
            self.agreement.open(micro_batches, rows)
            yield
            if self._config.routes == "engine":
                self.engine_agreement = self.agreement.read()
                self.agreement.require()
        except BaseException:
            # Room without features would be learned from as zeros by a second attempt.
            if self._config.drift:
                self.plan.forget_last()
            raise
        finally:
            self.agreement.discard()
            self._located, self._row_horizons = {}, {}
        self.features.settle()

    @contextmanager
    def training_pass(self, micro_batches: Sequence[MicroBatch], *, learning: bool) -> Iterator[None]:
        """Brings features to the tokens that this rank is going to compute, for as long as it lasts; collective over tp_cp."""
        # First, and kept if the pass fails: the other ranks learn, and wait for this one's share in step().
        self.learning = learning
        brought = False
        try:
            rows = self.rows(micro_batches)
            if self._config.drift:
                brought = self.plan.bring([micro_batch.grid for micro_batch in micro_batches])
                self.features_absent += sum(map(self.plan.absent, rows))
            self._locate(micro_batches, rows)
            yield
        except BaseException:
            self.discard()
            raise
        finally:
            self._located = {}
            if brought:
                self.features.remove_last()

    def step(self, lr: float, mini_step: int, horizon: Horizon) -> dict[str, Any]:
        """Ends a mini-step; collective over the token group and the pipeline. See `PR2.step` for what it returns.

        Args:
            lr: the policy's learning rate.
        """
        self.pushes.updated()
        update = {"tokens": 0.0, "grad_norm": 0.0, "weight_norm": 0.0}
        if self._predictor is not None:
            if self.learning:
                self.learning = False
                update = self._predictor.step(self._config.alpha * lr, self._token_group)
            if self._config.needs_optimizer:
                horizon.update()
                update["weight_norm"] = self._predictor.weight_norm()
            if not math.isfinite(update["weight_norm"]):
                update["weight_norm"] = self.pushes.start_over()
        absent, drift = self.features_absent, self.drift.read(self._token_group) if self._config.drift else {}
        if drift and self._predictor is not None and not self._config.keeps_inputs:
            drift["kl_predicted"] = [math.nan] * len(self._sites)
        held = {} if self.hold_back is None else self.hold_back.used
        if self._counts is not None:
            self._counts.read(self._token_group)
        if self._multiples is not None and drift:
            self._multiples.observe(mini_step, *(drift[name] for name in ("tokens", *MOMENTS[:3])))
        self.discard()
        per_layer = drift | (pushed := self.pushes.report()) | {f"hold_back.{name}": values for name, values in held.items()}
        per_layer, update = whole_model([site.column for site in self._sites], per_layer, update)
        report = {"drift": {name: per_layer[name] for name in drift}, "predictor": update, "features_absent": absent}
        if self._predictor is not None:
            report |= {"unjudged": self.pushes.unjudged, **{name: per_layer[name] for name in pushed}}
        if held:
            report["hold_back"] = {name: per_layer[f"hold_back.{name}"] for name in held}
        return report

    def skip(self) -> None:
        """Ends a mini-step whose step() was forgotten and cannot be made up for."""
        self.pushes.updated()
        self.learning = False
        self.discard()

    def discard(self) -> None:
        """Forgets what training passes gathered: a failed one belongs to no mini-step."""
        self.features_absent = 0
        self.drift.discard()
        if self._predictor is not None:
            self._predictor.discard()
        if self._counts is not None:
            self._counts.discard()

    def keep_features(self, site: RouterSite, bound: BoundMicroBatch, h_TH: Tensor, p_TE: Tensor) -> None:
        """The observer of the log-prob pass."""
        self._compare_routes(site, bound, h_TH, p_TE)
        where = self._located[bound.micro_batch.key].where
        if not where.count:
            return
        p_SE = p_TE.index_select(0, where.rows)
        self.features.write(site.local, where, h_TH[:, : self.features.hidden].index_select(0, where.rows), p_SE)

    def _compare_routes(self, site: RouterSite, bound: BoundMicroBatch, h_TH: Tensor, p_TE: Tensor) -> None:
        rows_C = self.agreement.rows(bound.micro_batch.key)
        if rows_C is None or bound.routes_TLK is None:
            return
        p_CE = p_TE.index_select(0, rows_C)
        for push in self.pushes.in_use[-1:]:  # the engine's gate was the merged one
            if push.beta[site.local]:
                p_CE = (p_CE + shift_logits(h_TH.index_select(0, rows_C), push.delta(site.local))).to(p_CE.dtype)
        replayed_CK = bound.routes_TLK[:, site.local].index_select(0, rows_C)
        self.agreement.add(site.local, bound.micro_batch.key, select_experts(site.router, p_CE), replayed_CK)

    def compare(self, site: RouterSite, bound: BoundMicroBatch, h_TH: Tensor, p_TE: Tensor) -> None:
        """The observer of a training pass."""
        rows = self._located[bound.micro_batch.key]
        where = rows.where
        if not where.count:
            return
        h_old_SH, p_old_SE = self.features.read(site.local, where, p_TE.device)
        p_SE = p_TE.index_select(0, where.rows)
        current_SK = select_experts(site.router, p_SE)
        p_SE = p_SE.to(p_old_SE.dtype)
        biases_LE = self.features.routers.get("expert_bias")

        def select_old(logits: Tensor) -> Tensor:
            """As the router did under theta_old: with its expert bias and in its dtype."""
            return select_experts(site.router, logits.to(p_TE.dtype), None if biases_LE is None else biases_LE[site.local])

        frozen_SK = select_old(p_old_SE)
        replayed_SK = frozen_SK
        if bound.routes_TLK is not None:
            replayed_SK = bound.routes_TLK[:, site.local].index_select(0, where.rows)
        q_hat_SE, of_prediction = p_old_SE, list[Tensor]()
        if self._predictor is not None and self._config.keeps_inputs:
            h_old_SH = h_old_SH.float()
            gate_SE = self.features.gate_drift(site.local, site.router, h_old_SH)
            if rows.horizon_S1 is not None:
                # W_p (s h) = s W_p h: a token that is s times as far away as the average.
                h_old_SH = h_old_SH * rows.horizon_S1
            q_hat_SE = predicted(site.local, rows.of_pushes, h_old_SH, p_old_SE)
            of_prediction.append(moments(site.local, rows.of_pushes, h_old_SH, p_SE - p_old_SE, gate_SE))
            if self.learning:
                shift_SE = shift_logits(h_old_SH, self._predictor.training_weight(site.local))
                learned_from = (rows_of(x, rows.learning) for x in (h_old_SH, p_old_SE, p_SE, shift_SE))
                self._predictor.accumulate(site.local, *learned_from)
            for part in rows.of_pushes:
                if self._counts is not None and part.held_out is not None:
                    *judged_on, h_SH = (rows_of(x, part.held_out) for x in (current_SK, frozen_SK, p_old_SE, h_old_SH))
                    self._counts.add(site.local, select_old, part.push.shifts(site.local, h_SH), *judged_on)
        columns = drift_columns(current_SK, replayed_SK, frozen_SK, p_SE, p_old_SE, q_hat_SE, self._score_function)
        self.drift.add(site.local, torch.cat((columns, *of_prediction)))

    def rows(self, micro_batches: Sequence[MicroBatch]) -> list[IntArray]:
        """The flat token index of every row that this rank computes; refuses what cannot be cut before anything is changed."""
        return [self._tokens.of_grid(self._tp_cp.rows(micro_batch.grid)) for micro_batch in micro_batches]

    def _locate(self, micro_batches: Sequence[MicroBatch], rows: Sequence[IntArray]) -> None:
        """Finds the features of every micro-batch's rows."""
        for micro_batch, tokens_T in zip(micro_batches, rows, strict=True):
            where = self.features.locate(tokens_T, self._device)
            held, horizon_S1 = self.held_out[where.tokens], None
            learning = None if self._counts is None else self._to_device(np.nonzero(~held)[0])
            of_pushes = self.pushes.rows(where.tokens, held, self._to_device)
            if self._horizon is not None:
                horizon_S1 = self._to_device(self._horizon[where.tokens][:, None])
            self._located[micro_batch.key] = SampledRows(where, learning, of_pushes, horizon_S1)

    def _to_device(self, values: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(values).to(self._device, non_blocking=True)
