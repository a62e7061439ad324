"""Core attention of the host: causal attention for padded batches, packed sequences, GQA, MLA and context parallelism.

Shape suffixes: S local sequence positions, B sequences of a padded batch, T local tokens of a packed batch, N heads of this
rank, G key/value heads of this rank, D channels.

Context parallelism splits every (padded) sequence of length L into 2*cp chunks; rank r holds chunks r and 2*cp-1-r, in this
order (the "zigzag" of Transformer Engine). Keys and values of all ranks are gathered, and a mask over global positions says
who may look at whom; the gradient of the gather is a reduce-scatter.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

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
    """Stands in for ``TEDotProductAttention``; no parameters.

    Raises:
        ConfigError: a setting that only Transformer Engine's attention has (sliding window, attention sink, qk-clip).
    """

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
        unsupported = {
            "window_size": config.window_size is not None,
            "softmax_type": config.softmax_type != "vanilla",
            "qk_clip": config.qk_clip,
            "log_max_attention_logit": config.log_max_attention_logit,
        }
        for name, is_set in unsupported.items():
            if is_set:
                raise ConfigError(f"{name}={getattr(config, name)!r}: the host's attention does not have it; unset it")
        groups = ProcessGroupCollection.use_mpu_process_groups() if pg_collection is None else pg_collection
        self.config = config
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.cp_group = groups.cp if config.context_parallel_size > 1 else None

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
                between a sequence's end and its padded end see the sequence and are seen by nobody outside.

        Returns:
            [S, B, N * Dv], packed [T, N * Dv].

        Raises:
            ConfigError: a combination that the host does not have.
        """
        if attention_bias is not None:
            raise ConfigError("attention_bias: the host's attention has none")
        causal = (self.attn_mask_type if attn_mask_type is None else attn_mask_type) in _CAUSAL
        if packed_seq_params is None or packed_seq_params.qkv_format != "thd":
            return self._padded(query, key, value, attention_mask, causal)
        if not causal:
            raise ConfigError(f"attn_mask_type={attn_mask_type}: packed sequences are causal on the host")
        if packed_seq_params.local_cp_size is not None or packed_seq_params.cp_group is not None:
            raise ConfigError("packed_seq_params with a context-parallel group of its own: not on the host")
        return self._packed(query, key, value, packed_seq_params)

    def _padded(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        causal: bool,
    ) -> torch.Tensor:
        if self.cp_group is not None and (attention_mask is not None or not causal):
            raise ConfigError("context parallelism on the host: attention must be causal and attention_mask None")
        local_length = query.shape[0]
        positions, allowed = self._masks(local_length)
        if self.cp_group is not None:
            key, value = self._gather(key), self._gather(value)
        if attention_mask is not None:
            allowed = ~attention_mask.bool()
            if causal:
                allowed = allowed & (positions[:, None] >= positions[None, :])
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
        if self.cp_group is not None:
            # [cp * T, ...] -> [T, cp, ...] in pieces of one sequence: all ranks' keys of a sequence lie together.
            key, value = (self._gather(tensor).unflatten(0, (cp_size, -1)).transpose(0, 1) for tensor in (key, value))
        outputs = []
        for q_TND, k_TGD, v_TGD in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True):
            _, allowed = self._masks(q_TND.shape[0])
            if self.cp_group is not None:
                k_TGD, v_TGD = (tensor.transpose(0, 1).flatten(0, 1) for tensor in (k_TGD, v_TGD))
            q_BNSD, k_BGSD, v_BGSD = (tensor.transpose(0, 1)[None] for tensor in (q_TND, k_TGD, v_TGD))
            output_NSD = self._attend(q_BNSD, k_BGSD, v_BGSD, allowed, True)[0]
            outputs.append(output_NSD.transpose(0, 1).flatten(1))
        return torch.cat(outputs)

    def _gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return gather_from_sequence_parallel_region(tensor, tensor_parallel_output_grad=True, group=self.cp_group)

    def _masks(self, local_length: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """This rank's global positions [S] and, under context parallelism, who may see whom [S, cp * S]."""
        if self.cp_group is None:
            return torch.arange(local_length), None
        size = self.cp_group.size()
        everyone = [zigzag_positions(local_length, size, rank) for rank in range(size)]
        mine = everyone[self.cp_group.rank()]
        return mine, mine[:, None] >= torch.cat(everyone)[None, :]

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, allowed: torch.Tensor | None, causal: bool
    ) -> torch.Tensor:
        """[B, heads, length, channels] each; ``allowed`` None means plain causal (or full) attention."""
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
