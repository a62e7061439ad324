"""What PR2 holds in memory, and when: flat over steps, linear in tokens, features within their byte budget.

Bytes are counted where they are allocated, not guessed from the resident set: torch's storages and numpy's buffers, exactly.
`T` tokens, `L` layers, `E` experts, `K` top-k, `H` hidden, `S` sampled tokens.
"""

from __future__ import annotations

import gc
import os
import tracemalloc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_pr2.attach import attach
from megatron_pr2.drift.feature_plan import FeaturePlan
from megatron_pr2.drift.features import FeatureStore
from megatron_pr2.drift.metrics import COLUMNS
from megatron_pr2.errors import ReplayError
from megatron_pr2.parallel.grid import TokenGrid, packed, padded
from megatron_pr2.parallel.replica import Member, RankGroup
from megatron_pr2.parallel.tokens import TokenIndex
from megatron_pr2.replay.micro_batch import MicroBatch
from tests.helpers import toy
from tests.helpers.distributed import pool

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("host_platform")]

L, E, H, K = toy.LAYERS, toy.EXPERTS, toy.HIDDEN, toy.TOPK
FEATURE = L * (H * 2 + E * 4)  # bytes of one sampled token: h_old in bf16, p_old in fp32
ROUTE = L * K  # bytes of one token's routes
CPU = torch.device("cpu")


# ---- the meter -------------------------------------------------------------------------------------------------------


def array_bytes() -> int:
    """Bytes of numpy's buffers that were made since tracemalloc was started."""
    arrays = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
    return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces([arrays]).traces)


class Meter(TorchDispatchMode):
    """Bytes of the storages that torch allocated while the meter was on, and of numpy's buffers.

    Storages are counted from the operator that made them to their end, whoever holds them (autograd's graph included); numpy's
    buffers, on which torch.from_numpy builds, through tracemalloc, Python's own objects left out of `live`.
    """

    def __init__(self, arrays: bool = True) -> None:
        """Args: `arrays` is whether numpy is watched as well, which is slow."""
        super().__init__()
        self.torch_live = self.torch_peak = 0
        self._arrays = arrays
        self._known: dict[int, weakref.ref[Any]] = {}

    def __enter__(self) -> Meter:
        if self._arrays:
            tracemalloc.start()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if self._arrays:
            tracemalloc.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._meet(args, own=False)
        if kwargs:
            self._meet(list(kwargs.values()), own=False)
        result = func(*args, **(kwargs or {}))
        self._meet(result, own=True)
        return result

    def _meet(self, found: Any, own: bool) -> None:
        if isinstance(found, list | tuple):
            for each in found:
                self._meet(each, own)
            return
        if not isinstance(found, Tensor):
            return
        storage = found.untyped_storage()
        key = id(storage)
        known = self._known.get(key)
        if known is not None and known() is storage:
            return
        nbytes = storage.nbytes() if own else 0

        def gone(which: Any) -> None:
            self.torch_live -= nbytes
            if self._known.get(key) is which:
                del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.torch_live += nbytes
        self.torch_peak = max(self.torch_peak, self.torch_live)

    @property
    def live(self) -> int:
        """Bytes held now."""
        return self.torch_live + array_bytes()

    def peak(self, function: Callable[[], Any]) -> int:
        """Most bytes held at once while `function` runs, above what is held before; Python's objects count as well.

        The sum of two peaks, of torch's and of the rest, which may not fall together.
        """
        gc.collect()
        before = self.torch_live, tracemalloc.get_traced_memory()[0]
        self.torch_peak = self.torch_live
        tracemalloc.reset_peak()
        function()
        return self.torch_peak - before[0] + tracemalloc.get_traced_memory()[1] - before[1]


