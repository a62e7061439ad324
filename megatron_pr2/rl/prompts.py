"""PromptQueue: which prompts a rollout batch asks for, and those that an early stop left for the next one."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_pr2.errors import ConfigError
from megatron_pr2.rl.config import TrainConfig
from megatron_pr2.rl.data import Example, PromptSampler, encode
from megatron_pr2.rollout.base import Environment, RolloutRequest


class PromptQueue:
    """Makes the requests of a rollout batch. The same on every rank.

    A prompt's responses are a group, numbered over the whole run; what a response samples depends on (seed, number of the response)
    alone, whenever it is asked for.
    """

    def __init__(self, config: TrainConfig, examples: Sequence[Example], tokenizer: Any) -> None:
        self._config, self._examples, self._tokenizer = config, examples, tokenizer
        self._sampler = PromptSampler(len(examples), config.seed)
        self._next_group = 0
        # (number of the group, index of its example)
        self._waiting: list[tuple[int, int]] = []
        self._asked: list[tuple[int, int]] = []
        self._make_environment = load_environment(config.rollout.environment)
        if tokenizer.eos_token_id is None:
            raise ConfigError("the model's tokenizer has no eos_token: no response would end; add it to tokenizer_config.json")

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """What ends a turn: the end of the sequence, and what the environment answers to."""
        end = (int(self._tokenizer.eos_token_id),)
        return end if self._make_environment is None else end + tuple(self._make_environment(self._tokenizer).stop_token_ids)

    @property
    def enough(self) -> int | None:
        """Groups that make a batch, None where all that are asked for are waited for."""
        rollout = self._config.rollout
        return rollout.prompts if rollout.oversample > 1 else None

    def requests(self) -> list[RolloutRequest]:
        """The requests of the next batch: what was left over first, then new prompts. Call `settle` when they are answered."""
        rollout = self._config.rollout
        if not self._asked:
            count = max(0, math.ceil(rollout.prompts * rollout.oversample) - len(self._waiting))
            new = self._sampler.take(count) if count else []
            self._asked = self._waiting + [(self._next_group + i, example) for i, example in enumerate(new)]
            self._next_group += count
        return [self._request(group, example, j) for group, example in self._asked for j in range(rollout.responses)]

    def settle(self, finished: Sequence[int]) -> list[tuple[int, Example]]:
        """Takes which requests were answered; the rest is asked for again in the next batch.

        Returns:
            Number of the response over the whole run, and its example, per answered request.
        """
        responses = self._config.rollout.responses
        answered = []
        for index in finished:
            group, example = self._asked[index // responses]
            answered.append((group * responses + index % responses, self._examples[example]))
        places = {index // responses for index in finished}
        self._waiting = [asked for place, asked in enumerate(self._asked) if place not in places]
        self._asked = []
        return answered

    def state_dict(self) -> dict[str, Any]:
        """Where it stands between two batches."""
        return {**self._sampler.state_dict(), "next_group": self._next_group, "waiting": list(self._waiting)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self._sampler.load_state_dict(state)
        # Checkpoints of version 0.1.0 had no over-sampling: every prompt taken so far was a group.
        taken = self._sampler.epoch * self._sampler.num_examples + self._sampler.cursor
        self._next_group = int(state.get("next_group", taken))
        self._waiting = [(int(group), int(example)) for group, example in state.get("waiting", [])]

    def _request(self, group: int, example: int, index: int) -> RolloutRequest:
        number = group * self._config.rollout.responses + index
        return RolloutRequest(
            encode(self._tokenizer, self._examples[example].prompt, f"{self._examples[example].where}: the prompt"),
            int(np.random.SeedSequence([self._config.seed, number]).generate_state(1)[0]),
            key=str(number) if self.enough is not None else "",
            group=group,
            environment=self._make_environment and self._make_environment(self._tokenizer),
        )


def load_environment(name: str | None) -> Any:
    """The callable that `rollout.environment` names, "package.module:Name"; called with the tokenizer for every response.

    Raises:
        ConfigError: there is no such thing.
    """
    if name is None:
        return None
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, SyntaxError) as error:
        raise ConfigError(
            f"rollout.environment={name!r}: {error}; expected 'package.module:Name' of something that, called with the tokenizer, "
            f"returns a {Environment.__name__}"
        ) from error
