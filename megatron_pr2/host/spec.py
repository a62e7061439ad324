"""Megatron-Core's layer specs with the host's modules in the place of Transformer Engine's.

Megatron's own spec functions stay in charge: which layers are dense or MoE, shared experts, MLA and multi-token prediction
come from them, with ``use_transformer_engine=True``. They ask a ``BackendSpecProvider`` for the modules; this is the host's.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import Any

from megatron.core.models.backends import BackendSpecProvider
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe import experts as megatron_experts
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP

from megatron_pr2.errors import ConfigError
from megatron_pr2.host.attention import HostAttention
from megatron_pr2.host.grouped import HostColumnParallelGroupedLinear, HostRowParallelGroupedLinear
from megatron_pr2.host.layers import HostLayerNormColumnParallelLinear, HostLinear, HostNorm
from megatron_pr2.host.patches import PatchSet

# Later releases have submodules of their own for grouped experts, and ask for a builder instead of a class beside its submodules.
_GroupedMLPSubmodules = getattr(megatron_experts, "GroupedMLPSubmodules", MLPSubmodules)
_EXPERTS_BY_BUILDER = "moe_use_legacy_grouped_gemm" not in inspect.signature(BackendSpecProvider.grouped_mlp_modules).parameters


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

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> type:
        """``has_residual`` asks for a fused kernel; the residual is added outside of the norm in either case."""
        return HostNorm

    def core_attention(self) -> type:
        return HostAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool, moe_use_legacy_grouped_gemm: bool = False) -> Any:
        """The experts: a builder, or in releases that want it the class and its submodules."""
        if moe_use_legacy_grouped_gemm:
            raise ConfigError("moe_use_legacy_grouped_gemm=True needs a GPU; set it to False on the host")
        module: type = SequentialMLP
        submodules = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        if moe_use_grouped_gemm:
            # Nothing in TEGroupedMLP itself is Transformer Engine's; only its two linear layers are.
            module = TEGroupedMLP
            submodules = _GroupedMLPSubmodules(linear_fc1=HostColumnParallelGroupedLinear, linear_fc2=HostRowParallelGroupedLinear)
        return functools.partial(module, submodules=submodules) if _EXPERTS_BY_BUILDER else (module, submodules)

    def activation_func(self) -> None:
        """None: the activation comes from the config."""
        return None


def patch_specs(patches: PatchSet) -> None:
    """Puts the host's modules where Megatron-Core looks for Transformer Engine's."""
    layer_specs = importlib.import_module("megatron.core.models.gpt.gpt_layer_specs")
    moe_specs = importlib.import_module("megatron.core.models.gpt.moe_module_specs")
    provider = importlib.import_module("megatron.core.extensions.transformer_engine_spec_provider")
    latent_attention = importlib.import_module("megatron.core.transformer.multi_latent_attention")
    block = importlib.import_module("megatron.core.transformer.transformer_block")
    # The provider's own module as well: later releases let MLA take its norms from there, not from the spec that it is built from.
    for module in (provider, layer_specs, moe_specs):
        patches.set(module, "TESpecProvider", HostSpecProvider)
    # The final norm of the decoder block, and the default of blocks whose spec names none.
    patches.set(layer_specs, "TENorm", HostNorm)
    patches.set(block, "LayerNormImpl", HostNorm)
    # MLA recognizes its duplicated down projections by class.
    patches.set(latent_attention, "TELinear", HostLinear)
