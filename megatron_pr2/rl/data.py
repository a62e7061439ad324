"""Prompts with verifiable answers: JSONL loading and a deterministic, resumable sampler.

Two kinds of line are understood, and may be mixed:
    {"prompt": "8+7-5=", "answer": "10"}                    this project's own; answer may be a number
    {"question": "...", "answer": "... #### 18"}            GSM8K; the gold number follows the last `####`
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_pr2.errors import ConfigError, DataError

GSM8K_MARK = "####"


@dataclass(frozen=True)
class Example:
    """One prompt and the answer that a response is checked against.

    Attributes:
        prompt: text given to the policy, verbatim.
        answer: gold answer without explanation.
        where: "file:line", for messages.
    """

    prompt: str
    answer: str
    where: str


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    """Non-empty text of field `key`; a number is accepted for an answer."""
    value = row[key]
    if key == "answer" and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: field {key!r} is {value!r}; expected a non-empty text")
    return value


def parse_row(row: object, where: str) -> Example:
    """One decoded JSON line as an example.

    Args:
        row: what `json.loads` made of the line.
        where: "file:line", named in errors.

    Raises:
        DataError: not an object, a field is missing, empty or of a wrong type, or a GSM8K answer has no `####`.
    """
    if not isinstance(row, dict):
        raise DataError(f"{where}: a JSON {type(row).__name__}; expected an object with `prompt` and `answer`")
    prompt_key = "prompt" if "prompt" in row else "question"
    missing = [key for key in (prompt_key, "answer") if key not in row]
    if missing:
        raise DataError(
            f"{where}: no field {missing[0] if prompt_key in row else 'prompt'!r} (found {sorted(row)}); "
            "expected `prompt` and `answer`, or GSM8K's `question` and `answer`"
        )
    prompt, answer = _text(row, prompt_key, where), _text(row, "answer", where)
    if GSM8K_MARK in answer:
        answer = answer.rsplit(GSM8K_MARK, 1)[1]
    elif prompt_key == "question":
        raise DataError(f"{where}: a GSM8K answer without {GSM8K_MARK!r}; expected the gold number behind it")
    if not answer.strip():
        raise DataError(f"{where}: nothing behind {GSM8K_MARK!r} in `answer`; expected the gold number there")
    return Example(prompt, answer.strip(), where)


def load_examples(path: str | Path) -> list[Example]:
    """Every line of a JSONL file, in order; blank lines are skipped.

    Raises:
        DataError: the file is missing, not UTF-8 or empty, or a line cannot be used; file and line are named.
    """
    path = Path(path)
    try:
        # Only \n separates lines: U+2028 and its like may stand unescaped inside a JSON string.
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); expected a JSONL file") from error
    except UnicodeDecodeError as error:
        bad_line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{bad_line}: not UTF-8 ({error.reason}); expected a JSONL file in UTF-8") from error
    examples = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{where}: not JSON ({error}); expected one object per line") from error
        examples.append(parse_row(row, where))
    if not examples:
        raise DataError(f"{path}: no examples; expected at least one line with `prompt` and `answer`")
    return examples


class PromptSampler:
    """Indices of the next examples: every epoch visits all of them once, in an order that (seed, epoch) alone decides.

    A batch may reach across the end of an epoch. The state is three integers and the size, so a run resumes with exactly the
    prompts that it would have seen.
    """

    def __init__(self, num_examples: int, seed: int) -> None:
        """Starts at the first example of epoch 0.

        Args:
            num_examples: size of the data set, at least 1.
            seed: non-negative.

        Raises:
            ConfigError: a value out of range.
        """
        if num_examples < 1 or seed < 0:
            raise ConfigError(f"PromptSampler: num_examples={num_examples}, seed={seed}; expected >= 1 and >= 0")
        self.num_examples = num_examples
        self.seed = seed
        self.epoch = 0
        self.cursor = 0
        self._order = self._shuffled(0)

    def _shuffled(self, epoch: int) -> Sequence[int]:
        order: list[int] = np.random.default_rng([self.seed, epoch]).permutation(self.num_examples).tolist()
        return order

    def take(self, count: int) -> list[int]:
        """The next `count` indices into the data set.

        Raises:
            ConfigError: `count` is below 1.
        """
        if count < 1:
            raise ConfigError(f"PromptSampler.take({count}): expected at least 1")
        taken: list[int] = []
        while len(taken) < count:
            if self.cursor == self.num_examples:
                self.epoch, self.cursor = self.epoch + 1, 0
                self._order = self._shuffled(self.epoch)
            part = self._order[self.cursor : self.cursor + count - len(taken)]
            taken.extend(part)
            self.cursor += len(part)
        return taken

    def state_dict(self) -> dict[str, int]:
        """What :meth:`load_state_dict` needs to continue here."""
        return {"epoch": self.epoch, "cursor": self.cursor, "seed": self.seed, "num_examples": self.num_examples}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continues where `state` was taken.

        Raises:
            ConfigError: another data set size, or a state that no sampler can be in.
        """
        missing = {"epoch", "cursor", "seed", "num_examples"} - set(state)
        if missing:
            raise ConfigError(f"PromptSampler state lacks {sorted(missing)}; expected what state_dict() returned")
        if state["num_examples"] != self.num_examples:
            raise ConfigError(
                f"PromptSampler state is of {state['num_examples']} examples, the data set has {self.num_examples}; "
                "resume with the data the run was started with"
            )
        if state["epoch"] < 0 or state["seed"] < 0 or not 0 <= state["cursor"] <= self.num_examples:
            raise ConfigError(f"PromptSampler state {dict(state)} is out of range; expected what state_dict() returned")
        self.epoch, self.cursor, self.seed = state["epoch"], state["cursor"], state["seed"]
        self._order = self._shuffled(self.epoch)
