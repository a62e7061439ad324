"""What a checkpoint is made of, as the handle offers it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch.distributed as dist

from megatron_pr2.config import PR2Config
from megatron_pr2.drift.feature_plan import FeaturePlan
from megatron_pr2.drift.features import FeatureStore
from megatron_pr2.drift.measurement import Measurement
from megatron_pr2.parallel.decoder_layers import DecoderLayers
from megatron_pr2.parallel.replica import Replica
from megatron_pr2.parallel.tokens import TokenIndex
from megatron_pr2.prediction.horizon import Horizon
from megatron_pr2.prediction.predictor import RoutePredictor
from megatron_pr2.replay.progress import Progress
from megatron_pr2.replay.sequences import ReplaySequence, RolloutReport
from megatron_pr2.replay.sites import RouterSite
from megatron_pr2.routes.store import RouteStore


class Contents(Protocol):
    """The part of `PR2` that checkpoints read and fill; its attributes say there what they are."""

    config: PR2Config
    model_config: Any
    sites: list[RouterSite]
    layers: DecoderLayers
    moe_layers: tuple[int, ...]
    predictor: RoutePredictor | None
    measurement: Measurement
    features: FeatureStore
    feature_plan: FeaturePlan
    routes: RouteStore
    replica: Replica
    token_group: dist.ProcessGroup | None
    sequences: tuple[ReplaySequence, ...]
    tokens: TokenIndex
    progress: Progress
    horizon: Horizon

    def begin_rollout(self, sequences: Sequence[ReplaySequence]) -> RolloutReport: ...
