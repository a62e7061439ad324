"""Group-normalised advantages, the policy's loss (`rl.objectives` has its kinds), and corrections for what another policy sampled.

Three policies take part, per sampled token a:
    mu        the behaviour policy: what the engine sampled from; log mu(a) came with the rollout
    prox      the proximal policy: what an update is to stay close to; log prox(a) are the old log-probs
    theta     the policy that is trained

    loss = - w * min(r A, clip(r, 1 - low, 1 + high) A),    r = theta(a) / prox(a),    w = f(prox(a) / mu(a))

is the decoupled objective (Hilton, Cobbe, Schulman 2021, https://arxiv.org/abs/2110.00641; for asynchronous RL of language models
AReaL, https://arxiv.org/abs/2505.24298). Everything is fp32 and without gradient, except the loss through log theta.
Pure functions of tensors [B, S], B sequences of S tokens; the trainer reduces their sums over micro-batches and ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_pr2.errors import ConfigError
from megatron_pr2.rl.objectives import OBJECTIVES, OVER_RESPONSES, Tokens, kpop_mask, opsm_mask
from megatron_pr2.rl.rules import KINDS, LEVELS

# What policy_loss sums over the loss-bearing tokens of a micro-batch, in this order; "divisor" is what the loss is divided by.
LOSS_COLUMNS = ("tokens", "divisor", "loss", "clipped", "masked", "ratio", "ratio_squared", "approx_kl", "ratio_weight")
# Beyond e^40 a ratio's square leaves fp32, and a clipped loss has the gradient 0 * inf.
LOG_RATIO_LIMIT = 40.0
# What diagnostic_sums adds up over the tokens of a micro-batch that would bear loss without a correction, in this order.
DIAGNOSTIC_COLUMNS = ("tokens", "weight", "weight_squared", "outside", "kl")


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
    loss: str = "grpo",
    ratio_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of a micro-batch, summed over its tokens, or over its responses of each one's mean over tokens.

    Args:
        logprobs, old_logprobs: [B, S], natural logs under theta and prox; rows are whole responses.
        mask: [B, S] float, 1 where a token bears loss.
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        weights: [B, S] without gradient, multiplied to every token's loss outside of the clipping.
        loss: a key of OBJECTIVES.
        ratio_weights: [B, S] without gradient, multiplied to the ratio before it is clipped.

    Returns:
        loss: scalar sum, to be divided by the mini-batch's "divisor" over all ranks: tokens, or responses that bear loss.
        sums: [len(LOSS_COLUMNS)] detached; "ratio" is theta / prox per token, whatever the loss clips.
        extremes: [2] detached, (min, max) of the ratio over the tokens that bear loss; (inf, -inf) if there is none.
    """
    mask = mask.float()
    bears = mask > 0
    log_ratio = torch.where(bears, logprobs - old_logprobs, 0.0).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    factor = torch.ones_like(mask) if ratio_weights is None else ratio_weights.detach()
    weighted = log_ratio if ratio_weights is None else log_ratio + torch.where(bears, factor, 1.0).log()
    tokens = Tokens(weighted, torch.where(bears, logprobs, 0.0), advantages, mask)
    per_token, clipped = OBJECTIVES[loss](tokens, clip_low, clip_high)
    per_token = per_token * mask
    if weights is not None:
        per_token = per_token * weights.detach()
    tokens_B1 = mask.sum(1, keepdim=True)
    if loss in OVER_RESPONSES:
        per_token = per_token / tokens_B1.clamp(min=1.0)
    with torch.no_grad():
        ratio = log_ratio.exp()
        # k3 estimate of KL(theta_old || theta), never negative: http://joschu.net/blog/kl-approx.html
        kl = ratio - 1.0 - log_ratio
        masked = torch.zeros_like(mask) if weights is None else (weights == 0).float()
        divisor = tokens_B1 > 0 if loss in OVER_RESPONSES else mask
        of_tokens = [c * mask for c in (clipped.float(), masked, ratio, ratio.square(), kl, factor)]
        sums = torch.stack([c.sum().float() for c in (mask, divisor, per_token, *of_tokens)])
        low = torch.where(bears, ratio, torch.inf).min()
        high = torch.where(bears, ratio, -torch.inf).max()
    return per_token.sum(), sums, torch.stack([low, high])


