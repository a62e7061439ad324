"""The flex dispatcher on two GPUs: DeepEP forgets the routing map and finds the experts again as topk(probabilities).

tests/parallel/test_flex.py has that step as a function; here are the real kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from tests.gpu import models
from tests.gpu.needs import has, name_general_gemm, needs

pytestmark = [pytest.mark.gpu, needs(gpus=2, packages=("deep_ep",))]


def compare_dispatchers(spec: str, reference: str, other: str, *, on_gpu: bool) -> dict[str, Any]:
    """One mini-step under each dispatcher on this rank; needs a parallel state with all experts spread over its ranks."""
    ranks = dist.get_world_size()
    found = [
        models.replay(
            spec,
            models.model_config(spec, on_gpu=on_gpu, expert_model_parallel_size=ranks, moe_token_dispatcher_type=dispatcher),
        )
        for dispatcher in (reference, other)
    ]
    return {
        "wrong": sum(each.wrong for each in found),
        "rows": [each.rows for each in found],
        "losses": models.relative_distance(found[1].losses, found[0].losses),
        "gradients": models.relative_distance(found[1].gradients, found[0].gradients),
    }


def judge(results: list[dict[str, Any]]) -> str:
    """Every rank replayed exactly, and the dispatchers agree up to rounding."""
    for result in results:
        assert result["wrong"] == 0
        assert min(result["rows"]) > 300
        assert result["losses"] < 0.01
        assert result["gradients"] < 0.05
    worst = {name: max(result[name] for result in results) for name in ("losses", "gradients")}
    return f"losses off by {worst['losses']:.0e}, gradients by {worst['gradients']:.0e}"


def flex_rank(rank: int, ranks: int, directory: str) -> None:
    """One process of the check."""
    name_general_gemm()
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{directory}/store", rank=rank, world_size=ranks)
    parallel_state.initialize_model_parallel(expert_model_parallel_size=ranks, create_gloo_process_groups=False)
    spec = "te" if has("transformer_engine") else "local"
    torch.save(compare_dispatchers(spec, "alltoall", "flex", on_gpu=True), Path(directory) / f"{rank}.pt")
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def test_replay_through_the_flex_dispatcher(tmp_path: Path, record_property: Callable[[str, Any], None]) -> None:
    torch.multiprocessing.spawn(flex_rank, args=(2, str(tmp_path)), nprocs=2)
    record_property("detail", judge([torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]))
