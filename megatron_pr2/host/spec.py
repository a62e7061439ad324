"""Megatron-Core's layer specs with the host's modules in the place of Transformer Engine's.

Megatron's own spec functions stay in charge: which layers are dense or MoE, shared experts, MLA and multi-token prediction
come from them, with ``use_transformer_engine=True``. They ask a ``BackendSpecProvider`` for the modules; this is the host's.
HybridModel's stack spec asks none: it is made of Transformer Engine's classes when its module is imported.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
from dataclasses import fields, is_dataclass
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
_HOST_MODULES = {
    "TENorm": HostNorm,
    "TELayerNormColumnParallelLinear": HostLayerNormColumnParallelLinear,
    "TEColumnParallelLinear": ColumnParallelLinear,
    "TERowParallelLinear": RowParallelLinear,
    "TELinear": HostLinear,
    "TEDotProductAttention": HostAttention,
}


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


def patch_hybrid(patches: PatchSet) -> None:
    """Replaces HybridModel's spec of training, under both of its names, and the final norm; call it after :func:`patch_specs`.

    Releases before HybridModel have nothing to patch here.
    """
    try:
        block = importlib.import_module("megatron.core.models.hybrid.hybrid_block")
        specs = importlib.import_module("megatron.core.models.hybrid.hybrid_layer_specs")
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("megatron.core.models.hybrid"):
            raise
        return
    transformer_engine = importlib.import_module("megatron.core.extensions.transformer_engine")
    # By identity: without Transformer Engine most of them are mocks, whose comparison means nothing.
    ours = {id(getattr(transformer_engine, name)): module for name, module in _HOST_MODULES.items()}
    spec = _swapped(specs.hybrid_stack_spec, ours)
    # The experts were chosen when the module was imported, perhaps before the host was enabled.
    spec.submodules.moe_layer.submodules.mlp = specs.get_moe_module_spec(use_te=True, num_experts=8, moe_grouped_gemm=True)
    for name in ("hybrid_stack_spec", "mamba_stack_spec"):
        patches.set(specs, name, spec)
    patches.set(block, "TENorm", HostNorm)


def _swapped(part: Any, ours: dict[int, Any]) -> Any:
    """A copy of a spec with other modules; what is no spec stays the same object."""
    if id(part) in ours:
        return ours[id(part)]
    if isinstance(part, functools.partial):
        return functools.partial(part.func, *part.args, **{name: _swapped(value, ours) for name, value in part.keywords.items()})
    if isinstance(part, list):
        return [_swapped(each, ours) for each in part]
    if not is_dataclass(part) or isinstance(part, type):
        return part
    changed = copy.copy(part)
    for field in fields(part):
        setattr(changed, field.name, _swapped(getattr(part, field.name), ours))
    return changed
