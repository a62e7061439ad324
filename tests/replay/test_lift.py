"""Invariant I9: replayed routes that are the actor's own under theta_old have a lift of exactly 0, whatever the router is.

By definition the lift of r2 is 0: TopK(p_old) is replayed and TopK(p_old) is what replay without prediction would give. It says
whether the selection is repeated as it was made: with the expert bias, in the dtype and by the rule of the old-log-prob pass.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_pr2 import host
from megatron_pr2.attach import PR2, attach
from tests.helpers import toy
from tests.helpers.distributed import pool

pytestmark = pytest.mark.usefixtures("host_platform")

LENGTHS = {sequence: 31 + sequence for sequence in range(6)}
MINI_STEPS = 3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BIAS = 0.05  # 50 of Megatron-Core's updates
KINDS = {**toy.ROUTERS, "fp64-router": {"moe_router_dtype": "fp64"}}
CASES = [
    (kind, dtype, moving)
    for kind, settings in KINDS.items()
    for dtype in DTYPES
    for moving in (False, True)
    if not moving or settings.get("moe_router_enable_expert_bias")
]


def made(kind: str, dtype: torch.dtype, *, recompute: bool = False) -> tuple[toy.ToyChunk, list[toy.Batch]]:
    """A model in which two experts of each layer are nearly the same, so that rounding decides between them."""
    chunk = toy.ToyChunk(toy.toy_config(params_dtype=dtype, **KINDS[kind]), recompute=recompute).to(dtype)
    with torch.no_grad():
        for router in toy.routers(chunk):
            router.weight[1] = router.weight[0]
            router.weight[1, :4] *= 1.0 + torch.finfo(dtype).eps
    return chunk, [toy.Batch(b.micro_batch, b.inputs_SBH.to(dtype)) for b in toy.batches(LENGTHS, 2)]


def move_biases(chunk: toy.ToyChunk, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for router in toy.routers(chunk):
        router.expert_bias += BIAS * torch.randn(len(router.expert_bias), generator=generator).sign()


def begin(pr2: PR2, chunk: toy.ToyChunk, data: list[toy.Batch]) -> None:
    """A rollout batch; where its routes are an engine's, the engine is the actor itself."""
    tables = None
    if pr2.config.routes == "engine":
        with pr2.record([b.micro_batch for b in data]) as session:
            toy.run(session, chunk, data, backward=False)
        tables = pr2.recorded_tables(session, LENGTHS)
    pr2.begin_rollout(toy.sequences(LENGTHS, tables))


def train(pr2: PR2, chunk: toy.ToyChunk, data: list[toy.Batch], *, moving: bool) -> list[dict[str, Any]]:
    """What step() reports of a rollout batch's mini-steps; weights, and with `moving` expert biases, change between them."""
    optimizer = torch.optim.Adam(chunk.parameters(), lr=0.02)
    toy.old_logprobs(pr2, chunk, data)
    reports = []
    for mini_step in range(1, MINI_STEPS + 1):
        if moving:  # as Megatron-Core's finalize_model_grads may have done since the old-log-prob pass
            move_biases(chunk, mini_step)
        toy.update(pr2, chunk, data, mini_step)
        optimizer.step()
        optimizer.zero_grad()
        reports.append(pr2.step(1e-3))
    return reports


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(("kind", "dtype", "moving"), CASES)
@pytest.mark.parametrize("preset", ["r2", "r3"])
def test_i9_routes_of_the_actor_itself_have_no_lift(preset: str, kind: str, dtype: str, moving: bool, recompute: bool) -> None:
    chunk, data = made(kind, DTYPES[dtype], recompute=recompute)
    pr2 = attach(chunk, toy.preset(preset, sample_fraction=1.0))
    begin(pr2, chunk, data)
    drift = [report["drift"] for report in train(pr2, chunk, data, moving=moving)]
    assert [each["lift"] for each in drift] == [[0.0] * toy.LAYERS] * MINI_STEPS
    assert all(each["agreement"] == each["frozen_agreement"] for each in drift)
    # Routes of a policy that did not move prove nothing.
    assert moving == any(share < 1.0 for share in drift[0]["agreement"])
    assert all(share < 1.0 for share in drift[-1]["agreement"])


@pytest.mark.parametrize("routes", ["engine", "actor"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_prediction_of_nothing_gains_nothing(kind: str, dtype: str, routes: str) -> None:
    """Every share of W_p = 0 is judged by the selection of the old-log-prob pass as well."""
    chunk, data = made(kind, DTYPES[dtype])
    settings = {"alpha": 0.0, "hold_back": True, "held_out_share": 0.5, "sample_fraction": 1.0}
    pr2 = attach(chunk, toy.preset("pr2", routes=routes, **settings))
    begin(pr2, chunk, data)
    moving = toy.routers(chunk)[0].expert_bias is not None
    assert all(report["drift"]["lift"] == [0.0] * toy.LAYERS for report in train(pr2, chunk, data, moving=moving))
    assert pr2.measurement.hold_back is not None
    kept_LJ = pr2.measurement.hold_back.state()[:, 4]
    assert (kept_LJ > 0).all()
    assert torch.equal(kept_LJ, kept_LJ[:, :1].expand_as(kept_LJ))


def resumed_job(directory: Path) -> list[list[float]]:
    """Lifts of two mini-steps, the second one after a restart: a batch is taken up with its expert biases."""
    host.init()
    lifts = []
    for mini_step in (1, 2):
        chunk, data = made("sigmoid-bias", torch.float32)
        pr2 = attach(chunk, toy.preset("r2", sample_fraction=1.0))
        if mini_step == 1:
            begin(pr2, chunk, data)
            toy.old_logprobs(pr2, chunk, data)
        move_biases(chunk, mini_step)
        if mini_step == 2:
            pr2.load(directory, sequences=list(LENGTHS))
        toy.update(pr2, chunk, data, mini_step)
        lifts.append(pr2.step(1e-3)["drift"]["lift"])
        if mini_step == 1:
            pr2.save(directory, rollout=True)
    return lifts


def test_a_rollout_batch_is_taken_up_with_its_expert_biases(tmp_path: Path) -> None:
    assert pool(1).run(resumed_job, tmp_path) == [[[0.0] * toy.LAYERS] * 2]
