# ruff: noqa: PT012 (what fails is a whole pass inside of a session)
"""Invariant I4: every valid (token, layer) route is replayed exactly once forward and at most once in recomputation.

Proved by what the routers really selected, which hooks on the routers collect.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_pr2.attach import PR2, attach
from megatron_pr2.config import PR2Config
from megatron_pr2.errors import AttachError, ReplayError
from megatron_pr2.parallel.grid import padded
from megatron_pr2.replay.micro_batch import MicroBatch
from megatron_pr2.replay.router import select_experts
from megatron_pr2.replay.session import ReplaySession
from megatron_pr2.routes.scatter import slice_tables
from megatron_pr2.routes.table import RouteTable
from tests.helpers import toy
from tests.helpers.distributed import pool
from tests.helpers.rounding import assert_near

pytestmark = pytest.mark.usefixtures("host_platform")

LENGTHS = {0: 7, 1: 9, 2: 5, 3: 6}
MISSING = [(0, 2), (0, 3), (1, 0), (3, 4)]
R3 = toy.preset("r3", max_missing_share=1.0)
MODELS: dict[str, dict[str, Any]] = {
    **{kind: toy.ROUTERS[kind] for kind in ("softmax", "groups", "top-1")},
    "uint16": {"num_moe_experts": 300, "moe_router_topk": 4},
}


def expected_map(call: toy.Call, router: Any, micro_batch: MicroBatch, tables: dict[int, RouteTable], column: int) -> Tensor:
    """[T, E]: the table's experts where it has a valid row, the live top-k elsewhere (padding included)."""
    ids = select_experts(router, call.hidden_TH.float() @ router.weight.detach().float().t())
    for row, (sequence, position) in enumerate(zip(*micro_batch.grid.rows(), strict=True)):
        if sequence >= 0 and tables[sequence].valid[position]:
            ids[row] = torch.from_numpy(tables[sequence].experts[position, column].astype(np.int64))
    return torch.zeros_like(call.map_TE).scatter(1, ids, True)


def assert_replayed(
    calls: Sequence[toy.Call],
    model: torch.nn.Module,
    forward: Sequence[MicroBatch],
    backward: Sequence[MicroBatch],
    tables: dict[int, RouteTable],
    columns: dict[int, int],
) -> None:
    """Every call selected what its micro-batch's table says; micro-batches are given in the order of their passes."""
    routers = {router.layer_number - 1: router for router in toy.routers(model)}
    wanted = {(layer, False): len(forward) for layer in routers} | {(layer, True): len(backward) for layer in routers}
    assert Counter((c.layer, c.recomputed) for c in calls) == Counter({k: v for k, v in wanted.items() if v})
    for call in calls:
        micro_batch = (backward if call.recomputed else forward)[call.number]
        expected = expected_map(call, routers[call.layer], micro_batch, tables, columns[call.layer])
        assert torch.equal(call.map_TE, expected)
        assert (call.map_TE.sum(1) == routers[call.layer].topk).all()


def prepared(recompute: bool = False, **changes: Any) -> tuple[toy.ToyChunk, PR2, list[toy.Batch], dict[int, RouteTable]]:
    config = toy.toy_config(**changes)
    chunk = toy.ToyChunk(config, recompute=recompute)
    pr2 = attach(chunk, R3)
    tables = toy.random_tables(LENGTHS, config, MISSING)
    pr2.begin_rollout(toy.sequences(LENGTHS, tables))
    return chunk, pr2, toy.batches(LENGTHS, 2), tables


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_interleaved_micro_batches_keep_their_routes(kind: str, recompute: bool, order: tuple[int, int]) -> None:
    """Forward A, forward B, then both backwards in either order."""
    chunk, pr2, data, tables = prepared(recompute, **MODELS[kind])
    micro_batches = [b.micro_batch for b in data]
    with toy.observed(chunk) as calls, pr2.actor_update(micro_batches, 1) as session:
        losses = []
        for batch in data:
            session.begin(chunk, batch.micro_batch)
            output = chunk(batch.inputs_SBH.clone().requires_grad_())
            session.end(chunk, batch.micro_batch, output)
            losses.append(toy.loss(output))
        for index in order:
            losses[index].backward()
    backward = [micro_batches[i] for i in order] if recompute else []
    assert_replayed(calls, chunk, micro_batches, backward, tables, {0: 0, 1: 1})
    valid = sum(int(t.valid.sum()) for t in tables.values())
    assert session.replayed_rows == valid
    assert session.missing_rows == sum(b.grid.num_rows for b in micro_batches) - valid


