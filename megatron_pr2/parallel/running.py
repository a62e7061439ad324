"""The parallel layout that Megatron-Core really runs, against what the model's config says and against what it gets wrong."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_pr2.errors import AttachError


def check_live_layout(config: TransformerConfig, device: torch.device) -> None:
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
        _check_expert_gradients(device)


def _check_expert_gradients(device: torch.device) -> None:
    """With one expert-parallel rank Megatron-Core 0.16 reduces expert gradients over data x context parallel ranks.

    That is wrong unless these are the ranks that hold the copies of an expert's share, which depends on the experts' tensor-
    parallel size and on the order of ranks (docs/parallelism.md).
    """
    reduced = mpu.get_data_parallel_group(with_context_parallel=True)
    copies = mpu.get_expert_data_parallel_group()
    same = dist.get_process_group_ranks(reduced) == dist.get_process_group_ranks(copies)
    # Some ranks may see equal groups by chance; all of them have to refuse.
    wrong = torch.tensor(float(not same), device=device)
    dist.all_reduce(wrong, op=dist.ReduceOp.MAX)
    if wrong.item():
        raise AttachError(
            "expert_model_parallel_size=1, and the ranks that hold the copies of an expert are not the data x context parallel "
            "ranks over which Megatron-Core reduces its gradients: it would lose expert gradients. Set expert_model_parallel_size "
            "above 1, or expert_tensor_parallel_size to tensor_model_parallel_size and the order of ranks to its default"
        )
