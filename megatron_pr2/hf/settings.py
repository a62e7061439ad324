"""TransformerConfig fields of each model family, from its Hugging Face config, where mbridge 0.15.1 leaves them out or is wrong.

What Megatron-Core cannot compute as Transformers does is refused here, by name: it would run, and be another model.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from typing import Any

from megatron_pr2.errors import ConfigError
from megatron_pr2.hf.shape import ModelShape

# Families whose router takes a sigmoid, selects with a bias and scales the weights. The others take a softmax.
_SIGMOID = ("deepseek_v3", "glm4_moe")
_WITH_QKV_BIAS = ("qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe")


def bridge_config(source: Any) -> Any:
    """A copy of a Transformers config with the attributes that mbridge reads and Transformers 5 no longer has.

    Raises:
        ConfigError: a setting that the bridge would silently ignore.
    """
    family = source.model_type
    config = copy.deepcopy(source)
    rope = getattr(source, "rope_parameters", None) or {}
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


def check_fields(config_class: Any, names: Iterable[str]) -> None:
    """Raises ConfigError for names that are no fields of a dataclass of settings."""
    if unknown := sorted(set(names) - {field.name for field in dataclasses.fields(config_class)}):
        raise ConfigError(f"extra_config: {config_class.__name__} has no fields {unknown}")


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
    overrides |= _router_overrides(config)
    if len(shape.moe_layers) < shape.num_hidden_layers:
        # Only where layers differ: Megatron saves a model with a list layer by layer, one without as stacked layers.
        overrides["moe_layer_freq"] = [int(index in shape.moe_layers) for index in range(shape.num_hidden_layers)]
    family = config.model_type
    if family in _WITH_QKV_BIAS:
        overrides["add_qkv_bias"] = getattr(config, "qkv_bias", getattr(config, "attention_bias", False))
    if family == "qwen2_moe":
        overrides["moe_shared_expert_gate"] = True
    elif family == "glm4_moe":
        overrides["moe_shared_expert_intermediate_size"] = config.moe_intermediate_size * config.n_shared_experts or None
    elif family == "deepseek_v3":
        overrides |= _deepseek_overrides(config)
    elif family == "gpt_oss":
        _check_gpt_oss(config)
    return overrides


def _router_overrides(config: Any) -> dict[str, Any]:
    """How the router of the family selects and weighs experts."""
    family, topk = config.model_type, config.num_experts_per_tok
    # Without a balancing loss, and the selection bias as pretraining left it: neither moves routing during reinforcement learning.
    overrides: dict[str, Any] = {"moe_router_load_balancing_type": "none", "moe_router_bias_update_rate": 0.0}
    # Mixtral and gpt-oss have no such setting: they normalize.
    normalized = getattr(config, "norm_topk_prob", True)
    if normalized and topk == 1:
        raise ConfigError(
            f"num_experts_per_tok=1 with normalized weights (model_type={family!r}): each weight is 1 whatever the router says; "
            "Megatron-Core has no such router"
        )
    if family not in _SIGMOID:
        # A softmax over the selected experts only is what normalizing the selected probabilities gives.
        return {**overrides, "moe_router_pre_softmax": not normalized}
    if not normalized:
        raise ConfigError(
            f"norm_topk_prob=False of model_type={family!r}: Megatron-Core always divides sigmoid weights by their sum"
        )
    groups, chosen = config.n_group or 1, config.topk_group
    if groups > 1:
        if topk // chosen != 2:
            raise ConfigError(
                f"num_experts_per_tok={topk}, topk_group={chosen}: the model ranks groups of experts by their two best, "
                f"Megatron-Core by their {topk // chosen} best (num_experts_per_tok // topk_group)"
            )
        overrides |= {"moe_router_num_groups": groups, "moe_router_group_topk": chosen}
    return overrides


def _deepseek_overrides(config: Any) -> dict[str, Any]:
    if not getattr(config, "rope_interleave", True):
        raise ConfigError("rope_interleave=False of model_type='deepseek_v3': Megatron-Core's latent attention interleaves always")
    # The multi-token prediction head takes no part in reinforcement learning.
    overrides: dict[str, Any] = {"mtp_num_layers": None, "rope_type": "rope"}
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "yarn":
        overrides |= {"rope_type": "yarn", "rotary_scaling_factor": rope["factor"]}
        names = ("mscale", "mscale_all_dim", "beta_fast", "beta_slow", "original_max_position_embeddings")
        overrides |= {name: rope[name] for name in names if rope.get(name) is not None}
    return overrides


def _check_gpt_oss(config: Any) -> None:
    """The bridge builds what every published checkpoint has."""
    for name, value in {"attention_bias": True, "swiglu_alpha": 1.702}.items():
        if (given := getattr(config, name, value)) != value:
            raise ConfigError(f"{name}={given!r} of model_type='gpt_oss': Megatron-Core has {value!r} only")
    if (factor := config.rope_parameters.get("attention_factor")) is not None:
        raise ConfigError(f"attention_factor={factor!r} of model_type='gpt_oss': Megatron-Core takes it from YaRN's factor")


def _window_overrides(config: Any) -> dict[str, Any]:
    """Sliding-window attention: Megatron-Core's window counts the keys before the query, Transformers' the query as well."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * config.num_hidden_layers
    if unknown := sorted(set(kinds) - {"sliding_attention", "full_attention"}):
        raise ConfigError(
            f"layer_types {unknown} of model_type={config.model_type!r}: expected 'full_attention' or 'sliding_attention'"
        )
    sliding = [int(kind == "sliding_attention") for kind in kinds]
    if not window or getattr(config, "use_sliding_window", True) is False or not any(sliding):
        return {}
    overrides: dict[str, Any] = {"window_size": (window - 1, 0)}
    if not all(sliding):
        overrides["window_attn_skip_freq"] = sliding
    return overrides
