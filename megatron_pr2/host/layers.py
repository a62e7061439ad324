"""Norms and linear layers that Megatron-Core has only in Transformer Engine's version, with the same parameter names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from megatron.core.utils import get_tensor_model_parallel_group_if_none

from megatron_pr2.errors import ConfigError

InitMethod = Callable[[torch.Tensor], Any]


class EmptyExtraState:
    """Transformer Engine's modules have an extra state; an empty one keeps the checkpoint keys equal."""

    def get_extra_state(self) -> None:
        return None

    def set_extra_state(self, state: Any) -> None:
        pass


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


class HostLayerNormColumnParallelLinear(ColumnParallelLinear):
    """Stands in for ``TELayerNormColumnParallelLinear``: parameters ``layer_norm_weight`` and ``weight``.

    Input [sequence, batch, hidden]; the norm runs on this rank's slice of the sequence, before the gather of sequence
    parallelism.
    """

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.layer_norm_weight, bias = norm_parameters(config, input_size)
        self.register_parameter("layer_norm_bias", bias)

    def forward(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        eps = self.config.layernorm_epsilon
        return super().forward(normalize(input_, self.layer_norm_weight, self.layer_norm_bias, eps, self.config), *args, **kwargs)


class HostLinear(EmptyExtraState, torch.nn.Module):
    """Stands in for ``TELinear`` with ``parallel_mode="duplicated"``: the same weight on every tensor-parallel rank."""

    # Bridges that do not know a class by its name ask for this.
    tensor_model_parallel = False

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        parallel_mode: str | None,
        config: TransformerConfig,
        init_method: InitMethod,
        bias: bool,
        skip_bias_add: bool,
        skip_weight_param_allocation: bool = False,
        tp_comm_buffer_name: str | None = None,
        is_expert: bool = False,
        tp_group: torch.distributed.ProcessGroup | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__()
        if parallel_mode != "duplicated" or bias or skip_weight_param_allocation:
            raise ConfigError(f"HostLinear: parallel_mode={parallel_mode!r}, bias={bias}; expected 'duplicated' without bias")
        self.weight = torch.nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype))
        if config.perform_initialization:
            init_method(self.weight.data)
        self.weight.allreduce = True
        # Duplicated, but it sees a slice of the tokens under sequence parallelism: gradients are summed over the ranks.
        self.weight.sequence_parallel = config.sequence_parallel
        self._tp_group = get_tensor_model_parallel_group_if_none(tp_group, is_expert=is_expert)

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, None]:
        return F.linear(input_, self.weight), None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict[str, Any]:
        groups = {"tp_group": self._tp_group, "dp_cp_group": ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"]}
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, None, sharded_offsets, **groups)
