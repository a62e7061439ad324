"""Megatron-Core's layer specs with the host's modules in the place of Transformer Engine's.

Megatron's own spec functions stay in charge: which layers are dense or MoE, shared experts, MLA and multi-token prediction
come from them, with ``use_transformer_engine=True``. They ask a ``BackendSpecProvider`` for the modules; this is the host's.
"""

from __future__ import annotations

import importlib

from megatron.core.models.backends import BackendSpecProvider
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP

from megatron_pr2.errors import ConfigError
from megatron_pr2.host.attention import HostAttention
from megatron_pr2.host.grouped import HostColumnParallelGroupedLinear, HostRowParallelGroupedLinear
from megatron_pr2.host.linear import HostLayerNormColumnParallelLinear, HostLinear
from megatron_pr2.host.norm import HostNorm
from megatron_pr2.host.patches import PatchSet


class HostSpecProvider(BackendSpecProvider):
    """Modules that run on a CPU and name their parameters as Transformer Engine's do."""

    def linear(self) -> type:
        return HostLinear

    def column_parallel_linear(self) -> type:
        return ColumnParallelLinear

    def row_parallel_linear(self) -> type:
        return RowParallelLinear

    def fuse_layernorm_and_linear(self) -> bool:
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        return HostLayerNormColumnParallelLinear

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        return HostNorm

    def core_attention(self) -> type:
        return HostAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool, moe_use_legacy_grouped_gemm: bool) -> tuple[type, MLPSubmodules]:
        if moe_use_legacy_grouped_gemm:
            raise ConfigError("moe_use_legacy_grouped_gemm=True needs a GPU; set it to False on the host")
        if moe_use_grouped_gemm:
            # Nothing in TEGroupedMLP itself is Transformer Engine's; only its two linear layers are.
            return TEGroupedMLP, MLPSubmodules(linear_fc1=HostColumnParallelGroupedLinear, linear_fc2=HostRowParallelGroupedLinear)
        return SequentialMLP, MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)

    def activation_func(self) -> None:
        """None: the activation comes from the config."""
        return None


def patch_specs(patches: PatchSet) -> None:
    """Puts the host's modules where Megatron-Core looks for Transformer Engine's."""
    layer_specs = importlib.import_module("megatron.core.models.gpt.gpt_layer_specs")
    moe_specs = importlib.import_module("megatron.core.models.gpt.moe_module_specs")
    latent_attention = importlib.import_module("megatron.core.transformer.multi_latent_attention")
    block = importlib.import_module("megatron.core.transformer.transformer_block")
    for module in (layer_specs, moe_specs):
        patches.set(module, "TESpecProvider", HostSpecProvider)
    # The final norm of the decoder block, and the default of blocks whose spec names none.
    patches.set(layer_specs, "TENorm", HostNorm)
    patches.set(block, "LayerNormImpl", HostNorm)
    # MLA recognizes its duplicated down projections by class.
    patches.set(latent_attention, "TELinear", HostLinear)
