"""HttpClient: JSON over HTTP to one server, with deadlines, bounded answers and retries; many requests at once.

Requests run on an event loop in a thread of their own, so that callers may be synchronous, or live inside another event loop
(a notebook), and so that a weight transfer can wait for a reply and for the transfer itself at once.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

import httpx

from megatron_pr2.errors import RolloutError

logger = logging.getLogger(__name__)

T = TypeVar("T")
_RETRIED_STATUS = (429, 500, 502, 503, 504)


class RefusedError(RolloutError):
    """The server understood and refused: an HTTP status other than 200 that is not worth a retry.

    Attributes:
        status, body: of the answer.
    """

    def __init__(self, message: str, status: int, body: str) -> None:
        super().__init__(message)
        self.status = status
        self.body = body


class HttpClient:
    """Client of one base URL.

    Args:
        url: base URL.
        api_key: sent as a bearer token, never logged; None for a server without one.
        concurrency: connections, and requests in flight.
        timeout_s: one attempt.
        retries, backoff_s: see SGLangConfig.
        why_dead: called before every retry; returns None while the server is alive, else the reason for the error message.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None,
        concurrency: int,
        timeout_s: float,
        retries: int,
        backoff_s: float,
        why_dead: Callable[[], str | None],
    ) -> None:
        self._url = url
        self._timeout_s = timeout_s
        self._retries = retries
        self._backoff_s = backoff_s
        self._why_dead = why_dead
        self.retried = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sglang-http", daemon=True)
        self._thread.start()
        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
        # trust_env=False: a proxy of the environment must see neither the requests nor the key.
        self._client = httpx.AsyncClient(
            headers=headers, trust_env=False, timeout=None, limits=httpx.Limits(max_connections=concurrency)
        )
        self._slots = asyncio.Semaphore(concurrency)

    def close(self) -> None:
        """Closes the connections and ends the thread; safe to call twice."""
        if self._loop.is_closed():
            return
        self.run(self._client.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Runs a coroutine on the client's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine on the client's loop and waits; cancels it if the wait is interrupted."""
        future = self.submit(coroutine)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def json(
        self,
        method: str,
        path: str,
        payload: Mapping[str, Any] | None = None,
        *,
        where: str,
        max_bytes: int = 1 << 20,
        retry: bool = True,
        timeout_s: float | None = None,
    ) -> Any:
        """The parsed JSON answer; see :meth:`body`.

        Raises:
            RolloutError: additionally, if the answer is not JSON.
        """
        body = await self.body(method, path, payload, where=where, max_bytes=max_bytes, retry=retry, timeout_s=timeout_s)
        text = body.decode("utf-8", errors="replace")
        try:
            return json.loads(text)
        except ValueError as error:
            raise RolloutError(f"{where}: {path} answered with something that is not JSON: {text[:200]!r}") from error

    async def body(
        self,
        method: str,
        path: str,
        payload: Mapping[str, Any] | None = None,
        *,
        where: str,
        max_bytes: int = 1 << 20,
        retry: bool = True,
        timeout_s: float | None = None,
    ) -> bytearray:
        """Sends one request and returns the body of its 200 answer.

        Args:
            where: names the request in errors.
            max_bytes: a longer answer is refused while it arrives.
            retry: whether to try again after a broken connection, 429 or 5xx; False where a repetition has another effect.
            timeout_s: of one attempt, the client's default if None.

        Raises:
            RefusedError: another HTTP status than 200, 429 and 5xx.
            RolloutError: no usable answer, and why.
        """
        attempts = 1 + (self._retries if retry else 0)
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        problem = ""
        for attempt in range(attempts):
            if attempt:
                self.retried += 1
                await asyncio.sleep(self._backoff_s * 2 ** (attempt - 1))
                await self._raise_if_dead(where, problem)
            try:
                async with self._slots:
                    status, body = await asyncio.wait_for(self._attempt(method, path, payload, max_bytes), timeout_s)
            except asyncio.TimeoutError as error:
                await self._raise_if_dead(where, f"no answer within {timeout_s:g} s")
                raise RolloutError(
                    f"{where}: {path} gave no answer within {timeout_s:g} s; raise request_timeout_s or look at the server"
                ) from error
            except httpx.TransportError as error:
                problem = f"connection failed ({type(error).__name__}: {error})"
            except _TooLongError as error:
                raise RolloutError(f"{where}: {path} answered with more than the expected {max_bytes} bytes") from error
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
        raise RolloutError(f"{where}: {path} failed {attempts} times although the server is alive; last: {problem}")

    async def _raise_if_dead(self, where: str, problem: str) -> None:
        reason = await asyncio.to_thread(self._why_dead)
        if reason is not None:
            raise RolloutError(f"{where}: {problem}; the engine died: {reason}")

    async def _attempt(self, method: str, path: str, payload: Mapping[str, Any] | None, max_bytes: int) -> tuple[int, bytearray]:
        async with self._client.stream(method, self._url + path, json=payload) as response:
            body = bytearray()
            async for chunk in response.aiter_bytes():
                if len(body) + len(chunk) > max_bytes:
                    raise _TooLongError
                body += chunk
            return response.status_code, body


class _TooLongError(Exception):
    """The answer exceeds its bound."""
