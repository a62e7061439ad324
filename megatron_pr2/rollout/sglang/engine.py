"""SGLangEngine: any number of SGLang servers as one RolloutEngine, driven from one process.

    servers.py     start, restart and stop of all servers
    scheduler.py   one generate call: concurrency, retries, turns, early stop
    fleet.py       who gets an attempt, what is in flight, halting it while weights are replaced
    replica.py     one server
    episode.py     one response over attempts, turns and weight versions

`update_weights` may be called while another thread is inside `generate`: what is in flight is halted first, and goes on under the
new weights (`SGLangConfig.interrupt`). A server that dies while others live costs nothing but time: the others continue its
responses, and it is restarted before the next push.
"""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from megatron_pr2.errors import ConfigError, RolloutError
from megatron_pr2.hf.shape import ModelShape
from megatron_pr2.rollout.base import Probe, Progress, RolloutBatch, RolloutRequest, RolloutStats, SamplingParams
from megatron_pr2.rollout.sglang import wire
from megatron_pr2.rollout.sglang.config import SGLangConfig
from megatron_pr2.rollout.sglang.episode import Episode
from megatron_pr2.rollout.sglang.fleet import Fleet
from megatron_pr2.rollout.sglang.push.disk import DiskPush, DiskTarget
from megatron_pr2.rollout.sglang.push.distributed import DistributedPush
from megatron_pr2.rollout.sglang.push.session import PushTarget, targets_of
from megatron_pr2.rollout.sglang.replica import SGLangReplica
from megatron_pr2.rollout.sglang.route_spill import RouteSpill
from megatron_pr2.rollout.sglang.scheduler import RolloutCall
from megatron_pr2.rollout.sglang.servers import SGLangServers

logger = logging.getLogger(__name__)


