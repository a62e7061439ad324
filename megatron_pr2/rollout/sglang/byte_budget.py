"""ByteBudget: bounds the bytes of responses that are being received or decoded; more than that waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from megatron_pr2.errors import ConfigError


class ByteBudget:
    """Back-pressure in bytes for the tasks of one event loop, first come first served.

    Strict order costs throughput where a large request waits in front of small ones that would fit; in return none starves.

    Args:
        limit: bytes that may be taken at once.

    Raises:
        ConfigError: the limit is not positive.

    Attributes:
        in_use: bytes taken now.
        peak: most bytes taken at once; above `limit` only if a single request was larger.
        waiting: tasks that wait their turn.
    """

    def __init__(self, limit: int) -> None:
        if limit < 1:
            raise ConfigError(f"ByteBudget: limit={limit}; expected at least 1 byte")
        self.limit = limit
        self.in_use = self.peak = self.waiting = 0
        self._turn = asyncio.Lock()  # its queue is first in, first out; only the holder waits for bytes
        self._released = asyncio.Event()

    @asynccontextmanager
    async def take(self, nbytes: int) -> AsyncIterator[None]:
        """Waits until `nbytes` fit and holds them within the block. More than the limit waits until nothing is held.

        A task that holds bytes must not take more: it could wait for itself.

        Raises:
            ValueError: `nbytes` is negative.
        """
        if nbytes < 0:
            raise ValueError(f"ByteBudget: cannot take {nbytes} bytes")
        self.waiting += 1
        try:
            async with self._turn:
                while self.in_use and self.in_use + nbytes > self.limit:
                    self._released.clear()
                    await self._released.wait()
                self.in_use += nbytes
        finally:
            self.waiting -= 1
        self.peak = max(self.peak, self.in_use)
        try:
            yield
        finally:
            self.in_use -= nbytes
            self._released.set()
