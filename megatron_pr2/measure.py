"""What the passes of a rollout batch leave behind: features in the log-prob pass, drift and the predictor's gradient in training.

Both happen in observers that a ReplaySession calls once per router and micro-batch, on the device, without a synchronisation.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_pr2.agreement import AgreementCheck
from megatron_pr2.config import PR2Config
from megatron_pr2.feature_plan import FeaturePlan
from megatron_pr2.features import FeatureStore, Located
from megatron_pr2.layout import IntArray
from megatron_pr2.metrics import DriftMetrics, drift_columns
from megatron_pr2.predictor import RoutePredictor, predicted_logits
from megatron_pr2.replay import BoundMicroBatch, MicroBatch
from megatron_pr2.replica import Replica
from megatron_pr2.router import select_experts
from megatron_pr2.sites import RouterSite
from megatron_pr2.tokens import TokenIndex


class Measurement:
    """Features, drift metrics and the predictor's gradient of the rollout batch at work.

    Attributes:
        features, plan: router inputs and logits of the sampled tokens, and which rank holds which.
        agreement: of replayed and live routes in the log-prob pass.
        drift: metrics of the training passes.
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
        device: torch.device,
    ) -> None:
        """Args: `device` is the routers'."""
        self._predictor, self._stage, self._device = predictor, replica.stage, device
        self._score_function = model_config.moe_router_score_function
        self.features = FeatureStore(
            len(sites),
            model_config.num_moe_experts,
            model_config.hidden_size,
            device=device if config.feature_device == "device" else torch.device("cpu"),
            h_dtype=torch.bfloat16,
        )
        # The stage with most layers decides which sequences are dropped, so that all of them drop the same.
        layers = max(len(member.columns) for member in replica.ranks.members)
        self.plan = FeaturePlan(
            self.features, replica.stage, budget_bytes=config.feature_bytes, most_layers=layers, device=device
        )
        self.agreement = AgreementCheck(device)
        self.drift = DriftMetrics(len(sites), device)
        self.learning = False
        self.features_absent = 0
        self._tokens = TokenIndex({})
        self._located: dict[Hashable, Located] = {}

    def begin(self, tokens: TokenIndex, sampled: npt.NDArray[np.bool_]) -> None:
        """Forgets the last rollout batch; `sampled` says which tokens of the new one are sampled."""
        # Located features would outlive the batch, and its budget, through them.
        self._tokens, self._located = tokens, {}
        # A mini-step that was never ended by step() belongs to the last batch.
        self.discard()
        self.plan.begin(tokens, sampled)

    def open_log_prob_pass(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Makes room for the features of the sampled tokens that this rank is going to compute."""
        rows = self._rows(micro_batches)
        self.plan.make_room([micro_batch.grid for micro_batch in micro_batches])
        try:
            self._locate(micro_batches, rows)
        except BaseException:
            # Room without features would be learned from as zeros by a second attempt.
            self.plan.forget_last()
            raise

    def abort_log_prob_pass(self) -> None:
        """Forgets features of a pass that failed: they must not be learned from."""
        self._located = {}
        self.plan.forget_last()
        self.agreement.discard()

    def close_log_prob_pass(self) -> None:
        """Files what is still on its way."""
        self._located = {}
        self.features.settle()

    def open_training_pass(self, micro_batches: Sequence[MicroBatch], *, learning: bool) -> bool:
        """Brings features to the tokens that this rank is going to compute; collective over the stage.

        Returns:
            Whether any came from other ranks; close_training_pass() has to be told.
        """
        rows = self._rows(micro_batches)
        brought = self.plan.bring([micro_batch.grid for micro_batch in micro_batches])
        self.learning = learning
        try:
            self.features_absent += sum(map(self.plan.absent, rows))
            self._locate(micro_batches, rows)
        except BaseException:
            self.close_training_pass(brought)
            raise
        return brought

    def close_training_pass(self, brought: bool) -> None:
        """Lets go of what open_training_pass() brought."""
        self._located = {}
        if brought:
            self.features.remove_last()

    def discard(self) -> None:
        """Forgets what training passes gathered: a failed one belongs to no mini-step."""
        self.learning, self.features_absent = False, 0
        self.drift.discard()
        if self._predictor is not None:
            self._predictor.discard()

    def keep_features(self, site: RouterSite, bound: BoundMicroBatch, h_TH: Tensor, p_TE: Tensor) -> None:
        """The observer of the log-prob pass."""
        where = self._located[bound.micro_batch.key]
        if not where.count:
            return
        p_SE = p_TE.index_select(0, where.rows)
        self.features.write(site.local, where, h_TH.index_select(0, where.rows), p_SE)
        if bound.routes_TLK is not None:
            replayed_SK = bound.routes_TLK[:, site.local].index_select(0, where.rows)
            self.agreement.add(select_experts(site.router, p_SE.float()), replayed_SK, p_SE.shape[1])

    def compare(self, site: RouterSite, bound: BoundMicroBatch, h_TH: Tensor, p_TE: Tensor) -> None:
        """The observer of a training pass."""
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
        if self._predictor is not None:
            q_hat_SE = predicted_logits(h_old_SH, p_old_SE, self._predictor.weight_LEH[site.local])
            if self.learning:
                self._predictor.accumulate(site.local, h_old_SH, p_old_SE, p_SE)
        columns = drift_columns(current_SK, replayed_SK, frozen_SK, p_SE, p_old_SE, q_hat_SE, self._score_function)
        self.drift.add(site.local, columns)

    def _rows(self, micro_batches: Sequence[MicroBatch]) -> list[IntArray]:
        """The flat token index of every row that this rank computes; refuses what cannot be cut before anything is changed."""
        return [self._tokens.of_grid(self._stage.rows(micro_batch.grid)) for micro_batch in micro_batches]

    def _locate(self, micro_batches: Sequence[MicroBatch], rows: Sequence[IntArray]) -> None:
        """Finds the features of every micro-batch's rows."""
        self._located = {
            micro_batch.key: self.features.locate(tokens, self._device)
            for micro_batch, tokens in zip(micro_batches, rows, strict=True)
        }
