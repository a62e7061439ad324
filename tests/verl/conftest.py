"""These tests run where verl is installed (`make test-verl` installs it); elsewhere each module is skipped and says so."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

HAVE_VERL = importlib.util.find_spec("verl") is not None


class WithoutVerl(pytest.Module):
    """A test module that is not imported."""

    def collect(self) -> Iterator[pytest.Item]:
        pytest.skip("verl is not installed: run `make test-verl`, which makes an environment with it", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    return None if HAVE_VERL else WithoutVerl.from_parent(parent, path=module_path)


@pytest.fixture(scope="session")
def model(host_platform: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Qwen3-MoE that two tensor- or four pipeline-parallel chunks can share: 4 layers, 8 experts, top-2."""
    from megatron_pr2.rl.tiny import TinyModelConfig, make_tiny_checkpoint

    config = TinyModelConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        max_position_embeddings=128,
        router_std=0.2,
    )
    return str(make_tiny_checkpoint(tmp_path_factory.mktemp("verl"), config, seed=1))
