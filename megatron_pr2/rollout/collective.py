"""CollectiveEngine: an engine that lives on rank 0, seen by every trainer rank as one of its own.

Rank 0 talks to the engine; the others take part in the collectives that weights need and receive their share of the responses.
A failure on any rank is raised on every rank, so that no rank waits for a collective that never comes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import torch
import torch.distributed as dist

from megatron_pr2.errors import AttachError, ConfigError, EnvironmentFailed, PR2Error, RolloutError
from megatron_pr2.parallel.consensus import described
from megatron_pr2.parallel.groups import gathered
from megatron_pr2.rollout.base import (
    Probe,
    Progress,
    RolloutBatch,
    RolloutEngine,
    RolloutRequest,
    RolloutResponse,
    RolloutStats,
    SamplingParams,
)

if TYPE_CHECKING:
    from megatron_pr2.rollout.sglang.push.disk import DiskTarget
    from megatron_pr2.rollout.sglang.push.distributed import WeightSender
    from megatron_pr2.rollout.sglang.push.session import PushTarget

logger = logging.getLogger(__name__)

T = TypeVar("T")
Weights = Iterable[tuple[str, torch.Tensor]]

# What another engine or another attempt would not fix; any other failure is a RolloutError, after which callers try again.
_LASTING = (AttachError, ConfigError, EnvironmentFailed)


class PushEngine(Protocol):
    """What an engine offers beside RolloutEngine if several ranks may send it their parts of the weights.

    begin_push returns where tensors go; after finish_push the next response is sampled from the new weights, after abandon_push no
    server samples until a push succeeds.
    """

    def begin_push(
        self, version: int, horizons: Sequence[float] = (), *, gates_only: bool = False
    ) -> list[PushTarget] | DiskTarget: ...

    def push_part(self, weights: Weights, targets: Sequence[PushTarget] | None = None) -> int:
        """Sends this process's tensors to the targets of begin_push, or some of them; returns their bytes."""

    def finish_push(self, version: int) -> None: ...

    def abandon_push(self) -> None: ...


