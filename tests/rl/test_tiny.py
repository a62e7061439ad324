"""The tiny model directory: complete, in the names that engines read, decided by the seed; its tokenizer round-trips every text."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as hf_logging

from megatron_pr2.rl.tiny import (
    EOS_ID,
    PAD_ID,
    SPECIAL_IDS,
    VOCAB_SIZE,
    TinyModelConfig,
    build_tiny_model,
    byte_tokenizer,
    make_tiny_checkpoint,
)

SMALL = TinyModelConfig(
    hidden_size=32, num_hidden_layers=2, head_dim=8, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny", SMALL, seed=3)


@pytest.mark.parametrize("shown", [True, False])
def test_progress_bars_are_afterwards_as_they_were(shown, tmp_path):
    before = hf_logging.is_progress_bar_enabled()
    switch = {True: hf_logging.enable_progress_bar, False: hf_logging.disable_progress_bar}
    try:
        switch[shown]()
        make_tiny_checkpoint(tmp_path / "tiny", SMALL, seed=3)
        assert hf_logging.is_progress_bar_enabled() == shown
    finally:
        switch[before]()


def test_the_directory_holds_one_tensor_per_expert_in_fp32(directory):
    with safe_open(directory / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    prefix = "model.layers.1.mlp"
    assert tensors[f"{prefix}.gate.weight"].shape == (8, 32)
    for name, shape in {"gate_proj": (16, 32), "up_proj": (16, 32), "down_proj": (32, 16)}.items():
        experts = [tensors[f"{prefix}.experts.{e}.{name}.weight"] for e in range(8)]
        assert {tuple(t.shape) for t in experts} == {shape}
    assert tensors["model.embed_tokens.weight"].shape == tensors["lm_head.weight"].shape == (264, 32)


def test_config_tokenizer_and_generation_config_agree(directory):
    config = AutoConfig.from_pretrained(directory)
    assert config.architectures == ["Qwen3MoeForCausalLM"]
    assert json.loads((directory / "config.json").read_text())["dtype"] == "float32"
    assert config.router_aux_loss_coef == 0.0
    assert not config.output_router_logits
    assert config.norm_topk_prob
    assert (config.num_experts, config.num_experts_per_tok) == (8, 2)
    generation = GenerationConfig.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert config.eos_token_id == generation.eos_token_id == tokenizer.eos_token_id == EOS_ID
    assert config.pad_token_id == generation.pad_token_id == tokenizer.pad_token_id == PAD_ID
    assert generation.do_sample
    assert (generation.temperature, generation.top_k, generation.top_p) == (1.0, 0, 1.0)
    assert config.vocab_size % 8 == 0
    assert config.vocab_size >= len(tokenizer) == VOCAB_SIZE


def test_the_loaded_model_computes_what_the_built_one_does(directory):
    built, loaded = build_tiny_model(SMALL, 3).eval(), AutoModelForCausalLM.from_pretrained(directory).eval()
    ids = torch.tensor([list(b"8+7+5=")])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, built(ids).logits, rtol=0, atol=0)


def test_the_seed_decides_and_the_global_generator_does_not_move():
    state = torch.random.get_rng_state()
    first, again, other = (build_tiny_model(SMALL, seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    gate = "model.layers.0.mlp.gate.weight"
    assert not torch.equal(first[gate], other[gate])
    assert 0.08 < first[gate].std() < 0.12  # router_std, not init_std


# ---- the tokenizer ---------------------------------------------------------------------------------------------------

_TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def tokenizer(directory):
    return AutoTokenizer.from_pretrained(directory)


def test_ids_are_bytes_and_specials_follow(tokenizer):
    assert len(tokenizer) == VOCAB_SIZE
    assert {name: getattr(tokenizer, name) for name in SPECIAL_IDS} == SPECIAL_IDS
    assert tokenizer("8+7=").input_ids == list(b"8+7=")


@pytest.mark.parametrize(
    "text", ["", " 8 + 7 ", "\x00\t\r\n\n", "é 漢字 🙂 \u2028 \u00a0", "<|eos|> and <|pad|>", "a , b . c", "\ufeffx"]
)
def test_texts_round_trip_as_bytes(tokenizer, text):
    for each in (_TOKENIZER, tokenizer):
        ids = each.encode(text, add_special_tokens=False)
        assert ids == list(text.encode())
        assert each.decode(ids) == text
        assert each.decode(ids, skip_special_tokens=True) == text
        assert each.encode(text) == ids  # nothing is added


@settings(max_examples=200)
@given(st.text())
def test_any_text_round_trips(text):
    ids = _TOKENIZER.encode(text)
    assert ids == list(text.encode())
    assert _TOKENIZER.decode(ids, skip_special_tokens=True) == text


def test_decoding_drops_specials_and_marks_broken_utf8(tokenizer):
    assert tokenizer.decode([*b"42", EOS_ID, PAD_ID, PAD_ID], skip_special_tokens=True) == "42"
    assert tokenizer.decode([0x41, 0xC3, 0x42], skip_special_tokens=True) == "A\ufffdB"


def test_a_padded_batch_keeps_what_was_said(tokenizer):
    batch = tokenizer(["1+2=", "10+20+30="], padding=True, padding_side="left")
    assert batch.input_ids[0][:5] == [PAD_ID] * 5
    assert tokenizer.batch_decode(batch.input_ids, skip_special_tokens=True) == ["1+2=", "10+20+30="]
