"""Fleet: the replicas of an engine while they sample: who gets an attempt, what is in flight, and how all of it is halted.

Everything here runs on the engine's event loop unless it says otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from typing import Any

from megatron_pr2.errors import RolloutError
from megatron_pr2.hf.shape import ModelShape
from megatron_pr2.rollout.base import SamplingParams
from megatron_pr2.rollout.sglang import wire
from megatron_pr2.rollout.sglang.config import SGLangConfig
from megatron_pr2.rollout.sglang.episode import Episode
from megatron_pr2.rollout.sglang.http import ByteBudget, EngineDiedError, HttpClient, TimedOutError
from megatron_pr2.rollout.sglang.replica import SGLangReplica
from megatron_pr2.rollout.sglang.routes import parse_body
from megatron_pr2.rollout.sglang.wire import Ask, Sampled

logger = logging.getLogger(__name__)

# An abort that overtakes its request is lost, so aborts are repeated until nothing is in flight.
_ABORT_EVERY_S = 0.25
_ABORT_TIMEOUT_S = 10.0
# Larger responses are decoded in a thread.
_DECODE_INLINE_BYTES = 1 << 20


class Fleet:
    """Sends attempts to replicas.

    Attributes:
        front: client of the router, None where attempts go to the replicas directly.
        lost: replicas that died while sampling and have not been started again, by index, and why.
        halts: how often everything in flight was told to stop.
        open: whether attempts may be sent; not while weights are replaced.
        of_group: the replica that holds the prefix of a group of this call, by index; for each horizon.
    """

    def __init__(self, config: SGLangConfig, shape: ModelShape, replicas: list[SGLangReplica]) -> None:
        self.replicas = replicas
        self.front: HttpClient | None = None
        self.lost: dict[int, str] = {}
        self.halts = 0
        self._config, self._shape = config, shape
        self._budget = ByteBudget(config.answer_bytes)
        self.open = asyncio.Event()
        self.open.set()
        self._paused: list[SGLangReplica] = []
        self._in_flight: dict[str, SGLangReplica | None] = {}
        self._left: dict[str, SGLangReplica | None] = {}
        self.of_group: dict[tuple[int, float | None], int] = {}

    def live(self) -> list[SGLangReplica]:
        """Replicas that are connected, usable and not lost."""
        return [r for r in self.reachable() if r.unusable is None]

    def reachable(self) -> list[SGLangReplica]:
        """Replicas that are connected and not lost, whatever their weights are."""
        return [r for r in self.replicas if r.connected and r.index not in self.lost]

    async def attempt(self, episode: Episode, sampling: SamplingParams, where: str) -> Sampled:
        """Sends one attempt and returns its checked response.

        Raises:
            AnswerError, RouteError: an invalid response.
            TimedOutError: none in time; it was aborted.
            EngineDiedError: no replica is left, or the one that was asked died (it is among `lost` then).
            RolloutError: the server refused, or somebody else replaced its weights.
        """
        replica = None if self.front is not None else self._choose(episode)
        client = self.front if replica is None else replica.http
        assert client is not None
        asked = [replica] if replica is not None else self.reachable()
        if not asked:
            raise EngineDiedError(self.nothing_left())

        def check_usable() -> None:  # a router sends attempts to unusable replicas all the same
            for one in asked:
                one.check_usable()

        check_usable()
        horizon = asked[0].horizon
        episode.sample_for(horizon)
        began = [len(r.labels) - 1 for r in asked]
        newest = max((r.label for r in asked), key=wire.parse_version)
        cache_key = f"pr2.{newest}" if horizon is None else f"pr2.{newest}.{horizon:g}"
        asks: list[Ask] = []

        def payload() -> dict[str, Any]:
            # Another try of the HTTP client is another attempt to the server, which may still be busy with the one before.
            if asks:
                self._in_flight.pop(asks[-1].rid, None)
            asks.append(episode.ask(cache_key))
            self._in_flight[asks[-1].rid] = replica
            return wire.generate_payload(asks[-1], sampling)

        num_tokens = episode.num_tokens + sampling.max_new_tokens  # also of the rows that a server sends unasked
        if replica is not None:
            replica.load += 1
        try:
            async with contextlib.AsyncExitStack() as held:

                async def reserve(num_bytes: int) -> None:
                    await held.aclose()
                    await held.enter_async_context(self._budget.take(num_bytes))

                limit = wire.max_answer_bytes(num_tokens, self._shape)
                body = await client.body("POST", "/generate", payload, where=where, max_bytes=limit, reserve=reserve)
                if self._config.interrupt == "in_place":  # an update of this very moment may yet fail
                    await self.open.wait()
                check_usable()
                # Weights may be replaced any number of times while attempts are paused in place.
                labels = [label for r, first in zip(asked, began, strict=True) for label in r.labels[first:]]
                allowed = {label: wire.parse_version(label) for label in labels}

                def parse() -> Sampled:
                    return wire.parse_generate(parse_body(body, where), asks[-1], self._shape, allowed, where)

                return parse() if len(body) < _DECODE_INLINE_BYTES else await asyncio.to_thread(parse)
        except EngineDiedError as error:
            if replica is not None and replica.index not in self.lost:
                self.lost[replica.index] = str(error)
                logger.warning("%s is lost: %s", replica.name, str(error).splitlines()[0])
            raise
        except TimedOutError:
            await self._abort({ask.rid: replica for ask in asks})
            raise
        except asyncio.CancelledError:
            self._left |= {ask.rid: replica for ask in asks[-1:]}
            raise
        finally:
            if asks:
                self._in_flight.pop(asks[-1].rid, None)
            if replica is not None:
                replica.load -= 1

    def _choose(self, episode: Episode) -> SGLangReplica:
        """The replica that holds the sequence's or the group's prefix, unless it is much busier than the idlest one.

        Of those with gates for the horizon that the response is for, or was begun with; of those for the nearest if none is left.
        """
        live = self.live()
        if not live:
            raise EngineDiedError(self.nothing_left())
        horizon = _nearest(episode.horizon if episode.response_ids else episode.request.horizon, {r.horizon for r in live})
        live = [r for r in live if r.horizon == horizon]
        idlest = min(live, key=lambda r: r.load)
        by_index: dict[int | None, SGLangReplica] = {r.index: r for r in live}
        group = episode.request.group, horizon
        chosen = by_index.get(episode.engine)
        if chosen is None:
            chosen = by_index.get(self.of_group.get(group), idlest)
            if chosen.load - idlest.load > self._config.max_running_requests // 2:
                chosen = idlest
        self.of_group[group] = episode.engine = chosen.index
        return chosen

    def nothing_left(self) -> str:
        """Why no replica can be asked."""
        for replica in self.replicas:
            replica.check_usable()
        return "no engine is left: " + "; ".join(self.lost.values())

    async def _abort(self, attempts: Mapping[str, SGLangReplica | None]) -> None:
        """Asks the servers to stop attempts and return what they have; best effort, since an attempt may just have ended."""

        async def abort(replica: SGLangReplica, rid: str) -> None:
            options: dict[str, Any] = {"where": "abort", "retry": False, "timeout_s": _ABORT_TIMEOUT_S}
            try:
                await replica.http.body("POST", "/abort_request", {"rid": rid}, **options)
            except RolloutError as error:
                logger.info("%s did not take an abort: %s", replica.name, error)

        every = [(r, rid) for rid, replica in attempts.items() for r in ([replica] if replica is not None else self.live())]
        await asyncio.gather(*(abort(*one) for one in every))

    async def abort_left(self) -> None:
        """Stops at the servers what was given up here; they would go on sampling and refuse to flush their caches."""
        left, self._left = self._left, {}
        await self._abort(left)

    async def drain(self) -> None:
        """Aborts whatever is in flight until nothing is; raises TimedOutError if an engine keeps on sampling."""
        self.halts += 1
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._config.request_timeout_s
        while self._in_flight:
            await self._abort(self._in_flight)
            wait_until = loop.time() + _ABORT_EVERY_S
            while self._in_flight and loop.time() < wait_until:
                await asyncio.sleep(0.005)
            if loop.time() > deadline:
                raise TimedOutError(f"{len(self._in_flight)} responses did not stop within {self._config.request_timeout_s:g} s")

    async def halt(self) -> None:
        """Before weights are replaced: sends nothing more, and stops or pauses what is in flight; raises RolloutError."""
        self.open.clear()
        if self._config.interrupt == "abort":
            await self.drain()
        elif self._in_flight:
            self._paused = self.live()
            for replica in self._paused:
                replica.paused = True
            await asyncio.gather(*(self._post(r, "/pause_generation", {"mode": "in_place"}) for r in self._paused))

    async def go_on(self) -> None:
        """After an update or its failure: attempts may be sent again, and paused ones go on."""
        paused, self._paused = self._paused, []
        self.open.set()
        # Those that were given up meanwhile as well: nobody else would tell them to go on.
        reachable = [r for r in paused if r.connected and r.paused]
        replies = await asyncio.gather(*(self._post(r, "/continue_generation", {}) for r in reachable), return_exceptions=True)
        for replica in reachable:
            replica.paused = False
        for replica, outcome in zip(reachable, replies, strict=True):
            if isinstance(outcome, BaseException) and replica.index not in self.lost:
                raise outcome

    @property
    def busy(self) -> bool:
        """Whether attempts are in flight, or servers paused because some were."""
        return bool(self._in_flight or self._paused)

    async def _post(self, replica: SGLangReplica, path: str, payload: dict[str, Any]) -> None:
        await replica.http.body("POST", path, payload, where=replica.name)


def _nearest(wanted: float | None, held: set[float | None]) -> float | None:
    """The horizon among those held that is nearest to the wanted one: of two the smaller, which predicts less."""
    if wanted in held:
        return wanted
    return min(held, key=lambda each: (each is None, abs((each or 0.0) - (wanted or 0.0)), each or 0.0))
