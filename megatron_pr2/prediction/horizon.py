"""Horizon: over how many updates a prediction has to reach, and what one update of the policy does to the gates.

Of kappa mini-steps the i-th trains i - 1 updates after the rollout, (kappa - 1) / 2 on average; kappa is that of the last rollout
batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_pr2.config import PR2Config
from megatron_pr2.errors import AttachError
from megatron_pr2.parallel.consensus import largest
from megatron_pr2.prediction.optimizer_moments import find_holders, next_updates
from megatron_pr2.prediction.predictor import RoutePredictor
from megatron_pr2.replay.sequences import ReplaySequence
from megatron_pr2.replay.sites import RouterSite


class Horizon:
    """What a predictor knows of time: mini-steps, and the policy's optimizer."""

    def __init__(
        self,
        config: PR2Config,
        model_config: Any,
        sites: Sequence[RouterSite],
        predictor: RoutePredictor | None,
        token_group: dist.ProcessGroup | None,
        device: torch.device,
    ) -> None:
        """Args: `token_group` are the ranks that hold other tokens of the same layers; None on a single process."""
        self._config, self._predictor, self._group, self._device = config, predictor, token_group, device
        self._gates = [site.router.weight for site in sites]
        self._shape = model_config.num_moe_experts, model_config.hidden_size
        self._optimizer: Any = None
        self._mini_steps = 0

    def watch(self, optimizer: Any) -> None:
        """Takes the policy's optimizer.

        Raises:
            AttachError: the predictor needs the gates' next update, and the optimizer does not train them, or is not supported.
        """
        if self._config.follows:
            find_holders(optimizer, self._gates)
        self._optimizer = optimizer

    def require_optimizer(self) -> None:
        """Before a mini-step.

        Raises:
            AttachError: the predictor needs the policy's optimizer, and PR2.follow() was not called.
        """
        if self._config.follows and self._optimizer is None:
            raise AttachError(
                f"predictor={self._config.predictor!r} needs to know the policy's optimizer: call pr2.follow(optimizer) once, "
                "after it is made"
            )

    def ran(self, mini_step: int) -> None:
        """A mini-step's forward and backward are done."""
        self._mini_steps = max(self._mini_steps, mini_step)

    def end_batch(self) -> None:
        """The rollout batch is over: its mini-steps are what the next one is expected to have."""
        if self._mini_steps and self._predictor is not None:
            self._predictor.horizon = (self._mini_steps - 1) / 2
        self._mini_steps = 0

    def update(self) -> None:
        """After an update of the policy: the predictor follows it; collective where the optimizer is sharded."""
        if self._predictor is not None and self._config.follows:
            horizon = self._config.horizon or max((self._mini_steps - 1) / 2, self._predictor.horizon)
            self._predictor.follow(self.gate_updates(), horizon)

    def gate_updates(self) -> Tensor:
        """The next update of the gates, [L, E, H] fp32."""
        self.require_optimizer()
        return next_updates(self._optimizer, self._gates, self._shape, self._device)

    def known_horizon(self, sequences: Sequence[ReplaySequence]) -> float | None:
        """The average that sequences' own horizons are relative to, where the actor records their routes.

        Collective over the token group, and the same on all of its ranks. None where a sequence does not say its mini-step.
        """
        if self._config.routes != "actor" or self._predictor is None:
            return None
        known = [sequence.mini_step for sequence in sequences if sequence.mini_step is not None]
        unknown, last = len(sequences) - len(known), max(known, default=0)
        if self._group is not None and self._group.size() > 1:
            both = torch.tensor([unknown, last], dtype=torch.int64, device=self._device)
            unknown, last = largest(both, [self._group]).tolist()
        if unknown or last < 2:
            return None
        return (self._config.horizon if self._config.follows else 0.0) or (last - 1) / 2
