"""Export without a whole model anywhere: every rank yields the weights that it owns, in Hugging Face names.

    experts        the ranks of expert-data-parallel rank 0, each its own (with expert tensor parallelism its first rank)
    anything else  tensor-parallel rank 0 of data-parallel rank 0 of each pipeline stage

Over all ranks that is the model, every name once. Shards are gathered tensor by tensor within a tensor-parallel group; nothing is
sent between pipeline stages, expert-parallel or data-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor

from megatron_pr2.errors import ConfigError

if TYPE_CHECKING:
    from megatron_pr2.attach import PR2

_EXPERTS = ".mlp.experts.linear_fc"
_EMBEDDING = "embedding.word_embeddings.weight"


def owns_dense_weights() -> bool:
    """Whether this rank yields the weights of its pipeline stage that are not experts, the gates among them."""
    return mpu.get_data_parallel_rank(with_context_parallel=True) == 0 and mpu.get_tensor_model_parallel_rank() == 0


def owned_engine_weights(pr2: PR2, bridge: Any, chunks: list[torch.nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """What this rank owns, for an engine: :func:`export_owned_weights` with W + W_p in the gates.

    Raises:
        AttachError: after the last weight, if a gate of this stage did not come by.
    """
    owned = export_owned_weights(bridge, chunks)
    return pr2.engine_weights(owned, own_stage=True) if owns_dense_weights() else owned


def export_owned_weights(bridge: Any, chunks: list[torch.nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, full tensor) of every parameter that this rank owns.

    Ranks yield different numbers of tensors, some none; yet every rank walks it to the end, because tensor-parallel peers send it
    their shards on the way. At most one gathered tensor is held at a time.

    Args:
        bridge, chunks: of :func:`megatron_pr2.bridge.load_model`.

    Yields:
        Tensors that may alias the model's parameters: copy what must survive the next update.

    Raises:
        ConfigError: at the first step and on every rank, for experts that are cut over ranks while the rest is not.
    """
    states = bridge.mpu
    if states.etp_size > 1 and states.tp_size == 1:
        raise ConfigError(
            f"expert_tensor_parallel_size={states.etp_size} with tensor_model_parallel_size=1: the bridge cannot join the experts' "
            "shards; use the same size for both"
        )
    first_replica = mpu.get_data_parallel_rank(with_context_parallel=True) == 0
    first_expert_replica = mpu.get_expert_data_parallel_rank() == 0
    with torch.no_grad():
        for name, parameter in _named_tensors(bridge, chunks):
            experts = _EXPERTS in name
            if not (first_expert_replica if experts else first_replica):
                continue
            if experts:
                shards = _gathered(parameter, states.etp_group, states.etp_size)
            elif getattr(parameter, "tensor_model_parallel", False):
                shards = _gathered(parameter, states.tp_group, states.tp_size)
            else:
                shards = [parameter] if states.tp_rank == 0 else None
            if shards is None:  # a peer has it
                continue
            whole = shards[0] if len(shards) == 1 else bridge._weight_merge_across_tp(name, shards, parameter)
            del shards
            for hf_name, tensor in zip(*bridge._weight_to_hf_format(name, whole), strict=True):
                yield hf_name, tensor.detach()


def _named_tensors(bridge: Any, chunks: list[torch.nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """(Megatron name with global layer and expert numbers, this rank's shard), in an order that tensor-parallel peers share."""
    from mbridge.core.util import unwrap_model

    embedding_is_elsewhere = not mpu.is_pipeline_first_stage(ignore_virtual=True)
    for chunk in chunks:
        model = unwrap_model(chunk)
        global_names = bridge._weight_name_mapping_mcore_local_to_global(model)
        parameters = dict(model.named_parameters())
        # Selection biases of the experts are buffers.
        biases = {name: tensor for name, tensor in model.state_dict().items() if "expert_bias" in name and torch.is_tensor(tensor)}
        for local_name, tensor in {**biases, **parameters}.items():
            name = global_names[local_name]
            # Tied embeddings exist on the first and on the last pipeline stage, as `output_layer` there.
            if embedding_is_elsewhere and bridge._DIRECT_MAPPING.get(name) == bridge._DIRECT_MAPPING[_EMBEDDING]:
                continue
            yield name, tensor


def _gathered(shard: Tensor, group: dist.ProcessGroup, size: int) -> list[Tensor] | None:
    """The shards of a group on its first rank, None elsewhere."""
    if size == 1:
        return [shard]
    shards = [torch.empty_like(shard) for _ in range(size)] if group.rank() == 0 else None
    dist.gather(shard.contiguous(), shards, dst=dist.get_global_rank(group, 0), group=group)
    return shards
