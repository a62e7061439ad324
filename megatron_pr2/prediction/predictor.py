"""RoutePredictor: the interface of everything that proposes a W_p, and the maths that its users share.

Shape suffixes: S sampled tokens, L local MoE layers, E experts, H hidden.

The prediction for a token is q_hat = score(p_old + W_p h_old) (arXiv 2606.00395, Eq. 9-11; scores: replay.scores). A strategy
says where W_p comes from: prediction.learned (the paper), prediction.momentum (the policy optimizer's direction), or both. It
is never a parameter of the policy (design decision 1).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

# Shares of W_p that hold-back compares. Coarse: agreement changes little between neighbours, and every step costs a top-k over the
# held-out tokens.
BETAS = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)
# Pushes that are kept: a pipeline that is one batch ahead needs two, responses that go on over another push one more.
KEPT = 3


def shift_logits(h_SH: Tensor, w_EH: Tensor) -> Tensor:
    """W_p h, [S, E], in the dtype of W_p."""
    return F.linear(h_SH.to(w_EH.dtype), w_EH)


class RoutePredictor(ABC):
    """W_p of the MoE layers of this pipeline rank, fp32, zero at the start; a strategy decides how it changes.

    What is pushed to the engine is W + beta W_p, where prediction.hold_back chooses beta. W_p may change while a
    rollout batch is trained on; prediction.pushes keeps the W_p that its routes were predicted with.

    Attributes:
        horizon: updates ahead that W_p is made for; set where W_p is. 0: not known, or W_p = 0.
    """

    horizon: float = 0.0

    def momentum_for(self, horizon: float | None) -> Tensor | None:
        """The newest extrapolation for so many updates, where it is a part of W_p beside a learned one; None elsewhere."""
        return None

    @property
    @abstractmethod
    def weight_LEH(self) -> Tensor:
        """W_p of every layer, [L, E, H] fp32."""

    def size_of(self, updates: float) -> float:
        """How far so many updates of the policy go, in units of one."""
        return updates

    def weight_for(self, horizon: float | None) -> Tensor:
        """W_p of every layer for so many updates ahead; as it is for None, and where it is not known what it is made for."""
        if horizon == 0.0:
            return torch.zeros_like(self.weight_LEH)  # exactly no prediction, also of a W_p that is not finite
        made_for = self.size_of(self.horizon)
        return self.weight_LEH if horizon is None or not made_for else self.weight_LEH * (self.size_of(horizon) / made_for)

    def weight(self, layer: int) -> Tensor:
        """W_p of one local layer, [E, H] fp32."""
        return self.weight_LEH[layer]

    def training_weight(self, layer: int) -> Tensor:
        """The W_p, [E, H] fp32, that the training passes of the current batch correct."""
        return self.weight(layer)

    # What follows does nothing where a strategy has no use for it.

    def begin(self, momentum_LEH: Tensor | None) -> None:  # noqa: B027
        """A rollout batch begins.

        Args:
            momentum_LEH: the extrapolation that its routes were predicted with, where that was one part of several.
        """

    def end_batch(self, average: float, horizon: float) -> None:  # noqa: B027
        """A rollout batch is over.

        Args:
            average: updates that its tokens were away, on average.
            horizon: updates that those of the next one are expected to be.
        """

    def clear_not_finite(self) -> list[int]:
        """Starts over from 0 in local layers whose W_p is not finite, and returns them."""
        fine = self.weight_LEH.isfinite().flatten(1).all(1).tolist()
        bad = [layer for layer, good in enumerate(fine) if not good]
        for tensor in self.state().values():
            if tensor.dim() > 1:
                tensor[bad] = 0.0
        return bad

    def accumulate(self, layer: int, h_old_SH: Tensor, p_old_SE: Tensor, p_SE: Tensor, shift_SE: Tensor) -> None:  # noqa: B027
        """Adds one micro-batch's gradient of one local layer; no host-device synchronisation.

        Args:
            h_old_SH: fp32 router inputs under theta_old; where a token's horizon is known, scaled by it.
            p_old_SE, p_SE: fp32 logits under theta_old and now.
            shift_SE: W_p h_old.
        """

    def discard(self) -> None:  # noqa: B027
        """Forgets what was accumulated since the last step."""

    def step(self, lr: float, group: dist.ProcessGroup | None) -> dict[str, float]:
        """Reduces, averages and applies the accumulated gradient, then clears it; collective over `group`.

        Args:
            lr: the predictor's learning rate, alpha times the policy's.
            group: the ranks that hold other tokens of the same layers; None on a single process.

        Returns:
            tokens: sampled tokens over the group, summed over layers; grad_norm; weight_norm after the step.
        """
        return {"tokens": 0.0, "grad_norm": 0.0, "weight_norm": self.weight_norm()}

    def follow(self, updates_LEH: Tensor, horizon: float) -> None:  # noqa: B027
        """Takes the change of the gates that the policy's optimizer is making per update.

        Args:
            updates_LEH: fp32, in units of the weights.
            horizon: updates that lie, on average, between a rollout and the training on it.
        """

    def weight_norm(self) -> float:
        """Norm of W_p over all layers."""
        return float(self.weight_LEH.norm())

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Everything that it continues from: name to a tensor with the layers in front."""

    @abstractmethod
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restores :meth:`state`; what is absent starts at its initial value."""


class ExtrapolatingPredictor(RoutePredictor):
    """W_p is set as a whole: a change of the routers per update of the policy, for so many updates.

    Attributes:
        kind: name of W_p in its state.
    """

    kind: str

    def __init__(self, num_layers: int, num_experts: int, hidden: int, *, device: torch.device) -> None:
        self._weight_LEH = torch.zeros(num_layers, num_experts, hidden, dtype=torch.float32, device=device)

    @property
    def weight_LEH(self) -> Tensor:
        return self._weight_LEH

    def state(self) -> dict[str, Tensor]:
        """W_p [L, E, H], because a push may come before it is set again; horizon [L]."""
        return {self.kind: self._weight_LEH, "horizon": torch.full((len(self._weight_LEH),), self.horizon)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            self._weight_LEH.zero_()
            if self.kind in state:
                self._weight_LEH.copy_(state[self.kind])
        self.horizon = loaded_horizon(state, "horizon")


def loaded_horizon(state: Mapping[str, Tensor], name: str) -> float:
    """What the layers of a state have in common; 0 where it is absent."""
    return float(state[name][0]) if name in state and len(state[name]) else 0.0


def predictor_bytes(num_layers: int, num_experts: int, hidden: int, predictor: str) -> dict[str, int]:
    """Bytes of a predictor on a rank with so many MoE layers, by what they are for.

    Returns:
        weight, gradient, adam (all of the learned part), momentum (or look-ahead). Pushes come on top (:func:`push_bytes`).
    """
    one = 4 * num_layers * num_experts * hidden
    learns, follows = "learned" in predictor, "momentum" in predictor or predictor == "lookahead"
    return {
        "weight": one * learns,
        "gradient": (one + 4 * num_layers) * learns,
        "adam": 2 * one * learns,
        "momentum": one * follows,
    }


def push_bytes(num_layers: int, num_experts: int, hidden: int, predictor: str, *, hold_back: bool, horizons: int = 1) -> int:
    """Bytes of the pushes of KEPT versions of a bf16 policy, and of what a batch of one is judged with, for so many MoE layers.

    Args:
        horizons: pushes of each version, and of a batch.
    """
    if predictor == "none":
        return 0
    entries = num_layers * num_experts * hidden
    extrapolated = 4 * ("learned" in predictor and "momentum" in predictor)
    gate = torch.bfloat16.itemsize
    # Each W_p in fp32, W and what arrived; of a batch's the gates of every beta, which a look-ahead has no use for; W of the
    # old-log-prob pass.
    candidates = (len(BETAS) - 1) * gate if hold_back and predictor != "lookahead" else 0
    pushes = horizons * (KEPT * (4 + extrapolated + 2 * gate) + candidates)
    return entries * (pushes + (hold_back or "learned" in predictor) * gate)