def test_recomputation_changes_no_gradient() -> None:
    gradients = []
    for recompute in (False, True):
        chunk, pr2, data, _ = prepared(recompute)
        toy.update(pr2, chunk, data, 1)
        gradients.append([p.grad for p in chunk.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("recompute", [False, True])
def test_virtual_pipeline_chunks_have_cursors_of_their_own(recompute: bool) -> None:
    """Chunk 0 runs ahead of chunk 1 in forward, and the other way round in backward."""
    config = toy.toy_config()
    chunks = [toy.ToyChunk(config, recompute=recompute, layers=[number]) for number in (1, 2)]
    pr2 = attach(chunks, R3)
    tables = toy.random_tables(LENGTHS, config, MISSING)
    pr2.begin_rollout(toy.sequences(LENGTHS, tables))
    data = toy.batches(LENGTHS, 2)
    micro_batches = [b.micro_batch for b in data]
    model = torch.nn.ModuleList(chunks)
    with toy.observed(model) as calls, pr2.actor_update(micro_batches, 1) as session:
        handed: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        for stage in (0, 1):
            for index, batch in enumerate(data):
                x = batch.inputs_SBH if stage == 0 else handed[0, index][1].detach()
                x = x.clone().requires_grad_()
                session.begin(chunks[stage], batch.micro_batch)
                output = chunks[stage](x)
                session.end(chunks[stage], batch.micro_batch, output)
                handed[stage, index] = (x, output)
        for index in (0, 1):
            toy.loss(handed[1, index][1]).backward()
        for index in (0, 1):
            handed[0, index][1].backward(handed[1, index][0].grad)
    assert_replayed(calls, model, micro_batches, micro_batches if recompute else [], tables, {0: 0, 1: 1})


def test_dense_layers_shift_no_column() -> None:
    """Dense first layer: decoder layer 1 is column 0 of the tables."""
    config = toy.toy_config(num_layers=4, moe_layer_freq=[0, 1, 0, 1])
    chunk = toy.ToyChunk(config)
    pr2 = attach(chunk, R3)
    tables = toy.random_tables(LENGTHS, config)
    pr2.begin_rollout(toy.sequences(LENGTHS, tables))
    data = toy.batches(LENGTHS, 2)
    with toy.observed(chunk) as calls:
        toy.update(pr2, chunk, data, 1)
    assert_replayed(calls, chunk, [b.micro_batch for b in data], [], tables, {1: 0, 3: 1})


def test_the_old_logprob_pass_replays_too_and_nothing_outside_a_session_does() -> None:
    chunk, pr2, data, tables = prepared()
    live = [chunk(b.inputs_SBH) for b in data]
    with toy.observed(chunk) as calls:
        replayed = toy.old_logprobs(pr2, chunk, data)
    assert_replayed(calls, chunk, [b.micro_batch for b in data], [], tables, {0: 0, 1: 1})
    assert not any(torch.equal(a, b) for a, b in zip(live, replayed, strict=True))
    # A reference, critic or evaluation pass.
    assert all(torch.equal(a, chunk(b.inputs_SBH)) for a, b in zip(live, data, strict=True))


@pytest.mark.parametrize("experts", [8, 300])
def test_the_actor_records_what_it_took_and_replays_it_after_an_update(experts: int) -> None:
    config = toy.toy_config(num_moe_experts=experts)
    chunk = toy.ToyChunk(config)
    pr2 = attach(chunk, PR2Config.preset("r2"))
    pr2.begin_rollout(toy.sequences(LENGTHS, None))
    with toy.observed(chunk) as recorded:
        toy.old_logprobs(pr2, chunk, toy.batches(LENGTHS, 2))
    toy.drift(chunk, 0.3)
    with toy.observed(chunk) as replayed:
        toy.update(pr2, chunk, toy.batches(LENGTHS, 2), 1)
    data = toy.batches(LENGTHS, 2)
    for before, after in zip(recorded, replayed, strict=True):
        rows = torch.from_numpy(data[before.number].micro_batch.grid.rows()[0] >= 0)
        router = toy.routers(chunk)[before.layer]
        live = select_experts(router, after.hidden_TH @ router.weight.t())
        assert torch.equal(before.map_TE[rows], after.map_TE[rows])
        assert not torch.equal(torch.zeros_like(after.map_TE).scatter(1, live, True)[rows], after.map_TE[rows])


def recomputed_with_other_gates(session: ReplaySession, chunk: toy.ToyChunk, batch: toy.Batch) -> dict[tuple[int, bool], Tensor]:
    """Forward and backward, between which the gates move by far more than kernels differ; the routing maps that were used."""
    with toy.observed(chunk) as calls:
        session.begin(chunk, batch.micro_batch)
        output = chunk(batch.inputs_SBH.clone().requires_grad_())
        session.end(chunk, batch.micro_batch, output)
        toy.drift(chunk, 0.5)
        toy.loss(output).backward()
    maps = {(c.layer, c.recomputed): c.map_TE for c in calls}
    assert all(torch.equal(maps[layer, False], maps[layer, True]) for layer in (0, 1))
    return maps


@pytest.mark.parametrize("preset", ["grpo", "r2", "r3"])
@pytest.mark.parametrize("kind", ["softmax", "groups"])
def test_what_the_router_chose_itself_is_repeated_in_recomputation(kind: str, preset: str) -> None:
    """Every row of live routing, and of replay the rows without a route: padding, last tokens, invalid ids."""
    config = toy.toy_config(**toy.ROUTERS[kind])
    chunk = toy.ToyChunk(config, recompute=True)
    pr2 = attach(chunk, toy.preset(preset, max_missing_share=1.0))
    pr2.begin_rollout(toy.sequences(LENGTHS, toy.random_tables(LENGTHS, config, MISSING) if preset == "r3" else None))
    batch = toy.batches(LENGTHS, 4)[0]
    toy.old_logprobs(pr2, chunk, [batch])
    with pr2.actor_update([batch.micro_batch], 1) as session:
        recomputed_with_other_gates(session, chunk, batch)
        assert not any(bound.own for bound in session._bound.values())  # freed as soon as it is used


def test_recorded_selections_are_repeated_in_recomputation() -> None:
    chunk = toy.ToyChunk(toy.toy_config(), recompute=True)
    pr2 = attach(chunk, R3)
    data = toy.batches(LENGTHS, 4)
    with pr2.record([data[0].micro_batch]) as session:
        maps = recomputed_with_other_gates(session, chunk, data[0])
    tables = pr2.recorded_tables(session, LENGTHS)
    sequence, position = data[0].micro_batch.grid.rows()
    for row in np.nonzero(sequence >= 0)[0]:
        taken = torch.from_numpy(tables[sequence[row]].experts[position[row], 1].astype(np.int64))
        assert sorted(taken.tolist()) == maps[1, False][row].nonzero()[:, 0].tolist()


def test_the_forward_step_wrapper_binds_what_the_iterator_yields() -> None:
    chunk, pr2, data, tables = prepared(recompute=True)

    def forward_step(iterator: Iterator[dict[str, Any]], model: torch.nn.Module) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        return model(next(iterator)["inputs"].requires_grad_()), toy.loss

    items = iter([{"inputs": b.inputs_SBH.clone(), "micro_batch": b.micro_batch} for b in data])
    micro_batches = [b.micro_batch for b in data]
    with toy.observed(chunk) as calls, pr2.actor_update(micro_batches, 1) as session:
        wrapped = session.forward_step(forward_step)
        for _ in data:
            output, loss = wrapped(items, chunk)
            loss(output).backward()
    assert_replayed(calls, chunk, micro_batches, micro_batches, tables, {0: 0, 1: 1})


def test_a_backward_inside_of_another_forward_finds_its_own_routes() -> None:
    """Combined 1F1B: micro-batch A is recomputed while B is between its two layers."""
    chunk, pr2, data, tables = prepared(recompute=True)
    micro_batches = [b.micro_batch for b in data]
    losses: list[Tensor] = []
    handles: list[Any] = []

    def backward_of_a(*_: Any) -> None:
        handles.pop().remove()
        losses[0].backward()

    with toy.observed(chunk) as calls, pr2.actor_update(micro_batches, 1) as session:
        for index, batch in enumerate(data):
            session.begin(chunk, batch.micro_batch)
            if index == 1:
                handles.append(chunk.decoder.layers[0].register_forward_hook(backward_of_a))
            output = chunk(batch.inputs_SBH.clone().requires_grad_())
            session.end(chunk, batch.micro_batch, output)
            losses.append(toy.loss(output))
        losses[1].backward()
    order = [(c.layer, c.recomputed, c.number) for c in calls]
    assert order.index((0, False, 1)) < order.index((0, True, 0)) < order.index((1, False, 1))
    assert_replayed(calls, chunk, micro_batches, micro_batches, tables, {0: 0, 1: 1})


RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "moe": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
}


def gpt_job(path: Path) -> dict[str, list[np.ndarray]]:
    """Forward A, forward B, backward A, backward B on a GPTModel under expert parallelism, for every kind of recomputation."""
    from megatron_pr2 import host
    from megatron_pr2.hf.bridge import load_model

    host.init(expert=2)
    rank = torch.distributed.get_rank()
    # Different tokens on the two ranks.
    lengths = {10 * rank + i: n + rank for i, n in enumerate((7, 9, 5, 6))}
    missing = [(10 * rank, 2), (10 * rank + 1, 0)]
    gradients = {}
    for name, extra in RECOMPUTE.items():
        _, chunks = load_model(path, dtype=torch.float32, wrap_with_ddp=False, extra_config=extra)
        model = chunks[0].train()
        pr2 = attach(chunks, R3)
        tables = toy.random_tables(lengths, model.config, missing)
        pr2.begin_rollout(toy.sequences(lengths, tables))
        micro_batches = [b.micro_batch for b in toy.batches(lengths, 2)]
        with toy.observed(model) as calls, pr2.actor_update(micro_batches, 1) as session:
            losses = []
            for micro_batch in micro_batches:
                tokens = torch.from_numpy((micro_batch.grid.sequence * 31 + micro_batch.grid.position * 7) % 250).t()
                session.begin(model, micro_batch)
                output = model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)
                session.end(model, micro_batch, output)
                losses.append(toy.loss(output.float()))
            # What recomputation is going to ask for, and nothing else; gone when it has.
            kept = [len(bound.own) for bound in session._bound.values()]
            assert kept == [0 if name == "none" else len(pr2.sites)] * len(micro_batches)
            for loss in losses:
                loss.backward()
            assert not any(bound.own for bound in session._bound.values())
        assert_replayed(calls, model, micro_batches, [] if name == "none" else micro_batches, tables, {0: 0, 1: 1})
        gradients[name] = [p.grad.numpy() for p in model.parameters()]
    return gradients


