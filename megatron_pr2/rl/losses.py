"""GRPO: group-normalised advantages and the clipped, token-level policy loss.

Pure functions of tensors; the trainer reduces their sums over micro-batches and ranks.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# What policy_loss sums over the loss-bearing tokens of a micro-batch, in this order.
LOSS_COLUMNS = ("tokens", "loss", "clipped", "ratio", "ratio_squared", "approx_kl")


def group_advantages(rewards: npt.NDArray[np.float64], group_size: int, eps: float = 1e-6) -> npt.NDArray[np.float64]:
    """Reward minus its group's mean, over the group's standard deviation (GRPO, arXiv 2402.03300, section 4.1).

    A group whose rewards are all equal gets zeros: it carries no signal.

    Args:
        rewards: [N], responses of one prompt side by side.
        group_size: responses per prompt; divides N.
    """
    groups = rewards.reshape(-1, group_size)
    centred = groups - groups.mean(axis=1, keepdims=True)
    return (centred / (groups.std(axis=1, keepdims=True) + eps)).reshape(-1)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Clipped surrogate with an asymmetric range ("clip-higher", DAPO, arXiv 2503.14476, Eq. 10), summed over tokens.

    Args:
        logprobs, old_logprobs: [B, S], natural logs under theta and theta_old (or whichever policy the update is to stay close to).
        mask: [B, S] float, 1 where a token bears loss.
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        weights: [B, S] without gradient, multiplied to every token's loss outside of the clipping (megatron_pr2.rl.corrections).

    Returns:
        loss: scalar sum, to be divided by the mini-batch's token count over all ranks (token-level loss, same equation).
        sums: [len(LOSS_COLUMNS)] detached.
        extremes: [2] detached, (min, max) of the ratio over the tokens that bear loss; (inf, -inf) if there is none.
    """
    mask = mask.float()
    log_ratio = (logprobs - old_logprobs) * mask
    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    unclipped, clipped = -advantages * ratio, -advantages * clipped_ratio
    per_token = torch.maximum(unclipped, clipped) * mask
    if weights is not None:
        per_token = per_token * weights.detach()
    with torch.no_grad():
        # k3 estimate of KL(theta_old || theta), never negative: http://joschu.net/blog/kl-approx.html
        kl = ratio - 1.0 - log_ratio
        clipping = (clipped > unclipped).float()
        columns = [mask, per_token, clipping * mask, ratio * mask, ratio.square() * mask, kl * mask]
        sums = torch.stack([c.sum() for c in columns])
        bears = mask > 0
        low = torch.where(bears, ratio, torch.inf).min()
        high = torch.where(bears, ratio, -torch.inf).max()
    return per_token.sum(), sums, torch.stack([low, high])
