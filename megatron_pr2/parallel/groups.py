"""Megatron-Core's process groups as PR2 uses them: whether they fit the model, and what is gathered over them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_pr2.errors import AttachError
from megatron_pr2.parallel.ranks import LOST_EXPERT_GRADIENTS

T = TypeVar("T")


def check_groups(config: TransformerConfig, device: torch.device) -> None:
    """Refuses a model whose config contradicts the process groups, and a layout that loses expert gradients; collective.

    Raises:
        AttachError: on every rank.
    """
    if not mpu.model_parallel_is_initialized():
        if dist.is_initialized() and dist.get_world_size() > 1:
            raise AttachError(
                f"{dist.get_world_size()} processes, but Megatron-Core's parallel_state is not initialised, from which PR2 takes "
                "its groups; call initialize_model_parallel() before attach()"
            )
        return
    sizes = {
        "tensor_model_parallel_size": mpu.get_tensor_model_parallel_world_size(),
        "context_parallel_size": mpu.get_context_parallel_world_size(),
        "pipeline_model_parallel_size": mpu.get_pipeline_model_parallel_world_size(),
        "expert_model_parallel_size": mpu.get_expert_model_parallel_world_size(),
    }
    for name, size in sizes.items():
        if getattr(config, name) != size:
            raise AttachError(
                f"the model's config says {name}={getattr(config, name)}, Megatron-Core's process groups say {size}; build the "
                "model with the sizes that initialize_model_parallel() was given"
            )
    if config.expert_model_parallel_size == 1:
        reduced, copies = mpu.get_data_parallel_group(with_context_parallel=True), mpu.get_expert_data_parallel_group()
        # Some ranks may see equal groups by chance; all of them have to refuse.
        wrong = torch.tensor(float(dist.get_process_group_ranks(reduced) != dist.get_process_group_ranks(copies)), device=device)
        dist.all_reduce(wrong, op=dist.ReduceOp.MAX)
        if wrong.item():
            raise AttachError(LOST_EXPERT_GRADIENTS)


def gathered(item: T, group: dist.ProcessGroup) -> list[T]:
    """One small object of every rank of a group, in the order of its ranks; collective and slow."""
    parts: list[Any] = [None] * group.size()
    dist.all_gather_object(parts, item, group=group)
    return parts


def token_group(sequence_parallel: bool) -> dist.ProcessGroup | None:
    """The ranks that hold other tokens of the same layers: data x context (x tensor under sequence parallelism)."""
    if not mpu.model_parallel_is_initialized():
        return None
    if sequence_parallel:
        return mpu.get_tensor_and_data_parallel_group(with_context_parallel=True)
    return mpu.get_data_parallel_group(with_context_parallel=True)


def everyone(tokens: dist.ProcessGroup | None) -> list[dist.ProcessGroup]:
    """Groups over which a sum becomes that of the whole model and batch: a stage's token group, then the pipeline's."""
    stages = pipeline_group()
    return [group for group in (tokens, stages) if group is not None]


def summed(values: Sequence[int], group: dist.ProcessGroup | None, device: torch.device) -> list[int]:
    """Integers summed over a group; collective, with one read. None is a group of one rank."""
    if group is None or group.size() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.int64, device=device)
    dist.all_reduce(total, group=group)
    return [int(value) for value in total.tolist()]


def every_layer(own: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """W_p of every MoE layer of the model by 0-based layer; collective over the pipeline group where there is one.

    Args:
        own: those of this pipeline stage, [E, H] fp32.
    """
    group = pipeline_group()
    if group is None:
        return dict(own)
    shape = next((tuple(w.shape) for w in own.values()), None)
    parts = gathered((sorted(own), shape), group)
    shape = next(shape for _, shape in parts if shape is not None)
    device = next((w.device for w in own.values()), communication_device())
    layers = {}
    for stage, (held, _) in enumerate(parts):
        for layer in held:
            w = own[layer].contiguous() if stage == group.rank() else torch.empty(shape, dtype=torch.float32, device=device)
            dist.broadcast(w, group=group, group_src=stage)
            layers[layer] = w
    return layers


def whole_model(
    columns: Sequence[int], drift: Mapping[str, list[float]], update: Mapping[str, float]
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Drift metrics and predictor norms of the whole model from those of the stages; collective over the pipeline group.

    Args:
        columns: this stage's MoE layers, as indices among all.
        drift: per metric a value per layer of this stage.
        update: `tokens` and two norms over this stage's layers.
    """
    group = pipeline_group()
    if group is None:
        return dict(drift), dict(update)
    parts = gathered((list(columns), dict(drift), dict(update)), group)
    order = sorted((column, stage, i) for stage, (held, *_) in enumerate(parts) for i, column in enumerate(held))
    merged = {name: [parts[stage][1][name][i] for _, stage, i in order] for name in drift}
    updates = [part[2] for part in parts]
    whole = {name: math.sqrt(sum(u[name] ** 2 for u in updates)) for name in update}
    return merged, {**whole, "tokens": sum(u["tokens"] for u in updates)}


def pipeline_group() -> dist.ProcessGroup | None:
    """The stages of the pipeline; None where there is only one."""
    if not mpu.model_parallel_is_initialized() or mpu.get_pipeline_model_parallel_world_size() == 1:
        return None
    return mpu.get_pipeline_model_parallel_group()


def communication_device() -> torch.device:
    """Where tensors have to be for the default process group, for ranks without a router to ask."""
    # A default group for both kinds of tensors does not say "nccl".
    if dist.is_initialized() and torch.cuda.is_available() and dist.get_backend() != "gloo":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
