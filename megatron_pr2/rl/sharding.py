"""The policy and its optimizer as shards that any parallel layout can read (megatron.core.dist_checkpointing).

Megatron-Core describes the tensors of both. What else its optimizers keep, the parameter groups and whether spread experts have an
optimizer of their own, follows from the configuration and the layout of the run that reads; only the number of updates is saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing import LocalNonpersistentObject
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer

from megatron_pr2.replay.sites import unwrapped

# One name per parameter, whether the experts have an optimizer of their own (expert parallelism) or not.
_METADATA = {"chained_optim_avoid_prefix": True}


def model_shards(chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """The sharded state dict of every model chunk."""
    metadata = {"dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True)}
    return {str(i): unwrapped(chunk).sharded_state_dict(metadata=metadata) for i, chunk in enumerate(chunks)}


def load_model_shards(chunks: Sequence[torch.nn.Module], loaded: dict[str, Any]) -> None:
    """Takes what was read for :func:`model_shards`."""
    for i, chunk in enumerate(chunks):
        unwrapped(chunk).load_state_dict(loaded[str(i)])


def optimizer_shards(optimizer: MegatronOptimizer, model: dict[str, Any]) -> dict[str, Any]:
    """Adam's moments and master weights as shards, and the number of updates; `model` are the :func:`model_shards`."""
    shards, _ = extract_sharded_base(optimizer.sharded_state_dict(model, metadata=_METADATA))
    return {"shards": shards, "step": _step(optimizer)}


def optimizer_template(optimizer: MegatronOptimizer, model: dict[str, Any]) -> dict[str, Any]:
    """What to read of :func:`optimizer_shards` in this layout; makes the moments that are read into."""
    return dict(optimizer.sharded_state_dict(model, is_loading=True, metadata=_METADATA))


def load_optimizer_shards(optimizer: MegatronOptimizer, template: dict[str, Any], loaded: dict[str, Any], step: Any) -> None:
    """Takes what was read.

    Args:
        template: from :func:`optimizer_template`.
        loaded: its shards, as tensors.
        step: the number of updates that :func:`optimizer_shards` gave.
    """
    state = _filled(template, loaded)
    for each in [state] if len(_chained(optimizer)) == 1 else state.values():
        inner = each.get("optimizer", each)
        if step["parameters"] is not None:
            inner["state"]["common_step"] = step["parameters"]
        for group in inner["param_groups"]:
            if step["groups"] is not None:
                group["step"] = step["groups"]
    # Holds the fp32 master weights of a bf16 model; reload_model_params() would replace them by the rounded ones.
    optimizer.load_state_dict(state)


def _step(optimizer: MegatronOptimizer) -> dict[str, Any]:
    """Updates so far: torch's Adam counts per parameter, Transformer Engine's per group."""
    inner = [each.optimizer for each in _chained(optimizer) if each.optimizer is not None]
    parameters = (state["step"] for each in inner for state in each.state.values() if "step" in state)
    groups = (group["step"] for each in inner for group in each.param_groups if group.get("step") is not None)
    return {"parameters": next(parameters, None), "groups": next(groups, None)}


def _chained(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    return optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def _filled(template: Any, loaded: Any) -> Any:
    """`template` with what was read in the place of its shards; nothing was read of what holds none."""
    if isinstance(template, ShardedBase):
        return loaded
    if isinstance(template, LocalNonpersistentObject):
        return template.unwrap()
    if isinstance(template, dict):
        return {key: _filled(value, _child(loaded, key)) for key, value in template.items()}
    if isinstance(template, list):
        return [_filled(value, _child(loaded, i)) for i, value in enumerate(template)]
    return template


def _child(loaded: Any, key: Any) -> Any:
    if isinstance(loaded, dict):
        return loaded.get(key)
    return loaded[key] if isinstance(loaded, list) and key < len(loaded) else None
