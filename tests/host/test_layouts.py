"""The host trains the same numbers in every parallel layout: loss and all gradients against one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.distributed import pool
from tests.helpers.rounding import LOGPROB, assert_near
from tests.host import training
from tests.host.models import make_checkpoint, tiny_config

RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "moe_act", "layernorm"]}

# name: (processes, layout, packed, TransformerConfig fields)
CASES: dict[str, tuple[int, dict[str, Any], bool, dict[str, Any]]] = {
    "packed": (1, {}, True, {}),
    "ep2": (2, {"expert": 2}, False, {}),
    "ep2-packed": (2, {"expert": 2}, True, {}),
    "ep2-allgather": (
        2,
        {"expert": 2},
        False,
        {"moe_token_dispatcher_type": "allgather", "variable_seq_lengths": False},
    ),
    "tp2-sp": (2, {"tensor": 2}, False, {}),
    "tp2-sp-ep2-packed": (2, {"tensor": 2, "expert": 2, "expert_tensor": 1}, True, {}),
    "cp2": (2, {"context": 2}, False, {}),
    "cp2-ep2-packed": (2, {"context": 2, "expert": 2}, True, {}),
    "pp2-recompute-selective": (2, {"pipeline": 2}, False, SELECTIVE),
    "pp2-vpp2": (2, {"pipeline": 2, "virtual_pipeline": 2}, False, {}),
    "pp2-vpp2-batched": (
        2,
        {"pipeline": 2, "virtual_pipeline": 2},
        False,
        {"batch_p2p_comm": True, "overlap_p2p_comm": False},
    ),
    "pp2-vpp2-packed-recompute": (2, {"pipeline": 2, "virtual_pipeline": 2}, True, RECOMPUTE),
    "pp2-ep2": (4, {"pipeline": 2, "expert": 2}, False, {}),
    "tp2-sp-cp2-ep2-packed": (4, {"tensor": 2, "context": 2, "expert": 2, "expert_tensor": 1}, True, {}),
    "tp2-sp-ep4": (4, {"tensor": 2, "expert": 4, "expert_tensor": 1}, False, {}),
}


QUICK = {"packed", "ep2-packed", "tp2-sp", "cp2", "pp2-vpp2"}
ROWS = [pytest.param(name, marks=() if name in QUICK else pytest.mark.exhaustive) for name in CASES]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("qwen3_moe"), tiny_config("qwen3_moe"))


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> tuple[float, training.Weights]:
    return pool(1).run(training.gradients, checkpoint, {}, training.random_sequences())[0]


@pytest.mark.parametrize("case", ROWS)
def test_gradients_of_one_process(case: str, checkpoint: Path, expected: tuple[float, training.Weights]) -> None:
    processes, layout, packed, extra = CASES[case]
    # The dispatcher that gathers all tokens needs them equally long everywhere.
    lengths = (16, 16, 16, 16) if "allgather" in case else (16, 8, 12, 16)
    if lengths != (16, 8, 12, 16):
        expected = pool(1).run(training.gradients, checkpoint, {}, training.random_sequences(lengths))[0]
    results = pool(processes).run(
        training.gradients, checkpoint, layout, training.random_sequences(lengths), packed=packed, extra_config=extra
    )
    assert any(loss == pytest.approx(expected[0], rel=LOGPROB) for loss, _ in results)
    for loss, gradients in results:
        assert loss == 0 or loss == pytest.approx(expected[0], rel=LOGPROB)
        assert gradients.keys() == expected[1].keys()
        for name, gradient in gradients.items():
            assert_near(gradient, expected[1][name], sum(lengths), msg=name)


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "deepseek_v3"])
def test_gradients_of_other_families(family: str, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / family, tiny_config(family, num_hidden_layers=2))
    sequences = training.random_sequences()
    layout = {"tensor": 2, "expert": 2, "expert_tensor": 1}
    _, alone = pool(1).run(training.gradients, path, {}, sequences)[0]
    _, parallel = pool(2).run(training.gradients, path, layout, sequences, packed=True)[0]
    assert alone.keys() == parallel.keys()
    for name, gradient in parallel.items():
        assert_near(gradient, alone[name], sum(map(len, sequences)), msg=name)