def test_a_gpt_model_replays_under_every_recomputation(tiny_checkpoint: Path) -> None:
    for gradients in pool(2).run(gpt_job, tiny_checkpoint):
        for name in ("full", "moe"):
            for plain, recomputed in zip(gradients["none"], gradients[name], strict=True):
                assert_near(torch.from_numpy(recomputed), torch.from_numpy(plain), 64)


# ---- misuse ----------------------------------------------------------------------------------------------------------


def released(chunk: torch.nn.Module) -> bool:
    return all(router.router_replay is None and router._control is None for router in toy.routers(chunk))


@pytest.mark.parametrize("where", ["enter", "forward", "backward"])
def test_an_exception_releases_the_routers_and_is_not_replaced(where: str) -> None:
    chunk, pr2, data, tables = prepared(recompute=True)
    micro_batches = [b.micro_batch for b in data]
    if where == "enter":
        bad = MicroBatch("bad", padded([99], [3], 3))
        with pytest.raises(ReplayError, match="sequence 99 has no routes"), pr2.actor_update([*micro_batches, bad], 1):
            pass
    else:
        with pytest.raises(ZeroDivisionError), pr2.actor_update(micro_batches, 1) as session:
            session.begin(chunk, micro_batches[0])
            output = chunk(data[0].inputs_SBH.clone().requires_grad_())
            session.end(chunk, micro_batches[0], output)
            if where == "backward":
                output.register_hook(lambda _: 1 / 0)
                output.sum().backward()
            raise ZeroDivisionError
    assert released(chunk)
    with toy.observed(chunk) as calls:
        toy.update(pr2, chunk, data, 1)
    assert_replayed(calls, chunk, micro_batches, micro_batches, tables, {0: 0, 1: 1})


