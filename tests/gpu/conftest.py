"""Settings under which CUDA computes the same bits twice, and one process as a whole Megatron world."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from tests.gpu.needs import name_general_gemm

if torch.cuda.is_available():
    # Read when the libraries start, so before any test: one fixed cuBLAS workspace per stream, and of Transformer Engine's
    # attention kernels only those with a deterministic backward.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")


@pytest.fixture(scope="session", autouse=True)
def router_without_transformer_engine() -> None:
    """Routers run on a GPU without Transformer Engine."""
    name_general_gemm()


@pytest.fixture
def device() -> torch.device:
    """The first GPU."""
    return torch.device("cuda", 0)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Deterministic kernels wherever torch has them; equal bits, not this switch, prove that no other was used."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """NCCL and Megatron's parallel state in this process, for a module's tests."""
    torch.cuda.set_device(0)
    store = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    model_parallel_cuda_manual_seed(0, force_reset_rng=True)
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
