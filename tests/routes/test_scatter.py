"""Routes on their way: every rank gets its own tokens of its own layers, once, and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_pr2.attach import ReplaySequence, attach
from megatron_pr2.config import PR2Config
from megatron_pr2.errors import ReplayError, RouteError
from megatron_pr2.parallel.grid import TokenGrid, packed, padded
from megatron_pr2.parallel.replica import find_replica
from megatron_pr2.parallel.tokens import TokenIndex
from megatron_pr2.routes.store import RouteStore
from megatron_pr2.routes.table import RouteTable
from tests.helpers import toy
from tests.helpers.distributed import pool
from tests.helpers.ids import random_ids

pytestmark = pytest.mark.slow

LENGTHS = {3: 11, 1: 24, 8: 5, 4: 17}
LAYERS, TOPK = 5, 3
CPU = torch.device("cpu")

# tensor, context, pipeline; the last two need a process group of their own.
SIZES = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (1, 2, 2), (2, 1, 2)]


def tables(experts: int) -> dict[int, RouteTable]:
    made = {}
    for sid, length in LENGTHS.items():
        ids = random_ids(length, LAYERS, TOPK, experts, seed=sid)
        ids[[length - 1, sid % length]] = -1
        made[sid] = RouteTable.from_ids(ids, experts)
    return made


def micro_batches(multiple: int) -> list[TokenGrid]:
    """A packed one with alignment padding, and a padded one."""
    ids = list(LENGTHS)
    up = {sid: -(-n // multiple) * multiple for sid, n in LENGTHS.items()}
    pair = ids[2:]
    return [
        packed(ids[:2], [LENGTHS[i] for i in ids[:2]], [up[i] for i in ids[:2]]),
        padded(pair, [LENGTHS[i] for i in pair], max(up[i] for i in pair) + multiple),
    ]


def expected(local: TokenGrid, made: dict[int, RouteTable], columns: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Token by token from the tables."""
    experts = np.zeros((local.num_rows, len(columns), TOPK), dtype=np.int64)
    valid = np.zeros(local.num_rows, dtype=bool)
    for row, (sid, position) in enumerate(zip(*local.rows(), strict=True)):
        if sid >= 0:
            experts[row] = made[int(sid)].experts[position][list(columns)]
            valid[row] = made[int(sid)].valid[position]
    return experts, valid


