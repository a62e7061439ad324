"""Episode: one response while it is being sampled, over attempts, turns and weight versions."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

import numpy as np

from megatron_pr2.errors import RolloutError
from megatron_pr2.hf.shape import ModelShape
from megatron_pr2.rollout.base import RolloutRequest, RolloutResponse, SamplingParams
from megatron_pr2.rollout.sglang.plugin import encode_rid
from megatron_pr2.rollout.sglang.splice import RouteSplice
from megatron_pr2.rollout.sglang.wire import Ask, Sampled, check_token_ids


class Episode:
    """What is known of one response; every token keeps the log-prob, the route and the weight version that it was sampled with.

    Attributes:
        request: whose response it is.
        finish_reason: None while it is not finished.
        failures: attempts that brought nothing since the last one that did.
        engine: index of the engine that holds its prefix, None before the first attempt.
    """

    def __init__(self, request: RolloutRequest, sampling: SamplingParams, shape: ModelShape, *, return_routes: bool) -> None:
        self.request = request
        self._sampling = sampling
        self._shape = shape
        self._return_routes = return_routes
        self._response: list[int] = []
        self._logprobs: list[np.ndarray] = []
        self._versions: list[np.ndarray] = []
        self._own: list[np.ndarray] = []
        self._sampled = 0
        self._routes = RouteSplice(shape)
        self.turns = 1
        self.finish_reason: str | None = None
        self.failures = 0
        self.engine: int | None = None
        self._sealed: RolloutResponse | None = None

    @property
    def num_sampled(self) -> int:
        """Tokens that the policy sampled so far."""
        return self._sampled

    @property
    def num_tokens(self) -> int:
        """Prompt and response so far."""
        return len(self.request.prompt_ids) + len(self._response)

    @property
    def known_rows(self) -> int | None:
        """Tokens whose row is known, or None where routes are not asked for."""
        return self._routes.rows if self._return_routes else None

    def continues(self, request: RolloutRequest, sampling: SamplingParams, *, return_routes: bool) -> bool:
        """Whether this is the unfinished response that a request asks to go on with."""
        return (
            request.key == self.request.key
            and request.prompt_ids == self.request.prompt_ids
            and sampling.temperature == self._sampling.temperature
            and sampling.stop_token_ids == self._sampling.stop_token_ids
            and return_routes == self._return_routes
        )

    def resume(self, request: RolloutRequest, sampling: SamplingParams) -> None:
        """Goes on for another request of the same key."""
        self.request, self._sampling, self.failures, self.engine = request, sampling, 0, None
        if self.finish_reason is None and self._room(0) <= 0:
            self.finish_reason = "length"

    def ask(self, cache_key: str) -> Ask:
        """The next attempt: the sequence so far as input, routes from the first token on whose row is not known."""
        first_row = self.known_rows
        return Ask(
            rid=encode_rid(uuid.uuid4().hex, first_row),
            input_ids=[*self.request.prompt_ids, *self._response],
            first_row=first_row,
            max_new_tokens=self._room(0),
            seed=self.request.seed,
            cache_key=cache_key,
        )

    def extend(self, sampled: Sampled, where: str) -> None:
        """Takes what an attempt brought.

        Raises:
            RouteError: its rows do not fit to what is known.
        """
        if sampled.token_ids and self._return_routes:
            assert sampled.routes is not None
            self._routes.append(self._routes.rows, sampled.routes, where)
        if sampled.token_ids:
            self.failures = 0
        self._response += sampled.token_ids
        self._logprobs.append(sampled.logprobs)
        self._versions.append(sampled.versions)
        self._own.append(np.ones(len(sampled.token_ids), dtype=bool))
        self._sampled += len(sampled.token_ids)
        if sampled.finish != "abort":
            self.finish_reason = sampled.finish
        elif sampled.token_ids and sampled.token_ids[-1] in self._sampling.stop_token_ids:
            # SGLang decodes once more before it honours an abort, and does not look whether that token is a stop token.
            self.finish_reason = "stop"
        elif self._room(0) <= 0:
            self.finish_reason = "length"

    def take_turn(self, reply: Sequence[int] | None, where: str) -> None:
        """Appends what the environment replied to a finished turn and opens the next one; None, or no room, ends the response.

        Raises:
            RolloutError: the reply is empty or names tokens that the model does not have.
        """
        assert self.finish_reason == "stop"
        if reply is None:
            return
        check_token_ids(list(reply), self._shape.vocab_size, f"{where}: the environment's reply")
        if self._room(len(reply)) <= 0 or self.turns >= self._sampling.max_turns:
            self.finish_reason = "length"
            return
        self._response += reply
        self._logprobs.append(np.zeros(len(reply), dtype=np.float32))
        self._versions.append(np.full(len(reply), -1, dtype=np.int64))
        self._own.append(np.zeros(len(reply), dtype=bool))
        self.turns += 1
        self.finish_reason = None

    @property
    def response_ids(self) -> tuple[int, ...]:
        """The response so far."""
        return tuple(self._response)

    def response(self, where: str) -> RolloutResponse:
        """The finished response.

        Raises:
            RouteError: rows are missing.
            RolloutError: it is not finished.
        """
        if self._sealed is not None:
            return self._sealed
        if self.finish_reason is None:
            raise RolloutError(f"{where}: the response is not finished")
        return RolloutResponse(
            prompt_ids=tuple(self.request.prompt_ids),
            response_ids=self.response_ids,
            logprobs=np.concatenate(self._logprobs),
            routes=self._routes.table(self.num_tokens, where) if self._return_routes else None,
            finish_reason=self.finish_reason,
            weight_versions=np.concatenate(self._versions),
            loss_mask=np.concatenate(self._own),
            turns=self.turns,
        )

    @property
    def sealed(self) -> bool:
        """Whether the response is finished for good: no turn follows."""
        return self._sealed is not None

    def seal(self, response: RolloutResponse) -> None:
        """Keeps the finished response instead of what it was put together from."""
        self._sealed = response
        self._routes = RouteSplice(self._shape)
        self._logprobs, self._versions, self._own = [], [], []

    def _room(self, reply: int) -> int:
        """Tokens that may still be sampled after a reply of so many."""
        sampling = self._sampling
        room = sampling.max_new_tokens - self._sampled
        return room if sampling.max_length is None else min(room, sampling.max_length - self.num_tokens - reply)
