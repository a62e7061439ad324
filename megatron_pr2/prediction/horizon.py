"""Horizon: over how many updates a prediction has to reach, and what one update of the policy does to the gates.

Of kappa mini-steps the i-th trains i - 1 updates after the rollout, (kappa - 1) / 2 on average; kappa is that of the last rollout
batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_pr2.config import PR2Config
from megatron_pr2.errors import AttachError, ReplayError
from megatron_pr2.parallel.consensus import largest
from megatron_pr2.prediction.optimizer_moments import find_holders, learning_rate, next_updates, update_rule
from megatron_pr2.prediction.predictor import RoutePredictor
from megatron_pr2.replay.sequences import ReplaySequence
from megatron_pr2.replay.sites import RouterSite


def average_horizon(mini_steps: int) -> float:
    """(kappa - 1) / 2, and 0 before the first mini-step."""
    return max(mini_steps - 1, 0) / 2


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
        self._rate: float | None = None
        self._mini_steps = 0

    @property
    def optimizer(self) -> Any:
        """The policy's optimizer, or None.

        Raises:
            AttachError: it does not train the gates, or the predictor needs their next update and does not know it.
        """
        return self._optimizer

    @optimizer.setter
    def optimizer(self, optimizer: Any) -> None:
        if optimizer is not None and self._config.needs_optimizer:
            for holder in find_holders(optimizer, self._gates):
                update_rule(holder)
        elif optimizer is not None and self._config.learns:
            find_holders(optimizer, [gate for gate in self._gates if gate.requires_grad])
        self._optimizer, self._rate = optimizer, None

    @property
    def can_end(self) -> bool:
        """Whether a mini-step can be ended without being told a learning rate."""
        return self._optimizer is not None or not self._config.learns

    def open(self) -> None:
        """Before a mini-step: reads the learning rate, which a schedule may move on together with the optimizer.

        Raises:
            AttachError: the predictor needs the policy's optimizer, and it was not given.
        """
        self._require_optimizer()
        self._rate = None
        if self._optimizer is not None and self._config.learns:
            self._rate = learning_rate(self._optimizer, self._gates, self._group, self._device)

    def rate(self, given: Any) -> float:
        """The policy's learning rate of the mini-step that ends.

        Args:
            given: what the trainer says; None for the gates' in the optimizer, when the mini-step began.

        Raises:
            ReplayError: it is no finite number of at least 0, or not given and the optimizer not known.
        """
        if given is not None:
            return checked_rate(given)
        if self._optimizer is None:
            raise ReplayError(
                "step() was given no learning rate and does not know the optimizer: pass the policy's current one, "
                "pr2.step(lr=optimizer.param_groups[0]['lr']), or the optimizer, once: attach(model, config, optimizer), or "
                "pr2.optimizer = optimizer where it is made later"
            )
        if self._rate is None and self._config.learns:
            self._rate = learning_rate(self._optimizer, self._gates, self._group, self._device)
        return 0.0 if self._rate is None else checked_rate(self._rate)

    def _require_optimizer(self) -> None:
        if self._config.needs_optimizer and self._optimizer is None:
            raise AttachError(
                f"predictor={self._config.predictor!r} needs the policy's optimizer: attach(model, config, optimizer), or "
                "pr2.optimizer = optimizer where it is made later"
            )

    def ran(self, mini_step: int) -> None:
        """A mini-step's forward and backward are done."""
        self._mini_steps = max(self._mini_steps, mini_step)

    def end_batch(self) -> None:
        """The rollout batch is over: its mini-steps are what the next one is expected to have."""
        if self._mini_steps and self._predictor is not None:
            self._predictor.end_batch(average_horizon(self._mini_steps), self.average())
        self._mini_steps = 0

    def forget_batch(self) -> None:
        """A checkpoint was loaded: the mini-steps that ran say nothing of its W_p."""
        self._mini_steps = 0

    def update(self) -> None:
        """After an update of the policy: the predictor follows it; collective where the optimizer is sharded."""
        if self._predictor is not None and self._config.follows:
            horizon = self._config.horizon or max(average_horizon(self._mini_steps), self._predictor.horizon)
            self._predictor.follow(self.gate_updates(), horizon)

    def gate_updates(self) -> Tensor:
        """The next update of the gates, [L, E, H] fp32."""
        self._require_optimizer()
        return next_updates(self._optimizer, self._gates, self._shape, self._device)

    def average(self) -> float:
        """Updates that the next rollouts will be behind, on average: as many as those of a batch whose mini-steps all ran."""
        return self._config.horizon or average_horizon(self._mini_steps)

    def known_horizon(self, sequences: Sequence[ReplaySequence]) -> float | None:
        """Updates that sequences are away on average, where the actor records their routes, each for its own number.

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
        return average_horizon(last)


def checked_rate(lr: Any) -> float:
    """A learning rate as a number.

    Raises:
        ReplayError: it is none, not finite, or negative.
    """
    try:
        rate = math.nan if isinstance(lr, str | bytes | bool) else float(lr)
    except (TypeError, ValueError, RuntimeError):
        rate = math.nan
    if not 0.0 <= rate < math.inf:
        raise ReplayError(
            f"step(lr={lr!r}): expected the policy's current learning rate, a finite number of at least 0, e.g. "
            "optimizer.param_groups[0]['lr']"
        )
    return rate
