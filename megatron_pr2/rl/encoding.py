"""Text to token ids where nothing may be lost: an encoding without tokens is refused, and the text is named."""

from __future__ import annotations

from typing import Any

from megatron_pr2.errors import DataError


def encode(tokenizer: Any, text: str, what: str, *, at_least: int = 1) -> tuple[int, ...]:
    """The token ids of a text, without special tokens.

    Args:
        tokenizer: Transformers'.
        what: what is encoded, for the message: "train.jsonl:3: the prompt".
        at_least: tokens that are needed.

    Raises:
        DataError: fewer tokens. Transformers makes an empty tokenizer of a directory without tokenizer files, and some tokenizers
            drop characters that they do not know.
    """
    ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    check_length(ids, text, what, at_least)
    return ids


def check_length(ids: tuple[int, ...] | list[int], text: str, what: str, at_least: int = 1) -> None:
    """Refuses an encoding that is too short; as for :func:`encode`."""
    if len(ids) < at_least:
        shown = text if len(text) <= 60 else f"{text[:60]}..."
        raise DataError(
            f"{what} {shown!r} is {len(ids)} tokens of the model's tokenizer; expected {at_least} or more. Look whether the "
            "tokenizer's files in model.path are complete and belong to the model, and whether it knows these characters"
        )
