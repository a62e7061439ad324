"""Scores of a router, the divergence between two sets of them, and its gradient.

Shape suffixes: S sampled tokens, E experts.

A score function is that of `moe_router_score_function`. Scores are compared as they are before the selection, which they (and an
expert bias, if there is one) decide: not normalised over the chosen experts, which is done to the gate weights only. Each kind of
score is the mean of a distribution, and the divergence is the forward KL(target || prediction) of these distributions:

    softmax        rho on the simplex     one Categorical   sum_e rho_e log(rho_e / q_e)
    sigmoid        rho_e in (0, 1)        E Bernoullis      sum_e rho_e log(rho_e / q_e) + (1 - rho_e) log((1 - rho_e) / (1 - q_e))
    sqrtsoftplus   rho_e in (0, inf)      E Poissons        sum_e rho_e log(rho_e / q_e) - rho_e + q_e

with rho = score(target) and q = score(prediction). The last is the generalised KL of positive measures (I-divergence; Csiszar 1991,
doi 10.1214/aos/1176348385): zero only where all scores agree, and not blind to their common scale, which matters beside an expert
bias. (A KL of scores that are normalised over the experts would be.) With x the logits of the prediction,

    d KL / d x = q - rho                        softmax, sigmoid: canonical links
    d KL / d x = (q - rho) * d log q / d x      sqrtsoftplus: d log sqrt(softplus(x)) / d x = sigmoid(x) / (2 softplus(x))
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SCORE_FUNCTIONS = ("softmax", "sigmoid", "sqrtsoftplus")
# Below it softplus(x) = e^x to fp64's precision, and e^x would vanish in fp32 long before its logarithm is of no interest.
_LOW = -40.0


def score(logits_SE: Tensor, score_function: str) -> Tensor:
    """Router scores in at least fp32: softmax over experts, sigmoid or sqrt(softplus) per expert.

    Raises:
        ValueError: another score function.
    """
    logits_SE = logits_SE if logits_SE.dtype == torch.float64 else logits_SE.float()
    if score_function == "softmax":
        return torch.softmax(logits_SE, dim=-1)
    if score_function == "sigmoid":
        return torch.sigmoid(logits_SE)
    if score_function == "sqrtsoftplus":
        return F.softplus(logits_SE).sqrt()
    raise ValueError(f"score function {score_function!r}: expected {', '.join(map(repr, SCORE_FUNCTIONS))}")


def divergence_terms(target_SE: Tensor, prediction_SE: Tensor, score_function: str) -> tuple[Tensor, Tensor]:
    """Forward KL(target || prediction) of the distributions whose means are the scores (see above), per expert.

    For sigmoid it is written as score(p) (p - q) - softplus(p) + softplus(q), which is the same.

    Args:
        target_SE: logits.
        prediction_SE: logits; several predictions of one target, [N, S, E], score it once.

    Returns:
        The scores of the target, [S, E], and terms of the shape of the prediction, whose sum over the experts is the KL of a token.
    """
    if score_function == "softmax":
        log_rho_SE = torch.log_softmax(target_SE, dim=-1)
        rho_SE = log_rho_SE.exp()
        return rho_SE, (log_rho_SE - torch.log_softmax(prediction_SE, dim=-1)).mul_(rho_SE)
    rho_SE = score(target_SE, score_function)
    if score_function == "sigmoid":
        terms_SE = (target_SE - prediction_SE).mul_(rho_SE)
        return rho_SE, terms_SE.add_(F.softplus(prediction_SE)).sub_(F.softplus(target_SE))
    logs_SE = (_log_softplus(target_SE) - _log_softplus(prediction_SE)).mul(0.5)
    return rho_SE, logs_SE.mul(rho_SE) - rho_SE + score(prediction_SE, score_function)


def divergence_gradient(target_SE: Tensor, prediction_SE: Tensor, score_function: str) -> Tensor:
    """Gradient of the divergence of each token with respect to the logits of the prediction, [S, E]."""
    difference_SE = score(prediction_SE, score_function) - score(target_SE, score_function)
    if score_function != "sqrtsoftplus":
        return difference_SE
    x_SE = prediction_SE.clamp(min=_LOW)  # the slope is 1/2 from there on
    return difference_SE * torch.sigmoid(x_SE) / (2.0 * F.softplus(x_SE))


def _log_softplus(x: Tensor) -> Tensor:
    """log softplus(x), which is x where softplus underflows."""
    return F.softplus(x.clamp(min=_LOW)).log() + (x - _LOW).clamp(max=0.0)
