"""A tiny Qwen3-MoE policy: a complete Hugging Face model directory that any engine loads, made in a second without a download.

Same architecture as Qwen3-30B-A3B (grouped-query attention with q/k norms, softmax router, normalised top-k, no dense layer),
in fp32, with the byte-level tokenizer of tokenizer.py.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_pr2.errors import ConfigError
from megatron_pr2.rl.tokenizer import BOS_ID, EOS_ID, PAD_ID, VOCAB_SIZE, save_byte_tokenizer

if TYPE_CHECKING:
    from transformers import Qwen3MoeForCausalLM


@dataclass(frozen=True)
class TinyModelConfig:
    """Sizes of the tiny model, by Transformers' names; the defaults are the quickstart's.

    Attributes:
        vocab_size: 259 tokens padded up so that tensor parallelism can split them.
        init_std: standard deviation of the other initial weights, about half of 1/sqrt(hidden_size).
        router_std: standard deviation of the initial router weights. Router inputs have unit mean square, so this times
            sqrt(hidden_size) is the spread of the initial router logits.
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
            raise ConfigError(f"vocab_size={self.vocab_size}: expected at least {VOCAB_SIZE}, the byte-level tokenizer's tokens")
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ConfigError(f"num_experts_per_tok={self.num_experts_per_tok}: expected 1..num_experts={self.num_experts}")
        if self.num_attention_heads % self.num_key_value_heads:
            heads = f"num_attention_heads={self.num_attention_heads}"
            raise ConfigError(f"{heads} is not a multiple of num_key_value_heads={self.num_key_value_heads}")


def build_tiny_model(config: TinyModelConfig, seed: int) -> Qwen3MoeForCausalLM:
    """An untrained model in fp32 on the CPU; `seed` decides every weight, and the global random state is left as it was."""
    import torch
    from transformers import GenerationConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

    special = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
    sizes = {name: size for name, size in asdict(config).items() if name not in ("init_std", "router_std")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                **sizes,
                **special,
                # No layer is dense, yet engines and bridges read the field.
                intermediate_size=config.moe_intermediate_size * config.num_experts_per_tok,
                norm_topk_prob=True,
                decoder_sparse_step=1,
                mlp_only_layers=[],
                # RL must not pull the router towards uniform load.
                router_aux_loss_coef=0.0,
                output_router_logits=False,
                initializer_range=config.init_std,
                tie_word_embeddings=False,
                attention_bias=False,
                use_sliding_window=False,
                architectures=["Qwen3MoeForCausalLM"],
                dtype=torch.float32,
            )
        )
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.gate.weight.normal_(0.0, config.router_std)
    # From the whole distribution, which is what importance ratios are computed against.
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **special)
    return model


def save_tiny_model(model: Qwen3MoeForCausalLM, path: str | Path) -> Path:
    """Writes config, generation config, safetensors and tokenizer into directory `path`, which is created if needed."""
    from transformers.utils import logging as hf_logging

    showed = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()  # the file has half a megabyte
    try:
        model.save_pretrained(str(path))
    finally:
        if showed:
            hf_logging.enable_progress_bar()
    return save_byte_tokenizer(path, model.config.max_position_embeddings)


def make_tiny_checkpoint(path: str | Path, config: TinyModelConfig | None = None, seed: int = 0) -> Path:
    """An untrained tiny model as a Hugging Face directory; `from_pretrained`, mbridge and SGLang read it."""
    return save_tiny_model(build_tiny_model(config or TinyModelConfig(), seed), path)
