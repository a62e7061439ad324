"""CollectiveEngine: an engine that lives on rank 0, seen by every trainer rank as one of its own.

Rank 0 talks to the engine; the others take part in the collectives that weights need and receive their share of the responses.
A failure on rank 0 is raised on every rank, so that no rank waits for a collective that never comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from megatron_pr2.errors import PR2Error, RolloutError
from megatron_pr2.rollout.base import RolloutEngine, RolloutRequest, RolloutResponse, RolloutStats, SamplingParams
from megatron_pr2.routes import RouteTable

T = TypeVar("T")


def share(count: int, parts: int, index: int) -> slice:
    """Contiguous share of `count` items; responses of one prompt stay together when their number divides it.

    Raises:
        RolloutError: `count` is not a multiple of `parts`.
    """
    if count % parts:
        raise RolloutError(f"{count} requests cannot be shared equally by {parts} data-parallel ranks")
    return slice(count // parts * index, count // parts * (index + 1))


class CollectiveEngine:
    """Wraps the engine that rank 0 owns; its methods are called by all ranks."""

    def __init__(self, engine: RolloutEngine | None, *, data_parallel_rank: int, data_parallel_size: int, name: str) -> None:
        """Args: `engine` is given on rank 0 and None elsewhere."""
        self._engine = engine
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._dp_rank, self._dp_size = data_parallel_rank, data_parallel_size
        ranks: list[Any] = [None] * self._world
        dist.all_gather_object(ranks, data_parallel_rank)
        self._dp_of_rank: list[int] = ranks
        self.name = name
        self.returns_routes = True

    def start(self) -> None:
        """Starts the engine on rank 0."""
        self._on_rank_0(lambda engine: engine.start())
        self.returns_routes = bool(self._on_rank_0(lambda engine: engine.returns_routes))

    def restart(self) -> None:
        """Starts a dead engine anew; its weights must be pushed again."""
        self._on_rank_0(lambda engine: engine.restart())

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Every rank walks the weights (exporting them is collective); rank 0 sends them."""
        iterator = iter(weights)
        failure: Exception | None = None
        try:
            if self._engine is not None:
                self._engine.update_weights(iterator, version)
        except Exception as error:
            failure = error
        try:
            for _ in iterator:  # exporting is collective: keep in step with the other ranks, also after a failure
                pass
        except Exception as error:
            failure = failure or error

        def outcome(_: RolloutEngine) -> None:
            if failure is not None:
                raise failure

        self._on_rank_0(outcome)
        if failure is not None:  # of this rank alone
            raise failure

    def generate(
        self, requests: Sequence[RolloutRequest], sampling: SamplingParams, *, return_routes: bool
    ) -> tuple[list[RolloutResponse], RolloutStats]:
        """All requests go to the engine on rank 0; each rank gets back its data-parallel share, in order."""
        shares: list[Any] | None = None
        stats: RolloutStats | None = None
        failure: str | None = None
        if self._engine is not None:
            try:
                responses, stats = self._engine.generate(requests, sampling, return_routes=return_routes)
                shares = [responses[share(len(requests), self._dp_size, dp)] for dp in self._dp_of_rank]
            except Exception as error:
                failure = _describe(error)
        self._raise_everywhere(failure)
        received: list[Any] = [None]
        dist.scatter_object_list(received, shares, src=0)
        common: list[Any] = [stats]
        dist.broadcast_object_list(common, src=0)
        return received[0], common[0]

    def score(self, token_ids: Sequence[int]) -> tuple[npt.NDArray[np.float32], RouteTable]:
        """The engine's answer to the handshake probe, on every rank."""
        return self._on_rank_0(lambda engine: engine.score(token_ids))

    def close(self) -> None:
        """Stops the engine on rank 0; no collective, so that it is safe while other ranks are gone."""
        if self._engine is not None:
            self._engine.close()

    def _on_rank_0(self, action: Callable[[RolloutEngine], T]) -> T:
        result: list[Any] = [None]
        failure: str | None = None
        if self._engine is not None:
            try:
                result[0] = action(self._engine)
            except Exception as error:
                failure = _describe(error)
        self._raise_everywhere(failure)
        dist.broadcast_object_list(result, src=0)
        return result[0]

    def _raise_everywhere(self, failure: str | None) -> None:
        outcome = [failure]
        dist.broadcast_object_list(outcome, src=0)
        if outcome[0] is not None:
            raise RolloutError(outcome[0])


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, PR2Error) else f"{type(error).__name__}: {error}"
