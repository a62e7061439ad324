"""Checkpoints of predictive routing replay: written in one parallel layout, read in any other (invariant I6).

Megatron-Core's dist_checkpointing, because the policy is saved with it: a pipeline merges `sharded_state_dict` into the call that
it has and needs no second format. Every tensor is a whole one of one layer, under the layer's number in the model, and the first
rank of each pipeline stage writes it: whatever tensor, pipeline, virtual pipeline, expert, context or data parallel sizes read it,
each rank takes the layers that it has. The current rollout batch can be kept as well (megatron_pr2.checkpoint.rollout). Keys:

    pr2.predictor.layers.<layer>.weight                   [E, H] fp32
    pr2.predictor.layers.<layer>.exp_avg, .exp_avg_sq     [E, H] fp32, Adam's
    pr2.predictor.layers.<layer>.step                     [] fp32, Adam's; 0 before the first update
    pr2.predictor.layers.<layer>.weight_horizon           [] fp32, updates that `weight` is made for
    pr2.predictor.layers.<layer>.momentum, .lookahead     [E, H] fp32, W_p of predictor="momentum" or "lookahead"
    pr2.predictor.layers.<layer>.horizon                  [] fp32, updates that it is made for
    pr2.predictor.layers.<layer>.hold_back                [rows, steps] fp64, measured gains (prediction.hold_back)
    pr2.predictor.layers.<layer>.multiples                [mini-steps, columns] fp64, moments of drift (prediction.multiples)

Each is there if the strategy that wrote has it; a strategy that reads takes what it knows, the rest starts at its initial value.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from megatron_pr2.checkpoint import files
from megatron_pr2.checkpoint.contents import Contents
from megatron_pr2.checkpoint.rollout import load_rollout, sharded_rollout
from megatron_pr2.errors import CheckpointError
from megatron_pr2.prediction.predictor import RoutePredictor
from megatron_pr2.routes.ids import integers

__all__ = ["load", "load_rollout", "load_sharded_state_dict", "save", "sharded_state_dict"]

logger = logging.getLogger(__name__)

PREFIX = "pr2.predictor.layers."


def save(pr2: Contents, directory: str | Path, *, rollout: bool = False) -> None:
    """Writes PR2's state into a directory of its own, which is made if it is absent; collective over all ranks.

    Args:
        rollout: also keeps the current rollout batch, for a checkpoint between two mini-steps: its sequences, routes and features.

    Raises:
        CheckpointError: on every rank, if any rank could not write.
    """
    _require_process_group()
    directory = files.together(lambda: Path(directory))
    files.together(lambda: _check_predictor(pr2, "it is not saved"))
    files.together(lambda: directory.mkdir(parents=True, exist_ok=True) if dist.get_rank() == 0 else None)
    files.write(sharded_state_dict(pr2, rollout=rollout), directory)


def load(pr2: Contents, directory: str | Path, *, sequences: Sequence[int] | None = None) -> None:
    """Restores PR2 from what :func:`save` wrote, or from a pipeline's own checkpoint with PR2 in it; collective over all ranks.

    A checkpoint without predictor leaves W_p = 0; one with a predictor that the config does not want is left alone. Either is said
    in one log line.

    Args:
        sequences: takes up the rollout batch as well; ids of what this rank's replica trains on in this layout, alike on all its
            ranks.

    Raises:
        CheckpointError: on every rank, if any rank cannot read it, it is of a model of another size, or has not these sequences.
    """
    _require_process_group()
    directory = files.together(lambda: Path(directory))
    wanted = files.together(lambda: None if sequences is None else integers(list(sequences), "sequences").tolist())
    loaded = files.read(sharded_state_dict(pr2, load_from=directory), directory)
    files.together(lambda: load_sharded_state_dict(pr2, loaded))
    if wanted is not None:
        load_rollout(pr2, directory, wanted)


def sharded_state_dict(pr2: Contents, *, rollout: bool = False, load_from: str | Path | None = None) -> dict[str, Any]:
    """PR2's state as Mcore ShardedTensors, for a pipeline's own `dist_checkpointing.save` or `load`.

    Args:
        rollout: with the current rollout batch (then the call is collective); :func:`load_rollout` takes it up again.
        load_from: the checkpoint that is going to be loaded (then the call is collective): without a predictor in it the result is
            empty, and its tensors are new ones, so that nothing has changed before :func:`load_sharded_state_dict`.

    Returns:
        To be put under any name into the pipeline's sharded state dict; empty without a predictor.

    Raises:
        CheckpointError: the checkpoint is of a model of another size, or W_p is not finite.
    """
    if load_from is not None:
        found = files.shapes(Path(load_from))
        return _shards(pr2, found) if _has_predictor(pr2, found, load_from) else {}
    _check_predictor(pr2, "it is not saved")
    state = {} if pr2.predictor is None else _shards(pr2, None)
    return {**state, **sharded_rollout(pr2)} if rollout else state


def load_sharded_state_dict(pr2: Contents, state: dict[str, Any] | None) -> None:
    """Takes what `dist_checkpointing.load` made of :func:`sharded_state_dict`; nothing (None, or empty) means W_p = 0.

    Raises:
        CheckpointError: W_p is not finite; nothing has changed.
    """
    if pr2.predictor is not None:
        _load_predictor(pr2, pr2.predictor, state)
    # Of another run:
    pr2.measurement.pushes.clear()
    pr2.horizon.forget_batch()


def _load_predictor(pr2: Contents, predictor: RoutePredictor, state: dict[str, Any] | None) -> None:
    loaded = {key: tensor for key, tensor in (state or {}).items() if key.startswith(PREFIX)}
    names = sorted({key.rsplit(".", 1)[1] for key in loaded}) if pr2.sites else []
    tensors = {name: torch.stack([loaded[f"{PREFIX}{site.hidden_layer}.{name}"] for site in pr2.sites]) for name in names}
    _require_finite(pr2, tensors, "it is not loaded; load an earlier checkpoint, or start without its predictor")
    if pr2.measurement.hold_back is not None:
        pr2.measurement.hold_back.load_state(tensors.pop(pr2.measurement.hold_back.kind, None))
    predictor.load_state(tensors)


def _check_predictor(pr2: Contents, what: str) -> None:
    """Raises CheckpointError, which names the layers, if there is a predictor that is not finite; `what` says what follows."""
    if pr2.predictor is not None:
        _require_finite(pr2, pr2.predictor.state(), what)


def _require_finite(pr2: Contents, tensors: Mapping[str, Tensor], what: str) -> None:
    for name, tensor in tensors.items():
        fine = tensor.isfinite().flatten(1).all(1) if tensor.dim() > 1 else tensor.isfinite()
        if bad := [site.layer for site, good in zip(pr2.sites, fine.tolist(), strict=True) if not good]:
            raise CheckpointError(f"the predictor's {name} of the MoE layers {bad} is not finite: {what}")


def _shards(pr2: Contents, wanted: Collection[str] | None) -> dict[str, Any]:
    """A ShardedTensor per layer and kind; with `wanted` new ones for these keys, to be loaded into."""
    assert pr2.predictor is not None
    tensors_of = pr2.predictor.state()
    if pr2.measurement.hold_back is not None:
        tensors_of[pr2.measurement.hold_back.kind] = pr2.measurement.hold_back.state()
    replica = replica_id()
    state: dict[str, Any] = {}
    for name, tensors in tensors_of.items():
        for site in pr2.sites:
            key = f"{PREFIX}{site.hidden_layer}.{name}"
            if wanted is not None and key not in wanted:
                continue
            data = tensors[site.local] if wanted is None else torch.empty_like(tensors[site.local])
            state[key] = ShardedTensor.from_rank_offsets(key, data, replica_id=replica)
    return state


def replica_id() -> tuple[int, int, int]:
    """All zeros on the one rank of each pipeline stage that writes."""
    if not mpu.model_parallel_is_initialized():
        return 0, 0, dist.get_rank()
    return 0, mpu.get_tensor_model_parallel_rank(), mpu.get_data_parallel_rank(with_context_parallel=True)


def _has_predictor(pr2: Contents, found: files.Shapes, where: str | Path) -> bool:
    """Whether there is a predictor to load; says so where there is none, or where the config wants none.

    Raises:
        CheckpointError: it is of other layers, experts or another hidden size.
    """
    kinds = (".weight", ".momentum", ".lookahead")
    ours = {key: shape for key, shape in found.items() if key.startswith(PREFIX) and key.endswith(kinds)}
    if pr2.predictor is None:
        if ours:
            _say("%s has a predictor, but predictor='none' is configured: ignored", where)
        return False
    if not ours:
        _say("%s has no predictor: starting with W_p = 0", where)
        return False
    config = pr2.model_config
    experts_hidden = (config.num_moe_experts, config.hidden_size)
    layers = sorted({int(key.removeprefix(PREFIX).split(".")[0]) for key in ours})
    if layers != (here := list(pr2.layers.hidden_moe)):
        raise CheckpointError(f"{where}: its predictor is of the MoE layers {layers}, the model has {here}")
    for key, shape in ours.items():
        if shape != experts_hidden:
            raise CheckpointError(
                f"{where}: {key} is [experts, hidden] = {list(shape)}, the model has {list(experts_hidden)}; load it into the "
                "model that it was trained with"
            )
    return True


def _say(message: str, *arguments: object) -> None:
    if dist.get_rank() == 0:
        logger.info(message, *arguments)


def _require_process_group() -> None:
    if not dist.is_initialized():
        raise CheckpointError("checkpoints need torch.distributed: call init_process_group() first, also for a single process")
