"""The tiny model directory: complete, in the names that engines read, decided by the seed."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from megatron_pr2.errors import ConfigError
from megatron_pr2.rl.tiny import TinyModelConfig, build_tiny_model, make_tiny_checkpoint
from megatron_pr2.rl.tokenizer import EOS_ID, PAD_ID, VOCAB_SIZE

SMALL = TinyModelConfig(
    hidden_size=32, num_hidden_layers=2, head_dim=8, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny", SMALL, seed=3)


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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vocab_size": 258}, "at least 259"),
        ({"num_experts_per_tok": 17}, "1..num_experts"),
        ({"num_key_value_heads": 3}, "not a multiple"),
    ],
)
def test_sizes_that_contradict_are_refused(change, words):
    with pytest.raises(ConfigError, match=words):
        TinyModelConfig(**change)
