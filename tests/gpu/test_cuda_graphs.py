"""Recording and replaying through Megatron-Core's replay hook inside captured CUDA graphs, against an eager ReplaySession."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_pr2.attach import attach
from megatron_pr2.replay.router import PredictiveTopKRouter
from megatron_pr2.routes.scatter import slice_tables
from megatron_pr2.routes.table import RouteTable
from tests.gpu import toys
from tests.gpu.needs import needs
from tests.gpu.static_routes import StaticRoutes, captured
from tests.helpers import toy

pytestmark = [pytest.mark.gpu, needs()]

KINDS = ("softmax", "sigmoid-bias", "groups", "fp32-router")
LENGTHS = {0: 17, 1: 23}
MISSING = {3: [(0, 5)], 4: [(0, 11), (1, 2)]}  # by seed


def config_of(kind: str) -> Any:
    return toy.toy_config(num_layers=1, params_dtype=torch.bfloat16, **toy.ROUTERS[kind])


def tables_of(config: Any, seed: int) -> dict[int, RouteTable]:
    """Different routes and gaps per seed."""
    drawn = toy.random_tables({seed * 10 + i: n for i, n in LENGTHS.items()}, config)
    tables = {i: drawn[seed * 10 + i] for i in LENGTHS}
    for sequence, position in MISSING[seed]:
        tables[sequence].valid[position] = False
    return tables


def routes_of(tables: dict[int, RouteTable], batch: toy.Batch, config: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids [T, K] of the one layer, and rows [T] without a route."""
    grid = batch.micro_batch.grid
    ids_TLK = slice_tables(grid, tables, (0,), config.moe_router_topk, config.num_moe_experts, device).ids_TLK()
    sequence, position = grid.rows()
    valid = [s >= 0 and bool(tables[int(s)].valid[int(p)]) for s, p in zip(sequence, position, strict=True)]
    return ids_TLK[:, 0].long(), torch.from_numpy(~np.asarray(valid)).to(device)


def forward_backward(router: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Probabilities, routing map, gradients of the gate and of its input."""
    router.weight.grad = hidden.grad = None
    probs_TE, map_TE = router(hidden)
    toy.loss(probs_TE).backward()
    return probs_TE.detach(), map_TE, router.weight.grad, hidden.grad


def eager(kind: str, tables: dict[int, RouteTable], batch: toy.Batch, device: torch.device) -> tuple[Tensor, ...]:
    """What a ReplaySession gives, from a router with the same weights."""
    config = config_of(kind)
    model = toys.chunk(config, device, torch.bfloat16)
    pr2 = attach(model, toy.preset("r3", max_missing_share=1.0))
    pr2.begin_rollout(toy.sequences(LENGTHS, tables))
    hidden = batch.inputs_SBH.clone().requires_grad_(True)
    with pr2.actor_update([batch.micro_batch], 1) as session:
        session.begin(model, batch.micro_batch)
        found = forward_backward(toy.routers(model)[0], hidden)
        session.end(model, batch.micro_batch, hidden)
    return found


def static_router(kind: str, batch: toy.Batch, device: torch.device, *, record: bool) -> tuple[Any, StaticRoutes]:
    config = config_of(kind)
    model = toys.chunk(config, device, torch.bfloat16, router_class=PredictiveTopKRouter)
    (router,) = toy.routers(model)
    control = StaticRoutes(batch.micro_batch.grid.num_rows, config.moe_router_topk, record=record, device=device)
    router.set_control(control)
    return router, control


def check_replay(kind: str, device: torch.device) -> None:
    """One capture, launched with two sets of routes and two inputs: each time an eager session's bits."""
    config = config_of(kind)
    (batch,) = toys.batches(LENGTHS, 2, device, torch.bfloat16)
    router, control = static_router(kind, batch, device, record=False)
    hidden = batch.inputs_SBH.clone().requires_grad_(True)
    launch = captured(lambda: forward_backward(router, hidden), device)
    maps = []
    for seed, scale in ((3, 1.0), (4, 0.5), (3, 1.0)):
        tables, inputs_SBH = tables_of(config, seed), batch.inputs_SBH * scale
        with torch.no_grad():
            hidden.copy_(inputs_SBH)
        control.set(*routes_of(tables, batch, config, device))
        found = [each.clone() for each in launch()]
        wanted = eager(kind, tables, toy.Batch(batch.micro_batch, inputs_SBH), device)
        for name, a, b in zip(("probabilities", "routing map", "gate gradient", "input gradient"), found, wanted, strict=True):
            assert torch.equal(a, b), name
        assert found[2].abs().max() > 0
        maps.append(found[1])
    assert not torch.equal(maps[0], maps[1])
    assert torch.equal(maps[0], maps[2])


def check_record(kind: str, device: torch.device) -> None:
    """What is recorded is what each launch selected, and replaying it gives the live router's bits."""
    (batch,) = toys.batches(LENGTHS, 2, device, torch.bfloat16)
    router, control = static_router(kind, batch, device, record=True)
    hidden = batch.inputs_SBH.clone().requires_grad_(True)
    launch = captured(lambda: forward_backward(router, hidden), device)
    seen = []
    for scale in (1.0, -1.0):
        with torch.no_grad():
            hidden.copy_(batch.inputs_SBH * scale)
        live = [each.clone() for each in launch()]
        ids_TK = control.ids_TK.clone()
        assert torch.equal(torch.zeros_like(live[1]).scatter(1, ids_TK, True), live[1])
        seen.append(ids_TK)
        again, replaying = static_router(kind, batch, device, record=False)
        replaying.set(ids_TK, torch.zeros_like(replaying.missing_T))
        found = forward_backward(again, hidden.detach().clone().requires_grad_(True))
        assert all(torch.equal(a, b) for a, b in zip(live, found, strict=True))
    assert not torch.equal(*seen)


@pytest.mark.parametrize("kind", KINDS)
def test_replay_in_a_captured_graph(kind: str, device: torch.device) -> None:
    """Forward and backward, captured once; routes are copied into a static buffer between launches."""
    check_replay(kind, device)


@pytest.mark.parametrize("kind", KINDS)
def test_record_in_a_captured_graph(kind: str, device: torch.device) -> None:
    """Routes appear in a static buffer after each launch."""
    check_record(kind, device)
