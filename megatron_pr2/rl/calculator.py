"""A calculator as an environment of several turns: the policy writes a call, the calculator its result, the policy goes on.

    prompt      "8+7+5="
    response    "[8+7]" -> "=15 "   "[15+5]" -> "=20 "   "20"   what stands behind an arrow is the calculator's

`rollout.environment=megatron_pr2.rl.calculator:Calculator` gives it to every response; a call that is no sum is answered "=? ".
"""

from __future__ import annotations

import re
from typing import Any

from megatron_pr2.errors import ConfigError
from megatron_pr2.rl.data import encode
from megatron_pr2.rl.task import Problem

OPEN, CLOSE = "[", "]"
ERROR_REPLY = "=? "
# Bounded, so that no call costs more than a line of text does; digits are ASCII, which \d is not.
_SUM = re.compile(r"[0-9]{1,9}(?:\+[0-9]{1,9}){1,15}")


def calculate(call: str) -> int | None:
    """The sum that a call asks for, None if it is no sum: two to sixteen numbers of at most nine digits with "+" between them."""
    return sum(map(int, call.split("+"))) if _SUM.fullmatch(call) else None


def reply_to(turn: str) -> str:
    """What the calculator appends to a text that ends with a call; never raises, whatever the text is."""
    _, bracket, call = turn.removesuffix(CLOSE).rpartition(OPEN)
    result = calculate(call) if bracket and turn.endswith(CLOSE) else None
    return ERROR_REPLY if result is None else f"={result} "


class Calculator:
    """Answers a response each time that the policy writes "]"; an `Environment` (megatron_pr2/rollout/base.py)."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        ids = tokenizer.encode(CLOSE, add_special_tokens=False)
        if len(ids) != 1:
            raise ConfigError(f"Calculator: {CLOSE!r} is {len(ids)} tokens of this tokenizer; expected one, which ends a turn")
        self.stop_token_ids: tuple[int, ...] = tuple(ids)

    def reply(self, prompt_ids: tuple[int, ...], response_ids: tuple[int, ...]) -> tuple[int, ...] | None:
        """The result of the call that the response ends with, or the error mark; None where it ends with no call."""
        if response_ids[-1:] != self.stop_token_ids:
            return None
        text = self._tokenizer.decode(response_ids)  # special tokens are seen, so that none hides within a call
        return encode(self._tokenizer, reply_to(text), "the calculator's reply")


def demonstration(problem: Problem) -> tuple[str, ...]:
    """A response that adds number after number: the policy's turns, with the calculator's replies between them."""
    first, *others = problem.prompt.removesuffix("=").split("+")
    parts: list[str] = []
    so_far = first
    for term in others:
        call = f"{OPEN}{so_far}+{term}{CLOSE}"
        parts += [call, reply_to(call)]
        so_far = str(int(so_far) + int(term))
    return (*parts, so_far)
