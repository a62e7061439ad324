"""ByteBudget: answers in flight never hold more bytes than agreed; who would exceed that waits its turn."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from megatron_pr2.errors import ConfigError


class ByteBudget:
    """Back-pressure in bytes for the tasks of one event loop, first come first served.

    Being fair costs throughput where a large request waits in front of small ones that would fit; in return no request starves.

    Args:
        limit: bytes that may be taken at once.

    Raises:
        ConfigError: the limit is not positive.

    Attributes:
        in_use: bytes taken now.
        peak: most bytes that were taken at once; above `limit` only if a single request was.
    """

    def __init__(self, limit: int) -> None:
        if limit < 1:
            raise ConfigError(f"ByteBudget: limit={limit}; expected at least 1 byte")
        self.limit = limit
        self.in_use = 0
        self.peak = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def waiting(self) -> int:
        """Tasks that wait their turn."""
        return len(self._waiting)

    @asynccontextmanager
    async def take(self, nbytes: int) -> AsyncIterator[None]:
        """Waits until `nbytes` fit and holds them within the block. More than the limit waits until nothing is held and goes alone.

        A task that holds bytes must not take more: it could wait for itself.

        Raises:
            ValueError: `nbytes` is negative.
        """
        if nbytes < 0:
            raise ValueError(f"ByteBudget: cannot take {nbytes} bytes")
        await self._acquire(nbytes)
        try:
            yield
        finally:
            self._release(nbytes)

    def _fits(self, nbytes: int) -> bool:
        return self.in_use == 0 or self.in_use + nbytes <= self.limit

    def _hold(self, nbytes: int) -> None:
        self.in_use += nbytes
        self.peak = max(self.peak, self.in_use)

    async def _acquire(self, nbytes: int) -> None:
        if not self._waiting and self._fits(nbytes):
            self._hold(nbytes)
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = nbytes, turn
        self._waiting.append(entry)
        try:
            await turn
        except BaseException:
            if turn.done() and not turn.cancelled():
                self._release(nbytes)  # its turn had come in the same breath
            else:
                if entry in self._waiting:
                    self._waiting.remove(entry)
                self._admit()  # it may have been in the way of those behind it
            raise

    def _release(self, nbytes: int) -> None:
        self.in_use -= nbytes
        self._admit()

    def _admit(self) -> None:
        """Gives as many of those in front their turn as fit."""
        while self._waiting and self._fits(self._waiting[0][0]):
            nbytes, turn = self._waiting.popleft()
            if not turn.cancelled():
                # Held here, not when the task runs: what comes in between must see it.
                self._hold(nbytes)
                turn.set_result(None)
