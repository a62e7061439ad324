"""A byte-level tokenizer: one token per UTF-8 byte, token id = byte value, plus bos, eos and pad.

It needs no training and no download, so the quickstart and the tests can make a complete model directory by themselves, and
every text is in its vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_pr2.rl.data import check_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS_TOKEN, EOS_TOKEN, PAD_TOKEN = "<|bos|>", "<|eos|>", "<|pad|>"
NUM_BYTES = 256
BOS_ID, EOS_ID, PAD_ID = 256, 257, 258
VOCAB_SIZE = 259


def prompt_bytes(prompt: str) -> tuple[int, ...]:
    """What the byte tokenizer makes of a prompt, without Transformers.

    Raises:
        DataError: an empty text.
    """
    ids = tuple(prompt.encode())
    check_length(ids, prompt, "the prompt")
    return ids


def byte_tokenizer(model_max_length: int = 4096) -> PreTrainedTokenizerFast:
    """The tokenizer, ready for `save_pretrained`; `AutoTokenizer.from_pretrained` reads it back.

    Nothing is added to a text (neither bos nor eos), and a text that spells out a special token is encoded as its bytes, so
    `decode(encode(text)) == text` for every text. Bytes that are not valid UTF-8 decode to U+FFFD.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # ByteLevel writes a byte as the character of that number where it is printable, else as the next one from U+0100 on.
    symbols = set(pre_tokenizers.ByteLevel.alphabet())
    others = iter(sorted(symbol for symbol in symbols if ord(symbol) >= NUM_BYTES))
    vocab = {chr(byte) if chr(byte) in symbols else next(others): byte for byte in range(NUM_BYTES)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([BOS_TOKEN, EOS_TOKEN, PAD_TOKEN])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def save_byte_tokenizer(path: str | Path, model_max_length: int = 4096) -> Path:
    """Writes the tokenizer's files into directory `path`, which is created if needed."""
    byte_tokenizer(model_max_length).save_pretrained(str(path))
    return Path(path)
