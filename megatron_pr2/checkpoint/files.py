"""A distributed checkpoint on disk, in Megatron-Core's format, written and read so that all ranks succeed or all ranks raise.

What is saved is a sharded state dict (megatron.core.dist_checkpointing): ShardedTensors say which part of which whole tensor a rank
holds, so that any other layout finds its parts again; everything else is stored once, as rank 0 has it. `dist_checkpointing.load`
reads what is written here. Its own `save` is not used: it writes from forked children and leaves a helper process that survives a
killed rank, and a failure of rank 0 outside of its writer (a full disk under common.pt) leaves the other ranks waiting.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.checkpointable import CheckpointableShardedTensor
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner, mcore_to_pyt_state_dict
from megatron.core.dist_checkpointing.validation import determine_global_metadata, validate_sharding_integrity
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from megatron_pr2.errors import CheckpointError
from megatron_pr2.parallel.consensus import attempt, described, failures_of_all

T = TypeVar("T")
Shapes = dict[str, tuple[int, ...]]

FORMAT = CheckpointingConfig("torch_dist", 1)
# Written last, so that it makes a directory a checkpoint.
FORMAT_FILE = "metadata.json"
METADATA_FILE = ".metadata"


def write(state: dict[str, Any], directory: Path) -> None:
    """Writes a sharded state dict into an existing directory; collective over all ranks. Everything is on disk when it returns.

    Args:
        state: consumed: Mcore replaces the factories in it.

    Raises:
        CheckpointError: on every rank, if the directory holds a checkpoint already, any rank could not write, or the shards do not
            add up to whole tensors.
    """
    rank = dist.get_rank()
    together(lambda: _refuse_checkpoint(directory) if rank == 0 else None)
    sharded, same_everywhere = together(lambda: save_preprocess(state, validate_access_integrity=False))
    _, everyones = determine_global_metadata(sharded)
    together(lambda: validate_sharding_integrity(everyones))
    together(lambda: _write_common(same_everywhere, directory) if rank == 0 else None)
    by_key = together(lambda: _by_key(sharded))
    with _quiet():
        together(
            lambda: dcp.save(
                by_key,
                storage_writer=dcp.FileSystemWriter(directory),
                planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
            )
        )
    together(lambda: _write_format(directory) if rank == 0 else None)


def read(template: dict[str, Any], directory: Path) -> dict[str, Any]:
    """What `template` asks for, and the common part; collective over all ranks.

    Args:
        template: a sharded state dict of this rank's layout. Tensors in it are filled in place, absent ones (data=None) allocated.

    Raises:
        CheckpointError: on every rank, if any rank cannot read its part.
    """
    common(directory)
    # Before Mcore, so that a damaged index is one sentence and not torch's search for another one.
    together(lambda: _Files(directory).read_metadata())
    with _quiet():
        # Some releases read without communication, so that only the rank that fails knows.
        return dict(together(lambda: dist_checkpointing.load(template, str(directory), validate_access_integrity=False)))


def common(directory: Path) -> dict[str, Any]:
    """The part of a checkpoint that is the same for all ranks; collective.

    Raises:
        CheckpointError: on every rank, if any rank cannot read it.
    """
    with _quiet():
        return dict(together(lambda: dist_checkpointing.load_common_state_dict(str(directory))))


def shapes(directory: Path) -> Shapes:
    """Global shape of every tensor in a checkpoint; collective.

    Raises:
        CheckpointError: on every rank, if any rank cannot read it or the directory is not a distributed checkpoint.
    """
    tensors = together(lambda: dist_checkpointing.load_tensors_metadata(str(directory)))
    return {key: tuple(tensor.global_shape) for key, tensor in tensors.items()}


class _Files(dcp.FileSystemReader):
    """Reads the metadata once. Mcore's own such reader keeps it for the process, even when the directory is replaced."""

    _metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            self._metadata = super().read_metadata(*args, **kwargs)
        return self._metadata