def scatter_job(size: tuple[int, int, int], experts: int, scatter: bool) -> dict[str, Any]:
    from megatron.core import parallel_state as mpu

    from megatron_pr2 import host

    tp, cp, pp = size
    host.init(tensor=tp, context=cp, pipeline=pp)
    stage = mpu.get_pipeline_model_parallel_rank()
    columns = tuple(c for c in range(LAYERS) if c * pp // LAYERS == stage) if pp > 1 else tuple(range(LAYERS))
    replica = find_replica(columns, sequence_parallel=tp > 1)
    store = RouteStore(replica, LAYERS, TOPK, experts, CPU, scatter=scatter)
    made = tables(experts)
    index = TokenIndex(LENGTHS)
    valid = np.concatenate([made[sid].valid for sid in LENGTHS])
    # A rank that does not own the routes has none; were it to look, this would fail.
    store.begin(index, made if store.is_owner else {}, valid)
    grids = micro_batches(2 * cp * tp)
    slices = store.slices(grids)
    wrong, rows = 0, 0
    for grid, (found, mask) in zip(grids, slices, strict=True):
        ids, has_route = expected(replica.ranks.rows(grid), made, columns)
        wrong += int((found.ids_TLK().numpy().astype(np.int64) != ids).sum()) + int((mask != has_route).sum())
        rows += int((replica.ranks.rows(grid).rows()[0] >= 0).sum())
    received = store.received_bytes
    again = all(a is b for (a, _), (b, _) in zip(store.slices(grids[::-1])[::-1], slices, strict=True))
    owners = [i for i, member in enumerate(replica.ranks.members) if member.first]
    replica.release()
    return {
        "wrong": wrong,
        "own_bytes": rows * len(columns) * TOPK * (1 if experts <= 256 else 2),
        "received": received,
        "again": again and store.received_bytes == received,
        "owner": store.is_owner,
        "owners": owners,
        "ranks": replica.ranks.size,
        "sum": rows * len(columns),
    }


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("experts", [200, 300])
def test_every_rank_gets_its_own_share_once(size: tuple[int, int, int], experts: int) -> None:
    world = int(np.prod(size))
    results = pool(world).run(scatter_job, size, experts, True, timeout=60.0)
    for result in results:
        assert result["wrong"] == 0
        assert result["received"] == (0 if result["owner"] else result["own_bytes"])
        assert result["again"]
        assert result["ranks"] == world
        assert len(result["owners"]) == 1
    assert sum(result["owner"] for result in results) == 1
    assert sum(result["sum"] for result in results) == sum(LENGTHS.values()) * LAYERS


@pytest.mark.parametrize("size", [(2, 2, 1), (1, 2, 2)])
def test_tables_that_are_everywhere_are_sliced_without_communication(size: tuple[int, int, int]) -> None:
    for result in pool(4).run(scatter_job, size, 200, False, timeout=60.0):
        assert (result["wrong"], result["received"], result["owner"]) == (0, 0, True)


def two_replicas_job() -> tuple[int, int]:
    """Two data-parallel replicas of two context-parallel ranks each have other sequences."""
    from megatron.core import parallel_state as mpu

    from megatron_pr2 import host

    host.init(context=2)
    dp = mpu.get_data_parallel_rank()
    replica = find_replica((0,), sequence_parallel=False)
    length = 8 + 4 * dp
    ids = random_ids(length, 1, 2, 8, seed=dp)
    table = RouteTable.from_ids(ids, 8)
    store = RouteStore(replica, 1, 2, 8, CPU, scatter=True)
    store.begin(TokenIndex({dp: length}), {dp: table} if store.is_owner else {}, table.valid)
    grid = packed([dp], [length])
    ((found, _),) = store.slices([grid])
    _, position = replica.ranks.rows(grid).rows()
    return dp, int((found.ids_TLK()[:, 0].numpy() != ids[position, 0]).sum())


def test_replicas_do_not_mix() -> None:
    assert sorted(pool(4).run(two_replicas_job)) == [(0, 0), (0, 0), (1, 0), (1, 0)]


# ---- through PR2 -----------------------------------------------------------------------------------------------------


def refusal_job(kind: str) -> str:
    from megatron_pr2 import host

    host.init(context=2)
    rank = dist.get_rank()
    config = toy.toy_config(context_parallel_size=2)
    pr2 = attach(toy.ToyChunk(config), toy.preset("r3"))
    lengths = {0: 8, 1: 12}
    made = toy.random_tables(lengths, config)
    sequences = [ReplaySequence(i, n, 2, n - 1, made[i] if rank == 0 else None) for i, n in lengths.items()]
    if kind == "short" and rank == 0:
        sequences[1] = ReplaySequence(1, 12, 2, 11, toy.random_tables({1: 11}, config)[1])
    if kind == "sequences" and rank == 1:
        sequences = sequences[::-1]
    if kind == "object" and rank == 0:
        sequences[1] = ReplaySequence(1, 12, 2, 11, b"routes")
    if kind == "length" and rank == 1:
        sequences[1] = ReplaySequence(1, -12, 2, 11)
    if kind == "tables" and rank == 1:
        # Given although not needed: what contradicts must not pass.
        sequences = [ReplaySequence(i, n, 2, n - 1, made[i]) for i, n in lengths.items()]
    try:
        pr2.begin_rollout(sequences)
    except RouteError as error:
        return str(error)
    micro_batches = [toy.MicroBatch(0, padded([0, 5] if kind == "unknown" else [0], [8, 8] if kind == "unknown" else [8], 8))]
    if kind == "micro-batches" and rank == 1:
        micro_batches = [toy.MicroBatch(0, padded([1], [12], 12))]
    if kind == "no micro-batch" and rank == 1:
        micro_batches = ["micro-batch"]  # type: ignore[list-item]
    try:
        with pr2.old_logprobs(micro_batches):
            raise KeyError
    except ReplayError as error:
        return str(error)
    except KeyError:
        return "ran"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("short", "sequence 1: its route table is (tokens, moe layers, top-k, experts) = (11, 2, 2, 8), expected (12, 2, 2, 8)"),
        ("sequences", "were told of different sequences"),
        ("object", "sequence 1: routes is a bytes; make a table of it"),
        ("length", "sequence 1: loss-bearing positions [2, 11) are outside its -12 tokens"),
        ("micro-batches", "describe different micro-batches for one pass"),
        ("no micro-batch", "a pass got a str among its micro-batches"),
        ("unknown", "sequence 5 has no routes"),
        ("tables", "ran"),
        ("fine", "ran"),
    ],
)
def test_all_ranks_refuse_together(kind: str, message: str) -> None:
    """A rank that raised alone would leave the others waiting for ever."""
    first, second = pool(2).run(refusal_job, kind, timeout=60.0)
    assert message in first
    assert message in second


