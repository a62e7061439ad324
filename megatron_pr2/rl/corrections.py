"""Off-policy corrections: the weight of what another policy sampled, and the decoupled loss that it belongs in.

Three policies take part, per sampled token a:
    mu        the behaviour policy: what the engine sampled from; log mu(a) came with the rollout
    prox      the proximal policy: what an update is to stay close to; log prox(a) are the old log-probs (old_logprobs.py)
    theta     the policy that is trained

    loss = - w * min(r A, clip(r, 1 - low, 1 + high) A),    r = theta(a) / prox(a),    w = f(prox(a) / mu(a))

is the decoupled objective (Hilton, Cobbe, Schulman 2021, https://arxiv.org/abs/2110.00641; for asynchronous RL of language models
AReaL, https://arxiv.org/abs/2505.24298), with w from truncated or masked importance sampling in the place of the plain ratio.
w times r is theta / mu, which decouples what the engine computed otherwise from what the updates changed
(https://arxiv.org/abs/2605.12070).

    none      w = 1
    tis       truncated importance sampling: w = min(prox / mu, cap) (Yao et al. 2025, https://fengyao.notion.site/off-policy-rl)
    mis       masked: w = prox / mu, and what lies outside of [floor, cap] bears no loss ("IcePop" in verl's rollout correction)

Everything is fp32 and without gradient, except the loss through log theta. [B, S]: B sequences of S tokens, padded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_pr2.errors import ConfigError
from megatron_pr2.rl.losses import policy_loss
from megatron_pr2.rl.old_logprobs import KINDS, LEVELS

# What diagnostic_sums adds up over the tokens of a micro-batch that would bear loss without a correction, in this order.
DIAGNOSTIC_COLUMNS = ("tokens", "weight", "weight_squared", "outside", "kl")


@torch.no_grad()
def behaviour_log_ratio(prox_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> Tensor:
    """log(prox / mu) [B, S] fp32 of every token that bears loss (mask > 0); 0 elsewhere, whatever is there."""
    return torch.where(mask > 0, prox_logprobs.float() - rollout_logprobs.float(), 0.0)


@torch.no_grad()
def sequence_log_ratio(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """The mean over each sequence's tokens, at each of them: log of the geometric mean of the ratios; [B, S] fp32.

    A product of the ratios would grow with the length; the geometric mean is what sequences are filtered by in verl ("seq_mean_k1")
    and what GSPO clips (https://arxiv.org/abs/2507.18071).
    """
    bears = (mask > 0).float()
    mean_B1 = log_ratio.sum(1, keepdim=True) / bears.sum(1, keepdim=True).clamp(min=1.0)
    return mean_B1 * bears


@torch.no_grad()
def truncated_weights(log_ratio: Tensor, cap: float) -> Tensor:
    """min(ratio, cap); exactly 1 where the policies agree. Same shape, fp32."""
    return log_ratio.float().exp().clamp(max=cap)


@torch.no_grad()
def within(log_ratio: Tensor, floor: float, cap: float) -> Tensor:
    """1 where the ratio lies in [floor, cap], 0 elsewhere. Same shape, fp32."""
    ratio = log_ratio.float().exp()
    return ((ratio >= floor) & (ratio <= cap)).float()


@torch.no_grad()
def masked_weights(log_ratio: Tensor, floor: float, cap: float) -> Tensor:
    """The ratio where it lies in [floor, cap], 0 elsewhere. Same shape, fp32."""
    # Not a product: beyond the range of fp32 it would be 0 * inf.
    return torch.where(within(log_ratio, floor, cap) > 0, log_ratio.float().exp(), 0.0)


@dataclass(frozen=True)
class Weighted:
    """What a correction makes of the tokens of a micro-batch; all [B, S] fp32.

    Attributes:
        weights: w.
        mask: 1 where a token still bears loss.
        outside: 1 where a token's ratio was beyond the bounds: truncated, or dropped.
    """

    weights: Tensor
    mask: Tensor
    outside: Tensor


@torch.no_grad()
def behaviour_weights(
    log_ratio: Tensor, mask: Tensor, *, kind: str, cap: float = 2.0, floor: float = 0.5, level: str = "token"
) -> Weighted:
    """w of every token, and which tokens still bear loss.

    What "mis" drops leaves the mask too: counted in the denominator of a token-level loss, it would scale down what is kept.

    Args:
        log_ratio: from :func:`behaviour_log_ratio`.
        cap: largest weight.
        floor: smallest weight that "mis" keeps.
        level: "token", or "sequence": all tokens of a row get the geometric mean of their ratios, and stay or go together.
    """
    if kind not in KINDS or level not in LEVELS:
        raise ConfigError(f"importance={kind!r}, level={level!r}: expected one of {', '.join(KINDS)} and of {', '.join(LEVELS)}")
    mask = (mask > 0).float()
    if kind == "none":
        return Weighted(torch.ones_like(log_ratio), mask, torch.zeros_like(log_ratio))
    if level == "sequence":
        log_ratio = sequence_log_ratio(log_ratio, mask)
    if kind == "tis":
        return Weighted(truncated_weights(log_ratio, cap), mask, (log_ratio.exp() > cap) * mask)
    inside = within(log_ratio, floor, cap) * mask
    return Weighted(masked_weights(log_ratio, floor, cap), inside, mask - inside)


def decoupled_loss(
    logprobs: Tensor,
    prox_logprobs: Tensor,
    rollout_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    kind: str,
    cap: float = 2.0,
    floor: float = 0.5,
    level: str = "token",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The module's equation, summed over tokens; policy_loss to the last bit where mu = prox, and with kind="none".

    Args:
        logprobs, prox_logprobs, rollout_logprobs: [B, S], natural logs under theta, prox and mu.
        advantages, mask, clip_low, clip_high: as of :func:`megatron_pr2.rl.losses.policy_loss`.
        kind, cap, floor, level: as of :func:`behaviour_weights`.

    Returns:
        loss, sums, extremes: as of policy_loss, over the tokens that still bear loss; sums[0] is how many these are.
        diagnostics: [len(DIAGNOSTIC_COLUMNS)] sums for :func:`diagnose`.
    """
    log_ratio = behaviour_log_ratio(prox_logprobs, rollout_logprobs, mask)
    weighted = behaviour_weights(log_ratio, mask, kind=kind, cap=cap, floor=floor, level=level)
    loss, sums, extremes = policy_loss(
        logprobs, prox_logprobs, advantages, weighted.mask, clip_low=clip_low, clip_high=clip_high, weights=weighted.weights
    )
    return loss, sums, extremes, diagnostic_sums(log_ratio, weighted, mask)


@torch.no_grad()
def diagnostic_sums(log_ratio: Tensor, weighted: Weighted, mask: Tensor) -> Tensor:
    """Sums over tokens, [len(DIAGNOSTIC_COLUMNS)] float64; `mask` is the one before the correction."""
    bears = (mask > 0).float()
    applied = weighted.weights * weighted.mask
    # k3 estimate of KL(mu || prox) from mu's samples, never negative: http://joschu.net/blog/kl-approx.html
    kl = torch.expm1(log_ratio) - log_ratio
    return torch.stack([column.sum(dtype=torch.float64) for column in (bears, applied, applied.square(), weighted.outside, kl)])


def diagnose(sums: Tensor) -> dict[str, float]:
    """How far behaviour and proximal policy are apart, from :func:`diagnostic_sums` added up over micro-batches and ranks.

    Returns:
        weight: mean w, 0 for what was dropped; about 1 where nothing was cut off.
        outside: share of tokens truncated (tis) or dropped (mis).
        kl: k3 estimate of KL(mu || prox).
        effective_sample_size: (sum w)^2 / (N sum w^2), in [0, 1]: 1 if all tokens weigh the same.
    """
    value = dict(zip(DIAGNOSTIC_COLUMNS, sums.tolist(), strict=True))
    tokens = max(value["tokens"], 1.0)
    squared = value["weight_squared"]
    return {
        "weight": value["weight"] / tokens,
        "outside": value["outside"] / tokens,
        "kl": value["kl"] / tokens,
        "effective_sample_size": min(1.0, value["weight"] ** 2 / (tokens * squared)) if squared else 0.0,
    }
