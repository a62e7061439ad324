"""Back-pressure in bytes: never more than the limit, in order, whatever is cancelled or fails in between."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_pr2.errors import ConfigError
from megatron_pr2.rollout.sglang.byte_budget import ByteBudget


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 30))


async def settle() -> None:
    """Lets every task run until it waits for something; those that wait in line go one by one."""
    for _ in range(200):
        await asyncio.sleep(0)


class Holder:
    """A task that takes bytes and holds them until it is told to end."""

    def __init__(self, budget: ByteBudget, nbytes: int, order: list[int] | None = None, number: int = 0) -> None:
        self.nbytes = nbytes
        self.holding = False
        self.end = asyncio.Event()
        self._order = [] if order is None else order
        self._number = number
        self.task = asyncio.ensure_future(self._run(budget))

    async def _run(self, budget: ByteBudget) -> None:
        try:
            async with budget.take(self.nbytes):
                self.holding = True
                self._order.append(self._number)
                await self.end.wait()
        finally:
            self.holding = False

    async def cancel(self) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task


def test_what_does_not_fit_waits() -> None:
    async def main() -> None:
        budget = ByteBudget(100)
        first, second, third = Holder(budget, 60), Holder(budget, 40), Holder(budget, 1)
        await settle()
        assert (first.holding, second.holding, third.holding) == (True, True, False)
        assert (budget.in_use, budget.waiting, budget.peak) == (100, 1, 100)
        second.end.set()
        await settle()
        assert third.holding
        assert budget.in_use == 61
        first.end.set()
        third.end.set()
        await settle()
        assert (budget.in_use, budget.waiting, budget.peak) == (0, 0, 100)

    run(main())


def test_first_come_first_served_also_where_a_later_one_would_fit() -> None:
    async def main() -> None:
        budget = ByteBudget(100)
        order: list[int] = []
        holders = [Holder(budget, nbytes, order, i) for i, nbytes in enumerate((80, 50, 10, 90, 5))]
        await settle()
        assert order == [0]
        for holder in holders:
            holder.end.set()
            await settle()
        assert order == [0, 1, 2, 3, 4]

    run(main())


def test_more_than_the_limit_goes_alone() -> None:
    async def main() -> None:
        budget = ByteBudget(100)
        small, huge, late = Holder(budget, 1), Holder(budget, 500), Holder(budget, 0)
        await settle()
        assert (small.holding, huge.holding, late.holding) == (True, False, False)
        small.end.set()
        await settle()
        assert (huge.holding, late.holding) == (True, False)
        assert budget.peak == 500
        huge.end.set()
        await settle()
        assert late.holding
        await late.cancel()

    run(main())


def test_an_exception_gives_back_what_was_taken() -> None:
    async def main() -> None:
        budget = ByteBudget(10)
        with pytest.raises(KeyError):
            async with budget.take(10):
                raise KeyError
        assert budget.in_use == 0

    run(main())


def test_a_cancelled_waiter_leaves_the_queue_and_lets_the_next_one_pass() -> None:
    async def main() -> None:
        budget = ByteBudget(100)
        holder, blocked, behind = Holder(budget, 50), Holder(budget, 90), Holder(budget, 50)
        await settle()
        assert not behind.holding
        await blocked.cancel()
        await settle()
        assert behind.holding
        assert budget.waiting == 0
        await holder.cancel()
        await behind.cancel()
        assert budget.in_use == 0

    run(main())


def test_a_waiter_cancelled_in_the_moment_of_its_turn_gives_it_back() -> None:
    async def main() -> None:
        budget = ByteBudget(100)
        holder, turn, behind = Holder(budget, 100), Holder(budget, 100), Holder(budget, 100)
        await settle()
        holder.end.set()
        while budget.in_use:  # until the bytes are released; the task itself has not run yet
            await asyncio.sleep(0)
        assert not turn.holding
        await turn.cancel()
        await settle()
        assert behind.holding
        await behind.cancel()
        assert budget.in_use == 0

    run(main())


@pytest.mark.parametrize("release_first", [True, False])
def test_a_waiter_cancelled_while_bytes_are_released_takes_nothing(release_first: bool) -> None:
    async def main() -> None:
        budget = ByteBudget(100)
        holder, cancelled, behind = Holder(budget, 100), Holder(budget, 100), Holder(budget, 60)
        await settle()
        steps = [holder.end.set, cancelled.task.cancel]
        for step in steps if release_first else reversed(steps):
            step()
        await settle()
        assert cancelled.task.cancelled()
        assert behind.holding
        assert (budget.in_use, budget.waiting) == (60, 0)
        await behind.cancel()

    run(main())


@given(st.lists(st.tuples(st.sampled_from(["take", "end", "cancel"]), st.integers(0, 150), st.booleans()), max_size=60))
def test_any_order_of_events_keeps_the_books(events: list[tuple[str, int, bool]]) -> None:
    """Held is what is accounted, no more than the limit unless alone, and nobody waits who could go."""

    async def main() -> None:
        budget = ByteBudget(100)
        holders: list[Holder] = []
        for kind, number, pause in events:
            if kind == "take":
                holders.append(Holder(budget, number))
            elif holders and kind == "end":
                holders[number % len(holders)].end.set()
            elif holders:
                holders[number % len(holders)].task.cancel()
            if not pause:
                continue
            await settle()
            held = [h.nbytes for h in holders if h.holding]
            waiting = [h for h in holders if not h.task.done() and not h.holding]
            assert budget.in_use == sum(held)
            assert budget.waiting == len(waiting)
            assert budget.in_use <= 100 or len([n for n in held if n]) == 1
            if waiting:
                assert budget.in_use > 0
                assert budget.in_use + waiting[0].nbytes > 100
        for holder in holders:
            holder.end.set()
        await settle()
        ends = await asyncio.gather(*(h.task for h in holders), return_exceptions=True)
        assert all(end is None or isinstance(end, asyncio.CancelledError) for end in ends)
        assert (budget.in_use, budget.waiting) == (0, 0)

    run(main())


def test_senseless_numbers_are_refused() -> None:
    async def main() -> None:
        with pytest.raises(ValueError, match="-1 bytes"):
            async with ByteBudget(5).take(-1):
                pass

    run(main())
    with pytest.raises(ConfigError, match="limit=0"):
        ByteBudget(0)
