"""Prompts with verifiable answers: loading from JSONL, a deterministic, resumable sampler, and encoding.

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
    """One decoded JSON line, of `where` = "file:line", as an example.

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

    A batch may reach across the end of an epoch. A run resumes with exactly the prompts that it would have seen.
    """

    def __init__(self, num_examples: int, seed: int) -> None:
        if num_examples < 1 or seed < 0:
            raise ConfigError(f"PromptSampler: num_examples={num_examples}, seed={seed}; expected >= 1 and >= 0")
        self.num_examples, self.seed = num_examples, seed
        self._start_at(0, 0)

    def _start_at(self, epoch: int, cursor: int) -> None:
        self.epoch, self.cursor = epoch, cursor
        self._order = np.random.default_rng([self.seed, epoch]).permutation(self.num_examples).tolist()

    def take(self, count: int) -> list[int]:
        """The next `count` indices into the data set."""
        if count < 1:
            raise ConfigError(f"PromptSampler.take({count}): expected at least 1")
        taken: list[int] = []
        for _ in range(count):
            if self.cursor == self.num_examples:
                self._start_at(self.epoch + 1, 0)
            taken.append(self._order[self.cursor])
            self.cursor += 1
        return taken

    def state_dict(self) -> dict[str, int]:
        """What :meth:`load_state_dict` needs to continue here."""
        return {"epoch": self.epoch, "cursor": self.cursor, "seed": self.seed, "num_examples": self.num_examples}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continues where `state` was taken.

        Raises:
            ConfigError: another data set size, or a state that no sampler can be in.
        """
        if missing := set(self.state_dict()) - set(state):
            raise ConfigError(f"PromptSampler state lacks {sorted(missing)}; expected what state_dict() returned")
        if state["num_examples"] != self.num_examples:
            raise ConfigError(
                f"PromptSampler state is of {state['num_examples']} examples, the data set has {self.num_examples}; "
                "resume with the data the run was started with"
            )
        if state["epoch"] < 0 or state["seed"] < 0 or not 0 <= state["cursor"] <= self.num_examples:
            raise ConfigError(f"PromptSampler state {dict(state)} is out of range; expected what state_dict() returned")
        self.seed = state["seed"]
        self._start_at(state["epoch"], state["cursor"])


def encode(tokenizer: Any, text: str, what: str, *, at_least: int = 1) -> tuple[int, ...]:
    """The token ids of a text, without special tokens.

    Args:
        tokenizer: Transformers'.
        what: what is encoded, for the message: "train.jsonl:3: the prompt".

    Raises:
        DataError: fewer than `at_least` tokens. Transformers makes an empty tokenizer of a directory without tokenizer files, and
            some tokenizers drop characters that they do not know.
    """
    ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    check_length(ids, text, what, at_least)
    return ids


def check_length(ids: Sequence[int], text: str, what: str, at_least: int = 1) -> None:
    """Refuses an encoding that is too short; as for :func:`encode`."""
    if len(ids) < at_least:
        shown = text if len(text) <= 60 else f"{text[:60]}..."
        raise DataError(
            f"{what} {shown!r} is {len(ids)} tokens of the model's tokenizer; expected {at_least} or more. Look whether the "
            "tokenizer's files in model.path are complete and belong to the model, and whether it knows these characters"
        )