def share(count: int, parts: int, index: int) -> slice:
    """Contiguous share of `count` items; responses of one prompt stay together when their number divides it."""
    if count % parts:
        raise RolloutError(f"{count} requests cannot be shared equally by {parts} data-parallel ranks")
    return slice(count // parts * index, count // parts * (index + 1))


class CollectiveEngine:
    """Wraps the engine that rank 0 owns; its methods are called by all ranks."""

    def __init__(self, engine: RolloutEngine | None, *, data_parallel_rank: int, data_parallel_size: int, name: str) -> None:
        """Args: `engine` is given on rank 0 and None elsewhere."""
        self._engine = engine
        self._dp_size = data_parallel_size
        # The others wait here while rank 0 generates or starts servers, longer than the 30 minutes of a group by default. One that
        # dies closes its connections, which the others notice at once.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
        ranks = gathered((data_parallel_rank, hasattr(engine, "begin_push")), self._group)
        self._dp_of_rank = [dp for dp, _ in ranks]
        self._sender: WeightSender | None = None
        self.takes_owned_weights = ranks[0][1]
        self.name = name
        self.returns_routes = True
        self.on_progress: Callable[[Progress], None] | None = None

    def start(self) -> None:

        def start(engine: RolloutEngine) -> bool:
            engine.start()
            return bool(engine.returns_routes)

        self.returns_routes = self._on_rank_0(start)

    def restart(self) -> None:
        self._on_rank_0(lambda engine: engine.restart())

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Every rank walks the weights (exporting them is collective); rank 0 sends them."""
        _, failure = _walked(weights, lambda part: self._engine.update_weights(part, version) if self._engine is not None else None)
        self._agree(failure)

    def update_owned_weights(self, owned: Weights, version: int, gates: Mapping[float, Weights] | None = None) -> None:
        """Every rank sends the engine's servers the weights that it owns; together they are what update_weights() would get.

        Only where `takes_owned_weights` says so. Every rank walks its weights (e.g. of
        :func:`megatron_pr2.hf.owned_export.owned_engine_weights`, maybe none) to the end, also after a failure.

        Args:
            gates: by horizon, what only the servers of that horizon get (:func:`megatron_pr2.hf.owned_export.owned_gates`); the
                servers share the horizons out among them. The same horizons on every rank.

        Raises:
            RolloutError: on every rank, whichever failed; the engine refuses to sample until a push succeeds.
            AttachError, ConfigError: the same, where another attempt would not help.
        """
        self._push(owned, version, gates or {})

    def update_owned_gates(self, gates: Weights, version: int, horizon: float) -> None:
        """Gates for a horizon, for every server that holds this version: for servers that take one horizon after the other."""
        self._push((), version, {horizon: gates}, gates_only=True)

    def _push(self, owned: Weights, version: int, gates: Mapping[float, Weights], *, gates_only: bool = False) -> None:
        if not self.takes_owned_weights:
            raise RolloutError(f"the {self.name} engine takes the whole model from one rank: call update_weights()")
        how: dict[str, Any] = {"horizons": tuple(gates), "gates_only": gates_only}
        targets = self._on_rank_0(lambda engine: cast(PushEngine, engine).begin_push(version, **how))
        try:
            total, failure = _walked(owned, lambda part: self._push_part(part, targets))
            for horizon, own in gates.items():
                send = partial(self._push_part, targets=targets, horizon=horizon)
                sent, failed = _walked(own, send if failure is None else lambda _: 0)
                total, failure = (total or 0) + (sent or 0), failure or failed
            if not self._agree(failure, total or 0):
                raise RolloutError("weight update: no tensors were given")
            self._on_rank_0(lambda engine: cast(PushEngine, engine).finish_push(version))
        except BaseException:
            if self._engine is not None:
                try:
                    cast(PushEngine, self._engine).abandon_push()
                except Exception as error:  # the failure that led here is the one to raise
                    logger.warning("a weight update could not be closed: %s", described(error))
            raise

    def _push_part(self, weights: Weights, targets: list[PushTarget] | DiskTarget, horizon: float | None = None) -> int:
        from megatron_pr2.rollout.sglang.push.disk import DiskTarget, write_part
        from megatron_pr2.rollout.sglang.push.distributed import WeightSender
        from megatron_pr2.rollout.sglang.push.session import targets_of

        some = None if horizon is None else targets_of(targets, horizon)
        if self._engine is not None:
            return cast(PushEngine, self._engine).push_part(weights, some)
        if isinstance(targets, DiskTarget):
            return write_part(targets, dist.get_rank(), weights)
        if self._sender is None:
            self._sender = WeightSender()
        self._sender.retarget(targets)
        return self._sender.push(weights, some)

    def _agree(self, failure: Exception | None, sent: int = 0) -> int:
        """What all ranks have sent; raises on every rank the failures of all."""
        everyone = gathered((None if failure is None else _told(failure), sent), self._group)
        failures: dict[str, list[str]] = {}
        kinds = []
        for rank, (told, _) in enumerate(everyone):
            if told is not None:
                kinds.append(told[0])
                failures.setdefault(told[1], []).append(str(rank))
        if failures:
            raise kinds[0]("; ".join(f"rank {', '.join(ranks)}: {message}" for message, ranks in failures.items()))
        return sum(count for _, count in everyone)

    def generate(
        self, requests: Sequence[RolloutRequest], sampling: SamplingParams, *, return_routes: bool, enough: int | None = None
    ) -> RolloutBatch:
        """All requests go to the engine on rank 0; each rank gets back its data-parallel share of the responses, in order."""
        shares: list[Any] | None = None

        def sample(engine: RolloutEngine) -> tuple[RolloutStats, list[int]]:
            nonlocal shares
            engine.on_progress = self.on_progress
            batch = engine.generate(requests, sampling, return_routes=return_routes, enough=enough)
            shares = [batch.responses[share(len(batch.responses), self._dp_size, dp)] for dp in self._dp_of_rank]
            return batch.stats, batch.finished

        stats, finished = self._on_rank_0(sample)
        received: list[Any] = [None]
        dist.scatter_object_list(received, shares, src=0, group=self._group)
        return RolloutBatch(received[0], stats, finished)

    def generate_in_turns(
        self,
        requests: Sequence[RolloutRequest],
        sampling: SamplingParams,
        prepare: Callable[[float | None], None],
        *,
        return_routes: bool,
    ) -> RolloutBatch:
        """generate() for one horizon after the other, where the servers hold gates for one at a time.

        Args:
            prepare: gives the servers the gates for a horizon (update_owned_gates) before its requests are sampled.
        """
        size, rank = self._dp_size, self._dp_of_rank[dist.get_rank(self._group)]
        own: dict[int, RolloutResponse] = {}
        stats = RolloutStats()
        for horizon in sorted({request.horizon for request in requests}, key=lambda each: each or 0.0):
            places = [place for place, request in enumerate(requests) if request.horizon == horizon]
            prepare(horizon)
            batch = self.generate([requests[place] for place in places], sampling, return_routes=return_routes)
            own |= zip(places[share(len(places), size, rank)], batch.responses, strict=True)
            stats.add(batch.stats)
        mine = range(len(requests))[share(len(requests), size, rank)]
        if own.keys() != {*mine}:
            raise RolloutError("turns: the horizons are dealt unequally to the data-parallel ranks' requests")
        return RolloutBatch([own[place] for place in mine], stats, list(range(len(requests))))

    def score(self, token_ids: Sequence[int], horizon: float | None = None) -> list[Probe]:
        return self._on_rank_0(lambda engine: engine.score(token_ids))

    def close(self) -> None:
        """Stops the engine on rank 0; no collective, so that it is safe while other ranks are gone."""
        sender, self._sender = self._sender, None
        if sender is not None:
            sender.close()
        if self._engine is not None:
            self._engine.close()

    def _on_rank_0(self, action: Callable[[RolloutEngine], T]) -> T:
        """What the action returns on rank 0, or raises there, on every rank."""
        outcome: list[Any] = [None]
        if self._engine is not None:
            try:
                outcome = [(None, action(self._engine))]
            except Exception as error:
                outcome = [(_told(error), None)]
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        failure, result = outcome[0]
        if failure is not None:
            kind, message = failure
            raise kind(message)
        return result


def _walked(
    weights: Iterable[tuple[str, torch.Tensor]], send: Callable[[Iterable[tuple[str, torch.Tensor]]], T]
) -> tuple[T | None, Exception | None]:
    """What `send` returned, and the first failure. Weights are iterated to the end in any case: exporting is collective."""
    iterator = iter(weights)
    sent: T | None = None
    failure: Exception | None = None
    try:
        sent = send(iterator)
    except Exception as error:
        failure = error
    try:
        for _ in iterator:
            pass
    except Exception as error:
        failure = failure or error
    return sent, failure


def _told(error: Exception) -> tuple[type[PR2Error], str]:
    """A failure as all ranks raise it."""
    return next((kind for kind in _LASTING if isinstance(error, kind)), RolloutError), described(error)
