"""This rank's model chunks as Megatron-LM makes them of a provider: one per virtual pipeline stage, cast, on the device, in DDP.

mbridge's own copy of that function asks for members of `ModelType` that Megatron-Core no longer has from 0.17 on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.enums import ModelType
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_defaults_if_not_set_tensor_model_parallel_attributes
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import get_model_config

# Megatron-LM's sizes of gradient buckets, in parameters.
_SMALLEST_BUCKET = 40_000_000
_BUCKET_PER_RANK = 1_000_000


def build_chunks(
    provider: Callable[..., torch.nn.Module], *, wrap_with_ddp: bool, ddp_config: Mapping[str, Any] | None = None
) -> list[torch.nn.Module]:
    """Builds the chunks of this rank in the current parallel state. Their numbers are for the caller to fill in, on every rank.

    Args:
        provider: makes a model of ``pre_process``, ``post_process`` and, under virtual pipeline parallelism, ``vp_stage``.
        wrap_with_ddp: wrap each chunk in Megatron's DistributedDataParallel.
        ddp_config: fields of DistributedDataParallelConfig besides ``grad_reduce_in_fp32=True`` and
            ``use_distributed_optimizer=True``, which are the defaults here.
    """
    stages = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    chunks = [_chunk(provider, stage) for stage in ([None] if stages is None else range(stages))]
    config = get_model_config(chunks[0])
    if config.fp16 or config.bf16:
        chunks = [Float16Module(config, chunk) for chunk in chunks]
        for chunk in chunks:
            for module in chunk.modules():
                # Routers keep the expert bias in fp32.
                if hasattr(module, "_maintain_float32_expert_bias"):
                    module._maintain_float32_expert_bias()
    if not wrap_with_ddp:
        return chunks
    settings = DistributedDataParallelConfig(
        **{"grad_reduce_in_fp32": True, "use_distributed_optimizer": True, **(ddp_config or {})}
    )
    if not settings.overlap_grad_reduce:
        settings.bucket_size = None
    elif settings.bucket_size is None:
        ranks = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
        settings.bucket_size = max(_SMALLEST_BUCKET, _BUCKET_PER_RANK * ranks)
    wrapped = []
    for index, chunk in enumerate(chunks):
        # The communication of later chunks is overlapped with the computation of others anyway.
        later = index > 0
        whole = later or parallel_state.get_pipeline_model_parallel_rank() > 0
        layout = _layout(chunk, settings, None if whole else settings.bucket_size)
        wrapped.append(DistributedDataParallel(config=config, ddp_config=settings, module=chunk, disable_bucketing=later, **layout))
    return wrapped


def _layout(chunk: torch.nn.Module, settings: DistributedDataParallelConfig, bucket_size: int | None) -> dict[str, Any]:
    """How the distributed optimizer cuts parameters, where a release wants to be told (0.19); as it would find out by itself."""
    compute = getattr(DistributedOptimizer, "compute_full_param_layout", None)
    if compute is None or not settings.use_distributed_optimizer:
        return {}
    groups = ProcessGroupCollection.use_mpu_process_groups(["intra_dp_cp", "intra_expt_dp"])
    layout = compute(
        [parameter for parameter in chunk.parameters() if parameter.requires_grad],
        bucket_size,
        groups.intra_dp_cp.size(),
        settings,
        expert_data_parallel_world_size=groups.intra_expt_dp.size(),
    )
    return {"full_param_layout": layout}


def _chunk(provider: Callable[..., torch.nn.Module], stage: int | None) -> torch.nn.Module:
    ends: dict[str, Any] = {} if stage is None else {"ignore_virtual": False, "vp_stage": stage}
    chunk = provider(
        pre_process=parallel_state.is_pipeline_first_stage(**ends),
        post_process=parallel_state.is_pipeline_last_stage(**ends),
        **({} if stage is None else {"vp_stage": stage}),
    )
    chunk.model_type = ModelType.encoder_or_decoder
    if stage is not None:
        chunk.vp_stage = stage
    for parameter in chunk.parameters():
        set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    return chunk.cuda(torch.cuda.current_device())
