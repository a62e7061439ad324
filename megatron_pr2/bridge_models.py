"""What mbridge 0.15.1 leaves out per model family, as a subclass of its bridge: configs of Transformers 5 and routing settings."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import torch

from megatron_pr2.errors import ConfigError
from megatron_pr2.rollout.base import ModelShape

# Dense layers of models whose mbridge mapping only knows MoE layers (Qwen: decoder_sparse_step, mlp_only_layers).
_DENSE_MAPPING = {
    "mlp.linear_fc1.layer_norm_weight": ["model.layers.{layer_number}.post_attention_layernorm.weight"],
    "mlp.linear_fc1.weight": [
        "model.layers.{layer_number}.mlp.gate_proj.weight",
        "model.layers.{layer_number}.mlp.up_proj.weight",
    ],
    "mlp.linear_fc2.weight": ["model.layers.{layer_number}.mlp.down_proj.weight"],
}


def bridge_config(source: Any) -> Any:
    """A copy of a Transformers config with the attributes that mbridge reads and Transformers 5 no longer has.

    Raises:
        ConfigError: a rotary scaling that the bridge would silently ignore.
    """
    config = copy.deepcopy(source)
    rope = dict(getattr(source, "rope_parameters", None) or {})
    if "rope_theta" in rope:
        config.rope_theta = rope["rope_theta"]
    kind = rope.get("rope_type", "default")
    if kind != "default" and source.model_type != "deepseek_v3":
        raise ConfigError(
            f"rope_type={kind!r} of model_type={source.model_type!r}: mbridge would ignore the scaling; expected 'default'"
        )
    if getattr(config, "head_dim", None) is None and getattr(config, "kv_lora_rank", None) is None:
        config.head_dim = config.hidden_size // config.num_attention_heads
    return config


def config_overrides(config: Any, shape: ModelShape | None) -> dict[str, Any]:
    """TransformerConfig fields that follow from the Hugging Face config and that mbridge leaves out or gets wrong.

    Args:
        config: of :func:`bridge_config`.
        shape: None for dense models.
    """
    if shape is None:
        return {}
    overrides: dict[str, Any] = {}
    if len(shape.moe_layers) < shape.num_hidden_layers:
        # Only where layers differ: Megatron saves a model with a list layer by layer, one without as stacked layers.
        overrides["moe_layer_freq"] = [int(index in shape.moe_layers) for index in range(shape.num_hidden_layers)]
    if config.model_type in ("qwen2_moe", "qwen3_moe"):
        # Softmax over the selected experts only is what normalizing the selected probabilities gives.
        overrides["moe_router_pre_softmax"] = not config.norm_topk_prob
        overrides["add_qkv_bias"] = getattr(config, "qkv_bias", getattr(config, "attention_bias", False))
        overrides["moe_shared_expert_gate"] = config.model_type == "qwen2_moe"
    elif config.model_type == "mixtral":
        overrides["moe_router_pre_softmax"] = False
    elif config.model_type == "deepseek_v3":
        overrides.update(_deepseek_overrides(config))
    return overrides


def _deepseek_overrides(config: Any) -> dict[str, Any]:
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
    elif rope.get("rope_type", "default") != "default":
        raise ConfigError(f"rope_type={rope['rope_type']!r} of model_type='deepseek_v3': expected 'default' or 'yarn'")
    if (config.n_group or 1) > 1:
        overrides["moe_router_num_groups"] = config.n_group
        overrides["moe_router_group_topk"] = config.topk_group
    return overrides


class _AdaptedBridge:
    """Mixed in before mbridge's class of a model family; see :func:`adapted_bridge_class`."""

    overrides: dict[str, Any]
    hf_config: Any
    config: Any
    TransformerConfigClass: type
    dtype: torch.dtype
    _DIRECT_MAPPING: dict[str, str]

    def _build_base_config(self, *args: Any, **kwargs: Any) -> Any:
        fields = {field.name for field in dataclasses.fields(self.TransformerConfigClass)}
        if unknown := sorted(set(self.overrides) - fields):
            raise ConfigError(f"extra_config: {self.TransformerConfigClass.__name__} has no fields {unknown}")
        # mbridge passes fields of older Megatron releases (DeepSeek: max_position_embeddings); nothing reads them any more.
        known = {name: value for name, value in kwargs.items() if name in fields}
        # Into the first build already: some settings decide whether a config is valid at all.
        return super()._build_base_config(*args, **{**known, **self.overrides})  # type: ignore[misc]

    def _adjust_mapping_for_shared_weights(self) -> None:
        if getattr(self.hf_config, "tie_word_embeddings", False):
            # On the instance: the mapping is shared by all bridges of the family.
            self._DIRECT_MAPPING = {**self._DIRECT_MAPPING, "output_layer.weight": "model.embed_tokens.weight"}

    def _get_safetensor_io(self, weights_path: str) -> Any:
        from mbridge.core.safetensor_io import SafeTensorIO

        if self.dtype is torch.bfloat16:
            # DeepSeek's reads FP8 checkpoints.
            return super()._get_safetensor_io(weights_path)  # type: ignore[misc]
        return SafeTensorIO(weights_path)


@functools.cache
def _registry() -> dict[str, type]:
    import mbridge  # noqa: F401, registers its bridges
    from mbridge.core.bridge import _MODEL_REGISTRY

    return _MODEL_REGISTRY


def adapted_bridge_class(model_type: str, overrides: dict[str, Any]) -> type:
    """mbridge's class for a model type with the additions of this module, and fixed config overrides.

    Raises:
        ConfigError: mbridge does not know the model type.
    """
    if model_type not in _registry():
        raise ConfigError(f"model_type={model_type!r}: mbridge knows {sorted(_registry())}")
    base = _registry()[model_type]
    members: dict[str, Any] = {"overrides": overrides}
    if hasattr(base, "_MLP_MAPPING"):
        members["_MLP_MAPPING"] = {**_DENSE_MAPPING, **base._MLP_MAPPING}
    return type(base.__name__, (_AdaptedBridge, base), members)
