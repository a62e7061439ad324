"""Invariant I3 for every shape of model: where the MoE layers are, and what their routers compute; each in one layout against one
process. All-MoE models with softmax after top-k are the matrix's."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.distributed import pool
from tests.host.models import make_checkpoint, tiny_config
from tests.parallel import batch, compare
from tests.parallel.batch import ONE
from tests.parallel.case import Case, Result
from tests.parallel.mtp import add_head, run_with_head
from tests.parallel.replay import run_case
from tests.parallel.test_matrix import (
    ALLGATHER,
    BLOCK,
    BUDGET,
    FIXED,
    MOE,
    OVERLAP,
    PP2,
    REVERSED,
    TWO,
    UNIFORM,
    VPP,
    ZERO,
    case,
    recomputes,
)

LAYERS = 4


@dataclass(frozen=True)
class Shape:
    """A model and the layout that it is compared under.

    Attributes:
        family, changes: of tests.host.models.tiny_config.
        moe_layers: 0-based decoder layers with a router.
        case: the layout.
        config: fields of TransformerConfig that belong to the model: the single process has them, too.
    """

    family: str
    changes: dict[str, Any]
    moe_layers: tuple[int, ...]
    case: Case
    config: dict[str, Any] = field(default_factory=dict)


BLOCK2 = {**BLOCK, "recompute_num_layers": 2}
SHAPES: dict[str, Shape] = {
    # Two dense layers: the first pipeline stage has no router at all. Sigmoid scores, expert bias, groups, shared expert, MLA.
    "deepseek-dense-first": Shape(
        "deepseek_v3", {"first_k_dense_replace": 2}, (2, 3), case(2, PP2, UNIFORM, packed=True, old=TWO, new=BUDGET)
    ),
    "deepseek-tp2-ep2": Shape(
        "deepseek_v3",
        {"first_k_dense_replace": 1, "routed_scaling_factor": 2.5},
        (1, 2, 3),
        case(2, {"tensor": 2, "expert": 2, "expert_tensor": 1}, MOE, old=BUDGET, new=REVERSED),
    ),
    # Alternating, as Megatron-Core's integer and as its list.
    "alternating-integer": Shape(
        "qwen3_moe", {"mlp_only_layers": [1, 3]}, (0, 2), case(2, VPP, old=TWO, new=ONE), {"moe_layer_freq": 2}
    ),
    "alternating-list": Shape(
        "qwen3_moe", {"decoder_sparse_step": 2}, (1, 3), case(2, {"context": 2}, BLOCK2, packed=True, new=REVERSED)
    ),
    # The last pipeline stage has no router.
    "dense-last": Shape("qwen3_moe", {"mlp_only_layers": [2, 3]}, (0, 1), case(4, {**PP2, "expert": 2}, old=TWO, new=BUDGET)),
    # A gated shared expert; softmax before top-k, not normalised.
    "shared-expert-pre-softmax": Shape(
        "qwen2_moe",
        {"norm_topk_prob": False},
        (0, 1, 2, 3),
        case(2, {"tensor": 2}, packed=True, old=BUDGET, new=TWO, ddp=OVERLAP),
    ),
    "mixtral": Shape("mixtral", {}, (0, 1, 2, 3), case(2, {"expert": 2}, ALLGATHER, old=FIXED, new=FIXED, ddp=ZERO)),
}
QUICK = {"deepseek-dense-first", "alternating-list"}
ROWS = [pytest.param(name, marks=() if name in QUICK else pytest.mark.exhaustive) for name in SHAPES]


def _checkpoint(shape: Shape, path: Path) -> Path:
    return make_checkpoint(path, tiny_config(shape.family, vocab_size=batch.VOCABULARY, **shape.changes))


def _assert_routes_were_taken(shape: Shape, result: Result, topk: int, experts: int) -> None:
    count = len(shape.moe_layers)
    tables = {s: torch.from_numpy(batch.table(s, count, topk, experts).experts.astype("int64")) for s in batch.LENGTHS}
    compare.assert_routes_were_taken(result, tables, {layer: column for column, layer in enumerate(shape.moe_layers)})


@pytest.mark.parametrize("name", ROWS)
def test_numbers_of_one_process(name: str, tmp_path: Path) -> None:
    shape = SHAPES[name]
    path = _checkpoint(shape, tmp_path / name)
    expected = pool(1).run(run_case, path, Case(config=shape.config))[0]
    assert tuple(sorted(expected.predictor)) == shape.moe_layers
    _assert_routes_were_taken(shape, expected, *((2, 8) if shape.family == "mixtral" else (4, 16)))
    layout = replace(shape.case, config={**shape.case.config, **shape.config})
    results = pool(layout.processes).run(run_case, path, layout)
    compare.assert_same_numbers(results, expected)
    compare.assert_every_route_replayed_once(results, expected, recomputed=recomputes(layout))


@pytest.mark.exhaustive
def test_multi_token_prediction_is_left_alone(tmp_path: Path) -> None:
    shape = Shape("deepseek_v3", {"first_k_dense_replace": 1}, (1, 2, 3), case(4, {**PP2, "expert": 2}, old=TWO, new=BUDGET))
    head = {"mtp_num_layers": 1}
    path = add_head(_checkpoint(shape, tmp_path / "mtp"), LAYERS, hidden=64)
    expected = pool(1).run(run_with_head, path, Case(config=head))[0]
    assert tuple(sorted(expected.predictor)) == shape.moe_layers
    results = pool(4).run(run_with_head, path, replace(shape.case, config=head))
    assert expected.gradients is not None
    assert any(name.startswith(f"model.layers.{LAYERS}.") and gradient.any() for name, gradient in expected.gradients.items())
    compare.assert_same_numbers(results, expected)
    compare.assert_every_route_replayed_once(results, expected, recomputed=False)
    for result in (expected, *results):
        assert "attached" not in result.other_calls
    # The head lives on the last stage.
    assert [result.other_calls["live"] > 0 for result in (expected, *results)] == [True, False, False, True, True]
