"""RolloutEngine: what the trainer asks of an engine, whatever runs behind it.

Every method is collective: all trainer ranks call it, with the same arguments unless said otherwise. An engine that lives on
one rank only does its work there and takes part in nothing else; `rollout/collective.py` hands the results round.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from megatron_pr2.routes import RouteTable


@dataclass(frozen=True)
class ModelShape:
    """What an engine has to know of the model to read its routes.

    Attributes:
        num_hidden_layers: all decoder layers, dense ones included.
        moe_layers: 0-based indices of the MoE layers, ascending.
        num_experts: E, routed experts.
        topk: K.
        vocab_size: tokens.
    """

    num_hidden_layers: int
    moe_layers: tuple[int, ...]
    num_experts: int
    topk: int
    vocab_size: int


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. `stop_token_ids` are part of the response when they are sampled."""

    max_new_tokens: int
    temperature: float = 1.0
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class RolloutRequest:
    """One response to sample.

    Attributes:
        prompt_ids: token ids of the prompt, at least one.
        seed: the random numbers of this response depend on this alone (where the engine can), so that a rerun samples the same.
    """

    prompt_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class RolloutResponse:
    """One sampled response.

    Attributes:
        prompt_ids, response_ids: token ids; the stop token, if one was sampled, is the last of the response.
        logprobs: [len(response_ids)] float32, natural log of the behaviour policy's probability at the sampling temperature.
        routes: table over prompt + response tokens, or None if routes were not asked for.
        finish_reason: "stop" or "length".
        weight_version: version of the weights that sampled it.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    logprobs: npt.NDArray[np.float32]
    routes: RouteTable | None
    finish_reason: str
    weight_version: int

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.prompt_ids + self.response_ids


@dataclass
class RolloutStats:
    """What a generate call cost; counts are of the whole call, bytes of routes as received."""

    seconds: float = 0.0
    generated_tokens: int = 0
    route_bytes: int = 0
    extra: dict[str, float] = field(default_factory=dict)


class RolloutEngine(Protocol):
    """An engine that samples responses and, if asked, returns the experts that every input token took."""

    name: str
    returns_routes: bool

    def start(self) -> None:
        """Makes the engine ready; raises RolloutError naming the cause (last log lines included) if it cannot be."""

    def restart(self) -> None:
        """Makes an engine that died ready again; its weights must be pushed anew."""

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Replaces weights (Hugging Face names) and drops every cache that depends on the old ones.

        Returns when the next response is sampled from the new weights; raises RolloutError if any part was refused.
        """

    def generate(
        self, requests: Sequence[RolloutRequest], sampling: SamplingParams, *, return_routes: bool
    ) -> tuple[list[RolloutResponse], RolloutStats]:
        """Samples one response per request, in the order of the requests; raises RolloutError if any is lost."""

    def score(self, token_ids: Sequence[int]) -> tuple[npt.NDArray[np.float32], RouteTable]:
        """Handshake probe: log-probs [len - 1] of tokens 1.. at temperature 1, and the routes of all input tokens."""

    def close(self) -> None:
        """Stops everything that start() started; safe to call twice and after a failure."""