def test_a_failed_pass_leaves_nothing_behind() -> None:
    """Its predictor gradient and metrics belong to no mini-step."""
    config = toy.toy_config()
    reports = []
    for fails in (False, True):
        chunk = toy.ToyChunk(config)
        pr2 = attach(chunk, toy.preset("pr2", sample_fraction=1.0))
        pr2.begin_rollout(toy.sequences(LENGTHS, toy.random_tables(LENGTHS, config)))
        data = toy.batches(LENGTHS, 2)
        toy.old_logprobs(pr2, chunk, data)
        toy.drift(chunk)
        if fails:
            with pytest.raises(ZeroDivisionError), pr2.actor_update([b.micro_batch for b in data], 2) as session:
                toy.run(session, chunk, data)
                raise ZeroDivisionError
        toy.update(pr2, chunk, data, 2)
        reports.append(pr2.step(0.1))
    assert reports[0] == reports[1]


def test_a_forward_that_was_not_announced_is_refused_where_others_were() -> None:
    chunk, pr2, data, _ = prepared()
    with (
        pytest.raises(ReplayError, match="without a bound micro-batch"),
        pr2.actor_update([b.micro_batch for b in data], 1) as session,
    ):
        session.begin(chunk, data[0].micro_batch)
        session.end(chunk, data[0].micro_batch, chunk(data[0].inputs_SBH))
        chunk(data[1].inputs_SBH)


