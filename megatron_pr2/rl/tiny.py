"""A tiny Qwen3-MoE policy: a complete Hugging Face model directory that any engine loads, made in a second without a download.

Same architecture as Qwen3-30B-A3B (grouped-query attention with q/k norms, softmax router, normalised top-k, no dense layer),
in fp32, with the byte-level tokenizer of tokenizer.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_pr2.errors import ConfigError
from megatron_pr2.rl.tokenizer import BOS_ID, EOS_ID, PAD_ID, VOCAB_SIZE, save_byte_tokenizer

if TYPE_CHECKING:
    from transformers import GenerationConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM


@dataclass(frozen=True)
class TinyModelConfig:
    """Sizes of the tiny model; the defaults are the quickstart's.

    Attributes:
        vocab_size: rows of the embedding, 259 tokens padded up so that tensor parallelism can split them.
        init_std: standard deviation of the other initial weights, about half of 1/sqrt(hidden_size).
        router_std: standard deviation of the initial router weights. Router inputs have unit mean square, so this times
            sqrt(hidden_size) is the spread of the initial router logits.
        max_position_embeddings: longest prompt + response.
    """

    hidden_size: int = 64
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 16
    num_experts: int = 16
    num_experts_per_tok: int = 4
    moe_intermediate_size: int = 32
    vocab_size: int = 264
    max_position_embeddings: int = 512
    init_std: float = 0.06
    router_std: float = 0.1

    def __post_init__(self) -> None:
        if self.vocab_size < VOCAB_SIZE:
            raise ConfigError(
                f"vocab_size={self.vocab_size}: expected at least {VOCAB_SIZE}, the byte-level tokenizer's tokens"
            )
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ConfigError(
                f"num_experts_per_tok={self.num_experts_per_tok}: expected 1..num_experts={self.num_experts}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )


def qwen3_moe_config(config: TinyModelConfig) -> Qwen3MoeConfig:
    """The Transformers config. Its load-balancing coefficient is 0: RL must not pull the router towards uniform load."""
    import torch
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        # No layer is dense, yet engines and bridges read the field.
        intermediate_size=config.moe_intermediate_size * config.num_experts_per_tok,
        moe_intermediate_size=config.moe_intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        num_experts=config.num_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        router_aux_loss_coef=0.0,
        output_router_logits=False,
        max_position_embeddings=config.max_position_embeddings,
        initializer_range=config.init_std,
        tie_word_embeddings=False,
        attention_bias=False,
        use_sliding_window=False,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        architectures=["Qwen3MoeForCausalLM"],
        dtype=torch.float32,
    )


def generation_config() -> GenerationConfig:
    """Plain sampling at temperature 1 from the whole distribution, which is what importance ratios are computed against."""
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )


def build_tiny_model(config: TinyModelConfig, seed: int) -> Qwen3MoeForCausalLM:
    """A freshly initialised model in fp32 on the CPU; the global random state is left as it was.

    Args:
        config: sizes.
        seed: decides every weight.
    """
    import torch
    from transformers import Qwen3MoeForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3MoeForCausalLM(qwen3_moe_config(config))
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.gate.weight.normal_(0.0, config.router_std)
    model.generation_config = generation_config()
    return model


def save_tiny_model(model: Qwen3MoeForCausalLM, path: str | Path) -> Path:
    """Writes config, generation config, safetensors and tokenizer into directory `path`, which is created if needed."""
    from transformers.utils import logging as hf_logging

    directory = Path(path)
    showed = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()  # a bar for half a megabyte is noise
    try:
        model.save_pretrained(str(directory))
    finally:
        if showed:
            hf_logging.enable_progress_bar()
    save_byte_tokenizer(directory, model.config.max_position_embeddings)
    return directory


def make_tiny_checkpoint(path: str | Path, config: TinyModelConfig | None = None, seed: int = 0) -> Path:
    """An untrained tiny model as a Hugging Face directory; `from_pretrained`, mbridge and SGLang read it.

    Args:
        path: directory, created if needed.
        config: sizes, or None for the quickstart's.
        seed: decides every weight.

    Returns:
        `path`.
    """
    return save_tiny_model(build_tiny_model(config or TinyModelConfig(), seed), path)
