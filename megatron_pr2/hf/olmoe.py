"""OLMoE for mbridge, which has no bridge for it: q/k norms over whole projections, and clipped queries, keys and values.

OLMoE is Qwen3-MoE but for its attention. Megatron-Core norms each head; OLMoE norms all heads of a projection together, before it
cuts them. Under tensor parallelism a rank has some of the heads, so that the mean square is summed over the ranks.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from mbridge.models.qwen3moe import Qwen3MoEBridge
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region, reduce_from_tensor_model_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_tensor_model_parallel_group_if_none
from torch import Tensor

from megatron_pr2.errors import ConfigError


class WholeProjectionNorm(torch.nn.Module):
    """RMSNorm over all heads of a projection; takes and returns this rank's heads [..., heads, channels].

    The weight [all heads * channels] is whole on every tensor-parallel rank, and each uses its part: Megatron-Core sums the
    gradients of q/k norms over these ranks, which makes the whole gradient of the parts.

    Attributes:
        heads: field of TransformerConfig with the number of heads of the whole projection.
    """

    heads: ClassVar[str]

    def __init__(self, hidden_size: int, config: TransformerConfig, eps: float = 1e-5) -> None:
        """Args:
        hidden_size: channels of a head.

        Raises:
            ConfigError: the heads cannot be shared out among the tensor-parallel ranks.
        """
        super().__init__()
        heads: int = getattr(config, self.heads)
        self._group = get_tensor_model_parallel_group_if_none(None)
        if heads % self._group.size():
            raise ConfigError(
                f"{heads} attention heads (or key/value heads) and tensor_model_parallel_size={self._group.size()}: the q/k norms "
                "of this model need whole heads on each rank; choose a size that divides them"
            )
        self._eps = eps
        self.weight = torch.nn.Parameter(torch.ones(heads * hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, heads: Tensor) -> Tensor:
        hidden = heads.flatten(-2).float()
        squares = hidden.square().sum(-1, keepdim=True)
        if self._group.size() > 1:
            # Summed over the ranks in both directions: each rank's output depends on the squares of all.
            squares = reduce_from_tensor_model_parallel_region(squares, group=self._group)
            squares = copy_to_tensor_model_parallel_region(squares, group=self._group)
        scaled = (hidden * torch.rsqrt(squares / self.weight.numel() + self._eps)).to(heads.dtype)
        return (scaled * self.weight.chunk(self._group.size())[self._group.rank()]).view_as(heads)


class QueryNorm(WholeProjectionNorm):
    heads = "num_attention_heads"


class KeyNorm(WholeProjectionNorm):
    heads = "num_query_groups"


class ClippedSelfAttention(SelfAttention):
    """Self-attention whose queries, keys and values lie within [-clip_qkv, clip_qkv], before rotary embeddings."""

    def __init__(self, *args: Any, clip_qkv: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.clip_qkv = clip_qkv

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        query, key, value = super().get_query_key_value_tensors(*args, **kwargs)
        return tuple(tensor.clamp(-self.clip_qkv, self.clip_qkv) for tensor in (query, key, value))


class OlmoeBridge(Qwen3MoEBridge):
    """mbridge's bridge for model_type "olmoe": names and layouts are those of Qwen3-MoE."""

    def _build_config(self) -> Any:
        config = self.hf_config
        return self._build_base_config(
            num_moe_experts=config.num_experts,
            moe_router_topk=config.num_experts_per_tok,
            # There are no dense layers: this is the width of an expert.
            moe_ffn_hidden_size=config.intermediate_size,
            moe_router_score_function="softmax",
            moe_grouped_gemm=True,
            qk_layernorm=True,
        )

    def _get_transformer_layer_spec(self, vp_stage: int | None = None) -> Any:
        block = super()._get_transformer_layer_spec(vp_stage)
        for layer in block.layer_specs:
            attention = layer.submodules.self_attention
            attention.submodules.q_layernorm = QueryNorm
            attention.submodules.k_layernorm = KeyNorm
            if (clip := self.hf_config.clip_qkv) is not None:
                attention.module = ClippedSelfAttention
                attention.params["clip_qkv"] = clip
        return block
