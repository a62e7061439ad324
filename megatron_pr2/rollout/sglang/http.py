"""HttpClient: JSON over HTTP to one server, with deadlines, bounded responses and retries; many requests at once.

Requests run on an event loop in a thread of their own, so that callers may be synchronous, or live inside another event loop
(a notebook), and so that a weight transfer can wait for a reply and for the transfer itself at once.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import httpx

from megatron_pr2.errors import RolloutError

logger = logging.getLogger(__name__)

T = TypeVar("T")
Reserve = Callable[[int], Awaitable[None]]
# Aborts and health checks must get through while as many requests as allowed are in flight.
_CONTROL_CONNECTIONS = 16
_RETRIED_STATUS = (429, 500, 502, 503, 504)


class RefusedError(RolloutError):
    """The server understood and refused: an HTTP status other than 200 that is not worth a retry."""

    def __init__(self, message: str, status: int, body: str) -> None:
        super().__init__(message)
        self.status, self.body = status, body


class AttemptError(RolloutError):
    """No response, HTTP 429 or 5xx, or more than any valid response, from a server that is alive; another attempt may succeed."""


class TimedOutError(AttemptError):
    """One attempt took too long."""


class EngineDiedError(RolloutError):
    """The server is gone or does not answer its health check."""


class LoopThread:
    """An event loop on a thread of its own, for callers that are not asynchronous."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sglang-http", daemon=True)
        self._thread.start()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine on the loop and waits; cancels it if the wait is interrupted."""
        future = self.submit(coroutine)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Ends the thread; safe to call twice."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


class ByteBudget:
    """Bounds the bytes of responses that tasks of one event loop receive or decode at once; more than that waits.

    First come first served: a large request delays small ones that would fit, and in return none starves.
    """

    def __init__(self, limit: int) -> None:
        self.in_use = self.peak = 0
        self._limit = limit
        self._turn = asyncio.Lock()  # its queue is first in, first out; only the holder waits for bytes
        self._released = asyncio.Event()

    @asynccontextmanager
    async def take(self, nbytes: int) -> AsyncIterator[None]:
        """Holds bytes within the block; more than the limit waits until nothing is held. Who holds bytes must not take more."""
        async with self._turn:
            while self.in_use and self.in_use + nbytes > self._limit:
                self._released.clear()
                await self._released.wait()
            self.in_use += nbytes
        self.peak = max(self.peak, self.in_use)
        try:
            yield
        finally:
            self.in_use -= nbytes
            self._released.set()


def auth_headers(api_key: str | None) -> dict[str, str]:
    """What every request presents: an uncompressed response is wanted, and the key as a bearer token."""
    return {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})


def ask_health(url: str, timeout_s: float, path: str = "/health") -> tuple[int, str]:
    """The status of a server's answer, 0 if there is none, and what is wrong with it, "" if nothing is. /health needs no key."""
    try:
        with httpx.stream("GET", url + path, timeout=timeout_s, trust_env=False) as answer:
            status = answer.status_code
    except httpx.HTTPError as error:
        return 0, f"{url} does not answer ({type(error).__name__}: {error})"
    return status, "" if status == 200 else f"{url}{path} answers {status}"


