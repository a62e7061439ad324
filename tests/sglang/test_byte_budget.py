"""Back-pressure in bytes: never more than the limit, in order, whatever is cancelled or fails in between."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_pr2.rollout.sglang.http import ByteBudget


async def settle() -> None:
    """Lets every task run until it waits for something; those that wait in line go one by one."""
    for _ in range(200):
        await asyncio.sleep(0)


class Holder:
    """A task that takes bytes and holds them until it is told to end."""

    def __init__(self, budget: ByteBudget, nbytes: int, order: list[int] | None = None) -> None:
        self.nbytes = nbytes
        self.holding = False
        self.end = asyncio.Event()
        self._order = [] if order is None else order
        self.task = asyncio.ensure_future(self._run(budget))

    async def _run(self, budget: ByteBudget) -> None:
        try:
            async with budget.take(self.nbytes):
                self.holding = True
                self._order.append(self.nbytes)
                await self.end.wait()
        finally:
            self.holding = False


@pytest.mark.parametrize(
    "sizes",
    [
        (80, 50, 10, 90, 5),  # also where a later one would fit
        (1, 500, 0),  # more than the limit goes alone
    ],
)
def test_first_come_first_served(sizes: tuple[int, ...]) -> None:
    async def main() -> None:
        budget = ByteBudget(100)
        order: list[int] = []
        holders = [Holder(budget, nbytes, order) for nbytes in sizes]
        await settle()
        assert order == [sizes[0]]
        for holder in holders:
            holder.end.set()
            await settle()
        assert order == list(sizes)
        assert budget.in_use == 0
        assert budget.peak == (500 if 500 in sizes else 100)

    asyncio.run(asyncio.wait_for(main(), 30))


def test_an_exception_gives_back_what_was_taken() -> None:
    async def main() -> None:
        budget = ByteBudget(10)
        with pytest.raises(KeyError):
            async with budget.take(10):
                raise KeyError
        assert budget.in_use == 0

    asyncio.run(main())


def test_a_waiter_cancelled_in_the_moment_of_its_turn_gives_it_back() -> None:
    async def main() -> None:
        budget = ByteBudget(100)
        holder, turn, behind = Holder(budget, 100), Holder(budget, 100), Holder(budget, 100)
        await settle()
        holder.end.set()
        while budget.in_use:  # until the bytes are released; the task itself has not run yet
            await asyncio.sleep(0)
        assert not turn.holding
        turn.task.cancel()
        await settle()
        assert behind.holding
        behind.end.set()
        await settle()
        assert budget.in_use == 0

    asyncio.run(asyncio.wait_for(main(), 30))


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
            assert budget.in_use <= 100 or len([n for n in held if n]) == 1
            if waiting:
                assert budget.in_use > 0
                assert budget.in_use + waiting[0].nbytes > 100
        for holder in holders:
            holder.end.set()
        await settle()
        ends = await asyncio.gather(*(h.task for h in holders), return_exceptions=True)
        assert all(end is None or isinstance(end, asyncio.CancelledError) for end in ends)
        assert budget.in_use == 0

    asyncio.run(asyncio.wait_for(main(), 30))
