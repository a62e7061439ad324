"""Tiny Hugging Face checkpoints of the families that the bridge is tested with, in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SIZES: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
MOE = {"num_experts_per_tok": 4, "moe_intermediate_size": 32}


def tiny_config(family: str, **changes: Any) -> Any:
    """A config of ``family`` (a model_type) with 4 layers and, if it has experts, 16 of them."""
    import transformers

    gqa = {"num_key_value_heads": 2}
    if family == "qwen3_moe":
        sizes = SIZES | MOE | gqa | {"num_experts": 16, "head_dim": 16, "norm_topk_prob": True}
        return transformers.Qwen3MoeConfig(**(sizes | changes))
    if family == "qwen2_moe":
        sizes = SIZES | MOE | gqa | {"num_experts": 16, "shared_expert_intermediate_size": 48}
        return transformers.Qwen2MoeConfig(**(sizes | changes))
    if family == "mixtral":
        sizes = SIZES | gqa | {"num_local_experts": 8, "num_experts_per_tok": 2}
        return transformers.MixtralConfig(**(sizes | changes))
    if family == "deepseek_v3":
        latent = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12}
        groups = {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "n_shared_experts": 1}
        sizes = SIZES | MOE | latent | groups | {"num_key_value_heads": 4, "num_nextn_predict_layers": 0}
        return transformers.DeepseekV3Config(**(sizes | changes))
    if family == "glm4_moe":
        shared = {"n_routed_experts": 16, "n_shared_experts": 2, "routed_scaling_factor": 1.5, "first_k_dense_replace": 1}
        sizes = SIZES | MOE | gqa | shared | {"head_dim": 16, "use_qk_norm": True, "num_nextn_predict_layers": 0}
        return transformers.Glm4MoeConfig(**(sizes | changes))
    if family == "olmoe":
        sizes = SIZES | gqa | {"num_experts": 16, "num_experts_per_tok": 4, "intermediate_size": 32}
        return transformers.OlmoeConfig(**(sizes | changes))
    if family == "gpt_oss":
        sizes = SIZES | gqa | {"num_local_experts": 16, "num_experts_per_tok": 4, "intermediate_size": 32, "head_dim": 16}
        yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128, "truncate": False}
        return transformers.GptOssConfig(**(sizes | {"sliding_window": 6, "rope_parameters": yarn} | changes))
    if family == "qwen3":
        return transformers.Qwen3Config(**(SIZES | gqa | {"head_dim": 16} | changes))
    raise ValueError(family)


def make_checkpoint(path: Path, config: Any, seed: int = 0) -> Path:
    """Random weights, spread widely enough that a wrong mapping, mask or routing changes the logits by much."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.08)
                elif "norm" in name:
                    parameter.uniform_(0.5, 1.5)
                else:
                    parameter.normal_(0.0, 0.1)
            for name, buffer in model.named_buffers():
                if "e_score_correction_bias" in name:
                    buffer.uniform_(-0.2, 0.2)
        model.save_pretrained(path)
    return path


def reference_logits(path: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Transformers' logits [B, S, V] in fp32 for a batch [B, S] of equally long sequences."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(tokens, use_cache=False).logits
