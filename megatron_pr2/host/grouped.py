"""Grouped linear layers of the local experts: one weight per expert, named weight0, weight1, ... as in TEGroupedLinear."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.utils import divide
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint

from megatron_pr2.errors import ConfigError
from megatron_pr2.host.layers import EmptyExtraState, InitMethod


class HostGroupedLinear(EmptyExtraState, torch.nn.Module):
    """``num_gemms`` independent linear layers over consecutive runs of rows. Use it within Megatron's ``TEGroupedMLP``.

    Communication between expert-parallel and expert-tensor-parallel ranks belongs to the token dispatcher, so this layer
    multiplies and nothing else. Weights are [out, in] of this rank's shard.

    Args:
        num_gemms: local experts.
        input_size, output_size: sizes of the whole layer, before sharding over expert tensor parallelism.

    Attributes:
        partition_dim: what expert tensor parallelism shards: 0 the output, 1 the input.
    """

    # Bridges that do not know a class by its name ask for these two.
    tensor_model_parallel = True
    partition_dim: int

    def __init__(
        self,
        num_gemms: int,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: InitMethod,
        bias: bool,
        skip_bias_add: bool,
        is_expert: bool,
        tp_comm_buffer_name: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__()
        groups = ProcessGroupCollection.use_mpu_process_groups() if pg_collection is None else pg_collection
        self.config = config
        self.num_gemms = num_gemms
        self.use_bias, self.skip_bias_add = bias, skip_bias_add
        self._pg_collection = groups
        if bias and groups.expt_tp.size() > 1:
            raise ConfigError(
                f"add_bias_linear=True with expert_tensor_parallel_size={groups.expt_tp.size()}: each rank would add the whole "
                "bias; set expert_tensor_parallel_size=1"
            )
        shape = [output_size, input_size]
        shape[self.partition_dim] = divide(shape[self.partition_dim], groups.expt_tp.size())
        for index in range(num_gemms):
            weight = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype))
            # Every rank owns different numbers: they count in the gradient norm on each rank.
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=self.partition_dim, stride=1)
            # Expert gradients are reduced over the expert data-parallel group, not over all data-parallel ranks.
            weight.allreduce = config.expert_model_parallel_size <= 1
            self.register_parameter(f"weight{index}", weight)
            if bias:
                offset = torch.nn.Parameter(torch.zeros(output_size, dtype=config.params_dtype))
                offset.allreduce = weight.allreduce
                self.register_parameter(f"bias{index}", offset)
        # A distributed checkpoint holds one (empty) extra state per expert, a module has one.
        self._register_load_state_dict_pre_hook(self._drop_extra_states)
        if config.perform_initialization:
            self._initialize(output_size, input_size, init_method)

    def _drop_extra_states(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for index in range(1, self.num_gemms):
            state_dict.pop(f"{prefix}_extra_state{index}", None)

    def _initialize(self, output_size: int, input_size: int, init_method: InitMethod) -> None:
        """Draws all experts in global order on every rank, so that an expert does not depend on the parallel layout."""
        ep, etp = self._pg_collection.ep, self._pg_collection.expt_tp
        first = ep.rank() * self.num_gemms
        for expert in range(ep.size() * self.num_gemms):
            whole = torch.empty(output_size, input_size, dtype=torch.float32)
            init_method(whole)
            if first <= expert < first + self.num_gemms:
                shard = whole.chunk(etp.size(), dim=self.partition_dim)[etp.rank()]
                self.get_parameter(f"weight{expert - first}").data.copy_(shard)

    def forward(self, input_: torch.Tensor, m_splits: Any) -> tuple[torch.Tensor, list[torch.Tensor] | None]:
        """Rows [sum(m_splits), in], sorted by local expert -> [sum(m_splits), out]; experts without rows are part of the graph.

        Returns:
            The rows, and with ``skip_bias_add`` the biases [out] of the local experts, which the caller adds.
        """
        rows = m_splits.tolist() if isinstance(m_splits, torch.Tensor) else [int(split) for split in m_splits]
        parts = input_.split(rows)
        biases = [self.get_parameter(f"bias{index}") for index in range(self.num_gemms)] if self.use_bias else None
        added = [None] * self.num_gemms if biases is None or self.skip_bias_add else biases
        outputs = [F.linear(part, self.get_parameter(f"weight{index}"), added[index]) for index, part in enumerate(parts)]
        return torch.cat(outputs), biases if self.skip_bias_add else None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict[str, Any]:
        """Same keys as TEGroupedLinear: one global tensor with the experts as a leading axis, one extra state per expert."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        single_shards = metadata.get("singleton_local_shards", False)
        ep = self._pg_collection.ep
        sharded: dict[str, Any] = {}
        for index in range(self.num_gemms):
            expert = ep.rank() * self.num_gemms + index
            offset = (len(sharded_offsets), expert, ep.size() * self.num_gemms)
            state = {f"{index}.weight": self.get_parameter(f"weight{index}"), f"{index}._extra_state": None}
            if self.use_bias:
                state[f"{index}.bias"] = self.get_parameter(f"bias{index}")
            local = make_sharded_tensors_for_checkpoint(
                state,
                "",
                {f"{index}.weight": self.partition_dim},
                sharded_offsets if single_shards else (*sharded_offsets, offset),
                tp_group=self._pg_collection.expt_tp,
                dp_cp_group=metadata["dp_cp_group"],
            )
            replace_prefix_for_sharding(local, f"{index}.", f"{expert}.{prefix}" if single_shards else prefix)
            sharded[f"{prefix}weight{index}"] = local[f"{index}.weight"]
            if self.use_bias:
                sharded[f"{prefix}bias{index}"] = local[f"{index}.bias"]
            sharded[f"{prefix}_extra_state{index or ''}"] = local[f"{index}._extra_state"]
        for entry in sharded.values():
            # Copies of an expert live along the expert data-parallel group.
            entry.replica_id = (*entry.replica_id[:2], self._pg_collection.expt_dp.rank())
        return sharded


class HostColumnParallelGroupedLinear(HostGroupedLinear):
    """Stands in for ``TEColumnParallelGroupedLinear`` (fc1)."""

    partition_dim = 0


class HostRowParallelGroupedLinear(HostGroupedLinear):
    """Stands in for ``TERowParallelGroupedLinear`` (fc2)."""

    partition_dim = 1
