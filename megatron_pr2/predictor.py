"""RoutePredictor: W_p of every local MoE layer, its closed-form gradient and its own optimizer (design decision 1).

Shape suffixes: S sampled tokens, L local MoE layers, E experts, H hidden.

The prediction for a token is q_hat = score(p_old + W_p h_old) (arXiv 2606.00395, Eq. 9-11). Both losses of the paper, and the
Bernoulli KL that sigmoid routers need, are negative log-likelihoods of generalised linear models with canonical links, so one
expression gives every gradient:  dL/dW_p = mean_t (score(prediction) - score(target))^T h_old.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def score(logits_SE: Tensor, score_function: str) -> Tensor:
    """Router scores in at least fp32: softmax over experts, or sigmoid per expert.

    Raises:
        ValueError: another score function.
    """
    logits_SE = logits_SE if logits_SE.dtype == torch.float64 else logits_SE.float()
    if score_function == "softmax":
        return torch.softmax(logits_SE, dim=-1)
    if score_function == "sigmoid":
        return torch.sigmoid(logits_SE)
    raise ValueError(f"score function {score_function!r}: expected 'softmax' or 'sigmoid'")


def predicted_logits(h_old_SH: Tensor, p_old_SE: Tensor, w_EH: Tensor) -> Tensor:
    """p_old + W_p h_old, [S, E], in the dtype of W_p."""
    return p_old_SE.to(w_EH.dtype) + h_old_SH.to(w_EH.dtype) @ w_EH.t()


def divergence(target_SE: Tensor, prediction_SE: Tensor, score_function: str) -> Tensor:
    """Forward KL(target || prediction) per token, [S]: categorical for softmax routers, summed Bernoulli for sigmoid routers.

    Args:
        target_SE, prediction_SE: logits.
    """
    if score_function == "softmax":
        log_target = torch.log_softmax(target_SE, dim=-1)
        return (log_target.exp() * (log_target - torch.log_softmax(prediction_SE, dim=-1))).sum(-1)
    if score_function == "sigmoid":
        on = torch.sigmoid(target_SE) * (F.logsigmoid(target_SE) - F.logsigmoid(prediction_SE))
        off = torch.sigmoid(-target_SE) * (F.logsigmoid(-target_SE) - F.logsigmoid(-prediction_SE))
        return (on + off).sum(-1)
    raise ValueError(f"score function {score_function!r}: expected 'softmax' or 'sigmoid'")


def matching_logits(
    h_old_SH: Tensor, p_old_SE: Tensor, p_SE: Tensor, w_EH: Tensor, target: str, score_function: str
) -> tuple[Tensor, Tensor, str]:
    """The (target, prediction) logits that a loss compares, and the score function that it compares them under.

    "post" compares p with p_old + W_p h_old under the router's own score; "delta" compares p - p_old with W_p h_old under softmax
    (the delta ablation of arXiv 2606.00395, defined for softmax only; a sigmoid router's logit change is compared likewise).
    """
    if target == "post":
        return p_SE.to(w_EH.dtype), predicted_logits(h_old_SH, p_old_SE, w_EH), score_function
    if target == "delta":
        return (p_SE.to(w_EH.dtype) - p_old_SE.to(w_EH.dtype)), h_old_SH.to(w_EH.dtype) @ w_EH.t(), "softmax"
    raise ValueError(f"predictor target {target!r}: expected 'post' or 'delta'")


def gradient_sum(
    h_old_SH: Tensor, p_old_SE: Tensor, p_SE: Tensor, w_EH: Tensor, *, target: str, score_function: str
) -> Tensor:
    """Sum over the sampled tokens of the loss gradient with respect to W_p, [E, H]."""
    wanted, predicted, function = matching_logits(h_old_SH, p_old_SE, p_SE, w_EH, target, score_function)
    return (score(predicted, function) - score(wanted, function)).t() @ h_old_SH.to(w_EH.dtype)


class RoutePredictor:
    """W_p of the MoE layers of this pipeline rank, fp32, zero at start; not a parameter of the policy.

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
        """Args: `device` is where the routers' weights live; `score_function` is the routers' own."""
        self.target = target
        self.score_function = score_function
        self.weight_LEH = torch.zeros(num_layers, num_experts, hidden, dtype=torch.float32, device=device)
        # One flat buffer, so that a mini-step costs one collective: the gradient sums, then the number of tokens per layer.
        self._sums = torch.zeros(self.weight_LEH.numel() + num_layers, dtype=torch.float32, device=device)
        self._optimizer = torch.optim.Adam([self.weight_LEH], lr=0.0, betas=betas, eps=eps)

    @property
    def grad_sum_LEH(self) -> Tensor:
        """Gradient sums of the current mini-step, a view."""
        return self._sums[: self.weight_LEH.numel()].view_as(self.weight_LEH)

    @property
    def token_count_L(self) -> Tensor:
        """Sampled tokens of the current mini-step per layer, a view."""
        return self._sums[self.weight_LEH.numel() :]

    @torch.no_grad()
    def accumulate(self, layer: int, h_old_SH: Tensor, p_old_SE: Tensor, p_SE: Tensor) -> None:
        """Adds one micro-batch's gradient of one local layer; no host-device synchronisation."""
        self.grad_sum_LEH[layer] += gradient_sum(
            h_old_SH, p_old_SE, p_SE, self.weight_LEH[layer], target=self.target, score_function=self.score_function
        )
        self.token_count_L[layer] += h_old_SH.shape[0]

    def discard(self) -> None:
        """Forgets what was accumulated since the last step."""
        self._sums.zero_()

    @torch.no_grad()
    def step(self, lr: float, group: dist.ProcessGroup | None) -> dict[str, float]:
        """Reduces, averages and applies the accumulated gradient, then clears it.

        Every rank of `group` calls it, also one without a single sampled token (a collective behind a per-rank condition hangs).
        Without any token in the whole group nothing is updated.

        Args:
            lr: the predictor's learning rate, alpha times the policy's.
            group: the ranks that hold other tokens of the same layers; None on a single process.

        Returns:
            tokens: sampled tokens over the group, summed over layers; grad_norm; weight_norm after the step.
        """
        if group is not None and dist.get_world_size(group) > 1:
            dist.all_reduce(self._sums, group=group)
        count_L = self.token_count_L
        grad = self.grad_sum_LEH / count_L.clamp(min=1.0).view(-1, 1, 1)
        tokens, grad_norm = torch.stack([count_L.sum(), grad.norm()]).tolist()
        if tokens > 0.0:
            self.weight_LEH.grad = grad
            for param_group in self._optimizer.param_groups:
                param_group["lr"] = lr
            self._optimizer.step()
            self.weight_LEH.grad = None
        self._sums.zero_()
        return {"tokens": tokens, "grad_norm": grad_norm, "weight_norm": float(self.weight_LEH.norm())}

    def merged(self, layer: int, gate_EH: Tensor) -> Tensor:
        """W + W_p of one local layer, added in fp32 and cast once to the gate's dtype (design decision 2)."""
        return merge_gate(gate_EH, self.weight_LEH[layer])

    def state_dict(self) -> dict[str, Any]:
        """W_p [L, E, H] and its Adam state."""
        return {"weight": self.weight_LEH, "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`; the learning rate is not restored, it follows the policy's."""
        with torch.no_grad():
            self.weight_LEH.copy_(state["weight"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._sums.zero_()


def merge_gate(gate_EH: Tensor, w_EH: Tensor) -> Tensor:
    """W + W_p, added in fp32 and cast once to the gate's dtype. With W_p = 0 the result is bit-identical to the gate."""
    return (gate_EH.detach().float() + w_EH.to(gate_EH.device)).to(gate_EH.dtype)