class SGLangEngine:
    """RolloutEngine on SGLang servers.

    Attributes:
        weight_version: of the last push; 0 for an own server's checkpoint, -1 if an attached server does not name a number.
    """

    name = "sglang"
    returns_routes = True
    takes_owned_weights = False

    def __init__(self, config: SGLangConfig, shape: ModelShape) -> None:
        self.config = config
        self.shape = shape
        self._servers = SGLangServers(config, shape)
        self.replicas = self._servers.replicas
        self.weight_version = -1
        self.on_progress: Callable[[Progress], None] | None = None
        self.spill = RouteSpill(config.route_bytes, config.spill_directory)
        self._update: DistributedPush | DiskPush
        if config.push == "distributed":
            self._update = DistributedPush(client=lambda target: next(r.http for r in self.replicas if r.url == target.url))
        else:
            assert config.model_path is not None
            parent = config.push_directory or tempfile.gettempdir()
            self._update = DiskPush(config.model_path, parent, shard_bytes=config.weight_bucket_bytes)
        self._updated: list[SGLangReplica] = []
        self._push_is_open = False
        self._carried: dict[str, Episode] = {}
        self._generating = threading.Lock()
        self._updating = threading.Lock()

    def start(self) -> None:
        """Starts the own servers, or attaches; returns when a probe of each returned valid routes."""
        if self._fleet is None:
            self._servers.start()
            self.weight_version = min(wire.parse_version(replica.label) for replica in self.replicas)

    def restart(self) -> None:
        """Restarts or reconnects servers that died, all of them if none did; what was carried over from an early stop is kept."""
        if self._fleet is None:
            self._stop()
            self.start()
        else:
            self._servers.restart()

    def close(self) -> None:
        """Stops own servers and leaves attached ones running; safe to call twice and after a failure."""
        healthy = [r for r in self.replicas if r.connected and r.unusable is None]
        self._carried.clear()
        self._stop()
        for replica in healthy:
            if replica.server is not None:
                replica.server.remove_log()

    def _stop(self) -> None:
        self._update.close()
        self._servers.stop()

    @property
    def _fleet(self) -> Fleet | None:
        return self._servers.fleet

    def update_weights(
        self,
        weights: Iterable[tuple[str, torch.Tensor]],
        version: int,
        gates: Mapping[float, Iterable[tuple[str, torch.Tensor]]] | None = None,
    ) -> None:
        """Pushes tensors by Hugging Face name to every server and drops every cache; a part of the model will do.

        SGLang casts to its own dtype and silently skips names that it does not know: the handshake after the push has to prove the
        content. After a RolloutError no server samples until a push succeeds.

        Args:
            gates: by horizon, what only the servers of that horizon get, which share the horizons out among them.
        """
        self._push(weights, version, gates or {})

    def update_gates(self, gates: Iterable[tuple[str, torch.Tensor]], version: int, horizon: float) -> None:
        """Pushes gates for a horizon to every server that holds a version, which stays; for servers that take turns."""
        self._push((), version, {horizon: gates}, gates_only=True)

    def _push(
        self,
        weights: Iterable[tuple[str, torch.Tensor]],
        version: int,
        gates: Mapping[float, Iterable[tuple[str, torch.Tensor]]],
        *,
        gates_only: bool = False,
    ) -> None:
        began = time.monotonic()
        targets = self.begin_push(version, tuple(gates), gates_only=gates_only)
        try:
            sent = self.push_part(weights)
            for horizon, own in gates.items():
                sent += self.push_part(own, targets_of(targets, horizon))
            if not sent:
                raise RolloutError("weight update: no tensors were given")
            self.finish_push(version)
        except BaseException:
            self.abandon_push()
            raise
        logger.info("pushed weights of version %d: %.1f MB in %.2f s", version, sent / 1e6, time.monotonic() - began)

    def begin_push(
        self, version: int, horizons: Sequence[float] = (), *, gates_only: bool = False
    ) -> list[PushTarget] | DiskTarget:
        """Halts sampling, restarts lost servers and opens a weight update on each; returns where tensors go.

        Either finish_push or abandon_push must be called next, by the same thread; after a RolloutError nothing is left open.

        Args:
            horizons: of the gates that are sent, if they are for several or one; each target says which it is to get.
            gates_only: to the servers that hold this version, which stays; lost ones are not restarted.
        """
        fleet = self._servers.running()
        self._check_horizons(horizons)
        self._updating.acquire()
        self._push_is_open = True
        try:
            # Before the halt: a paused server does not pass its health check.
            self._servers.find_lost(generates=not gates_only)
            self._servers.run(fleet.halt())
            if gates_only:
                updated = [replica for replica in fleet.live() if replica.label == str(version)]
                if not updated:
                    raise RolloutError(f"weight update: no server is left that holds version {version}; push all weights first")
            else:
                self._servers.revive()
                updated = fleet.reachable()
            for replica in updated:
                horizon = horizons[replica.index * len(horizons) // len(self.replicas)] if horizons else None
                if fleet.busy and horizon != replica.horizon:
                    raise RolloutError(
                        f"weight update: {replica.name} would get gates for another horizon in the middle of responses that go on; "
                        "push between two rollouts, or use interrupt='abort'"
                    )
                replica.target = replace(replica.target, horizon=horizon)
            self._updated = updated
            for replica in updated:
                replica.unusable = "its last weight update failed and may have replaced a part of the weights"
            return self._update.begin([r.session for r in updated], [r.target for r in updated])
        except BaseException:
            self.abandon_push()
            raise

    def _check_horizons(self, horizons: Sequence[float]) -> None:
        """Raises ConfigError for gates that servers cannot have one set each of."""
        if horizons and self.config.push != "distributed":
            raise ConfigError(f"sglang.push={self.config.push!r}: all servers load the same gates; use push='distributed'")
        if len(horizons) > len(self.replicas):
            raise ConfigError(f"gates for {len(horizons)} horizons and {len(self.replicas)} servers, with one set each; start more")
        if len(horizons) > 1 and self.config.router != "none":
            raise ConfigError(f"sglang.router={self.config.router!r} does not know which server has which gates; use router='none'")

    def push_part(self, weights: Iterable[tuple[str, torch.Tensor]], targets: Sequence[PushTarget] | None = None) -> int:
        """Sends tensors to the targets of begin_push, or some of them; returns their bytes.

        Other processes may send theirs at the same time.
        """
        return self._update.push(weights, targets)

    def finish_push(self, version: int) -> None:
        """Closes the update on every server: caches flushed, version stamped and read back; sampling goes on.

        After a RolloutError abandon_push must be called.
        """
        fleet = self._servers.running()
        self._update.finish([r.session for r in self._updated], str(version), flush_cache=not fleet.busy)
        for replica in self._updated:
            replica.published(str(version), replica.target.horizon)
        self.weight_version = version
        self._end_push(fleet)

    def abandon_push(self) -> None:
        """Closes a failed update as far as the servers still can; they refuse to sample until a push succeeds."""
        if not self._push_is_open:  # interrupted on its way out of finish_push
            return
        fleet = self._fleet
        try:
            if fleet is not None:
                self._update.abandon([replica.session for replica in self._updated if replica.connected])
        finally:
            self._end_push(fleet)

    def _end_push(self, fleet: Fleet | None) -> None:
        self._updated = []
        try:
            if fleet is not None:  # else the engine was closed meanwhile
                self._servers.run(fleet.go_on())
        except RolloutError as error:  # its attempts fail by themselves, with the reason
            logger.warning("an engine did not go on after a weight update: %s", error)
        finally:
            self._push_is_open = False
            self._updating.release()

    def generate(
        self, requests: Sequence[RolloutRequest], sampling: SamplingParams, *, return_routes: bool, enough: int | None = None
    ) -> RolloutBatch:
        """Samples one response per request, `config.concurrency` at a time.

        With `enough` groups the rest is aborted, and what has a key is continued when it is asked for again.

        Returns:
            Responses, and stats whose `extra` counts `rerolls` (attempts that returned nothing usable), `timeouts`, `retries` (of
            HTTP requests), `invalid_rows` (of routes, which fall back to the current router), `cached_tokens` (input tokens from
            the prefix cache), `retractions`, `interrupted` (attempts stopped by a weight update or an early stop), `resumed`
            (responses carried over), `turns`, `engines_lost`, `spilled_bytes` and `other_horizon` (responses under other gates than
            they are for).

        Raises:
            RolloutError: a response is lost: no engine is left, it was refused, timed out, or stayed invalid.
            RouteError: the last attempt's routes were invalid.
        """
        fleet = self._servers.running()
        self._check(requests, enough)
        if not self._generating.acquire(blocking=False):
            raise RolloutError("generate() is running already in another thread; one engine serves one call at a time")
        try:
            if fleet.open.is_set() and not fleet.live():
                raise RolloutError(fleet.nothing_left())
            began, before = time.monotonic(), self._totals(fleet)
            fleet.of_group.clear()
            sampling = self._bounded(sampling, requests)
            episodes = [self._episode(request, sampling, return_routes) for request in requests]
            call = RolloutCall(fleet, self.config, episodes, sampling, self.spill, enough, self.on_progress)
            finished: list[int] = []
            try:
                self._servers.run(call.run())
                chosen = set(call.complete[:enough])
                finished = [index for index, request in enumerate(requests) if request.group in chosen]
            finally:
                returned = set(finished)
                rest = [episode for index, episode in enumerate(episodes) if index not in returned]
                self._carried |= {episode.request.key: episode for episode in rest if episode.request.key and episode.num_sampled}
        finally:
            self._generating.release()
        counts = call.counts + self._totals(fleet) - before
        extra = {name: float(counts[name]) for name in _COUNTS}
        stats = RolloutStats(time.monotonic() - began, call.tokens, call.route_bytes, extra)
        return RolloutBatch([call.responses[index] for index in finished], stats, finished)

    def forget(self, keys: Iterable[str]) -> None:
        """Drops what an early stop left unfinished."""
        for key in keys:
            self._carried.pop(key, None)

    def score(self, token_ids: Sequence[int], horizon: float | None = None) -> list[Probe]:
        """Handshake probe of every server with its own gates; prefix caches are flushed first, so the servers have to be idle."""
        fleet = self._servers.running()
        return [replica.score(token_ids) for replica in fleet.live() or self.replicas]

    def _check(self, requests: Sequence[RolloutRequest], enough: int | None) -> None:
        keys: set[str] = set()
        for index, request in enumerate(requests):
            wire.check_token_ids(request.prompt_ids, self.shape.vocab_size, f"request {index}")
            if request.key and request.key in keys:
                raise RolloutError(f"request {index}: key {request.key!r} is given twice; keys name one response each")
            keys.add(request.key)
        groups = len({request.group for request in requests})
        if enough is not None and not 1 <= enough <= groups:
            raise RolloutError(f"enough={enough}: the {len(requests)} requests are of {groups} groups; expected 1 to {groups}")

    def _bounded(self, sampling: SamplingParams, requests: Sequence[RolloutRequest]) -> SamplingParams:
        """A server refuses what exceeds its context, which would end the call: replies may make a response that long."""
        lengths = [sampling.max_length, *(replica.max_length for replica in self.replicas if replica.connected)]
        limit = min((length for length in lengths if length is not None), default=None)
        if limit is None:
            return sampling
        for index, request in enumerate(requests):
            if len(request.prompt_ids) >= limit:
                raise RolloutError(
                    f"request {index}: its prompt has {len(request.prompt_ids)} tokens, and prompt and response together may have "
                    f"{limit} at most; use shorter prompts, or servers with a longer context (--context-length, max_total_tokens)"
                )
        return replace(sampling, max_length=limit)

    def _episode(self, request: RolloutRequest, sampling: SamplingParams, return_routes: bool) -> Episode:
        carried = self._carried.pop(request.key, None) if request.key else None
        if carried is not None and carried.continues(request, sampling, return_routes=return_routes):
            carried.resume(request, sampling)
            return carried
        return Episode(request, sampling, self.shape, return_routes=return_routes)

    def _totals(self, fleet: Fleet) -> Counter[str]:
        """Counts over the engine's life."""
        clients = [fleet.front, *(r.http for r in self.replicas if r.connected)]
        retries = sum(client.retried for client in clients if client is not None)
        return Counter(retries=retries, engines_lost=len(fleet.lost), spilled_bytes=self.spill.spilled_bytes)


_COUNTS = (
    "rerolls", "timeouts", "retries", "invalid_rows", "cached_tokens", "retractions", "interrupted", "resumed", "turns",
    "engines_lost", "spilled_bytes", "other_horizon",
)  # fmt: skip
