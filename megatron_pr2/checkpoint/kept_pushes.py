"""The pushes that are kept (prediction.pushes), as parts of a checkpoint between two rollout batches.

For pipelines in which the next batch is rolled out before the checkpoint and trained on after it: it is judged by them. Keys are
`pr2.pushes.layers.<layer>.push<n>.*` (checkpoint.pushes).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from megatron_pr2.checkpoint import files
from megatron_pr2.checkpoint.checkpoint import replica_id
from megatron_pr2.checkpoint.contents import Contents
from megatron_pr2.checkpoint.pushes import push_parts, read_push
from megatron_pr2.replay.sequences import PushName


def kept_shards(pr2: Contents) -> tuple[list[PushName], dict[str, Any]]:
    """Names of the pushes that are kept, oldest first, and their parts for a pipeline's own `dist_checkpointing.save`."""
    pushes = list(pr2.measurement.pushes.kept)
    names = [push.name for push in pushes]
    state = {}
    for layer, name, part in push_parts(pr2, pushes, {name: number for number, name in enumerate(names)}):
        key = _key(layer, name)
        state[key] = ShardedTensor.from_rank_offsets(key, part, replica_id=replica_id())
    return names, state


def load_kept(pr2: Contents, directory: Path, names: Sequence[PushName]) -> None:
    """Keeps a checkpoint's pushes again, after :func:`checkpoint.load_sharded_state_dict`; collective over all ranks.

    Raises:
        CheckpointError: on every rank, if any rank cannot read its part.
    """
    reader = files.RowReader(directory)

    def part(layer: int, name: str) -> Tensor | None:
        key = _key(layer, name)
        return None if reader.shape(key) is None else reader.read(key)

    for push in files.together(lambda: [read_push(pr2, part, number, name) for number, name in enumerate(names)]):
        pr2.measurement.pushes.kept.add(push)


def _key(layer: int, name: str) -> str:
    return f"pr2.pushes.layers.{layer}.{name}"
