"""RolloutEngine: what the trainer asks of an engine, whatever runs behind it.

Every method is collective: all trainer ranks call it, with the same arguments unless said otherwise. An engine that lives on
one rank only does its work there; `rollout/collective.py` distributes the results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from megatron_pr2.config import check_horizon
from megatron_pr2.errors import ConfigError, RouteError
from megatron_pr2.routes.ids import integers
from megatron_pr2.routes.table import RouteTable

if TYPE_CHECKING:  # settings are checked before torch is imported
    import torch


@dataclass(frozen=True)
class SamplingParams:
    """How to sample.

    Attributes:
        max_new_tokens: tokens that the policy samples, over all turns of a response.
        temperature: above 0; no top-p or top-k, which would make the log-probs those of another distribution.
        stop_token_ids: end a turn; part of the response when they are sampled.
        max_turns: turns of the policy at most; the response ends as "length" then.
        max_length: tokens of prompt and response together at most; None leaves it to max_new_tokens and the engine.
    """

    max_new_tokens: int
    temperature: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    max_turns: int = 16
    max_length: int | None = None


class Environment(Protocol):
    """What replies to the policy between its turns: a tool, a game, a user.

    A response that is carried over to another call goes on with that call's environment, so that replies should depend on the
    arguments alone.
    """

    stop_token_ids: tuple[int, ...]  # that end a turn besides the end of the sequence

    def reply(self, prompt_ids: tuple[int, ...], response_ids: tuple[int, ...]) -> tuple[int, ...] | None:
        """Token ids to append after the policy stopped, or None if the response is complete.

        Called once per turn, from a worker thread. `response_ids` is everything behind the prompt: what the policy sampled, stop
        tokens included, and earlier replies.
        """


@dataclass(frozen=True)
class RolloutRequest:
    """One response to sample.

    Attributes:
        prompt_ids: a tuple; lists, arrays and tensors of integers become one.
        seed: the random numbers of this response depend on this alone (where the engine can), so that a rerun samples the same.
        key: names the response over several calls: what an early stop leaves unfinished is continued by the next request of
            the same key. Empty: never continued.
        group: responses that are of use together only (those of one prompt); an early stop counts complete groups.
        horizon: updates of the policy until the response is trained on, which its routes are to be predicted for; None: the
            average of the batch. 0 is no prediction.
        environment: replies whenever the policy samples a stop token; None for a single turn.

    Raises:
        ConfigError: a value of a wrong type; or no prompt: a response to nothing has no first log-prob, and engines differ in what
            they do with it.
    """

    prompt_ids: tuple[int, ...]
    seed: int
    key: str = ""
    group: int = 0
    horizon: float | None = None
    environment: Environment | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        try:
            ids = integers(self.prompt_ids, "prompt_ids")
        except RouteError as error:
            raise ConfigError(f"RolloutRequest: {error}") from error
        if ids.ndim != 1:
            raise ConfigError(f"RolloutRequest: prompt_ids has the shape {list(ids.shape)}; expected one axis")
        object.__setattr__(self, "prompt_ids", tuple(ids.tolist()))
        for name, kind in (("seed", Integral), ("group", Integral), ("key", str)):
            if not isinstance(value := getattr(self, name), kind) or isinstance(value, bool):
                raise ConfigError(f"RolloutRequest: {name}={value!r}; expected {'a string' if kind is str else 'an integer'}")
        check_horizon(self.horizon, "RolloutRequest")
        if self.environment is not None and not callable(getattr(self.environment, "reply", None)):
            raise ConfigError(f"RolloutRequest: environment={self.environment!r} has no method reply()")
        if not self.prompt_ids:
            raise ConfigError("RolloutRequest: prompt_ids is empty; expected one token or more. Did the tokenizer encode it?")


@dataclass(frozen=True)
class RolloutResponse:
    """One sampled response.

    Attributes:
        prompt_ids, response_ids: token ids; a stop token that was sampled and what an environment replied are parts of it.
        logprobs: [len(response_ids)] float32, natural log of the behaviour policy's probability at the sampling temperature; 0 for
            tokens of an environment.
        routes: table over prompt + response tokens, or None if routes were not asked for.
        finish_reason: "stop" or "length".
        weight_versions: [len(response_ids)] int64, version of the weights that sampled each token; -1 for tokens of an environment.
        loss_mask: [len(response_ids)] bool, False for tokens of an environment.
        turns: times that the policy was asked to go on, plus one.
        horizon: updates that the gates were predicted for which sampled it: the request's, unless no server with these is left.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    logprobs: npt.NDArray[np.float32]
    routes: RouteTable | None
    finish_reason: str
    weight_versions: npt.NDArray[np.int64]
    loss_mask: npt.NDArray[np.bool_]
    turns: int = 1
    horizon: float | None = None

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.prompt_ids + self.response_ids

    @property
    def weight_version(self) -> int:
        """The newest weights that took part."""
        return int(self.weight_versions.max(initial=-1))