@pytest.mark.parametrize(
    ("passes", "times"),
    [([0], "routed 0 times forward"), ([0, 1, 1], "routed 2 times forward")],
)
def test_micro_batches_must_run_exactly_once(passes: list[int], times: str) -> None:
    chunk, pr2, data, _ = prepared()
    with (
        pytest.raises(ReplayError, match=times),
        pr2.actor_update([b.micro_batch for b in data], 1) as session,
    ):
        toy.run(session, chunk, [data[i] for i in passes])
    assert released(chunk)


def test_a_second_backward_is_refused() -> None:
    chunk, pr2, data, _ = prepared(recompute=True)
    with (
        pytest.raises(ReplayError, match="2 times in recomputation"),
        pr2.actor_update([data[0].micro_batch], 1) as session,
    ):
        session.begin(chunk, data[0].micro_batch)
        output = chunk(data[0].inputs_SBH.clone().requires_grad_())
        session.end(chunk, data[0].micro_batch, output)
        toy.loss(output).backward(retain_graph=True)
        toy.loss(output).backward()


def test_unknown_micro_batches_chunks_modes_and_mini_steps_are_refused() -> None:
    chunk, pr2, data, _ = prepared()
    other = toy.ToyChunk(toy.toy_config())
    with pr2.actor_update([], 1) as session, pytest.raises(ReplayError, match="not part of this pass"):
        session.begin(chunk, data[0].micro_batch)
    with pytest.raises(ReplayError, match="not one of the model chunks"), pr2.actor_update([data[0].micro_batch], 1) as session:
        session.begin(other, data[0].micro_batch)
    with pytest.raises(ReplayError, match="same key"), pr2.record([data[0].micro_batch] * 2):
        pass
    with pytest.raises(ReplayError, match="mini-steps count from 1"), pr2.actor_update([], 0):
        pass
    with pytest.raises(ReplayError, match="expected one of live, record, replay"):
        ReplaySession([], [], [], mode="predict")
    assert released(chunk)


