"""What mbridge 0.15.1 leaves out per model family, as a subclass of its bridge; settings come from hf/settings.py."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from megatron_pr2.errors import ConfigError
from megatron_pr2.hf.files import TensorIndex
from megatron_pr2.hf.latent_attention import use_plain_queries
from megatron_pr2.hf.settings import check_fields

# Dense layers of models whose mbridge mapping only knows MoE layers (Qwen: decoder_sparse_step, mlp_only_layers).
_DENSE_MAPPING = {
    "mlp.linear_fc1.layer_norm_weight": ["model.layers.{layer_number}.post_attention_layernorm.weight"],
    "mlp.linear_fc1.weight": [
        "model.layers.{layer_number}.mlp.gate_proj.weight",
        "model.layers.{layer_number}.mlp.up_proj.weight",
    ],
    "mlp.linear_fc2.weight": ["model.layers.{layer_number}.mlp.down_proj.weight"],
}


class _AdaptedBridge:
    """Mixed in before mbridge's class of a model family; see :func:`adapted_bridge_class`.

    Attributes:
        files: what load_weights() reads, whose headers have been read.
    """

    files: TensorIndex
    overrides: dict[str, Any]
    hf_config: Any
    config: Any
    TransformerConfigClass: type
    _DIRECT_MAPPING: dict[str, str]

    def _build_base_config(self, *args: Any, **kwargs: Any) -> Any:
        check_fields(self.TransformerConfigClass, self.overrides)
        # mbridge passes fields of older Megatron releases (DeepSeek: max_position_embeddings), which nothing reads.
        fields = {field.name for field in dataclasses.fields(self.TransformerConfigClass)}
        known = {name: value for name, value in kwargs.items() if name in fields}
        # Before the config is built: some settings decide whether it is valid.
        return super()._build_base_config(*args, **{**known, **self.overrides})  # type: ignore[misc]

    def _get_transformer_layer_spec(self, *args: Any, **kwargs: Any) -> Any:
        spec = super()._get_transformer_layer_spec(*args, **kwargs)  # type: ignore[misc]
        use_plain_queries(spec)
        return spec

    def _adjust_mapping_for_shared_weights(self) -> None:
        if getattr(self.hf_config, "tie_word_embeddings", False):
            # On the instance: the mapping is shared by all bridges of the family.
            self._DIRECT_MAPPING = {**self._DIRECT_MAPPING, "output_layer.weight": "model.embed_tokens.weight"}

    def _get_safetensor_io(self, weights_path: str) -> TensorIndex:
        return self.files

    def _weight_name_mapping_mcore_to_hf(self, mcore_weights_name: str) -> list[str]:
        # Some families repeat these names in a mapping of their own, without tied embeddings.
        if mcore_weights_name in self._DIRECT_MAPPING:
            return [self._DIRECT_MAPPING[mcore_weights_name]]
        return super()._weight_name_mapping_mcore_to_hf(mcore_weights_name)  # type: ignore[misc]


@functools.cache
def _registry() -> dict[str, type]:
    import mbridge  # noqa: F401, registers its bridges
    from mbridge.core.bridge import _MODEL_REGISTRY, register_model

    from megatron_pr2.hf.gpt_oss import GptOssBridge
    from megatron_pr2.hf.olmoe import OlmoeBridge

    for name, bridge in (("olmoe", OlmoeBridge), ("gpt_oss", GptOssBridge)):
        if name not in _MODEL_REGISTRY:
            register_model(name)(bridge)
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
