"""Which prompts a batch asks for: numbered once, asked for until answered, the same after a resumption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_pr2.errors import ConfigError
from megatron_pr2.rl.config import load_config
from megatron_pr2.rl.data import Example
from megatron_pr2.rl.deal import mini_batch_order
from megatron_pr2.rl.prompts import PromptQueue, load_environment

EXAMPLES = [Example(f"{i}+{i}=", str(2 * i), f"file:{i}") for i in range(20)]


class Characters:
    eos_token_id = 2

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [ord(c) for c in text]


class Tool:
    stop_token_ids = (93,)

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def reply(self, prompt_ids: Any, response_ids: Any) -> None:
        return None


def queue(*overrides: str) -> PromptQueue:
    config = load_config(None, ["rollout.prompts=4", "rollout.responses=2", "algorithm.mini_steps=2", *overrides])
    return PromptQueue(config, EXAMPLES, Characters())


def test_without_over_sampling_a_response_is_numbered_by_its_place_in_the_run() -> None:
    prompts = queue()
    numbers = []
    for _ in range(3):
        requests = prompts.requests()
        assert prompts.enough is None
        assert [r.key for r in requests] == [""] * 8
        answered = prompts.settle(range(8))
        numbers += [number for number, _ in answered]
        for request, (number, example) in zip(requests, answered, strict=True):
            assert request.prompt_ids == tuple(map(ord, example.prompt))
            assert request.seed == int(np.random.SeedSequence([0, number]).generate_state(1)[0])
            assert request.group == number // 2
    assert numbers == list(range(24))


def test_what_was_not_answered_comes_first_in_the_next_batch_under_its_old_number() -> None:
    prompts = queue("rollout.oversample=1.5")
    first = prompts.requests()
    assert (len(first), prompts.enough) == (12, 4)
    assert prompts.requests() == first  # a failed batch is asked for again
    answered = prompts.settle([0, 1, 4, 5, 6, 7, 10, 11])
    assert [number for number, _ in answered] == [0, 1, 4, 5, 6, 7, 10, 11]
    second = prompts.requests()
    assert second[:4] == first[2:4] + first[8:10]
    assert [r.key for r in second] == ["2", "3", "8", "9", *map(str, range(12, 20))]
    assert len({r.key for r in first + second}) == 12 + 8


def test_a_resumed_run_asks_for_the_same() -> None:
    straight, other = queue("rollout.oversample=1.5"), queue("rollout.oversample=1.5")
    straight.requests()
    straight.settle(range(2, 10))
    other.load_state_dict(straight.state_dict())
    assert other.requests() == straight.requests()


def test_every_epoch_visits_every_prompt_once_in_an_order_of_its_own() -> None:
    def order(*overrides: str) -> list[tuple[int, ...]]:
        prompts, asked = queue("rollout.responses=1", "algorithm.mini_steps=1", *overrides), []
        while len(asked) < 60:  # batches reach across the ends of epochs
            asked += [request.prompt_ids for request in prompts.requests()]
            prompts.settle(range(prompts._config.rollout.prompts))
        return asked

    asked = order("rollout.prompts=6")
    epochs = [asked[start : start + 20] for start in (0, 20, 40)]
    assert [sorted(epoch) for epoch in epochs] == [sorted(tuple(map(ord, e.prompt)) for e in EXAMPLES)] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert order()[:60] == asked[:60], "batch sizes do not matter"
    assert order("seed=1")[:20] != epochs[0]


def test_a_run_goes_on_with_the_data_it_was_started_with() -> None:
    with pytest.raises(ConfigError, match="started with 21 examples, the data set has 20"):
        queue().load_state_dict({**queue().state_dict(), "num_examples": 21})


@pytest.mark.parametrize("old", [{"waiting": [(3, 4)]}, {"next_group": ...}])
def test_a_checkpoint_that_numbered_prompts_otherwise_is_refused(old: dict[str, Any]) -> None:
    state = {name: value for name, value in {**queue().state_dict(), **old}.items() if value is not ...}
    with pytest.raises(ConfigError, match="numbered prompts otherwise"):
        queue().load_state_dict(state)


def test_an_environment_is_made_for_every_response(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = queue("rollout.environment=tests.rl.test_prompts:Tool")
    requests = prompts.requests()
    assert len({id(r.environment) for r in requests}) == 8
    assert prompts.stop_token_ids == (2, 93)
    assert queue().stop_token_ids == (2,)


@pytest.mark.parametrize("name", ["nowhere.to:be", "tests.rl.test_prompts:Missing", "no_colon", ":x"])
def test_an_environment_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=r"rollout.environment=.*expected 'package.module:Name'"):
        load_environment(name)


def test_an_environment_with_a_syntax_error_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_tool.py").write_text("def (:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="broken_tool:Tool"):
        load_environment("broken_tool:Tool")


@pytest.mark.parametrize("groups", ["0", "turns", "2"])
def test_requests_are_for_the_routers_of_their_mini_step(groups: str) -> None:
    """Dealt before they are sampled; what is carried over keeps its horizon."""
    ahead = ["rollout.oversample=1.5", "rollout.responses=4", "algorithm.mini_steps=4", "pr2.predictor=lookahead"]
    prompts = queue(*ahead, f"rollout.groups={groups}")
    horizons = [0.0, 0.0, 2.5, 2.5] if groups == "2" else [0.0, 1.0, 2.0, 3.0]
    first = prompts.requests()
    for place in range(0, len(first), 4):
        assert sorted(request.horizon or 0.0 for request in first[place : place + 4]) == horizons
    assert len({tuple(request.horizon for request in first[place : place + 4]) for place in range(0, len(first), 4)}) > 1
    answered = prompts.settle(range(8, len(first)))
    numbers = [number for number, _ in answered]
    order = mini_batch_order(numbers, 4, 0)
    assert [first[8:][place].horizon for place in order] == [each for each in horizons for _ in range(len(order) // 4)]
    assert [request.horizon for request in prompts.requests()[:8]] == [request.horizon for request in first[:8]]
    assert {request.horizon for request in queue(*ahead, "rollout.groups=1").requests()} == {None}
