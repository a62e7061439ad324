"""The learned predictor of arXiv 2606.00395: its closed-form gradient and its own optimizer (design decision 1).

Shape suffixes: S sampled tokens, L local MoE layers, E experts, H hidden.

Every loss is a forward KL between distributions whose means are the scores (replay.scores), the negative log-likelihood of a
generalised linear model, so one expression gives every gradient:

    dL/dW_p = mean_t ((score(prediction) - score(target)) * slope(prediction))^T h_old

where the slope is 1 for the canonical links: softmax, which both losses of the paper use, and sigmoid.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_pr2.prediction.predictor import RoutePredictor, loaded_horizon
from megatron_pr2.replay.scores import divergence_gradient

logger = logging.getLogger(__name__)


def matching_logits(
    p_old_SE: Tensor, p_SE: Tensor, shift_SE: Tensor, target: str, score_function: str
) -> tuple[Tensor, Tensor, str]:
    """The (target, prediction) logits that a loss compares, and the score function that it compares them under.

    "post" compares p with p_old + W_p h_old under the router's own score; "delta" compares p - p_old with W_p h_old under softmax
    (the delta ablation of arXiv 2606.00395, defined for softmax only; a sigmoid router's logit change is compared likewise).

    Args:
        p_old_SE, p_SE: logits under theta_old and now.
        shift_SE: W_p h_old, whose dtype the comparison takes.
    """
    if target == "post":
        return p_SE.to(shift_SE.dtype), p_old_SE.to(shift_SE.dtype) + shift_SE, score_function
    if target == "delta":
        return p_SE.to(shift_SE.dtype) - p_old_SE.to(shift_SE.dtype), shift_SE, "softmax"
    raise ValueError(f"predictor target {target!r}: expected 'post' or 'delta'")


def gradient_sum(
    h_old_SH: Tensor, p_old_SE: Tensor, p_SE: Tensor, shift_SE: Tensor, *, target: str, score_function: str
) -> Tensor:
    """Sum over the sampled tokens of the loss gradient with respect to W_p, [E, H]; shift_SE is W_p h_old."""
    wanted, predicted, function = matching_logits(p_old_SE, p_SE, shift_SE, target, score_function)
    return divergence_gradient(wanted, predicted, function).t() @ h_old_SH.to(shift_SE.dtype)


class LearnedPredictor(RoutePredictor):
    """W_p trained on the drift of the routers; not a parameter of the policy.

    The gradient is accumulated on the device over micro-batches and reduced once per mini-step over every rank that holds
    other tokens; it never touches DDP, the policy's optimizer, its clipping or its checkpoint.
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        hidden: int,
        *,
        target: str,
        score_function: str,
        betas: tuple[float, float],
        eps: float,
        device: torch.device,
    ) -> None:
        self.target = target
        self.score_function = score_function
        self._weight_LEH = torch.zeros(num_layers, num_experts, hidden, dtype=torch.float32, device=device)
        # One flat buffer, so that a mini-step costs one collective: the gradient sums, then the number of tokens per layer.
        self._sums = torch.zeros(self._weight_LEH.numel() + num_layers, dtype=torch.float32, device=device)
        self._optimizer = torch.optim.Adam([self._weight_LEH], lr=0.0, betas=betas, eps=eps)

    @property
    def weight_LEH(self) -> Tensor:
        return self._weight_LEH

    @property
    def grad_sum_LEH(self) -> Tensor:
        """Gradient sums of the current mini-step, a view."""
        return self._sums[: self._weight_LEH.numel()].view_as(self._weight_LEH)

    @property
    def token_count_L(self) -> Tensor:
        """Sampled tokens of the current mini-step per layer, a view."""
        return self._sums[self._weight_LEH.numel() :]

    @torch.no_grad()
    def accumulate(self, layer: int, h_old_SH: Tensor, p_old_SE: Tensor, p_SE: Tensor, shift_SE: Tensor) -> None:
        kind = {"target": self.target, "score_function": self.score_function}
        self.grad_sum_LEH[layer] += gradient_sum(h_old_SH, p_old_SE, p_SE, shift_SE, **kind)
        self.token_count_L[layer] += h_old_SH.shape[0]

    def discard(self) -> None:
        self._sums.zero_()

    @torch.no_grad()
    def step(self, lr: float, group: dist.ProcessGroup | None) -> dict[str, float]:
        """Reduces, averages and applies the accumulated gradient, then clears it.

        Every rank of `group` calls it, also one without a single sampled token (a collective behind a per-rank condition hangs).
        Without any token in the whole group nothing is updated.
        """
        if group is not None and dist.get_world_size(group) > 1:
            dist.all_reduce(self._sums, group=group)
        count_L = self.token_count_L
        grad = self.grad_sum_LEH / count_L.clamp(min=1.0).view(-1, 1, 1)
        tokens, grad_norm = torch.stack([count_L.sum(), grad.norm()]).tolist()
        if not math.isfinite(grad_norm):
            logger.warning("the predictor's gradient is not finite (router inputs or logits overflow): its layers take zero")
            grad = torch.where(grad.isfinite().all(dim=2, keepdim=True).all(dim=1, keepdim=True), grad, 0.0)
        if tokens > 0.0:
            self._weight_LEH.grad = grad
            for param_group in self._optimizer.param_groups:
                param_group["lr"] = lr
            self._optimizer.step()
            self._weight_LEH.grad = None
        self._sums.zero_()
        return {"tokens": tokens, "grad_norm": grad_norm, "weight_norm": self.weight_norm()}

    def end_batch(self, average: float, horizon: float) -> None:
        """W_p was learned from drift over so many updates; from one mini-step nothing is learned."""
        self.horizon = average or self.horizon

    def state(self) -> dict[str, Tensor]:
        """weight, exp_avg and exp_avg_sq [L, E, H], step and weight_horizon [L]; Adam's are zeros before its first update."""
        moments = self._optimizer.state.get(self._weight_LEH, {})
        zero = torch.zeros_like(self._weight_LEH)
        step = torch.as_tensor(moments.get("step", 0.0), dtype=torch.float32).cpu()
        return {
            "weight": self._weight_LEH,
            "exp_avg": moments.get("exp_avg", zero),
            "exp_avg_sq": moments.get("exp_avg_sq", zero),
            "step": step.expand(len(self._weight_LEH)),
            "weight_horizon": torch.full((len(self._weight_LEH),), self.horizon),
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restores :meth:`state`; the learning rate is not restored, it follows the policy's."""
        with torch.no_grad():
            self._weight_LEH.zero_()
            if "weight" in state:
                self._weight_LEH.copy_(state["weight"])
        self.horizon = loaded_horizon(state, "weight_horizon")
        saved = self._optimizer.state_dict()
        # Before its first update Adam has no state, and makes it as zeros.
        saved["state"] = {}
        step = _common_step(state["step"]) if "step" in state and len(self._weight_LEH) else torch.tensor(0.0)
        if step > 0:
            saved["state"][0] = {"exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"], "step": step.cpu()}
        self._optimizer.load_state_dict(saved)
        self._sums.zero_()


def _common_step(step_L: Tensor) -> Tensor:
    """Adam's step, which the layers of a rank share."""
    if (step_L != step_L[0]).any():
        # Possible only where the byte budget left one stage without any feature for a whole mini-step and others not.
        logger.warning("the layers' predictors had different numbers of updates %s: Adam goes on from the largest", step_L.tolist())
    return step_L.max()
