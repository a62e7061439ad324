"""TransformerConfig fields of each model family, from its Hugging Face config, where mbridge 0.15.1 leaves them out or is wrong.

What Megatron-Core cannot compute as Transformers does is refused here, by name: it would run, and be another model.
"""

from __future__ import annotations

import copy
from typing import Any

from megatron_pr2.errors import ConfigError
from megatron_pr2.hf.shape import ModelShape

# Families whose router takes a softmax over all experts and may leave the weights of the selected ones as they are.
_SOFTMAX = ("qwen2_moe", "qwen3_moe", "olmoe")
# Families whose router takes a sigmoid, selects with a bias and scales the weights.
_SIGMOID = ("deepseek_v3", "glm4_moe")


def bridge_config(source: Any) -> Any:
    """A copy of a Transformers config with the attributes that mbridge reads and Transformers 5 no longer has.

    Raises:
        ConfigError: a setting that the bridge would silently ignore.
    """
    family = source.model_type
    config = copy.deepcopy(source)
    rope = dict(getattr(source, "rope_parameters", None) or {})
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in rope:
            setattr(config, name, rope[name])
    kind = rope.get("rope_type", "default")
    if kind != "default" and not (kind == "yarn" and family in ("deepseek_v3", "gpt_oss")):
        raise ConfigError(f"rope_type={kind!r} of model_type={family!r}: the scaling would be ignored; expected 'default'")
    if getattr(config, "head_dim", None) is None and getattr(config, "kv_lora_rank", None) is None:
        config.head_dim = config.hidden_size // config.num_attention_heads
    if (activation := getattr(config, "hidden_act", "silu")) not in ("silu", "swish"):
        raise ConfigError(f"hidden_act={activation!r} of model_type={family!r}: mbridge would build the model with 'silu'")
    if getattr(source, "quantization_config", None):
        raise ConfigError(
            f"quantization_config of model_type={family!r}: quantized weights are not read; expected a checkpoint in bf16, fp16 or "
            "fp32 (load it dequantized in Transformers and save it)"
        )
    return config


def config_overrides(config: Any, shape: ModelShape | None) -> dict[str, Any]:
    """TransformerConfig fields that follow from the Hugging Face config and that mbridge leaves out or gets wrong.

    Args:
        config: of :func:`bridge_config`.
        shape: None for dense models.

    Raises:
        ConfigError: a router, or a detail of attention, that Megatron-Core does not have.
    """
    overrides = _window_overrides(config)
    if shape is None:
        return overrides
    if len(shape.moe_layers) < shape.num_hidden_layers:
        # Only where layers differ: Megatron saves a model with a list layer by layer, one without as stacked layers.
        overrides["moe_layer_freq"] = [int(index in shape.moe_layers) for index in range(shape.num_hidden_layers)]
    overrides["moe_router_load_balancing_type"] = "none"
    overrides |= _router_overrides(config)
    if config.model_type in ("qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe"):
        overrides["add_qkv_bias"] = getattr(config, "qkv_bias", getattr(config, "attention_bias", False))
    if config.model_type == "qwen2_moe":
        overrides["moe_shared_expert_gate"] = True
    elif config.model_type == "glm4_moe":
        shared = config.moe_intermediate_size * config.n_shared_experts
        overrides["moe_shared_expert_intermediate_size"] = shared or None
    elif config.model_type == "deepseek_v3":
        overrides |= _deepseek_overrides(config)
    elif config.model_type == "gpt_oss":
        _check_gpt_oss(config)
    return overrides


def _router_overrides(config: Any) -> dict[str, Any]:
    """How the router of the family selects and weighs experts."""
    family, topk = config.model_type, config.num_experts_per_tok
    # Mixtral has no such setting: it normalizes.
    normalized = getattr(config, "norm_topk_prob", True)
    if normalized and topk == 1 and family in (*_SOFTMAX, *_SIGMOID, "mixtral", "gpt_oss"):
        raise ConfigError(
            f"num_experts_per_tok=1 with normalized weights (model_type={family!r}): each weight is 1 whatever the router says; "
            "Megatron-Core has no such router"
        )
    if family in _SOFTMAX:
        # A softmax over the selected experts only is what normalizing the selected probabilities gives.
        return {"moe_router_pre_softmax": not normalized}
    if family == "mixtral":
        return {"moe_router_pre_softmax": False}
    if family in _SIGMOID:
        return _sigmoid_overrides(config, normalized)
    return {}


def _sigmoid_overrides(config: Any, normalized: bool) -> dict[str, Any]:
    if not normalized:
        raise ConfigError(
            f"norm_topk_prob=False of model_type={config.model_type!r}: Megatron-Core always divides sigmoid weights by their sum"
        )
    # The selection bias balances load in pretraining; reinforcement learning keeps it, as it does without a balancing loss.
    overrides: dict[str, Any] = {"moe_router_bias_update_rate": 0.0}
    groups, chosen = config.n_group or 1, config.topk_group
    if groups == 1:
        return overrides
    if config.num_experts_per_tok // chosen != 2:
        raise ConfigError(
            f"num_experts_per_tok={config.num_experts_per_tok}, topk_group={chosen}: the model ranks groups of experts by their "
            f"two best, Megatron-Core by their {config.num_experts_per_tok // chosen} best (num_experts_per_tok // topk_group)"
        )
    return {**overrides, "moe_router_num_groups": groups, "moe_router_group_topk": chosen}


def _deepseek_overrides(config: Any) -> dict[str, Any]:
    if not getattr(config, "rope_interleave", True):
        raise ConfigError("rope_interleave=False of model_type='deepseek_v3': Megatron-Core's latent attention interleaves always")
    rope = dict(getattr(config, "rope_parameters", None) or {})
    overrides: dict[str, Any] = {
        # The multi-token prediction head takes no part in reinforcement learning.
        "mtp_num_layers": None,
        "rope_type": "yarn" if rope.get("rope_type") == "yarn" else "rope",
    }
    if rope.get("rope_type") == "yarn":
        overrides["rotary_scaling_factor"] = rope["factor"]
        for name in ("mscale", "mscale_all_dim", "beta_fast", "beta_slow", "original_max_position_embeddings"):
            if rope.get(name) is not None:
                overrides[name] = rope[name]
    return overrides


def _check_gpt_oss(config: Any) -> None:
    """The bridge builds what every published checkpoint has."""
    rope = config.rope_parameters
    expected = {"attention_bias": True, "swiglu_alpha": 1.702}
    for name, value in expected.items():
        if (given := getattr(config, name, value)) != value:
            raise ConfigError(f"{name}={given!r} of model_type='gpt_oss': Megatron-Core has {value!r} only")
    if rope.get("attention_factor") is not None:
        raise ConfigError(
            f"attention_factor={rope['attention_factor']!r} of model_type='gpt_oss': Megatron-Core takes it from YaRN's factor"
        )


def _window_overrides(config: Any) -> dict[str, Any]:
    """Sliding-window attention: Megatron-Core's window counts the keys before the query, Transformers' the query as well."""
    window = getattr(config, "sliding_window", None)
    layers = config.num_hidden_layers
    types = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * layers
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    sliding = [int(kind == "sliding_attention") for kind in types]
    if unknown := sorted(set(types) - {"sliding_attention", "full_attention"}):
        raise ConfigError(
            f"layer_types {unknown} of model_type={config.model_type!r}: expected 'full_attention' or 'sliding_attention'"
        )
    if not window or not any(sliding):
        return {}
    overrides: dict[str, Any] = {"window_size": (window - 1, 0)}
    if not all(sliding):
        overrides["window_attn_skip_freq"] = sliding
    return overrides
