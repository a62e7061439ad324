"""An HTTP proxy in front of an SGLang server that misbehaves by plan and says afterwards what it did.

Answers of /generate are damaged, replaced, delayed or cut off; every other path goes through as it is. One request per connection,
so that no fault of one request shows in another one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import httpx

from megatron_pr2.hf.shape import ModelShape
from tests.sglang.damage import ALL_FIELD_KINDS, ROUTE_KINDS, Damaged, damage_field, damage_routes

_MAX_HEAD = 64 << 10
_MAX_REQUEST = 64 << 20
# Earlier answers that a duplicate may be taken from.
_REMEMBERED = 8
_REMEMBERED_BYTES = 1 << 20

STATUS_KINDS = ("500", "502", "503", "429")
LINK_KINDS = ("delay", "hang", "cut", "close", "duplicate", *STATUS_KINDS)
ALL_KINDS = (*LINK_KINDS, *(f"routes/{kind}" for kind in ROUTE_KINDS), *(f"field/{kind}" for kind in ALL_FIELD_KINDS))


@dataclass
class FaultPlan:
    """Which calls of /generate go wrong, and how; the same for the same seed and order of calls.

    Attributes:
        kinds: taken in turn, so that none is forgotten.
        seed: of everything that is chosen at random.
        share: of the calls.
        limit: faults at most; None for no limit.
        per_request: faults at most for requests of the same sampling seed, so that a client that tries again gets through.
    """

    kinds: Sequence[str]
    seed: int = 0
    share: float = 1.0
    limit: int | None = None
    per_request: int | None = None

    def __post_init__(self) -> None:
        unknown = set(self.kinds) - set(ALL_KINDS)
        assert not unknown, f"no such faults: {unknown}"
        self._done = 0
        self._of_request: Counter[Any] = Counter()

    def next_fault(self, number: int, request: Any) -> tuple[str | None, Random]:
        """The fault of a call, None if it goes well, and the random numbers for its details."""
        rng = Random(f"{self.seed}:{number}")
        if not self.kinds or (self.limit is not None and self._done >= self.limit) or rng.random() >= self.share:
            return None, rng
        if self.per_request is not None and self._of_request[request] >= self.per_request:
            return None, rng
        self._of_request[request] += 1
        kind = self.kinds[self._done % len(self.kinds)]
        self._done += 1
        return kind, rng


@dataclass(frozen=True)
class Record:
    """What was done to one call of /generate.

    Attributes:
        number: of the call, in the order of arrival.
        request: its sampling seed.
        rid: that it came with.
        fault: None if it was answered honestly, also where a fault was planned and the answer gave no occasion for it.
        damaged: what the client received and has to make of it, for faults of the content.
    """

    number: int
    request: Any
    rid: Any
    fault: str | None
    damaged: Damaged | None = None


class MisbehavingProxy:
    """See `misbehaving`.

    Attributes:
        url: of the proxy.
        plan: of faults; None lets everything through. May be replaced at any time.
        records: of the calls of /generate that were answered while there was a plan.
        passed: calls of other paths.
    """

    def __init__(self, upstream: str, shape: ModelShape, *, hang_s: float) -> None:
        self.url = ""
        self.plan: FaultPlan | None = None
        self.records: list[Record] = []
        self.passed: Counter[str] = Counter()
        self._upstream = upstream
        self._shape = shape
        self._hang_s = hang_s
        self._calls = 0
        self._answers: deque[tuple[Any, bytes]] = deque(maxlen=_REMEMBERED)
        # Plain HTTP, and a new connection to the server for each request.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self._client = httpx.AsyncClient(trust_env=False, timeout=None, limits=limits, verify=False)

    def faults(self) -> list[Record]:
        """The calls that went wrong."""
        return [record for record in self.records if record.fault is not None]

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answers one request and hangs up; hangs up on the server when the client does."""
        try:
            method, path, headers = await _head(reader)
            body = await reader.readexactly(min(int(headers.get("content-length", "0")), _MAX_REQUEST))
            answering = asyncio.ensure_future(self._answer(method, path, headers, body, writer))
            leaving = asyncio.ensure_future(reader.read(1))
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            for task in (leaving, answering):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                    await task
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _answer(self, method: str, path: str, headers: dict[str, str], body: bytes, writer: asyncio.StreamWriter) -> None:
        plan = self.plan if path == "/generate" else None
        if plan is None:
            self.passed[path] += 1
            await self._pass(method, path, headers, body, writer)
            return
        asked = json.loads(body)
        request, rid = asked.get("sampling_params", {}).get("sampling_seed"), asked.get("rid")
        number, self._calls = self._calls, self._calls + 1
        fault, rng = plan.next_fault(number, request)
        record = Record(number, request, rid, fault)
        if fault in STATUS_KINDS:
            self.records.append(record)
            await _reply(writer, int(fault), b'{"error": {"message": "the proxy says no"}}')
            return
        if fault == "close":
            self.records.append(record)
            return
        status, answer = await self._ask(method, path, headers, body)
        if fault in ("delay", "hang"):
            self.records.append(record)
            await asyncio.sleep(self._hang_s if fault == "hang" else rng.uniform(0.05, 0.3))
            await _reply(writer, status, answer)
        elif fault == "cut":
            self.records.append(record)
            await _reply(writer, status, answer, sent=rng.randrange(len(answer)))
            writer.transport.abort()
        else:
            done, sent = self._spoilt(fault, status, answer, rng, record)
            if status == 200 and len(answer) <= _REMEMBERED_BYTES:
                self._answers.append((request, answer))
            self.records.append(done)
            await _reply(writer, status, sent)

    def _spoilt(self, fault: str | None, status: int, answer: bytes, rng: Random, record: Record) -> tuple[Record, bytes]:
        """The answer as it is sent, and the record of it; honest where there is nothing to spoil."""
        honest = replace(record, fault=None), answer
        if fault is None or status != 200:
            return honest
        earlier = [body for request, body in self._answers if request != record.request]
        if fault == "duplicate":
            return (record, rng.choice(earlier)) if earlier else honest
        parsed = json.loads(answer)
        if not parsed["output_ids"]:
            return honest
        place, kind = fault.split("/")
        if place == "field":
            damaged = damage_field(kind, parsed, rng)
        elif len(parsed["meta_info"].get("routed_experts") or "") < 8:
            return honest
        else:
            others = [json.loads(body)["meta_info"].get("routed_experts") for body in earlier]
            lengths = len(parsed["meta_info"]["routed_experts"])
            other = next((text for text in others if text and len(text) != lengths), None)
            damaged = damage_routes(kind, parsed, self._shape, rng, other)
        return replace(record, damaged=damaged), damaged.body

    async def _ask(self, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, bytes]:
        response = await self._client.request(method, self._upstream + path, headers=_forwarded(headers), content=body)
        return response.status_code, response.content

    async def _pass(self, method: str, path: str, headers: dict[str, str], body: bytes, writer: asyncio.StreamWriter) -> None:
        """As it comes, piece by piece."""
        async with self._client.stream(method, self._upstream + path, headers=_forwarded(headers), content=body) as response:
            kept = [(k, v) for k, v in response.headers.items() if k not in ("connection", "transfer-encoding", "keep-alive")]
            head = f"HTTP/1.1 {response.status_code} {response.reason_phrase}\r\n"
            writer.write((head + "".join(f"{k}: {v}\r\n" for k, v in [*kept, ("connection", "close")]) + "\r\n").encode("latin-1"))
            async for piece in response.aiter_raw():
                writer.write(piece)
                await writer.drain()

    async def close(self) -> None:
        await self._client.aclose()


