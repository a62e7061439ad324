"""Parts: what the handle of an attached model holds, put together and, where that fails, undone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch

from megatron_pr2.config import PR2Config
from megatron_pr2.drift.measurement import Measurement
from megatron_pr2.drift.mini_steps import MiniSteps
from megatron_pr2.errors import AttachError
from megatron_pr2.parallel.groups import check_groups, communication_device, everyone, token_group
from megatron_pr2.parallel.replica import find_replica
from megatron_pr2.parallel.tokens import TokenIndex
from megatron_pr2.prediction.horizon import Horizon
from megatron_pr2.prediction.predictor import RoutePredictor
from megatron_pr2.prediction.strategies import make_predictor
from megatron_pr2.replay.hook import check_release, check_unpatched
from megatron_pr2.replay.model_settings import check_config
from megatron_pr2.replay.passes import Passes
from megatron_pr2.replay.progress import Progress
from megatron_pr2.replay.sequences import ReplaySequence
from megatron_pr2.replay.sites import give_back, unwrapped, upgrade_routers
from megatron_pr2.replay.token_check import TokenCheck
from megatron_pr2.routes.store import RouteStore


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