class HttpClient:
    """Client of one base URL.

    Args:
        concurrency: requests that its user has in flight at once; some connections more are kept for control.
        timeout_s: one attempt.
        why_dead: called before every retry; returns None while the server is alive, else the reason for the error message.
        loop: where it runs; a thread of its own, which ends with it, if None.

    Attributes:
        retried: attempts after the first of a request.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None,
        concurrency: int = 4,
        timeout_s: float = 60.0,
        retries: int = 0,
        backoff_s: float = 0.5,
        why_dead: Callable[[], str | None] = lambda: None,
        loop: LoopThread | None = None,
    ) -> None:
        self._url, self._timeout_s, self._retries, self._backoff_s = url, timeout_s, retries, backoff_s
        self._why_dead = why_dead
        self.retried = 0
        self._own_loop = loop is None
        self._loop = LoopThread() if loop is None else loop
        self.submit, self.run = self._loop.submit, self._loop.run
        self._closed = False
        # SGLang's web server drops idle connections after 5 s: what it is about to drop must not be used again.
        limits = httpx.Limits(max_connections=concurrency + _CONTROL_CONNECTIONS, keepalive_expiry=2.0)
        # trust_env=False: a proxy of the environment must see neither the requests nor the key.
        self._client = httpx.AsyncClient(headers=auth_headers(api_key), trust_env=False, timeout=None, limits=limits)

    def close(self) -> None:
        """Closes the connections; safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self.run(self._client.aclose())
        if self._own_loop:
            self._loop.close()

    async def json(self, method: str, path: str, payload: Mapping[str, Any] | None = None, *, where: str, **options: Any) -> Any:
        """The parsed JSON response; as :meth:`body`, and raises RolloutError if it is not JSON."""
        text = (await self.body(method, path, payload, where=where, **options)).decode("utf-8", errors="replace")
        try:
            return json.loads(text)
        except ValueError as error:
            raise RolloutError(f"{where}: {path} answered with something that is not JSON: {text[:200]!r}") from error

    async def body(
        self,
        method: str,
        path: str,
        payload: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
        *,
        where: str,
        max_bytes: int = 1 << 20,
        retry: bool = True,
        timeout_s: float | None = None,
        reserve: Reserve | None = None,
    ) -> bytearray:
        """Sends one request and returns the body of its 200 response; raises the errors of this module as their docstrings say.

        Args:
            payload: sent as JSON; a function makes a new one for every attempt.
            max_bytes: a longer response is refused while it arrives.
            retry: whether to try again after a broken connection, 429 or 5xx; False where a repetition has another effect.
            reserve: awaited with the number of bytes that are about to be read; the server waits meanwhile.
        """
        attempts = 1 + (self._retries if retry else 0)
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        problem = ""
        for attempt in range(attempts):
            if attempt:
                self.retried += 1
                await asyncio.sleep(self._backoff_s * 2 ** (attempt - 1))
                await self._raise_if_dead(where, problem)
            if self._closed:  # before, or during the pause: httpx would raise a RuntimeError
                raise EngineDiedError(f"{where}: the connection to {self._url} was closed")
            try:
                content = payload() if callable(payload) else payload
                async with asyncio.timeout(timeout_s) as limit:
                    status, body = await self._attempt(method, path, content, max_bytes, where, reserve, limit)
            except TimeoutError as error:
                await self._raise_if_dead(where, f"no answer within {timeout_s:g} s")
                raise TimedOutError(
                    f"{where}: {path} gave no answer within {timeout_s:g} s; raise request_timeout_s or look at the server"
                ) from error
            except httpx.RequestError as error:
                problem = f"connection failed ({type(error).__name__}: {error})"
            else:
                if status == 200:
                    return body
                text = body.decode("utf-8", errors="replace")
                problem = f"HTTP {status}: {text[:500]}"
                if status not in _RETRIED_STATUS:
                    raise RefusedError(f"{where}: {path} was refused with {problem}", status, text)
            logger.info("%s: %s, attempt %d of %d: %s", where, path, attempt + 1, attempts, problem)
        if not retry:
            await asyncio.sleep(self._backoff_s)  # the end of a dying process takes a moment to be seen
        await self._raise_if_dead(where, problem)
        raise AttemptError(f"{where}: {path} failed {attempts} times although the server is alive; last: {problem}")

    async def _raise_if_dead(self, where: str, problem: str) -> None:
        reason = await asyncio.to_thread(self._why_dead)
        if reason is not None:
            raise EngineDiedError(f"{where}: {problem}; the engine died: {reason}")

    async def _attempt(
        self, method: str, path: str, payload: Any, max_bytes: int, where: str, reserve: Reserve | None, limit: asyncio.Timeout
    ) -> tuple[int, bytearray]:
        too_long = AttemptError(f"{where}: {path} answered with more than the expected {max_bytes} bytes")
        async with self._client.stream(method, self._url + path, json=payload) as response:
            announced = response.headers.get("content-length", "")
            expected = int(announced) if announced.isascii() and announced.isdigit() else max_bytes
            if expected > max_bytes:
                raise too_long
            if reserve is not None:
                # The time limit stands still meanwhile: waiting for room is no fault of the server.
                loop, ends = asyncio.get_running_loop(), limit.when()
                began = loop.time()
                limit.reschedule(None)
                await reserve(expected)
                if ends is not None:
                    limit.reschedule(ends + loop.time() - began)
            body = bytearray()
            async for chunk in response.aiter_bytes():
                if len(body) + len(chunk) > max_bytes:
                    raise too_long
                body += chunk
            return response.status_code, body
