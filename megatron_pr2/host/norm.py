"""RMSNorm and LayerNorm with the parameter names and the attributes that Transformer Engine's have."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_pr2.errors import ConfigError


def norm_parameters(config: TransformerConfig, hidden_size: int) -> tuple[torch.nn.Parameter, torch.nn.Parameter | None]:
    """Weight [hidden] and, for LayerNorm, bias [hidden], marked for the gradient reduction under sequence parallelism.

    Raises:
        ConfigError: a normalization other than RMSNorm and LayerNorm.
    """
    if config.normalization not in ("RMSNorm", "LayerNorm"):
        raise ConfigError(f"normalization={config.normalization!r}: the host knows RMSNorm and LayerNorm")
    start = torch.zeros if config.layernorm_zero_centered_gamma else torch.ones
    weight = torch.nn.Parameter(start(hidden_size, dtype=config.params_dtype))
    bias = None
    if config.normalization == "LayerNorm":
        bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
    for parameter in (weight, bias):
        if parameter is not None:
            # Each tensor-parallel rank sees a slice of the tokens, so Megatron must sum these gradients over the ranks.
            parameter.sequence_parallel = config.sequence_parallel
    return weight, bias


def normalize(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, config: TransformerConfig
) -> torch.Tensor:
    """Normalizes the last dimension in fp32 and returns the input's dtype, as Transformer Engine does."""
    gamma = weight.float() + 1.0 if config.layernorm_zero_centered_gamma else weight.float()
    shape = (hidden.shape[-1],)
    if config.normalization == "LayerNorm":
        return F.layer_norm(hidden.float(), shape, gamma, None if bias is None else bias.float(), eps).to(hidden.dtype)
    return F.rms_norm(hidden.float(), shape, gamma, eps).to(hidden.dtype)


class HostNorm(torch.nn.Module):
    """Stands in for ``TENorm``: parameters ``weight`` and, for LayerNorm, ``bias``.

    Args:
        config: ``normalization``, ``layernorm_zero_centered_gamma``, ``sequence_parallel`` and ``params_dtype`` count.
        hidden_size: size of the last dimension of the input.
        eps: added to the variance.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.config = config
        self.eps = eps
        self.weight, bias = norm_parameters(config, hidden_size)
        self.register_parameter("bias", bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return normalize(hidden, self.weight, self.bias, self.eps, self.config)
