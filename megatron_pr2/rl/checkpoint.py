"""Checkpoints that a run resumes from, in any parallel layout: one directory per step, complete or absent.

All ranks write into a temporary directory (megatron_pr2.checkpoint.files); only when everything is on disk does rank 0 rename it
into place. An interruption or a full disk therefore leaves the previous checkpoint whole.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase

from megatron_pr2.checkpoint import files
from megatron_pr2.errors import CheckpointError

_STEP = re.compile(r"step_(\d{6})")
KEEP = 2


@dataclass(frozen=True)
class Shards:
    """A part of a checkpoint that each rank reads its own share of."""

    directory: Path
    name: str

    def read(self, template: dict[str, Any]) -> dict[str, Any]:
        """The shards that `template` asks for and what is saved beside them; collective.

        Raises:
            CheckpointError: on every rank, if any rank cannot read its part.
        """
        try:
            return dict(files.read({self.name: template}, self.directory)[self.name])
        except CheckpointError as error:
            raise _unreadable(self.directory, error) from error


def checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints, oldest first."""
    found = [(int(m.group(1)), p) for p in directory.glob("step_*") if (m := _STEP.fullmatch(p.name))]
    return sorted(found)


def save(directory: Path, step: int, state: dict[str, Any]) -> Path:
    """Writes the state; collective. Older checkpoints than the last two are removed afterwards.

    Args:
        step: rollout batches done.
        state: entries with ShardedTensors in them are written by all ranks, the others as rank 0 has them.

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

    nested = {name: nested_values(value) for name, value in state.items() if isinstance(value, dict)}
    sharded = [name for name, values in nested.items() if any(isinstance(value, ShardedBase) for value in values)]
    try:
        files.together(lambda: prepare() if rank == 0 else None)
        files.write({**state, "step": step, "sharded": sharded}, temporary)
        files.together(lambda: put_in_place() if rank == 0 else None)
    except CheckpointError as error:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"checkpoint {final} could not be written ({error}); earlier checkpoints are intact") from error
    return final


def load_latest(directory: Path) -> dict[str, Any] | None:
    """The newest checkpoint's state, or None where there is none; collective. Entries with shards come as :class:`Shards`.

    Raises:
        CheckpointError: on every rank, if any rank cannot read it.
    """
    # As rank 0 sees it: the others may look at an older state of a shared file system.
    newest = [path for _, path in checkpoints(directory)][-1:]
    told = [newest[0] if newest else None]
    dist.broadcast_object_list(told)
    path = told[0]
    if path is None:
        return None
    try:
        state = files.common(path)
    except CheckpointError as error:
        raise _unreadable(path, error) from error
    return {**state, **{name: Shards(path, name) for name in state.pop("sharded")}}


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read ({error}); remove it to resume from the checkpoint before it")