def test_the_meter_measures() -> None:
    """Arrays under tensors, views, what autograd keeps, and what is freed."""
    with Meter() as meter:
        a = torch.zeros(1000)
        assert meter.live == 4000
        b = torch.from_numpy(np.zeros(500))
        c = b + 1
        assert meter.live == 12000
        view = a[3:]
        del a
        assert meter.live == 12000
        del b, c
        a = view.exp_()
        del view, a
        assert meter.live == 0
        w = torch.zeros(10, 10, requires_grad=True)
        y = (w.exp() * 2).sin().sum()
        assert meter.live == 3 * 400 + 4  # the exponentials are in the graph only
        y.backward()
        del y
        assert meter.live == 2 * 400
        del w
        assert meter.live == 0
        assert meter.peak(lambda: torch.zeros(10_000) + 1) >= 80_000
        assert meter.live == 0


def test_the_meter_agrees_with_the_allocator() -> None:
    """Over a whole step; what operators allocate inside of themselves is small."""
    model = Model()
    steps = [Rollout(model, i, 16, 40) for i in range(2)]
    model.step(steps[0])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        model.step(steps[1])
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    with Meter() as meter:
        meter.peak(lambda: model.step(steps[1]))
        assert meter.torch_peak == pytest.approx(int(live.max()), rel=0.1)


# ---- whole steps -----------------------------------------------------------------------------------------------------


class Model:
    """A toy model under PR2, on one rank or as one of two context-parallel ones."""

    def __init__(self, context: int = 1, **settings: Any) -> None:
        self.chunk = toy.ToyChunk(toy.toy_config(context_parallel_size=context))
        self.pr2 = attach(self.chunk, toy.preset("pr2", **{"sample_fraction": 0.5, **settings}))
        self.rows = self.pr2.feature_plan._tp_cp.rows

    def step(self, rollout: Rollout) -> dict[str, Any]:
        """A rollout batch: old log-probs, then two mini-steps over another cut of it."""
        self.pr2.begin_rollout(rollout.sequences)
        toy.old_logprobs(self.pr2, self.chunk, rollout.first)
        for number, data in enumerate(rollout.mini_batches, start=1):
            toy.update(self.pr2, self.chunk, data, number)
            toy.drift(self.chunk, 0.01, seed=number)
            self.chunk.zero_grad()
            report = self.pr2.step(0.01)
        return report