@torch.no_grad()
def behaviour_log_ratio(prox_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> Tensor:
    """log(prox / mu) [B, S] fp32 of every token that bears loss (mask > 0); 0 elsewhere, whatever is there."""
    return torch.where(mask > 0, prox_logprobs.float() - rollout_logprobs.float(), 0.0)


class Weighted(NamedTuple):
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

    Args:
        log_ratio: from :func:`behaviour_log_ratio`.
        kind: "none", w = 1; "tis", truncated: w = min(ratio, cap) (https://fengyao.notion.site/off-policy-rl); "mis", masked:
            w = ratio, and what lies outside of [floor, cap] bears no loss ("IcePop"). It leaves the mask too: counted in the
            denominator of a token-level loss, it would scale down what is kept.
        level: "token", or "sequence": all tokens of a row get the geometric mean of their ratios, and stay or go together. A
            product would grow with the length; GSPO clips the mean as well (arXiv 2507.18071).
    """
    if kind not in KINDS or level not in LEVELS:
        raise ConfigError(f"importance={kind!r}, level={level!r}: expected one of {', '.join(KINDS)} and of {', '.join(LEVELS)}")
    bears = (mask > 0).float()
    if kind == "none":
        return Weighted(torch.ones_like(log_ratio), bears, torch.zeros_like(log_ratio))
    if level == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True) / bears.sum(1, keepdim=True).clamp(min=1.0) * bears
    ratio = log_ratio.exp()
    if kind == "tis":
        return Weighted(ratio.clamp(max=cap), bears, (ratio > cap) * bears)
    inside = (ratio >= floor) & (ratio <= cap)
    kept = inside * bears
    # Not a product: beyond the range of fp32 it would be 0 * inf.
    return Weighted(torch.where(inside, ratio, 0.0), kept, bears - kept)


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
    loss: str = "grpo",
    threshold: float = 0.0,
    ratio_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The module's equation with any loss in place of its min; policy_loss to the last bit where mu = prox, and with kind="none".

    Args:
        logprobs, prox_logprobs, rollout_logprobs: [B, S], natural logs under theta, prox and mu.
        advantages, mask, clip_low, clip_high, loss, ratio_weights: as of :func:`policy_loss`.
        kind, cap, floor, level: as of :func:`behaviour_weights`. IcePop's range is [floor, cap] as well: its weights are those of
            "mis", but what lies outside stays in the divisor (https://arxiv.org/abs/2510.18855).
        threshold: of :func:`kpop_mask` or :func:`opsm_mask`, for these losses.

    Returns:
        loss, sums, extremes: as of policy_loss, over the tokens that still bear loss; sums[0] is how many these are.
        diagnostics: [len(DIAGNOSTIC_COLUMNS)] sums for :func:`diagnose`.
    """
    log_ratio = behaviour_log_ratio(prox_logprobs, rollout_logprobs, mask)
    if loss == "icepop":
        weighted = behaviour_weights(log_ratio, mask, kind="mis", cap=cap, floor=floor)._replace(mask=(mask > 0).float())
    else:
        weighted = behaviour_weights(log_ratio, mask, kind=kind, cap=cap, floor=floor, level=level)
    weights = weighted.weights
    if loss == "kpop":
        weights = weights * kpop_mask(prox_logprobs, rollout_logprobs, mask, threshold)
    elif loss == "opsm":
        weights = weights * opsm_mask(logprobs, rollout_logprobs, advantages, weighted.mask, threshold)
    total, sums, extremes = policy_loss(
        logprobs, prox_logprobs, advantages, weighted.mask,
        clip_low=clip_low, clip_high=clip_high, weights=weights, loss=loss, ratio_weights=ratio_weights,
    )  # fmt: skip
    return total, sums, extremes, diagnostic_sums(log_ratio, weighted, mask)


@torch.no_grad()
def diagnostic_sums(log_ratio: Tensor, weighted: Weighted, mask: Tensor) -> Tensor:
    """Sums over tokens, [len(DIAGNOSTIC_COLUMNS)] float64; `mask` is the one before the correction."""
    applied = weighted.weights * weighted.mask
    kl = torch.expm1(log_ratio) - log_ratio  # k3 of KL(mu || prox) from mu's samples
    columns = ((mask > 0).float(), applied, applied.square(), weighted.outside, kl)
    return torch.stack([column.sum(dtype=torch.float64) for column in columns])


def diagnose(sums: Tensor) -> dict[str, float]:
    """How far behaviour and proximal policy are apart, from :func:`diagnostic_sums` added up over micro-batches and ranks.

    Returns:
        weight: mean w, 0 for what was dropped; about 1 where nothing was cut off.
        outside: share of tokens truncated (tis) or dropped (mis).
        kl: k3 estimate of KL(mu || prox).
        effective_sample_size: (sum w)^2 / (N sum w^2), in [0, 1]: 1 if all tokens weigh the same.
    """
    value = dict(zip(DIAGNOSTIC_COLUMNS, sums.tolist(), strict=True))
    tokens, squared = max(value["tokens"], 1.0), value["weight_squared"]
    return {
        **{name: value[name] / tokens for name in ("weight", "outside", "kl")},
        "effective_sample_size": min(1.0, value["weight"] ** 2 / (tokens * squared)) if squared else 0.0,
    }
