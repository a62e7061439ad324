"""Divergences by torch's own distributions, to compare with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Poisson, kl_divergence


def kl(target_SE: Tensor, prediction_SE: Tensor, score_function: str) -> Tensor:
    """KL(target || prediction) per token of a router's scores, from logits."""
    if score_function == "softmax":
        return kl_divergence(Categorical(logits=target_SE), Categorical(logits=prediction_SE))
    if score_function == "sqrtsoftplus":
        target, prediction = (torch.log1p(x.exp()).sqrt() for x in (target_SE, prediction_SE))
        return kl_divergence(Poisson(target), Poisson(prediction)).sum(-1)
    return kl_divergence(Bernoulli(logits=target_SE), Bernoulli(logits=prediction_SE)).sum(-1)
