"""The look-ahead in every kind of layout: the W_p of one process (I3), and a policy that it leaves alone, bit by bit (I2)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from torch import Tensor

from megatron_pr2 import host
from megatron_pr2.attach import attach
from megatron_pr2.config import PR2Config
from megatron_pr2.hf.bridge import load_model
from megatron_pr2.replay.session import ReplaySession
from tests.helpers.distributed import pool
from tests.helpers.loop import digest
from tests.host.models import make_checkpoint
from tests.parallel import compare
from tests.parallel.case import Case
from tests.parallel.replay import Run
from tests.parallel.test_matrix import CASES, model_config

# Of the largest entry of a layer's W_p: a regression on rounded inputs, whose matrix has a condition of some hundreds.
TOLERANCE = 2e-3


def look(
    path: Path, case: Case, dtype: torch.dtype = torch.float32, *, watch: bool | int = False, alone: bool = False, **settings: Any
) -> tuple[dict[int, Tensor], bool]:
    """W_p by layer after a mini-step and a look-ahead, and whether the policy is what it was before.

    Args:
        watch: whether the mini-step is watched; a number: on that rank alone.
        alone: only the first rank has micro-batches to look at.
    """
    host.init(**case.layout)
    sharded = case.ddp.get("use_distributed_optimizer", False)
    _, chunks = load_model(
        path,
        dtype=dtype,
        ddp_config={"use_distributed_optimizer": False, **case.ddp},
        extra_config={
            "finalize_model_grads_func": finalize_model_grads,
            "calculate_per_token_loss": True,
            "moe_aux_loss_coeff": 0.0,
            **case.config,
        },
    )
    # A large epsilon: the first step of Adam is the sign of a gradient otherwise, whose last bit depends on the layout.
    steps = OptimizerConfig(
        lr=3e-3, adam_eps=1e-2, weight_decay=0.0, clip_grad=0.0, bf16=dtype is torch.bfloat16, params_dtype=dtype,
        use_distributed_optimizer=sharded, **settings,
    )
    optimizer = get_megatron_optimizer(steps, chunks)
    if getattr(steps, "use_layer_wise_distributed_optimizer", False):  # not in Megatron-Core 0.16
        optimizer.allgather_params = optimizer.broadcast_params  # of parts of several sizes, which gloo does not gather
    config = PR2Config(predictor="lookahead", hold_back=False, max_missing_share=1.0, min_agreement=0.0)
    pr2 = attach(chunks, config, optimizer)
    run = Run(pr2, None, chunks, case, optimizer)
    run.begin_rollout()
    logprobs, _ = run.old_logprobs()
    run.training_pass(logprobs, watch=watch if isinstance(watch, bool) else dist.get_rank() == watch)
    assert optimizer.step()[0]
    pr2.step()
    items = [] if alone and dist.get_rank() else run.items("ahead", case.new)

    def policy() -> str:
        buffers = [buffer.grad_data for chunk in chunks for buffer in chunk.buffers]
        return digest([[chunk.state_dict() for chunk in chunks], optimizer.state_dict(), buffers, torch.get_rng_state()])

    def forward(session: ReplaySession) -> None:
        if items:
            run.schedule(session, items, lambda item, output_BS: (output_BS.sum(), item["mask"].sum().int(), {}), training=False)

    before = policy()
    pr2.look_ahead([item["micro_batch"] for item in items], forward)
    assert pr2.predictor is not None
    found = {site.hidden_layer: pr2.predictor.weight_LEH[site.local].clone() for site in pr2.sites}
    return found, policy() == before


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("qwen3_moe"), model_config())


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> dict[int, Tensor]:
    ((found, untouched),) = pool(1).run(look, checkpoint, Case())
    assert untouched
    assert len(found) == 4
    return found


QUICK = ["tp2", "cp2-packed-zero", "pp2-vpp2"]
MORE = ["packed", "dp2-packed-zero", "ep2", "tp2-cp2-ep2"]
ROWS = [*QUICK, *(pytest.param(name, marks=pytest.mark.exhaustive) for name in MORE)]


@pytest.mark.parametrize("name", ROWS)
def test_every_layout_finds_the_same(checkpoint: Path, expected: dict[int, Tensor], name: str) -> None:
    case = CASES[name]
    seen = set()
    for found, untouched in pool(case.processes).run(look, checkpoint, case):
        assert untouched
        for layer, w_EH in found.items():
            seen.add(layer)
            assert compare.relative(w_EH, expected[layer]) < TOLERANCE
    assert seen == set(expected)


@pytest.mark.parametrize("name", ["tp2", "pp2-vpp2", pytest.param("cp2-packed-zero", marks=pytest.mark.exhaustive)])
def test_every_layout_finds_the_same_of_a_watched_pass(checkpoint: Path, expected: dict[int, Tensor], name: str) -> None:
    """One forward after the update says roughly what two say of the next one, whose experts stay."""
    ((single, untouched),) = pool(1).run(look, checkpoint, Case(), watch=True)
    assert untouched
    for layer, w_EH in single.items():
        assert not torch.equal(w_EH, expected[layer])
        assert float(torch.cosine_similarity(w_EH.flatten(), expected[layer].flatten(), dim=0)) > 0.3
    case = CASES[name]
    for found, untouched in pool(case.processes).run(look, checkpoint, case, watch=True):
        assert untouched
        for layer, w_EH in found.items():
            assert compare.relative(w_EH, single[layer]) < TOLERANCE


@pytest.mark.parametrize(("watch", "alone"), [(False, True), (True, True), (0, False)])
def test_ranks_agree_on_what_was_watched(checkpoint: Path, watch: bool | int, alone: bool) -> None:
    """Also where some have nothing to look at, or did not watch: then all of them run two forwards."""
    (one, untouched), (other, also) = pool(2).run(look, checkpoint, Case(2), watch=watch, alone=alone)
    assert untouched
    assert also
    for layer, w_EH in one.items():
        assert w_EH.any()
        torch.testing.assert_close(other[layer], w_EH)
    if watch == 0 and not alone:
        for (found, _), (expected, _) in zip(
            pool(2).run(look, checkpoint, Case(2)), [(one, untouched), (other, also)], strict=True
        ):
            for layer, w_EH in found.items():
                torch.testing.assert_close(w_EH, expected[layer])


def test_bf16_looks_ahead_from_the_fp32_copies(checkpoint: Path, expected: dict[int, Tensor]) -> None:
    """Whole and sharded copies give the same; what bf16 weights and activations round away leaves the direction."""
    cases = [Case(2), Case(2, ddp={"use_distributed_optimizer": True})]
    whole, sharded = (pool(2).run(look, checkpoint, case, torch.bfloat16) for case in cases)
    for (one, untouched), (other, also) in zip(whole, sharded, strict=True):
        assert untouched
        assert also
        for layer, w_EH in one.items():
            assert compare.relative(other[layer], w_EH) < 0.05
            assert float(torch.cosine_similarity(w_EH.flatten(), expected[layer].flatten(), dim=0)) > 0.9


@pytest.mark.skipif(
    not hasattr(OptimizerConfig, "use_layer_wise_distributed_optimizer"), reason="this Megatron-Core has no layer-wise optimizer"
)
def test_muon_looks_ahead_layer_wise_as_whole(checkpoint: Path) -> None:
    """Each rank makes the next weights that its optimizer steps; they are those of an optimizer that steps all."""
    whole, layer_wise = (
        pool(2).run(look, checkpoint, Case(2), torch.bfloat16, optimizer="muon", use_layer_wise_distributed_optimizer=wise)
        for wise in (False, True)
    )
    for (one, untouched), (other, also) in zip(whole, layer_wise, strict=True):
        assert untouched
        assert also
        for layer, w_EH in one.items():
            assert w_EH.any()
            assert torch.equal(other[layer], w_EH)
