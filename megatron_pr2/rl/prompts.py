"""PromptQueue: which prompts a rollout batch asks for, and those that an early stop left for the next one."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_pr2.errors import ConfigError
from megatron_pr2.rl.config import TrainConfig
from megatron_pr2.rl.data import Example, encode
from megatron_pr2.rl.deal import mini_step_of
from megatron_pr2.rollout.base import Environment, RolloutRequest


class PromptQueue:
    """Makes the requests of a rollout batch. The same on every rank.

    Prompts come in epochs: each visits every example once, in an order that (seed, epoch) alone decides. A prompt's responses are a
    group, numbered over the whole run; what a response samples depends on (seed, number of the response) alone, whenever it is
    asked for.
    """

    def __init__(self, config: TrainConfig, examples: Sequence[Example], tokenizer: Any) -> None:
        self._config, self._examples, self._tokenizer = config, examples, tokenizer
        self._order = functools.lru_cache(maxsize=2)(self._order_of)
        self._next_group = 0
        # Numbers of groups.
        self._waiting: list[int] = []
        self._asked: list[int] = []
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
            self._asked = [*self._waiting, *range(self._next_group, self._next_group + count)]
            self._next_group += count
        return [self._request(group, j) for group in self._asked for j in range(rollout.responses)]

    def settle(self, finished: Sequence[int]) -> list[tuple[int, Example]]:
        """Takes which requests were answered; the rest is asked for again in the next batch.

        Returns:
            Number of the response over the whole run, and its example, per answered request.
        """
        responses = self._config.rollout.responses
        groups = [self._asked[index // responses] for index in finished]
        self._waiting = [group for group in self._asked if group not in set(groups)]
        self._asked = []
        return [(group * responses + i % responses, self._example(group)) for group, i in zip(groups, finished, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Where it stands between two batches."""
        return {"num_examples": len(self._examples), "next_group": self._next_group, "waiting": list(self._waiting)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`.

        Raises:
            ConfigError: the data set had another size, so that the run would go on with other prompts.
        """
        if state["num_examples"] != len(self._examples):
            raise ConfigError(
                f"the run was started with {state['num_examples']} examples, the data set has {len(self._examples)}; "
                "resume with the data the run was started with"
            )
        waiting = list(state.get("waiting", []))
        if "next_group" not in state or not all(isinstance(group, int) for group in waiting):
            raise ConfigError(
                "the checkpoint is of a release that numbered prompts otherwise; finish the run with that release, or start again "
                "in another run=DIRECTORY"
            )
        self._next_group, self._waiting = state["next_group"], waiting

    def _order_of(self, epoch: int) -> list[int]:
        return np.random.default_rng([self._config.seed, epoch]).permutation(len(self._examples)).tolist()

    def _example(self, group: int) -> Example:
        epoch, place = divmod(group, len(self._examples))
        return self._examples[self._order(epoch)[place]]

    def _request(self, group: int, index: int) -> RolloutRequest:
        config, example = self._config, self._example(group)
        number, horizons = group * config.rollout.responses + index, config.horizons
        return RolloutRequest(
            encode(self._tokenizer, example.prompt, f"{example.where}: the prompt"),
            int(np.random.SeedSequence([config.seed, number]).generate_state(1)[0]),
            key=str(number) if self.enough is not None else "",
            group=group,
            horizon=horizons[mini_step_of(number, config.algorithm.mini_steps, config.seed)] if horizons else None,
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
