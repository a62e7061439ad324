"""SGLangServers: the servers of an engine and the router in front of them: start, restart of what died, stop."""

from __future__ import annotations

import logging
import secrets
import uuid
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

from megatron_pr2.errors import RolloutError, RouteError
from megatron_pr2.hf.shape import ModelShape
from megatron_pr2.rollout.sglang.config import SGLangConfig
from megatron_pr2.rollout.sglang.fleet import Fleet
from megatron_pr2.rollout.sglang.gateway.router import SGLangRouter
from megatron_pr2.rollout.sglang.http import HttpClient, LoopThread
from megatron_pr2.rollout.sglang.plugin import encode_rid
from megatron_pr2.rollout.sglang.replica import SGLangReplica, score
from megatron_pr2.rollout.sglang.routes import AnswerError

logger = logging.getLogger(__name__)

T = TypeVar("T")


class SGLangServers:
    """All servers of one engine.

    Attributes:
        replicas: the servers, whether they run or not.
        fleet: of the replicas, while the engine runs.
    """

    def __init__(self, config: SGLangConfig, shape: ModelShape) -> None:
        self._config, self._shape = config, shape
        urls: Sequence[str | None] = config.urls or [None] * config.engines
        # Servers behind one router share a key.
        key = config.read_api_key() or (None if config.urls else secrets.token_urlsafe(24))
        self.replicas = [
            SGLangReplica(index, _config_of(config, index, len(urls)), shape, url=url, api_key=key)
            for index, url in enumerate(urls)
        ]
        self.fleet: Fleet | None = None
        self._loop: LoopThread | None = None
        self._router: SGLangRouter | None = None
        self._behind_router: dict[int, str] = {}

    def running(self) -> Fleet:
        """The fleet; raises RolloutError if the engine does not run."""
        if self.fleet is None:
            raise RolloutError("the rollout engine is not running; call start()")
        return self.fleet

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine on the event loop of all clients, and waits."""
        assert self._loop is not None
        return self._loop.run(coroutine)

    def start(self) -> None:
        """Starts all, or raises RolloutError, which names the cause, and leaves nothing running."""
        try:
            self._loop = loop = LoopThread()
            _together(lambda replica: replica.start(loop), self.replicas)
            self.fleet = Fleet(self._config, self._shape, self.replicas)
            self._start_router(self.fleet, loop)
        except BaseException:
            self.stop()
            raise

    def restart(self) -> None:
        """Restarts what died, all servers if nothing did."""
        fleet, loop = self.running(), self._loop
        assert loop is not None
        broken = [r for r in self.replicas if not r.connected or r.index in fleet.lost or r.why_dead() is not None]
        # Without a front, a restart before this one failed after it had stopped the router.
        router_died = self._config.router == "own" and (self._why_router_died() is not None or fleet.front is None)
        if router_died:
            self._stop_router()
        elif not broken:
            broken = self.replicas
        _together(lambda replica: replica.stop(), broken)
        self.revive()
        if router_died:
            self._start_router(fleet, loop)

    def stop(self) -> None:
        """Stops own servers and an own router, disconnects from others; safe to call twice."""
        self._stop_router()
        self.fleet = None
        for replica in self.replicas:
            replica.stop()
        if self._loop is not None:
            self._loop.close()
        self._loop = None

    def find_lost(self, *, generates: bool) -> None:
        """Looks which servers died since they last answered; `generates` as for SGLangReplica.why_dead."""
        fleet = self.running()

        def look(replica: SGLangReplica) -> None:
            if (reason := replica.why_dead(generates=generates)) is not None:
                fleet.lost[replica.index] = reason
                logger.warning("%s is lost and is restarted: %s", replica.name, reason.splitlines()[0])

        _together(look, fleet.reachable())

    def revive(self) -> None:
        """Starts what is stopped or lost; an attached server that does not come back is left out while there is another one."""
        fleet, loop = self.running(), self._loop
        assert loop is not None
        failures: list[RolloutError] = []
        gone = [r for r in self.replicas if not r.connected or r.index in fleet.lost]

        def revive(replica: SGLangReplica) -> None:
            replica.stop()
            try:
                replica.start(loop)
            except RolloutError as error:
                if replica.server is not None:
                    raise
                fleet.lost[replica.index] = str(error)
                failures.append(error)
                logger.warning("%s is left out: %s", replica.name, str(error).splitlines()[0])

        # In parallel: each takes minutes.
        _together(revive, gone)
        for replica in gone:
            if replica.connected:
                self._move(replica)
                fleet.lost.pop(replica.index, None)
                logger.info("%s is back", replica.name)
        if len(failures) == len(self.replicas):
            raise failures[0]

    def _start_router(self, fleet: Fleet, loop: LoopThread) -> None:
        """Starts an own router or attaches to one, and proves that routes come through it."""
        config = self._config
        if config.router == "none":
            return
        url, key = config.router, self.replicas[0].api_key
        if url == "own":
            self._behind_router = {replica.index: replica.url for replica in self.replicas}
            log = f"{config.log_path}.router" if config.log_path else None
            urls = list(self._behind_router.values())
            self._router = SGLangRouter(urls, api_key=key, python=config.python, bind=config.bind, log_path=log)
            self._router.start()
            url = self._router.url
        fleet.front = HttpClient(url, api_key=key, why_dead=self._why_router_died, loop=loop, **config.client_settings())
        # Routers drop what they do not know: whether routes come through is seen by asking for some.
        try:
            score(fleet.front, range(1, 9), self._shape, f"router {url}", rid=encode_rid(uuid.uuid4().hex, 0))
        except (AnswerError, RouteError) as error:
            raise RolloutError(
                f"router {url}: no usable routes come through it ({error}). SGLang's router drops the request for routes; it is "
                "repeated in the request id, which this package's SGLang plugin reads: install megatron-pr2 in the engines' "
                "environment, or use router='none'"
            ) from error

    def _why_router_died(self) -> str | None:
        router = self._router
        return router.describe_end() if router is not None and not router.alive() else None

    def _move(self, replica: SGLangReplica) -> None:
        """Tells an own router where a server is that is back, maybe under another address."""
        old_url = self._behind_router.get(replica.index, replica.url)
        if self._router is not None and self._router.alive() and old_url != replica.url:
            self._router.replace_worker(old_url, replica.url)
            self._behind_router[replica.index] = replica.url

    def _stop_router(self) -> None:
        if self.fleet is not None and self.fleet.front is not None:
            self.fleet.front.close()
            self.fleet.front = None
        if self._router is not None:
            self._router.stop()
            self._router = None


def _config_of(config: SGLangConfig, index: int, count: int) -> SGLangConfig:
    """The settings of one of several own servers: other GPUs and another log."""
    if count == 1 or config.urls:
        return config
    log = f"{config.log_path}.{index}" if config.log_path else None
    return replace(config, first_gpu=config.first_gpu + index * config.tp_size, log_path=log)


def _together(action: Callable[[SGLangReplica], None], replicas: Sequence[SGLangReplica]) -> None:
    """Runs an action for each of the replicas in threads, and raises the first failure after all have ended."""
    with ThreadPoolExecutor(max_workers=max(1, len(replicas))) as pool:
        futures = [pool.submit(action, replica) for replica in replicas]
    for future in futures:
        future.result()
