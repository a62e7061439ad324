"""Layers, experts and top-k of a model, from its Hugging Face config. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_pr2.errors import ConfigError

# Names of the number of routed experts; the first that is set counts.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class ModelShape:
    """What an engine has to know of the model to read its routes.

    Attributes:
        num_hidden_layers: all decoder layers, dense ones included.
        moe_layers: 0-based indices of the MoE layers, ascending.
        num_experts: E, routed experts.
        topk: K.
        vocab_size: tokens.
    """

    num_hidden_layers: int
    moe_layers: tuple[int, ...]
    num_experts: int
    topk: int
    vocab_size: int


def model_shape(hf_config: Any) -> ModelShape:
    """The shape of a model of any family that this package knows, from its Hugging Face config.

    Raises:
        ConfigError: the model has no routed experts, or no layer that uses them.
    """
    config = hf_config.get_text_config() if hasattr(hf_config, "get_text_config") else hf_config
    experts = next((int(value) for name in EXPERTS if (value := getattr(config, name, None))), 0)
    topk = getattr(config, "num_experts_per_tok", None)
    layers = int(config.num_hidden_layers)
    moe_layers = tuple(index for index in range(layers) if experts and _is_moe_layer(config, index))
    if not experts or not topk or not moe_layers:
        raise ConfigError(
            f"model_type={config.model_type!r} is not a mixture-of-experts model "
            f"(routed experts: {experts}, top-k: {topk}, MoE layers: {len(moe_layers)}); replay needs a model with a router"
        )
    return ModelShape(layers, moe_layers, experts, int(topk), int(config.vocab_size))


def _is_moe_layer(config: Any, index: int) -> bool:
    """The rule of the model's own code in Transformers; ``index`` is 0-based."""
    kinds = getattr(config, "layers_block_type", None) or ()
    if "moe" in kinds:  # Nemotron-H: a layer is attention, experts or another thing, and nothing else
        return bool(kinds[index] == "moe")
    if index in (getattr(config, "mlp_only_layers", None) or ()):
        return False
    if index < (getattr(config, "first_k_dense_replace", None) or 0):
        return False
    frequency = getattr(config, "moe_layer_freq", None) or 1
    if isinstance(frequency, list | tuple):
        return bool(frequency[index])
    return (index + 1) % (getattr(config, "decoder_sparse_step", None) or 1) == 0 and index % frequency == 0
