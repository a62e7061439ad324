"""The calculator: sums are right, nothing that a policy writes makes it fail, and its demonstrations are what it would reply."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_pr2.errors import ConfigError
from megatron_pr2.rl.calculator import Calculator, calculate, demonstration, reply_to
from megatron_pr2.rl.prompts import load_environment
from megatron_pr2.rl.rewards import exact_match
from megatron_pr2.rl.task import TaskConfig, make_problems
from megatron_pr2.rl.tiny import EOS_ID, SPECIAL_IDS, VOCAB_SIZE, byte_tokenizer
from megatron_pr2.rollout.base import Environment

TOKENIZER = byte_tokenizer()
CALCULATOR = Calculator(TOKENIZER)
REPLY = re.compile(r"=(\d+|\?) ")


def reply(text: str) -> str | None:
    ids = CALCULATOR.reply(tuple(b"8+7="), tuple(text.encode()))
    return None if ids is None else bytes(ids).decode()


@given(st.lists(st.integers(0, 10**9 - 1), min_size=2, max_size=16))
def test_sums_are_right(numbers: list[int]) -> None:
    call = "+".join(map(str, numbers))
    assert calculate(call) == sum(numbers)
    assert reply(f"some text [{call}]") == f"={sum(numbers)} "


@given(st.text())
def test_no_text_makes_it_fail(text: str) -> None:
    assert REPLY.fullmatch(reply_to(text))
    assert reply_to(f"[8+7]=15 {text}[15+5]") == "=20 "
    answer = reply(text)
    assert answer is None if not text.endswith("]") else REPLY.fullmatch(str(answer))


@given(st.lists(st.integers(0, VOCAB_SIZE + 4)), st.booleans())
def test_no_tokens_make_it_fail(ids: list[int], called: bool) -> None:
    """Bytes that are no text, special tokens, and ids that the model has but the tokenizer has not."""
    answer = CALCULATOR.reply((1,), (*ids, *CALCULATOR.stop_token_ids) if called else tuple(ids))
    assert (answer is None) == (not called and ids[-1:] != [ord("]")])
    assert answer is None or REPLY.fullmatch(bytes(answer).decode())


@pytest.mark.parametrize(
    "call",
    [
        "", "8", "+", "8+", "+7", "8++7", "8+7+", "8-7", "8*7", "8 + 7", "-8+7", "1e3+1", "0x1+1", "８+7", "٣+4", "8+7\n", "1_0+1",
        "9999999999+1", "+".join("1" * 17), "__import__('os')+1", "8+7]+1",
    ],
)  # fmt: skip
def test_what_is_no_sum_gets_the_error_mark(call: str) -> None:
    assert calculate(call) is None
    assert reply(f"[{call}]") == "=? "


def test_only_the_last_call_counts_and_special_tokens_do_not_hide_in_it() -> None:
    assert reply("[1+1]=2 [2+2]") == "=4 "
    assert reply("[[1+1]") == "=2 "
    assert reply("1+1]") == "=? "
    for special in SPECIAL_IDS.values():
        ids = CALCULATOR.reply((), (*b"[1", special, *b"+1]"))
        assert bytes(ids or ()).decode() == "=? "


def test_a_response_without_a_call_is_complete() -> None:
    for response in ((), (EOS_ID,), (*b"15", EOS_ID), (*b"[8+7]", EOS_ID), tuple(b"[8+7")):
        assert CALCULATOR.reply((1,), response) is None


def test_it_is_an_environment_that_a_configuration_can_name() -> None:
    made: Environment = load_environment("megatron_pr2.rl.calculator:Calculator")(TOKENIZER)
    assert isinstance(made, Calculator)
    assert made.stop_token_ids == (ord("]"),)


def test_a_tokenizer_that_splits_the_bracket_is_refused() -> None:
    class Splitting:
        def encode(self, text: str, **_: object) -> list[int]:
            return [1, 2]

    with pytest.raises(ConfigError, match="is 2 tokens"):
        Calculator(Splitting())


def test_demonstrations_are_what_the_calculator_replies_and_end_in_the_answer() -> None:
    for problem in make_problems(TaskConfig(), "warmstart", 200, 0):
        parts = demonstration(problem)
        assert len(parts) == 2 * problem.prompt.count("+") + 1
        assert exact_match(parts[-1], problem.answer) == 1.0
        for index in range(1, len(parts), 2):
            assert parts[index] == reply("".join(parts[:index])) != "=? "
