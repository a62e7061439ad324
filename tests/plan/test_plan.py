"""A plan against what PR2 really holds and moves on small layouts, byte by byte, and against itself on any number of ranks."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_pr2.attach import ReplaySequence, attach
from megatron_pr2.config import CHOICES, PR2Config
from megatron_pr2.errors import ConfigError
from megatron_pr2.parallel.grid import TokenGrid, packed, padded
from megatron_pr2.parallel.layout import ParallelLayout
from megatron_pr2.plan.dense import DenseWeights, dense_elements
from megatron_pr2.plan.models import MODELS, ModelSpec, load_spec, make_layout
from megatron_pr2.plan.plan import MEMORY, MOVED, Plan, RankPlan, plan, ring_bytes, sglang_route_bytes
from megatron_pr2.plan.tokens import Part, Workload
from megatron_pr2.prediction.ridge import GRAM_BYTES, reduced_bytes
from megatron_pr2.rollout.sglang.routes import decode_table
from megatron_pr2.routes.table import RouteTable
from tests.drift.test_memory import Meter
from tests.helpers import toy
from tests.helpers.distributed import pool
from tests.host.models import make_checkpoint, tiny_config

pytestmark = pytest.mark.slow

# ---- measured --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A small layout of the toy model and a rollout batch for it.

    Attributes:
        processes: of the whole run.
        moe: which decoder layers are MoE layers.
    """

    processes: int
    sizes: dict[str, int]
    work: Workload
    pr2: dict[str, Any]
    moe: tuple[int, ...] = (1, 1, 1, 1)
    experts: int = toy.EXPERTS

    def spec(self) -> ModelSpec:
        layers = tuple(i for i, is_moe in enumerate(self.moe) if is_moe)
        sizes = {"hidden": toy.HIDDEN, "attention_heads": 2, "query_groups": 2, "dense": DenseWeights(0, 0, 0)}
        return ModelSpec(len(self.moe), layers, self.experts, toy.TOPK, 100, name="toy", **sizes)

    def layout(self) -> ParallelLayout:
        return make_layout(self.spec(), world=self.processes, **self.sizes)

    def config(self) -> PR2Config:
        return toy.preset("pr2", **self.pr2)

    def plan(self) -> Plan:
        return plan(self.spec(), self.layout(), self.work, self.config())


CASES = {
    "one rank": Case(1, {}, Workload(batch=5, seq=13, mini_steps=2, micro_batch=2), {"predictor": "learned"}),
    "replay alone": Case(1, {}, Workload(batch=3, seq=9), {"predictor": "none", "drift": False}),
    "no predictor": Case(1, {}, Workload(batch=3, seq=9), {"predictor": "none"}),
    "momentum, padded": Case(1, {}, Workload(batch=6, seq=11, padded=True, micro_batch=3), {"predictor": "momentum"}),
    "look-ahead": Case(1, {}, Workload(batch=4, seq=9, mini_steps=2), {"predictor": "lookahead"}),
    "momentum, held back": Case(1, {}, Workload(batch=3, seq=9), {"predictor": "momentum", "hold_back": True}),
    "logits only, packed otherwise in the training passes": Case(
        2,
        {"tensor": 2},
        Workload(batch=7, seq=21, mini_steps=2, micro_batch=2, log_prob_micro_batch=3),
        {"sample_fraction": 0.5, "predictor": "none"},
    ),
    "both, not held back": Case(
        1, {}, Workload(batch=4, seq=10, mini_steps=2), {"predictor": "learned+momentum", "hold_back": False}
    ),
    "data parallel, batch that does not divide, one mini-step": Case(
        2, {}, Workload(batch=5, seq=12, mini_steps=1), {"sample_fraction": 0.4}
    ),
    "context parallel, padding, two-byte ids": Case(
        2, {"context": 2}, Workload(batch=4, seq=14, prompt=6, mini_steps=2), {"sample_fraction": 0.5}, experts=300
    ),
    "pipeline with a dense stage": Case(
        2, {"pipeline": 2}, Workload(batch=4, seq=12, mini_steps=2), {"sample_fraction": 0.5}, moe=(0, 0, 1, 1)
    ),
    "packed otherwise in the training passes": Case(
        2,
        {"tensor": 2},
        Workload(batch=7, seq=21, mini_steps=2, micro_batch=2, log_prob_micro_batch=3),
        {"sample_fraction": 0.5, "predictor": "learned+momentum"},
    ),
    "beyond the budget": Case(
        2,
        {"context": 2},
        Workload(batch=9, seq=16, mini_steps=3, log_prob_micro_batch=2),
        # Room for 20 tokens.
        {"sample_fraction": 0.6, "feature_bytes": 20 * 4 * (2 * toy.HIDDEN + 4 * toy.EXPERTS)},
    ),
    "budget of 30 tokens, data parallel": Case(
        2, {}, Workload(batch=7, seq=11), {"sample_fraction": 1.0, "feature_bytes": 30 * 4 * (2 * toy.HIDDEN + 4 * toy.EXPERTS)}
    ),
    "everything": Case(
        4,
        {"tensor": 2, "context": 2},
        Workload(batch=6, seq=30, prompt=4, mini_steps=3, micro_batch=2, log_prob_micro_batch=3),
        {"sample_fraction": 0.5},
        moe=(0, 1, 1, 1),
    ),
    "tables on every rank": Case(
        4,
        {"tensor": 2, "context": 2},
        Workload(batch=5, seq=26, prompt=3, mini_steps=2, micro_batch=2, log_prob_micro_batch=3),
        {"sample_fraction": 0.5, "route_delivery": "local"},
        moe=(0, 1, 1, 1),
    ),
    "stages of a replica": Case(
        4, {"tensor": 2, "pipeline": 2}, Workload(batch=4, seq=18, mini_steps=2), {"sample_fraction": 0.5}, moe=(0, 1, 1, 1)
    ),
}  # fmt: skip


