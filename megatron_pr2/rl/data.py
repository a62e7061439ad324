"""Prompts with verifiable answers: loading from JSONL, and encoding.

Two kinds of line are understood, and may be mixed:
    {"prompt": "8+7-5=", "answer": "10"}                    this project's own; answer may be a number
    {"question": "...", "answer": "... #### 18"}            GSM8K; the gold number follows the last `####`
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_pr2.errors import DataError

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


def _example(row: object, where: str) -> Example:
    """One decoded JSON line, of `where` = "file:line"."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: a JSON {type(row).__name__}; expected an object with `prompt` and `answer`")
    prompt_key = "prompt" if "prompt" in row else "question"
    if missing := [key for key in (prompt_key, "answer") if key not in row]:
        raise DataError(
            f"{where}: no field {missing[0] if prompt_key in row else 'prompt'!r} (found {sorted(row)}); "
            "expected `prompt` and `answer`, or GSM8K's `question` and `answer`"
        )
    prompt, answer = row[prompt_key], row["answer"]
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    for key, value in ((prompt_key, prompt), ("answer", answer)):
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{where}: field {key!r} is {value!r}; expected a non-empty text")
    *_, gold = answer.rsplit(GSM8K_MARK, 1)
    if prompt_key == "question" and GSM8K_MARK not in answer:
        raise DataError(f"{where}: a GSM8K answer without {GSM8K_MARK!r}; expected the gold number behind it")
    if not gold.strip():
        raise DataError(f"{where}: nothing behind {GSM8K_MARK!r} in `answer`; expected the gold number there")
    return Example(prompt, gold.strip(), where)


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
        examples.append(_example(row, where))
    if not examples:
        raise DataError(f"{path}: no examples; expected at least one line with `prompt` and `answer`")
    return examples


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