def test_another_number_of_rows_is_refused() -> None:
    chunk, pr2, data, _ = prepared()
    with (
        pytest.raises(ReplayError, match=r"router sees 20 rows, the micro-batch's grid has 22 on this rank"),
        pr2.actor_update([data[0].micro_batch], 1) as session,
    ):
        session.begin(chunk, data[0].micro_batch)
        chunk(data[0].inputs_SBH[:-1])


def test_a_forward_step_that_takes_no_data_is_refused() -> None:
    chunk, pr2, data, _ = prepared()
    with pytest.raises(ReplayError, match="took nothing"), pr2.actor_update([data[0].micro_batch], 1) as session:
        session.forward_step(lambda iterator, model: (torch.zeros(1), toy.loss))(iter([]), chunk)


def test_recorded_tables_of_an_incomplete_pass_are_refused() -> None:
    _, pr2, data, _ = prepared()
    session = ReplaySession(pr2.sites, [], [data[0].micro_batch], mode="record")
    with pytest.raises(ReplayError, match="only 0 layers were recorded"), session:
        session.recorded_tables(LENGTHS, 2, toy.EXPERTS)


def test_tables_that_are_too_short_are_refused() -> None:
    tables = toy.random_tables({0: 4}, toy.toy_config())
    where = toy.TOPK, toy.EXPERTS, torch.device("cpu")
    with pytest.raises(ReplayError, match="position 5 is outside its route table of 4 tokens"):
        slice_tables(padded([0], [6], 6), tables, [0, 1], *where)
    ids = slice_tables(padded([0], [4], 6), tables, [1], *where).ids_TLK()
    assert ids.shape == (6, 1, toy.TOPK)
    assert ids[:4, 0].tolist() == tables[0].experts[:, 1].tolist()


def test_a_recomputing_backward_after_the_session_is_refused() -> None:
    """The routers are released by then: recomputation would route live and silently contradict the forward pass."""
    chunk = toy.ToyChunk(toy.toy_config(), recompute=True)
    chunk.config.recompute_granularity = "full"
    pr2 = attach(chunk, toy.preset("r3"))
    micro_batch = MicroBatch(0, padded([0], [4], 4))
    with pr2.record([micro_batch]) as session:
        session.begin(chunk, micro_batch)
        output = chunk(torch.randn(4, 1, chunk.config.hidden_size, requires_grad=True))
        session.end(chunk, micro_batch, output)
    with pytest.raises(ReplayError, match="after the replay session has ended"):
        output.sum().backward()


def test_token_dropping_is_refused() -> None:
    """Capacity limits leave replayed rows with fewer than k experts."""
    chunk = toy.ToyChunk(toy.toy_config())
    chunk.config.moe_expert_capacity_factor = 1.0
    with pytest.raises(AttachError, match="moe_expert_capacity_factor"):
        attach(chunk, toy.preset("r3"))


