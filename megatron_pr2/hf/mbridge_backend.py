"""mbridge as back end of :mod:`megatron_pr2.hf.bridge`; what it lacks is in :mod:`megatron_pr2.hf.mbridge_models`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel.layers import set_defaults_if_not_set_tensor_model_parallel_attributes
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from megatron_pr2.errors import ConfigError
from megatron_pr2.hf.base import Chunks, owns_weights
from megatron_pr2.hf.files import TensorIndex
from megatron_pr2.hf.mbridge_models import adapted_bridge_class
from megatron_pr2.hf.settings import bridge_config, config_overrides
from megatron_pr2.hf.shape import ModelShape

_EMBEDDING = "embedding.word_embeddings.weight"
# From 0.19 on it warns that its caller could have computed the layout of the parameters that it computes itself.
logging.getLogger(DistributedDataParallel.__module__).addFilter(lambda record: "full_param_layout" not in record.getMessage())


class MBridge:
    """:class:`megatron_pr2.hf.base.Bridge` on mbridge's class of a model family.

    Args:
        source: Hugging Face config.
        shape: None for dense models.
        extra: TransformerConfig fields that override the bridge's.

    Raises:
        ConfigError: a model type or a setting that mbridge does not know.
    """

    def __init__(self, source: Any, shape: ModelShape | None, dtype: torch.dtype, extra: Mapping[str, Any]) -> None:
        config = bridge_config(source)
        overrides = {"fp16": dtype is torch.float16, **config_overrides(config, shape), **extra}
        self.inner = adapted_bridge_class(source.model_type, overrides)(config, dtype=dtype)
        self.source_config, self.dtype, self.config = source, dtype, self.inner.config

    def build(self, *, wrap_with_ddp: bool, ddp_config: Mapping[str, Any]) -> Chunks:
        """Not by mbridge's get_model: it asks for members of `ModelType` that Megatron-Core no longer has from 0.17 on."""
        stages = mpu.get_virtual_pipeline_model_parallel_world_size()
        provider = self.inner._model_provider([])
        chunks = [_chunk(provider, stage) for stage in ([None] if stages is None else range(stages))]
        if self.config.fp16 or self.config.bf16:
            chunks = [Float16Module(self.config, chunk) for chunk in chunks]
            for module in (module for chunk in chunks for module in chunk.modules()):
                # Routers keep the expert bias in fp32.
                if hasattr(module, "_maintain_float32_expert_bias"):
                    module._maintain_float32_expert_bias()
        if not wrap_with_ddp:
            return chunks
        settings = DistributedDataParallelConfig(**ddp_config)
        if settings.overlap_grad_reduce and settings.bucket_size is None:
            # As Megatron-LM sets it; the default of the class leaves out context parallelism.
            ranks = mpu.get_data_parallel_world_size(with_context_parallel=True)
            settings.bucket_size = max(40_000_000, 1_000_000 * ranks)
        # The communication of later chunks is overlapped with the computation of others anyway.
        return [DistributedDataParallel(self.config, settings, chunk, disable_bucketing=i > 0) for i, chunk in enumerate(chunks)]

    def parameter_names(self, chunks: Chunks) -> set[str]:
        try:
            return {
                name
                for chunk in chunks
                for key in self.inner._weight_name_mapping_mcore_local_to_global(chunk).values()
                for name in self.inner._weight_name_mapping_mcore_to_hf(key)
            }
        except NotImplementedError as error:
            raise ConfigError(f"mbridge cannot name a parameter of this model ({error}); check extra_config") from error

    def load_weights(self, chunks: Chunks, files: TensorIndex) -> None:
        self.inner.files = files
        with torch.no_grad():
            self.inner.load_weights(chunks, str(files.directory))

    def export_weights(self, chunks: Chunks) -> Iterator[tuple[str, Tensor]]:
        with torch.no_grad():
            yield from self.inner.export_weights(chunks)

    def export_owned_weights(self, chunks: Chunks) -> Iterator[tuple[str, Tensor]]:
        """Shards are gathered tensor by tensor within a tensor-parallel group, and nothing is sent between other ranks.

        Models that keep the experts of a layer in one tensor (gpt-oss) are the exception: the first expert-parallel rank owns it.
        """
        states = self.inner.mpu
        if states.etp_size > 1 and states.tp_size == 1:
            raise ConfigError(
                f"expert_tensor_parallel_size={states.etp_size} with tensor_model_parallel_size=1: the bridge cannot join the "
                "experts' shards; use the same size for both"
            )
        with torch.no_grad():
            yield from getattr(self.inner, "joined", iter)(self._owned(chunks))

    def _owned(self, chunks: Chunks) -> Iterator[tuple[str, Tensor]]:
        states = self.inner.mpu
        for name, parameter in self._named_tensors(chunks):
            experts = ".mlp.experts.linear_fc" in name
            if not owns_weights(experts=experts):
                continue
            if experts:
                shards = _gathered(parameter, states.etp_group, states.etp_size)
            elif getattr(parameter, "tensor_model_parallel", False):
                shards = _gathered(parameter, states.tp_group, states.tp_size)
            else:
                shards = [parameter] if states.tp_rank == 0 else None
            if shards is None:  # a peer has it
                continue
            whole = shards[0] if len(shards) == 1 else self.inner._weight_merge_across_tp(name, shards, parameter)
            del shards
            for hf_name, tensor in zip(*self.inner._weight_to_hf_format(name, whole), strict=True):
                stacked, separator, expert = hf_name.partition("#")
                if not separator:
                    yield hf_name, tensor.detach()
                    continue
                # An expert's part of a tensor: the first expert-parallel rank yields those of its peers as well.
                step = self.config.num_moe_experts // states.ep_size
                for rank, part in enumerate(_gathered(tensor, states.ep_group, states.ep_size) or ()):
                    yield f"{stacked}#{int(expert) + rank * step}", part

    def _named_tensors(self, chunks: Chunks) -> Iterator[tuple[str, Tensor]]:
        """(Megatron name with global layer and expert numbers, this rank's shard), in an order that tensor-parallel peers share."""
        from mbridge.core.util import unwrap_model

        embedding_is_elsewhere = not mpu.is_pipeline_first_stage(ignore_virtual=True)
        mapping = self.inner._DIRECT_MAPPING
        for chunk in chunks:
            model = unwrap_model(chunk)
            global_names = self.inner._weight_name_mapping_mcore_local_to_global(model)
            # Selection biases of the experts are buffers.
            biases = {name: value for name, value in model.state_dict().items() if "expert_bias" in name and torch.is_tensor(value)}
            for local_name, tensor in {**biases, **dict(model.named_parameters())}.items():
                name = global_names[local_name]
                # Tied embeddings exist on the first and on the last pipeline stage, as `output_layer` there.
                if embedding_is_elsewhere and mapping.get(name) == mapping[_EMBEDDING]:
                    continue
                yield name, tensor


def _chunk(provider: Callable[..., torch.nn.Module], stage: int | None) -> torch.nn.Module:
    virtual: dict[str, Any] = {} if stage is None else {"vp_stage": stage}
    ends = {} if stage is None else {"ignore_virtual": False, **virtual}
    chunk = provider(
        pre_process=mpu.is_pipeline_first_stage(**ends), post_process=mpu.is_pipeline_last_stage(**ends), **virtual
    )
    chunk.model_type = ModelType.encoder_or_decoder
    for name, value in virtual.items():
        setattr(chunk, name, value)
    for parameter in chunk.parameters():
        set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    return chunk.cuda(torch.cuda.current_device())


def _gathered(shard: Tensor, group: dist.ProcessGroup, size: int) -> list[Tensor] | None:
    """The shards of a group on its first rank, None elsewhere."""
    if size == 1:
        return [shard]
    shards = [torch.empty_like(shard) for _ in range(size)] if group.rank() == 0 else None
    dist.gather(shard.contiguous(), shards, dst=dist.get_global_rank(group, 0), group=group)
    return shards
