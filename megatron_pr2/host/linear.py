"""Linear layers that Megatron-Core only has in Transformer Engine's version, with the same parameter names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from megatron.core.utils import get_tensor_model_parallel_group_if_none

from megatron_pr2.errors import ConfigError
from megatron_pr2.host.norm import norm_parameters, normalize

InitMethod = Callable[[torch.Tensor], Any]


class EmptyExtraState:
    """Transformer Engine's modules have an extra state; an empty one keeps the checkpoint keys equal."""

    def get_extra_state(self) -> None:
        return None

    def set_extra_state(self, state: Any) -> None:
        pass


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
        return torch.nn.functional.linear(input_, self.weight), None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict[str, Any]:
        groups = {"tp_group": self._tp_group, "dp_cp_group": ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"]}
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, None, sharded_offsets, **groups)
