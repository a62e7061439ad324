"""Checkpoints that a run resumes from: one directory per step, complete or absent.

Every rank writes its own file into a temporary directory; only when all of them are on disk does rank 0 rename it into place.
An interruption or a full disk therefore leaves the previous checkpoint whole.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_pr2.errors import CheckpointError

T = TypeVar("T")
_STEP = re.compile(r"step_(\d{6})")
KEEP = 2


def checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints, oldest first."""
    found = [(int(m.group(1)), p) for p in directory.glob("step_*") if (m := _STEP.fullmatch(p.name))]
    return sorted(found)


def save(directory: Path, step: int, state: dict[str, Any]) -> Path:
    """Writes this rank's state; collective. Older checkpoints than the last two are removed afterwards.

    Args:
        step: rollout batches done.
        state: tensors, numbers, strings and containers of them.

    Raises:
        CheckpointError: on every rank, if any rank could not write; the previous checkpoint is untouched.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    final = directory / f"step_{step:06d}"
    temporary = directory / f".step_{step:06d}.tmp"

    def prepare() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True, exist_ok=True)

    def put_in_place() -> None:
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)

    try:
        _together(prepare if rank == 0 else None)
        _together(lambda: _write({**state, "step": step, "world_size": world}, temporary / f"rank_{rank:05d}.pt"))
        _together(put_in_place if rank == 0 else None)
    except CheckpointError as error:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"checkpoint {final} could not be written ({error}); earlier checkpoints are intact") from error
    if rank == 0:
        for _, old in checkpoints(directory)[:-KEEP]:
            shutil.rmtree(old, ignore_errors=True)
    return final


def load_latest(directory: Path) -> dict[str, Any] | None:
    """This rank's state of the newest checkpoint, or None where there is none; collective.

    Raises:
        CheckpointError: on every rank, if it was written by another number of processes or any rank cannot read its part.
    """
    found = checkpoints(directory)
    if not found:
        return None
    _, path = found[-1]
    world = dist.get_world_size()
    written = len(list(path.glob("rank_*.pt")))
    if written != world:
        raise CheckpointError(
            f"{path} was written by {written} processes, this run has {world}; resume with parallel.processes={written}"
        )
    file = path / f"rank_{dist.get_rank():05d}.pt"
    try:
        return _together(lambda: torch.load(file, map_location="cpu", weights_only=True))
    except CheckpointError as error:
        raise CheckpointError(f"{path} cannot be read ({error}); remove it to resume from the checkpoint before it") from error


def _together(action: Callable[[], T] | None) -> T | None:
    """Does what this rank has to do and waits for the others.

    Raises:
        CheckpointError: on every rank, if it failed on any.
    """
    result, failure = None, None
    try:
        result = action() if action is not None else None
    except Exception as error:
        failure = f"rank {dist.get_rank()}: {type(error).__name__}: {error}"
    failures: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    if failures := [f for f in failures if f]:
        raise CheckpointError("; ".join(failures))
    return result


def _write(state: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
