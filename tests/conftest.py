"""Fixtures that the whole test session shares."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from megatron_pr2 import host
from megatron_pr2.errors import ConfigError
from megatron_pr2.rollout.sglang.python import VARIABLE, find_python
from tests.helpers.distributed import close_pools

settings.register_profile("megatron_pr2", deadline=None, max_examples=60)
settings.load_profile("megatron_pr2")
# A shell starts what it runs in the background with SIGINT ignored, and children inherit that: tests of Ctrl-C would see nothing.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def idle_workers_end() -> Iterator[None]:
    """A module's pools end with it: idle workers hold gloo threads that poll, and later modules need the cores."""
    yield
    close_pools()


@pytest.fixture(scope="session")
def sglang_python() -> str:
    """The interpreter that SGLang's servers run in; without such an environment the test is skipped, unless one was named."""
    try:
        return find_python()
    except ConfigError as error:
        if os.environ.get(VARIABLE):
            raise
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def servers_have_an_environment(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("sglang"):
        request.getfixturevalue("sglang_python")


@pytest.fixture(scope="session")
def host_platform() -> None:
    """Megatron-Core on the CPU of this process; stays on for the session."""
    host.enable()


@pytest.fixture(scope="session")
def tiny_checkpoint(host_platform: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-MoE in fp32: 2 layers, 8 experts, top-2, hidden 32; router logits spread by about 1."""
    from megatron_pr2.rl.tiny import TinyModelConfig, make_tiny_checkpoint

    config = TinyModelConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        max_position_embeddings=128,
        router_std=0.2,
    )
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), config, seed=1)
