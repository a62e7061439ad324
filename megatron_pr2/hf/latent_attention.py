"""Multi-latent attention whose queries have no low rank (q_lora_rank=None), as checkpoints have it: without a norm of its own.

Megatron-Core 0.19 puts one into `linear_q_proj` where qk_layernorm is on, which keys and values need: a regression, since no
checkpoint has it and DeepSeek's models do not compute it. Models that are built here leave it out; others are refused when they are
loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.transformer.multi_latent_attention import MLASelfAttention

from megatron_pr2.errors import ConfigError

# The norm's weight, in a decoder layer; Transformer Engine and the host name it alike.
_NORM = "self_attention.linear_q_proj.layer_norm_weight"


class PlainQuerySelfAttention(MLASelfAttention):
    """MLASelfAttention with the linear_q_proj of its spec; earlier releases do not call what it overrides."""

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        resolved: dict[str, Any] = super()._resolve_qk_norm_config(submodules)
        if self.config.q_lora_rank is None:
            resolved["linear_q_proj"] = submodules.linear_q_proj
        return resolved


def use_plain_queries(block_spec: Any) -> None:
    """Puts such attention into the layers of a TransformerBlockSubmodules."""
    for layer in block_spec.layer_specs:
        attention: Any = getattr(layer.submodules, "self_attention", None)
        if getattr(attention, "module", None) is MLASelfAttention:
            attention.module = PlainQuerySelfAttention


def check_query_norm(chunks: Sequence[torch.nn.Module]) -> None:
    """Refuses a model with that norm: whatever its weight is, queries would not be the checkpoint's.

    Raises:
        ConfigError: naming the parameter.
    """
    for chunk in chunks:
        for name, _ in chunk.named_parameters():
            if name.endswith(_NORM) and getattr(chunk.config, "multi_latent_attention", False):
                raise ConfigError(
                    f"{name}: Megatron-Core puts a norm before the queries of multi-latent attention with q_lora_rank=None and "
                    "qk_layernorm=True, which no checkpoint has; load it with model.bridge=mbridge, or use megatron-core 0.18"
                )