class Rollout:
    """Sequences with ids that no other step has, cut for a log-prob pass and otherwise for two mini-steps."""

    def __init__(self, model: Model, number: int, count: int, length: int) -> None:
        """Args:
        count, length: sequences, and tokens of the longest one; no two steps are alike but in their number of tokens.
        """
        spread = np.random.default_rng(number).permutation(count)
        self.lengths = {1000 * (number + 1) + i: length - int(less) % 4 for i, less in enumerate(spread)}
        tables = toy.random_tables(self.lengths, model.chunk.config)
        self.sequences = toy.sequences(self.lengths, tables)
        ids = list(self.lengths)
        half = count // 2
        self.first = self._cut(model, ids, 4, 8)
        self.mini_batches = [self._cut(model, part, 2, 16) for part in (ids[half:][::-1], ids[:half][::-1])]

    def _cut(self, model: Model, ids: Sequence[int], size: int, multiple: int) -> list[toy.Batch]:
        data = []
        for start in range(0, len(ids), size):
            part = ids[start : start + size]
            counts = [self.lengths[i] for i in part]
            grid = padded(part, counts, -(-max(counts) // multiple) * multiple)
            local = model.rows(grid).sequence.shape
            data.append(toy.Batch(MicroBatch((start, *part), grid), torch.randn(*local, H)))
        return data


def resident() -> int:
    """The process's resident set, in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def fifty_steps(context: int) -> list[dict[str, int]]:
    """After each of 50 steps: what is left of it, its peak, what PR2 says that it holds; of 25 more what numpy holds.

    Nothing may wait for the garbage collector: reference cycles would hold a rollout batch for as long as it pleases.
    """
    if context > 1:
        from megatron_pr2 import host

        host.init(context=context)
    model = Model(context)
    store, plan, routes = model.pr2.features, model.pr2.feature_plan, model.pr2.routes
    out = []
    for number in range(3):
        model.step(Rollout(model, number, 8, 40))
    gc.collect()
    gc.disable()
    try:
        with Meter(arrays=False) as meter:
            for number in range(50):
                rollout = Rollout(model, 100 + number, 8, 40)
                before, meter.torch_peak = meter.torch_live, meter.torch_live
                model.step(rollout)
                del rollout
                found = {"torch": meter.torch_live - store.nbytes, "peak": meter.torch_peak - before, "resident": resident()}
                held = {"features": store.nbytes, "sampled": plan.sampled_tokens, "moved": plan.moved_tokens}
                out.append({**found, **held, "received": routes.received_bytes})
        if context == 1:
            # Python 3.11's tracemalloc is not safe where other threads allocate, as gloo's do.
            tracemalloc.start()
            for number in range(25):
                model.step(Rollout(model, 200 + number, 8, 40))
                out[2 * number]["arrays"] = out[2 * number + 1]["arrays"] = array_bytes()
    finally:
        tracemalloc.stop()
        gc.enable()
    return out


@pytest.mark.parametrize("context", [1, 2])
def test_fifty_steps_are_flat(context: int) -> None:
    """The last ten steps hold what the second ten held; with two context-parallel ranks routes and features travel as well."""
    for steps in [fifty_steps(1)] if context == 1 else pool(2).run(fifty_steps, context):
        early, late = steps[10:20], steps[40:]
        assert all(step["features"] == step["sampled"] * FEATURE > 0 for step in steps)
        # What is left beside the features is the same to the byte. Which tokens are sampled on which rank is drawn again per step.
        assert len({step["torch"] for step in early + late}) == 1
        peaks = [np.mean([step["peak"] for step in part]) for part in (early, late)]
        assert peaks[1] == pytest.approx(peaks[0], rel=0.05)
        if context == 1:
            assert len({step["peak"] for step in early + late}) == len({step["arrays"] for step in early + late}) == 1
        # Coarse, for what has no counter: a step allocates 2 MB, 80 MB over the steps between; the allocator may keep some pages.
        assert late[-1]["resident"] - early[0]["resident"] < 32 << 20
        if context == 2:
            assert all(step["moved"] > 0 for step in steps)
    if context == 2:
        assert all(step["received"] > 0 for step in steps)  # the last rank does not own the routes


SHAPES = {"sequences": lambda n: (8 * n, 64), "lengths": lambda n: (8, 64 * n)}


@pytest.mark.parametrize("what", SHAPES)
def test_the_peak_of_a_step_is_linear_in_tokens(what: str) -> None:
    model = Model()
    model.step(Rollout(model, 0, 8, 64))
    peaks = []
    for number, times in enumerate((1, 2, 4), start=1):
        rollout = Rollout(model, number, *SHAPES[what](times))
        with Meter() as meter:
            # The rollout batch before is let go first, whatever its size.
            model.pr2.begin_rollout([])
            peaks.append(meter.peak(lambda rollout=rollout: model.step(rollout)))
    first, second = peaks[1] - peaks[0], (peaks[2] - peaks[1]) / 2
    assert second == pytest.approx(first, rel=0.25)  # the largest of several phases, each linear
    assert peaks[2] > 2 * peaks[0]


def test_what_a_rollout_batch_costs() -> None:
    """Measured, against formulas: features, one slice of routes per cut and row, and indices of a few bytes per token."""
    model = Model()
    model.step(Rollout(model, 0, 16, 64))
    rollout = Rollout(model, 1, 16, 64)
    tokens = sum(rollout.lengths.values())
    sampled = sum(max(1, round((n - 3) / 2)) for n in rollout.lengths.values())  # prompts of 3 tokens, half of the rest
    rows = sum(batch.micro_batch.grid.num_rows for batch in rollout.first)
    again = sum(batch.micro_batch.grid.num_rows for data in rollout.mini_batches for batch in data)
    model.pr2.begin_rollout([])
    with Meter() as meter:
        empty = meter.live
        model.pr2.begin_rollout(rollout.sequences)
        begun = meter.live
        pushes = sum(push.nbytes for push in model.pr2.measurement.pushes.in_use)
        toy.old_logprobs(model.pr2, model.chunk, rollout.first)
        kept = meter.live
        for number, data in enumerate(rollout.mini_batches, start=1):
            toy.update(model.pr2, model.chunk, data, number)
            model.chunk.zero_grad()
            model.pr2.step(0.01)
        stepped = meter.live
        model.pr2.begin_rollout([])
        gone = meter.live
    features, indices, gates = sampled * FEATURE, sampled * 8, sum(site.router.weight.nbytes for site in model.pr2.sites)
    assert model.pr2.features.peak_bytes == 0
    # Holder, segment and slot per token, its id, its push and six flags.
    assert begun - empty - pushes == pytest.approx(tokens * 28, rel=0.05)
    # Where a micro-batch's rows and features are (two indices) is known during a pass.
    assert features <= kept - begun - gates - rows * ROUTE - indices <= features + 2 * indices
    assert stepped - begun == features + indices + gates + (rows + again) * ROUTE
    assert gone - empty - pushes < 100  # what was pushed is kept for the next batches


@pytest.mark.parametrize(
    ("preset", "settings", "inputs"),
    [
        ("grpo", {}, False),
        ("r2", {}, False),
        ("r3", {}, False),
        ("pr2", {"predictor": "momentum", "hold_back": False}, False),
        ("pr2", {"predictor": "momentum", "hold_back": True}, True),
        ("pr2", {"hold_back": False}, True),
    ],
)
def test_router_inputs_are_kept_only_for_a_predictor(preset: str, settings: dict[str, Any], inputs: bool) -> None:
    """Without one that learns from them or is judged on them features are the logits: drift is measured all the same."""
    chunk = toy.ToyChunk(toy.toy_config())
    optimizer = torch.optim.Adam([router.weight for router in toy.routers(chunk)])
    pr2 = attach(chunk, toy.preset(preset, sample_fraction=1.0, **settings), optimizer)
    lengths = {0: 20, 1: 30}
    tables = toy.random_tables(lengths, chunk.config) if pr2.config.routes == "engine" else None
    pr2.begin_rollout(toy.sequences(lengths, tables))
    data = toy.batches(lengths, 1)
    toy.old_logprobs(pr2, chunk, data)
    sampled = 17 + 27
    assert pr2.features.nbytes == pr2.features.peak_bytes == sampled * L * (4 * E + inputs * 2 * H)
    toy.drift(chunk)
    toy.update(pr2, chunk, data, 2)
    drift = pr2.step(0.1)["drift"]
    assert drift["tokens"] == [sampled] * L
    assert min(drift["agreement"] + drift["frozen_agreement"] + drift["kl_frozen"]) > 0.0
    # Of momentum that nothing judges, the distribution that it predicted is not known.
    assert np.isnan(drift["kl_predicted"]).all() == (pr2.config.predicts and not inputs)


@pytest.mark.parametrize("preset", ["grpo", "r2", "r3", "pr2"])
def test_without_drift_nothing_is_kept(preset: str) -> None:
    """Replay alone: no features, no share of tokens to agree on, no drift in the report or in metrics."""
    chunk = toy.ToyChunk(toy.toy_config())
    more = {"predictor": "momentum"} if preset == "pr2" else {}
    optimizer = torch.optim.Adam([router.weight for router in toy.routers(chunk)])
    pr2 = attach(chunk, toy.preset(preset, drift=False, **more), optimizer)
    lengths = {0: 20, 1: 30}
    data = toy.batches(lengths, 1)
    tables = toy.random_tables(lengths, chunk.config) if pr2.config.routes == "engine" else None
    pr2.begin_rollout(toy.sequences(lengths, tables))
    toy.old_logprobs(pr2, chunk, data)
    assert (pr2.engine_agreement is None) == (pr2.config.routes != "engine")
    for mini_step in (1, 2):
        toy.update(pr2, chunk, data, mini_step)
        toy.drift(chunk)
        report = pr2.step(0.1)
        assert (report["drift"], report["features_absent"]) == ({}, 0)
    assert (pr2.features.peak_bytes, pr2.features.segments, pr2.feature_plan.sampled.any()) == (0, (), False)
    drift = {*COLUMNS, "lift", "sample_fraction"}
    assert not drift & {name.removeprefix("pr2/") for name in pr2.metrics()}
    with pytest.raises(ReplayError), pr2.old_logprobs([b.micro_batch for b in data]) as session:
        toy.run(session, chunk, data[:1], backward=False)  # a pass that fails has no room to give back
    toy.old_logprobs(pr2, chunk, data)


# ---- the byte budget -------------------------------------------------------------------------------------------------


def cut(lengths: dict[int, int], sizes: Sequence[int], rows: Callable[[TokenGrid], TokenGrid]) -> list[toy.Batch]:
    """Micro-batches of so many sequences, the last size as often as it takes."""
    data: list[toy.Batch] = []
    ids, sizes = list(lengths), list(sizes)
    while ids:
        part, ids = ids[: sizes[0]], ids[sizes[0] :]
        sizes = sizes[1:] or sizes
        counts = [lengths[i] for i in part]
        grid = padded(part, counts, -(-max(counts) // 4) * 4)
        data.append(toy.Batch(MicroBatch(tuple(part), grid), torch.randn(*rows(grid).sequence.shape, H)))
    return data


def samples(lengths: dict[int, int], fraction: float) -> dict[int, int]:
    """Sampled tokens per sequence: of those from the last of a prompt of 3 to the last but one, which has no route."""
    candidates = {i: n - 1 - (min(3, n) - 1) for i, n in lengths.items()}
    return {i: min(c, max(1, round(c * fraction))) for i, c in candidates.items()}


@settings(max_examples=25)
@given(
    st.lists(st.integers(1, 24), min_size=1, max_size=7),
    st.integers(0, 60 * FEATURE),
    st.sampled_from([0.3, 1.0]),
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.integers(1, 3),
)
def test_features_obey_their_budget(
    counts: list[int], budget: int, fraction: float, first: list[int], second: list[int], passes: int
) -> None:
    """Tokens that there is no room for are not sampled, whatever the passes look like, and no sequence is left out as a whole."""
    model = Model(feature_bytes=budget, sample_fraction=fraction)
    pr2, lengths = model.pr2, dict(enumerate(counts))
    pr2.begin_rollout(toy.sequences(lengths, toy.random_tables(lengths, model.chunk.config)))
    data = cut(lengths, first, model.rows)
    share = -(-len(data) // passes)
    wanted = sum(samples(lengths, fraction).values())
    for start in range(0, len(data), share):
        toy.old_logprobs(pr2, model.chunk, data[start : start + share])
    tokens = pr2.feature_plan.sampled_tokens
    # All that there is room for, within the rounding of one token per pass.
    assert min(wanted, budget // FEATURE) - passes < tokens <= min(wanted, budget // FEATURE)
    assert (tokens == wanted) == (pr2.feature_plan.share == 1.0)
    toy.update(pr2, model.chunk, cut(dict(reversed(lengths.items())), second, model.rows), 2)
    assert pr2.features.nbytes == tokens * FEATURE
    assert pr2.features.peak_bytes == pr2.features.nbytes <= budget
    assert pr2.predictor.token_count_L.tolist() == [tokens] * L
    report = pr2.step(0.1)
    assert report["drift"]["tokens"] == [tokens] * L
    assert report["features_absent"] == 0


def budget_job(lengths: dict[int, int], budget: int) -> dict[str, Any]:
    """One rollout batch on a context-parallel rank; the training pass is cut otherwise and has one mini-step."""
    from megatron_pr2 import host

    host.init(context=2)
    model = Model(2, feature_bytes=budget)
    pr2 = model.pr2
    pr2.begin_rollout(toy.sequences(lengths, toy.random_tables(lengths, model.chunk.config)))
    toy.old_logprobs(pr2, model.chunk, cut(lengths, [1], model.rows))
    kept = pr2.features.nbytes
    data = cut(lengths, [3], model.rows)
    with pr2.actor_update([b.micro_batch for b in data], 2) as session:
        during = pr2.features.nbytes
        toy.run(session, model.chunk, data)
    return {
        "kept": kept,
        "during": during,
        "after": pr2.features.nbytes,
        "peak": pr2.features.peak_bytes,
        "moved": pr2.feature_plan.moved_tokens,
        "share": pr2.feature_plan.share,
        "held": np.concatenate([s.tokens for s in pr2.features.segments]).tolist(),
        "learned": pr2.step(0.1)["predictor"]["tokens"],
    }


def test_a_training_pass_that_is_cut_otherwise_holds_its_moved_features_on_top() -> None:
    """The budget is that of what is kept. What a pass fetches from other ranks comes on top and goes with the pass."""
    lengths = {i: 9 + 7 * i % 30 for i in range(9)}
    budget = 30 * FEATURE
    results = pool(2).run(budget_job, lengths, budget)
    assert results[0]["share"] == results[1]["share"] < 1.0
    held = [token for result in results for token in result["held"]]
    assert len(set(held)) == len(held) < sum(samples(lengths, 0.5).values())
    assert max(result["kept"] for result in results) == budget
    for result in results:
        assert 0 < result["kept"] <= budget
        assert result["kept"] == result["after"]
        assert result["during"] == result["peak"] == result["kept"] + result["moved"] * FEATURE
        assert result["learned"] == len(held) * L
        # Never more than the features of the tokens that the rank trains on.
        assert result["moved"] * FEATURE <= sum(r["kept"] for r in results)
    assert sum(result["moved"] for result in results) > 0


def test_a_failed_pass_gives_its_room_back_on_every_rank() -> None:
    """Or a second attempt would have none, and on some ranks only: they would then wait for each other's features."""
    lengths = {0: 16, 1: 16}
    grids = [packed([i], [n]) for i, n in lengths.items()]
    members = tuple(Member(c, 0, (0, 1), c == 0) for c in range(2))
    for me in range(2):
        store = FeatureStore(L, E, H, device=CPU, h_dtype=torch.bfloat16)
        plan = FeaturePlan(store, RankGroup(None, members, me, 2, 1), budget_bytes=16 * FEATURE, most_layers=L, device=CPU)
        plan.begin(TokenIndex(lengths), np.ones(32, dtype=bool))
        plan.make_room(grids[:1])
        for _ in range(3):
            plan.make_room(grids[1:])
            assert (plan.share, store.nbytes) == (1.0, 16 * FEATURE)
            plan.forget_last()
            assert store.nbytes == 8 * FEATURE
        plan.make_room([packed([1, 0], [16, 16])])
        assert (plan.share, store.nbytes) == (1.0, 16 * FEATURE)


def test_copies_under_way_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features in host memory: what the device has not delivered yet counts, and does not grow with the pass."""
    waits: list[int] = []
    stream = type("Stream", (), {"synchronize": lambda self: waits.append(1)})
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    monkeypatch.setattr("megatron_pr2.drift.features.STAGING_BYTES", 3 * FEATURE)

    class Elsewhere:
        """A tensor that says it is on a GPU."""

        def __init__(self, tensor: Tensor) -> None:
            self.tensor, self.device = tensor, torch.device("cuda")

        def __getitem__(self, share: slice) -> Tensor:
            return self.tensor[share]

    store = FeatureStore(L, E, H, device=CPU, h_dtype=torch.bfloat16)
    store.begin(20)
    store.add(np.arange(20))
    for start in range(0, 20, 2):
        where = store.locate(np.arange(start, start + 2), CPU)
        for layer in range(L):
            store.write(layer, where, Elsewhere(torch.ones(2, H)), Elsewhere(torch.full((2, E), start + layer)))
    assert store.peak_bytes == 24 * FEATURE  # a write may begin just below the bound and ends just above
    assert len(waits) == 5
    store.settle()
    assert store.nbytes == 20 * FEATURE
    (segment,) = store.segments
    assert (segment.h_LSH == 1).all()
    expected = torch.arange(20) // 2 * 2 + torch.arange(L)[:, None]
    assert torch.equal(segment.p_LSE, expected[..., None].expand(L, 20, E).float())
    store.add(np.zeros(0, dtype=np.int64))
    store.remove_last()
    assert store.nbytes == 20 * FEATURE
