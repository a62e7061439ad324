"""Time and memory of subjects that take turns; for bench_router."""

from __future__ import annotations

import gc
import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from bench_router_variants import Subject
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class AllocationTracker(TorchDispatchMode):
    """Bytes of the tensors that operators make inside, and their peak; kernels' own scratch space is not seen.

    Attributes:
        peak: most bytes alive at once.
        operators: calls that do something to data (no views): what a GPU would be sent.
    """

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[int, int] = {}
        self._bytes = 0
        self.peak = self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **kwargs)
        self.operators += not func.is_view
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self._live:
                    self._live[storage._cdata] = storage.nbytes()
                    self._bytes += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage._cdata).atexit = False
        self.peak = max(self.peak, self._bytes)
        return result

    def _gone(self, key: int) -> None:
        self._bytes -= self._live.pop(key)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def footprint(subject: Subject, device: torch.device) -> tuple[int, int]:
    """(most bytes that one sample holds above what was held before it, operators that it runs)."""
    if device.type == "cuda":
        with subject.opened() as run:
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            run()
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
    with subject.opened() as run, AllocationTracker() as tracker:
        run()
    return peak if device.type == "cuda" else tracker.peak, tracker.operators


@dataclass
class Times:
    """Seconds of one subject, one entry per round: until done, until the host had issued everything, of this process's CPU."""

    wall: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def sample(subject: Subject, device: torch.device, times: Times | None) -> None:
    """Runs one sample; times=None does not count it."""
    with subject.opened() as run:
        synchronise(device)
        started, busy = time.perf_counter(), time.process_time()
        run()
        issued = time.perf_counter()
        synchronise(device)
        if times is not None:
            times.wall.append(time.perf_counter() - started)
            times.host.append(issued - started)
            times.cpu.append(time.process_time() - busy)


def take_turns(
    subjects: Sequence[Subject], device: torch.device, repeats: int, warm_up: int, tick: Callable[[], None]
) -> list[Times]:
    """Times per subject; each round starts with another subject, so that none has the better place."""
    times = [Times() for _ in subjects]
    # What is there now stays: collections between rounds need not walk the models again.
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        for number in range(-warm_up, repeats):
            gc.collect()
            for place in range(len(subjects)):
                index = (place + number) % len(subjects)
                sample(subjects[index], device, times[index] if number >= 0 else None)
            tick()
    finally:
        gc.enable()
        gc.unfreeze()
    return times


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, first and third quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def ratios(mine: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """Quartiles of the ratios within each round."""
    return quartiles([a / b for a, b in zip(mine, other, strict=True)])
