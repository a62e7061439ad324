"""The loss of every token by the name of `algorithm.loss`, and the masks and weights that some of the losses put on it.

    r_t = theta(a_t) / prox(a_t)    s = (prod_t r_t)^(1 / |o|), the geometric mean over the |o| loss-bearing tokens of a response

Pure functions of whole rows [B, S]: s, GMPO's mean and OPSM's need all tokens of a response, so that a trainer that cuts sequences
(context parallelism) has to gather log-probs first. The formulas are of what is maximised; a loss is the negative.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# log p is at most this: what fp32 rounds to 0 is a probability of 1 - 6e-8 or more, whose complement has a logarithm.
_MOST = -6e-8


class Tokens(NamedTuple):
    """What objectives are made of; [B, S], and nothing that is not finite where no loss is borne.

    Attributes:
        log_ratio: log r, 0 where no loss is borne.
        logprobs: log theta.
        advantages: one value for all tokens of a response.
        mask: float, 1 where a token bears loss.
    """

    log_ratio: Tensor
    logprobs: Tensor
    advantages: Tensor
    mask: Tensor


# (tokens, low, high) -> the loss of every token, and which ones the bounds 1 - low and 1 + high took effect on.
Objective = Callable[[Tokens, float, float], tuple[Tensor, Tensor]]


def row_means(values: Tensor, mask: Tensor) -> Tensor:
    """Means over the loss-bearing tokens of each row, [B, 1]; 0 for a row without any."""
    return (values * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1.0)


def grpo(tokens: Tokens, low: float, high: float) -> tuple[Tensor, Tensor]:
    """min(r A, clip(r, 1 - low, 1 + high) A), "clip-higher": DAPO, https://arxiv.org/abs/2503.14476, Eq. 10."""
    ratio = tokens.log_ratio.exp()
    unclipped = -tokens.advantages * ratio
    clipped = -tokens.advantages * ratio.clamp(1.0 - low, 1.0 + high)
    return torch.maximum(unclipped, clipped), clipped > unclipped


def gspo(tokens: Tokens, low: float, high: float) -> tuple[Tensor, Tensor]:
    """min(s A, clip(s, 1 - low, 1 + high) A): GSPO, https://arxiv.org/abs/2507.18071, Eq. 5 and 7.

    Where all tokens of a response have one advantage, the paper's GSPO-token (section 4.3) has the same values and gradients.
    """
    return grpo(tokens._replace(log_ratio=row_means(tokens.log_ratio, tokens.mask)), low, high)


def cispo(tokens: Tokens, low: float, high: float) -> tuple[Tensor, Tensor]:
    """stopgrad(clip(r, 1 - low, 1 + high)) A log theta(a): CISPO, https://arxiv.org/abs/2506.13585, Eq. 4 and 5."""
    ratio = tokens.log_ratio.detach().exp()
    weight = ratio.clamp(1.0 - low, 1.0 + high)
    return -weight * tokens.advantages * tokens.logprobs, weight != ratio


def gmpo(tokens: Tokens, low: float, high: float) -> tuple[Tensor, Tensor]:
    """(prod_t c_t)^(1 / |o|) A: GMPO, https://arxiv.org/abs/2507.20673.

    c = min(r, 1 + high) for A > 0 and max(r, 1 - low) for A < 0. The paper has c = min(r^sgn A, clip(r^sgn A, e1, e2))^sgn A, where
    e1 never takes effect: the same with 1 + high = 1 / (1 - low) = e2.
    """
    above = (tokens.advantages > 0) & (tokens.log_ratio > math.log1p(high))
    below = (tokens.advantages < 0) & (tokens.log_ratio < math.log1p(-low))
    kept = torch.where(above, math.log1p(high), torch.where(below, math.log1p(-low), tokens.log_ratio))
    return -tokens.advantages * row_means(kept, tokens.mask).exp(), above | below


OBJECTIVES: dict[str, Objective] = {
    **dict.fromkeys(("grpo", "icepop", "kpop", "opsm"), grpo), "gspo": gspo, "cispo": cispo, "gmpo": gmpo, "rspo": gmpo,
}  # fmt: skip
# The losses whose sources average over the tokens of a response and then over responses; the others, over all tokens at once.
OVER_RESPONSES = frozenset(OBJECTIVES) - {"grpo", "cispo"}
# The losses that take tokens or responses out.
MASKING = frozenset({"icepop", "kpop", "opsm"})


@torch.no_grad()
def kpop_mask(prox_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, threshold: float) -> Tensor:
    """1 where D(p || q) <= threshold and D(q || p) <= threshold, with p = prox(a), q = mu(a); 0 elsewhere. [B, S] fp32.

    D(p || q) = p log(p / q) + (1 - p) log((1 - p) / (1 - q)) in nats: KPop, https://ringtech.notion.site/kpop, and section 3.2.3 of
    the technical report of Ling 2.6 and Ring 2.6.
    """
    log_p, log_q = (torch.where(mask > 0, x.double(), -1.0).clamp(max=_MOST) for x in (prox_logprobs, rollout_logprobs))
    p, q = log_p.exp(), log_q.exp()
    of_token, of_others = log_p - log_q, torch.log1p(-p) - torch.log1p(-q)
    forward, backward = p * of_token + (1.0 - p) * of_others, -q * of_token - (1.0 - q) * of_others
    return ((torch.maximum(forward, backward) <= threshold) & (mask > 0)).float()


@torch.no_grad()
def opsm_mask(logprobs: Tensor, rollout_logprobs: Tensor, advantages: Tensor, mask: Tensor, threshold: float) -> Tensor:
    """0 for all tokens of a response whose A < 0 and whose mean of log(mu / theta) exceeds the threshold; 1 elsewhere. [B, S] fp32.

    Off-policy sequence masking: DeepSeek-V3.2, https://arxiv.org/abs/2512.02556, Eq. 9; "old" are the engine's log-probs there too.
    """
    gap = torch.where(mask > 0, rollout_logprobs.float() - logprobs.float(), 0.0)
    return 1.0 - ((advantages < 0) & (row_means(gap, mask.float()) > threshold)).float()


@torch.no_grad()
def router_shift_weight(shift: Tensor, floor: float) -> Tensor:
    """max(exp(-shift), floor), which r is multiplied by before it is clipped: RSPO, https://arxiv.org/abs/2510.23027.

    Args:
        shift: mean over MoE layers and over the old top-k experts of |log score(theta) - log score(theta_old)|.
    """
    return torch.exp(-shift).clamp(min=floor)
