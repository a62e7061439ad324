"""Wrapping a model's chunks in Megatron-Core's DistributedDataParallel."""

from __future__ import annotations

import pytest
import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from tests.helpers.distributed import pool


def _layouts(**sizes: int) -> list[tuple[int, bool]]:
    """Per way of cutting gradients: buckets, and whether they are those that DistributedDataParallel makes by itself."""
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_pr2 import host
    from megatron_pr2.hf.model_chunks import build_chunks

    host.init(**sizes)
    config = TransformerConfig(num_layers=2, hidden_size=16, num_attention_heads=2, **host.config_overrides())

    def provider(pre_process: bool, post_process: bool) -> torch.nn.Module:
        model = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(4)))
        model.config = config
        for parameter in model[3].parameters():
            parameter.allreduce = False  # an expert's
        return model

    found = []
    for settings in ({}, {"overlap_grad_reduce": True, "bucket_size": 300}):
        (chunk,) = build_chunks(provider, wrap_with_ddp=True, ddp_config=settings)
        unaided = DistributedDataParallel(config=config, ddp_config=chunk.ddp_config, module=chunk.module)
        buckets = sum(len(layout.bucket_indices) for layout in chunk.full_param_layout.layouts.values())
        found.append((buckets, chunk.full_param_layout == unaided.full_param_layout))
    return found


@pytest.mark.skipif(not hasattr(DistributedOptimizer, "compute_full_param_layout"), reason="only DDP cuts parameters here")
@pytest.mark.parametrize("sizes", [{"expert": 2}, {"pipeline": 2}], ids=["expert", "pipeline"])
def test_parameters_are_cut_as_ddp_would(sizes: dict[str, int]) -> None:
    ranks = pool(2).run(_layouts, **sizes)
    for rank, ways in enumerate(ranks):
        assert all(same for _, same in ways)
        whole, in_buckets = (buckets for buckets, _ in ways)
        later_stage = "pipeline" in sizes and rank == 1
        assert (in_buckets > whole) is not later_stage  # what is communicated while others compute, is in buckets