@pytest.mark.parametrize("drift", [True, False])
def test_routes_on_other_tokens_rows_are_noticed(drift: bool) -> None:
    """The number of rows is right, their content is not: only the router can tell."""
    config = toy.toy_config(num_moe_experts=32)
    chunk = toy.ToyChunk(config)
    lengths = {0: 40, 1: 40}
    data = toy.batches(lengths, 1)
    recorder = attach(chunk, PR2Config.preset("r2"))
    with recorder.record([b.micro_batch for b in data]) as session:
        toy.run(session, chunk, data, backward=False)
    tables = recorder.recorded_tables(session, lengths)
    recorder.detach()
    pr2 = attach(chunk, PR2Config.preset("r3", sample_fraction=1.0, drift=drift))
    pr2.begin_rollout(toy.sequences(lengths, tables))
    toy.old_logprobs(pr2, chunk, data)
    assert pr2.engine_agreement == 1.0
    swapped = [
        toy.Batch(MicroBatch(b.micro_batch.key, other.micro_batch.grid), b.inputs_SBH)
        for b, other in zip(data, data[::-1], strict=True)
    ]
    pr2.begin_rollout(toy.sequences(lengths, tables))
    with pytest.raises(ReplayError, match=r"actor's routers choose .* only \d\.\d% in layer 1 .*routes agree in 6\.2%"):
        toy.old_logprobs(pr2, chunk, swapped)
    assert pr2.engine_agreement < 0.2


def test_ranks_without_a_data_iterator_run_in_order() -> None:
    """Megatron gives None to tensor-parallel ranks that are sent their batch, and to inner pipeline stages."""
    chunk, pr2, data, tables = prepared()
    batches = iter(data)

    def forward_step(iterator: Any, model: torch.nn.Module) -> Any:
        assert iterator is None
        return model(next(batches).inputs_SBH), toy.loss

    with toy.observed(chunk) as calls, pr2.actor_update([b.micro_batch for b in data], 1) as session:
        wrapped = session.forward_step(forward_step)
        for _ in data:
            wrapped(None, chunk)
    assert_own_routes(calls, data, tables)


def assert_own_routes(calls: list[toy.Call], data: list[toy.Batch], tables: dict[int, RouteTable]) -> None:
    """Every forward took the routes of the micro-batch that it ran."""
    assert {call.number for call in calls} == set(range(len(data)))
    for call in calls:
        for row, (sid, position) in enumerate(zip(*data[call.number].micro_batch.grid.rows(), strict=True)):
            if sid >= 0 and tables[int(sid)].valid[position]:
                chosen = call.map_TE[row].nonzero().flatten().tolist()
                assert chosen == sorted(tables[int(sid)].experts[position, call.layer].tolist())