@dataclass(frozen=True)
class Probe:
    """Given tokens, scored by one engine: [len - 1] float32 log-probs of tokens 1.. at temperature 1, routes of all tokens.

    `horizon` is that of its gates, as for RolloutRequest.
    """

    name: str
    logprobs: npt.NDArray[np.float32]
    routes: RouteTable
    horizon: float | None = None


@dataclass
class RolloutStats:
    """What a generate call cost; counts are of the whole call, bytes of routes as received."""

    seconds: float = 0.0
    generated_tokens: int = 0
    route_bytes: int = 0
    extra: dict[str, float] = field(default_factory=dict)

    def add(self, other: RolloutStats) -> None:
        """Adds those of another call."""
        self.seconds += other.seconds
        self.generated_tokens += other.generated_tokens
        self.route_bytes += other.route_bytes
        self.extra = {name: self.extra.get(name, 0.0) + value for name, value in other.extra.items()}


@dataclass(frozen=True)
class RolloutBatch:
    """What generate returns.

    Attributes:
        responses: in the order of their requests.
        finished: indices of the requests that were answered, ascending: all of them, or those of the groups that were enough.
    """

    responses: list[RolloutResponse]
    stats: RolloutStats
    finished: list[int]


@dataclass(frozen=True)
class Progress:
    """How far a generate call is: responses finished and asked for, and tokens sampled so far."""

    finished: int
    total: int
    tokens: int


class RolloutEngine(Protocol):
    """An engine that samples responses and, if asked, returns the experts that every input token took.

    Attributes:
        takes_owned_weights: whether every trainer rank may send what it owns (`CollectiveEngine.update_owned_weights`).
        on_progress: called now and then while generating, maybe from another thread.
    """

    name: str
    returns_routes: bool
    takes_owned_weights: bool
    on_progress: Callable[[Progress], None] | None

    def start(self) -> None:
        """Makes the engine ready; raises RolloutError naming the cause (last log lines included) if it cannot be."""

    def restart(self) -> None:
        """Makes an engine that died ready again; its weights must be pushed again."""

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Replaces weights (Hugging Face names) and drops every cache that depends on the old ones.

        Returns when the next response is sampled from the new weights; raises RolloutError if any part was refused.
        """

    def generate(
        self, requests: Sequence[RolloutRequest], sampling: SamplingParams, *, return_routes: bool, enough: int | None = None
    ) -> RolloutBatch:
        """Samples one response per request; raises RolloutError if any is lost.

        Args:
            enough: stop as soon as that many groups are complete and return those alone; None waits for all. Engines that cannot
                stop early answer all requests and return the first groups.
        """

    def score(self, token_ids: Sequence[int], horizon: float | None = None) -> list[Probe]:
        """Handshake probe: the same tokens scored by every engine behind this one.

        Args:
            horizon: which gates an engine takes that has several; servers hold one set each and say which.
        """

    def close(self) -> None:
        """Stops everything that start() started; safe to call twice and after a failure."""
