"""Core attention of the host: causal attention for padded batches, packed sequences, GQA, MLA and context parallelism, with
sliding windows and attention sinks (a logit per head that takes part in the softmax and stands for no key).

Shape suffixes: S local sequence positions, B sequences of a padded batch, T local tokens of a packed batch, N heads of this
rank, G key/value heads of this rank, D channels.

Context parallelism splits every (padded) sequence of length L into 2*cp chunks; rank r holds chunks r and 2*cp-1-r, in this
order (the "zigzag" of Transformer Engine). Keys and values of all ranks are gathered, and a mask over global positions says
who may look at whom; the gradient of the gather is a reduce-scatter.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    is_layer_window_attention,
    make_sharded_tensors_for_checkpoint,
)
from megatron.core.utils import divide

from megatron_pr2.errors import ConfigError

_CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)


def zigzag_positions(local_length: int, cp_size: int, cp_rank: int) -> torch.Tensor:
    """Global positions of the tokens of one sequence that a context-parallel rank holds.

    Args:
        local_length: tokens of the sequence on each rank, even if ``cp_size`` > 1.

    Returns:
        [local_length] int64.

    Raises:
        ConfigError: the sequence does not divide into 2 * cp_size chunks.
    """
    if cp_size == 1:
        return torch.arange(local_length)
    if local_length % 2:
        raise ConfigError(
            f"a sequence has {local_length} tokens on each of {cp_size} context-parallel ranks; "
            f"pad sequences to a multiple of {2 * cp_size}"
        )
    chunk = local_length // 2
    first, second = cp_rank * chunk, (2 * cp_size - 1 - cp_rank) * chunk
    return torch.cat((torch.arange(first, first + chunk), torch.arange(second, second + chunk)))


class HostAttention(torch.nn.Module):
    """Stands in for ``TEDotProductAttention``; its only parameter is ``softmax_offset`` [N], the sinks, where they are learned.

    Raises:
        ConfigError: a setting that only Transformer Engine's attention has (qk-clip).
    """

    softmax_offset: torch.Tensor | None

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__()
        for name in ("qk_clip", "log_max_attention_logit"):
            if getattr(config, name):
                raise ConfigError(f"{name}={getattr(config, name)!r}: the host's attention does not have it; unset it")
        groups = ProcessGroupCollection.use_mpu_process_groups() if pg_collection is None else pg_collection
        self.config = config
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.cp_group = groups.cp if config.context_parallel_size > 1 else None
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        # Keys before the query that it sees; what is after it is hidden anyway.
        self.window = config.window_size[0] if windowed and config.window_size[0] >= 0 else None
        self._add_sinks(config, groups)

    def _add_sinks(self, config: TransformerConfig, groups: ProcessGroupCollection) -> None:
        if config.softmax_type == "vanilla":
            self.register_parameter("softmax_offset", None)
            return
        self._tp_group = groups.tp
        offset = torch.zeros(divide(config.num_attention_heads, groups.tp.size()), dtype=config.params_dtype)
        if config.softmax_type == "off-by-one":
            self.register_buffer("softmax_offset", offset, persistent=False)
            return
        self.softmax_offset = torch.nn.Parameter(offset)
        set_tensor_model_parallel_attributes(self.softmax_offset, is_parallel=True, dim=0, stride=1)
        if config.perform_initialization:
            config.init_method(self.softmax_offset)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict[str, Any]:
        """The key that Transformer Engine's module has: learned sinks, by tensor-parallel rank."""
        state = self.state_dict(prefix="", keep_vars=True)
        if not state:
            return {}
        groups = {"tp_group": self._tp_group, "dp_cp_group": ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"]}
        return make_sharded_tensors_for_checkpoint(state, prefix, {"softmax_offset": 0}, sharded_offsets, **groups)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Attention of this rank's heads.

        Args:
            query, key, value: [S, B, N, D], [S, B, G, D], [S, B, G, Dv]; packed [T, N, D], [T, G, D], [T, G, Dv].
            attention_mask: bool, True where attention is *forbidden*, broadcastable to [B, N, S, S]; padded batches without
                context parallelism only. Causality is added to it.
            packed_seq_params: boundaries of the sequences of a packed batch, over all context-parallel ranks. Positions
                between a sequence's end and its padded end see the sequence; no other position sees them.

        Returns:
            [S, B, N * Dv], packed [T, N * Dv].

        Raises:
            ConfigError: a combination that the host does not have.
        """
        if attention_bias is not None:
            raise ConfigError("attention_bias: the host's attention has none")
        causal = (self.attn_mask_type if attn_mask_type is None else attn_mask_type) in _CAUSAL
        if self.window is not None and not causal:
            raise ConfigError(f"attn_mask_type={attn_mask_type}: windows of attention are causal on the host")
        if packed_seq_params is None or packed_seq_params.qkv_format != "thd":
            return self._padded(query, key, value, attention_mask, causal)
        if not causal:
            raise ConfigError(f"attn_mask_type={attn_mask_type}: packed sequences are causal on the host")
        if packed_seq_params.local_cp_size is not None or packed_seq_params.cp_group is not None:
            raise ConfigError("packed_seq_params with a context-parallel group of its own: not on the host")
        return self._packed(query, key, value, packed_seq_params)

    def _padded(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None, causal: bool
    ) -> torch.Tensor:
        if self.cp_group is not None and (attention_mask is not None or not causal):
            raise ConfigError("context parallelism on the host: attention must be causal and attention_mask None")
        local_length = query.shape[0]
        # Without any of these, causal attention needs no mask.
        special = self.cp_group is not None or self.window is not None or attention_mask is not None
        allowed = self._allowed(local_length) if causal and special else None
        if self.cp_group is not None:
            key, value = self._gather(key), self._gather(value)
        if attention_mask is not None:
            allowed = ~attention_mask.bool() if allowed is None else allowed & ~attention_mask.bool()
        # [S, B, heads, D] -> [B, heads, S, D]
        q_BNSD, k_BGSD, v_BGSD = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        output_BNSD = self._attend(q_BNSD, k_BGSD, v_BGSD, allowed, causal)
        return output_BNSD.permute(2, 0, 1, 3).reshape(local_length, query.shape[1], -1)

    def _packed(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSeqParams) -> torch.Tensor:
        boundaries = packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded
        cp_size = 1 if self.cp_group is None else self.cp_group.size()
        lengths = [length // cp_size for length in boundaries.diff().tolist()]
        if sum(lengths) != query.shape[0]:
            raise ConfigError(
                f"packed sequences: boundaries cover {sum(lengths)} tokens of this rank, the batch has {query.shape[0]}"
            )
        sequences = zip(*(tensor.unsqueeze(1).split(lengths) for tensor in (query, key, value)), strict=True)
        return torch.cat([self._padded(q, k, v, None, True).squeeze(1) for q, k, v in sequences])

    def _gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return gather_from_sequence_parallel_region(tensor, tensor_parallel_output_grad=True, group=self.cp_group)

    def _allowed(self, local_length: int) -> torch.Tensor:
        """Which keys of a sequence each query of this rank may see, [S, cp * S]."""
        if self.cp_group is None:
            queries = keys = torch.arange(local_length)
        else:
            size = self.cp_group.size()
            everyone = [zigzag_positions(local_length, size, rank) for rank in range(size)]
            queries, keys = everyone[self.cp_group.rank()], torch.cat(everyone)
        distance = queries[:, None] - keys[None, :]
        return distance >= 0 if self.window is None else (distance >= 0) & (distance <= self.window)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, allowed: torch.Tensor | None, causal: bool
    ) -> torch.Tensor:
        """[B, heads, length, channels] each; ``allowed`` None means plain causal (or full) attention."""
        if self.softmax_offset is None:
            return F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=allowed,
                dropout_p=self.dropout if self.training else 0.0,
                is_causal=causal and allowed is None,
                scale=self.softmax_scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        scale = 1.0 / math.sqrt(query.shape[-1]) if self.softmax_scale is None else self.softmax_scale
        scores = query @ key.transpose(-1, -2) * scale
        if allowed is None and causal:
            allowed = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -torch.inf)
        sinks = self.softmax_offset.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        # A sink takes its share of the weight, and adds nothing.
        weights = torch.cat((scores, sinks), dim=-1).softmax(dim=-1)[..., :-1]
        return F.dropout(weights, self.dropout, self.training) @ value
