"""HybridModel on the host: Megatron-Core's own stack spec with the host's modules in the place of Transformer Engine's.

That spec is made when its module is imported, from Transformer Engine's classes, without asking a ``BackendSpecProvider``. Releases
before HybridModel have nothing to patch here.
"""

from __future__ import annotations

import copy
import functools
import importlib
from dataclasses import fields, is_dataclass
from typing import Any

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from megatron_pr2.host.attention import HostAttention
from megatron_pr2.host.layers import HostLayerNormColumnParallelLinear, HostLinear, HostNorm
from megatron_pr2.host.patches import PatchSet

_HOST_MODULES = {
    "TENorm": HostNorm,
    "TELayerNormColumnParallelLinear": HostLayerNormColumnParallelLinear,
    "TEColumnParallelLinear": ColumnParallelLinear,
    "TERowParallelLinear": RowParallelLinear,
    "TELinear": HostLinear,
    "TEDotProductAttention": HostAttention,
}


def patch_hybrid(patches: PatchSet) -> None:
    """Replaces the spec of training, under both of its names, and the final norm. The layer specs must be patched before."""
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
