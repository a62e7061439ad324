"""The process pool of the tests reports errors, deaths and time-outs with tracebacks, never hangs, and recovers."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed import Pool, WorkerError


def _sum(value: float) -> float:
    total = torch.full((1,), value * (dist.get_rank() + 1))
    dist.all_reduce(total)
    return float(total)


def _fail_on_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("wrong on purpose")
    dist.barrier()


def _die() -> None:
    if dist.get_rank() == 0:
        os._exit(7)
    dist.barrier()


def _hang() -> None:
    if dist.get_rank() == 0:
        time.sleep(600)


def _unpicklable() -> object:
    return lambda: None


@pytest.fixture(scope="module")
def workers() -> Pool:
    own = Pool(2)
    yield own
    own.close()


def test_results_come_in_the_order_of_ranks(workers: Pool) -> None:
    assert workers.run(_sum, 2.0) == [6.0, 6.0]
    assert workers.run(dist.get_rank) == [0, 1]


@pytest.mark.parametrize(
    ("fn", "timeout", "expected"),
    [
        (_fail_on_one, 60, r"rank 0 of 2: did not finish(.|\n)*rank 1 of 2: Traceback(.|\n)*wrong on purpose"),
        (_die, 60, "died with exit code 7"),
        (_hang, 1.0, r"limit 1 s\)(.|\n)*rank 0 of 2: did not finish"),
        (_unpicklable, 60, "cannot be pickled"),
    ],
)
def test_failures_are_reported_and_the_pool_recovers(
    workers: Pool, monkeypatch: pytest.MonkeyPatch, fn: object, timeout: float, expected: str
) -> None:
    monkeypatch.setattr("tests.distributed.GRACE_SECONDS", 0.5)
    with pytest.raises(WorkerError, match=expected):
        workers.run(fn, timeout=timeout)  # type: ignore[arg-type]
    assert workers.run(_sum, 1.0) == [3.0, 3.0]
