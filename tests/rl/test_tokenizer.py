"""The byte-level tokenizer: every text round-trips, also through AutoTokenizer."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megatron_pr2.rl.tokenizer import BOS_ID, EOS_ID, PAD_ID, VOCAB_SIZE, byte_tokenizer, save_byte_tokenizer


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory):
    return AutoTokenizer.from_pretrained(save_byte_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_ids_are_bytes_and_specials_follow(reloaded):
    assert len(reloaded) == VOCAB_SIZE
    assert (reloaded.bos_token_id, reloaded.eos_token_id, reloaded.pad_token_id) == (BOS_ID, EOS_ID, PAD_ID)
    assert reloaded("8+7=").input_ids == list(b"8+7=")


@pytest.mark.parametrize(
    "text", ["", " 8 + 7 ", "\x00\t\r\n\n", "é 漢字 🙂 \u2028 \u00a0", "<|eos|> and <|pad|>", "a , b . c", "\ufeffx"]
)
def test_texts_round_trip_as_bytes(reloaded, text):
    for tokenizer in (byte_tokenizer(), reloaded):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == list(text.encode())
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert tokenizer.encode(text) == ids  # nothing is added


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_round_trips(text):
    tokenizer = _TOKENIZER
    ids = tokenizer.encode(text)
    assert ids == list(text.encode())
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


_TOKENIZER = byte_tokenizer()


def test_decoding_drops_specials_and_marks_broken_utf8(reloaded):
    assert reloaded.decode([*b"42", EOS_ID, PAD_ID, PAD_ID], skip_special_tokens=True) == "42"
    assert reloaded.decode([0x41, 0xC3, 0x42], skip_special_tokens=True) == "A\ufffdB"


def test_a_padded_batch_keeps_what_was_said(reloaded):
    batch = reloaded(["1+2=", "10+20+30="], padding=True, padding_side="left")
    assert batch.input_ids[0][:5] == [PAD_ID] * 5
    assert reloaded.batch_decode(batch.input_ids, skip_special_tokens=True) == ["1+2=", "10+20+30="]
