"""Process groups and Megatron's parallel state on the host."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from megatron_pr2.errors import ConfigError
from megatron_pr2.host import platform


def init(
    *,
    tensor: int = 1,
    pipeline: int = 1,
    virtual_pipeline: int | None = None,
    context: int = 1,
    expert: int = 1,
    expert_tensor: int | None = None,
    seed: int = 0,
    threads: int = 1,
    init_method: str = "env://",
    rank: int | None = None,
    world_size: int | None = None,
) -> None:
    """Enables the host, joins the gloo process group (unless one exists) and sets up Megatron's parallel state and seeds.

    Args:
        tensor, pipeline, virtual_pipeline, context, expert, expert_tensor: parallel sizes as in
            ``parallel_state.initialize_model_parallel``; ``expert_tensor`` None means the tensor-parallel size.
        seed: of Megatron's random number trackers.
        threads: torch threads of this process.
        init_method, rank, world_size: of ``init_process_group``; by default from the environment (torchrun).

    Raises:
        ConfigError: CUDA is available, or the world does not divide into the sizes.
    """
    platform.enable()
    # Imported after enable(), which keeps Megatron's import quiet.
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.set_num_threads(threads)
    if not dist.is_initialized():
        dist.init_process_group(
            "gloo",
            init_method=init_method,
            rank=int(os.environ["RANK"]) if rank is None else rank,
            world_size=int(os.environ["WORLD_SIZE"]) if world_size is None else world_size,
        )
    world = dist.get_world_size()
    for kind, size in (
        ("tensor*pipeline*context", tensor * pipeline * context),
        ("expert_tensor*expert*pipeline", (tensor if expert_tensor is None else expert_tensor) * expert * pipeline),
    ):
        if world % size:
            raise ConfigError(f"{world} processes do not divide into {kind}={size}; change the sizes or the processes")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual_pipeline,
        context_parallel_size=context,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=expert_tensor,
    )
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def shutdown() -> None:
    """Destroys Megatron's parallel state and the process group. The host stays enabled."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
