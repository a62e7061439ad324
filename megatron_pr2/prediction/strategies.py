"""Which predictor a configuration asks for."""

from __future__ import annotations

from typing import Any

import torch

from megatron_pr2.config import PR2Config
from megatron_pr2.prediction.learned import LearnedPredictor
from megatron_pr2.prediction.lookahead import LookaheadPredictor
from megatron_pr2.prediction.momentum import LearnedMomentumPredictor, MomentumPredictor
from megatron_pr2.prediction.predictor import RoutePredictor


def make_predictor(config: PR2Config, model_config: Any, num_layers: int, device: torch.device) -> RoutePredictor | None:
    """The strategy of `config.predictor` for so many local MoE layers; None for "none"."""
    if not config.predicts:
        return None
    sizes = num_layers, model_config.num_moe_experts, model_config.hidden_size
    if config.looks_ahead:
        return LookaheadPredictor(*sizes, reach=config.reach, device=device)
    learned = momentum = None
    if config.learns:
        scores = model_config.moe_router_score_function
        learned = LearnedPredictor(
            *sizes, target=config.target, score_function=scores, betas=config.betas, eps=config.eps, device=device
        )
    if config.follows:
        momentum = MomentumPredictor(*sizes, coefficient=config.momentum, device=device)
    predictor: RoutePredictor | None = learned or momentum
    if learned is not None and momentum is not None:
        predictor = LearnedMomentumPredictor(learned, momentum)
    assert predictor is not None
    return predictor
