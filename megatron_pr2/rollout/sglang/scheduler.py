"""RolloutCall: one generate call: all its episodes at bounded concurrency, retries, turns, and an early stop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TypeVar

from megatron_pr2.errors import EnvironmentFailed, RolloutError, RouteError
from megatron_pr2.rollout.base import Progress, RolloutResponse, SamplingParams
from megatron_pr2.rollout.sglang.config import SGLangConfig
from megatron_pr2.rollout.sglang.episode import Episode
from megatron_pr2.rollout.sglang.fleet import Fleet
from megatron_pr2.rollout.sglang.http import AttemptError, EngineDiedError, TimedOutError
from megatron_pr2.rollout.sglang.route_spill import RouteSpill
from megatron_pr2.rollout.sglang.routes import AnswerError
from megatron_pr2.rollout.sglang.wire import Sampled

logger = logging.getLogger(__name__)

_REPORT_EVERY_S = 0.25
_RETRIED = (AnswerError, AttemptError, RouteError)
Kept = TypeVar("Kept", RolloutResponse, Sampled)


@dataclass
class RolloutCall:
    """Runs the episodes of one call, one per request.

    Attributes:
        responses: of finished episodes, by their index.
        complete: groups of which every response is finished, in the order in which they were completed.
        counts: rerolls, timeouts, invalid_rows, cached_tokens, retractions, resumed, interrupted, turns, other_horizon.
        route_bytes: of routes as received.
        tokens: sampled in this call.
    """

    fleet: Fleet
    config: SGLangConfig
    episodes: Sequence[Episode]
    sampling: SamplingParams
    spill: RouteSpill
    enough: int | None
    on_progress: Callable[[Progress], None] | None
    responses: dict[int, RolloutResponse] = field(default_factory=dict)
    complete: list[int] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    route_bytes: int = 0
    tokens: int = 0

    def __post_init__(self) -> None:
        self._reported = 0.0
        self._stopping = False
        # Slow tools must not delay decoding.
        self._environments = ThreadPoolExecutor(self.config.concurrency, thread_name_prefix="environment")
        self._slots = asyncio.Semaphore(self.config.concurrency)
        self._left = Counter(episode.request.group for episode in self.episodes)

    async def run(self) -> None:
        """Returns when all episodes, or enough groups, are finished and the rest has stopped. Raises as the first that is lost."""
        tasks = [asyncio.ensure_future(self._in_slot(index)) for index in range(len(self.episodes))]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.fleet.abort_left()
            self._environments.shutdown(wait=False, cancel_futures=True)
            self._report(at_once=True)
            if count := self.counts["other_horizon"]:
                logger.warning("%d responses were sampled under gates for another horizon: no server with theirs was left", count)

    async def _in_slot(self, index: int) -> None:
        async with self._slots:
            if self._stopping:
                return
            request, limit = self.episodes[index].request, self.config.deadline_s
            key = f", key {request.key}" if request.key else ""
            where = f"request {index} of {len(self.episodes)} (seed {request.seed}{key})"
            try:
                async with asyncio.timeout(limit):
                    await self._sample(index, where)
            except TimeoutError as error:
                raise TimedOutError(f"{where}: not finished within {limit:g} s; raise deadline_s or look at the engines") from error

    async def _sample(self, index: int, where: str) -> None:
        """All attempts and turns of one response, until it is finished or everything stops."""
        episode = self.episodes[index]
        if episode.num_sampled:
            self.counts["resumed"] += 1
        while episode.finished is None:
            while episode.finish_reason is None:
                await self.fleet.open.wait()
                if self._stopping:
                    return
                await self._try(episode, where)
            if not await self._next_turn(episode, where):
                episode.finish(await self._kept(episode.response(where)))
        self.responses[index] = episode.finished
        self.counts["turns"] += episode.finished.turns
        self.counts["other_horizon"] += episode.horizon != episode.request.horizon
        self._report()
        group = episode.request.group
        self._left[group] -= 1
        if not self._left[group]:
            self.complete.append(group)
            if self.enough is not None and len(self.complete) >= self.enough and not self._stopping:
                self._stopping = True
                await self.fleet.drain()

    async def _kept(self, item: Kept) -> Kept:
        """The same with its routes within the budget of memory."""
        if item.routes is None:
            return item
        return replace(item, routes=await asyncio.to_thread(self.spill.keep, item.routes))

    async def _try(self, episode: Episode, where: str) -> None:
        halts = self.fleet.halts
        try:
            sampled = await self.fleet.attempt(episode, self.sampling, where)
            if sampled.finish == "abort":
                if halts == self.fleet.halts and not self._stopping:
                    raise AnswerError(f"{where}: the server aborted the request; the response is lost")
                self.counts["interrupted"] += 1
            if sampled.invalid_rows and episode.failures < self.config.rerolls:
                raise RouteError(
                    f"{where}: {sampled.invalid_rows} rows of routes hold duplicate, all-zero or out-of-range expert ids, "
                    "or repeat the row before them in all layers though the tokens differ (a stale buffer)"
                )
            episode.extend(await self._kept(sampled), where)
        except _RETRIED as error:
            if self._stopping:  # enough groups are complete: nothing depends on this one
                return
            episode.failures += 1
            self.counts["rerolls"] += 1
            self.counts["timeouts"] += isinstance(error, TimedOutError)
            if episode.failures > self.config.rerolls:
                raise
            logger.info("attempt %d: %s", episode.failures, error)
        except EngineDiedError:
            if self._stopping:
                return
            self.counts["rerolls"] += 1
            # Another replica goes on from what is known; while weights are replaced none is live, but some will be.
            if self.fleet.front is not None or not (self.fleet.live() or not self.fleet.open.is_set()):
                raise
        else:
            self.route_bytes += sampled.route_bytes
            self.tokens += len(sampled.token_ids)
            for name in ("invalid_rows", "cached_tokens", "retractions"):
                self.counts[name] += getattr(sampled, name)

    async def _next_turn(self, episode: Episode, where: str) -> bool:
        """Lets the environment reply to a finished turn; whether there is another one."""
        environment = episode.request.environment
        if environment is None or episode.finish_reason != "stop":
            return False
        try:
            ids = (episode.request.prompt_ids, tuple(episode.response_ids))
            reply = await asyncio.get_running_loop().run_in_executor(self._environments, environment.reply, *ids)
        except Exception as error:
            raise EnvironmentFailed(f"{where}: its environment failed: {type(error).__name__}: {error}") from error
        try:
            episode.take_turn(reply, where)
        except RolloutError as error:
            raise EnvironmentFailed(str(error)) from error
        return episode.finish_reason is None

    def _report(self, *, at_once: bool = False) -> None:
        now = time.monotonic()
        if self.on_progress is None or (now - self._reported < _REPORT_EVERY_S and not at_once):
            return
        self._reported = now
        self.on_progress(Progress(len(self.responses), len(self.episodes), self.tokens))