def grid_of(case: Case, part: Part, alignment: int) -> TokenGrid:
    ids, lengths = range(*part), [case.work.seq] * (part[1] - part[0])
    slot = -(-case.work.seq // alignment) * alignment
    return padded(ids, lengths, slot) if case.work.padded else packed(ids, lengths, [slot] * len(lengths))


def reachable(root: Any, kind: type) -> list[Any]:
    """Every object of a kind that an object holds, through its attributes and containers."""
    found, seen, todo = [], set(), [root]
    while todo:
        each = todo.pop()
        if id(each) in seen or isinstance(each, torch.nn.Module | type):
            continue
        seen.add(id(each))
        if isinstance(each, kind):
            found.append(each)
        if isinstance(each, dict):
            todo += each.values()
        elif isinstance(each, list | tuple):
            todo += each
        elif type(each).__module__.startswith("megatron_pr2") or isinstance(each, torch.optim.Optimizer):
            todo += vars(each).values()
    return found


def storage_bytes(tensors: list[Tensor]) -> int:
    """Bytes of tensors on the device, views counted once; Adam's count of its steps is a number in host memory."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.dim()}
    return sum(storages.values())


@contextmanager
def counted() -> Iterator[dict[str, list[tuple[int, int]]]]:
    """(bytes in, bytes out) of every collective of PR2 while it is open."""
    calls: dict[str, list[tuple[int, int]]] = {"routes": [], "features": [], "sums": []}
    all_to_all, all_reduce = dist.all_to_all_single, dist.all_reduce

    def counting_all_to_all(out: Tensor, into: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls["routes" if kwargs.get("async_op") else "features"].append((into.nbytes, out.nbytes))
        return all_to_all(out, into, *args, **kwargs)

    def counting_all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls["sums"].append((tensor.nbytes, tensor.nbytes))
        return all_reduce(tensor, *args, **kwargs)

    dist.all_to_all_single, dist.all_reduce = counting_all_to_all, counting_all_reduce
    try:
        yield calls
    finally:
        dist.all_to_all_single, dist.all_reduce = all_to_all, all_reduce


def measured_job(case: Case) -> dict[str, Any]:
    """A whole rollout batch on this rank."""
    from megatron_pr2 import host

    tensor, context, pipeline = (case.sizes.get(kind, 1) for kind in ("tensor", "context", "pipeline"))
    host.init(tensor=tensor, context=context, pipeline=pipeline)
    layout, rank = case.layout(), dist.get_rank()
    place = layout.coordinates(rank)
    config = toy.toy_config(
        num_layers=len(case.moe),
        moe_layer_freq=list(case.moe),
        num_moe_experts=case.experts,
        tensor_model_parallel_size=tensor,
        context_parallel_size=context,
        pipeline_model_parallel_size=pipeline,
        pipeline_dtype=torch.float32,
        sequence_parallel=tensor > 1,
    )
    chunk = toy.ToyChunk(config, layers=[layer + 1 for layer in layout.layers(place.pp)[0]])
    pr2 = attach(chunk, case.config())
    # A stage may have no router, hence no parameter.
    optimizer = torch.optim.Adam([*chunk.parameters(), torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    pr2.optimizer = optimizer
    count, seq = case.work.sequences(place.dp, layout.data), case.work.seq
    tables = toy.random_tables(dict.fromkeys(range(count), seq), config) if pr2.routes.is_owner else {}
    sequences = [ReplaySequence(i, seq, case.work.prompt - 1, seq - 1, tables.get(i)) for i in range(count)]
    pr2.begin_rollout(sequences)

    def batches(parts: list[Part]) -> list[toy.Batch]:
        grids = [grid_of(case, part, layout.alignment) for part in parts]
        return [
            toy.Batch(toy.MicroBatch(part, grid), toy.token_inputs(pr2.replica.ranks.rows(grid)))
            for part, grid in zip(parts, grids, strict=True)
        ]

    lengths = pr2.tokens.total
    arrays = {id(a): a for a in reachable((pr2.routes, pr2.measurement, pr2.progress), np.ndarray) if a.shape == (lengths,)}
    with counted() as calls:
        data = batches(case.work.log_prob_parts(count))
        with pr2.old_logprobs([batch.micro_batch for batch in data]) as session:
            opened = sum(into for into, _ in calls["routes"])
            waiting = [each._ids.args for each in pr2.routes._slices.values() if callable(each._ids)]
            row_numbers = sum(a.nbytes for args in waiting for a in args if isinstance(a, Tensor) and a.dtype == torch.int64)
            toy.run(session, chunk, data, backward=False)
        features = pr2.features.nbytes
        for mini_step, parts in enumerate(case.work.training_parts(count), start=1):
            toy.update(pr2, chunk, batches(parts), mini_step)
            optimizer.step()
            pr2.step(1e-3)
    pushed = {id(tensor) for tensor in reachable(pr2.measurement.pushes.in_use, Tensor)}
    return {
        "rank": rank,
        "replica": tuple(sorted(dist.get_process_group_ranks(pr2.replica.ranks.handle))) if pr2.replica.ranks.handle else (rank,),
        "predictor": storage_bytes([t for t in reachable(pr2.predictor, Tensor) if id(t) not in pushed]),
        "features": features,
        "features_peak": pr2.features.peak_bytes,
        "sample_fraction": pr2.measurement.sample_fraction,
        "tables": pr2.routes.table_bytes,
        "slices": sum(each.ids_TLK().nbytes for each in pr2.routes._slices.values()),
        "under_way": opened + row_numbers,
        "token_ids": pr2.token_check._ids_N.nbytes,
        "index": sum(a.nbytes for a in arrays.values()),
        "encoded": sum(table.encoded_size for table in tables.values()),
        "received_bytes": pr2.routes.received_bytes,
        "routes_sent": sum(into for into, _ in calls["routes"]),
        "routes_received": sum(out for _, out in calls["routes"]),
        "features_sent": sum(into for into, _ in calls["features"]),
        "features_received": sum(out for _, out in calls["features"]),
        "moved_tokens": pr2.feature_plan.moved_tokens,
        "sums": [size for size, _ in calls["sums"]],
    }


@pytest.mark.parametrize("name", CASES)
def test_what_is_planned_is_what_is_held_and_moved(name: str) -> None:
    case = CASES[name]
    made, layout = case.plan(), case.layout()
    predictor = ("weight", "gradient", "adam", "momentum")
    for rank, found in enumerate(pool(case.processes).run(measured_job, case, timeout=90.0)):
        memory, moved = made.rank(rank).memory, made.rank(rank).moved
        place = layout.coordinates(rank)
        assert found["rank"] == rank
        assert found["replica"] == tuple(sorted(layout.replica(rank)))
        # Adam has moments from its first update on: with one mini-step there is none.
        adam = memory["adam"] if case.work.mini_steps > 1 else 0
        assert found["predictor"] == sum(memory[part] for part in predictor) - memory["adam"] + adam
        assert found["features"] == memory["features"]
        assert found["features_peak"] == memory["features"] + memory["features_fetched"]
        assert found["tables"] == memory["tables"]
        assert found["slices"] == memory["slices"]
        assert found["token_ids"] == memory["token_ids"]
        assert found["index"] == memory["index"]
        assert found["encoded"] == moved["compact_routes"]
        assert found["received_bytes"] == found["routes_received"] == moved["routes_received"]
        assert found["routes_sent"] == moved["routes_sent"]
        assert found["under_way"] == memory["routes_under_way"]
        assert found["features_sent"] == moved["features_sent"]
        assert found["features_received"] == moved["features_received"]
        # The gradient is reduced in every mini-step but the first, over the ranks that the ring was planned for.
        learners = layout.data * layout.context * layout.tensor
        reduced = memory["gradient"] and found["sums"].count(memory["gradient"])
        assert reduced == (case.work.mini_steps - 1 if memory["gradient"] and learners > 1 else 0)
        assert moved["gradient_reduced"] == reduced * (ring_bytes(memory["gradient"], learners) if reduced else 0)
        assert (found["sample_fraction"] or 0.0) == made.sample_fraction
        assert (place.tp == place.cp == place.dp == 0 and memory["slices"] > 0) == (moved["gates_pushed"] > 0)
    assert (made.sample_fraction < case.config().sample_fraction) == ("budget" in name or name == "replay alone")


def test_the_cases_say_something() -> None:
    """Features move, are fewer, and differ between ranks, in at least one case each; every strategy is there."""
    plans = {name: case.plan() for name, case in CASES.items()}
    for name in ("packed otherwise in the training passes", "everything"):
        assert plans[name].total.moved["features_received"] > 0
        assert plans[name].total.memory["features_fetched"] > 0
    assert plans["pipeline with a dense stage"].rank(0).memory["features"] == 0
    assert {case.config().predictor for case in CASES.values()} == set(CHOICES["predictor"])
    for name in set(MEMORY) - {"look_weights"}:  # of a look-ahead that was not watched, which has a test of its own
        # What is on its way to host memory is so on a GPU only.
        assert any(made.total.memory[name] for made in plans.values()) == (name != "features_under_way"), name
    # A distributed optimizer and a look-ahead on several ranks have tests of their own.
    for name in set(MOVED) - {"momentum_reduced", "look_weights_reduced", "look_fit_reduced"}:
        assert any(made.total.moved[name] for made in plans.values()), name


def followed_job(checkpoint: Path) -> list[int]:
    """Payloads of the all-reduces of a mini-step in which the optimizer's shards become gate updates."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from megatron_pr2 import host
    from megatron_pr2.hf.bridge import load_model

    host.init()
    _, chunks = load_model(checkpoint, dtype=torch.float32, ddp_config={"use_distributed_optimizer": True})
    settings = {"optimizer": "adam", "lr": 1e-2, "params_dtype": torch.float32, "use_distributed_optimizer": True}
    pr2 = attach(chunks, PR2Config.preset("pr2", predictor="learned+momentum"))
    pr2.optimizer = get_megatron_optimizer(OptimizerConfig(**settings), chunks)
    with counted() as calls:
        pr2.step(1e-2)
    return [size for size, _ in calls["sums"]]


def test_gate_updates_of_a_distributed_optimizer_are_reduced_as_planned(tiny_checkpoint: Path) -> None:
    spec = load_spec(str(tiny_checkpoint))
    payload = len(spec.moe_layers) * (spec.num_experts * spec.hidden * 4 + 4)
    for strategy in ("momentum", "learned+momentum"):
        config = PR2Config.preset("pr2", predictor=strategy)
        made = plan(spec, make_layout(spec, data=2), Workload(batch=2, mini_steps=3), config)
        assert [made.rank(rank).moved["momentum_reduced"] for rank in range(2)] == [3 * ring_bytes(payload, 2)] * 2
    for sizes in pool(2).run(followed_job, tiny_checkpoint):
        assert sizes.count(payload) == 1


def look_job(checkpoint: Path, tensor: int) -> dict[str, int]:
    """A look-ahead over this replica's two sequences of 10 tokens, 4 of them the prompt's: what it holds and moves."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from megatron_pr2 import host
    from megatron_pr2.hf.bridge import load_model
    from megatron_pr2.prediction import lookahead

    host.init(tensor=tensor)
    _, chunks = load_model(checkpoint, dtype=torch.bfloat16, ddp_config={"use_distributed_optimizer": True})
    steps = OptimizerConfig(lr=1e-2, bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=True)
    optimizer = get_megatron_optimizer(steps, chunks)
    config = PR2Config.preset("pr2", predictor="lookahead", max_missing_share=1.0, min_agreement=0.0)
    pr2 = attach(chunks, config, optimizer)
    for chunk in chunks:
        chunk.zero_grad_buffer()
        chunk.finish_grad_sync()
    optimizer.step()
    model, first = pr2.model_config, 2 * (dist.get_rank() // tensor)
    table = RouteTable.missing(10, len(pr2.moe_layers), model.moe_router_topk, model.num_moe_experts)
    pr2.begin_rollout([ReplaySequence(first + i, 10, 3, 9, table if pr2.routes.is_owner else None) for i in range(2)])
    micro_batch = toy.MicroBatch.padded([first, first + 1], [10, 10], 10)
    found: dict[str, int] = {}
    swapped_in, fit, reduce = lookahead.swapped_in, lookahead.ridge_fit, dist.reduce

    @contextmanager
    def watched(*args: Any) -> Iterator[None]:
        manager = swapped_in(*args)
        with manager:
            found["look_weights"] = storage_bytes([own for _, own in manager.gen.gi_frame.f_locals["exchanged"]])
            yield

    def fitting(inputs: list[Tensor], shifts: list[Tensor], *args: Any) -> Tensor:
        found["look_inputs"] = storage_bytes([*inputs, *shifts])
        return fit(inputs, shifts, *args)

    def reducing(value: Tensor, **kwargs: Any) -> Any:
        found["to_owner"] = found.get("to_owner", 0) + value.nbytes
        return reduce(value, **kwargs)

    def forward(session: Any) -> None:
        session.begin(chunks[0], micro_batch)
        chunks[0](torch.ones(2, 10, dtype=torch.int64), torch.arange(10).expand(2, 10), None)

    with pytest.MonkeyPatch.context() as patch, counted() as calls:
        patch.setattr(lookahead, "swapped_in", watched)
        patch.setattr(lookahead, "ridge_fit", fitting)
        patch.setattr(dist, "reduce", reducing)
        with torch.no_grad():
            pr2.look_ahead([micro_batch], forward)
    return found | {"to_all": sum(size for size, _ in calls["sums"])}


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_look_ahead_holds_and_moves_what_is_planned(tiny_checkpoint: Path, tensor: int) -> None:
    spec = load_spec(str(tiny_checkpoint))
    layout = make_layout(spec, tensor=tensor, data=2 // tensor)
    work = Workload(batch=2 * layout.data, seq=10, prompt=4, micro_batch=2, padded=True, look_ahead=1.0, watched=False)
    made = plan(spec, layout, work, PR2Config.preset("pr2", predictor="lookahead"))
    to_owner, to_all = reduced_bytes(len(spec.moe_layers), spec.num_experts, spec.hidden)
    assert made.look_ahead["tokens"] == 12 * layout.data
    assert made.look_ahead["share_of_passes"] == 0.5
    once = plan(spec, layout, replace(work, watched=True, mini_steps=1), made.config)
    assert once.look_ahead == made.look_ahead | {"share_of_passes": 0.25}
    assert once.total.memory == made.total.memory | {"look_weights": 0}
    for rank, found in enumerate(pool(2).run(look_job, tiny_checkpoint, tensor)):
        memory, moved = made.rank(rank).memory, made.rank(rank).moved
        assert {name: found[name] for name in ("look_weights", "look_inputs")} == {
            name: memory[name] for name in ("look_weights", "look_inputs")
        }
        assert found["to_owner"] == to_owner
        # In a ring of two a rank sends as much as the payload; some flags come on top.
        planned = moved["look_weights_reduced"] + moved["momentum_reduced"] + to_all
        assert planned <= found["to_all"] < planned + 100
        assert moved["look_fit_reduced"] == to_owner // 2 + to_all


@pytest.mark.parametrize(("hidden", "gram_bytes"), [(64, GRAM_BYTES), (64, 0)])
def test_a_fit_holds_what_is_planned(hidden: int, gram_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_pr2.prediction import ridge

    layers, experts = 3, 4
    monkeypatch.setattr(ridge, "GRAM_BYTES", gram_bytes)
    inputs, shifts = ([torch.randn(9, size) for _ in range(layers)] for size in (hidden, experts))
    with Meter(arrays=False) as meter:
        ridge.ridge_fit(inputs, shifts, 1e-2, None, gram_bytes=gram_bytes)
    planned = ridge.fit_bytes(layers, experts, hidden)
    assert planned <= meter.torch_peak < 1.02 * planned


@pytest.mark.parametrize(("family", "tensor"), [("deepseek_v3", 1), ("deepseek_v3", 2), ("mixtral", 1), ("glm4_moe", 2)])
def test_weights_that_a_look_ahead_changes(tmp_path: Path, family: str, tensor: int) -> None:
    path = make_checkpoint(tmp_path / family, tiny_config(family))
    spec = load_spec(str(path))
    assert spec.dense is not None
    sizes = {"vocab": spec.vocab_size, "experts": spec.num_experts, "hidden": spec.hidden}
    planned = dense_elements(spec.dense, make_layout(spec, tensor=tensor), 0, **sizes)
    for found in pool(tensor).run(dense_job, path, tensor):
        # Biases are not counted.
        assert planned <= found < 1.01 * planned


def dense_job(path: Path, tensor: int) -> int:
    from megatron_pr2 import host
    from megatron_pr2.hf.bridge import load_model
    from megatron_pr2.prediction.ahead_weights import dense_parameters

    host.init(tensor=tensor)
    return sum(parameter.numel() for parameter in dense_parameters(load_model(path, dtype=torch.float32)[1]))


def validity_job(tokens: int) -> tuple[list[int], list[int]]:
    """Bytes that this rank got in begin_rollout: by broadcasts of others, and gathered."""
    from torch.distributed import distributed_c10d

    from megatron_pr2 import host

    host.init(context=2)
    config = toy.toy_config(context_parallel_size=2)
    pr2 = attach(toy.ToyChunk(config), toy.preset("pr2"))
    tables = toy.random_tables({0: tokens}, config) if pr2.routes.is_owner else None
    got: list[int] = []
    told: list[int] = []
    gather, broadcast = distributed_c10d.all_gather, dist.broadcast

    def counting(parts: list[Tensor], *args: Any, **kwargs: Any) -> Any:
        got.append(sum(part.nbytes for part in parts[1:]))
        return gather(parts, *args, **kwargs)

    def hearing(tensor: Tensor, *args: Any, group_src: int, **kwargs: Any) -> Any:
        told.append(tensor.nbytes if group_src != kwargs["group"].rank() else 0)
        return broadcast(tensor, *args, group_src=group_src, **kwargs)

    distributed_c10d.all_gather, dist.broadcast = counting, hearing
    try:
        pr2.begin_rollout(toy.sequences({0: tokens}, tables))
    finally:
        distributed_c10d.all_gather, dist.broadcast = gather, broadcast
    return told, got


def test_which_tokens_have_a_route_is_told_to_the_replica() -> None:
    case = Case(2, {"context": 2}, Workload(batch=1, seq=64_000), {})
    for rank, (told, got) in enumerate(pool(2).run(validity_job, 64_000)):
        assert told == [case.plan().rank(rank).moved["validity_received"]] == [8000 * rank]
        assert sum(got) < 1000  # digests, lengths, pickle's own bytes


# ---- any number of ranks -----------------------------------------------------------------------------------------------


@st.composite
def plans(draw: Any) -> Plan:
    """Small sequences on layouts of up to 144 ranks."""
    tensor, context, pipeline = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 4]))
    expert = draw(st.sampled_from([1, 2]))
    experts = draw(st.sampled_from([4, 512]))
    moe = draw(st.lists(st.booleans(), min_size=4, max_size=4).filter(any))
    layers = tuple(i for i, is_moe in enumerate(moe) if is_moe)
    spec = ModelSpec(4, layers, experts, 2, 100, name="m", hidden=draw(st.integers(1, 40)), dense=DenseWeights(8, 3, 6, 2))
    layout = make_layout(
        spec,
        tensor=tensor,
        context=context,
        pipeline=pipeline,
        data=draw(st.integers(1, 2)) * expert,
        expert=expert,
        virtual_pipeline=2 if pipeline == 2 and draw(st.booleans()) else None,
    )
    seq = draw(st.integers(1, 40))
    work = Workload(
        batch=draw(st.integers(1, 9)),
        seq=seq,
        prompt=draw(st.integers(1, seq)),
        mini_steps=draw(st.integers(1, 3)),
        micro_batch=draw(st.integers(1, 3)),
        log_prob_micro_batch=draw(st.none() | st.integers(1, 3)),
        padded=draw(st.booleans()),
    )
    config = PR2Config.preset(
        "pr2",
        predictor=draw(st.sampled_from(CHOICES["predictor"])),
        hold_back=draw(st.booleans()),
        sample_fraction=draw(st.sampled_from([0.2, 1.0])),
        feature_device=draw(st.sampled_from(["device", "cpu"])),
        feature_bytes=draw(st.sampled_from([3000, 4 << 30])),
        route_delivery=draw(st.sampled_from(["scatter", "local"])),
    )
    return plan(spec, layout, work, config)


@settings(max_examples=40)
@given(plans())
def test_ranks_add_up_to_the_totals(made: Plan) -> None:
    layout, work, spec = made.layout, made.work, made.model
    ranks = [made.rank(rank) for rank in range(layout.world_size)]
    for part in ("memory", "moved"):
        for name, total in getattr(made.total, part).items():
            assert sum(getattr(each, part)[name] for each in ranks) == total, name
    for device in ("device", "host"):
        assert sum(made.held(each, device) for each in ranks) == made.held(made.total, device)
    total = made.total
    # The totals once more, from what does not depend on the layout.
    routes = work.batch * len(spec.moe_layers) * spec.topk * (1 if spec.num_experts <= 256 else 2) * work.seq
    # Once, or on each rank of its replica.
    holders = layout.world_size // layout.data if made.config.route_delivery == "local" else 1
    assert total.memory["tables"] == holders * (routes + work.batch * -(-work.seq // 8))
    assert total.memory["slices"] >= routes
    assert total.moved["routes_received"] == total.moved["routes_sent"]
    assert total.moved["features_received"] == total.moved["features_sent"]
    if work.log_prob_micro_batch is None:
        rows = -(-work.seq // layout.alignment) * layout.alignment
        assert total.memory["slices"] == routes // work.seq * rows
        assert total.moved["features_received"] == 0
    samples = work.batch * min(work.seq - work.prompt, max(1, round((work.seq - work.prompt) * made.config.sample_fraction)))
    config = made.config
    inputs = 2 * spec.hidden * ("learned" in config.predictor or (config.predictor != "none" and config.hold_back))
    kept, rest = divmod(total.memory["features"], len(spec.moe_layers) * (inputs + 4 * spec.num_experts))
    assert (rest, kept == samples) == (0, made.sample_fraction == config.sample_fraction)
    assert kept <= samples
    replicated = layout.tensor * layout.context * layout.data
    one = len(spec.moe_layers) * spec.num_experts * spec.hidden * 4 * replicated
    assert total.memory["weight"] == (one if "learned" in made.config.predictor else 0)
    assert total.memory["adam"] == 2 * total.memory["weight"]
    assert total.moved["gates_pushed"] == one // replicated // 2
    # No rank holds more features than it may, nor more memory in all than the largest.
    assert max(each.memory["features"] for each in ranks) <= made.config.feature_bytes
    assert max(sum(each.memory.values()) for each in ranks) == sum(made.largest.memory.values())
    ordered = sorted(sum(each.memory.values()) for each in ranks)
    assert sum(made.typical.memory.values()) == ordered[(len(ordered) - 1) // 2]


def test_sixteen_thousand_ranks() -> None:
    """Computed as some hundred that differ; every one of them can be asked for."""
    spec = MODELS["deepseek-v3"]
    sizes = {"tensor": 8, "pipeline": 16, "context": 8, "world": 16_384, "expert": 64, "expert_tensor": 1}
    layout = make_layout(spec, layers_in_first=3, layers_in_last=2, **sizes)
    made = plan(spec, layout, Workload(batch=2048, seq=32_768), PR2Config.preset("pr2"))
    assert layout.world_size == 16_384
    assert made.distinct_ranks == 2 * 16 * 64
    # The first stage has dense layers only, and yet its first rank owns the routes: 464 bytes per token.
    owner = made.rank(0)
    assert owner == made.largest
    assert owner.memory["features"] == owner.memory["slices"] == owner.memory["weight"] == 0
    assert owner.memory["tables"] == 128 * 32_768 * 464 + 128 * 4096
    assert made.total.memory["weight"] == 58 * 256 * 7168 * 4 * 8 * 8 * 16
    assert sum(made.rank(rank).memory["slices"] for rank in layout.replica(5)) == 128 * 32_768 * 464
    assert 0 < made.typical.memory["features"] <= made.config.feature_bytes
    assert made.rank(16_383).place == (7, 7, 15, 15)


def test_planning_imports_neither_megatron_nor_transformers() -> None:
    code = (
        "import sys\n"
        "from megatron_pr2.cli import app\n"
        "app(['plan', '--model', 'qwen3-30b-a3b', '--json'], standalone_mode=False)\n"
        "print(sorted({'megatron.core', 'transformers', 'sglang', 'mbridge'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[-1] == "[]"
    assert json.loads(lines[-2])["model"]["name"] == "qwen3-30b-a3b"


# ---- models and layouts ------------------------------------------------------------------------------------------------


def test_known_sizes() -> None:
    """Figures of docs/design.md and of the papers."""
    one = Workload(batch=1, seq=2, prompt=1, mini_steps=1)
    for name, route, parameters in (("qwen3-30b-a3b", 384, 12.6e6), ("deepseek-v3", 464, 106e6), ("mixtral-8x7b", 64, 1.05e6)):
        spec = MODELS[name]
        made = plan(spec, make_layout(spec), one, PR2Config.preset("pr2"))
        assert made.total.memory["slices"] == 2 * route
        assert made.total.memory["weight"] / 4 == pytest.approx(parameters, rel=0.01)
        assert made.total.memory["features"] == len(spec.moe_layers) * (2 * spec.hidden + 4 * spec.num_experts)


def test_models_are_those_of_their_configs(tmp_path: Path) -> None:
    """Transformers' defaults are the sizes of these models, but for Qwen's layers and heads."""
    import transformers

    configs = {
        "deepseek-v3": transformers.DeepseekV3Config(),
        "mixtral-8x7b": transformers.MixtralConfig(),
        "qwen3-30b-a3b": transformers.Qwen3MoeConfig(num_hidden_layers=48, head_dim=128),
    }
    assert set(configs) == set(MODELS)
    for name, config in configs.items():
        directory = tmp_path / name
        config.save_pretrained(directory)
        for path in (directory, directory / "config.json"):
            found = load_spec(str(path))
            assert replace(found, name=name) == MODELS[name]
    assert MODELS["deepseek-v3"].moe_layers[0] == 3


def test_models_that_cannot_be_read(tmp_path: Path) -> None:
    import transformers

    with pytest.raises(ConfigError, match="no such model; expected qwen3-30b-a3b, mixtral-8x7b, deepseek-v3, or a directory"):
        load_spec("qwen4")
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match="not a Hugging Face config"):
        load_spec(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "never heard of"}', encoding="utf-8")
    with pytest.raises(ConfigError, match="not a Hugging Face config"):
        load_spec(str(tmp_path))
    transformers.Qwen3Config().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="model_type='qwen3' is not a mixture-of-experts model"):
        load_spec(str(tmp_path))


@pytest.mark.parametrize(
    "sizes",
    [
        {"tensor": 3},
        {"pipeline": 5},
        {"expert": 3, "data": 3},
        {"expert": 4},
        {"virtual_pipeline": 2},
        {"tensor": 2, "sequence_parallel": False},
        {"tensor": 2, "expert_tensor": 1},
        {"layers_in_first": 7, "pipeline": 4},
        {"pipeline_layout": "Et*24|t*23L", "pipeline": 2},
        {"order": "tp-cp", "data": 2},
    ],
)
def test_layouts_are_refused_with_the_words_of_training(sizes: dict[str, Any]) -> None:
    spec = MODELS["qwen3-30b-a3b"]
    with pytest.raises(ConfigError) as planned:
        make_layout(spec, **sizes)
    model = {"num_layers": 48, "num_experts": 128, "num_attention_heads": 32, "num_query_groups": 4}
    with pytest.raises(ConfigError) as real:
        ParallelLayout(**model, **sizes)
    assert str(planned.value) == str(real.value)


def test_worlds_that_do_not_divide() -> None:
    spec = MODELS["mixtral-8x7b"]
    assert make_layout(spec, tensor=2, context=2, world=16).data == 4
    with pytest.raises(ConfigError, match="world_size=6 is not a multiple of tensor_model_parallel_size=2 x"):
        make_layout(spec, tensor=2, context=2, world=6)
    with pytest.raises(ConfigError, match="world=8 contradicts tp=2 x pp=1 x cp=1 x dp=2 = 4"):
        make_layout(spec, tensor=2, data=2, world=8)
    for name in ("tensor", "pipeline", "context", "data", "world", "expert", "expert_tensor"):
        with pytest.raises(ConfigError, match="=0: expected at least 1"):
            make_layout(spec, **{name: 0})


def test_multi_token_prediction_heads_take_their_place_in_a_layout() -> None:
    spec = MODELS["deepseek-v3"]
    layout = make_layout(spec, pipeline=2, pipeline_layout="Et*31|t*30mL")
    assert [len(layout.moe_columns(pp)) for pp in range(2)] == [28, 30]
    with pytest.raises(ConfigError, match="mtp"):
        make_layout(spec, pipeline=2, pipeline_layout="Et*31|t*30mmL")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 0}, "batch=0: expected at least 1"),
        ({"log_prob_micro_batch": 0}, "log_prob_micro_batch=0: expected at least 1"),
        ({"seq": 8, "prompt": 9}, "prompt=9: expected at most the 8 tokens"),
    ],
)
def test_workloads_that_make_no_sense(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Workload(**changes)


def test_routes_that_no_engine_returned_are_not_planned() -> None:
    spec = MODELS["mixtral-8x7b"]
    for setting in ({"routes": "actor"}, {"routes": "live", "predictor": "none"}):
        with pytest.raises(ConfigError, match="a plan is made for routes from the engine"):
            plan(spec, make_layout(spec), Workload(), PR2Config.from_dict(setting))


@given(st.integers(2, 40), st.integers(1, 5), st.integers(2, 4))
def test_routes_from_sglang_are_as_long_as_planned(tokens: int, layers: int, topk: int) -> None:
    spec = ModelSpec(layers + 1, tuple(range(1, layers + 1)), 16, topk, 100, name="m", hidden=8)
    ids = np.tile(np.arange(topk, dtype="<i4"), (tokens - 1, layers + 1, 1))
    encoded = base64.b64encode(ids.tobytes())
    assert len(encoded) == sglang_route_bytes(tokens, spec)
    assert decode_table(encoded, num_tokens=tokens, shape=spec, where="here").num_missing == 1


def test_a_ring_moves_twice_the_rest() -> None:
    """Each of n ranks sends n - 1 shares to be summed and n - 1 sums."""
    payload = np.array([1200])
    for ranks, sent in ((1, 0), (2, 1200), (3, 1600), (4, 1800)):
        assert ring_bytes(payload, ranks) == sent


def test_one_rank_of_an_unknown_world() -> None:
    made = CASES["one rank"].plan()
    assert isinstance(made.rank(0), RankPlan)
    with pytest.raises(ConfigError, match="rank 1 of a world of 1"):
        made.rank(1)