@pytest.mark.parametrize("recompute", [False, True])
def test_unannounced_forwards_run_in_order(recompute: bool) -> None:
    """A pipeline's own schedule inside the session, with nothing wrapped: the same numbers as with everything announced."""
    gradients = []
    for announced in (True, False):
        chunk, pr2, data, tables = prepared(recompute)
        with toy.observed(chunk) as calls, pr2.actor_update([b.micro_batch for b in data], 1) as session:
            outputs = []
            for b in data:
                if announced:
                    session.begin(chunk, b.micro_batch)
                outputs.append(chunk(b.inputs_SBH.clone().requires_grad_()))
                if announced:
                    session.end(chunk, b.micro_batch, outputs[-1])
            for output in reversed(outputs):  # as late as a schedule may
                toy.loss(output).backward()
        assert_own_routes(calls[: len(data) * toy.LAYERS], data, tables)
        gradients.append([p.grad.clone() for p in chunk.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("forwards", ["too many", "too few", "another model's"])
def test_forwards_in_order_are_counted(forwards: str) -> None:
    chunk, pr2, data, _ = prepared()
    messages = {
        "too many": f"chunk 0 runs more than the {len(data)} micro-batches of this pass",
        "too few": "routed 0 times forward",
        "another model's": "routed 0 times forward",
    }
    run = {"too many": [*data, data[0]], "too few": data[:-1], "another model's": data}[forwards]
    model = toy.ToyChunk(toy.toy_config()) if forwards == "another model's" else chunk
    with pytest.raises(ReplayError, match=messages[forwards]), pr2.actor_update([b.micro_batch for b in data], 1):
        for b in run:
            model(b.inputs_SBH)
    assert released(chunk)
    # Nothing is left on the model: a forward outside is the router's own.
    assert not chunk._forward_hooks
    assert not chunk._forward_pre_hooks
    chunk(data[0].inputs_SBH)


@pytest.mark.parametrize("wrap", [lambda out: {"logits": out}, lambda out: (None, [out])], ids=["mapping", "nested tuple"])
def test_outputs_other_than_a_tensor_reach_their_recomputation(wrap: Callable[[Tensor], Any]) -> None:
    class Wrapping(toy.ToyChunk):
        def forward(self, h_SBH: Tensor) -> Any:
            return wrap(super().forward(h_SBH))

    lengths = {0: 9, 1: 5}
    settings = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    chunk, data = Wrapping(toy.toy_config(**settings), recompute=True), toy.batches(lengths, 1)
    pr2 = attach(chunk, toy.preset("r3"))
    pr2.begin_rollout(toy.sequences(lengths, toy.random_tables(lengths, chunk.config)))
    with pr2.actor_update([b.micro_batch for b in data], 1):
        outputs = [chunk(b.inputs_SBH.clone().requires_grad_()) for b in data]
        for output in outputs:
            tensor = output["logits"] if isinstance(output, dict) else output[1][0]
            toy.loss(tensor).backward()


def test_a_pass_inside_another_is_refused() -> None:
    """It would release the routers, and what the outer one recomputes later would be routed live without a word."""
    chunk, pr2, data, _ = prepared()
    micro_batches = [b.micro_batch for b in data]
    for name, inner in (
        ("replay", lambda: pr2.replay(micro_batches)),
        ("old_logprobs", lambda: pr2.old_logprobs(micro_batches)),
        ("actor_update", lambda: pr2.actor_update(micro_batches, 2)),
        ("record", lambda: pr2.record(micro_batches)),
        ("step", lambda: pr2.step(0.1)),
        ("begin_rollout", lambda: pr2.begin_rollout([])),
        ("end_rollout", pr2.end_rollout),
        ("load", lambda: pr2.load("nowhere")),
        ("detach", pr2.detach),
    ):
        for outer in (lambda: pr2.actor_update(micro_batches, 1), lambda: pr2.record(micro_batches)):
            with outer() as session:
                with pytest.raises(ReplayError, match=f"{name}: another pass is open"), inner():
                    pass
                toy.run(session, chunk, data)  # the outer one is as it was
    assert released(chunk)
    pr2.detach()


def test_replaying_under_other_weights_keeps_and_learns_nothing() -> None:
    """A proximal policy's log-probs: the routes of the rollout, and no trace of the pass."""
    reports = []
    for proximal in (False, True):
        chunk = toy.ToyChunk(toy.toy_config())
        pr2, data, tables = attach(chunk, toy.preset("pr2")), toy.batches(LENGTHS, 2), toy.random_tables(LENGTHS, chunk.config)
        pr2.begin_rollout(toy.sequences(LENGTHS, tables))
        toy.old_logprobs(pr2, chunk, data)
        if proximal:
            kept = {name: value.clone() for name, value in chunk.state_dict().items()}
            toy.drift(chunk, seed=3)
            with toy.observed(chunk) as calls, pr2.replay([b.micro_batch for b in data]), torch.no_grad():
                for b in data:
                    chunk(b.inputs_SBH)
            assert_own_routes(calls, data, tables)
            chunk.load_state_dict(kept)
        toy.drift(chunk)
        toy.update(pr2, chunk, data, 2)
        reports.append((pr2.step(0.1), pr2.predictor.weight_LEH.clone()))
    assert reports[0][0]["predictor"]["tokens"] > 0
    assert reports[0][0] == reports[1][0]
    assert torch.equal(reports[0][1], reports[1][1])
