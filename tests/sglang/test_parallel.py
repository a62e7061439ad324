"""Servers of two ranks on CPU: the hooks that only they need, and weight pushes to more than one rank."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_pr2.rollout.base import SamplingParams
from megatron_pr2.rollout.sglang.engine import SGLangEngine
from tests.sglang.conftest import SHAPE, TinyModel, own_server
from tests.sglang.test_engine import assert_matches, make_requests

pytestmark = [
    pytest.mark.sglang,
    pytest.mark.slow,
    pytest.mark.usefixtures("preloaded"),
]


@pytest.mark.parametrize(
    ("ep_size", "flags"),
    [(1, ()), (2, ()), (1, ("--enable-dp-attention", "--dp-size", "2"))],
    ids=["tp2", "tp2_ep2", "tp2_dp_attention"],
)
def test_two_ranks(tiny: TinyModel, tmp_path: Path, ep_size: int, flags: tuple[str, ...]) -> None:
    config = own_server(
        tiny.path,
        tmp_path / "log",
        tp_size=2,
        ep_size=ep_size,
        extra_flags=flags,
        env={"SGLANG_CPU_OMP_THREADS_BIND": "0|1"},
    )
    engine = SGLangEngine(config, SHAPE)
    engine.start()
    try:
        responses = engine.generate(make_requests(24), SamplingParams(16), return_routes=True).responses
        assert_matches(responses, tiny)
        merged = tiny.merged_gates(seed=3)
        engine.update_weights(merged.items(), 2)
        responses = engine.generate(make_requests(24), SamplingParams(16), return_routes=True).responses
        assert_matches(responses, tiny, merged)
    finally:
        engine.close()
