"""Invariant I3 as a matrix: the same batch gives the numbers of one process, however it is cut; I4's counts with it.

Rows are sorted by their number of processes, so that the workers of one size are started once. Every setting appears in a row,
most of them in several combinations; rows that a quick run needs least are marked slow.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.distributed import pool
from tests.helpers.rounding import LOGPROB
from tests.host.models import make_checkpoint, tiny_config
from tests.parallel import batch, compare
from tests.parallel.batch import ONE, Split
from tests.parallel.case import Case, Result
from tests.parallel.replay import run_case

UNIFORM = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
BLOCK = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1}
MOE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
PARTS = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "moe_act", "layernorm"]}
# The dispatcher that gathers all tokens needs equal shapes on all ranks: see Split.width.
ALLGATHER = {"moe_token_dispatcher_type": "allgather", "variable_seq_lengths": False}
ZERO = {"use_distributed_optimizer": True}
OVERLAP = {"overlap_grad_reduce": True}

TWO, FOUR, REVERSED, BUDGET = Split(2), Split(4), Split(2, reverse=True), Split(budget=48)
FIXED = Split(2, width=24)
EP2 = {"expert": 2, "expert_tensor": 1}
# Micro-batches by a wrapped forward step; in all other rows the order of the schedule says which one runs.
NAMED = {"bind": "identity"}


def case(processes: int, layout: dict[str, Any], layers: dict[str, Any] | None = None, **settings: Any) -> Case:
    """One row; `layers` are fields of TransformerConfig."""
    return Case(processes, layout, config=layers or {}, **settings)


PP2 = {"pipeline": 2}
VPP = {"pipeline": 2, "virtual_pipeline": 2}
CASES: dict[str, Case] = {
    "packed": case(1, {}, packed=True, old=BUDGET, new=FOUR),
    "recompute-block": case(1, {}, BLOCK, old=TWO, new=Split(reverse=True)),
    "packed-recompute-moe": case(1, {}, MOE, packed=True, new=BUDGET),
    "dp2": case(2, {}, old=BUDGET, new=FOUR, ddp=OVERLAP),
    "dp2-packed-zero": case(2, {}, UNIFORM, packed=True, old=TWO, new=BUDGET, ddp=ZERO),
    "ep2": case(2, {"expert": 2}, PARTS, old=TWO, new=BUDGET, **NAMED),
    "ep2-allgather-zero": case(2, {"expert": 2}, ALLGATHER, old=FIXED, new=Split(width=24), ddp=ZERO | OVERLAP),
    "tp2": case(2, {"tensor": 2}, old=FOUR, new=REVERSED),
    "tp2-packed-local": case(2, {"tensor": 2}, MOE, packed=True, old=BUDGET, delivery="local"),
    "tp2-ep2-etp1": case(2, {"tensor": 2, **EP2}, UNIFORM, packed=True, old=TWO, new=REVERSED, **NAMED),
    "cp2": case(2, {"context": 2}, BLOCK, old=FOUR, new=BUDGET),
    "cp2-packed-zero": case(2, {"context": 2}, packed=True, old=REVERSED, new=BUDGET, ddp=ZERO),
    "pp2": case(2, PP2, old=TWO, new=BUDGET, ddp=OVERLAP),
    "pp2-packed": case(2, PP2, BLOCK, packed=True, new=REVERSED),
    "pp2-vpp2": case(2, VPP, old=REVERSED, new=ONE),
    "pp2-vpp2-packed": case(2, VPP, UNIFORM, packed=True, old=FOUR, new=BUDGET),
    "tp2-ep2-etp2-zero": case(4, {"tensor": 2, "expert": 2}, PARTS, old=TWO, new=ONE, ddp=ZERO | OVERLAP),
    "tp2-pp2-ep2": case(4, {"tensor": 2, "pipeline": 2, **EP2}, MOE, old=BUDGET, new=TWO),
    "cp2-pp2-packed": case(4, {"context": 2, "pipeline": 2}, UNIFORM, packed=True, old=TWO, new=BUDGET, **NAMED),
    "tp2-cp2-ep2": case(4, {"tensor": 2, "context": 2, **EP2}, packed=True, old=FOUR, new=REVERSED),
    "cp2-ep4-allgather": case(4, {"context": 2, "expert": 4}, ALLGATHER, old=FIXED, new=FIXED),
    "pp2-vpp2-ep2": case(4, {**VPP, "expert": 2}, MOE, old=TWO, new=Split(reverse=True), **NAMED),
    "pp2-ep2-allgather": case(4, {"pipeline": 2, "expert": 2}, ALLGATHER | UNIFORM, old=FIXED, new=Split(width=24)),
    "tp2-cp2-pp2-ep2": case(8, {"tensor": 2, "context": 2, "pipeline": 2, **EP2}, BLOCK, packed=True, old=BUDGET, new=TWO),
    "tp2-pp2-vpp2-ep2-zero": case(8, {**VPP, "tensor": 2, "expert": 2}, old=TWO, new=Split(reverse=True), ddp=ZERO, **NAMED),
}
RECORDED: dict[str, Case] = {
    "tp2-cp2-ep2": case(4, {"tensor": 2, "context": 2, **EP2}, UNIFORM, packed=True, old=FOUR, new=REVERSED, routes="actor"),
    "pp2-vpp2-ep2": case(4, {**VPP, "expert": 2}, old=TWO, new=Split(reverse=True), routes="actor"),
}
QUICK = {"packed", "dp2", "ep2", "tp2", "cp2-packed-zero", "pp2-packed", "pp2-vpp2", "tp2-cp2-ep2", "pp2-vpp2-ep2"}
LARGE = {"tp2-cp2-pp2-ep2", "tp2-pp2-vpp2-ep2-zero"}
ROWS = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow if name in LARGE else pytest.mark.exhaustive)
    for name in CASES
]


def model_config() -> Any:
    """Qwen3-MoE: 4 MoE layers, 8 experts, top-2, hidden 32."""
    return tiny_config(
        "qwen3_moe",
        vocab_size=batch.VOCABULARY,
        hidden_size=32,
        head_dim=8,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
    )


def recomputes(case: Case) -> bool:
    """Whether routers run again in the backward pass."""
    return case.config.get("recompute_granularity") == "full" or "moe" in case.config.get("recompute_modules", ())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("qwen3_moe"), model_config())


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> Result:
    """One process, one unpadded sequence per micro-batch."""
    return pool(1).run(run_case, checkpoint, Case())[0]


def test_one_process_takes_the_routes(expected: Result) -> None:
    tables = {s: torch.from_numpy(batch.table(s, 4, 2, 8).experts.astype("int64")) for s in batch.LENGTHS}
    compare.assert_routes_were_taken(expected, tables, {layer: layer for layer in range(4)})
    compare.assert_every_route_replayed_once([expected], expected, recomputed=False)


@pytest.mark.parametrize("batched", [False, True])
def test_interleaved_pipeline_equals_plain_pipeline(checkpoint: Path, batched: bool) -> None:
    """gloo matches batched sends and receives by order alone: with two stages interleaved gradients would be wrong.

    All messages have one shape here, so that a wrong match is silent: only the numbers tell.
    """
    plain, interleaved = (
        pool(2).run(
            run_case,
            checkpoint,
            case(
                2,
                layout,
                {"variable_seq_lengths": False, "batch_p2p_comm": batched, "overlap_p2p_comm": not batched and layout == VPP},
                old=FIXED,
                new=FIXED,
            ),
        )
        for layout in (PP2, VPP)
    )
    first, second = plain[0].gradients, interleaved[0].gradients
    assert first is not None
    assert second is not None
    assert first.keys() == second.keys()
    assert max(compare.relative(second[name], gradient) for name, gradient in first.items()) < compare.GRADIENT
    assert abs(plain[0].loss - interleaved[0].loss) < LOGPROB
    for layer, (gradient, count) in (plain[0].predictor | plain[1].predictor).items():
        same, tokens = (interleaved[0].predictor | interleaved[1].predictor)[layer]
        assert count == tokens
        assert compare.relative(same, gradient) < compare.GRADIENT


@pytest.mark.parametrize("name", ROWS)
def test_numbers_of_one_process(name: str, checkpoint: Path, expected: Result) -> None:
    row = CASES[name]
    results = pool(row.processes).run(run_case, checkpoint, row)
    compare.assert_same_numbers(results, expected)
    compare.assert_every_route_replayed_once(results, expected, recomputed=recomputes(row))


@pytest.fixture(scope="module")
def recorded(checkpoint: Path) -> Result:
    """One process that replays what its own predicted log-prob pass recorded."""
    return pool(1).run(run_case, checkpoint, Case(routes="actor"))[0]


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", RECORDED)
def test_routes_that_the_actor_recorded(name: str, checkpoint: Path, recorded: Result) -> None:
    """They are chosen on the rank that computes a token and replayed on the one that trains on it, the same or another."""
    results = pool(RECORDED[name].processes).run(run_case, checkpoint, RECORDED[name])
    compare.assert_same_numbers(results, recorded)
    for result in results:
        assert result.counts[0] == (0, 0)
        assert result.counts[1][0] > 0
    trained = compare.selected_experts(results, training=True)
    assert trained == compare.selected_experts(results, training=False) == compare.selected_experts([recorded], training=True)
