"""RoutePredictor: the interface of everything that proposes a W_p, and the maths that its users share.

Shape suffixes: S sampled tokens, L local MoE layers, E experts, H hidden.

The prediction for a token is q_hat = score(p_old + W_p h_old) (arXiv 2606.00395, Eq. 9-11; scores: replay.scores). A strategy
says where W_p comes from: prediction.learned (the paper), prediction.momentum (the policy optimizer's direction), or both. It
is never a parameter of the policy (design decision 1).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def shift_logits(h_SH: Tensor, w_EH: Tensor) -> Tensor:
    """W_p h, [S, E], in the dtype of W_p."""
    return F.linear(h_SH.to(w_EH.dtype), w_EH)


class RoutePredictor(ABC):
    """W_p of the MoE layers of this pipeline rank, fp32, zero at the start; a strategy decides how it changes.

    What is pushed to the engine is W + beta W_p, where prediction.hold_back chooses beta. W_p may change while a
    rollout batch is trained on; `pushed` is the W_p that its routes were predicted with.

    Attributes:
        pushed_LEH: W_p as it was at the last freeze(); None where it is not needed.
        horizon: updates between a rollout and the training on it, on average, in the last whole rollout batch.
    """

    pushed_LEH: Tensor | None = None
    horizon: float = 0.0

    def keep_pushed(self) -> None:
        """From now on freeze() keeps a copy of W_p."""
        self.pushed_LEH = self.weight_LEH.clone()

    def freeze(self) -> None:
        """A rollout batch begins, whose routes were predicted with the present W_p."""
        if self.pushed_LEH is not None:
            self.pushed_LEH.copy_(self.weight_LEH)

    def in_use(self) -> dict[str, Tensor]:
        """What freeze() keeps, by name: needed to go on in the middle of a rollout batch."""
        return {} if self.pushed_LEH is None else {"pushed": self.pushed_LEH}

    @property
    @abstractmethod
    def weight_LEH(self) -> Tensor:
        """W_p of every layer, [L, E, H] fp32."""

    def weight(self, layer: int) -> Tensor:
        """W_p of one local layer, [E, H] fp32."""
        return self.weight_LEH[layer]

    def training_weight(self, layer: int) -> Tensor:
        """The W_p, [E, H] fp32, whose prediction the training passes of the current batch compare and learn from."""
        return self.weight(layer)

    # What follows does nothing where a strategy has no use for it.

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


def predictor_bytes(num_layers: int, num_experts: int, hidden: int, predictor: str, *, hold_back: bool) -> dict[str, int]:
    """Bytes of a predictor on a rank with so many MoE layers, by what they are for.

    Returns:
        weight, gradient, adam (all of the learned part), momentum, snapshot (W_p as the engine has it).
    """
    one = 4 * num_layers * num_experts * hidden
    learns, follows = "learned" in predictor, "momentum" in predictor
    return {
        "weight": one * learns,
        "gradient": (one + 4 * num_layers) * learns,
        "adam": 2 * one * learns,
        # Beside a learned part the extrapolation in use is kept apart from the newest one.
        "momentum": one * follows * (2 if learns else 1),
        "snapshot": one * (predictor == "momentum" or (learns and hold_back)),
    }


def merge_gate(gate_EH: Tensor, w_EH: Tensor) -> Tensor:
    """W + W_p, added in fp32 and cast once to the gate's dtype. With W_p = 0 the result is bit-identical to the gate."""
    return (gate_EH.detach().float() + w_EH.to(gate_EH.device)).to(gate_EH.dtype)
