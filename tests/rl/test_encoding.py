"""An encoding without tokens is refused wherever a text is encoded or tokens are taken for one."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_pr2.errors import ConfigError, DataError
from megatron_pr2.rl.calculator import Calculator
from megatron_pr2.rl.config import load_config
from megatron_pr2.rl.data import Example, encode
from megatron_pr2.rl.prompts import PromptQueue
from megatron_pr2.rollout.base import RolloutRequest
from megatron_pr2.rollout.handshake import handshake

EXAMPLES = [Example("1+1=", "2", "train.jsonl:7")]


def tokenizer(known: str, eos: int | None = 0) -> Any:
    """One token per known letter; drops the others, as some tokenizers do."""

    def to_ids(text: str, *, add_special_tokens: bool) -> list[int]:
        return [ord(letter) for letter in text if letter in known]

    return SimpleNamespace(encode=to_ids, decode=lambda ids: "".join(map(chr, ids)), eos_token_id=eos)


def test_encode() -> None:
    assert encode(tokenizer("ab"), "abc", "a text") == (97, 98)
    with pytest.raises(DataError, match=r"a text 'cd' is 0 tokens of the model's tokenizer; expected 1 or more"):
        encode(tokenizer("ab"), "cd", "a text")
    with pytest.raises(DataError, match=r"'a' is 1 tokens .*expected 2 or more"):
        encode(tokenizer("ab"), "a", "a text", at_least=2)
    with pytest.raises(DataError, match=rf"'{'c' * 60}\.\.\.' is 0 tokens"):
        encode(tokenizer("ab"), "c" * 1000, "a text")


def test_the_trainers_prompts() -> None:
    config = load_config(None)
    assert PromptQueue(config, EXAMPLES, tokenizer("1+=")).requests()[0].prompt_ids == tuple(map(ord, "1+1="))
    with pytest.raises(DataError, match=r"train\.jsonl:7: the prompt '1\+1=' is 0 tokens"):
        PromptQueue(config, EXAMPLES, tokenizer("ab")).requests()
    with pytest.raises(ConfigError, match="no eos_token"):
        PromptQueue(config, EXAMPLES, tokenizer("1+=", eos=None))


def test_requests_of_any_pipeline() -> None:
    with pytest.raises(ConfigError, match="prompt_ids is empty"):
        RolloutRequest((), 0)
    for kind in (list, np.array, torch.tensor):
        assert RolloutRequest(kind([3, 4]), 0).prompt_ids == (3, 4)


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt_ids": "ab"}, {"prompt_ids": (1.5,)}, {"prompt_ids": None}, {"prompt_ids": [[3]]}, {"seed": "0"}, {"seed": 0.5},
        {"key": 3}, {"group": "a"}, {"group": True}, {"horizon": "1"}, {"horizon": -1.0}, {"horizon": math.inf},
        {"environment": "x"},
    ],
    ids=str,
)  # fmt: skip
def test_requests_of_wrong_types_are_refused(wrong: dict[str, Any]) -> None:
    """Where they are made, and not in the middle of a rollout."""
    (name,) = wrong
    with pytest.raises(ConfigError, match=f"RolloutRequest: {name}"):
        RolloutRequest(**{"prompt_ids": (3,), "seed": 0, **wrong})


@pytest.mark.parametrize("ids", [(), (3,)])
def test_the_handshakes_probe(ids: tuple[int, ...]) -> None:
    engine: Any = SimpleNamespace(score=lambda ids: pytest.fail("it was asked"))
    with pytest.raises(ConfigError, match=f"the probe has {len(ids)} tokens; expected two or more"):
        handshake(engine, engine, ids, "float32")


def test_the_calculators_reply() -> None:
    assert Calculator(tokenizer("[]1+=2 ")).reply((1,), tuple(map(ord, "[1+1]"))) == tuple(map(ord, "=2 "))
    with pytest.raises(DataError, match="the calculator's reply"):
        Calculator(tokenizer("]")).reply((1,), (ord("]"),))
