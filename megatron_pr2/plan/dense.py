"""The weights that a look-ahead changes for a forward: a model's but its experts', as Megatron-Core keeps them on a rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_pr2.parallel.layout import ParallelLayout


@dataclass(frozen=True)
class DenseWeights:
    """Elements of one layer, biases left out.

    Attributes:
        attention: split over tensor-parallel ranks.
        whole: on every rank: norms, and the down-projections of latent attention.
        mlp: of a layer without routed experts, split.
        shared: of the shared experts, split.
    """

    attention: int
    whole: int
    mlp: int
    shared: int = 0


def dense_weights(config: Any) -> DenseWeights | None:
    """Of a Hugging Face config; None where layers are of several kinds (Nemotron-H)."""
    if getattr(config, "layers_block_type", None):
        return None
    hidden, heads = config.hidden_size, config.num_attention_heads

    def size(name: str, default: int = 0) -> int:
        return int(getattr(config, name, None) or default)

    if latent := size("kv_lora_rank"):
        query, nope, rope, value = map(size, ("q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
        attention = (query or hidden) * heads * (nope + rope) + latent * heads * (nope + value) + heads * value * hidden
        whole = query * (hidden + 1) + hidden * (latent + rope) + latent
    else:
        head = size("head_dim", hidden // heads)
        attention = 2 * hidden * head * (heads + size("num_key_value_heads", heads))
        whole = 2 * head * (config.model_type == "qwen3_moe" or bool(getattr(config, "use_qk_norm", False)))
    shared = size("shared_expert_intermediate_size", size("n_shared_experts") * size("moe_intermediate_size"))
    return DenseWeights(attention, whole + 2 * hidden, 3 * hidden * size("intermediate_size"), 3 * hidden * shared)


def dense_elements(
    dense: DenseWeights, layout: ParallelLayout, pp: int, *, vocab: int, experts: int, hidden: int
) -> int:
    """Elements on a rank of a pipeline stage: its layers, their routers, the embedding, and the last norm.

    An output layer moves no router and is left as it is.
    """
    layers = [layer for chunk in layout.layers(pp) for layer in chunk]
    moe = len(layout.moe_columns(pp))
    split = len(layers) * dense.attention + (len(layers) - moe) * dense.mlp + moe * dense.shared
    whole = len(layers) * dense.whole + moe * experts * hidden
    first, last = pp == 0, pp == layout.pipeline - 1
    return split // layout.tensor + whole + first * -(-vocab // layout.tensor) * hidden + last * hidden
