"""A byte-level tokenizer: one token per UTF-8 byte, token id = byte value, plus bos, eos and pad.

It needs no training and no download, so the quickstart and the tests can make a complete model directory by themselves, and
every text is in its vocabulary. Texts longer than a few hundred characters want a real tokenizer.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_pr2.rl.encoding import check_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS_TOKEN, EOS_TOKEN, PAD_TOKEN = "<|bos|>", "<|eos|>", "<|pad|>"
NUM_BYTES = 256
BOS_ID, EOS_ID, PAD_ID = 256, 257, 258
VOCAB_SIZE = 259


def prompt_bytes(prompt: str) -> tuple[int, ...]:
    """What the byte tokenizer makes of a prompt, without Transformers.

    Raises:
        DataError: an empty text; the first token of a response would be a response to nothing.
    """
    ids = tuple(prompt.encode())
    check_length(ids, prompt, "the prompt")
    return ids


def _byte_symbols() -> list[str]:
    """Symbol of every byte, by byte value, in the alphabet of the `tokenizers` ByteLevel pre-tokenizer.

    The alphabet shows printable Latin-1 bytes as themselves and the other 68, in ascending order, as the characters from U+0100
    on, so that no symbol is a space or a control character.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(NUM_BYTES) if byte not in printable]
    shifted = {byte: chr(0x100 + rank) for rank, byte in enumerate(hidden)}
    return [shifted.get(byte, chr(byte)) for byte in range(NUM_BYTES)]


def byte_tokenizer(model_max_length: int = 4096) -> PreTrainedTokenizerFast:
    """The tokenizer, ready for `save_pretrained`; `AutoTokenizer.from_pretrained` reads it back.

    Nothing is added to a text (neither bos nor eos), and a text that spells out a special token is encoded as its bytes, so
    `decode(encode(text)) == text` for every text. Bytes that are not valid UTF-8 decode to U+FFFD.

    Args:
        model_max_length: tokens; Transformers warns about longer texts.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
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
    directory = Path(path)
    byte_tokenizer(model_max_length).save_pretrained(str(directory))
    return directory
