"""mbridge as back end of :mod:`megatron_pr2.hf.bridge`; what it lacks is in :mod:`megatron_pr2.hf.mbridge_models`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor

from megatron_pr2 import host
from megatron_pr2.errors import ConfigError
from megatron_pr2.hf.base import Chunks, is_multi_token_prediction, owns_weights
from megatron_pr2.hf.mbridge_models import adapted_bridge_class
from megatron_pr2.hf.model_chunks import build_chunks
from megatron_pr2.hf.settings import bridge_config, config_overrides
from megatron_pr2.hf.shape import ModelShape

_EXPERTS = ".mlp.experts.linear_fc"
_EMBEDDING = "embedding.word_embeddings.weight"


class MBridge:
    """:class:`megatron_pr2.hf.base.Bridge` on mbridge's class of a model family.

    Args:
        source: Hugging Face config.
        shape: None for dense models.
        extra: TransformerConfig fields that override the bridge's.

    Raises:
        ConfigError: a model type or a setting that mbridge does not know.
    """

    label = "mbridge"

    def __init__(self, source: Any, shape: ModelShape | None, dtype: torch.dtype, extra: Mapping[str, Any]) -> None:
        config = bridge_config(source)
        overrides = {"fp16": dtype is torch.float16, **config_overrides(config, shape), **extra}
        if host.is_enabled():
            overrides.update(host.config_overrides())
        self.inner = adapted_bridge_class(source.model_type, overrides)(config, dtype=dtype)
        self.source_config, self.dtype, self.config = source, dtype, self.inner.config

    def build(self, *, wrap_with_ddp: bool, ddp_config: Mapping[str, Any]) -> Chunks:
        """The model chunks."""
        return build_chunks(self.inner._model_provider([]), wrap_with_ddp=wrap_with_ddp, ddp_config=ddp_config)

    def parameter_names(self, chunks: Chunks) -> set[str]:
        """Names by mbridge's own mapping."""
        try:
            return {
                name
                for chunk in chunks
                for key in self.inner._weight_name_mapping_mcore_local_to_global(chunk).values()
                for name in self.inner._weight_name_mapping_mcore_to_hf(key)
            }
        except NotImplementedError as error:
            raise ConfigError(f"mbridge cannot name a parameter of this model ({error}); check extra_config") from error

    def is_extra_weight(self, name: str) -> bool:
        """Multi-token prediction layers are not built."""
        return is_multi_token_prediction(name, self.config.num_layers)

    def load_weights(self, chunks: Chunks, path: Path) -> None:
        """mbridge's load."""
        with torch.no_grad():
            self.inner.load_weights(chunks, str(path))

    def export_weights(self, chunks: Chunks) -> Iterator[tuple[str, Tensor]]:
        """mbridge's export."""
        with torch.no_grad():
            yield from self.inner.export_weights(chunks)

    def export_owned_weights(self, chunks: Chunks) -> Iterator[tuple[str, Tensor]]:
        """Shards are gathered tensor by tensor within a tensor-parallel group, and nothing is sent between other ranks.

        But for models that keep the experts of a layer in one tensor (gpt-oss): the first expert-parallel rank owns it.

        Raises:
            ConfigError: at the first step and on every rank, for experts that are cut over ranks while the rest is not.
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
            experts = _EXPERTS in name
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
                if "#" in hf_name:
                    yield from self._of_every_rank(hf_name, tensor)
                else:
                    yield hf_name, tensor.detach()

    def _of_every_rank(self, name: str, part: Tensor) -> Iterator[tuple[str, Tensor]]:
        """An expert's part of a tensor, and on the first expert-parallel rank those of its peers; name is `<tensor>#<expert>`."""
        states = self.inner.mpu
        tensor, _, expert = name.partition("#")
        step = self.config.num_moe_experts // states.ep_size
        for rank, each in enumerate(_gathered(part, states.ep_group, states.ep_size) or ()):
            yield f"{tensor}#{int(expert) + rank * step}", each

    def _named_tensors(self, chunks: Chunks) -> Iterator[tuple[str, Tensor]]:
        """(Megatron name with global layer and expert numbers, this rank's shard), in an order that tensor-parallel peers share."""
        from mbridge.core.util import unwrap_model

        embedding_is_elsewhere = not mpu.is_pipeline_first_stage(ignore_virtual=True)
        mapping = self.inner._DIRECT_MAPPING
        for chunk in chunks:
            model = unwrap_model(chunk)
            global_names = self.inner._weight_name_mapping_mcore_local_to_global(model)
            parameters = dict(model.named_parameters())
            # Selection biases of the experts are buffers.
            state = model.state_dict()
            biases = {name: state[name] for name in state if "expert_bias" in name and torch.is_tensor(state[name])}
            for local_name, tensor in {**biases, **parameters}.items():
                name = global_names[local_name]
                # Tied embeddings exist on the first and on the last pipeline stage, as `output_layer` there.
                if embedding_is_elsewhere and mapping.get(name) == mapping[_EMBEDDING]:
                    continue
                yield name, tensor


def _gathered(shard: Tensor, group: dist.ProcessGroup, size: int) -> list[Tensor] | None:
    """The shards of a group on its first rank, None elsewhere."""
    if size == 1:
        return [shard]
    shards = [torch.empty_like(shard) for _ in range(size)] if group.rank() == 0 else None
    dist.gather(shard.contiguous(), shards, dst=dist.get_global_rank(group, 0), group=group)
    return shards
