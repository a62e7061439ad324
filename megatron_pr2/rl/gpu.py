"""Process groups on machines with GPUs: NCCL and Megatron's parallel state, from torchrun's environment."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed


def init(*, expert: int, seed: int) -> None:
    """Joins the process group with this rank's GPU and sets up data and expert parallelism."""
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl")
    parallel_state.initialize_model_parallel(expert_model_parallel_size=expert)
    model_parallel_cuda_manual_seed(seed)
