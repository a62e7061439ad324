"""I1 and I2 of the reference trainer in bf16 on CUDA: rollouts by the actor's own model, GRPO mini-steps, real rewards."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from megatron.core import parallel_state

from tests.gpu.needs import needs
from tests.helpers.loop import train

# mbridge builds models of Transformer Engine's modules.
pytestmark = [pytest.mark.gpu, needs(te="1.9.0", packages=("mbridge", "omegaconf"))]


@pytest.fixture
def trainers_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The process group as the trainer makes it, from what torchrun tells a rank."""
    from megatron_pr2.rl.worker import init_gpu

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    told = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    init_gpu(expert=1, seed=0)
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def checkpoint(directory: Path) -> Path:
    """A tiny random Qwen3-MoE in sizes that bf16 kernels take."""
    from megatron_pr2.rl.tiny import TinyModelConfig, make_tiny_checkpoint

    config = TinyModelConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        max_position_embeddings=128,
        router_std=0.2,
    )
    return make_tiny_checkpoint(directory, config, seed=1)


def check_trainer(directory: Path) -> str:
    """Two steps of r3, and of pr2 that does not learn, that is held back, and that is used; in the current parallel state."""
    path = checkpoint(directory / "model")
    presets = {
        "r3": ["preset=r3"],
        "zero": ["preset=pr2", "pr2.alpha=0", "pr2.hold_back=false"],
        "held": ["preset=pr2", "pr2.alpha=3"],
        "pr2": ["preset=pr2", "pr2.alpha=3", "pr2.hold_back=false"],
    }
    runs: dict[str, dict[str, Any]] = {}
    for name, overrides in presets.items():
        runs[name] = train(path, directory / name, ["steps=2", "model.dtype=bfloat16", *overrides])
    r3, zero, held, pr2 = (runs[name] for name in presets)
    assert len(set(r3["weights"])) == len(r3["weights"]) == 8
    for name in ("rollouts", "samples", "weights", "optimizer"):
        assert zero[name] == r3[name], f"I1: {name}"
        # Two rollout batches are too few for any prediction.
        assert held[name] == r3[name], f"I1, held back: {name}"
    assert zero["predictor"] == 0.0
    assert held["predictor"] > 0.1
    # Within the first rollout batch the routes are the same, so every update must be.
    assert pr2["rollouts"][0] == r3["rollouts"][0]
    for name in ("samples", "weights", "optimizer"):
        assert pr2[name][:4] == r3[name][:4], f"I2: {name}"
    assert pr2["predictor"] > 0.1
    assert pr2["rollouts"][1] != r3["rollouts"][1]
    return f"8 mini-steps each, |W_p| {pr2['predictor']:.2f}"


@pytest.mark.usefixtures("trainers_rank", "deterministic")
def test_i1_i2_of_the_reference_trainer(tmp_path: Path, record_property: Any) -> None:
    assert os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] == "0"
    record_property("detail", check_trainer(tmp_path))
