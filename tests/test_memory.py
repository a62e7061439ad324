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
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from megatron_pr2.attach import PR2, attach
from megatron_pr2.feature_plan import FeaturePlan
from megatron_pr2.features import FeatureStore
from megatron_pr2.layout import TokenGrid, packed, padded
from megatron_pr2.replay import MicroBatch
from megatron_pr2.replica import Member, RankGroup
from megatron_pr2.tokens import TokenIndex
from tests import toy
from tests.distributed import pool

pytestmark = pytest.mark.usefixtures("host_platform")

L, E, H, K = toy.LAYERS, toy.EXPERTS, toy.HIDDEN, toy.TOPK
FEATURE = L * (H * 2 + E * 4)  # bytes of one sampled token: h_old in bf16, p_old in fp32
ROUTE = L * K  # bytes of one token's routes
CPU = torch.device("cpu")


# ---- the meter -------------------------------------------------------------------------------------------------------


class Meter(TorchDispatchMode):
    """Bytes of the storages that torch allocated while the meter was on, and of numpy's buffers.

    Storages are counted from the operator that made them to their end, whoever holds them (autograd's graph included); numpy's
    buffers, on which torch.from_numpy builds, through tracemalloc, Python's own objects left out of `live`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.torch_live = self.torch_peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __enter__(self) -> Meter:
        tracemalloc.start()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        tracemalloc.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_iter((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._meet(tensor, own=False)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._meet(tensor, own=True)
        return result

    def _meet(self, tensor: Tensor, own: bool) -> None:
        storage = tensor.untyped_storage()
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
        arrays = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
        traces = tracemalloc.take_snapshot().filter_traces([arrays]).traces
        return self.torch_live + sum(trace.size for trace in traces)

    @property
    def traced(self) -> int:
        """Bytes of numpy's buffers and of Python's objects."""
        return tracemalloc.get_traced_memory()[0]

    def peak(self, function: Callable[[], Any]) -> int:
        """Most bytes held at once while `function` runs, above what is held before; Python's objects count as well.

        The sum of two peaks, of torch's and of the rest, which may not fall together.
        """
        gc.collect()
        before = self.torch_live, self.traced
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
        y = w.exp().sin().sum()
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
        self.rows = self.pr2.feature_plan._stage.rows

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