class RowReader:
    """Reads rows of tensors whose first axis is cut unevenly; each rank on its own, without communication."""

    def __init__(self, directory: Path) -> None:
        self._files = _Files(directory)

    def shape(self, key: str) -> tuple[int, ...] | None:
        """Global shape of a tensor; None if the checkpoint does not hold it."""
        entry = self._files.read_metadata().state_dict_metadata.get(key)
        return None if entry is None else tuple(entry.size)

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of a tensor, all by default; in memory are they and, one at a time, the shards that they come from."""
        entry = self._files.read_metadata().state_dict_metadata[key]
        size = tuple(entry.size)
        stop = size[0] if stop is None else stop
        rows = torch.empty(stop - start, *size[1:], dtype=entry.properties.dtype)
        if len(rows):
            shard = uneven_shard(key, rows, (start,), size)
            with warnings.catch_warnings():
                # That no process group takes part is what is wanted.
                warnings.simplefilter("ignore")
                dcp.load(
                    {key: CheckpointableShardedTensor.from_sh_ten(shard)},
                    storage_reader=self._files,
                    planner=dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                    no_dist=True,
                )
        return rows


def uneven_shard(key: str, part: Tensor, offset: tuple[int, ...], shape: tuple[int, ...], replica: int = 0) -> ShardedTensor:
    """A part of a tensor that is cut at any places, which Mcore's constructors do not cover.

    Args:
        offset: where it starts; axes that are not named start at 0.
        shape: of the whole tensor.
        replica: 0 on the rank that writes it.
    """
    offset = (*offset, *[0] * (len(shape) - len(offset)))
    return ShardedTensor(key, part, part.dtype, tuple(part.shape), shape, offset, None, (replica,))


def together(action: Callable[[], T]) -> T:
    """Does what this rank has to do and waits for the others.

    Args:
        action: either communicates with nobody, or tells a failure to every rank itself, as torch.distributed.checkpoint does.

    Raises:
        CheckpointError: on every rank, if it failed on any.
        KeyboardInterrupt, SystemExit: on the ranks that torch told of one instead.
    """
    result: T | None = None
    failures: dict[int, str] = {}
    end: BaseException | None = None
    try:
        result, failure = attempt(action)
        if failure is not None:
            failures = {dist.get_rank(): failure}
    except CheckpointException as error:  # a BaseException
        failures = {rank: described(failed[0]) for rank, failed in error.failures.items()}
        # torch counts these as failures, but they must end the program.
        end = next((failed[0] for failed in error.failures.values() if isinstance(failed[0], KeyboardInterrupt | SystemExit)), None)
    failures = failures_of_all(failures)
    if end is not None:
        raise end
    if failures:
        raise CheckpointError("; ".join(f"rank {rank}: {failures[rank]}" for rank in sorted(failures)))
    return cast(T, result)


def synced(path: Path) -> None:
    """Waits until a file or the names in a directory are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _by_key(sharded: dict[str, Any]) -> dict[str, Any]:
    """What torch.distributed.checkpoint saves: this rank's main replicas, by the key of the whole tensor or object."""
    grouped = defaultdict(list)
    for shard in nested_values(sharded):
        if is_main_replica(shard.replica_id):
            grouped[shard.unique_key if isinstance(shard, ShardedObject) else shard.key].append(shard)
    return dict(mcore_to_pyt_state_dict(grouped))


def _refuse_checkpoint(directory: Path) -> None:
    if (directory / FORMAT_FILE).exists():
        raise CheckpointError(f"{directory} holds a checkpoint already; write into another directory, or remove that one")
    # What a failed attempt left behind would only be warned of.
    (directory / METADATA_FILE).unlink(missing_ok=True)


def _write_common(state: dict[str, Any], directory: Path) -> None:
    # Through memory, so that a full disk is an OSError that says so.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    (directory / COMMON_STATE_FNAME).write_bytes(buffer.getbuffer())
    synced(directory / COMMON_STATE_FNAME)


def _write_format(directory: Path) -> None:
    save_config(FORMAT, str(directory))
    synced(directory / FORMAT_FILE)
    synced(directory)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what Mcore and torch say of each other and of files that every release of Mcore can read."""
    log = logging.getLogger("megatron.core.dist_checkpointing.strategies.common")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        log.setLevel(level)
