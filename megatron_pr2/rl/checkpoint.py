"""Checkpoints that a run resumes from, in any parallel layout: one directory per step, complete or absent.

All ranks write into a temporary directory (megatron_pr2.checkpoint.files); only when everything is on disk does rank 0 rename it
into place. An interruption or a full disk therefore leaves the previous checkpoint whole.

Megatron-Core describes the tensors of the policy and its optimizer. What else its optimizers keep, the parameter groups and whether
spread experts have an optimizer of their own, follows from the configuration and the layout of the run that reads; only the number
of updates is saved.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing import LocalNonpersistentObject
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer

from megatron_pr2.checkpoint import files
from megatron_pr2.errors import CheckpointError
from megatron_pr2.replay.sites import unwrapped

_STEP = re.compile(r"step_(\d{6})")
KEEP = 2
# One name per parameter, whether the experts have an optimizer of their own (expert parallelism) or not.
_METADATA = {"chained_optim_avoid_prefix": True}


def checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints, oldest first."""
    return sorted((int(m.group(1)), path) for path in directory.glob("step_*") if (m := _STEP.fullmatch(path.name)))


def save(directory: Path, step: int, state: dict[str, Any]) -> Path:
    """Writes the state; collective. Older checkpoints than the last two are removed afterwards.

    Args:
        step: rollout batches done.
        state: ShardedTensors in it are written by all ranks, the rest as rank 0 has it.

    Raises:
        CheckpointError: on every rank, if any rank could not write; the previous checkpoint is untouched.
    """
    rank = dist.get_rank()
    final = directory / f"step_{step:06d}"
    temporary = directory / f".step_{step:06d}.tmp"

    def prepare() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True, exist_ok=True)

    def put_in_place() -> None:
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        files.synced(directory)
        for _, old in checkpoints(directory)[:-KEEP]:
            shutil.rmtree(old, ignore_errors=True)

    try:
        files.together(lambda: prepare() if rank == 0 else None)
        files.write({**state, "step": step}, temporary)
        files.together(lambda: put_in_place() if rank == 0 else None)
    except CheckpointError as error:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"checkpoint {final} could not be written ({error}); earlier checkpoints are intact") from error
    return final


def latest(directory: Path) -> Path | None:
    """The newest checkpoint, None where there is none; collective: as rank 0 sees a shared file system, others may be behind."""
    told = [next((path for _, path in reversed(checkpoints(directory))), None)]
    dist.broadcast_object_list(told)
    return told[0]


def read(path: Path, template: dict[str, Any] | None = None) -> dict[str, Any]:
    """The shards that `template` asks for, and what is the same on all ranks; without a template that alone. Collective.

    Raises:
        CheckpointError: on every rank, if any rank cannot read its part.
    """
    try:
        return files.common(path) if template is None else files.read(template, path)
    except CheckpointError as error:
        raise CheckpointError(f"{path} cannot be read ({error}); remove it to resume from the checkpoint before it") from error


# ---- the policy and its optimizer ------------------------------------------------------------------------------------


def model_shards(chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """The sharded state dict of every model chunk."""
    metadata = {"dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True)}
    return {str(i): unwrapped(chunk).sharded_state_dict(metadata=metadata) for i, chunk in enumerate(chunks)}


def optimizer_shards(optimizer: MegatronOptimizer, model: dict[str, Any]) -> dict[str, Any]:
    """Adam's moments and master weights as shards, and the number of updates; `model` are the :func:`model_shards`."""
    shards, _ = extract_sharded_base(optimizer.sharded_state_dict(model, metadata=_METADATA))
    # torch's Adam counts updates per parameter, Transformer Engine's per group.
    inner = [each.optimizer for each in _chained(optimizer) if each.optimizer is not None]
    parameters = (state["step"] for each in inner for state in each.state.values() if "step" in state)
    groups = (group["step"] for each in inner for group in each.param_groups if group.get("step") is not None)
    return {"shards": shards, "step": {"parameters": next(parameters, None), "groups": next(groups, None)}}


def optimizer_template(optimizer: MegatronOptimizer, model: dict[str, Any]) -> dict[str, Any]:
    """What to read of the shards in this layout: new moments that are read into, and this run's own values of all else."""
    state = dict(optimizer.sharded_state_dict(model, is_loading=True, metadata=_METADATA))
    kept = (ShardedBase, LocalNonpersistentObject)
    dict_list_map_inplace(lambda leaf: leaf if isinstance(leaf, kept) else LocalNonpersistentObject(leaf), state)
    return state


def load_optimizer(optimizer: MegatronOptimizer, shards: dict[str, Any], step: dict[str, Any]) -> None:
    """Takes what was read for :func:`optimizer_template`, and the number of updates that :func:`optimizer_shards` gave."""
    for each in [shards] if len(_chained(optimizer)) == 1 else shards.values():
        inner = each.get("optimizer", each)
        if step["parameters"] is not None:
            inner["state"]["common_step"] = step["parameters"]
        for group in inner["param_groups"]:
            if step["groups"] is not None:
                group["step"] = step["groups"]
    # Holds the fp32 master weights of a bf16 model; reload_model_params() would replace them by the rounded ones.
    optimizer.load_state_dict(shards)


def _chained(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    return optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
