"""Prediction along the policy optimizer's momentum: no training, no features.

Adam moves a gate by -lr m / (sqrt(v) + eps) per update (prediction.optimizer_moments), and its first moment changes slowly, so
the next updates resemble the last one:

    W_p = c * horizon * (the last update of the gate)

where the horizon is the number of updates between the weights that a rollout is sampled under and those that train on it: of kappa
mini-steps the i-th is (i - 1) updates away, (kappa - 1) / 2 on average.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_pr2.prediction.learned import LearnedPredictor
from megatron_pr2.prediction.predictor import ExtrapolatingPredictor, RoutePredictor


class MomentumPredictor(ExtrapolatingPredictor):
    """W_p extrapolates what the policy's optimizer is doing to the gates; set after every update of the policy."""

    kind = "momentum"

    def __init__(self, num_layers: int, num_experts: int, hidden: int, *, coefficient: float, device: torch.device) -> None:
        """Args: `coefficient` is c."""
        super().__init__(num_layers, num_experts, hidden, device=device)
        self._coefficient = coefficient

    @torch.no_grad()
    def follow(self, updates_LEH: Tensor, horizon: float) -> None:
        """W_p = c * horizon * updates."""
        torch.mul(updates_LEH, self._coefficient * horizon, out=self._weight_LEH)
        self.horizon = horizon

    def end_batch(self, average: float, horizon: float) -> None:
        """Scales W_p: until the last mini-step of the batch it was made for at least as many as the batch before had."""
        if self.horizon:
            self._weight_LEH.mul_(horizon / self.horizon)
        self.horizon = horizon


class LearnedMomentumPredictor(RoutePredictor):
    """The sum of both: what is learned corrects the extrapolation.

    While a rollout batch is trained on, the learned part sees what the extrapolation missed that its routes were predicted with,
    not the newest one.
    """

    def __init__(self, learned: LearnedPredictor, momentum: MomentumPredictor) -> None:
        self.learned, self.momentum = learned, momentum
        self._in_use_LEH: Tensor | None = None

    @property
    def horizon(self) -> float:
        """The extrapolation's."""
        return self.momentum.horizon

    @horizon.setter
    def horizon(self, value: float) -> None:
        self.momentum.horizon = value

    @property
    def weight_LEH(self) -> Tensor:
        """W_p of every layer, a new tensor."""
        return self.learned.weight_LEH + self.momentum.weight_LEH

    def weight(self, layer: int) -> Tensor:
        return self.learned.weight(layer) + self.momentum.weight(layer)

    def weight_for(self, horizon: float | None) -> Tensor:
        return self.learned.weight_for(horizon) + self.momentum.weight_for(horizon)

    def momentum_for(self, horizon: float | None) -> Tensor:
        return self.momentum.weight_for(horizon)

    def training_weight(self, layer: int) -> Tensor:
        in_use_LEH = self.momentum.weight_LEH if self._in_use_LEH is None else self._in_use_LEH
        return self.learned.weight(layer) + in_use_LEH[layer]

    def begin(self, momentum_LEH: Tensor | None) -> None:
        self._in_use_LEH = momentum_LEH

    def accumulate(self, layer: int, h_old_SH: Tensor, p_old_SE: Tensor, p_SE: Tensor, shift_SE: Tensor) -> None:
        self.learned.accumulate(layer, h_old_SH, p_old_SE, p_SE, shift_SE)

    def discard(self) -> None:
        self.learned.discard()

    def step(self, lr: float, group: dist.ProcessGroup | None) -> dict[str, float]:
        return {**self.learned.step(lr, group), "weight_norm": self.weight_norm()}

    def follow(self, updates_LEH: Tensor, horizon: float) -> None:
        self.momentum.follow(updates_LEH, horizon)

    def end_batch(self, average: float, horizon: float) -> None:
        self.learned.end_batch(average, horizon)
        self.momentum.end_batch(average, horizon)

    def state(self) -> dict[str, Tensor]:
        return {**self.learned.state(), **self.momentum.state()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.learned.load_state(state)
        self.momentum.load_state(state)