@contextlib.contextmanager
def misbehaving(upstream: str, shape: ModelShape, *, hang_s: float = 60.0) -> Iterator[MisbehavingProxy]:
    """A proxy on a free port of 127.0.0.1, honest until it is given a plan.

    Args:
        upstream: URL of the server.
        hang_s: how long a "hang" lasts.
    """
    proxy = MisbehavingProxy(upstream, shape, hang_s=hang_s)
    loop = asyncio.new_event_loop()
    connections: set[asyncio.Task[None]] = set()

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections.add(task)
        try:
            await proxy.connection(reader, writer)
        except (httpx.TransportError, asyncio.CancelledError):
            writer.transport.abort()
        finally:
            connections.discard(task)

    async def serve() -> asyncio.Server:
        server = await asyncio.start_server(connection, "127.0.0.1", 0, limit=_MAX_HEAD)
        proxy.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        return server

    async def end() -> None:
        server.close()
        for task in list(connections):
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)
        await server.wait_closed()
        await proxy.close()

    thread = threading.Thread(target=loop.run_forever, name="misbehaving-proxy", daemon=True)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(serve(), loop).result(30)
    try:
        yield proxy
    finally:
        asyncio.run_coroutine_threadsafe(end(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _head(reader: asyncio.StreamReader) -> tuple[str, str, dict[str, str]]:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    method, path, _ = lines[0].split(" ")
    pairs = (line.split(":", 1) for line in lines[1:] if line)
    return method, path, {name.strip().lower(): value.strip() for name, value in pairs}


def _forwarded(headers: dict[str, str]) -> dict[str, str]:
    return {k: v for k, v in headers.items() if k not in ("host", "connection", "content-length", "keep-alive")}


async def _reply(writer: asyncio.StreamWriter, status: int, body: bytes, *, sent: int | None = None) -> None:
    """Sends the whole answer, or only its first `sent` bytes under the header of the whole."""
    head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
    writer.write(head.encode() + (body if sent is None else body[:sent]))
    await writer.drain()