def recorded_job(order: list[int], width: int, experts: int) -> tuple[int, int, int]:
    """r2: the actor records under one cut and replays under another."""
    from megatron_pr2 import host

    host.init(tensor=2, context=2)
    sizes = {"tensor_model_parallel_size": 2, "context_parallel_size": 2, "sequence_parallel": True}
    config = toy.toy_config(num_moe_experts=experts, **sizes)
    chunk = toy.ToyChunk(config)
    pr2 = attach(chunk, PR2Config.preset("r2", sample_fraction=1.0))
    lengths = {0: 13, 1: 24, 2: 5, 3: 9}
    pr2.begin_rollout(toy.sequences(lengths, None))
    group = pr2.replica.ranks

    def batch(ids: list[int], rows: int) -> tuple[toy.MicroBatch, toy.Batch]:
        grid = padded(ids, [lengths[i] for i in ids], rows)
        micro_batch = toy.MicroBatch(tuple(ids), grid)
        return toy.Batch(micro_batch, toy.token_inputs(group.rows(grid)))

    def chosen(calls: list[toy.Call], data: list[toy.Batch]) -> dict[tuple[int, int, int], bytes]:
        out = {}
        for call in calls:
            for row, (sid, position) in enumerate(zip(*group.rows(data[call.number].micro_batch.grid).rows(), strict=True)):
                if sid >= 0:
                    out[call.layer, int(sid), int(position)] = call.map_TE[row].numpy().tobytes()
        return out

    first = [batch([0, 1], 24), batch([2, 3], 16)]
    second = [batch(order, width)]
    with toy.observed(chunk) as calls:
        toy.old_logprobs(pr2, chunk, first)
    before = chosen(calls, first)
    toy.drift(chunk, 0.5)
    with toy.observed(chunk) as calls:
        toy.update(pr2, chunk, second, 1)
    after = chosen(calls, second)
    shares = [None] * 4
    dist.all_gather_object(shares, before)
    everywhere = {key: value for share in shares for key, value in share.items()}
    moved = sum(key not in before for key in after)
    wrong = sum(everywhere[key] != value for key, value in after.items())
    return wrong, moved, pr2.step(0.0)["features_absent"]


@pytest.mark.parametrize("experts", [8, 300])
def test_recorded_routes_follow_tokens_to_another_rank(experts: int) -> None:
    results = pool(4).run(recorded_job, [2, 0, 3], 32, experts)
    assert [wrong for wrong, *_ in results] == [0] * 4
    assert sum(moved for _, moved, _ in results) > 10
    assert [absent for *_, absent in results] == [0] * 4


def prefetch_job() -> tuple[int, int, int]:
    from megatron_pr2 import host

    host.init(context=2)
    config = toy.toy_config(context_parallel_size=2)
    chunk = toy.ToyChunk(config)
    pr2 = attach(chunk, toy.preset("r3"))
    lengths = {0: 8, 1: 12}
    made = toy.random_tables(lengths, config) if pr2.routes.is_owner else None
    pr2.begin_rollout(toy.sequences(lengths, made))
    grids = [padded([i], [n], n) for i, n in lengths.items()]
    data = [toy.Batch(toy.MicroBatch(i, g), toy.token_inputs(pr2.replica.ranks.rows(g))) for i, g in enumerate(grids)]
    pr2.prefetch([batch.micro_batch for batch in data])
    early = pr2.routes.received_bytes
    toy.old_logprobs(pr2, chunk, data)
    toy.update(pr2, chunk, data[::-1], 1)
    return dist.get_rank(), early, pr2.routes.received_bytes


def test_routes_that_were_fetched_early_are_not_sent_again() -> None:
    """Neither in the log-prob pass nor in a training pass with the same micro-batches."""
    (_, owner, owner_later), (_, other, later) = pool(2).run(prefetch_job)
    assert owner == owner_later == 0
    assert other == later == (8 + 12) // 2 * toy.LAYERS * toy.TOPK


def stage_without_routers_job() -> tuple[bool, bool]:
    """Recorded routes: both stages know which tokens have one, also the stage that recorded none."""
    from megatron_pr2 import host

    host.init(pipeline=2)
    config = toy.toy_config(moe_layer_freq=[0, 1], pipeline_model_parallel_size=2, pipeline_dtype=torch.float32)
    chunk = toy.ToyChunk(config, layers=[dist.get_rank() + 1])
    pr2 = attach(chunk, PR2Config.preset("r2"))
    lengths = {0: 8, 1: 5}
    pr2.begin_rollout(toy.sequences(lengths, None))
    toy.old_logprobs(pr2, chunk, toy.batches(lengths, 2))
    known = bool(pr2.routes.valid.all())
    pr2.end_rollout()
    return known, pr2.routes.valid.size == pr2.features.nbytes == pr2.tokens.total == 0


def test_every_stage_knows_what_was_recorded() -> None:
    assert pool(2).run(stage_without_routers_job) == [(True, True)] * 2
