"""Episode: one response while it is being sampled, over attempts, turns and weight versions."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

import numpy as np

from megatron_pr2.errors import RolloutError, RouteError
from megatron_pr2.hf.shape import ModelShape
from megatron_pr2.rollout.base import RolloutRequest, RolloutResponse, SamplingParams
from megatron_pr2.rollout.sglang.plugin import encode_rid
from megatron_pr2.rollout.sglang.wire import Ask, Sampled, check_token_ids
from megatron_pr2.routes.table import RouteTable


class Episode:
    """What is known of one response; every token keeps the log-prob, the route and the weight version that it was sampled with.

    Row i of the routes belongs to input token i and is taken from the attempt in which that token was an input for the first time,
    so it is the route that the token's successor was sampled with. The last token of an attempt was no input yet: its row comes
    with the next attempt, which asks for rows from there on (`routed_experts_start_len`).

    Attributes:
        response_ids: the response so far, of which the policy sampled `num_sampled` tokens.
        finish_reason: None while the policy has to go on.
        finished: the response, once no turn follows.
        failures: attempts that returned nothing usable since the last one that did.
        engine: index of the engine that holds its prefix, None before the first attempt.
        horizon: of the gates that it is sampled with.
    """

    def __init__(self, request: RolloutRequest, sampling: SamplingParams, shape: ModelShape, *, return_routes: bool) -> None:
        self.request = request
        self.response_ids: list[int] = []
        self.num_sampled = 0
        self.finish_reason: str | None = None
        self.finished: RolloutResponse | None = None
        self.failures = 0
        self.engine: int | None = None
        self.horizon = request.horizon
        self._sampling, self._shape, self._return_routes = sampling, shape, return_routes
        self._routes: list[RouteTable] = []
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # log-probs, versions, whether the policy's own
        self._turns = 1

    def sample_for(self, horizon: float | None) -> None:
        """The next attempt is with gates for this horizon: what was sampled with others is dropped, since a response has one."""
        if horizon != self.horizon:
            self.horizon = horizon
            self.response_ids, self.num_sampled = [], 0
            self._routes, self._parts, self._turns = [], [], 1

    @property
    def num_tokens(self) -> int:
        """Prompt and response so far."""
        return len(self.request.prompt_ids) + len(self.response_ids)

    @property
    def known_rows(self) -> int | None:
        """Tokens whose row is known, or None where routes are not asked for."""
        return sum(part.num_tokens - 1 for part in self._routes) if self._return_routes else None

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
        if self.finish_reason is None and self._room() <= 0:
            self.finish_reason = "length"

    def ask(self, cache_key: str) -> Ask:
        """The next attempt: the sequence so far as input, routes from the first token on whose row is not known."""
        return Ask(
            rid=encode_rid(uuid.uuid4().hex, self.known_rows),
            input_ids=[*self.request.prompt_ids, *self.response_ids],
            first_row=self.known_rows,
            max_new_tokens=self._room(),
            seed=self.request.seed,
            cache_key=cache_key,
        )

    def extend(self, sampled: Sampled, where: str) -> None:
        """Appends what an attempt returned; raises RouteError if its rows do not continue the known ones."""
        ids = sampled.token_ids
        if ids and self._return_routes:
            part = sampled.routes
            assert part is not None
            expected = (self.num_tokens + len(ids) - (self.known_rows or 0), len(self._shape.moe_layers), self._shape.topk)
            if part.experts.shape != expected or part.valid[-1]:
                raise RouteError(f"{where}: rows {part.experts.shape} of an attempt, expected {expected} without the last one")
            self._routes.append(part)
        if ids:
            self.failures = 0
        self.response_ids += ids
        self._parts.append((sampled.logprobs, sampled.versions, np.ones(len(ids), dtype=bool)))
        self.num_sampled += len(ids)
        if sampled.finish != "abort":
            self.finish_reason = sampled.finish
        elif ids and ids[-1] in self._sampling.stop_token_ids:
            # SGLang decodes once more before it honours an abort, and does not look whether that token is a stop token.
            self.finish_reason = "stop"
        elif self._room() <= 0:
            self.finish_reason = "length"

    def take_turn(self, reply: Sequence[int] | None, where: str) -> None:
        """Appends the environment's reply to a finished turn and opens the next one; None, or no room, ends the response."""
        assert self.finish_reason == "stop"
        if reply is None:
            return
        check_token_ids(list(reply), self._shape.vocab_size, f"{where}: the environment's reply")
        if self._room(len(reply)) <= 0 or self._turns >= self._sampling.max_turns:
            self.finish_reason = "length"
            return
        size = len(reply)
        self.response_ids += reply
        self._parts.append((np.zeros(size, np.float32), np.full(size, -1, np.int64), np.zeros(size, bool)))
        self._turns += 1
        self.finish_reason = None

    def response(self, where: str) -> RolloutResponse:
        """The response, put together; raises RolloutError if it is not finished, RouteError if rows are missing."""
        if self.finish_reason is None:
            raise RolloutError(f"{where}: the response is not finished")
        logprobs, versions, own = (np.concatenate(part) for part in zip(*self._parts, strict=True))
        return RolloutResponse(
            prompt_ids=tuple(self.request.prompt_ids),
            response_ids=tuple(self.response_ids),
            logprobs=logprobs,
            routes=self._joined(where) if self._return_routes else None,
            finish_reason=self.finish_reason,
            weight_versions=versions,
            loss_mask=own,
            turns=self._turns,
            horizon=self.horizon,
        )

    def finish(self, response: RolloutResponse) -> None:
        """Keeps the finished response instead of its parts."""
        self.finished = response
        self._routes, self._parts = [], []

    def _joined(self, where: str) -> RouteTable:
        if self.known_rows != self.num_tokens - 1:
            raise RouteError(f"{where}: {self.known_rows} rows for {self.num_tokens} tokens; expected one less than tokens")
        *earlier, last = self._routes
        if not earlier:
            return last
        experts = [part.experts[:-1] for part in earlier] + [last.experts]
        valid = [part.valid[:-1] for part in earlier] + [last.valid]
        return RouteTable.checked(np.concatenate(experts), np.concatenate(valid), self._shape.num_experts)

    def _room(self, reply: int = 0) -> int:
        """Tokens that may still be sampled after a reply of so many."""
        sampling = self._sampling
        room = sampling.max_new_tokens - self.num_sampled
        return room if sampling.max_length is None else min(room, sampling.max_length - self.num_tokens - reply)
