"""A tiny Qwen3-MoE policy: a complete Hugging Face model directory that any engine loads, made in a second without a download.

Same architecture as Qwen3-30B-A3B (grouped-query attention with q/k norms, softmax router, normalised top-k, no dense layer), in
fp32, with a byte-level tokenizer: one token per UTF-8 byte, token id = byte value, plus bos, eos and pad.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_pr2.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3MoeForCausalLM

NUM_BYTES = 256
SPECIAL_IDS = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
EOS_ID, PAD_ID, VOCAB_SIZE = 257, 258, 259


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

    @classmethod
    def of(cls, sizes: Mapping[str, Any]) -> TinyModelConfig:
        """The default sizes but for those given, as `model.sizes` gives them.

        Raises:
            ConfigError: there is no such size, or no model can be built with it.
        """
        defaults = {field.name: field.default for field in fields(cls)}
        for name, size in sizes.items():
            if name not in defaults:
                raise ConfigError(f"model.sizes.{name}: not a size of the tiny model; expected some of {', '.join(defaults)}")
            whole = isinstance(defaults[name], int)
            if isinstance(size, bool) or not isinstance(size, int if whole else int | float) or not 0 < size < math.inf:
                raise ConfigError(f"model.sizes.{name}={size!r}: expected {'an integer' if whole else 'a number'} above 0")
        model = cls(**sizes)
        for name, fine, expected in (
            ("num_experts_per_tok", model.num_experts_per_tok <= model.num_experts, f"at most num_experts={model.num_experts}"),
            (
                "num_attention_heads",
                model.num_attention_heads % model.num_key_value_heads == 0,
                f"a multiple of num_key_value_heads={model.num_key_value_heads}",
            ),
            ("head_dim", model.head_dim % 2 == 0, "an even number"),
            ("vocab_size", model.vocab_size >= VOCAB_SIZE, f"at least {VOCAB_SIZE}, the tokens of the tokenizer"),
        ):
            if not fine:
                raise ConfigError(f"model.sizes: {name}={getattr(model, name)}; expected {expected}")
        return model

    @property
    def name(self) -> str:
        """What differs from the default sizes, as a part of a file's name; empty for none."""
        default = TinyModelConfig()
        sizes = {field.name: getattr(self, field.name) for field in fields(self)}
        return "_".join(f"{name}_{size}" for name, size in sizes.items() if size != getattr(default, name))


def build_tiny_model(config: TinyModelConfig, seed: int) -> Qwen3MoeForCausalLM:
    """An untrained model in fp32 on the CPU; `seed` decides every weight, and the global random state is left as it was."""
    import torch
    from transformers import GenerationConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {name: size for name, size in asdict(config).items() if name not in ("init_std", "router_std")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                **sizes,
                **SPECIAL_IDS,
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
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **SPECIAL_IDS)
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
    special = {name.removesuffix("_id"): f"<|{name[:3]}|>" for name in SPECIAL_IDS}
    backend.add_special_tokens(list(special.values()))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **special,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def save_byte_tokenizer(path: str | Path, model_max_length: int = 4096) -> Path:
    """Writes the tokenizer's files into directory `path`, which is created if needed."""
    byte_tokenizer(model_max_length).save_pretrained(str(path))
    return Path(path)
